//! Debian packages that a command needs: installed on demand as root, otherwise named in one line.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::paths;

/// What a command needs: a file that proves it is there, and the package that brings it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Need {
    /// A program in `PATH`, or an absolute path, where a last component may end in `*`.
    pub(crate) proof: &'static str,
    /// Debian's package.
    pub(crate) package: &'static str,
}

const fn need(proof: &'static str, package: &'static str) -> Need {
    Need { proof, package }
}

/// QEMU, and what makes a disk for it.
pub(crate) const QEMU: &[Need] = &[
    need("qemu-system-x86_64", "qemu-system-x86"),
    need("/usr/share/seabios/bios-256k.bin", "seabios"),
    need("mke2fs", "e2fsprogs"),
];
/// Real Xen with a Debian dom0.
pub(crate) const XEN: &[Need] = &[
    need("/boot/xen-4.17-amd64.gz", "xen-hypervisor-4.17-amd64"),
    need("/usr/lib/xen-4.17/bin/xl", "xen-utils-4.17"),
    need("/usr/bin/xenstore-ls", "xenstore-utils"),
    need("/etc/xen/xl.conf", "xen-utils-common"),
    need("/boot/vmlinuz-6.1.0-*-amd64", "linux-image-amd64"),
    need("/bin/busybox", "busybox-static"),
    need("curl", "curl"),
    need("modprobe", "kmod"),
    need("xz", "xz-utils"),
];
/// Boot images with GRUB for BIOS and UEFI, and a UEFI firmware.
pub(crate) const GRUB: &[Need] = &[
    need("grub-mkrescue", "grub-common"),
    need("/usr/lib/grub/i386-pc", "grub-pc-bin"),
    need("/usr/lib/grub/x86_64-efi", "grub-efi-amd64-bin"),
    need("xorriso", "xorriso"),
    need("mformat", "mtools"),
    need("/usr/share/ovmf/OVMF.fd", "ovmf"),
];
/// Debian's cloud kernel as a guest: the bench's other side.
pub(crate) const CLOUD: &[Need] = &[
    need("/boot/vmlinuz-6.1.0-*-cloud-amd64", "linux-image-cloud-amd64"),
    need("/bin/busybox", "busybox-static"),
    need("modprobe", "kmod"),
    need("xz", "xz-utils"),
];
/// Real KVM, in a Debian kernel in QEMU.
pub(crate) const KVM_LAB: &[Need] = &[
    need("/boot/vmlinuz-6.1.0-*-cloud-amd64", "linux-image-cloud-amd64"),
    need("/bin/busybox", "busybox-static"),
    need("curl", "curl"),
    need("lz4", "lz4"),
    need("modprobe", "kmod"),
    need("xz", "xz-utils"),
];
/// The debugger that the VMM's stub is tested with.
pub(crate) const GDB: &[Need] = &[need("gdb", "gdb")];
/// The Xen headers, against which the ABI structures are checked.
pub(crate) const HEADERS: &[Need] =
    &[need("/usr/include/xen/xen.h", "libxen-dev"), need("cc", "gcc"), need("make", "make")];

/// What people make disk images with: the file systems' tests read what these write.
pub(crate) const FILE_SYSTEMS: &[Need] = &[
    need("mke2fs", "e2fsprogs"),
    need("mkfs.vfat", "dosfstools"),
    need("mcopy", "mtools"),
    need("tar", "tar"),
    need("cpio", "cpio"),
];

/// Debian's own Rust, for a machine that reaches no Rust toolchain server.
pub(crate) const RUST_WEB: &[&str] = &["rustc-web", "cargo-web", "rust-web-src"];

/// Whether this process may install packages.
pub(crate) fn may_install() -> bool {
    std::env::var_os("JANUS_NO_INSTALL").is_none()
        && is_root()
        && paths::program(&["apt-get"]).is_some()
}

fn is_root() -> bool {
    // The owner of /proc/self is this process's effective user.
    use std::os::unix::fs::MetadataExt as _;
    std::fs::metadata("/proc/self").is_ok_and(|meta| meta.uid() == 0)
}

impl Need {
    fn is_met(self) -> bool {
        let path = Path::new(self.proof);
        if !path.is_absolute() {
            return paths::program(&[self.proof]).is_some();
        }
        path.exists() || self.proof.contains('*') && newest(self.proof).is_some()
    }
}

/// The file that matches `pattern` (one `*`, in the last component) and sorts last by version number.
pub(crate) fn newest(pattern: &str) -> Option<PathBuf> {
    let path = Path::new(pattern);
    let (head, tail) = path.file_name()?.to_str()?.split_once('*')?;
    let middle_number = |name: &str| -> Option<u64> {
        // Only digits may stand for the star: `-cloud-amd64` is not `-amd64`.
        name.strip_prefix(head)?.strip_suffix(tail)?.parse().ok()
    };
    std::fs::read_dir(path.parent()?)
        .ok()?
        .filter_map(|entry| {
            let entry = entry.ok()?;
            Some((middle_number(entry.file_name().to_str()?)?, entry.path()))
        })
        .max()
        .map(|(_, path)| path)
}

/// Sees to it that everything in `needs` is there.
///
/// # Errors
/// Something is missing and cannot be installed from here; the message is the command that installs it.
pub(crate) fn ensure(needs: &[&[Need]]) -> Result<()> {
    let missing: Vec<&str> = missing(needs);
    if missing.is_empty() {
        return Ok(());
    }
    if !may_install() {
        bail!("missing packages; install them with: {}", install_line(&missing));
    }
    install(&missing)?;
    let still = self::missing(needs);
    if !still.is_empty() {
        bail!("installed, yet what these packages bring was not found: {}", still.join(" "));
    }
    Ok(())
}

/// The packages of `needs` that are not there.
pub(crate) fn missing(needs: &[&[Need]]) -> Vec<&'static str> {
    let mut missing: Vec<_> =
        needs.iter().copied().flatten().filter(|need| !need.is_met()).map(|n| n.package).collect();
    missing.sort_unstable();
    missing.dedup();
    missing
}

fn install_line(packages: &[&str]) -> String {
    format!("apt-get install -y --no-install-recommends {}", packages.join(" "))
}

/// Installs Debian packages; those that the package list at hand knows.
///
/// # Errors
/// `apt-get` fails.
pub(crate) fn install(packages: &[&str]) -> Result<()> {
    eprintln!("janus: installing {} (Debian packages)", packages.join(" "));
    let arguments = install_arguments(packages);
    // An old package list is enough when it is enough; it is fetched anew only when installing fails.
    if apt_get(&arguments)? {
        return Ok(());
    }
    install_from_new_list(packages, arguments)
}

/// Installs the newest version of Debian packages: for those of which an old one is of no use.
///
/// # Errors
/// `apt-get` fails.
pub(crate) fn install_newest(packages: &[&str]) -> Result<()> {
    eprintln!("janus: installing the newest {} (Debian packages)", packages.join(" "));
    install_from_new_list(packages, install_arguments(packages))
}

fn install_arguments<'a>(packages: &[&'a str]) -> Vec<&'a str> {
    let mut arguments = vec![
        "install",
        "-y",
        "--no-install-recommends",
        "--allow-downgrades",
        "-o=Dpkg::Use-Pty=0",
    ];
    arguments.extend(packages);
    arguments
}

fn install_from_new_list(packages: &[&str], mut arguments: Vec<&str>) -> Result<()> {
    // Without a network the old list may still do, with what is in apt's cache.
    let _ = apt_get(&["update"])?;
    if apt_get(&arguments)? {
        return Ok(());
    }
    // A backported qemu-utils conflicts with Debian 12's QEMU: take it back to the release's own.
    if packages.contains(&"qemu-system-x86") {
        arguments.push("qemu-utils/bookworm");
        if apt_get(&arguments)? {
            return Ok(());
        }
    }
    bail!("`{}` failed; see {}", install_line(packages), log()?.display())
}

fn log() -> Result<PathBuf> {
    Ok(paths::cache("log")?.join("apt.log"))
}

/// Runs it with its output in the log; answers whether it succeeded.
fn apt_get(arguments: &[&str]) -> Result<bool> {
    let output = std::fs::File::options().create(true).append(true).open(log()?)?;
    let status = Command::new("apt-get")
        .args(arguments)
        .env("DEBIAN_FRONTEND", "noninteractive")
        .stdin(Stdio::null())
        .stdout(output.try_clone()?)
        .stderr(output)
        .status()
        .context("cannot start apt-get")?;
    Ok(status.success())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_number_stands_for_the_star_and_the_highest_wins() {
        let dir = paths::cache("test-newest").unwrap();
        for name in
            ["vmlinuz-6.1.0-9-amd64", "vmlinuz-6.1.0-10-amd64", "vmlinuz-6.1.0-11-cloud-amd64"]
        {
            std::fs::write(dir.join(name), "").unwrap();
        }
        let pattern = dir.join("vmlinuz-6.1.0-*-amd64");
        let found = newest(pattern.to_str().unwrap()).unwrap();
        assert_eq!(found.file_name().unwrap(), "vmlinuz-6.1.0-10-amd64");
    }

    #[test]
    fn a_missing_file_names_its_package_once() {
        let needs =
            [need("/nonexistent/a", "one"), need("/nonexistent/b", "one"), need("/proc", "two")];
        assert_eq!(missing(&[&needs]), ["one"]);
    }
}

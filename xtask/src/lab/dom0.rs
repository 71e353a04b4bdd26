//! What the lab boots: Xen, the dom0 kernel as an ELF file, and dom0's initramfs, all from Debian packages.
//!
//! The initramfs is two cpio archives: the base (cached) and the images of this run. Its `/init`
//! starts xenstored and xenconsoled and then obeys command lines on a virtio-serial port.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, PoisonError};

use anyhow::{Context, Result, bail};

use crate::cpio::Cpio;
use crate::{packages, paths, process};

/// Where the parts are, ready for QEMU.
#[derive(Clone, Debug)]
pub(crate) struct Parts {
    /// Xen, unpacked: a 32-bit multiboot ELF.
    pub(crate) xen: PathBuf,
    /// The dom0 kernel, unpacked: 2.4 s less inside Xen.
    pub(crate) kernel: PathBuf,
    /// The base of the initramfs.
    pub(crate) base: PathBuf,
}

const BINARIES: &[&str] =
    &["xl", "xenstored", "xenconsoled", "xenconsole", "xen-init-dom0", "libxl-save-helper"];
const XENSTORE: &[&str] = &["ls", "read", "write", "list", "chmod", "rm", "exists", "watch"];
const MODULES: &[&str] = &[
    "xen-privcmd",
    "xenfs",
    "xen-evtchn",
    "xen-gntdev",
    "xen-gntalloc",
    "xen-blkback",
    "xen-netback",
    "loop",
    "brd",
    "virtio_pci",
    "virtio_console",
    "virtio_blk",
];

const INIT: &str = include_str!("init.sh");
const BLOCK_SCRIPT: &str = include_str!("block.sh");
const VIF_SCRIPT: &str = include_str!("vif.sh");

/// Assembles the parts, or finds them assembled.
///
/// # Errors
/// A package is missing, or a tool fails.
pub(crate) fn assemble() -> Result<Parts> {
    // The lab's rows and those in dom0's place begin at the same time; one of them does the work.
    static ASSEMBLING: Mutex<()> = Mutex::new(());
    let _assembling = ASSEMBLING.lock().unwrap_or_else(PoisonError::into_inner);
    packages::ensure(&[packages::XEN])?;
    let cache = paths::cache("lab")?;
    let source =
        packages::newest("/boot/vmlinuz-6.1.0-*-amd64").context("no dom0 kernel in /boot")?;
    let version = kernel_version(&source)?;
    let hypervisor = Path::new("/boot/xen-4.17-amd64.gz");
    let parts = Parts {
        xen: cache.join("xen.elf"),
        kernel: cache.join(format!("vmlinux-{version}")),
        base: cache.join("dom0-base.cpio"),
    };
    if !is_newer(&parts.xen, hypervisor) {
        unpack("gzip", &std::fs::read(hypervisor)?, &parts.xen)?;
    }
    if !is_newer(&parts.kernel, &source) {
        unpack_kernel(&source, &parts.kernel)?;
    }
    // This program holds the scripts: a newer one may hold newer scripts.
    let this = std::env::current_exe()?;
    if !is_newer(&parts.base, &this) || !is_newer(&parts.base, &source) {
        write(&parts.base, &base(&version)?)?;
    }
    Ok(parts)
}

/// The release in a kernel's file name: `6.1.0-56-amd64` of `vmlinuz-6.1.0-56-amd64`.
pub(crate) fn kernel_version(kernel: &Path) -> Result<String> {
    let name = kernel.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    Ok(name.strip_prefix("vmlinuz-").context("not a kernel's file name")?.to_owned())
}

pub(super) fn is_newer(made: &Path, source: &Path) -> bool {
    let time = |path: &Path| std::fs::metadata(path).and_then(|meta| meta.modified());
    matches!((time(made), time(source)), (Ok(made), Ok(source)) if made >= source)
}

/// Replaces a file as a whole: another run may be reading it.
pub(super) fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    paths::replace(path, bytes).with_context(|| format!("cannot write {}", path.display()))
}

/// Decompresses `bytes` with `gzip` or `xz` into `target`.
fn unpack(tool: &str, bytes: &[u8], target: &Path) -> Result<()> {
    let packed = paths::fresh(target);
    std::fs::write(&packed, bytes)?;
    let output = Command::new(tool).arg("-dc").stdin(std::fs::File::open(&packed)?).output();
    std::fs::remove_file(&packed)?;
    let output = output.with_context(|| format!("cannot start {tool}"))?;
    if !output.status.success() {
        bail!("{tool} -dc failed: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    write(target, &output.stdout)
}

/// Takes the ELF file out of a bzImage (Documentation/arch/x86/boot.rst: `payload_offset`, `payload_length`).
pub(super) fn unpack_kernel(source: &Path, target: &Path) -> Result<()> {
    let image = std::fs::read(source)?;
    let word = |at: usize| -> Option<usize> {
        let bytes: [u8; 4] = image.get(at..at + 4)?.try_into().ok()?;
        usize::try_from(u32::from_le_bytes(bytes)).ok()
    };
    let payload = || -> Option<&[u8]> {
        let sectors = usize::from(*image.get(0x1f1)?) + 1;
        let start = sectors * 512 + word(0x248)?;
        // The last four bytes are the unpacked length, not part of the compressed stream.
        image.get(start..start + word(0x24c)?.checked_sub(4)?)
    };
    let payload = payload().with_context(|| format!("{} is not a bzImage", source.display()))?;
    let tool = match payload {
        [0xfd, b'7', b'z', ..] => "xz",
        [0x1f, 0x8b, ..] => "gzip",
        [0x28, 0xb5, 0x2f, 0xfd, ..] => "zstd",
        [0x02, 0x21, 0x4c, 0x18, ..] => "lz4",
        _ => bail!("{} is compressed in an unknown way", source.display()),
    };
    unpack(tool, payload, target)
}

/// The base of the initramfs: toolstack, busybox, curl, kernel modules, scripts.
fn base(version: &str) -> Result<Vec<u8>> {
    eprintln!("janus: assembling dom0 from Debian packages");
    let mut archive = Cpio::default();
    for directory in [
        "proc",
        "sys",
        "dev",
        "run",
        "tmp",
        "etc",
        "images",
        "var/log/xen",
        "var/lib/xen",
        "var/lock",
    ] {
        archive.directory(directory);
    }
    archive.symlink("var/run", "../run");
    for name in BINARIES {
        add_program(&mut archive, &Path::new("/usr/lib/xen-4.17/bin").join(name))?;
    }
    for name in XENSTORE {
        add_program(&mut archive, Path::new(&format!("/usr/bin/xenstore-{name}")))?;
    }
    add_program(&mut archive, &paths::program(&["curl"]).context("no curl")?)?;
    // Loaded at run time by pthread_cancel, so that ldd does not show it; without it xl aborts at exit.
    archive.copy(Path::new("/lib/x86_64-linux-gnu/libgcc_s.so.1"))?;
    archive.file("etc/xen/xl.conf", b"autoballoon=\"off\"\n");
    add_busybox(&mut archive)?;
    let mut list = String::new();
    for module in modules(version, MODULES)? {
        let name = module.file_name().and_then(|name| name.to_str()).context("module name")?;
        archive.file(&format!("lib/modules/{name}"), &std::fs::read(&module)?);
        list.push_str(name);
        list.push('\n');
    }
    archive.file("lib/modules/order", list.as_bytes());
    archive.file("init", INIT.as_bytes());
    archive.file("etc/xen/scripts/janus-block", BLOCK_SCRIPT.as_bytes());
    archive.file("etc/xen/scripts/janus-vif", VIF_SCRIPT.as_bytes());
    Ok(archive.finish())
}

/// Adds busybox and a link for each of its tools.
pub(crate) fn add_busybox(archive: &mut Cpio) -> Result<()> {
    let busybox = Path::new("/bin/busybox");
    archive.file("bin/busybox", &std::fs::read(busybox).context("no busybox-static")?);
    for tool in process::output(Command::new(busybox).arg("--list"))?.lines() {
        archive.symlink(&format!("bin/{tool}"), "busybox");
    }
    Ok(())
}

/// Adds a program with the shared libraries that ldd names.
pub(super) fn add_program(archive: &mut Cpio, program: &Path) -> Result<()> {
    archive.copy(program)?;
    let libraries = process::output(Command::new("ldd").arg(program))?;
    for library in libraries.split_whitespace().filter(|word| word.starts_with('/')) {
        archive.copy(Path::new(library))?;
    }
    Ok(())
}

/// The files of kernel modules with those they depend on, in the order of loading.
pub(crate) fn modules(version: &str, names: &[&str]) -> Result<Vec<PathBuf>> {
    let modprobe = paths::program(&["modprobe"]).context("no modprobe")?;
    let mut files: Vec<PathBuf> = Vec::new();
    for name in names {
        let shown =
            process::output(Command::new(&modprobe).args(["-S", version, "--show-depends", name]))?;
        for file in shown.lines().filter_map(|line| line.strip_prefix("insmod ")) {
            let file = PathBuf::from(file.trim());
            if !files.contains(&file) {
                files.push(file);
            }
        }
    }
    Ok(files)
}

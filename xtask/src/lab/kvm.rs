//! The KVM lab: Debian's cloud kernel with its own KVM, inside QEMU's TCG, which emulates AMD's virtualisation.
//!
//! As the Xen lab it obeys command lines on one port, and one boot serves many guests. A guest here is a shell
//! command, as a rule `janus run`, whose output comes back line by line under its name.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use clap::Args;

use super::{Guest, Lab, dom0, initramfs, own_directory};
use crate::console::Echo;
use crate::cpio::Cpio;
use crate::{guest, packages, paths, vmm};

const INIT: &str = include_str!("kvm.sh");
const MODULES: &[&str] =
    &["kvm-amd", "virtio_pci", "virtio_console", "virtio_blk", "tun", "vhost_vsock"];

/// What a KVM lab is started with.
#[derive(Clone, Debug, Default)]
pub(crate) struct KvmSetup {
    /// Files that it has as `/images/NAME`; `janus` among them.
    pub(crate) images: Vec<(String, PathBuf)>,
    /// Raw disk images that it has as `/dev/vda`, `/dev/vdb`, ...; written to in memory only.
    pub(crate) disks: Vec<PathBuf>,
    /// CPUs of the machine; 0 for the usual one.
    pub(crate) cpus: u32,
    /// Memory of the machine, in MiB; 0 for the usual 1536.
    pub(crate) memory_mib: u32,
}

/// What the lab boots.
struct Parts {
    kernel: PathBuf,
    base: PathBuf,
}

/// Assembles the parts, or finds them assembled.
fn assemble() -> Result<Parts> {
    static ASSEMBLING: Mutex<()> = Mutex::new(());
    let _assembling = ASSEMBLING.lock().unwrap_or_else(PoisonError::into_inner);
    packages::ensure(&[packages::QEMU, packages::KVM_LAB])?;
    let cache = paths::cache("lab")?;
    let source = packages::newest("/boot/vmlinuz-6.1.0-*-cloud-amd64")
        .context("no cloud kernel in /boot")?;
    let version = dom0::kernel_version(&source)?;
    let parts = Parts {
        kernel: cache.join(format!("vmlinux-{version}")),
        base: cache.join("kvm-base.cpio"),
    };
    if !dom0::is_newer(&parts.kernel, &source) {
        dom0::unpack_kernel(&source, &parts.kernel)?;
    }
    let this = std::env::current_exe()?;
    if !dom0::is_newer(&parts.base, &this) || !dom0::is_newer(&parts.base, &source) {
        dom0::write(&parts.base, &base(&version)?)?;
    }
    Ok(parts)
}

/// The base of the initramfs: busybox, curl, kernel modules, `/init`.
fn base(version: &str) -> Result<Vec<u8>> {
    eprintln!("janus: assembling the KVM lab from Debian packages");
    let mut archive = Cpio::default();
    for directory in ["proc", "sys", "dev", "run", "tmp", "images"] {
        archive.directory(directory);
    }
    dom0::add_program(&mut archive, &paths::program(&["curl"]).context("no curl")?)?;
    // For a VMM that is not linked with musl; its other libraries are curl's too.
    for library in ["libgcc_s.so.1", "libm.so.6"] {
        archive.copy(&Path::new("/lib/x86_64-linux-gnu").join(library))?;
    }
    dom0::add_busybox(&mut archive)?;
    let mut list = String::new();
    for module in dom0::modules(version, MODULES)? {
        let name = module.file_name().and_then(|name| name.to_str()).context("module name")?;
        archive.file(&format!("lib/modules/{name}"), &std::fs::read(&module)?);
        list.push_str(name);
        list.push('\n');
    }
    archive.file("lib/modules/order", list.as_bytes());
    archive.file("init", INIT.as_bytes());
    Ok(archive.finish())
}

impl Lab {
    /// Boots a Debian kernel with KVM.
    ///
    /// # Errors
    /// A package is missing, or the lab does not come up within its time.
    pub(crate) fn start_kvm(setup: &KvmSetup, echo: Echo) -> Result<Self> {
        let parts = assemble()?;
        let directory = own_directory()?;
        let initrd = initramfs(&parts.base, &directory, &setup.images)?;
        let or = |value: u32, usual: u32| if value == 0 { usual } else { value };
        let mut qemu = Command::new("qemu-system-x86_64");
        qemu.args(["-accel", "tcg,thread=multi", "-M", "q35", "-cpu", "max"])
            .arg("-smp")
            .arg(or(setup.cpus, 1).to_string())
            .arg("-m")
            .arg(or(setup.memory_mib, 1536).to_string())
            .args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"])
            .args(["-serial", "stdio"])
            .arg("-kernel")
            .arg(&parts.kernel)
            .arg("-initrd")
            .arg(&initrd)
            // On a busy host TCG's timer is too late for the check that the kernel makes of it.
            .args([
                "-append",
                "console=ttyS0 quiet panic=-1 reboot=t mitigations=off no_timer_check",
            ]);
        Self::boot(qemu, &setup.disks, directory, echo)
    }

    /// Starts a shell command that runs beside whatever comes next; its end is `lab: ended NAME STATUS`.
    ///
    /// # Errors
    /// The lab died.
    pub(crate) fn launch(&mut self, name: &str, command: &str) -> Result<Guest> {
        self.run(&format!("mkfifo /run/{name}.in"), Duration::from_secs(10))?;
        self.begin(name, command)
    }
}

/// A word for the shell.
pub(crate) fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./,:=@%+".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        return word.to_owned();
    }
    format!("'{}'", word.replace('\'', "'\\''"))
}

/// Runs `janus` where there is real KVM: a Debian kernel inside QEMU.
#[derive(Clone, Debug, Args)]
pub(crate) struct KvmArguments {
    /// A file of this machine that the lab has as `/images/NAME`. May be repeated; `janus` itself and the default
    /// image (as `janus-kernel`) are there already.
    #[arg(long = "file", value_name = "NAME=PATH", value_parser = file)]
    files: Vec<(String, PathBuf)>,
    /// A raw disk image that it has as `/dev/vda`, ...; what is written to it is thrown away. May be repeated.
    #[arg(long, value_name = "FILE")]
    disk: Vec<PathBuf>,
    /// CPUs of the machine.
    #[arg(long, default_value_t = 1)]
    cpus: u32,
    /// Memory of the machine in MiB.
    #[arg(long, default_value_t = 1536)]
    memory: u32,
    /// Seconds the command may take.
    #[arg(long, default_value_t = 60)]
    timeout: u64,
    /// A shell command of the lab, instead of a command line of `janus`.
    #[arg(long, conflicts_with = "arguments")]
    sh: Option<String>,
    /// The command line of `janus`: `run /images/janus-kernel ...` if there is none.
    #[arg(last = true)]
    arguments: Vec<String>,
}

fn file(text: &str) -> Result<(String, PathBuf), String> {
    let parts = text.split_once('=').filter(|(name, _)| !name.is_empty() && !name.contains('/'));
    parts
        .map(|(name, path)| (name.to_owned(), path.into()))
        .ok_or_else(|| format!("`{text}` is not NAME=PATH"))
}

/// Runs it; the answer is the command's status.
///
/// # Errors
/// The lab fails, or the command does not end in time.
pub(crate) fn kvm(arguments: &KvmArguments) -> Result<ExitCode> {
    let mut setup = KvmSetup {
        images: vec![
            ("janus".to_owned(), vmm::build()?),
            (guest::DEFAULT_IMAGE.to_owned(), guest::build(guest::DEFAULT_IMAGE)?),
        ],
        disks: arguments.disk.clone(),
        cpus: arguments.cpus,
        memory_mib: arguments.memory,
    };
    setup.images.extend(arguments.files.iter().cloned());
    let mut command = match &arguments.sh {
        Some(command) => command.clone(),
        None => "janus".to_owned(),
    };
    let default = ["run".to_owned(), format!("/images/{}", guest::DEFAULT_IMAGE)];
    let words = if arguments.arguments.is_empty() { &default[..] } else { &arguments.arguments };
    if arguments.sh.is_none() {
        for word in words {
            // Writing to a String cannot fail.
            let _ = write!(command, " {}", quoted(word));
        }
    }
    eprintln!("janus: booting a kernel with KVM in QEMU");
    let mut lab = Lab::start_kvm(&setup, Echo::Live)?;
    let ready = lab.age();
    eprintln!("janus: KVM is ready after {ready:.1} s");
    let begun = Instant::now();
    let guest = lab.launch("kvm", &command)?;
    let ended = lab.end(&guest, Duration::from_secs(arguments.timeout))?;
    let status = ended.reason.context("the command has no status")?;
    let seconds = begun.elapsed().as_secs_f32();
    eprintln!("janus: ended with {status} after {seconds:.1} s");
    Ok(ExitCode::from(u8::try_from(status).unwrap_or(1)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_reach_the_shell_as_they_are() {
        assert_eq!(quoted("--memory=1G"), "--memory=1G");
        assert_eq!(quoted("echo 'a'"), r"'echo '\''a'\'''");
        assert_eq!(quoted(""), "''");
    }
}

//! `cargo xtask run`: the default image with a disk and a network, and its shell on this terminal.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use clap::{Args, ValueEnum};

use crate::console::Echo;
use crate::matrix::judge::reported_exit;
use crate::qemu::{self, Boot, Disk, Machine, Vm};
use crate::{disk, guest, lab, packages, process, vmm};

/// Where to boot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Where {
    /// The bundled VMM: a Xen PV guest as a process, without root.
    Janus,
    /// QEMU, PCI Express (virtio-pci).
    Q35,
    /// QEMU without PCI (virtio-mmio).
    Microvm,
    /// QEMU's old PC (virtio-pci).
    Pc,
    /// Real Xen in QEMU, as a PV guest.
    XenPv,
    /// Real Xen in QEMU, as a PVH guest.
    XenPvh,
}

/// Boots the default image and lands in its shell. Leave with `poweroff`; or Ctrl-], and Ctrl-A x in QEMU.
#[derive(Clone, Debug, Args)]
pub(crate) struct RunArguments {
    /// Where to boot.
    #[arg(long, alias = "on", value_enum, default_value = "janus")]
    machine: Where,
    /// A raw disk image; a small ext4 one with a web page if none is given. May be repeated.
    #[arg(long, value_name = "FILE")]
    disk: Vec<PathBuf>,
    /// Forwards a TCP port of this machine to the guest; 8080:80 if none is given. May be repeated.
    #[arg(short = 'p', long = "port", value_name = "HOST:GUEST", value_parser = forward)]
    ports: Vec<(u16, u16)>,
    /// Adds to the kernel command line.
    #[arg(long, default_value = "", allow_hyphen_values = true)]
    append: String,
    /// Runs these shell commands in the guest instead of its shell, and ends with their status.
    #[arg(long, value_name = "COMMANDS")]
    exec: Option<String>,
    /// Guest memory in MiB.
    #[arg(long, default_value_t = 256)]
    memory: u32,
    /// Virtual CPUs.
    #[arg(long, default_value_t = 1)]
    cpus: u32,
    /// Another kernel than the default image.
    #[arg(long, value_name = "PATH")]
    image: Option<PathBuf>,
}

fn forward(text: &str) -> Result<(u16, u16), String> {
    let parts = text
        .split_once(':')
        .and_then(|(host, guest)| Some((host.parse().ok()?, guest.parse().ok()?)));
    parts.ok_or_else(|| format!("`{text}` is not HOST:GUEST, two port numbers"))
}

/// Quotes shell commands as one word of the kernel command line.
///
/// # Errors
/// They hold both kinds of quotes.
pub(crate) fn exec_words(commands: &str) -> Result<String> {
    match (commands.contains('\''), commands.contains('"')) {
        (false, _) => Ok(format!("--exec '{commands}'")),
        (true, false) => Ok(format!("--exec \"{commands}\"")),
        (true, true) => bail!("commands with both ' and \" do not fit on a kernel command line"),
    }
}

/// Runs it; the answer is the guest's exit code.
///
/// # Errors
/// Something it needs is missing, or the machine fails.
pub(crate) fn run(arguments: &RunArguments) -> Result<ExitCode> {
    if arguments.machine != Where::Janus {
        packages::ensure(&[packages::QEMU])?;
    }
    let image = match &arguments.image {
        Some(image) => image.clone(),
        None => guest::build(guest::DEFAULT_IMAGE)?,
    };
    let disks =
        if arguments.disk.is_empty() { vec![disk::demo()?] } else { arguments.disk.clone() };
    let mut append = arguments.append.clone();
    if let Some(commands) = &arguments.exec {
        append = format!("{append} {}", exec_words(commands)?);
    }
    let append = append.trim().to_owned();
    let xen = |mode| {
        let (memory, cpus) = (arguments.memory, arguments.cpus);
        lab::command::shell(mode, image.clone(), disks.clone(), append.clone(), memory, cpus)
    };
    let machine = match arguments.machine {
        Where::Janus => return bundled(arguments, &image, &disks, &append),
        Where::Q35 => Machine::Q35,
        Where::Microvm => Machine::Microvm,
        Where::Pc => Machine::Pc,
        Where::XenPv => {
            return xen(lab::Mode::Pv);
        }
        Where::XenPvh => {
            return xen(lab::Mode::Pvh);
        }
    };
    let mut forwards = arguments.ports.clone();
    if forwards.is_empty() {
        forwards.push((qemu::free_port(8080)?, 80));
    }
    let keep_writes = !arguments.disk.is_empty();
    let mut vm = Vm::new(machine, Boot::Kernel(image));
    vm.append = append;
    vm.disks = disks.into_iter().map(|file| Disk { file, keep_writes }).collect();
    vm.memory_mib = arguments.memory;
    vm.cpus = arguments.cpus;
    if arguments.exec.is_none() {
        for (host, guest) in &forwards {
            eprintln!("janus: http://127.0.0.1:{host}/ reaches the guest's port {guest}");
        }
        eprintln!("janus: leave with `poweroff`, or Ctrl-A x");
        vm.serial = "mon:stdio";
    }
    vm.forwards = Some(forwards);
    let mut command = vm.command();
    if arguments.exec.is_some() {
        return unattended(&mut command);
    }
    let status = command.status().context("cannot start qemu-system-x86_64")?;
    match qemu::exit_code(status) {
        Some(code) => Ok(ExitCode::from(code)),
        None => bail!("QEMU failed ({status})"),
    }
}

/// Runs it in the bundled VMM.
fn bundled(
    arguments: &RunArguments,
    image: &Path,
    disks: &[PathBuf],
    append: &str,
) -> Result<ExitCode> {
    let mut command = std::process::Command::new(vmm::build()?);
    // The engine that is there on every machine: no look at /dev/kvm.
    command.arg("run").arg(image).arg("--engine=monitor");
    command.arg(format!("--memory={}M", arguments.memory));
    command.arg(format!("--cpus={}", arguments.cpus));
    if !append.is_empty() {
        command.arg(format!("--append={append}"));
    }
    // A disk of the user's own keeps what is written.
    let option = if arguments.disk.is_empty() { ",snapshot" } else { "" };
    for disk in disks {
        command.arg("--disk").arg(format!("{}{option}", disk.display()));
    }
    let mut ports = arguments.ports.clone();
    if ports.is_empty() {
        ports.push((qemu::free_port(8080)?, 80));
    }
    for (host, guest) in ports {
        command.args(["--publish", &format!("{host}:{guest}")]);
        if arguments.exec.is_none() {
            eprintln!("janus: http://127.0.0.1:{host}/ reaches the guest's port {guest}");
        }
    }
    let status = command.status().context("cannot start the VMM")?;
    let code = status.code().and_then(|code| u8::try_from(code).ok());
    code.map(ExitCode::from).with_context(|| format!("the VMM failed ({status})"))
}

/// Runs to the end without a person; the console goes to standard output, the guest's code is the answer.
fn unattended(command: &mut std::process::Command) -> Result<ExitCode> {
    let mut process = process::spawn(command.stdin(std::process::Stdio::null()), Echo::Live)?;
    let far = std::time::Instant::now() + std::time::Duration::from_hours(24);
    let status = process.end(far)?.context("the guest ran for a day")?;
    process.console.finished(std::time::Instant::now() + std::time::Duration::from_secs(2));
    // QEMU's status has room for four bits of the code.
    match reported_exit(&process.console.text()).or(qemu::exit_code(status)) {
        Some(code) => Ok(ExitCode::from(code)),
        None => bail!("QEMU failed ({status}){}", process.errors.tail(5)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_and_commands_are_checked_before_anything_starts() {
        assert_eq!(forward("8080:80"), Ok((8080, 80)));
        assert!(forward("8080").is_err() && forward("99999:80").is_err());
        assert_eq!(exec_words("ls /").unwrap(), "--exec 'ls /'");
        assert_eq!(exec_words("echo 'a b'").unwrap(), "--exec \"echo 'a b'\"");
        assert!(exec_words("'\"").is_err());
    }
}

//! QEMU command lines: which machine, which door, which devices.

use std::net::TcpListener;
use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicU16, Ordering};

use anyhow::{Context as _, Result};
use clap::ValueEnum;

/// A machine type of QEMU, run by TCG: the only accelerator that is everywhere the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Machine {
    /// PCI Express: virtio-pci with MSI-X.
    Q35,
    /// No PCI: virtio-mmio.
    Microvm,
    /// The old PC: virtio-pci.
    Pc,
}

/// How the guest gets in.
#[derive(Clone, Debug)]
pub(crate) enum Boot {
    /// QEMU's own loader: multiboot 1, or the PVH note, or a Linux image.
    Kernel(PathBuf),
    /// Linux's 64-bit boot protocol: QEMU starts the loader, which takes the kernel as its first module.
    Linux64 {
        /// See [`crate::linux_loader`].
        loader: PathBuf,
        /// The ELF file it loads.
        kernel: PathBuf,
    },
    /// A CD with GRUB, through SeaBIOS.
    Bios(PathBuf),
    /// A CD with GRUB, through OVMF.
    Uefi(PathBuf),
}

/// A disk.
#[derive(Clone, Debug)]
pub(crate) struct Disk {
    /// Raw image.
    pub(crate) file: PathBuf,
    /// Whether the guest's writes reach the file.
    pub(crate) keep_writes: bool,
}

/// A machine to start.
#[derive(Clone, Debug)]
pub(crate) struct Vm {
    /// Machine type.
    pub(crate) machine: Machine,
    /// The way in.
    pub(crate) boot: Boot,
    /// Kernel command line (with [`Boot::Kernel`]; GRUB's images carry their own).
    pub(crate) append: String,
    /// A module, or Linux's initramfs.
    pub(crate) initrd: Option<PathBuf>,
    /// In order.
    pub(crate) disks: Vec<Disk>,
    /// A user-mode network, and the ports forwarded to the guest: (host, guest). `None`: no network card.
    pub(crate) forwards: Option<Vec<(u16, u16)>>,
    /// MiB.
    pub(crate) memory_mib: u32,
    /// Virtual CPUs.
    pub(crate) cpus: u32,
    /// `mon:stdio` for a person, `stdio` for a program.
    pub(crate) serial: &'static str,
}

impl Vm {
    /// A machine with 256 MiB and nothing else in it.
    pub(crate) fn new(machine: Machine, boot: Boot) -> Self {
        Self {
            machine,
            boot,
            append: String::new(),
            initrd: None,
            disks: Vec::new(),
            forwards: None,
            memory_mib: 256,
            cpus: 1,
            serial: "stdio",
        }
    }

    /// The command that starts it.
    pub(crate) fn command(&self) -> Command {
        let mut qemu = Command::new("qemu-system-x86_64");
        let machine = match self.machine {
            Machine::Q35 => "q35",
            Machine::Microvm => "microvm",
            Machine::Pc => "pc",
        };
        qemu.args(["-accel", "tcg", "-M", machine, "-cpu", "max", "-smp"])
            .arg(self.cpus.to_string())
            .arg("-m")
            .arg(self.memory_mib.to_string())
            .args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"])
            .args(["-serial", self.serial])
            .args(["-device", "isa-debug-exit,iobase=0xf4,iosize=4"]);
        let bus = if self.machine == Machine::Microvm {
            qemu.args(["-global", "virtio-mmio.force-legacy=false"]);
            "device"
        } else {
            qemu.args(["-device", "pvpanic"]);
            "pci"
        };
        match &self.boot {
            Boot::Kernel(kernel) => {
                qemu.arg("-kernel").arg(kernel);
                if !self.append.is_empty() {
                    qemu.arg("-append").arg(&self.append);
                }
                if let Some(initrd) = &self.initrd {
                    qemu.arg("-initrd").arg(initrd);
                }
            }
            Boot::Linux64 { loader, kernel } => {
                let mut modules = kernel.clone().into_os_string();
                if let Some(initrd) = &self.initrd {
                    modules.push(",");
                    modules.push(initrd);
                }
                qemu.arg("-kernel").arg(loader).arg("-initrd").arg(modules);
                if !self.append.is_empty() {
                    qemu.arg("-append").arg(&self.append);
                }
            }
            Boot::Bios(cd) => {
                qemu.arg("-cdrom").arg(cd);
            }
            Boot::Uefi(cd) => {
                qemu.args(["-bios", crate::grub::OVMF]).arg("-cdrom").arg(cd);
            }
        }
        qemu.args(["-device", &format!("virtio-rng-{bus}")]);
        for (index, disk) in self.disks.iter().enumerate() {
            let snapshot = if disk.keep_writes { "off" } else { "on" };
            qemu.arg("-drive").arg(format!(
                "file={},if=none,id=d{index},format=raw,snapshot={snapshot},discard=unmap",
                disk.file.display()
            ));
            qemu.arg("-device").arg(format!("virtio-blk-{bus},drive=d{index}"));
        }
        if let Some(forwards) = &self.forwards {
            let mut netdev = String::from("user,id=n0");
            for (host, guest) in forwards {
                netdev.push_str(&format!(",hostfwd=tcp:127.0.0.1:{host}-:{guest}"));
            }
            qemu.args(["-netdev", &netdev, "-device", &format!("virtio-net-{bus},netdev=n0")]);
        }
        qemu
    }
}

/// The guest's exit code in QEMU's exit status: isa-debug-exit makes `value << 1 | 1` of the `0x10 | code` written.
pub(crate) fn exit_code(status: std::process::ExitStatus) -> Option<u8> {
    match status.code()? {
        // A plain power-off.
        0 => Some(0),
        status => {
            let value = u8::try_from(status).ok()? >> 1;
            (status & 1 == 1 && value & 0xf0 == 0x10).then_some(value & 0x0f)
        }
    }
}

/// `wanted` if it is free on this machine's loopback, or another port that is.
///
/// Not one of the system's choice: until QEMU takes it, the system could give it to somebody's connection.
///
/// # Errors
/// There is no free port.
pub(crate) fn free_port(wanted: u16) -> Result<u16> {
    /// Ports that no system hands out by itself (Linux: 32768 and up).
    const OURS: std::ops::Range<u16> = 20_000..32_000;
    static TAKEN: AtomicU16 = AtomicU16::new(0);
    let count = OURS.end - OURS.start;
    // Another process begins elsewhere; within this one no port is answered twice.
    let first = u16::try_from(std::process::id() % u32::from(count)).unwrap_or(0);
    let ours = (0..count).map(|_| {
        let next = u32::from(first) + u32::from(TAKEN.fetch_add(1, Ordering::Relaxed));
        OURS.start + u16::try_from(next % u32::from(count)).unwrap_or(0)
    });
    (wanted != 0)
        .then_some(wanted)
        .into_iter()
        .chain(ours)
        .find(|port| TcpListener::bind(("127.0.0.1", *port)).is_ok())
        .context("no free port on 127.0.0.1")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::process::ExitStatusExt as _;

    #[test]
    fn exit_codes_come_back_from_qemus_status() {
        let status = |code: i32| std::process::ExitStatus::from_raw(code << 8);
        assert_eq!(exit_code(status(0)), Some(0));
        assert_eq!(exit_code(status(33)), Some(0));
        assert_eq!(exit_code(status(43)), Some(5));
        assert_eq!(exit_code(status(1)), None, "QEMU's own failure");
        assert_eq!(exit_code(std::process::ExitStatus::from_raw(9)), None, "killed");
    }
}

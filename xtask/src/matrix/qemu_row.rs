//! Running a test in QEMU: by its own loader or by GRUB.

use std::io::Write as _;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{ChildStdin, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};

use super::data::{Case, Ending, Firmware, Instance, Row, Step};
use super::judge::Run;
use super::steps::{self, Fetched, Place};
use super::{command_line, disks};
use crate::console::Echo;
use crate::process::{self, Process};
use crate::qemu::{self, Boot, Disk, Machine, Vm};
use crate::{grub, linux_loader, paths};

struct QemuPlace {
    process: Process,
    cursor: usize,
    stdin: ChildStdin,
    port: u16,
    monitor: Option<PathBuf>,
}

impl Place for QemuPlace {
    fn wait(&mut self, text: &str, deadline: Instant) -> Result<()> {
        self.process
            .console
            .line(&mut self.cursor, deadline, |line| line.contains(text).then_some(()))
            .map(|_| ())
            .map_err(|missed| anyhow!("the guest {missed}"))
    }
    fn type_text(&mut self, text: &str) -> Result<()> {
        Ok(self.stdin.write_all(text.as_bytes())?)
    }
    fn fetch(&mut self, path: &str, deadline: Instant) -> Result<Fetched> {
        steps::fetch_here(&format!("http://127.0.0.1:{}{path}", self.port), deadline)
    }
    fn dom0(&mut self, _: &str, _: Instant) -> Result<()> {
        bail!("there is no dom0 on this row")
    }
    fn monitor(&mut self, command: &str) -> Result<()> {
        let path = self.monitor.as_ref().context("no monitor")?;
        let mut stream = UnixStream::connect(path).context("QEMU's monitor")?;
        stream.write_all(format!("{command}\n").as_bytes())?;
        // Closing at once could lose the command.
        std::thread::sleep(Duration::from_millis(50));
        Ok(())
    }
    fn kill(&mut self) -> Result<()> {
        self.process.kill();
        Ok(())
    }
}

/// Runs one test in a fresh machine.
///
/// # Errors
/// The machine cannot be set up; what happens in it is in the [`Run`].
pub(crate) fn run(instance: &Instance, image: &Path) -> Result<Run> {
    let case = &instance.case;
    let words = command_line(case)?;
    let module = case.module.map(disks::module).transpose()?;
    let (machine, boot) = match instance.row {
        Row::Qemu(machine) => (machine, Boot::Kernel(image.to_owned())),
        Row::Pvh(machine) | Row::PvhNoAcpi(machine) => {
            (machine, Boot::Kernel(without_multiboot(image)?))
        }
        Row::Linux64(machine) => {
            (machine, Boot::Linux64 { loader: linux_loader::build()?, kernel: image.to_owned() })
        }
        Row::Grub(protocol, firmware) => {
            let name = format!("{}-{}", instance.row_name, case.name);
            let cd = grub::cd(&name, image, protocol, &words, module.as_deref())?;
            let boot = match firmware {
                Firmware::Bios => Boot::Bios(cd),
                Firmware::Uefi => Boot::Uefi(cd),
            };
            (Machine::Q35, boot)
        }
        Row::Xen(_) | Row::Dom0(_) | Row::Monitor(_) | Row::Kvm(_) => bail!("not a row of QEMU"),
    };
    let port = qemu::free_port(0)?;
    let mut vm = Vm::new(machine, boot);
    vm.append = words;
    vm.initrd = module;
    vm.memory_mib = case.memory_mib;
    vm.cpus = case.cpus;
    vm.forwards = case.network.then(|| vec![(port, 80)]);
    for kind in &case.disks {
        vm.disks.push(Disk { file: disks::image(*kind)?, keep_writes: false });
    }
    let mut command = vm.command();
    if matches!(instance.row, Row::PvhNoAcpi(_)) {
        command.args(["-machine", "acpi=off"]);
    }
    let monitor = wants_monitor(case)
        .then(|| std::env::temp_dir().join(format!("janus-monitor-{}-{port}", std::process::id())));
    if let Some(path) = &monitor {
        command.arg("-monitor").arg(format!("unix:{},server=on,wait=off", path.display()));
    }
    let mut process = process::spawn(command.stdin(Stdio::piped()), Echo::Quiet)?;
    let stdin = process.stdin().context("no standard input")?;
    let deadline = process.started + Duration::from_secs(case.timeout_s);
    let mut place = QemuPlace { process, cursor: 0, stdin, port, monitor };
    let mut outcome = Run::default();
    match steps::run(case, &mut place, deadline) {
        Ok(killed) => outcome.killed = killed,
        Err(error) => outcome.trouble = Some(format!("{error:#}")),
    }
    finish(&mut outcome, &mut place.process, deadline, case)?;
    if let Some(path) = &place.monitor {
        // QEMU removes it itself when it ends in an orderly way.
        let _ = std::fs::remove_file(path);
    }
    Ok(outcome)
}

fn wants_monitor(case: &Case) -> bool {
    case.steps.iter().any(|step| matches!(step, Step::Monitor(_)))
}

/// Waits for the machine's end and fills in what is known then.
fn finish(outcome: &mut Run, process: &mut Process, deadline: Instant, case: &Case) -> Result<()> {
    if outcome.trouble.is_some() {
        process.kill();
    }
    let status = process.end(deadline)?;
    // The reader is done when the pipe is: at once, now that QEMU has gone.
    process.console.finished(Instant::now() + Duration::from_secs(2));
    outcome.console = process.console.text();
    match status {
        _ if outcome.killed || outcome.trouble.is_some() => {}
        None => {
            outcome.trouble =
                Some(format!("killed after {} s: it did not end by itself", case.timeout_s));
        }
        Some(status) => {
            outcome.code = qemu::exit_code(status);
            // QEMU is told not to reboot, so a machine that resets itself ends it, with status 0.
            outcome.ending = match (status.code(), outcome.code) {
                (Some(0), _) => Some(Ending::Reboot),
                (_, Some(6)) => Some(Ending::Crash),
                (_, code) => code.map(|_| Ending::PowerOff),
            };
            if outcome.code.is_none() {
                outcome.refused = outcome.console.is_empty();
                outcome.console.push_str(&process.errors.text());
            }
        }
    }
    Ok(())
}

/// Runs one test directly under Xen, in the place of dom0.
///
/// # Errors
/// The machine cannot be set up; what happens in it is in the [`Run`].
pub(crate) fn run_as_dom0(
    instance: &Instance,
    image: &Path,
    mode: crate::lab::Mode,
) -> Result<Run> {
    let case = &instance.case;
    let mut command = crate::lab::dom0_smoke(mode, image, &command_line(case)?)?;
    let mut process = process::spawn(command.stdin(Stdio::null()), Echo::Quiet)?;
    let deadline = process.started + Duration::from_secs(case.timeout_s);
    let mut outcome = Run::default();
    // QEMU does not end with a dom0 that powers off: Xen halts. Xen's own words say that it did.
    let ended = process.console.line(&mut 0, deadline, |line| {
        (line.contains("Hardware Dom0 halted")
            || line.contains("Hardware Dom0 crashed")
            || line.contains("Panic on CPU"))
        .then_some(())
    });
    match ended {
        Ok(_) | Err(crate::console::Missed::Closed) => {}
        Err(crate::console::Missed::Timeout) => {
            outcome.trouble =
                Some(format!("killed after {} s: it did not end by itself", case.timeout_s));
        }
    }
    process.kill();
    process.console.finished(Instant::now() + Duration::from_secs(2));
    outcome.console = process.console.text();
    // A dom0 that Xen itself ended had no chance to report.
    let crashed = ["Domain 0 crashed", "Hardware Dom0 crashed"];
    outcome.code = super::judge::reported_exit(&outcome.console)
        .or_else(|| crashed.iter().any(|text| outcome.console.contains(text)).then_some(6));
    Ok(outcome)
}

/// A copy of the image that only the PVH note makes bootable: the multiboot 1 header, which QEMU looks for first, is
/// zeroed. Everything else is the image's own.
///
/// # Errors
/// The image has no such header, or the copy cannot be written.
fn without_multiboot(image: &Path) -> Result<PathBuf> {
    /// Multiboot 1, 3.1.1: where it is looked for, and what it begins with.
    const SEARCHED: usize = 8192;
    const MAGIC: [u8; 4] = 0x1bad_b002_u32.to_le_bytes();
    let mut bytes = std::fs::read(image)?;
    let searched = bytes.len().min(SEARCHED);
    let header = bytes
        .get_mut(..searched)
        .and_then(|head| head.as_chunks_mut::<4>().0.iter_mut().find(|word| **word == MAGIC))
        .context("the image has no multiboot 1 header")?;
    *header = [0; 4];
    let name = image.file_stem().and_then(|name| name.to_str()).context("a nameless image")?;
    let file = paths::cache("images")?.join(format!("{name}-without-multiboot.elf"));
    paths::replace(&file, &bytes)?;
    Ok(file)
}

/// The kernel's file cut short, for the test that does so.
///
/// # Errors
/// It cannot be written.
pub(crate) fn cut(image: &Path, bytes: usize) -> Result<PathBuf> {
    let whole = std::fs::read(image)?;
    let file = paths::cache("images")?.join(format!("cut-{bytes}"));
    paths::replace(&file, whole.get(..bytes).unwrap_or(&whole))?;
    Ok(file)
}

//! Running a test in the bundled VMM: a Xen PV guest in a process.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{ChildStdin, Command, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};

use super::data::{Devices, Ending, Instance, Step};
use super::judge::Run;
use super::steps::{self, Fetched, Place};
use super::{command_line, disks};
use crate::console::Echo;
use crate::process::{self, Process};
use crate::{packages, qemu, vmm};

/// The VMM's code where the command line, a file or the host prevented the start.
const REFUSED: u8 = 2;
/// Its code for a guest that asked for a reboot.
const REBOOT: u8 = 7;
/// Its code for a guest that crashed.
const CRASH: u8 = 6;

struct MonitorPlace {
    process: Process,
    cursor: usize,
    stdin: ChildStdin,
    port: u16,
    /// The socket of its xenstore.
    store: PathBuf,
}

impl Place for MonitorPlace {
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
    fn dom0(&mut self, command: &str, deadline: Instant) -> Result<()> {
        // What dom0 does to the store by its tools, this machine does by the same tools over the VMM's socket.
        let mut shell = Command::new("sh");
        shell.args(["-ec", command]).env("XENSTORED_PATH", &self.store);
        let limit = deadline.saturating_duration_since(Instant::now());
        process::output_within(&mut shell, limit).map(drop)
    }
    fn monitor(&mut self, _: &str) -> Result<()> {
        bail!("there is no QEMU on this row")
    }
    fn kill(&mut self) -> Result<()> {
        self.process.kill();
        Ok(())
    }
}

/// The VMM, built once a run.
pub(super) fn program() -> Result<PathBuf> {
    // A failure is kept as well: it would be the same for every test.
    static BUILT: OnceLock<Result<PathBuf, String>> = OnceLock::new();
    let built = BUILT.get_or_init(|| vmm::build().map_err(|error| format!("{error:#}")));
    built.clone().map_err(|error| anyhow!(error))
}

/// Runs one test in a fresh process.
///
/// # Errors
/// The machine cannot be set up; what happens in it is in the [`Run`].
pub(crate) fn run(instance: &Instance, image: &Path, devices: Devices) -> Result<Run> {
    let case = &instance.case;
    let port = qemu::free_port(0)?;
    let mut command = Command::new(program()?);
    command.arg("run").arg(image).arg("--no-reboot");
    command.args(["--memory", &format!("{}M", case.memory_mib)]);
    command.args(["--cpus", &case.cpus.to_string()]);
    let words = command_line(case)?;
    if !words.is_empty() {
        command.arg(format!("--append={words}"));
    }
    if let Some(kind) = case.module {
        command.arg("--initrd").arg(disks::module(kind)?);
    }
    let disk_bus = match devices {
        Devices::Xen => "xen",
        Devices::Virtio | Devices::VirtioGrants | Devices::Mixed => "virtio",
    };
    for kind in &case.disks {
        let file = disks::image(*kind)?;
        command.arg("--disk").arg(format!("{},snapshot,bus={disk_bus}", file.display()));
    }
    match devices {
        Devices::Xen => {}
        Devices::Virtio => drop(command.args(["--virtio", "--rng"])),
        Devices::VirtioGrants => drop(command.args(["--virtio", "--rng", "--virtio-grants"])),
        Devices::Mixed => drop(command.arg("--rng")),
    }
    if case.network {
        command.args(["--publish", &format!("{port}:80")]);
    }
    let store = std::env::temp_dir().join(format!("janus-store-{}-{port}", std::process::id()));
    if case.steps.iter().any(|step| matches!(step, Step::Dom0(_))) {
        packages::ensure(&[packages::XEN])?;
        command.arg("--xenstore").arg(&store);
    }
    let mut process = process::spawn(command.stdin(Stdio::piped()), Echo::Quiet)?;
    let stdin = process.stdin().context("no standard input")?;
    let deadline = process.started + Duration::from_secs(case.timeout_s);
    let mut place = MonitorPlace { process, cursor: 0, stdin, port, store };
    let mut outcome = Run::default();
    match steps::run(case, &mut place, deadline) {
        Ok(killed) => outcome.killed = killed,
        Err(error) => outcome.trouble = Some(format!("{error:#}")),
    }
    let process = &mut place.process;
    if outcome.trouble.is_some() {
        process.kill();
    }
    let status = process.end(deadline)?;
    process.console.finished(Instant::now() + Duration::from_secs(2));
    process.errors.finished(Instant::now() + Duration::from_secs(2));
    outcome.console = process.console.text();
    outcome.console.push_str(&process.errors.text());
    match status {
        _ if outcome.killed || outcome.trouble.is_some() => {}
        None => {
            outcome.trouble =
                Some(format!("killed after {} s: it did not end by itself", case.timeout_s));
        }
        Some(status) => {
            let code = status.code().and_then(|code| u8::try_from(code).ok());
            take_status(&mut outcome, code);
        }
    }
    Ok(outcome)
}

/// What the VMM's exit status says of a run; `None`: it has none.
pub(super) fn take_status(outcome: &mut Run, status: Option<u8>) {
    outcome.refused = status == Some(REFUSED);
    if !outcome.refused {
        outcome.ending = match status {
            Some(REBOOT) => Some(Ending::Reboot),
            Some(CRASH) => Some(Ending::Crash),
            status => status.map(|_| Ending::PowerOff),
        };
        // As on the other rows, where a machine that reboots just ends.
        outcome.code = status.map(|code| if code == REBOOT { 0 } else { code });
    }
}

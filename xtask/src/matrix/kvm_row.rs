//! Running tests where there is real KVM: one boot of the KVM lab, then a fresh `janus run --engine kvm` for each.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::data::{Case, DiskKind, Instance, KvmDoor};
use super::judge::Run;
use super::steps::{self, Fetched, Place};
use super::{command_line, disks, monitor_row, qemu_row};
use crate::console::Echo;
use crate::lab::kvm::{KvmSetup, quoted};
use crate::lab::{Guest, Lab};

/// The port of the lab's machine that leads to a guest's web server.
const PORT: u16 = 8080;

/// The lab with all the images and disks that a set of tests asks for.
#[derive(Debug)]
pub(crate) struct Bench {
    lab: Lab,
    disks: BTreeMap<DiskKind, String>,
    count: u32,
}

struct KvmPlace<'a> {
    lab: &'a mut Lab,
    guest: &'a mut Guest,
}

fn left(deadline: Instant) -> Duration {
    deadline.saturating_duration_since(Instant::now()).max(Duration::from_secs(1))
}

impl Place for KvmPlace<'_> {
    fn wait(&mut self, text: &str, deadline: Instant) -> Result<()> {
        self.lab
            .guest_line(self.guest, left(deadline), |line| line.contains(text).then_some(()))
            .map(|_| ())
    }
    fn type_text(&mut self, text: &str) -> Result<()> {
        self.lab.type_to(self.guest, text)
    }
    fn fetch(&mut self, path: &str, deadline: Instant) -> Result<Fetched> {
        self.lab.fetch(&format!("http://127.0.0.1:{PORT}{path}"), deadline)
    }
    fn dom0(&mut self, _: &str, _: Instant) -> Result<()> {
        bail!("there is no dom0 on this row")
    }
    fn monitor(&mut self, _: &str) -> Result<()> {
        bail!("there is no QEMU monitor on this row")
    }
    fn kill(&mut self) -> Result<()> {
        self.lab.destroy(self.guest)
    }
}

/// The name under which the lab knows the image of a test.
fn image_name(case: &Case) -> String {
    match case.cut_image_to {
        None => case.image.clone(),
        Some(bytes) => format!("{}-cut-{bytes}", case.image),
    }
}

impl Bench {
    /// Boots the lab with what `instances` need.
    ///
    /// # Errors
    /// The lab does not come up.
    pub(crate) fn start(
        instances: &[Instance],
        images: &BTreeMap<String, PathBuf>,
    ) -> Result<Self> {
        let mut setup = KvmSetup::default();
        setup.images.push(("janus".to_owned(), monitor_row::program()?));
        let mut names = BTreeSet::new();
        let mut kinds = BTreeSet::new();
        for Instance { case, .. } in instances {
            kinds.extend(case.disks.iter().copied());
            if names.insert(image_name(case)) {
                let image = images.get(&case.image).context("an image that was not built")?;
                let file = match case.cut_image_to {
                    None => image.clone(),
                    Some(bytes) => qemu_row::cut(image, bytes)?,
                };
                setup.images.push((image_name(case), file));
            }
        }
        let mut disks = BTreeMap::new();
        for kind in kinds {
            if kind == DiskKind::Empty {
                // QEMU's disks have sectors; a file can have none.
                disks.insert(kind, "/tmp/empty".to_owned());
            } else {
                let letter = ('a'..='z').nth(setup.disks.len()).context("too many disks")?;
                disks.insert(kind, format!("/dev/vd{letter}"));
                setup.disks.push(disks::image(kind)?);
            }
        }
        let mut lab = Lab::start_kvm(&setup, Echo::Quiet)?;
        lab.run(": >/tmp/empty", Duration::from_secs(10))?;
        Ok(Self { lab, disks, count: 0 })
    }

    fn command(&self, case: &Case, door: KvmDoor) -> Result<String> {
        let image = quoted(&format!("/images/{}", image_name(case)));
        let mut command = format!(
            "janus run {image} --no-reboot --engine kvm --memory {}M --cpus {}",
            case.memory_mib, case.cpus
        );
        // Writing to a String cannot fail.
        if door == KvmDoor::Linux {
            command.push_str(" --door linux");
        }
        let words = command_line(case)?;
        if !words.is_empty() {
            let _ = write!(command, " {}", quoted(&format!("--append={words}")));
        }
        for kind in &case.disks {
            let disk = self.disks.get(kind).context("a disk that was not set up")?;
            let _ = write!(command, " --disk {disk},snapshot");
        }
        if case.network {
            let _ = write!(command, " --publish {PORT}:80");
        }
        Ok(command)
    }

    /// Runs one test in a fresh process.
    ///
    /// # Errors
    /// The lab died; what happens in the guest is in the [`Run`].
    pub(crate) fn run(&mut self, instance: &Instance, door: KvmDoor) -> Result<Run> {
        let case = &instance.case;
        self.count += 1;
        let command = self.command(case, door)?;
        let deadline = Instant::now() + Duration::from_secs(case.timeout_s);
        let mut guest = self.lab.launch(&format!("k{}", self.count), &command)?;
        let mut outcome = Run::default();
        let mut place = KvmPlace { lab: &mut self.lab, guest: &mut guest };
        match steps::run(case, &mut place, deadline) {
            Ok(killed) => outcome.killed = killed,
            Err(error) => {
                outcome.trouble = Some(format!("{error:#}"));
                if self.lab.is_over() {
                    return Err(error);
                }
                self.lab.destroy(&guest)?;
            }
        }
        if outcome.killed || outcome.trouble.is_some() {
            outcome.console = self.lab.said(&guest);
            return Ok(outcome);
        }
        match self.lab.end(&guest, left(deadline)) {
            Ok(ended) => {
                outcome.console = ended.console;
                let status = ended.reason.and_then(|status| u8::try_from(status).ok());
                monitor_row::take_status(&mut outcome, status);
            }
            Err(error) if self.lab.is_over() => return Err(error),
            Err(error) => {
                outcome.console = self.lab.said(&guest);
                outcome.trouble = Some(format!("{error:#}"));
            }
        }
        Ok(outcome)
    }
}

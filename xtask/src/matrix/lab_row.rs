//! Running tests as guests of real Xen: one boot of the lab, then a fresh domain for each.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::data::{Case, DiskKind, Ending, Instance, ModuleKind};
use super::judge::Run;
use super::steps::{self, Fetched, Place};
use super::{command_line, disks, qemu_row};
use crate::console::Echo;
use crate::lab::{Domain, Guest, Lab, Mode, Setup};

/// The lab with all the images and disks that a set of tests asks for.
#[derive(Debug)]
pub(crate) struct Bench {
    lab: Lab,
    disks: BTreeMap<DiskKind, String>,
    count: u32,
}

struct XenPlace<'a> {
    lab: &'a mut Lab,
    guest: &'a mut Guest,
    /// Its first disk, as dom0 knows it.
    disk: &'a str,
}

fn left(deadline: Instant) -> Duration {
    deadline.saturating_duration_since(Instant::now()).max(Duration::from_secs(1))
}

impl Place for XenPlace<'_> {
    fn wait(&mut self, text: &str, deadline: Instant) -> Result<()> {
        self.lab
            .guest_line(self.guest, left(deadline), |line| line.contains(text).then_some(()))
            .map(|_| ())
    }
    fn type_text(&mut self, text: &str) -> Result<()> {
        self.lab.type_to(self.guest, text)
    }
    fn fetch(&mut self, path: &str, deadline: Instant) -> Result<Fetched> {
        self.lab.fetch(&format!("http://10.0.0.2{path}"), deadline)
    }
    fn dom0(&mut self, command: &str, deadline: Instant) -> Result<()> {
        let command = command.replace("{guest}", self.guest.name()).replace("{disk}", self.disk);
        let (status, text) = self.lab.run(&command, left(deadline))?;
        if status != 0 {
            bail!("`{command}` in dom0 ended with {status}: {}", text.trim());
        }
        Ok(())
    }
    fn monitor(&mut self, _: &str) -> Result<()> {
        bail!("there is no QEMU monitor on this row")
    }
    fn kill(&mut self) -> Result<()> {
        self.lab.destroy(self.guest)
    }
}

/// The name under which dom0 knows the image of a test.
fn image_name(case: &Case) -> String {
    match case.cut_image_to {
        None => case.image.clone(),
        Some(bytes) => format!("{}-cut-{bytes}", case.image),
    }
}

/// The name under which dom0 knows a module.
fn module_name(kind: ModuleKind) -> String {
    format!("module-{kind:?}")
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
        let mut setup = Setup { dom0_mib: 640, machine_mib: 1280, ..Setup::default() };
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
        let modules: BTreeSet<_> = instances.iter().filter_map(|i| i.case.module).collect();
        for kind in modules {
            setup.images.push((module_name(kind), disks::module(kind)?));
        }
        let mut disks = BTreeMap::new();
        for kind in kinds {
            if kind == DiskKind::Empty {
                // QEMU's disks have sectors; a loop device can have none.
                disks.insert(kind, "/dev/loop7".to_owned());
            } else {
                let letter = ('a'..='z').nth(setup.disks.len()).context("too many disks")?;
                disks.insert(kind, format!("/dev/vd{letter}"));
                setup.disks.push(disks::image(kind)?);
            }
        }
        let mut lab = Lab::start(&setup, Echo::Quiet)?;
        if disks.contains_key(&DiskKind::Empty) {
            lab.run(": >/tmp/empty && losetup /dev/loop7 /tmp/empty", Duration::from_secs(10))?;
        }
        Ok(Self { lab, disks, count: 0 })
    }

    /// Creates a guest, lets dom0 do something to it, and lets it run.
    fn create_prepared(
        &mut self,
        domain: &Domain,
        before: &[String],
        deadline: Instant,
    ) -> Result<Guest> {
        let guest = self.lab.create_paused(domain)?;
        let (_, id) = self.lab.run(&format!("xl domid {}", domain.name), left(deadline))?;
        for command in before {
            let (status, text) =
                self.lab.run(&command.replace("{id}", id.trim()), left(deadline))?;
            if status != 0 {
                bail!("`{command}` in dom0 ended with {status}: {}", text.trim());
            }
        }
        self.lab.run(&format!("xl unpause {}", domain.name), left(deadline))?;
        Ok(guest)
    }

    /// Runs one test in a fresh domain.
    ///
    /// # Errors
    /// The lab died; what happens in the guest is in the [`Run`].
    pub(crate) fn run(&mut self, instance: &Instance, mode: Mode) -> Result<Run> {
        let case = &instance.case;
        self.count += 1;
        let mut domain = Domain {
            name: format!("t{}", self.count),
            mode,
            kernel: format!("/images/{}", image_name(case)),
            ramdisk: case.module.map(|kind| format!("/images/{}", module_name(kind))),
            command_line: command_line(case)?,
            memory_mib: case.memory_mib,
            cpus: case.cpus,
            disks: Vec::new(),
            network: case.network,
        };
        for kind in &case.disks {
            domain.disks.push(self.disks.get(kind).context("a disk that was not set up")?.clone());
        }
        let deadline = Instant::now() + Duration::from_secs(case.timeout_s);
        let mut guest = if case.before.is_empty() {
            self.lab.create(&domain)?
        } else {
            self.create_prepared(&domain, &case.before, deadline)?
        };
        let mut outcome = Run::default();
        let disk = domain.disks.first().map_or("", String::as_str);
        let mut place = XenPlace { lab: &mut self.lab, guest: &mut guest, disk };
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
                outcome.refused = ended.reason.is_none();
                outcome.console = ended.console;
                outcome.ending = match ended.reason {
                    Some(0) => Some(Ending::PowerOff),
                    Some(1) => Some(Ending::Reboot),
                    Some(3) => Some(Ending::Crash),
                    _ => None,
                };
                // Crash must be both reported and told to Xen; any other code goes with a power-off.
                let reported = super::judge::reported_exit(&outcome.console);
                outcome.code = match (ended.reason, reported) {
                    (Some(3), _) => Some(6),
                    (Some(_), reported) => reported,
                    (None, _) => None,
                };
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

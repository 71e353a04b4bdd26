//! The test matrix: every test of `tests/matrix.toml` on every row it names, a fresh machine each.

pub(crate) mod data;
mod disks;
pub(crate) mod judge;
mod kvm_row;
mod lab_row;
mod monitor_row;
mod qemu_row;
pub(crate) mod steps;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::results::{Outcome, Results};
use crate::{conformance, listing, run};
use data::{Case, Instance, Row};

/// Which instances to run; an empty list means all.
#[derive(Clone, Debug, Default)]
pub(crate) struct Selection {
    /// Rows.
    pub(crate) rows: Vec<String>,
    /// Groups.
    pub(crate) groups: Vec<String>,
    /// Parts of test names.
    pub(crate) names: Vec<String>,
}

impl Selection {
    fn takes(&self, instance: &Instance) -> bool {
        let any = |list: &[String], hit: &dyn Fn(&String) -> bool| {
            list.is_empty() || list.iter().any(hit)
        };
        any(&self.rows, &|row| *row == instance.row_name)
            && any(&self.groups, &|group| instance.case.groups.contains(group))
            && any(&self.names, &|name| instance.case.name.contains(name.as_str()))
    }
}

/// The packages of the images that `selection` needs.
pub(crate) fn images(matrix: &data::Matrix, selection: &Selection) -> Vec<String> {
    matrix.images(|rows, groups, name| {
        let any = |list: &[String], hit: &dyn Fn(&String) -> bool| {
            list.is_empty() || list.iter().any(hit)
        };
        any(&selection.rows, &|row| rows.contains(row))
            && any(&selection.groups, &|group| groups.contains(group))
            && name.is_none_or(|name| any(&selection.names, &|part| name.contains(part.as_str())))
    })
}

/// The kernel command line of a test.
fn command_line(case: &Case) -> Result<String> {
    let mut words = case.append.clone();
    if let Some(commands) = &case.exec {
        words = format!("{words} {}", run::exec_words(commands)?);
    }
    Ok(words.trim().to_owned())
}

/// Whether an instance is a guest of the Xen lab.
fn is_for_the_lab(instance: &Instance) -> bool {
    matches!(instance.row, Row::Xen(_))
}

/// Whether an instance is a guest of the KVM lab.
fn is_for_the_kvm_lab(instance: &Instance) -> bool {
    matches!(instance.row, Row::Kvm(_))
}

/// The instances that `selection` takes; the images must have been built.
///
/// # Errors
/// The matrix is wrong, or an image cannot be read.
pub(crate) fn select(
    matrix: &data::Matrix,
    images: &BTreeMap<String, PathBuf>,
    selection: &Selection,
) -> Result<Vec<Instance>> {
    let listed = |image: &str| images.get(image).map(|image| listing::tests(image)).transpose();
    let mut instances = matrix.instances(listed)?;
    instances.retain(|instance| selection.takes(instance));
    if instances.is_empty() {
        bail!("no test of the matrix is selected; `cargo xtask test --list` shows them");
    }
    Ok(instances)
}

/// Runs instances on two threads: each has a lab (Xen's, KVM's) first, and both, in the end, single machines.
///
/// # Errors
/// The set-up fails; failing tests are in `results`.
pub(crate) fn run_all(
    instances: Vec<Instance>,
    images: &BTreeMap<String, PathBuf>,
    results: &Results,
) -> Result<()> {
    results.expect(instances.len());
    let (lab, single): (Vec<_>, Vec<_>) = instances.into_iter().partition(is_for_the_lab);
    let (kvm, mut single): (Vec<_>, Vec<_>) = single.into_iter().partition(is_for_the_kvm_lab);
    single.reverse();
    let single = Mutex::new(single);
    let work = || {
        loop {
            let next = single.lock().unwrap_or_else(std::sync::PoisonError::into_inner).pop();
            let Some(instance) = next else { break };
            let start = Instant::now();
            let run = run_single(&instance, images);
            note(&instance, run, start, results);
        }
    };
    std::thread::scope(|scope| {
        let other = scope.spawn(|| {
            if !kvm.is_empty() {
                run_kvm_lab(&kvm, images, results);
            }
            work();
        });
        if !lab.is_empty() {
            run_lab(&lab, images, results);
        }
        work();
        other.join().map_err(|_| anyhow::anyhow!("a worker of the matrix panicked"))
    })
}

fn note(instance: &Instance, run: Result<judge::Run>, start: Instant, results: &Results) {
    let judged = run.and_then(|run| {
        let expect: Result<Vec<String>> =
            instance.case.expect.iter().map(|text| disks::fill_in(text)).collect();
        let judged = judge::judge(&instance.case, &expect?, &run);
        if instance.case.answers && judged.0 == Outcome::Success {
            let differing =
                conformance::check(&instance.row_name, &instance.case.name, &run.console)?;
            return Ok(differing.map_or(judged, |what| (Outcome::Failure, what)));
        }
        Ok(judged)
    });
    let (outcome, detail) = judged.unwrap_or_else(|error| (Outcome::Error, format!("{error:#}")));
    results.single(&instance.row_name, &instance.case.name, outcome, detail, start.elapsed());
}

fn run_single(instance: &Instance, images: &BTreeMap<String, PathBuf>) -> Result<judge::Run> {
    let mut image =
        images.get(&instance.case.image).context("an image that was not built")?.clone();
    if let Some(bytes) = instance.case.cut_image_to {
        image = qemu_row::cut(&image, bytes)?;
    }
    match instance.row {
        Row::Qemu(_) | Row::Pvh(_) | Row::PvhNoAcpi(_) | Row::Grub(..) | Row::Linux64(_) => {
            qemu_row::run(instance, &image)
        }
        Row::Dom0(mode) => qemu_row::run_as_dom0(instance, &image, mode),
        Row::Monitor(devices) => monitor_row::run(instance, &image, devices),
        Row::Xen(_) | Row::Kvm(_) => bail!("not a row for a single machine"),
    }
}

/// All of the lab's tests; a lab that dies is started once more for the next test.
fn run_lab(instances: &[Instance], images: &BTreeMap<String, PathBuf>, results: &Results) {
    let mut bench = None;
    for instance in instances {
        let mut start = Instant::now();
        if bench.is_none() {
            match lab_row::Bench::start(instances, images) {
                Ok(started) => {
                    println!("    (Xen and dom0 up in {:.1} s)", start.elapsed().as_secs_f32());
                    start = Instant::now();
                    bench = Some(started);
                }
                Err(error) => {
                    note(instance, Err(error), start, results);
                    continue;
                }
            }
        }
        let (Some(running), Row::Xen(mode)) = (&mut bench, instance.row) else { continue };
        let run = running.run(instance, mode);
        if run.is_err() {
            bench = None;
        }
        note(instance, run, start, results);
    }
}

/// All of the KVM lab's tests, as [`run_lab`].
fn run_kvm_lab(instances: &[Instance], images: &BTreeMap<String, PathBuf>, results: &Results) {
    let mut bench = None;
    for instance in instances {
        let mut start = Instant::now();
        if bench.is_none() {
            match kvm_row::Bench::start(instances, images) {
                Ok(started) => {
                    println!("    (KVM up in {:.1} s)", start.elapsed().as_secs_f32());
                    start = Instant::now();
                    bench = Some(started);
                }
                Err(error) => {
                    note(instance, Err(error), start, results);
                    continue;
                }
            }
        }
        let (Some(running), Row::Kvm(door)) = (&mut bench, instance.row) else { continue };
        let run = running.run(instance, door);
        if run.is_err() {
            bench = None;
        }
        note(instance, run, start, results);
    }
}

/// The time limit of everything in `instances` together: what a hung matrix would take at most.
#[must_use]
pub(crate) fn worst_case(instances: &[Instance]) -> Duration {
    instances.iter().map(|instance| Duration::from_secs(instance.case.timeout_s)).sum()
}

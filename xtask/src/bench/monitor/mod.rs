//! `cargo xtask bench --on monitor`: the bundled VMM beside what this machine can do without any guest, and beside
//! other ways to run a guest as a process. Everything is pinned to one CPU, and compared within one run.
//!
//! Each file measures one subject and answers [`Row`]s. What is measured in a guest is printed by its shell as
//! `janus-bench: {...}`; what is measured without one, by `tests/bench-peer`.

mod blocks;
mod costs;
mod density;
mod network;
mod row;
mod start;
mod store;

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::Args;
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
use serde_json::Value;

use super::peer;
use crate::{disk, guest, packages, process, vmm};
pub(super) use row::{Row, json, table};

/// What only `--on monitor` takes: programs from outside this tree to compare with, and sizes.
#[derive(Clone, Debug, Args)]
pub(super) struct Outsiders {
    /// Solo5's seccomp tender, to compare with on the monitor.
    #[arg(long, value_name = "FILE", env = "SOLO5_SPT")]
    solo5_spt: Option<PathBuf>,
    /// Solo5's test_hello.spt, which that tender runs.
    #[arg(long, value_name = "FILE", env = "SOLO5_HELLO", requires = "solo5_spt")]
    solo5_hello: Option<PathBuf>,
    /// Guests that are idle at once on the monitor, and at most so many, but not more than 100, that serve at once.
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..))]
    guests: u32,
}

/// The longest that one measurement may take.
const LIMIT: Duration = Duration::from_mins(5);

/// What the measurements work with.
struct Bench<'a> {
    outsiders: &'a Outsiders,
    /// Runs of a start; other measurements choose for themselves.
    runs: u32,
    /// The VMM.
    janus: PathBuf,
    /// The default image.
    image: PathBuf,
    /// The smallest image: it prints a line and ends.
    one_line: PathBuf,
    /// A file system with a big file.
    disk: PathBuf,
    /// The program that measures without a guest.
    native: PathBuf,
}

/// All rows, in their order; what could not be measured is told on standard error.
///
/// # Errors
/// Something that every row needs is missing.
pub(super) fn run(outsiders: &Outsiders, runs: u32) -> Result<(Vec<Row>, bool)> {
    packages::ensure(&[packages::QEMU])?;
    let mut images = guest::build_all(&[guest::DEFAULT_IMAGE.to_owned(), ONE_LINE.to_owned()])?;
    let mut image = |name: &str| images.remove(name).context("not built");
    let bench = Bench {
        outsiders,
        runs,
        janus: vmm::build()?,
        image: image(guest::DEFAULT_IMAGE)?,
        one_line: image(ONE_LINE)?,
        disk: disk::files()?.0,
        native: peer::program()?,
    };
    pin()?;
    let mut rows = Vec::new();
    let mut failed = false;
    for (name, measure) in SUBJECTS {
        eprintln!("janus: bench monitor: {name}");
        match measure(&bench) {
            Ok(measured) => rows.extend(measured),
            Err(error) => {
                eprintln!("janus: bench monitor: {name}: {error:#}");
                failed = true;
            }
        }
    }
    Ok((rows, failed))
}

/// The package of the smallest image.
const ONE_LINE: &str = "janus-one-line";

/// What answers rows.
type Measure = fn(&Bench<'_>) -> Result<Vec<Row>>;

/// The subjects, in the table's order.
const SUBJECTS: &[(&str, Measure)] = &[
    ("starts", start::rows),
    ("costs", costs::rows),
    ("disk", blocks::rows),
    ("network", network::rows),
    ("xenstore", store::rows),
    ("density", density::rows),
];

/// Keeps this thread, and all that it starts from here on, on one CPU: the last that it may use.
fn pin() -> Result<()> {
    let allowed = sched_getaffinity(None)?;
    let last = (0..CpuSet::MAX_CPU).rev().find(|cpu| allowed.is_set(*cpu));
    let mut one = CpuSet::new();
    one.set(last.context("no CPU")?);
    sched_setaffinity(None, &one).context("cannot be held on one CPU")
}

impl Bench<'_> {
    /// Samples of the program that needs no guest: `limit pipe`, and so on.
    fn limit(&self, arguments: &[&str]) -> Result<Vec<f64>> {
        let mut command = Command::new(&self.native);
        let text = process::output_within(command.arg("limit").args(arguments), LIMIT)?;
        samples(&serde_json::from_str(&text).with_context(|| text.clone())?, "ns")
    }

    /// A command that runs an image in the VMM.
    fn janus(&self, image: &Path) -> Command {
        let mut command = Command::new(&self.janus);
        command.arg("run").arg(image).args(["--engine", "monitor"]).stdin(Stdio::null());
        command
    }

    /// Runs shell commands in the default image, with further arguments for the VMM; answers the JSON lines of its
    /// bench.
    fn guest(&self, arguments: &[&str], commands: &str) -> Result<Vec<Value>> {
        let mut command = self.janus(&self.image);
        command.args(arguments).args(["--exec", commands]);
        let text = process::output_within(&mut command, LIMIT)?;
        let lines: Vec<Value> = text
            .lines()
            .filter_map(|line| line.split_once("janus-bench: "))
            .map(|(_, line)| serde_json::from_str(line).with_context(|| line.to_owned()))
            .collect::<Result<_>>()?;
        if lines.is_empty() {
            bail!("the guest measured nothing: {text}");
        }
        Ok(lines)
    }
}

/// The samples of this name in a line of JSON.
fn samples(line: &Value, name: &str) -> Result<Vec<f64>> {
    let list = line.get(name).and_then(Value::as_array);
    let list = list.with_context(|| format!("no {name} in {line}"))?;
    list.iter().map(|value| value.as_f64().context("not a number")).collect()
}

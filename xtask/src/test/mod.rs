//! `cargo xtask test` and `cargo xtask ci`: every level, a progress line each, one closing line.

mod host;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::Result;
use clap::{Args, ValueEnum};

use crate::matrix::{self, Selection};
use crate::results::Results;
use crate::{disk, guest, packages, vmm};

/// A level of tests.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Level {
    /// Unit tests of all crates on this machine.
    Host,
    /// Model checking of the lock-free code.
    Loom,
    /// Miri over the protocol code: undefined behaviour.
    Miri,
    /// The ABI structures against the Xen headers.
    Abi,
    /// A short run of each fuzz target.
    Fuzz,
    /// The built image through the loader of other monitors.
    Image,
    /// The built VMM from the outside: control, configuration, gdb.
    Cli,
    /// The guest in every kind of machine.
    Matrix,
}

const LEVELS: [Level; 8] = [
    Level::Host,
    Level::Loom,
    Level::Miri,
    Level::Abi,
    Level::Fuzz,
    Level::Image,
    Level::Cli,
    Level::Matrix,
];

/// Runs the tests.
#[derive(Clone, Debug, Default, Args)]
pub(crate) struct TestArguments {
    /// Only these levels.
    #[arg(long, value_enum)]
    level: Vec<Level>,
    /// Only these rows of the matrix (implies `--level matrix`).
    #[arg(long, value_delimiter = ',')]
    row: Vec<String>,
    /// Only these groups of the matrix (implies `--level matrix`).
    #[arg(long, value_delimiter = ',')]
    group: Vec<String>,
    /// Only tests of the matrix with this in their name (implies `--level matrix`).
    #[arg(long, value_delimiter = ',')]
    name: Vec<String>,
    /// Also writes the results to this file.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Lists the matrix instead of running it.
    #[arg(long)]
    list: bool,
}

/// Runs what `arguments` select.
///
/// # Errors
/// The set-up fails; failing tests are in the exit code.
pub(crate) fn run(arguments: &TestArguments) -> Result<ExitCode> {
    let results = Results::default();
    let start = Instant::now();
    levels(arguments, &results, host::new_seed())?;
    finish(arguments, &results, start, false)
}

/// Everything with every row required, and the source's own rules before it.
///
/// # Errors
/// The set-up fails; failing tests are in the exit code.
pub(crate) fn ci() -> Result<ExitCode> {
    let results = Results::default();
    let start = Instant::now();
    packages::ensure(&[
        packages::QEMU,
        packages::XEN,
        packages::GRUB,
        packages::CLOUD,
        packages::KVM_LAB,
        packages::HEADERS,
        packages::FILE_SYSTEMS,
        packages::GDB,
    ])?;
    let arguments = TestArguments::default();
    host::source_rules(&results);
    levels(&arguments, &results, host::FIXED_SEED)?;
    finish(&arguments, &results, start, true)
}

fn levels(arguments: &TestArguments, results: &Results, seed: u64) -> Result<()> {
    let narrowed =
        !(arguments.row.is_empty() && arguments.group.is_empty() && arguments.name.is_empty());
    let chosen: Vec<Level> = match (&*arguments.level, narrowed || arguments.list) {
        ([], true) => vec![Level::Matrix],
        ([], false) => LEVELS.to_vec(),
        (levels, _) => levels.to_vec(),
    };
    for level in chosen {
        match level {
            Level::Host => {
                packages::ensure(&[packages::FILE_SYSTEMS])?;
                host::unit_tests(results, seed);
            }
            Level::Loom => host::loom(results),
            Level::Miri => host::miri(results),
            Level::Abi => host::abi(results),
            Level::Fuzz => host::fuzz(results),
            Level::Image => host::image(results, &guest::build(guest::DEFAULT_IMAGE)?),
            Level::Cli => {
                packages::ensure(&[packages::GDB])?;
                host::outside(results, &vmm::build()?, &guest::build(guest::DEFAULT_IMAGE)?);
            }
            Level::Matrix => guests(arguments, results)?,
        }
    }
    Ok(())
}

/// The matrix: builds each image once, so that all rows boot the same bytes.
fn guests(arguments: &TestArguments, results: &Results) -> Result<()> {
    packages::ensure(&[packages::QEMU])?;
    let matrix = matrix::data::load()?;
    let selection = Selection {
        rows: arguments.row.clone(),
        groups: arguments.group.clone(),
        names: arguments.name.clone(),
    };
    let wanted = matrix::images(&matrix, &selection);
    if wanted.is_empty() {
        anyhow::bail!(
            "no test matches these rows, groups and names (see tests/matrix.toml, or --list without them)"
        );
    }
    let images = guest::build_all(&wanted)?;
    for (package, image) in &images {
        println!("image {package}: sha256 {}", disk::sha256(image)?);
    }
    let instances = matrix::select(&matrix, &images, &selection)?;
    if arguments.list {
        for instance in &instances {
            println!("{:<12} {}", instance.row_name, instance.case.name);
        }
        return Ok(());
    }
    println!(
        "matrix: {} tests (at most {} s if every one of them hung)",
        instances.len(),
        matrix::worst_case(&instances).as_secs()
    );
    matrix::run_all(instances, &images, results)
}

fn finish(
    arguments: &TestArguments,
    results: &Results,
    start: Instant,
    strict: bool,
) -> Result<ExitCode> {
    if let Some(file) = &arguments.json {
        std::fs::write(file, serde_json::to_string_pretty(&results.json(strict))?)?;
    }
    let totals = results.summary(strict, start.elapsed());
    Ok(if totals.failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

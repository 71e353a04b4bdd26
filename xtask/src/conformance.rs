//! `cargo xtask conformance`: the same questions to a real Xen and to the bundled VMM, and what each answers.
//!
//! The image `janus-conformance` prints its answers. Those of a real Xen are kept in `tests/conformance/xen-4.17.toml`,
//! and where the bundled VMM answers otherwise, its own in `tests/conformance/janus.toml`; why it does is in
//! `tests/conformance/differences.toml`, of which `docs/differences-from-xen.md` is made. So the matrix can compare on
//! each row alone, and a change of either side fails.

mod known;
mod page;

use std::collections::BTreeMap;
use std::process::ExitCode;
use std::sync::Mutex;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use clap::Args;

pub(crate) use self::known::Answers;
use self::known::Known;
use crate::lab::Mode;
use crate::matrix::data::{Instance, Row};
use crate::matrix::{self, Selection, judge};
use crate::results::Results;
use crate::{guest, packages, paths};

/// The group of its tests in the matrix, and the two rows.
const GROUP: &str = "conformance";
const XEN: &str = "xen-pv";
const JANUS: &str = "monitor";
/// Differences that a failure tells of.
const TOLD: usize = 8;

/// Asks a real Xen and the bundled VMM the same, and compares.
#[derive(Clone, Debug, Args)]
pub(crate) struct ConformanceArguments {
    /// Writes down what they answer instead of comparing: both files of answers, and the page in docs/.
    #[arg(long)]
    record: bool,
    /// Only writes the page in docs/, of what is known.
    #[arg(long)]
    page: bool,
    /// Only this row: `xen-pv` or `monitor`.
    #[arg(long)]
    row: Option<String>,
}

/// What was answered in this run: by row and test. With `record` nothing is judged.
#[derive(Debug, Default)]
struct Session {
    record: bool,
    rows: BTreeMap<String, BTreeMap<String, Answers>>,
}

static SESSION: Mutex<Option<Session>> = Mutex::new(None);

fn session<R>(with: impl FnOnce(&mut Session) -> R) -> R {
    let mut session = SESSION.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    with(session.get_or_insert_default())
}

/// The answers on a console.
fn answers(console: &str) -> Answers {
    judge::reports(console)
        .filter_map(|report| {
            let text = |name: &str| report.get(name)?.as_str().map(str::to_owned);
            Some((text("answer")?, text("is")?))
        })
        .collect()
}

/// Compares what a test of the matrix printed with what is known; the answer is what differs.
pub(crate) fn check(row: &str, test: &str, console: &str) -> Result<Option<String>> {
    let found = answers(console);
    let record = session(|session| {
        session.rows.entry(row.to_owned()).or_default().insert(test.to_owned(), found.clone());
        session.record
    });
    if record {
        return Ok(None);
    }
    let known = Known::load()?;
    let expected = match row {
        XEN => known.of_xen(test),
        JANUS => known.of_janus(test),
        other => bail!("no answers are known for row {other}"),
    };
    let differing = differences(&known, &expected, &found);
    if differing.is_empty() {
        return Ok(None);
    }
    let count = differing.len();
    let told = differing.into_iter().take(TOLD).collect::<Vec<_>>().join("; ");
    Ok(Some(format!("{count} answers differ: {told}")))
}

fn differences(known: &Known, expected: &Answers, found: &Answers) -> Vec<String> {
    let mut all = Vec::new();
    for (key, want) in expected {
        match found.get(key) {
            _ if known.varies(key) => {}
            Some(is) if is == want => {}
            Some(is) => all.push(format!("{key} is {is}, not {want}")),
            None => all.push(format!("{key} was not answered")),
        }
    }
    for (key, is) in found.iter().filter(|(key, _)| !expected.contains_key(*key)) {
        all.push(format!("{key} is {is}, of which nothing is known"));
    }
    all
}

/// Runs the command.
///
/// # Errors
/// The set-up fails; differences are in the exit code.
pub(crate) fn run(arguments: &ConformanceArguments) -> Result<ExitCode> {
    if arguments.page {
        write_page(&Known::load()?)?;
        tell()?;
        return Ok(ExitCode::SUCCESS);
    }
    packages::ensure(&[packages::QEMU, packages::XEN])?;
    session(|session| session.record = arguments.record);
    let start = Instant::now();
    let results = Results::default();
    let matrix = matrix::data::load()?;
    let selection = Selection { rows: Vec::new(), groups: vec![GROUP.into()], names: Vec::new() };
    let wanted = matrix::images(&matrix, &selection);
    let images = guest::build_all(&wanted)?;
    let mut instances = matrix::select(&matrix, &images, &selection)?;
    // In the matrix they run in the VMM alone; here they ask a real Xen too.
    let in_xen = |instance: &Instance| Instance {
        row_name: XEN.into(),
        row: Row::Xen(Mode::Pv),
        case: instance.case.clone(),
    };
    let others: Vec<_> = instances.iter().map(in_xen).collect();
    instances.extend(others);
    instances.retain(|instance| arguments.row.as_ref().is_none_or(|row| *row == instance.row_name));
    matrix::run_all(instances, &images, &results)?;
    let totals = results.summary(true, start.elapsed());
    if arguments.record {
        record()?;
    }
    tell()?;
    Ok(if totals.failed > 0 { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

/// Writes what was answered.
fn record() -> Result<()> {
    let mut known = Known::load()?;
    session(|session| {
        for (test, answers) in session.rows.remove(XEN).unwrap_or_default() {
            known.xen.insert(test, answers);
        }
        for (test, mut answers) in session.rows.remove(JANUS).unwrap_or_default() {
            let xens = known.xen.get(&test).cloned().unwrap_or_default();
            answers.retain(|key, is| xens.get(key) != Some(is) && !known.varies(key));
            known.janus.insert(test, answers);
        }
    });
    known.janus.retain(|_, answers| !answers.is_empty());
    known.save()?;
    write_page(&known)
}

fn write_page(known: &Known) -> Result<()> {
    let page = paths::root().join(page::FILE);
    std::fs::write(&page, page::text(known))
        .with_context(|| format!("cannot write {}", page.display()))
}

/// Says how it stands.
fn tell() -> Result<()> {
    let known = Known::load()?;
    let all: usize = known.xen.values().map(Answers::len).sum();
    let other: usize = known.janus.values().map(Answers::len).sum();
    println!(
        "{all} answers of Xen 4.17 are known; the bundled VMM gives {other} others ({})",
        page::FILE
    );
    for key in known.unexplained() {
        println!("  unexplained: {key}");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_read_from_the_console_and_compared() {
        let console = "x\njanus-report: {\"answer\":\"a.b\",\"is\":\"-22\"}\njanus-report: {\"answer\":\"c\",\"is\":\"0\"}\n";
        let found = answers(console);
        assert_eq!(found.len(), 2);
        let known = Known::default();
        let expected = Answers::from([("a.b".into(), "-22".into()), ("d".into(), "1".into())]);
        assert_eq!(
            differences(&known, &expected, &found),
            ["d was not answered", "c is 0, of which nothing is known"]
        );
    }

    #[test]
    fn every_difference_from_xen_is_explained_and_the_page_tells_of_it() {
        let known = Known::load().unwrap();
        assert_eq!(known.unexplained(), Vec::<String>::new());
        assert_eq!(known.unused(), Vec::<String>::new());
        let page = std::fs::read_to_string(paths::root().join(page::FILE)).unwrap();
        assert!(page == page::text(&known), "run `cargo xtask conformance --record`");
    }
}

//! The page that tells of the differences.

use std::fmt::Write as _;

use super::known::{Cause, Difference, Known};

/// Where it is.
pub(super) const FILE: &str = "docs/differences-from-xen.md";
/// Rows of a table that are printed.
const ROWS: usize = 40;

const HEAD: &str = "\
# Differences from Xen

The image `janus-conformance` (`tests/conformance`) makes every hypercall and trap that it can think of, with arguments
right and wrong, and tells what comes back. `cargo xtask conformance` runs it on a real Xen 4.17 in the lab and in the
bundled VMM and compares. This page is made of what differs (`--record`), and of the reasons in
`tests/conformance/differences.toml`; an answer that differs without being here is a failing test.
";

fn title(cause: Cause) -> &'static str {
    match cause {
        Cause::Process => "What a process cannot give",
        Cause::Choice => "What is otherwise on purpose",
        Cause::Lab => "What the lab's emulated CPU does to Xen",
        Cause::Varies => "What differs by machine, and is not compared",
    }
}

/// The name of an error, where the answer is one.
fn named(answer: &str) -> String {
    let name = match answer.parse() {
        Ok(-1) => "EPERM",
        Ok(-2) => "ENOENT",
        Ok(-3) => "ESRCH",
        Ok(-6) => "ENXIO",
        Ok(-7) => "E2BIG",
        Ok(-11) => "EAGAIN",
        Ok(-12) => "ENOMEM",
        Ok(-13) => "EACCES",
        Ok(-14) => "EFAULT",
        Ok(-16) => "EBUSY",
        Ok(-17) => "EEXIST",
        Ok(-19) => "ENODEV",
        Ok(-22) => "EINVAL",
        Ok(-28) => "ENOSPC",
        Ok(-38) => "ENOSYS",
        Ok(-62) => "ETIME",
        Ok(-95) => "EOPNOTSUPP",
        Ok(-105) => "ENOBUFS",
        Ok::<i64, _>(_) | Err(_) => return answer.replace('|', "\\|"),
    };
    format!("-{name}")
}

fn table(page: &mut String, known: &Known, difference: &Difference) {
    let rows: Vec<_> = known
        .janus
        .iter()
        .flat_map(|(test, answers)| answers.iter().map(move |(key, is)| (test, key, is)))
        .filter(|(_, key, _)| known.reason(key).is_some_and(|reason| reason.why == difference.why))
        .collect();
    if rows.is_empty() {
        return;
    }
    page.push_str("\n| question | Xen 4.17 | janus |\n|---|---|---|\n");
    for (test, key, is) in rows.iter().take(ROWS) {
        let xens = known.xen.get(*test).and_then(|answers| answers.get(*key));
        let xens = xens.map_or_else(|| "(none)".into(), |answer| named(answer));
        let _ = writeln!(page, "| `{key}` | {xens} | {} |", named(is));
    }
    if rows.len() > ROWS {
        let _ =
            writeln!(page, "\nand {} more, in `tests/conformance/janus.toml`.", rows.len() - ROWS);
    }
}

/// The page.
pub(super) fn text(known: &Known) -> String {
    let mut page = HEAD.to_owned();
    let all: usize = known.xen.values().map(|answers| answers.len()).sum();
    let differing: usize = known.janus.values().map(|answers| answers.len()).sum();
    let _ = writeln!(page, "\nOf {all} answers {differing} differ.");
    for cause in [Cause::Process, Cause::Choice, Cause::Lab, Cause::Varies] {
        let of: Vec<_> = known.differences.iter().filter(|d| d.cause == cause).collect();
        if of.is_empty() {
            continue;
        }
        let _ = writeln!(page, "\n## {}", title(cause));
        for difference in of {
            let questions: Vec<_> = difference.answers.iter().map(|a| format!("`{a}`")).collect();
            let _ = writeln!(page, "\n{}: {}", questions.join(", "), difference.why.trim());
            if cause != Cause::Varies {
                table(&mut page, known, difference);
            }
        }
    }
    page
}

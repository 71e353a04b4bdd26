//! How fast guests start, and what they occupy.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};
use serde_json::Value;

use super::row::{Goal, Row, Unit};
use super::{Bench, LIMIT, samples};
use crate::process;

/// Runs of each program in one turn: the programs take turns, so that all of them see the same machine.
const TURN: u32 = 5;

/// What the runs of one program cost.
#[derive(Clone, Debug, Default)]
struct Starts {
    first: Vec<f64>,
    total: Vec<f64>,
    resident: Vec<f64>,
}

impl Starts {
    /// Starts in a second, one after the other.
    fn rate(&self) -> Vec<f64> {
        self.total.iter().map(|time| 1e9 / time).collect()
    }
}

/// A program, and the text that it prints.
struct Subject {
    mark: &'static str,
    words: Vec<String>,
}

impl Subject {
    fn new(mark: &'static str, words: &[&str]) -> Self {
        Self { mark, words: words.iter().map(|word| (*word).to_owned()).collect() }
    }
}

fn text(path: &Path) -> Result<&str> {
    path.to_str().context("a path that is no text")
}

/// A program that does nothing: the least that a start can cost. An ELF file of one segment.
fn nothing() -> Result<std::path::PathBuf> {
    const BASE: u64 = 0x40_0000;
    // mov eax, 60 (exit); xor edi, edi; syscall
    const CODE: [u8; 9] = [0xb8, 60, 0, 0, 0, 0x31, 0xff, 0x0f, 0x05];
    const HEADERS: u64 = 64 + 56;
    let mut file = vec![0x7f, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    // ET_EXEC, EM_X86_64, version; entry; program headers; no sections, no flags; sizes and counts.
    file.extend([2, 0, 62, 0, 1, 0, 0, 0]);
    for value in [BASE + HEADERS, 64, 0] {
        file.extend(value.to_le_bytes());
    }
    file.extend([0, 0, 0, 0, 64, 0, 56, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
    // PT_LOAD, read and execute.
    file.extend([1, 0, 0, 0, 5, 0, 0, 0]);
    let size = HEADERS + CODE.len() as u64;
    for value in [0, BASE, BASE, size, size, 0x1000] {
        file.extend(value.to_le_bytes());
    }
    file.extend(CODE);
    let path = crate::paths::cache("bench")?.join("nothing");
    crate::paths::replace(&path, &file)?;
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(&path, mode)?;
    Ok(path)
}

/// Rows A1 to A4, and the default image's shell.
pub(super) fn rows(bench: &Bench<'_>) -> Result<Vec<Row>> {
    let janus = text(&bench.janus)?;
    let disk = format!("{},ro", text(&bench.disk)?);
    let nothing = nothing()?;
    let mut subjects = vec![
        Subject::new("", &[text(&nothing)?]),
        Subject::new("one line", &[janus, "run", text(&bench.one_line)?, "--engine", "monitor"]),
        Subject::new(
            "janus: ready",
            &[
                janus,
                "run",
                text(&bench.image)?,
                "--disk",
                &disk,
                "--net",
                "user",
                "--exec",
                "echo",
            ],
        ),
    ];
    if let (Some(spt), Some(hello)) = (&bench.outsiders.solo5_spt, &bench.outsiders.solo5_hello) {
        subjects.push(Subject::new("SUCCESS", &[text(spt)?, text(hello)?, "Hello_Solo5"]));
    }
    let mut starts = vec![Starts::default(); subjects.len()];
    for _ in 0..bench.runs.div_ceil(TURN) {
        for (subject, starts) in subjects.iter().zip(&mut starts) {
            measure(bench, subject, starts)?;
        }
    }
    let mut starts = starts.into_iter();
    let mut next = || starts.next().unwrap_or_default();
    let (bare, line, full, solo5) = (next(), next(), next(), next());
    let spt = "solo5-spt hello";
    Ok(vec![
        Row::new("A1", "exec to exit, a guest of one line", Unit::Milliseconds, line.total.clone())
            .beside(spt, solo5.total.clone(), Goal::AtMost(0.4))
            .beside("an empty program", bare.total.clone(), Goal::AtMost(5.0)),
        Row::new("A1", "  of which to that line", Unit::Milliseconds, line.first.clone()).beside(
            spt,
            solo5.first.clone(),
            Goal::AtMost(0.4),
        ),
        Row::new("A2", "exec to exit, with xenstore, disk and net", Unit::Milliseconds, full.total)
            .beside(spt, solo5.total.clone(), Goal::AtMost(1.0)),
        Row::new("", "default image ready, with disk and net", Unit::Milliseconds, full.first)
            .fixed("the goal", 5e6, Goal::AtMost(1.0)),
        Row::new(
            "A3",
            "largest resident set of one process",
            Unit::Kibibytes,
            line.resident.clone(),
        )
        .beside(spt, solo5.resident.clone(), Goal::AtMost(0.9)),
        Row::new("A4", "starts one after the other", Unit::PerSecond, line.rate()).beside(
            spt,
            solo5.rate(),
            Goal::AtLeast(2.5),
        ),
    ])
}

fn measure(bench: &Bench<'_>, subject: &Subject, starts: &mut Starts) -> Result<()> {
    let mut command = Command::new(&bench.native);
    command.args(["starts", &TURN.to_string(), subject.mark]).args(&subject.words);
    let text = process::output_within(&mut command, LIMIT)?;
    let line: Value = serde_json::from_str(&text).with_context(|| text.clone())?;
    starts.first.extend(samples(&line, "first_ns")?);
    starts.total.extend(samples(&line, "total_ns")?);
    starts.resident.extend(samples(&line, "resident_kib")?);
    Ok(())
}

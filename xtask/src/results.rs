//! Results of tests: one entry each, a progress line as they come, a table and one closing line.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::time::Duration;

use serde::Serialize;

/// Failures that are told in full once more at the end; of the others the first line.
const DETAILED: usize = 6;

/// How a test ended; the words are the guest's own (`kernel/src/test/outcome.rs`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Outcome {
    /// As it should be.
    Success,
    /// Not run, for a reason that is told.
    Skip,
    /// Could not be carried out.
    Error,
    /// Not as it should be.
    Failure,
    /// The guest kernel itself failed.
    Crash,
}

impl Outcome {
    /// From an exit code of the guest.
    pub(crate) fn from_code(code: u8) -> Self {
        match code {
            0 => Self::Success,
            3 => Self::Skip,
            4 => Self::Error,
            6 => Self::Crash,
            _ => Self::Failure,
        }
    }

    fn word(self) -> &'static str {
        match self {
            Self::Success => "ok",
            Self::Skip => "SKIP",
            Self::Error => "ERROR",
            Self::Failure => "FAILED",
            Self::Crash => "CRASHED",
        }
    }
}

/// One test that was to be run.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Entry {
    /// Where: `host`, or a row of the matrix.
    pub(crate) row: String,
    /// Which.
    pub(crate) name: String,
    /// How it ended.
    pub(crate) outcome: Outcome,
    /// Tests that this entry stands for, when a program ran many.
    pub(crate) passed: u32,
    /// Of these, the failed.
    pub(crate) failed: u32,
    /// Wall time.
    pub(crate) seconds: f32,
    /// What went wrong, or what was skipped and why.
    pub(crate) detail: String,
}

/// All entries so far; threads add to it.
#[derive(Debug, Default)]
pub(crate) struct Results {
    entries: Mutex<Vec<Entry>>,
    expected: Mutex<usize>,
}

/// Totals over all entries.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub(crate) struct Totals {
    /// Tests that ended as they should.
    pub(crate) passed: u32,
    /// Tests that did not, or could not be carried out.
    pub(crate) failed: u32,
    /// Tests that were not run.
    pub(crate) skipped: u32,
}

fn locked<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

impl Results {
    /// Announces that `count` more entries will come, for the progress lines.
    pub(crate) fn expect(&self, count: usize) {
        *locked(&self.expected) += count;
    }

    /// Adds an entry and prints its progress line.
    pub(crate) fn add(&self, entry: Entry) {
        let mut entries = locked(&self.entries);
        let number = entries.len() + 1;
        let expected = (*locked(&self.expected)).max(number);
        println!(
            "[{number:>3}/{expected}] {:<8} {:<12} {:<40} {:>6.1} s",
            entry.outcome.word(),
            entry.row,
            entry.name,
            entry.seconds
        );
        if entry.outcome != Outcome::Success {
            println!("    {}", entry.detail.trim_end());
        }
        entries.push(entry);
    }

    /// Adds the entry of one test.
    pub(crate) fn single(
        &self,
        row: &str,
        name: &str,
        outcome: Outcome,
        detail: String,
        time: Duration,
    ) {
        let passed = u32::from(outcome == Outcome::Success);
        let failed = u32::from(outcome > Outcome::Skip);
        self.add(Entry {
            row: row.to_owned(),
            name: name.to_owned(),
            outcome,
            passed,
            failed,
            seconds: time.as_secs_f32(),
            detail,
        });
    }

    /// The totals; with `strict` what was skipped counts as failed.
    pub(crate) fn totals(&self, strict: bool) -> Totals {
        let mut totals = Totals::default();
        for entry in locked(&self.entries).iter() {
            totals.passed += entry.passed;
            totals.failed += entry.failed;
            if entry.outcome == Outcome::Skip {
                if strict {
                    totals.failed += 1;
                } else {
                    totals.skipped += 1;
                }
            }
        }
        totals
    }

    /// Prints the table by row, what failed once more, and the closing line.
    pub(crate) fn summary(&self, strict: bool, time: Duration) -> Totals {
        let entries = locked(&self.entries).clone();
        let mut rows: BTreeMap<&str, (u32, u32, u32, f32)> = BTreeMap::new();
        for entry in &entries {
            let row = rows.entry(&entry.row).or_default();
            row.0 += entry.passed;
            row.1 += entry.failed;
            row.2 += u32::from(entry.outcome == Outcome::Skip);
            row.3 += entry.seconds;
        }
        println!(
            "\n{:<14} {:>7} {:>7} {:>8} {:>9}",
            "row", "passed", "failed", "skipped", "seconds"
        );
        for (name, (passed, failed, skipped, seconds)) in rows {
            println!("{name:<14} {passed:>7} {failed:>7} {skipped:>8} {seconds:>9.1}");
        }
        // The end of the output is what a forge shows of it: so all that is known stands here once more.
        let unwell = entries.iter().filter(|e| e.outcome != Outcome::Success);
        for entry in unwell.clone().filter(|e| e.outcome != Outcome::Skip).take(DETAILED) {
            println!("\n{} {}: {}", entry.row, entry.name, entry.detail.trim_end());
        }
        println!();
        for entry in unwell {
            let first = entry.detail.lines().next().unwrap_or_default();
            println!("{:<8} {} {}: {first}", entry.outcome.word(), entry.row, entry.name);
        }
        let totals = self.totals(strict);
        println!("\nin {:.0} s", time.as_secs_f32());
        println!("{} passed, {} failed, {} skipped", totals.passed, totals.failed, totals.skipped);
        totals
    }

    /// Everything as JSON.
    pub(crate) fn json(&self, strict: bool) -> serde_json::Value {
        serde_json::json!({
            "totals": self.totals(strict),
            "tests": *locked(&self.entries),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_skip_is_a_failure_when_every_row_is_required() {
        let results = Results::default();
        results.single("host", "a", Outcome::Success, String::new(), Duration::ZERO);
        results.single("q35", "b", Outcome::Skip, "no QEMU".into(), Duration::ZERO);
        results.single("q35", "c", Outcome::Crash, "panic".into(), Duration::ZERO);
        assert_eq!(results.totals(false), Totals { passed: 1, failed: 1, skipped: 1 });
        assert_eq!(results.totals(true), Totals { passed: 1, failed: 2, skipped: 0 });
    }
}

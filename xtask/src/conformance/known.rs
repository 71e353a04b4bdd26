//! What is known: the answers of both, and why they differ.

use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::{Context, Result};
use serde::Deserialize;

use crate::paths;

/// The answers of one test, by question.
pub(crate) type Answers = BTreeMap<String, String>;
/// Those of all tests.
pub(super) type AllAnswers = BTreeMap<String, Answers>;

/// Why some answers differ.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub(super) struct Difference {
    /// The questions: whole, or the beginning of many before a `*`.
    pub(super) answers: Vec<String>,
    /// Whose doing it is.
    pub(super) cause: Cause,
    /// The reason.
    pub(super) why: String,
}

/// Whose doing a difference is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Cause {
    /// Something that an ordinary process does not have.
    Process,
    /// Our choice.
    Choice,
    /// QEMU's emulation of a CPU, on which the lab's Xen runs, does it wrong or differently.
    Lab,
    /// The answer differs by machine: nothing is compared.
    Varies,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct Differences {
    #[serde(default)]
    difference: Vec<Difference>,
}

/// Everything.
#[derive(Debug, Default)]
pub(super) struct Known {
    pub(super) xen: AllAnswers,
    pub(super) janus: AllAnswers,
    pub(super) differences: Vec<Difference>,
}

fn matches(pattern: &str, key: &str) -> bool {
    match pattern.split_once('*') {
        None => pattern == key,
        Some((start, end)) => {
            key.len() >= start.len() + end.len() && key.starts_with(start) && key.ends_with(end)
        }
    }
}

fn file(name: &str) -> PathBuf {
    paths::root().join("tests/conformance").join(name)
}

fn read<T: Default + for<'a> Deserialize<'a>>(name: &str) -> Result<T> {
    let file = file(name);
    match std::fs::read_to_string(&file) {
        Ok(text) => toml::from_str(&text).with_context(|| format!("in {}", file.display())),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(T::default()),
        Err(error) => Err(error).with_context(|| format!("cannot read {}", file.display())),
    }
}

impl Known {
    /// Reads the three files.
    ///
    /// # Errors
    /// One of them is not what it should be.
    pub(super) fn load() -> Result<Self> {
        Ok(Self {
            xen: read("xen-4.17.toml")?,
            janus: read("janus.toml")?,
            differences: read::<Differences>("differences.toml")?.difference,
        })
    }

    /// Writes the two files of answers.
    ///
    /// # Errors
    /// They cannot be written.
    pub(super) fn save(&self) -> Result<()> {
        for (name, what, all) in [
            ("xen-4.17.toml", "What Xen 4.17 (Debian 12) answers", &self.xen),
            ("janus.toml", "Where the bundled VMM answers otherwise", &self.janus),
        ] {
            let text = format!(
                "# {what}: written by `cargo xtask conformance --record`.\n\n{}",
                toml::to_string(all)?
            );
            let file = file(name);
            std::fs::write(&file, text)
                .with_context(|| format!("cannot write {}", file.display()))?;
        }
        Ok(())
    }

    pub(super) fn of_xen(&self, test: &str) -> Answers {
        self.xen.get(test).cloned().unwrap_or_default()
    }

    pub(super) fn of_janus(&self, test: &str) -> Answers {
        let mut answers = self.of_xen(test);
        answers.extend(self.janus.get(test).cloned().unwrap_or_default());
        answers
    }

    /// Why an answer differs.
    pub(super) fn reason(&self, key: &str) -> Option<&Difference> {
        self.differences.iter().find(|d| d.answers.iter().any(|pattern| matches(pattern, key)))
    }

    pub(super) fn varies(&self, key: &str) -> bool {
        self.reason(key).is_some_and(|difference| difference.cause == Cause::Varies)
    }

    /// Answers that differ for no known reason.
    pub(super) fn unexplained(&self) -> Vec<String> {
        let keys = self.janus.values().flat_map(BTreeMap::keys);
        keys.filter(|key| self.reason(key).is_none()).cloned().collect()
    }

    /// Reasons for what does not differ.
    #[cfg(test)]
    pub(super) fn unused(&self) -> Vec<String> {
        let differs = |difference: &Difference, pattern: &String| {
            let of = if difference.cause == Cause::Varies { &self.xen } else { &self.janus };
            of.values().flat_map(BTreeMap::keys).any(|key| matches(pattern, key))
        };
        self.differences
            .iter()
            .flat_map(|difference| {
                difference.answers.iter().filter(|pattern| !differs(difference, pattern))
            })
            .cloned()
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_star_stands_for_anything() {
        assert!(matches("a.b", "a.b") && !matches("a.b", "a.bc"));
        assert!(matches("a.*", "a.b.c") && matches("a.*.c", "a.b.c") && !matches("a.*.c", "a.c"));
        assert!(matches("*", "x") && !matches("b.*", "a.b"));
    }
}

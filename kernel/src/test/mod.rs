//! Test images: tests that an ELF section lists, one to a machine, and a result that a host can read.
//!
//! An image is a small crate with [`crate::test_image!`] and some [`crate::guest_test!`]. Booted with
//! `test=NAME` it runs that test, with `--list` it prints the names, with neither it runs all. The
//! result goes to the console as a [`report`] line and into the machine's exit code.
//! How to write one: `docs/test-images.md`.

mod outcome;
mod registry;
pub mod report;

use alloc::string::{String, ToString};
use core::fmt::Display;

use crate::power::ExitStatus;
pub use outcome::Outcome;
pub use registry::{Descriptor, NAME_BYTES, all};

/// A test while it runs: its outcome so far, and why.
#[derive(Debug)]
pub struct Test {
    outcome: Outcome,
    detail: String,
}

impl Test {
    /// How it stands so far.
    #[must_use]
    pub const fn outcome(&self) -> Outcome {
        self.outcome
    }

    const fn new() -> Self {
        Self { outcome: Outcome::Success, detail: String::new() }
    }

    fn raise(&mut self, outcome: Outcome, detail: &dyn Display) {
        // The first of the worst is told; what follows is usually its consequence.
        if outcome > self.outcome {
            self.detail = detail.to_string();
        }
        self.outcome.raise(outcome);
    }

    /// Notes a failure unless `condition` holds; the test goes on.
    pub fn check(&mut self, condition: bool, message: impl Display) {
        if !condition {
            self.raise(Outcome::Failure, &message);
        }
    }

    /// Notes a failure with both values unless they are equal; the test goes on.
    pub fn equal<T: PartialEq + core::fmt::Debug>(&mut self, what: &str, found: T, expected: T) {
        if found != expected {
            self.raise(
                Outcome::Failure,
                &format_args!("{what}: found {found:?}, expected {expected:?}"),
            );
        }
    }

    /// Takes the value of a result; an error is noted as a failure.
    pub fn ok<T, E: Display>(&mut self, what: &str, result: Result<T, E>) -> Option<T> {
        match result {
            Ok(value) => Some(value),
            Err(error) => {
                self.raise(Outcome::Failure, &format_args!("{what}: {error}"));
                None
            }
        }
    }

    /// Says that the test does not apply here.
    pub fn skip(&mut self, reason: impl Display) {
        self.raise(Outcome::Skip, &reason);
    }

    /// Says that the test could not be carried out.
    pub fn error(&mut self, reason: impl Display) {
        self.raise(Outcome::Error, &reason);
    }

    /// Says what was seen, for the report; does not change the outcome.
    pub fn note(&mut self, text: impl Display) {
        if self.outcome == Outcome::Success {
            self.detail = text.to_string();
        }
    }
}

/// What a command line asks of a test image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Request<'a> {
    All,
    One(&'a str),
    List,
}

fn request(command_line: &str) -> Request<'_> {
    let mut request = Request::All;
    for word in command_line.split_ascii_whitespace() {
        if let Some(name) = word.strip_prefix("test=") {
            request = Request::One(name);
        } else if word == "--list" {
            request = Request::List;
        }
    }
    request
}

/// Runs what the command line asks for among `tests`, reporting to `out`; answers the worst outcome.
///
/// # Errors
/// `out` fails.
pub fn run(
    tests: &[Descriptor],
    command_line: &str,
    now_ns: impl Fn() -> u64,
    out: &mut impl core::fmt::Write,
) -> Result<Outcome, core::fmt::Error> {
    let request = request(command_line);
    let mut worst = Outcome::Success;
    let mut known = false;
    for descriptor in tests {
        match request {
            Request::List => {
                report::test_listed(out, descriptor.name())?;
                continue;
            }
            Request::One(name) if name != descriptor.name() => continue,
            Request::One(_) | Request::All => known = true,
        }
        let mut test = Test::new();
        let start = now_ns();
        descriptor.run(&mut test);
        let ns = now_ns().saturating_sub(start);
        report::test_ended(out, descriptor.name(), test.outcome, &test.detail, ns)?;
        worst.raise(test.outcome);
    }
    if let (Request::One(name), false) = (request, known) {
        report::test_ended(out, name, Outcome::Error, "no test of this name in the image", 0)?;
        worst.raise(Outcome::Error);
    }
    Ok(worst)
}

/// The main function of a test image: what [`crate::test_image!`] puts in.
///
/// It runs on the boot stack, so that a test may call `task::block_on`.
#[must_use]
pub fn main() -> ExitStatus {
    let now_ns = || crate::time::now().as_nanos();
    let outcome = run(all(), crate::command_line(), now_ns, &mut crate::console::Console);
    // The console takes everything.
    let outcome = outcome.unwrap_or(Outcome::Error);
    match outcome {
        Outcome::Crash => ExitStatus::Crash,
        outcome => ExitStatus::PowerOff(outcome.code()),
    }
}

/// Makes a crate a test image: its main function runs the tests that [`crate::guest_test!`] registers.
#[macro_export]
macro_rules! test_image {
    () => {
        const _: () = {
            #[allow(unsafe_code, reason = "the symbol that the kernel calls")]
            #[cfg_attr(target_os = "none", unsafe(no_mangle))]
            #[allow(dead_code, reason = "the host has nobody who calls it")]
            extern "Rust" fn janus_main() -> $crate::power::ExitStatus {
                $crate::test::main()
            }
        };

        #[cfg(not(target_os = "none"))]
        fn main() {
            eprintln!(
                "this is a guest image: build it with `cargo xtask build {}`",
                env!("CARGO_PKG_NAME")
            );
        }
    };
}

#[cfg(test)]
mod tests {
    use super::*;

    fn passes(_: &mut Test) {}
    fn fails(test: &mut Test) {
        test.check(1 > 2, "one is not more than two");
        test.skip("too late to skip");
        test.equal("sum", 1 + 1, 3);
    }

    fn ran(command_line: &str) -> (Outcome, String) {
        let tests = [Descriptor::new("passes", passes), Descriptor::new("fails", fails)];
        let mut out = String::new();
        let outcome = run(&tests, command_line, || 5, &mut out).unwrap();
        (outcome, out)
    }

    #[test]
    fn one_named_test_runs_alone() {
        let (outcome, out) = ran("console=x test=passes");
        assert_eq!(outcome, Outcome::Success);
        assert_eq!(out.lines().count(), 1);
    }

    #[test]
    fn the_first_failure_is_the_detail_and_nothing_lowers_it() {
        let (outcome, out) = ran("");
        assert_eq!(outcome, Outcome::Failure);
        assert!(out.contains("one is not more than two") && !out.contains("sum"), "{out}");
    }

    #[test]
    fn an_unknown_name_is_an_error_not_a_success() {
        assert_eq!(ran("test=nonesuch").0, Outcome::Error);
    }

    #[test]
    fn a_list_runs_nothing() {
        let (outcome, out) = ran("--list");
        assert_eq!(outcome, Outcome::Success);
        assert_eq!(out.lines().count(), 2);
        assert!(out.contains("\"listed\":\"fails\""));
    }
}

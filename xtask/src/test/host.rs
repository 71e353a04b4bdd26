//! The levels that run on this machine: unit tests, loom, Miri, the ABI check, fuzzing, the source's rules.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::console::Echo;
use crate::results::{Entry, Outcome, Results};
use crate::toolchain::clean_command;
use crate::{packages, paths, process, tidy};

/// Seconds that each fuzz target runs.
const FUZZ_SECONDS: u32 = 5;

fn cargo() -> Command {
    let cargo = std::env::var_os("CARGO").map_or_else(|| PathBuf::from("cargo"), PathBuf::from);
    let mut command = clean_command(&cargo);
    command.current_dir(paths::root()).stdin(Stdio::null());
    // The same compiler as the tool itself, so that nothing is built twice.
    if let Some(toolchain) = std::env::var_os("RUSTUP_TOOLCHAIN") {
        command.env("RUSTUP_TOOLCHAIN", toolchain);
    }
    command
}

/// Sums over the lines `test result: ok. 5 passed; 0 failed; 1 ignored; ...`: passed, failed, ignored.
fn sums(text: &str) -> (u32, u32, u32) {
    let mut sums = (0, 0, 0);
    for line in text.lines().filter_map(|line| line.trim().strip_prefix("test result: ")) {
        let count = |word: &str| -> u32 {
            line.split(['.', ';'])
                .find_map(|part| part.trim().strip_suffix(word)?.trim().parse().ok())
                .unwrap_or(0)
        };
        sums.0 += count("passed");
        sums.1 += count("failed");
        sums.2 += count("ignored");
    }
    sums
}

/// Runs a command as one entry; tests that it counts itself are counted, otherwise it is one.
fn entry(results: &Results, name: &str, command: &mut Command, minutes: u64) {
    results.expect(1);
    println!("... {name}");
    let start = Instant::now();
    let ended = process::spawn(command, Echo::Quiet).and_then(|mut process| {
        let status = process.end(Instant::now() + Duration::from_mins(minutes))?;
        process.console.finished(Instant::now() + Duration::from_secs(2));
        process.errors.finished(Instant::now() + Duration::from_secs(2));
        Ok((status, process.console.text(), process.errors.text()))
    });
    let mut entry = Entry {
        row: "host".to_owned(),
        name: name.to_owned(),
        outcome: Outcome::Success,
        passed: 0,
        failed: 0,
        seconds: start.elapsed().as_secs_f32(),
        detail: String::new(),
    };
    match ended {
        Ok((status, out, errors)) => {
            let ok = status.is_some_and(|status| status.success());
            let (passed, failed, ignored) = sums(&out);
            entry.passed = if passed + failed == 0 { u32::from(ok) } else { passed };
            entry.failed = if ok { failed } else { failed.max(1) };
            if !ok {
                entry.outcome = Outcome::Failure;
                let log = paths::cache("log")
                    .map(|dir| dir.join(format!("{}.log", name.replace([' ', '/'], "-"))));
                let kept = log.and_then(|log| {
                    std::fs::write(&log, format!("{out}\n{errors}"))?;
                    Ok(log)
                });
                let why = if status.is_none() { "took too long" } else { "failed" };
                let failures: String = out
                    .lines()
                    .filter(|line| line.starts_with("test ") && line.ends_with("FAILED"))
                    .map(|line| format!("\n    {line}"))
                    .collect();
                entry.detail = format!(
                    "{why}{} (all of it: {}){failures}{}",
                    if ignored > 0 { format!(", {ignored} ignored") } else { String::new() },
                    kept.map_or_else(|error| error.to_string(), |log| log.display().to_string()),
                    crate::console::tail(&errors, 12)
                );
            }
        }
        Err(error) => {
            entry.outcome = Outcome::Error;
            entry.failed = 1;
            entry.detail = format!("{error:#}");
        }
    }
    results.add(entry);
}

fn skip(results: &Results, name: &str, reason: &str) {
    results.expect(1);
    results.single("host", name, Outcome::Skip, reason.to_owned(), Duration::ZERO);
}

/// Every crate's own tests, with the documents' examples.
pub(super) fn unit_tests(results: &Results) {
    entry(
        results,
        "cargo test",
        cargo().args(["test", "--workspace", "--locked", "--no-fail-fast"]),
        10,
    );
}

/// The lock-free code under loom's scheduler, in a target directory of its own: the flag changes every crate.
pub(super) fn loom(results: &Results) {
    let target = paths::root().join("target/loom");
    let mut command = cargo();
    command
        .env("RUSTFLAGS", "--cfg loom")
        .env("LOOM_MAX_PREEMPTIONS", "2")
        .args(["test", "--locked", "-p", "janus-proto", "--lib", "--release", "--target-dir"])
        .arg(target)
        .args(["--", "loom"]);
    entry(results, "loom", &mut command, 8);
}

/// The protocol code under Miri, where there is a nightly toolchain that has it, or can get it.
pub(super) fn miri(results: &Results) {
    let Some(rustup) = paths::program(&["rustup"]) else {
        // Debian's toolchain has no Miri, and no way to it: the row exists only where it can run.
        println!("... miri: not on this toolchain (no rustup); the row does not apply");
        return;
    };
    let has = || {
        clean_command(&rustup)
            .args(["component", "list", "--toolchain", "nightly", "--installed"])
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .output()
            .is_ok_and(|output| String::from_utf8_lossy(&output.stdout).contains("miri"))
    };
    let install = || {
        std::env::var_os("JANUS_NO_INSTALL").is_none() && {
            println!("... miri: rustup component add miri rust-src (nightly)");
            let mut add = clean_command(&rustup);
            add.args(["component", "add", "--toolchain", "nightly", "miri", "rust-src"])
                .stdin(Stdio::null());
            process::output(&mut add).is_ok()
        }
    };
    if !has() && !install() {
        println!("... miri: not installed and not to be had from here; the row does not apply");
        return;
    }
    let mut command = clean_command(&rustup);
    command
        .current_dir(paths::root())
        .stdin(Stdio::null())
        .env("MIRIFLAGS", "-Zmiri-disable-isolation")
        .env("PROPTEST_CASES", "4")
        .args([
            "run",
            "nightly",
            "cargo",
            "miri",
            "test",
            "-p",
            "janus-proto",
            "--lib",
            "--target-dir",
        ])
        .arg(paths::root().join("target/miri"))
        // What shares memory with a peer; the codecs are forbid(unsafe) and take Miri very long.
        .args(["--", "ring", "grant", "evtchn", "pvclock"]);
    entry(results, "miri", &mut command, 8);
}

/// The layouts and constants of `janus-proto` against the C compiler's view of the Xen headers.
pub(super) fn abi(results: &Results) {
    if let Err(error) = packages::ensure(&[packages::HEADERS]) {
        skip(results, "abi-check", &format!("{error:#}"));
        return;
    }
    let mut command = cargo();
    command
        .args(["run", "--quiet", "--locked", "--manifest-path"])
        .arg(paths::root().join("tests/abi-check/Cargo.toml"))
        .arg("--target-dir")
        .arg(paths::root().join("target/abi-check"));
    entry(results, "abi-check", &mut command, 5);
}

/// Each fuzz target for a few seconds, under AddressSanitizer.
pub(super) fn fuzz(results: &Results) {
    let manifest = paths::root().join("tests/fuzz/Cargo.toml");
    let targets = std::fs::read_to_string(&manifest)
        .map_err(anyhow::Error::from)
        .and_then(|text| fuzz_targets(&text));
    let targets = match targets {
        Ok(targets) => targets,
        Err(error) => {
            results.expect(1);
            results.single("host", "fuzz", Outcome::Error, format!("{error:#}"), Duration::ZERO);
            return;
        }
    };
    for target in targets {
        let mut command = clean_command(Path::new("sh"));
        command
            .current_dir(paths::root())
            .stdin(Stdio::null())
            .arg("tests/fuzz/run")
            .arg(&target)
            .arg(FUZZ_SECONDS.to_string());
        entry(results, &format!("fuzz {target}"), &mut command, 8);
    }
}

/// The binaries of the fuzzing package, each a target.
fn fuzz_targets(manifest: &str) -> anyhow::Result<Vec<String>> {
    let manifest: toml::Table = toml::from_str(manifest)?;
    let bins = manifest.get("bin").and_then(toml::Value::as_array);
    let names: Vec<String> = bins
        .into_iter()
        .flatten()
        .filter_map(|bin| Some(bin.get("name")?.as_str()?.to_owned()))
        .collect();
    if names.is_empty() {
        anyhow::bail!("tests/fuzz/Cargo.toml names no target");
    }
    Ok(names)
}

/// Formatting, lints and the project's own rules.
pub(super) fn source_rules(results: &Results) {
    entry(results, "cargo fmt --check", cargo().args(["fmt", "--all", "--check"]), 2);
    let mut clippy = cargo();
    clippy.args(["clippy", "--workspace", "--all-targets", "--locked", "--", "-D", "warnings"]);
    entry(results, "cargo clippy", &mut clippy, 8);
    results.expect(1);
    let start = Instant::now();
    match tidy::check() {
        Ok(found) if found.is_empty() => {
            results.single("host", "tidy", Outcome::Success, String::new(), start.elapsed());
        }
        Ok(found) => {
            results.single("host", "tidy", Outcome::Failure, found.join("\n    "), start.elapsed());
        }
        Err(error) => {
            results.single("host", "tidy", Outcome::Error, format!("{error:#}"), start.elapsed());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_binary_of_the_fuzzing_package_is_a_target() {
        let names =
            fuzz_targets("[package]\nname = 'x'\n[[bin]]\nname = 'a'\n[[bin]]\nname = 'b'\n")
                .unwrap();
        assert_eq!(names, ["a", "b"]);
        assert!(fuzz_targets("[package]\nname = 'x'\n").is_err());
    }

    #[test]
    fn cargos_result_lines_are_summed() {
        let text = "running 3 tests\ntest result: ok. 3 passed; 0 failed; 1 ignored; 0 measured; 9 filtered out; finished in 0.1s\n\
                    test result: FAILED. 2 passed; 4 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.00s\n";
        assert_eq!(sums(text), (5, 4, 1));
    }
}

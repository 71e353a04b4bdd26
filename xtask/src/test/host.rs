//! The levels that run on this machine: unit tests, loom, Miri, the ABI check, fuzzing, the source's rules.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::console::Echo;
use crate::results::{Entry, Outcome, Results};
use crate::toolchain::{self, clean_command};
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

/// Lines of a failed program's output that are told with it.
const TOLD_LINES: usize = 40;

/// What went wrong, out of a failed program's two outputs: the names of failed tests, and what they printed
/// (a panic's message, proptest's minimal input), or else the last lines.
fn failures(out: &str, errors: &str) -> String {
    let names: Vec<&str> = out
        .lines()
        .filter_map(|line| line.strip_prefix("test ")?.strip_suffix(" ... FAILED"))
        .collect();
    // libtest prints what a failed test printed under `---- NAME stdout ----`, after all tests.
    let mut printed = Vec::new();
    let mut inside = false;
    for line in out.lines() {
        inside = match line {
            _ if line.starts_with("---- ") => true,
            "failures:" => false,
            _ => inside && !line.starts_with("test result: "),
        };
        if inside && !line.is_empty() {
            printed.push(line);
        }
    }
    if printed.is_empty() {
        let text = if errors.trim().is_empty() { out } else { errors };
        return format!("{}{}", names.join(", "), crate::console::tail(text, TOLD_LINES));
    }
    let more = printed.len().saturating_sub(TOLD_LINES);
    // The first failures in full say more than the tail of the last.
    printed.truncate(TOLD_LINES);
    let mut told =
        format!("{}{}", names.join(", "), crate::console::tail(&printed.join("\n"), TOLD_LINES));
    if more > 0 {
        told.push_str(&format!("\n    | ({more} lines more in the file)"));
    }
    told
}

/// Runs a command as one entry; tests that it counts itself are counted, otherwise it is one.
fn entry(results: &Results, name: &str, command: &mut Command, minutes: u64) {
    results.expect(1);
    println!("... {name}");
    let start = Instant::now();
    // Backtraces of failed tests would push the messages out of what is told.
    let ended =
        process::spawn(command.env("RUST_BACKTRACE", "0"), Echo::Quiet).and_then(|mut process| {
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
                let why = match status {
                    Some(status) => format!("failed ({status})"),
                    None => format!("took longer than {minutes} minutes"),
                };
                entry.detail = format!(
                    "{why}{} (all of it: {}): {}",
                    if ignored > 0 { format!(", {ignored} ignored") } else { String::new() },
                    kept.map_or_else(|error| error.to_string(), |log| log.display().to_string()),
                    failures(&out, &errors),
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

/// The random inputs of property tests: from a seed that is told, and never written into the source tree (a
/// regression file that one run leaves would be another run's input).
fn seeded(command: &mut Command, seed: u64) -> &mut Command {
    command
        .env("PROPTEST_RNG_SEED", seed.to_string())
        .env("PROPTEST_DISABLE_FAILURE_PERSISTENCE", "1")
}

/// The seed where every run must be like the last: CI, and Miri, which sees too few inputs to find any.
pub(super) const FIXED_SEED: u64 = 0x6a61_6e75_7300;

/// A seed that no run had before, for runs that are to find something.
pub(super) fn new_seed() -> u64 {
    use std::hash::{BuildHasher as _, RandomState};
    RandomState::new().hash_one(std::process::id())
}

/// Every crate's own tests, with the documents' examples; their random inputs come from `seed`.
pub(super) fn unit_tests(results: &Results, seed: u64) {
    println!("... PROPTEST_RNG_SEED={seed}");
    entry(
        results,
        "cargo test",
        seeded(cargo().args(["test", "--workspace", "--locked", "--no-fail-fast"]), seed),
        15,
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

/// What Miri looks at: a package, flags of its own, and the tests by parts of their names. Only what takes it seconds:
/// bytes that go through fake devices one by one, it counts in minutes.
const MIRI: [(&str, &str, &[&str]); 2] = [
    (
        "janus-proto",
        "",
        &[
            "ring",
            "grant",
            "evtchn",
            "pvclock",
            "virtqueue::tests::a_",
            "batches_need",
            "delayed_interrupt",
        ],
    ),
    // Its memory model cannot hold atomics of two sizes on the same bytes (it panics), which `SharedFrames` has; fakes
    // live for ever; and devices make pointers of the numbers they are given.
    (
        "janus-front",
        "-Zmiri-disable-weak-memory-emulation -Zmiri-ignore-leaks -Zmiri-permissive-provenance",
        &[
            "dma::",
            "mmio::",
            "_xs::",
            "messages_need_no_acknowledgement",
            "setting_up_fails_cleanly",
            "a_card_that_fails_is_noticed",
            "a_full_transmit_queue_gives_the_frame_back",
            "properties_are_what_was_negotiated",
        ],
    ),
];

/// The code that shares memory with a peer under Miri, where there is a nightly toolchain that has it, or can get it.
pub(super) fn miri(results: &Results) {
    let Some(rustup) = paths::program(&["rustup"]) else {
        // Debian's toolchain has no Miri, and no way to it: the row exists only where it can run.
        println!(
            "... miri: this toolchain is not rustup's, and only rustup has Miri; the row does not apply"
        );
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
    let install = || -> anyhow::Result<()> {
        if std::env::var_os("JANUS_NO_INSTALL").is_some() {
            anyhow::bail!("JANUS_NO_INSTALL is set");
        }
        println!("... miri: rustup toolchain install nightly (miri, rust-src)");
        let mut add = clean_command(&rustup);
        add.args(["toolchain", "install", "nightly", "--profile", "minimal"]).args([
            "--component",
            "miri",
            "--component",
            "rust-src",
        ]);
        process::output_within(&mut add, Duration::from_mins(5)).map(|_| ())
    };
    if !has()
        && let Err(error) = install()
    {
        skip(results, "miri", &format!("not installed, and not to be had from here: {error:#}"));
        return;
    }
    for (package, flags, tests) in MIRI {
        let mut command = clean_command(&rustup);
        seeded(&mut command, FIXED_SEED)
            .current_dir(paths::root())
            .stdin(Stdio::null())
            .env("MIRIFLAGS", format!("-Zmiri-disable-isolation {flags}"))
            .env("PROPTEST_CASES", "2")
            .env("RUSTC_ICE", "0")
            .args(["run", "nightly", "cargo", "miri", "test", "--locked", "-p", package, "--lib"])
            // Only the package with the fakes has features.
            .args((package == "janus-front").then_some("--features=std"))
            .arg("--target-dir")
            .arg(paths::root().join("target/miri"))
            .arg("--")
            .args(tests);
        entry(results, &format!("miri {package}"), &mut command, 15);
    }
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

/// The built image, as monitors of the rust-vmm family load it.
pub(super) fn image(results: &Results, elf: &Path) {
    let mut command = cargo();
    command.env("JANUS_IMAGE", elf).args([
        "test",
        "--locked",
        "-p",
        "janus-tests",
        "--test",
        "linux_loader",
        "--",
        "--ignored",
    ]);
    entry(results, "linux-loader", &mut command, 8);
}

/// The built VMM from the outside.
pub(super) fn outside(results: &Results, program: &Path, elf: &Path) {
    let mut command = cargo();
    command.env("JANUS_PROGRAM", program).env("JANUS_IMAGE", elf);
    command.args(["test", "--locked", "-p", "janus-tests", "--test", "outside"]);
    entry(results, "janus from the outside", &mut command, 8);
}

/// Formatting, lints and the project's own rules.
pub(super) fn source_rules(results: &Results) {
    entry(results, "cargo fmt --check", cargo().args(["fmt", "--all", "--check"]), 2);
    let mut clippy = cargo();
    clippy.args(["clippy", "--workspace", "--all-targets", "--locked", "--", "-D", "warnings"]);
    entry(results, "cargo clippy", &mut clippy, 8);
    guest_lints(results);
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

/// The lints of what only the guest compiles: entry points, assembly's other side, privileged instructions.
fn guest_lints(results: &Results) {
    const NAME: &str = "cargo clippy (guest)";
    let toolchain = match toolchain::find() {
        Ok(toolchain) => toolchain,
        Err(error) => {
            results.expect(1);
            results.single("host", NAME, Outcome::Error, format!("{error:#}"), Duration::ZERO);
            return;
        }
    };
    let mut clippy = toolchain.cargo("clippy");
    for package in GUEST_PACKAGES {
        clippy.args(["-p", package]);
    }
    // In the guest's own target directory: the dependencies' build scripts and macros are there already.
    clippy
        .args(["--profile", "guest", "--target-dir"])
        .arg(paths::guest_target())
        .args(["--", "-D", "warnings"])
        .stdin(Stdio::null());
    entry(results, NAME, &mut clippy, 8);
}

/// The packages that make guest images.
const GUEST_PACKAGES: [&str; 4] =
    ["janus-kernel", "janus-guest-tests", "janus-hello-test", "janus-one-line"];

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
    fn a_failure_is_told_by_name_and_message() {
        let out = "running 2 tests\ntest a::good ... ok\ntest b::bad ... FAILED\n\nfailures:\n\n\
                   ---- b::bad stdout ----\npanicked at src/b.rs:9:1:\nminimal failing input: hz = 3\n\n\n\
                   failures:\n    b::bad\n\ntest result: FAILED. 1 passed; 1 failed; 0 ignored\n";
        let told = failures(out, "error: 1 target failed");
        assert!(told.starts_with("b::bad\n"), "{told}");
        assert!(told.contains("| minimal failing input: hz = 3"), "{told}");
        assert!(!told.contains("target failed") && !told.contains("good"), "{told}");
        let told = failures("", "error: could not compile\n");
        assert!(told.contains("| error: could not compile"), "{told}");
    }

    #[test]
    fn cargos_result_lines_are_summed() {
        let text = "running 3 tests\ntest result: ok. 3 passed; 0 failed; 1 ignored; 0 measured; 9 filtered out; finished in 0.1s\n\
                    test result: FAILED. 2 passed; 4 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.00s\n";
        assert_eq!(sums(text), (5, 4, 1));
    }
}

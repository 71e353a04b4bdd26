//! Compares every layout and constant of `janus_proto::abi` with the C headers of Xen.
//!
//! Prints sizes, offsets and constants from a C program that includes the headers, compiled by the
//! system's compiler, and compares them with ours. Run by `cargo test` or `cargo run` with
//! `--manifest-path tests/abi-check/Cargo.toml`; `CC` names the compiler (default `cc`) and
//! `XEN_HEADERS` the directory that holds `xen/xen.h` (default `/usr/include`).
//!
//! Exit status: 0 all equal, 1 something differs, 2 the headers or the compiler do not work.

mod constants;
mod table;

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

/// One number that both languages must agree on.
pub struct Fact {
    /// The C expression.
    c: &'static str,
    /// Our value, in a width that holds any of them.
    ours: i128,
}

impl Fact {
    fn new(c: &'static str, ours: impl TryInto<i128>) -> Self {
        let Ok(ours) = ours.try_into() else {
            unreachable!("no number here is wider than 128 bits")
        };
        Self { c, ours }
    }
}

/// The headers, in an order in which they compile.
const HEADERS: &[&str] = &[
    "xen.h",
    "sched.h",
    "event_channel.h",
    "memory.h",
    "grant_table.h",
    "vcpu.h",
    "version.h",
    "features.h",
    "callback.h",
    "physdev.h",
    "elfnote.h",
    "errno.h",
    "hvm/hvm_op.h",
    "hvm/hvm_vcpu.h",
    "hvm/params.h",
    "arch-x86/cpuid.h",
    "arch-x86/hvm/start_info.h",
    "io/ring.h",
    "io/blkif.h",
    "io/netif.h",
    "io/console.h",
    "io/xenbus.h",
    "io/xs_wire.h",
];

/// The C program: one line of output for each fact, in order.
fn program(facts: &[Fact]) -> String {
    let mut c = String::from(
        "#include <stddef.h>\n#include <stdint.h>\n#include <stdio.h>\n#include <string.h>\n\
         #define __XEN_INTERFACE_VERSION__ __XEN_LATEST_INTERFACE_VERSION__\n",
    );
    for header in HEADERS {
        let _ = writeln!(c, "#include <xen/{header}>");
    }
    c.push_str("int main(void) {\n");
    for fact in facts {
        // Unsigned 64-bit constants are the widest, negative ones the narrowest: print both parts.
        let _ =
            writeln!(c, "printf(\"%d %llu\\n\", ({0}) < 0, (unsigned long long)({0}));", fact.c);
    }
    c.push_str("return 0; }\n");
    c
}

/// Compiles and runs `source`, answers what it printed.
fn run(source: &str, directory: &Path, headers: &Path) -> Result<String, String> {
    let file = directory.join("facts.c");
    let binary = directory.join("facts");
    std::fs::write(&file, source).map_err(|error| format!("{}: {error}", file.display()))?;
    let compiler = std::env::var("CC").unwrap_or_else(|_| "cc".into());
    let compiled = Command::new(&compiler)
        .args(["-std=gnu11", "-w", "-I"])
        .arg(headers)
        .arg("-o")
        .args([&binary, &file])
        .output()
        .map_err(|error| format!("the C compiler '{compiler}' does not start: {error}"))?;
    if !compiled.status.success() {
        let text = String::from_utf8_lossy(&compiled.stderr);
        let first: Vec<_> = text.lines().filter(|line| line.contains("error")).take(10).collect();
        return Err(format!("{} does not compile:\n  {}", file.display(), first.join("\n  ")));
    }
    let output = Command::new(&binary)
        .output()
        .map_err(|error| format!("{} does not run: {error}", binary.display()))?;
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// A line of the program's output as a number.
fn parse(line: &str) -> Option<i128> {
    let (negative, value) = line.split_once(' ')?;
    let value: u64 = value.parse().ok()?;
    Some(if negative == "1" { i128::from(value.cast_signed()) } else { i128::from(value) })
}

/// Why there is no comparison, or what differs.
enum Failure {
    /// The headers or the compiler do not work.
    Unusable(String),
    /// What differs.
    Different(String),
}

/// Compares everything; answers what agrees.
fn check() -> Result<String, Failure> {
    let headers = PathBuf::from(std::env::var("XEN_HEADERS").unwrap_or("/usr/include".into()));
    let place = headers.display();
    if !headers.join("xen/xen.h").exists() {
        let text = format!("no xen/xen.h in {place}; install libxen-dev or set XEN_HEADERS");
        return Err(Failure::Unusable(text));
    }
    let facts = table::facts();
    let directory = std::env::temp_dir().join(format!("janus-abi-check-{}", std::process::id()));
    let output = std::fs::create_dir_all(&directory)
        .map_err(|error| format!("{}: {error}", directory.display()))
        .and_then(|()| run(&program(&facts), &directory, &headers))
        .map_err(Failure::Unusable)?;
    // The program stays only if it does not compile, to be looked at.
    let _ = std::fs::remove_dir_all(&directory);
    let theirs: Vec<_> = output.lines().map(parse).collect();
    if theirs.len() != facts.len() {
        let text = format!("{} answers to {} questions", theirs.len(), facts.len());
        return Err(Failure::Unusable(text));
    }
    let mut wrong = Vec::new();
    for (fact, theirs) in facts.iter().zip(theirs) {
        if theirs != Some(fact.ours) {
            let theirs = theirs.map_or("nonsense".into(), |value| format!("{value:#x}"));
            wrong.push(format!("{} is {theirs} in C, {:#x} here", fact.c, fact.ours));
        }
    }
    let total = facts.len();
    if wrong.is_empty() {
        return Ok(format!("{total} facts agree with {place}/xen"));
    }
    wrong.push(format!("{} of {total} facts differ from {place}/xen", wrong.len()));
    Err(Failure::Different(wrong.join("\n")))
}

fn main() -> ExitCode {
    match check() {
        Ok(text) => {
            println!("abi-check: {text}");
            ExitCode::SUCCESS
        }
        Err(Failure::Different(text)) => {
            eprintln!("abi-check: {text}");
            ExitCode::FAILURE
        }
        Err(Failure::Unusable(text)) => {
            eprintln!("abi-check: {text}");
            ExitCode::from(2)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rust_and_c_agree() {
        match check() {
            Ok(text) => println!("{text}"),
            Err(Failure::Unusable(text) | Failure::Different(text)) => panic!("{text}"),
        }
    }
}

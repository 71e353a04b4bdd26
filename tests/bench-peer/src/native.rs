//! What this machine can do without any guest: the limits that the bench holds the guests against.
//!
//! Started with arguments, the program measures one thing and prints one JSON line of samples: `starts COUNT MARK
//! PROGRAM [ARGUMENT]...` times programs from start to a text and to their end; `limit NAME [FILE]` times one operation.

mod calls;
mod memory;
mod network;
mod starts;

use std::fmt::Write as _;
use std::time::Instant;

/// Batches of a measurement; each is one sample.
const BATCHES: usize = 31;

/// Does what the arguments say; answers the exit status.
pub(crate) fn run(arguments: &[String]) -> i32 {
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let line = match &*words {
        ["starts", count, mark, program @ ..] if !program.is_empty() => starts::run(
            count.parse().map_err(|error| format!("{count}: {error}")),
            mark.as_bytes(),
            program,
        ),
        ["limit", "call"] => Ok(line(&calls::plain())),
        ["limit", "filtered-call"] => calls::filtered().map(|samples| line(&samples)),
        ["limit", "pipe"] => calls::pipe().map(|samples| line(&samples)),
        ["limit", "futex"] => calls::futex().map(|samples| line(&samples)),
        ["limit", "touch"] => memory::touch().map(|samples| line(&samples)),
        ["limit", "unmap"] => memory::unmap().map(|samples| line(&samples)),
        ["limit", "loop"] => Ok(line(&memory::spin())),
        ["limit", "copy"] => Ok(line(&memory::copy())),
        ["limit", "udp"] => network::udp().map(|samples| line(&samples)),
        ["limit", "udp-send"] => network::udp_send().map(|samples| line(&samples)),
        ["limit", "tcp"] => network::tcp().map(|samples| line(&samples)),
        ["limit", "read", file] => memory::read(file).map(|samples| line(&samples)),
        ["limit", "read-mapped", file] => memory::read_mapped(file).map(|samples| line(&samples)),
        ["limit", "stream", file] => memory::stream(file).map(|samples| line(&samples)),
        ["limit", "stream-mapped", file] => {
            memory::stream_mapped(file).map(|samples| line(&samples))
        }
        _ => Err("usage: starts COUNT MARK PROGRAM [ARGUMENT]... | limit NAME [FILE]".to_owned()),
    };
    match line {
        Ok(line) => {
            println!("{line}");
            0
        }
        Err(error) => {
            eprintln!("janus-bench-peer: {error}");
            2
        }
    }
}

/// The samples as a JSON line, in nanoseconds an operation.
fn line(samples: &[f64]) -> String {
    format!("{{\"ns\":{}}}", list(samples))
}

/// A JSON list.
fn list(samples: &[f64]) -> String {
    let mut text = String::from("[");
    for (index, sample) in samples.iter().enumerate() {
        let _ = write!(text, "{}{sample:.3}", if index == 0 { "" } else { "," });
    }
    text.push(']');
    text
}

/// Times batches of `count` operations, after one that does not count; answers nanoseconds an operation, one for each
/// batch.
fn batches(count: u32, mut operation: impl FnMut()) -> Vec<f64> {
    let mut samples = Vec::with_capacity(BATCHES);
    for batch in 0..=BATCHES {
        let start = Instant::now();
        for _ in 0..count {
            operation();
        }
        let time = start.elapsed().as_secs_f64() * 1e9 / f64::from(count);
        if batch > 0 {
            samples.push(time);
        }
    }
    samples
}

/// What the system said.
fn refused(what: &str) -> String {
    format!("{what}: {}", std::io::Error::last_os_error())
}

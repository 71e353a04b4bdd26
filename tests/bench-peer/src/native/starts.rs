//! Programs from their start to a text on their standard output, and to their end.
// UNSAFETY: the account of a child's resources has no safe interface.
#![expect(unsafe_code, reason = "wait4(2)")]

use std::io::Read as _;
use std::mem::MaybeUninit;
use std::process::{Command, Stdio};
use std::time::Instant;

/// What one run cost, times in nanoseconds.
struct Sample {
    first: f64,
    total: f64,
    cpu: f64,
    /// The largest resident set of the program and of those it waited for, in KiB.
    resident: f64,
}

/// Runs `program` so often, one after the other; each must print `mark` and end with status 0.
pub(super) fn run(
    count: Result<u32, String>,
    mark: &[u8],
    program: &[&str],
) -> Result<String, String> {
    let mut samples = Vec::new();
    // The first run fills the page cache, and does not count.
    for run in 0..=count? {
        let sample = once(mark, program)?;
        if run > 0 {
            samples.push(sample);
        }
    }
    let list =
        |value: fn(&Sample) -> f64| super::list(&samples.iter().map(value).collect::<Vec<_>>());
    Ok(format!(
        "{{\"first_ns\":{},\"total_ns\":{},\"cpu_ns\":{},\"resident_kib\":{}}}",
        list(|sample| sample.first),
        list(|sample| sample.total),
        list(|sample| sample.cpu),
        list(|sample| sample.resident),
    ))
}

fn once(mark: &[u8], program: &[&str]) -> Result<Sample, String> {
    let (name, arguments) = program.split_first().ok_or("no program")?;
    let failed = |error: &dyn std::fmt::Display| format!("{name}: {error}");
    let start = Instant::now();
    let mut child = Command::new(name)
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .map_err(|error| failed(&error))?;
    let mut output = child.stdout.take().ok_or("no standard output")?;
    let mut seen = Vec::new();
    let mut first = mark.is_empty().then_some(0.0);
    let mut buf = [0; 4096];
    loop {
        match output.read(&mut buf).map_err(|error| failed(&error))? {
            0 => break,
            count => seen.extend_from_slice(buf.get(..count).unwrap_or_default()),
        }
        if first.is_none() && seen.windows(mark.len()).any(|window| window == mark) {
            first = Some(nanoseconds(start));
        }
    }
    let mut status = 0;
    let mut usage = MaybeUninit::<libc::rusage>::zeroed();
    // SAFETY: both places are writable, and of the types that the call writes.
    let ended =
        unsafe { libc::wait4(child.id().cast_signed(), &raw mut status, 0, usage.as_mut_ptr()) };
    let total = nanoseconds(start);
    if ended <= 0 || status != 0 {
        return Err(failed(&format_args!("ended with wait status {status:#x}")));
    }
    // SAFETY: zeros are a valid value, and the call wrote another.
    let usage = unsafe { usage.assume_init() };
    let time = |value: libc::timeval| {
        Some(
            f64::from(i32::try_from(value.tv_sec).ok()?) * 1e9
                + f64::from(i32::try_from(value.tv_usec).ok()?) * 1e3,
        )
    };
    Ok(Sample {
        first: first.ok_or_else(|| failed(&"did not print what it was to print"))?,
        total,
        cpu: time(usage.ru_utime).zip(time(usage.ru_stime)).map_or(0.0, |(user, own)| user + own),
        resident: f64::from(i32::try_from(usage.ru_maxrss).unwrap_or(i32::MAX)),
    })
}

fn nanoseconds(start: Instant) -> f64 {
    start.elapsed().as_secs_f64() * 1e9
}

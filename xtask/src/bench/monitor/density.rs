//! Many guests at once: what an idle one occupies, and whether all of them answer.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpStream;
use std::process::{Child, ChildStdout, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::process::Pid;

use super::Bench;
use super::row::{Goal, Row, Unit};
use crate::{process, qemu};

/// What the default image prints when it is at its prompt, or at its commands.
const READY: &str = "janus: ready";
/// The longest that a guest may take to be ready, or to answer, while all others do the same.
const PATIENCE: Duration = Duration::from_mins(1);
/// Guests that serve at once, at most.
const SERVERS: u32 = 100;
/// What the test disk has, and what it says.
const PAGE: (&str, &[u8]) = ("/hello.txt", b"hello, world\n");

/// Guests that run; killed when dropped.
#[derive(Default)]
struct Guests(Vec<(Child, BufReader<ChildStdout>)>);

impl Drop for Guests {
    fn drop(&mut self) {
        for (child, _) in &mut self.0 {
            // It may have ended by itself; its own process ends with it.
            let _ = child.kill();
        }
        for (child, _) in &mut self.0 {
            let _ = child.wait();
        }
    }
}

impl Guests {
    /// Starts one, and waits until it is ready.
    fn add(&mut self, bench: &Bench<'_>, arguments: &[&str]) -> Result<()> {
        let mut command = bench.janus(&bench.image);
        command.args(arguments).args(["--memory", "64M", "--exec", "sleep 600"]);
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn()?;
        let mut output = BufReader::new(child.stdout.take().context("no standard output")?);
        let mut line = String::new();
        let mut all = String::new();
        while !line.contains(READY) {
            line.clear();
            if output.read_line(&mut line)? == 0 {
                let _ = child.wait();
                bail!("guest {} ended before it was ready: {all}", self.0.len());
            }
            all.push_str(&line);
        }
        self.0.push((child, output));
        Ok(())
    }
}

/// The memory that a process occupies, its share of what it shares (`Pss`), in KiB.
fn occupied(pid: Pid) -> Result<f64> {
    let file = format!("/proc/{}/smaps_rollup", pid.as_raw_nonzero());
    let text = std::fs::read_to_string(&file).with_context(|| file.clone())?;
    let line = text.lines().find_map(|line| line.strip_prefix("Pss:"));
    let number = line.and_then(|line| line.trim().strip_suffix(" kB"));
    number.and_then(|number| number.trim().parse().ok()).context(file)
}

/// What each guest occupies, with all of its processes.
fn occupied_by_each(guests: &Guests) -> Result<Vec<f64>> {
    let family = process::processes();
    let each = guests.0.iter().map(|(child, _)| {
        let own = Pid::from_raw(i32::try_from(child.id())?).context("no process")?;
        let children = family.iter().filter(|(_, parent)| *parent == own).map(|(pid, _)| *pid);
        std::iter::once(own).chain(children).map(occupied).sum()
    });
    each.collect()
}

/// Idle guests, then guests that serve.
pub(super) fn rows(bench: &Bench<'_>) -> Result<Vec<Row>> {
    let mut rows = idle(bench)?;
    rows.push(serving(bench)?);
    Ok(rows)
}

fn idle(bench: &Bench<'_>) -> Result<Vec<Row>> {
    let count = bench.outsiders.guests;
    let mut guests = Guests::default();
    let mut times = Vec::new();
    for _ in 0..count {
        let start = Instant::now();
        guests.add(bench, &[])?;
        times.push(start.elapsed().as_secs_f64() * 1e9);
    }
    let shares = occupied_by_each(&guests)?;
    Ok(vec![
        Row::new("A3", &format!("memory of an idle guest, of {count}"), Unit::Kibibytes, shares)
            .fixed("solo5-spt, elsewhere", 177.0, Goal::AtMost(0.9))
            .fixed("Firecracker, elsewhere", 4168.0, Goal::AtMost(0.25)),
        Row::new("", "  a start beside the others", Unit::Milliseconds, times),
    ])
}

/// All connections first, then all questions, then all answers.
fn serving(bench: &Bench<'_>) -> Result<Row> {
    let count = bench.outsiders.guests.min(SERVERS);
    let disk = format!("{},ro", bench.disk.display());
    let mut guests = Guests::default();
    let mut ports = Vec::new();
    for _ in 0..count {
        let port = qemu::free_port(0)?;
        guests.add(bench, &["--disk", &disk, "--publish", &format!("{port}:80")])?;
        ports.push(port);
    }
    let mut streams = Vec::new();
    for port in ports {
        let stream = TcpStream::connect(("127.0.0.1", port))?;
        stream.set_read_timeout(Some(PATIENCE))?;
        streams.push(stream);
    }
    for stream in &mut streams {
        let (path, _) = PAGE;
        write!(stream, "GET {path} HTTP/1.1\r\nHost: bench\r\nConnection: close\r\n\r\n")?;
    }
    let mut right = 0;
    for stream in &mut streams {
        let mut answer = Vec::new();
        // One that does not answer is one that is not counted.
        let whole = stream.read_to_end(&mut answer).is_ok();
        if whole && answer.starts_with(b"HTTP/1.1 200 ") && answer.ends_with(PAGE.1) {
            right += 1;
        }
    }
    let what = format!("right answers of {count} guests that serve at once");
    Ok(Row::new("", &what, Unit::Count, vec![f64::from(right)]).fixed(
        "all",
        f64::from(count),
        Goal::AtLeast(1.0),
    ))
}

//! Child processes that never outlive their welcome: a time limit and SIGKILL behind each, and behind
//! whatever they started themselves.

use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal, kill_process};

use crate::console::{Console, Echo};

/// A running program whose output is collected; killed when dropped.
#[derive(Debug)]
pub(crate) struct Process {
    child: Child,
    /// Standard output (and, for [`spawn`], nothing else).
    pub(crate) console: Console,
    /// Standard error.
    pub(crate) errors: Console,
    /// When it was started.
    pub(crate) started: Instant,
}

/// Starts a program with its outputs collected and standard input as `command` has it.
///
/// # Errors
/// It cannot be started.
pub(crate) fn spawn(command: &mut Command, echo: Echo) -> Result<Process> {
    let started = Instant::now();
    let mut child = command
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot start {}", command.get_program().to_string_lossy()))?;
    let stdout = child.stdout.take().context("no standard output")?;
    let stderr = child.stderr.take().context("no standard error")?;
    Ok(Process {
        child,
        console: Console::attach(stdout, echo),
        errors: Console::attach(stderr, Echo::Quiet),
        started,
    })
}

impl Process {
    /// Waits for the end; on `deadline` kills and answers `None`.
    ///
    /// # Errors
    /// The system refuses to wait.
    pub(crate) fn end(&mut self, deadline: Instant) -> Result<Option<ExitStatus>> {
        let mut pause = Duration::from_millis(1);
        loop {
            if let Some(status) = self.child.try_wait()? {
                return Ok(Some(status));
            }
            if Instant::now() >= deadline {
                self.kill();
                return Ok(None);
            }
            std::thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_millis(10));
        }
    }

    /// SIGKILL, to it and all its descendants: a hung TCG run ignores everything else, and cargo's death
    /// alone would leave the test that hangs.
    pub(crate) fn kill(&mut self) {
        if let (Ok(None), Ok(pid)) = (self.child.try_wait(), i32::try_from(self.child.id()))
            && let Some(pid) = Pid::from_raw(pid)
        {
            kill_descendants(pid);
        }
        // It may have ended by itself meanwhile.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Its standard input, once, if it was piped.
    pub(crate) fn stdin(&mut self) -> Option<std::process::ChildStdin> {
        self.child.stdin.take()
    }
}

/// Kills what `root`, a child of ours that we have not waited for, has started.
///
/// They stay in our process group, so that Ctrl-C at a terminal reaches them; hence the walk. Each is stopped
/// before its own children are looked for, so that the family does not grow meanwhile.
fn kill_descendants(root: Pid) {
    // One that has ended is no trouble, and there is nobody else's to hit: a stopped parent reaps nobody.
    let signal = |pid, signal| {
        let _ = kill_process(pid, signal);
    };
    let mut family = vec![root];
    signal(root, Signal::STOP);
    loop {
        let born: Vec<Pid> = processes()
            .into_iter()
            .filter(|(pid, parent)| family.contains(parent) && !family.contains(pid))
            .map(|(pid, _)| pid)
            .collect();
        if born.is_empty() {
            break;
        }
        for pid in born {
            signal(pid, Signal::STOP);
            family.push(pid);
        }
    }
    for pid in family.into_iter().skip(1) {
        signal(pid, Signal::KILL);
    }
}

/// Every process with its parent.
pub(crate) fn processes() -> Vec<(Pid, Pid)> {
    let Ok(entries) = std::fs::read_dir("/proc") else { return Vec::new() };
    let parent = |entry: std::io::Result<std::fs::DirEntry>| {
        let entry = entry.ok()?;
        let pid = Pid::from_raw(entry.file_name().to_str()?.parse().ok()?)?;
        let stat = std::fs::read_to_string(entry.path().join("stat")).ok()?;
        // `pid (name) state parent`; the name may hold anything, parentheses too.
        let parent = stat.rsplit_once(") ")?.1.split(' ').nth(1)?.parse().ok()?;
        Some((pid, Pid::from_raw(parent)?))
    };
    entries.filter_map(parent).collect()
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Runs a helper program to its end and answers its standard output.
///
/// # Errors
/// It cannot be started, takes longer than a minute, or fails; the message has its last lines.
pub(crate) fn output(command: &mut Command) -> Result<String> {
    output_within(command, Duration::from_mins(1))
}

/// As [`output`], with another limit than a minute.
///
/// # Errors
/// It cannot be started, takes longer, or fails; the message has its last lines.
pub(crate) fn output_within(command: &mut Command, limit: Duration) -> Result<String> {
    let name = command.get_program().to_string_lossy().into_owned();
    let mut process = spawn(command.stdin(Stdio::null()), Echo::Quiet)?;
    let status = process.end(Instant::now() + limit)?;
    process.errors.finished(Instant::now() + Duration::from_secs(1));
    match status {
        Some(status) if status.success() => {}
        Some(status) => bail!("{name} failed ({status}){}", process.errors.tail(5)),
        None => bail!("{name} took more than {} s", limit.as_secs()),
    }
    // The reader thread may be a moment behind the process.
    process.console.finished(Instant::now() + Duration::from_secs(1));
    Ok(process.console.text())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn output_is_complete_and_failure_says_why() {
        assert_eq!(output(Command::new("sh").args(["-c", "echo a; echo b"])).unwrap(), "a\nb\n");
        let error =
            output(Command::new("sh").args(["-c", "echo no such luck >&2; exit 3"])).unwrap_err();
        assert!(error.to_string().contains("no such luck"), "{error}");
    }

    #[test]
    fn a_hung_program_is_killed_at_its_deadline() {
        let mut process = spawn(Command::new("sleep").arg("60"), Echo::Quiet).unwrap();
        assert!(process.end(Instant::now() + Duration::from_millis(30)).unwrap().is_none());
        assert!(process.started.elapsed() < Duration::from_secs(60));
    }

    #[test]
    fn what_a_hung_program_started_dies_with_it() {
        let mut process =
            spawn(Command::new("sh").args(["-c", "sleep 600 & echo $!; wait"]), Echo::Quiet)
                .unwrap();
        let soon = Instant::now() + Duration::from_secs(60);
        let line = process.console.line(&mut 0, soon, |line| Some(line.to_owned()));
        let sleeper = Pid::from_raw(line.unwrap().0.parse().unwrap()).unwrap();
        let runs = || {
            let stat = std::fs::read_to_string(format!("/proc/{}/stat", sleeper.as_raw_nonzero()));
            stat.is_ok_and(|stat| !stat.contains(") Z "))
        };
        assert!(runs());
        process.kill();
        // Its pipe closes when the last holder has gone.
        process.console.finished(Instant::now() + Duration::from_secs(60));
        assert!(process.console.is_closed() && !runs());
    }
}

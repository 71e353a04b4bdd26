//! Child processes that never outlive their welcome: a time limit and SIGKILL behind each.

use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

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

    /// SIGKILL: a hung TCG run ignores everything else.
    pub(crate) fn kill(&mut self) {
        // It may have ended by itself meanwhile.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Its standard input, once, if it was piped.
    pub(crate) fn stdin(&mut self) -> Option<std::process::ChildStdin> {
        self.child.stdin.take()
    }
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
    let name = command.get_program().to_string_lossy().into_owned();
    let mut process = spawn(command.stdin(Stdio::null()), Echo::Quiet)?;
    let status = process.end(Instant::now() + Duration::from_mins(1))?;
    process.errors.finished(Instant::now() + Duration::from_secs(1));
    match status {
        Some(status) if status.success() => {}
        Some(status) => bail!("{name} failed ({status}){}", process.errors.tail(5)),
        None => bail!("{name} took more than a minute"),
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
        assert!(process.started.elapsed() < Duration::from_secs(10));
    }
}

//! Carrying out a test's steps while its guest runs, whatever it runs on.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::data::{Case, Step};
use super::disks;
use crate::{disk, paths, process};

/// What steps need of the place where the guest runs.
pub(crate) trait Place {
    /// Waits for a line of the guest's console with `text`.
    fn wait(&mut self, text: &str, deadline: Instant) -> Result<()>;
    /// Types on the guest's console.
    fn type_text(&mut self, text: &str) -> Result<()>;
    /// Fetches a path from the guest's HTTP server: the sum of what arrived, and the HTTP status.
    fn fetch(&mut self, path: &str, deadline: Instant) -> Result<Fetched>;
    /// Runs a command in dom0.
    fn dom0(&mut self, command: &str, deadline: Instant) -> Result<()>;
    /// Gives a command to QEMU's monitor.
    fn monitor(&mut self, command: &str) -> Result<()>;
    /// Ends the guest by force.
    fn kill(&mut self) -> Result<()>;
}

/// What curl brought.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Fetched {
    /// HTTP status.
    pub(crate) status: u16,
    /// SHA-256 of the body.
    pub(crate) sha256: String,
}

/// Runs the steps; `true` if the last one killed the guest on purpose.
///
/// # Errors
/// A step fails; the message says which.
pub(crate) fn run(case: &Case, place: &mut dyn Place, deadline: Instant) -> Result<bool> {
    for step in &case.steps {
        match step {
            Step::Kill => {
                place.kill()?;
                return Ok(true);
            }
            _ => one(step, place, deadline).with_context(|| format!("step {step:?}"))?,
        }
    }
    Ok(false)
}

fn one(step: &Step, place: &mut dyn Place, deadline: Instant) -> Result<()> {
    match step {
        Step::Wait(text) => place.wait(text, deadline),
        Step::Type(text) => place.type_text(text),
        Step::Dom0(command) => place.dom0(command, deadline),
        Step::Monitor(command) => place.monitor(command),
        Step::SleepMs(ms) => {
            std::thread::sleep(Duration::from_millis(*ms));
            Ok(())
        }
        Step::Status(path, expected) => {
            let fetched = place.fetch(path, deadline)?;
            if fetched.status != *expected {
                bail!("HTTP status {}, not {expected}", fetched.status);
            }
            Ok(())
        }
        Step::Fetch(path) => {
            let fetched = place.fetch(path, deadline)?;
            let expected = disk::sha256(&disks::original(path)?)?;
            if fetched.status != 200 || fetched.sha256 != expected {
                bail!("HTTP status {}, sha256 {}, not {expected}", fetched.status, fetched.sha256);
            }
            Ok(())
        }
        // Handled by the caller.
        Step::Kill => Ok(()),
    }
}

/// The words that both this machine's curl and dom0's are called with.
pub(crate) fn curl_words(url: &str, file: &str, deadline: Instant) -> Vec<String> {
    let limit = deadline.saturating_duration_since(Instant::now()).as_secs().max(1);
    ["-sS", "--max-time", &limit.to_string(), "-w", "%{http_code}", "-o", file, url]
        .map(str::to_owned)
        .to_vec()
}

/// Fetches with this machine's curl.
///
/// # Errors
/// curl fails: no connection, or less than the promised length.
pub(crate) fn fetch_here(url: &str, deadline: Instant) -> Result<Fetched> {
    let curl = paths::program(&["curl"]).context("no curl (install curl)")?;
    let file = paths::cache("fetch")?.join(format!(
        "{}-{:?}",
        std::process::id(),
        std::thread::current().id()
    ));
    let result = fetch_into(&curl, url, &file, deadline);
    // It may not exist, if nothing arrived.
    let _ = std::fs::remove_file(&file);
    result
}

fn fetch_into(curl: &Path, url: &str, file: &Path, deadline: Instant) -> Result<Fetched> {
    std::fs::write(file, [])?;
    let name = file.to_str().context("a file name that is not text")?;
    let status = process::output(Command::new(curl).args(curl_words(url, name, deadline)))?;
    Ok(Fetched { status: status.trim().parse()?, sha256: disk::sha256(file)? })
}

//! The guests under measurement: in QEMU, or in the Xen lab; both are typed to and fetched from alike.

use std::io::Write as _;
use std::process::{ChildStdin, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};

use crate::console::Echo;
use crate::lab::{Domain, Guest, Lab};
use crate::process::{self, Process};
use crate::qemu::Vm;

/// How long anything may take before the guest counts as hung.
const LIMIT: Duration = Duration::from_secs(60);

/// How long a boot in QEMU may take.
const BOOT_LIMIT: Duration = Duration::from_secs(20);

/// A running guest.
pub(crate) trait Subject {
    /// Waits for a line with each of `texts`, in any order; answers the time since the start.
    fn ready(&mut self, texts: &[&str]) -> Result<Duration>;
    /// Types a line, and waits for a line of output that begins with `answer`; answers what follows that.
    fn ask(&mut self, line: &str, answer: &str) -> Result<String>;
    /// Fetches a file from the guest; answers bytes and seconds, as curl measured them.
    fn fetch(&mut self, path: &str) -> Result<(u64, f64)>;
}

/// curl's words: throw the body away, say how long it took and how much it was.
fn curl_words(url: &str) -> Vec<String> {
    [
        "-sS",
        "-f",
        "--max-time",
        "60",
        "-o",
        "/dev/null",
        "-w",
        "%{size_download} %{time_total}",
        url,
    ]
    .map(str::to_owned)
    .to_vec()
}

fn measured(text: &str) -> Result<(u64, f64)> {
    let mut parts = text.split_whitespace();
    let mut next = || parts.next().context("curl printed too little");
    Ok((next()?.parse()?, next()?.parse()?))
}

/// Takes the texts that `line` holds off the list; `true` when none is left.
fn cross_off(left: &mut Vec<String>, line: &str) -> Option<()> {
    left.retain(|text| !line.contains(text.as_str()));
    left.is_empty().then_some(())
}

/// A guest in QEMU.
pub(crate) struct InQemu {
    process: Process,
    stdin: ChildStdin,
    cursor: usize,
    port: u16,
}

impl InQemu {
    /// Starts it; the first forwarded port is the one to fetch from.
    pub(crate) fn start(vm: &Vm) -> Result<Self> {
        let port = vm.forwards.as_ref().and_then(|list| list.first()).context("no network")?.0;
        let mut process = process::spawn(vm.command().stdin(Stdio::piped()), Echo::Quiet)?;
        let stdin = process.stdin().context("no standard input")?;
        Ok(Self { process, stdin, cursor: 0, port })
    }
}

impl Subject for InQemu {
    fn ready(&mut self, texts: &[&str]) -> Result<Duration> {
        let mut left: Vec<String> = texts.iter().map(|text| (*text).to_owned()).collect();
        let deadline = self.process.started + BOOT_LIMIT;
        let found = self
            .process
            .console
            .line(&mut self.cursor, deadline, |line| cross_off(&mut left, line));
        match found {
            Ok(((), at)) => Ok(at - self.process.started),
            Err(missed) => Err(anyhow!(
                "the guest {missed} before it was ready:{}",
                self.process.console.tail(8)
            )),
        }
    }
    fn ask(&mut self, line: &str, answer: &str) -> Result<String> {
        self.stdin.write_all(format!("{line}\n").as_bytes())?;
        let deadline = Instant::now() + LIMIT;
        let found =
            self.process.console.line(&mut self.cursor, deadline, |line| after(line, answer));
        found.map(|(text, _)| text).map_err(|missed| {
            anyhow!("`{line}`: the guest {missed}:{}", self.process.console.tail(8))
        })
    }
    fn fetch(&mut self, path: &str) -> Result<(u64, f64)> {
        let url = format!("http://127.0.0.1:{}{path}", self.port);
        measured(&process::output(Command::new("curl").args(curl_words(&url)))?)
    }
}

/// What follows `answer` in `line`.
fn after(line: &str, answer: &str) -> Option<String> {
    line.split_once(answer).map(|(_, rest)| rest.trim().to_owned())
}

/// A guest in the lab.
pub(crate) struct InLab<'a> {
    lab: &'a mut Lab,
    guest: Guest,
    started: Instant,
}

impl<'a> InLab<'a> {
    /// Creates it and lets it go: the time of `xl create` is the toolstack's, not the guest's.
    pub(crate) fn start(lab: &'a mut Lab, domain: &Domain) -> Result<Self> {
        let guest = lab.create_paused(domain)?;
        let started = Instant::now();
        lab.run(&format!("xl unpause {}", domain.name), LIMIT)?;
        Ok(Self { lab, guest, started })
    }

    /// Ends it.
    pub(crate) fn destroy(self) -> Result<()> {
        self.lab.destroy(&self.guest)
    }
}

impl Subject for InLab<'_> {
    fn ready(&mut self, texts: &[&str]) -> Result<Duration> {
        let mut left: Vec<String> = texts.iter().map(|text| (*text).to_owned()).collect();
        let ((), at) =
            self.lab.guest_line(&mut self.guest, LIMIT, |line| cross_off(&mut left, line))?;
        Ok(at - self.started)
    }
    fn ask(&mut self, line: &str, answer: &str) -> Result<String> {
        self.lab.type_to(&self.guest, &format!("{line}\n"))?;
        let (text, _) = self
            .lab
            .guest_line(&mut self.guest, LIMIT, |line| after(line, answer))
            .with_context(|| line.to_owned())?;
        Ok(text)
    }
    fn fetch(&mut self, path: &str) -> Result<(u64, f64)> {
        let words = curl_words(&format!("http://10.0.0.2{path}"))
            .join(" ")
            .replace("%{size_download} %{time_total}", "'%{size_download} %{time_total}'");
        let (status, text) = self.lab.run(&format!("curl {words}"), LIMIT)?;
        if status != 0 {
            bail!("curl in dom0 ended with {status}: {}", text.trim());
        }
        measured(&text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_is_ready_when_every_word_has_come() {
        let mut left = vec!["ready".to_owned(), "address".to_owned()];
        assert!(cross_off(&mut left, "eth0 has the address x").is_none());
        assert!(cross_off(&mut left, "nothing").is_none());
        assert!(cross_off(&mut left, "ready after 3 ms").is_some());
    }

    #[test]
    fn curls_figures_are_read() {
        assert_eq!(measured("67108864 1.250000\n").unwrap(), (67_108_864, 1.25));
        assert!(measured("67108864").is_err());
    }
}

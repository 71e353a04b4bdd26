//! The guests under measurement: in QEMU, or in the Xen lab; both are typed to and fetched from alike.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
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

/// Bytes of a TCP stream.
pub(crate) const STREAM: u64 = 64 << 20;
/// The guest's ports for streams in and out.
pub(crate) const STREAM_PORTS: [u16; 2] = [5001, 5002];

/// How long a guest took.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ready {
    /// From the start of its machine.
    pub(crate) whole: Duration,
    /// By its own clock, in milliseconds.
    pub(crate) own_ms: Option<f64>,
}

/// A running guest.
pub(crate) trait Subject {
    /// Waits for a line with each of `texts`, in any order.
    fn ready(&mut self, texts: &[&str]) -> Result<Ready>;
    /// Types a line, and waits for a line of output that begins with `answer`; answers what follows that.
    fn ask(&mut self, line: &str, answer: &str) -> Result<String>;
    /// Waits for a line of output that begins with `answer`; answers what follows that.
    fn answer(&mut self, answer: &str) -> Result<String>;
    /// Sends [`STREAM`] zeroes, or a little more, to a port of the guest.
    fn push(&mut self, port: u16) -> Result<()>;
    /// Takes what a port of the guest sends until its end.
    fn pull(&mut self, port: u16) -> Result<()>;
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

/// Takes the texts that `line` holds off the list, and what the guest says of its own time; something when none is left.
fn cross_off(left: &mut Vec<String>, own_ms: &mut Option<f64>, line: &str) -> Option<()> {
    if let Some((_, rest)) = line.split_once("ready after ") {
        *own_ms = rest.split_whitespace().next().and_then(|word| word.parse().ok());
    }
    left.retain(|text| !line.contains(text.as_str()));
    left.is_empty().then_some(())
}

/// A guest in QEMU.
pub(crate) struct InQemu {
    process: Process,
    stdin: ChildStdin,
    cursor: usize,
    port: u16,
    /// Where the ports of [`STREAM_PORTS`] are on this machine.
    streams: Vec<(u16, u16)>,
}

impl InQemu {
    /// Starts it; the first forwarded port is the one to fetch from.
    pub(crate) fn start(vm: &Vm) -> Result<Self> {
        let (first, streams) =
            vm.forwards.as_ref().and_then(|list| list.split_first()).context("no network")?;
        let (port, streams) = (first.0, streams.to_vec());
        let mut process = process::spawn(vm.command().stdin(Stdio::piped()), Echo::Quiet)?;
        let stdin = process.stdin().context("no standard input")?;
        Ok(Self { process, stdin, cursor: 0, port, streams })
    }

    /// Starts another program that runs a guest on its standard streams; where ports of the guest's are on this machine.
    pub(crate) fn of_command(mut command: Command, streams: Vec<(u16, u16)>) -> Result<Self> {
        let mut process = process::spawn(command.stdin(Stdio::piped()), Echo::Quiet)?;
        let stdin = process.stdin().context("no standard input")?;
        let port = streams.first().map_or(0, |(here, _)| *here);
        Ok(Self { process, stdin, cursor: 0, port, streams })
    }

    fn connect(&self, port: u16) -> Result<TcpStream> {
        let forward = self.streams.iter().find(|(_, guest)| *guest == port);
        let (here, _) = forward.context("no such port")?;
        let stream = TcpStream::connect(("127.0.0.1", *here))?;
        stream.set_read_timeout(Some(LIMIT))?;
        stream.set_write_timeout(Some(LIMIT))?;
        Ok(stream)
    }
}

impl Subject for InQemu {
    fn ready(&mut self, texts: &[&str]) -> Result<Ready> {
        let mut left: Vec<String> = texts.iter().map(|text| (*text).to_owned()).collect();
        let mut own_ms = None;
        let deadline = self.process.started + BOOT_LIMIT;
        let found = self
            .process
            .console
            .line(&mut self.cursor, deadline, |line| cross_off(&mut left, &mut own_ms, line));
        match found {
            Ok(((), at)) => Ok(Ready { whole: at - self.process.started, own_ms }),
            Err(missed) => Err(anyhow!(
                "the guest {missed} before it was ready:{}",
                self.process.console.tail(8)
            )),
        }
    }
    fn ask(&mut self, line: &str, answer: &str) -> Result<String> {
        self.stdin.write_all(format!("{line}\n").as_bytes())?;
        self.answer(answer).with_context(|| line.to_owned())
    }
    fn answer(&mut self, answer: &str) -> Result<String> {
        let deadline = Instant::now() + LIMIT;
        let found =
            self.process.console.line(&mut self.cursor, deadline, |line| after(line, answer));
        found
            .map(|(text, _)| text)
            .map_err(|missed| anyhow!("the guest {missed}:{}", self.process.console.tail(8)))
    }
    fn push(&mut self, port: u16) -> Result<()> {
        let mut stream = self.connect(port)?;
        let zeroes = vec![0; 1 << 20];
        for _ in 0..STREAM / (1 << 20) {
            stream.write_all(&zeroes)?;
        }
        // Until the guest has it: what is dropped now would be lost.
        while stream.read(&mut [0; 4096])? > 0 {}
        Ok(())
    }
    fn pull(&mut self, port: u16) -> Result<()> {
        let mut stream = self.connect(port)?;
        let mut buffer = vec![0; 1 << 20];
        while stream.read(&mut buffer)? > 0 {}
        Ok(())
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
    fn ready(&mut self, texts: &[&str]) -> Result<Ready> {
        let mut left: Vec<String> = texts.iter().map(|text| (*text).to_owned()).collect();
        let mut own_ms = None;
        let ((), at) = self
            .lab
            .guest_line(&mut self.guest, LIMIT, |line| cross_off(&mut left, &mut own_ms, line))?;
        Ok(Ready { whole: at - self.started, own_ms })
    }
    fn ask(&mut self, line: &str, answer: &str) -> Result<String> {
        self.lab.type_to(&self.guest, &format!("{line}\n"))?;
        self.answer(answer).with_context(|| line.to_owned())
    }
    fn answer(&mut self, answer: &str) -> Result<String> {
        let (text, _) = self.lab.guest_line(&mut self.guest, LIMIT, |line| after(line, answer))?;
        Ok(text)
    }
    fn push(&mut self, port: u16) -> Result<()> {
        // An upload that gets no answer: the guest ends it when it has its bytes, which curl calls an error.
        let words = "-s -o /dev/null --max-time 60 --http1.0 -H Expect: -T /tmp/stream";
        self.lab.run(&format!("curl {words} http://10.0.0.2:{port}/"), LIMIT)?;
        Ok(())
    }
    fn pull(&mut self, port: u16) -> Result<()> {
        // Gopher: no headers, only bytes until the end.
        let words = "-sS -o /dev/null --max-time 60";
        let (status, text) =
            self.lab.run(&format!("curl {words} gopher://10.0.0.2:{port}/"), LIMIT)?;
        if status != 0 {
            bail!("curl in dom0 ended with {status}: {}", text.trim());
        }
        Ok(())
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
        let mut own = None;
        assert!(cross_off(&mut left, &mut own, "janus: ready after 3.250 ms").is_none());
        assert!(cross_off(&mut left, &mut own, "nothing").is_none());
        assert!(cross_off(&mut left, &mut own, "eth0 has the address x").is_some());
        assert_eq!(own, Some(3.25));
    }

    #[test]
    fn curls_figures_are_read() {
        assert_eq!(measured("67108864 1.250000\n").unwrap(), (67_108_864, 1.25));
        assert!(measured("67108864").is_err());
    }
}

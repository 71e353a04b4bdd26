//! The commands for guests that run: thin clients of their control sockets.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::Args;
use serde_json::Value;

use super::options::{duration, mebibytes};
use super::outcome::{TIMEOUT, USAGE};
use super::table;
use crate::control::client::{ClientError, Connection};
use crate::control::protocol::{Exit, Info, Request, Stat};
use crate::control::runtime::{Directory, Entry};

/// How long a guest may take to answer what it answers at once.
const PATIENCE: Duration = Duration::from_secs(5);

/// Names a guest.
#[derive(Clone, Debug, Args)]
pub(super) struct Named {
    /// The guest's name, the beginning of it, or its process number.
    name: String,
}

/// Lists the guests that run.
#[derive(Clone, Debug, Args)]
pub(super) struct List {
    /// As JSON.
    #[arg(long)]
    json: bool,
}

/// Asks a guest to power off, and waits until it has.
#[derive(Clone, Debug, Args)]
pub(super) struct Stop {
    #[command(flatten)]
    guest: Named,
    /// Ends it as it is if it has not ended by then.
    #[arg(long, value_name = "TIME", value_parser = duration)]
    timeout: Option<Duration>,
}

/// Shows what a guest has done: hypercalls, devices, memory.
#[derive(Clone, Debug, Args)]
pub(super) struct Statistics {
    #[command(flatten)]
    guest: Named,
    /// As JSON.
    #[arg(long)]
    json: bool,
    /// Again and again, every second or so often.
    #[arg(long, value_name = "TIME", num_args = 0..=1, default_missing_value = "1s", value_parser = duration)]
    watch: Option<Duration>,
}

/// Shows or changes how much memory a guest is to keep; its balloon driver does it.
#[derive(Clone, Debug, Args)]
pub(super) struct Memory {
    #[command(flatten)]
    guest: Named,
    /// In MiB unless K, M or G follows.
    #[arg(value_parser = mebibytes)]
    memory: Option<u64>,
}

/// Waits until a guest has ended, and ends with its exit code.
#[derive(Clone, Debug, Args)]
pub(super) struct Wait {
    #[command(flatten)]
    guest: Named,
    /// Gives up after so long, with code 124.
    #[arg(long, value_name = "TIME", value_parser = duration)]
    timeout: Option<Duration>,
}

/// What went wrong, for people.
type Failure = String;

/// The answer of a command as the exit code of this program.
pub(super) fn code(result: Result<u8, Failure>) -> ExitCode {
    ExitCode::from(result.unwrap_or_else(|error| {
        eprintln!("janus: {error}");
        USAGE
    }))
}

pub(super) fn find(named: &Named) -> Result<Entry, Failure> {
    Directory::open().and_then(|directory| directory.find(&named.name)).map_err(|e| e.to_string())
}

/// Asks what is answered at once.
fn ask<T: serde::de::DeserializeOwned>(guest: &Entry, request: &Request) -> Result<T, Failure> {
    let mut connection = Connection::open(guest).map_err(|error| error.to_string())?;
    let asked = connection.set_timeout(Some(PATIENCE)).and_then(|()| connection.ask(request));
    asked.map_err(|error| format!("{}: {error}", guest.name))
}

/// A request that has no other answer than that it was done.
pub(super) fn simple(named: &Named, request: &Request) -> Result<u8, Failure> {
    ask::<Value>(&find(named)?, request).map(|_| 0)
}

impl List {
    pub(super) fn run(&self) -> Result<u8, Failure> {
        let directory = Directory::open().map_err(|error| error.to_string())?;
        let guests = directory.guests().map_err(|error| error.to_string())?;
        // One that ends meanwhile is not there.
        let infos: Vec<Info> =
            guests.iter().filter_map(|guest| ask(guest, &Request::Info).ok()).collect();
        if self.json {
            println!(
                "{}",
                serde_json::to_string_pretty(&infos).map_err(|error| error.to_string())?
            );
        } else {
            print!("{}", table::guests(&infos));
        }
        Ok(0)
    }
}

/// Waits for the end; `None`: not by then.
fn wait_for_end(guest: &Entry, until: Option<Instant>) -> Result<Option<Exit>, Failure> {
    let mut connection = Connection::open(guest).map_err(|error| error.to_string())?;
    if let Some(until) = until {
        let left = until.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
        connection.set_timeout(Some(left)).map_err(|error| error.to_string())?;
    }
    match connection.ask(&Request::Wait) {
        Ok(exit) => Ok(Some(exit)),
        Err(ClientError::Connection(error))
            if matches!(
                error.kind(),
                std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut
            ) =>
        {
            Ok(None)
        }
        // Killed, with its process.
        Err(ClientError::Gone) => Ok(Some(Exit { reason: "killed".into(), code: 137 })),
        Err(error) => Err(format!("{}: {error}", guest.name)),
    }
}

impl Stop {
    pub(super) fn run(&self) -> Result<u8, Failure> {
        let guest = find(&self.guest)?;
        let until = self.timeout.map(|time| Instant::now() + time);
        ask::<Value>(&guest, &Request::Stop)?;
        if wait_for_end(&guest, until)?.is_none() {
            eprintln!("janus: {} did not power off in time, and is ended as it is", guest.name);
            ask::<Value>(&guest, &Request::Kill)?;
            wait_for_end(&guest, Some(Instant::now() + PATIENCE))?;
        }
        Ok(0)
    }
}

/// Ends a guest as it is, and waits until it is gone.
pub(super) fn kill(named: &Named) -> Result<u8, Failure> {
    let guest = find(named)?;
    let mut waiting = Connection::open(&guest).map_err(|error| error.to_string())?;
    waiting.set_timeout(Some(PATIENCE)).map_err(|error| error.to_string())?;
    ask::<Value>(&guest, &Request::Kill)?;
    // Gone is what it should be.
    let _ = waiting.ask::<Exit>(&Request::Wait);
    Ok(0)
}

impl Wait {
    pub(super) fn run(&self) -> Result<u8, Failure> {
        let until = self.timeout.map(|time| Instant::now() + time);
        let exit = wait_for_end(&find(&self.guest)?, until)?;
        Ok(exit.map_or(TIMEOUT, |exit| exit.code))
    }
}

impl Memory {
    pub(super) fn run(&self) -> Result<u8, Failure> {
        let request = Request::Memory { mib: self.memory };
        let answer: Value = ask(&find(&self.guest)?, &request)?;
        let of = |name: &str| answer.get(name).and_then(Value::as_u64).unwrap_or(0) / 1024;
        println!(
            "{} MiB, told to keep {}, at most {}",
            of("current_kib"),
            of("target_kib"),
            of("most_kib")
        );
        Ok(0)
    }
}

impl Statistics {
    pub(super) fn run(&self) -> Result<u8, Failure> {
        let guest = find(&self.guest)?;
        loop {
            let stat: Stat = match ask(&guest, &Request::Stat) {
                // While it is watched, its end is the end.
                Err(_) if self.watch.is_some() && find(&self.guest).is_err() => return Ok(0),
                asked => asked?,
            };
            if self.json {
                println!("{}", serde_json::to_string(&stat).map_err(|error| error.to_string())?);
            } else {
                if self.watch.is_some() {
                    // The screen from its top.
                    print!("\x1b[H\x1b[J");
                }
                print!("{}", table::stat(&stat));
            }
            match self.watch {
                Some(time) => std::thread::sleep(time),
                None => return Ok(0),
            }
        }
    }
}

/// Prints what happens to a guest as JSON lines, until it ends.
pub(super) fn events(named: &Named) -> Result<u8, Failure> {
    let guest = find(named)?;
    let mut connection = Connection::open(&guest).map_err(|error| error.to_string())?;
    connection.ask::<Value>(&Request::Events).map_err(|error| error.to_string())?;
    while let Some(line) = connection.line().map_err(|error| error.to_string())? {
        println!("{line}");
    }
    Ok(0)
}

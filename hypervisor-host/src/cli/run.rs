//! `janus run`: one guest in this process, from start to start.
//!
//! The guest's first CPU runs on this thread. Everything else (what is typed, the control socket, signals, the time-out)
//! is the affair of one thread beside it (`helper.rs`).

use std::io::Write;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::engine::{Choice, Engine, choose};
use super::helper::{Helper, Work};
use super::options::{Action, ConsolePlace, RunArguments};
use super::outcome::{self, Cut, Outcome, REBOOT, USAGE};
use super::tail::Tail;
use super::terminal::{self, Raw};
use super::{crash, describe, detach, kvm, qemu, table};
use crate::control::protocol::Exit;
use crate::gdb;
use crate::guest::{self, Description, Guest};
use crate::host::Endpoint;
use crate::journal::{Event, Journal};
use crate::kvm::probe;
use crate::supervise::Supervised;

/// A guest that ends sooner gets no control socket: nobody could have asked.
const SOON: Duration = Duration::from_millis(20);

/// Something prevents the start.
type Refusal = String;

pub(super) fn run(arguments: &RunArguments) -> ExitCode {
    let code = describe::describe(arguments).and_then(|description| {
        let suits_monitor = || guest::suits_monitor(&description.kernel);
        let ask = || probe::probe(Path::new(probe::DEVICE));
        let Choice { engine, reason } = choose(arguments.engine, suits_monitor, ask);
        if let Some(reason) = reason.filter(|_| !detach::is_detached()) {
            eprintln!("janus: {} runs on {reason}", description.name);
        }
        if engine != Engine::Monitor {
            of_the_monitor(arguments)?;
        }
        if arguments.detach && !detach::is_detached() {
            return detach::launch(&description.name);
        }
        match engine {
            Engine::Monitor => {
                let session = Session::new(arguments, description)?;
                let code = session.run();
                session.helper.finish();
                code
            }
            Engine::Kvm => again(arguments, || kvm::once(arguments, &description)),
            Engine::Qemu { kvm } => again(arguments, || qemu::once(arguments, &description, kvm)),
        }
    });
    ExitCode::from(code.unwrap_or_else(|error| {
        eprintln!("janus: {error}");
        USAGE
    }))
}

/// Refuses what the other engines do not have.
fn of_the_monitor(arguments: &RunArguments) -> Result<(), Refusal> {
    for (given, option) in [
        (arguments.detach, "--detach"),
        (arguments.paused, "--paused"),
        (arguments.gdb.is_some(), "--gdb"),
        (arguments.json.is_some(), "--json"),
        (arguments.crash_report.is_some(), "--crash-report"),
        (!arguments.console.is_empty(), "--console"),
        (arguments.max_memory.is_some(), "--max-memory"),
    ] {
        if given {
            return Err(format!("{option} needs --engine monitor"));
        }
    }
    Ok(())
}

/// Runs a guest as often as it asks for a reboot.
fn again(arguments: &RunArguments, once: impl Fn() -> Result<u8, Refusal>) -> Result<u8, Refusal> {
    let restarts = !arguments.no_reboot && arguments.on_reboot == Action::Restart;
    loop {
        match once()? {
            REBOOT if restarts => eprintln!("janus: the guest starts again"),
            code => return Ok(code),
        }
    }
}

/// What outlives a restart of the guest.
struct Session<'a> {
    arguments: &'a RunArguments,
    description: Description,
    journal: Arc<Journal>,
    supervised: Arc<Supervised>,
    tail: Tail,
    raw: Option<Arc<Raw>>,
    helper: Arc<Helper>,
    /// The thread beside the guest is wanted from the start.
    is_eager: bool,
    gdb: Option<gdb::Listener>,
}

impl<'a> Session<'a> {
    fn new(arguments: &'a RunArguments, description: Description) -> Result<Self, Refusal> {
        let journal = Arc::new(Journal::default());
        if let Some(place) = &arguments.json {
            journal.write_to(json_file(place)?);
        }
        let supervised = Arc::new(Supervised::new(&description, Arc::clone(&journal)));
        let tail = Tail::default();
        let gdb = match &arguments.gdb {
            None => None,
            Some(address) => {
                let listener = gdb::Listener::bind(address);
                let listener = listener.map_err(|error| format!("--gdb {address}: {error}"))?;
                eprintln!("janus: waits for gdb: target remote {}", listener.place());
                Some(listener)
            }
        };
        let wanted = prints(arguments) || arguments.console.is_empty();
        let mut takes_input = wanted && !detach::is_detached() && terminal::has_input();
        let mut raw = None;
        if takes_input && std::io::IsTerminal::is_terminal(&std::io::stdin()) {
            // In the background nothing can be read.
            raw = Raw::enter().map(Arc::new);
            takes_input = raw.is_some();
        }
        let name = (!arguments.no_control).then(|| description.name.clone());
        // A name that somebody chose is checked before anything starts, and can be used at once.
        let claims = arguments.name.is_some() || detach::is_detached();
        let is_eager = takes_input || claims || description.paused;
        let helper = Helper::new(Work {
            supervised: Arc::clone(&supervised),
            tail: tail.clone(),
            journal: Arc::clone(&journal),
            name,
            raw: raw.clone(),
            takes_input,
        });
        if claims {
            helper.claim()?;
        }
        if raw.is_some() {
            eprintln!("janus: Ctrl-] leaves and ends the guest\r");
        }
        Ok(Self { arguments, description, journal, supervised, tail, raw, helper, is_eager, gdb })
    }

    /// Until an end that nothing follows; answers the exit code.
    fn run(&self) -> Result<u8, Refusal> {
        loop {
            let outcome = self.once()?;
            if outcome.action == Action::Restart {
                eprintln!("janus: {} starts again", self.description.name);
                self.journal.add(Event::Restarted);
                if let Some(raw) = &self.raw {
                    raw.again();
                }
                continue;
            }
            self.helper.ended(&Exit { reason: outcome.reason.into(), code: outcome.code });
            return Ok(outcome.code);
        }
    }

    /// From start to end, once.
    fn once(&self) -> Result<Outcome, Refusal> {
        let guest = Guest::start(&self.description, self.console());
        let guest = Arc::new(guest.map_err(|error| error.to_string())?);
        let mut hypervisor = (self.tail.clone(), prints(self.arguments));
        guest.domain.set_debug_output(Box::new(move |bytes| {
            let _ = hypervisor.0.write_all(bytes);
            if hypervisor.1 {
                let _ = std::io::stdout().write_all(bytes);
                let _ = std::io::stdout().flush();
            }
        }));
        self.supervised.started(&guest, self.arguments.paused);
        self.tell_of_devices(&guest);
        let stub = self.debug(&guest)?;
        self.help(&guest)?;
        let ended = guest.run();
        self.helper.set_deadline(None);
        if let Some(stub) = stub {
            stub.finish();
        }
        // The terminal as it was, before anything is said.
        if let Some(raw) = &self.raw {
            raw.leave();
        }
        self.supervised.ended();
        let outcome = outcome::of(&ended, self.supervised.cut(), &self.tail, self.arguments);
        self.journal.add(Event::Ended {
            reason: outcome.reason.into(),
            code: outcome.code,
            detail: outcome.detail.clone(),
        });
        if self.arguments.stat
            && let Some(stat) = self.supervised.stat()
        {
            eprint!("{}", table::stat(&stat));
        }
        if let Some(detail) = &outcome.detail {
            eprintln!("janus: {detail}");
        }
        if outcome.is_crash {
            let stopped = self.helper.stopped();
            crash::report(&ended, &stopped, &guest, &self.description, &self.tail, self.arguments);
        }
        if outcome.action == Action::Preserve {
            self.preserve()?;
        }
        self.supervised.forget();
        Ok(outcome)
    }

    /// Where the console goes.
    fn console(&self) -> Vec<Endpoint> {
        let mut endpoints = vec![Endpoint::Writer(Box::new(self.tail.clone()))];
        if prints(self.arguments) {
            endpoints.push(Endpoint::Stdio { escape: None, input: false });
        } else if self.arguments.console.is_empty() && !detach::is_detached() {
            // Standard output has events.
            endpoints.push(Endpoint::Writer(Box::new(std::io::stderr())));
        }
        let others = self.arguments.console.iter().filter_map(|place| match place {
            ConsolePlace::Stdio => None,
            ConsolePlace::Pty => Some(Endpoint::Pty),
            ConsolePlace::File(path) => Some(Endpoint::File(path.clone())),
            ConsolePlace::Socket(path) => Some(Endpoint::Socket(path.clone())),
        });
        endpoints.extend(others);
        endpoints
    }

    fn tell_of_devices(&self, guest: &Guest) {
        let journal = Arc::clone(&self.journal);
        guest.host.on_device(Box::new(move |kind, number, connected| {
            let kind = kind.to_owned();
            journal.add(match connected {
                true => Event::DeviceConnected { kind, number },
                false => Event::DeviceDisconnected { kind, number },
            });
        }));
        for (publish, address) in guest.networks().iter().flat_map(|network| network.published()) {
            let (transport, guest_port) = (publish.transport, publish.guest_port);
            eprintln!("janus: {address} leads to the guest's {transport} port {guest_port}");
            self.journal.add(Event::PublishedPort {
                host: address.to_string(),
                guest_port,
                transport: transport.to_string(),
            });
        }
        if self.arguments.console.contains(&ConsolePlace::Pty)
            && let Some(tty) = guest.host.tty()
        {
            eprintln!("janus: the console is at {tty}");
        }
    }

    /// Lets gdb come, for which the guest is paused once.
    fn debug(&self, guest: &Guest) -> Result<Option<gdb::Stub>, Refusal> {
        let Some(listener) = &self.gdb else { return Ok(None) };
        if self.arguments.paused {
            // And once for `janus resume`.
            guest.domain.pause();
        }
        let (journal, supervised) = (Arc::clone(&self.journal), Arc::clone(&self.supervised));
        let hears = move |happened| match happened {
            gdb::Happened::Attached => journal.add(Event::DebuggerAttached),
            gdb::Happened::Detached => journal.add(Event::DebuggerDetached),
            gdb::Happened::Kill => supervised.end(Cut::Killed),
        };
        let stub = gdb::Stub::start(listener, &guest.domain, hears);
        stub.map(Some).map_err(|error| format!("gdb: {error}"))
    }

    /// Sees to it that the thread beside the guest is there when it is needed.
    fn help(&self, guest: &Guest) -> Result<(), Refusal> {
        let timeout = self.arguments.timeout;
        self.helper.set_deadline(timeout.map(|time| Instant::now() + time));
        if self.is_eager {
            return self.helper.start();
        }
        if timeout.is_some() || !self.arguments.no_control {
            let helper = Arc::clone(&self.helper);
            let soon = timeout.map_or(SOON, |time| time.min(SOON));
            guest.domain.at_later(
                soon,
                Box::new(move || {
                    if let Err(error) = helper.start() {
                        eprintln!("janus: {error}");
                    }
                }),
            );
        }
        Ok(())
    }

    /// Keeps what is left of the guest until somebody kills it.
    fn preserve(&self) -> Result<(), Refusal> {
        if self.arguments.no_control {
            return Ok(());
        }
        self.helper.start()?;
        let name = &self.description.name;
        eprintln!("janus: {name} is kept as it ended: `janus stat {name}`, `janus kill {name}`");
        self.supervised.wait_until_dismissed();
        Ok(())
    }
}

/// Whether the console goes to standard output.
fn prints(arguments: &RunArguments) -> bool {
    match arguments.console.as_slice() {
        [] => !detach::is_detached() && arguments.json.as_deref() != Some("-"),
        places => places.contains(&ConsolePlace::Stdio),
    }
}

/// Where events are written.
fn json_file(place: &str) -> Result<Box<dyn Write + Send>, Refusal> {
    let failed = |error| format!("--json {place}: {error}");
    if place == "-" {
        return Ok(Box::new(std::io::stdout()));
    }
    if let Some(number) = place.strip_prefix("fd:") {
        let number =
            number.parse::<u32>().map_err(|_| format!("--json {place}: no such descriptor"))?;
        let path = format!("/proc/self/fd/{number}");
        let file = std::fs::OpenOptions::new().append(true).open(path).map_err(failed)?;
        return Ok(Box::new(file));
    }
    let file = std::fs::OpenOptions::new().append(true).create(true).open(place);
    Ok(Box::new(file.map_err(failed)?))
}

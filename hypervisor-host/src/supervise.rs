//! A guest under control: what `janus ls`, `stat`, `pause` and so on reach while it runs, and why it was ended.

use std::fmt;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use serde_json::{Value, json};

use crate::control::protocol::{Call, DeviceStat, Info, Request, Stat, State};
use crate::control::server::Subject;
use crate::guest::{Description, Guest};
use crate::journal::{Event, Journal};
use crate::xenstored::home;

/// Why a run was ended from outside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cut {
    /// The time was over.
    Timeout,
    /// Somebody left it.
    Left,
    /// Somebody asked for it by the control socket.
    Killed,
    /// This process got a signal.
    Signal(i32),
}

#[derive(Default)]
struct Inner {
    guest: Option<Arc<Guest>>,
    paused: bool,
    ended: bool,
    cut: Option<Cut>,
    /// Nobody wants it any more, although it has ended.
    dismissed: bool,
}

/// A guest, from start to start.
pub struct Supervised {
    name: String,
    image: String,
    memory_mib: u64,
    most_mib: u64,
    vcpus: usize,
    begin: Instant,
    journal: Arc<Journal>,
    inner: Mutex<Inner>,
    changed: Condvar,
}

impl fmt::Debug for Supervised {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Supervised({})", self.name)
    }
}

impl Supervised {
    /// What is to run.
    #[must_use]
    pub fn new(description: &Description, journal: Arc<Journal>) -> Self {
        Self {
            name: description.name.clone(),
            image: description.kernel.display().to_string(),
            memory_mib: description.memory_mib,
            most_mib: description.max_memory_mib.max(description.memory_mib),
            vcpus: description.vcpus,
            begin: Instant::now(),
            journal,
            inner: Mutex::default(),
            changed: Condvar::new(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// It runs now.
    pub fn started(&self, guest: &Arc<Guest>, paused: bool) {
        let mut inner = self.lock();
        *inner = Inner { guest: Some(Arc::clone(guest)), paused, ..Inner::default() };
        drop(inner);
        self.journal.add(Event::Started {
            name: self.name.clone(),
            pid: std::process::id(),
            image: self.image.clone(),
            memory_mib: self.memory_mib,
            vcpus: self.vcpus,
        });
    }

    /// It has ended.
    pub fn ended(&self) {
        self.lock().ended = true;
    }

    /// Waits until nobody wants to look at it any more: somebody ends it once more.
    pub fn wait_until_dismissed(&self) {
        let mut inner = self.lock();
        while !inner.dismissed {
            inner = self.changed.wait(inner).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// The guest, while it runs.
    #[must_use]
    pub fn running(&self) -> Option<Arc<Guest>> {
        self.guest().ok()
    }

    /// Lets go of the guest.
    pub fn forget(&self) {
        let guest = self.lock().guest.take();
        drop(guest);
    }

    /// Ends the guest; the first reason counts.
    pub fn end(&self, cut: Cut) {
        let mut inner = self.lock();
        if inner.ended {
            inner.dismissed = true;
            self.changed.notify_all();
            return;
        }
        inner.cut.get_or_insert(cut);
        let guest = inner.guest.clone();
        drop(inner);
        if let Some(guest) = guest {
            guest.domain.destroy();
        }
    }

    /// Why it was ended from outside, if it was.
    #[must_use]
    pub fn cut(&self) -> Option<Cut> {
        self.lock().cut
    }

    /// Types on its console; answers how much fits.
    pub fn type_on_console(&self, bytes: &[u8]) -> usize {
        let guest = self.lock().guest.clone();
        // What is typed after the end is lost.
        guest.map_or(bytes.len(), |guest| guest.host.console().type_in(bytes))
    }

    fn guest(&self) -> Result<Arc<Guest>, String> {
        let inner = self.lock();
        match &inner.guest {
            Some(guest) if !inner.ended => Ok(Arc::clone(guest)),
            _ => Err(format!("{} has ended", self.name)),
        }
    }

    fn pause(&self) -> Result<Value, String> {
        let guest = self.guest()?;
        let mut inner = self.lock();
        if !std::mem::replace(&mut inner.paused, true) {
            drop(inner);
            guest.domain.pause();
            self.journal.add(Event::Paused);
        }
        Ok(json!({}))
    }

    fn resume(&self) -> Result<Value, String> {
        let guest = self.guest()?;
        let mut inner = self.lock();
        if std::mem::replace(&mut inner.paused, false) {
            drop(inner);
            guest.domain.unpause();
            self.journal.add(Event::Resumed);
        }
        Ok(json!({}))
    }

    fn ask_for(&self, what: &str) -> Result<Value, String> {
        let guest = self.guest()?;
        if self.lock().paused {
            return Err(format!("{} is paused and cannot hear: resume it first", self.name));
        }
        guest.host.request_shutdown(what).map_err(|error| error.to_string())?;
        self.journal.add(Event::ShutdownRequested { what: what.into() });
        Ok(json!({}))
    }

    fn memory(&self, mib: Option<u64>) -> Result<Value, String> {
        let guest = self.guest()?;
        if let Some(mib) = mib {
            if mib == 0 || mib > self.most_mib {
                return Err(format!(
                    "{} may have 1 to {} MiB (--max-memory sets the most)",
                    self.name, self.most_mib
                ));
            }
            let path = target_of(&guest);
            let kib = (mib * 1024).to_string();
            guest.host.write(&path, &kib).map_err(|error| error.to_string())?;
            self.journal.add(Event::MemoryTarget { mib });
        }
        Ok(json!({
            "target_kib": target(&guest), "current_kib": guest.memory.pages() * 4,
            "most_kib": self.most_mib * 1024,
        }))
    }

    /// What it is.
    #[must_use]
    pub fn info(&self) -> Info {
        let inner = self.lock();
        let state = match (inner.ended, inner.paused) {
            (true, _) => State::Ended,
            (false, true) => State::Paused,
            (false, false) => State::Running,
        };
        let guest = inner.guest.clone();
        drop(inner);
        Info {
            name: self.name.clone(),
            pid: std::process::id(),
            state,
            image: self.image.clone(),
            memory_mib: self.memory_mib,
            vcpus: self.vcpus,
            age_s: self.begin.elapsed().as_secs(),
            ports: guest.map(|guest| ports(&guest)).unwrap_or_default(),
        }
    }

    /// What it has done; `None`: there is no guest.
    #[must_use]
    pub fn stat(&self) -> Option<Stat> {
        let guest = self.lock().guest.clone()?;
        let stats = guest.domain.stats();
        let mut hypercalls: Vec<Call> = stats
            .calls
            .iter()
            .map(|call| Call {
                name: call.name().to_owned(),
                calls: call.calls,
                ns: guest.domain.nanoseconds(call.ticks),
            })
            .collect();
        hypercalls.sort_by(|a, b| b.calls.cmp(&a.calls).then_with(|| a.name.cmp(&b.name)));
        let device = |status: crate::host::DeviceStatus| DeviceStat {
            kind: status.kind.to_owned(),
            number: status.number,
            connected: status.connected,
            requests: status.figures.requests,
            received: status.figures.received,
            errors: status.figures.errors,
            bytes_out: status.figures.bytes_out,
            bytes_in: status.figures.bytes_in,
        };
        Some(Stat {
            age_us: u64::try_from(self.begin.elapsed().as_micros()).unwrap_or(u64::MAX),
            hypercalls,
            unknown_calls: stats.unknown_calls,
            events_sent: stats.notifications,
            ports: guest.domain.events().ports().len(),
            grants_in_use: stats.grants_in_use,
            devices: guest.host.devices().into_iter().map(device).collect(),
            memory_target_kib: target(&guest),
            memory_kib: guest.memory.pages() * 4,
            memory_most_kib: self.most_mib * 1024,
            resident_kib: resident(),
        })
    }
}

fn target_of(guest: &Guest) -> String {
    format!("{}/memory/target", home(guest.domain.id()))
}

fn target(guest: &Guest) -> Option<u64> {
    String::from_utf8(guest.host.read(&target_of(guest))?).ok()?.parse().ok()
}

/// Ports of the host that lead into the guest.
#[must_use]
pub fn ports(guest: &Guest) -> Vec<String> {
    let of = |network: &crate::usernet::UserNet| -> Vec<String> {
        let port = |(publish, host): &(crate::usernet::Publish, std::net::SocketAddr)| {
            format!("{host}->{}/{}", publish.guest_port, publish.transport)
        };
        network.published().iter().map(port).collect()
    };
    guest.networks().iter().flat_map(of).collect()
}

/// What this process has of the host's memory, in KiB: the guest's touched frames are mapped here as well.
fn resident() -> u64 {
    let text = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    let pages = text.split(' ').nth(1).and_then(|pages| pages.parse::<u64>().ok());
    pages.unwrap_or(0) * 4
}

impl Subject for Supervised {
    fn answer(&self, request: &Request) -> Result<Value, String> {
        match request {
            Request::Info => Ok(json!(self.info())),
            Request::Stat => self
                .stat()
                .map(|stat| json!(stat))
                .ok_or_else(|| format!("{} has ended", self.name)),
            Request::Stop => self.ask_for("poweroff"),
            Request::Reboot => self.ask_for("reboot"),
            Request::Kill => {
                self.end(Cut::Killed);
                Ok(json!({}))
            }
            Request::Pause => self.pause(),
            Request::Resume => self.resume(),
            Request::Memory { mib } => self.memory(*mib),
            Request::Console | Request::Events | Request::Wait => Err("not a plain request".into()),
        }
    }

    fn type_in(&self, bytes: &[u8]) -> usize {
        self.type_on_console(bytes)
    }
}

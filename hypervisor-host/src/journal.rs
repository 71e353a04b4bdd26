//! What happens to a guest, as lines of JSON: for whoever drives `janus` by a program (docs/control.md).

use std::collections::VecDeque;
use std::fmt;
use std::io::Write;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde::Serialize;
use serde_json::{Value, json};

/// The version of the lines: it changes when a field changes its meaning or goes; new ones may come at any time.
pub const VERSION: u32 = 1;
/// Lines that are kept for those who come later.
const KEPT: usize = 256;

/// Something that happened.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub enum Event {
    /// It runs (or stands before its first instruction, if it was started paused).
    Started {
        /// Its name.
        name: String,
        /// The process that it is.
        pid: u32,
        /// Its kernel.
        image: String,
        /// Its memory in MiB.
        memory_mib: u64,
        /// Its virtual CPUs.
        vcpus: usize,
    },
    /// A port of the host leads into it.
    PublishedPort {
        /// The host's end.
        host: String,
        /// The guest's port.
        guest_port: u16,
        /// `tcp` or `udp`.
        transport: String,
    },
    /// It uses a device.
    DeviceConnected {
        /// `vbd` or `vif`.
        kind: String,
        /// Its number on the bus.
        number: u32,
    },
    /// It has let go of a device.
    DeviceDisconnected {
        /// `vbd` or `vif`.
        kind: String,
        /// Its number on the bus.
        number: u32,
    },
    /// Somebody sees its console.
    ConsoleAttached,
    /// And does not any more.
    ConsoleDetached,
    /// It stands still.
    Paused,
    /// It runs again.
    Resumed,
    /// It was asked to power off or to reboot.
    ShutdownRequested {
        /// `poweroff` or `reboot`.
        what: String,
    },
    /// It was told how much memory to keep.
    MemoryTarget {
        /// In MiB.
        mib: u64,
    },
    /// A debugger came.
    DebuggerAttached,
    /// And left.
    DebuggerDetached,
    /// It starts again.
    Restarted,
    /// It ended.
    Ended {
        /// `poweroff`, `reboot`, `suspend`, `crash`, `timeout`, `left`, `killed`, `signal`, `lost`.
        reason: String,
        /// The exit code of the run, unless it starts again.
        code: u8,
        /// In words, where there is more to say.
        detail: Option<String>,
    },
}

/// Takes lines; `false`: it takes no more.
pub type Sink = Box<dyn FnMut(&str) -> bool + Send>;

#[derive(Default)]
struct Inner {
    /// As they happened: they become text only when somebody wants it.
    kept: VecDeque<Entry>,
    sinks: Vec<Sink>,
}

/// An event, when it happened by the clock, and how long after the start.
struct Entry {
    time: SystemTime,
    since: Duration,
    event: Event,
}

impl Entry {
    fn line(&self) -> String {
        let since = u64::try_from(self.since.as_micros()).unwrap_or(u64::MAX);
        let unix = self.time.duration_since(UNIX_EPOCH).map_or(0.0, |time| time.as_secs_f64());
        let mut line = json!({ "version": VERSION, "time": unix, "since_start_us": since });
        if let (Value::Object(line), Ok(Value::Object(event))) =
            (&mut line, serde_json::to_value(&self.event))
        {
            line.extend(event);
        }
        line.to_string()
    }
}

/// Everything that happened, and who wants to know.
pub struct Journal {
    begin: Instant,
    inner: Mutex<Inner>,
}

impl fmt::Debug for Journal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Journal").field("lines", &self.lock().kept.len()).finish_non_exhaustive()
    }
}

impl Default for Journal {
    fn default() -> Self {
        Self { begin: Instant::now(), inner: Mutex::default() }
    }
}

impl Journal {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes something down.
    pub fn add(&self, event: Event) {
        let entry = Entry { time: SystemTime::now(), since: self.begin.elapsed(), event };
        let mut inner = self.lock();
        if !inner.sinks.is_empty() {
            let line = entry.line();
            inner.sinks.retain_mut(|sink| sink(&line));
        }
        if inner.kept.len() == KEPT {
            inner.kept.pop_front();
        }
        inner.kept.push_back(entry);
    }

    /// Tells `sink` what happens from now on, and first what has happened.
    pub fn follow(&self, mut sink: Sink) {
        let mut inner = self.lock();
        if inner.kept.iter().all(|entry| sink(&entry.line())) {
            inner.sinks.push(sink);
        }
    }

    /// As [`Self::follow`], into something that can be written.
    pub fn write_to(&self, mut file: impl Write + Send + 'static) {
        self.follow(Box::new(move |line| {
            writeln!(file, "{line}").and_then(|()| file.flush()).is_ok()
        }));
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    #[test]
    fn events_are_lines_with_a_version_for_those_who_come_early_and_late() {
        let journal = Journal::default();
        let lines = Arc::new(Mutex::new(Vec::new()));
        let follow = |most: usize| {
            let lines = Arc::clone(&lines);
            journal.follow(Box::new(move |line| {
                let mut lines = lines.lock().unwrap();
                lines.push(serde_json::from_str::<Value>(line).unwrap());
                lines.len() < most
            }));
        };
        follow(2);
        journal.add(Event::Paused);
        journal.add(Event::DeviceConnected { kind: "vbd".into(), number: 51712 });
        journal.add(Event::Resumed);
        assert_eq!(lines.lock().unwrap().len(), 2, "a sink that has enough is told no more");
        follow(9);
        let lines = lines.lock().unwrap();
        let names: Vec<_> = lines.iter().map(|line| line["event"].as_str().unwrap()).collect();
        assert_eq!(names, ["paused", "device-connected", "paused", "device-connected", "resumed"]);
        assert_eq!((&lines[1]["version"], &lines[1]["number"]), (&json!(1), &json!(51712)));
    }

    #[test]
    fn not_everything_is_kept() {
        let journal = Journal::default();
        (0..KEPT + 10).for_each(|_| journal.add(Event::Paused));
        assert_eq!(journal.lock().kept.len(), KEPT);
    }
}

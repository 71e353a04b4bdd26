//! What is said on a control socket: a request, one line of JSON, and its answer, another.
//!
//! `{"request":"stat"}` is answered by `{"ok":{...}}` or `{"error":"..."}`. A connection may make any number of
//! requests; after `console` it is the console, and after `events` it has only events.

use serde::{Deserialize, Serialize};

/// Bytes of a request.
pub const LONGEST: usize = 4096;

/// What is asked for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Request {
    /// What it is: [`Info`].
    Info,
    /// What it has done: [`Stat`].
    Stat,
    /// Its console from now on, and first the last that it printed.
    Console,
    /// Its events from the first on.
    Events,
    /// Asks the guest to power off.
    Stop,
    /// Asks the guest to reboot.
    Reboot,
    /// Ends it as it is.
    Kill,
    /// Stops its CPUs.
    Pause,
    /// Lets them go on.
    Resume,
    /// Tells the guest how much memory to keep; without `mib`: asks only.
    Memory {
        /// In MiB.
        #[serde(default)]
        mib: Option<u64>,
    },
    /// Answers with [`Exit`] when it has ended.
    Wait,
}

/// An answer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Answer {
    /// It was done; what it brought.
    Ok(serde_json::Value),
    /// It was not, and why.
    Error(String),
}

/// What a guest does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    /// It runs.
    Running,
    /// It is paused.
    Paused,
    /// It has ended, and is kept as it was.
    Ended,
}

/// What a guest is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Info {
    /// Its name.
    pub name: String,
    /// Its process.
    pub pid: u32,
    /// What it does.
    pub state: State,
    /// Its kernel.
    pub image: String,
    /// Its memory in MiB.
    pub memory_mib: u64,
    /// Its virtual CPUs.
    pub vcpus: usize,
    /// Seconds since it was started.
    pub age_s: u64,
    /// Ports of the host that lead into it, as `127.0.0.1:8080->80/tcp`.
    pub ports: Vec<String>,
}

/// One kind of hypercall.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Call {
    /// Its name.
    pub name: String,
    /// How often.
    pub calls: u64,
    /// Nanoseconds in it, all calls together, waiting included.
    pub ns: u64,
}

/// A device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceStat {
    /// `vbd` or `vif`.
    pub kind: String,
    /// Its number on the bus.
    pub number: u32,
    /// Whether the guest uses it.
    pub connected: bool,
    /// Requests of a disk, frames that a guest sent.
    pub requests: u64,
    /// Frames that it received.
    pub received: u64,
    /// Of all these, refused or dropped.
    pub errors: u64,
    /// Bytes from the guest.
    pub bytes_out: u64,
    /// Bytes to the guest.
    pub bytes_in: u64,
}

/// What a guest has done.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stat {
    /// Microseconds since it was started.
    pub age_us: u64,
    /// Hypercalls, the most frequent first.
    pub hypercalls: Vec<Call>,
    /// Calls of numbers that there are not.
    pub unknown_calls: u64,
    /// Events that the host sent.
    pub events_sent: u64,
    /// Event channels that are in use.
    pub ports: usize,
    /// Grants that the host uses now.
    pub grants_in_use: usize,
    /// Its devices.
    pub devices: Vec<DeviceStat>,
    /// What it was told to keep, in KiB.
    pub memory_target_kib: Option<u64>,
    /// What it has, in KiB.
    pub memory_kib: u64,
    /// What it may have at most, in KiB.
    pub memory_most_kib: u64,
    /// What this process and the guest have of the host's memory, in KiB.
    pub resident_kib: u64,
}

/// How a guest ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exit {
    /// See [`crate::journal::Event::Ended`].
    pub reason: String,
    /// The exit code of the run.
    pub code: u8,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_and_answers_have_their_documented_form() {
        for (text, request) in [
            (r#"{"request":"stat"}"#, Request::Stat),
            (r#"{"request":"memory"}"#, Request::Memory { mib: None }),
            (r#"{"request":"memory","mib":64}"#, Request::Memory { mib: Some(64) }),
        ] {
            assert_eq!(serde_json::from_str::<Request>(text).unwrap(), request);
        }
        for wrong in ["", "{}", r#"{"request":"fly"}"#, r#"{"request":"memory","mib":-1}"#, "[]"] {
            assert!(serde_json::from_str::<Request>(wrong).is_err(), "{wrong}");
        }
        let answer = serde_json::to_string(&Answer::Error("no".into())).unwrap();
        assert_eq!(answer, r#"{"error":"no"}"#);
    }
}

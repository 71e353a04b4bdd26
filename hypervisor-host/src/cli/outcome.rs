//! How a run ended, as an exit code.

use std::time::Duration;

use janus_proto::abi::xen::sched::ShutdownReason;

use super::tail::Tail;
use crate::pv::domain::{EndReason, Ended};

/// The command line, a file or the host prevented the start.
pub(super) const USAGE: u8 = 2;
/// It crashed.
pub(super) const CRASHED: u8 = 6;
/// It asked for a reboot.
pub(super) const REBOOT: u8 = 7;
/// It was ended after `--timeout`.
pub(super) const TIMEOUT: u8 = 124;
/// The engine lost it.
pub(super) const LOST: u8 = 125;
/// It was left with Ctrl-].
pub(super) const LEFT: u8 = 130;

/// Why a run was ended from outside.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Cut {
    /// The time was over.
    Timeout,
    /// Somebody left it.
    Left,
}

/// Calls `end` once so much time has passed.
pub(super) fn end_after(time: Duration, end: impl FnOnce() + Send + 'static) -> Result<(), String> {
    let watch = move || {
        std::thread::sleep(time);
        end();
    };
    let thread = std::thread::Builder::new().name("timeout".into()).spawn(watch);
    thread.map(drop).map_err(|error| format!("no thread for --timeout: {error}"))
}

/// The exit code of a run, whose unexpected ends are told of here.
pub(super) fn code_of(
    ended: &Ended,
    cut: Option<Cut>,
    tail: &Tail,
    timeout: Option<Duration>,
) -> u8 {
    let reported = tail.reported_exit();
    match (cut, &ended.reason) {
        (_, EndReason::Shutdown(ShutdownReason::POWEROFF | ShutdownReason::SUSPEND)) => {
            reported.unwrap_or(0)
        }
        (_, EndReason::Shutdown(ShutdownReason::REBOOT)) => REBOOT,
        (_, EndReason::Shutdown(_)) => reported.filter(|code| *code != 0).unwrap_or(CRASHED),
        (Some(Cut::Timeout), _) => {
            eprintln!("janus: the guest was ended after {:?}", timeout.unwrap_or_default());
            TIMEOUT
        }
        (Some(Cut::Left), _) => LEFT,
        (None, EndReason::Crashed(cause)) => {
            eprintln!("janus: the guest crashed: {cause}");
            CRASHED
        }
        (None, EndReason::Engine(error)) => {
            eprintln!("janus: {error}");
            LOST
        }
        (None, EndReason::Destroyed) => LOST,
    }
}

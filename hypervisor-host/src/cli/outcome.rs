//! How a run ended, as an exit code and in words.

use std::time::Duration;

use janus_proto::abi::xen::sched::ShutdownReason;

use super::options::{Action, RunArguments};
use super::tail::Tail;
use crate::pv::domain::{EndReason, Ended};
pub(super) use crate::supervise::Cut;

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
/// And a signal's number.
const SIGNALLED: u8 = 128;
/// `SIGKILL`.
const KILL: u8 = 9;

/// How a run ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Outcome {
    /// As [`crate::journal::Event::Ended`] has it.
    pub(super) reason: &'static str,
    pub(super) code: u8,
    /// What is to be told, if anything.
    pub(super) detail: Option<String>,
    /// Whether its last state is worth a report.
    pub(super) is_crash: bool,
    /// What was to follow.
    pub(super) action: Action,
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

/// What an end comes to.
pub(super) fn of(
    ended: &Ended,
    cut: Option<Cut>,
    tail: &Tail,
    arguments: &RunArguments,
) -> Outcome {
    let reported = tail.reported_exit();
    let outcome = |reason, code| Outcome {
        reason,
        code,
        detail: None,
        is_crash: false,
        action: Action::Destroy,
    };
    let crash = |code, detail| Outcome {
        detail,
        is_crash: true,
        action: arguments.on_crash,
        ..outcome("crash", code)
    };
    match (cut, &ended.reason) {
        (_, EndReason::Shutdown(ShutdownReason::POWEROFF)) => {
            Outcome { action: arguments.on_poweroff, ..outcome("poweroff", reported.unwrap_or(0)) }
        }
        (_, EndReason::Shutdown(ShutdownReason::SUSPEND)) => {
            outcome("suspend", reported.unwrap_or(0))
        }
        (_, EndReason::Shutdown(ShutdownReason::REBOOT)) => {
            let action = if arguments.no_reboot { Action::Destroy } else { arguments.on_reboot };
            Outcome { action, ..outcome("reboot", REBOOT) }
        }
        (_, EndReason::Shutdown(_)) => {
            crash(reported.filter(|code| *code != 0).unwrap_or(CRASHED), None)
        }
        (None, EndReason::Crashed(cause)) => {
            crash(CRASHED, Some(format!("the guest crashed: {cause}")))
        }
        (Some(Cut::Timeout), _) => {
            let time = arguments.timeout.unwrap_or_default();
            let detail = Some(format!("the guest was ended after {time:?}"));
            Outcome { detail, is_crash: true, ..outcome("timeout", TIMEOUT) }
        }
        (Some(Cut::Left), _) => outcome("left", LEFT),
        (Some(Cut::Killed), _) => outcome("killed", SIGNALLED + KILL),
        (Some(Cut::Signal(signal)), _) => {
            outcome("signal", SIGNALLED.saturating_add(u8::try_from(signal).unwrap_or(0)))
        }
        (None, EndReason::Engine(error)) => {
            Outcome { reason: "lost", ..crash(LOST, Some(error.to_string())) }
        }
        (None, EndReason::Destroyed) => outcome("lost", LOST),
    }
}

#[cfg(test)]
mod tests {
    use clap::{Args as _, Command, FromArgMatches as _};

    use super::*;

    fn arguments(words: &[&str]) -> RunArguments {
        let command = RunArguments::augment_args(Command::new("run"));
        let matches = command.get_matches_from(std::iter::once(&"run").chain(words));
        RunArguments::from_arg_matches(&matches).unwrap()
    }

    #[test]
    fn ends_have_codes_and_what_follows_them() {
        let shutdown = EndReason::Shutdown;
        for (reason, cut, words, code, action) in [
            (shutdown(ShutdownReason::POWEROFF), None, &[][..], 0, Action::Destroy),
            (
                shutdown(ShutdownReason::POWEROFF),
                None,
                &["--on-poweroff=restart"],
                0,
                Action::Restart,
            ),
            (shutdown(ShutdownReason::REBOOT), None, &[], 7, Action::Restart),
            (shutdown(ShutdownReason::REBOOT), None, &["--no-reboot"], 7, Action::Destroy),
            (shutdown(ShutdownReason::CRASH), None, &["--on-crash=preserve"], 6, Action::Preserve),
            (EndReason::Destroyed, Some(Cut::Timeout), &["--timeout=1s"], 124, Action::Destroy),
            (EndReason::Destroyed, Some(Cut::Left), &[], 130, Action::Destroy),
            (
                EndReason::Destroyed,
                Some(Cut::Killed),
                &["--on-crash=restart"],
                137,
                Action::Destroy,
            ),
            (EndReason::Destroyed, Some(Cut::Signal(15)), &[], 143, Action::Destroy),
            (EndReason::Destroyed, None, &[], 125, Action::Destroy),
        ] {
            let ended = Ended { reason, vcpu: None, report: None };
            let found = of(&ended, cut, &Tail::default(), &arguments(words));
            assert_eq!((found.code, found.action), (code, action), "{ended:?} {cut:?}");
        }
    }
}

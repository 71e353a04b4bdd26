//! When something must be looked at again. Each thing has at most one entry.

use std::collections::BTreeSet;

use super::slab::Token;

/// Microseconds since the network was started.
pub(super) type Time = u64;

/// What waits for a time, earliest first.
#[derive(Debug, Default)]
pub(super) struct Timers(BTreeSet<(Time, Token)>);

impl Timers {
    /// Has `token` looked at no later than `at`; `entry` is what it has kept of its entry.
    pub(super) fn no_later(&mut self, entry: &mut Option<Time>, token: Token, at: Time) {
        if entry.is_none_or(|time| at < time) {
            self.remove(entry, token);
            self.0.insert((at, token));
            *entry = Some(at);
        }
    }

    /// Forgets an entry.
    pub(super) fn remove(&mut self, entry: &mut Option<Time>, token: Token) {
        if let Some(time) = entry.take() {
            self.0.remove(&(time, token));
        }
    }

    /// Takes the next that is due. Whoever owns the entry must forget it.
    pub(super) fn due(&mut self, now: Time) -> Option<Token> {
        let (time, _) = self.0.first()?;
        if *time <= now { self.0.pop_first().map(|(_, token)| token) } else { None }
    }

    /// The next time.
    pub(super) fn next(&self) -> Option<Time> {
        self.0.first().map(|(time, _)| *time)
    }
}

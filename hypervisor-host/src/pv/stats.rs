//! Figures of a domain, for tools.

use super::hypercall;

/// One kind of hypercall.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CallStats {
    /// Its number.
    pub number: u64,
    /// How often it was made.
    pub calls: u64,
    /// TSC ticks spent in it, waiting included.
    pub ticks: u64,
}

impl CallStats {
    /// Its name.
    #[must_use]
    pub fn name(&self) -> &'static str {
        hypercall::name(self.number)
    }
}

/// What a domain has done so far.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Hypercalls by number, those of all CPUs together.
    pub calls: Vec<CallStats>,
    /// Calls of unknown numbers.
    pub unknown_calls: u64,
    /// Events that the host has sent.
    pub notifications: u64,
    /// Accesses to device registers that were emulated.
    pub register_accesses: u64,
    /// Grant references that the host uses now.
    pub grants_in_use: usize,
}

impl Stats {
    pub(crate) fn add_call(&mut self, add: CallStats) {
        match self.calls.iter_mut().find(|call| call.number == add.number) {
            Some(call) => {
                call.calls += add.calls;
                call.ticks = call.ticks.wrapping_add(add.ticks);
            }
            None => self.calls.push(add),
        }
    }
}

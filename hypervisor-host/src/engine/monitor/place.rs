//! On which CPU a guest's process and the thread that serves it run: on one and the same.
//!
//! Handing over between two CPUs costs a wake-up of a halted one, 30 times as much as on one CPU. The scheduler prefers
//! to spread the two, so that both are held on one CPU, and let go for one turn now and then, for it to choose again.

use super::host::{self, CpuMask};

/// How long a choice holds, in nanoseconds.
const HOLD: u64 = 100_000_000;

#[derive(Debug)]
pub(super) struct Place {
    /// What this thread was allowed before us; `None`: we never held it, or could not ask.
    allowed: Option<CpuMask>,
    /// The time of the next choice.
    until: u64,
    held: bool,
}

impl Place {
    pub(super) fn new() -> Self {
        Self { allowed: None, until: 0, held: false }
    }

    /// To be called before each turn of the guest, on the thread that serves it.
    pub(super) fn choose(&mut self, guest: i32) {
        let now = host::coarse_now();
        if now < self.until {
            return;
        }
        if self.held {
            self.let_go(guest);
            return;
        }
        if self.allowed.is_none() {
            self.allowed = host::affinity(0);
        }
        let cpu = host::current_cpu();
        let mut mask = CpuMask::default();
        if let Some(word) = mask.get_mut(cpu / 64) {
            *word = 1 << (cpu % 64);
            host::set_affinity(0, &mask);
            host::set_affinity(guest, &mask);
            self.held = true;
        }
        self.until = now + HOLD;
    }

    /// Lets both run anywhere again, until the next choice.
    pub(super) fn let_go(&mut self, guest: i32) {
        if let (true, Some(mask)) = (self.held, &self.allowed) {
            host::set_affinity(0, mask);
            host::set_affinity(guest, mask);
        }
        self.held = false;
        self.until = 0;
    }
}

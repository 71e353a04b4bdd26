//! On which CPU a guest's process and the thread that serves it run: on one and the same.
//!
//! Handing over between two CPUs costs a wake-up of a halted one, 30 times as much as on one CPU. The scheduler prefers
//! to spread the two, so that both are held on one CPU, and let go for one turn now and then, for it to choose again.
//!
//! The virtual CPUs of one guest are spread: each goes where the fewest of its siblings are held, and where it is if
//! that is such a place.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::host::{self, CpuMask};

/// How long a choice holds, in nanoseconds.
const HOLD: u64 = 100_000_000;

/// Where the virtual CPUs of a guest are held: a number of a CPU for each, or [`NOWHERE`].
#[derive(Debug)]
pub(super) struct Spread(Vec<AtomicUsize>);

const NOWHERE: usize = usize::MAX;

impl Spread {
    pub(super) fn new(vcpus: usize) -> Arc<Self> {
        Arc::new(Self((0..vcpus).map(|_| AtomicUsize::new(NOWHERE)).collect()))
    }

    /// Notes where virtual CPU `index` is held.
    fn put(&self, index: usize, cpu: usize) {
        if let Some(place) = self.0.get(index) {
            place.store(cpu, Ordering::Relaxed);
        }
    }

    /// Of the `allowed` CPUs one with the fewest siblings of `index`; `here` if that is one.
    fn best(&self, index: usize, here: usize, allowed: &CpuMask) -> usize {
        if self.0.len() < 2 {
            return here;
        }
        let siblings = |cpu: usize| {
            let held = self.0.iter().enumerate().filter(|(sibling, _)| *sibling != index);
            held.filter(|(_, at)| at.load(Ordering::Relaxed) == cpu).count()
        };
        let words = allowed.iter().enumerate();
        let cpus = words.flat_map(|(word, bits)| {
            (0..64).filter(move |bit| bits & 1 << bit != 0).map(move |bit| word * 64 + bit)
        });
        let least = cpus.min_by_key(|cpu| (siblings(*cpu), *cpu != here));
        least.unwrap_or(here)
    }
}

#[derive(Debug)]
pub(super) struct Place {
    spread: Arc<Spread>,
    /// Which of the guest's virtual CPUs this is.
    index: usize,
    /// What this thread was allowed before us; `None`: we never held it, or could not ask.
    allowed: Option<CpuMask>,
    /// The time of the next choice.
    until: u64,
    held: bool,
}

impl Place {
    pub(super) fn new(spread: Arc<Spread>, index: usize) -> Self {
        Self { spread, index, allowed: None, until: 0, held: false }
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
        let here = host::current_cpu();
        let allowed = self.allowed.as_ref();
        let cpu = allowed.map_or(here, |allowed| self.spread.best(self.index, here, allowed));
        let mut mask = CpuMask::default();
        if let Some(word) = mask.get_mut(cpu / 64) {
            *word = 1 << (cpu % 64);
            host::set_affinity(0, &mask);
            host::set_affinity(guest, &mask);
            self.held = true;
            self.spread.put(self.index, cpu);
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
        self.spread.put(self.index, NOWHERE);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn virtual_cpus_of_one_guest_are_spread_over_what_is_allowed() {
        let mut allowed = CpuMask::default();
        allowed[0] = 0b1011;
        let alone = Spread::new(1);
        assert_eq!(alone.best(0, 3, &allowed), 3);
        let four = Spread::new(4);
        assert_eq!(four.best(0, 1, &allowed), 1, "it stays where it is");
        four.put(0, 1);
        assert_eq!(four.best(0, 1, &allowed), 1, "itself it does not count");
        assert_eq!(four.best(1, 1, &allowed), 0);
        four.put(1, 0);
        assert_eq!(four.best(2, 1, &allowed), 3);
        four.put(2, 3);
        assert_eq!(four.best(3, 3, &allowed), 3, "all have one");
        four.put(1, NOWHERE);
        assert_eq!(four.best(3, 3, &allowed), 0);
    }
}

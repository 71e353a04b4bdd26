//! Time as the guest sees it, and its timers.
//!
//! System time is the host's `CLOCK_MONOTONIC`; the guest reads it from the TSC with the rate in `vcpu_time_info`,
//! which is measured here (asking the CPU would cost a VM exit on virtualised hosts) and refined while the domain runs.
// UNSAFETY: reads the TSC and the host's clock.
#![expect(unsafe_code, reason = "rdtsc and clock_gettime")]

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::Duration;

use janus_proto::abi::xen::shared_info::{TimeFlags, VcpuTimeInfo};
use janus_proto::pvclock;

/// No deadline.
pub(crate) const NEVER: u64 = u64::MAX;
/// The first rate comes from at least so many nanoseconds: it is good to a few parts in ten thousand then.
const FIRST_BASELINE: u64 = 100_000;
/// Updates are this far apart at first, then always twice as far, up to the second number.
const FIRST_UPDATE: u64 = 500_000;
const LAST_UPDATE: u64 = 1_000_000_000;
/// Nanoseconds of the periodic timer that every PV CPU starts with (100 Hz).
const FIRST_PERIOD: u64 = 10_000_000;

/// Both clocks at one moment.
#[derive(Clone, Copy, Debug)]
struct Sample {
    tsc: u64,
    ns: u64,
}

static START: OnceLock<Sample> = OnceLock::new();

/// The host's TSC.
pub(crate) fn tsc() -> u64 {
    // SAFETY: every x86-64 CPU has the instruction; it touches no memory.
    unsafe { core::arch::x86_64::_rdtsc() }
}

fn clock(id: libc::clockid_t) -> u64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: writes the structure that it is given.
    if unsafe { libc::clock_gettime(id, &raw mut time) } != 0 {
        return 0;
    }
    time.tv_sec.cast_unsigned() * 1_000_000_000 + time.tv_nsec.cast_unsigned()
}

/// System time: nanoseconds of `CLOCK_MONOTONIC`.
pub(crate) fn now() -> u64 {
    clock(libc::CLOCK_MONOTONIC)
}

/// Has the host wake this thread when its waits are over, and not up to 50 us later.
pub(crate) fn be_punctual() {
    // SAFETY: no memory is involved. A host that refuses is only less exact.
    unsafe { libc::prctl(libc::PR_SET_TIMERSLACK, 1) };
}

fn sample() -> Sample {
    let one = || {
        let before = tsc();
        let ns = now();
        let after = tsc();
        (
            after.wrapping_sub(before),
            Sample { tsc: before.wrapping_add(after.wrapping_sub(before) / 2), ns },
        )
    };
    let (a, b, c) = (one(), one(), one());
    [b, c].into_iter().fold(a, |best, next| if next.0 < best.0 { next } else { best }).1
}

/// Begins to measure the TSC: the earlier it is called, the better the first rate.
pub fn begin() {
    START.get_or_init(sample);
}

/// TSC ticks a second between two moments.
fn rate(from: Sample, to: Sample) -> Option<u64> {
    let ns = to.ns.checked_sub(from.ns).filter(|ns| *ns > 0)?;
    let ticks = to.tsc.checked_sub(from.tsc)?;
    u64::try_from(u128::from(ticks) * 1_000_000_000 / u128::from(ns)).ok()
}

#[derive(Clone, Copy, Debug)]
struct Scale {
    info: VcpuTimeInfo,
    interval: u64,
}

/// The clock of a domain.
#[derive(Debug)]
pub(crate) struct Clock {
    /// Its CPUs take a change over one after the other, so that what they read differs for a moment.
    several: bool,
    scale: Mutex<Option<Scale>>,
    /// The TSC at which the scale is to be looked at again.
    due: AtomicU64,
    /// How often it was changed.
    changes: AtomicU64,
}

impl Clock {
    /// The clock of a domain with several CPUs, or one.
    pub(crate) fn new(several: bool) -> Self {
        Self {
            several,
            scale: Mutex::new(None),
            due: AtomicU64::new(0),
            changes: AtomicU64::new(0),
        }
    }

    /// Whether [`Self::update`] has something to do.
    pub(crate) fn is_due(&self) -> bool {
        tsc() >= self.due.load(Ordering::Relaxed)
    }

    /// Counts the changes: a copy made at another count is old.
    pub(crate) fn changes(&self) -> u64 {
        self.changes.load(Ordering::Acquire)
    }

    /// Measures again; answers what the guest is to be told.
    pub(crate) fn update(&self) -> VcpuTimeInfo {
        begin();
        let mut scale = self.scale.lock().unwrap_or_else(PoisonError::into_inner);
        let start = START.get().copied().unwrap_or_else(sample);
        let mut here = sample();
        while scale.is_none() && here.ns.saturating_sub(start.ns) < FIRST_BASELINE {
            here = sample();
        }
        let hz = rate(start, here).filter(|hz| *hz > 0).unwrap_or(1_000_000_000);
        let mut new = advance(scale.as_ref(), here, hz);
        if self.several {
            new.info.flags = TimeFlags::empty();
        }
        *scale = Some(new);
        let ticks = u128::from(new.interval) * u128::from(hz) / 1_000_000_000;
        let due = here.tsc.saturating_add(u64::try_from(ticks).unwrap_or(u64::MAX));
        self.due.store(due, Ordering::Relaxed);
        self.changes.fetch_add(1, Ordering::Release);
        new.info
    }

    /// What the guest was told last.
    pub(crate) fn info(&self) -> VcpuTimeInfo {
        let last = *self.scale.lock().unwrap_or_else(PoisonError::into_inner);
        last.map_or_else(|| self.update(), |scale| scale.info)
    }
}

/// The next scale: never behind what the guest could have read by the last one, and slower where that was too fast.
fn advance(last: Option<&Scale>, here: Sample, hz: u64) -> Scale {
    let interval = last.map_or(FIRST_UPDATE, |last| (last.interval * 2).min(LAST_UPDATE));
    let told = last.map_or(0, |last| pvclock::nanoseconds(&last.info, here.tsc));
    let system_time = here.ns.max(told);
    let ahead = (system_time - here.ns).min(interval / 2);
    // A higher rate of the TSC makes nanoseconds out of fewer of its ticks.
    let slowed = u128::from(hz) * u128::from(interval) / u128::from(interval - ahead);
    let hz = u64::try_from(slowed).unwrap_or(hz);
    let (tsc_to_system_mul, tsc_shift) = pvclock::rate(hz).unwrap_or((0, 0));
    let info = VcpuTimeInfo {
        version: 0,
        pad0: 0,
        tsc_timestamp: here.tsc,
        system_time,
        tsc_to_system_mul,
        tsc_shift,
        flags: TimeFlags::TSC_STABLE,
        pad1: [0; 2],
    };
    Scale { info, interval }
}

/// What the wall clock showed at system time 0.
pub(crate) fn wall_clock_base() -> Duration {
    Duration::from_nanos(clock(libc::CLOCK_REALTIME).saturating_sub(now()))
}

/// The timers of one virtual CPU, in system time. Any thread may set them; the CPU's own looks.
#[derive(Debug)]
pub(crate) struct Timers {
    singleshot: AtomicU64,
    /// Nanoseconds, or 0.
    period: AtomicU64,
    periodic: AtomicU64,
}

impl Timers {
    pub(crate) fn new() -> Self {
        Self {
            singleshot: AtomicU64::new(NEVER),
            period: AtomicU64::new(FIRST_PERIOD),
            periodic: AtomicU64::new(NEVER),
        }
    }

    /// The CPU starts, and with it the periodic timer, unless the guest has set that already.
    pub(crate) fn begin(&self) {
        let period = self.period.load(Ordering::SeqCst);
        if period != 0 && self.periodic.load(Ordering::SeqCst) == NEVER {
            self.set_period(period);
        }
    }

    /// Sets the one-shot timer; [`NEVER`] stops it.
    pub(crate) fn set_singleshot(&self, at: u64) {
        self.singleshot.store(at, Ordering::SeqCst);
    }

    /// Sets the periodic timer to nanoseconds; 0 stops it.
    pub(crate) fn set_period(&self, period: u64) {
        let first = if period == 0 { NEVER } else { now().saturating_add(period) };
        self.period.store(period, Ordering::SeqCst);
        self.periodic.store(first, Ordering::SeqCst);
    }

    /// When to look again.
    pub(crate) fn deadline(&self) -> u64 {
        self.singleshot.load(Ordering::SeqCst).min(self.periodic.load(Ordering::SeqCst))
    }

    /// Takes what is due; `true`: something was.
    pub(crate) fn take_due(&self, now: u64) -> bool {
        let due = |timer: &AtomicU64, next: u64| {
            let at = timer.load(Ordering::SeqCst);
            // Whoever sets it anew meanwhile is right.
            at <= now
                && timer.compare_exchange(at, next, Ordering::SeqCst, Ordering::SeqCst).is_ok()
        };
        let singleshot = due(&self.singleshot, NEVER);
        let period = self.period.load(Ordering::SeqCst);
        // Ticks that were missed are not made up for.
        let next = if period == 0 { NEVER } else { now.saturating_add(period) };
        due(&self.periodic, next) || singleshot
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_that_was_too_fast_is_slowed_and_never_goes_back() {
        let hz = 2_000_000_000;
        let first = advance(None, Sample { tsc: 1000, ns: 500 }, hz / 2);
        assert_eq!(pvclock::nanoseconds(&first.info, 1000), 500);
        // By its rate a million ticks are a million nanoseconds, when they are half a million.
        let here = Sample { tsc: 201_000, ns: 100_500 };
        let told = pvclock::nanoseconds(&first.info, here.tsc);
        let second = advance(Some(&first), here, hz);
        assert!(told > here.ns && second.info.system_time == told);
        // At the end of the interval both are together again.
        let ticks = second.interval * 2;
        let end = pvclock::nanoseconds(&second.info, here.tsc + ticks);
        assert!(end.abs_diff(here.ns + second.interval) < 10, "{end}");
    }

    #[test]
    fn the_clock_agrees_with_the_hosts() {
        let clock = Clock::new(false);
        let info = clock.update();
        assert!(info.tsc_to_system_mul != 0 && clock.changes() == 1);
        let (before, guest) = (now(), pvclock::nanoseconds(&info, tsc()));
        // Whatever happens between the two, the guest's reading came later, less the error of its rate.
        let slack = 1_000_000 + (guest.abs_diff(info.system_time)) / 10;
        assert!(guest + slack >= before, "{guest} {before}");
    }

    #[test]
    fn timers_fire_once_and_periods_again() {
        let timers = Timers::new();
        assert!(!timers.take_due(NEVER - 1));
        timers.set_singleshot(100);
        assert_eq!(timers.deadline(), 100);
        assert!(!timers.take_due(99) && timers.take_due(100) && !timers.take_due(101));
        timers.set_period(10);
        let first = timers.deadline();
        assert!(timers.take_due(first) && timers.deadline() == first + 10);
        timers.set_period(0);
        timers.begin();
        assert_eq!(timers.deadline(), NEVER, "stopped before the start, it stays so");
        let untouched = Timers::new();
        untouched.begin();
        assert_ne!(untouched.deadline(), NEVER);
    }
}

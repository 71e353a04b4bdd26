//! The native clock: the time stamp counter with a scale that readers take without locks.

use core::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering, fence};
use core::time::Duration;

use janus_proto::pvclock;

use super::kvm_clock;

/// Fraction bits of [`Scale::mult`].
const SHIFT: u32 = 32;

/// One line of the TSC-to-time mapping: `ns = base_ns + (tsc - base_tsc) * mult / 2^32`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Scale {
    /// Counter value at `base_ns`.
    pub base_tsc: u64,
    /// Nanoseconds since boot at `base_tsc`.
    pub base_ns: u64,
    /// Nanoseconds per tick, with 32 fraction bits.
    pub mult: u64,
}

impl Scale {
    /// The time at counter value `tsc`; a counter slightly behind the base (another CPU's) counts as the base.
    #[must_use]
    pub const fn ns_at(self, tsc: u64) -> u64 {
        self.base_ns + mul_shift(tsc.saturating_sub(self.base_tsc), self.mult)
    }
    /// The counter value at `ns`, rounded up, for deadlines.
    #[must_use]
    pub const fn tsc_at(self, ns: u64) -> u64 {
        let delta = ns.saturating_sub(self.base_ns) as u128;
        let ticks = (delta << SHIFT).div_ceil(if self.mult == 0 { 1 } else { self.mult as u128 });
        let tsc = self.base_tsc as u128 + ticks;
        if tsc > u64::MAX as u128 { u64::MAX } else { low64(tsc) }
    }
    /// The multiplier of a counter that runs at `hz`.
    #[must_use]
    pub const fn mult_of(hz: u64) -> u64 {
        (1_000_000_000u64 << 30) / (if hz < 4 { 1 } else { hz / 4 })
    }
}

const fn mul_shift(ticks: u64, mult: u64) -> u64 {
    low64((ticks as u128 * mult as u128) >> SHIFT)
}

#[expect(clippy::cast_possible_truncation, reason = "the low half is what is asked for")]
const fn low64(value: u128) -> u64 {
    value as u64
}

/// The current scale, published with a sequence count: odd while it changes.
static SEQUENCE: AtomicU32 = AtomicU32::new(0);
static BASE_TSC: AtomicU64 = AtomicU64::new(0);
static BASE_NS: AtomicU64 = AtomicU64::new(0);
/// Until calibration: one tick a nanosecond, so that time at least moves.
static MULT: AtomicU64 = AtomicU64::new(1 << SHIFT);

/// The current scale.
#[must_use]
pub fn scale() -> Scale {
    loop {
        let before = SEQUENCE.load(Ordering::Acquire);
        let scale = Scale {
            base_tsc: BASE_TSC.load(Ordering::Relaxed),
            base_ns: BASE_NS.load(Ordering::Relaxed),
            mult: MULT.load(Ordering::Relaxed),
        };
        // Orders the loads above before the second look at the sequence.
        fence(Ordering::Acquire);
        if before.is_multiple_of(2) && SEQUENCE.load(Ordering::Relaxed) == before {
            return scale;
        }
        core::hint::spin_loop();
    }
}

/// Publishes a scale. One writer at a time: boot, then whoever ends the measurement (`calibrate::refine`).
pub(crate) fn set_scale(scale: Scale) {
    let sequence = SEQUENCE.load(Ordering::Relaxed);
    SEQUENCE.store(sequence.wrapping_add(1), Ordering::Relaxed);
    // Orders the odd sequence before the new values, for `scale`'s acquire loads.
    fence(Ordering::Release);
    BASE_TSC.store(scale.base_tsc, Ordering::Relaxed);
    BASE_NS.store(scale.base_ns, Ordering::Relaxed);
    MULT.store(scale.mult, Ordering::Relaxed);
    SEQUENCE.store(sequence.wrapping_add(2), Ordering::Release);
}

/// Set where the hypervisor's clock must be asked each time: its scale may change, or differ between CPUs.
static ASK_HYPERVISOR: AtomicBool = AtomicBool::new(false);
/// What the hypervisor's clock said when ours was 0.
static HYPERVISOR_ZERO_NS: AtomicU64 = AtomicU64::new(0);
/// What is known of the TSC's rate, in Hz; 0 if nothing is.
static KNOWN_HZ: AtomicU64 = AtomicU64::new(0);
/// Time since 1970 when our clock was 0, in nanoseconds; 0 until somebody asks.
static WALL_ZERO_NS: AtomicU64 = AtomicU64::new(0);

/// Turns on KVM's clock, if there is one.
pub(crate) fn init_hypervisor_clock() {
    let Some(reading) = kvm_clock::init() else { return };
    let hz = pvclock::tsc_khz(&reading.info) * 1000;
    set_scale(Scale { mult: Scale::mult_of(hz), ..scale() });
    KNOWN_HZ.store(hz, Ordering::Relaxed);
    let tsc = crate::cpu::rdtsc();
    let at_zero = pvclock::nanoseconds(&reading.info, tsc).saturating_sub(scale().ns_at(tsc));
    HYPERVISOR_ZERO_NS.store(at_zero, Ordering::Relaxed);
    ASK_HYPERVISOR.store(!reading.stable, Ordering::Relaxed);
}

/// Turns on KVM's clock of the calling CPU, another than the first.
pub(crate) fn init_hypervisor_clock_here() {
    kvm_clock::init_here();
}

/// Nanoseconds since the clock was started.
#[must_use]
pub fn now_ns() -> u64 {
    /// The latest time that any CPU has told: their own lines from counter to time differ by a little.
    static LATEST_NS: AtomicU64 = AtomicU64::new(0);
    if ASK_HYPERVISOR.load(Ordering::Relaxed)
        && let Some(ns) = kvm_clock::now_ns()
    {
        let ns = ns.saturating_sub(HYPERVISOR_ZERO_NS.load(Ordering::Relaxed));
        if !crate::smp::several() {
            return ns;
        }
        return LATEST_NS.fetch_max(ns, Ordering::Relaxed).max(ns);
    }
    scale().ns_at(crate::cpu::rdtsc())
}

/// The counter value at which [`now_ns`] reaches `ns`.
#[must_use]
pub fn tsc_at(ns: u64) -> u64 {
    scale().tsc_at(ns)
}

/// The counter's rate, where something says it without measuring.
#[must_use]
pub(crate) fn known_hz() -> Option<u64> {
    Some(KNOWN_HZ.load(Ordering::Relaxed)).filter(|hz| *hz != 0)
}

/// Notes the counter's rate, learnt without measuring.
pub(crate) fn set_known_hz(hz: u64) {
    KNOWN_HZ.store(hz, Ordering::Relaxed);
}

/// Time since the UNIX epoch: from the hypervisor, or else from the real-time clock.
#[must_use]
pub fn wall_clock() -> Option<Duration> {
    let mut zero = WALL_ZERO_NS.load(Ordering::Relaxed);
    if zero == 0 {
        let at_zero = match kvm_clock::wall_clock_at_zero() {
            Some(wall) => wall + Duration::from_nanos(HYPERVISOR_ZERO_NS.load(Ordering::Relaxed)),
            None => super::rtc::read()?.saturating_sub(Duration::from_nanos(now_ns())),
        };
        zero = u64::try_from(at_zero.as_nanos()).ok()?;
        WALL_ZERO_NS.store(zero, Ordering::Relaxed);
    }
    Some(Duration::from_nanos(zero) + Duration::from_nanos(now_ns()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scale_and_its_inverse_agree() {
        for hz in [1_000_000_u64, 2_600_000_000, 999_999_937, 10_000_000_000] {
            let scale = Scale { base_tsc: 1 << 40, base_ns: 5, mult: Scale::mult_of(hz) };
            assert_eq!(scale.ns_at(scale.base_tsc - 1000), 5);
            let second = scale.ns_at(scale.base_tsc + hz) - 5;
            assert!(second.abs_diff(1_000_000_000) < 500, "{hz} Hz: {second} ns");
            for ns in [5, 6, 1000, 123_456_789_012] {
                let tsc = scale.tsc_at(ns);
                assert!(scale.ns_at(tsc) >= ns, "the deadline {ns} is not early at {hz} Hz");
                assert!(tsc == scale.base_tsc || scale.ns_at(tsc - 1) <= ns);
            }
        }
    }
}

//! How fast the TSC and the APIC timer count, measured against the PIT.
//!
//! The measurement costs little waiting: [`start`] takes the first sample early in boot, [`finish`] the
//! second one when the clock is first needed, and [`refine`] a third, a good while later, which makes the
//! first estimate (0.2 % after half a millisecond) a hundred times better.
// UNSAFETY: port I/O.
#![expect(unsafe_code, reason = "port I/O")]

use core::sync::atomic::{AtomicBool, Ordering};

use super::clock::{self, Scale};
use super::lock::IrqLock;
use super::native::{inb, outb};
use crate::cpu::{self, rdtsc};
use crate::irq::apic;

/// Counts of the PIT per second.
const PIT_HZ: u64 = 1_193_182;
/// Counts between the first two samples: half a millisecond.
const FIRST_COUNTS: u64 = PIT_HZ / 2000;
/// A third sample is worth it after this many nanoseconds.
const REFINE_AFTER_NS: u64 = 100_000_000;
/// And must come before this many: the counter has wrapped by then, and how often is only clear while the
/// first estimate's error is small beside a turn.
const REFINE_BEFORE_NS: u64 = 5_000_000_000;
/// Counts of a whole turn of the counter.
const TURN: u64 = 1 << 16;
/// Reads of a PIT that does not move before it is taken for a missing one.
const PATIENCE: u32 = 2000;
/// The rate of the APIC timer in QEMU and KVM, for machines without a PIT to measure it.
const EMULATED_APIC_HZ: u64 = 1_000_000_000;

const CHANNEL_2: u16 = 0x42;
const COMMAND: u16 = 0x43;
/// Bit 0 gates channel 2, bit 1 feeds the speaker.
const GATE: u16 = 0x61;

/// Where all counters stood at one moment.
#[derive(Clone, Copy)]
struct Sample {
    tsc: u64,
    pit: u16,
    /// The TSC when `apic` was read.
    apic_tsc: u64,
    apic: u32,
}

static FIRST: IrqLock<Option<Sample>> = IrqLock::new(None);
static REFINED: AtomicBool = AtomicBool::new(true);

/// What is known without measuring: the TSC's rate from CPUID.
fn tsc_hz_from_cpuid() -> Option<u64> {
    const FREQUENCIES: u32 = 0x10;
    let hypervisor = cpu::hypervisors().find(|h| h.max >= h.base + FREQUENCIES);
    if let Some(hypervisor) = hypervisor {
        let khz = cpu::cpuid(hypervisor.base + FREQUENCIES).eax;
        if khz != 0 {
            return Some(u64::from(khz) * 1000);
        }
    }
    // Intel SDM volume 2, CPUID: EBX / EAX is TSC per crystal, ECX the crystal in Hz.
    const TSC: u32 = 0x15;
    if cpu::cpuid(0).eax >= TSC {
        let leaf = cpu::cpuid(TSC);
        if leaf.eax != 0 && leaf.ebx != 0 && leaf.ecx != 0 {
            return Some(u64::from(leaf.ecx) * u64::from(leaf.ebx) / u64::from(leaf.eax));
        }
    }
    None
}

/// Starts the clock at 0; first thing at boot.
pub(crate) fn start_clock() {
    clock::set_scale(Scale { base_tsc: rdtsc(), base_ns: 0, mult: Scale::mult_of(1_000_000_000) });
}

/// Asks hypervisor and CPU for what they know of the clocks, and starts the measurement of the rest,
/// which [`finish`] ends; the APIC is on already.
pub(crate) fn start() {
    clock::init_hypervisor_clock();
    if clock::known_hz().is_none()
        && let Some(hz) = tsc_hz_from_cpuid()
    {
        clock::set_known_hz(hz);
    }
    // Each port access leaves the virtual machine: no measurement without need.
    if clock::known_hz().is_some() && !apic::needs_rate() {
        return;
    }
    // SAFETY: the speaker's gate and the PIT's channel 2, which nobody else uses.
    unsafe {
        outb(GATE, (inb(GATE) & !0b10) | 0b01);
        // Channel 2, both bytes, mode 0 (counts down through zero and on), from 65535.
        outb(COMMAND, 0b1011_0000);
        outb(CHANNEL_2, 0xff);
        outb(CHANNEL_2, 0xff);
    }
    apic::start_counting();
    *FIRST.lock() = Some(sample());
}

/// Sets the clock's scale and the APIC timer's rate, waiting until half a millisecond has passed since [`start`].
pub(crate) fn finish() {
    let known = clock::known_hz();
    let first = *FIRST.lock();
    let measured = first.map(|first| (first, second_sample(first)));
    let hz = known.or_else(|| measured.and_then(|(first, second)| tsc_hz(first, second)));
    if let Some(hz) = hz {
        set_hz(hz);
        REFINED.store(known.is_some(), Ordering::Relaxed);
    }
    if let Some((first, second)) = measured
        && apic::needs_rate()
    {
        let counts = second.apic.wrapping_sub(first.apic);
        if hz.is_some() {
            let scale = clock::scale();
            apic::set_rate(counts, scale.ns_at(second.apic_tsc) - scale.ns_at(first.apic_tsc));
        } else {
            // No PIT, and nothing in CPUID: believe the APIC, and measure the TSC by it.
            let ticks = u128::from(second.apic_tsc - first.apic_tsc);
            let hz = ticks * u128::from(EMULATED_APIC_HZ) / u128::from(counts.max(1));
            set_hz(u64::try_from(hz).unwrap_or(u64::MAX));
            apic::set_rate(1, 1);
        }
    }
    apic::use_tsc_deadline();
    let origin = match (known, hz) {
        (Some(_), _) => "as the hypervisor or the CPU says",
        (None, Some(_)) => "measured against the PIT",
        (None, None) => "measured against the APIC timer",
    };
    let khz = hz.unwrap_or(0) / 1000;
    log::debug!(
        "TSC at {}.{:03} MHz, {origin}; timer {}",
        khz / 1000,
        khz % 1000,
        if apic::needs_rate() { "one-shot" } else { "by TSC deadline" }
    );
}

/// Gives the clock its rate, from its start on.
fn set_hz(hz: u64) {
    clock::set_scale(Scale { mult: Scale::mult_of(hz), ..clock::scale() });
}

/// The sample half a millisecond after `first`, or a useless one from a PIT that does not move.
fn second_sample(first: Sample) -> Sample {
    let mut second = sample();
    for _ in 0..PATIENCE {
        if pit_counts(first, second) >= FIRST_COUNTS {
            break;
        }
        second = sample();
    }
    second
}

/// Takes the third sample if its time has come; called now and then, from wherever time is looked at.
pub(crate) fn refine() {
    if REFINED.load(Ordering::Relaxed) {
        return;
    }
    let now_ns = clock::now_ns();
    if now_ns < REFINE_AFTER_NS {
        return;
    }
    if REFINED.swap(true, Ordering::Relaxed) {
        return;
    }
    let _masked = super::IrqGuard::new();
    let Some(first) = *FIRST.lock() else { return };
    if now_ns > REFINE_BEFORE_NS {
        return;
    }
    let second = sample();
    let counts = unwrap_turns(
        pit_counts(first, second),
        clock::scale().ns_at(second.tsc) - clock::scale().ns_at(first.tsc),
    );
    if let Some(hz) = rate(second.tsc - first.tsc, counts) {
        // Time goes on from here at the better rate, without a step.
        let tsc = rdtsc();
        let base_ns = clock::scale().ns_at(tsc);
        clock::set_scale(Scale { base_tsc: tsc, base_ns, mult: Scale::mult_of(hz) });
    }
}

/// Counts of the PIT between two samples less than 55 ms apart.
fn pit_counts(first: Sample, second: Sample) -> u64 {
    // It counts down.
    u64::from(first.pit.wrapping_sub(second.pit))
}

fn tsc_hz(first: Sample, second: Sample) -> Option<u64> {
    rate(second.tsc - first.tsc, pit_counts(first, second))
}

/// The rate of a counter that made `ticks` while the PIT made `counts`; `None` if that is too short to say.
fn rate(ticks: u64, counts: u64) -> Option<u64> {
    if counts < FIRST_COUNTS {
        return None;
    }
    u64::try_from(u128::from(ticks) * u128::from(PIT_HZ) / u128::from(counts)).ok()
}

/// The PIT's counts in about `ns`, of which the counter shows `shown` after some whole turns.
fn unwrap_turns(shown: u64, ns: u64) -> u64 {
    let expected = u128::from(ns) * u128::from(PIT_HZ) / 1_000_000_000;
    let expected = u64::try_from(expected).unwrap_or(u64::MAX);
    let turns = (expected.saturating_sub(shown) + TURN / 2) / TURN;
    shown + turns * TURN
}

/// Reads the PIT between two looks at the TSC, three times, and keeps the reading that took the shortest.
fn sample() -> Sample {
    let mut best = Sample { tsc: 0, pit: 0, apic_tsc: 0, apic: 0 };
    let mut shortest = u64::MAX;
    for _ in 0..3 {
        let before = rdtsc();
        let pit = read_pit();
        let after = rdtsc();
        if after - before < shortest {
            shortest = after - before;
            best.pit = pit;
            best.tsc = before + (after - before) / 2;
        }
    }
    best.apic = apic::counted();
    best.apic_tsc = rdtsc();
    best
}

fn read_pit() -> u16 {
    // SAFETY: latches and reads the PIT's channel 2, which nobody else uses.
    unsafe {
        outb(COMMAND, 0b1000_0000);
        u16::from_le_bytes([inb(CHANNEL_2), inb(CHANNEL_2)])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whole_turns_of_the_counter_are_found_from_a_coarse_estimate() {
        for counts in [0, 1, 65_535, 65_536, 119_318, 1_193_182, 5_900_000] {
            let exact_ns = counts * 1_000_000_000 / PIT_HZ;
            for error in [-4_i64, 0, 4] {
                let ns = exact_ns.saturating_add_signed(exact_ns.cast_signed() / 1000 * error);
                assert_eq!(
                    unwrap_turns(counts % TURN, ns),
                    counts,
                    "{counts} counts, {error} per mille off"
                );
            }
        }
    }

    #[test]
    fn a_rate_needs_half_a_millisecond() {
        assert_eq!(rate(2_600_000_000, PIT_HZ), Some(2_600_000_000));
        assert_eq!(rate(1000, FIRST_COUNTS - 1), None);
    }
}

//! Xen's clock and timer, the same under PV and PVH: `vcpu_time_info` in the shared page, a one-shot
//! timer by hypercall, the wall clock of the host.

use alloc::boxed::Box;
use core::sync::atomic::{AtomicU64, Ordering, fence};
use core::time::Duration;

use janus_proto::abi::xen::Virq;

use crate::hypercall;
use crate::irq::evtchn;
use crate::xen::shared_info::{SHARED_INFO, boot_vcpu};

/// Xen's system time when this kernel started, so that its own time starts at 0.
static START_NS: AtomicU64 = AtomicU64::new(0);

/// Starts the clock; the shared page is there.
pub(super) fn init() {
    START_NS.store(system_time_ns(), Ordering::Relaxed);
}

/// Starts the timer; handlers can be registered.
///
/// # Errors
/// Xen refused the event channel.
pub(super) fn init_timer() -> Result<(), evtchn::EventError> {
    // PV CPUs start with one at 100 Hz; elsewhere there is none to stop.
    let _ = hypercall::stop_periodic_timer(0);
    // The interrupt only has to end a wait.
    let handler = Box::new(|| {});
    let _port = evtchn::bind_virq(Virq::TIMER, 0, "timer", handler)?.keep();
    Ok(())
}

/// Nanoseconds of Xen's system time, which runs since the host started.
fn system_time_ns() -> u64 {
    let time = &boot_vcpu().time;
    loop {
        let version = time.version.load(Ordering::Acquire);
        let tsc = crate::cpu::rdtsc();
        let start = time.tsc_timestamp.load(Ordering::Relaxed);
        let system_time = time.system_time.load(Ordering::Relaxed);
        let mul = time.tsc_to_system_mul.load(Ordering::Relaxed);
        let [shift, ..] = time.shift_and_flags.load(Ordering::Relaxed).to_le_bytes();
        // Orders the reads above before the second look at the version.
        fence(Ordering::Acquire);
        if version.is_multiple_of(2) && time.version.load(Ordering::Relaxed) == version {
            let ticks = tsc.saturating_sub(start);
            let shift = i32::from(shift.cast_signed());
            let ticks = if shift < 0 { ticks >> shift.unsigned_abs().min(63) } else { ticks << shift.min(63) };
            return system_time + scale(ticks, mul);
        }
        core::hint::spin_loop();
    }
}

#[expect(clippy::cast_possible_truncation, reason = "64 + 32 bits shifted right by 32 are the 64 asked for")]
fn scale(ticks: u64, mul: u32) -> u64 {
    ((u128::from(ticks) * u128::from(mul)) >> 32) as u64
}

pub(super) fn now_ns() -> u64 {
    system_time_ns().saturating_sub(START_NS.load(Ordering::Relaxed))
}

pub(super) fn wall_clock() -> Option<Duration> {
    loop {
        let version = SHARED_INFO.wc_version.load(Ordering::Acquire);
        let low = SHARED_INFO.wc_sec.load(Ordering::Relaxed);
        let high = SHARED_INFO.wc_sec_hi.load(Ordering::Relaxed);
        let nanoseconds = SHARED_INFO.wc_nsec.load(Ordering::Relaxed);
        // As in `system_time_ns`.
        fence(Ordering::Acquire);
        if version.is_multiple_of(2) && SHARED_INFO.wc_version.load(Ordering::Relaxed) == version {
            let seconds = u64::from(high) << 32 | u64::from(low);
            if seconds == 0 {
                return None;
            }
            let base = Duration::from_secs(seconds) + Duration::from_nanos(nanoseconds.into());
            return Some(base + Duration::from_nanos(system_time_ns()));
        }
        core::hint::spin_loop();
    }
}

pub(super) fn set_timer(deadline_ns: Option<u64>) {
    let result = match deadline_ns {
        Some(deadline) => {
            hypercall::set_singleshot_timer(0, deadline.saturating_add(START_NS.load(Ordering::Relaxed)))
        }
        None => hypercall::stop_singleshot_timer(0),
    };
    if let Err(error) = result {
        log::error!("Xen's timer cannot be set: {error}");
    }
}

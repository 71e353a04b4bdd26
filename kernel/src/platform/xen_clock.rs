//! Xen's clock and timer, the same under PV and PVH: `vcpu_time_info` in the shared page, a one-shot
//! timer by hypercall, the wall clock of the host.

use core::sync::atomic::{AtomicU64, Ordering};
use core::time::Duration;

use janus_proto::pvclock;

use crate::irq::evtchn;
use crate::percpu::{self, CpuId, PerCpu};
use crate::xen::shared_info::SHARED_INFO;
use crate::{hypercall, smp};

/// How often to look at the wall clock while it is being set.
const WALL_CLOCK_TRIES: u32 = 1000;
/// Xen's system time when this kernel started, so that its own time starts at 0.
static START_NS: AtomicU64 = AtomicU64::new(0);

/// Starts the clock; the shared page is there.
pub(super) fn init() {
    START_NS.store(system_time_ns(), Ordering::Relaxed);
}

/// Starts the timer of a CPU; handlers can be registered.
///
/// # Errors
/// Xen refused the event channel.
pub(crate) fn init_timer(cpu: &PerCpu) -> Result<(), evtchn::EventError> {
    // PV CPUs start with one at 100 Hz; elsewhere there is none to stop.
    let _ = hypercall::stop_periodic_timer(cpu.id().0);
    evtchn::open_own(cpu, evtchn::Own::Timer)
}

/// The latest time that any CPU has told, from when on there are several.
static LATEST_NS: AtomicU64 = AtomicU64::new(0);

/// Nanoseconds of Xen's system time, which runs since the host started.
fn system_time_ns() -> u64 {
    // A clock that never comes to rest is a broken host; time then stands still rather than jumps.
    pvclock::now(&percpu::vcpu().time, crate::cpu::rdtsc).unwrap_or(0)
}

pub(super) fn now_ns() -> u64 {
    let now_ns = system_time_ns().saturating_sub(START_NS.load(Ordering::Relaxed));
    if !smp::several() {
        return now_ns;
    }
    // Each CPU has a line of its own from counter to time, and they differ by a little.
    LATEST_NS.fetch_max(now_ns, Ordering::Relaxed).max(now_ns)
}

pub(super) fn wall_clock() -> Option<Duration> {
    (0..WALL_CLOCK_TRIES)
        .find_map(|_| pvclock::try_read_wall_clock(&SHARED_INFO.wall_clock))
        .filter(|base| !base.is_zero())
        .map(|base| base + Duration::from_nanos(system_time_ns()))
}

pub(super) fn set_timer(deadline_ns: Option<u64>) {
    let CpuId(vcpu) = percpu::current().id();
    let result = match deadline_ns {
        Some(deadline) => hypercall::set_singleshot_timer(
            vcpu,
            deadline.saturating_add(START_NS.load(Ordering::Relaxed)),
        ),
        None => hypercall::stop_singleshot_timer(vcpu),
    };
    if let Err(error) = result {
        log::error!("Xen's timer cannot be set: {error}");
    }
}

//! Xen PV: every privileged step is a hypercall or a word in memory shared with Xen.
// UNSAFETY: maps the shared page, sets the GS base.
#![expect(unsafe_code, reason = "mappings and CPU state by hypercall")]

use core::sync::atomic::{Ordering, compiler_fence};
use core::time::Duration;

use janus_boot::start_info::StartInfo;
use janus_proto::abi::xen::Errno;
use janus_proto::abi::xen::sched::ShutdownReason;
use janus_proto::addr::Mfn;

use super::xen_clock;
use crate::hypercall;
use crate::irq::evtchn;
use crate::mm::paging::{MapError, pv};
use crate::percpu;
use crate::power::ExitStatus;
use crate::xen::shared_info::SHARED_INFO;

/// Makes hypercalls work and maps the shared page, over the page of the image kept for it: events can
/// be masked and time read from here on. The first act under PV; needs no memory. `hypercall_page` is the address of
/// the page that the image's note names.
///
/// # Errors
/// Xen refused the mapping.
pub(crate) fn init(start: &StartInfo, hypercall_page: u64) -> Result<(), MapError> {
    // SAFETY: the caller names the page that Xen has filled, and the builder maps the image executable.
    unsafe { hypercall::init_page(hypercall_page) };
    let va = core::ptr::from_ref(&SHARED_INFO).expose_provenance();
    // SAFETY: the page is only seen as atomics, and is in the state the memory before it was in: masked.
    unsafe { pv::map_machine_early(va, Mfn(start.shared_info >> 12)) }?;
    disable_irqs();
    evtchn::init();
    xen_clock::init();
    Ok(())
}

/// Makes `base` the GS base of this CPU.
///
/// # Errors
/// Xen refused.
///
/// # Safety
/// As [`hypercall::cpu::set_gs_base`].
pub(crate) unsafe fn set_gs_base(base: u64) -> Result<(), Errno> {
    // SAFETY: the caller's promise.
    unsafe { hypercall::cpu::set_gs_base(base) }
}

/// Starts the timer; the heap and the traps are there.
///
/// # Errors
/// Xen refused the event channel.
pub(crate) fn init_timer() -> Result<(), evtchn::EventError> {
    xen_clock::init_timer(percpu::current())
}

#[inline]
pub(super) fn irqs_enabled() -> bool {
    percpu::vcpu().evtchn_upcall_mask.load(Ordering::Relaxed) == 0
}

#[inline]
pub(super) fn disable_irqs() {
    percpu::vcpu().evtchn_upcall_mask.store(1, Ordering::Relaxed);
    // Xen looks at the mask on this CPU, so the compiler's order is all that matters.
    compiler_fence(Ordering::SeqCst);
}

#[inline]
pub(super) fn enable_irqs() {
    let vcpu = percpu::vcpu();
    compiler_fence(Ordering::SeqCst);
    vcpu.evtchn_upcall_mask.store(0, Ordering::Relaxed);
    compiler_fence(Ordering::SeqCst);
    // What came while masked made no upcall; the way back from any hypercall does.
    if vcpu.evtchn_upcall_pending.load(Ordering::Relaxed) != 0 {
        let _ = hypercall::xen_version();
    }
}

/// `SCHEDOP_block` unmasks and waits in one step; upcalls run before it returns.
pub(super) fn idle_wait() {
    compiler_fence(Ordering::SeqCst);
    hypercall::block();
    disable_irqs();
}

pub(super) fn now_ns() -> u64 {
    xen_clock::now_ns()
}

pub(super) fn wall_clock() -> Option<Duration> {
    xen_clock::wall_clock()
}

pub(super) fn set_timer(deadline_ns: Option<u64>) {
    xen_clock::set_timer(deadline_ns);
}

pub(super) fn wake_cpu(cpu: &percpu::PerCpu) {
    evtchn::wake(cpu);
}

/// One step of waiting for another CPU: often enough it may be one that Xen lets wait for this one's time.
pub(super) fn relax() {
    /// Steps between two yields.
    const STEPS: u32 = 128;
    let spins = &percpu::current().spins;
    let count = spins.load(Ordering::Relaxed).wrapping_add(1);
    spins.store(count, Ordering::Relaxed);
    if count.is_multiple_of(STEPS) {
        hypercall::yield_cpu();
    } else {
        core::hint::spin_loop();
    }
}

pub(super) fn end(status: ExitStatus) -> ! {
    end_domain(status)
}

/// Ends the domain for the reason that `status` is to Xen; also for PVH.
pub(super) fn end_domain(status: ExitStatus) -> ! {
    crate::xen::console::drain();
    let reason = match status {
        ExitStatus::PowerOff(_) => ShutdownReason::POWEROFF,
        ExitStatus::Reboot => ShutdownReason::REBOOT,
        ExitStatus::Crash => ShutdownReason::CRASH,
    };
    loop {
        // A domain that cannot shut down has nothing else to do.
        let _ = hypercall::shutdown(reason);
        hypercall::yield_cpu();
    }
}

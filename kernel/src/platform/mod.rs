//! Where the kernel runs: a closed enum, found once at boot and immutable from then on.
//!
//! About ten functions differ so early or so deeply that everything above needs them (early output,
//! interrupt masking, waiting, time, the end). They are here, each one `match`; the work is in
//! [`xen_pv`], [`xen_pvh`], [`kvm`] and, for what all natively running kernels share, [`native`].
//! Everything else (drivers, paging, traps) chooses its half once, in its own `init`.
// UNSAFETY: programs the machine: masks interrupts, ends the virtual machine.
#![expect(unsafe_code, reason = "the platform seam ends in privileged instructions and hypercalls")]

use core::sync::atomic::{AtomicU8, Ordering};
use core::time::Duration;

use crate::power::ExitStatus;

pub mod calibrate;
pub mod clock;
#[cfg(not(target_os = "none"))]
pub mod host;
pub mod kvm;
mod kvm_clock;
pub mod lock;
pub mod native;
mod rtc;
pub(crate) mod tcg;
pub(crate) mod xen_clock;
pub mod xen_pv;
pub mod xen_pvh;

/// Where the kernel runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Platform {
    /// A Xen paravirtualised guest: no privileged instructions, paging and events by hypercall.
    XenPv = 1,
    /// A Xen guest in a hardware container: native CPU state, Xen's devices and events.
    XenPvh = 2,
    /// KVM, QEMU's TCG, any other hypervisor or a bare machine: native CPU state, virtio devices.
    Kvm = 3,
    /// The development host: the portable parts under `cargo test`.
    #[cfg(not(target_os = "none"))]
    Host = 4,
}

impl Platform {
    /// Whether this is a Xen guest of either kind.
    #[must_use]
    pub const fn is_xen(self) -> bool {
        matches!(self, Self::XenPv | Self::XenPvh)
    }
    /// Whether the kernel owns the (virtual) CPU: page tables, IDT, interrupt flag, ports.
    #[must_use]
    pub const fn is_native(self) -> bool {
        matches!(self, Self::XenPvh | Self::Kvm)
    }
    /// Its name in messages and reports.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::XenPv => "xen-pv",
            Self::XenPvh => "xen-pvh",
            Self::Kvm => "kvm",
            #[cfg(not(target_os = "none"))]
            Self::Host => "host",
        }
    }
}

/// Finds the platform: by the door, then by the hypervisor that CPUID shows.
#[must_use]
pub fn detect(door: janus_boot::Door) -> Platform {
    if door == janus_boot::Door::XenPv {
        Platform::XenPv
    } else if crate::cpu::hypervisors().any(|hypervisor| hypervisor.signature == crate::cpu::XEN) {
        Platform::XenPvh
    } else {
        Platform::Kvm
    }
}

static CURRENT: AtomicU8 = AtomicU8::new(0);

/// Fixes the platform; the first act of the kernel, before any other function here.
pub(crate) fn set_current(platform: Platform) {
    CURRENT.store(platform as u8, Ordering::Relaxed);
}

/// The platform. Before it is known (the very first instructions) the answer is the native one.
#[must_use]
#[inline]
pub fn current() -> Platform {
    #[cfg(not(target_os = "none"))]
    {
        Platform::Host
    }
    #[cfg(target_os = "none")]
    match CURRENT.load(Ordering::Relaxed) {
        1 => Platform::XenPv,
        2 => Platform::XenPvh,
        _ => Platform::Kvm,
    }
}

/// Writes to the platform's simplest output, without locks, memory or interrupts.
pub fn early_write(bytes: &[u8]) {
    match current() {
        #[cfg(not(target_os = "none"))]
        Platform::Host => host::early_write(bytes),
        _ => janus_boot::early::write(bytes),
    }
}

/// Whether interrupts (events) are delivered to this CPU.
#[must_use]
#[inline]
pub fn irqs_enabled() -> bool {
    match current() {
        Platform::XenPv => xen_pv::irqs_enabled(),
        Platform::XenPvh | Platform::Kvm => native::irqs_enabled(),
        #[cfg(not(target_os = "none"))]
        Platform::Host => false,
    }
}

/// Stops delivery of interrupts to this CPU.
#[inline]
pub fn disable_irqs() {
    match current() {
        Platform::XenPv => xen_pv::disable_irqs(),
        Platform::XenPvh | Platform::Kvm => native::disable_irqs(),
        #[cfg(not(target_os = "none"))]
        Platform::Host => {}
    }
}

/// Starts delivery of interrupts to this CPU; what is pending arrives at once.
///
/// # Safety
/// The caller holds no lock that an interrupt handler takes, and trap handling is set up.
#[inline]
pub unsafe fn enable_irqs() {
    match current() {
        Platform::XenPv => xen_pv::enable_irqs(),
        // SAFETY: the caller's promise is the same.
        Platform::XenPvh | Platform::Kvm => unsafe { native::enable_irqs() },
        #[cfg(not(target_os = "none"))]
        Platform::Host => {}
    }
}

/// Keeps interrupts masked on this CPU while it lives; guards nest.
#[derive(Debug)]
pub struct IrqGuard {
    was_enabled: bool,
    /// Masking is a state of one CPU, so the guard stays there.
    _not_send: core::marker::PhantomData<*mut ()>,
}

impl IrqGuard {
    /// Masks interrupts on this CPU.
    #[must_use]
    #[inline]
    pub fn new() -> Self {
        let was_enabled = irqs_enabled();
        if was_enabled {
            disable_irqs();
        }
        Self { was_enabled, _not_send: core::marker::PhantomData }
    }
}

impl Default for IrqGuard {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for IrqGuard {
    #[inline]
    fn drop(&mut self) {
        if self.was_enabled {
            // SAFETY: interrupts were enabled when the guard was made; what was locked under the guard
            // was unlocked before it is dropped.
            unsafe { enable_irqs() }
        }
    }
}

/// Waits, without using the CPU, until an interrupt (event) has been handled.
///
/// Call it with interrupts masked, after finding that there is nothing to do: unmasking and waiting
/// are one step, so an interrupt that arrives in between ends the wait. Returns with them masked again.
pub fn idle_wait() {
    match current() {
        Platform::XenPv => xen_pv::idle_wait(),
        Platform::XenPvh | Platform::Kvm => native::idle_wait(),
        #[cfg(not(target_os = "none"))]
        Platform::Host => host::idle_wait(),
    }
}

/// One step of waiting for another CPU, which may not be running now.
///
/// What another CPU asks of this one is done here, as interrupts are masked where locks are waited for.
pub fn relax() {
    match current() {
        Platform::XenPv | Platform::XenPvh => {
            crate::smp::attend();
            xen_pv::relax();
        }
        Platform::Kvm => {
            crate::smp::attend();
            core::hint::spin_loop();
        }
        #[cfg(not(target_os = "none"))]
        Platform::Host => std::thread::yield_now(),
    }
}

/// Nanoseconds since boot; the same on all CPUs, and never running backwards.
#[must_use]
#[inline]
pub fn now_ns() -> u64 {
    match current() {
        Platform::XenPv => xen_pv::now_ns(),
        Platform::XenPvh => xen_pvh::now_ns(),
        Platform::Kvm => kvm::now_ns(),
        #[cfg(not(target_os = "none"))]
        Platform::Host => host::now_ns(),
    }
}

/// Time since the UNIX epoch, if the platform tells it.
#[must_use]
pub fn wall_clock() -> Option<Duration> {
    match current() {
        Platform::XenPv => xen_pv::wall_clock(),
        Platform::XenPvh => xen_pvh::wall_clock(),
        Platform::Kvm => kvm::wall_clock(),
        #[cfg(not(target_os = "none"))]
        Platform::Host => host::wall_clock(),
    }
}

/// Asks for one timer interrupt on this CPU at `deadline_ns` (of [`now_ns`]), or for none.
///
/// A deadline in the past interrupts at once. A new call replaces the old deadline. The interrupt
/// may come early (coarse timers): whoever waits looks at the clock again. All it does is end
/// [`idle_wait`].
pub fn set_timer(deadline_ns: Option<u64>) {
    match current() {
        Platform::XenPv => xen_pv::set_timer(deadline_ns),
        Platform::XenPvh => xen_pvh::set_timer(deadline_ns),
        Platform::Kvm => kvm::set_timer(deadline_ns),
        #[cfg(not(target_os = "none"))]
        Platform::Host => host::set_timer(deadline_ns),
    }
}

/// Ends the [`idle_wait`] of another CPU.
pub fn wake_cpu(cpu: &crate::percpu::PerCpu) {
    match current() {
        Platform::XenPv | Platform::XenPvh => xen_pv::wake_cpu(cpu),
        Platform::Kvm => native::wake_cpu(cpu),
        #[cfg(not(target_os = "none"))]
        Platform::Host => {}
    }
}

/// Ends the virtual machine in the hypervisor's own way; callers use [`crate::power::exit`].
pub(crate) fn end(status: ExitStatus) -> ! {
    match current() {
        Platform::XenPv => xen_pv::end(status),
        Platform::XenPvh => xen_pvh::end(status),
        Platform::Kvm => kvm::end(status),
        #[cfg(not(target_os = "none"))]
        Platform::Host => host::end(status),
    }
}

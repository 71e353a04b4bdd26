//! What the runtime asks of the machine under it: time, one timer, masking, idling, stacks.
//!
//! The platform installs its table once, early in boot ([`install`]). Before that, and for every table entry
//! that a platform has no better answer for, [`Hooks::EARLY`] applies in the guest; on the host the table is
//! made of threads (`std_hooks.rs`), where each thread plays one CPU.

use core::ptr::NonNull;
use core::time::Duration;

use spin::Once;

use super::executor::Cpu;

/// The machine as the runtime sees it. All functions act on the calling CPU unless they say otherwise.
#[derive(Clone, Copy, Debug)]
pub struct Hooks {
    /// Monotonic nanoseconds since boot, the same on all CPUs.
    pub now_ns: fn() -> u64,
    /// Nanoseconds since the UNIX epoch, where the platform has a wall clock.
    pub wall_clock: fn() -> Option<Duration>,
    /// Asks for one interrupt at (or soon after) this time in [`Self::now_ns`] terms; `None` cancels.
    /// The interrupt only has to end [`Self::idle_wait`]; no handler needs to call the runtime.
    pub set_timer: fn(Option<u64>),
    /// Called with interrupts masked. Unmasks and waits for an interrupt *atomically* (`sti; hlt`,
    /// `SCHEDOP_block`), lets its handler run, masks again and returns. May return early.
    pub idle_wait: fn(),
    /// Masks interrupts (events); answers whether they were unmasked before.
    pub irq_disable: fn() -> bool,
    /// Unmasks interrupts and delivers what has become pending meanwhile.
    pub irq_enable: fn(),
    /// The calling CPU's runtime state. Stable while interrupts are masked.
    pub current_cpu: fn() -> &'static Cpu,
    /// Ends [`Self::idle_wait`] of another CPU (an IPI). Never called for the calling CPU.
    pub wake_cpu: fn(&'static Cpu),
    /// One step of waiting for a spin lock: `pause`, or a yield to the hypervisor.
    pub relax: fn(),
    /// The CPUs in use by number, from 0 without a gap; `None` behind the last. Those among which tasks may move.
    pub nth_cpu: fn(usize) -> Option<&'static Cpu>,
    /// Allocates a stack of this many bytes (a multiple of 4096) with an unmapped page below it; answers its lowest byte.
    pub stack_alloc: fn(usize) -> Option<NonNull<u8>>,
    /// Takes back what [`Self::stack_alloc`] gave, with the same length.
    pub stack_free: fn(NonNull<u8>, usize),
}

#[cfg(target_os = "none")]
impl Hooks {
    /// The table before the platform is known: no time, interrupts stay as they are (masked), no stacks.
    pub const EARLY: Self = Self {
        now_ns: || 0,
        wall_clock: || None,
        set_timer: |_| {},
        idle_wait: core::hint::spin_loop,
        irq_disable: || false,
        irq_enable: || {},
        current_cpu: super::executor::boot_cpu,
        wake_cpu: |_| {},
        relax: core::hint::spin_loop,
        nth_cpu: |_| None,
        stack_alloc: |_| None,
        stack_free: |_, _| {},
    };
}

#[cfg(target_os = "none")]
static DEFAULT: Hooks = Hooks::EARLY;
#[cfg(not(target_os = "none"))]
static DEFAULT: Hooks = super::std_hooks::HOOKS;

static INSTALLED: Once<Hooks> = Once::new();

/// Installs the platform's table, once and before the second CPU starts; later calls change nothing.
pub fn install(table: Hooks) {
    INSTALLED.call_once(|| table);
}

/// The table in force.
#[inline]
#[must_use]
pub fn hooks() -> &'static Hooks {
    INSTALLED.get().unwrap_or(&DEFAULT)
}

//! Data that each CPU has for itself, behind one type.
//!
//! The GS base points to this CPU's [`PerCpu`]: set natively by an MSR, under Xen PV by
//! `set_segment_base`. Nothing else in the kernel may assume how many CPUs there are.
// UNSAFETY: reads the GS base and makes a reference of it.
#![expect(unsafe_code, reason = "the GS base is the only way to find this CPU's data")]

use core::cell::UnsafeCell;
use core::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use crate::task::executor::Cpu;

/// CPUs that this kernel can drive.
pub const MAX_CPUS: usize = 8;

/// A CPU by number: 0 is the boot CPU, others follow in the order they came up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct CpuId(pub u32);

/// What one CPU has for itself. Found by [`current`].
#[derive(Debug)]
#[repr(C, align(64))]
pub struct PerCpu {
    /// This structure's own address, read through `gs:0`.
    this: UnsafeCell<*const PerCpu>,
    id: AtomicU32,
    /// Whether interrupts are being handled right now.
    pub(crate) in_interrupt: AtomicU32,
    /// How many [`crate::trap::fpu::with`] are active on this CPU, one inside the other.
    pub(crate) fpu_depth: AtomicU32,
    /// The executor's part.
    runtime: Cpu,
    /// The local APIC's id, where interrupts for this CPU go.
    apic_id: AtomicU32,
    /// Scratch for [`crate::mm::heap`]: this CPU's magazines of free objects.
    pub(crate) magazines: crate::mm::heap::Magazines,
}

// SAFETY: `this` is written once, before its CPU runs anything else; the other fields are atomics or
// are used by their own CPU alone, with interrupts masked.
unsafe impl Sync for PerCpu {}

impl PerCpu {
    const fn new() -> Self {
        Self {
            this: UnsafeCell::new(core::ptr::null()),
            id: AtomicU32::new(0),
            in_interrupt: AtomicU32::new(0),
            fpu_depth: AtomicU32::new(0),
            runtime: Cpu::new(),
            apic_id: AtomicU32::new(0),
            magazines: crate::mm::heap::Magazines::new(),
        }
    }
    /// Which CPU this is.
    #[must_use]
    pub fn id(&self) -> CpuId {
        CpuId(self.id.load(Ordering::Relaxed))
    }
    /// The executor's part.
    #[must_use]
    pub fn runtime(&self) -> &Cpu {
        &self.runtime
    }
    /// Where interrupts for this CPU go.
    #[must_use]
    pub fn apic_id(&self) -> u32 {
        self.apic_id.load(Ordering::Relaxed)
    }
    /// Notes where interrupts for this CPU go.
    pub(crate) fn set_apic_id(&self, id: u32) {
        self.apic_id.store(id, Ordering::Relaxed);
    }
}

/// The CPU whose executor part `runtime` is.
#[must_use]
pub fn of_runtime(runtime: &Cpu) -> Option<&'static PerCpu> {
    CPUS.iter().find(|cpu| core::ptr::eq(&raw const cpu.runtime, runtime))
}

static CPUS: [PerCpu; MAX_CPUS] = [const { PerCpu::new() }; MAX_CPUS];
static BOOT_CPU_READY: AtomicBool = AtomicBool::new(false);

/// The address that the GS base of CPU `id` must hold, with the structure behind it prepared.
///
/// `None`: more CPUs than [`MAX_CPUS`].
pub(crate) fn prepare(id: CpuId) -> Option<*const PerCpu> {
    let cpu = CPUS.get(usize::try_from(id.0).ok()?)?;
    cpu.id.store(id.0, Ordering::Relaxed);
    // SAFETY: CPU `id` does not run yet (or is this one, not using its data yet), so nobody reads it.
    unsafe { *cpu.this.get() = core::ptr::from_ref(cpu) };
    Some(core::ptr::from_ref(cpu))
}

/// Says that the boot CPU's GS base is set; until then [`current`] answers with the boot CPU's data directly.
pub(crate) fn boot_cpu_ready() {
    BOOT_CPU_READY.store(true, Ordering::Release);
}

/// This CPU's data.
#[must_use]
#[inline]
pub fn current() -> &'static PerCpu {
    #[cfg(target_os = "none")]
    if BOOT_CPU_READY.load(Ordering::Relaxed) {
        let this: *const PerCpu;
        // SAFETY: the GS base of every running CPU holds a prepared `PerCpu`, whose first word is its address.
        unsafe {
            core::arch::asm!("mov {}, gs:[0]", out(reg) this,
                options(nostack, preserves_flags, readonly, pure));
        }
        // SAFETY: it points into `CPUS`, which is never freed nor borrowed mutably.
        return unsafe { &*this };
    }
    let [boot, ..] = &CPUS;
    boot
}

//! Data that each CPU has for itself, behind one type.
//!
//! The GS base points to this CPU's [`PerCpu`]: set natively by an MSR, under Xen PV by
//! `set_segment_base`. Nothing else in the kernel may assume how many CPUs there are.
// UNSAFETY: reads the GS base and makes a reference of it.
#![expect(unsafe_code, reason = "the GS base is the only way to find this CPU's data")]

use core::cell::UnsafeCell;
use core::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use crate::task::executor::Cpu;
use crate::xen::shared_info::{self, VcpuInfo};

/// CPUs that this kernel can drive: as many as a word has bits.
pub const MAX_CPUS: usize = 64;
/// Event channels of a CPU's own: its timer, and the one by which others wake it.
const OWN_PORTS: usize = 2;

/// A CPU by number: 0 is the boot CPU, others follow in the order they came up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct CpuId(pub u32);

/// What one CPU has for itself. Found by [`current`].
#[derive(Debug)]
#[repr(C, align(64))]
pub struct PerCpu {
    /// This structure's own address, read through `gs:0`.
    this: UnsafeCell<*const PerCpu>,
    /// Where this CPU and Xen tell each other of events; `trap/pv.s` reads it through `gs:8`.
    vcpu: UnsafeCell<*const VcpuInfo>,
    id: AtomicU32,
    prepared: AtomicBool,
    /// Whether interrupts are being handled right now.
    pub(crate) in_interrupt: AtomicU32,
    /// How many [`crate::trap::fpu::with`] are active on this CPU, one inside the other.
    pub(crate) fpu_depth: AtomicU32,
    /// Steps of waiting for other CPUs.
    pub(crate) spins: AtomicU32,
    /// The executor's part.
    runtime: Cpu,
    /// The local APIC's id, where interrupts for this CPU go.
    apic_id: AtomicU32,
    /// Scratch for [`crate::mm::heap`]: this CPU's magazines of free objects.
    pub(crate) magazines: crate::mm::heap::Magazines,
    /// The `vcpu_info` of a CPU other than the first, whose is in the shared page.
    own_vcpu: VcpuInfo,
    /// Event channels of a CPU other than the first ([`crate::irq::evtchn`]); 0: none.
    pub(crate) ports: [AtomicU32; OWN_PORTS],
}
const _: () = assert!(core::mem::offset_of!(PerCpu, this) == 0);
const _: () = assert!(core::mem::offset_of!(PerCpu, vcpu) == 8);

// SAFETY: `this` and `vcpu` are written once, before their CPU runs anything else; the other fields are atomics or
// are used by their own CPU alone, with interrupts masked.
unsafe impl Sync for PerCpu {}

impl PerCpu {
    const fn new() -> Self {
        Self {
            this: UnsafeCell::new(core::ptr::null()),
            vcpu: UnsafeCell::new(core::ptr::null()),
            id: AtomicU32::new(0),
            prepared: AtomicBool::new(false),
            in_interrupt: AtomicU32::new(0),
            fpu_depth: AtomicU32::new(0),
            spins: AtomicU32::new(0),
            runtime: Cpu::new(),
            apic_id: AtomicU32::new(0),
            magazines: crate::mm::heap::Magazines::new(),
            own_vcpu: VcpuInfo::new(),
            ports: [const { AtomicU32::new(0) }; OWN_PORTS],
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
    /// The `vcpu_info` that is this CPU's own, to be registered with Xen.
    pub(crate) fn own_vcpu(&self) -> &VcpuInfo {
        &self.own_vcpu
    }
    /// Whether it was started once, or is about to be.
    pub(crate) fn is_prepared(&self) -> bool {
        self.prepared.load(Ordering::Acquire)
    }
    /// The bit that stands for this CPU in a set of CPUs.
    pub(crate) fn bit(&self) -> u64 {
        1 << (self.id().0 % u64::BITS)
    }
}

/// The CPU with number `id`; `None`: beyond what this kernel can drive.
#[must_use]
pub(crate) fn get(id: CpuId) -> Option<&'static PerCpu> {
    CPUS.get(usize::try_from(id.0).ok()?)
}

/// The CPU that booted.
#[must_use]
pub fn first() -> &'static PerCpu {
    let [first, ..] = &CPUS;
    first
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
    let vcpu = if id.0 == 0 { shared_info::boot_vcpu() } else { &cpu.own_vcpu };
    // SAFETY: CPU `id` does not run yet (or is this one, not using its data yet), so nobody reads it.
    unsafe { *cpu.this.get() = core::ptr::from_ref(cpu) };
    // SAFETY: as above.
    unsafe { *cpu.vcpu.get() = core::ptr::from_ref(vcpu) };
    cpu.prepared.store(true, Ordering::Release);
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

/// What this CPU and Xen tell each other.
#[must_use]
#[inline]
pub fn vcpu() -> &'static VcpuInfo {
    #[cfg(target_os = "none")]
    if BOOT_CPU_READY.load(Ordering::Relaxed) {
        let vcpu: *const VcpuInfo;
        // SAFETY: the GS base of every running CPU holds a prepared `PerCpu`, whose second word `prepare` has written.
        unsafe {
            core::arch::asm!("mov {}, gs:[8]", out(reg) vcpu,
                options(nostack, preserves_flags, readonly, pure));
        }
        // SAFETY: it points into a static, of which there are only shared references.
        return unsafe { &*vcpu };
    }
    shared_info::boot_vcpu()
}

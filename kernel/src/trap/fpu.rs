//! The floating point and vector state, which the kernel itself never touches.
//!
//! Kernel code is compiled without SSE, and nothing saves these registers at interrupts or task
//! switches. A library user who wants them (a vectorised checksum, say) encloses the code in [`with`].
// UNSAFETY: writes control registers, saves and restores FPU state.
#![expect(unsafe_code, reason = "control registers, xsave and fxsave")]

use core::arch::asm;
use core::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use x86_64::registers::control::{Cr0, Cr0Flags, Cr4, Cr4Flags};

use crate::percpu;
use crate::platform::IrqGuard;

/// Whether XSAVE is on; else FXSAVE, which every x86-64 CPU has.
static XSAVE: AtomicBool = AtomicBool::new(false);
/// The state components that [`init`] enabled in XCR0.
static COMPONENTS: AtomicU32 = AtomicU32::new(0);

/// x87, SSE and AVX: what a save area of [`AREA`] bytes holds (Intel SDM volume 1, 13.1 and 13.4).
const X87_SSE_AVX: u32 = 0b111;
const X87_SSE: u32 = 0b11;
/// Legacy region 512 bytes, header 64, AVX 256.
const AREA: usize = 832;

#[repr(C, align(64))]
struct Area([u8; AREA]);

/// Enables SSE, and AVX where the CPU has it, on this CPU. `features` is ECX of CPUID leaf 1.
///
/// # Safety
/// Runs natively (not under Xen PV, where Xen has done this), once on each CPU, before [`with`].
pub(crate) unsafe fn init(features: u32) {
    const CPUID_XSAVE: u32 = 1 << 26;
    const CPUID_AVX: u32 = 1 << 28;
    // SAFETY: no FPU instruction has run, so no state changes its meaning.
    unsafe {
        Cr0::update(|flags| {
            flags.remove(Cr0Flags::EMULATE_COPROCESSOR | Cr0Flags::TASK_SWITCHED);
            flags.insert(Cr0Flags::MONITOR_COPROCESSOR | Cr0Flags::NUMERIC_ERROR);
        });
    }
    let has_xsave = features & CPUID_XSAVE != 0;
    // SAFETY: SSE is part of x86-64; OSXSAVE only where CPUID has it.
    unsafe {
        Cr4::update(|flags| {
            flags.insert(Cr4Flags::OSFXSR | Cr4Flags::OSXMMEXCPT_ENABLE);
            flags.set(Cr4Flags::OSXSAVE, has_xsave);
        });
    }
    if has_xsave {
        let components = if features & CPUID_AVX != 0 { X87_SSE_AVX } else { X87_SSE };
        // SAFETY: OSXSAVE is on, and these are components that the CPU has.
        unsafe {
            asm!("xsetbv", in("ecx") 0, in("eax") components, in("edx") 0, options(nomem, nostack));
        }
        COMPONENTS.store(components, Ordering::Relaxed);
        XSAVE.store(true, Ordering::Relaxed);
    }
}

/// Runs `f` with the floating point and vector registers at its disposal (x87, SSE, and AVX where there is).
///
/// They start out with undefined contents and are nobody's afterwards. Interrupts stay masked, so keep
/// `f` short; it cannot wait, being a plain function. Calls may nest: the outer state is kept.
pub fn with<T>(f: impl FnOnce() -> T) -> T {
    let _irq = IrqGuard::new();
    let depth = &percpu::current().fpu_depth;
    let nested = depth.fetch_add(1, Ordering::Relaxed) > 0;
    let result = if nested {
        let mut area = Area([0; AREA]);
        save(&mut area);
        let result = f();
        restore(&area);
        result
    } else {
        f()
    };
    depth.fetch_sub(1, Ordering::Relaxed);
    result
}

fn save(area: &mut Area) {
    let components = COMPONENTS.load(Ordering::Relaxed);
    if XSAVE.load(Ordering::Relaxed) {
        // SAFETY: XSAVE is on; the area is aligned to 64, zeroed, and holds these components.
        unsafe {
            asm!("xsave64 [{}]", in(reg) area.0.as_mut_ptr(), in("eax") components, in("edx") 0,
                options(nostack));
        }
    } else {
        // SAFETY: 512 bytes, aligned to 16.
        unsafe { asm!("fxsave64 [{}]", in(reg) area.0.as_mut_ptr(), options(nostack)) };
    }
}

fn restore(area: &Area) {
    let components = COMPONENTS.load(Ordering::Relaxed);
    if XSAVE.load(Ordering::Relaxed) {
        // SAFETY: what `save` wrote with the same components.
        unsafe {
            asm!("xrstor64 [{}]", in(reg) area.0.as_ptr(), in("eax") components, in("edx") 0,
                options(nostack, readonly));
        }
    } else {
        // SAFETY: what `save` wrote.
        unsafe { asm!("fxrstor64 [{}]", in(reg) area.0.as_ptr(), options(nostack, readonly)) };
    }
}

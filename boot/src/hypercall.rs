//! The few hypercalls that are needed before the kernel has its own (`xen/include/public/xen.h`).
// UNSAFETY: the `syscall`, `vmcall` and `vmmcall` instructions.
#![expect(unsafe_code, reason = "hypercall instructions")]

use core::arch::asm;

pub(crate) const SET_TRAP_TABLE: u64 = 0;
pub(crate) const MEMORY_OP: u64 = 12;
pub(crate) const UPDATE_VA_MAPPING: u64 = 14;
pub(crate) const CONSOLE_IO: u64 = 18;
pub(crate) const SCHED_OP: u64 = 29;
pub(crate) const EVENT_CHANNEL_OP: u64 = 32;
pub(crate) const HVM_OP: u64 = 34;

/// How this guest reaches the hypervisor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Gate {
    /// Xen PV.
    Syscall = 1,
    /// Xen PVH on Intel.
    Vmcall = 2,
    /// Xen PVH on AMD.
    Vmmcall = 3,
}

/// Makes hypercall `number` with three arguments.
///
/// # Safety
/// `gate` must be this guest's, and the call, with what its arguments point to, must be one that
/// leaves the memory Rust knows of alone but for what the caller handed over.
pub(crate) unsafe fn hypercall(gate: Gate, number: u64, a1: u64, a2: u64, a3: u64) -> i64 {
    let result: i64;
    match gate {
        // SAFETY: per the contract; Xen's ABI destroys rcx and r11 (the instruction itself does) and,
        // for good measure, the argument registers.
        Gate::Syscall => unsafe {
            asm!(
                "syscall",
                inlateout("rax") number => result,
                inlateout("rdi") a1 => _,
                inlateout("rsi") a2 => _,
                inlateout("rdx") a3 => _,
                lateout("rcx") _,
                lateout("r11") _,
                options(nostack)
            );
        },
        // SAFETY: as above.
        Gate::Vmcall => unsafe {
            asm!(
                "vmcall",
                inlateout("rax") number => result,
                inlateout("rdi") a1 => _,
                inlateout("rsi") a2 => _,
                inlateout("rdx") a3 => _,
                options(nostack)
            );
        },
        // SAFETY: as above.
        Gate::Vmmcall => unsafe {
            asm!(
                "vmmcall",
                inlateout("rax") number => result,
                inlateout("rdi") a1 => _,
                inlateout("rsi") a2 => _,
                inlateout("rdx") a3 => _,
                options(nostack)
            );
        },
    }
    result
}

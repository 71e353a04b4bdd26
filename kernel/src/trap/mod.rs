//! Exceptions: what happened, where, and how the kernel got there; then the end.
//!
//! [`idt`] is the native way in, [`pv`] that of Xen PV; both build a [`TrapFrame`] and call
//! [`trap_entry`]. Interrupts go on to [`crate::irq`].
// UNSAFETY: entry points called from assembly; reads CR2.
#![expect(unsafe_code, reason = "entry points of assembly, CR2")]

use core::fmt::Write;

use crate::panic::{self, Report, backtrace};
use crate::platform::{self, Platform};
use crate::power::{self, ExitStatus};
use crate::{irq, smp};

pub mod fpu;
#[cfg(target_os = "none")]
pub mod idt;
pub mod pv;

/// Vectors of exceptions that get special treatment (AMD64 volume 2, 8.2).
pub const NMI: u8 = 2;
/// See [`NMI`].
pub const DOUBLE_FAULT: u8 = 8;
/// See [`NMI`].
pub const PAGE_FAULT: u8 = 14;
/// See [`NMI`].
pub const MACHINE_CHECK: u8 = 18;
/// Vectors below this are exceptions.
const EXCEPTIONS: u64 = 32;

/// The registers at an interruption, in the order in which the entry code pushes them (last first).
#[derive(Clone, Copy, Debug)]
#[repr(C)]
#[expect(missing_docs, reason = "the fields are the registers they are named after")]
pub struct TrapFrame {
    pub r15: u64,
    pub r14: u64,
    pub r13: u64,
    pub r12: u64,
    pub rbp: u64,
    pub rbx: u64,
    pub r11: u64,
    pub r10: u64,
    pub r9: u64,
    pub r8: u64,
    pub rax: u64,
    pub rcx: u64,
    pub rdx: u64,
    pub rsi: u64,
    pub rdi: u64,
    /// Pushed by the entry stub.
    pub vector: u64,
    /// Pushed by the CPU, or 0 by the stub of a vector without one.
    pub error_code: u64,
    pub rip: u64,
    pub cs: u64,
    pub rflags: u64,
    pub rsp: u64,
    pub ss: u64,
}

/// What the entry code calls, with interrupts masked: exceptions end the kernel, interrupts are handled.
#[cfg_attr(target_os = "none", unsafe(no_mangle))]
pub extern "C" fn trap_entry(frame: &mut TrapFrame) {
    match u8::try_from(frame.vector) {
        Ok(vector) if frame.vector >= EXCEPTIONS => irq::interrupt(vector),
        _ => exception(frame),
    }
}

/// Reports an exception and ends the virtual machine as crashed.
pub fn exception(frame: &TrapFrame) -> ! {
    platform::disable_irqs();
    if frame.vector == u64::from(NMI) && panic::reported_elsewhere() {
        smp::stand_still();
    }
    let mut report = Report::begin();
    let name =
        usize::try_from(frame.vector).ok().and_then(|v| NAMES.get(v)).copied().unwrap_or("unknown");
    let _ = writeln!(
        report,
        "\nkernel exception {}: {name}, error code {:#x}, at {:#x}",
        frame.vector, frame.error_code, frame.rip
    );
    panic::cpu_line(&mut report);
    if frame.vector == u64::from(PAGE_FAULT) || frame.vector == u64::from(DOUBLE_FAULT) {
        let address = fault_address();
        let _ = write!(report, "  address {address:#x}");
        if address < 4096 {
            let _ = write!(report, " (null pointer)");
        } else if frame.rsp.wrapping_sub(address) < 4096 || address.wrapping_sub(frame.rsp) < 4096 {
            let _ = write!(report, " (at the stack pointer: the stack has overflowed)");
        }
        if frame.vector == u64::from(PAGE_FAULT) {
            let _ = write!(report, ", {}", PageFault(frame.error_code));
        }
        let _ = writeln!(report);
    }
    let _ = writeln!(
        report,
        "  rax {:016x} rbx {:016x} rcx {:016x} rdx {:016x}\n  rsi {:016x} rdi {:016x} rbp {:016x} rsp {:016x}\n  \
         r8  {:016x} r9  {:016x} r10 {:016x} r11 {:016x}\n  r12 {:016x} r13 {:016x} r14 {:016x} r15 {:016x}\n  \
         rip {:016x} cs {:x} ss {:x} rflags {:x} platform {}",
        frame.rax,
        frame.rbx,
        frame.rcx,
        frame.rdx,
        frame.rsi,
        frame.rdi,
        frame.rbp,
        frame.rsp,
        frame.r8,
        frame.r9,
        frame.r10,
        frame.r11,
        frame.r12,
        frame.r13,
        frame.r14,
        frame.r15,
        frame.rip,
        frame.cs,
        frame.ss,
        frame.rflags,
        platform::current().name()
    );
    backtrace(&mut report, Some(frame.rip), frame.rbp);
    power::exit(ExitStatus::Crash)
}

/// The address of the last page fault.
fn fault_address() -> u64 {
    if platform::current() == Platform::XenPv { pv::fault_address() } else { read_cr2() }
}

fn read_cr2() -> u64 {
    let value: u64;
    // SAFETY: reads a register, in ring 0 (the callers ask for the platform).
    unsafe {
        core::arch::asm!("mov {}, cr2", out(reg) value, options(nomem, nostack, preserves_flags))
    };
    value
}

/// The error code of a page fault in words (AMD64 volume 2, 8.4.2).
struct PageFault(u64);

impl core::fmt::Display for PageFault {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        let what = if self.0 & 16 != 0 {
            "execution"
        } else if self.0 & 2 != 0 {
            "write"
        } else {
            "read"
        };
        let why = if self.0 & 1 != 0 { "not allowed there" } else { "not mapped" };
        write!(f, "{what}: {why}")
    }
}

const NAMES: [&str; 32] = [
    "divide error",
    "debug",
    "non-maskable interrupt",
    "breakpoint",
    "overflow",
    "bound range",
    "invalid opcode",
    "device not available",
    "double fault",
    "coprocessor segment overrun",
    "invalid TSS",
    "segment not present",
    "stack fault",
    "general protection",
    "page fault",
    "reserved",
    "x87 floating point",
    "alignment check",
    "machine check",
    "SIMD floating point",
    "virtualization",
    "control protection",
    "reserved",
    "reserved",
    "reserved",
    "reserved",
    "reserved",
    "reserved",
    "hypervisor injection",
    "VMM communication",
    "security",
    "reserved",
];

//! Instructions that trap on purpose, and what Xen tells the guest of it.
//!
//! [`install`] gives every vector an entry of `probe.s`, which writes down the frame and goes on behind the code that
//! trapped, on its stack. So the kernel's own handlers are gone: a test that installs this is the last in its machine.
// UNSAFETY: assembly and a trap table; instructions that trap.
#![cfg_attr(
    target_os = "none",
    expect(unsafe_code, reason = "provokes exceptions, and has handlers of its own for them")
)]

use core::fmt;

use janus_kernel::xen::shared_info;
use janus_proto::abi::xen::Hypercall;

use crate::ask::{Page, call};

#[cfg(target_os = "none")]
core::arch::global_asm!(include_str!("probe.s"), options(raw));

/// Bytes between the entries.
const STUB: u64 = 32;

#[cfg(target_os = "none")]
unsafe extern "C" {
    static conformance_stubs: u8;
    static conformance_syscall: u8;
    static mut conformance_record: [u64; 9];
    static conformance_start: u64;
}

/// The entry of a vector.
pub(crate) fn entry(vector: u64) -> u64 {
    #[cfg(target_os = "none")]
    return (&raw const conformance_stubs).addr() as u64 + vector * STUB;
    #[cfg(not(target_os = "none"))]
    return vector * STUB;
}

/// The entry of system calls.
pub(crate) fn syscall_entry() -> u64 {
    #[cfg(target_os = "none")]
    return (&raw const conformance_syscall).addr() as u64;
    #[cfg(not(target_os = "none"))]
    return 0;
}

/// Gives all vectors of the CPU, and 0x80, our entries: with `mask` events are masked on entry.
pub(crate) fn install(page: Page, mask: bool) -> i64 {
    let flags = if mask { 4 } else { 0 };
    page.clear();
    let mut words = [0; 70];
    for (index, vector) in (0..32_u64).chain([0x80]).enumerate() {
        let privilege = if matches!(vector, 1 | 3 | 4 | 0x80) { 3 } else { 0 };
        if let Some(pair) = words.get_mut(index * 2..index * 2 + 2) {
            pair.copy_from_slice(&[
                vector | (flags | privilege) << 8 | 0xe033 << 16,
                entry(vector),
            ]);
        }
    }
    page.put(&words);
    call(Hypercall::SET_TRAP_TABLE, &[page.address()])
}

/// What was written down of an exception.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Trapped {
    /// Its vector; `None`: there was none.
    pub(crate) vector: Option<u64>,
    frame: [u64; 6],
    start: u64,
    stack: u64,
}

/// Before code that may trap.
pub(crate) fn prepare() {
    #[cfg(target_os = "none")]
    // SAFETY: one CPU, and no exception now.
    unsafe {
        conformance_record = [u64::MAX; 9];
    }
}

/// What came of it; `stack` is where its stack pointer was.
pub(crate) fn result(stack: u64) -> Trapped {
    let mut trapped = Trapped { stack, ..Trapped::default() };
    #[cfg(target_os = "none")]
    {
        // SAFETY: one CPU, and no exception now.
        let record = unsafe { conformance_record };
        // SAFETY: as above.
        trapped.start = unsafe { conformance_start };
        if record[0] != u64::MAX {
            trapped.vector = Some(record[0]);
        }
        let has_error = matches!(record[0], 8 | 10..=14 | 17 | 21);
        let rest = if has_error { &record[3..9] } else { &record[3..8] };
        if has_error {
            trapped.frame.copy_from_slice(rest);
        } else {
            trapped.frame = [u64::MAX; 6];
            trapped.frame[1..].copy_from_slice(rest);
        }
    }
    // Events stay masked only as long as the handler runs.
    shared_info::boot_vcpu().evtchn_upcall_mask.store(0, core::sync::atomic::Ordering::SeqCst);
    trapped
}

impl Trapped {
    pub(crate) fn address() -> u64 {
        shared_info::boot_vcpu().cr2.load(core::sync::atomic::Ordering::Relaxed)
    }
}

impl fmt::Display for Trapped {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some(vector) = self.vector else { return f.write_str("none") };
        let [error, rip, cs, flags, rsp, ss] = self.frame;
        write!(f, "vector {vector}")?;
        if error != u64::MAX {
            write!(f, " error {error:#x}")?;
        }
        // IF, IOPL, TF, AC, NT, VM; not RF, which QEMU's CPU does not set for faults.
        let flags = flags & 0x0006_7300;
        let offset = rip.wrapping_sub(self.start).cast_signed();
        if offset.unsigned_abs() < 64 {
            write!(f, " at +{offset}")?;
        } else {
            write!(f, " at {rip:#x}")?;
        }
        let mask = cs >> 32;
        write!(f, " cs {:#x} mask {mask:#x} flags {flags:#x} ss {ss:#x}", cs & 0xffff)?;
        if rsp != self.stack {
            let by = rsp.wrapping_sub(self.stack).cast_signed();
            if by.unsigned_abs() < 4096 {
                write!(f, " rsp {by:+}")
            } else {
                write!(f, " rsp {rsp:#x}")
            }
        } else {
            Ok(())
        }
    }
}

/// Executes instructions with these registers; answers what was raised, and `rax`, `rcx` and `rdx` after it.
macro_rules! probe {
    ([$rax:expr, $rcx:expr, $rdx:expr], $($instruction:literal),+ $(,)?) => {{
        let mut registers: [u64; 3] = [$rax, $rcx, $rdx];
        let stack: u64;
        $crate::probe::prepare();
        #[cfg(target_os = "none")]
        // SAFETY: whatever is raised comes back to label 3 with the stack as it was; all registers are outputs but
        // those that are pushed; what the instructions themselves do is the caller's to answer for: nothing but traps,
        // or a change of registers.
        unsafe {
            core::arch::asm!(
                "push rbx", "push rbp",
                "mov [conformance_stack], rsp",
                "lea rsi, [rip + 3f]", "mov [conformance_resume], rsi",
                "lea rsi, [rip + 2f]", "mov [conformance_start], rsi",
                "2:", $($instruction,)+
                "3:",
                "mov rsp, [conformance_stack]",
                "mov rdi, rsp",
                "pop rbp", "pop rbx", "cld",
                inlateout("rax") registers[0], inlateout("rcx") registers[1], inlateout("rdx") registers[2],
                out("rsi") _, lateout("rdi") stack, out("r8") _, out("r9") _, out("r10") _, out("r11") _,
                out("r12") _, out("r13") _, out("r14") _, out("r15") _,
            )
        };
        #[cfg(not(target_os = "none"))]
        {
            stack = registers.iter().sum();
            let _ = [$($instruction),+];
            registers = [0; 3];
        }
        ($crate::probe::result(stack), registers)
    }};
}
pub(crate) use probe;

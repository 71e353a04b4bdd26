//! Exceptions: what happened, where, and how the kernel got there; then the end.
//!
//! [`idt`] is the native way in, [`pv`] that of Xen PV; both build the same [`TrapFrame`].

pub mod idt;
pub mod pv;

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

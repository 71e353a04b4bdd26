//! The code in the guest's process: a program of a few pages that takes everything else away from itself, shuts the
//! door, and then carries registers between the guest and the mailbox.
//!
//! It is no part of any trust: the guest can jump anywhere in it. What bounds the guest is the filter of
//! `super::filter`. What concerns nobody but the guest is done here without leaving the process: Xen's version, and the
//! kernel's return to its own code when no event waits. It is as if the guest did it. Three stretches of it matter to a signal that interrupts it: up to `inside`, all state is still in
//! registers, and it counts as the guest's own code; up to `tail`, a kick is written down for later; up to `tail_end`,
//! the mailbox still has the guest's registers.
// UNSAFETY: assembly, and the symbols at its ends.
#![expect(unsafe_code, reason = "the stub is assembly")]

use std::arch::global_asm;
use std::mem::offset_of;
use std::ptr::addr_of;

use janus_proto::abi::xen::Hypercall;
use janus_proto::abi::xen::trap::{FLAT_RING3_CS64, FLAT_RING3_SS64, VGCF_IN_SYSCALL};

use super::layout::{
    CODE, FILTER, FPU, Frame, MAILBOX, MAILBOX_FD, MAILBOX_SIZE, Mailbox, OURS, Op, SAVE_FPU,
    SIGNAL_STACK, SIGNAL_STACK_SIZE, STUB, kind,
};
use super::{USER_CS, USER_SS};
use crate::pv::version::VERSION;

global_asm!(
    include_str!("stub.s"),
    STUB = const STUB,
    CODE = const CODE,
    MAILBOX = const MAILBOX,
    MAILBOX_SIZE = const MAILBOX_SIZE,
    MAILBOX_FD = const MAILBOX_FD,
    SIGNAL_STACK = const SIGNAL_STACK,
    SIGNAL_STACK_SIZE = const SIGNAL_STACK_SIZE,
    FILTER = const FILTER,
    FPU = const FPU,
    TURN = const offset_of!(Mailbox, turn),
    KICKED = const offset_of!(Mailbox, kicked),
    KIND = const offset_of!(Mailbox, kind),
    SIGNAL = const offset_of!(Mailbox, signal),
    SIGNAL_CODE = const offset_of!(Mailbox, code),
    ARCH = const offset_of!(Mailbox, arch),
    TRAP = const offset_of!(Mailbox, trap),
    TRAP_ERROR = const offset_of!(Mailbox, trap_error),
    ADDRESS = const offset_of!(Mailbox, address),
    FRAME_FPU = const offset_of!(Mailbox, fpu),
    OPS = const offset_of!(Mailbox, ops),
    COMMAND = const offset_of!(Mailbox, command),
    ERROR = const offset_of!(Mailbox, error),
    FS_BASE = const offset_of!(Mailbox, fs_base),
    GS_BASE = const offset_of!(Mailbox, gs_base),
    PARENT = const offset_of!(Mailbox, parent),
    INFO = const offset_of!(Mailbox, info),
    XEN_VERSION = const Hypercall::XEN_VERSION.0,
    VERSION = const VERSION,
    KERNEL_CS = const FLAT_RING3_CS64 & !3,
    KERNEL_SS = const FLAT_RING3_SS64,
    USER_CS = const USER_CS,
    USER_SS = const USER_SS,
    IN_SYSCALL = const VGCF_IN_SYSCALL,
    STACK_END = const offset_of!(Mailbox, stack_end),
    OP = const offset_of!(Mailbox, op),
    OP_SIZE = const size_of::<Op>(),
    FRAME = const offset_of!(Mailbox, frame),
    RIP = const offset_of!(Mailbox, frame) + offset_of!(Frame, rip),
    RFLAGS = const offset_of!(Mailbox, frame) + offset_of!(Frame, rflags),
    RSP = const offset_of!(Mailbox, frame) + offset_of!(Frame, rsp),
    OURS = const OURS,
    SAVE_FPU = const SAVE_FPU,
    READY = const kind::READY,
    HYPERCALL = const kind::HYPERCALL,
    BY_SIGNAL = const kind::SIGNAL,
    WAS_KICKED = const kind::KICKED,
    DONE = const kind::DONE,
    FAILED = const kind::FAILED,
);

unsafe extern "C" {
    static janus_stub: u8;
    static janus_stub_end: u8;
    static janus_stub_gate_iret: u8;
    static janus_stub_start: u8;
    #[cfg(test)]
    static janus_stub_system_call: u8;
}

/// The code, as it is copied behind the ELF header.
pub(super) fn code() -> &'static [u8] {
    let start = addr_of!(janus_stub);
    let length = addr_of!(janus_stub_end).addr() - start.addr();
    // SAFETY: the two labels are the ends of one constant of this program.
    unsafe { std::slice::from_raw_parts(start, length) }
}

/// Where a label of the stub is in a guest's process.
fn address(label: *const u8) -> u64 {
    STUB + CODE as u64 + (label.addr() - addr_of!(janus_stub).addr()) as u64
}

/// Where the hypercall page goes.
pub(super) fn gate() -> u64 {
    address(addr_of!(janus_stub))
}

/// Where its `iret` entry goes, with the registers pushed.
pub(super) fn gate_iret() -> u64 {
    address(addr_of!(janus_stub_gate_iret))
}

/// The program's entry.
pub(super) fn entry() -> u64 {
    address(addr_of!(janus_stub_start))
}

/// One of the stub's `syscall` instructions, for those who would try it from outside.
#[cfg(test)]
pub(super) fn system_call() -> u64 {
    address(addr_of!(janus_stub_system_call))
}

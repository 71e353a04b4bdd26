//! Where things are in a guest's process, and the page through which it and we speak.
//!
//! Below [`TOP`] is the guest's. Above it are the stub (read and execute, sealed) and the mailbox with the alternate
//! signal stack (read and write); nothing else is mapped.

use std::sync::atomic::{AtomicI32, AtomicU32, AtomicU64};

use zerocopy::FromZeros;

/// The first address that a guest can have: the host's `vm.mmap_min_addr`.
pub const BOTTOM: u64 = 0x1000;
/// The end of the addresses that a guest can have. The stub is 8 GiB further up: the filter adds only upper halves.
pub const TOP: u64 = 0x7ff8_0000_0000;

/// Where the stub sees the page with the CPU's `vcpu_info`: above the guest's addresses, and in reach of the filter.
pub(super) const INFO: u64 = TOP;

/// Where the stub is. The kernel puts a new program's stack into the top 16 GiB of the lower half, so that this is free.
pub(super) const STUB: u64 = 0x7ffa_0000_0000;
/// Bytes of the stub's file.
pub(super) const IMAGE_SIZE: usize = 0x4000;
/// Where the code starts in it: behind the ELF header's page.
pub(super) const CODE: usize = 0x1000;
/// Where the filter program is in it.
pub(super) const FILTER: usize = 0x3000;
/// Where the mailbox is, from the stub's start.
pub(super) const MAILBOX: usize = 0x1_0000;
/// Bytes of the mailbox's file, of which most are never touched.
pub(super) const MAILBOX_SIZE: usize = 0x3_0000;
/// The alternate signal stack in the mailbox's file.
pub(super) const SIGNAL_STACK: usize = 0x1_0000;
/// Its size: a frame has 3 KiB with AVX-512, 11 KiB with AMX.
pub(super) const SIGNAL_STACK_SIZE: usize = 0x1_0000;
/// Where the stub saves the FPU state, in the mailbox's file.
pub(super) const FPU: usize = 0x2_0000;
/// Its size.
pub(super) const FPU_SIZE: usize = 0x1_0000;

/// The guest's memory in the process's table of files.
pub(super) const RAM_FD: i32 = 3;
/// The mailbox, until it is mapped.
pub(super) const MAILBOX_FD: i32 = 4;
/// The stub, until it is executed.
pub(super) const IMAGE_FD: i32 = 5;

/// [`Mailbox::turn`]: the guest stopped; it is our turn. Any other value lets it run.
pub(super) const OURS: u32 = 1;

/// [`Mailbox::kind`]: why it is our turn.
pub(super) mod kind {
    /// The process is ready.
    pub(in super::super) const READY: u32 = 1;
    /// The gate of the hypercall page was called.
    pub(in super::super) const HYPERCALL: u32 = 2;
    /// A signal came.
    pub(in super::super) const SIGNAL: u32 = 3;
    /// A kick was seen on the way back into the guest.
    pub(in super::super) const KICKED: u32 = 4;
    /// The commands are done.
    pub(in super::super) const DONE: u32 = 5;
    /// A command failed, with [`Mailbox::error`](super::Mailbox::error).
    pub(in super::super) const FAILED: u32 = 6;
}

/// [`Mailbox::command`]: come back when the operations are done.
pub(super) const COME_BACK: u32 = 1;
/// [`Mailbox::command`]: save the FPU state.
pub(super) const SAVE_FPU: u32 = 2;

/// One operation on the address space.
#[derive(Debug, FromZeros)]
#[repr(C)]
pub(super) struct Op {
    /// Where.
    pub(super) address: AtomicU64,
    /// Bytes.
    pub(super) length: AtomicU64,
    /// `PROT_*`, or [`UNMAP`].
    pub(super) protection: AtomicU64,
    /// Where in the guest's memory.
    pub(super) offset: AtomicU64,
}

/// [`Op::protection`]: take the pages out.
pub(super) const UNMAP: u64 = 1 << 63;
/// Operations in one turn.
pub(super) const OPS: usize = 128;

/// The registers, in the order in which the stub pops them, `iretq`'s frame last.
#[derive(Debug, FromZeros)]
#[repr(C)]
pub(super) struct Frame {
    /// `r15` to `rdi`, in the order of `engine::Registers`.
    pub(super) general: [AtomicU64; 15],
    pub(super) rip: AtomicU64,
    pub(super) cs: AtomicU64,
    pub(super) rflags: AtomicU64,
    pub(super) rsp: AtomicU64,
    pub(super) ss: AtomicU64,
}

#[derive(Debug, FromZeros)]
#[repr(C, align(256))]
struct Stack([u64; 64]);

#[derive(Debug, FromZeros)]
#[repr(C, align(2048))]
struct PageEnd([u64; 256]);

/// What the guest's process and we share. All of it is what a guest says: copied once, bounded, never trusted.
#[derive(Debug, FromZeros)]
#[repr(C)]
pub(super) struct Mailbox {
    /// Whose turn it is: [`OURS`], or the process's id with `FUTEX_WAITERS` (so that the kernel tells of its end).
    pub(super) turn: AtomicU32,
    /// The stub was interrupted by a kick before it looked here.
    pub(super) kicked: AtomicU32,
    /// Why it is our turn.
    pub(super) kind: AtomicU32,
    /// The signal's number.
    pub(super) signal: AtomicU32,
    /// Its `si_code`.
    pub(super) code: AtomicI32,
    /// `si_arch` of a `SIGSYS`.
    pub(super) arch: AtomicU32,
    /// The exception's vector.
    pub(super) trap: AtomicU64,
    /// Its error code.
    pub(super) trap_error: AtomicU64,
    /// `cr2`.
    pub(super) address: AtomicU64,
    /// Where the signal frame has the FPU state; 0: it is in the registers.
    pub(super) fpu: AtomicU64,
    /// How many operations there are; what is left of them after a failure.
    pub(super) ops: AtomicU32,
    /// What else to do.
    pub(super) command: AtomicU32,
    /// What the host said to a failed operation.
    pub(super) error: AtomicU64,
    pub(super) fs_base: AtomicU64,
    pub(super) gs_base: AtomicU64,
    /// Where the stub sees the CPU's `vcpu_info`; 0: it does not, and asks us whatever concerns it.
    pub(super) info: AtomicU64,
    /// The monitor's process id; the child ends when that is not its parent.
    pub(super) parent: AtomicU32,
    pub(super) frame: Frame,
    stack: Stack,
    /// The end of a stack of a few words for the gate's path.
    pub(super) stack_end: AtomicU64,
    end: PageEnd,
    pub(super) op: [Op; OPS],
}

const _: () = assert!(
    size_of::<Mailbox>() == 0x2000
        && std::mem::offset_of!(Mailbox, op) == 0x1000
        && std::mem::offset_of!(Mailbox, stack_end) % 16 == 0
        && size_of::<Mailbox>() <= SIGNAL_STACK
);

//! The seam between a virtual CPU and whoever gives it time.
//!
//! An engine runs guest instructions until something needs the hypervisor, and says what in an [`Exit`]. It knows of
//! registers, frames and addresses; it knows nothing of hypercalls, events or devices, which are in `crate::pv`. The
//! first engine is the monitor: each virtual CPU is a child process whose only way out is a shared mailbox.

pub mod monitor;
pub mod ptrace;
mod registers;

use std::fmt;
use std::io;
use std::sync::Arc;

use janus_proto::addr::Mfn;

pub use registers::Registers;

/// Why the guest stopped running.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// A call of the hypercall page: number in `rax`, arguments in `rdi`, `rsi`, `rdx`, `r10`, `r8`, `r9`; `rip` is
    /// behind the call, and `rcx` and `r11` are undefined, as after `syscall`.
    Hypercall,
    /// A `syscall` instruction elsewhere: a hypercall in kernel mode, the guest's own system call in user mode.
    /// `rip` is behind the instruction.
    Syscall,
    /// An exception; `rip` is what the CPU would push.
    Fault(Fault),
    /// Nothing of the guest's doing: somebody used the [`Kicker`].
    Kicked,
}

/// An exception of the guest, as the CPU describes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// Its vector: 14 for a page fault.
    pub vector: u8,
    /// The error code, 0 where the vector has none.
    pub error: u32,
    /// `cr2` of a page fault, else 0.
    pub address: u64,
}

/// What may be done with a mapped page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Protection {
    /// It may be written.
    pub write: bool,
    /// It may be executed.
    pub execute: bool,
}

/// A run of pages to put into the guest's address space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mapping {
    /// Where, in bytes; a multiple of the page size.
    pub address: u64,
    /// The first frame.
    pub frame: Mfn,
    /// How many pages, contiguous in both.
    pub pages: usize,
    /// What the guest may do with them.
    pub protection: Protection,
}

/// One virtual CPU on an engine. Used by one thread at a time.
pub trait Vcpu: Send {
    /// Runs the guest from `registers`, and puts there what they are when it stops.
    ///
    /// # Errors
    /// The engine lost its guest: killed, or it broke out of what the engine relies on. It cannot go on.
    fn run(&mut self, registers: &mut Registers) -> Result<Exit, EngineError>;

    /// Puts pages into the address space that this CPU runs on. What was there is replaced. Takes effect before the
    /// guest runs again.
    fn map(&mut self, mapping: Mapping);

    /// Takes pages out of the address spaces of all CPUs of this guest, before the guest runs again here. On other
    /// CPUs that run now it has happened when this returns.
    fn unmap(&mut self, address: u64, pages: usize);

    /// As [`Vcpu::unmap`] for the whole lower half.
    fn unmap_all(&mut self);

    /// Changes to another address space: `root` is a name only (the frame of its top page table). What was mapped in
    /// the former one may be kept for when it comes back, and is then still told of by [`Vcpu::unmap`].
    fn switch(&mut self, root: Mfn);

    /// Says where the CPU's `vcpu_info` is in the guest's memory, in bytes, so that the engine may answer by itself what
    /// only concerns it and the guest; `None`: it may not. An engine that does not do so has nothing to remember.
    fn show_info(&mut self, machine_address: Option<u64>) {
        let _ = machine_address;
    }

    /// From here on a run ends with [`Exit::Kicked`] once `CLOCK_MONOTONIC` reaches so many nanoseconds; `None`: none
    /// does. At once if that has passed. It lets the thread that waits for the guest be the guest's timer as well.
    fn set_deadline(&mut self, nanoseconds: Option<u64>);

    /// What ends a [`Vcpu::run`] of this CPU from elsewhere. A kick between two runs ends the second one, or at the
    /// latest when the guest would enter it: none is lost.
    fn kicker(&self) -> Arc<dyn Kicker>;

    /// The FPU state in the XSAVE layout (standard form), for reports and debuggers.
    ///
    /// # Errors
    /// The engine lost its guest.
    fn fpu(&mut self) -> Result<Vec<u8>, EngineError>;
}

/// Makes a CPU stop running the guest.
pub trait Kicker: Send + Sync + fmt::Debug {
    /// The CPU's run ends soon with [`Exit::Kicked`] (or with what happened before). On a CPU that is about to run it
    /// ends the next run: whoever kicks has first written down why, but the CPU may have looked before that.
    fn kick(&self);
    /// Ends the guest's part of the engine for good; a run in progress ends with an error. Always works.
    fn kill(&self);
}

/// The engine cannot go on.
#[derive(Debug)]
pub enum EngineError {
    /// The guest's process ended, by this signal or with this status.
    Ended(i32),
    /// The guest did not stop when told to, and was killed.
    Hung,
    /// What the guest's process said makes no sense: it has written over the engine's part of its memory.
    Corrupt(&'static str),
    /// The host refused something.
    Host(io::Error),
}

impl fmt::Display for EngineError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ended(status) => write!(f, "the guest's process ended (wait status {status:#x})"),
            Self::Hung => f.write_str("the guest did not stop when told to, and was killed"),
            Self::Corrupt(what) => write!(f, "the guest broke the engine's memory: {what}"),
            Self::Host(error) => write!(f, "the host refused: {error}"),
        }
    }
}

impl std::error::Error for EngineError {}

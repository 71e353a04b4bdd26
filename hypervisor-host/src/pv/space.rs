//! What the rest of the domain asks of the guest's memory: [`super::mm`] answers it, and tests have an answer of their own.

use janus_proto::abi::xen::grant_table::{GrantStatus, MapFlags};
use janus_proto::abi::xen::{Errno, Hypercall};
use janus_proto::addr::Mfn;

use super::grant::FrameTypes;
use super::report::WalkStep;
use crate::engine::{Fault, Vcpu};

/// What became of a page fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Resolution {
    /// The page is there now: run the instruction again.
    Retry,
    /// The guest's tables do not allow the access: its own page fault, with this error code.
    Guest(u32),
    /// The guest's tables allow it, and a process cannot have a page there: the instruction is to be emulated.
    Emulate,
}

/// What became of a write to a page table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TableWrite {
    /// It is made.
    Done,
    /// It is not: something else is there now.
    Differs(u64),
}

/// The guest's memory. Locks inside: all of a domain's threads use it.
pub trait Space: FrameTypes {
    /// Whether the processor translates the guest's addresses, so that its frames are numbers of its own.
    fn is_translated(&self) -> bool {
        false
    }

    /// Copies from guest memory as the kernel of this CPU sees it.
    ///
    /// # Errors
    /// `EFAULT`: some of it is not mapped; the buffer is then of no use.
    fn read(&self, vcpu: usize, address: u64, buf: &mut [u8]) -> Result<(), Errno>;

    /// Copies to guest memory as the kernel of this CPU sees it.
    ///
    /// # Errors
    /// `EFAULT`: some of it is not mapped or cannot be written; what came before it may be.
    fn write(&self, vcpu: usize, address: u64, bytes: &[u8]) -> Result<(), Errno>;

    /// Maps what a page fault is about, if the guest's tables say so.
    fn fault(&self, vcpu: usize, engine: &mut dyn Vcpu, fault: &Fault) -> Resolution;

    /// Writes to an entry of a page table as the guest's own instruction at `address` would: `size` bytes, if (with
    /// `old`) they are what the instruction has read. Xen lets a guest do so with tables of pages only, and checks the
    /// entry as if it came by hypercall; `None`: there is no such table, or the entry is refused.
    fn write_table(
        &self,
        vcpu: usize,
        engine: &mut dyn Vcpu,
        address: u64,
        old: Option<u64>,
        new: u64,
        size: usize,
    ) -> Option<TableWrite>;

    /// Lets the domain map a device's frame from now on ([`super::io`]).
    fn permit(&self, _frame: Mfn) {}

    /// The device's frame that is mapped at an address, for this kind of access; `None`: none is.
    fn device_frame(&self, _vcpu: usize, _address: u64, _write: bool) -> Option<Mfn> {
        None
    }

    /// Makes one of the memory calls; `None`: that is none of them.
    fn hypercall(
        &self,
        vcpu: usize,
        engine: &mut dyn Vcpu,
        number: Hypercall,
        arguments: [u64; 6],
    ) -> Option<Result<u64, Errno>>;

    /// Changes a CPU to the page tables of the other mode; `false`: it has none.
    fn switch_mode(&self, vcpu: usize, engine: &mut dyn Vcpu, user: bool) -> bool;

    /// Gives a CPU that is down its page tables (`VCPUOP_initialise`), and takes the references they need.
    ///
    /// # Errors
    /// Not a top page table.
    fn initialise(&self, vcpu: usize, root: Mfn, user_root: Option<Mfn>) -> Result<(), Errno>;

    /// Puts a CPU on its kernel page table, on its own thread before it runs.
    fn load(&self, vcpu: usize, engine: &mut dyn Vcpu);

    /// Maps a granted frame where the flags say: at an address, or by a page-table entry.
    ///
    /// # Errors
    /// What the guest is told.
    fn map_grant(
        &self,
        vcpu: usize,
        engine: &mut dyn Vcpu,
        address: u64,
        flags: MapFlags,
        frame: Mfn,
    ) -> Result<(), GrantStatus>;

    /// Takes such a mapping away; what is mapped at another address is moved there, if one is given.
    ///
    /// # Errors
    /// It is not there, or not with these flags.
    fn unmap_grant(
        &self,
        vcpu: usize,
        engine: &mut dyn Vcpu,
        address: u64,
        replace: Option<u64>,
        flags: MapFlags,
        frame: Mfn,
    ) -> Result<(), GrantStatus>;

    /// Whether the guest maps one of the frames that are not its own: grant table, status.
    fn is_mapped(&self, frame: Mfn) -> bool;

    /// The kernel's and the user's top page table.
    fn roots(&self, vcpu: usize) -> (Option<Mfn>, Option<Mfn>);

    /// How an address is mapped, for reports.
    fn walk(&self, vcpu: usize, address: u64) -> Vec<WalkStep>;
}

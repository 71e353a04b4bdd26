//! A guest's memory, as Xen sees it: whose each frame is, what it is used as, and what the guest's page tables say.
//!
//! A PV guest makes its own page tables, of machine frames. Xen checks every entry before the guest may use it, and
//! counts for each frame how it is used, so that nothing is a page table (or a descriptor table) and writable at
//! once: `types` does that, `update`, `extended` and `descriptors` are the hypercalls that change entries,
//! `reservation` those that change how much memory there is. Hardware never walks the guest's tables here: `fault`
//! does, and puts pages into the guest's processes as they are touched. What is in the processes is always a part of
//! what the tables say: a change takes the page out before the hypercall returns.
//!
//! Everything is under one lock, the one around [`Memory`] in [`space::SharedMemory`]. Answers are those of Xen 4.17
//! (`xen/arch/x86/mm.c`, `xen/common/memory.c`).

pub(crate) mod descriptors;
pub(crate) mod entry;
mod extended;
mod fault;
pub(crate) mod frame;
pub(crate) mod machine_to_physical;
mod pool;
mod reservation;
mod resident;
pub mod space;
#[cfg(test)]
mod tests;
mod types;
mod update;

use std::collections::BTreeSet;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use janus_proto::abi::xen::Errno;
use janus_proto::addr::Mfn;
use zerocopy::FromZeros as _;

use self::entry::Entry;
use self::frame::{Frame, Owner};
use self::machine_to_physical::MachineToPhysical;
use self::pool::Pool;
use self::resident::Resident;
use crate::machine::ram::{FIRST_FRAME, Ram};
use crate::pv::grant::{MAX_GRANT_FRAMES, MAX_STATUS_FRAMES};

pub use self::fault::Outcome;
pub use self::frame::Kind;
pub use self::machine_to_physical::ALIAS as MACHINE_TO_PHYSICAL;

/// How much memory a guest has, and may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size {
    /// Frames at the start.
    pub pages: u64,
    /// Frames it may grow to; at least `pages`.
    pub max_pages: u64,
    /// Its virtual CPUs.
    pub vcpus: usize,
}

/// Frames that the guest cannot have at once, so that it can always exchange some (`XENMEM_exchange`).
const SPARE: u64 = 512;

/// What a virtual CPU walks.
#[derive(Clone, Debug, Default)]
struct Cpu {
    root: Option<Mfn>,
    user_root: Option<Mfn>,
    /// Runs the guest's user mode.
    user: bool,
    /// Frames of its GDT, each with a use as [`Kind::Segments`].
    gdt: Vec<Mfn>,
    gdt_entries: u64,
    /// Address and entries of its LDT.
    ldt: (u64, u64),
}

/// The memory of one guest.
#[derive(Debug)]
pub struct Memory {
    ram: Arc<Ram>,
    frames: Vec<Frame>,
    pool: Pool,
    /// Frames that are the guest's now.
    pages: u64,
    max_pages: u64,
    shared_info: Mfn,
    grant_frames: Mfn,
    machine_to_physical: MachineToPhysical,
    cpus: Vec<Cpu>,
    resident: Resident,
    /// Frames of devices that the guest may map.
    devices: BTreeSet<Mfn>,
}

impl Memory {
    /// Memory whose first `pages` frames, from [`FIRST_FRAME`], are the guest's, contiguous and zero.
    ///
    /// # Errors
    /// The host does not have it.
    pub fn new(size: Size) -> io::Result<Self> {
        let too_much =
            || io::Error::new(io::ErrorKind::InvalidInput, "that much memory has no address");
        let max_pages = size.max_pages.max(size.pages);
        let own = max_pages.checked_add(SPARE).ok_or_else(too_much)?;
        // Behind the guest's frames: shared info, grant table, machine-to-physical table.
        let fixed = 1 + MAX_GRANT_FRAMES + MAX_STATUS_FRAMES;
        if max_pages > 1 << 34 {
            return Err(too_much());
        }
        let table = MachineToPhysical::frames_for(own + fixed);
        let total = own + fixed + table;
        let ram = Arc::new(Ram::new(total)?);
        let length = usize::try_from(total).map_err(|_| too_much())?;
        let frames = Frame::new_vec_zeroed(length)
            .map_err(|_| io::Error::from(io::ErrorKind::OutOfMemory))?;
        let shared_info = Mfn(FIRST_FRAME.0 + own);
        let grant_frames = Mfn(shared_info.0 + 1);
        let mut memory = Self {
            machine_to_physical: MachineToPhysical::new(
                Mfn(grant_frames.0 + MAX_GRANT_FRAMES + MAX_STATUS_FRAMES),
                table,
                size.pages,
                total - table,
            ),
            ram,
            frames,
            pool: Pool::new(FIRST_FRAME.0 + size.pages, own - size.pages),
            pages: size.pages,
            max_pages,
            shared_info,
            grant_frames,
            cpus: vec![Cpu::default(); size.vcpus],
            resident: Resident::default(),
            devices: BTreeSet::new(),
        };
        for frame in memory.frames.iter_mut().skip(usize::try_from(size.pages).unwrap_or(0)) {
            frame.owner = Owner::Hidden;
        }
        for index in size.pages..own {
            memory.set_owner(Mfn(FIRST_FRAME.0 + index), Owner::Free);
        }
        for index in 0..fixed {
            // Xen's own use keeps it writable for ever: it can never become a page table.
            memory.set_owner(Mfn(shared_info.0 + index), Owner::Shared);
            if let Some(frame) = memory.frame_mut(Mfn(shared_info.0 + index)) {
                (frame.kind, frame.uses, frame.references) = (Kind::Writable, 1, 1);
                frame.validated = true;
            }
        }
        Ok(memory)
    }

    /// The frames themselves.
    #[must_use]
    pub fn ram(&self) -> &Arc<Ram> {
        &self.ram
    }
    /// The shared info page.
    #[must_use]
    pub fn shared_info(&self) -> Mfn {
        self.shared_info
    }
    /// The first frame of the grant table: entries, then status words.
    #[must_use]
    pub fn grant_frames(&self) -> Mfn {
        self.grant_frames
    }
    /// Frames that the guest has now.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.pages
    }
    /// Frames that it may have.
    #[must_use]
    pub fn max_pages(&self) -> u64 {
        self.max_pages
    }

    /// What a frame is used as, and how often; `None`: it is no frame of the guest's.
    #[must_use]
    pub fn kind(&self, frame: Mfn) -> Option<(Kind, u32)> {
        self.frame(frame).map(|frame| (frame.kind, frame.uses))
    }

    fn slot(frame: Mfn) -> Option<usize> {
        usize::try_from(frame.0.checked_sub(FIRST_FRAME.0)?).ok()
    }
    fn frame(&self, frame: Mfn) -> Option<&Frame> {
        self.frames.get(Self::slot(frame)?)
    }
    fn frame_mut(&mut self, frame: Mfn) -> Option<&mut Frame> {
        self.frames.get_mut(Self::slot(frame)?)
    }
    fn set_owner(&mut self, frame: Mfn, owner: Owner) {
        if let Some(frame) = self.frame_mut(frame) {
            frame.owner = owner;
        }
    }

    /// The words of a frame, for those that have a reference to it.
    fn words(&self, frame: Mfn) -> Result<&[AtomicU64; 512], Errno> {
        self.ram.frame(frame).ok_or(Errno::EINVAL)
    }

    fn read_entry(&self, table: Mfn, index: usize) -> Entry {
        let word = self.ram.frame(table).and_then(|words| words.get(index));
        Entry(word.map_or(0, |word| word.load(Ordering::Relaxed)))
    }

    fn write_entry(&self, table: Mfn, index: usize, entry: Entry) {
        if let Some(word) = self.ram.frame(table).and_then(|words| words.get(index)) {
            word.store(entry.0, Ordering::Relaxed);
        }
    }

    /// The top table that a CPU is on.
    fn current_root(&self, vcpu: usize) -> Option<Mfn> {
        let cpu = self.cpus.get(vcpu)?;
        if cpu.user { cpu.user_root } else { cpu.root }
    }
}

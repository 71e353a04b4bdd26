//! The machine-to-physical table: what the guest calls each of its machine frames.
//!
//! It is frames of the guest's file, filled page by page when first looked at, because most guests only look at the
//! pages of their own tables. The guest sees it read-only at [`ALIAS`], which `XENMEM_machphys_mapping` reports; where
//! Xen has it, in the upper half, nothing can be mapped in a process, and loads from there are emulated.

use std::sync::atomic::{AtomicU64, Ordering};

use janus_proto::addr::{Mfn, PAGE_SIZE};

use crate::machine::ram::{FIRST_FRAME, Ram};

/// Where the guest finds the entry of [`FIRST_FRAME`]: in the last 512 GiB of the lower half, below the engine.
pub const ALIAS: u64 = 0x7f80_0000_0000;
/// Where a guest that does not ask looks for the entry of frame 0 (`MACH2PHYS_VIRT_START`).
pub(crate) const START: u64 = 0xffff_8000_0000_0000;
/// Behind the last entry there (`MACH2PHYS_VIRT_END`).
pub(crate) const END: u64 = 0xffff_8040_0000_0000;
/// A frame without a name (`INVALID_M2P_ENTRY`).
pub(crate) const INVALID: u64 = u64::MAX;
/// A frame of Xen's that the guest may map (`SHARED_M2P_ENTRY`).
const SHARED: u64 = u64::MAX - 1;
/// Entries in a page.
const ENTRIES: u64 = 512;

/// See the module.
#[derive(Debug)]
pub(crate) struct MachineToPhysical {
    first: Mfn,
    filled: Vec<bool>,
    /// Frames that had a name at the start: their own index.
    initial: u64,
    /// Frames that have an entry at all.
    entries: u64,
}

impl MachineToPhysical {
    /// How many frames a table for `frames` takes.
    pub(crate) fn frames_for(frames: u64) -> u64 {
        frames.div_ceil(ENTRIES)
    }

    /// A table in `count` frames from `first`.
    pub(crate) fn new(first: Mfn, count: u64, initial: u64, entries: u64) -> Self {
        Self { first, filled: vec![false; usize::try_from(count).unwrap_or(0)], initial, entries }
    }

    /// The frames of the table.
    pub(crate) fn frames(&self) -> (Mfn, u64) {
        (self.first, self.filled.len() as u64)
    }

    /// The highest frame with an entry.
    pub(crate) fn last_frame(&self) -> Mfn {
        Mfn(FIRST_FRAME.0 + self.entries - 1)
    }

    /// Its page `index` as a frame, filled.
    pub(crate) fn page(&mut self, ram: &Ram, index: u64) -> Option<Mfn> {
        let filled = self.filled.get_mut(usize::try_from(index).ok()?)?;
        let frame = Mfn(self.first.0 + index);
        if !*filled {
            let words = ram.frame(frame)?;
            for (word, entry) in words.iter().zip(index * ENTRIES..) {
                word.store(self.initial_name(entry), Ordering::Relaxed);
            }
            if let Some(filled) = self.filled.get_mut(usize::try_from(index).ok()?) {
                *filled = true;
            }
        }
        Some(frame)
    }

    fn initial_name(&self, entry: u64) -> u64 {
        match entry {
            _ if entry < self.initial => entry,
            _ if entry < self.entries => SHARED,
            _ => INVALID,
        }
    }

    fn entry<'a>(&mut self, ram: &'a Ram, frame: Mfn) -> Option<&'a AtomicU64> {
        let entry = frame.0.checked_sub(FIRST_FRAME.0).filter(|entry| *entry < self.entries)?;
        let page = self.page(ram, entry / ENTRIES)?;
        ram.frame(page)?.get(usize::try_from(entry % ENTRIES).ok()?)
    }

    /// What the guest calls a frame; `None`: it has no entry.
    pub(crate) fn get(&mut self, ram: &Ram, frame: Mfn) -> Option<u64> {
        Some(self.entry(ram, frame)?.load(Ordering::Relaxed))
    }

    /// Names a frame.
    pub(crate) fn set(&mut self, ram: &Ram, frame: Mfn, name: u64) {
        if let Some(entry) = self.entry(ram, frame) {
            entry.store(name, Ordering::Relaxed);
        }
    }

    /// A frame has no name any more.
    pub(crate) fn clear(&mut self, ram: &Ram, frame: Mfn) {
        self.set(ram, frame, INVALID);
    }

    /// The page of the table that an address of the alias lies in.
    pub(crate) fn alias_page(&self, address: u64) -> Option<u64> {
        let page = address.checked_sub(ALIAS)? / PAGE_SIZE as u64;
        (page < self.filled.len() as u64).then_some(page)
    }
}

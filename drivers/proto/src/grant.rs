//! The grant table, version 1: references for a guest, and Xen's side of an entry.
//!
//! An entry is two words, seen as atomics because Xen changes the first at any time: flags and domain in
//! one (`xen/include/public/grant_table.h`, `struct grant_entry_v1`), the frame in the other. The header's
//! rules ("Introducing a valid entry", "Invalidating an entry") are what [`GrantTable::grant`] and
//! [`GrantTable::end`] do; [`GrantView`] is the other side, for hosts and tests.

use alloc::vec::Vec;
use core::fmt;
use core::ops::Deref;

use crate::abi::xen::grant_table::{GNTTAB_NR_RESERVED_ENTRIES, GrantFlags, GrantStatus};
use crate::addr::{DomId, GrantRef};
use crate::sync::{AtomicU32, Ordering};

/// Words of an entry.
const ENTRY_WORDS: usize = 2;
/// How often an entry is looked at again when Xen changes it under our hands.
const TRIES: u32 = 16;

/// What the other domain may do with a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Only read it.
    ReadOnly,
    /// Read and write it.
    ReadWrite,
}

/// Why a grant did not end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EndError {
    /// The other domain still maps or copies the page, which must not be reused.
    InUse,
    /// The reference does not grant anything.
    NotGranted,
}

impl fmt::Display for EndError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::InUse => "the other domain still uses the page",
            Self::NotGranted => "the reference grants nothing",
        })
    }
}

const fn header(flags: GrantFlags, domain: DomId) -> u32 {
    // Little-endian: flags are the low half.
    flags.bits() as u32 | (domain.0 as u32) << 16
}

const fn flags_of(header: u32) -> GrantFlags {
    GrantFlags::from_bits_retain((header & 0xffff) as u16)
}

const IN_USE: GrantFlags = GrantFlags::READING.union(GrantFlags::WRITING);

/// The two words of an entry.
fn entry(memory: &[AtomicU32], reference: GrantRef) -> Option<(&AtomicU32, &AtomicU32)> {
    let start = (reference.0 as usize).checked_mul(ENTRY_WORDS)?;
    match memory.get(start..start.checked_add(ENTRY_WORDS)?)? {
        [header, frame] => Some((header, frame)),
        _ => None,
    }
}

/// This domain's table, with the references it may hand out.
pub struct GrantTable<M> {
    memory: M,
    free: Vec<u32>,
    /// References ever put into `free`: the next new one.
    known: u32,
    in_use: u32,
}

impl<M> fmt::Debug for GrantTable<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GrantTable")
            .field("entries", &self.known)
            .field("in_use", &self.in_use)
            .finish_non_exhaustive()
    }
}

impl<M: Deref<Target = [AtomicU32]>> GrantTable<M> {
    /// The table in `memory`; the reserved references at its start are left alone.
    pub fn new(memory: M) -> Self {
        let mut table =
            Self { memory, free: Vec::new(), known: GNTTAB_NR_RESERVED_ENTRIES, in_use: 0 };
        table.learn();
        table
    }

    /// Replaces the memory by a larger view of the same table, after `GNTTABOP_setup_table`.
    pub fn grow(&mut self, memory: M) {
        self.memory = memory;
        self.learn();
    }

    fn learn(&mut self) {
        let entries = u32::try_from(self.memory.len() / ENTRY_WORDS).unwrap_or(u32::MAX);
        // Low references first: they are on pages that are mapped and warm.
        let new = (self.known..entries).rev();
        self.free.splice(0..0, new);
        self.known = self.known.max(entries);
    }

    /// References that can still be handed out.
    #[must_use]
    pub fn available(&self) -> usize {
        self.free.len()
    }

    /// References handed out and not ended.
    #[must_use]
    pub fn in_use(&self) -> u32 {
        self.in_use
    }

    /// Grants a frame (machine frame under PV, guest frame else); `None` when the table is full.
    pub fn grant(&mut self, domain: DomId, frame: u32, access: Access) -> Option<GrantRef> {
        let reference = GrantRef(*self.free.last()?);
        let (head, frame_word) = entry(&self.memory, reference)?;
        frame_word.store(frame, Ordering::Relaxed);
        let flags = match access {
            Access::ReadOnly => GrantFlags::PERMIT_ACCESS.union(GrantFlags::READONLY),
            Access::ReadWrite => GrantFlags::PERMIT_ACCESS,
        };
        // Orders the frame before the flags that make it valid ("Write memory barrier (WMB)").
        head.store(header(flags, domain), Ordering::Release);
        self.free.pop();
        self.in_use += 1;
        Some(reference)
    }

    /// Grants frames, each with the next reference; answers the first. `None`: so many references in a row are not
    /// free, and nothing is granted.
    pub fn grant_run(&mut self, domain: DomId, frames: &[u32], access: Access) -> Option<GrantRef> {
        let count = frames.len().max(1);
        let mut sorted = self.free.clone();
        sorted.sort_unstable();
        let in_a_row = |window: &&[u32]| match window {
            [first, .., last] => (last - first) as usize == count - 1,
            _ => true,
        };
        let run = sorted.windows(count).find(in_a_row)?;
        let (first, last) = (*run.first()?, *run.last()?);
        // To the end, where references are taken from, so that they go out in their order.
        self.free.retain(|reference| !(first..=last).contains(reference));
        self.free.extend(run.iter().rev());
        for frame in frames {
            self.grant(domain, *frame, access)?;
        }
        Some(GrantRef(first))
    }

    /// Takes a page back, and its reference.
    ///
    /// # Errors
    /// [`EndError::InUse`]: the grant stands, try again later or leak the page. See [`EndError`].
    pub fn end(&mut self, reference: GrantRef) -> Result<(), EndError> {
        if reference.0 < GNTTAB_NR_RESERVED_ENTRIES || reference.0 >= self.known {
            return Err(EndError::NotGranted);
        }
        let (head, _) = entry(&self.memory, reference).ok_or(EndError::NotGranted)?;
        let mut seen = head.load(Ordering::Relaxed);
        for _ in 0..TRIES {
            let flags = flags_of(seen);
            if !flags.contains(GrantFlags::PERMIT_ACCESS) {
                return Err(EndError::NotGranted);
            }
            if flags.intersects(IN_USE) {
                return Err(EndError::InUse);
            }
            // One compare-exchange over flags and domain: it fails if Xen sets a bit in between. Acquire
            // orders the other domain's last writes before our use of the page.
            match head.compare_exchange(seen, 0, Ordering::AcqRel, Ordering::Relaxed) {
                Ok(_) => {
                    self.free.push(reference.0);
                    self.in_use = self.in_use.saturating_sub(1);
                    return Ok(());
                }
                Err(now) => seen = now,
            }
        }
        Err(EndError::InUse)
    }

    /// Whether the other domain maps or copies the page right now.
    #[must_use]
    pub fn is_in_use(&self, reference: GrantRef) -> bool {
        entry(&self.memory, reference)
            .is_some_and(|(head, _)| flags_of(head.load(Ordering::Relaxed)).intersects(IN_USE))
    }
}

/// Xen's side of a domain's table: checks a reference on behalf of another domain and marks its use.
///
/// Xen counts its users outside the table; so does the owner of this view: call [`Self::release`]
/// with the access that no user needs any more.
#[derive(Clone, Copy, Debug)]
pub struct GrantView<M>(pub M);

impl<M: Deref<Target = [AtomicU32]>> GrantView<M> {
    /// Checks that `domain` may use the page, and marks it used; answers its frame.
    ///
    /// # Errors
    /// [`GrantStatus::BAD_GNTREF`] when nothing is granted, [`GrantStatus::PERMISSION_DENIED`] when it
    /// is granted to another domain or only for reading.
    pub fn acquire(
        &self,
        reference: GrantRef,
        domain: DomId,
        access: Access,
    ) -> Result<u32, GrantStatus> {
        let (head, frame) = entry(&self.0, reference).ok_or(GrantStatus::BAD_GNTREF)?;
        let mut seen = head.load(Ordering::Relaxed);
        for _ in 0..TRIES {
            let flags = flags_of(seen);
            if !flags.contains(GrantFlags::PERMIT_ACCESS) {
                return Err(GrantStatus::BAD_GNTREF);
            }
            let read_only = flags.contains(GrantFlags::READONLY);
            if seen >> 16 != u32::from(domain.0) || (read_only && access == Access::ReadWrite) {
                return Err(GrantStatus::PERMISSION_DENIED);
            }
            let mark = match access {
                Access::ReadOnly => GrantFlags::READING,
                Access::ReadWrite => IN_USE,
            };
            let marked = seen | u32::from(mark.bits());
            // Acquire orders the frame and the page's contents after the flags that made them valid.
            match head.compare_exchange(seen, marked, Ordering::AcqRel, Ordering::Relaxed) {
                Ok(_) => return Ok(frame.load(Ordering::Relaxed)),
                Err(now) => seen = now,
            }
        }
        Err(GrantStatus::EAGAIN)
    }

    /// Clears the marks of an access: [`Access::ReadOnly`] both, [`Access::ReadWrite`] that for writing.
    pub fn release(&self, reference: GrantRef, access: Access) {
        let mark = match access {
            Access::ReadOnly => IN_USE,
            Access::ReadWrite => GrantFlags::WRITING,
        };
        if let Some((head, _)) = entry(&self.0, reference) {
            // Release orders our uses of the page before its owner sees it unused.
            head.fetch_and(!u32::from(mark.bits()), Ordering::Release);
        }
    }
}

#[cfg(test)]
mod loom_tests;
#[cfg(test)]
mod tests;

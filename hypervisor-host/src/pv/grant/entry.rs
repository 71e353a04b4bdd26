//! The entries of a grant table in the guest's memory, of both versions, as Xen sees and marks them.

use std::sync::atomic::{AtomicU32, Ordering};

use janus_proto::abi::xen::grant_table::{GrantFlags, GrantStatus};
use janus_proto::addr::{DomId, GrantRef, Mfn, PAGE_SIZE};
use janus_proto::grant::Access;

use super::MAX_GRANT_FRAMES;
use crate::machine::ram::Ram;

/// How often an entry is looked at again when the guest changes it under our hands.
const TRIES: u32 = 5;
/// Type bits of the flags (`GTF_type_mask`).
const TYPE_MASK: u16 = 3;
/// `GTF_sub_page`: a version 2 entry for a part of a page, which can be copied but not mapped.
const SUB_PAGE: u16 = 1 << 8;
const PERMIT_ACCESS: u16 = GrantFlags::PERMIT_ACCESS.0;
const READONLY: u16 = GrantFlags::READONLY.0;
const READING: u16 = GrantFlags::READING.0;
const WRITING: u16 = GrantFlags::WRITING.0;

/// The marks in the first word of an entry, where version 1 has them.
pub(super) const MARKS: u32 = READING as u32 | WRITING as u32;

/// Bytes of an entry.
const fn size(version: u32) -> usize {
    if version == 2 { 16 } else { 8 }
}

/// Entries that fit so many frames.
pub(super) fn entries(version: u32, frames: u64) -> u64 {
    frames * (PAGE_SIZE / size(version)) as u64
}

/// Frames of status words for so many frames of version 2 entries.
pub(super) fn status_frames(frames: u64) -> u64 {
    frames.div_ceil(8)
}

/// A table as it is now.
pub(super) struct Entries<'a> {
    ram: &'a Ram,
    first: Mfn,
    version: u32,
    frames: u64,
}

/// Writes a version 1 entry as its owner would.
pub(super) fn grant(ram: &Ram, first: Mfn, reference: GrantRef, domain: DomId, frame: Mfn) {
    let index = reference.0 as usize * 2;
    let Some(words) = ram.words(first, 1) else { return };
    let (Some(head), Some(word)) = (words.get(index), words.get(index + 1)) else { return };
    word.store(u32::try_from(frame.0).unwrap_or(0), Ordering::Relaxed);
    head.store(u32::from(PERMIT_ACCESS) | u32::from(domain.0) << 16, Ordering::Release);
}

impl<'a> Entries<'a> {
    pub(super) fn new(ram: &'a Ram, first: Mfn, version: u32, frames: u64) -> Self {
        Self { ram, first, version, frames }
    }

    /// The words of an entry.
    pub(super) fn words(&self, reference: GrantRef) -> Option<&'a [AtomicU32]> {
        let index = u64::from(reference.0);
        if index >= entries(self.version, self.frames) {
            return None;
        }
        let per_frame = entries(self.version, 1);
        let page = self.ram.words(Mfn(self.first.0 + index / per_frame), 1)?;
        let words = size(self.version) / 4;
        let start = usize::try_from(index % per_frame).ok()? * words;
        page.get(start..start + words)
    }

    /// The word with the status of a version 2 entry, and where in it.
    fn status(&self, reference: GrantRef) -> Option<(&'a AtomicU32, u32)> {
        let index = u64::from(reference.0);
        let frame = Mfn(self.first.0 + MAX_GRANT_FRAMES + index / 2048);
        let word = self.ram.words(frame, 1)?.get(usize::try_from(index % 2048 / 2).ok()?)?;
        Some((word, if index.is_multiple_of(2) { 0 } else { 16 }))
    }

    /// Checks that `domain` may use the whole page, and marks that it does; answers the frame.
    pub(super) fn acquire(
        &self,
        reference: GrantRef,
        domain: DomId,
        access: Access,
    ) -> Result<Mfn, GrantStatus> {
        let words = self.words(reference).ok_or(GrantStatus::BAD_GNTREF)?;
        let head = words.first().ok_or(GrantStatus::BAD_GNTREF)?;
        let mark = match access {
            Access::ReadOnly => READING,
            Access::ReadWrite => READING | WRITING,
        };
        let mut seen = head.load(Ordering::Acquire);
        for _ in 0..TRIES {
            check(seen, domain, access, self.version)?;
            if self.version == 2 {
                let (status, shift) = self.status(reference).ok_or(GrantStatus::BAD_GNTREF)?;
                status.fetch_or(u32::from(mark) << shift, Ordering::SeqCst);
                // The owner clears the flags and then looks at the status: so we look again.
                let now = head.load(Ordering::SeqCst);
                if let Err(error) = check(now, domain, access, 2) {
                    status.fetch_and(!(u32::from(mark) << shift), Ordering::SeqCst);
                    return Err(error);
                }
                let low = words.get(2).map_or(0, |word| word.load(Ordering::Relaxed));
                let high = words.get(3).map_or(0, |word| word.load(Ordering::Relaxed));
                return Ok(Mfn(u64::from(high) << 32 | u64::from(low)));
            }
            let marked = seen | u32::from(mark);
            match head.compare_exchange(seen, marked, Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => {
                    let frame = words.get(1).map_or(0, |word| word.load(Ordering::Relaxed));
                    return Ok(Mfn(frame.into()));
                }
                Err(now) => seen = now,
            }
        }
        Err(GrantStatus::GENERAL_ERROR)
    }

    /// Marks an entry that is in use already.
    pub(super) fn mark(&self, reference: GrantRef, writing: bool) {
        let mark = if writing { READING | WRITING } else { READING };
        if let Some((word, shift)) = self.marks(reference) {
            word.fetch_or(u32::from(mark) << shift, Ordering::SeqCst);
        }
    }

    /// The word with the marks of an entry, and where in it.
    fn marks(&self, reference: GrantRef) -> Option<(&'a AtomicU32, u32)> {
        if self.version == 2 {
            self.status(reference)
        } else {
            self.words(reference).and_then(<[_]>::first).map(|head| (head, 0))
        }
    }

    /// Clears the mark of an access: [`Access::ReadWrite`] that for writing, [`Access::ReadOnly`] that for reading.
    pub(super) fn release(&self, reference: GrantRef, access: Access) {
        let mark = match access {
            Access::ReadOnly => READING,
            Access::ReadWrite => WRITING,
        };
        if let Some((word, shift)) = self.marks(reference) {
            // Orders our uses of the page before its owner sees it unused.
            word.fetch_and(!(u32::from(mark) << shift), Ordering::Release);
        }
    }

    /// What an entry grants, without the marks: flags, domain and frame.
    pub(super) fn content(&self, reference: GrantRef) -> Option<(u32, u64)> {
        let words = self.words(reference)?;
        let word = |index: usize| words.get(index).map_or(0, |w| w.load(Ordering::Relaxed));
        let frame = if self.version == 2 {
            u64::from(word(3)) << 32 | u64::from(word(2))
        } else {
            word(1).into()
        };
        Some((word(0), frame))
    }

    /// Writes an entry as its owner would.
    pub(super) fn set_content(&self, reference: GrantRef, (head, frame): (u32, u64)) {
        let Some(words) = self.words(reference) else { return };
        let low = u32::try_from(frame & 0xffff_ffff).unwrap_or(0);
        let high = u32::try_from(frame >> 32).unwrap_or(0);
        let targets = if self.version == 2 { [(2, low), (3, high)] } else { [(1, low), (1, low)] };
        for (index, value) in targets {
            if let Some(word) = words.get(index) {
                word.store(value, Ordering::Relaxed);
            }
        }
        if let Some(word) = words.first() {
            word.store(head, Ordering::Release);
        }
    }
}

fn check(head: u32, domain: DomId, access: Access, version: u32) -> Result<(), GrantStatus> {
    let (flags, owner) = ((head & 0xffff) as u16, head >> 16);
    if flags & TYPE_MASK != PERMIT_ACCESS {
        return Err(GrantStatus::GENERAL_ERROR);
    }
    if version == 2 && flags & SUB_PAGE != 0 {
        return Err(GrantStatus::GENERAL_ERROR);
    }
    if owner != u32::from(domain.0) {
        return Err(GrantStatus::GENERAL_ERROR);
    }
    if access == Access::ReadWrite && flags & READONLY != 0 {
        return Err(GrantStatus::GENERAL_ERROR);
    }
    Ok(())
}

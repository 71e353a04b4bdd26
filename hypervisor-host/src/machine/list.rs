//! The list of a domain's frames (`mfn_list` of `start_info`), written piece by piece when somebody looks.
//!
//! It has 8 bytes for each page of the guest, so that writing it all would cost a small guest more than the rest of its
//! start. It belongs to [`super::ram::Ram`], through which everybody looks at memory.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};

use janus_proto::addr::Mfn;

use super::ram::FIRST_FRAME;

/// Entries in a page.
const ENTRIES: u64 = 512;
/// Pages written at once: whoever looks at one looks at its neighbours.
const CHUNK: u64 = 4;

/// See the module.
#[derive(Debug, Default)]
pub(super) struct List(OnceLock<Known>);

#[derive(Debug)]
struct Known {
    first: u64,
    entries: u64,
    pages: u64,
    /// By chunk. Set when its pages have been written, which happens once, under the lock.
    written: Vec<AtomicBool>,
    writing: Mutex<()>,
}

impl List {
    /// Makes it the list of `entries` frames from [`FIRST_FRAME`], in the frames from `first` on; once.
    pub(super) fn set(&self, first: Mfn, entries: u64) {
        let pages = entries.div_ceil(ENTRIES);
        let chunks = usize::try_from(pages.div_ceil(CHUNK)).unwrap_or(0);
        let written = std::iter::repeat_with(AtomicBool::default).take(chunks).collect();
        let known = Known { first: first.0, entries, pages, written, writing: Mutex::default() };
        // A second one is a mistake that changes nothing.
        let _ = self.0.set(known);
    }

    /// Whether some of these frames are the list's.
    pub(super) fn is_near(&self, frame: Mfn, count: u64) -> bool {
        self.0.get().is_some_and(|known| {
            frame.0 < known.first + known.pages && frame.0.saturating_add(count) > known.first
        })
    }

    /// Whether a frame of the list has been written.
    pub(super) fn is_written(&self, frame: Mfn) -> bool {
        let Some(known) = self.0.get() else { return true };
        let chunk = frame.0.checked_sub(known.first).map(|page| page / CHUNK);
        let chunk = chunk.and_then(|chunk| known.written.get(usize::try_from(chunk).ok()?));
        chunk.is_none_or(|written| written.load(Ordering::Acquire))
    }

    /// Sees to it that those of these frames that are the list's have been written.
    pub(super) fn write<'a>(
        &self,
        frame: Mfn,
        count: u64,
        page: impl Fn(Mfn) -> Option<&'a [AtomicU64; 512]>,
    ) {
        let Some(known) = self.0.get() else { return };
        let start = frame.0.saturating_sub(known.first) / CHUNK;
        let end = frame.0.saturating_add(count).saturating_sub(known.first).div_ceil(CHUNK);
        for (index, written) in (0..).zip(&known.written) {
            if !(start..end).contains(&index) || written.load(Ordering::Acquire) {
                continue;
            }
            let _guard = known.writing.lock().unwrap_or_else(PoisonError::into_inner);
            if written.load(Ordering::Acquire) {
                continue;
            }
            for index in index * CHUNK..((index + 1) * CHUNK).min(known.pages) {
                let Some(words) = page(Mfn(known.first + index)) else { continue };
                for (word, entry) in words.iter().zip(index * ENTRIES..known.entries) {
                    word.store(FIRST_FRAME.0 + entry, Ordering::Relaxed);
                }
            }
            written.store(true, Ordering::Release);
        }
    }
}

//! Page frames from the host's heap, for tests: a guest address is the pointer's value.
// UNSAFETY: implements the contract of `FrameSource` over the global allocator.
#![expect(unsafe_code, reason = "allocates and frees page-aligned memory")]

use core::ptr::NonNull;
use core::sync::atomic::{AtomicUsize, Ordering};

use janus_proto::addr::{Gpa, PAGE_SIZE};
use std::alloc::{Layout, alloc_zeroed, dealloc};

use crate::dma::FrameSource;

/// A source that counts what is out, and spoils what comes back so that late users are seen.
#[derive(Debug, Default)]
pub struct HeapFrames {
    pages_out: AtomicUsize,
    /// Pages that may be out at once; 0: any number.
    limit: AtomicUsize,
}

/// What returned memory is filled with.
const SPOILT: u8 = 0xA5;

impl HeapFrames {
    /// A source of its own, for the rest of the test.
    #[must_use]
    pub fn leaked() -> &'static Self {
        Box::leak(Box::default())
    }
    /// Pages allocated and not freed.
    #[must_use]
    pub fn pages_out(&self) -> usize {
        self.pages_out.load(Ordering::Relaxed)
    }
    /// Lets at most this many pages out at once; 0: any number.
    pub fn set_limit(&self, pages: usize) {
        self.limit.store(pages, Ordering::Relaxed);
    }
}

fn layout(pages: usize) -> Option<Layout> {
    Layout::from_size_align(pages.checked_mul(PAGE_SIZE)?, PAGE_SIZE).ok()
}

// SAFETY: 1. `alloc_zeroed` with this layout gives zeroed, page-aligned, owned memory of that length;
// 2. on the host nobody translates guest addresses, so the pointer's value serves as one.
unsafe impl FrameSource for HeapFrames {
    fn allocate(&self, pages: usize) -> Option<NonNull<u8>> {
        let limit = self.limit.load(Ordering::Relaxed);
        if pages == 0 || (limit != 0 && self.pages_out() + pages > limit) {
            return None;
        }
        // SAFETY: the layout's size is not zero.
        let start = NonNull::new(unsafe { alloc_zeroed(layout(pages)?) })?;
        self.pages_out.fetch_add(pages, Ordering::Relaxed);
        Some(start)
    }
    unsafe fn free(&self, start: NonNull<u8>, pages: usize) {
        let Some(layout) = layout(pages) else { return };
        self.pages_out.fetch_sub(pages, Ordering::Relaxed);
        // SAFETY: the caller gives back memory of this length that nobody uses.
        unsafe { start.write_bytes(SPOILT, layout.size()) };
        // SAFETY: allocated by `allocate` with the same layout.
        unsafe { dealloc(start.as_ptr(), layout) };
    }
    fn guest_address(&self, memory: NonNull<u8>) -> Gpa {
        // A fake device makes a pointer of it again.
        Gpa(memory.as_ptr().expose_provenance() as u64)
    }
}

//! The allocator of the program where it is linked with musl.
//!
//! musl's own maps and unmaps memory for every few objects, and touches a page for each size of them: of a start that
//! takes half a millisecond, that would be a tenth. So small objects are dlmalloc's. Large ones stay with musl, which
//! maps them: they are zero without being written, and go back to the host when they are freed.
// UNSAFETY: implements the contract of `GlobalAlloc` by two others that keep it.
#![expect(unsafe_code, reason = "an allocator made of two")]

use std::alloc::{GlobalAlloc, Layout, System};

use dlmalloc::GlobalDlmalloc;

/// Objects of this size and more are mapped: musl's own threshold is 128 KiB less a header.
const LARGE: usize = 256 << 10;

/// See the module.
struct BySize;

// SAFETY: each object is handed to the allocator that made it, because its layout says which that was; `realloc` of an
// object that changes sides is that of the trait, which allocates, copies and frees.
unsafe impl GlobalAlloc for BySize {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if layout.size() >= LARGE {
            // SAFETY: the caller's contract is the same.
            unsafe { System.alloc(layout) }
        } else {
            // SAFETY: as above.
            unsafe { GlobalDlmalloc.alloc(layout) }
        }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        if layout.size() >= LARGE {
            // SAFETY: the caller's contract is the same.
            unsafe { System.alloc_zeroed(layout) }
        } else {
            // SAFETY: as above.
            unsafe { GlobalDlmalloc.alloc_zeroed(layout) }
        }
    }

    unsafe fn dealloc(&self, object: *mut u8, layout: Layout) {
        if layout.size() >= LARGE {
            // SAFETY: made by `System`, with this layout.
            unsafe { System.dealloc(object, layout) }
        } else {
            // SAFETY: made by dlmalloc, with this layout.
            unsafe { GlobalDlmalloc.dealloc(object, layout) }
        }
    }

    unsafe fn realloc(&self, object: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        match (layout.size() >= LARGE, size >= LARGE) {
            // SAFETY: made by `System`, and the caller's contract is the same.
            (true, true) => unsafe { System.realloc(object, layout, size) },
            // SAFETY: made by dlmalloc, as above.
            (false, false) => unsafe { GlobalDlmalloc.realloc(object, layout, size) },
            _ => {
                // SAFETY: `size` is not 0 and does not overflow when rounded up to the alignment: the caller's promise.
                let new_layout = unsafe { Layout::from_size_align_unchecked(size, layout.align()) };
                // SAFETY: as above.
                let new = unsafe { self.alloc(new_layout) };
                if !new.is_null() {
                    // SAFETY: both are at least as long as the shorter, and the new one is nobody else's.
                    unsafe { new.copy_from_nonoverlapping(object, layout.size().min(size)) };
                    // SAFETY: the caller gives it up.
                    unsafe { self.dealloc(object, layout) };
                }
                new
            }
        }
    }
}

#[global_allocator]
static MEMORY: BySize = BySize;

//! Stacks with an unmapped page below them, so that an overflow is a page fault and not a corruption.
// UNSAFETY: takes page frames out of the address space and gives them back.
#![expect(unsafe_code, reason = "a stack is raw memory")]

use core::ptr::NonNull;

use janus_proto::addr::{PAGE_SHIFT, PAGE_SIZE, Pfn};

use super::{frames, paging, reclaim};
use crate::platform::lock::IrqLock;

/// A stack that waits to be used again, guard page and all.
#[derive(Clone, Copy)]
struct Spare {
    lowest: NonNull<u8>,
    bytes: usize,
}

// SAFETY: the memory belongs to nobody but this list.
unsafe impl Send for Spare {}

/// Changing page tables costs a flush of the TLB, so a few stacks are kept.
static SPARES: IrqLock<[Option<Spare>; 8]> = IrqLock::new([None; 8]);

/// Allocates a stack of `bytes` (rounded up to pages) above a guard page; answers its lowest byte.
#[must_use]
pub fn allocate(bytes: usize) -> Option<NonNull<u8>> {
    if let Some(spare) =
        SPARES.lock().iter_mut().find_map(|slot| slot.take_if(|spare| spare.bytes == bytes))
    {
        return Some(spare.lowest);
    }
    let pages = bytes.div_ceil(PAGE_SIZE);
    let guard = reclaim::until(|| frames::allocate(pages + 1))?;
    // SAFETY: the lowest frame was just allocated, and nobody has a reference into it.
    if unsafe { paging::unmap(address(guard), 1) }.is_err() {
        // SAFETY: just allocated, still mapped, not used.
        unsafe { frames::free(guard, pages + 1) };
        return None;
    }
    NonNull::new(core::ptr::with_exposed_provenance_mut(address(guard) + PAGE_SIZE))
}

/// Gives a stack back.
///
/// # Safety
/// `lowest` and `bytes` are those of one [`allocate`], and nobody runs on the stack any more.
pub unsafe fn free(lowest: NonNull<u8>, bytes: usize) {
    if let Some(slot) = SPARES.lock().iter_mut().find(|slot| slot.is_none()) {
        *slot = Some(Spare { lowest, bytes });
        return;
    }
    let guard = lowest.as_ptr().expose_provenance() - PAGE_SIZE;
    let guard_frame = Pfn((guard >> PAGE_SHIFT) as u64);
    // SAFETY: the guard frame belongs to this stack; it becomes ordinary memory again.
    match unsafe { paging::map(guard, guard_frame, 1, paging::Flags::WRITE) } {
        // SAFETY: the frames of `allocate`, all mapped again; unused (the caller's promise).
        Ok(()) => unsafe { frames::free(guard_frame, bytes.div_ceil(PAGE_SIZE) + 1) },
        // Without its guard page mapped the run must not be reused: only the stack itself goes back.
        Err(_) => {
            // SAFETY: the stack's own frames, mapped all the time; unused (the caller's promise).
            unsafe { frames::free(Pfn(guard_frame.0 + 1), bytes.div_ceil(PAGE_SIZE)) }
        }
    }
}

fn address(frame: Pfn) -> usize {
    usize::try_from(frame.start().0).unwrap_or(usize::MAX)
}

//! Giving page frames back to the hypervisor and taking them again: what a Xen balloon moves.
//!
//! Under PV a frame's machine frame goes away: its mapping first, then the frame, then its entry in the
//! p2m; the way back is the reverse, with another machine frame. A PVH guest only loses the memory behind
//! a guest frame. Either way the address stays reserved: whoever calls this has taken the frames from the
//! allocator ([`super::frames`]) and gives them back to it only when they have memory again.
// UNSAFETY: takes memory from under addresses, and puts some there.
#![expect(unsafe_code, reason = "memory comes and goes")]

use janus_proto::addr::{Mfn, PAGE_SIZE, Pfn};

use super::paging::{self, Flags, MapError, pv};
use crate::hypercall::memory::{decrease_reservation, populate_physmap, set_machine_to_physical};
use crate::platform::{self, Platform};

/// Frames moved in one hypercall.
pub const BATCH: usize = 64;

fn address(frame: Pfn) -> usize {
    usize::try_from(frame.start().0).unwrap_or(usize::MAX)
}

/// Gives the memory behind `frames` (at most [`BATCH`] of them) to Xen; answers how many, from the first, it
/// took. The others are as before.
///
/// # Errors
/// A mapping could not be removed, or Xen took none.
///
/// # Safety
/// The caller owns the frames, and nothing refers to their memory.
pub unsafe fn release(frames: &[Pfn]) -> Result<usize, MapError> {
    let frames = frames.get(..BATCH).unwrap_or(frames);
    let is_pv = platform::current() == Platform::XenPv;
    let mut list = [0; BATCH];
    let mut count = 0;
    for (slot, &frame) in list.iter_mut().zip(frames) {
        let Some(number) = (if is_pv { pv::mfn(frame).map(|mfn| mfn.0) } else { Some(frame.0) })
        else {
            break;
        };
        // SAFETY: nothing refers to the page (the caller's promise).
        if unsafe { paging::unmap(address(frame), 1) }.is_err() {
            break;
        }
        *slot = number;
        count += 1;
    }
    let list = list.get_mut(..count).unwrap_or_default();
    // SAFETY: the caller owns the frames, and nothing maps them any more.
    let done = unsafe { decrease_reservation(list) }.unwrap_or_else(|error| {
        log::warn!("Xen does not take memory back: {error}");
        0
    });
    for (index, &frame) in frames.iter().enumerate().take(count) {
        if index >= done {
            // SAFETY: the page as it was.
            unsafe { paging::map(address(frame), frame, 1, Flags::WRITE) }?;
        } else if is_pv {
            // SAFETY: its machine frame is Xen's now, and nothing maps it.
            unsafe { pv::set_mfn(frame, None) };
        }
    }
    if done == 0 && !frames.is_empty() { Err(MapError::Refused) } else { Ok(done) }
}

/// Gets memory from Xen for `frames` (at most [`BATCH`] of them) that [`release`] took; answers how many, from the
/// first, have some now, mapped writable, with contents of nobody's.
///
/// # Errors
/// A page could not be mapped.
///
/// # Safety
/// The caller owns the frames, and they have no memory.
pub unsafe fn populate(frames: &[Pfn]) -> Result<usize, MapError> {
    let frames = frames.get(..BATCH).unwrap_or(frames);
    let is_pv = platform::current() == Platform::XenPv;
    let mut list = [0; BATCH];
    let list = list.get_mut(..frames.len()).unwrap_or_default();
    for (slot, frame) in list.iter_mut().zip(frames) {
        *slot = frame.0;
    }
    // SAFETY: the caller owns the frames, which have no memory.
    let done = match unsafe { populate_physmap(list) } {
        Ok(done) => done,
        Err(error) => {
            log::debug!("Xen has no memory to give: {error}");
            0
        }
    };
    for (&frame, &mfn) in frames.iter().zip(list.iter()).take(done) {
        if is_pv {
            // SAFETY: the machine frame that Xen has just named for it.
            unsafe { pv::set_mfn(frame, Some(Mfn(mfn))) };
            set_machine_to_physical(Mfn(mfn), frame).map_err(|_| MapError::Refused)?;
        }
        // SAFETY: memory that nobody uses yet, at its own address.
        unsafe { paging::map(address(frame), frame, 1, Flags::WRITE) }?;
        debug_assert!(address(frame).is_multiple_of(PAGE_SIZE));
    }
    Ok(done)
}

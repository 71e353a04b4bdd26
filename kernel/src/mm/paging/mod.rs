//! Page tables: one interface over two ways to change them, by hand and by hypercall.
//!
//! Addresses are virtual; frames are pseudo-physical, and [`pv`] translates them to machine frames.
// UNSAFETY: changes what addresses mean.
#![expect(unsafe_code, reason = "page tables decide what memory is")]

use core::ptr::NonNull;

use janus_proto::addr::{Gpa, PAGE_SIZE, Pfn};

use crate::platform::{self, Platform};

pub mod native;
pub mod pv;

bitflags::bitflags! {
    /// What may be done with a mapping beyond reading it.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Flags: u32 {
        /// Writing.
        const WRITE = 1 << 0;
        /// Executing; never together with `WRITE`.
        const EXECUTE = 1 << 1;
        /// Accesses go to the device, in order, not to the cache.
        const UNCACHED = 1 << 2;
    }
}

/// Why a mapping could not be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MapError {
    /// No memory for a page table.
    OutOfMemory,
    /// The address is outside the lower half, or not aligned to a page.
    BadAddress,
    /// Writable and executable at once.
    WriteExecute,
    /// The hypervisor refused.
    Refused,
    /// The page tables do not belong to this kernel (the host), or are not set up yet.
    NotReady,
}

impl core::fmt::Display for MapError {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str(match self {
            Self::OutOfMemory => "no memory for a page table",
            Self::BadAddress => "the address cannot be mapped",
            Self::WriteExecute => "a mapping may not be writable and executable",
            Self::Refused => "the hypervisor refused the mapping",
            Self::NotReady => "the page tables are not set up",
        })
    }
}

/// Maps `pages` pages at `va` to adjacent frames from `frame`, replacing what was mapped there.
///
/// # Errors
/// See [`MapError`].
///
/// # Safety
/// No reference into the range is alive, and giving these frames this meaning breaks no owner's rules.
pub unsafe fn map(va: usize, frame: Pfn, pages: usize, flags: Flags) -> Result<(), MapError> {
    check(va, pages, flags)?;
    match platform::current() {
        // SAFETY: the caller's promise.
        Platform::XenPv => unsafe { pv::map(va, frame, pages, flags) },
        // SAFETY: the caller's promise.
        Platform::XenPvh | Platform::Kvm => unsafe { native::map(va, frame, pages, flags) },
        #[cfg(not(target_os = "none"))]
        Platform::Host => Err(MapError::NotReady),
    }
}

/// Removes the mappings of `pages` pages at `va`; pages without one are left alone.
///
/// # Errors
/// See [`MapError`].
///
/// # Safety
/// No reference into the range is alive.
pub unsafe fn unmap(va: usize, pages: usize) -> Result<(), MapError> {
    check(va, pages, Flags::empty())?;
    match platform::current() {
        // SAFETY: the caller's promise.
        Platform::XenPv => unsafe { pv::unmap(va, pages) },
        // SAFETY: the caller's promise.
        Platform::XenPvh | Platform::Kvm => unsafe { native::unmap(va, pages) },
        #[cfg(not(target_os = "none"))]
        Platform::Host => Err(MapError::NotReady),
    }
}

/// Changes what may be done with `pages` mapped pages at `va`; pages without a mapping are left alone.
///
/// # Errors
/// See [`MapError`].
///
/// # Safety
/// What becomes forbidden is not done any more: no mutable reference into pages that lose `WRITE`.
pub unsafe fn protect(va: usize, pages: usize, flags: Flags) -> Result<(), MapError> {
    check(va, pages, flags)?;
    match platform::current() {
        // SAFETY: the caller's promise.
        Platform::XenPv => unsafe { pv::protect(va, pages, flags) },
        // SAFETY: the caller's promise.
        Platform::XenPvh | Platform::Kvm => unsafe { native::protect(va, pages, flags) },
        #[cfg(not(target_os = "none"))]
        Platform::Host => Err(MapError::NotReady),
    }
}

/// Maps a device's registers, uncached, at their own address; mapping them again is allowed.
///
/// # Errors
/// See [`MapError`].
pub fn map_mmio(start: Gpa, len: usize) -> Result<NonNull<u8>, MapError> {
    let address = usize::try_from(start.0).map_err(|_| MapError::BadAddress)?;
    let first = address & !(PAGE_SIZE - 1);
    let end = address.checked_add(len.max(1)).ok_or(MapError::BadAddress)?;
    let pages = (end - first).div_ceil(PAGE_SIZE);
    let frame = Pfn::containing(start);
    if super::frames::is_ram(frame, pages) {
        return Err(MapError::BadAddress);
    }
    // SAFETY: outside RAM no Rust object lives, so no reference into the range exists.
    unsafe { map(first, frame, pages, Flags::WRITE | Flags::UNCACHED) }?;
    NonNull::new(core::ptr::with_exposed_provenance_mut(address)).ok_or(MapError::BadAddress)
}

fn check(va: usize, pages: usize, flags: Flags) -> Result<(), MapError> {
    let end = pages.checked_mul(PAGE_SIZE).and_then(|bytes| va.checked_add(bytes));
    if !va.is_multiple_of(PAGE_SIZE) || va == 0 || end.is_none_or(|end| end > 1 << 47) {
        return Err(MapError::BadAddress);
    }
    if flags.contains(Flags::WRITE | Flags::EXECUTE) {
        return Err(MapError::WriteExecute);
    }
    Ok(())
}

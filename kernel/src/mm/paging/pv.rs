//! Page tables under Xen PV: read by the kernel, changed by hypercalls.
// UNSAFETY: changes what addresses mean.
#![expect(unsafe_code, reason = "page tables decide what memory is")]

use janus_proto::addr::Pfn;

use super::{Flags, MapError};

/// # Safety
/// As [`super::map`].
pub(super) unsafe fn map(_va: usize, _frame: Pfn, _pages: usize, _flags: Flags) -> Result<(), MapError> {
    Err(MapError::NotReady)
}

/// # Safety
/// As [`super::unmap`].
pub(super) unsafe fn unmap(_va: usize, _pages: usize) -> Result<(), MapError> {
    Err(MapError::NotReady)
}

/// # Safety
/// As [`super::protect`].
pub(super) unsafe fn protect(_va: usize, _pages: usize, _flags: Flags) -> Result<(), MapError> {
    Err(MapError::NotReady)
}

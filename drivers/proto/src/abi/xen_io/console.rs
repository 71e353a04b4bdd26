//! The console ring page (`xen/include/public/io/console.h`): byte offsets in the page.
//!
//! The protocol over it is in `crate::byte_ring`.

/// Byte offset and size of `in`: from the backend to the guest.
pub const IN: (usize, usize) = (0, 1024);
/// Byte offset and size of `out`: from the guest to the backend.
pub const OUT: (usize, usize) = (1024, 2048);
/// Byte offset of `in_cons`.
pub const IN_CONS: usize = 3072;
/// Byte offset of `in_prod`.
pub const IN_PROD: usize = 3076;
/// Byte offset of `out_cons`.
pub const OUT_CONS: usize = 3080;
/// Byte offset of `out_prod`.
pub const OUT_PROD: usize = 3084;

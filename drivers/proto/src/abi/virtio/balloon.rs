//! Traditional memory balloon (virtio 1.2, 5.5).

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// The host must be told before pages are used again.
pub const F_MUST_TELL_HOST: u64 = 1 << 0;
/// A queue for statistics.
pub const F_STATS_VQ: u64 = 1 << 1;
/// The guest may take pages back when it is out of memory.
pub const F_DEFLATE_ON_OOM: u64 = 1 << 2;
/// A queue for pages that are free.
pub const F_PAGE_REPORTING: u64 = 1 << 5;
/// Pages given up.
pub const QUEUE_INFLATE: u16 = 0;
/// Pages taken back.
pub const QUEUE_DEFLATE: u16 = 1;
/// log2 of the page that balloon page numbers count, whatever the guest's own.
pub const PFN_SHIFT: u32 = 12;

/// Device configuration (virtio 1.2, 5.5.4).
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Config {
    /// Pages the host wants in the balloon.
    pub num_pages: u32,
    /// Pages that the guest says are in it.
    pub actual: u32,
}
assert_layout!(Config, size = 8, num_pages = 0, actual = 4);

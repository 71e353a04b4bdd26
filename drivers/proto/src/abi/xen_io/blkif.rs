//! Block devices (`xen/include/public/io/blkif.h`), 64-bit layout ("x86_64-abi").
//!
//! Ring slots are 112 bytes; the three request layouts share `operation`, `id` and `sector_number`.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::addr::GrantRef;

open_enum! {
    /// What to do (`BLKIF_OP_*`).
    pub enum BlkifOp: u8 {
        /// Reads sectors.
        READ = 0,
        /// Writes sectors.
        WRITE = 1,
        /// Writes, ordered against all else.
        WRITE_BARRIER = 2,
        /// Makes completed writes stable.
        FLUSH_DISKCACHE = 3,
        /// Gives back sectors.
        DISCARD = 5,
        /// Reads or writes with segments in granted pages.
        INDIRECT = 6,
    }
}

open_enum! {
    /// How it ended (`BLKIF_RSP_*`).
    pub enum BlkifStatus: i16 {
        /// Done.
        OKAY = 0,
        /// Failed.
        ERROR = -1,
        /// Not supported.
        EOPNOTSUPP = -2,
    }
}

/// Segments in a direct request.
pub const BLKIF_MAX_SEGMENTS_PER_REQUEST: usize = 11;

/// Pages of segments in an indirect request.
pub const BLKIF_MAX_INDIRECT_PAGES_PER_REQUEST: usize = 8;

/// Segments in a page: 4096 / 8.
pub const SEGMENTS_PER_INDIRECT_PAGE: usize = 512;

/// Words in a ring slot.
pub const SLOT_WORDS: usize = 28;

/// Part of a granted page, in 512-byte sectors.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct BlkifSegment {
    /// The page.
    pub gref: GrantRef,
    /// First sector in it.
    pub first_sect: u8,
    /// Last sector in it, inclusive.
    pub last_sect: u8,
    /// Padding; zero.
    pub pad0: [u8; 2],
}
assert_layout!(BlkifSegment, size = 8, gref = 0, first_sect = 4, last_sect = 5);

/// A direct read, write or flush.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct BlkifRequest {
    /// What.
    pub operation: BlkifOp,
    /// Segments used; 0 for a flush.
    pub nr_segments: u8,
    /// The virtual device.
    pub handle: u16,
    /// Padding; zero.
    pub pad0: [u8; 4],
    /// The guest's, echoed.
    pub id: u64,
    /// First sector of the disk.
    pub sector_number: u64,
    /// Where.
    pub seg: [BlkifSegment; 11],
}
assert_layout!(
    BlkifRequest,
    size = 112,
    operation = 0,
    nr_segments = 1,
    handle = 2,
    id = 8,
    sector_number = 16,
    seg = 24
);

/// A discard.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct BlkifRequestDiscard {
    /// [`BlkifOp::DISCARD`].
    pub operation: BlkifOp,
    /// 1: erase securely.
    pub flag: u8,
    /// The virtual device.
    pub handle: u16,
    /// Padding; zero.
    pub pad0: [u8; 4],
    /// The guest's, echoed.
    pub id: u64,
    /// First sector.
    pub sector_number: u64,
    /// Sectors.
    pub nr_sectors: u64,
}
assert_layout!(
    BlkifRequestDiscard,
    size = 32,
    operation = 0,
    flag = 1,
    handle = 2,
    id = 8,
    sector_number = 16,
    nr_sectors = 24
);

/// A read or write with many segments.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct BlkifRequestIndirect {
    /// [`BlkifOp::INDIRECT`].
    pub operation: BlkifOp,
    /// Read or write.
    pub indirect_op: BlkifOp,
    /// Segments.
    pub nr_segments: u16,
    /// Padding; zero.
    pub pad0: [u8; 4],
    /// The guest's, echoed.
    pub id: u64,
    /// First sector of the disk.
    pub sector_number: u64,
    /// The virtual device.
    pub handle: u16,
    /// Padding; zero.
    pub pad1: [u8; 2],
    /// Pages holding arrays of [`BlkifSegment`].
    pub indirect_grefs: [GrantRef; 8],
    /// Padding; zero.
    pub pad2: [u8; 4],
}
assert_layout!(
    BlkifRequestIndirect,
    size = 64,
    operation = 0,
    indirect_op = 1,
    nr_segments = 2,
    id = 8,
    sector_number = 16,
    handle = 24,
    indirect_grefs = 28
);

/// The end of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct BlkifResponse {
    /// Of the request.
    pub id: u64,
    /// Of the request.
    pub operation: BlkifOp,
    /// Padding; zero.
    pub pad0: [u8; 1],
    /// How it ended.
    pub status: BlkifStatus,
    /// Padding; zero.
    pub pad1: [u8; 4],
}
assert_layout!(BlkifResponse, size = 16, id = 0, operation = 8, status = 10);

open_flags! {
    /// The `info` node of a backend (`VDISK_*`).
    pub struct VdiskInfo: u32 {
        /// A CD-ROM.
        const CDROM = 1;
        /// Removable.
        const REMOVABLE = 2;
        /// Read-only.
        const READONLY = 4;
    }
}

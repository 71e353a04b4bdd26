//! Block device (virtio 1.2, 5.2).

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// `size_max` limits a segment.
pub const F_SIZE_MAX: u64 = 1 << 1;
/// `seg_max` limits the segments of a request.
pub const F_SEG_MAX: u64 = 1 << 2;
/// Read-only.
pub const F_RO: u64 = 1 << 5;
/// `blk_size` is valid.
pub const F_BLK_SIZE: u64 = 1 << 6;
/// Flush is known.
pub const F_FLUSH: u64 = 1 << 9;
/// `num_queues` is valid.
pub const F_MQ: u64 = 1 << 12;
/// Discard is known.
pub const F_DISCARD: u64 = 1 << 13;
/// Write zeroes is known.
pub const F_WRITE_ZEROES: u64 = 1 << 14;

/// Bytes of the answer to `GET_ID`.
pub const ID_BYTES: usize = 20;
/// Flag of a range to fill with zeroes: it may be given back to the medium.
pub const WRITE_ZEROES_FLAG_UNMAP: u32 = 1;

open_enum! {
    /// `type` of a request.
    pub enum RequestType: u32 {
        /// Read.
        IN = 0,
        /// Write.
        OUT = 1,
        /// Flush.
        FLUSH = 4,
        /// Device id string.
        GET_ID = 8,
        /// Discard.
        DISCARD = 11,
        /// Write zeroes.
        WRITE_ZEROES = 13,
    }
}
open_enum! {
    /// The status byte at the end of a request.
    pub enum RequestStatus: u8 {
        /// Done.
        OK = 0,
        /// Failed.
        IOERR = 1,
        /// Unknown operation.
        UNSUPP = 2,
    }
}

/// The header of a request (virtio 1.2, 5.2.6).
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct RequestHeader {
    /// What to do.
    pub request_type: RequestType,
    /// Reserved (was an I/O priority).
    pub reserved: u32,
    /// First 512-byte sector.
    pub sector: u64,
}
assert_layout!(RequestHeader, size = 16, request_type = 0, sector = 8);

/// The data of discard and write zeroes.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct DiscardWriteZeroes {
    /// First 512-byte sector.
    pub sector: u64,
    /// How many.
    pub num_sectors: u32,
    /// Bit 0: unmap (write zeroes only).
    pub flags: u32,
}
assert_layout!(DiscardWriteZeroes, size = 16, sector = 0, num_sectors = 8, flags = 12);

/// Device configuration (virtio 1.2, 5.2.4).
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Config {
    /// Capacity in 512-byte sectors.
    pub capacity: u64,
    /// Most bytes in a segment.
    pub size_max: u32,
    /// Most data segments in a request.
    pub seg_max: u32,
    /// Cylinders of a geometry nobody uses.
    pub cylinders: u16,
    /// Its heads.
    pub heads: u8,
    /// Its sectors.
    pub sectors: u8,
    /// Block size in bytes.
    pub blk_size: u32,
    /// log2 of logical blocks in a physical one.
    pub physical_block_exp: u8,
    /// Offset of the first aligned logical block.
    pub alignment_offset: u8,
    /// Suggested minimum request in blocks.
    pub min_io_size: u16,
    /// Suggested request in blocks.
    pub opt_io_size: u32,
    /// Cache mode.
    pub writeback: u8,
    /// Padding.
    pub unused0: u8,
    /// Request queues.
    pub num_queues: u16,
    /// Most sectors in one discard segment.
    pub max_discard_sectors: u32,
    /// Most segments in a discard.
    pub max_discard_seg: u32,
    /// Alignment of discards in sectors.
    pub discard_sector_alignment: u32,
    /// Most sectors in one write-zeroes segment.
    pub max_write_zeroes_sectors: u32,
    /// Most segments in a write zeroes.
    pub max_write_zeroes_seg: u32,
    /// Whether write zeroes may unmap.
    pub write_zeroes_may_unmap: u8,
    /// Padding.
    pub unused1: [u8; 3],
    /// Most sectors in one secure-erase segment; its further fields are of no use here.
    pub max_secure_erase_sectors: u32,
}
assert_layout!(
    Config,
    size = 64,
    size_max = 8,
    seg_max = 12,
    cylinders = 16,
    blk_size = 20,
    physical_block_exp = 24,
    writeback = 32,
    num_queues = 34,
    max_discard_sectors = 36,
    max_write_zeroes_sectors = 48,
    write_zeroes_may_unmap = 56
);

//! Network device (virtio 1.2, 5.1).

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// The device fills in checksums.
pub const F_CSUM: u64 = 1 << 0;
/// The driver takes frames with unfilled checksums.
pub const F_GUEST_CSUM: u64 = 1 << 1;
/// `mtu` is valid.
pub const F_MTU: u64 = 1 << 3;
/// `mac` is valid.
pub const F_MAC: u64 = 1 << 5;
/// The driver takes long TCP/IPv4 frames.
pub const F_GUEST_TSO4: u64 = 1 << 7;
/// The driver takes long TCP/IPv6 frames.
pub const F_GUEST_TSO6: u64 = 1 << 8;
/// The device takes long TCP/IPv4 frames.
pub const F_HOST_TSO4: u64 = 1 << 11;
/// The device takes long TCP/IPv6 frames.
pub const F_HOST_TSO6: u64 = 1 << 12;
/// A received frame may lie in several buffers.
pub const F_MRG_RXBUF: u64 = 1 << 15;
/// `status` is valid.
pub const F_STATUS: u64 = 1 << 16;
/// There is a control queue.
pub const F_CTRL_VQ: u64 = 1 << 17;
/// There are several pairs of queues, and the control queue says how many are used.
pub const F_MQ: u64 = 1 << 22;

/// Class of commands: several pairs of queues.
pub const CTRL_MQ: u8 = 4;
/// Command of [`CTRL_MQ`]: use so many pairs, a `u16`.
pub const CTRL_MQ_VQ_PAIRS_SET: u8 = 0;
/// A command was done.
pub const CTRL_OK: u8 = 0;
/// A command was refused.
pub const CTRL_ERR: u8 = 1;

/// `status`: the link is up.
pub const S_LINK_UP: u16 = 1;
/// Receive queue of the first pair.
pub const QUEUE_RECEIVE: u16 = 0;
/// Transmit queue of the first pair.
pub const QUEUE_TRANSMIT: u16 = 1;

/// Header flag: `csum_start` and `csum_offset` name a checksum to fill in.
pub const HDR_F_NEEDS_CSUM: u8 = 1;
/// Header flag: the checksum was verified.
pub const HDR_F_DATA_VALID: u8 = 2;

open_enum! {
    /// `gso_type` of a frame.
    pub enum GsoType: u8 {
        /// An ordinary frame.
        NONE = 0,
        /// Long TCP/IPv4.
        TCPV4 = 1,
        /// Long UDP.
        UDP = 3,
        /// Long TCP/IPv6.
        TCPV6 = 4,
        /// Flag beside the others: ECN is in use.
        ECN = 0x80,
    }
}

/// The header in front of every frame (virtio 1.2, 5.1.6).
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Header {
    /// [`HDR_F_NEEDS_CSUM`], [`HDR_F_DATA_VALID`].
    pub flags: u8,
    /// Kind of segmentation.
    pub gso_type: GsoType,
    /// Bytes of headers in front of the payload.
    pub hdr_len: u16,
    /// Payload bytes in each segment.
    pub gso_size: u16,
    /// Where summing starts.
    pub csum_start: u16,
    /// Where the sum goes, from `csum_start`.
    pub csum_offset: u16,
    /// Receive buffers that the frame takes (mergeable buffers).
    pub num_buffers: u16,
}
assert_layout!(
    Header,
    size = 12,
    flags = 0,
    gso_type = 1,
    hdr_len = 2,
    gso_size = 4,
    csum_start = 6,
    csum_offset = 8,
    num_buffers = 10
);

/// Device configuration (virtio 1.2, 5.1.4).
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Config {
    /// Ethernet address.
    pub mac: [u8; 6],
    /// [`S_LINK_UP`].
    pub status: u16,
    /// Queue pairs at most.
    pub max_virtqueue_pairs: u16,
    /// MTU.
    pub mtu: u16,
}
assert_layout!(Config, size = 12, mac = 0, status = 6, max_virtqueue_pairs = 8, mtu = 10);

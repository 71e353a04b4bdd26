//! Network devices (`xen/include/public/io/netif.h`).
//!
//! Transmit slots are 12 bytes (extra info shares them), receive slots 8.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::addr::GrantRef;

open_flags! {
    /// [`NetTxRequest::flags`] (`NETTXF_*`).
    pub struct NetTxFlags: u16 {
        /// The checksum is to be filled in.
        const CSUM_BLANK = 1 << 0;
        /// The data is known to be good.
        const DATA_VALIDATED = 1 << 1;
        /// The frame goes on in the next slot.
        const MORE_DATA = 1 << 2;
        /// The next slot is a [`NetExtraInfo`].
        const EXTRA_INFO = 1 << 3;
    }
}

/// Part of a frame to send. In the first of a frame, `size` is that of the whole frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct NetTxRequest {
    /// The page.
    pub gref: GrantRef,
    /// First byte in it.
    pub offset: u16,
    /// Flags.
    pub flags: NetTxFlags,
    /// The guest's, echoed.
    pub id: u16,
    /// Bytes.
    pub size: u16,
}
assert_layout!(NetTxRequest, size = 12, gref = 0, offset = 4, flags = 6, id = 8, size = 10);

/// A slot was sent (or was extra info).
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct NetTxResponse {
    /// Of the request.
    pub id: u16,
    /// [`NetStatus`].
    pub status: i16,
}
assert_layout!(NetTxResponse, size = 4, id = 0, status = 2);

open_enum! {
    /// Results (`NETIF_RSP_*`); a receive response has the byte count in their place.
    pub enum NetStatus: i16 {
        /// Dropped.
        DROPPED = -2,
        /// Failed.
        ERROR = -1,
        /// Done.
        OKAY = 0,
        /// No response: the slot was extra info.
        NULL = 1,
    }
}

open_enum! {
    /// [`NetExtraInfo::kind`] (`XEN_NETIF_EXTRA_TYPE_*`).
    pub enum ExtraType: u8 {
        /// Invalid.
        NONE = 0,
        /// Segmentation.
        GSO = 1,
        /// Join a multicast group.
        MCAST_ADD = 2,
        /// Leave it.
        MCAST_DEL = 3,
        /// Flow hash.
        HASH = 4,
    }
}

/// [`NetExtraInfo::flags`]: another one follows.
pub const EXTRA_FLAG_MORE: u8 = 1;

open_enum! {
    /// [`NetExtraInfo::gso_type`] (`XEN_NETIF_GSO_TYPE_*`).
    pub enum GsoType: u8 {
        /// Not segmented.
        NONE = 0,
        /// TCP over IPv4.
        TCPV4 = 1,
        /// TCP over IPv6.
        TCPV6 = 2,
    }
}

/// More about a frame; fits a transmit and a receive slot. The names are those of segmentation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct NetExtraInfo {
    /// Which layout.
    pub kind: ExtraType,
    /// [`EXTRA_FLAG_MORE`].
    pub flags: u8,
    /// Payload bytes in a segment.
    pub gso_size: u16,
    /// Protocol.
    pub gso_type: GsoType,
    /// Zero.
    pub gso_pad: u8,
    /// Zero.
    pub gso_features: u16,
}
assert_layout!(
    NetExtraInfo,
    size = 8,
    kind = 0,
    flags = 1,
    gso_size = 2,
    gso_type = 4,
    gso_pad = 5,
    gso_features = 6
);

/// A multicast group to join or leave ([`ExtraType::MCAST_ADD`], [`ExtraType::MCAST_DEL`]).
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct NetExtraMulticast {
    /// Which layout.
    pub kind: ExtraType,
    /// [`EXTRA_FLAG_MORE`].
    pub flags: u8,
    /// The group's Ethernet address.
    pub address: [u8; 6],
}
assert_layout!(NetExtraMulticast, size = 8, kind = 0, flags = 1, address = 2);

/// The hash of a frame's flow ([`ExtraType::HASH`]).
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct NetExtraHash {
    /// Which layout.
    pub kind: ExtraType,
    /// [`EXTRA_FLAG_MORE`].
    pub flags: u8,
    /// Of what: the number of the bit of [`HashTypes`].
    pub hash_type: u8,
    /// [`HashAlgorithm`].
    pub algorithm: u8,
    /// The hash, in the byte order of the CPU.
    pub value: [u8; 4],
}
assert_layout!(
    NetExtraHash,
    size = 8,
    kind = 0,
    flags = 1,
    hash_type = 2,
    algorithm = 3,
    value = 4
);

/// An empty page for receiving.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct NetRxRequest {
    /// The guest's, echoed.
    pub id: u16,
    /// Zero.
    pub pad: u16,
    /// The page.
    pub gref: GrantRef,
}
assert_layout!(NetRxRequest, size = 8, id = 0, pad = 2, gref = 4);

open_flags! {
    /// [`NetRxResponse::flags`] (`NETRXF_*`).
    pub struct NetRxFlags: u16 {
        /// The checksum is known to be good.
        const DATA_VALIDATED = 1 << 0;
        /// The checksum is not filled in.
        const CSUM_BLANK = 1 << 1;
        /// The frame goes on in the next slot.
        const MORE_DATA = 1 << 2;
        /// The next slot is a [`NetExtraInfo`].
        const EXTRA_INFO = 1 << 3;
        /// Deprecated.
        const GSO_PREFIX = 1 << 4;
    }
}

/// A page was filled.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct NetRxResponse {
    /// Of the request.
    pub id: u16,
    /// First byte in the page.
    pub offset: u16,
    /// Flags.
    pub flags: NetRxFlags,
    /// Bytes, or a negative [`NetStatus`].
    pub status: i16,
}
assert_layout!(NetRxResponse, size = 8, id = 0, offset = 2, flags = 4, status = 6);

/// Slots that every backend takes for one frame.
pub const NR_SLOTS_MIN: usize = 18;

/// Longest frame, in bytes.
pub const MAX_TX_SIZE: u32 = 0xffff;

/// Words in a transmit slot.
pub const TX_SLOT_WORDS: usize = 3;

/// Words in a receive slot.
pub const RX_SLOT_WORDS: usize = 2;

open_enum! {
    /// [`NetCtrlRequest::kind`] (`XEN_NETIF_CTRL_TYPE_*`).
    pub enum CtrlType: u16 {
        /// Which flows can be hashed.
        GET_HASH_FLAGS = 1,
        /// Which are to be: `data[0]`.
        SET_HASH_FLAGS = 2,
        /// The key: `data[0]` grants its page, `data[1]` is its length in bytes.
        SET_HASH_KEY = 3,
        /// Entries that a mapping may have.
        GET_HASH_MAPPING_SIZE = 4,
        /// Entries that it shall have: `data[0]`.
        SET_HASH_MAPPING_SIZE = 5,
        /// Queues by hash: `data[0]` grants a page of 32-bit numbers, `data[1]` of them from entry `data[2]` on.
        SET_HASH_MAPPING = 6,
        /// The algorithm: `data[0]`.
        SET_HASH_ALGORITHM = 7,
    }
}

open_enum! {
    /// [`NetCtrlResponse::status`] (`XEN_NETIF_CTRL_STATUS_*`).
    pub enum CtrlStatus: u32 {
        /// Done.
        SUCCESS = 0,
        /// Not known here.
        NOT_SUPPORTED = 1,
        /// It makes no sense.
        INVALID_PARAMETER = 2,
        /// A buffer is too small.
        BUFFER_OVERFLOW = 3,
    }
}

open_enum! {
    /// How flows are hashed (`XEN_NETIF_CTRL_HASH_ALGORITHM_*`).
    pub enum HashAlgorithm: u32 {
        /// The backend's own way.
        NONE = 0,
        /// By a key.
        TOEPLITZ = 1,
    }
}

open_flags! {
    /// Flows that are hashed (`XEN_NETIF_CTRL_HASH_TYPE_*`).
    pub struct HashTypes: u32 {
        /// By both IPv4 addresses.
        const IPV4 = 1 << 0;
        /// And both TCP ports.
        const IPV4_TCP = 1 << 1;
        /// By both IPv6 addresses.
        const IPV6 = 1 << 2;
        /// And both TCP ports.
        const IPV6_TCP = 1 << 3;
    }
}

impl HashTypes {
    /// All of them.
    pub const ALL: Self = Self(0xf);
}

/// A request on the control ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct NetCtrlRequest {
    /// The guest's, echoed.
    pub id: u16,
    /// What is asked.
    pub kind: CtrlType,
    /// By kind.
    pub data: [u32; 3],
}
assert_layout!(NetCtrlRequest, size = 16, id = 0, kind = 2, data = 4);

/// An answer on the control ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct NetCtrlResponse {
    /// Of the request.
    pub id: u16,
    /// Of the request.
    pub kind: CtrlType,
    /// Whether it was done.
    pub status: CtrlStatus,
    /// By kind.
    pub data: u32,
}
assert_layout!(NetCtrlResponse, size = 12, id = 0, kind = 2, status = 4, data = 8);

/// Words in a slot of the control ring.
pub const CTRL_SLOT_WORDS: usize = 4;

//! Grant tables (`xen/include/public/grant_table.h`).

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::addr::{DomId, GrantRef};

/// A version 1 entry: one page offered to one domain. In memory: two little-endian `u32` words,
/// flags and domain in the first, the frame in the second; see `crate::grant`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct GrantEntryV1 {
    /// [`GrantFlags`].
    pub flags: u16,
    /// Who may access.
    pub domid: DomId,
    /// Guest frame (translated guests) or machine frame.
    pub frame: u32,
}
assert_layout!(GrantEntryV1, size = 8, flags = 0, domid = 2, frame = 4);

open_flags! {
    /// Flags of an entry (`GTF_*`).
    pub struct GrantFlags: u16 {
        /// The domain may map and copy.
        const PERMIT_ACCESS = 1 << 0;
        /// Only for reading.
        const READONLY = 1 << 2;
        /// Set by Xen while it is mapped or copied for reading.
        const READING = 1 << 3;
        /// Set by Xen while it is mapped or copied for writing.
        const WRITING = 1 << 4;
    }
}

/// References below this are reserved for the toolstack.
pub const GNTTAB_NR_RESERVED_ENTRIES: u32 = 8;

/// The console ring, set up by the toolstack.
pub const GNTTAB_RESERVED_CONSOLE: GrantRef = GrantRef(0);

/// The xenstore ring, set up by the toolstack.
pub const GNTTAB_RESERVED_XENSTORE: GrantRef = GrantRef(1);

open_enum! {
    /// First argument of `Hypercall::GRANT_TABLE_OP` (`GNTTABOP_*`): operation, array, count.
    pub enum GrantTableOp: u32 {
        /// [`MapGrantRef`].
        MAP_GRANT_REF = 0,
        /// [`UnmapGrantRef`].
        UNMAP_GRANT_REF = 1,
        /// [`SetupTable`].
        SETUP_TABLE = 2,
        /// [`Copy`].
        COPY = 5,
        /// [`QuerySize`].
        QUERY_SIZE = 6,
        /// [`SetVersion`].
        SET_VERSION = 8,
        /// [`GetVersion`].
        GET_VERSION = 10,
    }
}

open_enum! {
    /// Result of a grant operation (`GNTST_*`).
    pub enum GrantStatus: i16 {
        /// Done.
        OKAY = 0,
        /// Undefined error.
        GENERAL_ERROR = -1,
        /// Unknown domain.
        BAD_DOMAIN = -2,
        /// Invalid grant reference.
        BAD_GNTREF = -3,
        /// Invalid mapping handle.
        BAD_HANDLE = -4,
        /// Invalid virtual address.
        BAD_VIRT_ADDR = -5,
        /// Invalid device address.
        BAD_DEV_ADDR = -6,
        /// No translation slot in the I/O MMU.
        NO_DEVICE_SPACE = -7,
        /// Permission denied.
        PERMISSION_DENIED = -8,
        /// Bad page.
        BAD_PAGE = -9,
        /// A copy crosses a page boundary.
        BAD_COPY_ARG = -10,
        /// Page address too large.
        ADDRESS_TOO_BIG = -11,
        /// Try again.
        EAGAIN = -12,
        /// Out of space.
        NO_SPACE = -13,
    }
}

/// Sizes the table, and tells where its frames are (PV).
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct SetupTable {
    /// Normally `DomId::SELF`.
    pub dom: DomId,
    /// Padding; zero.
    pub pad0: [u8; 2],
    /// Frames wanted.
    pub nr_frames: u32,
    /// OUT: result.
    pub status: GrantStatus,
    /// Padding; zero.
    pub pad1: [u8; 6],
    /// Address of an array of `nr_frames` frame numbers, OUT.
    pub frame_list: u64,
}
assert_layout!(SetupTable, size = 24, dom = 0, nr_frames = 4, status = 8, frame_list = 16);

/// Asks for the size of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct QuerySize {
    /// Normally `DomId::SELF`.
    pub dom: DomId,
    /// Padding; zero.
    pub pad0: [u8; 2],
    /// OUT: frames now.
    pub nr_frames: u32,
    /// OUT: frames at most.
    pub max_nr_frames: u32,
    /// OUT: result.
    pub status: GrantStatus,
    /// Padding; zero.
    pub pad1: [u8; 2],
}
assert_layout!(QuerySize, size = 16, dom = 0, nr_frames = 4, max_nr_frames = 8, status = 12);

/// Chooses the entry layout.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct SetVersion {
    /// IN and OUT: 1 or 2.
    pub version: u32,
}
assert_layout!(SetVersion, size = 4, version = 0);

/// Asks for the entry layout.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct GetVersion {
    /// Normally `DomId::SELF`.
    pub dom: DomId,
    /// Zero.
    pub pad: u16,
    /// OUT: 1 or 2.
    pub version: u32,
}
assert_layout!(GetVersion, size = 8, dom = 0, pad = 2, version = 4);

open_flags! {
    /// Flags of [`MapGrantRef`] (`GNTMAP_*`).
    pub struct MapFlags: u32 {
        /// For devices.
        const DEVICE_MAP = 1 << 0;
        /// For the CPU.
        const HOST_MAP = 1 << 1;
        /// Only for reading.
        const READONLY = 1 << 2;
        /// For user mode too.
        const APPLICATION_MAP = 1 << 3;
        /// `host_addr` is the machine address of a page table entry.
        const CONTAINS_PTE = 1 << 4;
    }
}

/// Maps a page another domain granted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct MapGrantRef {
    /// Where.
    pub host_addr: u64,
    /// How.
    pub flags: MapFlags,
    /// What.
    pub reference: GrantRef,
    /// Whose.
    pub dom: DomId,
    /// OUT: result.
    pub status: GrantStatus,
    /// OUT: for unmapping.
    pub handle: u32,
    /// OUT: machine address.
    pub dev_bus_addr: u64,
}
assert_layout!(
    MapGrantRef,
    size = 32,
    host_addr = 0,
    flags = 8,
    reference = 12,
    dom = 16,
    status = 18,
    handle = 20,
    dev_bus_addr = 24
);

/// Unmaps it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct UnmapGrantRef {
    /// Where it was.
    pub host_addr: u64,
    /// Its machine address, or 0.
    pub dev_bus_addr: u64,
    /// From mapping.
    pub handle: u32,
    /// OUT: result.
    pub status: GrantStatus,
    /// Padding; zero.
    pub pad0: [u8; 2],
}
assert_layout!(UnmapGrantRef, size = 24, host_addr = 0, dev_bus_addr = 8, handle = 16, status = 20);

/// One end of a [`Copy`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct CopyPtr {
    /// Frame number, or a grant reference in the low 32 bits.
    pub target: u64,
    /// Whose.
    pub domid: DomId,
    /// Byte offset in the page.
    pub offset: u16,
    /// Padding; zero.
    pub pad0: [u8; 4],
}
assert_layout!(CopyPtr, size = 16, target = 0, domid = 8, offset = 10);

open_flags! {
    /// Flags of [`Copy`] (`GNTCOPY_*`).
    pub struct CopyFlags: u16 {
        /// The source is a grant reference.
        const SOURCE_GREF = 1 << 0;
        /// The destination is a grant reference.
        const DEST_GREF = 1 << 1;
    }
}

/// Copies between pages without mapping them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Copy {
    /// From.
    pub source: CopyPtr,
    /// To.
    pub dest: CopyPtr,
    /// Bytes.
    pub len: u16,
    /// What the ends are.
    pub flags: CopyFlags,
    /// OUT: result.
    pub status: GrantStatus,
    /// Padding; zero.
    pub pad0: [u8; 2],
}
assert_layout!(Copy, size = 40, source = 0, dest = 16, len = 32, flags = 34, status = 36);

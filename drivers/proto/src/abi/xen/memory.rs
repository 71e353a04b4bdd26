//! Memory reservations and the physical map (`xen/include/public/memory.h`).

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::addr::{DomId, Pfn};

open_enum! {
    /// First argument of `Hypercall::MEMORY_OP` (`XENMEM_*`); the second points at the structure named.
    pub enum MemoryOp: u32 {
        /// [`Reservation`]: more machine frames; answers how many extents.
        INCREASE_RESERVATION = 0,
        /// [`Reservation`]: gives frames back; answers how many extents.
        DECREASE_RESERVATION = 1,
        /// Highest machine frame. No argument.
        MAXIMUM_RAM_PAGE = 2,
        /// [`Domain`]: pages the domain has.
        CURRENT_RESERVATION = 3,
        /// [`Domain`]: pages the domain may have.
        MAXIMUM_RESERVATION = 4,
        /// Frames of the machine-to-physical table.
        MACHPHYS_MFN_LIST = 5,
        /// [`Reservation`]: fills guest frames; answers how many extents.
        POPULATE_PHYSMAP = 6,
        /// [`AddToPhysmap`].
        ADD_TO_PHYSMAP = 7,
        /// [`MemoryMap`]: the E820-style map of this domain.
        MEMORY_MAP = 9,
        /// [`MemoryMap`] of the machine (privileged domains).
        MACHINE_MEMORY_MAP = 10,
        /// [`Exchange`].
        EXCHANGE = 11,
        /// [`MachphysMapping`].
        MACHPHYS_MAPPING = 12,
        /// [`Domain`]: highest guest frame.
        MAXIMUM_GPFN = 14,
        /// [`RemoveFromPhysmap`].
        REMOVE_FROM_PHYSMAP = 15,
    }
}

/// A list of extents (`struct xen_memory_reservation`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Reservation {
    /// Address of an array of frame numbers, IN or OUT as the operation says.
    pub extent_start: u64,
    /// Its length.
    pub nr_extents: u64,
    /// log2 of the pages in an extent.
    pub extent_order: u32,
    /// `XENMEMF_*`: bits 0..8 limit the address width.
    pub mem_flags: u32,
    /// Normally `DomId::SELF`.
    pub domid: DomId,
    /// Padding; zero.
    pub pad0: [u8; 6],
}
assert_layout!(
    Reservation,
    size = 32,
    extent_start = 0,
    nr_extents = 8,
    extent_order = 16,
    mem_flags = 20,
    domid = 24
);

/// Swaps extents for others, for example contiguous ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Exchange {
    /// Extents given back.
    pub give: Reservation,
    /// Extents wanted.
    pub take: Reservation,
    /// IN zero, OUT how many of `give` went.
    pub nr_exchanged: u64,
}
assert_layout!(Exchange, size = 72, give = 0, take = 32, nr_exchanged = 64);

/// A domain as an argument.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Domain {
    /// Normally `DomId::SELF`.
    pub domid: DomId,
}
assert_layout!(Domain, size = 2, domid = 0);

/// OUT: where the machine-to-physical table lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct MachphysMapping {
    /// First virtual address.
    pub v_start: u64,
    /// Behind the last.
    pub v_end: u64,
    /// Highest frame that can be looked up.
    pub max_mfn: u64,
}
assert_layout!(MachphysMapping, size = 24, v_start = 0, v_end = 8, max_mfn = 16);

open_enum! {
    /// What [`AddToPhysmap`] maps (`XENMAPSPACE_*`).
    pub enum MapSpace: u32 {
        /// The shared info page.
        SHARED_INFO = 0,
        /// A frame of the grant table.
        GRANT_TABLE = 1,
        /// Another guest frame.
        GMFN = 2,
    }
}

/// Puts a page of a [`MapSpace`] at a guest frame (translated guests).
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct AddToPhysmap {
    /// Normally `DomId::SELF`.
    pub domid: DomId,
    /// Pages, for ranges only.
    pub size: u16,
    /// What.
    pub space: MapSpace,
    /// Which of its pages.
    pub idx: u64,
    /// Where.
    pub gpfn: Pfn,
}
assert_layout!(AddToPhysmap, size = 24, domid = 0, size = 2, space = 4, idx = 8, gpfn = 16);

/// Unmaps a guest frame (translated guests).
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct RemoveFromPhysmap {
    /// Normally `DomId::SELF`.
    pub domid: DomId,
    /// Padding; zero.
    pub pad0: [u8; 6],
    /// Which.
    pub gpfn: Pfn,
}
assert_layout!(RemoveFromPhysmap, size = 16, domid = 0, gpfn = 8);

/// Asks for an E820-style map.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct MemoryMap {
    /// IN room, OUT entries stored.
    pub nr_entries: u32,
    /// Padding; zero.
    pub pad0: [u8; 4],
    /// Address of an array of [`E820Entry`].
    pub buffer: u64,
}
assert_layout!(MemoryMap, size = 16, nr_entries = 0, buffer = 8);

/// One entry of the map: packed to 20 bytes as the BIOS call has it (`hvm/e820.h`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C, packed(4))]
pub struct E820Entry {
    /// First byte.
    pub addr: u64,
    /// Bytes.
    pub size: u64,
    /// 1 RAM, 2 reserved, 3 ACPI, 4 NVS, 5 unusable.
    pub kind: u32,
}
assert_layout!(E820Entry, size = 20, addr = 0, size = 8, kind = 16);

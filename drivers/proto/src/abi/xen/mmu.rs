//! Page tables by hypercall, PV only (`xen/include/public/xen.h`).

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

open_enum! {
    /// Low two bits of [`MmuUpdate::ptr`] (`MMU_*`).
    pub enum MmuUpdateKind: u64 {
        /// A checked page-table entry.
        NORMAL_PT_UPDATE = 0,
        /// An entry of the machine-to-physical table.
        MACHPHYS_UPDATE = 1,
        /// As the first, keeping accessed and dirty bits.
        PT_UPDATE_PRESERVE_AD = 2,
    }
}

/// One write of `Hypercall::MMU_UPDATE`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct MmuUpdate {
    /// Machine address of the entry, with a [`MmuUpdateKind`] in bits 0 and 1.
    pub ptr: u64,
    /// The new entry.
    pub val: u64,
}
assert_layout!(MmuUpdate, size = 16, ptr = 0, val = 8);

open_enum! {
    /// What a [`MmuextOp`] does (`MMUEXT_*`).
    pub enum MmuextCmd: u32 {
        /// Validates and pins `arg1` (frame) as a page table.
        PIN_L1_TABLE = 0,
        /// The same, level 2.
        PIN_L2_TABLE = 1,
        /// The same, level 3.
        PIN_L3_TABLE = 2,
        /// The same, level 4.
        PIN_L4_TABLE = 3,
        /// Unpins `arg1` (frame).
        UNPIN_TABLE = 4,
        /// Loads CR3 with `arg1` (frame).
        NEW_BASEPTR = 5,
        /// Flushes the TLB of this vCPU.
        TLB_FLUSH_LOCAL = 6,
        /// Flushes `arg1` (address) on this vCPU.
        INVLPG_LOCAL = 7,
        /// Flushes the TLBs of the vCPUs in the mask at `arg2`.
        TLB_FLUSH_MULTI = 8,
        /// Flushes `arg1` on the vCPUs in the mask at `arg2`.
        INVLPG_MULTI = 9,
        /// Flushes all TLBs.
        TLB_FLUSH_ALL = 10,
        /// Flushes `arg1` everywhere.
        INVLPG_ALL = 11,
        /// Sets the LDT at `arg1` (address), `arg2` entries.
        SET_LDT = 13,
        /// Sets the user page table to `arg1` (frame).
        NEW_USER_BASEPTR = 15,
        /// Zeroes `arg1` (frame).
        CLEAR_PAGE = 16,
        /// Copies frame `arg2` to frame `arg1`.
        COPY_PAGE = 17,
    }
}

/// One operation of `Hypercall::MMUEXT_OP`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct MmuextOp {
    /// What.
    pub cmd: MmuextCmd,
    /// Padding; zero.
    pub pad0: [u8; 4],
    /// Machine frame or linear address.
    pub arg1: u64,
    /// Count, address of a vCPU mask, or machine frame.
    pub arg2: u64,
}
assert_layout!(MmuextOp, size = 24, cmd = 0, arg1 = 8, arg2 = 16);

open_flags! {
    /// Flags of `UPDATE_VA_MAPPING` (`UVMF_*`). With `TLB_FLUSH` or `INVLPG` and not `ALL`: this vCPU only.
    pub struct UvmFlags: u64 {
        /// Flush the TLB.
        const TLB_FLUSH = 1;
        /// Flush the address.
        const INVLPG = 2;
        /// On all vCPUs.
        const ALL = 4;
    }
}

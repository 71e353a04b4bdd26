//! Page tables (PV only) and memory reservations.
// UNSAFETY: hands addresses to the hypervisor.
#![expect(unsafe_code, reason = "hands addresses to the hypervisor")]

use janus_proto::abi::xen::memory::{
    AddToPhysmap, MachphysMapping, MapSpace, MemoryOp, Reservation,
};
use janus_proto::abi::xen::mmu::{MmuUpdate, MmuUpdateKind, MmuextCmd, MmuextOp, UvmFlags};
use janus_proto::abi::xen::{Errno, Hypercall, MulticallEntry};
use janus_proto::addr::{DomId, Mfn, Pfn};

use super::{Result, address, address_mut, call};

/// Makes `updates` in order; stops at the first that Xen refuses.
///
/// # Errors
/// Xen refused one.
///
/// # Safety
/// The new mappings break no rule that safe code relies on.
pub unsafe fn mmu_update(updates: &[MmuUpdate]) -> Result<()> {
    if updates.is_empty() {
        return Ok(());
    }
    let args = [address(updates), updates.len() as u64, 0, DomId::SELF.0.into(), 0];
    // SAFETY: Xen reads the array; the caller answers for the mappings.
    unsafe { call(Hypercall::MMU_UPDATE, args) }.map(drop)
}

/// Sets the last-level entry of `va`, whose tables exist.
///
/// # Errors
/// Xen refused it.
///
/// # Safety
/// As for [`mmu_update`].
pub unsafe fn update_va_mapping(va: usize, entry: u64, flush: UvmFlags) -> Result<()> {
    // SAFETY: no pointers; the caller answers for the mapping.
    unsafe { call(Hypercall::UPDATE_VA_MAPPING, [va as u64, entry, flush.bits(), 0, 0]) }.map(drop)
}

/// Forgets all cached translations, on all CPUs.
///
/// # Errors
/// There is no Xen.
pub fn flush_tlb_all() -> Result<()> {
    let op = MmuextOp { cmd: MmuextCmd::TLB_FLUSH_ALL, pad0: [0; 4], arg1: 0, arg2: 0 };
    // SAFETY: Xen reads the structure; a flush changes no mapping.
    unsafe { call(Hypercall::MMUEXT_OP, [address(&op), 1, 0, DomId::SELF.0.into(), 0]) }.map(drop)
}

/// An [`update_va_mapping`] without a flush, for [`multicall`].
#[must_use]
pub fn update_va_mapping_entry(va: usize, entry: u64) -> MulticallEntry {
    MulticallEntry {
        op: Hypercall::UPDATE_VA_MAPPING.0,
        result: 0,
        args: [va as u64, entry, UvmFlags::empty().bits(), 0, 0, 0],
    }
}

/// An [`mmu_update`] for [`multicall`]; `updates` lives until that is made.
#[must_use]
pub fn mmu_update_entry(updates: &[MmuUpdate]) -> MulticallEntry {
    MulticallEntry {
        op: Hypercall::MMU_UPDATE.0,
        result: 0,
        args: [address(updates), updates.len() as u64, 0, DomId::SELF.0.into(), 0, 0],
    }
}

/// Makes all `calls` in one hypercall; the error is that of the first that failed.
///
/// # Errors
/// One of them failed.
///
/// # Safety
/// As for the calls themselves; what they point to is still there.
pub unsafe fn multicall(calls: &mut [MulticallEntry]) -> Result<()> {
    // SAFETY: Xen reads the entries and writes their results; the caller answers for the calls.
    unsafe { call(Hypercall::MULTICALL, [address_mut(calls), calls.len() as u64, 0, 0, 0]) }?;
    calls.iter().try_for_each(|entry| Errno::check(entry.result.cast_signed()).map(drop))
}

/// Answers how many of the single-page `extents` were done; they are frame numbers in and out.
///
/// # Safety
/// As for the operation.
unsafe fn reservation(op: MemoryOp, extents: &mut [u64]) -> Result<usize> {
    let argument = Reservation {
        extent_start: address_mut(extents),
        nr_extents: extents.len() as u64,
        extent_order: 0,
        mem_flags: 0,
        domid: DomId::SELF,
        pad0: [0; 6],
    };
    // SAFETY: Xen reads the structure and reads or writes the list.
    let done = unsafe { call(Hypercall::MEMORY_OP, [op.0.into(), address(&argument), 0, 0, 0]) }?;
    Ok(usize::try_from(done).unwrap_or(usize::MAX).min(extents.len()))
}

/// Gives frames back to Xen: machine frames under PV, guest frames otherwise. Answers how many of
/// them, from the first, Xen took.
///
/// # Errors
/// Xen refused.
///
/// # Safety
/// Nobody uses the frames, and under PV nothing maps them.
pub unsafe fn decrease_reservation(frames: &mut [u64]) -> Result<usize> {
    // SAFETY: the caller's promise.
    unsafe { reservation(MemoryOp::DECREASE_RESERVATION, frames) }
}

/// Puts memory under guest frames; under PV the list comes back as machine frames. Answers how many,
/// from the first, Xen gave.
///
/// # Errors
/// Xen refused.
///
/// # Safety
/// The frames are this domain's and have no memory now.
pub unsafe fn populate_physmap(frames: &mut [u64]) -> Result<usize> {
    // SAFETY: the caller's promise.
    unsafe { reservation(MemoryOp::POPULATE_PHYSMAP, frames) }
}

/// Puts a page of Xen's under a guest frame (PVH).
///
/// # Errors
/// Xen refused.
///
/// # Safety
/// The frame is the caller's; its contents are replaced.
pub unsafe fn add_to_physmap(space: MapSpace, index: u64, frame: Pfn) -> Result<()> {
    let argument = AddToPhysmap { domid: DomId::SELF, size: 0, space, idx: index, gpfn: frame };
    // SAFETY: Xen reads the structure; the caller answers for the frame.
    unsafe {
        call(Hypercall::MEMORY_OP, [MemoryOp::ADD_TO_PHYSMAP.0.into(), address(&argument), 0, 0, 0])
    }
    .map(drop)
}

/// Where Xen's machine-to-physical table is (PV).
///
/// # Errors
/// There is no Xen, or it does not say.
pub fn machphys_mapping() -> Result<MachphysMapping> {
    let mut mapping = MachphysMapping { v_start: 0, v_end: 0, max_mfn: 0 };
    let args = [MemoryOp::MACHPHYS_MAPPING.0.into(), address_mut(&mut mapping), 0, 0, 0];
    // SAFETY: Xen writes the structure.
    unsafe { call(Hypercall::MEMORY_OP, args) }.map(|_| mapping)
}

/// Tells Xen that machine frame `mfn` is our frame `pfn` (PV).
///
/// # Errors
/// Not our frame.
pub fn set_machine_to_physical(mfn: Mfn, pfn: Pfn) -> Result<()> {
    let update = MmuUpdate { ptr: mfn.0 << 12 | MmuUpdateKind::MACHPHYS_UPDATE.0, val: pfn.0 };
    // SAFETY: changes Xen's table of names, not a mapping.
    unsafe { mmu_update(&[update]) }
}

//! Memory for virtio devices of a Xen guest: what is a guest physical address to this kernel is none to a device.
//!
//! A PV guest's device finds memory by its machine address ([`MACHINE_FRAMES`]), or, where the host wants it so, only
//! what was granted to it, at `1 << 63 | reference << 12` ([`GRANTED_FRAMES`]; `drivers/xen/grant-dma-ops.c` in Linux).
//! Buffers come from pools and are used again, so a page is granted once and not for every request.
// UNSAFETY: implements the contract of `FrameSource`, and grants what it allocates.
#![expect(unsafe_code, reason = "pages for devices, at addresses that devices know")]

use alloc::collections::BTreeMap;
use alloc::vec::Vec;
use core::ptr::NonNull;

use janus_front::dma::FrameSource;
use janus_front::virtio::baseline::DeviceFrames;
use janus_proto::addr::{DomId, Gpa, GrantRef, PAGE_SHIFT, PAGE_SIZE, Pfn};
use janus_proto::grant::Access;

use super::grant;
use crate::mm::frames::FRAMES;
use crate::mm::paging::pv;
use crate::platform::lock::IrqLock;

/// Allocations that are tried until one is contiguous in the machine.
const TRIES: usize = 8;
/// Marks an address as a grant reference (`XEN_GRANT_DMA_ADDR_OFF`).
const GRANT: u64 = 1 << 63;

/// Frames that a device finds at their machine addresses.
#[derive(Clone, Copy, Debug)]
pub(crate) struct MachineFrames;

/// The one value of [`MachineFrames`].
pub(crate) static MACHINE_FRAMES: MachineFrames = MachineFrames;

/// Whether pages of ours are contiguous in the machine.
fn is_contiguous(first: Pfn, pages: usize) -> bool {
    let Some(start) = pv::mfn(first) else { return false };
    let next = |index: u64| pv::mfn(Pfn(first.0 + index)).is_some_and(|m| m.0 == start.0 + index);
    (1..pages as u64).all(next)
}

// SAFETY: as that of `KernelFrames`, which does all of it: what is here is only which of its frames are handed on, and
// the address by which a device finds them, which stays: the machine frame of a page changes only while the balloon
// owns it.
unsafe impl FrameSource for MachineFrames {
    fn allocate(&self, pages: usize) -> Option<NonNull<u8>> {
        let mut scattered = Vec::new();
        let mut found = None;
        while found.is_none() && scattered.len() < TRIES {
            let memory = FRAMES.allocate(pages)?;
            if is_contiguous(Pfn::containing(FRAMES.guest_address(memory)), pages) {
                found = Some(memory);
            } else {
                scattered.push(memory);
            }
        }
        for memory in scattered {
            // SAFETY: allocated above, and nobody has seen it.
            unsafe { FRAMES.free(memory, pages) };
        }
        found
    }
    unsafe fn free(&self, start: NonNull<u8>, pages: usize) {
        // SAFETY: the caller's promise; it came from there.
        unsafe { FRAMES.free(start, pages) };
    }
    fn guest_address(&self, memory: NonNull<u8>) -> Gpa {
        let Gpa(address) = FRAMES.guest_address(memory);
        // All memory that is handed out has a machine frame; without one there is no address to give.
        let frame = pv::mfn(Pfn::containing(Gpa(address))).map_or(0, |mfn| mfn.0);
        Gpa((frame << PAGE_SHIFT) | (address % PAGE_SIZE as u64))
    }
}

/// The virtio drivers on [`MACHINE_FRAMES`].
#[derive(Clone, Copy, Debug)]
pub(crate) struct Machine;

// SAFETY: see `MachineFrames`.
unsafe impl DeviceFrames for Machine {
    const ANY_MEMORY: bool = false;
    fn frames() -> &'static dyn FrameSource {
        &MACHINE_FRAMES
    }
}

/// Frames that are granted to the devices' domain as long as they are allocated.
#[derive(Debug)]
pub(crate) struct GrantedFrames {
    /// The reference of the first page of each allocation, and how many there are, by address.
    granted: IrqLock<BTreeMap<usize, (GrantRef, usize)>>,
    peer: DomId,
}

/// Granted to domain 0, where the devices of a guest of `janus` are.
pub(crate) static GRANTED_FRAMES: GrantedFrames =
    GrantedFrames { granted: IrqLock::new(BTreeMap::new()), peer: DomId(0) };

// SAFETY: as that of `KernelFrames`, whose frames these are. The address stays until `free`, which gives a page back
// only when its grant has ended.
unsafe impl FrameSource for GrantedFrames {
    fn allocate(&self, pages: usize) -> Option<NonNull<u8>> {
        let memory = FRAMES.allocate(pages)?;
        let start = FRAMES.guest_address(memory);
        // SAFETY: the pages are freed only after `end`, in `free`; a `FrameSource`'s memory is seen by its owner alone
        // or, while a device has it, as atomics or by nobody.
        match unsafe { grant::grant_run(self.peer, start, pages, Access::ReadWrite) } {
            Ok(first) => {
                self.granted.lock().insert(memory.addr().get(), (first, pages));
                Some(memory)
            }
            Err(error) => {
                log::warn!("no memory for virtio devices: {error}");
                // SAFETY: allocated above, and nobody has seen it.
                unsafe { FRAMES.free(memory, pages) };
                None
            }
        }
    }
    unsafe fn free(&self, start: NonNull<u8>, pages: usize) {
        let Some((first, count)) = self.granted.lock().remove(&start.addr().get()) else { return };
        debug_assert_eq!(count, pages, "freed as it was allocated");
        for index in 0..u32::try_from(count).unwrap_or(0) {
            // SAFETY: inside the allocation.
            let page = unsafe { start.add(index as usize * PAGE_SIZE) };
            match grant::end(GrantRef(first.0 + index)) {
                // SAFETY: the caller's promise; no device can reach the page any more.
                Ok(()) => unsafe { FRAMES.free(page, 1) },
                Err(error) => log::warn!("a page of a virtio device stays out of use: {error}"),
            }
        }
    }
    fn guest_address(&self, memory: NonNull<u8>) -> Gpa {
        let address = memory.addr().get();
        let granted = self.granted.lock();
        let found = granted.range(..=address).next_back();
        let reference = found.and_then(|(start, (first, pages))| {
            let page = (address - start) / PAGE_SIZE;
            (page < *pages).then_some(u64::from(first.0) + page as u64)
        });
        // Reference 0 is the console's: an address that no device can use as memory of ours.
        Gpa(GRANT | (reference.unwrap_or(0) << PAGE_SHIFT) | (address % PAGE_SIZE) as u64)
    }
}

/// The virtio drivers on [`GRANTED_FRAMES`].
#[derive(Clone, Copy, Debug)]
pub(crate) struct Granted;

// SAFETY: see `GrantedFrames`.
unsafe impl DeviceFrames for Granted {
    const ANY_MEMORY: bool = false;
    fn frames() -> &'static dyn FrameSource {
        &GRANTED_FRAMES
    }
}

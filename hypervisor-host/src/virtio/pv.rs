//! Memory of PV guests for virtio devices: by machine address, or by grant reference only.
//!
//! Both are what a guest's platform gives a driver as the address for a device (`VIRTIO_F_ACCESS_PLATFORM`). A machine
//! address is what Linux's `xen-swiotlb` gives; a device may then use whatever memory the guest has, other than its
//! page tables. `1 << 63 | reference << 12 | offset` is what its `xen-grant-dma` gives
//! (`drivers/xen/grant-dma-ops.c`); a device then sees what was granted to it, page by page.

use std::fmt;
use std::ops::Deref;
use std::sync::Arc;
use std::sync::atomic::AtomicU32;

use janus_proto::addr::{Gpa, GrantRef, Mfn, PAGE_SIZE};
use janus_proto::grant::Access;

use super::memory::{GuestMemory, Pinned, frames_of, whole_pages};
use crate::machine::ram::Ram;
use crate::memory::GrantMapper;
use crate::pv::domain::Domain;
use crate::pv::space::Space;

/// A guest's memory by machine address.
#[derive(Clone)]
pub struct MachineMemory {
    ram: Arc<Ram>,
    space: Arc<dyn Space>,
}

impl fmt::Debug for MachineMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("MachineMemory")
    }
}

/// References to frames that follow each other.
struct Frames {
    memory: MachineMemory,
    first: Mfn,
    count: u64,
    access: Access,
}

impl Drop for Frames {
    fn drop(&mut self) {
        for index in 0..self.count {
            self.memory.space.put(Mfn(self.first.0 + index), self.access);
        }
    }
}

impl Deref for Frames {
    type Target = [AtomicU32];
    fn deref(&self) -> &[AtomicU32] {
        self.memory.ram.words(self.first, self.count).unwrap_or_default()
    }
}

impl MachineMemory {
    /// All of a domain's.
    #[must_use]
    pub fn new(domain: &Domain) -> Self {
        Self { ram: Arc::clone(domain.ram()), space: Arc::clone(&domain.space) }
    }

    /// Holds the frames of a range: none of them is a page table, or becomes one, while it is written.
    fn hold(&self, address: Gpa, len: usize, access: Access) -> Option<(Frames, usize)> {
        let page = PAGE_SIZE as u64;
        let offset = usize::try_from(address.0 % page).ok()?;
        let first = Mfn(address.0 / page);
        let wanted = frames_of(offset, len);
        self.ram.words(first, wanted)?;
        let mut held = Frames { memory: self.clone(), first, count: 0, access };
        while held.count < wanted {
            self.space.get(Mfn(first.0 + held.count), access).then_some(())?;
            held.count += 1;
        }
        Some((held, offset))
    }
}

impl GuestMemory for MachineMemory {
    fn with(
        &self,
        address: Gpa,
        len: usize,
        access: Access,
        with: &mut dyn FnMut(&[AtomicU32], usize),
    ) -> Option<()> {
        let (held, offset) = self.hold(address, len, access)?;
        with(&held, offset);
        Some(())
    }

    fn pin(&self, address: Gpa, len: usize, access: Access) -> Option<Pinned> {
        let (held, offset) = self.hold(address, len, access)?;
        Pinned::new(held, offset, len)
    }

    fn discard(&self, address: Gpa, len: usize) -> Option<u64> {
        let mut count = 0;
        for page in whole_pages(address, len)? {
            // Held, so that it is the guest's and no page table.
            let page = Gpa(page * PAGE_SIZE as u64);
            let (held, _) = self.hold(page, PAGE_SIZE, Access::ReadWrite)?;
            count += u64::from(self.ram.discard(held.first));
        }
        Some(count)
    }

    fn needs_platform_addresses(&self) -> bool {
        true
    }
}

/// Marks an address as a grant reference (`XEN_GRANT_DMA_ADDR_OFF`).
const GRANT: u64 = 1 << 63;

/// A guest's memory by grant reference.
#[derive(Clone)]
pub struct GrantedMemory<G> {
    grants: G,
}

impl<G> fmt::Debug for GrantedMemory<G> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("GrantedMemory")
    }
}

impl<G: GrantMapper> GrantedMemory<G> {
    /// What a guest grants to domain 0.
    #[must_use]
    pub fn new(grants: G) -> Self {
        Self { grants }
    }

    fn map(&self, address: Gpa, len: usize, access: Access) -> Option<(G::Mapping, usize)> {
        let page = PAGE_SIZE as u64;
        let place = address.0.checked_sub(GRANT)?;
        let offset = usize::try_from(place % page).ok()?;
        let first = u32::try_from(place / page).ok()?;
        // Longer than any request has a use for: a guest has fewer references.
        let count = u32::try_from(frames_of(offset, len)).ok().filter(|count| *count <= 1 << 16)?;
        let references: Vec<_> = (first..first.checked_add(count)?).map(GrantRef).collect();
        Some((self.grants.map(&references, access).ok()?, offset))
    }
}

impl<G> GuestMemory for GrantedMemory<G>
where
    G: GrantMapper<Mapping: Send + Sync + 'static> + Send + Sync,
{
    fn with(
        &self,
        address: Gpa,
        len: usize,
        access: Access,
        with: &mut dyn FnMut(&[AtomicU32], usize),
    ) -> Option<()> {
        if len == 0 {
            with(&[], 0);
            return Some(());
        }
        let (pages, offset) = self.map(address, len, access)?;
        with(&pages, offset);
        Some(())
    }

    fn pin(&self, address: Gpa, len: usize, access: Access) -> Option<Pinned> {
        let (pages, offset) = self.map(address, len, access)?;
        Pinned::new(pages, offset, len)
    }

    fn needs_platform_addresses(&self) -> bool {
        true
    }
}

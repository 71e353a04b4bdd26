//! [`Memory`] as the rest of a domain uses it: behind one lock.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use janus_proto::abi::xen::grant_table::{GrantStatus, MapFlags};
use janus_proto::abi::xen::{Errno, Hypercall};
use janus_proto::addr::{Mfn, PAGE_SIZE};
use janus_proto::grant::Access;

use super::entry::Entry;
use super::fault::{Outcome, Table};
use super::frame::Kind;
use super::{Memory, machine_to_physical};
use crate::engine::{Fault, Vcpu};
use crate::machine::ram::Ram;
use crate::pv::grant::FrameTypes;
use crate::pv::report::WalkStep;
use crate::pv::space::{Resolution, Space, TableWrite};

/// The memory of a domain, for all its threads.
#[derive(Debug)]
pub struct SharedMemory {
    memory: Mutex<Memory>,
    ram: Arc<Ram>,
}

impl SharedMemory {
    /// Puts the lock around it.
    #[must_use]
    pub fn new(memory: Memory) -> Arc<Self> {
        let ram = Arc::clone(memory.ram());
        Arc::new(Self { memory: Mutex::new(memory), ram })
    }

    /// Frames that the guest has now.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.memory.lock().unwrap_or_else(PoisonError::into_inner).pages()
    }

    /// The frames.
    #[must_use]
    pub fn ram(&self) -> &Arc<Ram> {
        &self.ram
    }

    /// The memory itself, while nobody else uses it.
    pub fn lock(&self) -> MutexGuard<'_, Memory> {
        self.memory.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl FrameTypes for SharedMemory {
    fn get(&self, frame: Mfn, access: Access) -> bool {
        let mut memory = self.lock();
        match access {
            Access::ReadOnly => memory.get_page(frame).is_ok(),
            Access::ReadWrite => memory.get_page_and_type(frame, Kind::Writable).is_ok(),
        }
    }

    fn put(&self, frame: Mfn, access: Access) {
        let mut memory = self.lock();
        match access {
            Access::ReadOnly => memory.put_page(frame),
            Access::ReadWrite => memory.put_page_and_type(frame),
        }
    }
}

impl Space for SharedMemory {
    fn read(&self, vcpu: usize, address: u64, buf: &mut [u8]) -> Result<(), Errno> {
        let mut memory = self.lock();
        if (machine_to_physical::START..machine_to_physical::END).contains(&address) {
            // An emulated load from where Xen has its table.
            let bytes = memory.m2p_load(address).ok_or(Errno::EFAULT)?.to_le_bytes();
            buf.copy_from_slice(bytes.get(..buf.len()).ok_or(Errno::EFAULT)?);
            return Ok(());
        }
        memory.copy_from_guest(vcpu, address, buf)
    }

    fn write(&self, vcpu: usize, address: u64, bytes: &[u8]) -> Result<(), Errno> {
        self.lock().copy_to_guest(vcpu, address, bytes)
    }

    fn fault(&self, vcpu: usize, engine: &mut dyn Vcpu, fault: &Fault) -> Resolution {
        let mut memory = self.lock();
        match memory.fault(vcpu, engine, fault) {
            Outcome::Resolved => Resolution::Retry,
            Outcome::Unmappable => Resolution::Emulate,
            Outcome::Protection(_) if memory.is_table_write(vcpu, fault) => Resolution::Emulate,
            Outcome::NotMapped(error) | Outcome::Protection(error) => Resolution::Guest(error),
        }
    }

    fn write_table(
        &self,
        vcpu: usize,
        engine: &mut dyn Vcpu,
        address: u64,
        old: Option<u64>,
        new: u64,
        size: usize,
    ) -> Option<TableWrite> {
        self.lock().write_table(vcpu, engine, address, old, new, size)
    }

    fn permit(&self, frame: Mfn) {
        self.lock().devices.insert(frame);
    }

    fn device_frame(&self, vcpu: usize, address: u64, write: bool) -> Option<Mfn> {
        let memory = self.lock();
        if memory.devices.is_empty() {
            return None;
        }
        let leaf = memory.walk(memory.root(vcpu)?, address)?;
        let frame = leaf.entry.frame();
        (memory.devices.contains(&frame) && (leaf.write || !write)).then_some(frame)
    }

    fn hypercall(
        &self,
        vcpu: usize,
        engine: &mut dyn Vcpu,
        number: Hypercall,
        arguments: [u64; 6],
    ) -> Option<Result<u64, Errno>> {
        let call = match number {
            Hypercall::MMU_UPDATE => Memory::mmu_update,
            Hypercall::MMUEXT_OP => Memory::mmuext_op,
            Hypercall::UPDATE_VA_MAPPING => Memory::update_va_mapping,
            Hypercall::MEMORY_OP => Memory::memory_op,
            Hypercall::SET_GDT => Memory::set_gdt,
            Hypercall::UPDATE_DESCRIPTOR => {
                return Some(self.lock().update_descriptor(engine, arguments));
            }
            // No domain has power over another.
            Hypercall::UPDATE_VA_MAPPING_OTHERDOMAIN => {
                let [address, entry, flags, domain, ..] = arguments;
                return Some(super::update::only_itself(domain).and_then(|()| {
                    let own = [address, entry, flags, 0, 0, 0];
                    self.lock().update_va_mapping(vcpu, engine, own)
                }));
            }
            _ => return None,
        };
        Some(call(&mut self.lock(), vcpu, engine, arguments))
    }

    fn switch_mode(&self, vcpu: usize, engine: &mut dyn Vcpu, user: bool) -> bool {
        let mut memory = self.lock();
        let Some(cpu) = memory.cpus.get_mut(vcpu) else { return false };
        let Some(root) = (if user { cpu.user_root } else { cpu.root }) else { return false };
        if cpu.user != user {
            cpu.user = user;
            engine.switch(root);
        }
        true
    }

    fn initialise(&self, vcpu: usize, root: Mfn, user_root: Option<Mfn>) -> Result<(), Errno> {
        self.lock().initialise(vcpu, root, user_root)
    }

    fn load(&self, vcpu: usize, engine: &mut dyn Vcpu) {
        let memory = self.lock();
        if let Some(root) = memory.root(vcpu) {
            engine.switch(root);
        }
    }

    fn map_grant(
        &self,
        vcpu: usize,
        engine: &mut dyn Vcpu,
        address: u64,
        flags: MapFlags,
        frame: Mfn,
    ) -> Result<(), GrantStatus> {
        let mut bits = Entry::PRESENT | Entry::ACCESSED | Entry::DIRTY;
        if !flags.contains(MapFlags::READONLY) {
            bits |= Entry::WRITE;
        }
        if flags.contains(MapFlags::APPLICATION_MAP) {
            bits |= Entry::USER;
        }
        let mut memory = self.lock();
        let place = memory.grant_entry(vcpu, address, flags)?;
        let entry = Entry(frame.0 << 12 | bits);
        let result = memory.set_entry(engine, place.frame, 1, place.index, entry, false);
        memory.resident.apply(engine);
        result.map_err(|_| GrantStatus::GENERAL_ERROR)
    }

    fn unmap_grant(
        &self,
        vcpu: usize,
        engine: &mut dyn Vcpu,
        address: u64,
        replace: Option<u64>,
        flags: MapFlags,
        frame: Mfn,
    ) -> Result<(), GrantStatus> {
        let mut memory = self.lock();
        let place = memory.grant_entry(vcpu, address, flags)?;
        let entry = memory.read_entry(place.frame, place.index);
        // As it was made: whoever has changed it since has a mapping of its own (XSA-234).
        let as_made = entry.is_writable() != flags.contains(MapFlags::READONLY);
        if !entry.is_present() || entry.frame() != frame || !as_made {
            return Err(GrantStatus::GENERAL_ERROR);
        }
        let from = match replace {
            Some(address) => {
                let root = memory.root(vcpu).ok_or(GrantStatus::GENERAL_ERROR)?;
                Some(memory.table_of_pages(root, address).ok_or(GrantStatus::GENERAL_ERROR)?)
            }
            None => None,
        };
        let new = from.map_or(Entry(0), |from| memory.read_entry(from.frame, from.index));
        let mut result = memory.set_entry(engine, place.frame, 1, place.index, new, false);
        if let Some(from) = from.filter(|_| result.is_ok()) {
            result = memory.set_entry(engine, from.frame, 1, from.index, Entry(0), false);
        }
        memory.resident.apply(engine);
        result.map_err(|_| GrantStatus::GENERAL_ERROR)
    }

    fn is_mapped(&self, frame: Mfn) -> bool {
        // One reference is Xen's own; a mapping that only reads has no use, but a reference.
        self.lock().frame(frame).is_some_and(|frame| frame.references > 1)
    }

    fn roots(&self, vcpu: usize) -> (Option<Mfn>, Option<Mfn>) {
        let memory = self.lock();
        memory.cpus.get(vcpu).map_or((None, None), |cpu| (cpu.root, cpu.user_root))
    }

    fn walk(&self, vcpu: usize, address: u64) -> Vec<WalkStep> {
        let memory = self.lock();
        memory.root(vcpu).map_or_else(Vec::new, |root| memory.steps(root, address))
    }
}

impl Memory {
    /// Gives a CPU that is down its page tables.
    ///
    /// # Errors
    /// `EINVAL`: one of them is no top page table, or the CPU has some already.
    pub fn initialise(
        &mut self,
        vcpu: usize,
        root: Mfn,
        user_root: Option<Mfn>,
    ) -> Result<(), Errno> {
        if self.cpus.get(vcpu).is_none_or(|cpu| cpu.root.is_some()) {
            return Err(Errno::EINVAL);
        }
        self.get_page_and_type(root, Kind::L4)?;
        if let Some(user_root) = user_root
            && let Err(error) = self.get_page_and_type(user_root, Kind::L4)
        {
            self.put_page_and_type(root);
            return Err(error);
        }
        if let Some(cpu) = self.cpus.get_mut(vcpu) {
            (cpu.root, cpu.user_root) = (Some(root), user_root);
        }
        Ok(())
    }

    /// The entry of a table of pages that a grant is to be mapped by: named itself, or by the address it maps.
    fn grant_entry(
        &self,
        vcpu: usize,
        address: u64,
        flags: MapFlags,
    ) -> Result<Table, GrantStatus> {
        if !flags.contains(MapFlags::CONTAINS_PTE) {
            return self
                .root(vcpu)
                .and_then(|root| self.table_of_pages(root, address))
                .ok_or(GrantStatus::GENERAL_ERROR);
        }
        let frame = Mfn(address >> 12);
        let known = self.frame(frame).ok_or(GrantStatus::GENERAL_ERROR)?;
        if known.kind != Kind::L1 || known.uses == 0 || !address.is_multiple_of(8) {
            return Err(GrantStatus::GENERAL_ERROR);
        }
        let index = usize::try_from(address % PAGE_SIZE as u64 / 8).unwrap_or(0);
        Ok(Table { frame, index })
    }

    /// The table of pages that is mapped, read-only, at an address; its entry there.
    fn mapped_table(&self, vcpu: usize, address: u64) -> Option<Table> {
        let leaf = self.walk(self.root(vcpu)?, address)?;
        let frame = leaf.entry.frame();
        let known = self.frame(frame)?;
        let index = usize::try_from(address % PAGE_SIZE as u64 / 8).ok()?;
        (known.kind == Kind::L1 && known.uses > 0 && known.validated)
            .then_some(Table { frame, index })
    }

    /// Whether a fault is the guest's kernel writing to a table of pages (`pv_ro_page_fault`).
    fn is_table_write(&self, vcpu: usize, fault: &Fault) -> bool {
        let user = self.cpus.get(vcpu).is_some_and(|cpu| cpu.user);
        fault.error & 2 != 0 && !user && self.mapped_table(vcpu, fault.address).is_some()
    }

    /// Makes such a write (`ptwr_emulated_update`): naturally aligned, of at most an entry.
    fn write_table(
        &mut self,
        vcpu: usize,
        engine: &mut dyn Vcpu,
        address: u64,
        old: Option<u64>,
        new: u64,
        size: usize,
    ) -> Option<TableWrite> {
        if !matches!(size, 1 | 2 | 4 | 8) || !address.is_multiple_of(size as u64) {
            return None;
        }
        let place = self.mapped_table(vcpu, address)?;
        let shift = u32::try_from(address % 8 * 8).ok()?;
        let mask = if size == 8 { u64::MAX } else { ((1 << (size * 8)) - 1) << shift };
        let entry = self.read_entry(place.frame, place.index);
        let there = (entry.0 & mask) >> shift;
        if old.is_some_and(|old| old != there) {
            return Some(TableWrite::Differs(there));
        }
        let new = Entry(entry.0 & !mask | new << shift & mask);
        let result = self.set_entry(engine, place.frame, 1, place.index, new, false);
        self.resident.apply(engine);
        result.ok().map(|()| TableWrite::Done)
    }
}

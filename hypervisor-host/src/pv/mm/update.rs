//! Changes of single page table entries: `mmu_update` and `update_va_mapping`.

use std::sync::atomic::Ordering;

use janus_proto::abi::xen::Errno;
use janus_proto::abi::xen::mmu::{MmuUpdate, MmuUpdateKind, UvmFlags};
use janus_proto::addr::{DomId, Mfn, PAGE_SIZE};

use super::Memory;
use super::entry::{Entry, is_guest_slot};
use super::fault::Table;
use super::frame::Kind;
use crate::engine::Vcpu;

/// Set in a count by a hypercall that Xen goes on with (`MMU_UPDATE_PREEMPTED`).
const PREEMPTED: u64 = 1 << 31;

/// The count argument of `mmu_update` and `mmuext_op`.
pub(super) fn count(argument: u64) -> u64 {
    argument & 0xffff_ffff & !PREEMPTED
}

/// `MMU_PT_UPDATE_NO_TRANSLATE`: frames of PV guests are never translated.
const PT_UPDATE_NO_TRANSLATE: MmuUpdateKind = MmuUpdateKind(3);

/// What a domain argument says: no domain has power over another here. Domain 0, and Xen's own, are there; others not.
pub(super) fn only_itself(domain: u64) -> Result<(), Errno> {
    match DomId(u16::try_from(domain & 0xffff).unwrap_or(0)) {
        DomId::SELF => Ok(()),
        DomId(0) | DomId::IO | DomId::XEN => Err(Errno::EPERM),
        _ => Err(Errno::ESRCH),
    }
}

/// The argument of `mmu_update`, whose upper half names the owner of the tables, plus one.
fn whose(domain: u64) -> Result<(), Errno> {
    match domain >> 16 & 0xffff {
        0 => {}
        tables_of => only_itself(tables_of - 1)?,
    }
    match DomId(u16::try_from(domain & 0xffff).unwrap_or(0)) {
        // Pages of devices can be named, and this domain has none.
        DomId::IO => Err(Errno::EINVAL),
        _ => only_itself(domain),
    }
}

impl Memory {
    /// `mmu_update(updates, count, done, domain)`.
    ///
    /// # Errors
    /// That of the first update that is refused; those before it are made.
    pub fn mmu_update(
        &mut self,
        vcpu: usize,
        engine: &mut dyn Vcpu,
        [updates, number, done, domain, ..]: [u64; 6],
    ) -> Result<u64, Errno> {
        let number = count(number);
        if number == 0 {
            return Ok(0);
        }
        whose(domain)?;
        let mut made = 0;
        let mut result = Ok(0);
        while made < number {
            let address = made
                .checked_mul(size_of::<MmuUpdate>() as u64)
                .and_then(|offset| updates.checked_add(offset));
            result = address
                .ok_or(Errno::EFAULT)
                .and_then(|address| self.fetch::<MmuUpdate>(vcpu, address))
                .and_then(|update| self.update_entry(engine, update));
            if result.is_err() {
                break;
            }
            made += 1;
        }
        self.resident.apply(engine);
        if done != 0 {
            let made = u32::try_from(made).unwrap_or(u32::MAX);
            self.copy_to_guest(vcpu, done, &made.to_le_bytes())?;
        }
        result
    }

    /// One update of the list.
    pub(crate) fn update_entry(
        &mut self,
        engine: &mut dyn Vcpu,
        update: MmuUpdate,
    ) -> Result<u64, Errno> {
        let kind = MmuUpdateKind(update.ptr & 7);
        let address = update.ptr & !7;
        let frame = Mfn(address >> 12);
        match kind {
            MmuUpdateKind::NORMAL_PT_UPDATE
            | MmuUpdateKind::PT_UPDATE_PRESERVE_AD
            | PT_UPDATE_NO_TRANSLATE => {
                self.get_page(frame)?;
                let keep = kind == MmuUpdateKind::PT_UPDATE_PRESERVE_AD;
                let result = self.update_word(engine, address, Entry(update.val), keep);
                self.put_page(frame);
                result
            }
            MmuUpdateKind::MACHPHYS_UPDATE => {
                self.get_page(frame)?;
                self.machine_to_physical.set(&self.ram, frame, update.val);
                self.put_page(frame);
                Ok(0)
            }
            _ => Err(Errno::ENOSYS),
        }
    }

    fn update_word(
        &mut self,
        engine: &mut dyn Vcpu,
        address: u64,
        entry: Entry,
        keep_accessed: bool,
    ) -> Result<u64, Errno> {
        if !address.is_multiple_of(8) {
            return Err(Errno::EINVAL);
        }
        let table = Mfn(address >> 12);
        let index = usize::try_from(address % PAGE_SIZE as u64 / 8).unwrap_or(0);
        let known = self.frame(table).ok_or(Errno::EINVAL)?;
        match known.kind.level().filter(|_| known.uses > 0) {
            Some(level) => self.set_entry(engine, table, level, index, entry, keep_accessed)?,
            None => {
                // An ordinary page, which stays one meanwhile.
                self.get_type(table, Kind::Writable)?;
                if let Some(word) = self.words(table)?.get(index) {
                    word.store(entry.0, Ordering::Relaxed);
                }
                self.put_type(table, None);
            }
        }
        Ok(0)
    }

    /// Changes an entry of a validated table (`mod_l?_entry`).
    pub(crate) fn set_entry(
        &mut self,
        engine: &mut dyn Vcpu,
        table: Mfn,
        level: u8,
        index: usize,
        new: Entry,
        keep_accessed: bool,
    ) -> Result<(), Errno> {
        if level == 4 && !is_guest_slot(index) {
            return Err(Errno::EINVAL);
        }
        let old = self.read_entry(table, index);
        let kept = if keep_accessed { old.0 & (Entry::ACCESSED | Entry::DIRTY) } else { 0 };
        let mut new = new;
        let mut same = false;
        if new.is_present() {
            if new.is_disallowed(level) {
                return Err(Errno::EINVAL);
            }
            new = Entry(new.0 | kept);
            same = new.same_page(old);
            if !same {
                if level > 1 {
                    // What becomes a table is checked, so nobody may still be writing to it.
                    self.resident.apply(engine);
                }
                self.get_entry(new, level, table)?;
            }
            new = new.adjusted(level);
        }
        self.write_entry(table, index, new);
        if new.restricts(old) {
            // A table of a higher level is a table of pages too where a linear entry shows it.
            self.resident.revoke(table, index);
            match level {
                1 => {}
                2 => self.resident.revoke_table(old.frame()),
                _ => self.resident.revoke_all(),
            }
        }
        if !same {
            self.put_entry(old, level, table);
        }
        Ok(())
    }

    /// `update_va_mapping(address, entry, flags)`.
    ///
    /// # Errors
    /// `EINVAL`: the address has no table of pages, or the entry is refused.
    pub fn update_va_mapping(
        &mut self,
        vcpu: usize,
        engine: &mut dyn Vcpu,
        [address, entry, flags, ..]: [u64; 6],
    ) -> Result<u64, Errno> {
        let root = self.current_root(vcpu).ok_or(Errno::EINVAL)?;
        let Some(Table { frame, index }) = self.table_of_pages(root, address) else {
            return Err(Errno::EINVAL);
        };
        let result = self.set_entry(engine, frame, 1, index, Entry(entry), false);
        self.resident.apply(engine);
        result?;
        // What went has gone from all CPUs, whatever the flags ask for; a mask of CPUs must be readable still.
        let flush = UvmFlags(flags & 3);
        let mask = flags & !3;
        if !flush.is_empty() && mask != 0 && mask != UvmFlags::ALL.bits() {
            self.cpu_mask(vcpu, mask)?;
        }
        Ok(0)
    }

    /// Reads a bit map of CPUs, of which only those that exist matter.
    pub(super) fn cpu_mask(&self, vcpu: usize, address: u64) -> Result<u64, Errno> {
        let mut bytes = [0; 8];
        let length = self.cpus.len().div_ceil(8).clamp(1, 8);
        let bytes_wanted = bytes.get_mut(..length).unwrap_or_default();
        self.copy_from_guest(vcpu, address, bytes_wanted)?;
        Ok(u64::from_le_bytes(bytes))
    }
}

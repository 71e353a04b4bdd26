//! `mmuext_op`: pins, page table bases, flushes, and work on whole pages.

use std::sync::atomic::Ordering;

use janus_proto::abi::xen::Errno;
use janus_proto::abi::xen::mmu::{MmuextCmd, MmuextOp};
use janus_proto::addr::{Mfn, PAGE_SIZE};

use super::Memory;
use super::entry::is_guest_address;
use super::frame::Kind;
use super::update::{count, only_itself};
use crate::engine::Vcpu;

/// `MMUEXT_FLUSH_CACHE` and `MMUEXT_FLUSH_CACHE_GLOBAL`: for domains with devices.
const FLUSH_CACHE: MmuextCmd = MmuextCmd(12);
const FLUSH_CACHE_GLOBAL: MmuextCmd = MmuextCmd(18);
/// `MMUEXT_MARK_SUPER` and `MMUEXT_UNMARK_SUPER`: Xen has given them up.
const MARK_SUPER: MmuextCmd = MmuextCmd(19);
const UNMARK_SUPER: MmuextCmd = MmuextCmd(20);
/// Entries that an LDT may have.
const MAX_LDT: u64 = 8192;

impl Memory {
    /// `mmuext_op(operations, count, done, domain)`.
    ///
    /// # Errors
    /// That of the first operation that is refused; those before it are done.
    pub fn mmuext_op(
        &mut self,
        vcpu: usize,
        engine: &mut dyn Vcpu,
        [operations, number, done, domain, ..]: [u64; 6],
    ) -> Result<u64, Errno> {
        only_itself(domain)?;
        let number = count(number);
        let mut made = 0;
        let mut result = Ok(0);
        while made < number {
            let address = made
                .checked_mul(size_of::<MmuextOp>() as u64)
                .and_then(|offset| operations.checked_add(offset));
            result = address
                .ok_or(Errno::EFAULT)
                .and_then(|address| self.fetch::<MmuextOp>(vcpu, address))
                .and_then(|operation| self.extended_op(vcpu, engine, operation));
            if result.is_err() {
                break;
            }
            made += 1;
        }
        self.resident.apply(engine);
        if done != 0 {
            let made = u32::try_from(made).unwrap_or(u32::MAX);
            // As Xen: that this cannot be told is no error.
            let _ = self.copy_to_guest(vcpu, done, &made.to_le_bytes());
        }
        result
    }

    /// One operation of the list.
    pub(crate) fn extended_op(
        &mut self,
        vcpu: usize,
        engine: &mut dyn Vcpu,
        operation: MmuextOp,
    ) -> Result<u64, Errno> {
        let frame = Mfn(operation.arg1);
        match operation.cmd {
            MmuextCmd::PIN_L1_TABLE => self.pin(engine, frame, Kind::L1)?,
            MmuextCmd::PIN_L2_TABLE => self.pin(engine, frame, Kind::L2)?,
            MmuextCmd::PIN_L3_TABLE => self.pin(engine, frame, Kind::L3)?,
            MmuextCmd::PIN_L4_TABLE => self.pin(engine, frame, Kind::L4)?,
            MmuextCmd::UNPIN_TABLE => self.unpin(frame)?,
            MmuextCmd::NEW_BASEPTR => self.set_root(vcpu, engine, frame)?,
            MmuextCmd::NEW_USER_BASEPTR => self.set_user_root(vcpu, engine, frame)?,
            // A change of a table takes its pages out of all CPUs before its hypercall ends: nothing is left to flush.
            MmuextCmd::TLB_FLUSH_LOCAL
            | MmuextCmd::INVLPG_LOCAL
            | MmuextCmd::TLB_FLUSH_ALL
            | MmuextCmd::INVLPG_ALL => {}
            MmuextCmd::TLB_FLUSH_MULTI | MmuextCmd::INVLPG_MULTI => {
                self.cpu_mask(vcpu, operation.arg2).map_err(|_| Errno::EINVAL)?;
            }
            FLUSH_CACHE => return Err(Errno::EACCES),
            FLUSH_CACHE_GLOBAL => return Err(Errno::EINVAL),
            MmuextCmd::SET_LDT => self.set_ldt(vcpu, operation.arg1, operation.arg2)?,
            MmuextCmd::CLEAR_PAGE => self.write_page(engine, frame, None)?,
            MmuextCmd::COPY_PAGE => {
                let source = Mfn(operation.arg2);
                self.get_page(source)?;
                let result = self.write_page(engine, frame, Some(source));
                self.put_page(source);
                result?;
            }
            MARK_SUPER | UNMARK_SUPER => return Err(Errno::EOPNOTSUPP),
            _ => return Err(Errno::ENOSYS),
        }
        Ok(0)
    }

    /// Makes a frame a page table for as long as the guest wants.
    pub(crate) fn pin(&mut self, engine: &mut dyn Vcpu, mfn: Mfn, kind: Kind) -> Result<(), Errno> {
        self.resident.apply(engine);
        self.pin_quietly(mfn, kind)
    }

    /// [`Memory::pin`] when no guest has run since the last change.
    pub(crate) fn pin_quietly(&mut self, mfn: Mfn, kind: Kind) -> Result<(), Errno> {
        self.get_page_and_type(mfn, kind)?;
        match self.frame_mut(mfn) {
            Some(frame) if !frame.pinned => {
                frame.pinned = true;
                Ok(())
            }
            _ => {
                self.put_page_and_type(mfn);
                Err(Errno::EINVAL)
            }
        }
    }

    fn unpin(&mut self, mfn: Mfn) -> Result<(), Errno> {
        self.get_page(mfn)?;
        let pinned = self.frame_mut(mfn).is_some_and(|frame| std::mem::take(&mut frame.pinned));
        if pinned {
            self.put_page_and_type(mfn);
        }
        self.put_page(mfn);
        if pinned { Ok(()) } else { Err(Errno::EINVAL) }
    }

    fn set_root(&mut self, vcpu: usize, engine: &mut dyn Vcpu, root: Mfn) -> Result<(), Errno> {
        let old = self.cpus.get(vcpu).ok_or(Errno::EINVAL)?.root;
        if old == Some(root) {
            return Ok(());
        }
        self.resident.apply(engine);
        self.get_page_and_type(root, Kind::L4)?;
        if let Some(cpu) = self.cpus.get_mut(vcpu) {
            cpu.root = Some(root);
            if !cpu.user {
                engine.switch(root);
            }
        }
        if let Some(old) = old {
            self.put_page_and_type(old);
        }
        Ok(())
    }

    fn set_user_root(
        &mut self,
        vcpu: usize,
        engine: &mut dyn Vcpu,
        root: Mfn,
    ) -> Result<(), Errno> {
        let old = self.cpus.get(vcpu).ok_or(Errno::EINVAL)?.user_root;
        let new = (root.0 != 0).then_some(root);
        if old == new {
            return Ok(());
        }
        if new.is_some() {
            self.resident.apply(engine);
            self.get_page_and_type(root, Kind::L4)?;
        }
        if let Some(cpu) = self.cpus.get_mut(vcpu) {
            cpu.user_root = new;
        }
        if let Some(old) = old {
            self.put_page_and_type(old);
        }
        Ok(())
    }

    /// Notes where the LDT is. No process can have one of the guest's making, so no selector of it works.
    fn set_ldt(&mut self, vcpu: usize, address: u64, entries: u64) -> Result<(), Errno> {
        let fits = entries.checked_mul(8).and_then(|length| address.checked_add(length));
        if !address.is_multiple_of(PAGE_SIZE as u64)
            || entries > MAX_LDT
            || !is_guest_address(address)
            || fits.is_none()
        {
            return Err(Errno::EINVAL);
        }
        self.cpus.get_mut(vcpu).ok_or(Errno::EINVAL)?.ldt = (address, entries);
        Ok(())
    }

    /// Writes a whole page: zeroes, or another page.
    fn write_page(
        &mut self,
        engine: &mut dyn Vcpu,
        target: Mfn,
        source: Option<Mfn>,
    ) -> Result<(), Errno> {
        self.resident.apply(engine);
        self.get_page_and_type(target, Kind::Writable)?;
        let result = self.words(target).and_then(|to| {
            let from = source.map(|source| self.words(source)).transpose()?;
            for (index, word) in to.iter().enumerate() {
                let value = from.and_then(|from| from.get(index));
                word.store(
                    value.map_or(0, |value| value.load(Ordering::Relaxed)),
                    Ordering::Relaxed,
                );
            }
            Ok(())
        });
        self.put_page_and_type(target);
        result
    }
}

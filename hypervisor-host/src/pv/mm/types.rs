//! References and uses: a frame is one kind of thing as long as it has uses (`get_page`, `get_page_type`).
//!
//! A page table's first use checks all its entries, and takes a reference and a use of whatever they name; its last
//! use gives them back. Tables nest four deep, and the entries that name a table of their own level (linear page
//! tables) make no chains, so the recursion ends.

use std::sync::atomic::Ordering;

use janus_proto::abi::xen::Errno;
use janus_proto::addr::Mfn;

use super::Memory;
use super::entry::{ENTRIES, Entry, is_guest_slot};
use super::frame::{Kind, Owner};

impl Memory {
    /// Takes a reference to a frame that the guest may name.
    pub(crate) fn get_page(&mut self, frame: Mfn) -> Result<(), Errno> {
        let frame = self.frame_mut(frame).ok_or(Errno::EINVAL)?;
        let alive = match frame.owner {
            Owner::Guest | Owner::Shared => true,
            Owner::Leaving => frame.references > 0,
            Owner::Free | Owner::Hidden => false,
        };
        if !alive {
            return Err(Errno::EINVAL);
        }
        frame.references = frame.references.checked_add(1).ok_or(Errno::EINVAL)?;
        Ok(())
    }

    /// Gives a reference back. The last one of a frame that the guest gave up frees it.
    pub(crate) fn put_page(&mut self, mfn: Mfn) {
        let Some(frame) = self.frame_mut(mfn) else { return };
        debug_assert!(frame.references > 0, "a reference too many was given back");
        frame.references = frame.references.saturating_sub(1);
        if frame.references == 0 && frame.owner == Owner::Leaving {
            self.free_frame(mfn);
        }
    }

    /// Takes a use of a frame to which the caller has a reference.
    pub(crate) fn get_type(&mut self, mfn: Mfn, kind: Kind) -> Result<(), Errno> {
        let frame = self.frame_mut(mfn).ok_or(Errno::EINVAL)?;
        if frame.uses > 0 {
            // Not validated: it is being validated right now, and names itself.
            if frame.kind != kind || !frame.validated {
                return Err(Errno::EINVAL);
            }
            frame.uses = frame.uses.checked_add(1).ok_or(Errno::EINVAL)?;
            return Ok(());
        }
        frame.kind = kind;
        frame.uses = 1;
        frame.validated = kind == Kind::Writable;
        let checked = match kind {
            Kind::None | Kind::Writable => Ok(()),
            Kind::Segments => self.validate_segments(mfn),
            Kind::L1 => self.validate_table(mfn, 1),
            Kind::L2 => self.validate_table(mfn, 2),
            Kind::L3 => self.validate_table(mfn, 3),
            Kind::L4 => self.validate_table(mfn, 4),
        };
        if let Some(frame) = self.frame_mut(mfn) {
            match checked {
                Ok(()) => frame.validated = true,
                Err(_) => (frame.uses, frame.kind) = (0, Kind::None),
            }
        }
        checked
    }

    /// Gives a use back; `parent` is the table whose entry it was.
    pub(crate) fn put_type(&mut self, mfn: Mfn, parent: Option<Mfn>) {
        let Some(frame) = self.frame_mut(mfn) else { return };
        debug_assert!(frame.uses > 0, "a use too many was given back");
        let kind = frame.kind;
        if frame.uses == 1 && frame.validated {
            // Still in use while its entries are given back, so that nothing else happens to it.
            frame.validated = false;
            if let Some(level) = kind.level() {
                self.release_table(mfn, level);
            }
        }
        if let Some(frame) = self.frame_mut(mfn) {
            frame.uses = frame.uses.saturating_sub(1);
        }
        let parent_kind = parent.and_then(|parent| self.frame(parent)).map(|frame| frame.kind);
        if parent_kind == Some(kind)
            && let Some(parent) = parent
        {
            self.end_linear(parent, mfn);
        }
    }

    /// A reference and a use.
    pub(crate) fn get_page_and_type(&mut self, mfn: Mfn, kind: Kind) -> Result<(), Errno> {
        self.get_page(mfn)?;
        self.get_type(mfn, kind).inspect_err(|_| self.put_page(mfn))
    }

    /// Both back.
    pub(crate) fn put_page_and_type(&mut self, mfn: Mfn) {
        self.put_type(mfn, None);
        self.put_page(mfn);
    }

    /// Checks all entries of a table, and takes what they name.
    fn validate_table(&mut self, table: Mfn, level: u8) -> Result<(), Errno> {
        for index in 0..ENTRIES {
            if level == 4 && !is_guest_slot(index) {
                // Xen puts its own there: a linear page table must not show what the guest left.
                self.write_entry(table, index, Entry(0));
                continue;
            }
            let entry = self.read_entry(table, index);
            if !entry.is_present() {
                continue;
            }
            if let Err(error) = self.get_entry(entry, level, table) {
                for index in (0..index).rev() {
                    if level < 4 || is_guest_slot(index) {
                        let entry = self.read_entry(table, index);
                        self.put_entry(entry, level, table);
                    }
                }
                return Err(error);
            }
            let adjusted = entry.adjusted(level);
            if adjusted != entry {
                self.write_entry(table, index, adjusted);
            }
        }
        Ok(())
    }

    /// Gives back what the entries of a table name.
    fn release_table(&mut self, table: Mfn, level: u8) {
        // Any table can be mapped as pages: by itself, or by a linear entry.
        self.resident.revoke_table(table);
        for index in 0..ENTRIES {
            if level < 4 || is_guest_slot(index) {
                let entry = self.read_entry(table, index);
                self.put_entry(entry, level, table);
            }
        }
    }

    /// Checks one present entry for a table of `level`, and takes what it names (`get_page_from_l?e`).
    pub(crate) fn get_entry(&mut self, entry: Entry, level: u8, table: Mfn) -> Result<(), Errno> {
        if entry.is_disallowed(level) {
            return Err(Errno::EINVAL);
        }
        let frame = entry.frame();
        let Some(below) = Kind::table(level - 1) else {
            return self.get_mapped_page(frame, entry.is_writable());
        };
        match self.get_page_and_type(frame, below) {
            Err(Errno::EINVAL) if self.get_linear(entry, level, table) => Ok(()),
            answer => answer,
        }
    }

    /// What an entry of the last level names (`get_page_from_l1e`).
    fn get_mapped_page(&mut self, frame: Mfn, writable: bool) -> Result<(), Errno> {
        if self.devices.contains(&frame) {
            // No memory, so nothing to count: it is never anything else.
            return Ok(());
        }
        if self.frame(frame).is_none_or(|frame| frame.owner == Owner::Hidden) {
            // Not this guest's memory at all: a device's, or another domain's.
            return Err(Errno::EPERM);
        }
        self.get_page(frame).map_err(|_| Errno::EBUSY)?;
        if writable && self.get_type(frame, Kind::Writable).is_err() {
            self.put_page(frame);
            return Err(Errno::EBUSY);
        }
        Ok(())
    }

    /// Gives back what an entry that was in a table of `level` names (`put_page_from_l?e`).
    pub(crate) fn put_entry(&mut self, entry: Entry, level: u8, table: Mfn) {
        if !entry.is_present() {
            return;
        }
        let frame = entry.frame();
        if level == 1 {
            if entry.is_writable() {
                self.put_type(frame, None);
            }
            self.put_page(frame);
            return;
        }
        match level {
            2 => self.resident.revoke_table(frame),
            _ => self.resident.revoke_all(),
        }
        // A table that names itself took nothing.
        if frame != table {
            self.put_type(frame, Some(table));
            self.put_page(frame);
        }
    }

    /// Lets a read-only entry name a table of its own level, so that the guest can read its tables by one
    /// (`get_l?_linear_pagetable`). A table with such entries cannot itself be named so by another: no chains.
    fn get_linear(&mut self, entry: Entry, level: u8, table: Mfn) -> bool {
        if entry.is_writable() {
            return false;
        }
        let frame = entry.frame();
        if frame == table {
            return true;
        }
        let Some(kind) = Kind::table(level) else { return false };
        if self.get_page(frame).is_err() {
            return false;
        }
        let named = self.frame(frame).is_some_and(|named| {
            named.kind == kind
                && named.validated
                && named.uses > 0
                && named.uses < u32::MAX
                && (i32::MIN + 1..=0).contains(&named.linear)
        });
        let naming = self.frame(table).is_some_and(|naming| (0..i32::MAX).contains(&naming.linear));
        if !named || !naming {
            self.put_page(frame);
            return false;
        }
        if let Some(named) = self.frame_mut(frame) {
            named.uses += 1;
            named.linear -= 1;
        }
        if let Some(naming) = self.frame_mut(table) {
            naming.linear += 1;
        }
        true
    }

    fn end_linear(&mut self, naming: Mfn, named: Mfn) {
        if let Some(frame) = self.frame_mut(naming) {
            debug_assert!(frame.linear > 0, "a linear entry too many went");
            frame.linear -= 1;
        }
        if let Some(frame) = self.frame_mut(named) {
            debug_assert!(frame.linear < 0, "a linear use too many went");
            frame.linear += 1;
        }
    }

    /// The guest gave a frame up and nobody uses it any more.
    fn free_frame(&mut self, mfn: Mfn) {
        if let Some(frame) = self.frame_mut(mfn) {
            debug_assert!(frame.uses == 0 && frame.linear == 0, "a used frame is freed");
            frame.owner = Owner::Free;
            frame.kind = Kind::None;
            frame.validated = false;
        }
        if let Some(words) = self.ram.frame(mfn)
            && !self.ram.discard(mfn)
        {
            for word in words {
                word.store(0, Ordering::Relaxed);
            }
        }
        self.machine_to_physical.clear(&self.ram, mfn);
        self.pool.give(mfn);
        self.pages -= 1;
    }

    /// Gives the guest `1 << order` more frames, zeroed and contiguous; `None`: there are none, or it may not.
    pub(crate) fn allocate(&mut self, order: u32) -> Option<Mfn> {
        let count = 1u64.checked_shl(order)?;
        if self.pages.checked_add(count)? > self.max_pages {
            return None;
        }
        let first = self.pool.take(order)?;
        for frame in first.0..first.0 + count {
            self.set_owner(Mfn(frame), Owner::Guest);
        }
        self.pages += count;
        Some(first)
    }

    /// Takes the guest's own claim from a frame; it is free once the last reference has gone (`guest_remove_page`).
    pub(crate) fn remove(&mut self, mfn: Mfn) -> Result<(), Errno> {
        let frame = self.frame_mut(mfn).ok_or(Errno::EINVAL)?;
        if frame.owner != Owner::Guest {
            return Err(Errno::EINVAL);
        }
        frame.owner = Owner::Leaving;
        if frame.references == 0 {
            self.free_frame(mfn);
        }
        Ok(())
    }
}

//! The first page tables: everything up to the end of the boot area, and the list of frames where the kernel wants it.

use std::sync::atomic::Ordering;

use janus_proto::addr::Mfn;

use super::error::Cause;
use super::{Layout, PAGE, machine};
use crate::machine::ram::Ram;
use crate::pv::mm::entry::{Entry, index, is_guest_address};

/// What an entry of a table of pages has; tables themselves are not writable.
const PAGE_BITS: u64 = Entry::PRESENT | Entry::WRITE | Entry::ACCESSED | Entry::DIRTY;
/// What an entry above has.
const TABLE_BITS: u64 = PAGE_BITS | Entry::USER;
/// The layout and the tables disagree.
const BROKEN: Cause = Cause::Image("page tables");

/// A range to map: first address, first frame, pages.
type Range = (u64, u64, u64);

fn ranges(layout: &Layout, p2m_base: Option<u64>) -> impl Iterator<Item = Range> {
    let list = p2m_base.map(|base| (base, layout.list, layout.list_pages));
    std::iter::once((layout.base, 0, layout.end)).chain(list)
}

/// How many tables the layout takes.
pub(super) fn count(layout: &Layout, p2m_base: Option<u64>) -> Result<u64, Cause> {
    let mut spans = Vec::with_capacity(2);
    for ((address, _, pages), field) in ranges(layout, p2m_base).zip(["VIRT_BASE", "INIT_P2M"]) {
        let last = pages.checked_mul(PAGE).and_then(|length| address.checked_add(length - 1));
        let last = last.filter(|last| {
            is_guest_address(address) && is_guest_address(*last) && address >> 47 == last >> 47
        });
        spans.push((address, last.ok_or(Cause::Image(field))?));
    }
    spans.sort_unstable();
    if spans.windows(2).any(|pair| matches!(pair, [a, b] if b.0 <= a.1)) {
        return Err(Cause::Image("INIT_P2M"));
    }
    let mut tables = 1;
    for level in 1..=3 {
        // Bits of an address that one table of this level maps.
        let shift = 12 + 9 * level;
        let mut next = 0;
        for (first, last) in &spans {
            let first = (first >> shift).max(next);
            next = (last >> shift) + 1;
            tables += next.saturating_sub(first);
        }
    }
    Ok(tables)
}

/// Tables being written.
pub(super) struct Tables<'a> {
    ram: &'a Ram,
    layout: &'a Layout,
    /// The next frame for one.
    next: u64,
}

impl<'a> Tables<'a> {
    /// Writes them into the frames that the layout has for them; the first is the top one.
    pub(super) fn write(
        ram: &'a Ram,
        layout: &'a Layout,
        p2m_base: Option<u64>,
    ) -> Result<Mfn, Cause> {
        let mut tables = Self { ram, layout, next: layout.tables };
        let root = tables.take()?;
        for (address, frame, pages) in ranges(layout, p2m_base) {
            let mut page = 0;
            while page < pages {
                let at = address + page * PAGE;
                let mut table = root;
                for level in (2..=4).rev() {
                    table = tables.below(table, index(at, level))?;
                }
                let words = ram.frame(table).ok_or(BROKEN)?;
                for word in words.iter().skip(index(at, 1)) {
                    if page == pages {
                        break;
                    }
                    word.store(tables.entry(frame + page), Ordering::Relaxed);
                    page += 1;
                }
            }
        }
        Ok(root)
    }

    fn take(&mut self) -> Result<Mfn, Cause> {
        if self.next >= self.layout.tables + self.layout.table_pages {
            return Err(BROKEN);
        }
        self.next += 1;
        Ok(machine(self.next - 1))
    }

    /// The table that an entry names; a new one if it names none.
    fn below(&mut self, table: Mfn, index: usize) -> Result<Mfn, Cause> {
        let word = self.ram.frame(table).and_then(|words| words.get(index)).ok_or(BROKEN)?;
        let entry = Entry(word.load(Ordering::Relaxed));
        if entry.is_present() {
            return Ok(entry.frame());
        }
        let new = self.take()?;
        word.store(new.0 << 12 | TABLE_BITS, Ordering::Relaxed);
        Ok(new)
    }

    fn entry(&self, frame: u64) -> u64 {
        let tables = self.layout.tables..self.layout.tables + self.layout.table_pages;
        let bits = if tables.contains(&frame) { PAGE_BITS & !Entry::WRITE } else { PAGE_BITS };
        machine(frame).0 << 12 | bits
    }
}

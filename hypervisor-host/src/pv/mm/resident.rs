//! What has been put into the guest's processes, by the table of pages that said so.
//!
//! The engine is told of every page that must go. This remembers which pages can be there at all: most changes of
//! tables are to entries that nobody has touched, and cost the engine nothing.

use std::collections::HashMap;

use janus_proto::addr::{Mfn, PAGE_SIZE};

use super::entry::ENTRIES;
use crate::engine::Vcpu;

/// Ranges that are told one by one; more than these, and all goes at once.
const MAX_RANGES: usize = 64;

/// The pages of one table that may be mapped.
#[derive(Debug)]
struct Pages {
    /// Where the table's first page is; `None`: at several places.
    base: Option<u64>,
    bits: [u64; ENTRIES / 64],
}

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Resident {
    tables: HashMap<Mfn, Pages>,
    /// To be taken out before the lock is let go.
    ranges: Vec<(u64, usize)>,
    everything: bool,
}

impl Resident {
    /// Whether a page may be mapped already.
    pub(crate) fn contains(&self, table: Mfn, index: usize) -> bool {
        self.tables
            .get(&table)
            .and_then(|pages| pages.bits.get(index / 64))
            .is_some_and(|word| word >> (index % 64) & 1 != 0)
    }

    /// `count` pages of a table are mapped from `index`; the table's first page is at `base`.
    pub(crate) fn insert(&mut self, table: Mfn, base: u64, index: usize, count: usize) {
        let pages =
            self.tables.entry(table).or_insert(Pages { base: Some(base), bits: [0; ENTRIES / 64] });
        if pages.base != Some(base) {
            pages.base = None;
        }
        for index in index..index + count {
            if let Some(word) = pages.bits.get_mut(index / 64) {
                *word |= 1 << (index % 64);
            }
        }
    }

    /// An entry of a table of pages allows less now.
    pub(crate) fn revoke(&mut self, table: Mfn, index: usize) {
        let Some(pages) = self.tables.get_mut(&table) else { return };
        let Some(word) = pages.bits.get_mut(index / 64) else { return };
        if *word >> (index % 64) & 1 == 0 {
            return;
        }
        match pages.base {
            Some(base) => {
                *word &= !(1 << (index % 64));
                self.add(base + (index * PAGE_SIZE) as u64, 1);
            }
            None => self.revoke_all(),
        }
    }

    /// A table of pages is no longer where it was, or no longer one.
    pub(crate) fn revoke_table(&mut self, table: Mfn) {
        match self.tables.get(&table).map(|pages| pages.base) {
            Some(Some(base)) => {
                self.tables.remove(&table);
                self.add(base, ENTRIES);
            }
            Some(None) => self.revoke_all(),
            None => {}
        }
    }

    /// Something changed above the tables of pages.
    pub(crate) fn revoke_all(&mut self) {
        if self.tables.is_empty() {
            // What was mapped is in `ranges` already.
            return;
        }
        self.tables.clear();
        self.ranges.clear();
        self.everything = true;
    }

    fn add(&mut self, address: u64, pages: usize) {
        if self.everything {
            return;
        }
        if let Some((last, count)) = self.ranges.last_mut()
            && *last + (*count * PAGE_SIZE) as u64 == address
        {
            *count += pages;
            return;
        }
        if self.ranges.len() == MAX_RANGES {
            self.ranges.clear();
            self.tables.clear();
            self.everything = true;
            return;
        }
        self.ranges.push((address, pages));
    }

    /// Tells the engine.
    pub(crate) fn apply(&mut self, engine: &mut dyn Vcpu) {
        if self.everything {
            self.everything = false;
            engine.unmap_all();
            return;
        }
        for (address, pages) in self.ranges.drain(..) {
            engine.unmap(address, pages);
        }
    }
}

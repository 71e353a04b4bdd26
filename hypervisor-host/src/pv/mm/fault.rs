//! Page faults: walking the guest's tables, and putting pages into its processes when they are touched.
//!
//! A fault brings its neighbours along, as far as they are contiguous frames with the same rights: memory that the
//! guest maps linearly arrives in a few large pieces, each one mapping of the host.
//!
//! The rights are those of a 64-bit PV guest: its kernel and its programs all run in user mode, every entry has the
//! user bit, and what keeps a program out of its kernel is that it has page tables of its own.

use janus_proto::addr::{Mfn, PAGE_SIZE};

use super::Memory;
use super::entry::{ENTRIES, Entry, LEVELS, index, is_guest_address};
use super::machine_to_physical::{ALIAS, END, START};
use crate::engine::monitor::{BOTTOM, TOP};
use crate::engine::{Fault, Mapping, Protection, Vcpu};
use crate::pv::report::WalkStep;

/// Tables of pages, beyond the one with the fault, that are looked through in each direction.
const MORE_TABLES: usize = 16;
/// Pages of one table of pages, in bytes.
const TABLE_SPAN: u64 = (ENTRIES * PAGE_SIZE) as u64;

/// Bits of a page fault's error code.
const ERROR_PRESENT: u32 = 1 << 0;
const ERROR_WRITE: u32 = 1 << 1;
const ERROR_USER: u32 = 1 << 2;
const ERROR_FETCH: u32 = 1 << 4;

/// Where Xen maps all of the machine's memory (`DIRECTMAP_VIRT_START`), and where that ends at the latest.
const XENS_MAP: core::ops::Range<u64> = 0xffff_8300_0000_0000..0xffff_8800_0000_0000;

/// What became of a page fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The page is there now: run the instruction again.
    Resolved,
    /// The guest's tables map nothing there: its own fault, with this error code.
    NotMapped(u32),
    /// They do, but not for this: its own fault, with this error code.
    Protection(u32),
    /// They allow it, and no process can have a page there: somebody has to do what the instruction does.
    Unmappable,
}

/// An entry of a table of pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Table {
    pub(crate) frame: Mfn,
    pub(crate) index: usize,
}

/// Where a walk ended.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Leaf {
    pub(crate) table: Table,
    pub(crate) entry: Entry,
    /// Every level lets it be written.
    pub(crate) write: bool,
    /// Every level lets it be executed.
    pub(crate) execute: bool,
}

/// What the levels above a table of pages allow.
#[derive(Clone, Copy, Debug)]
struct Path {
    table: Table,
    write: bool,
    execute: bool,
}

/// A part of a run that lies in one table.
struct Part {
    table: Mfn,
    base: u64,
    first: usize,
    count: usize,
}

/// Whether an engine can have a page at an address.
fn is_mappable(address: u64) -> bool {
    (BOTTOM..TOP).contains(&address)
}

impl Memory {
    /// The root that a CPU is on.
    pub(crate) fn root(&self, vcpu: usize) -> Option<Mfn> {
        self.current_root(vcpu)
    }

    fn path(&self, root: Mfn, address: u64) -> Option<Path> {
        if !is_guest_address(address) {
            return None;
        }
        let (mut table, mut write, mut execute) = (root, true, true);
        for level in (2..=LEVELS).rev() {
            let index = index(address, level);
            let entry = self.read_entry(table, index);
            if !entry.is_present() {
                return None;
            }
            if !entry.has(Entry::ACCESSED) {
                self.write_entry(table, index, Entry(entry.0 | Entry::ACCESSED));
            }
            write &= entry.is_writable();
            execute &= !entry.has(Entry::NO_EXECUTE);
            table = entry.frame();
        }
        Some(Path { table: Table { frame: table, index: index(address, 1) }, write, execute })
    }

    /// The entry for an address in its table of pages, if there is such a table (and not one of a higher level,
    /// which linear page tables show as one).
    pub(crate) fn table_of_pages(&self, root: Mfn, address: u64) -> Option<Table> {
        let table = self.path(root, address)?.table;
        let known = self.frame(table.frame)?;
        (known.kind == super::Kind::L1 && known.uses > 0).then_some(table)
    }

    /// What is mapped at an address.
    pub(crate) fn walk(&self, root: Mfn, address: u64) -> Option<Leaf> {
        let path = self.path(root, address)?;
        let entry = self.read_entry(path.table.frame, path.table.index);
        entry.is_present().then_some(Leaf {
            table: path.table,
            entry,
            write: path.write && entry.is_writable(),
            execute: path.execute && !entry.has(Entry::NO_EXECUTE),
        })
    }

    /// Sets bits (accessed, dirty) of an entry, as the CPU would.
    pub(crate) fn mark(&self, leaf: &Leaf, bits: u64) {
        if !leaf.entry.has(bits) {
            self.write_entry(leaf.table.frame, leaf.table.index, Entry(leaf.entry.0 | bits));
        }
    }

    /// Every entry on the way to an address, for reports.
    #[must_use]
    pub fn steps(&self, root: Mfn, address: u64) -> Vec<WalkStep> {
        let mut steps = Vec::new();
        let mut table = root;
        for level in (1..=LEVELS).rev() {
            let index = index(address, level);
            let entry = self.read_entry(table, index);
            steps.push(WalkStep {
                level,
                table,
                index: u16::try_from(index).unwrap_or(0),
                entry: entry.0,
            });
            if !entry.is_present() || !is_guest_address(address) {
                break;
            }
            table = entry.frame();
        }
        steps
    }

    /// Maps what a page fault of a CPU is about, if the guest's tables say so.
    pub fn fault(&mut self, vcpu: usize, engine: &mut dyn Vcpu, fault: &Fault) -> Outcome {
        self.resident.apply(engine);
        let user = self.cpus.get(vcpu).is_some_and(|cpu| cpu.user);
        let write = fault.error & ERROR_WRITE != 0;
        let fetch = fault.error & ERROR_FETCH != 0;
        let code = fault.error & (ERROR_WRITE | ERROR_FETCH) | if user { ERROR_USER } else { 0 };
        let address = fault.address;
        if let Some(page) = self.machine_to_physical.alias_page(address) {
            if write || fetch {
                return Outcome::Protection(code | ERROR_PRESENT);
            }
            let Some(frame) = self.machine_to_physical.page(&self.ram, page) else {
                return Outcome::NotMapped(code);
            };
            engine.map(Mapping {
                address: address & !(PAGE_SIZE as u64 - 1),
                frame,
                pages: 1,
                protection: Protection { write: false, execute: false },
            });
            return Outcome::Resolved;
        }
        if (START..END).contains(&address) {
            return match self.m2p_load(address) {
                _ if write || fetch => Outcome::Protection(code | ERROR_PRESENT),
                Some(_) => Outcome::Unmappable,
                None => Outcome::NotMapped(code),
            };
        }
        // There is something of Xen's own: its map of all memory.
        if XENS_MAP.contains(&address) {
            return Outcome::Protection(code | ERROR_PRESENT);
        }
        let leaf = self.root(vcpu).and_then(|root| Some((root, self.walk(root, address)?)));
        let Some((root, leaf)) = leaf else { return Outcome::NotMapped(code) };
        if write && !leaf.write || fetch && !leaf.execute {
            return Outcome::Protection(code | ERROR_PRESENT);
        }
        self.mark(&leaf, if write { Entry::ACCESSED | Entry::DIRTY } else { Entry::ACCESSED });
        if !is_mappable(address) || self.devices.contains(&leaf.entry.frame()) {
            return Outcome::Unmappable;
        }
        self.map_around(root, engine, address & !(PAGE_SIZE as u64 - 1), &leaf, write);
        Outcome::Resolved
    }

    /// The value of the machine-to-physical table at an address where Xen has it, 8 bytes that may be unaligned;
    /// `None`: there is none.
    pub fn m2p_load(&mut self, address: u64) -> Option<u64> {
        let offset = address.checked_sub(START).filter(|_| address < END)?;
        let low = self.machine_to_physical.get(&self.ram, Mfn(offset / 8))?;
        let shift = u32::try_from(offset % 8 * 8).ok()?;
        if shift == 0 {
            return Some(low);
        }
        let high = self.machine_to_physical.get(&self.ram, Mfn(offset / 8 + 1))?;
        Some(low >> shift | high << (64 - shift))
    }

    /// The frames of the machine-to-physical table, all of them filled, for an engine that maps it whole at
    /// [`ALIAS`].
    pub fn fill_machine_to_physical(&mut self) -> (Mfn, u64) {
        let (first, count) = self.machine_to_physical.frames();
        for page in 0..count {
            self.machine_to_physical.page(&self.ram, page);
        }
        (first, count)
    }

    /// Where the guest finds the table: the address of frame 0's entry, and the highest frame with one.
    pub(crate) fn machine_to_physical_at(&self) -> (u64, Mfn) {
        let first = crate::machine::ram::FIRST_FRAME.0 * 8;
        (ALIAS - first, self.machine_to_physical.last_frame())
    }

    /// Maps the page at `address` with its neighbours. A page that would be written becomes dirty when it is mapped
    /// writable, not when it is written: pages that are clean are brought along only by a write.
    fn map_around(
        &mut self,
        root: Mfn,
        engine: &mut dyn Vcpu,
        address: u64,
        leaf: &Leaf,
        write: bool,
    ) {
        let writable = leaf.write && (write || leaf.entry.has(Entry::DIRTY));
        let fits = |path: &Path, entry: Entry, frame: u64| {
            let can_write = path.write && entry.is_writable();
            entry.is_present()
                && entry.frame().0 == frame
                && (can_write && (write || entry.has(Entry::DIRTY))) == writable
                && (path.execute && !entry.has(Entry::NO_EXECUTE)) == leaf.execute
        };
        let Some(path) = self.path(root, address) else { return };
        // Writes what is to be there.
        let _ = self.ram.frame(leaf.entry.frame());
        let mut parts: Vec<Part> = Vec::with_capacity(2);
        let frame = leaf.entry.frame().0;
        let own = path.table.index;
        let base = address & !(TABLE_SPAN - 1);
        // Within the table of the fault.
        let is_there = |memory: &Self, path: &Path, base: u64, index: usize| {
            let page = base + (index * PAGE_SIZE) as u64;
            let Some(frame) =
                (frame + page / PAGE_SIZE as u64).checked_sub(address / PAGE_SIZE as u64)
            else {
                return false;
            };
            is_mappable(page)
                && memory.machine_to_physical.alias_page(page).is_none()
                && memory.ram.is_written(Mfn(frame))
                && fits(path, memory.read_entry(path.table.frame, index), frame)
                && !memory.resident.contains(path.table.frame, index)
        };
        let mut first = own;
        while first > 0 && is_there(self, &path, base, first - 1) {
            first -= 1;
        }
        let mut last = own;
        while last + 1 < ENTRIES && is_there(self, &path, base, last + 1) {
            last += 1;
        }
        parts.push(Part { table: path.table.frame, base, first, count: last - first + 1 });
        // Whole tables below and above.
        let mut start = base + (first * PAGE_SIZE) as u64;
        let mut end = base + ((last + 1) * PAGE_SIZE) as u64;
        for _ in 0..MORE_TABLES {
            let Some(base) =
                start.checked_sub(TABLE_SPAN).filter(|base| base.is_multiple_of(TABLE_SPAN))
            else {
                break;
            };
            let Some(path) = self.path(root, base) else { break };
            let mut first = ENTRIES;
            while first > 0 && is_there(self, &path, base, first - 1) {
                first -= 1;
            }
            if first == ENTRIES {
                break;
            }
            parts.push(Part { table: path.table.frame, base, first, count: ENTRIES - first });
            start = base + (first * PAGE_SIZE) as u64;
        }
        for _ in 0..MORE_TABLES {
            if !end.is_multiple_of(TABLE_SPAN) {
                break;
            }
            let Some(path) = self.path(root, end) else { break };
            let mut count = 0;
            while count < ENTRIES && is_there(self, &path, end, count) {
                count += 1;
            }
            if count == 0 {
                break;
            }
            parts.push(Part { table: path.table.frame, base: end, first: 0, count });
            end += (count * PAGE_SIZE) as u64;
        }
        let seen = if writable { Entry::ACCESSED | Entry::DIRTY } else { Entry::ACCESSED };
        for part in &parts {
            for index in part.first..part.first + part.count {
                let entry = self.read_entry(part.table, index);
                if !entry.has(seen) {
                    self.write_entry(part.table, index, Entry(entry.0 | seen));
                }
            }
            self.resident.insert(part.table, part.base, part.first, part.count);
        }
        engine.map(Mapping {
            address: start,
            frame: Mfn(frame - (address - start) / PAGE_SIZE as u64),
            pages: usize::try_from((end - start) / PAGE_SIZE as u64).unwrap_or(1),
            protection: Protection { write: writable, execute: leaf.execute },
        });
    }
}

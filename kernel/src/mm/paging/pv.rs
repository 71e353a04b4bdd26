//! Page tables under Xen PV: read by the kernel, changed by hypercalls.
//!
//! Tables hold machine frames, and Xen insists that nobody can write a page that is one. So a new
//! table is filled while it is ordinary memory, its own mapping is made read-only, and then it is
//! hung into its parent, which is when Xen checks every entry. The tree that Xen built stays in use
//! (and pinned); [`init`] completes it so that all memory is at its own address, as everywhere else.
//!
//! `p2m` is the builder's list of machine frames by pseudo-physical frame; the way back is Xen's
//! machine-to-physical table, which every PV guest can read (`arch-x86/xen-x86_64.h`,
//! `MACH2PHYS_VIRT_START`).
// UNSAFETY: reads page tables and the tables of frames, and changes what addresses mean.
#![expect(unsafe_code, reason = "page tables decide what memory is")]

use core::sync::atomic::{AtomicU32, AtomicUsize, Ordering};

use janus_boot::MemoryRange;
use janus_boot::start_info::StartInfo;
use janus_proto::addr::{Gpa, Mfn, PAGE_SIZE, Pfn};

use super::super::frames;
use super::native::Section;
use super::{Flags, MapError};
use crate::hypercall::memory;
use crate::percpu;
use crate::platform::IrqGuard;
use crate::platform::lock::{IrqLock, IrqLockGuard};
use janus_proto::abi::xen::mmu::{MmuUpdate, UvmFlags};

const ENTRIES: usize = 512;
/// Address bits of an entry.
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;
const PRESENT: u64 = 1 << 0;
const WRITABLE: u64 = 1 << 1;
const USER: u64 = 1 << 2;
/// Set from the start, so that the CPU never has to.
const ACCESSED: u64 = 1 << 5;
const DIRTY: u64 = 1 << 6;
const NO_EXECUTE: u64 = 1 << 63;
/// What every entry above the last level allows; the last level decides.
const TABLE: u64 = PRESENT | WRITABLE | USER | ACCESSED | DIRTY;
/// Where Xen has its table of frames by machine frame (`MACH2PHYS_VIRT_START`), if it does not say.
const MACHINE_TO_PHYSICAL: usize = 0xffff_8000_0000_0000;
/// A page of the p2m without memory (`INVALID_P2M_ENTRY`).
const INVALID: u64 = u64::MAX;
/// Entries changed in one hypercall.
const BATCH: usize = 64;
/// Forget this address, on all CPUs.
const FLUSH_ADDRESS: UvmFlags = UvmFlags::INVLPG.union(UvmFlags::ALL);

/// The domain's own names of things, once [`init`] knows them.
struct Tables {
    /// Address of the top table.
    root: usize,
    /// Address of the p2m list.
    p2m: usize,
    /// Its entries.
    pages: usize,
}

static TABLES: IrqLock<Option<Tables>> = IrqLock::new(None);
/// Which CPU has [`TABLES`], and may run out of memory meanwhile.
static OWNER: AtomicU32 = AtomicU32::new(NOBODY);
const NOBODY: u32 = u32::MAX;

/// The tables, in this CPU's hands.
struct Locked(IrqLockGuard<'static, Option<Tables>>);

fn lock() -> Locked {
    let guard = TABLES.lock();
    OWNER.store(percpu::current().id().0, Ordering::Relaxed);
    Locked(guard)
}

impl Drop for Locked {
    fn drop(&mut self) {
        OWNER.store(NOBODY, Ordering::Relaxed);
    }
}

/// Where the machine-to-physical table is, which is asked for once: a hypervisor without an upper half of its own
/// (the user-mode monitor) has it elsewhere, and emulates each load from where Xen has it.
fn machine_to_physical() -> usize {
    static KNOWN: AtomicUsize = AtomicUsize::new(0);
    match KNOWN.load(Ordering::Relaxed) {
        0 => {
            let asked = memory::machphys_mapping().map(|mapping| to_usize(mapping.v_start));
            let table = asked.unwrap_or(MACHINE_TO_PHYSICAL);
            KNOWN.store(table, Ordering::Relaxed);
            table
        }
        table => table,
    }
}

/// Page table entries to change, collected so that one hypercall changes many.
struct Batch {
    updates: [MmuUpdate; BATCH],
    len: usize,
}

impl Batch {
    fn new() -> Self {
        Self { updates: [MmuUpdate { ptr: 0, val: 0 }; BATCH], len: 0 }
    }
    /// # Safety
    /// As [`memory::mmu_update`].
    unsafe fn push(&mut self, ptr: u64, val: u64) -> Result<(), MapError> {
        if self.len == BATCH {
            // SAFETY: the caller's promise.
            unsafe { self.flush() }?;
        }
        if let Some(slot) = self.updates.get_mut(self.len) {
            *slot = MmuUpdate { ptr, val };
            self.len += 1;
        }
        Ok(())
    }
    /// # Safety
    /// As [`memory::mmu_update`].
    unsafe fn flush(&mut self) -> Result<(), MapError> {
        let updates = self.updates.get(..self.len).unwrap_or_default();
        self.len = 0;
        // SAFETY: the caller's promise.
        unsafe { memory::mmu_update(updates) }.map_err(|error| {
            log::error!("Xen refused a page table update: {error}");
            MapError::Refused
        })
    }
}

/// Where the frames of new page tables come from.
trait TableFrames {
    fn next(&mut self, tables: &Tables) -> Result<Pfn, MapError>;
}

/// At run time: the frame allocator, all of whose memory is mapped.
struct Allocator;

impl TableFrames for Allocator {
    fn next(&mut self, tables: &Tables) -> Result<Pfn, MapError> {
        // The tables are locked, so the allocator cannot ask for more memory by itself.
        loop {
            if let Some(frame) = frames::take_mapped(1, 1) {
                return Ok(frame);
            }
            if !tables.extend() {
                return Err(MapError::OutOfMemory);
            }
        }
    }
}

/// At boot: the first free memory after Xen's boot area, which is mapped a little way ahead.
struct BootFrames<'a> {
    next: u64,
    taken: &'a [MemoryRange],
}

impl TableFrames for BootFrames<'_> {
    fn next(&mut self, tables: &Tables) -> Result<Pfn, MapError> {
        let clash = |frame: u64| {
            let start = frame << 12;
            self.taken.iter().find(|range| {
                range.start.0 < start + PAGE_SIZE as u64 && start < range.start.0 + range.len
            })
        };
        let mut frame = self.next;
        while let Some(range) = clash(frame) {
            frame = (range.start.0 + range.len).div_ceil(PAGE_SIZE as u64);
        }
        if tables.entry(to_usize(frame << 12)).is_none_or(|(_, value)| value & PRESENT == 0) {
            return Err(MapError::OutOfMemory);
        }
        self.next = frame + 1;
        Ok(Pfn(frame))
    }
}

/// Memory mapped at boot, in pages: 4 MiB after the boot area.
const EAGER: usize = (4 << 20) / PAGE_SIZE;

/// Memory that is not mapped yet. Xen checks every entry of a new table, which takes longer than the rest of a small
/// guest's boot, and much of the memory is never used: it is mapped as the frame allocator runs out, a table at a time.
struct Deferred {
    /// The first page, of a table's first entry.
    next: usize,
    end: usize,
    /// A frame for the next table.
    spare: Option<Pfn>,
}

static DEFERRED: IrqLock<Option<Deferred>> = IrqLock::new(None);

/// A frame that is at hand.
impl TableFrames for Option<Pfn> {
    fn next(&mut self, _tables: &Tables) -> Result<Pfn, MapError> {
        self.take().ok_or(MapError::OutOfMemory)
    }
}

/// Maps more memory, for the frame allocator; `false`: there is none, or this CPU is changing the tables.
pub(crate) fn extend() -> bool {
    // What this CPU holds it holds until we return.
    let _masked = IrqGuard::new();
    if OWNER.load(Ordering::Relaxed) == percpu::current().id().0 {
        return false;
    }
    lock().0.as_ref().is_some_and(Tables::extend)
}

impl Tables {
    /// Maps the memory of one more table and gives it to the frame allocator; `false`: there is none.
    fn extend(&self) -> bool {
        let mut guard = DEFERRED.lock();
        let Some(deferred) = guard.as_mut().filter(|deferred| deferred.next < deferred.end) else {
            return false;
        };
        let base = deferred.next;
        let Some((1, parent)) = self.missing(base * PAGE_SIZE) else { return false };
        // SAFETY: our own memory at its own address, which nobody uses yet.
        if unsafe { self.hang(&mut deferred.spare, parent, |index| self.own(base + index)) }
            .is_err()
        {
            // Whatever Xen has against it will not change.
            deferred.end = base;
            return false;
        }
        deferred.next = base + ENTRIES;
        frames::release(Pfn(base as u64), ENTRIES.min(deferred.end - base));
        deferred.spare = frames::take_mapped(1, 1);
        true
    }

    /// The entry for a page of ours at its own address; 0 if there is no memory.
    fn own(&self, page: usize) -> u64 {
        self.mfn(Pfn(page as u64)).map_or(0, |mfn| (mfn.0 << 12) | page_flags(Flags::WRITE))
    }

    /// The machine frame of a page of ours.
    fn mfn(&self, frame: Pfn) -> Option<Mfn> {
        let index = to_usize(frame.0);
        if index >= self.pages {
            return None;
        }
        let entry = core::ptr::with_exposed_provenance::<u64>(self.p2m + index * size_of::<u64>());
        // SAFETY: inside the list, which the builder mapped and only the balloon changes.
        let mfn = unsafe { entry.read_volatile() };
        (mfn != INVALID).then_some(Mfn(mfn))
    }

    /// The address of the table that `entry` points to.
    fn table(entry: u64) -> usize {
        let mfn = to_usize((entry & ADDRESS) >> 12);
        let table = machine_to_physical();
        let name = core::ptr::with_exposed_provenance::<u64>(table + mfn * size_of::<u64>());
        // SAFETY: Xen maps its table for every machine frame there is, and `mfn` is one: Xen checked the entry.
        to_usize(unsafe { name.read_volatile() }) << 12
    }

    /// Address, machine address and value of the entry for `va` at `level` (0: a page), if its tables exist.
    fn walk(&self, va: usize, level: u32) -> Option<(u64, u64)> {
        let mut table = self.root;
        // The machine address of the top table is not in any entry: it comes from the p2m.
        let mut machine = self.mfn(Pfn((self.root >> 12) as u64))?.0 << 12;
        for upper in (level..4).rev() {
            let offset = (va >> (12 + 9 * upper)) % ENTRIES * size_of::<u64>();
            let entry = core::ptr::with_exposed_provenance::<u64>(table + offset);
            // SAFETY: an entry of a table of our tree, mapped (read-only) at its own address.
            let value = unsafe { entry.read_volatile() };
            if upper == level {
                return Some((machine + offset as u64, value));
            }
            if value & PRESENT == 0 {
                return None;
            }
            table = Self::table(value);
            machine = value & ADDRESS;
        }
        None
    }

    /// Machine address and value of the last-level entry for `va`, if its tables exist.
    fn entry(&self, va: usize) -> Option<(u64, u64)> {
        self.walk(va, 0)
    }

    /// The lowest level at which `va` has no table under its entry, with that entry's machine address; `None` if
    /// all tables exist.
    fn missing(&self, va: usize) -> Option<(u32, u64)> {
        (1..4).rev().find_map(|level| {
            let (machine, value) = self.walk(va, level)?;
            (value & PRESENT == 0).then_some((level, machine))
        })
    }

    /// Hangs a table with `contents` into the entry at machine address `parent`.
    ///
    /// # Safety
    /// As [`super::map`], for what the contents map.
    unsafe fn hang(
        &self,
        frames: &mut dyn TableFrames,
        parent: u64,
        contents: impl Fn(usize) -> u64,
    ) -> Result<(), MapError> {
        let frame = frames.next(self)?;
        let mfn = self.mfn(frame).ok_or(MapError::OutOfMemory)?;
        let va = to_usize(frame.start().0);
        let table = core::ptr::with_exposed_provenance_mut::<u64>(va);
        for index in 0..ENTRIES {
            // SAFETY: a frame of our own, mapped writable until the update below.
            unsafe { table.add(index).write(contents(index)) };
        }
        let update = [MmuUpdate { ptr: parent, val: (mfn.0 << 12) | TABLE }];
        let mut calls = [
            memory::update_va_mapping_entry(va, (mfn.0 << 12) | page_flags(Flags::empty())),
            memory::mmu_update_entry(&update),
        ];
        // SAFETY: 1. the frame belongs to the tree from here on, so nobody needs to write it; 2. the entry was empty.
        unsafe { memory::multicall(&mut calls) }.map_err(|error| {
            log::error!("Xen refused a page table: {error}");
            MapError::Refused
        })
    }

    /// Makes the tables above `va` exist, empty.
    fn make_tables(&self, frames: &mut dyn TableFrames, va: usize) -> Result<(), MapError> {
        while let Some((_, parent)) = self.missing(va) {
            // SAFETY: an empty table maps nothing.
            unsafe { self.hang(frames, parent, |_| 0) }?;
        }
        Ok(())
    }
}

/// What [`init`] made.
#[derive(Clone, Debug)]
pub(crate) struct Completed {
    /// Where the new tables are.
    pub(crate) tables: core::ops::Range<Gpa>,
    /// Memory from here on is mapped by [`extend`].
    pub(crate) mapped_end: Gpa,
}

/// Completes Xen's tables: all memory of the domain at its own address, writable and not executable,
/// without page 0; the image's `sections` as they say. Memory far behind the boot area is left for later.
///
/// # Errors
/// Memory for the tables is missing, or Xen refused one.
///
/// # Safety
/// 1. `start` is Xen's, and its page tables are in force.
/// 2. `sections` covers the running image; `taken` everything else that is in use after the boot area.
pub(crate) unsafe fn init(
    start: &StartInfo,
    taken: &[MemoryRange],
    sections: &[Section],
) -> Result<Completed, MapError> {
    let tables = Tables {
        root: to_usize(start.pt_base),
        p2m: to_usize(start.mfn_list),
        pages: to_usize(start.nr_pages),
    };
    let first = start.bootstrap_end.div_ceil(PAGE_SIZE as u64);
    let mut frames = BootFrames { next: first, taken };

    // What Xen mapped has no NX bit: everything but the image gets one.
    let mut batch = Batch::new();
    let mut page = 1;
    while page < tables.pages {
        let va = page * PAGE_SIZE;
        let Some((entry, value)) = tables.entry(va) else { break };
        if value & PRESENT == 0 {
            if page as u64 >= first {
                break;
            }
            // The boot stack's guard page.
            page += 1;
            continue;
        }
        let inside = sections.iter().any(|section| section.start <= va && va < section.end);
        if !inside {
            // SAFETY: outside the image no code lies; the rest of the entry stays.
            unsafe { batch.push(entry, value | NO_EXECUTE) }?;
        }
        page += 1;
    }
    // SAFETY: as above.
    unsafe { batch.flush() }?;

    page = page.max(to_usize(first));
    let in_use = taken.iter().map(|range| range.start.0.saturating_add(range.len)).max();
    let in_use = to_usize(in_use.unwrap_or(0).div_ceil(PAGE_SIZE as u64));
    let eager = (page.max(in_use) + EAGER).next_multiple_of(ENTRIES);
    let mut deferred: Option<Deferred> = None;
    while page < tables.pages {
        let va = page * PAGE_SIZE;
        match tables.missing(va) {
            Some((1, parent)) => {
                let base = page - page % ENTRIES;
                if base >= eager {
                    if deferred.is_none() {
                        let spare = Some(frames.next(&tables)?);
                        deferred = Some(Deferred { next: base, end: tables.pages, spare });
                    }
                } else {
                    // SAFETY: our own memory at its own address, which nobody uses yet.
                    unsafe { tables.hang(&mut frames, parent, |index| tables.own(base + index)) }?;
                }
                page = base + ENTRIES;
            }
            Some((_, parent)) => {
                // SAFETY: an empty table maps nothing.
                unsafe { tables.hang(&mut frames, parent, |_| 0) }?;
            }
            None => {
                if let (Some((entry, value)), Some(mfn)) =
                    (tables.entry(va), tables.mfn(Pfn(page as u64)))
                    && value & PRESENT == 0
                {
                    // SAFETY: as above.
                    unsafe { batch.push(entry, (mfn.0 << 12) | page_flags(Flags::WRITE)) }?;
                }
                page += 1;
            }
        }
    }
    // SAFETY: as above.
    unsafe { batch.flush() }?;

    let mapped_end = deferred.as_ref().map_or(u64::MAX, |d| (d.next * PAGE_SIZE) as u64);
    *DEFERRED.lock() = deferred;
    *lock().0 = Some(tables);
    for section in sections {
        let pages = section.end.saturating_sub(section.start).div_ceil(PAGE_SIZE);
        // SAFETY: the flags are the image's own.
        unsafe { protect(section.start, pages, section.flags) }?;
    }
    // SAFETY: nothing is at page 0, on purpose.
    unsafe { unmap(0, 1) }?;
    Ok(Completed { tables: Gpa(first << 12)..Gpa(frames.next << 12), mapped_end: Gpa(mapped_end) })
}

/// The machine frame of the top table, which all CPUs share.
pub(crate) fn root() -> Option<Mfn> {
    let guard = lock();
    let tables = guard.0.as_ref()?;
    tables.mfn(Pfn((tables.root >> 12) as u64))
}

/// The machine frame of a page of ours; `None` outside our memory.
#[must_use]
pub fn mfn(frame: Pfn) -> Option<Mfn> {
    lock().0.as_ref()?.mfn(frame)
}

/// Notes which machine frame is behind `frame` now; `None` when there is none any more.
///
/// # Safety
/// It is the truth, and nothing maps the old one.
pub(crate) unsafe fn set_mfn(frame: Pfn, mfn: Option<Mfn>) {
    let tables = lock();
    let Some(tables) = tables.0.as_ref() else { return };
    let index = to_usize(frame.0);
    if index < tables.pages {
        let entry =
            core::ptr::with_exposed_provenance_mut::<u64>(tables.p2m + index * size_of::<u64>());
        // SAFETY: inside the list, which the lock protects.
        unsafe { entry.write_volatile(mfn.map_or(INVALID, |mfn| mfn.0)) };
    }
}

/// Our frame with machine frame `mfn`; `None` if it is not ours.
///
/// Only for frames that Xen named to us: others may lie outside its table.
#[must_use]
pub(crate) fn pfn(mfn: Mfn) -> Option<Pfn> {
    let frame = Pfn((Tables::table(mfn.0 << 12) >> 12) as u64);
    (lock().0.as_ref()?.mfn(frame)? == mfn).then_some(frame)
}

/// Maps a machine frame that Xen named to us (shared info, grant table) over the page at `va`.
///
/// # Errors
/// See [`MapError`].
///
/// # Safety
/// As [`super::map`].
pub(crate) unsafe fn map_machine(va: usize, mfn: Mfn, flags: Flags) -> Result<(), MapError> {
    {
        let tables = lock();
        tables.0.as_ref().ok_or(MapError::NotReady)?.make_tables(&mut Allocator, va)?;
    }
    // SAFETY: the caller's promise.
    unsafe { memory::update_va_mapping(va, (mfn.0 << 12) | page_flags(flags), FLUSH_ADDRESS) }
        .map_err(|_| MapError::Refused)
}

/// [`map_machine`] for a page whose tables the builder made, before there is an allocator.
///
/// # Errors
/// See [`MapError`].
///
/// # Safety
/// As [`super::map`].
pub(crate) unsafe fn map_machine_early(va: usize, mfn: Mfn) -> Result<(), MapError> {
    // SAFETY: the caller's promise.
    unsafe {
        memory::update_va_mapping(va, (mfn.0 << 12) | page_flags(Flags::WRITE), FLUSH_ADDRESS)
    }
    .map_err(|_| MapError::Refused)
}

/// # Safety
/// As [`super::map`].
pub(super) unsafe fn map(
    va: usize,
    frame: Pfn,
    pages: usize,
    flags: Flags,
) -> Result<(), MapError> {
    if flags.contains(Flags::UNCACHED) {
        // Devices need a privileged domain; this kernel is none.
        return Err(MapError::Refused);
    }
    let guard = lock();
    let tables = guard.0.as_ref().ok_or(MapError::NotReady)?;
    let mut batch = Batch::new();
    let mut replaced = false;
    for page in 0..pages {
        let va = va + page * PAGE_SIZE;
        let mfn = tables.mfn(Pfn(frame.0 + page as u64)).ok_or(MapError::BadAddress)?;
        tables.make_tables(&mut Allocator, va)?;
        let (entry, value) = tables.entry(va).ok_or(MapError::BadAddress)?;
        replaced |= value & PRESENT != 0;
        // SAFETY: the caller's promise.
        unsafe { batch.push(entry, (mfn.0 << 12) | page_flags(flags)) }?;
    }
    // SAFETY: the caller's promise.
    unsafe { batch.flush() }?;
    // No TLB remembers an entry that was not present (Intel SDM 3A, 4.10.2.3).
    if replaced { flush(va, pages) } else { Ok(()) }
}

/// # Safety
/// As [`super::unmap`].
pub(super) unsafe fn unmap(va: usize, pages: usize) -> Result<(), MapError> {
    // SAFETY: the caller's promise.
    unsafe { change(va, pages, |_| 0) }
}

/// # Safety
/// As [`super::protect`].
pub(super) unsafe fn protect(va: usize, pages: usize, flags: Flags) -> Result<(), MapError> {
    // SAFETY: the caller's promise.
    unsafe { change(va, pages, |entry| (entry & ADDRESS) | page_flags(flags)) }
}

/// Rewrites the entries that are present in a range.
///
/// # Safety
/// As [`super::unmap`] and [`super::protect`], whichever `to` amounts to.
unsafe fn change(va: usize, pages: usize, to: impl Fn(u64) -> u64) -> Result<(), MapError> {
    let guard = lock();
    let tables = guard.0.as_ref().ok_or(MapError::NotReady)?;
    if pages == 1 {
        // The common case (a guard page) in one hypercall, flush included.
        return match tables.entry(va) {
            Some((_, value)) if value & PRESENT != 0 => {
                // SAFETY: the caller's promise.
                unsafe { memory::update_va_mapping(va, to(value), FLUSH_ADDRESS) }
                    .map_err(|_| MapError::Refused)
            }
            _ => Ok(()),
        };
    }
    let mut batch = Batch::new();
    for page in 0..pages {
        if let Some((entry, value)) = tables.entry(va + page * PAGE_SIZE)
            && value & PRESENT != 0
        {
            // SAFETY: the caller's promise.
            unsafe { batch.push(entry, to(value)) }?;
        }
    }
    // SAFETY: the caller's promise.
    unsafe { batch.flush() }?;
    flush(va, pages)
}

fn flush(_va: usize, _pages: usize) -> Result<(), MapError> {
    memory::flush_tlb_all().map_err(|_| MapError::Refused)
}

fn page_flags(flags: Flags) -> u64 {
    let mut entry = PRESENT | ACCESSED | DIRTY;
    if flags.contains(Flags::WRITE) {
        entry |= WRITABLE;
    }
    if !flags.contains(Flags::EXECUTE) {
        entry |= NO_EXECUTE;
    }
    entry
}

fn to_usize(value: u64) -> usize {
    usize::try_from(value).unwrap_or(usize::MAX)
}

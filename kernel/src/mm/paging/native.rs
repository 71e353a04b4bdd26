//! Page tables that the kernel writes itself: four levels, 2 MiB pages for RAM.
//!
//! Table frames are RAM, mapped at their own address like everything else, so a table is reached by
//! the address in its parent's entry.
// UNSAFETY: writes page tables and loads CR3.
#![expect(unsafe_code, reason = "page tables decide what memory is")]

use janus_boot::{MemoryKind, MemoryRange};
use janus_proto::addr::{PAGE_SIZE, Pfn};
use x86_64::registers::control::{Cr0, Cr0Flags, Cr3, Cr3Flags, Efer, EferFlags};
use x86_64::structures::paging::{PageTableFlags, PhysFrame};
use x86_64::{PhysAddr, VirtAddr};

use super::super::frames;
use super::{Flags, MapError};
use crate::platform::lock::IrqLock;
use crate::platform::tcg;
use crate::smp::shootdown;

/// Entries in a table.
const ENTRIES: usize = 512;
/// Pages of 4 KiB in a page of 2 MiB.
const LARGE_PAGES: usize = 512;
/// The address bits of an entry.
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;
/// More invalidations than this are done by reloading CR3.
const INVALIDATE_ONE_BY_ONE: usize = 64;

const PRESENT: u64 = PageTableFlags::PRESENT.bits();
const HUGE: u64 = PageTableFlags::HUGE_PAGE.bits();
/// What every entry above the last level allows; the last level decides.
const TABLE: u64 = PRESENT | PageTableFlags::WRITABLE.bits();

/// The physical address of the top table; 0 before [`init`].
static ROOT: IrqLock<u64> = IrqLock::new(0);

/// A piece of the kernel's image and what may be done with it.
#[derive(Clone, Copy, Debug)]
pub struct Section {
    /// First address, a multiple of the page size.
    pub start: usize,
    /// One past the last address, rounded up to the page size by whoever uses it.
    pub end: usize,
    /// What may be done with it beyond reading.
    pub flags: Flags,
}

/// Builds the kernel's own tables and switches to them: all usable and ACPI memory of `map` at its own
/// address, writable and not executable, without page 0; then the image's `sections` as they say.
///
/// # Errors
/// [`MapError::OutOfMemory`].
///
/// # Safety
/// 1. The boot tables map memory at its own address, at least up to the frames that the allocator gives first.
/// 2. `sections` covers the running image, the code executable; nothing outside `map` is in use.
pub(crate) unsafe fn init(map: &[MemoryRange], sections: &[Section]) -> Result<(), MapError> {
    let root = new_table()?;
    for range in map {
        if !matches!(
            range.kind,
            MemoryKind::Usable | MemoryKind::AcpiReclaimable | MemoryKind::AcpiNvs
        ) {
            continue;
        }
        let first = index(range.start.0).div_ceil(PAGE_SIZE).max(1);
        let end = index(range.start.0.saturating_add(range.len)) / PAGE_SIZE;
        let pages = end.saturating_sub(first);
        // SAFETY: a fresh tree that is not in force; RAM at its own address is what everybody expects.
        unsafe { write_range(root, first * PAGE_SIZE, Pfn(first as u64), pages, Flags::WRITE) }?;
    }
    for section in sections {
        let pages = section.end.saturating_sub(section.start).div_ceil(PAGE_SIZE);
        let frame = Pfn((section.start / PAGE_SIZE) as u64);
        // SAFETY: as above; the flags are the image's own.
        unsafe { write_range(root, section.start, frame, pages, section.flags) }?;
    }
    // SAFETY: long mode is on and stays; the flag only gives a meaning to bit 63 of entries.
    unsafe { Efer::update(|flags| flags.insert(EferFlags::NO_EXECUTE_ENABLE)) };
    // SAFETY: the new tables map the running code, its stack and its data as the old ones did (condition 2).
    unsafe { Cr3::write(PhysFrame::containing_address(PhysAddr::new(root)), Cr3Flags::empty()) };
    // SAFETY: write protection binds the kernel to its own tables, which are right.
    unsafe { Cr0::update(|flags| flags.insert(Cr0Flags::WRITE_PROTECT)) };
    *ROOT.lock() = root;
    Ok(())
}

/// # Safety
/// As [`super::map`].
pub(super) unsafe fn map(
    va: usize,
    frame: Pfn,
    pages: usize,
    flags: Flags,
) -> Result<(), MapError> {
    let root = ROOT.lock();
    if *root == 0 {
        return Err(MapError::NotReady);
    }
    // SAFETY: the caller's promise; the lock makes this the only writer.
    unsafe { write_range(*root, va, frame, pages, flags) }?;
    flush(va, pages);
    Ok(())
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
    unsafe { change(va, pages, |entry| (entry & ADDRESS) | entry_flags(flags)) }
}

/// Whether `va` is mapped.
#[must_use]
pub fn is_mapped(va: usize) -> bool {
    let root = ROOT.lock();
    if *root == 0 {
        return false;
    }
    let mut table = *root;
    for level in (0..4).rev() {
        let Some(entry) = entry_of(table, va, level) else { return false };
        // SAFETY: `entry_of` points into a table of the tree, which the lock keeps still.
        let value = unsafe { entry.read() };
        if value & PRESENT == 0 {
            return false;
        }
        if level == 0 || value & HUGE != 0 {
            return true;
        }
        table = value & ADDRESS;
    }
    false
}

/// Rewrites the last-level entries that are present in a range.
///
/// # Safety
/// As [`super::unmap`] and [`super::protect`], whichever `to` amounts to.
unsafe fn change(va: usize, pages: usize, to: impl Fn(u64) -> u64) -> Result<(), MapError> {
    let root = ROOT.lock();
    if *root == 0 {
        return Err(MapError::NotReady);
    }
    let mut done = 0;
    while done < pages {
        let at = va + done * PAGE_SIZE;
        // A missing table means nothing is mapped up to its end.
        let Some(directory_entry) = walk(*root, at, 1, false)? else {
            done += LARGE_PAGES - (at / PAGE_SIZE) % LARGE_PAGES;
            continue;
        };
        // SAFETY: `walk` points into a table of the tree, which the lock keeps still.
        let directory = unsafe { directory_entry.read() };
        if directory & PRESENT == 0 {
            done += LARGE_PAGES - (at / PAGE_SIZE) % LARGE_PAGES;
            continue;
        }
        if directory & HUGE != 0
            && at.is_multiple_of(LARGE_PAGES * PAGE_SIZE)
            && pages - done >= LARGE_PAGES
        {
            let new = to(directory);
            // SAFETY: a whole large page of the range; the new meaning is the caller's responsibility.
            unsafe { directory_entry.write(if new == 0 { 0 } else { new | HUGE }) };
            done += LARGE_PAGES;
            continue;
        }
        if let Some(entry) = walk(*root, at, 0, true)? {
            // SAFETY: as above.
            let value = unsafe { entry.read() };
            if value & PRESENT != 0 {
                // SAFETY: as above; a page of the range.
                unsafe { entry.write(to(value)) };
            }
        }
        done += 1;
    }
    flush(va, pages);
    Ok(())
}

/// Writes mappings of `pages` adjacent frames into the tree at `root`, with large pages where both sides allow.
///
/// # Safety
/// As [`super::map`], if the tree is in force.
unsafe fn write_range(
    root: u64,
    va: usize,
    frame: Pfn,
    pages: usize,
    flags: Flags,
) -> Result<(), MapError> {
    let mut done = 0;
    while done < pages {
        let at = va + done * PAGE_SIZE;
        let physical = (frame.0 + done as u64) << 12;
        let large = LARGE_PAGES * PAGE_SIZE;
        if at.is_multiple_of(large) && physical.is_multiple_of(large as u64) && pages - done >= LARGE_PAGES
            && let Some(entry) = walk(root, at, 1, true)?
            // SAFETY: `walk` points into a table of the tree.
            && unsafe { entry.read() } & (PRESENT | HUGE) != PRESENT
        {
            // SAFETY: as above; no table hangs here, and the caller answers for the new meaning.
            unsafe { entry.write(physical | HUGE | entry_flags(flags)) };
            done += LARGE_PAGES;
            continue;
        }
        let entry = walk(root, at, 0, true)?.ok_or(MapError::BadAddress)?;
        // SAFETY: as above.
        unsafe { entry.write(physical | entry_flags(flags)) };
        done += 1;
    }
    Ok(())
}

fn entry_flags(flags: Flags) -> u64 {
    let mut entry = PageTableFlags::PRESENT;
    entry.set(PageTableFlags::WRITABLE, flags.contains(Flags::WRITE));
    entry.set(PageTableFlags::NO_EXECUTE, !flags.contains(Flags::EXECUTE));
    entry.set(
        PageTableFlags::NO_CACHE | PageTableFlags::WRITE_THROUGH,
        flags.contains(Flags::UNCACHED),
    );
    entry.bits()
}

/// The entry for `va` at `level` (0: a page, 1: a directory). With `create`, missing tables are made and large pages split.
fn walk(root: u64, va: usize, level: u32, create: bool) -> Result<Option<*mut u64>, MapError> {
    let mut table = root;
    for upper in (level + 1..4).rev() {
        let Some(entry) = entry_of(table, va, upper) else { return Ok(None) };
        // SAFETY: `entry_of` points into a table of the tree; writers are serialised by the callers.
        let value = unsafe { entry.read() };
        if value & PRESENT == 0 {
            if !create {
                return Ok(None);
            }
            let new = new_table()?;
            // SAFETY: as above; an empty table changes no mapping.
            unsafe { entry.write(new | TABLE) };
            table = new;
        } else if value & HUGE != 0 {
            if !create || upper != 1 {
                return Ok(None);
            }
            let new = split(value)?;
            // SAFETY: as above; the new table maps what the large page mapped.
            unsafe { entry.write(new | TABLE) };
            table = new;
        } else {
            table = value & ADDRESS;
        }
    }
    Ok(entry_of(table, va, level))
}

/// A table that maps, page by page, what the large page `entry` maps.
fn split(entry: u64) -> Result<u64, MapError> {
    let new = new_table()?;
    for page in 0..ENTRIES {
        if let Some(slot) = entry_of(new, page * PAGE_SIZE, 0) {
            // SAFETY: a fresh table that nobody else knows.
            unsafe { slot.write((entry & !HUGE) + ((page as u64) << 12)) };
        }
    }
    Ok(new)
}

/// Where the entry for `va` is in the table at physical address `table`.
fn entry_of(table: u64, va: usize, level: u32) -> Option<*mut u64> {
    let slot = (va >> (12 + 9 * level)) % ENTRIES;
    let address = usize::try_from(table).ok()?.checked_add(slot * size_of::<u64>())?;
    Some(core::ptr::with_exposed_provenance_mut(address))
}

fn new_table() -> Result<u64, MapError> {
    let frame = frames::allocate(1).ok_or(MapError::OutOfMemory)?;
    let address = frame.start().0;
    let table = core::ptr::with_exposed_provenance_mut::<u64>(index(address));
    // SAFETY: a frame of our own, mapped writable at its own address.
    unsafe { table.write_bytes(0, ENTRIES) };
    Ok(address)
}

fn flush(va: usize, pages: usize) {
    forget(va, pages);
    shootdown::flush_others(va, pages);
    tcg::flushed();
}

/// Forgets this CPU's cached translations of `pages` pages at `va`.
pub(crate) fn forget(va: usize, pages: usize) {
    if pages <= INVALIDATE_ONE_BY_ONE {
        for page in 0..pages {
            x86_64::instructions::tlb::flush(VirtAddr::new_truncate(
                (va + page * PAGE_SIZE) as u64,
            ));
        }
    } else {
        x86_64::instructions::tlb::flush_all();
    }
}

fn index(address: u64) -> usize {
    usize::try_from(address).unwrap_or(usize::MAX)
}

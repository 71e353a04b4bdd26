//! Page frames: which are free, and the way they become memory that drivers own.
// UNSAFETY: makes slices of memory that the memory map calls usable, and hands it out.
#![expect(unsafe_code, reason = "memory begins here")]

use core::ptr::NonNull;
use core::sync::atomic::{AtomicU64, Ordering};

use janus_boot::{MemoryKind, MemoryRange};
use janus_front::dma::FrameSource;
use janus_proto::addr::{Gpa, PAGE_SHIFT, PAGE_SIZE, Pfn};

use super::bitmap::{FrameBitmap, words_needed};
use super::reclaim;
use crate::platform::lock::IrqLock;

/// Why there is no frame allocator.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FramesError {
    /// The memory map names no usable memory.
    NoMemory,
    /// No free range that is mapped at boot can hold the allocator's own table.
    NoRoomForTable,
    /// `init` was called before.
    Twice,
}

impl core::fmt::Display for FramesError {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str(match self {
            Self::NoMemory => "the memory map has no usable memory",
            Self::NoRoomForTable => "too little memory for the table of page frames",
            Self::Twice => "the frame allocator is set up already",
        })
    }
}

/// Memory in frames of [`PAGE_SIZE`] bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct MemoryStatistics {
    /// Frames of usable memory, free or not.
    pub total: usize,
    /// Frames free now.
    pub free: usize,
}

/// Ranges of usable memory that [`is_ram`] remembers.
const RANGES: usize = 64;

struct State {
    map: FrameBitmap<'static>,
    total: usize,
    /// Frames that [`defer`] took out and [`release`] has not brought back, and who brings them back.
    deferred: usize,
    extend: fn() -> bool,
    /// Usable memory, as first frame and one past the last; empty ranges at the end.
    ram: [(usize, usize); RANGES],
}

static STATE: IrqLock<Option<State>> = IrqLock::new(None);

/// The frames that `range` holds entirely, as first and one past the last.
fn whole_frames(range: &MemoryRange) -> (usize, usize) {
    let end = range.start.0.saturating_add(range.len);
    (to_usize(range.start.0.div_ceil(PAGE_SIZE as u64)), to_usize(end >> PAGE_SHIFT))
}

/// The frames that `range` touches, as first and one past the last.
fn touched_frames(range: &MemoryRange) -> (usize, usize) {
    let end = range.start.0.saturating_add(range.len);
    (to_usize(range.start.0 >> PAGE_SHIFT), to_usize(end.div_ceil(PAGE_SIZE as u64)))
}

fn to_usize(value: u64) -> usize {
    usize::try_from(value).unwrap_or(usize::MAX)
}

/// Sets up the allocator: every whole frame of usable memory is free, except frame 0, those that
/// `taken` touches, and those of its own table, which it places below `mapped_end`.
///
/// # Errors
/// See [`FramesError`].
///
/// # Safety
/// 1. Memory that `map` calls usable is RAM that nobody uses, apart from `taken`.
/// 2. Memory below `mapped_end` that `map` calls usable is mapped, writable, at its own address.
pub unsafe fn init(
    map: &[MemoryRange],
    taken: &[MemoryRange],
    mapped_end: Gpa,
) -> Result<(), FramesError> {
    let usable = || map.iter().filter(|range| range.kind == MemoryKind::Usable).map(whole_frames);
    let frames = usable().map(|(_, end)| end).max().ok_or(FramesError::NoMemory)?;
    let table_pages = (words_needed(frames) * size_of::<u64>()).div_ceil(PAGE_SIZE);
    let table =
        place_table(map, taken, mapped_end, table_pages).ok_or(FramesError::NoRoomForTable)?;

    // SAFETY: 1. usable memory that nobody else uses, so ours for ever (`place_table`, condition 1);
    // 2. mapped and writable (condition 2); any bytes are valid `u64`s, and a page is aligned for them.
    let words = unsafe {
        core::slice::from_raw_parts_mut(
            core::ptr::with_exposed_provenance_mut::<u64>(table * PAGE_SIZE),
            table_pages * PAGE_SIZE / size_of::<u64>(),
        )
    };
    let mut bitmap = FrameBitmap::new(words, frames).ok_or(FramesError::NoRoomForTable)?;
    for (start, end) in usable() {
        bitmap.free_run(start, end.saturating_sub(start));
    }
    for range in map.iter().filter(|range| range.kind != MemoryKind::Usable) {
        let (start, end) = touched_frames(range);
        bitmap.reserve_run(start, end.saturating_sub(start));
    }
    let total = bitmap.free_frames();
    bitmap.reserve_run(0, 1);
    bitmap.reserve_run(table, table_pages);
    for range in taken {
        let (start, end) = touched_frames(range);
        bitmap.reserve_run(start, end.saturating_sub(start));
    }
    let mut state = STATE.lock();
    if state.is_some() {
        return Err(FramesError::Twice);
    }
    let mut ram = [(0, 0); RANGES];
    for (slot, range) in ram.iter_mut().zip(usable()) {
        *slot = range;
    }
    *state = Some(State { map: bitmap, total, deferred: 0, extend: || false, ram });
    Ok(())
}

/// The first frame of a run of `pages` frames in usable memory, clear of everything in `taken` and below `mapped_end`.
fn place_table(
    map: &[MemoryRange],
    taken: &[MemoryRange],
    mapped_end: Gpa,
    pages: usize,
) -> Option<usize> {
    let mapped = to_usize(mapped_end.0 >> PAGE_SHIFT);
    let blocked =
        || taken.iter().chain(map.iter().filter(|range| range.kind != MemoryKind::Usable));
    map.iter().filter(|range| range.kind == MemoryKind::Usable).map(whole_frames).find_map(
        |(first, end)| {
            let mut start = first.max(1);
            while start.checked_add(pages)? <= end.min(mapped) {
                let clash = blocked()
                    .map(touched_frames)
                    .find(|(from, to)| *from < start + pages && start < *to);
                match clash {
                    Some((_, to)) => start = to,
                    None => return Some(start),
                }
            }
            None
        },
    )
}

/// A frame below 1 MiB, where other CPUs start from: kept when [`keep_low_page`] found one.
static LOW_PAGE: AtomicU64 = AtomicU64::new(0);

/// Keeps a frame below 1 MiB, if one is free; called once, first.
pub(crate) fn keep_low_page() {
    const LIMIT: u64 = 1 << 20;
    // The lowest frame comes first.
    let Some(frame) = take_mapped(1, 1) else { return };
    if frame.start().0 < LIMIT {
        LOW_PAGE.store(frame.0, Ordering::Relaxed);
    } else {
        // SAFETY: just taken.
        unsafe { free(frame, 1) };
    }
}

/// The frame that [`keep_low_page`] kept.
#[must_use]
pub(crate) fn low_page() -> Option<Pfn> {
    Some(Pfn(LOW_PAGE.load(Ordering::Relaxed))).filter(|frame| frame.0 != 0)
}

/// Keeps free frames from `start` on back: they are not mapped yet. `extend` maps some of them and [`release`]s them,
/// or answers `false`; it is called without locks of this module, when a request cannot be met otherwise.
pub(crate) fn defer(start: Gpa, extend: fn() -> bool) {
    let mut state = STATE.lock();
    let Some(state) = state.as_mut() else { return };
    let first = to_usize(start.0.div_ceil(PAGE_SIZE as u64));
    let before = state.map.free_frames();
    state.map.reserve_run(first, state.map.frames().saturating_sub(first));
    state.deferred = before - state.map.free_frames();
    state.extend = extend;
}

/// Makes deferred frames available: they are mapped now.
pub(crate) fn release(start: Pfn, count: usize) {
    let mut state = STATE.lock();
    let Some(state) = state.as_mut() else { return };
    let (first, end) = (to_usize(start.0), to_usize(start.0).saturating_add(count));
    for (from, to) in state.ram {
        let (from, to) = (from.max(first), to.min(end));
        if from < to {
            state.map.free_run(from, to - from);
        }
    }
    state.deferred = state.deferred.saturating_sub(count);
}

/// Takes `count` adjacent frames; their contents are whatever was there.
#[must_use]
pub fn allocate(count: usize) -> Option<Pfn> {
    allocate_aligned(count, 1)
}

/// Takes `count` adjacent frames, the first a multiple of `align` (a power of two).
#[must_use]
pub fn allocate_aligned(count: usize, align: usize) -> Option<Pfn> {
    loop {
        let extend = {
            let mut state = STATE.lock();
            let state = state.as_mut()?;
            if let Some(start) = state.map.take_run(count, align, 0) {
                return Some(Pfn(start as u64));
            }
            if state.deferred == 0 {
                return None;
            }
            state.extend
        };
        if !extend() {
            return None;
        }
    }
}

/// As [`allocate_aligned`], of the frames that are mapped already.
#[must_use]
pub(crate) fn take_mapped(count: usize, align: usize) -> Option<Pfn> {
    let start = STATE.lock().as_mut()?.map.take_run(count, align, 0)?;
    Some(Pfn(start as u64))
}

/// Gives frames back.
///
/// # Safety
/// They are from [`allocate`] (any part of a run may be given back), and nobody uses them any more.
pub unsafe fn free(start: Pfn, count: usize) {
    let mut state = STATE.lock();
    let Some(state) = state.as_mut() else { return };
    let already = state.map.free_run(to_usize(start.0), count);
    assert!(already == 0, "page frames {:#x}+{count} were freed twice", start.0);
}

/// Whether any of `pages` frames from `frame` is usable memory: not a place for device registers.
#[must_use]
pub fn is_ram(frame: Pfn, pages: usize) -> bool {
    let first = to_usize(frame.0);
    let end = first.saturating_add(pages);
    STATE
        .lock()
        .as_ref()
        .is_some_and(|state| state.ram.iter().any(|(from, to)| *from < end && first < *to))
}

impl State {
    fn statistics(&self) -> MemoryStatistics {
        MemoryStatistics { total: self.total, free: self.map.free_frames() + self.deferred }
    }
}

/// How much memory there is and how much is free.
#[must_use]
pub fn statistics() -> MemoryStatistics {
    STATE.lock().as_ref().map(State::statistics).unwrap_or_default()
}

/// As [`statistics`], for reports after a failure: `None` if somebody was at work on the allocator.
#[must_use]
pub fn try_statistics() -> Option<MemoryStatistics> {
    STATE.try_lock()?.as_ref().map(State::statistics)
}

/// The kernel's frames as drivers see them: zeroed, mapped at their guest physical address.
#[derive(Clone, Copy, Debug)]
pub struct KernelFrames;

/// The one value of [`KernelFrames`], for `DmaBuf::new`.
pub static FRAMES: KernelFrames = KernelFrames;

// SAFETY: frames are owned by the allocator's caller until freed, contiguous by number, mapped
// writable at their own address (`paging` maps all RAM so), and zeroed here.
unsafe impl FrameSource for KernelFrames {
    fn allocate(&self, pages: usize) -> Option<NonNull<u8>> {
        let start = reclaim::until(|| allocate(pages))?;
        let memory =
            NonNull::new(core::ptr::with_exposed_provenance_mut::<u8>(to_usize(start.start().0)))?;
        // SAFETY: this many bytes, just allocated, mapped and writable.
        unsafe { memory.write_bytes(0, pages * PAGE_SIZE) };
        Some(memory)
    }
    unsafe fn free(&self, start: NonNull<u8>, pages: usize) {
        // SAFETY: the caller's promise.
        unsafe { free(Pfn::containing(self.guest_address(start)), pages) }
    }
    fn guest_address(&self, memory: NonNull<u8>) -> Gpa {
        Gpa(memory.as_ptr().expose_provenance() as u64)
    }
}

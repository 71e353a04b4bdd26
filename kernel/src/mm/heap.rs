//! The kernel heap: per-CPU magazines of small objects, a shared layer below, page frames under both.
//!
//! | request | served by |
//! |---|---|
//! | up to 2 KiB | the CPU's magazine of its size class, refilled from [`slab`](super::slab)s of 16 KiB |
//! | up to 16 KiB | `linked_list_allocator` over arenas of 256 KiB ([`Medium`]) |
//! | more | runs of page frames |
//!
//! `linked_list_allocator` alone takes time in proportion to its free blocks (19,000 cycles a call
//! with 20,000 small objects), so only the few objects of middle size reach it.
// UNSAFETY: implements `GlobalAlloc` over raw memory.
#![expect(unsafe_code, reason = "an allocator hands out raw memory")]

use core::alloc::{GlobalAlloc, Layout};
use core::cell::UnsafeCell;
use core::ptr::NonNull;

use janus_proto::addr::{PAGE_SHIFT, PAGE_SIZE, Pfn};
use linked_list_allocator::Heap;

use super::slab::{self, CLASS_SIZES, CLASSES, FrameRuns, Object, Slabs};
use super::{frames, reclaim};
use crate::percpu;
use crate::platform::IrqGuard;
use crate::platform::lock::IrqLock;

/// Objects that a magazine holds at most, and how many move at once when it is empty or full.
const MAGAZINE: usize = 32;
const BATCH: usize = MAGAZINE / 2;
/// Requests above this many bytes go to the frame allocator.
const LARGE: usize = 16 << 10;
/// Frames in an arena of middle-sized objects.
const ARENA_FRAMES: usize = 64;
/// Arenas at most; when all are full, middle-sized objects take whole frames.
const ARENAS: usize = 128;

/// Free objects of one class that one CPU keeps for itself.
#[derive(Clone, Copy, Debug)]
struct Magazine {
    head: Option<NonNull<Object>>,
    count: usize,
}

/// One CPU's magazines, one for each size class; used by that CPU alone, with interrupts masked.
#[derive(Debug)]
pub struct Magazines(UnsafeCell<[Magazine; CLASSES]>);

impl Magazines {
    pub(crate) const fn new() -> Self {
        Self(UnsafeCell::new([Magazine { head: None, count: 0 }; CLASSES]))
    }
}

/// The frame allocator as the slabs and arenas see it.
#[derive(Debug)]
struct KernelRuns;

// SAFETY: frames come zero or more at a time from the frame allocator, which gives each to one owner
// and keeps all RAM mapped at its own address.
unsafe impl FrameRuns for KernelRuns {
    fn take(&self, count: usize, align: usize) -> Option<NonNull<u8>> {
        let start = frames::allocate_aligned(count, align)?;
        NonNull::new(core::ptr::with_exposed_provenance_mut(usize::try_from(start.start().0).ok()?))
    }
    unsafe fn give(&self, start: NonNull<u8>, count: usize) {
        // SAFETY: the caller's promise.
        unsafe {
            frames::free(Pfn((start.as_ptr().expose_provenance() >> PAGE_SHIFT) as u64), count)
        }
    }
}

static SLABS: IrqLock<Slabs<KernelRuns>> = IrqLock::new(Slabs::new(KernelRuns));
static MEDIUM: IrqLock<Medium> = IrqLock::new(Medium { arenas: [const { None }; ARENAS] });

/// Heaps for objects of middle size.
struct Medium {
    arenas: [Option<Heap>; ARENAS],
}

impl Medium {
    fn allocate(&mut self, layout: Layout) -> Option<NonNull<u8>> {
        for arena in self.arenas.iter_mut().flatten() {
            if let Ok(memory) = arena.allocate_first_fit(layout) {
                return Some(memory);
            }
        }
        let slot = self.arenas.iter_mut().find(|slot| slot.is_none())?;
        let memory = KernelRuns.take(ARENA_FRAMES, 1)?;
        // SAFETY: this many bytes of memory, owned by the arena until it is empty and given back.
        let mut arena = unsafe { Heap::new(memory.as_ptr(), ARENA_FRAMES * PAGE_SIZE) };
        let result = arena.allocate_first_fit(layout).ok();
        *slot = Some(arena);
        result
    }

    /// Takes `memory` back if it lies in an arena.
    ///
    /// # Safety
    /// `memory` is from [`Self::allocate`] with `layout`, or from elsewhere; nobody uses it any more.
    unsafe fn free(&mut self, memory: NonNull<u8>, layout: Layout) -> bool {
        let inside = |arena: &Heap| (arena.bottom()..arena.top()).contains(&memory.as_ptr());
        let mut others = 0;
        let mut found = None;
        for slot in &mut self.arenas {
            match slot {
                Some(arena) if inside(arena) => found = Some(slot),
                Some(_) => others += 1,
                None => {}
            }
        }
        let Some(slot) = found else { return false };
        if let Some(arena) = slot {
            // SAFETY: it lies in this arena, so it is from this arena, with this layout (the caller's promise).
            unsafe { arena.deallocate(memory, layout) };
            if arena.used() == 0 && others > 0 {
                if let Some(bottom) = NonNull::new(arena.bottom()) {
                    // SAFETY: the run that `allocate` took; no object is left in it.
                    unsafe { KernelRuns.give(bottom, ARENA_FRAMES) };
                }
                *slot = None;
            }
        }
        true
    }
}

/// The kernel's `#[global_allocator]`.
#[derive(Debug)]
pub struct KernelHeap;

#[cfg(target_os = "none")]
#[global_allocator]
static HEAP: KernelHeap = KernelHeap;

impl KernelHeap {
    fn allocate(layout: Layout) -> Option<NonNull<u8>> {
        if let Some(class) = slab::class_of(layout) {
            return Self::allocate_small(class);
        }
        if layout.size() <= LARGE
            && layout.align() <= PAGE_SIZE
            && let Some(memory) = MEDIUM.lock().allocate(layout)
        {
            return Some(memory);
        }
        let (count, align) = frames_of(layout);
        KernelRuns.take(count, align)
    }

    fn allocate_small(class: usize) -> Option<NonNull<u8>> {
        let _irq = IrqGuard::new();
        // SAFETY: this CPU's own magazines, with interrupts masked: nobody else has a reference to them.
        let magazines = unsafe { &mut *percpu::current().magazines.0.get() };
        let magazine = magazines.get_mut(class)?;
        if magazine.head.is_none() {
            let mut slabs = SLABS.lock();
            // Of large objects fewer: each that is taken is written to, and may be the first use of its page.
            let size = CLASS_SIZES.get(class).copied().unwrap_or(PAGE_SIZE);
            for _ in 0..(2 * PAGE_SIZE / size).clamp(1, BATCH) {
                let Some(object) = slabs.take(class) else { break };
                // SAFETY: a free object, ours until it is handed out.
                unsafe { object.write(Object { next: magazine.head }) };
                magazine.head = Some(object);
                magazine.count += 1;
            }
        }
        let object = magazine.head?;
        // SAFETY: free objects in a magazine hold an initialised `Object`.
        magazine.head = unsafe { object.read() }.next;
        magazine.count -= 1;
        Some(object.cast())
    }

    /// # Safety
    /// `memory` is from [`Self::allocate_small`] with this class, and nobody uses it any more.
    unsafe fn free_small(memory: NonNull<u8>, class: usize) {
        let _irq = IrqGuard::new();
        // SAFETY: as in `allocate_small`.
        let magazines = unsafe { &mut *percpu::current().magazines.0.get() };
        let Some(magazine) = magazines.get_mut(class) else { return };
        let object = memory.cast::<Object>();
        // SAFETY: the memory of a freed object, at least 16 bytes and aligned for 16.
        unsafe { object.write(Object { next: magazine.head }) };
        magazine.head = Some(object);
        magazine.count += 1;
        if magazine.count > MAGAZINE {
            let mut slabs = SLABS.lock();
            for _ in 0..BATCH {
                let Some(object) = magazine.head else { break };
                // SAFETY: free objects in a magazine hold an initialised `Object`.
                magazine.head = unsafe { object.read() }.next;
                magazine.count -= 1;
                // SAFETY: from `Slabs::take` with this class, and free.
                unsafe { slabs.give(object, class) };
            }
        }
    }

    /// # Safety
    /// As [`GlobalAlloc::dealloc`].
    unsafe fn free(memory: NonNull<u8>, layout: Layout) {
        if let Some(class) = slab::class_of(layout) {
            // SAFETY: the same layout chose the same class when it was allocated.
            return unsafe { Self::free_small(memory, class) };
        }
        if layout.size() <= LARGE && layout.align() <= PAGE_SIZE
            // SAFETY: the caller's promise; an object outside the arenas is left alone.
            && unsafe { MEDIUM.lock().free(memory, layout) }
        {
            return;
        }
        // SAFETY: neither small nor in an arena: a run of frames of this length.
        unsafe { KernelRuns.give(memory, frames_of(layout).0) }
    }
}

/// The frames that a large object takes, and the alignment of the first.
fn frames_of(layout: Layout) -> (usize, usize) {
    (layout.size().div_ceil(PAGE_SIZE), layout.align().div_ceil(PAGE_SIZE))
}

// SAFETY: every path gives memory of at least the layout's size and alignment that nobody else has;
// nothing here unwinds, and nothing allocates through the global allocator.
unsafe impl GlobalAlloc for KernelHeap {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        reclaim::until(|| Self::allocate(layout)).map_or(core::ptr::null_mut(), NonNull::as_ptr)
    }
    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        if let Some(memory) = NonNull::new(memory) {
            // SAFETY: the caller's promise.
            unsafe { Self::free(memory, layout) }
        }
    }
    unsafe fn realloc(&self, memory: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        // SAFETY: the caller promises that `new_size`, rounded up to the alignment, is a valid size.
        let new_layout = unsafe { Layout::from_size_align_unchecked(new_size, layout.align()) };
        let stays = match (slab::class_of(layout), slab::class_of(new_layout)) {
            (Some(old), Some(new)) => old == new,
            (None, None) => {
                layout.size() > LARGE
                    && new_size > LARGE
                    && frames_of(layout).0 == frames_of(new_layout).0
            }
            _ => false,
        };
        if stays {
            return memory;
        }
        // SAFETY: `new_layout` has a nonzero size, as the caller promises.
        let new = unsafe { self.alloc(new_layout) };
        if !new.is_null() {
            // SAFETY: both are valid for the smaller of the sizes, and distinct.
            unsafe { core::ptr::copy_nonoverlapping(memory, new, layout.size().min(new_size)) };
            // SAFETY: the caller's promise; the old memory is given up.
            unsafe { self.dealloc(memory, layout) };
        }
        new
    }
}

/// How the heap stands: bytes in slabs of each size class, and bytes in arenas, for the `memory` command.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HeapStatistics {
    /// Bytes of memory held for small objects.
    pub slab_bytes: usize,
    /// Objects of each class in use (or in another CPU's magazine); sizes are [`CLASS_SIZES`].
    pub objects: [usize; CLASSES],
    /// Bytes held for objects of middle size.
    pub arena_bytes: usize,
    /// Bytes of them in use.
    pub arena_used: usize,
}

/// How the heap stands.
#[must_use]
pub fn statistics() -> HeapStatistics {
    let mut statistics = HeapStatistics::default();
    {
        let slabs = SLABS.lock();
        statistics.slab_bytes = slabs.bytes();
        statistics.objects = slabs.objects();
        // The lock has masked interrupts.
        // SAFETY: as in `allocate_small`; only read, and for no longer than this block.
        let magazines = unsafe { &*percpu::current().magazines.0.get() };
        for (objects, magazine) in statistics.objects.iter_mut().zip(magazines) {
            *objects -= magazine.count;
        }
    }
    for arena in MEDIUM.lock().arenas.iter().flatten() {
        statistics.arena_bytes += arena.size();
        statistics.arena_used += arena.used();
    }
    statistics
}

/// The size in bytes of each class of small objects.
#[must_use]
pub const fn class_sizes() -> &'static [usize; CLASSES] {
    &CLASS_SIZES
}

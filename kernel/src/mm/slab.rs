//! Slabs: runs of 16 KiB cut into objects of one size, the layer under the per-CPU magazines.
//!
//! A slab begins with its header, so an object's slab is found by masking its address. Slabs with
//! free objects are linked in a list for each class; an empty one goes back to the frame allocator,
//! unless it is the last with free objects.
// UNSAFETY: intrusive lists through raw memory.
#![expect(
    unsafe_code,
    reason = "free objects and slab headers are linked through the memory itself"
)]

use core::alloc::Layout;
use core::ptr::NonNull;

use janus_proto::addr::PAGE_SIZE;

/// How many size classes there are.
pub const CLASSES: usize = 16;
/// Their sizes in bytes.
pub const CLASS_SIZES: [usize; CLASSES] =
    [16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 640, 768, 1024, 1280, 1536, 2048];
/// Frames in a slab.
const SLAB_FRAMES: usize = 4;
const SLAB_BYTES: usize = SLAB_FRAMES * PAGE_SIZE;
/// The largest object.
const LARGEST: usize = 2048;

/// Where runs of frames come from.
///
/// # Implementation safety
/// `take` gives `count * PAGE_SIZE` bytes of memory, aligned to `align * PAGE_SIZE`, that nobody else
/// uses until `give`.
pub unsafe trait FrameRuns {
    /// Takes `count` adjacent frames, the first a multiple of `align`.
    fn take(&self, count: usize, align: usize) -> Option<NonNull<u8>>;
    /// Gives frames back.
    ///
    /// # Safety
    /// They are from one `take`, and nobody uses them any more.
    unsafe fn give(&self, start: NonNull<u8>, count: usize);
}

/// A free object: a link to the next one.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(16))]
pub struct Object {
    /// The next free object of its list.
    pub next: Option<NonNull<Object>>,
}

/// The alignment that every object of a class has: the largest power of two in its size.
const fn class_align(size: usize) -> usize {
    1 << size.trailing_zeros()
}

/// For each size in steps of 16 bytes, the smallest class that holds it.
const CLASS_OF_SIZE: [u8; LARGEST / 16 + 1] = {
    let mut table = [0; LARGEST / 16 + 1];
    let mut step = 0;
    let mut class = 0;
    while step < table.len() {
        #[expect(clippy::indexing_slicing, reason = "evaluated by the compiler")]
        if CLASS_SIZES[class] < step * 16 {
            class += 1;
        }
        #[expect(clippy::cast_possible_truncation, reason = "there are 16 classes")]
        #[expect(clippy::indexing_slicing, reason = "evaluated by the compiler")]
        {
            table[step] = class as u8;
        }
        step += 1;
    }
    table
};

/// The class that serves a layout; `None` if it is too large or too strictly aligned for any.
#[must_use]
#[inline]
pub fn class_of(layout: Layout) -> Option<usize> {
    let mut class = usize::from(*CLASS_OF_SIZE.get(layout.size().div_ceil(16))?);
    while class_align(*CLASS_SIZES.get(class)?) < layout.align() {
        class += 1;
    }
    Some(class)
}

/// The header at the start of each slab.
#[derive(Debug)]
#[repr(C)]
struct Slab {
    free: Option<NonNull<Object>>,
    used: usize,
    /// Neighbours in the list of slabs with free objects.
    previous: Option<NonNull<Slab>>,
    next: Option<NonNull<Slab>>,
    /// Objects from this offset on have never been used: they are not yet linked into `free`.
    untouched: usize,
}

const fn first_object(size: usize) -> usize {
    size_of::<Slab>().next_multiple_of(class_align(size))
}

const fn objects_in(size: usize) -> usize {
    (SLAB_BYTES - first_object(size)) / size
}

#[derive(Clone, Copy, Debug)]
struct Class {
    partial: Option<NonNull<Slab>>,
    slabs: usize,
    used: usize,
}

/// All slabs, by class.
#[derive(Debug)]
pub struct Slabs<F: FrameRuns> {
    classes: [Class; CLASSES],
    frames: F,
}

// SAFETY: the slabs are owned by this value; whoever has `&mut Slabs` has them alone.
unsafe impl<F: FrameRuns + Send> Send for Slabs<F> {}

impl<F: FrameRuns> Slabs<F> {
    /// No slabs yet; they come from `frames`.
    pub const fn new(frames: F) -> Self {
        Self { classes: [Class { partial: None, slabs: 0, used: 0 }; CLASSES], frames }
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        self.classes.iter().map(|class| class.slabs * SLAB_BYTES).sum()
    }

    /// Objects in use, by class.
    pub fn objects(&self) -> [usize; CLASSES] {
        self.classes.map(|class| class.used)
    }

    /// Takes a free object of a class; its contents are undefined.
    pub fn take(&mut self, class: usize) -> Option<NonNull<Object>> {
        let size = *CLASS_SIZES.get(class)?;
        let state = self.classes.get_mut(class)?;
        let mut at = match state.partial {
            Some(slab) => slab,
            None => {
                let slab = self.frames.take(SLAB_FRAMES, SLAB_FRAMES)?.cast::<Slab>();
                let header = Slab {
                    free: None,
                    used: 0,
                    previous: None,
                    next: None,
                    untouched: first_object(size),
                };
                // SAFETY: fresh memory, large and aligned enough, owned by `self` from now on.
                unsafe { slab.write(header) };
                state.partial = Some(slab);
                state.slabs += 1;
                slab
            }
        };
        // SAFETY: slabs in the list have an initialised header, and `&mut self` owns them all.
        let slab = unsafe { at.as_mut() };
        let object = match slab.free {
            Some(object) => {
                // SAFETY: objects in a free list hold an initialised `Object`.
                slab.free = unsafe { object.read() }.next;
                object
            }
            None => {
                let offset = slab.untouched;
                slab.untouched += size;
                // SAFETY: slabs in the list have a free object: with none in `free`, one lies at `untouched`,
                // inside the slab.
                unsafe { at.cast::<u8>().add(offset) }.cast()
            }
        };
        slab.used += 1;
        state.used += 1;
        if slab.used == objects_in(size) {
            state.partial = slab.next;
            if let Some(mut next) = slab.next.take() {
                // SAFETY: as above.
                unsafe { next.as_mut() }.previous = None;
            }
        }
        Some(object)
    }

    /// Takes an object back.
    ///
    /// # Safety
    /// It is from [`Self::take`] with this class, and nobody uses it any more.
    pub unsafe fn give(&mut self, object: NonNull<Object>, class: usize) {
        let Some(size) = CLASS_SIZES.get(class) else { return };
        let Some(state) = self.classes.get_mut(class) else { return };
        let offset = object.addr().get() % SLAB_BYTES;
        // SAFETY: an object lies `offset` bytes into its slab, and the slab is aligned to its size.
        let mut at = unsafe { object.cast::<u8>().sub(offset) }.cast::<Slab>();
        // SAFETY: the header of a slab in use; `&mut self` owns all headers.
        let slab = unsafe { at.as_mut() };
        // SAFETY: the object is free now, and large enough for a link.
        unsafe { object.write(Object { next: slab.free }) };
        slab.free = Some(object);
        let was_full = slab.used == objects_in(*size);
        slab.used -= 1;
        state.used -= 1;
        if was_full {
            slab.next = state.partial;
            if let Some(mut next) = slab.next {
                // SAFETY: slabs in the list have an initialised header.
                unsafe { next.as_mut() }.previous = Some(at);
            }
            state.partial = Some(at);
        }
        let alone = slab.previous.is_none() && slab.next.is_none();
        if slab.used == 0 && !alone {
            match slab.previous {
                // SAFETY: as above.
                Some(mut previous) => unsafe { previous.as_mut() }.next = slab.next,
                None => state.partial = slab.next,
            }
            if let Some(mut next) = slab.next {
                // SAFETY: as above.
                unsafe { next.as_mut() }.previous = slab.previous;
            }
            state.slabs -= 1;
            // SAFETY: one `take` of this many frames; no object in it is used, and no list knows it.
            unsafe { self.frames.give(at.cast(), SLAB_FRAMES) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;
    use std::vec::Vec;

    struct HostRuns(Cell<usize>);

    // SAFETY: the host's allocator gives memory of the layout asked for.
    unsafe impl FrameRuns for HostRuns {
        fn take(&self, count: usize, align: usize) -> Option<NonNull<u8>> {
            self.0.set(self.0.get() + count);
            let layout = Layout::from_size_align(count * PAGE_SIZE, align * PAGE_SIZE).unwrap();
            // SAFETY: the size is not zero.
            NonNull::new(unsafe { std::alloc::alloc(layout) })
        }
        unsafe fn give(&self, start: NonNull<u8>, count: usize) {
            self.0.set(self.0.get() - count);
            let layout = Layout::from_size_align(count * PAGE_SIZE, count * PAGE_SIZE).unwrap();
            // SAFETY: from `take`, which is only ever asked for `align == count` here.
            unsafe { std::alloc::dealloc(start.as_ptr(), layout) }
        }
    }

    #[test]
    fn a_layout_gets_the_smallest_class_that_fits() {
        let class = |size, align| {
            class_of(Layout::from_size_align(size, align).unwrap()).map(|c| CLASS_SIZES[c])
        };
        for (size, align, expected) in [
            (0, 1, Some(16)),
            (1, 1, Some(16)),
            (17, 8, Some(32)),
            (33, 16, Some(48)),
            (33, 64, Some(64)),
            (65, 64, Some(128)),
            (300, 256, Some(512)),
            (2048, 8, Some(2048)),
            (2000, 2048, Some(2048)),
            (2049, 8, None),
            (16, 4096, None),
        ] {
            assert_eq!(class(size, align), expected, "{size} bytes aligned to {align}");
        }
    }

    #[test]
    fn objects_of_every_class_are_aligned_apart_and_inside() {
        for (class, size) in CLASS_SIZES.iter().enumerate() {
            let mut slabs = Slabs::new(HostRuns(Cell::new(0)));
            let mut objects: Vec<_> =
                (0..3 * objects_in(*size)).map(|_| slabs.take(class).unwrap()).collect();
            assert_eq!(slabs.bytes(), 3 * SLAB_BYTES);
            objects.sort();
            for pair in objects.windows(2) {
                assert!(pair[1].addr().get() - pair[0].addr().get() >= *size);
            }
            for object in &objects {
                assert_eq!(object.addr().get() % class_align(*size), 0);
                assert!(object.addr().get() % SLAB_BYTES + size <= SLAB_BYTES);
                assert!(object.addr().get() % SLAB_BYTES >= size_of::<Slab>());
            }
            for object in objects {
                // SAFETY: taken above, given back once.
                unsafe { slabs.give(object, class) };
            }
            assert_eq!((slabs.bytes(), slabs.objects()[class]), (SLAB_BYTES, 0));
            assert_eq!(slabs.frames.0.get(), SLAB_FRAMES);
        }
    }

    #[test]
    fn random_work_never_gives_one_object_to_two_owners() {
        let mut slabs = Slabs::new(HostRuns(Cell::new(0)));
        let mut seed = 12345_u64;
        let mut random = move |below: usize| {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (seed >> 33) as usize % below
        };
        let mut held: Vec<(NonNull<Object>, usize, u8)> = Vec::new();
        for round in 0..50_000_usize {
            if held.len() < 400 && random(5) < 3 {
                let class = random(CLASSES);
                let object = slabs.take(class).unwrap();
                let mark = u8::try_from(round % 251).unwrap();
                // SAFETY: the object is ours and this large.
                unsafe { object.cast::<u8>().write_bytes(mark, CLASS_SIZES[class]) };
                held.push((object, class, mark));
            } else if !held.is_empty() {
                let (object, class, mark) = held.swap_remove(random(held.len()));
                // SAFETY: filled above, and ours.
                let bytes = unsafe {
                    std::slice::from_raw_parts(object.cast::<u8>().as_ptr(), CLASS_SIZES[class])
                };
                assert!(bytes.iter().all(|byte| *byte == mark));
                // SAFETY: taken above, given back once.
                unsafe { slabs.give(object, class) };
            }
        }
        assert_eq!(slabs.objects().iter().sum::<usize>(), held.len());
    }
}

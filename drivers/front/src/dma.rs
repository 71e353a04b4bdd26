//! Memory that a peer may read or write: owned, whole pages, moved rather than borrowed.
// UNSAFETY: turns page frames into slices and atomics; the only place in the drivers that does.
#![expect(unsafe_code, reason = "the one cast from frames to memory stands here")]

use core::fmt;
use core::ops::{Deref, DerefMut};
use core::ptr::NonNull;
use core::sync::atomic::{AtomicU8, AtomicU64, Ordering};

use janus_proto::addr::{Gpa, PAGE_SIZE};
use janus_proto::sync::AtomicU32;

/// Where page frames come from.
///
/// # Implementation safety
/// - `allocate` returns zeroed, page-aligned memory of `pages * PAGE_SIZE` bytes that is readable,
///   writable, guest-physically contiguous, and owned by the caller until `free`.
/// - `guest_address` is the guest physical (pseudo-physical) address of that memory.
pub unsafe trait FrameSource: Sync {
    /// Allocates `pages` contiguous zeroed pages; `None` when memory is short.
    fn allocate(&self, pages: usize) -> Option<NonNull<u8>>;
    /// Takes pages back.
    ///
    /// # Safety
    /// `start` and `pages` are those of one `allocate`, and nobody, peers included, uses the memory any more.
    unsafe fn free(&self, start: NonNull<u8>, pages: usize);
    /// The guest physical address of memory that `allocate` returned (or of a byte inside it).
    fn guest_address(&self, memory: NonNull<u8>) -> Gpa;
}

impl fmt::Debug for dyn FrameSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("FrameSource")
    }
}

/// An owned run of pages that can be given to a peer and comes back.
///
/// While a peer uses it, it lies in the driver's table of requests, where nobody has a reference to its bytes.
pub struct DmaBuf {
    start: NonNull<u8>,
    pages: usize,
    source: &'static dyn FrameSource,
}

// SAFETY: the memory is owned by this value alone, and `FrameSource` is `Sync`.
unsafe impl Send for DmaBuf {}
// SAFETY: `&DmaBuf` gives only shared access to bytes that nobody writes while it is borrowed.
unsafe impl Sync for DmaBuf {}

impl DmaBuf {
    /// Allocates room for at least `len` bytes (rounded up to whole pages, at least one), zeroed.
    #[must_use]
    pub fn new(source: &'static dyn FrameSource, len: usize) -> Option<Self> {
        let pages = len.div_ceil(PAGE_SIZE).max(1);
        Some(Self { start: source.allocate(pages)?, pages, source })
    }
    /// The guest physical address of the first byte.
    #[must_use]
    pub fn guest_address(&self) -> Gpa {
        self.source.guest_address(self.start)
    }
    /// Whole pages owned.
    #[must_use]
    pub fn pages(&self) -> usize {
        self.pages
    }
    /// Gives the memory up for good, because a peer may still write it. Report it where you do this.
    pub fn leak(self) {
        core::mem::forget(self);
    }
}

impl Deref for DmaBuf {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        // SAFETY: `allocate` gave this many initialised bytes, owned by `self`; drivers move the buffer
        // away from every borrower before a peer may write it.
        unsafe { core::slice::from_raw_parts(self.start.as_ptr(), self.pages * PAGE_SIZE) }
    }
}

impl DerefMut for DmaBuf {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `deref`; `&mut self` makes the access exclusive.
        unsafe { core::slice::from_raw_parts_mut(self.start.as_ptr(), self.pages * PAGE_SIZE) }
    }
}

impl Drop for DmaBuf {
    fn drop(&mut self) {
        // SAFETY: `start` and `pages` are from one `allocate`; a buffer that a peer still uses is never
        // dropped but leaked (`leak`).
        unsafe { self.source.free(self.start, self.pages) }
    }
}

impl fmt::Debug for DmaBuf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DmaBuf({:#x}, {} pages)", self.guest_address().0, self.pages)
    }
}

/// Pages that a peer reads and writes at any time: a ring. Seen only as atomics.
pub struct SharedFrames(DmaBuf);

impl SharedFrames {
    /// Allocates `pages` zeroed pages to share.
    #[must_use]
    pub fn new(source: &'static dyn FrameSource, pages: usize) -> Option<Self> {
        DmaBuf::new(source, pages.checked_mul(PAGE_SIZE)?).map(Self)
    }
    /// The guest physical address of the first byte.
    #[must_use]
    pub fn guest_address(&self) -> Gpa {
        self.0.guest_address()
    }
    /// Whole pages owned.
    #[must_use]
    pub fn pages(&self) -> usize {
        self.0.pages
    }
    /// See [`DmaBuf::leak`].
    pub fn leak(self) {
        self.0.leak();
    }
    /// Copies bytes out, from byte `offset` on, as far as both reach; what the peer writes meanwhile may be torn.
    pub fn copy_out(&self, offset: usize, target: &mut [u8]) {
        let (start, middle) = self.split(offset);
        let (head, rest) = target.split_at_mut(target.len().min(start.len()));
        for (byte, shared) in head.iter_mut().zip(start) {
            *byte = shared.load(Ordering::Relaxed);
        }
        // Whole words, eight at a time: a page is copied for every 4 KiB of disk data.
        let (words, tail) = rest.as_chunks_mut::<8>();
        for (word, shared) in words.iter_mut().zip(middle) {
            *word = shared.load(Ordering::Relaxed).to_ne_bytes();
        }
        if let Some(shared) = middle.get(words.len()) {
            for (byte, shared) in tail.iter_mut().zip(shared.load(Ordering::Relaxed).to_ne_bytes())
            {
                *byte = shared;
            }
        }
    }
    /// Copies bytes in, from byte `offset` on, as far as both reach.
    pub fn copy_in(&self, offset: usize, source: &[u8]) {
        let (start, middle) = self.split(offset);
        let (head, rest) = source.split_at(source.len().min(start.len()));
        for (byte, shared) in head.iter().zip(start) {
            shared.store(*byte, Ordering::Relaxed);
        }
        let (words, tail) = rest.as_chunks::<8>();
        for (word, shared) in words.iter().zip(middle) {
            shared.store(u64::from_ne_bytes(*word), Ordering::Relaxed);
        }
        let written = offset + head.len() + words.len() * 8;
        for (byte, shared) in tail.iter().zip(self.bytes().get(written..).unwrap_or(&[])) {
            shared.store(*byte, Ordering::Relaxed);
        }
    }
    fn bytes(&self) -> &[AtomicU8] {
        // SAFETY: as in `deref`; bytes have no alignment.
        unsafe {
            core::slice::from_raw_parts(self.0.start.as_ptr().cast(), self.0.pages * PAGE_SIZE)
        }
    }
    /// The bytes from `offset` to the next word, and the words from there on.
    fn split(&self, offset: usize) -> (&[AtomicU8], &[AtomicU64]) {
        let aligned = offset.next_multiple_of(8).min(self.0.pages * PAGE_SIZE);
        let start = self.bytes().get(offset..aligned).unwrap_or(&[]);
        // SAFETY: as in `deref`: page-aligned, so aligned for words at their multiples.
        let words = unsafe {
            core::slice::from_raw_parts(
                self.0.start.as_ptr().cast::<AtomicU64>(),
                self.0.pages * PAGE_SIZE / size_of::<AtomicU64>(),
            )
        };
        (start, words.get(aligned / 8..).unwrap_or(&[]))
    }
}

#[cfg(not(loom))]
impl Deref for SharedFrames {
    type Target = [AtomicU32];
    fn deref(&self) -> &[AtomicU32] {
        // SAFETY: 1. page-aligned, so aligned for `AtomicU32`; 2. `pages * PAGE_SIZE` initialised bytes owned
        // by `self`; 3. never seen as anything but atomics, so a concurrent write by the peer is no data race.
        unsafe {
            core::slice::from_raw_parts(
                self.0.start.as_ptr().cast::<AtomicU32>(),
                self.0.pages * PAGE_SIZE / size_of::<AtomicU32>(),
            )
        }
    }
}

impl fmt::Debug for SharedFrames {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SharedFrames({:#x}, {} pages)", self.guest_address().0, self.pages())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fake::FakeXen;

    #[test]
    fn copies_reach_every_byte_and_no_other() {
        let frames = SharedFrames::new(FakeXen::new(), 1).unwrap();
        let data: Vec<u8> = (1..=64).collect();
        for offset in [0, 1, 7, 8, 9, 4000, 4032, 4040, 4095, 4096, 5000] {
            for len in [0, 1, 7, 8, 9, 40, 64] {
                frames.copy_in(0, &[0; PAGE_SIZE]);
                frames.copy_in(offset, &data[..len]);
                let mut all = [0xff; PAGE_SIZE];
                frames.copy_out(0, &mut all);
                let mut expected = [0; PAGE_SIZE];
                let fits = len.min(PAGE_SIZE.saturating_sub(offset));
                if fits > 0 {
                    expected[offset..offset + fits].copy_from_slice(&data[..fits]);
                }
                assert!(all == expected, "in: offset {offset} len {len}");
                let mut back = [0xee; 64];
                frames.copy_out(offset, &mut back[..len]);
                let mut expected = [0xee; 64];
                expected[..fits].copy_from_slice(&data[..fits]);
                assert_eq!(back, expected, "out: offset {offset} len {len}");
            }
        }
    }
}

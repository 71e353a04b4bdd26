//! Copies between memory that a guest may write at any time and our own: each byte once, and fast, since every packet
//! and block goes through here.
//!
//! `rep movsb` is outside of what Rust says about memory, so that a guest that writes meanwhile is no data race; and it
//! is several times as fast as a loop over atomics. Under Miri and loom, which know no assembly, that loop is used.
// UNSAFETY: copies in assembly.

use janus_proto::sync::AtomicU32;

/// Copies bytes out of shared memory, each once; `false`: the range is outside.
#[must_use]
pub fn copy_out(words: &[AtomicU32], offset: usize, buf: &mut [u8]) -> bool {
    let inside = inside(words, offset, buf.len());
    if inside {
        imp::copy_out(words, offset, buf);
    }
    inside
}

/// Copies bytes into shared memory; `false`: the range is outside, and nothing was written.
#[must_use]
pub fn copy_in(words: &[AtomicU32], offset: usize, bytes: &[u8]) -> bool {
    let inside = inside(words, offset, bytes.len());
    if inside {
        imp::copy_in(words, offset, bytes);
    }
    inside
}

/// A range of shared memory that is known to be there.
#[derive(Clone, Copy, Debug)]
pub struct Piece<'a> {
    words: &'a [AtomicU32],
    offset: usize,
    len: usize,
}

impl<'a> Piece<'a> {
    /// `len` bytes of `words` from byte `offset` on; `None`: some are outside.
    #[must_use]
    pub fn new(words: &'a [AtomicU32], offset: usize, len: usize) -> Option<Self> {
        inside(words, offset, len).then_some(Self { words, offset, len })
    }

    /// Its bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it has none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Copies as many bytes as both have out of it.
    pub fn copy_out(&self, buf: &mut [u8]) {
        let len = self.len.min(buf.len());
        imp::copy_out(self.words, self.offset, buf.get_mut(..len).unwrap_or_default());
    }

    /// Copies as many bytes as both have into it.
    pub fn copy_in(&self, bytes: &[u8]) {
        let len = self.len.min(bytes.len());
        imp::copy_in(self.words, self.offset, bytes.get(..len).unwrap_or_default());
    }

    /// Where it is, for whoever copies by other means: `len` bytes that others may write too.
    pub(crate) fn address(&self) -> *mut u8 {
        self.words.as_ptr().cast_mut().cast::<u8>().wrapping_add(self.offset)
    }
}

fn inside(words: &[AtomicU32], offset: usize, len: usize) -> bool {
    offset.checked_add(len).is_some_and(|end| end <= size_of_val(words))
}

#[cfg(not(any(miri, loom)))]
mod imp {
    #![expect(unsafe_code, reason = "a fast copy of memory that is shared with a guest")]

    use std::arch::asm;

    use super::AtomicU32;

    /// `offset` and the length are inside of `words`.
    pub(super) fn copy_out(words: &[AtomicU32], offset: usize, buf: &mut [u8]) {
        let from = words.as_ptr().cast::<u8>().wrapping_add(offset);
        // SAFETY: the caller checked that `from` has as many bytes as `buf`, which is ours alone; the direction flag
        // is clear by the ABI.
        unsafe {
            asm!(
                "rep movsb",
                inout("rsi") from => _,
                inout("rdi") buf.as_mut_ptr() => _,
                inout("rcx") buf.len() => _,
                options(nostack, preserves_flags),
            );
        }
    }

    /// `offset` and the length are inside of `words`.
    pub(super) fn copy_in(words: &[AtomicU32], offset: usize, bytes: &[u8]) {
        let to = words.as_ptr().cast_mut().cast::<u8>().wrapping_add(offset);
        // SAFETY: the caller checked that `to` has as many bytes as `bytes`; atomics may be written through a shared
        // reference; the direction flag is clear by the ABI.
        unsafe {
            asm!(
                "rep movsb",
                inout("rsi") bytes.as_ptr() => _,
                inout("rdi") to => _,
                inout("rcx") bytes.len() => _,
                options(nostack, preserves_flags),
            );
        }
    }
}

#[cfg(any(miri, loom))]
mod imp {
    use janus_proto::sync::Ordering;

    use super::AtomicU32;

    pub(super) fn copy_out(words: &[AtomicU32], offset: usize, buf: &mut [u8]) {
        for (index, to) in (offset..).zip(buf) {
            let word = words.get(index / 4).map_or(0, |word| word.load(Ordering::Relaxed));
            *to = word.to_ne_bytes().get(index % 4).copied().unwrap_or_default();
        }
    }

    pub(super) fn copy_in(words: &[AtomicU32], offset: usize, bytes: &[u8]) {
        for (index, from) in (offset..).zip(bytes) {
            let Some(word) = words.get(index / 4) else { return };
            let mut value = word.load(Ordering::Relaxed).to_ne_bytes();
            if let Some(byte) = value.get_mut(index % 4) {
                *byte = *from;
            }
            word.store(u32::from_ne_bytes(value), Ordering::Relaxed);
        }
    }
}

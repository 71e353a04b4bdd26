//! Device registers in memory: volatile, of the width that was asked for, never outside their window.
// UNSAFETY: reads and writes device registers by address; the only place in the drivers that does.
#![expect(unsafe_code, reason = "volatile access to registers stands here and nowhere else")]

use core::fmt;
use core::ptr::NonNull;

/// A window of device registers.
///
/// An access outside it, or misaligned, reads as all ones and writes nothing, as on a bus where nobody
/// answers. Clones are the same registers.
#[derive(Clone)]
pub struct MmioRegion {
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: registers have no owner among CPUs; every access is volatile and atomic by its width on x86.
unsafe impl Send for MmioRegion {}
// SAFETY: as for `Send`.
unsafe impl Sync for MmioRegion {}

macro_rules! accessors {
    ($($int:ty: $read:ident, $write:ident;)*) => {$(
        #[doc = concat!("Reads a `", stringify!($int), "` register.")]
        #[must_use]
        pub fn $read(&self, offset: usize) -> $int {
            match self.at::<$int>(offset) {
                // SAFETY: `at` checked that the register lies in the window and is aligned; `new`
                // promised that the window is mapped and is registers only.
                Some(register) => unsafe { register.read_volatile() },
                None => <$int>::MAX,
            }
        }
        #[doc = concat!("Writes a `", stringify!($int), "` register.")]
        pub fn $write(&self, offset: usize, value: $int) {
            if let Some(register) = self.at::<$int>(offset) {
                // SAFETY: as for the read.
                unsafe { register.write_volatile(value) }
            }
        }
    )*};
}

impl MmioRegion {
    /// Takes a window of registers.
    ///
    /// # Safety
    /// `start..start + len` is mapped, uncached, for the rest of the program, and holds device registers:
    /// no Rust object lies there, and no access to it can break one.
    #[must_use]
    pub unsafe fn new(start: NonNull<u8>, len: usize) -> Self {
        Self { start, len }
    }
    /// Bytes in the window.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }
    /// Whether the window is empty.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
    /// The part of the window at `offset`; `None` if it is not wholly inside.
    #[must_use]
    pub fn part(&self, offset: usize, len: usize) -> Option<Self> {
        if offset.checked_add(len)? > self.len {
            return None;
        }
        // SAFETY: `offset` is at most `len`, so the sum stays inside the window or one past its end.
        Some(Self { start: unsafe { self.start.add(offset) }, len })
    }

    accessors! {
        u8: read8, write8;
        u16: read16, write16;
        u32: read32, write32;
    }

    fn at<T>(&self, offset: usize) -> Option<NonNull<T>> {
        if offset.checked_add(size_of::<T>())? > self.len {
            return None;
        }
        // SAFETY: checked above to be inside the window.
        let register = unsafe { self.start.add(offset) }.cast::<T>();
        register.is_aligned().then_some(register)
    }
}

impl fmt::Debug for MmioRegion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "MmioRegion({:p}, {:#x} bytes)", self.start, self.len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accesses_outside_the_window_read_as_ones() {
        let mut registers = [0x0403_0201u32, 0];
        // SAFETY: the array outlives the region and is used through it alone.
        let region = unsafe { MmioRegion::new(NonNull::from(&mut registers).cast(), 8) };
        assert_eq!((region.read8(1), region.read16(2), region.read32(0)), (2, 0x0403, 0x0403_0201));
        region.write16(4, 7);
        assert_eq!(region.read32(4), 7);
        assert_eq!(region.read32(5), u32::MAX, "misaligned and over the end");
        assert_eq!(region.read16(1), u16::MAX, "misaligned");
        assert_eq!(region.read8(8), u8::MAX, "behind the end");
        assert_eq!(region.read32(usize::MAX), u32::MAX);
        region.write32(8, 1);
        let part = region.part(4, 4).unwrap();
        assert_eq!(part.read16(0), 7);
        assert!(part.part(2, 3).is_none() && region.part(usize::MAX, 2).is_none());
    }
}

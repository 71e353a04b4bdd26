//! A guest's memory, as its devices see it: only as atomics, and only what they may use.

use std::fmt;
use std::ops::Deref;
use std::sync::Arc;
use std::sync::atomic::AtomicU32;

use janus_proto::addr::{Gpa, Mfn, PAGE_SIZE};
use janus_proto::grant::Access;

use crate::machine::ram::{FIRST_FRAME, Ram};
use crate::memory::{Piece, copy_in, copy_out};

/// Memory that stays where it is as long as this lives.
pub struct Pinned {
    words: Box<dyn Deref<Target = [AtomicU32]> + Send + Sync>,
    /// Where it begins in the words, in bytes.
    offset: usize,
    len: usize,
}

impl Pinned {
    /// `len` bytes of what gives the words, from byte `offset` on.
    pub fn new(
        words: impl Deref<Target = [AtomicU32]> + Send + Sync + 'static,
        offset: usize,
        len: usize,
    ) -> Option<Self> {
        Piece::new(&words, offset, len)?;
        Some(Self { words: Box::new(words), offset, len })
    }

    /// Its bytes.
    pub(super) fn piece(&self) -> Option<Piece<'_>> {
        Piece::new(&self.words, self.offset, self.len)
    }
}

impl fmt::Debug for Pinned {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Pinned({} bytes)", self.len)
    }
}

/// The words from its first byte on, if that is the first of a word.
impl Deref for Pinned {
    type Target = [AtomicU32];
    fn deref(&self) -> &[AtomicU32] {
        let first = if self.offset.is_multiple_of(4) { self.offset / 4 } else { usize::MAX };
        self.words.get(first..).unwrap_or_default()
    }
}

/// A guest's memory. An address is what the driver writes into a descriptor; what it means, the engine says.
pub trait GuestMemory: Send + Sync + fmt::Debug {
    /// Calls `with` with words in which the `len` bytes from `address` on lie, and where in them these begin, in
    /// bytes; `None`: not all of that is memory that a device may access in this way, and nothing was called.
    fn with(
        &self,
        address: Gpa,
        len: usize,
        access: Access,
        with: &mut dyn FnMut(&[AtomicU32], usize),
    ) -> Option<()>;

    /// The same bytes, to be accessed until the result is dropped.
    fn pin(&self, address: Gpa, len: usize, access: Access) -> Option<Pinned>;

    /// Gives the whole pages of a range back to the host: they read as zeroes until they are written again. How many;
    /// `None`: that cannot be done.
    fn discard(&self, _address: Gpa, _len: usize) -> Option<u64> {
        None
    }

    /// Whether drivers must not hand out addresses of their own memory, but what their platform gives them for it
    /// (`VIRTIO_F_ACCESS_PLATFORM`).
    fn needs_platform_addresses(&self) -> bool {
        false
    }
}

/// Copies from the guest; `None`: not all of it can be read.
pub(super) fn read(memory: &dyn GuestMemory, address: Gpa, buf: &mut [u8]) -> Option<()> {
    let mut copied = false;
    memory.with(address, buf.len(), Access::ReadOnly, &mut |words, offset| {
        copied = copy_out(words, offset, buf);
    })?;
    copied.then_some(())
}

/// Copies to the guest; `None`: not all of it can be written.
pub(super) fn write(memory: &dyn GuestMemory, address: Gpa, bytes: &[u8]) -> Option<()> {
    let mut copied = false;
    memory.with(address, bytes.len(), Access::ReadWrite, &mut |words, offset| {
        copied = copy_in(words, offset, bytes);
    })?;
    copied.then_some(())
}

/// A part of a guest's physical address space that is memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    /// Where it starts, a multiple of the page size.
    pub start: Gpa,
    /// The frame that is there.
    pub frame: Mfn,
    /// Frames.
    pub frames: u64,
}

/// The memory of a guest that knows addresses of its own making: hardware-virtualised ones.
#[derive(Clone, Debug)]
pub struct PhysicalMemory {
    ram: Arc<Ram>,
    regions: Arc<[Region]>,
}

impl PhysicalMemory {
    /// `regions` of `ram`, which do not overlap; `None`: one of them is not in `ram`, or beyond all addresses.
    #[must_use]
    pub fn new(ram: Arc<Ram>, regions: &[Region]) -> Option<Self> {
        for region in regions {
            ram.words(region.frame, region.frames)?;
            region.frames.checked_mul(PAGE_SIZE as u64)?.checked_add(region.start.0)?;
        }
        Some(Self { ram, regions: regions.into() })
    }

    /// All of `ram` as one region from address 0 on.
    #[must_use]
    pub fn flat(ram: Arc<Ram>) -> Self {
        let region = Region { start: Gpa(0), frame: FIRST_FRAME, frames: ram.frames() };
        Self { ram, regions: [region].into() }
    }

    /// The frame at an address, and how many bytes it is from the start of that frame.
    fn locate(&self, address: Gpa, len: usize) -> Option<(Mfn, usize)> {
        let len = u64::try_from(len).ok()?;
        self.regions.iter().find_map(|region| {
            let offset = address.0.checked_sub(region.start.0)?;
            let end = offset.checked_add(len)?;
            let fits = end <= region.frames * PAGE_SIZE as u64 && offset < end.max(1);
            let frame = Mfn(region.frame.0 + offset / PAGE_SIZE as u64);
            fits.then_some((frame, usize::try_from(offset % PAGE_SIZE as u64).ok()?))
        })
    }
}

/// The whole pages of a range.
pub(super) fn whole_pages(address: Gpa, len: usize) -> Option<std::ops::Range<u64>> {
    let page = PAGE_SIZE as u64;
    let end = address.0.checked_add(u64::try_from(len).ok()?)?;
    Some(address.0.div_ceil(page)..end / page)
}

/// Frames that are there as long as this is.
struct Held {
    ram: Arc<Ram>,
    frame: Mfn,
    frames: u64,
}

impl Deref for Held {
    type Target = [AtomicU32];
    fn deref(&self) -> &[AtomicU32] {
        self.ram.words(self.frame, self.frames).unwrap_or_default()
    }
}

/// How many frames `len` bytes take, `offset` bytes into the first one.
pub(super) fn frames_of(offset: usize, len: usize) -> u64 {
    offset.saturating_add(len).div_ceil(PAGE_SIZE) as u64
}

impl GuestMemory for PhysicalMemory {
    fn with(
        &self,
        address: Gpa,
        len: usize,
        _access: Access,
        with: &mut dyn FnMut(&[AtomicU32], usize),
    ) -> Option<()> {
        let (frame, offset) = self.locate(address, len)?;
        with(self.ram.words(frame, frames_of(offset, len))?, offset);
        Some(())
    }

    fn pin(&self, address: Gpa, len: usize, _access: Access) -> Option<Pinned> {
        let (frame, offset) = self.locate(address, len)?;
        let held = Held { ram: Arc::clone(&self.ram), frame, frames: frames_of(offset, len) };
        Pinned::new(held, offset, len)
    }

    fn discard(&self, address: Gpa, len: usize) -> Option<u64> {
        let mut count = 0;
        for page in whole_pages(address, len)? {
            let (frame, _) = self.locate(Gpa(page * PAGE_SIZE as u64), PAGE_SIZE)?;
            count += u64::from(self.ram.discard(frame));
        }
        Some(count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn memory() -> PhysicalMemory {
        let ram = Arc::new(Ram::new(4).unwrap());
        let part = |start, index, frames| Region {
            start: Gpa(start),
            frame: Mfn(FIRST_FRAME.0 + index),
            frames,
        };
        PhysicalMemory::new(ram, &[part(0, 0, 1), part(0x10_0000, 1, 3)]).unwrap()
    }

    #[test]
    fn bytes_are_found_in_their_region_across_its_pages() {
        let memory = memory();
        let bytes: Vec<u8> = (0..=255).collect();
        for address in [0, 1, 4096 - 256, 0x10_0000, 0x10_0fff, 0x10_2f00] {
            write(&memory, Gpa(address), &bytes).unwrap();
            let mut back = [0; 256];
            read(&memory, Gpa(address), &mut back).unwrap();
            assert_eq!(back[..], bytes[..], "{address:#x}");
        }
    }

    #[test]
    fn what_is_not_wholly_in_one_region_is_refused() {
        let memory = memory();
        for (address, len) in [
            (4095, 2),
            (4096, 1),
            (0xf_ffff, 2),
            (0x10_3000, 1),
            (0x10_2fff, 2),
            (u64::MAX, 1),
            (u64::MAX - 3, 8),
            (0, usize::MAX),
        ] {
            let mut called = false;
            let found = memory.with(Gpa(address), len, Access::ReadOnly, &mut |_, _| called = true);
            assert!(found.is_none() && !called, "{address:#x} {len}");
            assert!(memory.pin(Gpa(address), len, Access::ReadWrite).is_none());
        }
        let pinned = memory.pin(Gpa(0x10_1002), 4, Access::ReadWrite).unwrap();
        assert!(pinned.is_empty() && pinned.piece().unwrap().len() == 4, "rings are made of words");
    }

    #[test]
    fn regions_outside_memory_are_refused() {
        let ram = Arc::new(Ram::new(4).unwrap());
        for (start, frame, frames) in
            [(0, FIRST_FRAME.0, 5), (0, 0, 1), (u64::MAX - 4095, FIRST_FRAME.0, 2)]
        {
            let region = Region { start: Gpa(start), frame: Mfn(frame), frames };
            assert!(PhysicalMemory::new(Arc::clone(&ram), &[region]).is_none());
        }
    }
}

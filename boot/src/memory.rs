//! The memory map, and checked reading of what a loader left in memory.

use crate::Problems;
use arrayvec::ArrayVec;
use janus_proto::addr::Gpa;

/// Most ranges that are kept; PC firmware gives 5 to 40, Linux's boot_params 128.
pub const MAX_RANGES: usize = 160;
/// Longest command line that is read, in bytes.
pub const MAX_COMMAND_LINE: u64 = 4096;

/// What a range of guest physical memory is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum MemoryKind {
    /// Ordinary memory, free unless [`crate::BootInfo::reserved`] names it.
    Usable,
    /// ACPI tables, usable once they have been read.
    AcpiReclaimable,
    /// ACPI non-volatile storage: never touched.
    AcpiNvs,
    /// Firmware, devices, holes.
    Reserved,
    /// Broken memory, or a type this kernel does not know.
    Unusable,
}

impl MemoryKind {
    /// From an E820 type, which PVH and multiboot use as well (ACPI 6.5, 15.1).
    #[must_use]
    pub const fn from_e820(value: u32) -> Self {
        match value {
            1 => Self::Usable,
            2 => Self::Reserved,
            3 => Self::AcpiReclaimable,
            4 => Self::AcpiNvs,
            _ => Self::Unusable,
        }
    }
}

/// One range of the memory map, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryRange {
    /// First byte.
    pub start: Gpa,
    /// Bytes.
    pub len: u64,
    /// What it is.
    pub kind: MemoryKind,
}

impl MemoryRange {
    /// The first byte after it.
    #[must_use]
    pub const fn end(&self) -> u64 {
        self.start.0 + self.len // `MemoryMap::add` lets no range in that wraps
    }
}

/// The memory map: sorted by address, without overlaps. Where the loader's ranges overlapped, the less
/// usable kind has won.
#[derive(Clone, Debug, Default)]
pub struct MemoryMap {
    ranges: ArrayVec<MemoryRange, MAX_RANGES>,
}

impl MemoryMap {
    /// An empty map.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// The ranges, lowest first.
    #[must_use]
    pub fn ranges(&self) -> &[MemoryRange] {
        &self.ranges
    }

    /// Usable bytes in all.
    #[must_use]
    pub fn usable_bytes(&self) -> u64 {
        self.ranges.iter().filter(|r| r.kind == MemoryKind::Usable).map(|r| r.len).sum()
    }

    /// Adds a range; empty ones are ignored. Returns what had to be left out.
    pub fn add(&mut self, start: u64, len: u64, kind: MemoryKind) -> Problems {
        if len == 0 {
            return Problems::empty();
        }
        let Some(end) = start.checked_add(len) else {
            return Problems::MEMORY_RANGE_REJECTED;
        };
        let mut problems = Problems::empty();
        // Take out whatever overlaps, and put it back around, or over, the new range.
        let mut pieces: ArrayVec<MemoryRange, MAX_RANGES> = ArrayVec::new();
        let mut push = |start: u64, end: u64, kind| {
            if start < end
                && pieces
                    .try_push(MemoryRange { start: Gpa(start), len: end - start, kind })
                    .is_err()
            {
                problems |= Problems::MEMORY_MAP_TRUNCATED;
            }
        };
        let mut at = start; // of the new range, what is below is placed already
        for old in &self.ranges {
            let (old_start, old_end) = (old.start.0, old.end());
            if old_end <= start || old_start >= end {
                if old_start >= end && at < end {
                    push(at, end, kind);
                    at = end;
                }
                push(old_start, old_end, old.kind);
                continue;
            }
            push(old_start, start.max(old_start), old.kind);
            push(at, old_start, kind);
            at = at.max(old_start);
            let both = old_end.min(end);
            push(at, both, old.kind.max(kind));
            at = at.max(both);
            push(both, old_end, old.kind);
        }
        push(at, end, kind);
        // Neighbours of one kind become one range.
        let mut merged: ArrayVec<MemoryRange, MAX_RANGES> = ArrayVec::new();
        for piece in pieces {
            match merged.last_mut() {
                Some(last) if last.kind == piece.kind && last.end() == piece.start.0 => {
                    last.len += piece.len;
                }
                _ => merged.push(piece), // no longer than `pieces`
            }
        }
        self.ranges = merged;
        problems
    }
}

/// Memory as the boot code sees it: what lies at a guest physical address, if that can be read.
pub trait PhysicalMemory {
    /// `len` bytes at `address`, or `None` where they cannot all be read.
    fn bytes(&self, address: u64, len: u64) -> Option<&'static [u8]>;

    /// As [`Self::bytes`], for what is looked at during the boot only: it may lie in the first page, which the
    /// kernel leaves unmapped later (QEMU's PVH loader puts the memory map there).
    fn passing(&self, address: u64, len: u64) -> Option<&[u8]> {
        self.bytes(address, len)
    }
}

/// The zero-terminated text at `address`, at most `max` bytes of it, without the terminator.
pub fn c_string(memory: &impl PhysicalMemory, address: u64, max: u64) -> Option<&'static [u8]> {
    let mut len = 0;
    while len < max {
        // Byte by byte: the text may end right at the end of what can be read.
        if memory.bytes(address.checked_add(len)?, 1)?.first() == Some(&0) {
            break;
        }
        len += 1;
    }
    memory.bytes(address, len)
}

/// The little-endian u32 at `offset`, or `None` past the end.
#[must_use]
pub fn read_u32(bytes: &[u8], offset: usize) -> Option<u32> {
    let field = bytes.get(offset..offset.checked_add(4)?)?;
    field.try_into().ok().map(u32::from_le_bytes)
}

/// The little-endian u64 at `offset`, or `None` past the end.
#[must_use]
pub fn read_u64(bytes: &[u8], offset: usize) -> Option<u64> {
    let field = bytes.get(offset..offset.checked_add(8)?)?;
    field.try_into().ok().map(u64::from_le_bytes)
}

#[cfg(test)]
pub(crate) mod fake {
    //! Guest memory for the parsers' tests.

    use super::PhysicalMemory;

    /// One readable block at `base`.
    pub(crate) struct FakeMemory {
        base: u64,
        bytes: &'static [u8],
    }

    impl FakeMemory {
        pub(crate) fn new(base: u64, bytes: Vec<u8>) -> Self {
            Self { base, bytes: bytes.leak() }
        }
    }

    impl PhysicalMemory for FakeMemory {
        fn bytes(&self, address: u64, len: u64) -> Option<&'static [u8]> {
            let start = usize::try_from(address.checked_sub(self.base)?).ok()?;
            self.bytes.get(start..start.checked_add(usize::try_from(len).ok()?)?)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map_of(parts: &[(u64, u64, MemoryKind)]) -> Vec<(u64, u64, MemoryKind)> {
        let mut map = MemoryMap::new();
        for &(start, len, kind) in parts {
            assert_eq!(map.add(start, len, kind), Problems::empty());
        }
        map.ranges().iter().map(|r| (r.start.0, r.end(), r.kind)).collect()
    }

    #[test]
    fn ranges_are_sorted_and_neighbours_merged() {
        use MemoryKind::{Reserved, Usable};
        assert_eq!(
            map_of(&[(0x2000, 0x1000, Usable), (0, 0x1000, Reserved), (0x1000, 0x1000, Usable)]),
            [(0, 0x1000, Reserved), (0x1000, 0x3000, Usable)]
        );
    }

    #[test]
    fn the_less_usable_kind_wins_an_overlap() {
        use MemoryKind::{AcpiNvs, Reserved, Usable};
        let expected = [(0, 0x1000, Usable), (0x1000, 0x2000, Reserved), (0x2000, 0x4000, Usable)];
        assert_eq!(map_of(&[(0, 0x4000, Usable), (0x1000, 0x1000, Reserved)]), expected);
        assert_eq!(map_of(&[(0x1000, 0x1000, Reserved), (0, 0x4000, Usable)]), expected);
        assert_eq!(
            map_of(&[(0x1000, 0x2000, Usable), (0x3000, 0x1000, Reserved), (0, 0x8000, AcpiNvs)]),
            [(0, 0x3000, AcpiNvs), (0x3000, 0x4000, Reserved), (0x4000, 0x8000, AcpiNvs)]
        );
    }

    #[test]
    fn a_wrapping_range_is_left_out_and_too_many_are_noted() {
        let mut map = MemoryMap::new();
        assert_eq!(map.add(u64::MAX - 5, 10, MemoryKind::Usable), Problems::MEMORY_RANGE_REJECTED);
        for i in 0..MAX_RANGES as u64 {
            assert_eq!(map.add(i * 0x2000, 0x1000, MemoryKind::Usable), Problems::empty());
        }
        assert_eq!(map.add(1 << 40, 0x1000, MemoryKind::Usable), Problems::MEMORY_MAP_TRUNCATED);
        assert_eq!(map.ranges().len(), MAX_RANGES);
    }

    #[test]
    fn a_string_that_never_ends_is_cut_or_refused() {
        let memory = fake::FakeMemory::new(0x1000, b"abc\0def".to_vec());
        assert_eq!(c_string(&memory, 0x1000, 10), Some(&b"abc"[..]));
        assert_eq!(c_string(&memory, 0x1004, 2), Some(&b"de"[..]));
        assert_eq!(c_string(&memory, 0x1004, 10), None);
        assert_eq!(c_string(&memory, u64::MAX, 10), None);
    }
}

//! Multiboot 1 and 2 information (Multiboot Specification 0.6.96, 3.3; Multiboot2 2.0, 3.6).

use crate::memory::{MAX_COMMAND_LINE, MemoryKind, PhysicalMemory, c_string, read_u32, read_u64};
use crate::{BootError, BootInfo, Door, Problems, Protocol};
use janus_proto::addr::Gpa;

/// What a multiboot 1 loader leaves in eax.
pub const MAGIC1: u32 = 0x2bad_b002;
/// What a multiboot 2 loader leaves in eax.
pub const MAGIC2: u32 = 0x36d7_6289;

const INFO1_SIZE: u64 = 88;
// Flags of the multiboot 1 information structure.
const HAS_MEMORY: u32 = 1 << 0;
const HAS_COMMAND_LINE: u32 = 1 << 2;
const HAS_MODULES: u32 = 1 << 3;
const HAS_MEMORY_MAP: u32 = 1 << 6;
const HAS_LOADER_NAME: u32 = 1 << 9;

/// Reads the information structure at `address`; `magic` says which version it is.
///
/// # Errors
/// When it cannot be read, or `magic` is neither version's.
pub fn parse(
    memory: &impl PhysicalMemory,
    magic: u32,
    address: u64,
    image: core::ops::Range<u64>,
) -> Result<BootInfo, BootError> {
    match magic {
        MAGIC1 => parse1(memory, address, image),
        MAGIC2 => parse2(memory, address, image),
        _ => Err(BootError::BadMagic),
    }
}

fn parse1(
    memory: &impl PhysicalMemory,
    address: u64,
    image: core::ops::Range<u64>,
) -> Result<BootInfo, BootError> {
    let raw = memory.bytes(address, INFO1_SIZE).ok_or(BootError::Unreadable)?;
    let field = |offset| read_u32(raw, offset).unwrap_or(0);
    let wide = |offset| u64::from(field(offset));
    let flags = field(0);
    let mut info = BootInfo::new(Door::Multiboot1, Protocol::Multiboot, image);
    info.reserve(address, INFO1_SIZE, "multiboot information");

    if flags & HAS_COMMAND_LINE != 0 {
        info.set_command_line(memory, wide(16));
        let by_qemu = flags & HAS_LOADER_NAME != 0
            && c_string(memory, wide(64), 64).is_some_and(|name| name.starts_with(b"qemu"));
        if by_qemu {
            // QEMU puts the kernel's file name first, as GRUB Legacy did; GRUB 2 does not.
            let line = info.command_line;
            let name = line.iter().position(|&byte| byte == b' ').unwrap_or(line.len());
            info.command_line = line.get(name..).unwrap_or_default().trim_ascii_start();
        }
    }
    if flags & HAS_MEMORY_MAP != 0 {
        read_memory_map1(memory, &mut info, wide(48), wide(44));
    } else if flags & HAS_MEMORY != 0 {
        info.add_memory(0, wide(4) * 1024, MemoryKind::Usable);
        info.add_memory(1 << 20, wide(8) * 1024, MemoryKind::Usable);
    }
    if flags & HAS_MODULES != 0 {
        let (count, table) = (wide(20), wide(24));
        info.reserve(table, count * 16, "module list");
        for index in 0..count {
            let Some(entry) = memory.bytes(table + index * 16, 16) else {
                info.problems |= Problems::TABLE_TRUNCATED;
                break;
            };
            let field = |offset| u64::from(read_u32(entry, offset).unwrap_or(0));
            let line = match field(8) {
                0 => &[][..],
                at => c_string(memory, at, MAX_COMMAND_LINE).unwrap_or_default(),
            };
            if !line.is_empty() {
                info.reserve(field(8), line.len() as u64 + 1, "module command line");
            }
            add_module(memory, &mut info, field(0), field(4), line);
            if info.modules.is_full() && index + 1 < count {
                info.problems |= Problems::MODULE_REJECTED;
                break;
            }
        }
    }
    Ok(info)
}

fn add_module(
    memory: &impl PhysicalMemory,
    info: &mut BootInfo,
    start: u64,
    end: u64,
    line: &'static [u8],
) {
    match end.checked_sub(start) {
        Some(len) => info.add_module(memory, start, len, line),
        None => info.problems |= Problems::MODULE_REJECTED,
    }
}

fn read_memory_map1(memory: &impl PhysicalMemory, info: &mut BootInfo, table: u64, len: u64) {
    let Some(mut rest) = memory.bytes(table, len) else {
        info.problems |= Problems::TABLE_TRUNCATED;
        return;
    };
    while !rest.is_empty() {
        // The size field does not count itself.
        let size = read_u32(rest, 0).and_then(|size| usize::try_from(size).ok());
        let entry = size.and_then(|size| rest.get(4..4usize.checked_add(size)?));
        let fields = entry.and_then(|entry| {
            Some((read_u64(entry, 0)?, read_u64(entry, 8)?, read_u32(entry, 16)?))
        });
        let (Some(entry), Some((start, len, kind))) = (entry, fields) else {
            info.problems |= Problems::TABLE_TRUNCATED;
            return;
        };
        info.add_memory(start, len, MemoryKind::from_e820(kind));
        rest = rest.get(4 + entry.len()..).unwrap_or_default();
    }
}

fn parse2(
    memory: &impl PhysicalMemory,
    address: u64,
    image: core::ops::Range<u64>,
) -> Result<BootInfo, BootError> {
    let head = memory.bytes(address, 8).ok_or(BootError::Unreadable)?;
    let total = u64::from(read_u32(head, 0).ok_or(BootError::Unreadable)?);
    let raw = memory.bytes(address, total).ok_or(BootError::Unreadable)?;
    let mut info = BootInfo::new(Door::Multiboot2, Protocol::Multiboot, image);
    info.reserve(address, total, "multiboot2 information");

    let mut offset = 8;
    loop {
        let kind = read_u32(raw, offset);
        let size = read_u32(raw, offset + 4).and_then(|size| usize::try_from(size).ok());
        let tag = size.and_then(|size| raw.get(offset..offset.checked_add(size)?));
        let (Some(kind), Some(tag)) = (kind, tag.filter(|tag| tag.len() >= 8)) else {
            info.problems |= Problems::TABLE_TRUNCATED;
            return Ok(info);
        };
        let text = |from: usize| {
            tag.get(from..).unwrap_or_default().split(|&byte| byte == 0).next().unwrap_or_default()
        };
        let tag_address = address + offset as u64;
        match kind {
            0 => break,
            1 => info.command_line = text(8),
            3 => {
                let field = |at| u64::from(read_u32(tag, at).unwrap_or(0));
                add_module(memory, &mut info, field(8), field(12), text(16));
            }
            6 => {
                let entry_size = read_u32(tag, 8).and_then(|size| usize::try_from(size).ok());
                let entries = tag.get(16..).unwrap_or_default();
                let Some(entry_size) = entry_size.filter(|&size| size >= 20) else {
                    info.problems |= Problems::TABLE_TRUNCATED;
                    return Ok(info);
                };
                for entry in entries.chunks_exact(entry_size) {
                    let field = |at| read_u64(entry, at).unwrap_or(0);
                    let kind = MemoryKind::from_e820(read_u32(entry, 16).unwrap_or(0));
                    info.add_memory(field(0), field(8), kind);
                }
            }
            // A copy of the root pointer, ACPI 1.0 (14) or 2.0 (15); the newer one wins.
            14 if info.rsdp.is_none() => info.rsdp = Some(Gpa(tag_address + 8)),
            15 => info.rsdp = Some(Gpa(tag_address + 8)),
            _ => {}
        }
        offset = match offset.checked_add(tag.len()).and_then(|at| at.checked_next_multiple_of(8)) {
            Some(next) => next,
            None => break,
        };
    }
    Ok(info)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::fake::FakeMemory;

    const BASE: u64 = 0x1_0000;
    const IMAGE: core::ops::Range<u64> = 0x20_0000..0x30_0000;

    fn put(bytes: &mut Vec<u8>, offset: usize, words: &[u32]) {
        let end = offset + words.len() * 4;
        if bytes.len() < end {
            bytes.resize(end, 0);
        }
        for (slot, word) in bytes[offset..].chunks_exact_mut(4).zip(words) {
            slot.copy_from_slice(&word.to_le_bytes());
        }
    }

    fn info1(loader: &[u8]) -> Vec<u8> {
        let base = u32::try_from(BASE).unwrap();
        let mut bytes = vec![0; 0x400];
        put(&mut bytes, 0, &[HAS_COMMAND_LINE | HAS_MODULES | HAS_MEMORY_MAP | HAS_LOADER_NAME]);
        put(&mut bytes, 16, &[base + 0x100, 1, base + 0x140]);
        put(&mut bytes, 44, &[48, base + 0x180]);
        put(&mut bytes, 64, &[base + 0x200]);
        bytes[0x100..0x110].copy_from_slice(b"/janus log=debug");
        put(&mut bytes, 0x140, &[base + 0x300, base + 0x304, 0, 0]);
        put(&mut bytes, 0x180, &[20, 0, 0, 0x9_f000, 0, 1]);
        put(&mut bytes, 0x198, &[20, 0x10_0000, 0, 0x100_0000, 0, 1]);
        bytes[0x200..0x200 + loader.len()].copy_from_slice(loader);
        bytes[0x300..0x304].copy_from_slice(b"data");
        bytes
    }

    #[test]
    fn only_qemu_puts_the_file_name_into_the_command_line() {
        for (loader, line) in
            [(&b"qemu"[..], &b"log=debug"[..]), (b"GRUB 2.06", b"/janus log=debug")]
        {
            let memory = FakeMemory::new(BASE, info1(loader));
            let info = parse(&memory, MAGIC1, BASE, IMAGE).unwrap();
            assert_eq!(info.command_line, line);
            assert_eq!(info.memory.usable_bytes(), 0x9_f000 + 0x100_0000);
            assert_eq!(info.modules[0].data, b"data");
            assert_eq!(info.problems, Problems::empty());
        }
    }

    #[test]
    fn a_map_entry_that_lies_about_its_size_ends_the_map() {
        for size in [0, 4, 19, 400, u32::MAX] {
            let mut bytes = info1(b"qemu");
            put(&mut bytes, 0x198, &[size]);
            let info = parse(&FakeMemory::new(BASE, bytes), MAGIC1, BASE, IMAGE).unwrap();
            assert_eq!(info.problems, Problems::TABLE_TRUNCATED, "size {size}");
            assert_eq!(info.memory.usable_bytes(), 0x9_f000);
        }
    }

    fn info2() -> Vec<u8> {
        let base = u32::try_from(BASE).unwrap();
        let mut bytes = Vec::new();
        put(&mut bytes, 8, &[1, 14, u32::from_le_bytes(*b"hell"), u32::from(b'o')]);
        put(&mut bytes, 24, &[3, 17, base + 0x100, base + 0x104, 0]);
        put(&mut bytes, 48, &[6, 40, 24, 0, 0x10_0000, 0, 0x100_0000, 0, 1, 0]);
        put(&mut bytes, 88, &[15, 44]);
        put(&mut bytes, 136, &[0, 8]);
        let total = u32::try_from(bytes.len()).unwrap();
        put(&mut bytes, 0, &[total]);
        put(&mut bytes, 0x100, &[0x1234]);
        bytes
    }

    #[test]
    fn every_tag_of_version_2_arrives() {
        let info = parse(&FakeMemory::new(BASE, info2()), MAGIC2, BASE, IMAGE).unwrap();
        assert_eq!(info.command_line, b"hello");
        assert_eq!(info.modules[0].data, 0x1234u32.to_le_bytes());
        assert_eq!(info.memory.usable_bytes(), 0x100_0000);
        assert_eq!(info.rsdp, Some(Gpa(BASE + 96)));
        assert_eq!(info.problems, Problems::empty());
    }

    #[test]
    fn a_damaged_information_structure_never_panics() {
        for (magic, good) in [(MAGIC1, info1(b"qemu")), (MAGIC2, info2())] {
            for at in 0..good.len().min(0x200) {
                for value in [0, 0x7f, 0xff] {
                    let mut bad = good.clone();
                    bad[at] = value;
                    // Any answer will do but a panic or a hang.
                    let _ =
                        parse(&FakeMemory::new(BASE, bad), magic, BASE, IMAGE).map(|i| i.problems);
                }
            }
        }
    }
}

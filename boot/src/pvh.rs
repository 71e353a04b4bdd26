//! PVH's `hvm_start_info` (`xen/include/public/arch-x86/hvm/start_info.h`).
//!
//! The `pvh` crate reads the same structures, but through raw pointers that it trusts; here one
//! bounds-checked reader serves all four protocols, so that a lying loader is an error value.

use crate::memory::{MAX_COMMAND_LINE, MemoryKind, PhysicalMemory, c_string, read_u32, read_u64};
use crate::start_info::StartFlags;
use crate::{BootError, BootInfo, Door, Problems, Protocol};
use janus_proto::addr::Gpa;

/// The parts of `hvm_start_info` that are not in [`BootInfo`] itself.
#[derive(Clone, Copy, Debug)]
pub struct HvmStartInfo {
    /// Where the structure lies.
    pub address: u64,
    /// 0, or 1 and newer with a memory map.
    pub version: u32,
    /// `SIF_*`.
    pub flags: StartFlags,
}

const MAGIC: u32 = 0x336e_c578;
const MEMMAP_ENTRY: u64 = 24;
const MODULE_ENTRY: u64 = 32;

/// Reads the structure at `address`.
///
/// # Errors
/// When it cannot be read or is not one.
pub fn parse(
    memory: &impl PhysicalMemory,
    address: u64,
    image: core::ops::Range<u64>,
) -> Result<BootInfo, BootError> {
    let raw = memory.passing(address, 40).ok_or(BootError::Unreadable)?;
    let u32_at = |offset| read_u32(raw, offset).ok_or(BootError::Unreadable);
    let u64_at = |offset| read_u64(raw, offset).ok_or(BootError::Unreadable);
    if u32_at(0)? != MAGIC {
        return Err(BootError::BadMagic);
    }
    let version = u32_at(4)?;
    let flags = StartFlags::from_bits_retain(u32_at(8)?);
    let protocol = Protocol::Pvh(HvmStartInfo { address, version, flags });
    let mut info = BootInfo::new(Door::Pvh, protocol, image);
    info.reserve(address, if version >= 1 { 56 } else { 40 }, "hvm_start_info");

    let (nr_modules, modules) = (u64::from(u32_at(12)?), u64_at(16)?);
    info.set_command_line(memory, u64_at(24)?);
    let rsdp = u64_at(32)?;
    info.rsdp = (rsdp != 0).then_some(Gpa(rsdp));

    if version >= 1 {
        let rest = memory.passing(address, 56).ok_or(BootError::Unreadable)?;
        let table = read_u64(rest, 40).ok_or(BootError::Unreadable)?;
        let entries = u64::from(read_u32(rest, 48).ok_or(BootError::Unreadable)?);
        read_memory_map(memory, &mut info, table, entries);
    }

    if nr_modules != 0 {
        info.reserve(modules, nr_modules.saturating_mul(MODULE_ENTRY), "module list");
    }
    for index in 0..nr_modules {
        let entry = modules
            .checked_add(index.saturating_mul(MODULE_ENTRY))
            .and_then(|at| memory.passing(at, MODULE_ENTRY));
        let Some(entry) = entry else {
            info.problems |= Problems::TABLE_TRUNCATED;
            break;
        };
        let field = |offset| read_u64(entry, offset).unwrap_or(0);
        let line = match field(16) {
            0 => &[][..],
            at => c_string(memory, at, MAX_COMMAND_LINE).unwrap_or_default(),
        };
        info.add_module(memory, field(0), field(8), line);
        if info.modules.is_full() && index + 1 < nr_modules {
            info.problems |= Problems::MODULE_REJECTED;
            break;
        }
    }
    Ok(info)
}

fn read_memory_map(memory: &impl PhysicalMemory, info: &mut BootInfo, table: u64, entries: u64) {
    for index in 0..entries {
        let entry =
            table.checked_add(index * MEMMAP_ENTRY).and_then(|at| memory.passing(at, MEMMAP_ENTRY));
        let Some(entry) = entry else {
            info.problems |= Problems::TABLE_TRUNCATED;
            break;
        };
        let field = |offset| read_u64(entry, offset).unwrap_or(0);
        let kind = MemoryKind::from_e820(read_u32(entry, 16).unwrap_or(0));
        info.add_memory(field(0), field(8), kind);
        if info.problems.contains(Problems::MEMORY_MAP_TRUNCATED) {
            break;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::fake::FakeMemory;

    const BASE: u64 = 0x1_0000;

    fn start_info(nr_modules: u32, entries: u32) -> Vec<u8> {
        let mut bytes = Vec::new();
        for word in [MAGIC, 1, 0, nr_modules] {
            bytes.extend_from_slice(&word.to_le_bytes());
        }
        for address in [BASE + 0x100, BASE + 0x300, 0xf_1234, BASE + 0x200] {
            bytes.extend_from_slice(&address.to_le_bytes());
        }
        bytes.extend_from_slice(&entries.to_le_bytes());
        bytes.resize(0x100, 0);
        for word in [BASE + 0x400, 5, BASE + 0x310, 0] {
            bytes.extend_from_slice(&word.to_le_bytes());
        }
        bytes.resize(0x200, 0);
        for word in [0u64, 0x9_f000, 1, 0x10_0000, 0x100_0000, 1] {
            bytes.extend_from_slice(&word.to_le_bytes());
        }
        bytes.resize(0x300, 0);
        bytes.extend_from_slice(b"console=hvc0\0");
        bytes.resize(0x310, 0);
        bytes.extend_from_slice(b"initrd\0");
        bytes.resize(0x400, 0);
        bytes.extend_from_slice(b"hello");
        bytes
    }

    #[test]
    fn all_parts_arrive() {
        let memory = FakeMemory::new(BASE, start_info(1, 2));
        let info = parse(&memory, BASE, 0x20_0000..0x30_0000).unwrap();
        assert_eq!(info.command_line, b"console=hvc0");
        assert_eq!(info.rsdp, Some(Gpa(0xf_1234)));
        assert_eq!(info.memory.usable_bytes(), 0x9_f000 + 0x100_0000);
        assert_eq!(
            (info.modules[0].data, info.modules[0].command_line),
            (&b"hello"[..], &b"initrd"[..])
        );
        assert_eq!(info.problems, Problems::empty());
    }

    #[test]
    fn counts_that_lie_end_at_the_end_of_memory() {
        let memory = FakeMemory::new(BASE, start_info(u32::MAX, u32::MAX));
        let info = parse(&memory, BASE, 0x20_0000..0x30_0000).unwrap();
        assert!(info.problems.intersects(Problems::TABLE_TRUNCATED | Problems::MODULE_REJECTED));
    }

    #[test]
    fn a_module_over_the_image_is_rejected() {
        let memory = FakeMemory::new(BASE, start_info(1, 2));
        let info = parse(&memory, BASE, BASE..BASE + 0x1000).unwrap();
        assert!(info.modules.is_empty());
        assert_eq!(info.problems, Problems::MODULE_REJECTED);
    }

    #[test]
    fn a_wrong_magic_or_address_is_an_error() {
        let memory = FakeMemory::new(BASE, vec![0; 64]);
        assert_eq!(parse(&memory, BASE, 0..1).unwrap_err(), BootError::BadMagic);
        assert_eq!(parse(&memory, BASE + 60, 0..1).unwrap_err(), BootError::Unreadable);
    }
}

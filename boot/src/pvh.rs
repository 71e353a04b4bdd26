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
    let raw = memory.bytes(address, 40).ok_or(BootError::Unreadable)?;
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
        let rest = memory.bytes(address, 56).ok_or(BootError::Unreadable)?;
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
            .and_then(|at| memory.bytes(at, MODULE_ENTRY));
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

fn read_memory_map(
    memory: &impl PhysicalMemory,
    info: &mut BootInfo,
    table: u64,
    entries: u64,
) {
    for index in 0..entries {
        let entry = table
            .checked_add(index * MEMMAP_ENTRY)
            .and_then(|at| memory.bytes(at, MEMMAP_ENTRY));
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

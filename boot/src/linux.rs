//! Linux's `boot_params` ("zero page", Documentation/arch/x86/zero-page.rst and boot.rst), as a
//! loader of the 64-bit boot protocol leaves it.

use crate::memory::{MemoryKind, PhysicalMemory, read_u32, read_u64};
use crate::{BootError, BootInfo, Door, Protocol};
use janus_proto::addr::Gpa;

const SIZE: u64 = 4096;
const ACPI_RSDP_ADDR: usize = 0x070;
const EXT_RAMDISK_IMAGE: usize = 0x0c0;
const EXT_RAMDISK_SIZE: usize = 0x0c4;
const EXT_CMD_LINE_PTR: usize = 0x0c8;
const E820_ENTRIES: usize = 0x1e8;
const BOOT_FLAG: usize = 0x1fe;
const HEADER: usize = 0x202;
const RAMDISK_IMAGE: usize = 0x218;
const RAMDISK_SIZE: usize = 0x21c;
const CMD_LINE_PTR: usize = 0x228;
const E820_TABLE: usize = 0x2d0;
const E820_ENTRY: usize = 20;
const E820_MAX: usize = 128;

/// Reads the zero page at `address`.
///
/// # Errors
/// When it cannot be read or has neither of its marks.
pub fn parse(
    memory: &impl PhysicalMemory,
    address: u64,
    image: core::ops::Range<u64>,
) -> Result<BootInfo, BootError> {
    let raw = memory.bytes(address, SIZE).ok_or(BootError::Unreadable)?;
    // A loader copies the setup header of a bzImage; for an ELF it makes one up, and some leave out
    // one of the two marks.
    if raw.get(BOOT_FLAG..BOOT_FLAG + 2) != Some(&[0x55, 0xaa])
        && raw.get(HEADER..HEADER + 4) != Some(b"HdrS")
    {
        return Err(BootError::BadMagic);
    }
    let wide = |low, high| {
        let part = |offset| u64::from(read_u32(raw, offset).unwrap_or(0));
        part(low) | part(high) << 32
    };
    let protocol = Protocol::Linux { boot_params: Gpa(address) };
    let mut info = BootInfo::new(Door::Linux64, protocol, image);
    info.reserve(address, SIZE, "boot_params");
    info.set_command_line(memory, wide(CMD_LINE_PTR, EXT_CMD_LINE_PTR));
    let rsdp = read_u64(raw, ACPI_RSDP_ADDR).unwrap_or(0);
    info.rsdp = (rsdp != 0).then_some(Gpa(rsdp));

    let entries = usize::from(raw.get(E820_ENTRIES).copied().unwrap_or(0)).min(E820_MAX);
    let table = raw.get(E820_TABLE..).unwrap_or_default();
    for entry in table.chunks_exact(E820_ENTRY).take(entries) {
        let field = |offset| read_u64(entry, offset).unwrap_or(0);
        let kind = MemoryKind::from_e820(read_u32(entry, 16).unwrap_or(0));
        info.add_memory(field(0), field(8), kind);
    }

    let ramdisk_size = wide(RAMDISK_SIZE, EXT_RAMDISK_SIZE);
    if ramdisk_size != 0 {
        info.add_module(memory, wide(RAMDISK_IMAGE, EXT_RAMDISK_IMAGE), ramdisk_size, &[]);
    }
    Ok(info)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::fake::FakeMemory;

    const BASE: u64 = 0x9_0000;
    const IMAGE: core::ops::Range<u64> = 0x20_0000..0x30_0000;

    fn zero_page() -> Vec<u8> {
        let mut bytes = vec![0; 0x1100];
        bytes[HEADER..HEADER + 4].copy_from_slice(b"HdrS");
        bytes[CMD_LINE_PTR..CMD_LINE_PTR + 4].copy_from_slice(&0x9_1000u32.to_le_bytes());
        bytes[0x1000..0x1006].copy_from_slice(b"hello\0");
        bytes[RAMDISK_IMAGE..RAMDISK_IMAGE + 4].copy_from_slice(&0x9_1010u32.to_le_bytes());
        bytes[RAMDISK_SIZE..RAMDISK_SIZE + 4].copy_from_slice(&4u32.to_le_bytes());
        bytes[E820_ENTRIES] = 1;
        bytes[E820_TABLE..E820_TABLE + 8].copy_from_slice(&0x10_0000u64.to_le_bytes());
        bytes[E820_TABLE + 8..E820_TABLE + 16].copy_from_slice(&0x100_0000u64.to_le_bytes());
        bytes[E820_TABLE + 16] = 1;
        bytes
    }

    #[test]
    fn all_parts_arrive() {
        let info = parse(&FakeMemory::new(BASE, zero_page()), BASE, IMAGE).unwrap();
        assert_eq!(info.command_line, b"hello");
        assert_eq!(info.modules[0].data, [0; 4]);
        assert_eq!(info.memory.usable_bytes(), 0x100_0000);
        assert_eq!(info.problems, crate::Problems::empty());
    }

    #[test]
    fn addresses_that_cannot_be_read_are_noted() {
        let mut bytes = zero_page();
        bytes[EXT_CMD_LINE_PTR] = 1; // above 4 GiB
        bytes[E820_ENTRIES] = 0xff;
        bytes[RAMDISK_SIZE + 3] = 0x7f;
        let info = parse(&FakeMemory::new(BASE, bytes), BASE, IMAGE).unwrap();
        let expected = crate::Problems::COMMAND_LINE_REJECTED | crate::Problems::MODULE_REJECTED;
        assert_eq!(info.problems, expected);
    }
}

//! Where things are in a KVM guest's physical address space.
//!
//! Memory begins at 0 and has a hole below 4 GiB, in which devices and interrupt controllers are. What the guest is
//! told at its start lies in the first MiB.

use std::ops::Range;

use janus_proto::addr::{Mfn, PAGE_SIZE};

use crate::machine::ram::Numbering;

/// The descriptor table of the Linux 64-bit entry.
pub(crate) const GDT: u64 = 0x500;
/// PVH's `hvm_start_info`.
pub(crate) const START_INFO: u64 = 0x6000;
/// Its list of modules.
pub(crate) const MODULES: u64 = 0x6040;
/// Its memory map.
pub(crate) const MEMORY_MAP: u64 = 0x6100;
/// Linux's `boot_params`.
pub(crate) const ZERO_PAGE: u64 = 0x7000;
/// The page tables of the Linux 64-bit entry: one page of each of two levels, and four of 2 MiB pages.
pub(crate) const PAGE_TABLES: u64 = 0x9000;
/// The command line.
pub(crate) const COMMAND_LINE: u64 = 0x2_0000;
/// Its longest, with the zero at its end.
pub(crate) const COMMAND_LINE_SIZE: usize = 0x1_0000;
/// The end of low memory as the memory map tells it.
pub(crate) const LOW_END: u64 = 0x9_fc00;
/// The ACPI tables, the root pointer first, in the area where firmware keeps it.
pub(crate) const ACPI: u64 = 0xe_0000;
/// Where high memory begins, and kernels are put.
pub(crate) const HIGH: u64 = 0x10_0000;
/// The hole below 4 GiB.
pub(crate) const HOLE: Range<u64> = 0xc000_0000..0x1_0000_0000;
/// The windows of virtio-mmio devices, one page each.
pub(crate) const VIRTIO: u64 = 0xd000_0000;
/// Their interrupts, in order: what the ISA devices leave.
pub(crate) const VIRTIO_GSIS: [u32; 18] =
    [16, 17, 18, 19, 20, 21, 22, 23, 5, 6, 7, 10, 11, 12, 13, 14, 15, 3];
/// The I/O APIC.
pub(crate) const IO_APIC: u32 = 0xfec0_0000;
/// The local APICs.
pub(crate) const LOCAL_APIC: u32 = 0xfee0_0000;
/// Three pages that KVM needs on some Intel CPUs.
pub(crate) const TSS: usize = 0xfffb_d000;
/// The interrupt of the serial port.
pub(crate) const SERIAL_GSI: u32 = 4;
/// The interrupt of ACPI events.
pub(crate) const SCI: u16 = 9;

/// I/O ports.
pub(crate) mod port {
    /// The serial port, 8 of them.
    pub(crate) const SERIAL: u16 = 0x3f8;
    /// The keyboard controller's data and command.
    pub(crate) const I8042: u16 = 0x60;
    /// As above.
    pub(crate) const I8042_COMMAND: u16 = 0x64;
    /// As QEMU's `isa-debug-exit`, where this project puts it.
    pub(crate) const DEBUG_EXIT: u16 = 0xf4;
    /// QEMU's pvpanic (`docs/specs/pvpanic.rst`).
    pub(crate) const PVPANIC: u16 = 0x505;
    /// ACPI's PM1a event block: status, then enable, two bytes each.
    pub(crate) const PM1_EVENT: u16 = 0x600;
    /// ACPI's PM1a control block, two bytes.
    pub(crate) const PM1_CONTROL: u16 = 0x604;
    /// The reset register.
    pub(crate) const RESET: u16 = 0x608;
}

/// How the frames of so much memory are numbered.
pub(crate) const fn numbering() -> Numbering {
    let page = PAGE_SIZE as u64;
    Numbering { first: Mfn(0), below: HOLE.start / page, above: Mfn(HOLE.end / page) }
}

/// The ranges of memory of a guest with so many bytes.
pub(crate) fn regions(bytes: u64) -> impl Iterator<Item = Range<u64>> {
    let low = 0..bytes.min(HOLE.start);
    let high = HOLE.end..HOLE.end + bytes.saturating_sub(HOLE.start);
    [low, high].into_iter().filter(|range| !range.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_goes_on_behind_the_hole() {
        let all = |bytes| regions(bytes).collect::<Vec<_>>();
        assert_eq!(all(1 << 20), vec![0..1 << 20; 1]);
        assert_eq!(all(4 << 30), [0..0xc000_0000, 0x1_0000_0000..0x1_4000_0000]);
    }
}

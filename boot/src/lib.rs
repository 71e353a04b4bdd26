//! Everything before the first platform-independent line: the entry doors, each ending in one [`BootInfo`].
#![cfg_attr(not(test), no_std)]

use janus_proto::addr::Gpa;

/// The door the image was entered by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Door {
    /// Xen PV: `XEN_ELFNOTE_ENTRY`, start_info in rsi.
    XenPv,
    /// PVH: `XEN_ELFNOTE_PHYS32_ENTRY`, hvm_start_info in ebx (Xen, QEMU, Firecracker, Cloud Hypervisor).
    Pvh,
    /// Multiboot 1, address form.
    Multiboot1,
    /// Multiboot 2.
    Multiboot2,
    /// The Linux 64-bit boot protocol: boot_params in rsi.
    Linux64,
}

/// What a range of guest physical memory is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MemoryKind {
    /// Ordinary memory, free unless the image, a module or the boot structures lie in it.
    Usable,
    /// Firmware, devices, holes.
    Reserved,
    /// ACPI tables, usable once they have been read.
    AcpiReclaimable,
    /// ACPI non-volatile storage: never touched.
    AcpiNvs,
    /// Broken memory, or a type this kernel does not know.
    Unusable,
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

/// A file that the loader put into memory beside the kernel (initrd, multiboot module).
#[derive(Clone, Copy, Debug)]
pub struct Module {
    /// Its bytes.
    pub data: &'static [u8],
    /// Its own command line, if the protocol has one.
    pub command_line: &'static [u8],
}

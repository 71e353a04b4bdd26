//! Everything before the first platform-independent line: the entry doors, each ending in one [`BootInfo`].
//!
//! The doors themselves are assembly (`entry/*.s`, guest target only) and end in one Rust function
//! each. The parsers of what a loader hands over ([`start_info`], [`pvh`], [`multiboot`],
//! [`linux`]) are safe code over a [`memory::PhysicalMemory`], so the host tests feed them anything.
#![cfg_attr(not(test), no_std)]

use arrayvec::ArrayVec;
use janus_proto::addr::{Gpa, PAGE_SIZE};

pub mod early;
pub mod image;
pub mod linux;
pub mod memory;
pub mod multiboot;
pub mod pvh;
pub mod start_info;
pub mod symbols;

#[cfg(target_os = "none")]
mod entry;
#[cfg(target_os = "none")]
mod exception;
#[cfg(target_os = "none")]
mod hypercall;

pub use memory::{MemoryKind, MemoryMap, MemoryRange};

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

/// A file that the loader put into memory beside the kernel (initrd, multiboot module).
#[derive(Clone, Copy, Debug)]
pub struct Module {
    /// Its bytes.
    pub data: &'static [u8],
    /// Its own command line, if the protocol has one.
    pub command_line: &'static [u8],
}

bitflags::bitflags! {
    /// What the loader said that could not be used. The boot goes on; the kernel logs these.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Problems: u32 {
        /// More memory ranges than [`memory::MAX_RANGES`]; the rest is left unused.
        const MEMORY_MAP_TRUNCATED = 1 << 0;
        /// A memory range with an impossible extent was left out.
        const MEMORY_RANGE_REJECTED = 1 << 1;
        /// No memory map at all: memory was guessed from the image's own extent.
        const NO_MEMORY_MAP = 1 << 2;
        /// A module outside the first 4 GiB, over the image, or one too many.
        const MODULE_REJECTED = 1 << 3;
        /// The command line could not be read.
        const COMMAND_LINE_REJECTED = 1 << 4;
        /// A table of the loader's ends early or lies outside memory.
        const TABLE_TRUNCATED = 1 << 5;
        /// More reserved ranges than [`MAX_RESERVED`].
        const RESERVED_TRUNCATED = 1 << 6;
    }
}

/// Why an entry cannot go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BootError {
    /// The structure does not start with its magic number.
    BadMagic,
    /// The structure lies outside memory that can be read.
    Unreadable,
}

impl core::fmt::Display for BootError {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str(match self {
            Self::BadMagic => "boot information has the wrong magic number",
            Self::Unreadable => "boot information lies outside readable memory",
        })
    }
}

/// What only one boot protocol says.
#[derive(Clone, Copy, Debug)]
pub enum Protocol {
    /// Xen PV.
    XenPv(start_info::StartInfo),
    /// PVH.
    Pvh(pvh::HvmStartInfo),
    /// Multiboot 1 or 2.
    Multiboot,
    /// Linux 64-bit: address of boot_params.
    Linux {
        /// Where the "zero page" lies.
        boot_params: Gpa,
    },
}

/// Most modules that are kept.
pub const MAX_MODULES: usize = 16;
/// Most reserved ranges that are kept.
pub const MAX_RESERVED: usize = 32;

/// One part of usable memory that is in use when the kernel starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reserved {
    /// First byte.
    pub start: Gpa,
    /// Bytes.
    pub len: u64,
    /// What lies there, for the log.
    pub what: &'static str,
}

/// Everything the kernel learns from its loader, whichever door it came by.
#[derive(Clone, Debug)]
pub struct BootInfo {
    /// The door.
    pub door: Door,
    /// Guest (pseudo-)physical memory, sorted, without overlaps.
    pub memory: MemoryMap,
    /// Parts of [`Self::memory`]'s usable ranges that must not be handed out: the image, modules, page
    /// tables, and the structures the slices in here point to.
    pub reserved: ArrayVec<Reserved, MAX_RESERVED>,
    /// The command line, without a terminator.
    pub command_line: &'static [u8],
    /// Modules in the loader's order.
    pub modules: ArrayVec<Module, MAX_MODULES>,
    /// A module that reaches into page 0, where no slice can point: address, bytes, command line. The
    /// native doors move it (`modules` has it then).
    pub(crate) low_module: Option<(u64, u64, &'static [u8])>,
    /// The ACPI root pointer, if the protocol or the firmware area has it.
    pub rsdp: Option<Gpa>,
    /// The image with its bss, in bytes.
    pub image: core::ops::Range<u64>,
    /// What only this protocol says.
    pub protocol: Protocol,
    /// What could not be used.
    pub problems: Problems,
}

impl BootInfo {
    /// An empty account of an entry by `door` of the image at `image`.
    #[must_use]
    pub fn new(door: Door, protocol: Protocol, image: core::ops::Range<u64>) -> Self {
        let mut info = Self {
            door,
            memory: MemoryMap::new(),
            reserved: ArrayVec::new(),
            command_line: &[],
            modules: ArrayVec::new(),
            low_module: None,
            rsdp: None,
            image: image.clone(),
            protocol,
            problems: Problems::empty(),
        };
        info.reserve(image.start, image.end - image.start, "image");
        info
    }

    /// Notes that `len` bytes at `start` are in use.
    pub fn reserve(&mut self, start: u64, len: u64, what: &'static str) {
        if len != 0 && self.reserved.try_push(Reserved { start: Gpa(start), len, what }).is_err() {
            self.problems |= Problems::RESERVED_TRUNCATED;
        }
    }

    /// Adds a module of `len` bytes at `start` after checking that it can be one.
    pub fn add_module(
        &mut self,
        memory: &impl memory::PhysicalMemory,
        start: u64,
        len: u64,
        command_line: &'static [u8],
    ) {
        if start < PAGE_SIZE as u64 && len != 0 && self.low_module.is_none() {
            // GRUB on UEFI starts handing out memory at address 0.
            self.low_module = Some((start, len, command_line));
            return;
        }
        let overlaps = start < self.image.end && start.saturating_add(len) > self.image.start;
        let Some(data) = memory.bytes(start, len).filter(|_| !overlaps) else {
            self.problems |= Problems::MODULE_REJECTED;
            return;
        };
        if self.modules.try_push(Module { data, command_line }).is_err() {
            self.problems |= Problems::MODULE_REJECTED;
            return;
        }
        self.reserve(start, len, "module");
    }

    /// The highest page-aligned place for `len` bytes in usable memory below `limit` that nothing is
    /// known to use.
    #[must_use]
    pub fn find_free(&self, len: u64, limit: u64) -> Option<u64> {
        let page = PAGE_SIZE as u64;
        for range in self.memory.ranges().iter().rev() {
            if range.kind != MemoryKind::Usable {
                continue;
            }
            let mut end = range.end().min(limit) & !(page - 1);
            while let Some(start) = end.checked_sub(len.next_multiple_of(page)) {
                if start < range.start.0.max(page) {
                    break;
                }
                let clash = self.reserved.iter().find(|part| {
                    part.start.0 < end && part.start.0.saturating_add(part.len) > start
                });
                match clash {
                    None => return Some(start),
                    Some(part) => end = part.start.0 & !(page - 1),
                }
            }
        }
        None
    }

    /// Takes the zero-terminated command line at `address`; 0 means none.
    pub fn set_command_line(&mut self, memory: &impl memory::PhysicalMemory, address: u64) {
        if address == 0 {
            return;
        }
        match memory::c_string(memory, address, memory::MAX_COMMAND_LINE) {
            Some(line) => {
                self.command_line = line;
                self.reserve(address, line.len() as u64 + 1, "command line");
            }
            None => self.problems |= Problems::COMMAND_LINE_REJECTED,
        }
    }

    /// Adds one range to the memory map, noting what is wrong with it.
    pub fn add_memory(&mut self, start: u64, len: u64, kind: MemoryKind) {
        self.problems |= self.memory.add(start, len, kind);
    }
}

/// [`BootInfo`] in a few lines of text, for the log.
#[derive(Debug)]
pub struct Summary<'a>(&'a BootInfo);

impl BootInfo {
    /// The whole account in a few lines.
    #[must_use]
    pub fn summary(&self) -> Summary<'_> {
        Summary(self)
    }
}

impl core::fmt::Display for Summary<'_> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        let info = self.0;
        writeln!(f, "door {:?}, command line \"{}\"", info.door, info.command_line.escape_ascii())?;
        for range in info.memory.ranges() {
            writeln!(f, "memory {:#014x}..{:#014x} {:?}", range.start.0, range.end(), range.kind)?;
        }
        for part in &info.reserved {
            let end = part.start.0.saturating_add(part.len);
            writeln!(f, "in use {:#014x}..{end:#014x} {}", part.start.0, part.what)?;
        }
        for module in &info.modules {
            writeln!(
                f,
                "module of {} bytes \"{}\"",
                module.data.len(),
                module.command_line.escape_ascii()
            )?;
        }
        if let Some(rsdp) = info.rsdp {
            writeln!(f, "ACPI root pointer {:#x}", rsdp.0)?;
        }
        if !info.problems.is_empty() {
            writeln!(f, "problems: {:?}", info.problems)?;
        }
        Ok(())
    }
}

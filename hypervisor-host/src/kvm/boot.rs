//! Puts a kernel and what it is told into a guest's memory: by the PVH note, or by Linux's 64-bit protocol.
//!
//! `linux-loader` reads the kernels; it sees the guest's memory through a mapping of its own, which is gone before
//! the guest runs.

use std::fmt;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};

use linux_loader::loader::bootparam::boot_params;
use linux_loader::loader::elf::PvhBootCapability;
use linux_loader::loader::elf::start_info::{
    hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
};
use linux_loader::loader::{BzImage, Elf, KernelLoader as _, KernelLoaderResult};
use vm_memory::{Bytes as _, FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionMmap};

use super::registers::{self, Entry};
use super::{layout, xen};
use crate::machine::ram::Ram;

/// `XEN_HVM_START_MAGIC_VALUE`.
const PVH_MAGIC: u32 = 0x336e_c578;
/// Usable memory, and memory that is not, in both protocols' maps.
const USABLE: u32 = 1;
const RESERVED: u32 = 2;
/// ELF's first bytes.
const ELF_MAGIC: [u8; 4] = *b"\x7fELF";
/// `boot_params`: the mark of the setup header, its version here (2.15), and a loader without a number of its own.
const BOOT_FLAG: u16 = 0xaa55;
const HEADER: u32 = 0x5372_6448;
const VERSION: u16 = 0x20f;
const LOADER: u8 = 0xff;
/// `loadflags`: the kernel is at or above 1 MiB.
const LOADED_HIGH: u8 = 1;
/// Where the 64-bit entry of a bzImage is.
const BZIMAGE_ENTRY_64: u64 = 0x200;

/// By which protocol a kernel is entered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Door {
    /// By the PVH note if there is one, else as Linux.
    #[default]
    Any,
    /// By the PVH note.
    Pvh,
    /// By Linux's 64-bit protocol.
    Linux,
}

/// A guest cannot be loaded.
#[derive(Debug)]
pub enum LoadError {
    /// A file cannot be read.
    File(PathBuf, io::Error),
    /// The kernel is not one, or does not fit.
    Kernel(PathBuf, linux_loader::loader::Error),
    /// The kernel has no such entry.
    NoEntry(PathBuf, &'static str),
    /// Something does not fit into memory.
    TooSmall(&'static str),
    /// The command line is too long.
    CommandLine(usize),
    /// Its memory cannot be seen.
    Memory(String),
}

impl fmt::Display for LoadError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(file, error) => write!(f, "{}: {error}", file.display()),
            Self::Kernel(file, error) => {
                let file = file.display();
                write!(f, "{file}: not a kernel, or too large for the guest's memory: {error}")
            }
            Self::NoEntry(file, entry) => {
                write!(f, "{}: the kernel cannot be entered by {entry}", file.display())
            }
            Self::TooSmall(what) => {
                write!(f, "the guest has too little memory for {what}; give it more (--memory)")
            }
            Self::CommandLine(length) => {
                let most = layout::COMMAND_LINE_SIZE - 1;
                write!(f, "the command line has {length} bytes; {most} fit")
            }
            Self::Memory(error) => write!(f, "the guest's memory cannot be mapped: {error}"),
        }
    }
}

impl std::error::Error for LoadError {}

/// What is loaded.
#[derive(Clone, Debug)]
pub(crate) struct Boot<'a> {
    pub(crate) kernel: &'a Path,
    pub(crate) module: Option<&'a Path>,
    pub(crate) command_line: &'a str,
    pub(crate) door: Door,
    /// Bytes of memory that the guest is told of.
    pub(crate) memory: u64,
    /// The ACPI tables, or none.
    pub(crate) acpi: &'a [u8],
    /// Whether Xen's hypercalls are to come here, and not to KVM.
    pub(crate) xen: bool,
    /// Memory beyond it that is there for something else.
    pub(crate) reserved: Range<u64>,
}

type Memory = GuestMemoryMmap<()>;

fn view(ram: &Ram) -> Result<Memory, LoadError> {
    let failed = |error: &dyn fmt::Display| LoadError::Memory(error.to_string());
    let mut done = 0;
    let mut regions = Vec::new();
    for range in layout::regions(ram.frames() * 4096) {
        let file = ram.file().try_clone_to_owned().map_err(|error| failed(&error))?;
        let length = usize::try_from(range.end - range.start).unwrap_or(usize::MAX);
        let place = FileOffset::new(File::from(file), done);
        let region = GuestRegionMmap::from_range(GuestAddress(range.start), length, Some(place));
        regions.push(region.map_err(|error| failed(&error))?);
        done += range.end - range.start;
    }
    Memory::from_regions(regions).map_err(|error| failed(&error))
}

/// Loads everything; answers how the guest is entered.
pub(crate) fn load(ram: &Ram, boot: &Boot<'_>) -> Result<Entry, LoadError> {
    let memory = view(ram)?;
    let mut file = open(boot.kernel)?;
    let mut magic = [0; 4];
    let is_elf = std::os::unix::fs::FileExt::read_exact_at(&file, &mut magic, 0).is_ok()
        && magic == ELF_MAGIC;
    let not = |error| LoadError::Kernel(boot.kernel.to_owned(), error);
    let loaded = if is_elf {
        Elf::load(&memory, None, &mut file, None).map_err(not)?
    } else {
        let high = Some(GuestAddress(layout::HIGH));
        BzImage::load(&memory, None, &mut file, high).map_err(not)?
    };
    if boot.xen {
        redirect_hypercalls(&memory, loaded.kernel_end)?;
    }
    let module = boot.module.map(|file| put_module(&memory, file, &loaded, boot)).transpose()?;
    put_command_line(&memory, boot.command_line)?;
    put(&memory, layout::ACPI, boot.acpi, "the ACPI tables")?;
    let by_pvh = match loaded.pvh_boot_cap {
        PvhBootCapability::PvhEntryPresent(entry) if boot.door != Door::Linux => Some(entry.0),
        _ => None,
    };
    let rsdp = if boot.acpi.is_empty() { 0 } else { layout::ACPI };
    match by_pvh {
        Some(rip) => {
            put_start_info(&memory, &map(boot.memory, &boot.reserved), module, rsdp)?;
            Ok(Entry::Pvh { rip, start_info: layout::START_INFO })
        }
        None if boot.door == Door::Pvh => {
            Err(LoadError::NoEntry(boot.kernel.to_owned(), "the PVH note, which it lacks"))
        }
        None => {
            let map = map(boot.memory, &boot.reserved);
            put_zero_page(&memory, &loaded, &map, module, rsdp)?;
            let offset = if loaded.setup_header.is_some() { BZIMAGE_ENTRY_64 } else { 0 };
            let rip = loaded.kernel_load.0.saturating_add(offset);
            Ok(Entry::Linux { rip, boot_params: layout::ZERO_PAGE })
        }
    }
}

/// Makes a Linux that calls Xen by the instruction of the processor's maker (since XSA-466; before that by a page that
/// the hypervisor filled) write to [`xen::PORT`] instead: that instruction is KVM's. Such kernels have two functions of
/// just this instruction, `xen_hypercall_amd` and `xen_hypercall_intel`, 16 bytes apart.
fn redirect_hypercalls(memory: &Memory, end: u64) -> Result<(), LoadError> {
    const PIECE: usize = 1 << 16;
    let [low, _] = xen::PORT.to_le_bytes();
    // out PORT, eax; nop
    let write = [0xe7, low, 0x90];
    let mut bytes = vec![0; PIECE + 16];
    for start in (layout::HIGH..end).step_by(PIECE) {
        let length = usize::try_from(end - start).unwrap_or(PIECE).min(PIECE + 16);
        let piece = bytes.get_mut(..length).unwrap_or_default();
        if memory.read_slice(piece, GuestAddress(start)).is_err() {
            continue;
        }
        for (at, pair) in (start..).step_by(16).zip(piece.windows(32).step_by(16)) {
            if is_hypercall_pair(pair) {
                put(memory, at, &write, "the kernel")?;
                put(memory, at + 16, &write, "the kernel")?;
            }
        }
    }
    Ok(())
}

/// Whether these are the two functions: `vmmcall` and `vmcall`, each with a return, or a jump to one, behind it.
fn is_hypercall_pair(code: &[u8]) -> bool {
    const RETURN: u8 = 0xc3;
    const JUMP: u8 = 0xe9;
    let is = |at: usize, last: u8| matches!(code.get(at..at + 4), Some([0x0f, 0x01, third, RETURN | JUMP]) if *third == last);
    is(0, 0xd9) && is(16, 0xc1)
}

fn open(path: &Path) -> Result<File, LoadError> {
    File::open(path).map_err(|error| LoadError::File(path.to_owned(), error))
}

fn put(memory: &Memory, at: u64, bytes: &[u8], what: &'static str) -> Result<(), LoadError> {
    memory.write_slice(bytes, GuestAddress(at)).map_err(|_| LoadError::TooSmall(what))
}

fn put_command_line(memory: &Memory, words: &str) -> Result<(), LoadError> {
    if words.len() >= layout::COMMAND_LINE_SIZE {
        return Err(LoadError::CommandLine(words.len()));
    }
    put(memory, layout::COMMAND_LINE, words.as_bytes(), "the command line")?;
    put(memory, layout::COMMAND_LINE + words.len() as u64, &[0], "the command line")
}

/// Where the initial RAM disk is.
#[derive(Clone, Copy, Debug)]
struct Module {
    start: u64,
    length: u64,
}

/// Puts the RAM disk at the end of low memory, as far from the kernel as can be.
fn put_module(
    memory: &Memory,
    path: &Path,
    loaded: &KernelLoaderResult,
    boot: &Boot<'_>,
) -> Result<Module, LoadError> {
    const WHAT: &str = "the initial RAM disk beside the kernel";
    let failed = |error| LoadError::File(path.to_owned(), error);
    let mut file = open(path)?;
    let length = file.metadata().map_err(failed)?.len();
    let end = boot.memory.min(layout::HOLE.start);
    let start = end.checked_sub(length).ok_or(LoadError::TooSmall(WHAT))? & !0xfff;
    if start < loaded.kernel_end || start < layout::HIGH {
        return Err(LoadError::TooSmall(WHAT));
    }
    let count = usize::try_from(length).map_err(|_| LoadError::TooSmall(WHAT))?;
    memory
        .read_exact_volatile_from(GuestAddress(start), &mut file, count)
        .map_err(|error| failed(io::Error::other(error.to_string())))?;
    Ok(Module { start, length })
}

/// The memory map: start, length, kind.
pub(crate) fn map(bytes: u64, reserved: &Range<u64>) -> Vec<(u64, u64, u32)> {
    let mut map =
        vec![(0, layout::LOW_END, USABLE), (layout::ACPI, layout::HIGH - layout::ACPI, RESERVED)];
    for range in layout::regions(bytes) {
        let start = range.start.max(layout::HIGH);
        if start < range.end {
            map.push((start, range.end - start, USABLE));
        }
    }
    if !reserved.is_empty() {
        map.push((reserved.start, reserved.end - reserved.start, RESERVED));
    }
    map
}

fn words<T: vm_memory::ByteValued>(values: &[T]) -> Vec<u8> {
    values.iter().flat_map(|value| value.as_slice().iter().copied()).collect()
}

fn put_start_info(
    memory: &Memory,
    map: &[(u64, u64, u32)],
    module: Option<Module>,
    rsdp: u64,
) -> Result<(), LoadError> {
    const WHAT: &str = "PVH's start information";
    let map: Vec<_> = map
        .iter()
        .map(|&(addr, size, type_)| hvm_memmap_table_entry { addr, size, type_, reserved: 0 })
        .collect();
    let modules: Vec<_> = module
        .iter()
        .map(|module| hvm_modlist_entry {
            paddr: module.start,
            size: module.length,
            ..hvm_modlist_entry::default()
        })
        .collect();
    let info = hvm_start_info {
        magic: PVH_MAGIC,
        version: 1,
        nr_modules: u32::try_from(modules.len()).unwrap_or(0),
        modlist_paddr: if modules.is_empty() { 0 } else { layout::MODULES },
        cmdline_paddr: layout::COMMAND_LINE,
        rsdp_paddr: rsdp,
        memmap_paddr: layout::MEMORY_MAP,
        memmap_entries: u32::try_from(map.len()).unwrap_or(0),
        ..hvm_start_info::default()
    };
    put(memory, layout::START_INFO, &words(&[info]), WHAT)?;
    put(memory, layout::MODULES, &words(&modules), WHAT)?;
    put(memory, layout::MEMORY_MAP, &words(&map), WHAT)
}

fn put_zero_page(
    memory: &Memory,
    loaded: &KernelLoaderResult,
    map: &[(u64, u64, u32)],
    module: Option<Module>,
    rsdp: u64,
) -> Result<(), LoadError> {
    const WHAT: &str = "Linux's boot parameters";
    let mut params =
        boot_params { hdr: loaded.setup_header.unwrap_or_default(), ..Default::default() };
    if loaded.setup_header.is_none() {
        params.hdr.boot_flag = BOOT_FLAG;
        params.hdr.header = HEADER;
        params.hdr.version = VERSION;
        params.hdr.kernel_alignment = 0x100_0000;
    }
    params.hdr.type_of_loader = LOADER;
    params.hdr.loadflags |= LOADED_HIGH;
    params.hdr.cmd_line_ptr = u32::try_from(layout::COMMAND_LINE).unwrap_or(0);
    params.hdr.cmdline_size = u32::try_from(layout::COMMAND_LINE_SIZE - 1).unwrap_or(0);
    if let Some(module) = module {
        // Below the hole, so both fit.
        params.hdr.ramdisk_image = u32::try_from(module.start).unwrap_or(0);
        params.hdr.ramdisk_size = u32::try_from(module.length).unwrap_or(0);
    }
    params.acpi_rsdp_addr = rsdp;
    params.e820_entries = u8::try_from(map.len()).unwrap_or(0);
    for (place, (addr, size, kind)) in params.e820_table.iter_mut().zip(map.iter().copied()) {
        (place.addr, place.size, place.r#type) = (addr, size, kind);
    }
    put(memory, layout::ZERO_PAGE, &words(&[params]), WHAT)?;
    put(memory, layout::GDT, &words(&registers::GDT), WHAT)?;
    put(memory, layout::PAGE_TABLES, &words(&registers::page_tables()), WHAT)
}

#[cfg(test)]
mod tests;

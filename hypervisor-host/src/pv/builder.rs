//! Builds a PV domain's memory: the kernel, what it is told, and its first page tables.
//!
//! `kernel` reads the ELF file and `notes` what its Xen notes ask for; everything is checked and an error says which
//! file, which field, and what to do. The layout is that of `xen/include/public/xen.h` ("Start-of-day memory layout"),
//! as Xen's own toolstack makes it: kernel, module, list of frames, start info, xenstore page, console page, page
//! tables, stack, and a little mapped memory up to a multiple of 4 MiB.

mod error;
mod kernel;
mod notes;
mod tables;
#[cfg(test)]
mod tests;

use std::sync::atomic::Ordering;

use janus_proto::abi::xen::start_info::{MAX_GUEST_CMDLINE, StartFlags, StartInfo};
use janus_proto::addr::{Mfn, PAGE_SIZE, Port};
use zerocopy::{FromZeros as _, IntoBytes as _};

pub use self::error::{BuildError, Cause};
pub use self::kernel::Kernel;
pub use self::notes::{Features, Notes};
use self::tables::Tables;
use crate::engine::Registers;
use crate::machine::ram::{FIRST_FRAME, Ram};
use crate::pv::mm::{Kind, Memory, Size};

/// Mapped memory behind the stack, at the least.
const SLACK: u64 = 512 << 10;
/// The end of what is mapped is a multiple of this.
const END_ALIGNMENT: u64 = 4 << 20;
/// What `StartInfo::magic` holds.
const MAGIC: &[u8] = b"xen-3.0-x86_64";
/// CPUs that have a `vcpu_info` in the shared info page.
const LEGACY_MAX_VCPUS: usize = 32;
/// Words of a `vcpu_info`.
const VCPU_INFO_WORDS: usize = 8;
const PAGE: u64 = PAGE_SIZE as u64;

/// What to build.
#[derive(Clone, Copy, Debug)]
pub struct Config<'a> {
    /// The kernel's file name, for errors.
    pub name: &'a str,
    /// The kernel's file.
    pub kernel: &'a [u8],
    /// The module (initial RAM disk), if there is one.
    pub module: Option<&'a [u8]>,
    /// The command line, at most 1023 bytes.
    pub command_line: &'a str,
    /// How much memory, and how many CPUs.
    pub size: Size,
    /// The guest's end of the xenstore channel.
    pub store_port: Port,
    /// The guest's end of the console channel.
    pub console_port: Port,
    /// What goes into the kernel's hypercall page.
    pub hypercall_page: &'a [u8; PAGE_SIZE],
}

/// A domain's memory, ready to run.
#[derive(Debug)]
pub struct Built {
    /// All of it; the first CPU is on its page table.
    pub memory: Memory,
    /// The first CPU's registers.
    pub registers: Registers,
    /// The top page table.
    pub root: Mfn,
    /// The start info page.
    pub start_info: Mfn,
    /// The console ring.
    pub console: Mfn,
    /// The xenstore ring.
    pub store: Mfn,
    /// The shared info page.
    pub shared_info: Mfn,
    /// The first frame of the grant table.
    pub grant_frames: Mfn,
    /// What the kernel's notes say.
    pub notes: Notes,
}

/// Where everything goes, in frames of the guest (pfn).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Layout {
    /// Virtual address of frame 0.
    base: u64,
    module: u64,
    module_pages: u64,
    list: u64,
    list_pages: u64,
    start_info: u64,
    store: u64,
    console: u64,
    tables: u64,
    table_pages: u64,
    stack: u64,
    /// Behind the last frame that is mapped from `base`.
    end: u64,
    /// Behind the last frame that is used at all.
    used: u64,
}

impl Layout {
    fn address(&self, frame: u64) -> u64 {
        self.base.wrapping_add(frame * PAGE)
    }
}

/// The machine frame of one of the guest's first frames.
fn machine(frame: u64) -> Mfn {
    Mfn(FIRST_FRAME.0 + frame)
}

/// Lays everything out: pure arithmetic.
fn lay_out(kernel: &Kernel, config: &Config<'_>) -> Result<Layout, Cause> {
    let notes = &kernel.notes;
    let pages = config.size.pages;
    let too_little = |needed: u64| Cause::Memory {
        needed: needed.saturating_mul(PAGE),
        given: pages.saturating_mul(PAGE),
    };
    let mut next =
        kernel.end.checked_sub(notes.virt_base).ok_or(Cause::Image("VIRT_BASE"))?.div_ceil(PAGE);
    let mut layout = Layout { base: notes.virt_base, ..Layout::default() };
    let module_pages = config.module.map_or(0, |module| module.len() as u64).div_ceil(PAGE);
    if next.saturating_add(module_pages) > pages {
        return Err(too_little(next.saturating_add(module_pages)));
    }
    layout.module_pages = module_pages;
    layout.list_pages = (pages * 8).div_ceil(PAGE);
    if !notes.module_unmapped {
        layout.module = next;
        next += module_pages;
    }
    if notes.p2m_base.is_none() {
        layout.list = next;
        next += layout.list_pages;
    }
    layout.start_info = next;
    layout.store = next + 1;
    layout.console = next + 2;
    layout.tables = next + 3;
    // The tables map themselves, so their number depends on itself; it only grows.
    let mut table_pages = 1;
    loop {
        layout.table_pages = table_pages;
        layout.stack = layout.tables + table_pages;
        let end = layout
            .base
            .checked_add((layout.stack + 1) * PAGE)
            .and_then(|end| end.checked_add(SLACK))
            .and_then(|end| end.checked_next_multiple_of(END_ALIGNMENT))
            .ok_or(Cause::Image("VIRT_BASE"))?;
        layout.end = (end - layout.base) / PAGE;
        layout.used = layout.end;
        if notes.p2m_base.is_some() {
            layout.list = layout.used;
            layout.used += layout.list_pages;
        }
        if notes.module_unmapped {
            layout.module = layout.used;
            layout.used += module_pages;
        }
        if layout.used > pages {
            return Err(too_little(layout.used));
        }
        let needed = tables::count(&layout, notes.p2m_base)?;
        if needed <= table_pages {
            return Ok(layout);
        }
        table_pages = needed;
    }
}

/// Copies bytes into the guest's memory from one of its first frames on.
fn put(ram: &Ram, frame: u64, offset: u64, bytes: &[u8]) -> Result<(), Cause> {
    let mut at = frame * PAGE + offset;
    let mut rest = bytes;
    while !rest.is_empty() {
        let in_page = usize::try_from(at % PAGE).unwrap_or(0);
        let (part, later) = rest.split_at(rest.len().min(PAGE_SIZE - in_page));
        let page = ram.frame(machine(at / PAGE)).ok_or(Cause::Image("size"))?;
        crate::pv::access::store(page, in_page, part);
        at += part.len() as u64;
        rest = later;
    }
    Ok(())
}

/// Builds a domain.
///
/// # Errors
/// The file is no kernel for a 64-bit PV domain, something does not fit, or the host has no memory.
pub fn build(config: &Config<'_>) -> Result<Built, BuildError> {
    build_inner(config).map_err(|cause| BuildError { file: config.name.to_owned(), cause })
}

fn build_inner(config: &Config<'_>) -> Result<Built, Cause> {
    let kernel = Kernel::parse(config.kernel)?;
    if config.command_line.len() >= MAX_GUEST_CMDLINE {
        return Err(Cause::CommandLine(config.command_line.len()));
    }
    if config.command_line.contains('\0') {
        return Err(Cause::CommandLineZero);
    }
    if config.size.vcpus == 0 || config.size.vcpus > LEGACY_MAX_VCPUS {
        return Err(Cause::Vcpus(config.size.vcpus));
    }
    let layout = lay_out(&kernel, config)?;
    let notes = kernel.notes;
    let mut memory = Memory::new(config.size).map_err(|error| Cause::Host(error.kind()))?;
    let ram = std::sync::Arc::clone(memory.ram());

    for segment in &kernel.segments {
        let start = segment.address - notes.virt_base;
        let pages = (start % PAGE + segment.data.len() as u64).div_ceil(PAGE);
        ram.populate(machine(start / PAGE), pages);
        put(&ram, 0, start, segment.data)?;
    }
    if let Some(page) = notes.hypercall_page {
        put(&ram, 0, page - notes.virt_base, config.hypercall_page)?;
    }
    if let Some(module) = config.module {
        put(&ram, layout.module, 0, module)?;
    }
    ram.list_later(machine(layout.list), config.size.pages);
    ram.populate(machine(layout.start_info), layout.stack - layout.start_info);
    put(&ram, layout.start_info, 0, start_info(config, &kernel, &layout, &memory).as_bytes())?;
    let shared = ram.frame(memory.shared_info()).ok_or(Cause::Image("size"))?;
    for info in shared.chunks(VCPU_INFO_WORDS).take(LEGACY_MAX_VCPUS) {
        if let Some(word) = info.first() {
            // `evtchn_upcall_mask`: no events before the guest is ready.
            word.store(1 << 8, Ordering::Relaxed);
        }
    }

    let root = Tables::write(&ram, &layout, notes.p2m_base)?;
    memory
        .pin_quietly(root, Kind::L4)
        .and_then(|()| memory.initialise(0, root, None))
        .map_err(|_| Cause::Image("page tables"))?;
    let registers = Registers {
        rip: kernel.entry,
        rsi: layout.address(layout.start_info),
        rsp: layout.address(layout.stack + 1),
        // Interrupts on: of the flags, the only one that matters.
        rflags: 0x202,
        ..Registers::default()
    };
    Ok(Built {
        registers,
        root,
        start_info: machine(layout.start_info),
        console: machine(layout.console),
        store: machine(layout.store),
        shared_info: memory.shared_info(),
        grant_frames: memory.grant_frames(),
        notes,
        memory,
    })
}

fn start_info(config: &Config<'_>, kernel: &Kernel, layout: &Layout, memory: &Memory) -> StartInfo {
    let notes = &kernel.notes;
    let mut info = StartInfo::new_zeroed();
    for (to, from) in info.magic.iter_mut().zip(MAGIC) {
        *to = *from;
    }
    info.nr_pages = config.size.pages;
    info.shared_info = memory.shared_info().0 * PAGE;
    info.flags = StartFlags::empty();
    info.store_mfn = machine(layout.store);
    info.store_evtchn = config.store_port;
    info.console_mfn = machine(layout.console);
    info.console_evtchn = config.console_port;
    info.pt_base = layout.address(layout.tables);
    info.nr_pt_frames = layout.table_pages;
    info.mfn_list = notes.p2m_base.unwrap_or(layout.address(layout.list));
    if let Some(module) = config.module.filter(|module| !module.is_empty()) {
        info.mod_len = module.len() as u64;
        info.mod_start = if notes.module_unmapped {
            info.flags |= StartFlags::MOD_START_PFN;
            layout.module
        } else {
            layout.address(layout.module)
        };
    }
    for (to, from) in info.cmd_line.iter_mut().zip(config.command_line.bytes()) {
        *to = from;
    }
    if notes.p2m_base.is_some() {
        info.first_p2m_pfn = layout.list;
        info.nr_p2m_frames = layout.list_pages;
    }
    info
}

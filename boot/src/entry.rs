//! Where the assembly doors arrive: early output, early exceptions, one [`BootInfo`], the kernel.
// UNSAFETY: reads guest physical memory that loaders point to, edits the boot page tables, names the
// kernel's entry symbol.
#![expect(unsafe_code, reason = "physical memory, boot page tables, entry symbols")]

use crate::early::{self, EarlyConsole};
use crate::hypercall::{self, Gate, hypercall};
use crate::image::Image;
use crate::memory::PhysicalMemory;
use crate::{BootError, BootInfo, Door, MemoryKind, Problems, exception};
use core::arch::{asm, global_asm};
use core::cell::UnsafeCell;
use core::fmt::Write;
use janus_proto::addr::{Gpa, PAGE_SIZE};

global_asm!(include_str!("entry/headers.s"), options(raw));
global_asm!(include_str!("entry/native.s"), options(raw));
global_asm!(include_str!("entry/stack.s"), options(raw));
global_asm!(include_str!("entry/xen_pv.s"), options(raw));

unsafe extern "Rust" {
    /// The kernel's start; `janus_kernel` defines it.
    fn janus_kernel_start(info: BootInfo) -> !;
}

/// Memory below `limit`, mapped at its own address; the first page only in passing.
struct Identity {
    limit: u64,
}

impl Identity {
    fn slice(&self, address: u64, len: u64, lowest: u64) -> Option<&'static [u8]> {
        if len == 0 {
            return Some(&[]);
        }
        let end = address.checked_add(len)?;
        if address < lowest || end > self.limit {
            return None;
        }
        let pointer = core::ptr::with_exposed_provenance(usize::try_from(address).ok()?);
        // SAFETY: 1. the range is mapped (checked above) and does not begin at address 0; 2. it is the loader's: the
        // kernel reserves it (`BootInfo::reserve`) before it hands out any memory, so nothing writes there.
        Some(unsafe { core::slice::from_raw_parts(pointer, usize::try_from(len).ok()?) })
    }
}

impl PhysicalMemory for Identity {
    fn bytes(&self, address: u64, len: u64) -> Option<&'static [u8]> {
        self.slice(address, len, PAGE_SIZE as u64)
    }

    fn passing(&self, address: u64, len: u64) -> Option<&[u8]> {
        // The boot tables map the first page, too.
        self.slice(address, len, 1)
    }
}

/// Ends a boot that cannot go on, with a word.
fn fail(door: Door, error: BootError) -> ! {
    let _ = writeln!(EarlyConsole, "janus: {door:?}: {error}");
    early::crash()
}

/// From `native.s`: `door` as numbered there, the loader's structure, and its magic.
#[unsafe(no_mangle)]
extern "C" fn native_start(door: u32, argument: u64, magic: u32) -> ! {
    early::init_native();
    exception::load_native();
    unmap_stack_guard();
    // The boot tables map 4 GiB.
    let memory = Identity { limit: 1 << 32 };
    let (door, name) = match door {
        1 => (Door::Pvh, "PVH"),
        2 => (Door::Multiboot1, "multiboot 1"),
        3 => (Door::Multiboot2, "multiboot 2"),
        _ => (Door::Linux64, "Linux 64-bit"),
    };
    for part in ["janus: entered by ", name, "\n"] {
        early::write_to_xen(part.as_bytes());
    }
    let image = Image::all();
    let info = match door {
        Door::Pvh => crate::pvh::parse(&memory, argument, image),
        Door::Multiboot1 | Door::Multiboot2 => {
            crate::multiboot::parse(&memory, magic, argument, image)
        }
        Door::Linux64 | Door::XenPv => crate::linux::parse(&memory, argument, image),
    };
    let mut info = info.unwrap_or_else(|error| fail(door, error));
    if info.memory.ranges().is_empty() {
        early::xen_memory_map(&mut info);
    }
    if info.rsdp.is_none() {
        info.rsdp = find_rsdp(&info);
    }
    if info.memory.usable_bytes() == 0 {
        // A PVH version 0 loader, or a careless one. What holds the image is memory; the kernel says
        // that it may be too little.
        info.problems |= Problems::NO_MEMORY_MAP;
        let start = info.image.start;
        let end = info.image.end.next_multiple_of(2 << 20);
        info.add_memory(start, end - start, MemoryKind::Usable);
    }
    move_low_module(&memory, &mut info);
    // SAFETY: the kernel defines it with this signature (`janus_kernel::start`).
    unsafe { janus_kernel_start(info) }
}

/// From `xen_pv.s`: `start_info` as Xen left it in rsi.
#[unsafe(no_mangle)]
extern "C" fn xen_pv_start(start_info: u64) -> ! {
    // No console is known yet, and a trap table costs nothing.
    early::init_pv(None);
    exception::load_pv();
    // Everything that start_info points to lies in what Xen mapped for the boot.
    let memory = Identity { limit: u64::MAX };
    let info = crate::start_info::parse(&memory, start_info, Image::all())
        .unwrap_or_else(|error| fail(Door::XenPv, error));
    if let crate::Protocol::XenPv(start_info) = &info.protocol
        && let Some(console) = start_info.console
        && let Some(ring) = find_frame(start_info, console.mfn.0)
        && let Ok(ring) = usize::try_from(ring)
    {
        early::init_pv(Some((ring, console.port.0)));
    }
    early::write(b"janus: entered by Xen PV\n");
    // Leaves the guard page, an ordinary page of the image, without a mapping.
    const UVMF_INVLPG: u64 = 2;
    // SAFETY: nothing lies in the guard page; Xen validates the rest.
    let _ = unsafe {
        hypercall(Gate::Syscall, hypercall::UPDATE_VA_MAPPING, Image::stack_guard(), 0, UVMF_INVLPG)
    };
    // SAFETY: the kernel defines it with this signature (`janus_kernel::start`).
    unsafe { janus_kernel_start(info) }
}

/// Where machine frame `mfn` of this PV guest is mapped: the domain builder puts the ring pages right
/// behind start_info, so the list of frames is searched from there and then in full.
fn find_frame(start_info: &crate::start_info::StartInfo, mfn: u64) -> Option<u64> {
    let memory = Identity { limit: u64::MAX };
    let list = memory.bytes(start_info.mfn_list, start_info.nr_pages.checked_mul(8)?)?;
    let is_it = |pfn: &u64| {
        usize::try_from(*pfn).ok().and_then(|pfn| crate::memory::read_u64(list, pfn * 8))
            == Some(mfn)
    };
    let near = start_info.address / PAGE_SIZE as u64;
    let last_mapped = (start_info.bootstrap_end / PAGE_SIZE as u64).min(start_info.nr_pages);
    let pfn = (near..near + 4).find(is_it).or_else(|| (1..last_mapped).find(is_it))?;
    Some(pfn * PAGE_SIZE as u64)
}

/// Moves a module out of page 0 to where a slice can name it.
fn move_low_module(memory: &Identity, info: &mut BootInfo) {
    let Some((start, len, command_line)) = info.low_module.take() else { return };
    let fits = start.checked_add(len).is_some_and(|end| end <= info.image.start);
    let Some(target) = info.find_free(len, memory.limit).filter(|_| fits) else {
        info.problems |= Problems::MODULE_REJECTED;
        return;
    };
    // SAFETY: both ranges are mapped; the target is free memory that nothing refers to. Assembly,
    // because the source may start at address 0.
    unsafe {
        asm!(
            "rep movsb",
            inout("rcx") len => _,
            inout("rsi") start => _,
            inout("rdi") target => _,
            options(nostack, preserves_flags)
        );
    }
    info.add_module(memory, target, len, command_line);
}

/// The ACPI root pointer, for loaders that do not pass it: in the BIOS area (ACPI 6.5, 5.2.5.1), or,
/// where UEFI firmware has none there (multiboot 1), in the ACPI ranges of the memory map.
fn find_rsdp(info: &BootInfo) -> Option<Gpa> {
    let memory = Identity { limit: 1 << 32 };
    let is_rsdp = |bytes: &[u8]| {
        bytes.starts_with(b"RSD PTR ")
            && bytes
                .get(..20)
                .is_some_and(|head| head.iter().fold(0u8, |a, &b| a.wrapping_add(b)) == 0)
    };
    let acpi = info
        .memory
        .ranges()
        .iter()
        .filter(|range| matches!(range.kind, MemoryKind::AcpiReclaimable | MemoryKind::AcpiNvs))
        .map(|range| (range.start.0, range.len));
    core::iter::once((0xe_0000, 0x2_0000)).chain(acpi).find_map(|(start, len)| {
        let area = memory.bytes(start, len)?;
        // The structure is 16-byte aligned in the BIOS area, and anywhere on 4 bytes under UEFI.
        let step = if start == 0xe_0000 { 16 } else { 4 };
        let index = area.windows(36).step_by(step).position(is_rsdp)?;
        Some(Gpa(start + (index * step) as u64))
    })
}

/// A page of page table entries for the 2 MiB that hold the boot stack's guard page.
#[repr(C, align(4096))]
struct GuardTable(UnsafeCell<[u64; 512]>);

// SAFETY: written once by the one CPU that is up, then read by the page walker only.
unsafe impl Sync for GuardTable {}

static GUARD_TABLE: GuardTable = GuardTable(UnsafeCell::new([0; 512]));

/// Splits the 2 MiB page around the guard page and leaves that page out.
fn unmap_stack_guard() {
    unsafe extern "C" {
        static boot_pd: u8;
    }
    const PRESENT_WRITABLE_AD: u64 = 0x63;
    let guard = Image::stack_guard();
    let base = guard & !((2 << 20) - 1);
    let mut entries = [0u64; 512];
    let mut address = base;
    for entry in &mut entries {
        *entry = if address == guard { 0 } else { address | PRESENT_WRITABLE_AD };
        address += PAGE_SIZE as u64;
    }
    let table = GUARD_TABLE.0.get();
    // SAFETY: not in use yet (see `GuardTable`).
    unsafe { table.write(entries) };
    let directory =
        core::ptr::with_exposed_provenance_mut::<u64>((&raw const boot_pd).expose_provenance());
    let index = usize::try_from(base >> 21).unwrap_or(0);
    // SAFETY: `index` is below 2048, since the image is linked below 4 GiB, so this is the entry that
    // maps `base`; the new one maps the same memory but for the guard page.
    unsafe {
        directory.add(index).write_volatile(table.expose_provenance() as u64 | PRESENT_WRITABLE_AD);
    }
    // SAFETY: drops the guard page's stale translation.
    unsafe { asm!("invlpg [{}]", in(reg) guard, options(nostack)) };
}

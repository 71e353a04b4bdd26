//! The built image through `linux-loader`, by which Firecracker, Cloud Hypervisor and other rust-vmm monitors load
//! kernels: the PVH note's entry, the segments, and `hvm_start_info` as these monitors write it.
//!
//! Needs the finished ELF file, whose path is in `JANUS_IMAGE`; `cargo xtask test --level image` builds it and runs
//! this. Ref: `xen/include/public/arch-x86/hvm/start_info.h`; the addresses are Firecracker's (`arch/x86_64/layout.rs`).
#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::fs::File;

use janus_boot::memory::{MemoryKind, PhysicalMemory};
use janus_boot::{Door, pvh};
use linux_loader::configurator::pvh::PvhBootConfigurator;
use linux_loader::configurator::{BootConfigurator, BootParams};
use linux_loader::loader::elf::start_info::{
    hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
};
use linux_loader::loader::elf::{Elf, PvhBootCapability};
use linux_loader::loader::{Cmdline, KernelLoader, KernelLoaderResult, load_cmdline};
use object::Endianness;
use object::elf::{FileHeader64, PT_LOAD};
use object::read::elf::{FileHeader as _, ProgramHeader as _};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

const MEMORY: usize = 128 << 20;
const HIMEM: GuestAddress = GuestAddress(1 << 20);
const START_INFO: GuestAddress = GuestAddress(0x6000);
const MODULES: GuestAddress = GuestAddress(0x6040);
const MEMORY_MAP: GuestAddress = GuestAddress(0x7000);
const COMMAND_LINE: GuestAddress = GuestAddress(0x2_0000);
const INITRD: GuestAddress = GuestAddress(100 << 20);
const RSDP: u64 = 0xe_0000;
const WORDS: &str = "console=ttyS0 virtio_mmio.device=4K@0xd0000000:5 --exec uptime";

fn image() -> File {
    let path = std::env::var_os("JANUS_IMAGE").expect("JANUS_IMAGE names the built image");
    File::open(path).unwrap()
}

fn memory() -> GuestMemoryMmap {
    GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY)]).unwrap()
}

fn load(memory: &GuestMemoryMmap) -> KernelLoaderResult {
    Elf::load(memory, None, &mut image(), Some(HIMEM)).unwrap()
}

fn bytes(memory: &GuestMemoryMmap, at: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    memory.read_slice(&mut bytes, GuestAddress(at)).unwrap();
    bytes
}

#[test]
#[ignore = "needs the built image: cargo xtask test --level image"]
fn the_pvh_note_names_the_entry_and_the_segments_arrive_whole() {
    let memory = memory();
    // What no loader writes is left as it was.
    memory.write_slice(&vec![0xa5; MEMORY - 4096], GuestAddress(4096)).unwrap();
    let loaded = load(&memory);
    let PvhBootCapability::PvhEntryPresent(entry) = loaded.pvh_boot_cap else {
        panic!("{:?}", loaded.pvh_boot_cap);
    };
    // `pvh_entry` (boot/src/entry/native.s), 32-bit code: cli; cld; mov ebp, 1 (the door's number).
    assert_eq!(bytes(&memory, entry.0, 7), [0xfa, 0xfc, 0xbd, 1, 0, 0, 0]);

    let file = std::fs::read(std::env::var_os("JANUS_IMAGE").unwrap()).unwrap();
    let header = FileHeader64::<Endianness>::parse(&*file).unwrap();
    let endian = header.endian().unwrap();
    let mut inside = 0;
    let mut end = 0;
    for segment in header.program_headers(endian, &*file).unwrap() {
        if segment.p_type(endian) != PT_LOAD {
            continue;
        }
        let at = segment.p_paddr(endian);
        assert_eq!(at, segment.p_vaddr(endian), "linked where it is loaded");
        let data = segment.data(endian, &*file).unwrap();
        assert!(bytes(&memory, at, data.len()) == data, "the segment at {at:#x} differs");
        inside += u32::from((at..at + data.len() as u64).contains(&entry.0));
        end = end.max(at + segment.p_memsz(endian));
    }
    assert_eq!(inside, 1, "the entry lies in one segment");
    assert_eq!(loaded.kernel_end, end, "free memory begins behind what the image uses");
    assert_eq!(bytes(&memory, (1 << 20) + 16, 16), [0xa5; 16], "nothing else is written");
}

/// What the monitor wrote, as the boot code sees it.
struct Low(&'static [u8]);

impl PhysicalMemory for Low {
    fn bytes(&self, address: u64, len: u64) -> Option<&'static [u8]> {
        let start = usize::try_from(address).ok().filter(|start| *start >= 4096)?;
        self.0.get(start..start.checked_add(usize::try_from(len).ok()?)?)
    }
}

#[test]
#[ignore = "needs the built image: cargo xtask test --level image"]
fn what_a_monitor_tells_by_hvm_start_info_is_understood() {
    let memory = memory();
    let loaded = load(&memory);
    let mut line = Cmdline::new(2048).unwrap();
    line.insert_str(WORDS).unwrap();
    load_cmdline(&memory, COMMAND_LINE, &line).unwrap();
    memory.write_slice(b"070701", INITRD).unwrap();
    let ram = |addr, size| hvm_memmap_table_entry { addr, size, type_: 1, reserved: 0 };
    let map = [ram(0, 0x9_fc00), ram(HIMEM.0, MEMORY as u64 - HIMEM.0)];
    let modules = [hvm_modlist_entry { paddr: INITRD.0, size: 6, ..Default::default() }];
    let start_info = hvm_start_info {
        magic: 0x336e_c578,
        version: 1,
        nr_modules: 1,
        modlist_paddr: MODULES.0,
        cmdline_paddr: COMMAND_LINE.0,
        rsdp_paddr: RSDP,
        memmap_paddr: MEMORY_MAP.0,
        memmap_entries: 2,
        ..Default::default()
    };
    let mut parameters = BootParams::new(&start_info, START_INFO);
    parameters.set_sections(&map, MEMORY_MAP);
    parameters.set_modules(&modules, MODULES);
    PvhBootConfigurator::write_bootparams(&parameters, &memory).unwrap();

    let seen = Low(bytes(&memory, 0, MEMORY).leak());
    let image = loaded.kernel_load.0..loaded.kernel_end;
    let info = pvh::parse(&seen, START_INFO.0, image).unwrap();
    assert!(matches!(info.door, Door::Pvh) && info.problems.is_empty(), "{:?}", info.problems);
    assert_eq!(info.command_line, WORDS.as_bytes());
    assert_eq!(info.rsdp.map(|rsdp| rsdp.0), Some(RSDP));
    let ranges: Vec<_> = info.memory.ranges().iter().map(|r| (r.start.0, r.len, r.kind)).collect();
    assert_eq!(
        ranges,
        map.map(|entry| (entry.addr, entry.size, MemoryKind::Usable)),
        "the memory map"
    );
    assert_eq!(info.modules.len(), 1);
    assert_eq!(info.modules[0].data, b"070701");
}

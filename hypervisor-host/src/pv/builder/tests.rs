//! Images with and without faults: what is built is read back as a guest would see it.

use std::mem::offset_of;

use proptest::prelude::*;

use super::*;
use crate::pv::mm::MACHINE_TO_PHYSICAL;

const PAGES: u64 = 2048;
const HYPERCALL_PAGE: [u8; PAGE_SIZE] = [0xab; PAGE_SIZE];

/// A file with one segment at a physical address, and notes.
struct Image {
    physical: u64,
    memory: u64,
    contents: Vec<u8>,
    entry: u64,
    notes: Vec<(u32, Vec<u8>)>,
    legacy: Option<&'static str>,
}

impl Image {
    fn new() -> Self {
        Self {
            physical: 0x20_0000,
            memory: 0x3000,
            contents: (0..0x1800u32).map(|i| i.to_le_bytes()[0]).collect(),
            entry: 0x20_0010,
            notes: vec![
                (1, 0x20_0020u64.to_le_bytes().to_vec()),
                (2, 0x20_1000u64.to_le_bytes().to_vec()),
                (3, 0u64.to_le_bytes().to_vec()),
                (5, b"xen-3.0\0".to_vec()),
                (8, b"generic\0".to_vec()),
            ],
            legacy: None,
        }
    }

    fn note(mut self, kind: u32, value: &[u8]) -> Self {
        self.notes.retain(|(other, _)| *other != kind);
        self.notes.push((kind, value.to_vec()));
        self
    }

    fn file(&self) -> Vec<u8> {
        let mut notes = Vec::new();
        for (kind, value) in &self.notes {
            for word in [4, u32::try_from(value.len()).unwrap(), *kind] {
                notes.extend(word.to_le_bytes());
            }
            notes.extend(b"Xen\0");
            notes.extend(value);
            notes.resize(notes.len().next_multiple_of(4), 0);
        }
        let names = b"\0__xen_guest\0.shstrtab\0";
        let legacy_name = u32::from(self.legacy.is_some());
        let legacy = self.legacy.unwrap_or_default().as_bytes();
        let programs_at = 64u64;
        let contents_at = programs_at + 2 * 56;
        let notes_at = contents_at + self.contents.len() as u64;
        let names_at = notes_at + notes.len() as u64;
        let legacy_at = names_at + names.len() as u64;
        let sections_at = legacy_at + legacy.len() as u64;
        let mut file = Vec::new();
        file.extend(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
        for half in [2u16, 62] {
            file.extend(half.to_le_bytes());
        }
        file.extend(1u32.to_le_bytes());
        for long in [self.entry, programs_at, sections_at] {
            file.extend(long.to_le_bytes());
        }
        file.extend(0u32.to_le_bytes());
        for half in [64u16, 56, 2, 64, 3, 2] {
            file.extend(half.to_le_bytes());
        }
        let contents = self.contents.len() as u64;
        let segments = [
            (1u32, contents_at, self.physical, contents, self.memory, 0x1000),
            (4, notes_at, 0, notes.len() as u64, notes.len() as u64, 4),
        ];
        for (kind, at, physical, length, memory, align) in segments {
            file.extend(kind.to_le_bytes());
            file.extend(7u32.to_le_bytes());
            for long in [at, physical, physical, length, memory, align] {
                file.extend(long.to_le_bytes());
            }
        }
        file.extend(&self.contents);
        file.extend(&notes);
        file.extend(names);
        file.extend(legacy);
        let sections = [
            (0u32, 0u32, 0u64, 0u64),
            (legacy_name, 1, legacy_at, legacy.len() as u64),
            (13, 3, names_at, names.len() as u64),
        ];
        for (name, kind, at, length) in sections {
            file.extend(name.to_le_bytes());
            file.extend(kind.to_le_bytes());
            for long in [0, 0, at, length] {
                file.extend(long.to_le_bytes());
            }
            file.extend([0; 8]);
            for long in [1u64, 0] {
                file.extend(long.to_le_bytes());
            }
        }
        file
    }
}

fn config(kernel: &[u8]) -> Config<'_> {
    Config {
        name: "kernel",
        kernel,
        module: None,
        command_line: "hello",
        size: Size { pages: PAGES, max_pages: PAGES, vcpus: 1 },
        store_port: Port(1),
        console_port: Port(2),
        hypercall_page: &HYPERCALL_PAGE,
    }
}

fn cause(image: &Image) -> Cause {
    build(&config(&image.file())).map(drop).unwrap_err().cause
}

fn bytes(built: &Built, address: u64, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    built.memory.copy_from(built.root, address, &mut bytes).unwrap();
    bytes
}

fn word(built: &Built, address: u64) -> u64 {
    u64::from_le_bytes(bytes(built, address, 8).try_into().unwrap())
}

#[test]
fn a_kernel_finds_what_xen_promises() {
    let file = Image::new().file();
    let module = vec![0x5a; 5000];
    let built = build(&Config { module: Some(&module), ..config(&file) }).unwrap();
    let registers = built.registers;
    assert_eq!(registers.rip, 0x20_0020, "the note, not the file's entry point");
    let info = registers.rsi;
    assert_eq!(bytes(&built, info, 15), b"xen-3.0-x86_64\0");
    let field = |offset: usize| word(&built, info + offset as u64);
    assert_eq!(field(offset_of!(StartInfo, nr_pages)), PAGES);
    assert_eq!(field(offset_of!(StartInfo, shared_info)), built.shared_info.0 << 12);
    assert_eq!(field(offset_of!(StartInfo, store_mfn)), built.store.0);
    assert_eq!(field(offset_of!(StartInfo, console_mfn)), built.console.0);
    assert_eq!(field(offset_of!(StartInfo, flags)), 0);
    assert_eq!(field(offset_of!(StartInfo, mod_len)), 5000);
    let module_at = field(offset_of!(StartInfo, mod_start));
    assert_eq!(module_at, 0x20_3000, "right behind the kernel");
    assert_eq!(bytes(&built, module_at, 5000), module);
    assert_eq!(bytes(&built, info + 128, 6), b"hello\0");
    // The kernel, its bss, and the hypercall page over its own bytes.
    assert_eq!(bytes(&built, 0x20_0000, 0x1000), Image::new().contents[..0x1000]);
    assert_eq!(bytes(&built, 0x20_1000, 0x1000), HYPERCALL_PAGE);
    assert_eq!(bytes(&built, 0x20_2000, 0x1000), [0; 0x1000]);
    // Frame n is at address n pages, and the list says which machine frame that is.
    let list = field(offset_of!(StartInfo, mfn_list));
    for frame in [0, 0x200, PAGES - 1] {
        assert_eq!(word(&built, list + frame * 8), FIRST_FRAME.0 + frame);
    }
    // The order of xen.h.
    let tables = field(offset_of!(StartInfo, pt_base));
    let count = field(offset_of!(StartInfo, nr_pt_frames));
    assert!(module_at < list && list < info);
    assert_eq!(tables, info + 3 * PAGE);
    assert_eq!(registers.rsp, tables + (count + 1) * PAGE);
    assert_eq!(built.root.0, FIRST_FRAME.0 + tables / PAGE);
    // The whole is mapped up to 4 MiB, with half a MiB to spare, and no further.
    let end = (registers.rsp + SLACK).next_multiple_of(END_ALIGNMENT);
    let mut byte = [0];
    assert!(built.memory.copy_from(built.root, end - 1, &mut byte).is_ok());
    assert_eq!(
        built.memory.copy_from(built.root, end, &mut byte),
        Err(janus_proto::abi::xen::Errno::EFAULT)
    );
}

#[test]
fn its_page_tables_are_tables_and_read_only() {
    let built = build(&config(&Image::new().file())).unwrap();
    assert_eq!(built.memory.kind(built.root).map(|(kind, _)| kind), Some(Kind::L4));
    let info = built.registers.rsi;
    let tables = word(&built, info + offset_of!(StartInfo, pt_base) as u64);
    let count = word(&built, info + offset_of!(StartInfo, nr_pt_frames) as u64);
    for page in 0..count {
        let address = tables + page * PAGE;
        assert!(built.memory.copy_to(built.root, address, &[0]).is_err(), "table {page}");
        let (kind, uses) = built.memory.kind(machine(address / PAGE)).unwrap();
        assert!(kind.is_table() && uses > 0);
    }
    assert!(built.memory.copy_to(built.root, built.registers.rsp - 8, &[0; 8]).is_ok());
}

#[test]
fn events_are_off_on_all_cpus() {
    let built = build(&config(&Image::new().file())).unwrap();
    let page = built.memory.ram().frame(built.shared_info).unwrap();
    for cpu in 0..LEGACY_MAX_VCPUS {
        assert_eq!(page[cpu * VCPU_INFO_WORDS].load(Ordering::Relaxed).to_le_bytes()[1], 1);
    }
}

#[test]
fn a_kernel_may_begin_at_address_0() {
    // As Mini-OS: linked at 0, entered there, notes with virtual addresses.
    let image = Image { physical: 0, entry: 0, ..Image::new() }
        .note(1, &0u64.to_le_bytes())
        .note(2, &0x1000u64.to_le_bytes());
    let built = build(&config(&image.file())).unwrap();
    assert_eq!(built.registers.rip, 0);
    assert_eq!(bytes(&built, 0, 0x1000), image.contents[..0x1000]);
}

#[test]
fn physical_addresses_are_shifted_by_the_notes() {
    // A kernel in the upper half, as Linux is built.
    let base = 0xffff_ffff_8000_0000u64;
    let image = Image::new()
        .note(1, &(base + 0x20_0010).to_le_bytes())
        .note(2, &(base + 0x20_1000).to_le_bytes())
        .note(3, &base.to_le_bytes());
    let built = build(&config(&image.file())).unwrap();
    assert_eq!(built.registers.rip, base + 0x20_0010);
    assert_eq!(bytes(&built, base + 0x20_0000, 16), image.contents[..16]);
    let list = word(&built, built.registers.rsi + offset_of!(StartInfo, mfn_list) as u64);
    assert_eq!(list, base + 0x20_3000);
}

#[test]
fn the_old_section_is_read_too() {
    let mut image = Image::new();
    image.notes.clear();
    image.legacy = Some(
        "XEN_VER=xen-3.0,VIRT_BASE=0x100000,VIRT_ENTRY=0x200040,HYPERCALL_PAGE=0x101,LOADER=generic",
    );
    let built = build(&config(&image.file())).unwrap();
    assert_eq!(built.registers.rip, 0x20_0040);
    // Its hypercall page is a frame number: 0x100000 + 0x101 * 4096.
    assert_eq!(bytes(&built, 0x20_1000, 4), [0xab; 4]);
    // Physical addresses in such a file are virtual ones; frame 0 is at VIRT_BASE.
    assert_eq!(bytes(&built, 0x20_0000, 16), image.contents[..16]);
    let list = word(&built, built.registers.rsi + offset_of!(StartInfo, mfn_list) as u64);
    let (frame, at) = ((0x20_0000 - 0x10_0000) / PAGE, 0x20_0000);
    assert_eq!(word(&built, list + frame * 8), FIRST_FRAME.0 + frame, "{at:#x}");
}

#[test]
fn the_list_and_the_module_go_where_the_kernel_wants_them() {
    let list_at = 0x10_0000_0000u64;
    let image = Image::new().note(15, &list_at.to_le_bytes()).note(16, &1u64.to_le_bytes());
    let file = image.file();
    let built = build(&Config { module: Some(b"module"), ..config(&file) }).unwrap();
    let field = |offset: usize| word(&built, built.registers.rsi + offset as u64);
    assert_eq!(field(offset_of!(StartInfo, mfn_list)), list_at);
    assert_eq!(word(&built, list_at + 8 * 7), FIRST_FRAME.0 + 7);
    assert_eq!(field(offset_of!(StartInfo, flags)) & 8, 8, "SIF_MOD_START_PFN");
    let frame = machine(field(offset_of!(StartInfo, mod_start)));
    let page = built.memory.ram().frame(frame).unwrap();
    assert_eq!(page[0].load(Ordering::Relaxed).to_le_bytes()[..6], *b"module");
    assert_eq!(
        field(offset_of!(StartInfo, first_p2m_pfn)),
        field(offset_of!(StartInfo, mod_start)) - 4
    );
    assert_eq!(field(offset_of!(StartInfo, nr_p2m_frames)), 4);
}

#[test]
fn what_is_wrong_is_named() {
    assert_eq!(build(&config(b"\x1f\x8b\x08")).unwrap_err().cause, Cause::Compressed);
    assert_eq!(build(&config(b"MZ")).unwrap_err().cause, Cause::NotElf);
    assert_eq!(build(&config(b"")).unwrap_err().cause, Cause::NotElf);
    let file = Image::new().file();
    for (at, byte, want) in [
        (4, 1, Cause::Machine("EI_CLASS", 1)),
        (5, 2, Cause::Machine("EI_DATA", 2)),
        (18, 40, Cause::Machine("e_machine", 40)),
        (16, 1, Cause::Machine("e_type", 1)),
    ] {
        let mut file = file.clone();
        file[at] = byte;
        assert_eq!(build(&config(&file)).unwrap_err().cause, want);
    }
    for length in 4..file.len() {
        let error = build(&config(&file[..length])).map(drop).err();
        // Nothing needs the sections when there are notes.
        let needed = length < 64 + 2 * 56 + 0x1800 + 40;
        assert_eq!(
            error.is_some(),
            error.is_some_and(|error| matches!(error.cause, Cause::Truncated(_))),
            "{length}"
        );
        assert!(!needed || build(&config(&file[..length])).is_err(), "{length}");
    }
    let mut empty = Image::new();
    empty.notes.clear();
    assert_eq!(cause(&empty), Cause::NoNotes);
    empty.notes.push((18, 0x20_0000u32.to_le_bytes().to_vec()));
    assert_eq!(cause(&empty), Cause::OnlyPvh);
    assert_eq!(cause(&Image::new().note(1, &0x30_0000u64.to_le_bytes())), Cause::Image("ENTRY"));
    assert_eq!(
        cause(&Image::new().note(2, &0x20_1008u64.to_le_bytes())),
        Cause::Image("HYPERCALL_PAGE")
    );
    assert_eq!(
        cause(&Image::new().note(2, &0x20_3000u64.to_le_bytes())),
        Cause::Image("HYPERCALL_PAGE")
    );
    assert_eq!(cause(&Image::new().note(3, &0x30_0000u64.to_le_bytes())), Cause::Image("ENTRY"));
    assert_eq!(cause(&Image::new().note(3, b"abc")), Cause::Note("VIRT_BASE"));
    assert_eq!(cause(&Image::new().note(5, b"xen-2.0\0")), Cause::Note("XEN_VERSION"));
    assert_eq!(
        cause(&Image::new().note(15, &0x20_0000u64.to_le_bytes())),
        Cause::Image("INIT_P2M")
    );
    assert_eq!(
        cause(&Image::new().note(15, &(1u64 << 47).to_le_bytes())),
        Cause::Image("INIT_P2M")
    );
    assert_eq!(
        cause(&Image::new().note(10, b"!auto_translated_physmap\0")),
        Cause::Unsupported("auto_translated_physmap")
    );
    assert_eq!(cause(&Image { memory: 0x1000, ..Image::new() }), Cause::Image("p_filesz"));
    assert!(matches!(cause(&Image { memory: 1 << 40, ..Image::new() }), Cause::Memory { .. }));
    assert_eq!(cause(&Image { memory: u64::MAX, ..Image::new() }), Cause::Image("p_memsz"));
}

#[test]
fn what_it_is_given_is_checked_too() {
    let file = Image::new().file();
    let long = "x".repeat(1024);
    let with = |change: fn(&mut Config<'_>)| {
        let mut config = config(&file);
        change(&mut config);
        build(&config).map(drop).map_err(|error| error.cause)
    };
    let error = build(&Config { command_line: &long, ..config(&file) }).unwrap_err();
    assert_eq!(error.cause, Cause::CommandLine(1024));
    assert!(build(&Config { command_line: &long[1..], ..config(&file) }).is_ok());
    assert_eq!(with(|config| config.command_line = "a\0b"), Err(Cause::CommandLineZero));
    assert_eq!(with(|config| config.size.vcpus = 33), Err(Cause::Vcpus(33)));
    assert_eq!(
        with(|config| config.size.pages = 1023),
        Err(Cause::Memory { needed: 1024 * PAGE, given: 1023 * PAGE })
    );
    assert_eq!(with(|config| config.size.pages = 1024), Ok(()));
    let big = vec![0; 16 << 20];
    let error = build(&Config { module: Some(&big), ..config(&file) }).unwrap_err();
    assert!(error.to_string().starts_with("kernel: 8192 KiB of memory are too few"), "{error}");
}

#[test]
fn two_segments_in_one_place_are_refused() {
    let mut file = Image::new().file();
    // The note segment becomes a second one to load, inside the first.
    file[64 + 56] = 1;
    file[64 + 56 + 24..64 + 56 + 32].copy_from_slice(&0x20_0100u64.to_le_bytes());
    // Its notes are then found by nobody.
    assert_eq!(build(&config(&file)).unwrap_err().cause, Cause::NoNotes);
}

#[test]
fn the_machine_to_physical_table_names_the_guests_frames() {
    let mut built = build(&config(&Image::new().file())).unwrap();
    let start = 0xffff_8000_0000_0000u64;
    for frame in [0, 5, PAGES - 1] {
        assert_eq!(built.memory.m2p_load(start + machine(frame).0 * 8), Some(frame));
    }
    assert_eq!(built.memory.m2p_load(start), None);
    assert_eq!(built.memory.m2p_load(start + built.shared_info.0 * 8), Some(u64::MAX - 1));
    const { assert!(MACHINE_TO_PHYSICAL < 1 << 47) };
}

proptest! {
    #[test]
    fn no_file_breaks_the_builder(
        changes in proptest::collection::vec((0..0x2000usize, any::<u8>()), 0..12),
        cut in 0..0x3000usize,
    ) {
        let mut file = Image::new().file();
        for (at, byte) in changes {
            // Mostly headers and notes.
            let at = if at < 0x400 { at } else { (64 + 2 * 56 + 0x1800 + at) % file.len() };
            file[at] = byte;
        }
        file.truncate(cut.max(0x100));
        if let Ok(built) = build(&config(&file)) {
            prop_assert_eq!(built.memory.kind(built.root).map(|(kind, _)| kind), Some(Kind::L4));
            prop_assert!(bytes(&built, built.registers.rsi, 4) == b"xen-");
        }
    }
}

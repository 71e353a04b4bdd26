//! Kernels put into memory, and what is refused.

use std::io::Write as _;

use super::*;
use crate::kvm::layout::numbering;

fn ram(mib: u64) -> Ram {
    Ram::with_numbering(mib * 256, numbering(), 0).unwrap()
}

fn file(bytes: &[u8]) -> tempfile::NamedTempFile {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(bytes).unwrap();
    file
}

/// An ELF file with one segment at 2 MiB, and a PVH note if there is to be one.
fn elf(note: bool) -> Vec<u8> {
    let mut bytes = vec![0; 0x1100];
    let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
    put(0, b"\x7fELF\x02\x01\x01");
    put(16, &[2, 0, 62, 0, 1, 0, 0, 0]);
    put(24, &0x20_0010u64.to_le_bytes());
    put(32, &64u64.to_le_bytes());
    put(52, &[64, 0, 56, 0, 2, 0]);
    put(64, &[1, 0, 0, 0, 5, 0, 0, 0]);
    for (at, value) in [(8, 0x1000u64), (16, 0x20_0000), (24, 0x20_0000), (32, 4), (40, 4096)] {
        put(64 + at, &value.to_le_bytes());
    }
    put(120, &[4, 0, 0, 0, 4, 0, 0, 0]);
    let length = if note { 20u64 } else { 0 };
    for (at, value) in [(8, 0x800u64), (32, length), (40, length), (48, 4)] {
        put(120 + at, &value.to_le_bytes());
    }
    put(0x800, &[4, 0, 0, 0, 4, 0, 0, 0, 18, 0, 0, 0]);
    put(0x80c, b"Xen\0");
    put(0x810, &0x20_0020u32.to_le_bytes());
    put(0x1000, b"code");
    bytes
}

fn read(ram: &Ram, at: u64, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    view(ram).unwrap().read_slice(&mut bytes, GuestAddress(at)).unwrap();
    bytes
}

#[test]
fn a_kernel_with_a_pvh_note_is_entered_by_it_and_told_everything() {
    let (ram, kernel, module) = (ram(64), file(&elf(true)), file(b"070701"));
    let mut boot = Boot {
        kernel: kernel.path(),
        module: Some(module.path()),
        command_line: "console=ttyS0",
        door: Door::Any,
        memory: 64 << 20,
        acpi: b"RSD PTR ",
        reserved: 0..0,
        xen: false,
    };
    let entry = load(&ram, &boot).unwrap();
    assert_eq!(entry, Entry::Pvh { rip: 0x20_0020, start_info: layout::START_INFO });
    assert_eq!(read(&ram, 0x20_0000, 4), b"code");
    let info = read(&ram, layout::START_INFO, 56);
    assert_eq!(info[..4], PVH_MAGIC.to_le_bytes());
    assert_eq!(info[12], 1, "one module");
    let module = read(&ram, layout::MODULES, 16);
    let start = u64::from_le_bytes(module[..8].try_into().unwrap());
    assert_eq!(read(&ram, start, 6), b"070701");
    assert_eq!(read(&ram, layout::COMMAND_LINE, 14), b"console=ttyS0\0");
    assert_eq!(read(&ram, layout::ACPI, 8), b"RSD PTR ");

    boot.door = Door::Linux;
    let entry = load(&ram, &boot).unwrap();
    assert_eq!(entry, Entry::Linux { rip: 0x20_0010, boot_params: layout::ZERO_PAGE });
    assert_eq!(read(&ram, layout::ZERO_PAGE + 0x202, 4), b"HdrS");
    let map = read(&ram, layout::ZERO_PAGE + 0x1e8, 1);
    assert_eq!(map, [3]);
}

#[test]
fn what_cannot_be_loaded_is_refused_with_a_reason() {
    let (small, note, none) = (ram(4), file(&elf(true)), file(&elf(false)));
    let boot = Boot {
        kernel: none.path(),
        module: None,
        command_line: "",
        door: Door::Pvh,
        memory: 4 << 20,
        acpi: &[],
        reserved: 0..0,
        xen: false,
    };
    let says = |boot: &Boot<'_>| load(&small, boot).unwrap_err().to_string();
    assert!(says(&boot).contains("PVH note"));
    let text =
        file(b"no kernel at all, but long enough to have a header, which is at 497 and is short");
    assert!(says(&Boot { kernel: text.path(), ..boot.clone() }).contains("not a kernel"));
    let big = file(&vec![0; 3 << 20]);
    let boot = Boot { kernel: note.path(), module: Some(big.path()), ..boot.clone() };
    assert!(says(&boot).contains("initial RAM disk"));
    let long = "x".repeat(1 << 20);
    assert!(
        says(&Boot { module: None, command_line: &long, ..boot.clone() }).contains("command line")
    );
    let truncated = file(&elf(true)[..0x1002]);
    assert!(
        says(&Boot { kernel: truncated.path(), module: None, ..boot.clone() })
            .contains("not a kernel")
    );
    let missing = Path::new("/nonexistent/kernel");
    assert!(says(&Boot { kernel: missing, module: None, ..boot.clone() }).contains("No such file"));
}

#[test]
fn calls_of_xen_by_the_processors_instruction_are_redirected_and_nothing_else() {
    let mut code = vec![0x90; 0x200];
    let mut put = |at: usize, bytes: &[u8]| code[at..at + bytes.len()].copy_from_slice(bytes);
    put(0x40, &[0x0f, 0x01, 0xd9, 0xe9, 1, 2, 3, 4]);
    put(0x50, &[0x0f, 0x01, 0xc1, 0xc3]);
    // Not a pair, not aligned, not followed by a return.
    put(0x80, &[0x0f, 0x01, 0xd9, 0xc3]);
    put(0xa8, &[0x0f, 0x01, 0xd9, 0xc3]);
    put(0xb8, &[0x0f, 0x01, 0xc1, 0xc3]);
    put(0x100, &[0x0f, 0x01, 0xd9, 0x48]);
    put(0x110, &[0x0f, 0x01, 0xc1, 0xc3]);
    let ram = ram(4);
    let memory = view(&ram).unwrap();
    let start = layout::HIGH + (1 << 16) - 0x50;
    memory.write_slice(&code, GuestAddress(start)).unwrap();
    redirect_hypercalls(&memory, start + 0x200).unwrap();
    let mut expected = code.clone();
    expected[0x40..0x43].copy_from_slice(&[0xe7, 0xe8, 0x90]);
    expected[0x50..0x53].copy_from_slice(&[0xe7, 0xe8, 0x90]);
    assert!(read(&ram, start, 0x200) == expected);
}

//! The rules against images that are made here, one property each.

use janus_proto::abi::xen::elfnote::ElfNote;

use super::image::{Image, Kind};
use super::{Verdict, predict};

/// An ELF file as a test describes it.
#[derive(Clone, Debug)]
struct Made {
    bits: u8,
    machine: u16,
    entry: u64,
    physical: u64,
    notes: Vec<(ElfNote, Vec<u8>)>,
    note_alignment: u64,
    later_notes: bool,
    multiboot: Option<(u32, Option<[u32; 5]>)>,
    multiboot2: bool,
}

impl Default for Made {
    fn default() -> Self {
        Self {
            bits: 64,
            machine: 62,
            entry: 0x20_1000,
            physical: 0x20_0000,
            notes: Vec::new(),
            note_alignment: 4,
            later_notes: false,
            multiboot: None,
            multiboot2: false,
        }
    }
}

const SEGMENT: usize = 0x1000;
const LENGTH: usize = 0x2000;

fn note(owner: &[u8; 4], kind: u32, value: &[u8]) -> Vec<u8> {
    let mut note = Vec::new();
    for word in [4, u32::try_from(value.len()).unwrap(), kind] {
        note.extend(word.to_le_bytes());
    }
    note.extend(owner);
    note.extend(value);
    note.resize(note.len().next_multiple_of(4), 0);
    note
}

impl Made {
    fn pv() -> Self {
        Self {
            notes: vec![
                (ElfNote::XEN_VERSION, b"xen-3.0\0".to_vec()),
                (ElfNote::LOADER, b"generic\0".to_vec()),
                (ElfNote::VIRT_BASE, 0u64.to_le_bytes().to_vec()),
                (ElfNote::ENTRY, 0x20_1000u64.to_le_bytes().to_vec()),
            ],
            ..Self::default()
        }
    }
    fn pvh() -> Self {
        let entry = 0x20_1000u32.to_le_bytes().to_vec();
        Self { notes: vec![(ElfNote::PHYS32_ENTRY, entry)], ..Self::default() }
    }
    /// The file: header, program headers, notes, then one segment at `SEGMENT`.
    fn file(&self) -> Vec<u8> {
        let mut file = vec![0; SEGMENT + LENGTH];
        let wide = self.bits == 64;
        let notes: Vec<u8> =
            self.notes.iter().flat_map(|(kind, value)| note(b"Xen\0", kind.0, value)).collect();
        let other = note(b"GNU\0", 5, &[0; 16]);
        let (notes_at, other_at) = (0x400, 0x800);
        file[notes_at..notes_at + notes.len()].copy_from_slice(&notes);
        file[other_at..other_at + other.len()].copy_from_slice(&other);
        let mut segments = vec![(1u32, SEGMENT, self.physical, LENGTH, 0x1000)];
        if !self.notes.is_empty() {
            segments.push((4, notes_at, 0, notes.len(), self.note_alignment));
        }
        if self.later_notes {
            segments.push((4, other_at, 0, other.len(), 4));
        }
        let mut put = |at: usize, bytes: &[u8]| file[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &[0x7f, b'E', b'L', b'F', if wide { 2 } else { 1 }, 1, 1]);
        put(16, &2u16.to_le_bytes());
        put(18, &self.machine.to_le_bytes());
        put(20, &1u32.to_le_bytes());
        let count = u16::try_from(segments.len()).unwrap();
        let short = |value: u64| u32::try_from(value).unwrap().to_le_bytes();
        if wide {
            put(24, &self.entry.to_le_bytes());
            put(32, &64u64.to_le_bytes());
            put(52, &64u16.to_le_bytes());
            put(54, &56u16.to_le_bytes());
            put(56, &count.to_le_bytes());
        } else {
            put(24, &short(self.entry));
            put(28, &short(52));
            put(40, &52u16.to_le_bytes());
            put(42, &32u16.to_le_bytes());
            put(44, &count.to_le_bytes());
        }
        for (index, (kind, offset, physical, length, alignment)) in segments.into_iter().enumerate()
        {
            let (offset, length) = (offset as u64, length as u64);
            if wide {
                let at = 64 + index * 56;
                put(at, &kind.to_le_bytes());
                put(at + 4, &7u32.to_le_bytes());
                for (place, value) in
                    [offset, physical, physical, length, length, alignment].into_iter().enumerate()
                {
                    put(at + 8 + place * 8, &value.to_le_bytes());
                }
            } else {
                let at = 52 + index * 32;
                put(at, &kind.to_le_bytes());
                for (place, value) in [offset, physical, physical, length, length, 7, alignment]
                    .into_iter()
                    .enumerate()
                {
                    put(at + 4 + place * 4, &short(value));
                }
            }
        }
        if let Some((flags, addresses)) = self.multiboot {
            let magic = 0x1bad_b002u32;
            let sum = 0u32.wrapping_sub(magic).wrapping_sub(flags);
            let words = [magic, flags, sum].into_iter().chain(addresses.into_iter().flatten());
            for (index, word) in words.enumerate() {
                put(SEGMENT + index * 4, &word.to_le_bytes());
            }
        }
        if self.multiboot2 {
            let magic = 0xe852_50d6u32;
            let length = 24u32;
            let sum = 0u32.wrapping_sub(magic).wrapping_sub(length);
            for (index, word) in [magic, 0, length, sum, 0, 8].into_iter().enumerate() {
                put(SEGMENT + 0x100 + index * 4, &word.to_le_bytes());
            }
        }
        file
    }
}

/// The verdict of the loader whose name starts so.
fn verdict(file: &[u8], loader: &str) -> Verdict {
    let predictions = predict(&Image::read(file), file);
    let found =
        predictions.iter().find(|prediction| prediction.loader.starts_with(loader)).unwrap();
    assert!(!found.why.is_empty() && !found.rule.is_empty());
    found.verdict
}

/// Checks the verdicts on one file.
fn check(what: &str, file: &[u8], expected: &[(&str, Verdict)]) {
    for (loader, expected) in expected {
        assert_eq!(verdict(file, loader), *expected, "{what}: {loader}");
    }
}

#[test]
fn each_door_is_seen_by_the_loaders_that_look_for_it() {
    use Verdict::{No, Perhaps, Yes};
    check(
        "PV notes only",
        &Made::pv().file(),
        &[
            ("Xen, type=pv", Yes),
            ("Xen, type=pvh", No),
            ("janus, monitor", Yes),
            ("QEMU", No),
            ("Firecracker", Perhaps),
            ("Cloud", No),
            ("crosvm", Perhaps),
            ("GRUB, multiboot", No),
        ],
    );
    check(
        "PVH note only",
        &Made::pvh().file(),
        &[
            ("Xen, type=pv", No),
            ("Xen, type=pvh", Yes),
            ("janus, monitor", No),
            ("janus, KVM", Yes),
            ("QEMU", Yes),
            ("Firecracker", Yes),
            ("Cloud", Yes),
        ],
    );
    check(
        "no door at all",
        &Made::default().file(),
        &[("Xen, type=pv", No), ("QEMU", No), ("Cloud", No), ("Firecracker", Perhaps)],
    );
    let multiboot2 = Made { multiboot2: true, ..Made::default() };
    check("multiboot 2", &multiboot2.file(), &[("GRUB, multiboot2", Yes), ("QEMU", No)]);
}

#[test]
fn a_plain_multiboot_header_hides_the_pvh_note_from_qemu() {
    use Verdict::{No, Yes};
    let plain = Made { multiboot: Some((0, None)), ..Made::pvh() };
    check(
        "plain header",
        &plain.file(),
        &[("QEMU", No), ("GRUB, multiboot", Yes), ("Firecracker", Yes)],
    );
    let addresses = [0x20_0000, 0x20_0000, 0x20_2000, 0, 0x20_1000];
    let with_addresses = Made { multiboot: Some((1 << 16, Some(addresses))), ..Made::pvh() };
    check("addresses", &with_addresses.file(), &[("QEMU", Yes), ("crosvm", Yes)]);
    let beyond = [0x20_0000, 0x20_0000, 0x40_0000, 0, 0x20_1000];
    let wrong = Made { multiboot: Some((1 << 16, Some(beyond))), ..Made::pvh() };
    check("addresses beyond the file", &wrong.file(), &[("QEMU", No)]);
    let in_32_bits = Made { bits: 32, machine: 3, multiboot: Some((0, None)), ..Made::pvh() };
    check("32 bits", &in_32_bits.file(), &[("QEMU", Yes), ("GRUB, multiboot", Yes), ("Cloud", No)]);
}

#[test]
fn notes_that_some_loaders_overlook_are_told() {
    use Verdict::{No, Perhaps, Yes};
    let aligned = Made { note_alignment: 8, ..Made::pvh() };
    check("p_align 8", &aligned.file(), &[("QEMU", No), ("Cloud", Yes), ("Xen, type=pvh", Yes)]);
    let later = Made { later_notes: true, ..Made::pvh() };
    check(
        "a later note segment",
        &later.file(),
        &[("QEMU", Yes), ("Cloud", No), ("Firecracker", Perhaps)],
    );
    let low = Made { entry: 0x1000, ..Made::pvh() };
    check("e_entry below 1 MiB", &low.file(), &[("Firecracker", No), ("QEMU", Yes)]);
}

#[test]
fn notes_of_xen_that_make_no_sense_are_refused() {
    use Verdict::No;
    let without = |kind: ElfNote| {
        let mut made = Made::pv();
        made.notes.retain(|(other, _)| *other != kind);
        made
    };
    for kind in [ElfNote::XEN_VERSION, ElfNote::LOADER] {
        check("a note is missing", &without(kind).file(), &[("Xen, type=pv", No)]);
    }
    let mut outside = Made::pv();
    outside.notes.push((ElfNote::ENTRY, 0x90_0000u64.to_le_bytes().to_vec()));
    check("entry outside", &outside.file(), &[("Xen, type=pv", No), ("janus, monitor", No)]);
    let mut upper = Made::pv();
    upper.notes.push((ElfNote::VIRT_BASE, 0xffff_ffff_8000_0000u64.to_le_bytes().to_vec()));
    upper.notes.push((ElfNote::ENTRY, 0xffff_ffff_8020_1000u64.to_le_bytes().to_vec()));
    check("upper half", &upper.file(), &[("Xen, type=pv", Verdict::Yes), ("janus, monitor", No)]);
}

#[test]
fn whatever_the_file_holds_there_is_an_answer() {
    let whole =
        Made { multiboot: Some((1 << 16, Some([0x20_0000; 5]))), multiboot2: true, ..Made::pv() };
    let whole = whole.file();
    for length in (0..whole.len()).step_by(97).chain([whole.len() - 1]) {
        let cut = &whole[..length];
        let predictions = predict(&Image::read(cut), cut);
        // A segment is cut, so nothing that loads by program headers can load it.
        let monitor = predictions.iter().find(|found| found.loader.contains("monitor")).unwrap();
        assert_eq!(monitor.verdict, Verdict::No, "{length} bytes");
    }
    for garbage in [&b""[..], b"\x7fELF", b"\x1f\x8b\x08", &[0xff; 9000]] {
        let _ = predict(&Image::read(garbage), garbage);
    }
    assert_eq!(Image::read(b"\x1f\x8b\x08").kind, Kind::Compressed("gzip"));
}

/// A bzImage around `payload`.
fn bzimage(payload: &[u8]) -> Vec<u8> {
    let mut file = vec![0; 5 * 512];
    let mut put = |at: usize, bytes: &[u8]| file[at..at + bytes.len()].copy_from_slice(bytes);
    put(0x1f1, &[4]);
    put(0x1fe, &[0x55, 0xaa]);
    put(0x202, b"HdrS");
    put(0x206, &0x20fu16.to_le_bytes());
    put(0x211, &[1]);
    put(0x236, &1u16.to_le_bytes());
    put(0x248, &0u32.to_le_bytes());
    put(0x24c, &u32::try_from(payload.len()).unwrap().to_le_bytes());
    file.extend(payload);
    file
}

#[test]
fn xen_reads_the_notes_that_a_bzimage_carries() {
    use Verdict::{No, Perhaps, Yes};
    use std::io::Write as _;
    let elf = Made { notes: [Made::pv().notes, Made::pvh().notes].concat(), ..Made::pv() }.file();
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(&elf).unwrap();
    let mut lz4 = vec![0x02, 0x21, 0x4c, 0x18];
    let chunk = lz4_flex::block::compress(&elf);
    lz4.extend(u32::try_from(chunk.len()).unwrap().to_le_bytes());
    lz4.extend(chunk);
    lz4.extend(u32::try_from(elf.len()).unwrap().to_le_bytes());
    for payload in [elf.clone(), gzip.finish().unwrap(), lz4] {
        let file = bzimage(&payload);
        check(
            "bzImage",
            &file,
            &[
                ("Xen, type=pv", Yes),
                ("Xen, type=pvh", Yes),
                ("QEMU", Yes),
                ("janus, monitor", No),
                ("janus, KVM", Yes),
                ("Firecracker", Perhaps),
                ("Cloud", Yes),
                ("crosvm", Yes),
            ],
        );
        let cut = &file[..file.len() - 40];
        check("a cut bzImage", cut, &[("Xen, type=pv", No)]);
    }
}

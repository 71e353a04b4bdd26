//! Every header of a kernel's file that some loader looks for.

use janus_proto::abi::xen::elfnote::ElfNote;
use object::elf::{self, FileHeader32, FileHeader64, PT_LOAD, PT_NOTE};
use object::read::elf::{FileHeader, ProgramHeader, SectionHeader};
use object::{Endian, Endianness};

use super::payload;

/// Bytes at the file's start in which a multiboot 1 header may lie (multiboot 0.6.96, 3.1).
const MULTIBOOT_SEARCH: usize = 8192;
/// The same for multiboot 2 (multiboot 2.0, 3.1.1).
const MULTIBOOT2_SEARCH: usize = 32768;
const MULTIBOOT_MAGIC: u32 = 0x1bad_b002;
const MULTIBOOT2_MAGIC: u32 = 0xe852_50d6;
/// "HdrS" (Linux, `Documentation/arch/x86/boot.rst`).
const LINUX_MAGIC: u32 = 0x5372_6448;

/// What a file begins as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// An ELF file.
    Elf,
    /// A Linux kernel with its setup code.
    BzImage,
    /// Compressed as a whole, by this program.
    Compressed(&'static str),
    /// None of these.
    Unknown,
}

/// One of Xen's ELF notes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Note {
    /// Its type.
    pub kind: ElfNote,
    /// Its value.
    pub value: Vec<u8>,
}

impl Note {
    /// The value as a number of 4 or 8 bytes.
    #[must_use]
    pub fn number(&self) -> Option<u64> {
        let value = &*self.value;
        value
            .try_into()
            .map(u64::from_le_bytes)
            .or_else(|_| value.try_into().map(|bytes| u64::from(u32::from_le_bytes(bytes))))
            .ok()
    }
    /// The value as text, up to its zero byte.
    #[must_use]
    pub fn text(&self) -> Option<&str> {
        std::str::from_utf8(self.value.split(|byte| *byte == 0).next()?).ok()
    }
}

/// A note segment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NoteSegment {
    /// `p_align`.
    pub alignment: u64,
    /// Xen's notes in it, read with sizes rounded up to 4, as Xen and `linux-loader` do.
    pub xen: Vec<Note>,
    /// The same, read with sizes rounded up to `p_align`, as QEMU does.
    pub xen_by_alignment: Vec<Note>,
}

/// A segment that is loaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Load {
    /// Physical address.
    pub physical: u64,
    /// Bytes in memory.
    pub size: u64,
}

/// An ELF file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Elf {
    /// 32 or 64.
    pub bits: u8,
    /// `e_machine`.
    pub machine: u16,
    /// `e_flags`.
    pub flags: u32,
    /// `e_entry`.
    pub entry: u64,
    /// What is loaded.
    pub loads: Vec<Load>,
    /// Its note segments, in their order.
    pub notes: Vec<NoteSegment>,
    /// Xen's notes in note sections, for loaders that look there if no segment has any.
    pub section_notes: Vec<Note>,
    /// It has the old section `__xen_guest`.
    pub has_xen_guest: bool,
    /// What of it is not in the file.
    pub missing: Option<&'static str>,
}

impl Elf {
    /// Xen's notes as Xen looks for them: all note segments, or else note sections.
    #[must_use]
    pub fn xen_notes(&self) -> Vec<&Note> {
        let in_segments: Vec<&Note> = self.notes.iter().flat_map(|segment| &segment.xen).collect();
        if in_segments.is_empty() { self.section_notes.iter().collect() } else { in_segments }
    }
    /// The value of one of them.
    #[must_use]
    pub fn xen_note(&self, kind: ElfNote) -> Option<&Note> {
        self.xen_notes().into_iter().rfind(|note| note.kind == kind)
    }
    /// First physical address, and the one behind the last.
    #[must_use]
    pub fn span(&self) -> Option<(u64, u64)> {
        let start = self.loads.iter().map(|load| load.physical).min()?;
        let end = self.loads.iter().map(|load| load.physical.saturating_add(load.size)).max()?;
        Some((start, end))
    }
}

/// A multiboot 1 header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Multiboot {
    /// Where in the file.
    pub offset: usize,
    /// Its flags.
    pub flags: u32,
    /// `header_addr`, `load_addr`, `load_end_addr`, `bss_end_addr`, `entry_addr`, if flag 16 is set.
    pub addresses: Option<[u32; 5]>,
}

/// The header of a Linux kernel (`struct setup_header`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Linux {
    /// The protocol's version: 0x20f is 2.15.
    pub version: u16,
    /// `XLF_KERNEL_64`: it has a 64-bit entry.
    pub has_64_bit_entry: bool,
    /// `LOADED_HIGH`: it is loaded at 1 MiB.
    pub is_loaded_high: bool,
    /// All of its setup code is in the file.
    pub is_whole: bool,
}

/// A kernel's file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Image {
    /// Its size in bytes.
    pub size: usize,
    /// What it begins as.
    pub kind: Kind,
    /// The file itself as an ELF file.
    pub elf: Option<Elf>,
    /// Its multiboot 1 header.
    pub multiboot: Option<Multiboot>,
    /// Where its multiboot 2 header is.
    pub multiboot2: Option<usize>,
    /// Its Linux header.
    pub linux: Option<Linux>,
    /// The ELF file that a bzImage carries, or why it cannot be seen.
    pub payload: Option<Result<Elf, String>>,
}

fn u16_at(file: &[u8], at: usize) -> Option<u16> {
    file.get(at..at + 2)?.try_into().map(u16::from_le_bytes).ok()
}

pub(super) fn u32_at(file: &[u8], at: usize) -> Option<u32> {
    file.get(at..at + 4)?.try_into().map(u32::from_le_bytes).ok()
}

impl Image {
    /// Reads the headers of a file; whatever it holds, there is an answer.
    #[must_use]
    pub fn read(file: &[u8]) -> Self {
        let linux = linux(file);
        let elf = read_elf(file);
        let kind = if elf.is_some() {
            Kind::Elf
        } else if linux.is_some() {
            Kind::BzImage
        } else {
            payload::format(file).map_or(Kind::Unknown, Kind::Compressed)
        };
        let payload = linux.is_some().then(|| {
            let unpacked = payload::unpack(file)?;
            read_elf(&unpacked).ok_or_else(|| "what it carries is no ELF file".to_owned())
        });
        Self {
            size: file.len(),
            kind,
            elf,
            multiboot: multiboot(file),
            multiboot2: multiboot2(file),
            linux,
            payload,
        }
    }

    /// The ELF file that Xen's toolstack ends up with.
    #[must_use]
    pub fn innermost_elf(&self) -> Option<&Elf> {
        self.elf.as_ref().or_else(|| self.payload.as_ref()?.as_ref().ok())
    }
}

fn multiboot(file: &[u8]) -> Option<Multiboot> {
    let searched = file.get(..MULTIBOOT_SEARCH).unwrap_or(file);
    (0..searched.len()).step_by(4).find_map(|offset| {
        let word = |index: usize| u32_at(file, offset + index * 4);
        if word(0)? != MULTIBOOT_MAGIC || offset + 12 > MULTIBOOT_SEARCH {
            return None;
        }
        let (flags, sum) = (word(1)?, word(2)?);
        if MULTIBOOT_MAGIC.wrapping_add(flags).wrapping_add(sum) != 0 {
            return None;
        }
        let addresses = if flags & 1 << 16 == 0 {
            None
        } else {
            Some([word(3)?, word(4)?, word(5)?, word(6)?, word(7)?])
        };
        Some(Multiboot { offset, flags, addresses })
    })
}

fn multiboot2(file: &[u8]) -> Option<usize> {
    let searched = file.get(..MULTIBOOT2_SEARCH).unwrap_or(file);
    (0..searched.len()).step_by(8).find(|offset| {
        let word = |index: usize| u32_at(searched, offset + index * 4);
        let words = [word(0), word(1), word(2), word(3)];
        let [Some(magic), Some(architecture), Some(length), Some(sum)] = words else {
            return false;
        };
        // Architecture 0: 32-bit protected mode of i386.
        magic == MULTIBOOT2_MAGIC
            && architecture == 0
            && magic.wrapping_add(architecture).wrapping_add(length).wrapping_add(sum) == 0
    })
}

fn linux(file: &[u8]) -> Option<Linux> {
    if u32_at(file, 0x202)? != LINUX_MAGIC {
        return None;
    }
    let version = u16_at(file, 0x206)?;
    let extended_flags = if version >= 0x20c { u16_at(file, 0x236).unwrap_or(0) } else { 0 };
    Some(Linux {
        version,
        has_64_bit_entry: extended_flags & 1 != 0,
        is_loaded_high: file.get(0x211)? & 1 != 0,
        is_whole: payload::setup_size(file)? <= file.len(),
    })
}

fn read_elf(file: &[u8]) -> Option<Elf> {
    if !file.starts_with(&elf::ELFMAG) {
        return None;
    }
    Some(match file.get(4).copied() {
        Some(class) if class == elf::ELFCLASS32.0 => {
            read_class::<FileHeader32<Endianness>>(file, 32)
        }
        _ => read_class::<FileHeader64<Endianness>>(file, 64),
    })
}

fn read_class<H: FileHeader<Endian = Endianness>>(file: &[u8], bits: u8) -> Elf {
    let mut found = Elf {
        bits,
        machine: 0,
        flags: 0,
        entry: 0,
        loads: Vec::new(),
        notes: Vec::new(),
        section_notes: Vec::new(),
        has_xen_guest: false,
        missing: Some("the ELF header"),
    };
    let Ok(header) = H::parse(file) else { return found };
    let Ok(endian) = header.endian() else { return found };
    if endian.is_big_endian() {
        found.missing = Some("little-endian data (EI_DATA)");
        return found;
    }
    found.machine = header.e_machine(endian).0;
    found.flags = header.e_flags(endian).0;
    found.entry = header.e_entry(endian).into();
    found.missing = Some("the program header table");
    let Ok(programs) = header.program_headers(endian, file) else { return found };
    found.missing = None;
    for program in programs {
        match program.p_type(endian) {
            PT_LOAD => {
                let size = program.p_memsz(endian).into();
                if program.data(endian, file).is_err() {
                    found.missing = Some("a PT_LOAD segment");
                }
                if size > 0 {
                    found.loads.push(Load { physical: program.p_paddr(endian).into(), size });
                }
            }
            PT_NOTE => {
                let Ok(data) = program.data(endian, file) else {
                    found.missing = Some("a PT_NOTE segment");
                    continue;
                };
                let alignment = program.p_align(endian).into();
                found.notes.push(NoteSegment {
                    alignment,
                    xen: xen_notes(data, 4),
                    xen_by_alignment: xen_notes(data, alignment),
                });
            }
            _ => {}
        }
    }
    if let Ok(sections) = header.sections(endian, file) {
        for section in sections.iter() {
            if section.sh_type(endian) == elf::SHT_NOTE
                && let Ok(data) = section.data(endian, file)
            {
                found.section_notes.extend(xen_notes(data, 4));
            }
            found.has_xen_guest |=
                sections.section_name(endian, section).is_ok_and(|name| name == b"__xen_guest");
        }
    }
    found
}

/// Xen's notes in `data`, with the sizes of a note's fields rounded up to `alignment`.
fn xen_notes(data: &[u8], alignment: u64) -> Vec<Note> {
    const HEADER: usize = 12;
    let alignment = usize::try_from(alignment).unwrap_or(4).clamp(1, 4096);
    let aligned = |size: usize| size.checked_next_multiple_of(alignment);
    let mut notes = Vec::new();
    let mut at = 0;
    let mut next = || {
        let word = |index: usize| u32_at(data, at + index * 4);
        let (name_size, value_size, kind) = (word(0)? as usize, word(1)? as usize, word(2)?);
        let name = data.get(at + HEADER..(at + HEADER).checked_add(name_size)?)?;
        // The sizes are rounded up, not the places: with 8, no field of QEMU's is where a linker would put it.
        let value_at = (at + HEADER).checked_add(aligned(name_size)?)?;
        let value = data.get(value_at..value_at.checked_add(value_size)?)?;
        at = value_at.checked_add(aligned(value_size)?)?;
        Some((name, kind, value))
    };
    while let Some((name, kind, value)) = next() {
        if name == b"Xen\0" {
            notes.push(Note { kind: ElfNote(kind), value: value.to_vec() });
        }
    }
    notes
}

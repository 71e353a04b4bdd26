//! The kernel's file: an ELF executable for x86-64.

use object::elf::{self, EM_X86_64, ET_DYN, ET_EXEC, FileHeader64, PT_LOAD, PT_NOTE};
use object::read::elf::{FileHeader, ProgramHeader, SectionHeader};
use object::{Endian, Endianness};

use super::error::Cause;
use super::notes::{self, Notes};

/// What gzip files begin with.
const GZIP: &[u8] = &[0x1f, 0x8b];
/// The old way to say what notes say: text in a section of this name.
const LEGACY: &[u8] = b"__xen_guest";

/// Contents of the file, and the guest's virtual address of their first byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment<'a> {
    /// Where.
    pub address: u64,
    /// What; the rest of the segment's memory is zero.
    pub data: &'a [u8],
}

/// A kernel, checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kernel<'a> {
    /// What its notes say.
    pub notes: Notes,
    /// What is to be loaded.
    pub segments: Vec<Segment<'a>>,
    /// The first virtual address of the image.
    pub start: u64,
    /// Behind its last.
    pub end: u64,
    /// Where it is entered.
    pub entry: u64,
}

impl<'a> Kernel<'a> {
    /// Reads and checks a file.
    ///
    /// # Errors
    /// See [`Cause`].
    pub fn parse(file: &'a [u8]) -> Result<Self, Cause> {
        if file.starts_with(GZIP) {
            return Err(Cause::Compressed);
        }
        if !file.starts_with(&elf::ELFMAG) {
            return Err(Cause::NotElf);
        }
        match file.get(4) {
            Some(&class) if class == elf::ELFCLASS64.0 => {}
            Some(class) => return Err(Cause::Machine("EI_CLASS", u64::from(*class))),
            None => return Err(Cause::Truncated("the ELF header")),
        }
        let truncated = |_| Cause::Truncated("the ELF header");
        let header = FileHeader64::<Endianness>::parse(file).map_err(truncated)?;
        let endian = header.endian().map_err(|_| Cause::Machine("EI_DATA", 0))?;
        if endian.is_big_endian() {
            return Err(Cause::Machine("EI_DATA", 2));
        }
        if header.e_machine(endian) != EM_X86_64 {
            return Err(Cause::Machine("e_machine", u64::from(header.e_machine(endian).0)));
        }
        if !matches!(header.e_type(endian), ET_EXEC | ET_DYN) {
            return Err(Cause::Machine("e_type", u64::from(header.e_type(endian).0)));
        }
        let programs = header
            .program_headers(endian, file)
            .map_err(|_| Cause::Truncated("the program header table"))?;
        let notes = find_notes(header, endian, file, programs)?;
        let mut kernel = Self { notes, segments: Vec::new(), start: u64::MAX, end: 0, entry: 0 };
        let mut taken: Vec<(u64, u64)> = Vec::new();
        for program in programs.iter().filter(|program| program.p_type(endian) == PT_LOAD) {
            let size = program.p_memsz(endian);
            if size == 0 {
                continue;
            }
            let data =
                program.data(endian, file).map_err(|()| Cause::Truncated("a PT_LOAD segment"))?;
            if data.len() as u64 > size {
                return Err(Cause::Image("p_filesz"));
            }
            // From physical address to virtual: what the notes say, modulo 2^64.
            let address = program
                .p_paddr(endian)
                .wrapping_sub(notes.paddr_offset)
                .wrapping_add(notes.virt_base);
            let end = address.checked_add(size).ok_or(Cause::Image("p_memsz"))?;
            let clash =
                taken.iter().find(|(other, other_end)| address < *other_end && *other < end);
            if let Some((other, _)) = clash {
                return Err(Cause::Overlap(address.max(*other)));
            }
            taken.push((address, end));
            kernel.start = kernel.start.min(address);
            kernel.end = kernel.end.max(end);
            kernel.segments.push(Segment { address, data });
        }
        if kernel.segments.is_empty() {
            return Err(Cause::NoSegments);
        }
        kernel.entry = notes.entry.unwrap_or(header.e_entry(endian));
        kernel.check()?;
        Ok(kernel)
    }

    fn check(&self) -> Result<(), Cause> {
        let image = self.start..self.end;
        if self.notes.virt_base > self.start {
            return Err(Cause::Image("VIRT_BASE"));
        }
        if !image.contains(&self.entry) {
            return Err(Cause::Image("ENTRY"));
        }
        let inside = |page: u64| {
            page >= self.start && page.checked_add(4096).is_some_and(|end| end <= self.end)
        };
        let in_image = |page: u64| page.is_multiple_of(4096) && inside(page);
        if self.notes.hypercall_page.is_some_and(|page| !in_image(page)) {
            return Err(Cause::Image("HYPERCALL_PAGE"));
        }
        let outside = |base: u64| base.is_multiple_of(4096) && !image.contains(&base);
        if self.notes.p2m_base.is_some_and(|base| !outside(base)) {
            return Err(Cause::Image("INIT_P2M"));
        }
        Ok(())
    }
}

/// Xen's notes: in note segments, in note sections, or as text in the old section; the first kind that is there.
fn find_notes(
    header: &FileHeader64<Endianness>,
    endian: Endianness,
    file: &[u8],
    programs: &[elf::ProgramHeader64<Endianness>],
) -> Result<Notes, Cause> {
    for program in programs.iter().filter(|program| program.p_type(endian) == PT_NOTE) {
        let data =
            program.data(endian, file).map_err(|()| Cause::Truncated("a PT_NOTE segment"))?;
        if let Some(notes) = notes::parse(data, program.p_align(endian))? {
            return notes.checked();
        }
    }
    // Without section headers (or with nonsense there), there is nothing more to find.
    let Ok(sections) = header.sections(endian, file) else { return Err(Cause::NoNotes) };
    for section in sections.iter().filter(|section| section.sh_type(endian) == elf::SHT_NOTE) {
        let data = section.data(endian, file).map_err(|_| Cause::Truncated("a note section"))?;
        if let Some(notes) = notes::parse(data, section.sh_addralign(endian))? {
            return notes.checked();
        }
    }
    for section in sections.iter() {
        if sections.section_name(endian, section).is_ok_and(|name| name == LEGACY) {
            let data = section
                .data(endian, file)
                .map_err(|_| Cause::Truncated("the section __xen_guest"))?;
            return notes::parse_legacy(data)?.checked();
        }
    }
    Err(Cause::NoNotes)
}

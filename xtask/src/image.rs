//! The image that is booted: the linked ELF without its debug sections, checked against what loaders ask for.
//!
//! `xl` and GRUB read the whole file, and DWARF is nine tenths of it; the linked file keeps it for the host's tools.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use object::elf::{
    FileHeader64, PT_LOAD, SHF_ALLOC, SHT_NOBITS, SHT_STRTAB, SHT_SYMTAB, SectionHeader64,
    SymbolSection,
};
use object::read::elf::{FileHeader as _, ProgramHeader as _, SectionHeader as _};
use object::{LittleEndian, U16, U32, U64};

type Header = FileHeader64<LittleEndian>;
type Section = SectionHeader64<LittleEndian>;

const LE: LittleEndian = LittleEndian;
/// Where a loader must find the multiboot headers: the first 8 KiB of the file (Multiboot 0.6.96, 3.1).
const MULTIBOOT_SEARCH: usize = 8192;
const MULTIBOOT1_MAGIC: [u8; 4] = 0x1bad_b002_u32.to_le_bytes();
const MULTIBOOT2_MAGIC: [u8; 4] = 0xe852_50d6_u32.to_le_bytes();

/// Writes the bootable image of the linked file `elf` beside it, and answers its path.
///
/// # Errors
/// The file is not an image that every loader takes, or cannot be written.
pub(crate) fn finish(elf: &Path) -> Result<PathBuf> {
    let linked = fs::read(elf).with_context(|| format!("cannot read {}", elf.display()))?;
    let image = strip(&linked)?;
    check(&image)?;
    let path = elf.with_extension("elf");
    if fs::read(&path).ok().as_ref() != Some(&image) {
        fs::write(&path, &image).with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(path)
}

/// Everything that is loaded, the symbol table, and headers for those.
fn strip(linked: &[u8]) -> Result<Vec<u8>> {
    let header = Header::parse(linked).context("not an ELF64 file")?;
    let sections = header.section_headers(LE, linked)?;
    let name_of = header.section_strings_index(LE, linked)?;

    let is_kept = |(index, section): (usize, &Section)| {
        section.sh_flags(LE).contains(SHF_ALLOC)
            || section.sh_type(LE) == SHT_SYMTAB
            || section.sh_type(LE) == SHT_STRTAB
            || index == 0
    };
    let kept: Vec<usize> =
        sections.iter().enumerate().filter(|&pair| is_kept(pair)).map(|(index, _)| index).collect();
    let is_alloc =
        |index: usize| sections.get(index).is_some_and(|s| s.sh_flags(LE).contains(SHF_ALLOC));
    // Symbols name their sections by index, so those must not move.
    let in_place = kept.iter().enumerate().all(|(new, &old)| new == old || !is_alloc(old));
    ensure!(in_place, "a section that is loaded lies behind one that is not");
    let new_index = |old: usize| kept.iter().position(|&index| index == old);

    // What is loaded keeps its place in the file.
    let loaded_end = |section: &Section| match section.sh_type(LE) {
        SHT_NOBITS => 0,
        _ => section.sh_offset(LE) + section.sh_size(LE),
    };
    let end = kept
        .iter()
        .filter(|&&i| is_alloc(i))
        .filter_map(|&i| sections.get(i))
        .map(loaded_end)
        .max();
    let end = usize::try_from(end.context("nothing is loaded")?)?;
    let mut image = linked.get(..end).context("the file ends early")?.to_vec();

    let mut headers = Vec::new();
    for &index in &kept {
        let mut section = *sections.get(index).context("a section is missing")?;
        if index != 0 && !is_alloc(index) {
            let data = section.data(LE, linked)?;
            image.resize(image.len().next_multiple_of(8), 0);
            section.sh_offset = U64::new(LE, image.len() as u64);
            image.extend_from_slice(data);
        }
        if section.sh_type(LE) == SHT_SYMTAB {
            let link = usize::try_from(section.sh_link(LE))?;
            let link = new_index(link).context("the symbols have lost their names")?;
            section.sh_link = U32::new(LE, u32::try_from(link)?);
        }
        headers.push(section);
    }
    image.resize(image.len().next_multiple_of(8), 0);
    let table_at = image.len() as u64;
    image.extend_from_slice(object::pod::bytes_of_slice(&headers));

    let mut header = *header;
    header.e_shoff = U64::new(LE, table_at);
    header.e_shnum = U16::new(LE, u16::try_from(headers.len())?);
    let names = new_index(name_of.0).context("the section names are lost")?;
    header.e_shstrndx = U16::new(LE, SymbolSection(u16::try_from(names)?));
    let bytes = object::pod::bytes_of(&header);
    image.get_mut(..bytes.len()).context("no room for the header")?.copy_from_slice(bytes);
    Ok(image)
}

/// Checks what the linker script promises and loaders rely on.
fn check(image: &[u8]) -> Result<()> {
    let header = Header::parse(image).context("not an ELF64 file")?;
    let mut step = None;
    for segment in header.program_headers(LE, image)? {
        if segment.p_type(LE) != PT_LOAD {
            continue;
        }
        let (offset, address) = (segment.p_offset(LE), segment.p_paddr(LE));
        ensure!(
            segment.p_vaddr(LE) == address,
            "the segment at {address:#x} is not identity-mapped"
        );
        ensure!(address % 4096 == 0, "the segment at {address:#x} is not page-aligned");
        let distance = address.wrapping_sub(offset);
        // Multiboot's address form loads one piece of the file.
        ensure!(
            *step.get_or_insert(distance) == distance,
            "the segment at {address:#x} is out of step in the file"
        );
    }
    ensure!(step.is_some(), "no segment is loaded");
    let head = image.get(..MULTIBOOT_SEARCH.min(image.len())).unwrap_or_default();
    for (version, magic) in [(1, MULTIBOOT1_MAGIC), (2, MULTIBOOT2_MAGIC)] {
        if !head.chunks_exact(4).any(|word| word == magic) {
            bail!("no multiboot {version} header in the first {MULTIBOOT_SEARCH} bytes");
        }
    }
    for kind in [1_u32, 18] {
        ensure!(has_xen_note(image, kind)?, "no Xen note of type {kind}");
    }
    Ok(())
}

/// Whether the program headers lead to a note of Xen's of this type (`elfnote.h`).
fn has_xen_note(image: &[u8], kind: u32) -> Result<bool> {
    let header = Header::parse(image)?;
    for segment in header.program_headers(LE, image)? {
        let Some(mut notes) = segment.notes(LE, image)? else { continue };
        while let Some(note) = notes.next()? {
            if note.name() == b"Xen" && note.n_type(LE).0 == kind {
                return Ok(true);
            }
        }
    }
    Ok(false)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_image_is_refused() {
        assert!(strip(b"not an ELF").is_err());
        // A host program: an ELF64, but linked elsewhere and without any door.
        let own = fs::read(std::env::current_exe().unwrap()).unwrap();
        let stripped = strip(&own).unwrap();
        assert!(stripped.len() < own.len());
        assert!(check(&stripped).is_err());
    }

    #[test]
    fn a_stripped_program_keeps_its_symbols_and_segments() {
        use object::{Object as _, ObjectSymbol as _};
        let own = fs::read(std::env::current_exe().unwrap()).unwrap();
        let stripped = strip(&own).unwrap();
        let (before, after) =
            (object::File::parse(&*own).unwrap(), object::File::parse(&*stripped).unwrap());
        let symbols = |file: &object::File<'_>| {
            file.symbols()
                .map(|s| (s.address(), s.name().unwrap_or("").to_owned()))
                .collect::<Vec<_>>()
        };
        assert_eq!(symbols(&before), symbols(&after));
        assert!(!symbols(&after).is_empty());
        assert!(after.section_by_name(".debug_info").is_none());
        assert_eq!(before.entry(), after.entry());
    }
}

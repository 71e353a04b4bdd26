//! Puts the symbol table into a linked image, in the section reserved for it.
//!
//! The format and its reader are `janus_boot::symbols`; the kernel's panic handler uses them.

use std::collections::HashMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail};
use janus_boot::symbols::{ENTRIES_OFFSET, MAGIC, MAX_NAME, PAIRS};
use object::{Object, ObjectSection, ObjectSymbol, SymbolKind};

const SECTION: &str = ".janus.symbols";

/// Fills the symbol section of the image at `path`; again and again gives the same bytes.
///
/// # Errors
/// The file is no ELF, or has no such section, or cannot be written.
pub(crate) fn fill(path: &Path) -> Result<()> {
    let mut file = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    let elf = object::File::parse(&*file).context("the image is not an ELF file")?;
    let section = elf.section_by_name(SECTION).with_context(|| format!("no section {SECTION}"))?;
    let (offset, size) = section.file_range().context("the symbol section is not in the file")?;
    let (offset, size) = (usize::try_from(offset)?, usize::try_from(size)?);

    let mut functions: Vec<(u64, String)> = elf
        .symbols()
        .filter(|symbol| symbol.kind() == SymbolKind::Text && symbol.is_definition())
        .filter_map(|symbol| Some((symbol.address(), readable(symbol.name().ok()?))))
        .collect();
    functions.sort();
    functions.dedup_by_key(|(address, _)| *address);

    // The section's size is a guess from the size of the code; cut long names where it is too small.
    let table = [MAX_NAME, 140, 100, 64, 40, 24]
        .into_iter()
        .map(|longest| encode(&functions, longest))
        .find(|table| table.len() <= size);
    let Some(table) = table else {
        bail!("{} functions do not fit into {size} bytes of {SECTION}", functions.len());
    };
    let room = file.get_mut(offset..offset + size).context("the symbol section is cut off")?;
    let (head, tail) = room.split_at_mut(table.len());
    if head == table && tail.iter().all(|&byte| byte == 0) {
        return Ok(());
    }
    head.copy_from_slice(&table);
    tail.fill(0);
    fs::write(path, &file).with_context(|| format!("cannot write {}", path.display()))
}

/// The demangled name without its hash, in ASCII.
fn readable(mangled: &str) -> String {
    let name = format!("{:#}", rustc_demangle::demangle(mangled));
    name.chars().map(|c| if c.is_ascii() && c != '\0' { c } else { '?' }).collect()
}

/// The table of `functions`, sorted by address, with no name longer than `longest` bytes.
#[expect(clippy::indexing_slicing, reason = "lengths and counts of these very slices")]
fn encode(functions: &[(u64, String)], longest: usize) -> Vec<u8> {
    let base = functions.first().map_or(0, |(address, _)| *address);
    // Shared prefixes first, then pairs of codes over what is left.
    let mut previous: &[u8] = &[];
    let mut shared = Vec::with_capacity(functions.len());
    let mut suffixes: Vec<Vec<u8>> = Vec::with_capacity(functions.len());
    for (_, name) in functions {
        let name = &name.as_bytes()[..name.len().min(longest)];
        let same = name.iter().zip(previous).take_while(|(a, b)| a == b).count();
        shared.push(u8::try_from(same).expect("names are shorter than 256 bytes"));
        suffixes.push(name[same..].to_vec());
        previous = name;
    }
    let pairs = compress(&mut suffixes);

    let mut entries = Vec::new();
    let mut at = base;
    for (((address, _), shared), codes) in functions.iter().zip(shared).zip(&suffixes) {
        push_leb128(&mut entries, address - at);
        at = *address;
        entries.push(shared);
        entries.push(u8::try_from(codes.len()).expect("no longer than the name"));
        entries.extend_from_slice(codes);
    }
    let mut table = Vec::with_capacity(ENTRIES_OFFSET + entries.len());
    table.extend_from_slice(&MAGIC.to_le_bytes());
    table.extend_from_slice(&u32::try_from(entries.len()).expect("far below 4 GiB").to_le_bytes());
    table.extend_from_slice(&base.to_le_bytes());
    for pair in &pairs {
        table.extend_from_slice(pair);
    }
    table.extend_from_slice(&entries);
    table
}

/// Replaces the most frequent pair of codes by a new code, until there are no codes left.
#[expect(
    clippy::indexing_slicing,
    reason = "both positions stay below the length, the loop's condition"
)]
fn compress(texts: &mut [Vec<u8>]) -> [[u8; 2]; PAIRS] {
    let mut pairs = [[0; 2]; PAIRS];
    for (index, slot) in pairs.iter_mut().enumerate() {
        let mut counts: HashMap<[u8; 2], usize> = HashMap::new();
        for text in texts.iter() {
            for pair in text.array_windows() {
                *counts.entry(*pair).or_default() += 1;
            }
        }
        // The pair itself decides a tie, so that the same input gives the same image.
        let Some((&pair, _)) = counts.iter().max_by_key(|&(pair, count)| (*count, *pair)) else {
            break;
        };
        *slot = pair;
        let code = u8::try_from(128 + index).expect("128 pairs");
        for text in texts.iter_mut() {
            let mut read = 0;
            let mut write = 0;
            while read < text.len() {
                let matches = text[read..].starts_with(&pair);
                text[write] = if matches { code } else { text[read] };
                read += if matches { 2 } else { 1 };
                write += 1;
            }
            text.truncate(write);
        }
    }
    pairs
}

fn push_leb128(out: &mut Vec<u8>, mut value: u64) {
    loop {
        let low = u8::try_from(value & 0x7f).expect("seven bits");
        value >>= 7;
        if value == 0 {
            out.push(low);
            return;
        }
        out.push(low | 0x80);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use janus_boot::symbols::Table;

    fn functions() -> Vec<(u64, String)> {
        (0..2000u64)
            .map(|i| {
                (0x20_0000 + i * 16 * (1 + i % 40), format!("janus::module{}::f{i}::poll", i / 50))
            })
            .scan(0x20_0000, |at, (step, name)| {
                *at += step % 5000 + 1;
                Some((*at, name))
            })
            .collect()
    }

    #[test]
    fn every_function_is_found_by_every_address_in_it() {
        let functions = functions();
        let bytes = encode(&functions, MAX_NAME);
        let table = Table::new(&bytes).unwrap();
        for pair in functions.windows(2).step_by(37) {
            for address in [pair[0].0, pair[0].0 + 1, pair[1].0 - 1] {
                let (name, offset) = table.lookup(address).unwrap();
                assert_eq!((name.as_str(), offset), (&*pair[0].1, address - pair[0].0));
            }
        }
        assert!(table.lookup(0x10_0000).is_none());
    }

    #[test]
    fn names_are_compressed_well() {
        let functions = functions();
        let raw: usize = functions.iter().map(|(_, name)| name.len()).sum();
        assert!(encode(&functions, MAX_NAME).len() < raw / 2);
    }

    #[test]
    fn a_damaged_table_never_panics() {
        let good = encode(&functions()[..50], MAX_NAME);
        for at in 0..good.len() {
            let mut bad = good.clone();
            bad[at] ^= 0xff;
            if let Some(table) = Table::new(&bad) {
                // What it says does not matter; that it ends does.
                let _ = table.lookup(0x21_0000).map(|(name, _)| name.as_str().len());
            }
            assert!(Table::new(&good[..at]).is_none());
        }
    }
}

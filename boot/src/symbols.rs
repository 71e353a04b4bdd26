//! The image's own symbol table: function names by address, small enough to be carried along.
//!
//! `cargo xtask build` writes it into the section that the linker script reserves
//! (`xtask/src/symbols.rs`); the panic handler looks addresses up. Names are demangled at build
//! time. Layout, little-endian:
//!
//! | offset | bytes | what |
//! |---|---|---|
//! | 0 | 4 | [`MAGIC`] |
//! | 4 | 4 | bytes of entries |
//! | 8 | 8 | address that the first entry's delta counts from |
//! | 16 | 2 x [`PAIRS`] | what the codes from 128 on stand for: two codes each |
//! | 272 | | entries, by rising address |
//!
//! An entry is: address minus the previous entry's (LEB128), bytes of the name shared with the
//! previous name (u8), number of codes (u8), codes. A code below 128 is an ASCII character.

use crate::memory::{read_u32, read_u64};

/// First four bytes of a table that has been filled in.
pub const MAGIC: u32 = u32::from_le_bytes(*b"JSYM");
/// Number of pair codes.
pub const PAIRS: usize = 128;
/// Offset of the pairs.
pub const PAIRS_OFFSET: usize = 16;
/// Offset of the entries.
pub const ENTRIES_OFFSET: usize = PAIRS_OFFSET + 2 * PAIRS;
/// Longest name, in bytes.
pub const MAX_NAME: usize = 200;

/// A table to look things up in.
#[derive(Clone, Copy, Debug)]
pub struct Table<'a> {
    pairs: &'a [u8],
    entries: &'a [u8],
    base: u64,
}

/// A name found, with room for it.
#[derive(Clone, Debug)]
pub struct Name {
    bytes: [u8; MAX_NAME],
    len: usize,
}

impl Name {
    const EMPTY: Self = Self { bytes: [0; MAX_NAME], len: 0 };

    /// The function's name.
    #[must_use]
    pub fn as_str(&self) -> &str {
        let bytes = self.bytes.get(..self.len).unwrap_or_default();
        // Only ASCII is ever pushed.
        core::str::from_utf8(bytes).unwrap_or("?")
    }

    fn push(&mut self, character: u8) {
        if let Some(slot) = self.bytes.get_mut(self.len) {
            *slot = character;
            self.len += 1;
        }
    }
}

impl<'a> Table<'a> {
    /// The table in `bytes`, or `None` if nobody has filled it in.
    #[must_use]
    pub fn new(bytes: &'a [u8]) -> Option<Self> {
        if read_u32(bytes, 0)? != MAGIC {
            return None;
        }
        let len = usize::try_from(read_u32(bytes, 4)?).ok()?;
        Some(Self {
            pairs: bytes.get(PAIRS_OFFSET..ENTRIES_OFFSET)?,
            entries: bytes.get(ENTRIES_OFFSET..ENTRIES_OFFSET.checked_add(len)?)?,
            base: read_u64(bytes, 8)?,
        })
    }

    /// The function that `address` lies in or behind, and how far behind its start.
    #[must_use]
    pub fn lookup(&self, address: u64) -> Option<(Name, u64)> {
        let mut rest = self.entries;
        let mut at = self.base;
        let mut name = Name::EMPTY;
        let mut best = None;
        while !rest.is_empty() {
            at = at.checked_add(take_leb128(&mut rest)?)?;
            if at > address {
                break;
            }
            let shared = usize::from(take(&mut rest)?);
            let codes = usize::from(take(&mut rest)?);
            name.len = shared.min(name.len);
            for &code in rest.get(..codes)? {
                self.expand(code, &mut name, 0);
            }
            rest = rest.get(codes..)?;
            best = Some(at);
        }
        best.map(|start| (name, address - start))
    }

    fn expand(&self, code: u8, name: &mut Name, depth: u32) {
        if code < 128 {
            name.push(code);
            return;
        }
        // A pair stands for codes below it only; the bound is for a damaged table.
        if depth < 16 {
            let at = usize::from(code - 128) * 2;
            for &part in self.pairs.get(at..at + 2).unwrap_or_default() {
                self.expand(part, name, depth + 1);
            }
        }
    }
}

fn take(rest: &mut &[u8]) -> Option<u8> {
    let (&first, tail) = rest.split_first()?;
    *rest = tail;
    Some(first)
}

fn take_leb128(rest: &mut &[u8]) -> Option<u64> {
    let mut value = 0u64;
    for shift in (0..63).step_by(7) {
        let byte = take(rest)?;
        value |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Some(value);
        }
    }
    None
}

//! A disk whose writes are forgotten.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::io;

use super::{BlockBackend, SECTOR, length, spread};
use crate::memory::Piece;

/// Bytes of a piece of a [`Snapshot`].
const PIECE: usize = 4096;

/// A disk whose writes are kept in memory and forgotten at the end.
#[derive(Debug)]
pub struct Snapshot<B> {
    pub(super) below: B,
    /// What was written, by pieces of the disk; `None`: zeroes.
    written: BTreeMap<u64, Option<Box<[u8; PIECE]>>>,
}

impl<B: BlockBackend> Snapshot<B> {
    /// Nothing written yet.
    pub fn new(below: B) -> Self {
        Self { below, written: BTreeMap::new() }
    }

    /// A piece, to be changed: what lies below where it was not written yet.
    fn piece(&mut self, index: u64) -> io::Result<&mut [u8; PIECE]> {
        let piece = match self.written.entry(index) {
            Entry::Occupied(piece) => piece.into_mut(),
            Entry::Vacant(place) => {
                let mut piece = Box::new([0; PIECE]);
                let first = index * SECTORS_PER_PIECE;
                let sectors = self.below.sectors().saturating_sub(first).min(SECTORS_PER_PIECE);
                let len = usize::try_from(sectors).unwrap_or(0) * SECTOR;
                self.below.read(first, piece.get_mut(..len).unwrap_or_default())?;
                place.insert(Some(piece))
            }
        };
        Ok(piece.get_or_insert_with(|| Box::new([0; PIECE])))
    }

    /// Writes bytes piece by piece.
    fn store(
        &mut self,
        sector: u64,
        len: usize,
        fill: impl Fn(usize, &mut [u8]),
    ) -> io::Result<()> {
        let (mut at, mut done) = (sector, 0);
        while done < len {
            let skip = usize::try_from(at % SECTORS_PER_PIECE).unwrap_or(0) * SECTOR;
            let count = (PIECE - skip).min(len - done);
            let piece = self.piece(at / SECTORS_PER_PIECE)?;
            fill(done, piece.get_mut(skip..skip + count).unwrap_or_default());
            done += count;
            at += (count / SECTOR) as u64;
        }
        Ok(())
    }
}

/// Sectors of a piece.
const SECTORS_PER_PIECE: u64 = (PIECE / SECTOR) as u64;

impl<B: BlockBackend> BlockBackend for Snapshot<B> {
    fn sectors(&self) -> u64 {
        self.below.sectors()
    }
    fn is_read_only(&self) -> bool {
        false
    }
    fn read(&mut self, sector: u64, buf: &mut [u8]) -> io::Result<()> {
        self.below.read(sector, buf)?;
        let end = sector + (buf.len() / SECTOR) as u64;
        let pieces = sector / SECTORS_PER_PIECE..end.div_ceil(SECTORS_PER_PIECE);
        for (index, piece) in self.written.range(pieces) {
            let piece = piece.as_deref().unwrap_or(&[0; PIECE]);
            let first = index * SECTORS_PER_PIECE;
            for (at, bytes) in (first..).zip(piece.chunks(SECTOR)) {
                let Some(place) = at.checked_sub(sector).and_then(|at| usize::try_from(at).ok())
                else {
                    continue;
                };
                if let Some(to) = buf.get_mut(place * SECTOR..(place + 1) * SECTOR) {
                    to.copy_from_slice(bytes);
                }
            }
        }
        Ok(())
    }
    fn write(&mut self, sector: u64, bytes: &[u8]) -> io::Result<()> {
        self.store(sector, bytes.len(), |done, to| {
            to.copy_from_slice(bytes.get(done..done + to.len()).unwrap_or_default());
        })
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
    fn discard(&mut self, sector: u64, sectors: u64) -> io::Result<()> {
        let end = sector.saturating_add(sectors);
        let (mut at, mut left) = (sector, sectors);
        while left > 0 {
            let (index, skip) = (at / SECTORS_PER_PIECE, at % SECTORS_PER_PIECE);
            let count = (SECTORS_PER_PIECE - skip).min(left);
            if count == SECTORS_PER_PIECE || (skip == 0 && end == self.sectors()) {
                // A whole piece takes no memory, so that a guest that discards much does not use up the host's.
                self.written.insert(index, None);
            } else {
                let len = usize::try_from(count).unwrap_or(0) * SECTOR;
                self.store(at, len, |_, to| to.fill(0))?;
            }
            (at, left) = (at + count, left - count);
        }
        Ok(())
    }
    fn read_pieces(&mut self, sector: u64, pieces: &[Piece<'_>]) -> io::Result<()> {
        let end = sector + (length(pieces) / SECTOR) as u64;
        let range = sector / SECTORS_PER_PIECE..end.div_ceil(SECTORS_PER_PIECE);
        if self.written.range(range).next().is_none() {
            return self.below.read_pieces(sector, pieces);
        }
        let mut bytes = vec![0; length(pieces)];
        self.read(sector, &mut bytes)?;
        spread(&bytes, pieces);
        Ok(())
    }
}

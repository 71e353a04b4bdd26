//! A disk in memory, for tests.

use std::io;

use super::{BlockBackend, SECTOR, length};
use crate::memory::Piece;

/// A disk in memory.
#[derive(Clone, Debug)]
pub struct MemoryDisk {
    /// The contents, a whole number of sectors.
    pub bytes: Vec<u8>,
    /// Refuses writes.
    pub read_only: bool,
    /// Flushes so far.
    pub flushes: u64,
}

impl MemoryDisk {
    /// A disk of zeroes.
    #[must_use]
    pub fn new(sectors: usize) -> Self {
        Self { bytes: vec![0; sectors * SECTOR], read_only: false, flushes: 0 }
    }

    fn range(&mut self, sector: u64, len: usize) -> io::Result<&mut [u8]> {
        let outside = || io::Error::from(io::ErrorKind::UnexpectedEof);
        let start = usize::try_from(sector).ok().and_then(|sector| sector.checked_mul(SECTOR));
        let start = start.ok_or_else(outside)?;
        let end = start.checked_add(len).ok_or_else(outside)?;
        self.bytes.get_mut(start..end).ok_or_else(outside)
    }
}

impl BlockBackend for MemoryDisk {
    fn sectors(&self) -> u64 {
        (self.bytes.len() / SECTOR) as u64
    }
    fn is_read_only(&self) -> bool {
        self.read_only
    }
    fn read(&mut self, sector: u64, buf: &mut [u8]) -> io::Result<()> {
        buf.copy_from_slice(self.range(sector, buf.len())?);
        Ok(())
    }
    fn write(&mut self, sector: u64, bytes: &[u8]) -> io::Result<()> {
        self.range(sector, bytes.len())?.copy_from_slice(bytes);
        Ok(())
    }
    fn flush(&mut self) -> io::Result<()> {
        self.flushes += 1;
        Ok(())
    }
    fn discard(&mut self, sector: u64, sectors: u64) -> io::Result<()> {
        let len = usize::try_from(sectors).unwrap_or(usize::MAX).saturating_mul(SECTOR);
        self.range(sector, len)?.fill(0);
        Ok(())
    }
    fn read_pieces(&mut self, sector: u64, pieces: &[Piece<'_>]) -> io::Result<()> {
        super::spread(self.range(sector, length(pieces))?, pieces);
        Ok(())
    }
}

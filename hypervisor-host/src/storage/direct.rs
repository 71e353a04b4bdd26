//! Raw images past the host's page cache (`O_DIRECT`): the device moves data to and from the guest's own pages.
//!
//! The host wants offsets, lengths and addresses that are multiples of the device's block. What the guest asks for in
//! other units goes through a buffer of ours; a write of a part of a block reads the rest of it first.

use std::fs::File;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use janus_proto::sync::AtomicU32;

use super::raw::{discard_file, read_file, write_file};
use super::{BlockBackend, SECTOR, SharedBackend, gathered, length, spread};
use crate::memory::Piece;

/// The largest block that is tried.
const MOST_BLOCK: usize = 4096;

/// Memory of ours as the guest's is seen, at an address that any block is aligned to.
struct Aligned {
    words: Vec<AtomicU32>,
    skip: usize,
    len: usize,
}

impl Aligned {
    fn new(len: usize) -> Self {
        let count = (len + MOST_BLOCK).div_ceil(4);
        let words: Vec<AtomicU32> = (0..count).map(|_| AtomicU32::new(0)).collect();
        let skip = words.as_ptr().addr().wrapping_neg() % MOST_BLOCK;
        Self { words, skip, len }
    }

    fn part(&self, start: usize, len: usize) -> io::Result<Piece<'_>> {
        let inside = start.checked_add(len).is_some_and(|end| end <= self.len);
        let piece = Piece::new(&self.words, self.skip.saturating_add(start), len);
        piece.filter(|_| inside).ok_or_else(|| io::ErrorKind::InvalidInput.into())
    }

    fn whole(&self) -> io::Result<Piece<'_>> {
        self.part(0, self.len)
    }
}

/// A raw image without the host's cache.
#[derive(Clone, Debug)]
pub struct DirectDisk {
    file: Arc<File>,
    sectors: u64,
    read_only: bool,
    /// Bytes of the device's block.
    block: usize,
    /// Held while a part of a block is written.
    parts: Arc<Mutex<()>>,
}

impl DirectDisk {
    /// The whole blocks of `file`, which was opened with `O_DIRECT`.
    ///
    /// # Errors
    /// The file system or device has no direct I/O, or the size cannot be found.
    pub fn new(file: File, read_only: bool) -> io::Result<Self> {
        let bytes = rustix::fs::seek(&file, rustix::fs::SeekFrom::End(0))?;
        let block = block_of(&file)?;
        let sectors = bytes / block as u64 * (block / SECTOR) as u64;
        Ok(Self { file: Arc::new(file), sectors, read_only, block, parts: Arc::default() })
    }

    fn is_aligned(&self, start: u64, pieces: &[Piece<'_>]) -> bool {
        let fits = |value: usize| value.is_multiple_of(self.block);
        start.is_multiple_of(self.block as u64)
            && pieces.iter().all(|piece| fits(piece.len()) && fits(piece.address().addr()))
    }

    /// The whole blocks around a range: where they begin, how long they are, and how far into them the range begins.
    fn around(&self, start: u64, len: usize) -> (u64, usize, usize) {
        let skip = usize::try_from(start % self.block as u64).unwrap_or(0);
        (start - skip as u64, (skip + len).next_multiple_of(self.block), skip)
    }

    fn read_at(&self, start: u64, len: usize, take: impl FnOnce(&[u8])) -> io::Result<()> {
        let (first, whole, skip) = self.around(start, len);
        let buffer = Aligned::new(whole);
        read_file(&self.file, first, &[buffer.whole()?])?;
        take(&gathered(&[buffer.part(skip, len)?]));
        Ok(())
    }

    fn write_at(&self, start: u64, bytes: &[u8]) -> io::Result<()> {
        let (first, whole, skip) = self.around(start, bytes.len());
        let buffer = Aligned::new(whole);
        let _held = self.parts.lock().unwrap_or_else(PoisonError::into_inner);
        if whole != bytes.len() {
            read_file(&self.file, first, &[buffer.whole()?])?;
        }
        buffer.part(skip, bytes.len())?.copy_in(bytes);
        write_file(&self.file, first, &[buffer.whole()?])
    }
}

/// Reads the first bytes of a file, at most [`SECTOR`], whether it is open for direct I/O or not.
pub(super) fn read_start(file: &File, buf: &mut [u8]) -> io::Result<()> {
    let buffer = Aligned::new(MOST_BLOCK);
    let block = block_of(file)?.max(buf.len());
    read_file(file, 0, &[buffer.part(0, block)?])?;
    buffer.part(0, buf.len())?.copy_out(buf);
    Ok(())
}

/// The unit in which a file can be read directly.
fn block_of(file: &File) -> io::Result<usize> {
    let mut refused = None;
    for block in [SECTOR, MOST_BLOCK] {
        // At an address that is aligned to this block and to no larger one.
        let buffer = Aligned::new(2 * MOST_BLOCK);
        match read_file(file, 0, &[buffer.part(block % MOST_BLOCK, block)?]) {
            Ok(()) => return Ok(block),
            // Shorter than a block: the disk is empty.
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(block),
            Err(error) if error.kind() == io::ErrorKind::InvalidInput => refused = Some(error),
            Err(error) => return Err(error),
        }
    }
    Err(refused.unwrap_or_else(|| io::ErrorKind::Unsupported.into()))
}

impl BlockBackend for DirectDisk {
    fn sectors(&self) -> u64 {
        self.sectors
    }
    fn is_read_only(&self) -> bool {
        self.read_only
    }
    fn read(&mut self, sector: u64, buf: &mut [u8]) -> io::Result<()> {
        let len = buf.len();
        self.read_at(sector * SECTOR as u64, len, |bytes| buf.copy_from_slice(bytes))
    }
    fn write(&mut self, sector: u64, bytes: &[u8]) -> io::Result<()> {
        self.write_at(sector * SECTOR as u64, bytes)
    }
    fn flush(&mut self) -> io::Result<()> {
        // The device has a cache of its own.
        self.file.sync_data()
    }
    fn discard(&mut self, sector: u64, sectors: u64) -> io::Result<()> {
        discard_file(&self.file, sector, sectors, |at, zeroes| {
            self.write_at(at * SECTOR as u64, zeroes)
        })
    }
    fn read_pieces(&mut self, sector: u64, pieces: &[Piece<'_>]) -> io::Result<()> {
        let start = sector * SECTOR as u64;
        if self.is_aligned(start, pieces) {
            return read_file(&self.file, start, pieces);
        }
        self.read_at(start, length(pieces), |bytes| spread(bytes, pieces))
    }
    fn write_pieces(&mut self, sector: u64, pieces: &[Piece<'_>]) -> io::Result<()> {
        let start = sector * SECTOR as u64;
        if self.is_aligned(start, pieces) {
            return write_file(&self.file, start, pieces);
        }
        self.write_at(start, &gathered(pieces))
    }
    fn sharable(&self) -> Option<Box<dyn SharedBackend>> {
        Some(self.share())
    }
}

impl SharedBackend for DirectDisk {
    fn share(&self) -> Box<dyn SharedBackend> {
        Box::new(self.clone())
    }
}

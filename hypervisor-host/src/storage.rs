//! What a disk is made of, whatever the protocol in front of it.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::fmt;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Bytes in a sector.
pub const SECTOR: usize = 512;

/// A disk image. Ranges are checked by the caller against [`Self::sectors`].
pub trait BlockBackend {
    /// Capacity in sectors.
    fn sectors(&self) -> u64;
    /// Whether writes are refused.
    fn is_read_only(&self) -> bool;
    /// Fills `buf` from `sector` on.
    ///
    /// # Errors
    /// The medium failed.
    fn read(&mut self, sector: u64, buf: &mut [u8]) -> io::Result<()>;
    /// Stores `bytes` from `sector` on.
    ///
    /// # Errors
    /// The medium failed.
    fn write(&mut self, sector: u64, bytes: &[u8]) -> io::Result<()>;
    /// Makes completed writes stable.
    ///
    /// # Errors
    /// The medium failed.
    fn flush(&mut self) -> io::Result<()>;
    /// Forgets a range; it reads as zeroes afterwards.
    ///
    /// # Errors
    /// The medium failed.
    fn discard(&mut self, sector: u64, sectors: u64) -> io::Result<()>;
}

impl<B: BlockBackend + ?Sized> BlockBackend for Box<B> {
    fn sectors(&self) -> u64 {
        (**self).sectors()
    }
    fn is_read_only(&self) -> bool {
        (**self).is_read_only()
    }
    fn read(&mut self, sector: u64, buf: &mut [u8]) -> io::Result<()> {
        (**self).read(sector, buf)
    }
    fn write(&mut self, sector: u64, bytes: &[u8]) -> io::Result<()> {
        (**self).write(sector, bytes)
    }
    fn flush(&mut self) -> io::Result<()> {
        (**self).flush()
    }
    fn discard(&mut self, sector: u64, sectors: u64) -> io::Result<()> {
        (**self).discard(sector, sectors)
    }
}

/// An image that several queues share.
#[derive(Clone)]
pub struct SharedDisk {
    image: Arc<Mutex<Box<dyn BlockBackend + Send>>>,
    sectors: u64,
    read_only: bool,
}

impl fmt::Debug for SharedDisk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SharedDisk({} sectors)", self.sectors)
    }
}

impl SharedDisk {
    /// Shares an image.
    #[must_use]
    pub fn new(image: Box<dyn BlockBackend + Send>) -> Self {
        let (sectors, read_only) = (image.sectors(), image.is_read_only());
        Self { image: Arc::new(Mutex::new(image)), sectors, read_only }
    }

    fn lock(&self) -> MutexGuard<'_, Box<dyn BlockBackend + Send>> {
        self.image.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl BlockBackend for SharedDisk {
    fn sectors(&self) -> u64 {
        self.sectors
    }
    fn is_read_only(&self) -> bool {
        self.read_only
    }
    fn read(&mut self, sector: u64, buf: &mut [u8]) -> io::Result<()> {
        self.lock().read(sector, buf)
    }
    fn write(&mut self, sector: u64, bytes: &[u8]) -> io::Result<()> {
        self.lock().write(sector, bytes)
    }
    fn flush(&mut self) -> io::Result<()> {
        self.lock().flush()
    }
    fn discard(&mut self, sector: u64, sectors: u64) -> io::Result<()> {
        self.lock().discard(sector, sectors)
    }
}

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
}

/// Processes that hold a lock on a file, as far as the host tells.
#[must_use]
pub fn holders(path: &Path) -> Vec<u32> {
    use std::os::unix::fs::MetadataExt as _;
    let locks = std::fs::read_to_string("/proc/locks").unwrap_or_default();
    path.metadata().map_or_else(|_| Vec::new(), |file| holders_in(&locks, file.dev(), file.ino()))
}

/// The lines of `/proc/locks` about a file: `1: FLOCK ADVISORY WRITE 4711 fe:01:1234 0 EOF`.
fn holders_in(locks: &str, device: u64, inode: u64) -> Vec<u32> {
    let device = (rustix::fs::major(device), rustix::fs::minor(device));
    let holder = |line: &str| {
        let mut words = line.split_whitespace().skip(4);
        let (pid, place) = (words.next()?.parse().ok()?, words.next()?);
        let mut parts = place.split(':');
        let mut number = || u32::from_str_radix(parts.next()?, 16).ok();
        let same = (number()?, number()?) == device && parts.next()?.parse() == Ok(inode);
        same.then_some(pid)
    };
    locks.lines().filter_map(holder).collect()
}

/// A disk in a file of the host.
#[derive(Debug)]
pub struct FileDisk {
    file: File,
    sectors: u64,
    read_only: bool,
}

impl FileDisk {
    /// The whole sectors of `file`.
    ///
    /// # Errors
    /// Its size cannot be read.
    pub fn new(file: File, read_only: bool) -> io::Result<Self> {
        let sectors = file.metadata()?.len() / SECTOR as u64;
        Ok(Self { file, sectors, read_only })
    }
}

impl BlockBackend for FileDisk {
    fn sectors(&self) -> u64 {
        self.sectors
    }
    fn is_read_only(&self) -> bool {
        self.read_only
    }
    fn read(&mut self, sector: u64, buf: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(buf, sector * SECTOR as u64)
    }
    fn write(&mut self, sector: u64, bytes: &[u8]) -> io::Result<()> {
        self.file.write_all_at(bytes, sector * SECTOR as u64)
    }
    fn flush(&mut self) -> io::Result<()> {
        self.file.sync_data()
    }
    fn discard(&mut self, sector: u64, sectors: u64) -> io::Result<()> {
        use rustix::fs::FallocateFlags;
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        let (start, len) = (sector * SECTOR as u64, sectors * SECTOR as u64);
        if len > 0 && rustix::fs::fallocate(&self.file, flags, start, len).is_ok() {
            return Ok(());
        }
        // Not every file system has holes.
        let zeroes = [0; 64 * SECTOR];
        let (mut at, mut left) = (sector, sectors);
        while left > 0 {
            let count = left.min(64);
            let len = usize::try_from(count).map_or(SECTOR, |count| count * SECTOR);
            self.file.write_all_at(zeroes.get(..len).unwrap_or(&zeroes), at * SECTOR as u64)?;
            (at, left) = (at + count, left - count);
        }
        Ok(())
    }
}

/// Bytes of a piece of a [`Snapshot`].
const PIECE: usize = 4096;

/// A disk whose writes are kept in memory and forgotten at the end.
#[derive(Debug)]
pub struct Snapshot<B> {
    below: B,
    /// What was written, by pieces of the disk.
    written: BTreeMap<u64, Box<[u8; PIECE]>>,
}

impl<B: BlockBackend> Snapshot<B> {
    /// Nothing written yet.
    pub fn new(below: B) -> Self {
        Self { below, written: BTreeMap::new() }
    }

    /// A piece, to be changed: what lies below where it was not written yet.
    fn piece(&mut self, index: u64) -> io::Result<&mut [u8; PIECE]> {
        match self.written.entry(index) {
            Entry::Occupied(piece) => Ok(piece.into_mut()),
            Entry::Vacant(place) => {
                let mut piece = Box::new([0; PIECE]);
                let first = index * SECTORS_PER_PIECE;
                let sectors = self.below.sectors().saturating_sub(first).min(SECTORS_PER_PIECE);
                let len = usize::try_from(sectors).unwrap_or(0) * SECTOR;
                self.below.read(first, piece.get_mut(..len).unwrap_or_default())?;
                Ok(place.insert(piece))
            }
        }
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
        let len = usize::try_from(sectors).unwrap_or(usize::MAX).saturating_mul(SECTOR);
        self.store(sector, len, |_, to| to.fill(0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_host_tells_who_holds_a_file() {
        let locks = "1: FLOCK  ADVISORY  WRITE 4711 fe:01:1234 0 EOF\n\
                     1: -> FLOCK  ADVISORY  WRITE 12 fe:01:1234 0 EOF\n\
                     2: POSIX  ADVISORY  READ 8 fe:01:1235 0 EOF\nnonsense\n";
        let device = rustix::fs::makedev(0xfe, 1);
        assert_eq!(holders_in(locks, device, 1234), [4711]);
        assert_eq!(holders_in(locks, device, 1235), [8]);
        assert!(holders_in(locks, device, 1).is_empty());
    }

    fn check(disk: &mut dyn BlockBackend) {
        assert_eq!(disk.sectors(), 100);
        disk.write(3, &[7; 3 * SECTOR]).unwrap();
        disk.discard(4, 1).unwrap();
        disk.flush().unwrap();
        let mut buf = [1; 4 * SECTOR];
        disk.read(2, &mut buf).unwrap();
        let sectors: Vec<_> = buf.chunks(SECTOR).map(|s| (s[0], s[SECTOR - 1])).collect();
        assert_eq!(sectors, [(0, 0), (7, 7), (0, 0), (7, 7)]);
        disk.discard(0, 100).unwrap();
        disk.read(3, &mut buf).unwrap();
        assert!(buf.iter().all(|&byte| byte == 0));
        assert!(disk.read(98, &mut buf).is_err(), "the end is checked again here");
    }

    #[test]
    fn memory_and_file_are_the_same_disk() {
        check(&mut MemoryDisk::new(100));
        let path = std::env::temp_dir().join(format!("janus-disk-{}", std::process::id()));
        let file = File::options().read(true).write(true).create(true).truncate(true).open(&path);
        let file = file.unwrap();
        file.set_len(100 * 512 + 17).unwrap();
        check(&mut FileDisk::new(file.try_clone().unwrap(), false).unwrap());
        file.write_all_at(&[0; 100 * SECTOR], 0).unwrap();
        check(&mut Snapshot::new(FileDisk::new(file, false).unwrap()));
        std::fs::remove_file(path).unwrap();
    }

    #[test]
    fn what_a_snapshot_keeps_does_not_reach_the_disk_below() {
        let mut below = MemoryDisk::new(100);
        below.write(0, &[9; 100 * SECTOR]).unwrap();
        let mut disk = Snapshot::new(below.clone());
        disk.write(7, &[1; 2 * SECTOR]).unwrap();
        disk.write(99, &[2; SECTOR]).unwrap();
        let mut buf = [0; 100 * SECTOR];
        disk.read(0, &mut buf).unwrap();
        for (sector, bytes) in buf.chunks(SECTOR).enumerate() {
            let expected = match sector {
                7 | 8 => 1,
                99 => 2,
                _ => 9,
            };
            assert!(bytes.iter().all(|&byte| byte == expected), "sector {sector}");
        }
        let mut part = [0; 2 * SECTOR];
        disk.read(8, &mut part).unwrap();
        assert_eq!((part[0], part[SECTOR]), (1, 9));
        disk.below.read(7, &mut part).unwrap();
        assert_eq!(part[0], 9);
    }
}

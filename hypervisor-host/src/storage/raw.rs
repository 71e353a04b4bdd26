//! Raw images: a file of the host, as it is.
//!
//! Reads are copies out of a mapping, which cost half of what a system call does; where the file cannot be mapped, and
//! for all writes, the host is given the guest's own pages. Either way a byte is copied once.
// UNSAFETY: maps a file, and names the guest's pages to the host.
#![expect(unsafe_code, reason = "a mapping, and system calls on memory of the guest's")]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::FileExt as _;
use std::ptr::NonNull;
use std::sync::Arc;

use super::{BlockBackend, SECTOR, SharedBackend, length};
use crate::memory::Piece;
use crate::memory::guard::Guard;

/// Buffers that the host takes in one call (`IOV_MAX`).
const MOST_BUFFERS: usize = 1024;
/// Bytes of a line of the CPU's cache.
const LINE: usize = 64;
/// Lines that are fetched ahead; more gain nothing.
const LINES: usize = 4;
/// How far ahead of a copy: two pages.
const AHEAD: usize = 8192;

/// A file's bytes in our address space, as long as they are there.
#[derive(Debug)]
struct Map {
    base: NonNull<u8>,
    len: usize,
    guard: Guard,
}

// SAFETY: the memory is only read, by copies that mind neither other writers nor its absence.
unsafe impl Send for Map {}
// SAFETY: as above.
unsafe impl Sync for Map {}

impl Map {
    fn new(file: &File, len: usize) -> io::Result<Self> {
        let guard = Guard::new()?;
        // SAFETY: a new mapping for reading, at an address that the host chooses.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                libc::PROT_READ,
                libc::MAP_SHARED | libc::MAP_NORESERVE,
                file.as_raw_fd(),
                0,
            )
        };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let base = NonNull::new(base.cast()).ok_or(io::ErrorKind::InvalidInput)?;
        Ok(Self { base, len, guard })
    }

    /// Has the CPU fetch the first bytes of a page that will be copied soon. Its own prefetching ends at pages, and begins
    /// with a page's first bytes: so much of a copy out of a large image is waiting for those that this saves a third.
    fn hint(&self, at: usize) {
        if at.checked_add(LINES * LINE).is_some_and(|end| end <= self.len) {
            for line in 0..LINES {
                // SAFETY: inside of the mapping; and a prefetch of what is not there does nothing.
                unsafe {
                    let place = self.base.as_ptr().add(at + line * LINE);
                    std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(
                        place.cast(),
                    );
                }
            }
        }
    }

    fn read(&self, start: usize, pieces: &[Piece<'_>]) -> io::Result<()> {
        let mut at = start;
        let last = start.saturating_add(length(pieces));
        for piece in pieces {
            // What lies beyond the request is only in the way.
            if at.saturating_add(AHEAD) < last {
                self.hint(at + AHEAD);
            }
            let end = at.checked_add(piece.len()).filter(|end| *end <= self.len);
            let end = end.ok_or(io::ErrorKind::UnexpectedEof)?;
            // SAFETY: `at..end` is inside of the mapping, which stays as long as `self`.
            unsafe { self.guard.copy(piece, self.base.as_ptr().add(at)) }?;
            at = end;
        }
        Ok(())
    }
}

impl Drop for Map {
    fn drop(&mut self) {
        // SAFETY: the mapping of `new`, which nobody else knows.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.len) };
    }
}

/// A raw image.
#[derive(Clone, Debug)]
pub struct FileDisk {
    file: Arc<File>,
    map: Option<Arc<Map>>,
    sectors: u64,
    read_only: bool,
}

impl FileDisk {
    /// The whole sectors of `file`, which may be a block device.
    ///
    /// # Errors
    /// Its size cannot be found.
    pub fn new(file: File, read_only: bool) -> io::Result<Self> {
        let mut disk = Self::unmapped(file, read_only)?;
        let len = usize::try_from(disk.sectors * SECTOR as u64).unwrap_or(0);
        if len > 0 {
            // Some files cannot be mapped, and a large one may not fit a limited address space.
            disk.map = Map::new(&disk.file, len).ok().map(Arc::new);
        }
        Ok(disk)
    }

    /// As [`Self::new`], with a system call for each read.
    ///
    /// # Errors
    /// Its size cannot be found.
    pub fn unmapped(file: File, read_only: bool) -> io::Result<Self> {
        let bytes = rustix::fs::seek(&file, rustix::fs::SeekFrom::End(0))?;
        ignore_file_size_signal();
        let sectors = bytes / SECTOR as u64;
        Ok(Self { file: Arc::new(file), map: None, sectors, read_only })
    }
}

/// Moves all of `pieces` by calls that may move less; a call that moves nothing is the end of the file.
pub(super) fn move_pieces(
    pieces: &[Piece<'_>],
    start: u64,
    mut call: impl FnMut(&[libc::iovec], libc::off_t) -> isize,
) -> io::Result<()> {
    let buffer =
        |piece: &Piece<'_>| libc::iovec { iov_base: piece.address().cast(), iov_len: piece.len() };
    let mut buffers: Vec<_> = pieces.iter().map(buffer).collect();
    let (mut left, mut at) = (buffers.as_mut_slice(), start);
    while let Some(first) = left.first()
        && first.iov_len == 0
    {
        left = left.get_mut(1..).unwrap_or_default();
    }
    while !left.is_empty() {
        let now = left.get(..left.len().min(MOST_BUFFERS)).unwrap_or_default();
        let offset = libc::off_t::try_from(at).map_err(|_| io::ErrorKind::InvalidInput)?;
        let mut moved = match usize::try_from(call(now, offset)) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(moved) => moved,
            Err(_) => match io::Error::last_os_error() {
                error if error.kind() == io::ErrorKind::Interrupted => continue,
                error => return Err(error),
            },
        };
        at += moved as u64;
        while let Some(first) = left.first_mut() {
            let part = moved.min(first.iov_len);
            first.iov_base = first.iov_base.wrapping_byte_add(part);
            first.iov_len -= part;
            moved -= part;
            if first.iov_len > 0 {
                break;
            }
            left = left.get_mut(1..).unwrap_or_default();
        }
    }
    Ok(())
}

fn count(buffers: &[libc::iovec]) -> libc::c_int {
    libc::c_int::try_from(buffers.len()).unwrap_or(0)
}

/// Reads from a file into the guest's memory.
pub(super) fn read_file(file: &File, start: u64, pieces: &[Piece<'_>]) -> io::Result<()> {
    move_pieces(pieces, start, |buffers, at| {
        // SAFETY: the buffers are pieces, or what is left of them: memory that is there and that others may write.
        unsafe { libc::preadv(file.as_raw_fd(), buffers.as_ptr(), count(buffers), at) }
    })
}

/// Writes to a file from the guest's memory.
pub(super) fn write_file(file: &File, start: u64, pieces: &[Piece<'_>]) -> io::Result<()> {
    move_pieces(pieces, start, |buffers, at| {
        // SAFETY: as in `read_file`; the host only reads them.
        unsafe { libc::pwritev(file.as_raw_fd(), buffers.as_ptr(), count(buffers), at) }
    })
}

/// A write beyond the host's limit (`ulimit -f`) is an error like a full disk, not the end of the process.
fn ignore_file_size_signal() {
    static DONE: std::sync::Once = std::sync::Once::new();
    DONE.call_once(|| {
        // SAFETY: no handler, and nobody waits for this signal.
        unsafe { libc::signal(libc::SIGXFSZ, libc::SIG_IGN) };
    });
}

/// Makes a range of a file read as zeroes: by a hole, or by `write`, which is given a sector and zeroes.
pub(super) fn discard_file(
    file: &File,
    sector: u64,
    sectors: u64,
    write: impl Fn(u64, &[u8]) -> io::Result<()>,
) -> io::Result<()> {
    use rustix::fs::FallocateFlags;
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    let (start, len) = (sector * SECTOR as u64, sectors * SECTOR as u64);
    if len > 0 && rustix::fs::fallocate(file, flags, start, len).is_ok() {
        return Ok(());
    }
    // Not every file system has holes.
    let zeroes = [0; 64 * SECTOR];
    let (mut at, mut left) = (sector, sectors);
    while left > 0 {
        let count = left.min(64);
        let len = usize::try_from(count).map_or(SECTOR, |count| count * SECTOR);
        write(at, zeroes.get(..len).unwrap_or(&zeroes))?;
        (at, left) = (at + count, left - count);
    }
    Ok(())
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
    fn read_pieces(&mut self, sector: u64, pieces: &[Piece<'_>]) -> io::Result<()> {
        let start = sector * SECTOR as u64;
        match (&self.map, usize::try_from(start)) {
            (Some(map), Ok(start)) => map.read(start, pieces),
            _ => read_file(&self.file, start, pieces),
        }
    }
    fn write_pieces(&mut self, sector: u64, pieces: &[Piece<'_>]) -> io::Result<()> {
        debug_assert!(sector + (length(pieces) / SECTOR) as u64 <= self.sectors);
        write_file(&self.file, sector * SECTOR as u64, pieces)
    }
    fn hint(&self, sector: u64) {
        if let (Some(map), Ok(start)) = (&self.map, usize::try_from(sector * SECTOR as u64)) {
            map.hint(start);
        }
    }
    fn flush(&mut self) -> io::Result<()> {
        self.file.sync_data()
    }
    fn discard(&mut self, sector: u64, sectors: u64) -> io::Result<()> {
        discard_file(&self.file, sector, sectors, |at, zeroes| {
            self.file.write_all_at(zeroes, at * SECTOR as u64)
        })
    }
    fn sharable(&self) -> Option<Box<dyn SharedBackend>> {
        Some(self.share())
    }
}

impl SharedBackend for FileDisk {
    fn share(&self) -> Box<dyn SharedBackend> {
        Box::new(self.clone())
    }
}

//! What a disk is made of, whatever the protocol in front of it.

use std::fmt;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

mod direct;
mod memory;
pub mod open;
mod qcow2;
mod raw;
mod snapshot;
#[cfg(test)]
mod tests;

pub use direct::DirectDisk;
pub use memory::MemoryDisk;
pub use open::holders;
pub use qcow2::Qcow2Disk;
pub use raw::FileDisk;
pub use snapshot::Snapshot;

use crate::memory::Piece;

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
    /// Fills pieces of the guest's memory, one behind the other, from `sector` on.
    ///
    /// # Errors
    /// The medium failed; some of the pieces may be written.
    fn read_pieces(&mut self, sector: u64, pieces: &[Piece<'_>]) -> io::Result<()> {
        let mut bytes = vec![0; length(pieces)];
        self.read(sector, &mut bytes)?;
        spread(&bytes, pieces);
        Ok(())
    }
    /// Stores pieces of the guest's memory, one behind the other, from `sector` on.
    ///
    /// # Errors
    /// The medium failed.
    fn write_pieces(&mut self, sector: u64, pieces: &[Piece<'_>]) -> io::Result<()> {
        self.write(sector, &gathered(pieces))
    }
    /// What begins at `sector`, which is on the disk, will be read soon.
    fn hint(&self, _sector: u64) {}
    /// Another handle on the same medium that can be used at the same time, if there can be such.
    fn sharable(&self) -> Option<Box<dyn SharedBackend>> {
        None
    }
}

/// An image of which there can be any number of handles that are used at the same time.
pub trait SharedBackend: BlockBackend + Send {
    /// Another handle.
    fn share(&self) -> Box<dyn SharedBackend>;
}

/// Bytes of all pieces.
fn length(pieces: &[Piece<'_>]) -> usize {
    pieces.iter().map(Piece::len).sum()
}

/// Copies bytes into pieces, one behind the other.
fn spread(bytes: &[u8], pieces: &[Piece<'_>]) {
    let mut rest = bytes;
    for piece in pieces {
        let (part, later) = rest.split_at(piece.len().min(rest.len()));
        piece.copy_in(part);
        rest = later;
    }
}

/// The bytes of all pieces.
fn gathered(pieces: &[Piece<'_>]) -> Vec<u8> {
    let mut bytes = vec![0; length(pieces)];
    let mut rest = bytes.as_mut_slice();
    for piece in pieces {
        let (part, later) = rest.split_at_mut(piece.len().min(rest.len()));
        piece.copy_out(part);
        rest = later;
    }
    bytes
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
    fn read_pieces(&mut self, sector: u64, pieces: &[Piece<'_>]) -> io::Result<()> {
        (**self).read_pieces(sector, pieces)
    }
    fn write_pieces(&mut self, sector: u64, pieces: &[Piece<'_>]) -> io::Result<()> {
        (**self).write_pieces(sector, pieces)
    }
    fn hint(&self, sector: u64) {
        (**self).hint(sector);
    }
    fn sharable(&self) -> Option<Box<dyn SharedBackend>> {
        (**self).sharable()
    }
}

/// An image that several queues use: each through a handle of its own where it can be shared, else one after the other.
pub struct SharedDisk {
    handle: Handle,
    sectors: u64,
    read_only: bool,
}

enum Handle {
    Own(Box<dyn SharedBackend>),
    Common(Arc<Mutex<Box<dyn BlockBackend + Send>>>),
}

impl fmt::Debug for SharedDisk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SharedDisk({} sectors)", self.sectors)
    }
}

impl Clone for SharedDisk {
    fn clone(&self) -> Self {
        let handle = match &self.handle {
            Handle::Own(image) => Handle::Own(image.share()),
            Handle::Common(image) => Handle::Common(Arc::clone(image)),
        };
        Self { handle, sectors: self.sectors, read_only: self.read_only }
    }
}

impl SharedDisk {
    /// Shares an image.
    #[must_use]
    pub fn new(image: Box<dyn BlockBackend + Send>) -> Self {
        let (sectors, read_only) = (image.sectors(), image.is_read_only());
        let handle = match image.sharable() {
            Some(image) => Handle::Own(image),
            None => Handle::Common(Arc::new(Mutex::new(image))),
        };
        Self { handle, sectors, read_only }
    }

    fn with<R>(&mut self, action: impl FnOnce(&mut dyn BlockBackend) -> R) -> R {
        match &mut self.handle {
            Handle::Own(image) => action(image.as_mut()),
            Handle::Common(image) => action(lock(image).as_mut()),
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl BlockBackend for SharedDisk {
    fn sectors(&self) -> u64 {
        self.sectors
    }
    fn is_read_only(&self) -> bool {
        self.read_only
    }
    fn read(&mut self, sector: u64, buf: &mut [u8]) -> io::Result<()> {
        self.with(|image| image.read(sector, buf))
    }
    fn write(&mut self, sector: u64, bytes: &[u8]) -> io::Result<()> {
        self.with(|image| image.write(sector, bytes))
    }
    fn flush(&mut self) -> io::Result<()> {
        self.with(|image| image.flush())
    }
    fn discard(&mut self, sector: u64, sectors: u64) -> io::Result<()> {
        self.with(|image| image.discard(sector, sectors))
    }
    fn read_pieces(&mut self, sector: u64, pieces: &[Piece<'_>]) -> io::Result<()> {
        self.with(|image| image.read_pieces(sector, pieces))
    }
    fn write_pieces(&mut self, sector: u64, pieces: &[Piece<'_>]) -> io::Result<()> {
        self.with(|image| image.write_pieces(sector, pieces))
    }
    fn hint(&self, sector: u64) {
        if let Handle::Own(image) = &self.handle {
            image.hint(sector);
        }
    }
}

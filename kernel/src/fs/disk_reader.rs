//! A disk, or a part of it, as bytes for synchronous libraries.
//!
//! Waits with [`task::block_on`], so it belongs in a fiber; caching and read-ahead are [`Cached`]'s.

use crate::block::BlockError;
use crate::block::cache::Cached;
use crate::task;

/// Why bytes could not be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReadError {
    /// Past the end of the disk or partition, in bytes.
    OutOfRange {
        /// First byte asked for.
        start: u64,
        /// Bytes asked for.
        len: usize,
        /// Bytes there are.
        size: u64,
    },
    /// The disk failed.
    Disk(BlockError),
}

impl core::fmt::Display for ReadError {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self {
            Self::OutOfRange { start, len, size } => {
                write!(f, "a read of {len} bytes at {start} is past the end, {size} bytes")
            }
            Self::Disk(error) => write!(f, "{error}"),
        }
    }
}

impl core::error::Error for ReadError {}

/// See the module.
#[derive(Debug)]
pub struct DiskReader {
    disk: Cached,
    base: u64,
    size: u64,
    last_error: Option<ReadError>,
}

impl DiskReader {
    /// A view of `size` bytes of `disk` from byte `base` on; cut to what the disk has.
    #[must_use]
    pub fn new(disk: Cached, base: u64, size: u64) -> Self {
        let size = size.min(disk.block().capacity().saturating_sub(base));
        Self { disk, base, size, last_error: None }
    }
    /// Bytes in view.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.size
    }
    /// The last error, once: libraries tend to wrap it beyond recognition.
    pub fn take_error(&mut self) -> Option<ReadError> {
        self.last_error.take()
    }
    /// Fills `dst` from byte `start` on.
    ///
    /// # Errors
    /// See [`ReadError`].
    pub fn read(&mut self, start: u64, dst: &mut [u8]) -> Result<(), ReadError> {
        let fits = start.checked_add(dst.len() as u64).is_some_and(|end| end <= self.size);
        let result = if fits {
            task::block_on(self.disk.read_into(self.base + start, dst)).map_err(ReadError::Disk)
        } else {
            Err(ReadError::OutOfRange { start, len: dst.len(), size: self.size })
        };
        self.last_error = result.err();
        result
    }
}

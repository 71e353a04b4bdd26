//! The block device (virtio 1.2, 5.2), over the same images as blkback.
//!
//! Data moves between the image and the guest's buffers without a copy of ours, where the image can do that.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use janus_proto::abi::virtio::DeviceId;
use janus_proto::abi::virtio::blk::{
    Config, DiscardWriteZeroes, F_BLK_SIZE, F_DISCARD, F_FLUSH, F_MQ, F_RO, F_SEG_MAX,
    F_WRITE_ZEROES, ID_BYTES, RequestHeader, RequestStatus, RequestType, WRITE_ZEROES_FLAG_UNMAP,
};
use janus_proto::grant::Access;
use janus_proto::virtqueue::QueueError;
use zerocopy::{FromZeros as _, IntoBytes as _};

use super::Model;
use super::memory::Pinned;
use super::queue::{BadBuffer, Chain, Queue};
use crate::memory::Piece;
use crate::storage::{BlockBackend, SECTOR, SharedDisk};

/// Entries of a queue.
const SIZE: u16 = 256;
/// Queues at most.
const MAX_QUEUES: u16 = 16;
/// Buffers of a request beside header and status, so that it fits into the queue's own table too.
const SEGMENTS: u32 = SIZE as u32 - 2;
/// Bytes of the guest's that are held at once.
const STEP: u32 = 1 << 20;
/// Sectors of one range to discard.
const MOST_DISCARD: u32 = u32::MAX;
/// Sectors of one range to fill with zeroes: what takes no longer than an ordinary request.
const MOST_ZEROES: u32 = 1 << 15;
/// Ranges of one request.
const RANGES: u32 = 16;
/// Bytes of the answer to `GET_ID`.
const ID_LEN: u32 = 20;
/// Bytes of a sector, as lengths on the wire are.
const SECTOR_LEN: u32 = 512;
/// Bytes of a request's header, and of a range.
const HEADER: u32 = 16;

/// A block device.
#[derive(Debug)]
pub struct Blk {
    disks: Vec<Mutex<SharedDisk>>,
    sizes: Vec<u16>,
    sectors: u64,
    read_only: bool,
    id: [u8; ID_BYTES],
    /// The driver flushes; otherwise every write is stable when it is answered.
    flushes: AtomicBool,
    threads: bool,
}

/// Why a request was not done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Failed(RequestStatus);

impl From<BadBuffer> for Failed {
    fn from(_: BadBuffer) -> Self {
        Self(RequestStatus::IOERR)
    }
}
impl From<io::Error> for Failed {
    fn from(_: io::Error) -> Self {
        Self(RequestStatus::IOERR)
    }
}

/// The request makes no sense.
const WRONG: Failed = Failed(RequestStatus::IOERR);
/// The device does not do this.
const UNKNOWN: Failed = Failed(RequestStatus::UNSUPP);

impl Blk {
    /// A device with so many queues (at least one, at most 16); `id` is what it answers to `GET_ID`, cut to 20 bytes.
    #[must_use]
    pub fn new(image: Box<dyn BlockBackend + Send>, queues: u16, id: &str) -> Self {
        let disk = SharedDisk::new(image);
        let queues = usize::from(queues.clamp(1, MAX_QUEUES));
        let mut name = [0; ID_BYTES];
        for (to, from) in name.iter_mut().zip(id.bytes()) {
            *to = from;
        }
        Self {
            sectors: disk.sectors(),
            read_only: disk.is_read_only(),
            disks: (0..queues).map(|_| Mutex::new(disk.clone())).collect(),
            sizes: vec![SIZE; queues],
            id: name,
            flushes: AtomicBool::new(false),
            threads: false,
        }
    }

    /// Serves each queue on a thread of its own: for images that wait (direct I/O).
    #[must_use]
    pub fn on_threads(self) -> Self {
        Self { threads: true, ..self }
    }

    /// Does a request; how many bytes of data were written to the guest.
    fn request(&self, disk: &mut SharedDisk, chain: &Chain, room: u32) -> Result<u32, Failed> {
        let header: RequestHeader = chain.read_object(0)?;
        let data = chain.readable() - HEADER;
        match header.request_type {
            RequestType::IN => {
                let sectors = self.range(header.sector, room)?;
                transfer(chain, Access::ReadWrite, 0, room, |offset, pieces| {
                    disk.read_pieces(sectors + offset, pieces)
                })?;
                Ok(room)
            }
            RequestType::OUT => {
                let sectors = self.range(header.sector, data)?;
                self.may_write()?;
                transfer(chain, Access::ReadOnly, HEADER, data, |offset, pieces| {
                    disk.write_pieces(sectors + offset, pieces)
                })?;
                if !self.flushes.load(Ordering::Relaxed) {
                    disk.flush()?;
                }
                Ok(0)
            }
            RequestType::FLUSH => {
                disk.flush()?;
                Ok(0)
            }
            RequestType::GET_ID => {
                let count = room.min(ID_LEN);
                let id = self.id.get(..count as usize).unwrap_or_default();
                chain.write(0, id)?;
                Ok(count)
            }
            RequestType::DISCARD | RequestType::WRITE_ZEROES => {
                self.may_write()?;
                self.forget(disk, chain, header.request_type, data)?;
                Ok(0)
            }
            _ => Err(UNKNOWN),
        }
    }

    fn may_write(&self) -> Result<(), Failed> {
        if self.read_only { Err(WRONG) } else { Ok(()) }
    }

    /// Checks that `len` bytes from `sector` on are whole sectors of the disk; answers the sector.
    fn range(&self, sector: u64, len: u32) -> Result<u64, Failed> {
        let whole = len.is_multiple_of(SECTOR_LEN);
        let end = sector.checked_add(u64::from(len) / SECTOR as u64);
        if whole && end.is_some_and(|end| end <= self.sectors) { Ok(sector) } else { Err(WRONG) }
    }

    /// Discards ranges, or fills them with zeroes; all are checked before the first is touched.
    fn forget(
        &self,
        disk: &mut SharedDisk,
        chain: &Chain,
        kind: RequestType,
        len: u32,
    ) -> Result<(), Failed> {
        let zeroes = kind == RequestType::WRITE_ZEROES;
        if len == 0 || !len.is_multiple_of(HEADER) || len / HEADER > RANGES {
            return Err(WRONG);
        }
        let mut ranges = Vec::new();
        for index in 0..len / HEADER {
            let range: DiscardWriteZeroes = chain.read_object(HEADER * (index + 1))?;
            let known = if zeroes { WRITE_ZEROES_FLAG_UNMAP } else { 0 };
            if range.flags & !known != 0 {
                return Err(UNKNOWN);
            }
            let end = range.sector.checked_add(range.num_sectors.into());
            let fits = end.is_some_and(|end| end <= self.sectors);
            if !fits || (zeroes && range.num_sectors > MOST_ZEROES) {
                return Err(WRONG);
            }
            ranges.push(range);
        }
        for range in ranges {
            if zeroes && range.flags & WRITE_ZEROES_FLAG_UNMAP == 0 {
                fill(disk, range.sector, range.num_sectors.into())?;
            } else {
                disk.discard(range.sector, range.num_sectors.into())?;
            }
        }
        if zeroes && !self.flushes.load(Ordering::Relaxed) {
            disk.flush()?;
        }
        Ok(())
    }

    /// Answers a chain.
    fn answer(&self, disk: &mut SharedDisk, chain: &Chain) -> u32 {
        // The status is the last byte that the device may write, however the driver cut its buffers.
        let Some(room) = chain.writable().checked_sub(1) else { return 0 };
        let (status, written) = match self.request(disk, chain, room) {
            Ok(written) => (RequestStatus::OK, written),
            Err(Failed(status)) => (status, 0),
        };
        match chain.write(room, &[status.0]) {
            // Up to the status all counts as written, as the status is.
            Ok(()) if written == room => written + 1,
            Ok(()) => written.max(1),
            Err(BadBuffer) => written,
        }
    }
}

/// Moves `len` bytes of the chain from `offset` on, in steps; `with` gets how many sectors came before.
fn transfer(
    chain: &Chain,
    access: Access,
    offset: u32,
    len: u32,
    mut with: impl FnMut(u64, &[Piece<'_>]) -> io::Result<()>,
) -> Result<(), Failed> {
    let mut done = 0;
    while done < len {
        let step = (len - done).min(STEP);
        let pinned = chain.pin(access, offset + done, step as usize)?;
        let pieces: Option<Vec<_>> = pinned.iter().map(Pinned::piece).collect();
        with(u64::from(done) / SECTOR as u64, &pieces.ok_or(WRONG)?)?;
        done += step;
    }
    Ok(())
}

/// Writes zeroes, so that the image keeps the room for what comes later.
fn fill(disk: &mut SharedDisk, start: u64, count: u64) -> io::Result<()> {
    static ZEROES: [u8; 128 * SECTOR] = [0; 128 * SECTOR];
    let (mut at, mut left) = (start, count);
    while left > 0 {
        let now = left.min(128);
        let len = usize::try_from(now).map_or(SECTOR, |now| now * SECTOR);
        disk.write(at, ZEROES.get(..len).unwrap_or(&ZEROES))?;
        (at, left) = (at + now, left - now);
    }
    Ok(())
}

impl Model for Blk {
    fn id(&self) -> DeviceId {
        DeviceId::BLOCK
    }

    fn features(&self) -> u64 {
        let always = F_SEG_MAX | F_BLK_SIZE | F_FLUSH;
        let queues = if self.sizes.len() > 1 { F_MQ } else { 0 };
        always | queues | if self.read_only { F_RO } else { F_DISCARD | F_WRITE_ZEROES }
    }

    fn is_slow(&self) -> bool {
        self.threads
    }

    fn queues(&self) -> &[u16] {
        &self.sizes
    }

    fn config(&self) -> Vec<u8> {
        let config = Config {
            capacity: self.sectors,
            seg_max: SEGMENTS,
            blk_size: SECTOR_LEN,
            num_queues: u16::try_from(self.sizes.len()).unwrap_or(1),
            max_discard_sectors: MOST_DISCARD,
            max_discard_seg: RANGES,
            discard_sector_alignment: 1,
            max_write_zeroes_sectors: MOST_ZEROES,
            max_write_zeroes_seg: RANGES,
            write_zeroes_may_unmap: 1,
            ..Config::new_zeroed()
        };
        config.as_bytes().to_vec()
    }

    fn start(&self, features: u64) {
        self.flushes.store(features & F_FLUSH != 0, Ordering::Relaxed);
    }

    fn serve(&self, index: u16, queue: &mut Queue) -> Result<(), QueueError> {
        let Some(disk) = self.disks.get(usize::from(index)) else { return Ok(()) };
        let mut disk = disk.lock().unwrap_or_else(PoisonError::into_inner);
        queue.each(|chain| self.answer(&mut disk, chain))
    }
}

#[cfg(test)]
mod tests;

//! The `virtio-drivers` crate's disk behind our device class: the baseline of the bench, nothing else.
//!
//! It kicks at every request, has 16 of them in flight at most, and allocates on the way.
// UNSAFETY: the crate keeps pointers to buffers that it was lent; here they are moved into a table.
#![expect(unsafe_code, reason = "the crate's requests keep pointers beyond the call")]

use alloc::boxed::Box;

use virtio_drivers::device::blk::{BlkReq, BlkResp, RespStatus, VirtIOBlk};

use super::baseline::{Adapter, DeviceFrames, FramesHal};
use super::{InitError, Transport};
use crate::class::{
    BlockDevice, BlockFeatures, BlockOp, BlockStatus, Completion, Geometry, PeerError, SECTOR_SIZE,
    SubmitError,
};
use crate::dma::DmaBuf;

/// What the crate's queue has, with indirect descriptors.
const DEPTH: usize = 16;
const QUEUE_DEPTH: u16 = 16;
/// Longest request; one contiguous buffer.
const MAX_REQUEST: usize = 1 << 20;
const MAX_REQUEST_BYTES: u32 = 1 << 20;

#[derive(Debug)]
struct Request {
    id: u64,
    buf: DmaBuf,
    len: usize,
    write: bool,
    header: Box<BlkReq>,
    response: Box<BlkResp>,
}

/// The crate's disk.
pub struct BaselineBlk<S: DeviceFrames> {
    driver: VirtIOBlk<FramesHal<S>, Adapter>,
    requests: [Option<Request>; DEPTH],
    broken: bool,
}

impl<S: DeviceFrames> core::fmt::Debug for BaselineBlk<S> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("BaselineBlk").field("requests", &self.requests).finish_non_exhaustive()
    }
}

impl<S: DeviceFrames> BaselineBlk<S> {
    /// Sets the device up.
    ///
    /// # Errors
    /// [`InitError::Queue`] for whatever the crate does not like.
    pub fn new(transport: Box<dyn Transport>) -> Result<Self, InitError> {
        let adapter = Adapter::new(transport).map_err(|_| InitError::Config("device type"))?;
        let driver = VirtIOBlk::new(adapter).map_err(|_| InitError::Queue(0))?;
        Ok(Self { driver, requests: [const { None }; DEPTH], broken: false })
    }

    fn submit_data(
        &mut self,
        id: u64,
        sector: u64,
        len: usize,
        mut buf: DmaBuf,
        write: bool,
    ) -> Result<(), DmaBuf> {
        let mut header = Box::new(BlkReq::default());
        let mut response = Box::new(BlkResp::default());
        let (Ok(block), Some(bytes)) = (usize::try_from(sector), buf.get_mut(..len)) else {
            return Err(buf);
        };
        let token = if write {
            // SAFETY: all three move into the table below, untouched until the request is complete; the
            // boxes' and the buffer's memory does not move with them.
            unsafe { self.driver.write_blocks_nb(block, &mut header, bytes, &mut response) }
        } else {
            // SAFETY: as above.
            unsafe { self.driver.read_blocks_nb(block, &mut header, bytes, &mut response) }
        };
        match token.ok().and_then(|token| self.requests.get_mut(usize::from(token))) {
            Some(slot) => *slot = Some(Request { id, buf, len, write, header, response }),
            None => return Err(buf), // Full, so nothing was queued: tokens are below DEPTH.
        }
        Ok(())
    }
}

impl<S: DeviceFrames> BlockDevice for BaselineBlk<S> {
    fn geometry(&self) -> Geometry {
        let writable =
            if self.driver.readonly() { BlockFeatures::empty() } else { BlockFeatures::WRITE };
        Geometry {
            sectors: self.driver.capacity(),
            block_size: 512,
            max_request: MAX_REQUEST_BYTES,
            queue_depth: QUEUE_DEPTH,
            features: writable,
        }
    }

    fn submit(&mut self, id: u64, op: BlockOp) -> Result<(), SubmitError> {
        if self.broken {
            return Err(SubmitError::Gone(op));
        }
        let (sector, len, buf, write) = match op {
            BlockOp::Read { sector, len, buf } => (sector, len, buf, false),
            BlockOp::Write { sector, len, buf } if !self.driver.readonly() => {
                (sector, len, buf, true)
            }
            other => return Err(SubmitError::Invalid(other)),
        };
        let back = |buf| match write {
            true => BlockOp::Write { sector, len, buf },
            false => BlockOp::Read { sector, len, buf },
        };
        let end = sector.checked_add((len / SECTOR_SIZE) as u64);
        let fits = end.is_some_and(|end| end <= self.driver.capacity());
        if !fits || len == 0 || len > MAX_REQUEST.min(buf.len()) || !len.is_multiple_of(SECTOR_SIZE)
        {
            return Err(SubmitError::Invalid(back(buf)));
        }
        self.submit_data(id, sector, len, buf, write).map_err(|buf| SubmitError::Busy(back(buf)))
    }

    fn kick(&mut self) {} // The crate did so with each request.

    fn complete(&mut self) -> Result<Option<Completion>, PeerError> {
        if self.broken {
            return Ok(None);
        }
        let Some(token) = self.driver.peek_used() else { return Ok(None) };
        let Some(request) = self.requests.get_mut(usize::from(token)).and_then(Option::take) else {
            self.broken = true;
            return Err(PeerError("used id that is not in flight"));
        };
        let Request { id, mut buf, len, write, header, mut response } = request;
        let Some(bytes) = buf.get_mut(..len) else { return Ok(None) };
        let ended = if write {
            // SAFETY: the buffers of the request that was queued under this token.
            unsafe { self.driver.complete_write_blocks(token, &header, bytes, &mut response) }
        } else {
            // SAFETY: as above.
            unsafe { self.driver.complete_read_blocks(token, &header, bytes, &mut response) }
        };
        let status = match ended {
            Ok(()) => BlockStatus::Ok,
            Err(_) if response.status() == RespStatus::UNSUPPORTED => BlockStatus::Unsupported,
            Err(_) => BlockStatus::IoError,
        };
        Ok(Some(Completion { id, status, buf: Some(buf) }))
    }

    fn arm(&mut self) -> bool {
        // The crate's interrupts are always on.
        !self.broken && self.driver.peek_used().is_some()
    }
}

//! The Xen disk driver's data path (`xen/include/public/io/blkif.h`). What it agrees on with the backend is
//! in [`super::blkfront_xs`].
//!
//! Requests of up to 11 pages are direct, longer ones put their segments in an indirect page. With persistent
//! grants, data is copied through pages that stay granted; without, the caller's own pages are granted for
//! the time of the request, and the grants end before the buffer goes back.

use alloc::collections::VecDeque;
use alloc::vec::Vec;
use core::fmt;

use janus_proto::abi::xen_io::blkif::{
    BLKIF_MAX_SEGMENTS_PER_REQUEST, BlkifOp, BlkifRequest, BlkifRequestDiscard,
    BlkifRequestIndirect, BlkifResponse, BlkifSegment, BlkifStatus, SLOT_WORDS,
};
use janus_proto::addr::{DomId, GrantRef, PAGE_SIZE, Port};
use janus_proto::ring::Front;
use zerocopy::IntoBytes;

use super::blkfront_xs::{Details, FlushMode, Offer, publication};
use super::grants::{EventChannel, GrantedBuf, GrantedFrames, Grave};
use super::nodes::Publication;
use crate::class::{
    BlockDevice, BlockFeatures, BlockOp, BlockStatus, Completion, Geometry, PeerError, SECTOR_SIZE,
    SubmitError,
};
use crate::dma::DmaBuf;
use crate::hal::{GrantAccess, HalError, XenHal};

/// Pages that stay granted at most. Linux's backend keeps 1056 mapped (`max_persistent_grants`, indirect pages
/// included) and unmaps those beyond in a way that costs more than it saves.
const PERSISTENT_PAGES: usize = 960;

const SECTORS_PER_PAGE: u8 = 8;
const _: () = assert!(SECTORS_PER_PAGE as usize * SECTOR_SIZE == PAGE_SIZE);

/// A ring that is published and waits for its backend.
pub struct Setup {
    hal: &'static dyn XenHal,
    peer: DomId,
    ring: Front<GrantedFrames, SLOT_WORDS>,
    refs: Vec<GrantRef>,
    channel: EventChannel,
}

impl fmt::Debug for Setup {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Setup({:?}, {:?})", self.refs, self.channel)
    }
}

impl Setup {
    /// Makes a ring and an event channel for backend domain `peer`.
    ///
    /// # Errors
    /// [`HalError`].
    pub fn new(hal: &'static dyn XenHal, peer: DomId, offer: Offer) -> Result<Self, HalError> {
        let ring = GrantedFrames::new(hal, peer, 1 << offer.ring_order)?;
        let refs = ring.refs().to_vec();
        let ring = Front::new(ring).map_err(|_| HalError::NoMemory)?;
        Ok(Self { hal, peer, ring, refs, channel: EventChannel::new(hal, peer)? })
    }

    /// The nodes to write.
    #[must_use]
    pub fn publication(&self) -> Publication {
        publication(&self.refs, self.channel.port())
    }

    /// The port on which completions are announced.
    #[must_use]
    pub fn port(&self) -> Port {
        self.channel.port()
    }

    /// Puts ring and channel aside, because the backend may still use them.
    pub fn bury(self, grave: &Grave) {
        grave.put((self.ring.into_memory(), self.channel));
    }

    /// The driver, when the backend is connected. `handle` is the number of the virtual device; `grave`
    /// gets what the driver leaves behind.
    #[must_use]
    pub fn connect(self, details: Details, handle: u16, grave: Grave) -> Blkfront {
        let slots = u16::try_from(self.ring.slots()).unwrap_or(u16::MAX);
        let direct = u16::try_from(BLKIF_MAX_SEGMENTS_PER_REQUEST).unwrap_or(u16::MAX);
        let segments = details.indirect_segments.max(direct);
        Blkfront {
            hal: self.hal,
            peer: self.peer,
            ring: Some(self.ring),
            channel: Some(self.channel),
            handle,
            details,
            geometry: details.geometry(segments, slots),
            slots: (0..slots).map(|_| Slot::default()).collect(),
            free: (0..slots).rev().collect(),
            pool: Vec::new(),
            pool_made: 0,
            early: VecDeque::new(),
            broken: None,
            drain_from: 0,
            grave,
        }
    }
}

/// The memory of a request while the backend has it.
#[derive(Debug)]
enum Data {
    /// Flush, discard.
    None,
    /// The caller's pages, granted.
    Granted(GrantedBuf),
    /// Pages of the pool, and the caller's buffer, which the backend never sees.
    Bounced { pages: Vec<GrantedFrames>, buf: DmaBuf, fill: Option<usize> },
}

#[derive(Debug)]
struct InFlight {
    /// The caller's.
    id: u64,
    data: Data,
}

#[derive(Debug, Default)]
struct Slot {
    /// Part of the id on the ring, so that a response to a former request is seen as what it is.
    generation: u32,
    request: Option<InFlight>,
    /// The page of segments, once the slot has needed one. It stays granted.
    indirect: Option<GrantedFrames>,
}

/// The driver of a connected disk.
pub struct Blkfront {
    hal: &'static dyn XenHal,
    peer: DomId,
    /// `Some` until dropped, as is `channel`.
    ring: Option<Front<GrantedFrames, SLOT_WORDS>>,
    channel: Option<EventChannel>,
    handle: u16,
    details: Details,
    geometry: Geometry,
    slots: Vec<Slot>,
    free: Vec<u16>,
    /// Pages that stay granted and are not in use.
    pool: Vec<GrantedFrames>,
    /// Pages of the pool, in use or not.
    pool_made: usize,
    /// Requests that ended without the backend.
    early: VecDeque<Completion>,
    broken: Option<PeerError>,
    /// Where draining goes on, once broken.
    drain_from: usize,
    grave: Grave,
}

impl Blkfront {
    /// What was negotiated.
    #[must_use]
    pub fn details(&self) -> &Details {
        &self.details
    }

    /// Pages granted for good.
    #[must_use]
    pub fn persistent_pages(&self) -> usize {
        self.pool_made
    }

    /// Is of no more use, because another ring of the same disk is broken.
    pub(super) fn give_up(&mut self, error: PeerError) {
        self.broken.get_or_insert(error);
    }

    fn in_flight(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    fn within(&self, sector: u64, sectors: u64) -> bool {
        let unit = u64::from(self.geometry.block_size) / SECTOR_SIZE as u64;
        let end = sector.checked_add(sectors);
        sectors != 0
            && sector.is_multiple_of(unit)
            && sectors.is_multiple_of(unit)
            && end.is_some_and(|end| end <= self.geometry.sectors)
    }

    fn is_valid(&self, op: &BlockOp) -> bool {
        let features = self.geometry.features;
        let data = |sector, len: usize, buf: &DmaBuf| {
            len <= buf.len()
                && len <= self.geometry.max_request as usize
                && len.is_multiple_of(SECTOR_SIZE)
                && self.within(sector, (len / SECTOR_SIZE) as u64)
        };
        match op {
            BlockOp::Read { sector, len, buf } => data(*sector, *len, buf),
            BlockOp::Write { sector, len, buf } => {
                features.contains(BlockFeatures::WRITE) && data(*sector, *len, buf)
            }
            BlockOp::Flush => features.contains(BlockFeatures::FLUSH),
            BlockOp::Discard { sector, sectors } => {
                features.contains(BlockFeatures::DISCARD) && self.within(*sector, *sectors)
            }
            BlockOp::WriteZeroes { .. } => false,
        }
    }

    /// The whole units of a discard; a part of a unit cannot be discarded and keeps its contents.
    fn discard_units(&self, sector: u64, sectors: u64) -> Option<(u64, u64)> {
        let limits = self.details.discard?;
        let up = |at: u64| {
            let past = at.saturating_sub(limits.alignment);
            past.checked_next_multiple_of(limits.granularity)?.checked_add(limits.alignment)
        };
        let start = up(sector)?;
        let end = up(sector.checked_add(sectors)?.checked_sub(limits.granularity - 1)?)?;
        (start >= sector && end > start).then(|| (start, end - start))
    }

    /// Pages of the pool for a request, or none of them.
    fn take_pages(&mut self, count: usize) -> Option<Vec<GrantedFrames>> {
        while self.pool.len() < count && self.pool_made < PERSISTENT_PAGES {
            match GrantedFrames::new(self.hal, self.peer, 1) {
                Ok(page) => self.pool.push(page),
                Err(_) => break,
            }
            self.pool_made += 1;
        }
        let rest = self.pool.len().checked_sub(count)?;
        Some(self.pool.split_off(rest))
    }

    /// Gives memory of a request to the backend; the buffer comes back if that is not possible now.
    fn lend(
        &mut self,
        buf: DmaBuf,
        len: usize,
        access: GrantAccess,
    ) -> Result<Data, Option<DmaBuf>> {
        if !self.details.persistent {
            let granted = GrantedBuf::new(self.hal, self.peer, buf, len, access);
            return granted.map(Data::Granted).map_err(|(_, buf)| buf);
        }
        let Some(pages) = self.take_pages(len.div_ceil(PAGE_SIZE)) else {
            return Err(Some(buf));
        };
        let fill = match access {
            GrantAccess::ReadWrite => Some(len),
            GrantAccess::ReadOnly => {
                let data = buf.get(..len).unwrap_or(&[]);
                for (page, data) in pages.iter().zip(data.chunks(PAGE_SIZE)) {
                    page.frames().copy_in(0, data);
                }
                None
            }
        };
        Ok(Data::Bounced { pages, buf, fill })
    }

    /// Takes the memory of a request back; `ok`: what the backend read is there.
    fn take_back(&mut self, data: Data, ok: bool) -> Option<DmaBuf> {
        match data {
            Data::None => None,
            Data::Granted(granted) => granted.reclaim(),
            Data::Bounced { pages, mut buf, fill } => {
                if ok && let Some(len) = fill {
                    let target = buf.get_mut(..len).unwrap_or(&mut []);
                    for (page, target) in pages.iter().zip(target.chunks_mut(PAGE_SIZE)) {
                        page.frames().copy_out(0, target);
                    }
                }
                self.pool.extend(pages);
                Some(buf)
            }
        }
    }

    fn push_data(
        &mut self,
        slot: u16,
        op: BlkifOp,
        sector: u64,
        len: usize,
    ) -> Result<(), HalError> {
        let wire = self.wire_id(slot);
        let Some(entry) = self.slots.get_mut(usize::from(slot)) else {
            return Err(HalError::NoMemory);
        };
        let data = entry.request.as_ref().map(|request| &request.data);
        let refs = |index: usize| -> GrantRef {
            match data {
                Some(Data::Granted(granted)) => granted.refs().get(index).copied(),
                Some(Data::Bounced { pages, .. }) => {
                    pages.get(index).and_then(|page| page.refs().first().copied())
                }
                _ => None,
            }
            .unwrap_or(GrantRef(0))
        };
        let segment = |index: usize| {
            let sectors = (len - index * PAGE_SIZE).min(PAGE_SIZE) / SECTOR_SIZE;
            let last_sect = u8::try_from(sectors).unwrap_or(SECTORS_PER_PAGE) - 1;
            BlkifSegment { gref: refs(index), first_sect: 0, last_sect, pad0: [0; 2] }
        };
        let count = len.div_ceil(PAGE_SIZE);
        let Some(ring) = &mut self.ring else { return Err(HalError::NoMemory) };
        if count <= BLKIF_MAX_SEGMENTS_PER_REQUEST {
            let none =
                BlkifSegment { gref: GrantRef(0), first_sect: 0, last_sect: 0, pad0: [0; 2] };
            let mut request = BlkifRequest {
                operation: op,
                nr_segments: u8::try_from(count).unwrap_or(0),
                handle: self.handle,
                pad0: [0; 4],
                id: wire,
                sector_number: sector,
                seg: [none; BLKIF_MAX_SEGMENTS_PER_REQUEST],
            };
            for (index, place) in request.seg.iter_mut().take(count).enumerate() {
                *place = segment(index);
            }
            return ring.push(&request).map(drop).map_err(|_| HalError::NoMemory);
        }
        let page = match &mut entry.indirect {
            Some(page) => page,
            empty => empty.insert(GrantedFrames::new(self.hal, self.peer, 1)?),
        };
        for index in 0..count {
            page.frames().copy_in(index * size_of::<BlkifSegment>(), segment(index).as_bytes());
        }
        let mut indirect_grefs = [GrantRef(0); 8];
        if let ([first, ..], Some(gref)) = (&mut indirect_grefs, page.refs().first()) {
            *first = *gref;
        }
        let request = BlkifRequestIndirect {
            operation: BlkifOp::INDIRECT,
            indirect_op: op,
            nr_segments: u16::try_from(count).unwrap_or(0),
            pad0: [0; 4],
            id: wire,
            sector_number: sector,
            handle: self.handle,
            pad1: [0; 2],
            indirect_grefs,
            pad2: [0; 4],
        };
        ring.push(&request).map(drop).map_err(|_| HalError::NoMemory)
    }

    fn wire_id(&self, slot: u16) -> u64 {
        let generation = self.slots.get(usize::from(slot)).map_or(0, |slot| slot.generation);
        u64::from(generation) << 16 | u64::from(slot)
    }

    /// Puts a request on the ring. There is a free slot.
    fn start(&mut self, id: u64, op: BlockOp) -> Result<(), SubmitError> {
        let (operation, sector, len, buf) = match op {
            BlockOp::Read { sector, len, buf } => (BlkifOp::READ, sector, len, buf),
            BlockOp::Write { sector, len, buf } => (BlkifOp::WRITE, sector, len, buf),
            other => return self.start_without_data(id, other),
        };
        let reading = operation == BlkifOp::READ;
        let access = if reading { GrantAccess::ReadWrite } else { GrantAccess::ReadOnly };
        let back = |buf| {
            if reading {
                BlockOp::Read { sector, len, buf }
            } else {
                BlockOp::Write { sector, len, buf }
            }
        };
        let data = match self.lend(buf, len, access) {
            Ok(data) => data,
            // Pages or grants come free when a request ends; if none is under way, none ever will.
            Err(Some(buf)) if self.in_flight() > 0 => return Err(SubmitError::Busy(back(buf))),
            Err(buf) => {
                self.early.push_back(Completion { id, status: BlockStatus::IoError, buf });
                return Ok(());
            }
        };
        let Some(slot) = self.occupy(InFlight { id, data }) else {
            // `submit` saw a free slot.
            return Ok(());
        };
        if self.push_data(slot, operation, sector, len).is_ok() {
            return Ok(());
        }
        // No page for the segments. Nothing has reached the ring.
        let request = self.vacate(slot);
        let buf = request.and_then(|request| self.take_back(request.data, false));
        match buf {
            Some(buf) if self.in_flight() > 0 => Err(SubmitError::Busy(back(buf))),
            buf => {
                self.early.push_back(Completion { id, status: BlockStatus::IoError, buf });
                Ok(())
            }
        }
    }

    fn start_without_data(&mut self, id: u64, op: BlockOp) -> Result<(), SubmitError> {
        let discard = match op {
            BlockOp::Discard { sector, sectors } => match self.discard_units(sector, sectors) {
                Some(range) => Some(range),
                None => {
                    self.early.push_back(Completion { id, status: BlockStatus::Ok, buf: None });
                    return Ok(());
                }
            },
            _ => None,
        };
        let Some(slot) = self.occupy(InFlight { id, data: Data::None }) else {
            return Err(SubmitError::Busy(op));
        };
        let wire = self.wire_id(slot);
        let (handle, flush) = (self.handle, self.details.flush);
        let Some(ring) = &mut self.ring else { return Err(SubmitError::Gone(op)) };
        let pushed = if let Some((sector_number, nr_sectors)) = discard {
            ring.push(&BlkifRequestDiscard {
                operation: BlkifOp::DISCARD,
                flag: 0,
                handle,
                pad0: [0; 4],
                id: wire,
                sector_number,
                nr_sectors,
            })
        } else {
            let none =
                BlkifSegment { gref: GrantRef(0), first_sect: 0, last_sect: 0, pad0: [0; 2] };
            let barrier = flush == FlushMode::Barrier;
            ring.push(&BlkifRequest {
                operation: if barrier { BlkifOp::WRITE_BARRIER } else { BlkifOp::FLUSH_DISKCACHE },
                nr_segments: 0,
                handle,
                pad0: [0; 4],
                id: wire,
                sector_number: 0,
                seg: [none; BLKIF_MAX_SEGMENTS_PER_REQUEST],
            })
        };
        if pushed.is_err() {
            drop(self.vacate(slot));
            return Err(SubmitError::Busy(op));
        }
        Ok(())
    }

    fn occupy(&mut self, request: InFlight) -> Option<u16> {
        let slot = self.free.pop()?;
        let entry = self.slots.get_mut(usize::from(slot))?;
        entry.generation = entry.generation.wrapping_add(1);
        entry.request = Some(request);
        Some(slot)
    }

    fn vacate(&mut self, slot: u16) -> Option<InFlight> {
        let request = self.slots.get_mut(usize::from(slot))?.request.take()?;
        self.free.push(slot);
        Some(request)
    }

    fn finish(&mut self, response: BlkifResponse) -> Result<Completion, PeerError> {
        let slot = u16::try_from(response.id & 0xffff).unwrap_or(u16::MAX);
        let known = usize::from(slot) < self.slots.len() && self.wire_id(slot) == response.id;
        let request = if known { self.vacate(slot) } else { None };
        let Some(request) = request else {
            return Err(PeerError("a response to no request of this disk"));
        };
        let status = match response.status {
            BlkifStatus::OKAY => BlockStatus::Ok,
            BlkifStatus::EOPNOTSUPP => BlockStatus::Unsupported,
            _ => BlockStatus::IoError,
        };
        let buf = self.take_back(request.data, status == BlockStatus::Ok);
        Ok(Completion { id: request.id, status, buf })
    }

    /// After the backend broke the protocol: ends what is outstanding, one by one.
    fn drain(&mut self) -> Option<Completion> {
        if let Some(completion) = self.early.pop_front() {
            return Some(completion);
        }
        while let Ok(slot) = u16::try_from(self.drain_from)
            && self.drain_from < self.slots.len()
        {
            self.drain_from += 1;
            if let Some(request) = self.vacate(slot) {
                let buf = self.take_back(request.data, false);
                return Some(Completion { id: request.id, status: BlockStatus::IoError, buf });
            }
        }
        None
    }
}

impl BlockDevice for Blkfront {
    fn geometry(&self) -> Geometry {
        self.geometry
    }

    fn submit(&mut self, id: u64, op: BlockOp) -> Result<(), SubmitError> {
        if self.broken.is_some() {
            return Err(SubmitError::Gone(op));
        }
        if !self.is_valid(&op) {
            return Err(SubmitError::Invalid(op));
        }
        if self.free.is_empty() {
            return Err(SubmitError::Busy(op));
        }
        self.start(id, op)
    }

    fn kick(&mut self) {
        if let (Some(ring), Some(channel)) = (&mut self.ring, &self.channel)
            && ring.publish()
        {
            channel.notify();
        }
    }

    fn complete(&mut self) -> Result<Option<Completion>, PeerError> {
        if self.broken.is_some() {
            return Ok(self.drain());
        }
        if let Some(completion) = self.early.pop_front() {
            return Ok(Some(completion));
        }
        let Some(ring) = &mut self.ring else { return Ok(None) };
        let result = match ring.pop::<BlkifResponse>() {
            Ok(None) => return Ok(None),
            Ok(Some(response)) => self.finish(response),
            Err(error) => Err(PeerError(error.message())),
        };
        match result {
            Ok(completion) => Ok(Some(completion)),
            Err(error) => {
                self.broken = Some(error);
                Err(error)
            }
        }
    }

    fn arm(&mut self) -> bool {
        if self.broken.is_some() {
            return self.in_flight() > 0 || !self.early.is_empty();
        }
        let more = self.ring.as_mut().is_some_and(Front::final_check_for_responses);
        more || !self.early.is_empty()
    }
}

impl Drop for Blkfront {
    /// Leaves everything that the backend may still use to the grave, which the bus empties when the backend
    /// has let go.
    fn drop(&mut self) {
        let ring = self.ring.take().map(Front::into_memory);
        let slots = core::mem::take(&mut self.slots);
        let pool = core::mem::take(&mut self.pool);
        self.grave.put((ring, self.channel.take(), slots, pool));
    }
}

impl fmt::Debug for Blkfront {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Blkfront(handle {}, {} in flight)", self.handle, self.in_flight())
    }
}

#[cfg(test)]
mod tests;

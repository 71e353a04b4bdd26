//! The back half of a Xen disk (`xen/include/public/io/blkif.h`).
//!
//! [`Blkback`] has the data path: requests are copied once, checked against the disk and the grants, and answered
//! in order. Which nodes to write and read in xenstore is in [`nodes`](Blkback::offer) and [`Frontend`].

use std::fmt;

use janus_proto::abi::xen_io::blkif::{
    BLKIF_MAX_INDIRECT_PAGES_PER_REQUEST, BLKIF_MAX_SEGMENTS_PER_REQUEST, BlkifOp, BlkifRequest,
    BlkifRequestDiscard, BlkifRequestIndirect, BlkifResponse, BlkifSegment, BlkifStatus,
    SEGMENTS_PER_INDIRECT_PAGE, SLOT_WORDS, VdiskInfo,
};
use janus_proto::addr::{GrantRef, Port};
use janus_proto::grant::Access;
use janus_proto::ring::{Back, RingError};
use zerocopy::{FromZeros as _, IntoBytes as _, transmute};

use crate::memory::{BadNode, FrontendNodes, GrantMapper, MapError, Piece, copy_out};
use crate::storage::{BlockBackend, SECTOR};

/// Pages kept mapped at most, as Linux's backend: more are mapped for each request.
const PERSISTENT_MAX: usize = 1056;
/// References beyond this are not kept; a guest's table has 64 frames of 512 (`max_grant_frames`).
const PERSISTENT_REFERENCES: u32 = 64 * 512;
/// Sectors in a page.
const SECTORS_PER_PAGE: u8 = 8;

/// What a backend offers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlkbackFeatures {
    /// `log2` of the ring's pages at most.
    pub max_ring_page_order: u32,
    /// Segments of an indirect request; 0: none are taken.
    pub max_indirect_segments: u16,
    /// Flush requests.
    pub flush_cache: bool,
    /// Barrier requests.
    pub barrier: bool,
    /// Discard requests.
    pub discard: bool,
    /// Pages stay mapped.
    pub persistent: bool,
    /// Rings that one disk may have.
    pub max_queues: u32,
}

impl Default for BlkbackFeatures {
    fn default() -> Self {
        Self {
            max_ring_page_order: 4,
            max_indirect_segments: 256,
            flush_cache: true,
            barrier: true,
            discard: true,
            persistent: true,
            max_queues: 4,
        }
    }
}

/// What the frontend published.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frontend {
    /// Pages of the ring, in order.
    pub ring: Vec<GrantRef>,
    /// Where to notify it.
    pub port: Port,
    /// It keeps grants too.
    pub persistent: bool,
}

impl Frontend {
    /// Reads the directory of a frontend with one ring through `read`.
    ///
    /// # Errors
    /// A node is missing or nonsense, or the ring is larger than offered.
    pub fn read(
        read: &dyn Fn(&str) -> Option<String>,
        offered: BlkbackFeatures,
    ) -> Result<Self, BadNode> {
        let nodes = FrontendNodes(read);
        let order = Self::common(&nodes, offered)?;
        Self::queue(&nodes, "", order)
    }

    /// Reads the directory of a frontend with any number of rings through `read`.
    ///
    /// # Errors
    /// A node is missing or nonsense, or there are more or larger rings than offered.
    pub fn read_all(
        read: &dyn Fn(&str) -> Option<String>,
        offered: BlkbackFeatures,
    ) -> Result<Vec<Self>, BadNode> {
        let nodes = FrontendNodes(read);
        let order = Self::common(&nodes, offered)?;
        match nodes.optional::<u32>("multi-queue-num-queues")? {
            None | Some(1) => Ok(vec![Self::queue(&nodes, "", order)?]),
            Some(count) if count == 0 || count > offered.max_queues => {
                Err(BadNode("multi-queue-num-queues"))
            }
            Some(count) => (0..count)
                .map(|queue| Self::queue(&nodes, &format!("queue-{queue}/"), order))
                .collect(),
        }
    }

    /// What holds for all rings: checks the layout, and answers `ring-page-order`.
    fn common(nodes: &FrontendNodes<'_>, offered: BlkbackFeatures) -> Result<Option<u32>, BadNode> {
        if (nodes.0)("protocol").is_some_and(|protocol| protocol != "x86_64-abi") {
            return Err(BadNode("protocol"));
        }
        let order = nodes.optional::<u32>("ring-page-order")?;
        if order.is_some_and(|order| order > offered.max_ring_page_order || order > 8) {
            return Err(BadNode("ring-page-order"));
        }
        Ok(order)
    }

    fn queue(nodes: &FrontendNodes<'_>, prefix: &str, order: Option<u32>) -> Result<Self, BadNode> {
        let node = |name: &str| (nodes.0)(&format!("{prefix}{name}"));
        let number = |name: &str| node(name)?.parse::<u32>().ok();
        let ring = match order {
            None => vec![GrantRef(number("ring-ref").ok_or(BadNode("ring-ref"))?)],
            Some(order) => {
                let page = |index: u32| number(&format!("ring-ref{index}"));
                let pages: Option<Vec<u32>> = (0..1 << order).map(page).collect();
                // Linux writes `ring-ref` when the order is 0.
                let pages =
                    pages.or_else(|| Some(vec![number("ring-ref")?]).filter(|_| order == 0));
                pages.ok_or(BadNode("ring-ref*"))?.into_iter().map(GrantRef).collect()
            }
        };
        let port = Port(number("event-channel").ok_or(BadNode("event-channel"))?);
        Ok(Self { ring, port, persistent: nodes.feature("feature-persistent") })
    }
}

/// The connection is of no more use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BlkbackError {
    /// The frontend broke the ring.
    Ring(RingError),
    /// The ring cannot be mapped.
    Map(MapError),
}

impl fmt::Display for BlkbackError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ring(error) => error.fmt(f),
            Self::Map(error) => error.fmt(f),
        }
    }
}

/// What went through, for reports and tests.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BlkbackCounters {
    /// Requests answered.
    pub requests: u64,
    /// Of these, refused or failed.
    pub errors: u64,
    /// Of these, with indirect segments.
    pub indirect: u64,
    /// Bytes read from the disk.
    pub bytes_read: u64,
    /// Bytes written to it.
    pub bytes_written: u64,
}

/// A connected disk.
pub struct Blkback<G: GrantMapper, B> {
    ring: Back<G::Mapping, SLOT_WORDS>,
    mapper: G,
    /// The disk itself.
    pub disk: B,
    features: BlkbackFeatures,
    kept: Kept<G::Mapping>,
    counters: BlkbackCounters,
    /// Pages of the request under way that are not kept.
    own: Vec<G::Mapping>,
}

/// Pages that stay mapped, by their references.
struct Kept<M> {
    pages: Vec<Option<M>>,
    /// How many more there may be.
    room: usize,
}

impl<M> Kept<M> {
    fn new(room: usize) -> Self {
        Self { pages: Vec::new(), room }
    }

    fn get(&self, grant: GrantRef) -> Option<&M> {
        self.pages.get(grant.0 as usize)?.as_ref()
    }

    fn has_room(&self, grant: GrantRef) -> bool {
        self.room > 0 && grant.0 < PERSISTENT_REFERENCES
    }

    fn put(&mut self, grant: GrantRef, page: M) {
        let index = grant.0 as usize;
        if self.pages.len() <= index {
            self.pages.resize_with(index + 1, || None);
        }
        if let Some(place) = self.pages.get_mut(index) {
            *place = Some(page);
            self.room = self.room.saturating_sub(1);
        }
    }
}

impl<G: GrantMapper, B: fmt::Debug> fmt::Debug for Blkback<G, B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Blkback")
            .field("disk", &self.disk)
            .field("features", &self.features)
            .field("counters", &self.counters)
            .finish_non_exhaustive()
    }
}

/// Nodes of the backend's directory to write before a frontend connects.
#[must_use]
pub fn offer_nodes(features: BlkbackFeatures) -> Vec<(&'static str, String)> {
    let mut nodes = vec![("max-ring-page-order", features.max_ring_page_order.to_string())];
    if features.max_queues > 1 {
        nodes.push(("multi-queue-max-queues", features.max_queues.to_string()));
    }
    nodes
}

/// Nodes of the backend's directory to write before it goes to Connected.
#[must_use]
pub fn detail_nodes(
    features: BlkbackFeatures,
    disk: &dyn BlockBackend,
) -> Vec<(&'static str, String)> {
    let flag = |on: bool| u8::from(on).to_string();
    let info = if disk.is_read_only() { VdiskInfo::READONLY.bits() } else { 0 };
    let mut nodes = vec![
        ("sectors", disk.sectors().to_string()),
        ("sector-size", SECTOR.to_string()),
        ("physical-sector-size", SECTOR.to_string()),
        ("info", info.to_string()),
        ("feature-flush-cache", flag(features.flush_cache)),
        ("feature-barrier", flag(features.barrier)),
        ("feature-discard", flag(features.discard)),
        ("feature-persistent", flag(features.persistent)),
    ];
    if features.max_indirect_segments > 0 {
        nodes.push(("feature-max-indirect-segments", features.max_indirect_segments.to_string()));
    }
    nodes
}

impl<G: GrantMapper, B: BlockBackend> Blkback<G, B> {
    /// Connects to a frontend that published its ring.
    ///
    /// # Errors
    /// The ring cannot be mapped, or is nonsense; the disk comes back.
    pub fn connect(
        mapper: G,
        disk: B,
        features: BlkbackFeatures,
        frontend: &Frontend,
    ) -> Result<Self, (BlkbackError, B)> {
        let memory = mapper.map(&frontend.ring, Access::ReadWrite).map_err(BlkbackError::Map);
        let ring = memory.and_then(|memory| Back::attach(memory).map_err(BlkbackError::Ring));
        let ring = match ring {
            Ok(ring) => ring,
            Err(error) => return Err((error, disk)),
        };
        let persistent = features.persistent && frontend.persistent;
        let kept = Kept::new(if persistent { PERSISTENT_MAX } else { 0 });
        let (counters, own) = (BlkbackCounters::default(), Vec::new());
        Ok(Self { ring, mapper, disk, features, kept, counters, own })
    }

    /// What went through so far.
    #[must_use]
    pub fn counters(&self) -> BlkbackCounters {
        self.counters
    }

    /// Disconnects and gives the disk back; everything is unmapped.
    pub fn disconnect(self) -> B {
        self.disk
    }

    /// Does everything that is on the ring; `true`: notify the frontend.
    ///
    /// # Errors
    /// The frontend broke the ring: disconnect.
    pub fn serve(&mut self) -> Result<bool, BlkbackError> {
        let mut notify = false;
        loop {
            let mut next = self.pop()?;
            while let Some(slot) = next {
                // The disk hears of a request while the one before is done.
                next = self.pop()?;
                if let Some(slot) = &next {
                    self.hint(slot);
                }
                self.answer(&slot, &mut notify)?;
            }
            if !self.ring.final_check_for_requests() {
                return Ok(notify);
            }
        }
    }

    fn pop(&mut self) -> Result<Option<[u32; SLOT_WORDS]>, BlkbackError> {
        self.ring.pop().map_err(BlkbackError::Ring)
    }

    fn hint(&self, slot: &[u32; SLOT_WORDS]) {
        let request: BlkifRequest = transmute!(*slot);
        if request.operation == BlkifOp::READ && request.sector_number < self.disk.sectors() {
            self.disk.hint(request.sector_number);
        }
    }

    /// Does at most one request; `false`: there was none.
    ///
    /// # Errors
    /// As [`Self::serve`].
    pub fn serve_one(&mut self, notify: &mut bool) -> Result<bool, BlkbackError> {
        let Some(slot) = self.pop()? else { return Ok(false) };
        self.answer(&slot, notify)?;
        Ok(true)
    }

    fn answer(&mut self, slot: &[u32; SLOT_WORDS], notify: &mut bool) -> Result<(), BlkbackError> {
        let request: BlkifRequest = transmute!(*slot);
        let (operation, id, status) = match request.operation {
            BlkifOp::INDIRECT => {
                let request: BlkifRequestIndirect = prefix(slot);
                self.counters.indirect += 1;
                (request.indirect_op, request.id, self.indirect(&request))
            }
            BlkifOp::DISCARD => {
                let request: BlkifRequestDiscard = prefix(slot);
                (request.operation, request.id, self.discard(&request))
            }
            operation => (operation, request.id, self.direct(&request)),
        };
        self.counters.requests += 1;
        self.counters.errors += u64::from(status != BlkifStatus::OKAY);
        let response = BlkifResponse { id, operation, status, ..BlkifResponse::new_zeroed() };
        self.ring.push(&response).map_err(BlkbackError::Ring)?;
        *notify |= self.ring.publish();
        Ok(())
    }

    fn direct(&mut self, request: &BlkifRequest) -> BlkifStatus {
        let count = usize::from(request.nr_segments);
        let Some(segments) = request.seg.get(..count.min(BLKIF_MAX_SEGMENTS_PER_REQUEST)) else {
            return BlkifStatus::ERROR;
        };
        if count > segments.len() {
            return BlkifStatus::ERROR;
        }
        match request.operation {
            BlkifOp::READ | BlkifOp::WRITE => {
                self.transfer(request.operation, request.sector_number, segments)
            }
            BlkifOp::FLUSH_DISKCACHE if self.features.flush_cache => status(self.disk.flush()),
            BlkifOp::WRITE_BARRIER if self.features.barrier => {
                if self.disk.flush().is_err() {
                    return BlkifStatus::ERROR;
                }
                if segments.is_empty() {
                    return BlkifStatus::OKAY;
                }
                match self.transfer(BlkifOp::WRITE, request.sector_number, segments) {
                    BlkifStatus::OKAY => status(self.disk.flush()),
                    failed => failed,
                }
            }
            _ => BlkifStatus::EOPNOTSUPP,
        }
    }

    fn indirect(&mut self, request: &BlkifRequestIndirect) -> BlkifStatus {
        if self.features.max_indirect_segments == 0 {
            return BlkifStatus::EOPNOTSUPP;
        }
        let count = usize::from(request.nr_segments);
        let pages = count.div_ceil(SEGMENTS_PER_INDIRECT_PAGE);
        if request.nr_segments > self.features.max_indirect_segments
            || pages > BLKIF_MAX_INDIRECT_PAGES_PER_REQUEST
            || !matches!(request.indirect_op, BlkifOp::READ | BlkifOp::WRITE)
        {
            return BlkifStatus::ERROR;
        }
        let mut segments = vec![BlkifSegment::new_zeroed(); count];
        let grants = request.indirect_grefs.iter().take(pages);
        for (grant, part) in grants.zip(segments.chunks_mut(SEGMENTS_PER_INDIRECT_PAGE)) {
            let copied = self.mapper.map(&[*grant], Access::ReadOnly);
            if !copied.is_ok_and(|page| copy_out(&page, 0, part.as_mut_bytes())) {
                return BlkifStatus::ERROR;
            }
        }
        self.transfer(request.indirect_op, request.sector_number, &segments)
    }

    /// Reads or writes the segments, all checked before the first byte moves.
    fn transfer(
        &mut self,
        operation: BlkifOp,
        start: u64,
        segments: &[BlkifSegment],
    ) -> BlkifStatus {
        let fits = |s: &BlkifSegment| s.first_sect <= s.last_sect && s.last_sect < SECTORS_PER_PAGE;
        let sectors: u64 = segments.iter().map(length).sum();
        let end = start.checked_add(sectors);
        let write = operation == BlkifOp::WRITE;
        if segments.is_empty()
            || !segments.iter().all(fits)
            || end.is_none_or(|end| end > self.disk.sectors())
            || (write && self.disk.is_read_only())
        {
            return BlkifStatus::ERROR;
        }
        if self.map(operation, segments).is_none() {
            return BlkifStatus::ERROR;
        }
        // One call of the medium for the whole request, however its pages are scattered.
        let Self { kept, own, disk, .. } = self;
        let mut fresh = own.iter();
        let piece = |segment: &BlkifSegment| {
            let page = kept.get(segment.gref).or_else(|| fresh.next())?;
            let len = usize::try_from(length(segment)).ok()? * SECTOR;
            Piece::new(page, usize::from(segment.first_sect) * SECTOR, len)
        };
        let pieces: Option<Vec<Piece<'_>>> = segments.iter().map(piece).collect();
        let done = pieces.is_some_and(|pieces| {
            let done = match write {
                true => disk.write_pieces(start, &pieces),
                false => disk.read_pieces(start, &pieces),
            };
            done.is_ok()
        });
        // The grants end before the frontend hears that it may have its pages back.
        own.clear();
        if !done {
            return BlkifStatus::ERROR;
        }
        let bytes = sectors * SECTOR as u64;
        match write {
            true => self.counters.bytes_written += bytes,
            false => self.counters.bytes_read += bytes,
        }
        BlkifStatus::OKAY
    }

    /// Maps the pages of a request that are not kept; those that cannot be are in `own`, in order.
    fn map(&mut self, operation: BlkifOp, segments: &[BlkifSegment]) -> Option<()> {
        self.own.clear();
        for segment in segments {
            if self.kept.get(segment.gref).is_some() {
                continue;
            }
            // What is kept is for both directions, so that the next use may be the other one.
            let keep = self.kept.has_room(segment.gref);
            let access = if keep || operation == BlkifOp::READ {
                Access::ReadWrite
            } else {
                Access::ReadOnly
            };
            let Ok(page) = self.mapper.map(&[segment.gref], access) else {
                self.own.clear();
                return None;
            };
            if keep {
                self.kept.put(segment.gref, page);
            } else {
                self.own.push(page);
            }
        }
        Some(())
    }

    fn discard(&mut self, request: &BlkifRequestDiscard) -> BlkifStatus {
        if !self.features.discard {
            return BlkifStatus::EOPNOTSUPP;
        }
        let end = request.sector_number.checked_add(request.nr_sectors);
        if self.disk.is_read_only() || end.is_none_or(|end| end > self.disk.sectors()) {
            return BlkifStatus::ERROR;
        }
        status(self.disk.discard(request.sector_number, request.nr_sectors))
    }
}

fn length(segment: &BlkifSegment) -> u64 {
    // Called for unchecked segments too: a wrong one is refused later.
    u64::from(segment.last_sect).saturating_sub(u64::from(segment.first_sect)) + 1
}

fn status(result: std::io::Result<()>) -> BlkifStatus {
    if result.is_ok() { BlkifStatus::OKAY } else { BlkifStatus::ERROR }
}

/// Another layout of the same slot, which is at least as long.
fn prefix<T: zerocopy::FromBytes>(slot: &[u32; SLOT_WORDS]) -> T {
    const { assert!(size_of::<T>() <= SLOT_WORDS * 4) }
    T::read_from_prefix(slot.as_bytes()).map_or_else(|_| T::new_zeroed(), |(value, _)| value)
}

#[cfg(test)]
mod tests;

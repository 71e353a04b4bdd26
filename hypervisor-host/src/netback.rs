//! The back half of a Xen network card (`xen/include/public/io/netif.h`): receive by copy, scatter-gather,
//! checksum and segmentation flags, one or two event channels, multicast control.
//!
//! [`Netback`] is the data path of one pair of rings. A card may have several: [`CardNet`] shares a network out between
//! them, as the control ring ([`Control`]) says.

pub(crate) mod checksum;

use std::collections::VecDeque;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use janus_proto::abi::xen_io::netif::{
    EXTRA_FLAG_MORE, ExtraType, GsoType, HashAlgorithm, MAX_TX_SIZE, NR_SLOTS_MIN, NetExtraHash,
    NetExtraInfo, NetExtraMulticast, NetRxFlags, NetRxRequest, NetRxResponse, NetStatus,
    NetTxFlags, NetTxRequest, NetTxResponse, RX_SLOT_WORDS, TX_SLOT_WORDS,
};
use janus_proto::addr::PAGE_SIZE;
use janus_proto::grant::Access;
use janus_proto::ring::{Back, RingError};
use zerocopy::{FromZeros as _, transmute};

mod control;
mod hash;
mod nodes;
mod steer;

pub use control::Control;
pub use hash::{FlowHash, Hash};
pub use nodes::{Frontend, FrontendCard, NetbackFeatures, offer_nodes};
pub use steer::{CardNet, QueueNet};

use crate::memory::{GrantMapper, MapError, copy_in, copy_out};

/// Bytes of an Ethernet header, the shortest thing that is sent.
const ETHERNET_HEADER: usize = 14;

/// Cutting of a long TCP frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gso {
    /// Payload bytes in a segment.
    pub size: u16,
    /// Protocol.
    pub kind: GsoType,
}

/// A frame on its way, with what is known of it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Frame {
    /// From the Ethernet header on.
    pub bytes: Vec<u8>,
    /// The checksum is not filled in.
    pub checksum_blank: bool,
    /// The data is known to be good.
    pub validated: bool,
    /// To be cut.
    pub gso: Option<Gso>,
}

/// What the guest's end of a card can take, beyond plain frames of up to 1514 bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Accepts {
    /// Frames of several pages.
    pub long: bool,
    /// Frames whose TCP or UDP checksum is not filled in (the sum over the pseudo header is).
    pub checksum_blank: bool,
    /// TCP over IPv4 to be cut, up to 64 KiB.
    pub gso_tcpv4: bool,
    /// TCP over IPv6 to be cut, up to 64 KiB.
    pub gso_tcpv6: bool,
}

/// A change of the multicast groups that the guest wants, by their Ethernet addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GroupChange {
    /// It wants this one.
    Join([u8; 6]),
    /// It does not any more.
    Leave([u8; 6]),
}

/// What a card is plugged into.
pub trait NetBackend {
    /// Takes a frame from the guest.
    fn send(&mut self, frame: Frame);
    /// Gives a frame for the guest.
    fn receive(&mut self) -> Option<Frame>;
    /// A guest was connected, perhaps after another one: what it can take.
    fn connected(&mut self, _accepts: Accepts) {}
    /// A buffer for the next frame of the guest, of any length and content.
    fn buffer(&mut self) -> Vec<u8> {
        Vec::new()
    }
    /// Takes back the buffer of a frame that was delivered.
    fn recycle(&mut self, _bytes: Vec<u8>) {}
    /// The guest changes its multicast groups; `false`: that cannot be done.
    fn group(&mut self, _change: GroupChange) -> bool {
        false
    }
    /// The hash to tell the guest with a frame.
    fn hash(&mut self, _frame: &Frame) -> Option<FlowHash> {
        None
    }
}

type Queue = Arc<Mutex<VecDeque<Frame>>>;

/// One end of a cable in memory.
#[derive(Clone, Debug)]
pub struct Cable {
    out: Queue,
    inward: Queue,
}

impl Cable {
    /// Both ends of a cable.
    #[must_use]
    pub fn pair() -> (Self, Self) {
        let (a, b) = (Queue::default(), Queue::default());
        (Self { out: a.clone(), inward: b.clone() }, Self { out: b, inward: a })
    }
}

impl NetBackend for Cable {
    fn send(&mut self, frame: Frame) {
        self.out.lock().unwrap_or_else(PoisonError::into_inner).push_back(frame);
    }
    fn receive(&mut self) -> Option<Frame> {
        self.inward.lock().unwrap_or_else(PoisonError::into_inner).pop_front()
    }
}

/// The connection is of no more use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NetbackError {
    /// The frontend broke a ring.
    Ring(RingError),
    /// A ring cannot be mapped.
    Map(MapError),
    /// A frame announces slots that are not there.
    Truncated,
    /// A frame has more slots than [`NR_SLOTS_MIN`].
    TooManySlots,
    /// Extra information of a type that nobody offered.
    BadExtra,
}

impl fmt::Display for NetbackError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ring(error) => error.fmt(f),
            Self::Map(error) => error.fmt(f),
            Self::Truncated => f.write_str("a frame announces slots that are not there"),
            Self::TooManySlots => f.write_str("a frame has too many slots"),
            Self::BadExtra => f.write_str("extra information of an unknown type"),
        }
    }
}

/// Which ports to notify.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Notify {
    /// The transmit port.
    pub tx: bool,
    /// The receive port.
    pub rx: bool,
}

/// A connected card.
pub struct Netback<G: GrantMapper, N> {
    tx: Back<G::Mapping, TX_SLOT_WORDS>,
    rx: Back<G::Mapping, RX_SLOT_WORDS>,
    mapper: G,
    /// What it is plugged into.
    pub net: N,
    frontend: Frontend,
    /// A frame that waits for pages.
    staged: Option<Frame>,
    /// Pages the frontend gave, oldest first.
    pages: VecDeque<NetRxRequest>,
    dropped: u64,
    /// The slots of the frame that is being sent.
    slots: Vec<TxSlot>,
}

impl<G: GrantMapper, N: fmt::Debug> fmt::Debug for Netback<G, N> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Netback")
            .field("net", &self.net)
            .field("frontend", &self.frontend)
            .field("pages", &self.pages.len())
            .field("dropped", &self.dropped)
            .finish_non_exhaustive()
    }
}

/// A slot of a frame that is being sent.
#[derive(Clone, Copy)]
enum TxSlot {
    Data(NetTxRequest),
    Extra,
}

impl<G: GrantMapper, N: NetBackend> Netback<G, N> {
    /// Connects to a frontend that published its rings.
    ///
    /// # Errors
    /// A ring cannot be mapped, or is nonsense.
    pub fn connect(mapper: G, mut net: N, frontend: Frontend) -> Result<Self, NetbackError> {
        let map = |ring| mapper.map(&[ring], Access::ReadWrite).map_err(NetbackError::Map);
        let tx = Back::attach(map(frontend.tx_ring)?).map_err(NetbackError::Ring)?;
        let rx = Back::attach(map(frontend.rx_ring)?).map_err(NetbackError::Ring)?;
        let (staged, pages) = (None, VecDeque::new());
        net.connected(Accepts {
            long: frontend.sg,
            checksum_blank: frontend.checksum_offload,
            gso_tcpv4: frontend.sg && frontend.gso_tcpv4 && frontend.checksum_offload,
            gso_tcpv6: frontend.sg && frontend.gso_tcpv6 && frontend.checksum_offload,
        });
        let slots = Vec::new();
        Ok(Self { tx, rx, mapper, net, frontend, staged, pages, dropped: 0, slots })
    }

    /// Frames that the guest could not take, or that were malformed.
    #[must_use]
    pub fn dropped(&self) -> u64 {
        self.dropped
    }

    /// Does everything that can be done in both directions.
    ///
    /// # Errors
    /// The frontend broke a ring: disconnect.
    pub fn serve(&mut self) -> Result<Notify, NetbackError> {
        let mut notify = Notify::default();
        loop {
            while self.send_one()? {
                notify.tx |= self.tx.publish();
            }
            while self.receive_one()? {
                notify.rx |= self.rx.publish();
            }
            if !self.tx.final_check_for_requests() && !self.more_pages() {
                return Ok(notify);
            }
        }
    }

    /// Whether pages arrived for a frame that waits.
    fn more_pages(&mut self) -> bool {
        self.rx.final_check_for_requests() && self.staged.is_some()
    }

    /// Sends one frame of the guest; `false`: there is none.
    fn send_one(&mut self) -> Result<bool, NetbackError> {
        let Some(first) = self.pop_tx()? else { return Ok(false) };
        let first: NetTxRequest = transmute!(first);
        let mut slots = std::mem::take(&mut self.slots);
        slots.clear();
        slots.push(TxSlot::Data(first));
        let (mut gso, mut group) = (None, None);
        let mut extra = first.flags.contains(NetTxFlags::EXTRA_INFO);
        while extra {
            let slot = self.pop_tx()?.ok_or(NetbackError::Truncated)?;
            let [low, high, _] = slot;
            let info: NetExtraInfo = transmute!([low, high]);
            let NetExtraMulticast { address, .. } = transmute!([low, high]);
            match info.kind {
                ExtraType::GSO => gso = Some(Gso { size: info.gso_size, kind: info.gso_type }),
                ExtraType::MCAST_ADD => group = Some(GroupChange::Join(address)),
                ExtraType::MCAST_DEL => group = Some(GroupChange::Leave(address)),
                _ => return Err(NetbackError::BadExtra),
            }
            slots.push(TxSlot::Extra);
            if slots.len() > NR_SLOTS_MIN + 1 {
                return Err(NetbackError::TooManySlots);
            }
            extra = info.flags & EXTRA_FLAG_MORE != 0;
        }
        let mut more = first.flags.contains(NetTxFlags::MORE_DATA);
        while more {
            if slots.len() > NR_SLOTS_MIN + 1 {
                return Err(NetbackError::TooManySlots);
            }
            let slot: NetTxRequest = transmute!(self.pop_tx()?.ok_or(NetbackError::Truncated)?);
            more = slot.flags.contains(NetTxFlags::MORE_DATA);
            slots.push(TxSlot::Data(slot));
        }
        let status = match (group, self.gather(&slots)) {
            // The frame that carries it is not meant for anybody.
            (Some(change), carrier) => {
                self.net.recycle(carrier.unwrap_or_default());
                if self.net.group(change) { NetStatus::OKAY } else { NetStatus::ERROR }
            }
            (None, Some(bytes)) => {
                let checksum_blank = first.flags.contains(NetTxFlags::CSUM_BLANK);
                let validated = first.flags.contains(NetTxFlags::DATA_VALIDATED);
                self.net.send(Frame { bytes, checksum_blank, validated, gso });
                NetStatus::OKAY
            }
            (None, None) => {
                self.dropped += 1;
                NetStatus::ERROR
            }
        };
        for slot in &slots {
            let (id, status) = match slot {
                TxSlot::Data(request) => (request.id, status.0),
                TxSlot::Extra => (0, NetStatus::NULL.0),
            };
            self.tx.push(&NetTxResponse { id, status }).map_err(NetbackError::Ring)?;
        }
        self.slots = slots;
        Ok(true)
    }

    fn pop_tx(&mut self) -> Result<Option<[u32; TX_SLOT_WORDS]>, NetbackError> {
        self.tx.pop().map_err(NetbackError::Ring)
    }

    /// The bytes of a frame; `None`: its sizes do not add up, or a page is not granted.
    fn gather(&mut self, slots: &[TxSlot]) -> Option<Vec<u8>> {
        let data = || {
            slots.iter().filter_map(|slot| match slot {
                TxSlot::Data(request) => Some(request),
                TxSlot::Extra => None,
            })
        };
        // The first slot has the size of the whole frame; its own is what the others leave.
        let total = usize::from(data().next()?.size);
        let others: usize = data().skip(1).map(|request| usize::from(request.size)).sum();
        let own = total.checked_sub(others)?;
        if !(ETHERNET_HEADER..=MAX_TX_SIZE as usize).contains(&total) {
            return None;
        }
        let mut frame = self.net.buffer();
        frame.resize(total, 0);
        let mut rest = frame.as_mut_slice();
        for (index, request) in data().enumerate() {
            let len = if index == 0 { own } else { usize::from(request.size) };
            let offset = usize::from(request.offset);
            let (part, later) = rest.split_at_mut_checked(len)?;
            if offset + len > PAGE_SIZE {
                return None;
            }
            let page = self.mapper.map(&[request.gref], Access::ReadOnly).ok()?;
            if !copy_out(&page, offset, part) {
                return None;
            }
            rest = later;
        }
        Some(frame)
    }

    /// Gives the guest one frame; `false`: there is none, or no room for it.
    fn receive_one(&mut self) -> Result<bool, NetbackError> {
        let Some(frame) = self.staged.take().or_else(|| self.net.receive()) else {
            return Ok(false);
        };
        let gso_wanted = match frame.gso.map(|gso| gso.kind) {
            None => true,
            Some(GsoType::TCPV4) => self.frontend.gso_tcpv4,
            Some(GsoType::TCPV6) => self.frontend.gso_tcpv6,
            Some(_) => false,
        };
        let parts = frame.bytes.len().div_ceil(PAGE_SIZE);
        let hash = if self.frontend.hash { self.net.hash(&frame) } else { None };
        let slots = parts + usize::from(frame.gso.is_some()) + usize::from(hash.is_some());
        let unwanted = parts == 0
            || !gso_wanted
            || (parts > 1 && !self.frontend.sg)
            || (frame.checksum_blank && !self.frontend.checksum_offload)
            || parts > NR_SLOTS_MIN;
        if unwanted {
            self.dropped += 1;
            self.net.recycle(frame.bytes);
            return Ok(true);
        }
        while self.pages.len() < slots {
            match self.rx.pop().map_err(NetbackError::Ring)? {
                Some(page) => self.pages.push_back(page),
                None => {
                    self.staged = Some(frame);
                    return Ok(false);
                }
            }
        }
        self.scatter(&frame, hash)?;
        self.net.recycle(frame.bytes);
        Ok(true)
    }

    fn scatter(&mut self, frame: &Frame, hash: Option<FlowHash>) -> Result<(), NetbackError> {
        let chunks = frame.bytes.chunks(PAGE_SIZE);
        let last = chunks.len() - 1;
        for (index, chunk) in chunks.enumerate() {
            let Some(request) = self.pages.pop_front() else { return Ok(()) };
            let page = self.mapper.map(&[request.gref], Access::ReadWrite);
            let written = page.is_ok_and(|page| copy_in(&page, 0, chunk));
            let mut flags = NetRxFlags::empty();
            flags.set(NetRxFlags::MORE_DATA, index != last);
            if index == 0 {
                flags.set(NetRxFlags::CSUM_BLANK, frame.checksum_blank);
                let validated = frame.validated || frame.checksum_blank;
                flags.set(NetRxFlags::DATA_VALIDATED, validated);
                flags.set(NetRxFlags::EXTRA_INFO, frame.gso.is_some() || hash.is_some());
            }
            let length = i16::try_from(chunk.len()).unwrap_or(NetStatus::ERROR.0);
            let status = if written { length } else { NetStatus::ERROR.0 };
            let response = NetRxResponse { id: request.id, offset: 0, flags, status };
            self.rx.push(&response).map_err(NetbackError::Ring)?;
            if index == 0 {
                self.extras(frame.gso, hash)?;
            }
        }
        Ok(())
    }

    /// Each takes the place, and so the page, of one response; the frontend gets the page back by order.
    fn extras(&mut self, gso: Option<Gso>, hash: Option<FlowHash>) -> Result<(), NetbackError> {
        if let Some(gso) = gso {
            self.pages.pop_front();
            let info = NetExtraInfo {
                kind: ExtraType::GSO,
                flags: if hash.is_some() { EXTRA_FLAG_MORE } else { 0 },
                gso_size: gso.size,
                gso_type: gso.kind,
                ..NetExtraInfo::new_zeroed()
            };
            self.rx.push(&info).map_err(NetbackError::Ring)?;
        }
        if let Some(hash) = hash {
            self.pages.pop_front();
            let info = NetExtraHash {
                kind: ExtraType::HASH,
                flags: 0,
                hash_type: u8::try_from(hash.of.bits().trailing_zeros()).unwrap_or(0),
                algorithm: u8::try_from(HashAlgorithm::TOEPLITZ.0).unwrap_or(0),
                value: hash.value.to_ne_bytes(),
            };
            self.rx.push(&info).map_err(NetbackError::Ring)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;

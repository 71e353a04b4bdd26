//! The Xen network driver's data path (`xen/include/public/io/netif.h`). What it agrees on with the backend is
//! in [`super::netfront_xs`].
//!
//! Two rings. Transmit: a frame takes a slot for each page it touches, and one more for segmentation. Receive:
//! the driver keeps pages granted for the backend to copy into; a long frame takes several. Receive slots are
//! answered in order, each with the page that was posted in it, extra information included.

use alloc::collections::VecDeque;
use alloc::vec::Vec;
use core::fmt;

use janus_proto::abi::xen_io::netif::{
    EXTRA_FLAG_MORE, ExtraType, GsoType, MAX_TX_SIZE, NR_SLOTS_MIN, NetExtraInfo, NetRxFlags,
    NetRxRequest, NetRxResponse, NetStatus, NetTxFlags, NetTxRequest, NetTxResponse, RX_SLOT_WORDS,
    TX_SLOT_WORDS,
};
use janus_proto::addr::{DomId, GrantRef, PAGE_SIZE, Port};
use janus_proto::ring::Front;

use super::grants::{EventChannel, GrantedBuf, GrantedFrames, Grave};
use super::netfront_xs::{Offer, Ports, publication};
use super::nodes::Publication;
use crate::class::{
    NetDevice, NetOffloads, NetProperties, PeerError, RxChecksum, RxPart, TX_HEADROOM, TxFrame,
};
use crate::dma::DmaBuf;
use crate::hal::{GrantAccess, HalError, XenHal};

/// Pages kept posted for receiving, at most: the whole ring.
const RX_BUFFERS: usize = 256;
/// Pages for receiving at first: three of the largest frames. Each page is cleared before the peer gets it, so that a card
/// that is hardly used, and a guest that lives shortly, should not have them all.
const RX_BUFFERS_FIRST: usize = 64;
/// Slots that one received frame may take: 64 KiB of any alignment, as backends do.
const RX_SLOTS_MAX: usize = NR_SLOTS_MIN + 1;

type TxRing = Front<GrantedFrames, TX_SLOT_WORDS>;
type RxRing = Front<GrantedFrames, RX_SLOT_WORDS>;

/// Event channels of a card.
#[derive(Debug)]
enum Channels {
    Shared(EventChannel),
    Split { tx: EventChannel, rx: EventChannel },
}

impl Channels {
    fn tx(&self) -> &EventChannel {
        match self {
            Self::Shared(channel) => channel,
            Self::Split { tx, .. } => tx,
        }
    }
    fn rx(&self) -> &EventChannel {
        match self {
            Self::Shared(channel) => channel,
            Self::Split { rx, .. } => rx,
        }
    }
}

/// A frame that the backend is sending.
#[derive(Debug)]
struct Sending {
    data: GrantedBuf,
    /// Slots not answered yet.
    slots: usize,
}

/// What a transmit slot belongs to; the slot's number is its id on the ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum TxSlot {
    Free,
    /// Part of the frame of this number.
    Data(u16),
    /// The information before a segmented frame's parts.
    Extra(u16),
}

/// The driver of a network card.
pub struct Netfront {
    hal: &'static dyn XenHal,
    peer: DomId,
    offer: Offer,
    /// `Some` until dropped, as are the other two.
    tx: Option<TxRing>,
    rx: Option<RxRing>,
    channels: Option<Channels>,
    refs: [GrantRef; 2],
    tx_slots: Vec<TxSlot>,
    tx_free: Vec<u16>,
    /// Frames under way, by number.
    sending: Vec<Option<Sending>>,
    sending_free: Vec<u16>,
    /// Buffers whose frames were sent.
    sent: VecDeque<DmaBuf>,
    /// Pages posted, by ring slot.
    rx_slots: Vec<Option<GrantedBuf>>,
    /// Pages to post.
    pool: Vec<DmaBuf>,
    /// Pages that may exist for receiving; doubled when the peer has used half of them before we came.
    rx_target: usize,
    /// Pages that exist for receiving: posted, in the pool, or with the user.
    rx_pages: usize,
    connected: bool,
    broken: Option<PeerError>,
    grave: Grave,
}

impl Netfront {
    /// Makes rings and event channels for backend domain `peer`. Publish [`Self::publication`]; the device can
    /// be used at once, and moves frames when the backend has connected. `grave` gets what it leaves behind.
    ///
    /// # Errors
    /// [`HalError`].
    pub fn new(
        hal: &'static dyn XenHal,
        peer: DomId,
        offer: Offer,
        grave: Grave,
    ) -> Result<Self, HalError> {
        let (tx, rx) = (GrantedFrames::new(hal, peer, 1)?, GrantedFrames::new(hal, peer, 1)?);
        let first = |frames: &GrantedFrames| frames.refs().first().copied().unwrap_or(GrantRef(0));
        let refs = [first(&tx), first(&rx)];
        let tx = TxRing::new(tx).map_err(|_| HalError::NoMemory)?;
        let rx = RxRing::new(rx).map_err(|_| HalError::NoMemory)?;
        let channels = if offer.split_event_channels {
            Channels::Split { tx: EventChannel::new(hal, peer)?, rx: EventChannel::new(hal, peer)? }
        } else {
            Channels::Shared(EventChannel::new(hal, peer)?)
        };
        let tx_slots = u16::try_from(tx.slots()).unwrap_or(u16::MAX);
        let rx_slots = rx.slots() as usize;
        let mut this = Self {
            hal,
            peer,
            offer,
            tx: Some(tx),
            rx: Some(rx),
            channels: Some(channels),
            refs,
            tx_slots: (0..tx_slots).map(|_| TxSlot::Free).collect(),
            tx_free: (0..tx_slots).rev().collect(),
            sending: (0..tx_slots).map(|_| None).collect(),
            sending_free: (0..tx_slots).rev().collect(),
            sent: VecDeque::new(),
            rx_slots: (0..rx_slots).map(|_| None).collect(),
            pool: Vec::new(),
            rx_target: RX_BUFFERS_FIRST,
            rx_pages: 0,
            connected: true,
            broken: None,
            grave,
        };
        this.fill();
        if this.rx.as_ref().is_none_or(|rx| rx.outstanding() == 0) {
            return Err(HalError::NoMemory);
        }
        Ok(this)
    }

    /// The ports of the card's events.
    #[must_use]
    pub fn ports(&self) -> Ports {
        match &self.channels {
            Some(Channels::Split { tx, rx }) => Ports::Split { tx: tx.port(), rx: rx.port() },
            Some(Channels::Shared(channel)) => Ports::Shared(channel.port()),
            None => Ports::Shared(Port(0)),
        }
    }

    /// The nodes to write.
    #[must_use]
    pub fn publication(&self) -> Publication {
        let [tx, rx] = self.refs;
        publication(tx, rx, self.ports(), self.offer.offloads)
    }

    /// Posts pages for receiving until the ring is full or memory is short.
    fn fill(&mut self) {
        let Some(rx) = &mut self.rx else { return };
        if self.rx_pages >= self.rx_target && rx.outstanding() as usize <= self.rx_target / 2 {
            self.rx_target = (self.rx_target * 2).min(RX_BUFFERS);
        }
        while rx.free() > 0 {
            let buf = match self.pool.pop() {
                Some(buf) => buf,
                None if self.rx_pages < self.rx_target => {
                    let Some(buf) = DmaBuf::new(self.hal.frames(), PAGE_SIZE) else { break };
                    self.rx_pages += 1;
                    buf
                }
                None => break,
            };
            let granted = match GrantedBuf::new(
                self.hal,
                self.peer,
                buf,
                PAGE_SIZE,
                GrantAccess::ReadWrite,
            ) {
                Ok(granted) => granted,
                Err((_, buf)) => {
                    // Grants come back as frames are sent; leaked pages do not.
                    match buf {
                        Some(buf) => self.pool.push(buf),
                        None => self.rx_pages -= 1,
                    }
                    break;
                }
            };
            let gref = granted.refs().first().copied().unwrap_or(GrantRef(0));
            // The slot's number, which is the ring index modulo the ring, is also the id.
            let slot = next_request(rx) % rx.slots();
            let id = u16::try_from(slot).unwrap_or(0);
            if rx.push(&NetRxRequest { id, pad: 0, gref }).is_err() {
                break;
            }
            if let Some(place) = self.rx_slots.get_mut(slot as usize) {
                *place = Some(granted);
            }
        }
    }

    /// The slots that a frame of `len` bytes behind the headroom takes for its data.
    fn parts(len: usize) -> usize {
        (TX_HEADROOM + len).div_ceil(PAGE_SIZE)
    }

    fn can_send(&self, frame: &TxFrame) -> bool {
        let parts = Self::parts(frame.len);
        let offloads = self.offer.offloads;
        let segmentation = match frame.segmentation {
            None => true,
            Some(how) if how.ipv6 => offloads.contains(NetOffloads::TX_TSO6) && how.mss != 0,
            Some(how) => offloads.contains(NetOffloads::TX_TSO4) && how.mss != 0,
        };
        let checksum = frame.checksum.is_none() || offloads.contains(NetOffloads::TX_CHECKSUM);
        (14..=MAX_TX_SIZE as usize).contains(&frame.len)
            && TX_HEADROOM + frame.len <= frame.buf.len()
            && parts <= NR_SLOTS_MIN
            && (parts == 1 || self.offer.scatter_gather)
            && segmentation
            && (frame.segmentation.is_none() || frame.checksum.is_some())
            && checksum
    }

    /// Takes slots for a frame's parts; there are enough.
    fn take_slot(&mut self, what: TxSlot) -> u16 {
        let id = self.tx_free.pop().unwrap_or(0);
        if let Some(slot) = self.tx_slots.get_mut(usize::from(id)) {
            *slot = what;
        }
        id
    }

    fn send(&mut self, frame: TxFrame) -> Result<(), TxFrame> {
        let TxFrame { buf, len, checksum, segmentation } = frame;
        let parts = Self::parts(len);
        let needed = parts + usize::from(segmentation.is_some());
        let room = self.tx.as_ref().is_some_and(|tx| tx.free() as usize >= needed);
        let number = match self.sending_free.last() {
            Some(&number) if room && self.tx_free.len() >= needed => number,
            _ => return Err(TxFrame { buf, len, checksum, segmentation }),
        };
        let bytes = TX_HEADROOM + len;
        let data = match GrantedBuf::new(self.hal, self.peer, buf, bytes, GrantAccess::ReadOnly) {
            Ok(data) => data,
            Err((_, Some(buf))) => return Err(TxFrame { buf, len, checksum, segmentation }),
            // The frame is lost with its buffer, as on a wire.
            Err((_, None)) => return Ok(()),
        };
        self.sending_free.pop();
        let more =
            |at: usize| if at + 1 < parts { NetTxFlags::MORE_DATA } else { NetTxFlags::empty() };
        for (at, gref) in data.refs().iter().enumerate() {
            let offset = if at == 0 { TX_HEADROOM } else { 0 };
            let end = (bytes - at * PAGE_SIZE).min(PAGE_SIZE);
            let mut flags = more(at);
            // The first slot speaks for the frame: its size, its checksum, its segmentation.
            let size = if at == 0 { len } else { end };
            if at == 0 && checksum.is_some() {
                flags |= NetTxFlags::CSUM_BLANK | NetTxFlags::DATA_VALIDATED;
            }
            if at == 0 && segmentation.is_some() {
                flags |= NetTxFlags::EXTRA_INFO;
            }
            let id = self.take_slot(TxSlot::Data(number));
            let (offset, size) = (to_u16(offset), to_u16(size));
            let request = NetTxRequest { gref: *gref, offset, flags, id, size };
            let Some(tx) = &mut self.tx else { break };
            // There is room: it was counted.
            let _ = tx.push(&request);
            if at == 0
                && let Some(how) = segmentation
            {
                let extra = NetExtraInfo {
                    kind: ExtraType::GSO,
                    flags: 0,
                    gso_size: how.mss,
                    gso_type: if how.ipv6 { GsoType::TCPV6 } else { GsoType::TCPV4 },
                    gso_pad: 0,
                    gso_features: 0,
                };
                let _ = tx.push(&extra);
            }
        }
        // The extra slot has no id of its own; the backend answers it with none, in any slot.
        if segmentation.is_some() {
            self.take_slot(TxSlot::Extra(number));
        }
        if let Some(place) = self.sending.get_mut(usize::from(number)) {
            *place = Some(Sending { data, slots: parts });
        }
        Ok(())
    }

    /// Handles one transmit response.
    fn answered(&mut self, response: NetTxResponse) -> Result<(), PeerError> {
        if response.status == NetStatus::NULL.0 {
            return Ok(());
        }
        let slot = self.tx_slots.get_mut(usize::from(response.id));
        let Some(TxSlot::Data(number)) = slot.as_deref().copied() else {
            return Err(PeerError("a transmit response to no frame of this card"));
        };
        if let Some(slot) = slot {
            *slot = TxSlot::Free;
        }
        self.tx_free.push(response.id);
        let place = self.sending.get_mut(usize::from(number));
        let Some(place) = place else { return Err(PeerError("a transmit response to no frame")) };
        let Some(sending) = place else { return Err(PeerError("a transmit response to no frame")) };
        sending.slots -= 1;
        if sending.slots > 0 {
            return Ok(());
        }
        // A dropped frame is a lost frame: the protocols above know what to do.
        if let Some(done) = place.take() {
            self.sending_free.push(number);
            for (id, slot) in self.tx_slots.iter_mut().enumerate() {
                if *slot == TxSlot::Extra(number) {
                    *slot = TxSlot::Free;
                    self.tx_free.push(to_u16(id));
                }
            }
            self.sent.extend(done.data.reclaim());
        }
        Ok(())
    }

    /// Takes the next receive response and the page of its slot.
    fn next_received<T: zerocopy::FromBytes + zerocopy::IntoBytes>(
        &mut self,
    ) -> Result<Option<(T, Option<DmaBuf>)>, PeerError> {
        let Some(rx) = &mut self.rx else { return Ok(None) };
        let slot = (rx.next_response() % rx.slots()) as usize;
        let response = rx.pop::<T>().map_err(|error| PeerError(error.message()))?;
        let Some(response) = response else { return Ok(None) };
        let granted = self.rx_slots.get_mut(slot).and_then(Option::take);
        let buf = granted.and_then(GrantedBuf::reclaim);
        if buf.is_none() {
            // Leaked: another page takes its place.
            self.rx_pages = self.rx_pages.saturating_sub(1);
        }
        Ok(Some((response, buf)))
    }

    /// Takes the responses of one frame. A backend publishes a frame's slots together, so one that is cut off
    /// has broken the protocol.
    fn next_frame(&mut self, parts: &mut Vec<RxPart>) -> Result<Option<RxChecksum>, PeerError> {
        loop {
            let Some((first, buf)) = self.next_received::<NetRxResponse>()? else {
                return Ok(None);
            };
            let mut response = first;
            let mut page = buf;
            let mut good = true;
            if first.flags.contains(NetRxFlags::EXTRA_INFO) {
                self.skip_extras()?;
            }
            loop {
                match (part_of(response), page) {
                    (Some((offset, len)), Some(buf)) => parts.push(RxPart { buf, offset, len }),
                    (_, page) => {
                        good = false;
                        self.pool.extend(page);
                    }
                }
                if !response.flags.contains(NetRxFlags::MORE_DATA) {
                    break;
                }
                if parts.len() >= RX_SLOTS_MAX {
                    return Err(PeerError("a received frame of too many parts"));
                }
                let next = self.next_received::<NetRxResponse>()?;
                let Some(next) = next else {
                    return Err(PeerError("a received frame without end"));
                };
                (response, page) = next;
            }
            if good {
                let trusted = NetRxFlags::DATA_VALIDATED | NetRxFlags::CSUM_BLANK;
                let is_trusted = first.flags.intersects(trusted);
                return Ok(Some(if is_trusted {
                    RxChecksum::Trusted
                } else {
                    RxChecksum::Unknown
                }));
            }
            // The backend failed at it, or its page was lost: the frame is dropped.
            self.pool.extend(parts.drain(..).map(|part| part.buf));
        }
    }

    /// Passes over the slots of extra information: segmentation, which only says what the frame shows.
    fn skip_extras(&mut self) -> Result<(), PeerError> {
        for _ in 0..RX_SLOTS_MAX {
            let Some((extra, page)) = self.next_received::<NetExtraInfo>()? else {
                return Err(PeerError("extra information is announced and missing"));
            };
            self.pool.extend(page);
            if extra.flags & EXTRA_FLAG_MORE == 0 {
                return Ok(());
            }
        }
        Err(PeerError("extra information without end"))
    }

    /// Is of no more use, because another ring of the same card is broken.
    pub(super) fn give_up(&mut self, error: PeerError) {
        self.broken.get_or_insert(error);
        self.connected = false;
    }

    fn fail<T>(&mut self, error: PeerError) -> Result<T, PeerError> {
        self.broken = Some(error);
        self.connected = false;
        Err(error)
    }
}

/// Where a response says that data is in its page; `None`: nowhere, or beyond the page.
fn part_of(response: NetRxResponse) -> Option<(usize, usize)> {
    let len = usize::try_from(response.status).ok()?;
    let offset = usize::from(response.offset);
    (offset + len <= PAGE_SIZE).then_some((offset, len))
}

/// The ring index of the next request that is pushed.
fn next_request<M, const SLOT: usize>(ring: &Front<M, SLOT>) -> u32
where
    M: core::ops::Deref<Target = [janus_proto::sync::AtomicU32]>,
{
    ring.next_response().wrapping_add(ring.outstanding())
}

/// A number that is known to be below 65536.
fn to_u16(value: usize) -> u16 {
    u16::try_from(value).unwrap_or(u16::MAX)
}

impl NetDevice for Netfront {
    fn properties(&self) -> NetProperties {
        NetProperties { mac: self.offer.mac, mtu: self.offer.mtu, offloads: self.offer.offloads }
    }

    fn link_up(&self) -> bool {
        self.connected && self.broken.is_none()
    }

    fn transmit(&mut self, frame: TxFrame) -> Result<(), TxFrame> {
        if self.broken.is_some() {
            return Err(frame);
        }
        if !self.can_send(&frame) {
            // Never possible: lost, as on a wire, with the buffer back.
            self.sent.push_back(frame.buf);
            return Ok(());
        }
        self.send(frame)
    }

    fn kick(&mut self) {
        if self.broken.is_some() {
            return;
        }
        self.fill();
        let Some(channels) = &self.channels else { return };
        let tx = self.tx.as_mut().is_some_and(Front::publish);
        let rx = self.rx.as_mut().is_some_and(Front::publish);
        match channels {
            Channels::Shared(channel) if tx || rx => channel.notify(),
            Channels::Shared(_) => {}
            Channels::Split { .. } => {
                if tx {
                    channels.tx().notify();
                }
                if rx {
                    channels.rx().notify();
                }
            }
        }
    }

    fn transmitted(&mut self) -> Result<Option<DmaBuf>, PeerError> {
        loop {
            if let Some(buf) = self.sent.pop_front() {
                return Ok(Some(buf));
            }
            if self.broken.is_some() {
                return Ok(None);
            }
            let Some(tx) = &mut self.tx else { return Ok(None) };
            let response = match tx.pop::<NetTxResponse>() {
                Ok(None) => return Ok(None),
                Ok(Some(response)) => response,
                Err(error) => return self.fail(PeerError(error.message())),
            };
            if let Err(error) = self.answered(response) {
                return self.fail(error);
            }
        }
    }

    fn receive(&mut self, parts: &mut Vec<RxPart>) -> Result<Option<RxChecksum>, PeerError> {
        parts.clear();
        if self.broken.is_some() {
            return Ok(None);
        }
        match self.next_frame(parts) {
            Err(error) => {
                parts.clear();
                self.fail(error)
            }
            Ok(frame) => Ok(frame),
        }
    }

    fn recycle(&mut self, buf: DmaBuf) {
        self.pool.push(buf);
    }

    fn arm(&mut self) -> bool {
        if self.broken.is_some() {
            return false;
        }
        let rx = self.rx.as_mut().is_some_and(Front::final_check_for_responses);
        // Nobody waits for a buffer to come back while many slots are free: ask when a quarter is done.
        let tx = self.tx.as_mut().is_some_and(|tx| {
            let count = (tx.outstanding() / 4).max(1);
            tx.final_check_after(count)
        });
        rx || tx || !self.sent.is_empty()
    }
}

impl Drop for Netfront {
    /// Leaves everything that the backend may still use to the grave, which the bus empties when the backend
    /// has let go.
    fn drop(&mut self) {
        let tx = self.tx.take().map(Front::into_memory);
        let rx = self.rx.take().map(Front::into_memory);
        let sending = core::mem::take(&mut self.sending);
        let posted = core::mem::take(&mut self.rx_slots);
        self.grave.put((tx, rx, self.channels.take(), sending, posted));
    }
}

impl fmt::Debug for Netfront {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let posted = self.rx.as_ref().map_or(0, Front::outstanding);
        write!(f, "Netfront({} pages posted)", posted)
    }
}

#[cfg(test)]
mod tests;

//! smoltcp's device over a [`NetDevice`]: buffers, checksums, segmentation.
//!
//! smoltcp neither computes nor verifies TCP and UDP checksums here: on the way out the device does (offload) or
//! [`checksum`](super::checksum) does; on the way in frames that the device does not vouch for are verified before
//! smoltcp sees them. Where the device cuts segments (TSO), smoltcp emits frames of up to [`LONG_FRAME`] bytes.
//! Transmit buffers are reused: no allocation per frame.

use alloc::boxed::Box;
use alloc::collections::VecDeque;
use alloc::vec::Vec;
use core::num::NonZeroUsize;

use janus_front::class::{
    NetDevice, NetOffloads, NetProperties, PeerError, RxChecksum, RxPart, TX_HEADROOM, TxFrame,
};
use janus_front::dma::{DmaBuf, FrameSource};
use janus_proto::addr::PAGE_SIZE;
use smoltcp::phy::{self, Checksum, DeviceCapabilities, Medium, PacketMeta};
use smoltcp::time::Instant;

use super::NetCounters;
use super::checksum::{ETHERNET_HEADER, Transport};

/// Pages of a buffer for long frames.
const LONG_PAGES: usize = 16;
/// The longest frame to be cut by the device: with the headroom, a whole number of pages.
const LONG_FRAME: usize = LONG_PAGES * PAGE_SIZE - TX_HEADROOM;
/// Buffers of each kind that may exist.
const MAX_SHORT: usize = 256;
const MAX_LONG: usize = 32;
/// The longest received frame: 64 KiB of IP packet behind an Ethernet header with a VLAN tag.
const MAX_RECEIVED: usize = 65_535 + ETHERNET_HEADER + 4;
/// Frames that may wait for room in the device's queue, beyond which nothing is received either.
const MAX_PENDING: usize = 64;

/// See the module.
pub(super) struct Phy {
    transmit: Transmit,
    /// A received frame that smoltcp has not seen yet.
    current: Option<Received>,
    parts: Vec<RxPart>,
    /// Where frames of several parts are put together.
    linear: Vec<u8>,
    /// Receive buffers that smoltcp is done with.
    used: Vec<DmaBuf>,
}

enum Received {
    Single(RxPart),
    /// In `Phy::linear`.
    Joined,
}

/// The sending half, which owns the device.
struct Transmit {
    device: Box<dyn NetDevice>,
    frames: &'static dyn FrameSource,
    properties: NetProperties,
    tso: bool,
    short_pages: usize,
    short: Vec<DmaBuf>,
    short_made: usize,
    long: Vec<DmaBuf>,
    long_made: usize,
    pending: VecDeque<TxFrame>,
    /// Something was queued since the last kick.
    dirty: bool,
    /// smoltcp had something to send and there was no room for it since the last [`Phy::reclaim`].
    refused: bool,
    failure: Option<PeerError>,
    counters: NetCounters,
}

impl Phy {
    pub(super) fn new(device: Box<dyn NetDevice>, frames: &'static dyn FrameSource) -> Self {
        let properties = device.properties();
        let wanted = NetOffloads::TX_TSO4 | NetOffloads::TX_CHECKSUM;
        let frame_max = usize::from(properties.mtu) + ETHERNET_HEADER;
        let mut transmit = Transmit {
            device,
            frames,
            properties,
            tso: properties.offloads.contains(wanted),
            short_pages: (TX_HEADROOM + frame_max).div_ceil(PAGE_SIZE),
            short: Vec::with_capacity(MAX_SHORT),
            short_made: 0,
            long: Vec::with_capacity(MAX_LONG),
            long_made: 0,
            pending: VecDeque::with_capacity(MAX_PENDING * 2),
            dirty: false,
            refused: false,
            failure: None,
            counters: NetCounters::default(),
        };
        // Without memory for a few long buffers the frames stay short.
        transmit.tso = transmit.tso && (0..2).all(|_| transmit.make_long());
        Self { transmit, current: None, parts: Vec::new(), linear: Vec::new(), used: Vec::new() }
    }

    pub(super) fn properties(&self) -> NetProperties {
        self.transmit.properties
    }
    pub(super) fn link_up(&self) -> bool {
        self.transmit.device.link_up()
    }
    pub(super) fn counters(&self) -> NetCounters {
        self.transmit.counters
    }
    pub(super) fn failure(&self) -> Option<PeerError> {
        self.transmit.failure
    }
    pub(super) fn tso(&self) -> bool {
        self.transmit.tso
    }

    /// Takes back the buffers of frames that were sent, and sends what waited for room.
    pub(super) fn reclaim(&mut self) {
        self.transmit.reclaim();
    }

    /// Makes the next received frame current; `false` when there is none, or no room to answer it.
    pub(super) fn fetch(&mut self) -> bool {
        for buf in self.used.drain(..) {
            self.transmit.device.recycle(buf);
            self.transmit.dirty = true;
        }
        while self.current.is_none() {
            if self.transmit.failure.is_some() || self.transmit.pending.len() >= MAX_PENDING {
                return false;
            }
            self.parts.clear();
            let checksum = match self.transmit.device.receive(&mut self.parts) {
                Ok(Some(checksum)) => checksum,
                Ok(None) => return false,
                Err(error) => {
                    self.transmit.failure = Some(error);
                    return false;
                }
            };
            self.current = self.join();
            let counters = &mut self.transmit.counters;
            let Some(frame) = frame(self.current.as_ref(), &self.linear) else {
                counters.received_bad += 1;
                continue;
            };
            counters.received += 1;
            counters.received_bytes += frame.len() as u64;
            if checksum == RxChecksum::Unknown
                && Transport::parse(frame).is_some_and(|packet| !packet.verify(frame))
            {
                counters.received_bad += 1;
                self.drop_current();
            }
        }
        true
    }

    /// Turns the parts of a frame into one piece; `None` for one that is empty or too long.
    fn join(&mut self) -> Option<Received> {
        if self.parts.len() == 1 {
            return self.parts.pop().map(Received::Single);
        }
        self.linear.clear();
        let total: usize = self.parts.iter().map(|part| part.len).sum();
        let fits = total <= MAX_RECEIVED && !self.parts.is_empty();
        for part in self.parts.drain(..) {
            if fits {
                let end = part.offset.saturating_add(part.len);
                self.linear.extend_from_slice(part.buf.get(part.offset..end).unwrap_or_default());
            }
            self.used.push(part.buf);
        }
        self.transmit.counters.received_joined += u64::from(fits);
        fits.then_some(Received::Joined)
    }

    fn drop_current(&mut self) {
        if let Some(Received::Single(part)) = self.current.take() {
            self.used.push(part.buf);
        }
    }

    /// Drops the current frame, as a full queue would.
    pub(super) fn refuse_current(&mut self) {
        self.transmit.counters.received_dropped += 1;
        self.drop_current();
    }

    /// The port that the current frame asks to connect to.
    pub(super) fn connection_request(&self) -> Option<u16> {
        let frame = frame(self.current.as_ref(), &self.linear)?;
        Transport::parse(frame)?.connection_request()
    }

    /// Publishes what was queued, in one kick.
    pub(super) fn kick(&mut self) {
        for buf in self.used.drain(..) {
            self.transmit.device.recycle(buf);
            self.transmit.dirty = true;
        }
        if self.transmit.dirty {
            self.transmit.device.kick();
            self.transmit.counters.kicks += 1;
            self.transmit.dirty = false;
        }
    }

    /// Asks for the next event; `true`: there is something already.
    pub(super) fn arm(&mut self) -> bool {
        self.transmit.failure.is_none() && self.transmit.device.arm()
    }

    /// Whether something waits for room in the device's queue, or for buffers to come back.
    pub(super) fn is_congested(&self) -> bool {
        self.transmit.refused || !self.transmit.pending.is_empty()
    }
}

fn frame<'a>(received: Option<&'a Received>, linear: &'a [u8]) -> Option<&'a [u8]> {
    match received? {
        Received::Single(part) => part.buf.get(part.offset..part.offset.checked_add(part.len)?),
        Received::Joined => Some(linear),
    }
}

impl Transmit {
    fn make_long(&mut self) -> bool {
        if self.long_made == MAX_LONG {
            return false;
        }
        let made = DmaBuf::new(self.frames, LONG_PAGES * PAGE_SIZE);
        self.long_made += usize::from(made.is_some());
        let ok = made.is_some();
        self.long.extend(made);
        ok
    }

    fn make_short(&mut self) -> bool {
        if self.short_made == MAX_SHORT {
            return false;
        }
        let made = DmaBuf::new(self.frames, self.short_pages * PAGE_SIZE);
        self.short_made += usize::from(made.is_some());
        let ok = made.is_some();
        self.short.extend(made);
        ok
    }

    fn reclaim(&mut self) {
        self.refused = false;
        while self.failure.is_none() {
            match self.device.transmitted() {
                Ok(Some(buf)) if buf.pages() >= LONG_PAGES => self.long.push(buf),
                Ok(Some(buf)) => self.short.push(buf),
                Ok(None) => break,
                Err(error) => self.failure = Some(error),
            }
        }
        while let Some(frame) = self.pending.pop_front() {
            if let Err(frame) = self.device.transmit(frame) {
                self.pending.push_front(frame);
                break;
            }
            self.dirty = true;
        }
    }

    /// Whether a frame of any length can be taken now.
    fn is_ready(&mut self) -> bool {
        if self.failure.is_some() || !self.pending.is_empty() {
            return false;
        }
        (!self.short.is_empty() || self.make_short())
            && (!self.tso || !self.long.is_empty() || self.make_long())
    }

    fn take(&mut self, len: usize) -> Option<DmaBuf> {
        if TX_HEADROOM + len <= self.short_pages * PAGE_SIZE {
            if self.short.is_empty() {
                self.make_short();
            }
            self.short.pop()
        } else {
            if self.long.is_empty() {
                self.make_long();
            }
            self.long.pop()
        }
    }

    /// Finishes a frame's checksums and queues it.
    fn send(&mut self, mut buf: DmaBuf, len: usize, mss: Option<u16>) {
        let mut checksum = None;
        let mut segmentation = None;
        if let Some(frame) = buf.get_mut(TX_HEADROOM..TX_HEADROOM + len)
            && let Some(packet) = Transport::parse(frame)
        {
            if self.properties.offloads.contains(NetOffloads::TX_CHECKSUM) {
                checksum = packet.fill_partially(frame);
                segmentation = mss.and_then(|mss| packet.segmentation(mss));
            } else {
                packet.fill(frame);
            }
        }
        self.counters.sent += 1;
        self.counters.sent_bytes += len as u64;
        self.counters.sent_long += u64::from(segmentation.is_some());
        let frame = TxFrame { buf, len, checksum, segmentation };
        let refused =
            if self.pending.is_empty() { self.device.transmit(frame).err() } else { Some(frame) };
        match refused {
            None => self.dirty = true,
            Some(frame) => {
                self.counters.queue_full += 1;
                self.pending.push_back(frame);
            }
        }
    }
}

/// A received frame on its way into smoltcp.
pub(super) struct RxToken<'a> {
    received: Received,
    linear: &'a [u8],
    used: &'a mut Vec<DmaBuf>,
}

impl phy::RxToken for RxToken<'_> {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        let result = f(frame(Some(&self.received), self.linear).unwrap_or_default());
        if let Received::Single(part) = self.received {
            self.used.push(part.buf);
        }
        result
    }
}

/// Room for one frame.
pub(super) struct TxToken<'a> {
    transmit: &'a mut Transmit,
    mss: Option<u16>,
}

impl phy::TxToken for TxToken<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        match self.transmit.take(len) {
            Some(mut buf) if TX_HEADROOM + len <= buf.len() => {
                let result = f(buf.get_mut(TX_HEADROOM..TX_HEADROOM + len).unwrap_or_default());
                self.transmit.send(buf, len, self.mss);
                result
            }
            // Only an answer to a received frame comes here, when buffers are short: it is lost, as on the wire.
            _ => {
                self.transmit.counters.sent_dropped += 1;
                f(&mut alloc::vec![0; len])
            }
        }
    }
    fn set_meta(&mut self, meta: PacketMeta) {
        self.mss = meta.segmentation_offload_size.map(core::num::NonZeroU16::get);
    }
}

impl phy::Device for Phy {
    type RxToken<'a> = RxToken<'a>;
    type TxToken<'a> = TxToken<'a>;

    fn receive(&mut self, _: Instant) -> Option<(RxToken<'_>, TxToken<'_>)> {
        let received = self.current.take()?;
        let receive = RxToken { received, linear: &self.linear, used: &mut self.used };
        Some((receive, TxToken { transmit: &mut self.transmit, mss: None }))
    }

    fn transmit(&mut self, _: Instant) -> Option<TxToken<'_>> {
        if !self.transmit.is_ready() {
            self.transmit.refused = true;
            return None;
        }
        Some(TxToken { transmit: &mut self.transmit, mss: None })
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit =
            usize::from(self.transmit.properties.mtu) + ETHERNET_HEADER;
        capabilities.checksum.tcp = Checksum::None;
        capabilities.checksum.udp = Checksum::None;
        if self.transmit.tso {
            capabilities.segmentation.tcpv4 = NonZeroUsize::new(LONG_FRAME);
        }
        capabilities
    }
}

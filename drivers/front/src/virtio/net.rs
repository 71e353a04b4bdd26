//! virtio network device (virtio 1.2, 5.1) on our own ring: checksum and segmentation offload both ways.
//!
//! A frame to send has room for the header in front, so header and frame are one descriptor. Received
//! frames may lie in several page-sized buffers (mergeable buffers), which is how long frames arrive.

use alloc::boxed::Box;
use alloc::vec::Vec;

use janus_proto::abi::virtio::net::{
    Config, F_CSUM, F_GUEST_CSUM, F_GUEST_TSO4, F_GUEST_TSO6, F_HOST_TSO4, F_HOST_TSO6, F_MAC,
    F_MRG_RXBUF, F_MTU, F_STATUS, GsoType, HDR_F_DATA_VALID, HDR_F_NEEDS_CSUM, Header,
    QUEUE_RECEIVE, QUEUE_TRANSMIT, S_LINK_UP,
};
use janus_proto::addr::{Gpa, PAGE_SIZE};
use janus_proto::virtqueue::{QueueStats, Segment};
use zerocopy::{FromBytes, IntoBytes};

use super::{
    COMMON_FEATURES, InitError, Link, NEEDS_RESET, Queue, RingMemory, Transport, make_queue,
};
use crate::class::{
    NetDevice, NetOffloads, NetProperties, PeerError, RxChecksum, RxPart, TX_HEADROOM, TxFrame,
};
use crate::dma::{DmaBuf, FrameSource};

/// Most entries of each queue.
const QUEUE_SIZE: u16 = 256;
/// Bytes of the header.
const HEADER: usize = size_of::<Header>();
/// Pages of a receive buffer that holds a long frame in one piece.
const LONG_PAGES: usize = 16;
/// Ethernet header, the shortest frame that means anything.
const ETHERNET_HEADER: usize = 14;
/// Longest frame either way: 64 KiB of IP packet behind an Ethernet header.
const MAX_FRAME: usize = 65535 + ETHERNET_HEADER;

const FEATURES: u64 = COMMON_FEATURES
    | F_CSUM
    | F_GUEST_CSUM
    | F_MTU
    | F_MAC
    | F_GUEST_TSO4
    | F_GUEST_TSO6
    | F_HOST_TSO4
    | F_HOST_TSO6
    | F_MRG_RXBUF
    | F_STATUS;

macro_rules! config {
    ($field:ident) => {
        core::mem::offset_of!(Config, $field)
    };
}

/// One queue and the buffers that are in it, by head.
#[derive(Debug)]
struct Side {
    queue: Queue,
    buffers: Box<[Option<DmaBuf>]>,
}

impl Side {
    fn new(
        transport: &mut dyn Transport,
        frames: &'static dyn FrameSource,
        queue: u16,
        features: u64,
    ) -> Result<Self, InitError> {
        let queue = make_queue(transport, frames, queue, QUEUE_SIZE, 0, features)?;
        Ok(Self { buffers: (0..queue.size()).map(|_| None).collect(), queue })
    }
    fn add(&mut self, segment: Segment, buf: DmaBuf) -> Result<(), DmaBuf> {
        match self.queue.add(&[segment]) {
            Ok(head) => {
                if let Some(entry) = self.buffers.get_mut(usize::from(head)) {
                    *entry = Some(buf);
                }
                Ok(())
            }
            Err(_) => Err(buf),
        }
    }
    fn pop(&mut self) -> Result<Option<(DmaBuf, u32)>, PeerError> {
        let used = self.queue.pop().map_err(|error| PeerError(error.message()))?;
        Ok(used.and_then(|used| {
            Some((self.buffers.get_mut(usize::from(used.head))?.take()?, used.len))
        }))
    }
    fn take(&mut self) -> Option<DmaBuf> {
        self.buffers.iter_mut().find_map(Option::take)
    }
}

/// What a network card has done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NetStats {
    /// Counters of the receive queue.
    pub receive: QueueStats,
    /// Counters of the transmit queue.
    pub transmit: QueueStats,
    /// Received frames thrown away because their header made no sense.
    pub malformed: u64,
    /// Frames that the caller must not have sent (too short, too long, offload not negotiated), not sent.
    pub refused: u64,
}

/// What to put into the receive queue, if the device sends long frames and several buffers for one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReceiveBuffers {
    /// Single pages, as many as the queue holds: a long frame comes in many parts.
    Pages,
    /// So many buffers of 64 KiB: a long frame mostly comes in one part, which need not be copied together.
    Long(u16),
}

/// A virtio network card.
#[derive(Debug)]
pub struct VirtioNet {
    link: Link,
    frames: &'static dyn FrameSource,
    receive: Side,
    transmit: Side,
    features: u64,
    properties: NetProperties,
    /// Parts of a frame whose last buffers have not come yet, and how many are missing.
    partial: Vec<RxPart>,
    missing: u16,
    partial_checksum: RxChecksum,
    /// Buffers of frames that were refused, on their way back.
    returned: Vec<DmaBuf>,
    malformed: u64,
    refused: u64,
    /// Pages of each receive buffer, and how many buffers the queue gets.
    buffer_pages: usize,
    buffer_count: u16,
    dead: Option<PeerError>,
    /// The device was given up and did not even finish its reset.
    stuck: bool,
}

impl VirtioNet {
    /// Sets the device up and fills its receive queue with pages.
    ///
    /// # Errors
    /// See [`InitError`].
    pub fn new(
        transport: Box<dyn Transport>,
        frames: &'static dyn FrameSource,
    ) -> Result<Self, InitError> {
        Self::with_buffers(transport, frames, ReceiveBuffers::Pages)
    }

    /// Sets the device up and fills its receive queue.
    ///
    /// # Errors
    /// See [`InitError`].
    pub fn with_buffers(
        mut transport: Box<dyn Transport>,
        frames: &'static dyn FrameSource,
        buffers: ReceiveBuffers,
    ) -> Result<Self, InitError> {
        let mut wanted = FEATURES;
        transport.reset()?;
        if transport.read_device_features() & F_MRG_RXBUF == 0 {
            // Long frames would need 17 contiguous pages in every single receive buffer.
            wanted &= !(F_GUEST_TSO4 | F_GUEST_TSO6);
        }
        let features = transport.negotiate(wanted)?;
        let has = |feature: u64| features & feature == feature;
        let mut mac = [0x02, 0, 0, 0, 0, 0x01]; // locally administered, for a device that has none
        if has(F_MAC) {
            for (n, byte) in mac.iter_mut().enumerate() {
                *byte = transport.config_read8(config!(mac) + n);
            }
        }
        let mtu = if has(F_MTU) { transport.config_read16(config!(mtu)).max(68) } else { 1500 };
        // One buffer is one page; without mergeable buffers a longer frame cannot be received.
        let mtu = if has(F_MRG_RXBUF) { mtu } else { mtu.min(4000) };
        let mut offloads = NetOffloads::empty();
        offloads.set(NetOffloads::TX_CHECKSUM, has(F_CSUM));
        offloads.set(NetOffloads::TX_TSO4, has(F_CSUM | F_HOST_TSO4));
        offloads.set(NetOffloads::TX_TSO6, has(F_CSUM | F_HOST_TSO6));
        offloads.set(NetOffloads::RX_CHECKSUM, has(F_GUEST_CSUM));
        offloads.set(NetOffloads::RX_LARGE, features & (F_GUEST_TSO4 | F_GUEST_TSO6) != 0);
        let receive = Side::new(transport.as_mut(), frames, QUEUE_RECEIVE, features)?;
        let transmit = Side::new(transport.as_mut(), frames, QUEUE_TRANSMIT, features)?;
        let long = offloads.contains(NetOffloads::RX_LARGE);
        let (buffer_pages, buffer_count) = match buffers {
            ReceiveBuffers::Long(count) if long && count != 0 => {
                (LONG_PAGES, count.min(receive.queue.size()))
            }
            _ => (1, receive.queue.size()),
        };
        transport.start();
        let mut net = Self {
            link: Link::new(transport),
            frames,
            receive,
            transmit,
            features,
            properties: NetProperties { mac, mtu, offloads },
            partial: Vec::new(),
            missing: 0,
            partial_checksum: RxChecksum::Unknown,
            returned: Vec::new(),
            malformed: 0,
            refused: 0,
            buffer_pages,
            buffer_count,
            dead: None,
            stuck: false,
        };
        net.kick();
        if net.receive.queue.in_flight() == 0 {
            return Err(InitError::Memory);
        }
        Ok(net)
    }

    /// Counters.
    #[must_use]
    pub fn stats(&self) -> NetStats {
        NetStats {
            receive: self.receive.queue.stats(),
            transmit: self.transmit.queue.stats(),
            malformed: self.malformed,
            refused: self.refused,
        }
    }

    fn has(&self, feature: u64) -> bool {
        self.features & feature != 0
    }

    /// The header for a frame, or `None` if the frame must not be sent.
    fn header(&self, frame: &TxFrame) -> Option<Header> {
        let room = frame.buf.len().saturating_sub(TX_HEADROOM).min(MAX_FRAME);
        if !(ETHERNET_HEADER..=room).contains(&frame.len) {
            return None;
        }
        let mut header = Header {
            flags: 0,
            gso_type: GsoType::NONE,
            hdr_len: 0,
            gso_size: 0,
            csum_start: 0,
            csum_offset: 0,
            num_buffers: 0,
        };
        if let Some(checksum) = frame.checksum {
            let end = usize::from(checksum.start) + usize::from(checksum.offset) + 2;
            if !self.has(F_CSUM) || end > frame.len {
                return None;
            }
            header.flags = HDR_F_NEEDS_CSUM;
            header.csum_start = checksum.start;
            header.csum_offset = checksum.offset;
        }
        if let Some(segmentation) = frame.segmentation {
            let (feature, kind) = if segmentation.ipv6 {
                (F_HOST_TSO6, GsoType::TCPV6)
            } else {
                (F_HOST_TSO4, GsoType::TCPV4)
            };
            if !self.has(feature)
                || frame.checksum.is_none()
                || segmentation.mss == 0
                || usize::from(segmentation.header_len) > frame.len
            {
                return None;
            }
            header.gso_type = kind;
            header.gso_size = segmentation.mss;
            header.hdr_len = segmentation.header_len;
        }
        Some(header)
    }

    /// Puts empty buffers into the receive queue, from the frame source if too many are with the caller.
    fn refill(&mut self) {
        if self.receive.queue.in_flight() > self.buffer_count / 2 {
            return;
        }
        while self.receive.queue.in_flight() < self.buffer_count {
            let Some(buf) = DmaBuf::new(self.frames, self.buffer_pages * PAGE_SIZE) else {
                return;
            };
            if self.post(buf).is_err() {
                return;
            }
        }
    }

    fn post(&mut self, buf: DmaBuf) -> Result<(), DmaBuf> {
        // At most `LONG_PAGES`.
        let len = u32::try_from(buf.pages() * PAGE_SIZE).unwrap_or(0);
        self.receive.add(Segment { address: buf.guest_address(), len, writable: true }, buf)
    }

    fn give_up(&mut self, error: PeerError) -> PeerError {
        if self.dead.is_none() {
            log::error!("virtio-net: {error}");
            self.stuck = self.link.transport.reset().is_err();
            self.dead = Some(error);
            self.partial.clear();
            self.missing = 0;
        }
        error
    }

    /// Reads the header of a frame's first buffer: buffers in all, and what is known of the checksum.
    fn parse(&self, buf: &[u8], len: usize) -> Option<(u16, RxChecksum)> {
        let (header, _) = Header::read_from_prefix(buf.get(..len)?).ok()?;
        let buffers = if self.has(F_MRG_RXBUF) { header.num_buffers } else { 1 };
        if buffers == 0 || usize::from(buffers) > MAX_FRAME / 1024 {
            return None;
        }
        let long = GsoType(header.gso_type.0 & !GsoType::ECN.0);
        let allowed = match long {
            GsoType::NONE => true,
            GsoType::TCPV4 => self.has(F_GUEST_TSO4),
            GsoType::TCPV6 => self.has(F_GUEST_TSO6),
            _ => false,
        };
        let trusted = header.flags & (HDR_F_NEEDS_CSUM | HDR_F_DATA_VALID) != 0;
        if !allowed || (header.flags & HDR_F_NEEDS_CSUM != 0 && !self.has(F_GUEST_CSUM)) {
            return None;
        }
        let trusted = trusted && self.has(F_GUEST_CSUM);
        Some((buffers, if trusted { RxChecksum::Trusted } else { RxChecksum::Unknown }))
    }

    /// Throws the frame under way and `buf` away, back into the receive queue.
    fn discard(&mut self, buf: DmaBuf) {
        self.malformed += 1;
        self.missing = 0;
        self.recycle(buf);
        while let Some(part) = self.partial.pop() {
            self.recycle(part.buf);
        }
    }

    fn take_part(&mut self, buf: DmaBuf, len: usize) {
        if self.missing == 0 {
            match self.parse(&buf, len) {
                Some((buffers, checksum)) => {
                    self.missing = buffers - 1;
                    self.partial_checksum = checksum;
                    self.partial.push(RxPart { buf, offset: HEADER, len: len - HEADER });
                }
                None => self.discard(buf),
            }
        } else {
            self.missing -= 1;
            let so_far: usize = self.partial.iter().map(|part| part.len).sum();
            if len == 0 || so_far + len > MAX_FRAME {
                self.discard(buf);
            } else {
                self.partial.push(RxPart { buf, offset: 0, len });
            }
        }
    }
}

impl NetDevice for VirtioNet {
    fn properties(&self) -> NetProperties {
        self.properties
    }

    fn link_up(&self) -> bool {
        self.dead.is_none()
            && (!self.has(F_STATUS)
                || self.link.transport.config_read16(config!(status)) & S_LINK_UP != 0)
    }

    fn transmit(&mut self, mut frame: TxFrame) -> Result<(), TxFrame> {
        if self.dead.is_some() || self.transmit.queue.free() == 0 {
            return Err(frame);
        }
        let Some(header) = self.header(&frame) else {
            self.refused += 1;
            self.returned.push(frame.buf);
            return Ok(());
        };
        // The header ends where the frame begins: one descriptor covers both.
        let start = TX_HEADROOM - HEADER;
        if let Some(room) = frame.buf.get_mut(start..TX_HEADROOM) {
            room.copy_from_slice(header.as_bytes());
        }
        let segment = Segment {
            address: Gpa(frame.buf.guest_address().0 + start as u64),
            len: u32::try_from(HEADER + frame.len).unwrap_or(0), // at most MAX_FRAME and a header
            writable: false,
        };
        let TxFrame { buf, len, checksum, segmentation } = frame;
        self.transmit.add(segment, buf).map_err(|buf| TxFrame { buf, len, checksum, segmentation })
    }

    fn kick(&mut self) {
        if self.dead.is_some() {
            return;
        }
        self.refill();
        if self.receive.queue.publish() {
            self.link.transport.notify(QUEUE_RECEIVE);
        }
        if self.transmit.queue.publish() {
            self.link.transport.notify(QUEUE_TRANSMIT);
        }
    }

    fn transmitted(&mut self) -> Result<Option<DmaBuf>, PeerError> {
        if let Some(buf) = self.returned.pop() {
            return Ok(Some(buf));
        }
        if let Some(error) = self.dead {
            // A reset device has let go of everything; a stuck one keeps its buffers for good.
            return match if self.stuck { None } else { self.transmit.take() } {
                Some(buf) => Ok(Some(buf)),
                None => Err(error),
            };
        }
        match self.transmit.pop() {
            Ok(used) => Ok(used.map(|(buf, _)| buf)),
            Err(error) => Err(self.give_up(error)),
        }
    }

    fn receive(&mut self, parts: &mut Vec<RxPart>) -> Result<Option<RxChecksum>, PeerError> {
        parts.clear();
        if let Some(error) = self.dead {
            return Err(error);
        }
        loop {
            match self.receive.pop() {
                Ok(Some((buf, len))) => self.take_part(buf, len as usize),
                Ok(None) => {
                    if self.link.take_config_changed() && self.link.failed() {
                        return Err(self.give_up(NEEDS_RESET));
                    }
                    return Ok(None);
                }
                Err(error) => return Err(self.give_up(error)),
            }
            if self.missing == 0 && !self.partial.is_empty() {
                let frame: usize = self.partial.iter().map(|part| part.len).sum();
                if frame < ETHERNET_HEADER {
                    if let Some(part) = self.partial.pop() {
                        self.discard(part.buf);
                    }
                    continue;
                }
                parts.append(&mut self.partial);
                return Ok(Some(self.partial_checksum));
            }
        }
    }

    fn recycle(&mut self, buf: DmaBuf) {
        // A buffer that is not one of ours, or one too many, goes back to where it came from.
        let room = self.receive.queue.in_flight() < self.buffer_count;
        if self.dead.is_none() && buf.pages() == self.buffer_pages && room {
            drop(self.post(buf));
        }
    }

    fn arm(&mut self) -> bool {
        if self.dead.is_some() {
            return true;
        }
        // Frames sent free their buffers in no hurry: one interrupt for three quarters of them.
        let later = self.transmit.queue.in_flight() / 4 * 3;
        let sent = self.transmit.queue.in_flight() != 0 && self.transmit.queue.arm_after(later);
        let failed = self.link.take_config_changed() && self.link.failed();
        if failed {
            self.give_up(NEEDS_RESET);
        }
        self.receive.queue.arm() || sent || failed
    }
}

impl Drop for VirtioNet {
    fn drop(&mut self) {
        // The device must let go of rings and buffers before they are freed.
        if self.dead.is_none() {
            self.stuck = self.link.transport.reset().is_err();
        }
        if self.stuck {
            log::error!("virtio-net: the device did not finish its reset; its memory is leaked");
            for side in [&mut self.receive, &mut self.transmit] {
                side.queue.memories_mut().for_each(RingMemory::leak);
                while let Some(buf) = side.take() {
                    buf.leak();
                }
            }
        }
    }
}

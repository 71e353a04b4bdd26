//! The network card (virtio 1.2, 5.1), on the same networks as netback.

use std::collections::VecDeque;
use std::fmt;
use std::sync::atomic::{AtomicU16, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use janus_proto::abi::virtio::DeviceId;
use janus_proto::abi::virtio::net::{
    CTRL_ERR, CTRL_MQ, CTRL_MQ_VQ_PAIRS_SET, CTRL_OK, Config, F_CSUM, F_CTRL_VQ, F_GUEST_CSUM,
    F_GUEST_TSO4, F_GUEST_TSO6, F_HOST_TSO4, F_HOST_TSO6, F_MAC, F_MQ, F_MRG_RXBUF, F_MTU,
    F_STATUS, GsoType, HDR_F_DATA_VALID, HDR_F_NEEDS_CSUM, Header, S_LINK_UP,
};
use janus_proto::abi::xen_io::netif;
use janus_proto::virtqueue::QueueError;
use zerocopy::{FromZeros as _, IntoBytes as _};

use super::Model;
use super::device::Waker;
use super::queue::{Chain, Queue};
use crate::netback::checksum::{self, Place};
use crate::netback::{Accepts, Frame, Gso, NetBackend};

/// Entries of a queue.
const SIZE: u16 = 256;
/// Pairs of queues at most.
const MAX_PAIRS: u16 = 8;
/// Bytes of a header.
const HEADER: u32 = 12;
/// The shortest and the longest frame: 64 KiB of packet behind an Ethernet header.
const SHORTEST: usize = 14;
const LONGEST: usize = 65_536 + 14;
/// The longest frame that is not to be cut.
const PLAIN: usize = 1514;
/// Frames that wait for a receive queue.
const INBOX: usize = 256;
/// What every packet may have.
const MTU: u16 = 1500;

/// The receiving half of a pair.
#[derive(Debug, Default)]
struct Inbox {
    frames: VecDeque<Frame>,
    /// Buffers taken for a frame that needs more of them.
    held: Vec<Chain>,
}

/// A network card.
pub struct Net {
    net: Mutex<Box<dyn NetBackend + Send>>,
    mac: [u8; 6],
    sizes: Vec<u16>,
    inboxes: Vec<Mutex<Inbox>>,
    features: AtomicU64,
    /// Pairs in use.
    pairs: AtomicU16,
    dropped: AtomicU64,
    waker: Arc<OnceLock<Waker>>,
}

impl fmt::Debug for Net {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Net").field("mac", &self.mac).finish_non_exhaustive()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Is called, on any thread, when there may be frames for the guest.
pub type Bell = Arc<dyn Fn() + Send + Sync>;

impl Net {
    /// A card with so many pairs of queues (at least one, at most 8). `connect` makes its network, which rings the
    /// bell it is given, without a lock of its own, when there may be frames for the guest.
    ///
    /// # Errors
    /// Those of `connect`.
    pub fn new<E>(
        mac: [u8; 6],
        pairs: u16,
        connect: impl FnOnce(Bell) -> Result<Box<dyn NetBackend + Send>, E>,
    ) -> Result<Self, E> {
        let pairs = pairs.clamp(1, MAX_PAIRS);
        let waker: Arc<OnceLock<Waker>> = Arc::default();
        let of_bell = Arc::downgrade(&waker);
        let bell = move || {
            if let Some(waker) = of_bell.upgrade()
                && let Some(waker) = waker.get()
            {
                waker.wake(0);
            }
        };
        let net = Mutex::new(connect(Arc::new(bell))?);
        // With several pairs there is the control queue behind them.
        let queues = 2 * usize::from(pairs) + usize::from(pairs > 1);
        Ok(Self {
            net,
            mac,
            sizes: vec![SIZE; queues],
            inboxes: (0..pairs).map(|_| Mutex::default()).collect(),
            features: AtomicU64::new(0),
            pairs: AtomicU16::new(1),
            dropped: AtomicU64::new(0),
            waker,
        })
    }

    /// Frames that made no sense, or that the driver had no buffers for.
    #[must_use]
    pub fn dropped(&self) -> u64 {
        self.dropped.load(Ordering::Relaxed)
    }

    fn has(&self, features: u64) -> bool {
        self.features.load(Ordering::Relaxed) & features == features
    }

    fn wake(&self, queue: u16) {
        if let Some(waker) = self.waker.get() {
            waker.wake(queue);
        }
    }

    fn max_pairs(&self) -> u16 {
        u16::try_from(self.inboxes.len()).unwrap_or(1)
    }

    /// The number of the control queue (virtio 1.2, 5.1.2).
    fn control_queue(&self) -> u16 {
        if self.has(F_MQ) { 2 * self.max_pairs() } else { 2 }
    }

    /// Takes a frame out of a chain; `None`: it makes no sense.
    fn frame(&self, chain: &Chain, mut bytes: Vec<u8>) -> Option<Frame> {
        let header: Header = chain.read_object(0).ok()?;
        let len = usize::try_from(chain.readable().checked_sub(HEADER)?).ok()?;
        if !(SHORTEST..=LONGEST).contains(&len) {
            return None;
        }
        bytes.resize(len, 0);
        chain.read(HEADER, &mut bytes).ok()?;
        let blank = header.flags & HDR_F_NEEDS_CSUM != 0;
        if blank && !self.has(F_CSUM) {
            return None;
        }
        let kind = GsoType(header.gso_type.0 & !GsoType::ECN.0);
        let gso = match kind {
            GsoType::NONE => None,
            GsoType::TCPV4 if self.has(F_HOST_TSO4) => Some(netif::GsoType::TCPV4),
            GsoType::TCPV6 if self.has(F_HOST_TSO6) => Some(netif::GsoType::TCPV6),
            _ => return None,
        };
        let gso = gso.map(|kind| Gso { size: header.gso_size, kind });
        if gso.is_some_and(|gso| gso.size == 0 || !blank) || (gso.is_none() && len > PLAIN) {
            return None;
        }
        let (start, offset) = (header.csum_start, header.csum_offset);
        let usual = |place: Place| (place.start, place.offset) == (start, offset);
        let mut checksum_blank = blank;
        if blank && !checksum::place(&bytes).is_some_and(usual) {
            // Of a protocol that the network does not fill it in for.
            if gso.is_some() {
                return None;
            }
            checksum::fill(&mut bytes, start, offset)?;
            checksum_blank = false;
        }
        Some(Frame { bytes, checksum_blank, validated: false, gso })
    }

    fn transmit(&self, queue: &mut Queue) -> Result<(), QueueError> {
        queue.each(|chain| {
            let buffer = lock(&self.net).buffer();
            match self.frame(chain, buffer) {
                Some(frame) => lock(&self.net).send(frame),
                None => {
                    self.dropped.fetch_add(1, Ordering::Relaxed);
                }
            }
            0
        })?;
        // Answers may be there already.
        self.wake(0);
        Ok(())
    }

    /// The header of a frame for the guest; `None`: the driver cannot take it.
    fn header(&self, frame: &Frame) -> Option<Header> {
        let mut header = Header { num_buffers: 1, ..Header::new_zeroed() };
        if frame.validated && self.has(F_GUEST_CSUM) {
            header.flags = HDR_F_DATA_VALID;
        }
        // Networks say it of every frame: one that is neither TCP nor UDP has no such sum.
        let place = checksum::place(&frame.bytes);
        if frame.gso.is_some() || (frame.checksum_blank && place.is_some()) {
            let Place { start, offset, header_len } = place?;
            self.has(F_GUEST_CSUM).then_some(())?;
            header.flags = HDR_F_NEEDS_CSUM;
            (header.csum_start, header.csum_offset) = (start, offset);
            header.hdr_len = header_len;
        }
        if let Some(gso) = frame.gso {
            let (kind, feature) = match gso.kind {
                netif::GsoType::TCPV4 => (GsoType::TCPV4, F_GUEST_TSO4),
                netif::GsoType::TCPV6 => (GsoType::TCPV6, F_GUEST_TSO6),
                _ => return None,
            };
            self.has(feature).then_some(())?;
            (header.gso_type, header.gso_size) = (kind, gso.size);
        }
        Some(header)
    }

    /// Which pair a frame goes to: always the same for one connection.
    fn pair_of(&self, bytes: &[u8]) -> usize {
        let pairs = usize::from(self.pairs.load(Ordering::Relaxed).max(1));
        if pairs == 1 {
            return 0;
        }
        // Addresses and ports of TCP and UDP over IPv4 without options; of others, whatever is there.
        let flow = bytes.get(26..38.min(bytes.len())).unwrap_or_default();
        let mix = |hash: usize, byte: &u8| hash.wrapping_mul(31).wrapping_add((*byte).into());
        flow.iter().fold(0, mix) % pairs
    }

    /// Takes frames from the network, as many as there is room for; answers the pairs that got some.
    fn distribute(&self) -> Vec<usize> {
        let mut got = Vec::new();
        let mut net = lock(&self.net);
        let has_room = |inbox: &Mutex<Inbox>| lock(inbox).frames.len() < INBOX;
        while self.inboxes.iter().all(has_room)
            && let Some(frame) = net.receive()
        {
            let pair = self.pair_of(&frame.bytes);
            if let Some(inbox) = self.inboxes.get(pair) {
                lock(inbox).frames.push_back(frame);
                if !got.contains(&pair) {
                    got.push(pair);
                }
            }
        }
        got
    }

    fn receive(&self, pair: usize, queue: &mut Queue) -> Result<(), QueueError> {
        let Some(inbox) = self.inboxes.get(pair) else { return Ok(()) };
        loop {
            let got = self.distribute();
            let mut inbox = lock(inbox);
            while let Some(frame) = inbox.frames.pop_front() {
                match self.deliver(&frame, &mut inbox.held, queue)? {
                    true => lock(&self.net).recycle(frame.bytes),
                    false => {
                        inbox.frames.push_front(frame);
                        return Ok(());
                    }
                }
            }
            drop(inbox);
            let others = got.iter().filter(|other| **other != pair);
            for other in others.filter_map(|other| u16::try_from(2 * other).ok()) {
                self.wake(other);
            }
            if got.is_empty() {
                return Ok(());
            }
        }
    }

    /// Puts a frame into the driver's buffers; `false`: there are not enough.
    fn deliver(
        &self,
        frame: &Frame,
        held: &mut Vec<Chain>,
        queue: &mut Queue,
    ) -> Result<bool, QueueError> {
        let dropped = || {
            self.dropped.fetch_add(1, Ordering::Relaxed);
            Ok(true)
        };
        let mergeable = self.has(F_MRG_RXBUF);
        let Some(mut header) = self.header(frame) else { return dropped() };
        let needed = HEADER as usize + frame.bytes.len();
        let room =
            |held: &[Chain]| held.iter().map(|chain| chain.writable() as usize).sum::<usize>();
        while room(held) < needed {
            // Without mergeable buffers it is the first one or none; a driver that gives tiny ones gets nothing.
            if (!mergeable && !held.is_empty()) || held.len() >= usize::from(SIZE) {
                return dropped();
            }
            match queue.pop()? {
                Some(chain) => held.push(chain),
                None => {
                    queue.publish()?;
                    if !queue.arm()? {
                        return Ok(false);
                    }
                }
            }
        }
        let mut used = Vec::new();
        let mut left = needed;
        while left > 0 && !held.is_empty() {
            let chain = held.remove(0);
            let part = left.min(chain.writable() as usize);
            left -= part;
            used.push((chain, part));
        }
        header.num_buffers = u16::try_from(used.len()).unwrap_or(1);
        let header = header.as_bytes();
        let mut at = 0;
        for (chain, part) in &used {
            // The header first, then the frame, as if they were one.
            let head = header.get(at.min(header.len())..(at + part).min(header.len()));
            let head = head.unwrap_or_default();
            let from = (at + head.len()).saturating_sub(header.len());
            let body = frame.bytes.get(from..from + part - head.len()).unwrap_or_default();
            let behind = u32::try_from(head.len()).unwrap_or(0);
            let written = chain.write(0, head).and_then(|()| chain.write(behind, body));
            written.map_err(|_| QueueError::Address)?;
            at += part;
        }
        for (chain, part) in used {
            queue.push(chain, u32::try_from(part).unwrap_or(0))?;
        }
        Ok(true)
    }

    fn control(&self, chain: &Chain) -> u32 {
        let Some(room) = chain.writable().checked_sub(1) else { return 0 };
        let mut command = [0; 4];
        let known = chain.readable() == 4 && chain.read(0, &mut command).is_ok();
        let [class, kind, low, high] = command;
        let pairs = u16::from_le_bytes([low, high]);
        let done = known
            && self.has(F_MQ)
            && (class, kind) == (CTRL_MQ, CTRL_MQ_VQ_PAIRS_SET)
            && (1..=self.max_pairs()).contains(&pairs);
        if done {
            self.pairs.store(pairs, Ordering::Relaxed);
        }
        let answer = if done { CTRL_OK } else { CTRL_ERR };
        u32::from(chain.write(room, &[answer]).is_ok())
    }
}

impl Model for Net {
    fn id(&self) -> DeviceId {
        DeviceId::NET
    }

    fn features(&self) -> u64 {
        let offloads = F_CSUM | F_GUEST_CSUM | F_HOST_TSO4 | F_HOST_TSO6;
        let guest = F_GUEST_TSO4 | F_GUEST_TSO6 | F_MRG_RXBUF;
        let pairs = if self.inboxes.len() > 1 { F_CTRL_VQ | F_MQ } else { 0 };
        offloads | guest | F_MAC | F_MTU | F_STATUS | pairs
    }

    fn queues(&self) -> &[u16] {
        &self.sizes
    }

    fn config(&self) -> Vec<u8> {
        let max_virtqueue_pairs = self.max_pairs();
        let config = Config { mac: self.mac, status: S_LINK_UP, max_virtqueue_pairs, mtu: MTU };
        config.as_bytes().to_vec()
    }

    fn attach(&self, waker: Waker) {
        // Called once.
        let _ = self.waker.set(waker);
    }

    fn start(&self, features: u64) {
        self.features.store(features, Ordering::Relaxed);
        self.pairs.store(1, Ordering::Relaxed);
        let long = self.has(F_MRG_RXBUF) || self.has(F_GUEST_TSO4) || self.has(F_GUEST_TSO6);
        let checksum_blank = self.has(F_GUEST_CSUM);
        let gso_tcpv4 = checksum_blank && self.has(F_GUEST_TSO4);
        let gso_tcpv6 = checksum_blank && self.has(F_GUEST_TSO6);
        lock(&self.net).connected(Accepts { long, checksum_blank, gso_tcpv4, gso_tcpv6 });
    }

    fn stop(&self) {
        for inbox in &self.inboxes {
            *lock(inbox) = Inbox::default();
        }
    }

    fn serve(&self, index: u16, queue: &mut Queue) -> Result<(), QueueError> {
        match index {
            _ if index == self.control_queue() && self.has(F_CTRL_VQ) => {
                queue.each(|chain| self.control(chain))
            }
            _ if index.is_multiple_of(2) => self.receive(usize::from(index / 2), queue),
            _ => self.transmit(queue),
        }
    }
}

#[cfg(test)]
mod tests;

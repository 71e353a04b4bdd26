//! A wire between two network cards, in one process: the cards check what drivers' peers check, cut long frames,
//! and the wire loses, reorders and corrupts as told.

use alloc::collections::VecDeque;
use alloc::sync::{Arc, Weak};
use alloc::vec::Vec;
use std::sync::{Mutex, MutexGuard};

use janus_front::class::*;
use janus_front::dma::DmaBuf;
use janus_front::heap_frames::HeapFrames;

use super::super::checksum::{ETHERNET_HEADER, Transport};
use super::super::{Ipv4Address, Ipv4Cidr, Net};

pub(super) const MTU: u16 = 1500;
const QUEUE: usize = 64;
/// Bytes of a receive buffer: a long frame takes several.
const PART: usize = 4096;

/// Faults, one in so many frames; 0: never.
#[derive(Clone, Copy, Default)]
pub(super) struct Faults {
    pub(super) lose: u32,
    pub(super) swap: u32,
    pub(super) corrupt: u32,
}

#[derive(Default)]
struct End {
    arriving: VecDeque<(Vec<u8>, RxChecksum)>,
    net: Weak<Net>,
}

#[derive(Default)]
pub(super) struct Wire {
    ends: [End; 2],
    pub(super) faults: Faults,
    random: u32,
    pub(super) long_frames: u64,
    pub(super) segments: u64,
    pub(super) lost: u64,
    /// Card 0 breaks the protocol from now on.
    pub(super) lie: bool,
    /// Card 0's transmit queue is stuck.
    pub(super) stuck: bool,
}

impl Wire {
    fn chance(&mut self, one_in: u32) -> bool {
        // xorshift32
        let mut x = self.random;
        x ^= x << 13;
        x ^= x >> 17;
        x ^= x << 5;
        self.random = x;
        one_in != 0 && x.is_multiple_of(one_in)
    }

    fn deliver(&mut self, to: usize, mut frame: Vec<u8>, checksum: RxChecksum) {
        if self.chance(self.faults.lose) {
            self.lost += 1;
            return;
        }
        if self.chance(self.faults.corrupt) {
            let at = ETHERNET_HEADER + 20 + frame.len() % 7;
            frame[at] ^= 0x40;
        }
        let swap = self.chance(self.faults.swap);
        let queue = &mut self.ends[to].arriving;
        match queue.pop_back() {
            Some(last) if swap => {
                queue.push_back((frame, checksum));
                queue.push_back(last);
            }
            last => {
                queue.extend(last);
                queue.push_back((frame, checksum));
            }
        }
    }
}

pub(super) struct Card {
    wire: Arc<Mutex<Wire>>,
    index: usize,
    offloads: NetOffloads,
    peer_large: bool,
    queued: Vec<DmaBuf>,
    sent: VecDeque<DmaBuf>,
    frames: &'static HeapFrames,
    notify_peer: bool,
}

impl Card {
    fn wire(&self) -> MutexGuard<'_, Wire> {
        self.wire.lock().unwrap()
    }

    /// What a real device does with a long frame: RFC 9293 segments, each with its own lengths and checksums.
    fn cut(&self, frame: &[u8], cut: Segmentation) {
        let packet = Transport::parse(frame).expect("a segmented frame is TCP over IPv4");
        let (start, header, end) = packet.extent();
        assert_eq!(start + header, usize::from(cut.header_len));
        assert!(
            usize::from(cut.mss) + header + 20 <= usize::from(MTU),
            "the segments fit the wire"
        );
        assert_eq!(end, frame.len());
        let payload = &frame[start + header..];
        assert!(payload.len() > usize::from(cut.mss), "only long frames are cut");
        let sequence = u32::from_be_bytes(frame[start + 4..start + 8].try_into().unwrap());
        let pieces = payload.len().div_ceil(usize::from(cut.mss));
        for (i, piece) in payload.chunks(usize::from(cut.mss)).enumerate() {
            let mut segment = frame[..start + header].to_vec();
            segment.extend_from_slice(piece);
            let total = (segment.len() - ETHERNET_HEADER) as u16;
            segment[16..18].copy_from_slice(&total.to_be_bytes());
            let at = sequence.wrapping_add((i * usize::from(cut.mss)) as u32);
            segment[start + 4..start + 8].copy_from_slice(&at.to_be_bytes());
            if i + 1 < pieces {
                segment[start + 13] &= !0b1001; // PSH and FIN only in the last
            }
            segment[24..26].fill(0);
            let ip_sum = !super::super::internet_sum(&segment[14..start]);
            segment[24..26].copy_from_slice(&ip_sum.to_be_bytes());
            Transport::parse(&segment).unwrap().fill(&mut segment);
            let mut wire = self.wire();
            wire.segments += 1;
            wire.deliver(1 - self.index, segment, RxChecksum::Unknown);
        }
    }
}

impl NetDevice for Card {
    fn properties(&self) -> NetProperties {
        let mac = [2, 0, 0, 0, 0, self.index as u8 + 1];
        NetProperties { mac, mtu: MTU, offloads: self.offloads }
    }
    fn link_up(&self) -> bool {
        true
    }
    fn transmit(&mut self, frame: TxFrame) -> Result<(), TxFrame> {
        if self.queued.len() + self.sent.len() >= QUEUE || (self.wire().stuck && self.index == 0) {
            return Err(frame);
        }
        let TxFrame { buf, len, checksum, segmentation } = frame;
        let mut bytes = buf[TX_HEADROOM..TX_HEADROOM + len].to_vec();
        self.notify_peer = true;
        if let Some(partial) = checksum {
            assert!(self.offloads.contains(NetOffloads::TX_CHECKSUM));
            // The device sums from `start` on, over the pseudo header's sum that the driver left in the field.
            let sum = !super::super::internet_sum(&bytes[usize::from(partial.start)..]);
            let whole = Transport::parse(&bytes).expect("partial checksums are for TCP and UDP");
            let mut filled = bytes.clone();
            whole.fill(&mut filled);
            let at = usize::from(partial.start + partial.offset);
            if segmentation.is_none() {
                assert_eq!(filled[at..at + 2], sum.to_be_bytes(), "pseudo header's sum");
            }
            if !self.peer_large {
                bytes = filled;
            }
        }
        match segmentation {
            Some(cut) if !self.peer_large => self.cut(&bytes, cut),
            _ => {
                assert!(segmentation.is_some() || len <= usize::from(MTU) + ETHERNET_HEADER);
                if let Some(cut) = segmentation {
                    let packet = Transport::parse(&bytes).expect("TCP over IPv4");
                    assert_eq!(packet.extent().0 + packet.extent().1, usize::from(cut.header_len));
                }
                let unfilled = checksum.is_some() && self.peer_large;
                let state = if unfilled { RxChecksum::Trusted } else { RxChecksum::Unknown };
                let mut wire = self.wire();
                wire.long_frames += u64::from(segmentation.is_some());
                wire.deliver(1 - self.index, bytes, state);
            }
        }
        self.queued.push(buf);
        Ok(())
    }
    fn kick(&mut self) {
        self.sent.extend(self.queued.drain(..));
        if core::mem::take(&mut self.notify_peer) {
            let peer = self.wire().ends[1 - self.index].net.upgrade();
            if let Some(peer) = peer {
                peer.interrupt();
            }
        }
    }
    fn transmitted(&mut self) -> Result<Option<DmaBuf>, PeerError> {
        Ok(self.sent.pop_front())
    }
    fn receive(&mut self, parts: &mut Vec<RxPart>) -> Result<Option<RxChecksum>, PeerError> {
        let mut wire = self.wire();
        if wire.lie && self.index == 0 {
            return Err(PeerError("response index ran ahead"));
        }
        let Some((frame, checksum)) = wire.ends[self.index].arriving.pop_front() else {
            return Ok(None);
        };
        drop(wire);
        for piece in frame.chunks(PART - 64) {
            let mut buf = DmaBuf::new(self.frames, PART).expect("memory");
            buf[32..32 + piece.len()].copy_from_slice(piece);
            parts.push(RxPart { buf, offset: 32, len: piece.len() });
        }
        Ok(Some(checksum))
    }
    fn recycle(&mut self, buf: DmaBuf) {
        drop(buf);
    }
    fn arm(&mut self) -> bool {
        !self.wire().ends[self.index].arriving.is_empty() || !self.sent.is_empty()
    }
}

/// What both cards of a pair can do.
#[derive(Clone, Copy, Debug)]
pub(super) enum Cards {
    Plain,
    Checksums,
    /// Segmentation by the sender's card.
    Cutting,
    /// Long frames all the way.
    Large,
}

pub(super) struct Pair {
    pub(super) a: Arc<Net>,
    pub(super) b: Arc<Net>,
    pub(super) wire: Arc<Mutex<Wire>>,
    pub(super) frames: &'static HeapFrames,
}

pub(super) const A: Ipv4Address = Ipv4Address::new(10, 0, 0, 1);
pub(super) const B: Ipv4Address = Ipv4Address::new(10, 0, 0, 2);

/// Two hosts on one wire, with addresses.
pub(super) fn pair(cards: Cards, faults: Faults) -> Pair {
    use NetOffloads as O;
    let offloads = match cards {
        Cards::Plain => O::empty(),
        Cards::Checksums => O::TX_CHECKSUM | O::RX_CHECKSUM,
        Cards::Cutting => O::TX_CHECKSUM | O::TX_TSO4,
        Cards::Large => O::all(),
    };
    let wire = Arc::new(Mutex::new(Wire { random: 0x1234_5678, faults, ..Wire::default() }));
    let frames = HeapFrames::leaked();
    let host = |index: usize, address: Ipv4Address| {
        let card = Card {
            wire: Arc::clone(&wire),
            index,
            offloads,
            peer_large: offloads.contains(O::RX_LARGE),
            queued: Vec::new(),
            sent: VecDeque::new(),
            frames,
            notify_peer: false,
        };
        let net = Net::start("test".into(), Box::new(card), frames, 0xDEAD_BEEF + index as u64);
        net.set_static(Ipv4Cidr::new(address, 24), None).unwrap();
        wire.lock().unwrap().ends[index].net = Arc::downgrade(&net);
        net
    };
    let (a, b) = (host(0, A), host(1, B));
    Pair { a, b, wire, frames }
}

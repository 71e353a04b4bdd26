//! The network driver against a card in memory, honest and lying.

use alloc::boxed::Box;
use alloc::vec;
use alloc::vec::Vec;

use janus_proto::abi::virtio::net::{
    F_CSUM, F_GUEST_CSUM, F_GUEST_TSO4, F_GUEST_TSO6, F_HOST_TSO4, F_HOST_TSO6, F_MAC, F_MRG_RXBUF,
    F_MTU, F_STATUS, GsoType, HDR_F_DATA_VALID, HDR_F_NEEDS_CSUM, Header,
};
use janus_proto::abi::virtio::{DeviceId, feature};
use zerocopy::{FromBytes, FromZeros, IntoBytes};

use super::COMMON_FEATURES;
use super::fake::{FakeDevice, read, write};
use super::net::{ReceiveBuffers, VirtioNet};
use crate::class::{
    NetDevice, NetOffloads, PartialChecksum, RxChecksum, RxPart, Segmentation, TX_HEADROOM, TxFrame,
};
use crate::dma::DmaBuf;
use crate::heap_frames::HeapFrames;

const OFFLOADS: u64 =
    F_CSUM | F_GUEST_CSUM | F_GUEST_TSO4 | F_GUEST_TSO6 | F_HOST_TSO4 | F_HOST_TSO6;
const ALL: u64 = COMMON_FEATURES | OFFLOADS | F_MAC | F_MTU | F_MRG_RXBUF | F_STATUS;
const CONFIG: [u8; 12] = [0x52, 0x54, 0, 1, 2, 3, 1, 0, 1, 0, 0x00, 0x20]; // link up, MTU 8192

struct Card {
    device: FakeDevice,
    frames: &'static HeapFrames,
}

impl Card {
    fn new(offered: u64) -> Self {
        let device = FakeDevice::new(DeviceId::NET, offered, CONFIG.to_vec(), &[64, 64]);
        Self { device, frames: HeapFrames::leaked() }
    }
    fn driver(&self) -> VirtioNet {
        VirtioNet::new(Box::new(self.device.clone()), self.frames).unwrap()
    }
    fn frame(&self, payload: &[u8]) -> TxFrame {
        let mut buf = DmaBuf::new(self.frames, TX_HEADROOM + payload.len()).unwrap();
        buf[TX_HEADROOM..TX_HEADROOM + payload.len()].copy_from_slice(payload);
        TxFrame { buf, len: payload.len(), checksum: None, segmentation: None }
    }
    /// Takes what was sent: header and frame.
    fn sent(&self) -> Vec<(Header, Vec<u8>)> {
        let mut sent = Vec::new();
        self.device.serve(1, |chain| {
            assert_eq!(chain.len(), 1, "header and frame are one descriptor");
            let bytes = read(chain[0]);
            let (header, frame) = Header::read_from_prefix(&bytes).unwrap();
            sent.push((header, frame.to_vec()));
            0
        });
        sent
    }
    /// Delivers buffers with these contents, one each; returns whether an interrupt is due.
    fn deliver(&self, buffers: &[Vec<u8>]) -> bool {
        let mut registers = self.device.registers();
        let queue = registers.queues[0].as_mut().unwrap();
        let memory = super::fake::ProcessMemory;
        let mut chain = Vec::new();
        for bytes in buffers {
            let head = queue.device.pop(&memory, &mut chain).unwrap().unwrap();
            write(chain[0], bytes);
            queue.device.push(&memory, head, bytes.len() as u32).unwrap();
        }
        queue.device.publish(&memory).unwrap()
    }
}

fn header(change: impl FnOnce(&mut Header)) -> Vec<u8> {
    let mut header = Header::new_zeroed();
    header.num_buffers = 1;
    change(&mut header);
    header.as_bytes().to_vec()
}

/// One received frame: its bytes and what is known of its checksum.
fn receive(driver: &mut VirtioNet) -> Option<(Vec<u8>, RxChecksum)> {
    let mut parts: Vec<RxPart> = Vec::new();
    let checksum = driver.receive(&mut parts).unwrap()?;
    let mut frame = Vec::new();
    for part in parts {
        frame.extend_from_slice(&part.buf[part.offset..part.offset + part.len]);
        driver.recycle(part.buf);
    }
    Some((frame, checksum))
}

#[test]
fn properties_are_what_was_negotiated() {
    let card = Card::new(ALL);
    let driver = card.driver();
    let properties = driver.properties();
    assert_eq!((properties.mac, properties.mtu), ([0x52, 0x54, 0, 1, 2, 3], 8192));
    assert_eq!(properties.offloads, NetOffloads::all());
    assert!(driver.link_up());
    card.device.registers().config[6] = 0;
    assert!(!driver.link_up());
    // Long frames only with mergeable buffers.
    let card = Card::new(ALL & !F_MRG_RXBUF);
    let driver = card.driver();
    assert_eq!(driver.properties().offloads, NetOffloads::all() - NetOffloads::RX_LARGE);
    assert_eq!(driver.properties().mtu, 4000);
    assert_eq!(card.device.registers().taken & (F_GUEST_TSO4 | F_GUEST_TSO6), 0);
    assert_eq!(Card::new(feature::VERSION_1).driver().properties().offloads, NetOffloads::empty());
}

#[test]
fn frames_are_sent_with_their_offloads_and_come_back() {
    let card = Card::new(ALL);
    let mut driver = card.driver();
    let plain: Vec<u8> = (0..60).collect();
    let long: Vec<u8> = (0..60000u32).map(|n| n as u8).collect();
    driver.transmit(card.frame(&plain)).unwrap();
    let mut frame = card.frame(&long);
    frame.checksum = Some(PartialChecksum { start: 34, offset: 16 });
    frame.segmentation = Some(Segmentation { mss: 1448, header_len: 66, ipv6: false });
    driver.transmit(frame).unwrap();
    let before = card.device.kicks(1);
    driver.kick();
    assert_eq!(card.device.kicks(1), before + 1);
    let sent = card.sent();
    assert_eq!(sent[0].1, plain);
    assert_eq!((sent[0].0.flags, sent[0].0.gso_type), (0, GsoType::NONE));
    assert_eq!(sent[1].1, long);
    let header = sent[1].0;
    assert_eq!((header.flags, header.csum_start, header.csum_offset), (HDR_F_NEEDS_CSUM, 34, 16));
    assert_eq!((header.gso_type, header.gso_size, header.hdr_len), (GsoType::TCPV4, 1448, 66));
    assert!(driver.transmitted().unwrap().is_some());
    assert!(driver.transmitted().unwrap().is_some());
    assert!(driver.transmitted().unwrap().is_none());
}

#[test]
fn frames_that_must_not_be_sent_come_back_unsent() {
    let card = Card::new(ALL & !(F_HOST_TSO6 | F_HOST_TSO4));
    let mut driver = card.driver();
    let refuse = |driver: &mut VirtioNet, change: &dyn Fn(&mut TxFrame)| {
        let mut frame = card.frame(&[0; 100]);
        change(&mut frame);
        driver.transmit(frame).unwrap();
        driver.kick();
        assert!(card.sent().is_empty());
        assert!(driver.transmitted().unwrap().is_some());
    };
    refuse(&mut driver, &|frame| frame.len = 13);
    refuse(&mut driver, &|frame| frame.len = 1 << 20);
    refuse(&mut driver, &|frame| frame.len = usize::MAX);
    refuse(&mut driver, &|frame| frame.checksum = Some(PartialChecksum { start: 90, offset: 10 }));
    refuse(&mut driver, &|frame| {
        frame.checksum = Some(PartialChecksum { start: u16::MAX, offset: u16::MAX })
    });
    refuse(&mut driver, &|frame| {
        frame.checksum = Some(PartialChecksum { start: 34, offset: 16 });
        frame.segmentation = Some(Segmentation { mss: 1000, header_len: 54, ipv6: true });
    });
    assert_eq!(driver.stats().refused, 6);
}

#[test]
fn a_full_transmit_queue_gives_the_frame_back() {
    let card = Card::new(ALL);
    let mut driver = card.driver();
    for _ in 0..64 {
        driver.transmit(card.frame(&[1; 60])).unwrap();
    }
    let back = driver.transmit(card.frame(&[2; 60])).unwrap_err();
    assert_eq!((back.len, back.buf[TX_HEADROOM]), (60, 2));
    driver.kick();
    // Interrupts for frames sent are put off: one for three quarters of them.
    assert!(!driver.arm());
    let mut registers = card.device.registers();
    let queue = registers.queues[1].as_mut().unwrap();
    let mut interrupts = 0;
    let mut chain = Vec::new();
    while let Some(head) = queue.device.pop(&super::fake::ProcessMemory, &mut chain).unwrap() {
        queue.device.push(&super::fake::ProcessMemory, head, 0).unwrap();
        interrupts += u32::from(queue.device.publish(&super::fake::ProcessMemory).unwrap());
    }
    assert_eq!(interrupts, 1);
    drop(registers);
    let mut back = 0;
    while driver.transmitted().unwrap().is_some() {
        back += 1;
    }
    assert_eq!(back, 64);
}

#[test]
fn frames_arrive_whole_from_one_or_many_buffers() {
    let card = Card::new(ALL);
    let mut driver = card.driver();
    assert!(!driver.arm());
    let short: Vec<u8> = (0..64).collect();
    let long: Vec<u8> = (0..20000u32).map(|n| (n * 3) as u8).collect();
    let mut buffers = vec![[header(|_| ()), short.clone()].concat()];
    let first = header(|header| {
        header.num_buffers = 5;
        header.flags = HDR_F_NEEDS_CSUM;
        header.gso_type = GsoType(GsoType::TCPV4.0 | GsoType::ECN.0);
    });
    buffers.push([first, long[..4084].to_vec()].concat());
    buffers.extend(long[4084..].chunks(4096).map(<[u8]>::to_vec));
    assert!(card.deliver(&buffers));
    assert_eq!(receive(&mut driver), Some((short.clone(), RxChecksum::Unknown)));
    assert_eq!(receive(&mut driver), Some((long.clone(), RxChecksum::Trusted)));
    assert_eq!(receive(&mut driver), None);
    // The rest of a frame may come later.
    let valid = header(|header| {
        header.num_buffers = 2;
        header.flags = HDR_F_DATA_VALID;
    });
    card.deliver(&[[valid, long[..4084].to_vec()].concat()]);
    assert_eq!(receive(&mut driver), None);
    card.deliver(&[long[4084..5000].to_vec()]);
    assert_eq!(receive(&mut driver), Some((long[..5000].to_vec(), RxChecksum::Trusted)));
}

#[test]
fn a_long_frame_arrives_in_one_long_buffer() {
    let card = Card::new(ALL);
    let long = |card: &Card, count| {
        let device = Box::new(card.device.clone());
        VirtioNet::with_buffers(device, card.frames, ReceiveBuffers::Long(count)).unwrap()
    };
    let mut driver = long(&card, 8);
    let frame: Vec<u8> = (0..65_000_u32).map(|n| (n * 3) as u8).collect();
    for _ in 0..40 {
        card.deliver(&[[header(|_| ()), frame.clone()].concat()]);
        let mut parts = Vec::new();
        driver.receive(&mut parts).unwrap().unwrap();
        let part = parts.pop().unwrap();
        assert!(parts.is_empty() && part.buf[part.offset..][..part.len] == frame);
        driver.recycle(part.buf);
        driver.kick();
    }
    drop(driver);
    assert_eq!(card.frames.pages_out(), 0);
    // A card that sends no long frames gets pages.
    let card = Card::new(ALL & !(F_GUEST_TSO4 | F_GUEST_TSO6));
    let driver = long(&card, 8);
    assert!(card.frames.pages_out() < 128);
    drop(driver);
}

#[test]
fn the_receive_queue_stays_filled_for_thousands_of_frames() {
    let card = Card::new(ALL);
    let mut driver = card.driver();
    let mut kept = Vec::new();
    for n in 0..5000u32 {
        card.deliver(&[[header(|_| ()), n.to_le_bytes().repeat(20)].concat()]);
        let mut parts = Vec::new();
        driver.receive(&mut parts).unwrap().unwrap();
        let part = parts.pop().unwrap();
        assert_eq!(&part.buf[12..16], &n.to_le_bytes());
        // Sometimes the caller keeps buffers for long.
        if n % 3 == 0 && kept.len() < 200 {
            kept.push(part.buf)
        } else {
            driver.recycle(part.buf)
        }
        driver.kick();
    }
    assert!(card.frames.pages_out() < 64 + 64 + 200 + 20);
    kept.into_iter().for_each(|buf| driver.recycle(buf));
    drop(driver);
    assert_eq!(card.frames.pages_out(), 0);
}

#[test]
fn malformed_frames_are_dropped_and_counted() {
    let card = Card::new(ALL & !(F_GUEST_TSO6 | F_GUEST_CSUM));
    let mut driver = card.driver();
    let frame = vec![7u8; 60];
    let bad = [
        [header(|header| header.num_buffers = 0), frame.clone()].concat(),
        [header(|header| header.num_buffers = 1000), frame.clone()].concat(),
        [header(|header| header.gso_type = GsoType::TCPV6), frame.clone()].concat(),
        [header(|header| header.gso_type = GsoType(77)), frame.clone()].concat(),
        [header(|header| header.flags = HDR_F_NEEDS_CSUM), frame.clone()].concat(),
        header(|_| ())[..5].to_vec(),
        header(|_| ()),
        Vec::new(),
    ];
    for bytes in &bad {
        card.deliver(&[bytes.clone(), [header(|_| ()), frame.clone()].concat()]);
        assert_eq!(receive(&mut driver), Some((frame.clone(), RxChecksum::Unknown)), "{bytes:x?}");
        assert_eq!(receive(&mut driver), None);
        driver.kick();
    }
    // A frame of many buffers that grows too long, or has an empty part.
    let huge = header(|header| header.num_buffers = 40);
    let mut buffers = vec![[huge, vec![1; 4084]].concat()];
    buffers.extend((0..16).map(|_| vec![1; 4096]));
    card.deliver(&buffers);
    assert_eq!(receive(&mut driver), None);
    assert_eq!(driver.stats().malformed, bad.len() as u64 + 1);
    drop(driver);
    assert_eq!(card.frames.pages_out(), 0);
}

#[test]
fn a_lying_card_is_an_error_and_gives_everything_back() {
    let card = Card::new(ALL);
    let mut driver = card.driver();
    driver.transmit(card.frame(&[1; 60])).unwrap();
    driver.kick();
    {
        let mut registers = card.device.registers();
        let queue = registers.queues[0].as_mut().unwrap();
        queue.device.push(&super::fake::ProcessMemory, 63, 5000).unwrap(); // longer than its page
        queue.device.publish(&super::fake::ProcessMemory).unwrap();
    }
    let mut parts = Vec::new();
    driver.receive(&mut parts).unwrap_err();
    driver.receive(&mut parts).unwrap_err();
    assert!(!driver.link_up());
    assert!(driver.transmit(card.frame(&[1; 60])).is_err());
    assert!(driver.transmitted().unwrap().is_some(), "the frame under way comes back");
    driver.transmitted().unwrap_err();
    drop(driver);
    assert_eq!(card.frames.pages_out(), 0);
}

#[test]
fn a_card_that_fails_is_noticed() {
    let card = Card::new(ALL);
    let mut driver = card.driver();
    card.device.fail();
    assert!(driver.arm());
    driver.receive(&mut Vec::new()).unwrap_err();
}

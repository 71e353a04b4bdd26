//! Frames in both directions, with every combination of buffers and offloads.

use janus_proto::abi::virtio::feature::RING_EVENT_IDX;

use super::*;
use crate::netback::Cable;
use crate::virtio::testing::Driver;

const MAC: [u8; 6] = [2, 3, 4, 5, 6, 7];
const ALL: u64 = u64::MAX >> 34 & !(1 << 28) | RING_EVENT_IDX;

fn card(pairs: u16, wanted: u64) -> (Driver, Cable, Bell) {
    let (ours, theirs) = Cable::pair();
    let mut bell = None;
    let card = Net::new(MAC, pairs, |ring| {
        bell = Some(ring);
        Ok::<_, ()>(Box::new(theirs) as Box<dyn NetBackend + Send>)
    });
    (Driver::new(Box::new(card.unwrap()), wanted), ours, bell.unwrap())
}

/// A TCP segment over IPv4, of so many bytes.
fn tcp(len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    bytes[12..14].copy_from_slice(&[8, 0]);
    bytes[14] = 0x45;
    bytes[23] = 6;
    bytes[46] = 0x50;
    for (index, byte) in bytes.iter_mut().enumerate().skip(54) {
        *byte = u8::try_from(index % 251).unwrap();
    }
    bytes
}

fn plain(bytes: Vec<u8>) -> Frame {
    Frame { bytes, ..Frame::default() }
}

/// Sends a frame behind a header; what came out of the cable.
fn sent(driver: &mut Driver, cable: &mut Cable, header: &[u8; 12], bytes: &[u8]) -> Option<Frame> {
    driver.put(0, header);
    driver.put(12, bytes);
    let len = u32::try_from(bytes.len()).unwrap();
    // Cut in the middle of header and frame.
    let first = 12 + len / 2;
    assert_eq!(
        driver.ask(
            1,
            &[(0, 5, false), (5, first - 5, false), (first.into(), 12 + len - first, false)]
        ),
        0
    );
    cable.receive()
}

#[test]
fn frames_go_out_with_what_is_left_to_do_for_them() {
    let (mut driver, mut cable, _) = card(1, ALL);
    let frame = sent(&mut driver, &mut cable, &[0; 12], &tcp(600)).unwrap();
    assert_eq!(frame, plain(tcp(600)));
    let blank = [1, 0, 0, 0, 0, 0, 34, 0, 16, 0, 0, 0];
    let frame = sent(&mut driver, &mut cable, &blank, &tcp(600)).unwrap();
    assert!(frame.checksum_blank && frame.bytes == tcp(600));
    for (kind, expected) in
        [(1, netif::GsoType::TCPV4), (4, netif::GsoType::TCPV6), (0x81, netif::GsoType::TCPV4)]
    {
        let long = [1, kind, 54, 0, 0xa0, 5, 34, 0, 16, 0, 0, 0];
        let frame = sent(&mut driver, &mut cable, &long, &tcp(30_000)).unwrap();
        assert_eq!(frame.gso, Some(Gso { size: 0x5a0, kind: expected }));
    }
    // A sum at a place that no network fills in is filled in here.
    let odd = [1, 0, 0, 0, 0, 0, 14, 0, 2, 0, 0, 0];
    let frame = sent(&mut driver, &mut cable, &odd, &tcp(600)).unwrap();
    assert!(!frame.checksum_blank && frame.bytes[16..18] != [0, 0]);
}

#[test]
fn frames_that_make_no_sense_are_not_sent() {
    let (mut driver, mut cable, _) = card(1, ALL);
    for (name, header, len) in [
        ("too short", [0; 12], 13),
        ("too long", [0; 12], PLAIN + 1),
        ("much too long", [1, 1, 54, 0, 0xa0, 5, 34, 0, 16, 0, 0, 0], LONGEST + 1),
        ("cut without a sum", [0, 1, 54, 0, 0xa0, 5, 0, 0, 0, 0, 0, 0], 2000),
        ("cut to nothing", [1, 1, 54, 0, 0, 0, 34, 0, 16, 0, 0, 0], 2000),
        ("cut of an unknown kind", [1, 3, 54, 0, 0xa0, 5, 34, 0, 16, 0, 0, 0], 2000),
        ("cut with an odd sum", [1, 1, 54, 0, 0xa0, 5, 14, 0, 2, 0, 0, 0], 2000),
        ("sum behind the end", [1, 0, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0, 0], 600),
    ] {
        assert_eq!(
            sent(&mut driver, &mut cable, &header, &tcp(len.max(60))[..len]),
            None,
            "{name}"
        );
    }
    assert_eq!(driver.ask(1, &[(0, 11, false)]), 0);
    assert_eq!(driver.ask(1, &[(0, 100, true)]), 0);
    assert!(cable.receive().is_none());
    let (mut driver, mut cable, _) = card(1, 0);
    let blank = [1, 0, 0, 0, 0, 0, 34, 0, 16, 0, 0, 0];
    assert_eq!(sent(&mut driver, &mut cable, &blank, &tcp(600)), None, "not negotiated");
}

#[test]
fn frames_come_in_when_there_are_buffers() {
    let (mut driver, mut cable, bell) = card(1, ALL);
    cable.send(plain(tcp(600)));
    bell();
    assert!(driver.used(0).is_none());
    driver.send(0, &[(0, 2048, true)]);
    let used = driver.used(0).unwrap();
    assert_eq!(used.len, 612);
    assert_eq!(driver.peek(12, 600), tcp(600));
    assert_eq!(driver.peek(0, 12), [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0]);
    // The other way round.
    driver.send(0, &[(0, 2048, true)]);
    cable.send(Frame { checksum_blank: true, ..plain(tcp(100)) });
    bell();
    assert_eq!(driver.used(0).unwrap().len, 112);
    assert_eq!(driver.peek(0, 12), [1, 0, 54, 0, 0, 0, 34, 0, 16, 0, 1, 0]);
    // An ICMP message has its sum, whatever the network says.
    let mut icmp = tcp(100);
    icmp[23] = 1;
    driver.send(0, &[(0, 2048, true)]);
    cable.send(Frame { checksum_blank: true, validated: true, ..plain(icmp) });
    bell();
    assert_eq!(driver.used(0).unwrap().len, 112);
    assert_eq!(driver.peek(0, 12), [2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0]);
}

#[test]
fn a_long_frame_takes_as_many_buffers_as_it_needs() {
    let (mut driver, mut cable, bell) = card(1, ALL);
    let gso = Some(Gso { size: 1448, kind: netif::GsoType::TCPV4 });
    cable.send(Frame { gso, checksum_blank: true, ..plain(tcp(5000)) });
    bell();
    driver.send(0, &[(0, 2000, true)]);
    driver.send(0, &[(2000, 7, true), (2007, 1993, true)]);
    assert!(driver.used(0).is_none(), "not enough yet");
    driver.send(0, &[(4000, 2000, true)]);
    let lens: Vec<_> = std::iter::from_fn(|| driver.used(0)).map(|used| used.len).collect();
    assert_eq!(lens, [2000, 2000, 1012]);
    assert_eq!(driver.peek(12, 5000), tcp(5000));
    assert_eq!(driver.peek(0, 12), [1, 1, 54, 0, 0xa8, 5, 34, 0, 16, 0, 3, 0]);
    // A reset forgets frames and buffers that were held.
    cable.send(plain(tcp(1000)));
    driver.send(0, &[(0, 100, true)]);
    bell();
    driver.start(ALL);
    cable.send(plain(tcp(60)));
    bell();
    driver.send(0, &[(0, 2000, true)]);
    assert_eq!(driver.used(0).unwrap().len, 72);
}

#[test]
fn a_buffer_without_room_is_kept_for_a_frame_that_fits() {
    let (mut driver, mut cable, bell) = card(1, ALL & !F_MRG_RXBUF);
    driver.send(0, &[(0, 500, true)]);
    cable.send(plain(tcp(600)));
    cable.send(plain(tcp(300)));
    bell();
    assert_eq!(driver.used(0).unwrap().len, 312);
    assert!(driver.used(0).is_none());
}

#[test]
fn a_driver_gets_only_frames_that_it_can_take() {
    let (mut driver, mut cable, bell) = card(1, F_MRG_RXBUF);
    driver.send(0, &[(0, 4096, true)]);
    cable.send(Frame { checksum_blank: true, ..plain(tcp(600)) });
    let gso = Some(Gso { size: 1448, kind: netif::GsoType::TCPV4 });
    cable.send(Frame { gso, ..plain(tcp(3000)) });
    cable.send(plain(tcp(60)));
    bell();
    assert_eq!(driver.used(0).unwrap().len, 72);
}

#[test]
fn buffers_that_are_no_memory_break_the_queue_and_not_the_device() {
    let (mut driver, mut cable, bell) = card(1, ALL);
    driver.send(0, &[(1 << 40, 2048, true)]);
    cable.send(plain(tcp(600)));
    bell();
    assert!(driver.device_status().contains(janus_proto::abi::virtio::Status::DEVICE_NEEDS_RESET));
    driver.start(ALL);
    driver.send(0, &[(0, 2048, true)]);
    cable.send(plain(tcp(60)));
    bell();
    assert_eq!(driver.used(0).unwrap().len, 72);
}

#[test]
fn the_control_queue_sets_how_many_pairs_are_used() {
    let (mut driver, mut cable, bell) = card(2, ALL);
    for (command, answer) in [
        ([4, 0, 2, 0], 0),
        ([4, 0, 0, 0], 1),
        ([4, 0, 3, 0], 1),
        ([4, 1, 1, 0], 1),
        ([0, 0, 1, 0], 1),
    ] {
        driver.put(0, &command);
        driver.put(8, &[9]);
        assert_eq!(driver.ask(4, &[(0, 2, false), (2, 2, false), (8, 1, true)]), 1);
        assert_eq!(driver.peek(8, 1), [answer], "{command:?}");
    }
    for queue in [0, 2] {
        for buffer in 0..10 {
            driver.send(queue, &[(0x1000 + 200 * buffer, 200, true)]);
        }
    }
    for port in 0..10 {
        let mut frame = tcp(60);
        frame[35] = port;
        cable.send(plain(frame));
    }
    bell();
    let mut count = |queue| std::iter::from_fn(|| driver.used(queue)).count();
    let (first, second) = (count(0), count(2));
    assert!(first > 0 && second > 0 && first + second == 10, "{first} {second}");
}

#[test]
fn it_tells_its_address_and_limits() {
    let (driver, ..) = card(3, ALL);
    let mut config = [0; 12];
    driver.mmio.read(0x100, &mut config);
    assert_eq!(config, [2, 3, 4, 5, 6, 7, 1, 0, 3, 0, 0xdc, 5]);
}

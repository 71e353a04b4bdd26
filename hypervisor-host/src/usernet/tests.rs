//! The parts that need no network: keys, timers, headers.

use std::net::Ipv4Addr;

use super::frames::{Bad, Header, Packet, UDP, fill_checksum, start};
use super::slab::{Key, Kind, Slab, Token};
use super::timers::Timers;
use super::*;

#[test]
fn a_key_is_not_used_again_for_another_thing() {
    let mut slab = Slab::new(2);
    let (a, b) = (slab.insert('a').unwrap(), slab.insert('b').unwrap());
    assert_eq!(slab.insert('c'), Err('c'));
    assert_eq!((slab.remove(a), slab.remove(a), slab.len()), (Some('a'), None, 1));
    let c = slab.insert('c').unwrap();
    assert!(c.index == a.index && c != a);
    assert_eq!(slab.get_mut(a), None);
    assert_eq!(slab.get_mut(b), Some(&mut 'b'));
    assert_eq!(slab.get_mut(c), Some(&mut 'c'));
    assert_eq!(slab.keys(), [c, b]);
    for kind in [Kind::Wake, Kind::Tcp, Kind::Datagram, Kind::TcpListener, Kind::UdpListener] {
        let token = Token { kind, key: Key { index: u32::MAX, generation: 0xff_fffe } };
        assert_eq!(Token::from_u64(token.to_u64()), Some(token));
    }
    assert_eq!(Token::from_u64(u64::MAX), None);
}

#[test]
fn a_timer_moves_forward_only() {
    let token = |index| Token { kind: Kind::Tcp, key: Key { index, generation: 0 } };
    let (mut timers, mut first, mut second) = (Timers::default(), None, None);
    timers.no_later(&mut first, token(1), 50);
    timers.no_later(&mut second, token(2), 40);
    timers.no_later(&mut first, token(1), 60);
    assert_eq!((timers.next(), timers.due(39)), (Some(40), None));
    timers.no_later(&mut first, token(1), 30);
    assert_eq!(timers.due(40), Some(token(1)));
    timers.remove(&mut second, token(2));
    assert_eq!((timers.due(u64::MAX), timers.next()), (None, None), "one entry each");
}

#[test]
fn headers_are_read_as_they_are_written() {
    let (source, destination) = (Ipv4Addr::new(10, 0, 2, 2), Ipv4Addr::new(10, 0, 2, 15));
    let mut frame = Vec::new();
    start(&mut frame, [2; 6], &Header::whole(source, destination, UDP), 9);
    frame.extend([0, 1, 0, 2, 0, 9, 0, 0, 7]);
    fill_checksum(&mut frame, false);
    let ip = &frame[ETHERNET..];
    let packet = Packet::parse(ip).unwrap();
    assert_eq!((packet.source, packet.destination, packet.protocol), (source, destination, UDP));
    assert_eq!((packet.whole, packet.payload), (ip, &ip[20..]));
    // 10.0.2.2 + 10.0.2.15 + 17 + 9 + ports + length + data, each as 16-bit words.
    let sum = 0x0a00 + 0x0202 + 0x0a00 + 0x020f + 17 + 9 + 1 + 2 + 9 + 0x0700;
    assert_eq!(packet.payload[6..8], (!u16::try_from(sum).unwrap()).to_be_bytes());
    for cut in 0..ip.len() {
        assert_eq!(Packet::parse(&ip[..cut]), Err(Bad::Malformed), "{cut} bytes");
    }
    for (at, value) in [(0, 0x44), (0, 0x65), (3, 19), (10, 0)] {
        let mut bad = ip.to_vec();
        bad[at] = value;
        assert_eq!(Packet::parse(&bad), Err(Bad::Malformed), "byte {at}");
    }
}

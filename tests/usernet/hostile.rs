//! A guest that sends anything.

use janus::netback::{Accepts, Frame, NetBackend as _};
use janus::usernet::{Config, DNS, GATEWAY, LEASE, Resolvers};
use proptest::prelude::*;

use crate::guest::{Guest, MAC, OFFLOADS, frame, tcp};

/// A network where nothing that the guest does leaves it: what is outside is refused, the host's loopback too.
fn closed() -> Config {
    let resolvers = Resolvers::Fixed(Vec::new());
    Config { host_loopback: false, restrict: true, resolvers, ..Config::default() }
}

#[test]
fn senders_that_are_not_the_guest_are_dropped() {
    let mut guest = Guest::bare(closed(), OFFLOADS);
    let senders =
        [GATEWAY.octets(), DNS.octets(), [10, 0, 2, 255], [10, 0, 2, 0], [192, 0, 2, 1], [0; 4]];
    for source in senders {
        guest.send_raw(frame(source, GATEWAY.octets(), 6, &tcp(1000, 80, 2)));
        guest.send_raw(frame(source, GATEWAY.octets(), 17, &[3, 232, 0, 80, 0, 9, 0, 0, 1]));
    }
    // One that speaks as us by ARP, and a sender that is many.
    let mut arp = vec![0xff; 6];
    arp.extend(MAC);
    arp.extend([8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
    arp.extend(MAC);
    arp.extend(GATEWAY.octets());
    arp.extend([0; 6]);
    arp.extend(DNS.octets());
    guest.send_raw(arp);
    let mut many = frame(LEASE.octets(), GATEWAY.octets(), 6, &tcp(1000, 80, 2));
    many[6] |= 1;
    guest.send_raw(many);
    let counters = guest.net.counters();
    assert_eq!(counters.spoofed, 2 * senders.len() as u64 + 1);
    assert_eq!(counters.malformed, 1);
    assert_eq!(guest.card.wire.backend.receive(), None);
    assert_eq!(guest.net.open(), (0, 0));
}

#[test]
fn fragments_are_refused() {
    let mut guest = Guest::bare(closed(), OFFLOADS);
    for field in [[0x20, 0], [0, 1], [0x3f, 0xff]] {
        let mut bytes = frame(LEASE.octets(), GATEWAY.octets(), 17, &[0; 64]);
        bytes[20..22].copy_from_slice(&field);
        bytes[24..26].fill(0);
        let sum = !smoltcp::wire::checksum::data(&bytes[14..34]);
        bytes[24..26].copy_from_slice(&sum.to_be_bytes());
        guest.send_raw(bytes);
    }
    assert_eq!(guest.net.counters().fragments, 3);
    assert_eq!(guest.card.wire.backend.receive(), None);
}

fn bytes() -> impl Strategy<Value = Vec<u8>> {
    prop::collection::vec(any::<u8>(), 0..200)
}

/// Frames that are mostly right, in one of the protocols.
fn frames() -> impl Strategy<Value = Vec<u8>> {
    let address = prop_oneof![
        Just(GATEWAY.octets()),
        Just(DNS.octets()),
        Just(LEASE.octets()),
        any::<[u8; 4]>(),
    ];
    let source = prop_oneof![4 => Just(LEASE.octets()), 1 => any::<[u8; 4]>()];
    let protocol = prop_oneof![Just(1_u8), Just(6), Just(17), any::<u8>()];
    let segment = (0_u16..4, 0_u16..3, any::<u8>(), bytes()).prop_map(|(from, to, flags, rest)| {
        let mut segment = tcp(from, to * 53, flags);
        segment.extend(rest);
        segment
    });
    let datagram = (0_u16..4, prop_oneof![Just(67_u16), Just(53), 0_u16..3], bytes());
    let datagram = datagram.prop_map(|(from, to, data)| {
        let mut datagram = from.to_be_bytes().to_vec();
        datagram.extend(to.to_be_bytes());
        datagram.extend((8 + data.len() as u16).to_be_bytes());
        datagram.extend([0, 0]);
        datagram.extend(data);
        datagram
    });
    let payload = prop_oneof![bytes(), segment, datagram];
    let packet = (source, address, protocol, payload).prop_map(|(s, a, p, d)| frame(s, a, p, &d));
    let arp = bytes().prop_map(|rest| {
        let mut bytes = vec![0xff; 6];
        bytes.extend(MAC);
        bytes.extend([8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
        bytes.extend(rest);
        bytes
    });
    let cut = (packet.clone(), any::<prop::sample::Index>(), any::<u8>()).prop_map(
        |(mut f, at, value)| {
            let at = at.index(f.len());
            f[at] = value;
            f
        },
    );
    let short = (packet.clone(), any::<prop::sample::Index>()).prop_map(|(mut f, at)| {
        f.truncate(at.index(f.len()));
        f
    });
    prop_oneof![1 => bytes(), 4 => packet, 1 => arp, 1 => cut, 1 => short]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever the guest sends, what it gets is a frame, addressed to it by one of us, of a length that it can take.
    #[test]
    fn any_frames_are_survived(frames in prop::collection::vec(frames(), 1..60), gso: bool) {
        let accepts = if gso { OFFLOADS } else { Accepts::default() };
        let mut guest = Guest::bare(closed(), accepts);
        for bytes in frames {
            guest.card.wire.backend.send(Frame { bytes, checksum_blank: gso, ..Frame::default() });
            while let Some(frame) = guest.card.wire.backend.receive() {
                prop_assert!(frame.bytes.len() > 14 && frame.bytes.len() <= 1514);
                prop_assert_eq!(&frame.bytes[6..12], &[0x52, 0x55, 10, 0, 2, 2]);
            }
        }
        prop_assert_eq!(guest.net.open(), (0, 0), "nothing was allowed");
    }
}

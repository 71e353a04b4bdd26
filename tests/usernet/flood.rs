//! A guest that uses up what it can: apart from the other tests, which need file descriptors too.

#![expect(clippy::unwrap_used, reason = "a test")]
#![expect(dead_code, reason = "the other tests use more of the guest")]

#[path = "guest.rs"]
mod guest;

use janus::netback::NetBackend as _;
use janus::usernet::{Config, GATEWAY, LEASE, MAX_CONNECTIONS, MAX_FLOWS};

use guest::{Guest, OFFLOADS, frame, tcp};

#[test]
fn a_flood_ends_at_the_limits() {
    datagrams();
    connections();
}

fn datagrams() {
    let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    let port = socket.local_addr().unwrap().port();
    let mut guest = Guest::bare(Config::default(), OFFLOADS);
    let (to, from) = (GATEWAY.octets(), LEASE.octets());
    for source in 1..=u16::try_from(MAX_FLOWS).unwrap() + 200 {
        let mut udp = source.to_be_bytes().to_vec();
        udp.extend(port.to_be_bytes());
        udp.extend([0, 9, 0, 0, 1]);
        guest.send_raw(frame(from, to, 17, &udp));
    }
    // With fewer file descriptors there are fewer.
    let (_, flows) = guest.net.open();
    assert!(flows > 0 && flows <= MAX_FLOWS);
    // Echo requests that nobody takes the answers of.
    for _ in 0..10_000 {
        let icmp = [8, 0, 0xf7, 0xff, 0, 0, 0, 0];
        guest.send_raw(frame(from, to, 1, &icmp));
    }
    assert!(guest.net.counters().answers_lost > 9_000);
    let mut answers = 0;
    while guest.card.wire.backend.receive().is_some() {
        answers += 1;
    }
    assert!(answers > 0 && answers < 1000, "{answers} answers");
}

fn connections() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let mut guest = Guest::bare(Config::default(), OFFLOADS);
    for source in 1..=u16::try_from(MAX_CONNECTIONS).unwrap() + 500 {
        guest.send_raw(frame(LEASE.octets(), GATEWAY.octets(), 6, &tcp(source, port, 2)));
        while guest.card.wire.backend.receive().is_some() {}
    }
    let (connections, _) = guest.net.open();
    assert!(connections > 0 && connections <= MAX_CONNECTIONS);
    // The guest forgets them all; another one finds nothing of it.
    guest.restart();
    assert_eq!(guest.net.open(), (0, 0));
}

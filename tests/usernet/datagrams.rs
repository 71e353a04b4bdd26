//! DHCP, DNS, UDP and echo.

use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::sync::Arc;

use janus::netback::{Accepts, NetBackend as _};
use janus::usernet::{Config, DNS, GATEWAY, LEASE, NETMASK, Resolvers, StartError, UserNet};
use smoltcp::iface::SocketHandle;
use smoltcp::socket::{dhcpv4, icmp, udp};
use smoltcp::wire::{Icmpv4DstUnreachable, Icmpv4Packet, Icmpv4Repr, IpEndpoint};

use crate::guest::{Guest, MAC, OFFLOADS, pattern};
use crate::tcp::announce;

/// An address outside that is the host's loopback interface in these tests.
const OUTSIDE: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 7);

fn outside() -> Config {
    Config { aliases: vec![(OUTSIDE, Ipv4Addr::LOCALHOST)], ..Config::default() }
}

fn host() -> (UdpSocket, u16) {
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    let port = socket.local_addr().unwrap().port();
    (socket, port)
}

/// A port where nobody listens.
fn nobody() -> u16 {
    host().1
}

fn add_udp(guest: &mut Guest, port: u16) -> SocketHandle {
    let buffer = || udp::PacketBuffer::new(vec![udp::PacketMetadata::EMPTY; 16], vec![0; 16384]);
    let mut socket = udp::Socket::new(buffer(), buffer());
    socket.bind(port).unwrap();
    guest.sockets.add(socket)
}

fn send(guest: &mut Guest, handle: SocketHandle, to: (Ipv4Addr, u16), data: &[u8]) {
    let socket = guest.sockets.get_mut::<udp::Socket<'_>>(handle);
    socket.send_slice(data, IpEndpoint::new(to.0.into(), to.1)).unwrap();
    guest.until("it is sent", |guest| {
        (guest.sockets.get::<udp::Socket<'_>>(handle).send_queue() == 0).then_some(())
    });
}

fn receive(guest: &mut Guest, handle: SocketHandle) -> (Vec<u8>, IpEndpoint) {
    guest.until("a datagram", |guest| {
        let socket = guest.sockets.get_mut::<udp::Socket<'_>>(handle);
        socket.recv().ok().map(|(data, from)| (data.to_vec(), from.endpoint))
    })
}

#[test]
fn dhcp_leases_an_address_with_all_that_belongs_to_it() {
    for accepts in [OFFLOADS, Accepts::default()] {
        let mut guest = Guest::bare(Config { mtu: 1400, ..Config::default() }, accepts);
        let mut socket = dhcpv4::Socket::new();
        let packet = vec![0; 1500].leak();
        socket.set_receive_packet_buffer(packet);
        let handle = guest.sockets.add(socket);
        guest.until("a lease", |guest| {
            match guest.sockets.get_mut::<dhcpv4::Socket<'_>>(handle).poll() {
                Some(dhcpv4::Event::Configured(config)) => {
                    assert_eq!(config.address.address(), LEASE);
                    assert_eq!(config.address.netmask(), NETMASK);
                    assert_eq!(config.router, Some(GATEWAY));
                    assert_eq!(config.dns_servers[..], [DNS]);
                    assert_eq!(config.server.address, GATEWAY);
                    let packet = config.packet.unwrap();
                    let mtu = packet.options().find(|option| option.kind == 26).unwrap();
                    assert_eq!(mtu.data, 1400_u16.to_be_bytes());
                    Some(())
                }
                _ => None,
            }
        });
        assert_eq!(guest.net.counters().malformed, 0);
    }
}

#[test]
fn a_request_for_another_address_is_refused() {
    let mut guest = Guest::bare(Config::default(), OFFLOADS);
    let mut dhcp = vec![1, 1, 6, 0, 1, 2, 3, 4];
    dhcp.resize(28, 0);
    dhcp.extend(MAC);
    dhcp.resize(236, 0);
    // Magic, DHCPREQUEST, requested address, end.
    dhcp.extend([99, 130, 83, 99, 53, 1, 3, 50, 4, 10, 0, 2, 99, 255]);
    let mut bytes = vec![0xff; 6];
    bytes.extend(MAC);
    bytes.extend([8, 0]);
    let mut ip = vec![0x45, 0, 0, 0, 0, 0, 0, 0, 64, 17, 0, 0, 0, 0, 0, 0, 255, 255, 255, 255];
    let len = u16::try_from(20 + 8 + dhcp.len()).unwrap();
    ip[2..4].copy_from_slice(&len.to_be_bytes());
    let sum = !smoltcp::wire::checksum::data(&ip);
    ip[10..12].copy_from_slice(&sum.to_be_bytes());
    bytes.extend(ip);
    bytes.extend([0, 68, 0, 67]);
    bytes.extend((len - 20).to_be_bytes());
    bytes.extend([0, 0]);
    bytes.extend(dhcp);
    guest.send_raw(bytes);
    let answer = guest.card.wire.backend.receive().unwrap().bytes;
    // The message type is the first option.
    assert_eq!(answer[14 + 20 + 8 + 240..][..3], [53, 1, 6]);
}

fn question(id: u16) -> Vec<u8> {
    let mut data = id.to_be_bytes().to_vec();
    data.extend([1, 0, 0, 1, 0, 0, 0, 0, 0, 0]);
    data.extend(b"\x07example\x03org\0\0\x01\0\x01");
    data
}

fn resolvers(ports: &[u16]) -> Config {
    let address = |port: &u16| SocketAddr::from(([127, 0, 0, 1], *port));
    Config { resolvers: Resolvers::Fixed(ports.iter().map(address).collect()), ..Config::default() }
}

#[test]
fn dns_is_asked_of_the_hosts_resolver() {
    let (resolver, port) = host();
    // The first one is dead: the question goes on to the second.
    for ports in [vec![port], vec![nobody(), port]] {
        let mut guest = Guest::new(resolvers(&ports), OFFLOADS);
        let handle = add_udp(&mut guest, 5000);
        for id in 1..4 {
            send(&mut guest, handle, (DNS, 53), &question(id));
            let answer = guest.until("the question arrives", |_| {
                resolver.set_nonblocking(true).unwrap();
                let mut buf = [0; 512];
                let (len, from) = resolver.recv_from(&mut buf).ok()?;
                assert_eq!(buf[..len], question(id)[..]);
                let mut answer = buf[..len].to_vec();
                answer[2] |= 0x80;
                resolver.send_to(&answer, from).unwrap();
                Some(answer)
            });
            let (data, from) = receive(&mut guest, handle);
            assert_eq!((data, from), (answer, IpEndpoint::new(DNS.into(), 53)));
        }
    }
}

#[test]
fn dns_without_a_resolver_is_answered_with_an_error() {
    let (dead, other) = (nobody(), nobody());
    let file = Resolvers::File("/nonexistent/resolv.conf".into());
    for (config, code) in [
        (resolvers(&[]), 2),
        (resolvers(&[dead, other]), 2),
        (Config { resolvers: file, ..Config::default() }, 2),
        (Config { restrict: true, ..Config::default() }, 5),
    ] {
        let mut guest = Guest::new(config, OFFLOADS);
        let handle = add_udp(&mut guest, 5000);
        for id in 7..9 {
            send(&mut guest, handle, (DNS, 53), &question(id));
            let (data, _) = receive(&mut guest, handle);
            let mut want = question(id);
            (want[2], want[3]) = (0x81, 0x80 | code);
            assert_eq!(data, want);
        }
    }
}

#[test]
fn datagrams_go_out_and_come_back() {
    let (socket, port) = host();
    for accepts in [OFFLOADS, Accepts::default()] {
        let mut guest = Guest::new(outside(), accepts);
        let handle = add_udp(&mut guest, 5001);
        for to in [GATEWAY, OUTSIDE] {
            for len in [0, 1, 500, 1472] {
                let mut data = vec![0; len];
                pattern(len, &mut data);
                send(&mut guest, handle, (to, port), &data);
                let mut buf = vec![0; 2000];
                let (got, from) = socket.recv_from(&mut buf).unwrap();
                assert!(buf[..got] == data, "{len} bytes");
                socket.send_to(&data, from).unwrap();
                let (back, from) = receive(&mut guest, handle);
                assert_eq!((back == data, from), (true, IpEndpoint::new(to.into(), port)));
            }
        }
        assert_eq!(guest.net.open(), (0, 2));
    }
}

#[test]
fn a_long_datagram_comes_in_parts() {
    let (socket, port) = host();
    let mut guest = Guest::new(Config::default(), OFFLOADS);
    let handle = add_udp(&mut guest, 5001);
    send(&mut guest, handle, (GATEWAY, port), b"x");
    let (_, from) = socket.recv_from(&mut [0; 8]).unwrap();
    let mut data = vec![0; 9000];
    pattern(5, &mut data);
    socket.send_to(&data, from).unwrap();
    let mut parts: Vec<u8> = Vec::new();
    let start = std::time::Instant::now();
    while parts.len() < 9008 {
        assert!(start.elapsed().as_secs() < 150, "it never comes");
        let Some(frame) = guest.card.wire.backend.receive() else { continue };
        let ip = &frame.bytes[14..];
        assert!(!frame.checksum_blank && ip.len() <= 1500);
        assert_eq!(smoltcp::wire::checksum::data(&ip[..20]), 0xffff);
        let field = u16::from_be_bytes([ip[6], ip[7]]);
        assert_eq!(usize::from(field & 0x1fff) * 8, parts.len());
        parts.extend(&ip[20..]);
        assert_eq!(field & 0x2000 != 0, parts.len() < 9008, "more parts");
    }
    assert!(parts[8..] == data);
}

#[test]
fn nobody_there_is_told_to_the_guest() {
    let port = nobody();
    let mut guest = Guest::new(Config { restrict: true, ..Config::default() }, OFFLOADS);
    for (to, reason) in [
        ((GATEWAY, port), Icmpv4DstUnreachable::PortUnreachable),
        ((OUTSIDE, 9), Icmpv4DstUnreachable::CommProhibited),
    ] {
        let handle = add_udp(&mut guest, 5002);
        let buffer =
            || icmp::PacketBuffer::new(vec![icmp::PacketMetadata::EMPTY; 4], vec![0; 1024]);
        let mut errors = icmp::Socket::new(buffer(), buffer());
        errors.bind(icmp::Endpoint::Udp(5002.into())).unwrap();
        let errors = guest.sockets.add(errors);
        send(&mut guest, handle, to, b"anybody?");
        let (got, from) = guest.until("an error", |guest| {
            let socket = guest.sockets.get_mut::<icmp::Socket<'_>>(errors);
            let (data, from) = socket.recv().ok()?;
            let packet = Icmpv4Packet::new_checked(data).unwrap();
            let caps = smoltcp::phy::ChecksumCapabilities::default();
            match Icmpv4Repr::parse(&packet, &caps).unwrap() {
                Icmpv4Repr::DstUnreachable { reason, header, .. } => {
                    assert_eq!((header.src_addr, header.dst_addr), (LEASE, to.0));
                    Some((reason, from))
                }
                other => panic!("{other:?}"),
            }
        });
        assert_eq!((got, from), (reason, GATEWAY.into()));
        guest.sockets.remove(errors);
        guest.sockets.remove(handle);
    }
}

#[test]
fn a_published_udp_port_keeps_its_peers_apart() {
    let config = Config { publish: vec!["0:5353/udp".parse().unwrap()], ..Config::default() };
    let mut guest = Guest::new(config, OFFLOADS);
    let (_, address) = guest.net.published()[0];
    let handle = add_udp(&mut guest, 5353);
    announce(&mut guest);
    let peers = [host().0, host().0, host().0];
    for round in 0..3_u8 {
        for (index, peer) in (0_u8..).zip(&peers) {
            peer.send_to(&[round, index], address).unwrap();
            let (data, from) = receive(&mut guest, handle);
            assert_eq!(data, [round, index]);
            assert_eq!(from.addr, GATEWAY.into());
            send(&mut guest, handle, (GATEWAY, from.port), &[round, index, 9]);
            let mut buf = [0; 8];
            assert_eq!(peer.recv_from(&mut buf).unwrap(), (3, address));
            assert_eq!(buf[..3], [round, index, 9]);
        }
    }
    assert_eq!(guest.net.open().1, peers.len());
}

#[test]
fn a_udp_port_that_is_taken_is_told() {
    let (_socket, port) = host();
    let text = format!("{port}:1/udp");
    let config = Config { publish: vec![text.parse().unwrap()], ..Config::default() };
    let error = UserNet::start(config, Arc::new(|| {})).unwrap_err();
    assert!(matches!(error, StartError::Publish(..)));
    let want = format!("cannot publish udp port 127.0.0.1:{port}: it is in use");
    assert_eq!(error.to_string(), want);
}

/// Pings; what comes back.
fn ping(guest: &mut Guest, to: Ipv4Addr) -> Result<Vec<u8>, Icmpv4DstUnreachable> {
    const ID: u16 = 0x1234;
    let caps = smoltcp::phy::ChecksumCapabilities::default();
    let echo = Icmpv4Repr::EchoRequest { ident: ID, seq_no: 3, data: b"are you there?" };
    let mut icmp = vec![0; echo.buffer_len()];
    echo.emit(&mut Icmpv4Packet::new_unchecked(&mut icmp), &caps);
    let mut bytes = vec![0xff; 6];
    bytes.extend(MAC);
    bytes.extend([8, 0]);
    let len = u16::try_from(20 + icmp.len()).unwrap().to_be_bytes();
    let mut ip = vec![0x45, 0, len[0], len[1], 0, 0, 0, 0, 64, 1, 0, 0];
    ip.extend(LEASE.octets());
    ip.extend(to.octets());
    let sum = !smoltcp::wire::checksum::data(&ip);
    ip[10..12].copy_from_slice(&sum.to_be_bytes());
    bytes.extend(ip);
    bytes.extend(icmp);
    guest.send_raw(bytes);
    let start = std::time::Instant::now();
    loop {
        assert!(start.elapsed().as_secs() < 150, "no answer");
        let Some(frame) = guest.card.wire.backend.receive() else { continue };
        assert_eq!(frame.bytes[30..34], LEASE.octets());
        let packet = Icmpv4Packet::new_checked(&frame.bytes[34..]).unwrap();
        return match Icmpv4Repr::parse(&packet, &caps).unwrap() {
            Icmpv4Repr::EchoReply { ident: ID, seq_no: 3, data } => {
                assert_eq!(frame.bytes[26..30], to.octets());
                Ok(data.to_vec())
            }
            Icmpv4Repr::DstUnreachable { reason, .. } => Err(reason),
            other => panic!("{other:?}"),
        };
    }
}

/// Whether the host lets this process have a ping socket.
fn may_ping() -> bool {
    use rustix::net::{AddressFamily, SocketType, ipproto, socket};
    socket(AddressFamily::INET, SocketType::DGRAM, Some(ipproto::ICMP)).is_ok()
}

#[test]
fn pings_are_answered_by_us_by_others_or_with_an_error() {
    let mut guest = Guest::new(outside(), OFFLOADS);
    let data = b"are you there?".to_vec();
    assert_eq!(ping(&mut guest, GATEWAY), Ok(data.clone()));
    assert_eq!(ping(&mut guest, DNS), Ok(data.clone()));
    let want = if may_ping() { Ok(data) } else { Err(Icmpv4DstUnreachable::CommProhibited) };
    assert_eq!(ping(&mut guest, OUTSIDE), want);
    let mut guest = Guest::new(Config { restrict: true, ..Config::default() }, OFFLOADS);
    assert_eq!(ping(&mut guest, OUTSIDE), Err(Icmpv4DstUnreachable::CommProhibited));
}

//! TCP: out of the guest, into it, fast and slow, and every way to end.

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::thread;

use janus::netback::Accepts;
use janus::usernet::{Config, GATEWAY, StartError, UserNet};
use smoltcp::socket::tcp::State;
use std::sync::Arc;

use crate::guest::{Guest, OFFLOADS, pattern};

/// More than all buffers on the way together.
const BULK: usize = 24 << 20;

fn listener() -> (TcpListener, u16) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    (listener, port)
}

/// Reads until the end and compares; how much it was.
fn check_all(stream: &mut TcpStream) -> usize {
    let (mut total, mut buf, mut want) = (0, vec![0; 1 << 16], vec![0; 1 << 16]);
    loop {
        let len = stream.read(&mut buf).unwrap();
        if len == 0 {
            return total;
        }
        pattern(total, &mut want[..len]);
        assert!(buf[..len] == want[..len], "wrong bytes after {total}");
        total += len;
    }
}

fn write_all(stream: &mut TcpStream, len: usize) {
    let mut bytes = vec![0; len];
    pattern(0, &mut bytes);
    stream.write_all(&bytes).unwrap();
}

/// Sends as much as there is room for; `true`: all is in.
fn feed(
    guest: &mut Guest,
    handle: smoltcp::iface::SocketHandle,
    sent: &mut usize,
    total: usize,
) -> bool {
    while *sent < total && guest.tcp(handle).can_send() {
        *sent += guest
            .tcp(handle)
            .send(|room| {
                let len = room.len().min(total - *sent);
                pattern(*sent, &mut room[..len]);
                (len, len)
            })
            .unwrap();
    }
    *sent == total
}

/// Takes and compares what there is.
fn drain(guest: &mut Guest, handle: smoltcp::iface::SocketHandle, got: &mut usize) {
    while guest.tcp(handle).can_recv() {
        *got += guest
            .tcp(handle)
            .recv(|data| {
                let mut want = vec![0; data.len()];
                pattern(*got, &mut want);
                assert!(*data == want, "wrong bytes after {got}");
                (data.len(), data.len())
            })
            .unwrap();
    }
}

fn both_kinds() -> [Accepts; 2] {
    [OFFLOADS, Accepts::default()]
}

#[test]
fn the_guest_sends_much_and_gets_much_back_after_its_half_close() {
    for accepts in both_kinds() {
        let (listener, port) = listener();
        let host = thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let got = check_all(&mut stream);
            write_all(&mut stream, BULK);
            got
        });
        let mut guest = Guest::new(Config::default(), accepts);
        let handle = guest.connect((GATEWAY, port), 50_000);
        let mut sent = 0;
        guest.until("everything is sent", |guest| {
            feed(guest, handle, &mut sent, BULK).then_some(())
        });
        guest.tcp(handle).close();
        let mut got = 0;
        guest.until("everything is received", |guest| {
            drain(guest, handle, &mut got);
            (!guest.tcp(handle).may_recv()).then_some(())
        });
        assert_eq!((host.join().unwrap(), got), (BULK, BULK));
        guest.until("the connection is forgotten", |guest| (guest.net.open().0 == 0).then_some(()));
        let (came, went) = guest.card.wire.long;
        assert_eq!(accepts.gso_tcpv4, came > 0 && went > 0, "long frames: {came} in, {went} out");
    }
}

#[test]
fn the_host_half_closes_first_and_both_directions_run_at_once() {
    for accepts in both_kinds() {
        let (listener, port) = listener();
        let host = thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut writer = stream.try_clone().unwrap();
            let writing = thread::spawn(move || {
                write_all(&mut writer, BULK);
                writer.shutdown(Shutdown::Write).unwrap();
            });
            let got = check_all(&mut stream);
            writing.join().unwrap();
            got
        });
        let mut guest = Guest::new(Config::default(), accepts);
        let handle = guest.connect((GATEWAY, port), 50_000);
        let (mut sent, mut got) = (0, 0);
        // The last part only after the host's end.
        guest.until("most is exchanged", |guest| {
            drain(guest, handle, &mut got);
            let fed = feed(guest, handle, &mut sent, BULK - 1000);
            (fed && got == BULK && guest.tcp(handle).state() == State::CloseWait).then_some(())
        });
        guest.until("the rest is sent", |guest| feed(guest, handle, &mut sent, BULK).then_some(()));
        guest.tcp(handle).close();
        guest.until("it is closed", |guest| (!guest.tcp(handle).is_open()).then_some(()));
        assert_eq!(host.join().unwrap(), BULK);
        guest.until("the connection is forgotten", |guest| (guest.net.open().0 == 0).then_some(()));
    }
}

#[test]
fn a_refusal_reaches_the_guest() {
    let (listener, port) = listener();
    drop(listener);
    let mut guest = Guest::new(Config::default(), OFFLOADS);
    for (to, from) in [
        ((GATEWAY, port), 50_000),
        ((Ipv4Addr::LOCALHOST, port), 50_002),
        ((Ipv4Addr::new(10, 0, 2, 3), 80), 50_003),
    ] {
        let handle = guest.connect(to, from);
        guest.until("it is refused", |guest| {
            (guest.tcp(handle).state() == State::Closed).then_some(())
        });
    }
    assert_eq!(guest.net.open(), (0, 0));
}

#[test]
fn what_is_forbidden_is_refused() {
    let (_listener, port) = listener();
    let other = Ipv4Addr::new(198, 51, 100, 7);
    for (host_loopback, restrict, loopback, outside) in
        [(true, false, true, true), (false, false, false, true), (true, true, true, false)]
    {
        // The alias stands for what is outside, and comes before the rules only if nothing is restricted.
        let aliases = if restrict { vec![] } else { vec![(other, Ipv4Addr::LOCALHOST)] };
        let config = Config { host_loopback, restrict, aliases, ..Config::default() };
        let mut guest = Guest::new(config, OFFLOADS);
        for (to, goes, from) in [(GATEWAY, loopback, 50_000), (other, outside, 50_001)] {
            let handle = guest.connect((to, port), from);
            let state = guest.until("an answer", |guest| {
                let state = guest.tcp(handle).state();
                (state != State::SynSent).then_some(state)
            });
            assert_eq!(state == State::Established, goes, "{to} {host_loopback} {restrict}");
        }
    }
}

#[test]
fn a_reset_goes_through_in_both_directions() {
    let (listener, port) = listener();
    let mut guest = Guest::new(Config::default(), OFFLOADS);
    // From the guest.
    let handle = guest.connect((GATEWAY, port), 50_000);
    guest.until("connected", |guest| guest.tcp(handle).may_send().then_some(()));
    let (mut stream, _) = listener.accept().unwrap();
    guest.tcp(handle).abort();
    guest.until("the connection is forgotten", |guest| (guest.net.open().0 == 0).then_some(()));
    assert_eq!(stream.read(&mut [0; 1]).unwrap_err().kind(), ErrorKind::ConnectionReset);
    // From the host: unread data makes a close a reset.
    let handle = guest.connect((GATEWAY, port), 50_001);
    guest.until("connected", |guest| guest.tcp(handle).may_send().then_some(()));
    let (mut stream, _) = listener.accept().unwrap();
    guest.tcp(handle).send_slice(b"nobody reads this").unwrap();
    guest.until("it is acknowledged", |guest| (guest.tcp(handle).send_queue() == 0).then_some(()));
    stream.write_all(b"x").unwrap();
    let mut peeked = [0; 1];
    stream.peek(&mut peeked).unwrap();
    drop(stream);
    guest.until("it is reset", |guest| (guest.tcp(handle).state() == State::Closed).then_some(()));
    guest.until("the connection is forgotten", |guest| (guest.net.open().0 == 0).then_some(()));
}

#[test]
fn a_slow_reader_stops_the_guest_and_loses_nothing() {
    let (listener, port) = listener();
    let mut guest = Guest::new(Config::default(), OFFLOADS);
    let handle = guest.connect((GATEWAY, port), 50_000);
    guest.until("connected", |guest| guest.tcp(handle).may_send().then_some(()));
    let (mut stream, _) = listener.accept().unwrap();
    // Nobody reads: at some time all buffers are full, whatever the host's are.
    let mut sent = 0;
    let total = guest.until("the way is full", |guest| {
        feed(guest, handle, &mut sent, usize::MAX);
        let socket = guest.tcp(handle);
        (socket.send_queue() == socket.send_capacity()).then_some(sent)
    });
    let more = total + 1000;
    let host = thread::spawn(move || check_all(&mut stream));
    guest.until("the rest is sent", |guest| feed(guest, handle, &mut sent, more).then_some(()));
    guest.tcp(handle).close();
    guest.until("the connection is forgotten", |guest| (guest.net.open().0 == 0).then_some(()));
    assert_eq!(host.join().unwrap(), more);
}

#[test]
fn a_guest_that_does_not_read_stops_the_host_and_loses_nothing() {
    let (listener, port) = listener();
    let mut guest = Guest::new(Config::default(), OFFLOADS);
    let handle = guest.connect((GATEWAY, port), 50_000);
    guest.until("connected", |guest| guest.tcp(handle).may_send().then_some(()));
    let (mut stream, _) = listener.accept().unwrap();
    let host = thread::spawn(move || write_all(&mut stream, BULK));
    guest.until("its window is full", |guest| {
        let socket = guest.tcp(handle);
        (socket.recv_queue() == socket.recv_capacity()).then_some(())
    });
    let mut got = 0;
    guest.until("everything is received", |guest| {
        drain(guest, handle, &mut got);
        (!guest.tcp(handle).may_recv()).then_some(())
    });
    host.join().unwrap();
    assert_eq!(got, BULK);
}

fn publish(text: &str) -> Config {
    Config { publish: vec![text.parse().unwrap()], ..Config::default() }
}

#[test]
fn a_published_port_leads_into_the_guest_even_before_there_is_one() {
    for early in [true, false] {
        let mut guest = Guest::bare(publish("127.0.0.1:0:80"), OFFLOADS);
        let (_, address) = guest.net.published()[0];
        let listening = guest.add_tcp();
        guest.tcp(listening).listen(80).unwrap();
        let client = move || {
            let mut stream = TcpStream::connect(address).unwrap();
            write_all(&mut stream, BULK);
            stream.shutdown(Shutdown::Write).unwrap();
            check_all(&mut stream)
        };
        let early = early.then(|| TcpStream::connect(address).unwrap());
        if early.is_none() {
            guest.set_address(janus::usernet::LEASE);
            announce(&mut guest);
        }
        let host = match early {
            Some(mut stream) => {
                guest.set_address(janus::usernet::LEASE);
                announce(&mut guest);
                thread::spawn(move || {
                    write_all(&mut stream, BULK);
                    stream.shutdown(Shutdown::Write).unwrap();
                    check_all(&mut stream)
                })
            }
            None => thread::spawn(client),
        };
        let mut got = 0;
        guest.until("the request is in", |guest| {
            drain(guest, listening, &mut got);
            (guest.tcp(listening).state() == State::CloseWait).then_some(())
        });
        assert_eq!(got, BULK);
        let remote = guest.tcp(listening).remote_endpoint().unwrap();
        assert_eq!(remote.addr, GATEWAY.into(), "the gateway calls");
        let mut sent = 0;
        guest.until("the answer is out", |guest| {
            feed(guest, listening, &mut sent, BULK).then_some(())
        });
        guest.tcp(listening).close();
        guest.until("the connection is forgotten", |guest| (guest.net.open().0 == 0).then_some(()));
        assert_eq!(host.join().unwrap(), BULK);
    }
}

/// Has the guest show itself: it asks who has the gateway's address.
pub(crate) fn announce(guest: &mut Guest) {
    let mut arp = vec![0xff; 6];
    arp.extend(crate::guest::MAC);
    arp.extend([8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
    arp.extend(crate::guest::MAC);
    arp.extend(janus::usernet::LEASE.octets());
    arp.extend([0; 6]);
    arp.extend(GATEWAY.octets());
    guest.send_raw(arp);
}

#[test]
fn a_published_port_where_the_guest_does_not_listen_is_reset() {
    let mut guest = Guest::new(publish("0:81"), OFFLOADS);
    let (_, address) = guest.net.published()[0];
    announce(&mut guest);
    let client = thread::spawn(move || {
        let mut stream = TcpStream::connect(address).unwrap();
        stream.read(&mut [0; 1]).unwrap_err().kind()
    });
    guest.until("it came and went", |guest| {
        (guest.net.counters().connections == 1 && guest.net.open().0 == 0).then_some(())
    });
    assert_eq!(client.join().unwrap(), ErrorKind::ConnectionReset);
}

#[test]
fn a_port_that_is_taken_is_told() {
    let (_listener, port) = listener();
    let text = format!("127.0.0.1:{port}:80");
    let error = UserNet::start(publish(&text), Arc::new(|| {})).unwrap_err();
    assert!(matches!(error, StartError::Publish(..)));
    let want = format!("cannot publish tcp port 127.0.0.1:{port}: it is in use");
    assert_eq!(error.to_string(), want);
}

#[test]
fn a_new_guest_ends_the_connections_of_the_old_one() {
    let (listener, port) = listener();
    let mut guest = Guest::new(Config::default(), OFFLOADS);
    let handle = guest.connect((GATEWAY, port), 50_000);
    guest.until("connected", |guest| guest.tcp(handle).may_send().then_some(()));
    let (mut stream, _) = listener.accept().unwrap();
    guest.restart();
    assert_eq!(guest.net.open(), (0, 0));
    assert_eq!(stream.read(&mut [0; 1]).unwrap_err().kind(), ErrorKind::ConnectionReset);
    // The same ports again work at once.
    let handle = guest.connect((GATEWAY, port), 50_000);
    guest.until("connected", |guest| guest.tcp(handle).may_send().then_some(()));
    // And a guest that forgot without telling anybody gets through as well.
    let (mut stream, _) = listener.accept().unwrap();
    guest.sockets.remove(handle);
    let handle = guest.connect((GATEWAY, port), 50_000);
    guest.until("connected", |guest| guest.tcp(handle).may_send().then_some(()));
    assert_eq!(stream.read(&mut [0; 1]).unwrap_err().kind(), ErrorKind::ConnectionReset);
}

#[test]
fn hundreds_of_connections_at_once_each_get_their_own() {
    const COUNT: usize = 150;
    let (listener, port) = listener();
    let host = thread::spawn(move || {
        let mut streams: Vec<_> = (0..COUNT).map(|_| listener.accept().unwrap().0).collect();
        for stream in &mut streams {
            let mut bytes = [0; 8];
            stream.read_exact(&mut bytes).unwrap();
            stream.write_all(&bytes).unwrap();
        }
        streams
    });
    let mut guest = Guest::new(Config::default(), OFFLOADS);
    let handles: Vec<_> = (0..COUNT)
        .map(|index| {
            let handle = guest.add_tcp_with(256);
            guest.connect_with(handle, (GATEWAY, port), 20_000 + index as u16);
            guest.until("connected", |guest| guest.tcp(handle).may_send().then_some(()));
            handle
        })
        .collect();
    assert_eq!(guest.net.open().0, COUNT);
    for (index, handle) in handles.iter().enumerate() {
        guest.tcp(*handle).send_slice(&(index as u64).to_le_bytes()).unwrap();
    }
    guest.until("all are answered", |guest| {
        handles.iter().all(|handle| guest.tcp(*handle).recv_queue() == 8).then_some(())
    });
    for (index, handle) in handles.iter().enumerate() {
        let mut bytes = [0; 8];
        guest.tcp(*handle).recv_slice(&mut bytes).unwrap();
        assert_eq!(u64::from_le_bytes(bytes), index as u64);
        guest.tcp(*handle).close();
    }
    drop(host.join().unwrap());
    guest.until("all are forgotten", |guest| (guest.net.open().0 == 0).then_some(()));
}

#[test]
fn dropping_the_network_ends_everything() {
    let (listener, port) = listener();
    let mut guest = Guest::new(publish("0:80"), OFFLOADS);
    let (_, published): (_, SocketAddr) = guest.net.published()[0];
    let handle = guest.connect((GATEWAY, port), 50_000);
    guest.until("connected", |guest| guest.tcp(handle).may_send().then_some(()));
    let (mut stream, _) = listener.accept().unwrap();
    drop(guest);
    assert_eq!(stream.read(&mut [0; 1]).unwrap_err().kind(), ErrorKind::ConnectionReset);
    assert_eq!(TcpStream::connect(published).unwrap_err().kind(), ErrorKind::ConnectionRefused);
}

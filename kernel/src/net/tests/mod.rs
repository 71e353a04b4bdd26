//! Two stacks on one wire, on one CPU.

mod wire;

use alloc::sync::Arc;
use alloc::vec::Vec;
use core::time::Duration;

use wire::{A, B, Cards, Faults, MTU, Pair, pair};

use super::tcp::{Listener, Stream, connect};
use super::*;
use crate::task::{block_on, spawn};
use crate::time::{sleep, timeout};

const LIMIT: Duration = Duration::from_secs(50);

fn within<T>(future: impl Future<Output = T>) -> T {
    block_on(timeout(LIMIT, future)).expect("the test ends in time")
}

/// Bytes that differ at every offset a test could confuse.
fn pattern(at: usize) -> u8 {
    ((at as u32).wrapping_mul(0x9E37_79B1) >> 24) as u8
}

async fn send(stream: &Stream, total: usize) {
    let mut at = 0;
    while at < total {
        at += stream
            .write_with(|room| {
                let len = room.len().min(total - at);
                for (i, byte) in room[..len].iter_mut().enumerate() {
                    *byte = pattern(at + i);
                }
                (len, len)
            })
            .await
            .unwrap();
    }
}

async fn receive(stream: &Stream) -> usize {
    let mut at = 0;
    while let Some(len) = stream
        .read_with(|data| {
            assert!(data.iter().enumerate().all(|(i, b)| *b == pattern(at + i)), "at {at}");
            (data.len(), data.len())
        })
        .await
        .unwrap()
    {
        at += len;
    }
    at
}

fn transfer(cards: Cards, faults: Faults, total: usize) -> Pair {
    let pair = pair(cards, faults);
    within(async {
        let listener = Listener::bind(&pair.b, 7).unwrap();
        let sink = spawn("sink", async move {
            let stream = listener.accept().await.unwrap();
            let received = receive(&stream).await;
            send(&stream, 1000).await;
            stream.close().await.unwrap();
            received
        });
        let stream = connect(&pair.a, (B, 7)).await.unwrap();
        send(&stream, total).await;
        stream.finish();
        assert_eq!(receive(&stream).await, 1000);
        assert_eq!(sink.await, total);
    });
    pair
}

const MIB: usize = 1024 * 1024;

#[test]
fn a_long_transfer_arrives_intact_without_offloads() {
    let pair = transfer(Cards::Plain, Faults::default(), 16 * MIB);
    let counters = pair.a.status().counters;
    assert_eq!((counters.sent_long, counters.sent_dropped), (0, 0));
    assert_eq!(pair.b.status().counters.received_bad, 0);
    assert!(counters.kicks < counters.sent / 4, "kicks are for batches: {counters:?}");
}

#[test]
fn a_long_transfer_arrives_intact_with_checksums_by_the_card() {
    transfer(Cards::Checksums, Faults::default(), 16 * MIB);
}

#[test]
fn a_long_transfer_arrives_intact_when_the_card_cuts() {
    let pair = transfer(Cards::Cutting, Faults::default(), 16 * MIB);
    let counters = pair.a.status().counters;
    assert!(counters.sent_long > 200, "{counters:?}");
    assert!(counters.sent_bytes / counters.sent_long > 30_000, "frames are long: {counters:?}");
    assert!(pair.wire.lock().unwrap().segments > 11_000);
}

#[test]
fn a_long_transfer_arrives_intact_in_long_frames() {
    let pair = transfer(Cards::Large, Faults::default(), 16 * MIB);
    assert!(pair.wire.lock().unwrap().long_frames > 200);
    let counters = pair.b.status().counters;
    assert!(counters.received_joined > 200, "{counters:?}");
}

#[test]
fn loss_and_disorder_are_repaired() {
    for cards in [Cards::Plain, Cards::Cutting] {
        let pair = transfer(cards, Faults { lose: 400, swap: 50, corrupt: 0 }, 2 * MIB);
        assert!(pair.wire.lock().unwrap().lost > 0);
    }
}

#[test]
fn corrupt_frames_are_dropped_and_sent_again() {
    let pair = transfer(Cards::Plain, Faults { corrupt: 300, ..Faults::default() }, 2 * MIB);
    let bad = pair.a.status().counters.received_bad + pair.b.status().counters.received_bad;
    assert!(bad > 0);
}

#[test]
fn many_connections_at_once_are_all_accepted() {
    const COUNT: usize = 60;
    let pair = pair(Cards::Plain, Faults::default());
    within(async {
        let listener = Listener::bind(&pair.b, 80).unwrap();
        let server = spawn("server", async move {
            let mut tasks = Vec::new();
            for _ in 0..COUNT {
                let stream = listener.accept().await.unwrap();
                tasks.push(spawn("echo", async move {
                    let mut buf = [0; 8];
                    stream.read_exact(&mut buf).await.unwrap();
                    stream.write_all(&buf).await.unwrap();
                    stream.close().await.unwrap();
                }));
            }
            for task in tasks {
                task.await;
            }
        });
        let clients: Vec<_> = (0..COUNT as u64)
            .map(|i| {
                let net = Arc::clone(&pair.a);
                spawn("client", async move {
                    let stream = connect(&net, (B, 80)).await.unwrap();
                    stream.write_all(&i.to_be_bytes()).await.unwrap();
                    let mut buf = [0; 8];
                    stream.read_exact(&mut buf).await.unwrap();
                    assert_eq!(u64::from_be_bytes(buf), i);
                    assert_eq!(stream.read(&mut buf).await, Ok(0));
                    stream.close().await.unwrap();
                })
            })
            .collect();
        for client in clients {
            client.await;
        }
        server.await;
    });
}

#[test]
fn connections_one_after_the_other_leave_no_sockets_behind() {
    let pair = pair(Cards::Plain, Faults::default());
    within(async {
        let listener = Listener::bind(&pair.b, 80).unwrap();
        for _ in 0..100 {
            let client = connect(&pair.a, (B, 80)).await.unwrap();
            let server = listener.accept().await.unwrap();
            drop(server);
            assert_eq!(client.read(&mut [0; 1]).await, Ok(0));
            client.close().await.unwrap();
        }
        let sockets = pair.b.status().sockets;
        assert!(sockets <= 20, "{sockets} sockets");
    });
}

#[test]
fn a_closed_port_refuses_and_a_silent_host_times_out() {
    let pair = pair(Cards::Plain, Faults::default());
    within(async {
        assert_eq!(connect(&pair.a, (B, 81)).await.unwrap_err(), NetError::Reset);
        let nobody = Ipv4Address::new(10, 0, 0, 77);
        let ping =
            icmp::Ping::new(&pair.a, nobody).unwrap().send(8, Duration::from_millis(30)).await;
        assert_eq!(ping, Err(NetError::TimedOut));
        assert_eq!(connect(&pair.a, (nobody, 80)).await.unwrap_err(), NetError::TimedOut);
    });
}

#[test]
fn a_port_is_bound_once_and_free_again_when_dropped() {
    let pair = pair(Cards::Plain, Faults::default());
    let first = Listener::bind(&pair.a, 80).unwrap();
    assert_eq!(Listener::bind(&pair.a, 80).unwrap_err(), NetError::PortInUse);
    assert_eq!(Listener::bind(&pair.a, 0).unwrap_err(), NetError::Unreachable);
    drop(first);
    drop(Listener::bind(&pair.a, 80).unwrap());
    let first = udp::Socket::bind(&pair.a, 53).unwrap();
    assert_eq!(udp::Socket::bind(&pair.a, 53).unwrap_err(), NetError::PortInUse);
    drop(first);
    drop(udp::Socket::bind(&pair.a, 53).unwrap());
}

#[test]
fn ping_and_datagrams_go_both_ways() {
    for cards in [Cards::Plain, Cards::Checksums, Cards::Large] {
        let pair = pair(cards, Faults::default());
        within(async {
            let mut ping = icmp::Ping::new(&pair.a, B).unwrap();
            for len in [0, 56, 1472, 5000] {
                ping.send(len, Duration::from_secs(2)).await.unwrap();
            }
            let echo = udp::Socket::bind(&pair.b, 7).unwrap();
            let server = spawn("echo", async move {
                for _ in 0..20 {
                    let mut buf = [0; 1500];
                    let (len, from) = echo.recv_from(&mut buf).await.unwrap();
                    echo.send_to(&buf[..len], from).await.unwrap();
                }
                sleep(Duration::from_millis(20)).await; // the last answer goes out
            });
            let client = udp::Socket::bind(&pair.a, 9999).unwrap();
            for i in 0..20_usize {
                let data: Vec<u8> = (0..i * 70).map(pattern).collect();
                client.send_to(&data, (B, 7)).await.unwrap();
                let mut buf = [0; 1500];
                let (len, from) = client.recv_from(&mut buf).await.unwrap();
                assert_eq!((&buf[..len], from), (&data[..], (B, 7).into()));
            }
            server.await;
            let long = vec![0; usize::from(MTU)];
            assert_eq!(client.send_to(&long, (B, 7)).await, Err(NetError::TooLong));
        });
    }
}

#[test]
fn a_full_transmit_queue_is_waited_for() {
    let pair = pair(Cards::Plain, Faults::default());
    within(async {
        let listener = Listener::bind(&pair.b, 7).unwrap();
        let client = connect(&pair.a, (B, 7)).await.unwrap();
        let server = listener.accept().await.unwrap();
        pair.wire.lock().unwrap().stuck = true;
        client.write_all(&[1; 10_000]).await.unwrap();
        sleep(Duration::from_millis(50)).await;
        assert!(pair.a.status().counters.polls < 100, "it does not spin meanwhile");
        pair.wire.lock().unwrap().stuck = false;
        let mut buf = vec![0; 10_000];
        server.read_exact(&mut buf).await.unwrap();
        assert!(buf.iter().all(|b| *b == 1));
    });
}

#[test]
fn an_idle_interface_is_not_polled() {
    let pair = pair(Cards::Plain, Faults::default());
    within(async {
        let listener = Listener::bind(&pair.b, 7).unwrap();
        let client = connect(&pair.a, (B, 7)).await.unwrap();
        let _server = listener.accept().await.unwrap();
        client.write_all(b"x").await.unwrap();
        client.flush().await.unwrap();
        sleep(Duration::from_millis(50)).await;
        let before = (pair.a.status().counters.polls, pair.b.status().counters.polls);
        sleep(Duration::from_millis(200)).await;
        let after = (pair.a.status().counters.polls, pair.b.status().counters.polls);
        assert!(after.0 - before.0 < 5 && after.1 - before.1 < 5, "{before:?} {after:?}");
    });
}

#[test]
fn a_lying_backend_ends_the_sockets_with_an_error() {
    let pair = pair(Cards::Plain, Faults::default());
    within(async {
        let listener = Listener::bind(&pair.b, 7).unwrap();
        let client = connect(&pair.a, (B, 7)).await.unwrap();
        let _server = listener.accept().await.unwrap();
        let reader = spawn("reader", async move {
            let read = client.read(&mut [0; 10]).await;
            (read, client.write(b"x").await)
        });
        task::yield_now().await;
        pair.wire.lock().unwrap().lie = true;
        pair.a.interrupt();
        assert_eq!(reader.await, (Err(NetError::Down), Err(NetError::Down)));
        assert_eq!(connect(&pair.a, (B, 7)).await.unwrap_err(), NetError::Down);
        assert_eq!(pair.a.status().failure, Some("response index ran ahead"));
    });
}

#[test]
fn a_detached_interface_fails_everyone_and_frees_its_memory() {
    let pair = pair(Cards::Large, Faults::default());
    within(async {
        let listener = Listener::bind(&pair.a, 7).unwrap();
        let waiting = spawn("accept", async move { listener.accept().await.map(drop) });
        task::yield_now().await;
        pair.a.detach();
        assert_eq!(waiting.await, Err(NetError::Down));
        assert_eq!(pair.a.configured().await, Err(NetError::Down));
        assert!(udp::Socket::bind(&pair.a, 1).is_err());
        pair.b.detach();
        task::yield_now().await;
    });
    assert_eq!(pair.frames.pages_out(), 0);
}

#[test]
fn unusable_addresses_are_refused() {
    let pair = pair(Cards::Plain, Faults::default());
    for bad in [[0, 0, 0, 0], [224, 0, 0, 1], [255, 255, 255, 255]] {
        let bad = Ipv4Address::from(bad);
        assert!(pair.a.set_static(Ipv4Cidr::new(bad, 24), None).is_err());
        assert!(pair.a.set_static(Ipv4Cidr::new(A, 24), Some(bad)).is_err());
    }
    assert_eq!(pair.a.address(), Some(Ipv4Cidr::new(A, 24)));
}

//! What exchanges with the outside cost this guest: questions to xenstore, datagrams.

use alloc::boxed::Box;
use alloc::string::String;
use alloc::vec::Vec;
use core::fmt::Write;

use smoltcp::wire::{IpAddress, Ipv4Address};

use super::{Command, number};
use crate::net::udp::Socket;
use crate::shell::{Session, Status};
use crate::xen::store::store;
use crate::xen::xenstore::{XenStore, XenStoreError};
use crate::{devices, task, time};

pub(super) const COMMANDS: &[Command] = &[
    Command {
        name: "store-bench",
        arguments: "read|write|transaction DEPTH",
        help: "asks xenstore DEPTH things at once, many times; prints a JSON line of nanoseconds each",
        run: |session, arguments| Box::pin(store_bench(session, arguments)),
    },
    Command {
        name: "udp-echo",
        arguments: "PORT COUNT",
        help: "sends COUNT datagrams back to where they came from",
        run: |session, arguments| Box::pin(udp_echo(session, arguments)),
    },
    Command {
        name: "udp-flood",
        arguments: "ADDRESS PORT BYTES COUNT",
        help: "sends datagrams as fast as they go; prints a JSON line with the time it took",
        run: |session, arguments| Box::pin(udp_flood(session, arguments)),
    },
];

/// Batches of a measurement; each is one sample.
const BATCHES: usize = 31;
/// Questions in a batch.
const BATCH: u64 = 512;
/// Writes of a transaction.
const WRITES: usize = 4;
const NODE: &str = "data/bench";

async fn ask(store: &XenStore, what: &str) -> Result<(), XenStoreError> {
    match what {
        "read" => store.read(NODE).await.map(drop),
        "write" => store.write(NODE, b"0123456789abcdef").await,
        _ => {
            let transaction = store.begin().await?;
            for _ in 0..WRITES {
                transaction.write(NODE, b"0123456789abcdef").await?;
            }
            transaction.commit().await
        }
    }
}

async fn store_bench(session: &mut Session<'_>, arguments: &[String]) -> Status {
    let [what, depth] = arguments else { return Status::USAGE };
    let what = match what.as_str() {
        "read" => "read",
        "write" => "write",
        "transaction" => "transaction",
        _ => return Status::USAGE,
    };
    let Some(depth) = number(depth).filter(|depth| (1..=64).contains(depth)) else {
        return Status::USAGE;
    };
    let Some(store) = store() else { return session.fail("store-bench: there is no xenstore") };
    if let Err(error) = store.write(NODE, b"0123456789abcdef").await {
        return session.fail(format_args!("store-bench: {error}"));
    }
    let mut samples = Vec::with_capacity(BATCHES);
    for batch in 0..=BATCHES {
        let start = time::now();
        let each = BATCH / depth;
        let worker = || async move {
            for _ in 0..each {
                ask(store, what).await?;
            }
            Ok::<(), XenStoreError>(())
        };
        let result = if depth == 1 {
            worker().await
        } else {
            let workers: Vec<_> =
                (0..depth).map(|_| task::spawn("store-bench", worker())).collect();
            let mut result = Ok(());
            for worker in workers {
                result = result.and(worker.await);
            }
            result
        };
        if let Err(error) = result {
            return session.fail(format_args!("store-bench: {error}"));
        }
        let time = u64::try_from(start.elapsed().as_nanos()).unwrap_or(u64::MAX);
        if batch > 0 {
            samples.push(time / (each * depth));
        }
    }
    let _ = store.remove(NODE).await;
    let _ = writeln!(
        session,
        "janus-bench: {{\"store\":\"{what}\",\"depth\":{depth},\"ns\":{samples:?}}}"
    );
    Status::SUCCESS
}

async fn udp_echo(session: &mut Session<'_>, arguments: &[String]) -> Status {
    let [port, count] = arguments else { return Status::USAGE };
    let (Ok(port), Some(count)) = (port.parse::<u16>(), number(count)) else {
        return Status::USAGE;
    };
    let Some(net) = devices::nets().into_iter().next() else {
        return session.fail("there is no network interface");
    };
    let socket = match Socket::bind(&net, port) {
        Ok(socket) => socket,
        Err(error) => return session.fail(format_args!("port {port}: {error}")),
    };
    let _ = writeln!(session, "echoing on port {port}");
    let mut buffer = [0; 2048];
    for _ in 0..count {
        let echoed = match socket.recv_from(&mut buffer).await {
            Ok((len, from)) => socket.send_to(buffer.get(..len).unwrap_or_default(), from).await,
            Err(error) => Err(error),
        };
        if let Err(error) = echoed {
            return session.fail(format_args!("port {port}: {error}"));
        }
    }
    Status::SUCCESS
}

async fn udp_flood(session: &mut Session<'_>, arguments: &[String]) -> Status {
    let [address, port, bytes, count] = arguments else { return Status::USAGE };
    let (Ok(address), Ok(port)) = (address.parse::<Ipv4Address>(), port.parse::<u16>()) else {
        return Status::USAGE;
    };
    let (Some(bytes), Some(count)) = (number(bytes).filter(|n| *n <= 1472), number(count)) else {
        return Status::USAGE;
    };
    let Some(net) = devices::nets().into_iter().next() else {
        return session.fail("there is no network interface");
    };
    let socket = match Socket::bind(&net, 4999) {
        Ok(socket) => socket,
        Err(error) => return session.fail(format_args!("port 4999: {error}")),
    };
    let buffer = [0; 1472];
    let data = usize::try_from(bytes).ok().and_then(|bytes| buffer.get(..bytes));
    let before = net.status().counters;
    let start = time::now();
    for _ in 0..count {
        let to = (IpAddress::Ipv4(address), port);
        if let Err(error) = socket.send_to(data.unwrap_or_default(), to).await {
            return session.fail(format_args!("{address}: {error}"));
        }
    }
    let nanos = u64::try_from(start.elapsed().as_nanos()).unwrap_or(u64::MAX);
    let after = net.status().counters;
    let _ = writeln!(
        session,
        "janus-bench: {{\"udp\":\"out\",\"bytes\":{bytes},\"count\":{count},\"ns\":[{}],\
         \"sent\":{},\"kicks\":{}}}",
        nanos / count.max(1),
        after.sent - before.sent,
        after.kicks - before.kicks,
    );
    Status::SUCCESS
}

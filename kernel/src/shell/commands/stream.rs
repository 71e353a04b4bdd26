//! Plain TCP streams into and out of the guest, for measurements from outside.

use alloc::boxed::Box;
use alloc::string::String;
use core::fmt::Write;
use core::time::Duration;

use super::{Command, number};
use crate::net::tcp::{Listener, Stream};
use crate::net::{NetCounters, NetError};
use crate::shell::{Session, Status};
use crate::{devices, time};

pub(super) const COMMANDS: &[Command] = &[
    Command {
        name: "tcp-sink",
        arguments: "PORT [BYTES]",
        help: "takes one connection, throws away what comes (all, or BYTES), prints a JSON line with the time it took",
        run: |session, arguments| Box::pin(run(session, arguments, Direction::In)),
    },
    Command {
        name: "tcp-source",
        arguments: "PORT BYTES",
        help: "takes one connection, sends BYTES zeroes, prints a JSON line with the time it took",
        run: |session, arguments| Box::pin(run(session, arguments, Direction::Out)),
    },
];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Direction {
    In,
    Out,
}

/// How long to wait for the connection.
const PATIENCE: Duration = Duration::from_secs(120);
/// How long to wait for the peer's acknowledgement of the end.
const CLOSING: Duration = Duration::from_secs(2);

async fn run(session: &mut Session<'_>, arguments: &[String], direction: Direction) -> Status {
    let (port, bytes) = match (direction, arguments) {
        (Direction::In, [port]) => (port, Some(u64::MAX)),
        (Direction::In, [port, bytes]) => (port, number(bytes)),
        (Direction::Out, [port, bytes]) => (port, number(bytes)),
        _ => return Status::USAGE,
    };
    let (Ok(port), Some(bytes)) = (port.parse::<u16>(), bytes) else { return Status::USAGE };
    let Some(net) = devices::nets().into_iter().next() else {
        return session.fail("there is no network interface");
    };
    let listener = match Listener::bind(&net, port) {
        Ok(listener) => listener,
        Err(error) => return session.fail(format_args!("port {port}: {error}")),
    };
    let _ = writeln!(session, "listening on port {port}");
    let stream = match time::timeout(PATIENCE, listener.accept()).await {
        Ok(Ok(stream)) => stream,
        Ok(Err(error)) => return session.fail(format_args!("port {port}: {error}")),
        Err(_) => return session.fail(format_args!("port {port}: nobody connected")),
    };
    let before = net.status().counters;
    let start = time::now();
    let moved = match direction {
        Direction::In => drain(&stream, bytes).await,
        Direction::Out => pour(&stream, bytes).await,
    };
    let micros = u64::try_from(start.elapsed().as_micros()).unwrap_or(u64::MAX).max(1);
    // The peer learns of the end before the machine may be powered off.
    let _ = time::timeout(CLOSING, stream.close()).await;
    match moved {
        Ok(bytes) => {
            let counts = net.status().counters;
            report(session, direction, bytes, micros, &before, &counts);
            Status::SUCCESS
        }
        Err(error) => session.fail(format_args!("port {port}: {error}")),
    }
}

/// Takes everything until the peer finishes, or `limit` bytes have come; answers how many did.
async fn drain(stream: &Stream, limit: u64) -> Result<u64, NetError> {
    let mut total = 0;
    while total < limit
        && let Some(len) = stream.read_with(|data| (data.len(), data.len())).await?
    {
        total += len as u64;
    }
    Ok(total)
}

/// Sends zeroes, and waits until the peer has them and has ended its side too.
async fn pour(stream: &Stream, bytes: u64) -> Result<u64, NetError> {
    let mut left = bytes;
    while left != 0 {
        left -= stream
            .write_with(|room| {
                let len = room.len().min(usize::try_from(left).unwrap_or(usize::MAX));
                if let Some(room) = room.get_mut(..len) {
                    room.fill(0);
                }
                (len, len as u64)
            })
            .await?;
    }
    stream.flush().await?;
    stream.finish();
    // What it said meanwhile is of no interest, and unread it would end the connection with a reset.
    if let Ok(result) = time::timeout(CLOSING, drain(stream, u64::MAX)).await {
        result?;
    }
    Ok(bytes)
}

fn report(
    session: &mut Session<'_>,
    direction: Direction,
    bytes: u64,
    micros: u64,
    before: &NetCounters,
    after: &NetCounters,
) {
    let _ = writeln!(
        session,
        "janus-bench: {{\"tcp\":\"{}\",\"bytes\":{bytes},\"us\":{micros},\"mbit_s\":{},\
         \"received\":{},\"joined\":{},\"sent\":{},\"long\":{},\"kicks\":{},\"events\":{},\"polls\":{},\"full\":{}}}",
        if direction == Direction::In { "in" } else { "out" },
        bytes.saturating_mul(8) / micros,
        after.received - before.received,
        after.received_joined - before.received_joined,
        after.sent - before.sent,
        after.sent_long - before.sent_long,
        after.kicks - before.kicks,
        after.events - before.events,
        after.polls - before.polls,
        after.queue_full - before.queue_full,
    );
}

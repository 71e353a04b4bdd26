//! Measurements inside the guest, as the comparison with other guests needs them.

use alloc::boxed::Box;
use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt::Write;
use core::sync::atomic::{AtomicU64, Ordering};
use core::time::Duration;

use super::{Command, number};
use crate::block::{Block, BlockError};
use crate::shell::{Session, Status};
use crate::{devices, task, time};

pub(super) const COMMANDS: &[Command] = &[Command {
    name: "bench",
    arguments: "DISK seq|random BYTES DEPTH SECONDS",
    help: "reads a disk with DEPTH requests of BYTES at once; prints a JSON line",
    run: |session, arguments| Box::pin(bench(session, arguments)),
}];

/// Requests at once at most.
const MAX_DEPTH: u64 = 256;

/// Where the next request goes.
struct Pattern {
    /// Counts requests; for the random pattern, the state of the generator.
    next: AtomicU64,
    random: bool,
    /// Requests that fit on the disk.
    slots: u64,
    size: u64,
}

impl Pattern {
    /// The offset of the next request, in bytes.
    fn offset(&self) -> u64 {
        let count = self.next.fetch_add(1, Ordering::Relaxed);
        let slot = if self.random { mix(count) } else { count } % self.slots;
        slot * self.size
    }
}

/// SplitMix64 (Steele, Lea, Flood 2014): spreads a counter over all 64-bit values.
fn mix(count: u64) -> u64 {
    let mut z = count.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

async fn bench(session: &mut Session<'_>, arguments: &[String]) -> Status {
    let [name, pattern, size, depth, seconds] = arguments else { return Status::USAGE };
    let random = match pattern.as_str() {
        "seq" => false,
        "random" => true,
        _ => return Status::USAGE,
    };
    let (Some(size), Some(depth), Some(seconds)) = (number(size), number(depth), number(seconds))
    else {
        return Status::USAGE;
    };
    let Some(disk) = devices::block(name) else {
        return session.fail(format_args!("bench: there is no disk {name}; see `block info`"));
    };
    let block = u64::from(disk.geometry().block_size);
    if size == 0 || !size.is_multiple_of(block) || size > disk.capacity() {
        return session
            .fail(format_args!("bench: {size} is not a number of blocks of {block} on this disk"));
    }
    if !(1..=MAX_DEPTH).contains(&depth) || !(1..=600).contains(&seconds) {
        return session
            .fail(format_args!("bench: 1 to {MAX_DEPTH} requests at once, 1 to 600 seconds"));
    }
    let pattern =
        Arc::new(Pattern { next: AtomicU64::new(0), random, slots: disk.capacity() / size, size });
    let before = disk.counters();
    let start = time::now();
    let deadline = start + Duration::from_secs(seconds);
    let workers: Vec<_> = (0..depth)
        .map(|_| task::spawn("bench", worker(Arc::clone(&disk), Arc::clone(&pattern), deadline)))
        .collect();
    let mut done = 0u64;
    for worker in workers {
        match worker.await {
            Ok(count) => done += count,
            Err(error) => return session.fail(format_args!("bench: {name}: {error}")),
        }
    }
    let micros = u64::try_from(start.elapsed().as_micros()).unwrap_or(u64::MAX).max(1);
    let after = disk.counters();
    let _ = writeln!(
        session,
        "janus-bench: {{\"disk\":\"{name}\",\"random\":{random},\"size\":{size},\"depth\":{depth},\
         \"requests\":{done},\"us\":{micros},\"kicks\":{},\"events\":{}}}",
        after.kicks - before.kicks,
        after.events - before.events,
    );
    Status::SUCCESS
}

/// Reads until the deadline; answers how many requests were done.
async fn worker(
    disk: Arc<Block>,
    pattern: Arc<Pattern>,
    deadline: time::Instant,
) -> Result<u64, BlockError> {
    let len = usize::try_from(pattern.size).unwrap_or(usize::MAX);
    let longest = disk.max_request();
    let mut count = 0;
    while time::now() < deadline {
        let offset = pattern.offset();
        if len <= longest {
            drop(disk.read(offset, len).await?);
        } else {
            // A longer request than the disk takes: its pieces go out together, as any layer above would do.
            let mut pieces = Vec::new();
            for at in (0..len).step_by(longest) {
                pieces.push(disk.start_read(offset + at as u64, longest.min(len - at))?);
            }
            for piece in pieces {
                drop(piece.await?);
            }
        }
        count += 1;
    }
    Ok(count)
}

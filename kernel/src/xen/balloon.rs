//! The balloon: memory given back to Xen when the toolstack wants some, and taken again when it may.
//!
//! `memory/target` says, in KiB, how much this domain should have (`xen/docs/misc/xenstore-paths`). The
//! frames of the difference are taken from the allocator and released
//! ([`crate::mm::reservation`]). The domain never grows beyond what it started with.
// UNSAFETY: releases and populates frames that the balloon owns.
#![expect(unsafe_code, reason = "the balloon owns the frames it moves")]

use alloc::sync::Arc;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicU64, Ordering};
use core::time::Duration;

use janus_boot::{BootInfo, Protocol};
use janus_front::class::{BalloonDevice, PeerError};
use janus_proto::addr::{PAGE_SIZE, Pfn};

use super::xenstore::{XenStore, XenStoreError};
use crate::mm::reservation::{self, BATCH};
use crate::mm::{frames, reclaim};
use crate::{task, time};

const TARGET: &str = "memory/target";
const STATIC_MAX: &str = "memory/static-max";
/// Frames that the kernel keeps for itself, whatever the toolstack wants: 4 MiB.
const RESERVE: usize = (4 << 20) / PAGE_SIZE;
/// When to try again what did not work for want of memory, here or in Xen.
const RETRY: Duration = Duration::from_secs(5);
/// KiB in a page.
const PAGE_KIB: u64 = (PAGE_SIZE / 1024) as u64;

static HELD: AtomicU64 = AtomicU64::new(0);

/// Pages that Xen has back at present.
#[must_use]
pub fn held_pages() -> u64 {
    HELD.load(Ordering::Relaxed)
}

/// The balloon; `wanted` is what it should hold.
#[derive(Debug, Default)]
struct XenBalloon {
    wanted: u64,
    held: Vec<Pfn>,
}

impl XenBalloon {
    fn inflate(&mut self, limit: usize) -> usize {
        let mut taken = Vec::with_capacity(limit);
        while taken.len() < limit {
            if frames::statistics().free <= RESERVE {
                if reclaim::free_some() {
                    continue;
                }
                break;
            }
            let Some(frame) = frames::allocate(1) else { break };
            taken.push(frame);
        }
        // SAFETY: just allocated, and nothing refers to their memory.
        let done = unsafe { reservation::release(&taken) }.unwrap_or_else(|error| {
            log::warn!("balloon: {error}");
            0
        });
        let kept = taken.split_off(done.min(taken.len()));
        self.held.extend(taken);
        for frame in kept {
            // SAFETY: ours, and as it was.
            unsafe { frames::free(frame, 1) };
        }
        done
    }
    fn deflate(&mut self, limit: usize) -> usize {
        let first = self.held.len().saturating_sub(limit);
        let asked = self.held.split_off(first);
        // SAFETY: the balloon owns them, and they have no memory.
        let done = unsafe { reservation::populate(&asked) }.unwrap_or_else(|error| {
            log::warn!("balloon: {error}");
            0
        });
        for (index, &frame) in asked.iter().enumerate() {
            if index < done {
                // SAFETY: ours, with memory again, and nobody uses it.
                unsafe { frames::free(frame, 1) };
            } else {
                self.held.push(frame);
            }
        }
        done
    }
}

impl BalloonDevice for XenBalloon {
    fn target_pages(&mut self) -> u64 {
        self.wanted
    }
    fn held_pages(&self) -> u64 {
        self.held.len() as u64
    }
    fn step(&mut self, limit: usize) -> Result<usize, PeerError> {
        let held = self.held_pages();
        let distance = usize::try_from(self.wanted.abs_diff(held)).unwrap_or(usize::MAX);
        let limit = limit.min(distance).min(BATCH);
        let moved = match self.wanted.cmp(&held) {
            core::cmp::Ordering::Greater => self.inflate(limit),
            core::cmp::Ordering::Less => self.deflate(limit),
            core::cmp::Ordering::Equal => 0,
        };
        HELD.store(self.held_pages(), Ordering::Relaxed);
        Ok(moved)
    }
}

/// Starts to follow the toolstack's target.
pub(crate) fn start(store: Arc<XenStore>, info: &'static BootInfo) {
    drop(task::spawn("balloon", async move {
        if let Err(error) = follow(&store, info).await {
            log::warn!("the memory target is not followed: {error}");
        }
    }));
}

/// What the domain has with an empty balloon, in KiB.
///
/// A PV guest has what start_info says. A PVH guest's memory map shows its maximum, of which Xen may
/// so far have filled only the target (populate on demand): the balloon must make that true.
async fn full_kib(store: &XenStore, info: &BootInfo) -> Result<Option<u64>, XenStoreError> {
    if let Protocol::XenPv(start) = &info.protocol {
        return Ok(Some(start.nr_pages * PAGE_KIB));
    }
    read_kib(store, STATIC_MAX).await
}

async fn read_kib(store: &XenStore, path: &str) -> Result<Option<u64>, XenStoreError> {
    let Some(value) = store.read_if_there(path).await? else { return Ok(None) };
    let number = kib(&value);
    if number.is_none() {
        log::warn!("{path} is no number: {}", value.escape_ascii());
    }
    Ok(number)
}

fn kib(value: &[u8]) -> Option<u64> {
    core::str::from_utf8(value).ok()?.trim().parse().ok()
}

async fn follow(store: &Arc<XenStore>, info: &BootInfo) -> Result<(), XenStoreError> {
    let Some(full) = full_kib(store, info).await? else { return Ok(()) };
    let mut balloon = XenBalloon::default();
    let mut watch = store.watch(TARGET).await?;
    loop {
        // The watch fires once at the start.
        if balloon.wanted == balloon.held_pages() {
            watch.changed().await?;
        } else if let Ok(change) = time::timeout(RETRY, watch.changed()).await {
            change?;
        }
        if let Some(target) = read_kib(store, TARGET).await? {
            balloon.wanted = full.saturating_sub(target) / PAGE_KIB;
        }
        let before = balloon.held_pages();
        while balloon.step(BATCH).is_ok_and(|moved| moved != 0) {
            task::yield_now().await;
        }
        let held = balloon.held_pages();
        if held != before {
            log::info!("balloon: {} MiB with Xen, {} MiB wanted", mib(held), mib(balloon.wanted));
        }
    }
}

fn mib(pages: u64) -> u64 {
    pages * PAGE_KIB / 1024
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_target_is_a_number_or_nothing() {
        assert_eq!(kib(b"65536"), Some(65536));
        assert_eq!(kib(b" 65536\n"), Some(65536));
        for nonsense in [&b""[..], b"-1", b"64M", b"\xff", b"99999999999999999999"] {
            assert_eq!(kib(nonsense), None, "{}", nonsense.escape_ascii());
        }
    }
}

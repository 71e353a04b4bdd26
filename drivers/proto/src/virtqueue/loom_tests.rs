//! Every interleaving, store buffers included, of the two races that decide whether a queue hangs.
//!
//! `RUSTFLAGS="--cfg loom" cargo test -p janus-proto --release loom_` runs them.

use alloc::sync::Arc;
use alloc::vec::Vec;

use loom::thread;

use super::{DeviceQueue, DriverQueue, GuestWords, Layout, Rings, Segment};
use crate::abi::virtio::feature;
use crate::addr::Gpa;
use crate::sync::{AtomicBool, AtomicU32, Ordering, fence};

const SIZE: u16 = 2;

#[derive(Clone)]
struct Memory(Arc<Vec<AtomicU32>>);

impl Memory {
    fn new() -> Self {
        let words = Layout::new(SIZE).map_or(0, Layout::bytes).div_ceil(4);
        Self(Arc::new((0..words).map(|_| AtomicU32::new(0)).collect()))
    }
}

impl core::ops::Deref for Memory {
    type Target = [AtomicU32];
    fn deref(&self) -> &[AtomicU32] {
        &self.0
    }
}

impl GuestWords for Memory {
    fn word(&self, address: Gpa) -> Option<&AtomicU32> {
        self.0.get(usize::try_from(address.0 / 4).ok()?)
    }
}

/// A pair with one chain behind it: the event positions, which start at 0, are passed, so nobody asks.
fn pair(memory: &Memory, features: u64) -> (DriverQueue<Memory>, DeviceQueue) {
    let mut driver = DriverQueue::new(SIZE, memory.clone(), None, features).unwrap();
    let mut device = DeviceQueue::new(SIZE, Rings::of(driver.layout(), Gpa(0)), features).unwrap();
    driver.add(&BUFFER).unwrap();
    driver.publish();
    let head = device.pop(memory, &mut Vec::new()).unwrap().unwrap();
    device.push(memory, head, 8).unwrap();
    device.publish(memory).unwrap();
    driver.pop().unwrap().unwrap();
    (driver, device)
}

const BUFFER: [Segment; 1] = [Segment { address: Gpa(0x1000), len: 8, writable: true }];

/// The driver adds while the device goes to sleep: either the device sees the chain, or it is kicked.
fn kick_race(features: u64) {
    loom::model(move || {
        let memory = Memory::new();
        let (mut driver, mut device) = pair(&memory, features);
        let kicked = Arc::new(AtomicBool::new(false));
        let in_guest = {
            let kicked = kicked.clone();
            thread::spawn(move || {
                for _ in 0..2 {
                    driver.add(&BUFFER).unwrap();
                    if driver.publish() {
                        kicked.store(true, Ordering::Relaxed);
                    }
                }
            })
        };
        let mut seen = 0;
        let mut chain = Vec::new();
        device.disarm(&memory).unwrap();
        for _ in 0..3 {
            while device.pop(&memory, &mut chain).unwrap().is_some() {
                assert_eq!(chain, BUFFER);
                seen += 1;
            }
            if !device.arm(&memory).unwrap() {
                break;
            }
        }
        in_guest.join().unwrap();
        assert!(seen == 2 || kicked.load(Ordering::Relaxed), "lost kick: {seen} of 2 seen");
    });
}

/// The device finishes while the driver goes to sleep: either the driver sees it, or it is interrupted.
fn interrupt_race(features: u64) {
    loom::model(move || {
        let memory = Memory::new();
        let (mut driver, mut device) = pair(&memory, features);
        let heads = [driver.add(&BUFFER).unwrap(), driver.add(&BUFFER).unwrap()];
        driver.publish();
        let interrupted = Arc::new(AtomicBool::new(false));
        let in_host = {
            let (memory, interrupted) = (memory.clone(), interrupted.clone());
            thread::spawn(move || {
                for head in heads {
                    device.push(&memory, head, 8).unwrap();
                    if device.publish(&memory).unwrap() {
                        interrupted.store(true, Ordering::Relaxed);
                    }
                }
            })
        };
        let mut seen = 0;
        driver.disarm();
        for _ in 0..3 {
            while driver.pop().unwrap().is_some() {
                seen += 1;
            }
            if !driver.arm() {
                break;
            }
        }
        in_host.join().unwrap();
        assert!(
            seen == 2 || interrupted.load(Ordering::Relaxed),
            "lost interrupt: {seen} of 2 seen"
        );
    });
}

#[test]
fn loom_no_kick_is_lost_with_event_index() {
    kick_race(feature::RING_EVENT_IDX);
}
#[test]
fn loom_no_kick_is_lost_with_flags() {
    kick_race(0);
}
#[test]
fn loom_no_interrupt_is_lost_with_event_index() {
    interrupt_race(feature::RING_EVENT_IDX);
}
#[test]
fn loom_no_interrupt_is_lost_with_flags() {
    interrupt_race(0);
}

/// The shape of `virtio-drivers` 0.13: a full fence in front of the index store, none behind it.
fn store_then_look(with_fence: bool) {
    loom::model(move || {
        let index = Arc::new(AtomicU32::new(0));
        let no_notify = Arc::new(AtomicU32::new(1));
        let kicked = Arc::new(AtomicBool::new(false));
        let in_guest = {
            let (index, no_notify, kicked) = (index.clone(), no_notify.clone(), kicked.clone());
            thread::spawn(move || {
                fence(Ordering::SeqCst);
                index.store(1, Ordering::Release);
                if with_fence {
                    fence(Ordering::SeqCst);
                }
                if no_notify.load(Ordering::Acquire) == 0 {
                    kicked.store(true, Ordering::Relaxed);
                }
            })
        };
        // A correct device: asks for a kick, full fence, looks once more.
        no_notify.store(0, Ordering::Release);
        fence(Ordering::SeqCst);
        let seen = index.load(Ordering::Acquire) == 1;
        in_guest.join().unwrap();
        assert!(seen || kicked.load(Ordering::Relaxed), "lost kick");
    });
}

#[test]
#[should_panic(expected = "lost kick")]
fn loom_finds_the_lost_kick_of_a_missing_fence() {
    store_then_look(false);
}
#[test]
fn loom_agrees_with_the_fence() {
    store_then_look(true);
}

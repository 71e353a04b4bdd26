//! One memory, two ends: the driver half against the device half, honest and lying.

#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "tests may panic, on numbers of their own"
)]

use alloc::collections::VecDeque;
use alloc::vec::Vec;

use proptest::prelude::*;

use super::*;
use crate::abi::virtio::{VIRTQ_DESC_F_INDIRECT, VIRTQ_DESC_F_NEXT, VIRTQ_DESC_F_WRITE, feature};
use crate::addr::Gpa;
use crate::sync::Ordering;

const BOTH: u64 = feature::RING_EVENT_IDX | feature::RING_INDIRECT_DESC;
/// Where the rings and the indirect tables of the tests lie, in words.
const RINGS: usize = 0x100;
const TABLES: usize = 0x2000;
const TABLE_ENTRIES: u16 = 4;

struct Memory(Vec<AtomicU32>);

impl Memory {
    fn new() -> Self {
        Self((0..0x2800).map(|_| AtomicU32::new(0)).collect())
    }
    fn driver(&self, size: u16, features: u64) -> DriverQueue<&[AtomicU32]> {
        let bytes = Layout::new(size).unwrap().bytes();
        let tables = IndirectMemory {
            memory: &self.0[TABLES..TABLES + IndirectMemory::<()>::bytes(size, TABLE_ENTRIES) / 4],
            address: Gpa(4 * TABLES as u64),
            entries: TABLE_ENTRIES,
        };
        DriverQueue::new(size, &self.0[RINGS..RINGS + bytes.div_ceil(4)], Some(tables), features)
            .unwrap()
    }
    fn device(&self, size: u16, features: u64) -> DeviceQueue {
        DeviceQueue::new(size, rings(size), features).unwrap()
    }
    fn set(&self, byte: usize, value: u32) {
        self.0[byte / 4].store(value, Ordering::Relaxed);
    }
    fn get(&self, byte: usize) -> u32 {
        self.0[byte / 4].load(Ordering::Relaxed)
    }
}

impl GuestWords for Memory {
    fn word(&self, address: Gpa) -> Option<&AtomicU32> {
        assert!(address.0.is_multiple_of(4));
        self.0.get(usize::try_from(address.0 / 4).ok()?)
    }
}

fn rings(size: u16) -> Rings {
    Rings::of(Layout::new(size).unwrap(), Gpa(4 * RINGS as u64))
}

fn readable(address: u64, len: u32) -> Segment {
    Segment { address: Gpa(address), len, writable: false }
}
fn writable(address: u64, len: u32) -> Segment {
    Segment { address: Gpa(address), len, writable: true }
}

#[test]
fn need_event_is_true_exactly_for_positions_passed() {
    for (event, new, old, expected) in [
        (0, 1, 0, true),
        (0, 0, 0, false),
        (1, 1, 0, false),
        (5, 10, 5, true),
        (9, 10, 5, true),
        (10, 10, 5, false),
        (4, 10, 5, false),
        (0xfffe, 0, 0xfffe, true),
        (0xffff, 1, 0xfffe, true),
        (0xfffd, 1, 0xfffe, false),
        (0, 0, 0xfffe, false),
        (0, 1, 0xfffe, true),
    ] {
        assert_eq!(need_event(event, new, old), expected, "event {event} in {old}..{new}");
    }
}

#[test]
fn layout_is_that_of_the_specification() {
    // virtio 1.2, 2.7: 16 n, then 6 + 2 n, then 6 + 8 n, with alignments 16, 2 and 4.
    for size in [2u16, 4, 128, 256, 32768] {
        let layout = Layout::new(size).unwrap();
        assert_eq!(layout.available(), 16 * usize::from(size));
        assert!(layout.used() >= layout.available() + 6 + 2 * usize::from(size));
        assert!(layout.used().is_multiple_of(4));
        assert_eq!(layout.bytes(), layout.used() + 6 + 8 * usize::from(size) + 2);
    }
    for size in [0, 1, 3, 100, 65535] {
        assert!(Layout::new(size).is_none());
    }
}

#[test]
fn too_little_memory_is_refused() {
    let memory = Memory::new();
    let short = DriverQueue::new(256, &memory.0[..100], None, 0);
    assert_eq!(short.err(), Some(QueueError::BadSize));
}

/// What the driver has in flight in the model: head and chain.
type InFlight = VecDeque<(u16, Vec<Segment>)>;

#[derive(Clone, Debug)]
enum Step {
    Add { readable: u8, writable: u8 },
    Publish,
    Serve { count: u8, reorder: bool },
    Reap,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        3 => (0u8..4, 0u8..4).prop_map(|(readable, writable)| Step::Add { readable, writable }),
        2 => Just(Step::Publish),
        2 => (0u8..8, any::<bool>()).prop_map(|(count, reorder)| Step::Serve { count, reorder }),
        2 => Just(Step::Reap),
    ]
}

proptest! {
    /// Every chain arrives as it was sent, comes back once, and nobody who asked sleeps through it.
    #[test]
    fn chains_arrive_whole_and_come_back_once(
        steps in proptest::collection::vec(step(), 1..400),
        log_size in 1u32..6,
        features in prop_oneof![Just(0), Just(feature::RING_EVENT_IDX), Just(feature::RING_INDIRECT_DESC), Just(BOTH)],
    ) {
        let size = 1u16 << log_size;
        let memory = Memory::new();
        let mut driver = memory.driver(size, features);
        let mut device = memory.device(size, features);
        let mut queued = InFlight::new();
        let mut sent = InFlight::new();
        let mut served: Vec<(u16, u32)> = Vec::new();
        let mut next_address = 0x1000u64;
        // The device starts by asking for a kick, the driver for an interrupt.
        prop_assert!(!device.arm(&memory).unwrap());
        prop_assert!(!driver.arm());
        let mut device_asleep = true;
        let mut driver_asleep = true;
        for step in steps {
            match step {
                Step::Add { readable: r, writable: w } => {
                    let chain: Vec<Segment> = (0..r).map(|_| false).chain((0..w).map(|_| true)).map(|writable| {
                        next_address += 0x1_0000_0040;
                        Segment { address: Gpa(next_address), len: 64, writable }
                    }).collect();
                    let free = driver.free();
                    match driver.add(&chain) {
                        Ok(head) => {
                            prop_assert!(queued.iter().chain(&sent).all(|(h, _)| *h != head));
                            prop_assert!(driver.free() < free);
                            queued.push_back((head, chain));
                        }
                        Err(QueueError::BadLength) => prop_assert!(chain.is_empty() || chain.len() > usize::from(size)),
                        Err(QueueError::Full) => prop_assert!(chain.len() > usize::from(free) || free == 0),
                        Err(other) => prop_assert!(false, "{other:?}"),
                    }
                }
                Step::Publish => {
                    let kick = driver.publish();
                    let any = !queued.is_empty();
                    sent.append(&mut queued);
                    if any && device_asleep {
                        prop_assert!(kick, "the device sleeps and was not told");
                    }
                    device_asleep &= !kick;
                }
                Step::Serve { count, reorder } => {
                    device.disarm(&memory).unwrap();
                    let mut chain = Vec::new();
                    let mut taken = Vec::new();
                    for _ in 0..count {
                        let Some(head) = device.pop(&memory, &mut chain).unwrap() else { break };
                        let (expected, segments) = sent.pop_front().unwrap();
                        prop_assert_eq!(head, expected);
                        prop_assert_eq!(&chain, &segments);
                        let room: u32 = chain.iter().filter(|s| s.writable).map(|s| s.len).sum();
                        taken.push((head, room));
                    }
                    if reorder { taken.reverse(); }
                    for (head, len) in &taken {
                        device.push(&memory, *head, *len).unwrap();
                    }
                    let signal = device.publish(&memory).unwrap();
                    if !taken.is_empty() && driver_asleep {
                        prop_assert!(signal, "the driver sleeps and was not told");
                    }
                    driver_asleep &= !signal;
                    served.extend(taken);
                    device_asleep = !device.arm(&memory).unwrap();
                    prop_assert_eq!(device_asleep, sent.is_empty());
                }
                Step::Reap => {
                    driver.disarm();
                    for (head, len) in served.drain(..) {
                        prop_assert_eq!(driver.pop().unwrap(), Some(Used { head, len }));
                    }
                    prop_assert_eq!(driver.pop().unwrap(), None);
                    driver_asleep = !driver.arm();
                    prop_assert!(driver_asleep);
                }
            }
        }
    }

    /// Whatever a device writes over the used ring and the descriptors, the driver answers with values.
    #[test]
    fn any_used_ring_is_an_error_or_a_chain_in_flight(
        idx in any::<u16>(),
        elements in proptest::collection::vec((0u32..12, 0u32..100), 8),
        descriptors in proptest::collection::vec(any::<u32>(), 32),
    ) {
        let memory = Memory::new();
        let mut driver = memory.driver(8, BOTH);
        let mut in_flight: Vec<u16> = (0..5u64).map(|n| driver.add(&[writable(n << 12, 64)]).unwrap()).collect();
        driver.publish();
        for (n, word) in descriptors.into_iter().enumerate() {
            memory.set(4 * RINGS + 4 * n, word);
        }
        let used = usize::try_from(rings(8).used.0).unwrap();
        for (n, (id, len)) in elements.into_iter().enumerate() {
            memory.set(used + 4 + 8 * n, id);
            memory.set(used + 8 + 8 * n, len);
        }
        memory.set(used, u32::from(idx) << 16);
        loop {
            match driver.pop() {
                Ok(Some(Used { head, len })) => {
                    prop_assert!(len <= 64);
                    let at = in_flight.iter().position(|h| *h == head);
                    prop_assert!(at.is_some(), "{head} came back and was not in flight");
                    in_flight.remove(at.unwrap());
                }
                Ok(None) => break,
                Err(_) => {
                    prop_assert_eq!(driver.pop(), Err(QueueError::Broken));
                    prop_assert_eq!(driver.add(&[writable(0, 1)]), Err(QueueError::Broken));
                    break;
                }
            }
        }
    }

    /// Whatever a driver writes into the queue, the device half answers with values and in bounded time.
    #[test]
    fn any_available_ring_is_an_error_or_a_bounded_chain(
        words in proptest::collection::vec(prop_oneof![any::<u32>(), 0u32..16, Just(0x0001_0001u32)], 40),
        descriptors in proptest::collection::vec((prop_oneof![Just(0x8000u64), any::<u64>()], prop_oneof![Just(64u32), any::<u32>()], 0u16..8, 0u16..10), 8),
    ) {
        let memory = Memory::new();
        let size = 8;
        for (n, (addr, len, flags, next)) in descriptors.into_iter().enumerate() {
            let at = 4 * RINGS + 16 * n;
            memory.set(at, addr as u32);
            memory.set(at + 4, (addr >> 32) as u32);
            memory.set(at + 8, len);
            memory.set(at + 12, u32::from(flags) | u32::from(next) << 16);
        }
        let available = usize::try_from(rings(size).available.0).unwrap();
        for (n, word) in words.into_iter().take(6).enumerate() {
            memory.set(available + 4 * n, word);
        }
        let mut device = memory.device(size, BOTH);
        let mut chain = Vec::new();
        for _ in 0..20 {
            match device.pop(&memory, &mut chain) {
                Ok(Some(head)) => {
                    prop_assert!(head < size && !chain.is_empty() && chain.len() <= 1 << 15);
                }
                Ok(None) => break,
                Err(_) => {
                    prop_assert_eq!(device.pop(&memory, &mut chain), Err(QueueError::Broken));
                    break;
                }
            }
        }
    }
}

/// Runs two chains through a queue, lets `lie` change memory, and answers what the driver says.
fn lying_device(lie: impl FnOnce(&Memory, usize)) -> Result<Option<Used>, QueueError> {
    let memory = Memory::new();
    let mut driver = memory.driver(4, feature::RING_EVENT_IDX);
    driver.add(&[readable(0x1000, 16), writable(0x2000, 512)]).unwrap();
    driver.publish();
    driver.add(&[writable(0x3000, 512)]).unwrap();
    lie(&memory, usize::try_from(rings(4).used.0).unwrap());
    driver.pop()
}

#[test]
fn lying_device_is_an_error_not_a_panic() {
    let element = |memory: &Memory, used: usize, id: u32, len: u32| {
        memory.set(used + 4, id);
        memory.set(used + 8, len);
        memory.set(used, 1 << 16);
    };
    assert_eq!(lying_device(|m, u| element(m, u, 0, 512)), Ok(Some(Used { head: 0, len: 512 })));
    assert_eq!(lying_device(|m, u| element(m, u, 0, 513)), Err(QueueError::UsedLength));
    assert_eq!(lying_device(|m, u| element(m, u, 1, 0)), Err(QueueError::UsedId), "inside a chain");
    assert_eq!(
        lying_device(|m, u| element(m, u, 2, 0)),
        Err(QueueError::UsedId),
        "not yet published"
    );
    assert_eq!(lying_device(|m, u| element(m, u, 3, 0)), Err(QueueError::UsedId), "free");
    assert_eq!(
        lying_device(|m, u| element(m, u, 4, 0)),
        Err(QueueError::UsedId),
        "beyond the table"
    );
    assert_eq!(
        lying_device(|m, u| element(m, u, 0x1_0000, 0)),
        Err(QueueError::UsedId),
        "beyond 16 bits"
    );
    assert_eq!(
        lying_device(|m, u| m.set(u, 2 << 16)),
        Err(QueueError::UsedIndex),
        "one in flight, two used"
    );
    assert_eq!(
        lying_device(|m, u| m.set(u, 0xffff << 16)),
        Err(QueueError::UsedIndex),
        "backwards"
    );
}

#[test]
fn a_chain_used_twice_is_an_error() {
    let memory = Memory::new();
    let mut driver = memory.driver(4, 0);
    let mut device = memory.device(4, 0);
    let head = driver.add(&[writable(0x1000, 8)]).unwrap();
    driver.add(&[writable(0x2000, 8)]).unwrap();
    driver.publish();
    for _ in 0..2 {
        device.push(&memory, head, 8).unwrap();
    }
    device.publish(&memory).unwrap();
    assert_eq!(driver.pop(), Ok(Some(Used { head, len: 8 })));
    assert_eq!(driver.pop(), Err(QueueError::UsedId));
    assert_eq!(driver.pop(), Err(QueueError::Broken));
}

/// Puts descriptors into the table by hand and answers what the device half says of the chain at 0.
fn lying_driver(
    features: u64,
    descriptors: &[(u64, u32, u16, u16)],
) -> Result<Vec<Segment>, QueueError> {
    let memory = Memory::new();
    for (n, &(addr, len, flags, next)) in descriptors.iter().enumerate() {
        let at = 4 * RINGS + 16 * n;
        memory.set(at, addr as u32);
        memory.set(at + 4, (addr >> 32) as u32);
        memory.set(at + 8, len);
        memory.set(at + 12, u32::from(flags) | u32::from(next) << 16);
    }
    memory.set(usize::try_from(rings(4).available.0).unwrap(), 1 << 16);
    let mut chain = Vec::new();
    memory.device(4, features).pop(&memory, &mut chain).map(|_| chain)
}

#[test]
fn lying_driver_is_an_error_not_a_panic() {
    const NEXT: u16 = VIRTQ_DESC_F_NEXT;
    const WRITE: u16 = VIRTQ_DESC_F_WRITE;
    const INDIRECT: u16 = VIRTQ_DESC_F_INDIRECT;
    let table = 4 * RINGS as u64; // an indirect table that is the ring's own
    for (descriptors, expected) in [
        (&[(0x1000, 8, NEXT, 0)][..], QueueError::DescriptorLoop),
        (&[(0x1000, 8, NEXT, 1), (0x1000, 8, NEXT, 0)], QueueError::DescriptorLoop),
        (&[(0x1000, 8, NEXT, 4)], QueueError::DescriptorIndex),
        (&[(0x1000, 8, NEXT | WRITE, 1), (0x1000, 8, 0, 0)], QueueError::Order),
        (&[(0x1000, u32::MAX, NEXT, 1), (0x1000, 8, 0, 0)], QueueError::Overflow),
        (&[(table, 0, INDIRECT, 0)], QueueError::Indirect),
        (&[(table, 24, INDIRECT, 0)], QueueError::Indirect),
        (&[(table, 16, INDIRECT, 0)], QueueError::Indirect), // points to itself
        (&[(table + 16, 16, INDIRECT | NEXT, 1)], QueueError::Indirect),
        (&[(table + 2, 16, INDIRECT, 0)], QueueError::Indirect),
        (&[(u64::MAX - 15, 32, INDIRECT, 0)], QueueError::Address),
    ] {
        assert_eq!(lying_driver(BOTH, descriptors), Err(expected), "{descriptors:x?}");
    }
    assert_eq!(
        lying_driver(0, &[(table, 16, INDIRECT, 0)]),
        Err(QueueError::Indirect),
        "not negotiated"
    );
    assert_eq!(lying_driver(0, &[(0x1000, 8, WRITE, 9)]), Ok(alloc::vec![writable(0x1000, 8)]));
}

#[test]
fn available_index_beyond_the_queue_is_an_error() {
    let memory = Memory::new();
    memory.set(usize::try_from(rings(4).available.0).unwrap(), 5 << 16);
    let mut device = memory.device(4, 0);
    assert_eq!(device.pop(&memory, &mut Vec::new()), Err(QueueError::AvailableIndex));
}

#[test]
fn batches_need_one_kick_and_one_interrupt() {
    let memory = Memory::new();
    let mut driver = memory.driver(64, BOTH);
    let mut device = memory.device(64, BOTH);
    let mut chain = Vec::new();
    // Enough for the 16-bit indices to wrap; under Miri, which takes a second for each, enough to run it.
    for round in 0..if cfg!(miri) { 2 } else { 2000u32 } {
        assert!(!device.arm(&memory).unwrap());
        assert!(!driver.arm());
        let mut kicks = 0;
        for _ in 0..4 {
            for _ in 0..16 {
                driver.add(&[readable(0x1000, 16), writable(0x2000, 64)]).unwrap();
            }
            kicks += u32::from(driver.publish());
        }
        assert_eq!(kicks, 1, "round {round}");
        let mut interrupts = 0;
        while let Some(head) = device.pop(&memory, &mut chain).unwrap() {
            device.push(&memory, head, 64).unwrap();
            interrupts += u32::from(device.publish(&memory).unwrap());
        }
        assert_eq!(interrupts, 1, "round {round}");
        while driver.pop().unwrap().is_some() {}
        assert_eq!(driver.free(), 64);
    }
}

#[test]
fn delayed_interrupt_comes_after_as_many_as_asked_for() {
    let memory = Memory::new();
    let mut driver = memory.driver(16, BOTH);
    let mut device = memory.device(16, BOTH);
    for _ in 0..8 {
        driver.add(&[readable(0x1000, 16)]).unwrap();
    }
    driver.publish();
    assert!(!driver.arm_after(5));
    let mut chain = Vec::new();
    let mut signals = Vec::new();
    while let Some(head) = device.pop(&memory, &mut chain).unwrap() {
        device.push(&memory, head, 0).unwrap();
        signals.push(device.publish(&memory).unwrap());
    }
    assert_eq!(signals, [false, false, false, false, false, true, false, false]);
    assert!(driver.arm_after(5), "eight are there, six were asked for");
}

#[test]
fn without_event_index_the_flags_say_who_sleeps() {
    let memory = Memory::new();
    let mut driver = memory.driver(4, 0);
    let mut device = memory.device(4, 0);
    device.disarm(&memory).unwrap();
    driver.add(&[writable(0x1000, 8)]).unwrap();
    assert!(!driver.publish());
    assert!(device.arm(&memory).unwrap(), "one came before the request");
    driver.disarm();
    let head = device.pop(&memory, &mut Vec::new()).unwrap().unwrap();
    device.push(&memory, head, 8).unwrap();
    assert!(!device.publish(&memory).unwrap());
    assert!(driver.arm());
    assert_eq!(memory.get(usize::try_from(rings(4).available.0).unwrap()) & 0xffff, 0);
}

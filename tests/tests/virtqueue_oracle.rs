//! The virtqueue against a second implementation: rust-vmm's device half, over the same bytes.
//!
//! The steps are random; chains must come out as they went in, come back once, and nobody who asked to
//! be told may sleep through anything. The other direction, a foreign driver half on our device half, is
//! in `virtio_drivers_lost_kicks.rs`.
// UNSAFETY: our half sees as atomics the memory that rust-vmm has mapped.
#![expect(unsafe_code, reason = "two implementations look at the same bytes")]
#![expect(clippy::unwrap_used, reason = "a test may panic")]
#![expect(clippy::unnecessary_safety_comment, reason = "the ledger's UNSAFETY is taken for one")]
#![expect(clippy::cast_possible_truncation, reason = "small numbers of the test's own")]

use std::collections::VecDeque;

use janus_proto::abi::virtio::feature;
use janus_proto::addr::Gpa;
use janus_proto::sync::AtomicU32;
use janus_proto::virtqueue::{
    DriverQueue, IndirectMemory, Layout, QueueError, Rings, Segment, Used,
};
use proptest::prelude::*;
use virtio_queue::{Queue, QueueT};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

/// Where rings and indirect tables lie, and how much memory there is.
const RINGS: u64 = 0x1_0000;
const TABLES: u64 = 0x4_0000;
const MEMORY: usize = 0x10_0000;
const TABLE_ENTRIES: u16 = 8;
/// Buffers lie here; nobody touches their bytes.
const BUFFERS: u64 = 0x8_0000;

fn words(memory: &GuestMemoryMmap, start: u64, bytes: usize) -> &[AtomicU32] {
    let pointer = memory.get_host_address(GuestAddress(start)).unwrap();
    memory.get_host_address(GuestAddress(start + bytes as u64 - 1)).unwrap();
    // SAFETY: 1. both ends lie in the one region, which is mapped as long as `memory` is borrowed; 2. `start`
    // is page-aligned; 3. the other half accesses the bytes volatile or as atomics.
    unsafe { core::slice::from_raw_parts(pointer.cast::<AtomicU32>(), bytes.div_ceil(4)) }
}

fn driver(memory: &GuestMemoryMmap, size: u16, features: u64) -> DriverQueue<&[AtomicU32]> {
    let layout = Layout::new(size).unwrap();
    let tables = IndirectMemory {
        memory: words(memory, TABLES, IndirectMemory::<()>::bytes(size, TABLE_ENTRIES)),
        address: Gpa(TABLES),
        entries: TABLE_ENTRIES,
    };
    DriverQueue::new(size, words(memory, RINGS, layout.bytes()), Some(tables), features).unwrap()
}

fn device(memory: &GuestMemoryMmap, size: u16, features: u64) -> Queue {
    let rings = Rings::of(Layout::new(size).unwrap(), Gpa(RINGS));
    let mut queue = Queue::new(size).unwrap();
    queue.set_size(size);
    let halves = |address: Gpa| (Some(address.0 as u32), Some((address.0 >> 32) as u32));
    let (low, high) = halves(rings.descriptors);
    queue.set_desc_table_address(low, high);
    let (low, high) = halves(rings.available);
    queue.set_avail_ring_address(low, high);
    let (low, high) = halves(rings.used);
    queue.set_used_ring_address(low, high);
    queue.set_event_idx(features & feature::RING_EVENT_IDX != 0);
    queue.set_ready(true);
    assert!(queue.is_valid(memory));
    queue
}

#[derive(Clone, Debug)]
enum Step {
    Add { readable: u8, writable: u8 },
    Publish,
    Serve { count: u8 },
    Reap,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (0u8..4, 0u8..4).prop_map(|(readable, writable)| Step::Add { readable, writable }),
        2 => Just(Step::Publish),
        2 => (1u8..12).prop_map(|count| Step::Serve { count }),
        2 => Just(Step::Reap),
    ]
}

proptest! {
    #[test]
    fn our_driver_half_and_rust_vmms_device_half_agree(
        steps in proptest::collection::vec(step(), 1..500),
        log_size in 1u32..8,
        features in prop_oneof![
            Just(0),
            Just(feature::RING_EVENT_IDX),
            Just(feature::RING_INDIRECT_DESC),
            Just(feature::RING_EVENT_IDX | feature::RING_INDIRECT_DESC),
        ],
    ) {
        let size = 1u16 << log_size;
        let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), MEMORY)]).unwrap();
        let mut driver = driver(&memory, size, features);
        let mut device = device(&memory, size, features);
        let mut added: VecDeque<(u16, Vec<Segment>)> = VecDeque::new();
        let mut sent: VecDeque<(u16, Vec<Segment>)> = VecDeque::new();
        let mut served: VecDeque<Used> = VecDeque::new();
        device.enable_notification(&memory).unwrap();
        driver.arm();
        let (mut device_asleep, mut driver_asleep) = (true, true);
        for step in steps {
            match step {
                Step::Add { readable, writable } => {
                    let kinds = (0..readable).map(|_| false).chain((0..writable).map(|_| true));
                    let chain: Vec<Segment> = kinds.enumerate().map(|(n, writable)| {
                        Segment { address: Gpa(BUFFERS + 64 * n as u64), len: 1 + n as u32, writable }
                    }).collect();
                    match driver.add(&chain) {
                        Ok(head) => added.push_back((head, chain)),
                        Err(error) => prop_assert!(matches!(error, QueueError::Full | QueueError::BadLength)),
                    }
                }
                Step::Publish => {
                    let any = !added.is_empty();
                    sent.append(&mut added);
                    let kick = driver.publish();
                    prop_assert!(!any || !device_asleep || kick, "rust-vmm asked for a kick and got none");
                    device_asleep &= !kick;
                }
                Step::Serve { count } => {
                    device.disable_notification(&memory).unwrap();
                    let mut used = false;
                    for _ in 0..count {
                        let Some(chain) = device.pop_descriptor_chain(&memory) else { break };
                        let head = chain.head_index();
                        let segments: Vec<Segment> = chain.map(|desc| Segment {
                            address: Gpa(desc.addr().0),
                            len: desc.len(),
                            writable: desc.is_write_only(),
                        }).collect();
                        prop_assert_eq!(Some((head, segments.clone())), sent.pop_front());
                        let len = segments.iter().filter(|s| s.writable).map(|s| s.len).sum();
                        device.add_used(&memory, head, len).unwrap();
                        served.push_back(Used { head, len });
                        used = true;
                    }
                    // Without event index rust-vmm always says yes.
                    let signal = used && device.needs_notification(&memory).unwrap();
                    prop_assert!(!used || !driver_asleep || signal, "we asked for an interrupt and got none");
                    driver_asleep &= !signal;
                    let more = device.enable_notification(&memory).unwrap();
                    prop_assert_eq!(more, !sent.is_empty());
                    device_asleep = !more;
                }
                Step::Reap => {
                    driver.disarm();
                    for used in served.drain(..) {
                        prop_assert_eq!(driver.pop(), Ok(Some(used)));
                    }
                    prop_assert_eq!(driver.pop(), Ok(None));
                    driver_asleep = !driver.arm();
                    prop_assert!(driver_asleep);
                }
            }
        }
    }
}

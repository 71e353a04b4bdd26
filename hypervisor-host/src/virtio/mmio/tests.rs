//! The register file and the state machine behind it, with a well-behaved driver and with others.

use janus_proto::abi::virtio::feature::{RING_EVENT_IDX, VERSION_1};
use janus_proto::abi::virtio::{VIRTQ_DESC_F_INDIRECT, VIRTQ_DESC_F_NEXT, VIRTQ_DESC_F_WRITE};
use janus_proto::addr::Gpa;
use janus_proto::virtqueue::{Layout, Rings};

use super::*;
use crate::virtio::memory;
use crate::virtio::rng::Rng;
use crate::virtio::testing::{BUFFERS, Driver, PAGES, SIZE};

fn rng() -> Box<Rng> {
    Box::new(Rng::from_source(Box::new(std::io::repeat(0x5a))))
}

const ACKNOWLEDGED: Status = Status::ACKNOWLEDGE.union(Status::DRIVER);
const AGREED: Status = ACKNOWLEDGED.union(Status::FEATURES_OK);
const RUNNING: Status = AGREED.union(Status::DRIVER_OK);

#[test]
fn a_device_is_found_started_used_and_acknowledged() {
    let mut driver = Driver::new(rng(), RING_EVENT_IDX);
    for (register, value) in
        [(MAGIC_VALUE, 0x7472_6976), (VERSION, 2), (DEVICE_ID, 4), (QUEUE_NUM_MAX, 64)]
    {
        driver.set(QUEUE_SEL, 0);
        assert_eq!(driver.get(register), value, "{register:#x}");
    }
    assert!(driver.queues[0].arm() || driver.used(0).is_none());
    assert_eq!(driver.ask(0, &[(0, 100, true), (4096, 28, true)]), 128);
    assert!(driver.peek(0, 100).iter().chain(&driver.peek(4096, 28)).all(|&byte| byte == 0x5a));
    assert_eq!(driver.get(INTERRUPT_STATUS), 1);
    assert_eq!(driver.line.raised.load(Ordering::SeqCst), 1);
    driver.set(INTERRUPT_ACK, 1);
    assert_eq!(driver.get(INTERRUPT_STATUS), 0);
    assert_eq!(
        driver.line.lowered.load(Ordering::SeqCst),
        2,
        "by the reset, and by the acknowledgement"
    );
}

#[test]
fn status_bits_are_taken_in_their_order_only() {
    let driver = Driver::untouched(rng());
    for (written, expected) in [
        (Status::DRIVER, Status::empty()),
        (Status::FEATURES_OK | Status::DRIVER_OK, Status::empty()),
        (Status::ACKNOWLEDGE, Status::ACKNOWLEDGE),
        (Status::empty(), Status::empty()),
        (ACKNOWLEDGED, ACKNOWLEDGED),
        (ACKNOWLEDGED | Status::DRIVER_OK, ACKNOWLEDGED),
        // VERSION_1 has not been taken.
        (AGREED, ACKNOWLEDGED),
        // Bits are not taken back, and no driver makes this one.
        (Status::ACKNOWLEDGE | Status::DEVICE_NEEDS_RESET, ACKNOWLEDGED),
        (Status::FAILED, ACKNOWLEDGED | Status::FAILED),
        (Status::empty(), Status::empty()),
    ] {
        assert_eq!(driver.status(written), expected, "{written:?}");
    }
}

#[test]
fn only_features_that_were_offered_are_accepted() {
    for (taken, accepted) in [
        (VERSION_1, true),
        (VERSION_1 | RING_EVENT_IDX, true),
        (RING_EVENT_IDX, false),
        (VERSION_1 | 1, false),
        (VERSION_1 | 1 << 63, false),
        (u64::MAX, false),
    ] {
        let driver = Driver::untouched(rng());
        driver.status(ACKNOWLEDGED);
        driver.take(taken);
        assert_eq!(driver.status(AGREED) == AGREED, accepted, "{taken:#x}");
        // What was agreed on is not changed any more.
        driver.take(VERSION_1 | 2);
        assert_eq!(driver.status(AGREED) == AGREED, accepted);
    }
    let driver = Driver::untouched(rng());
    driver.status(ACKNOWLEDGED);
    driver.take(VERSION_1);
    driver.set(DRIVER_FEATURES_SEL, 2);
    driver.set(DRIVER_FEATURES, 1);
    assert_eq!(driver.status(AGREED), ACKNOWLEDGED, "there is no feature 64");
    driver.set(DEVICE_FEATURES_SEL, 2);
    assert_eq!(driver.get(DEVICE_FEATURES), 0);
}

#[test]
fn queues_that_make_no_sense_are_not_taken() {
    let good = Driver::rings(0);
    let end = PAGES * 4096;
    let at = |descriptors, available, used| Rings {
        descriptors: Gpa(descriptors),
        available: Gpa(available),
        used: Gpa(used),
    };
    for (name, queue, size, rings, taken) in [
        ("good", 0, 16, good, true),
        ("no such queue", 1, 16, good, false),
        ("no such queue", 0xffff, 16, good, false),
        ("empty", 0, 0, good, false),
        ("no power of two", 0, 12, good, false),
        ("larger than offered", 0, 128, good, false),
        ("of another number in 16 bits", 0, 0x1_0010, good, false),
        ("misaligned table", 0, 16, at(8, 1024, 2048), false),
        ("misaligned available ring", 0, 16, at(0, 1025, 2048), false),
        ("available ring at a half word", 0, 16, at(0, 1026, 2048), true),
        ("misaligned used ring", 0, 16, at(0, 1024, 2050), false),
        ("table outside", 0, 16, at(end, 1024, 2048), false),
        ("table across the end", 0, 16, at(end - 128, 1024, 2048), false),
        ("available ring outside", 0, 16, at(0, 1 << 60, 2048), false),
        ("used ring outside", 0, 16, at(0, 1024, end - 64), false),
        ("around the end of all addresses", 0, 16, at(u64::MAX - 15, 1024, 2048), false),
        ("all in one place", 0, 16, at(0, 0, 0), true),
    ] {
        let driver = Driver::untouched(rng());
        assert!(!driver.enable(0, SIZE.into(), good), "before anything is agreed on");
        driver.negotiate(0);
        assert_eq!(driver.enable(queue, size, rings), taken, "{name}");
    }
}

#[test]
fn a_queue_in_use_is_changed_only_after_it_was_taken_back() {
    let driver = Driver::untouched(rng());
    driver.negotiate(0);
    assert!(driver.enable(0, 16, Driver::rings(0)));
    assert!(driver.enable(0, 8, Driver::rings(2)), "still the first one");
    driver.set(QUEUE_READY, 0);
    assert_eq!(driver.get(QUEUE_READY), 0);
    assert!(!driver.enable(0, 3, Driver::rings(2)));
    assert!(driver.enable(0, 8, Driver::rings(2)));
}

#[test]
fn a_reset_forgets_everything() {
    let mut driver = Driver::new(rng(), RING_EVENT_IDX);
    driver.send(0, &[(0, 4, true)]);
    driver.set(QUEUE_SEL, 7);
    driver.set(STATUS, 0);
    for (register, value) in
        [(STATUS, 0), (QUEUE_READY, 0), (INTERRUPT_STATUS, 0), (QUEUE_NUM_MAX, 64)]
    {
        assert_eq!(driver.get(register), value, "{register:#x}");
    }
    // Notifications of before are of nothing.
    driver.set(QUEUE_NOTIFY, 0);
    driver.start(RING_EVENT_IDX);
    assert_eq!(driver.ask(0, &[(0, 8, true)]), 8);
}

#[test]
fn accesses_that_are_no_registers_do_nothing() {
    let driver = Driver::untouched(rng());
    for offset in (0..WINDOW + 64).chain([u64::MAX, u64::MAX - 3, 1 << 32]) {
        for len in [1, 2, 3, 4, 8, 16] {
            let mut buf = vec![0xaa; len];
            driver.mmio.read(offset, &mut buf);
            let register = len == 4 && offset < 0x100 && offset % 4 == 0;
            assert!(register || buf.iter().all(|&byte| byte == 0), "{offset:#x} {len}");
            if offset != STATUS as u64 {
                driver.mmio.write(offset, &vec![0xff; len]);
            }
        }
    }
    assert_eq!(driver.status(Status::empty()), Status::empty());
}

/// Writes a descriptor of queue 0.
fn descriptor(driver: &Driver, index: u64, address: u64, len: u32, flags: u16, next: u16) {
    let mut bytes = address.to_le_bytes().to_vec();
    bytes.extend(len.to_le_bytes());
    bytes.extend(flags.to_le_bytes());
    bytes.extend(next.to_le_bytes());
    memory::write(&driver.memory, Gpa(16 * index), &bytes).unwrap();
}

/// Makes `head` available `index` times, and notifies.
fn offer(driver: &Driver, head: u16, index: u16) {
    let Gpa(available) = Driver::rings(0).available;
    memory::write(&driver.memory, Gpa(available + 4), &head.to_le_bytes()).unwrap();
    memory::write(&driver.memory, Gpa(available + 2), &index.to_le_bytes()).unwrap();
    driver.set(QUEUE_NOTIFY, 0);
}

#[test]
fn a_broken_queue_makes_the_device_ask_for_a_reset_and_a_reset_heals_it() {
    const WRITE: u16 = VIRTQ_DESC_F_WRITE;
    const NEXT: u16 = VIRTQ_DESC_F_NEXT;
    const INDIRECT: u16 = VIRTQ_DESC_F_INDIRECT;
    type Break = fn(&Driver);
    let cases: [(&str, Break); 9] = [
        ("an index too far ahead", |driver| offer(driver, 0, 17)),
        ("a head beyond the table", |driver| offer(driver, 16, 1)),
        ("a next beyond the table", |driver| {
            descriptor(driver, 0, BUFFERS, 4, WRITE | NEXT, 16);
            offer(driver, 0, 1);
        }),
        ("a loop of one", |driver| {
            descriptor(driver, 0, BUFFERS, 4, WRITE | NEXT, 0);
            offer(driver, 0, 1);
        }),
        ("a loop of two", |driver| {
            descriptor(driver, 0, BUFFERS, 4, WRITE | NEXT, 1);
            descriptor(driver, 1, BUFFERS, 4, WRITE | NEXT, 0);
            offer(driver, 0, 1);
        }),
        ("lengths that overflow", |driver| {
            descriptor(driver, 0, BUFFERS, u32::MAX, WRITE | NEXT, 1);
            descriptor(driver, 1, BUFFERS, 2, WRITE, 0);
            offer(driver, 0, 1);
        }),
        ("readable behind writable", |driver| {
            descriptor(driver, 0, BUFFERS, 4, WRITE | NEXT, 1);
            descriptor(driver, 1, BUFFERS, 4, 0, 0);
            offer(driver, 0, 1);
        }),
        ("indirect outside of memory", |driver| {
            descriptor(driver, 0, PAGES << 12, 16, INDIRECT, 0);
            offer(driver, 0, 1);
        }),
        ("indirect in indirect", |driver| {
            descriptor(driver, 0, 0, 16, INDIRECT, 0);
            offer(driver, 0, 1);
        }),
    ];
    for (name, wreck) in cases {
        let mut driver = Driver::new(rng(), 1 << 28);
        wreck(&driver);
        let status = driver.device_status();
        assert_eq!(status, RUNNING | Status::DEVICE_NEEDS_RESET, "{name}");
        assert_eq!(driver.get(INTERRUPT_STATUS) & 2, 2, "{name}: the driver is told");
        // It is dead until then.
        driver.set(QUEUE_NOTIFY, 0);
        assert!(driver.used(0).is_none());
        driver.start(RING_EVENT_IDX);
        assert_eq!(driver.ask(0, &[(0, 8, true)]), 8, "{name}");
    }
}

#[test]
fn buffers_that_are_no_memory_are_given_back_empty() {
    let driver = Driver::new(rng(), 0);
    for (index, (address, len)) in
        (1..).zip([(PAGES << 12, 4), ((PAGES << 12) - 2, 4), (u64::MAX - 1, 4), (1 << 63, 4096)])
    {
        descriptor(&driver, 0, address, len, VIRTQ_DESC_F_WRITE, 0);
        let Gpa(available) = Driver::rings(0).available;
        let slot = available + 4 + 2 * (u64::from(index) - 1);
        memory::write(&driver.memory, Gpa(slot), &[0, 0]).unwrap();
        memory::write(&driver.memory, Gpa(available + 2), &u16::to_le_bytes(index)).unwrap();
        driver.set(QUEUE_NOTIFY, 0);
        assert_eq!(driver.device_status(), RUNNING, "{address:#x}");
        let mut used = [0; 4];
        let element = Driver::rings(0).used.0 + 4 + 8 * (u64::from(index) - 1) + 4;
        memory::read(&driver.memory, Gpa(element), &mut used).unwrap();
        assert_eq!(u32::from_le_bytes(used), 0, "{address:#x}");
    }
}

#[test]
fn a_reset_under_load_waits_for_whoever_serves() {
    use std::sync::atomic::AtomicBool;
    let driver = Driver::new(rng(), 0);
    descriptor(&driver, 0, BUFFERS, 4096, VIRTQ_DESC_F_WRITE, 0);
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                // A guest's other CPUs go on using the device meanwhile.
                let mut index = 0_u16;
                while !stop.load(Ordering::Relaxed) {
                    index = index.wrapping_add(1);
                    offer(&driver, 0, index);
                }
            });
        }
        for _ in 0..200 {
            driver.set(STATUS, 0);
            assert_eq!(driver.get(STATUS), 0);
            // Nobody writes to memory that was taken back.
            memory::write(&driver.memory, Gpa(BUFFERS), &[7; 4096]).unwrap();
            assert!(driver.peek(0, 4096).iter().all(|&byte| byte == 7));
            driver.negotiate(0);
            let layout = Layout::new(SIZE).unwrap();
            driver.enable(0, SIZE.into(), Rings::of(layout, Gpa(0)));
            driver.status(RUNNING);
        }
        stop.store(true, Ordering::Relaxed);
    });
}

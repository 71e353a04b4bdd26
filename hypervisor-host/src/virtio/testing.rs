//! A driver for tests, of the registers and queues that any guest has.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use janus_proto::abi::virtio::mmio::{
    DEVICE_FEATURES, DEVICE_FEATURES_SEL, DRIVER_FEATURES, DRIVER_FEATURES_SEL, QUEUE_DESC,
    QUEUE_DEVICE, QUEUE_DRIVER, QUEUE_NOTIFY, QUEUE_NUM, QUEUE_READY, QUEUE_SEL, STATUS,
};
use janus_proto::abi::virtio::{InterruptStatus, Status};
use janus_proto::addr::{Gpa, Mfn, PAGE_SIZE};
use janus_proto::grant::Access;
use janus_proto::virtqueue::{DriverQueue, Layout, Rings, Segment, Used};

use super::Model;
use super::memory::{self, GuestMemory as _, PhysicalMemory, Pinned};
use super::mmio::{Line, Mmio};
use crate::machine::ram::{FIRST_FRAME, Ram};

/// Pages of the guest; the first are for queues, one each.
pub(crate) const PAGES: u64 = 64;
/// Where its buffers are.
pub(crate) const BUFFERS: u64 = 0x1_0000;
/// Entries of every queue.
pub(crate) const SIZE: u16 = 16;

/// Counts interrupts.
#[derive(Debug, Default)]
pub(crate) struct Counter {
    pub(crate) raised: AtomicU32,
    pub(crate) lowered: AtomicU32,
    reasons: Mutex<Vec<InterruptStatus>>,
}

impl Line for Counter {
    fn raise(&self, reason: InterruptStatus) {
        self.raised.fetch_add(1, Ordering::SeqCst);
        self.reasons.lock().unwrap().push(reason);
    }
    fn lower(&self) {
        self.lowered.fetch_add(1, Ordering::SeqCst);
    }
}

/// A guest of one device.
pub(crate) struct Driver {
    pub(crate) ram: Arc<Ram>,
    pub(crate) memory: PhysicalMemory,
    pub(crate) mmio: Arc<Mmio>,
    pub(crate) line: Arc<Counter>,
    pub(crate) queues: Vec<DriverQueue<Pinned>>,
}

impl Driver {
    /// A device that nobody has touched.
    pub(crate) fn untouched(model: Box<dyn Model>) -> Self {
        let ram = Arc::new(Ram::new(PAGES).unwrap());
        let memory = PhysicalMemory::flat(Arc::clone(&ram));
        let line = Arc::new(Counter::default());
        let mmio = Mmio::new(model, Arc::new(memory.clone()), line.clone());
        Self { ram, memory, mmio, line, queues: Vec::new() }
    }

    /// A device in use, with the features of `wanted` that it offers.
    pub(crate) fn new(model: Box<dyn Model>, wanted: u64) -> Self {
        let mut driver = Self::untouched(model);
        driver.start(wanted);
        driver
    }

    pub(crate) fn get(&self, register: usize) -> u32 {
        let mut word = [0; 4];
        self.mmio.read(register as u64, &mut word);
        u32::from_le_bytes(word)
    }

    pub(crate) fn set(&self, register: usize, value: u32) {
        self.mmio.write(register as u64, &value.to_le_bytes());
    }

    pub(crate) fn offered(&self) -> u64 {
        let halves = [0, 1].map(|half| {
            self.set(DEVICE_FEATURES_SEL, half);
            u64::from(self.get(DEVICE_FEATURES))
        });
        halves[0] | halves[1] << 32
    }

    pub(crate) fn take(&self, features: u64) {
        for half in 0..2 {
            self.set(DRIVER_FEATURES_SEL, half);
            self.set(
                DRIVER_FEATURES,
                u32::try_from(features >> (32 * half) & 0xffff_ffff).unwrap(),
            );
        }
    }

    pub(crate) fn status(&self, status: Status) -> Status {
        self.set(STATUS, status.bits().into());
        self.device_status()
    }

    pub(crate) fn device_status(&self) -> Status {
        Status::from_bits_retain(u8::try_from(self.get(STATUS)).unwrap())
    }

    /// Agrees on features, as far as the device offers them.
    pub(crate) fn negotiate(&self, wanted: u64) -> u64 {
        assert!(self.status(Status::empty()).is_empty());
        self.status(Status::ACKNOWLEDGE);
        self.status(Status::ACKNOWLEDGE | Status::DRIVER);
        let features = self.offered() & (wanted | 1 << 32);
        self.take(features);
        let agreed = Status::ACKNOWLEDGE | Status::DRIVER | Status::FEATURES_OK;
        assert_eq!(self.status(agreed), agreed);
        features
    }

    /// Where the rings of a queue are.
    pub(crate) fn rings(queue: u16) -> Rings {
        Rings::of(Layout::new(SIZE).unwrap(), Gpa(u64::from(queue) * PAGE_SIZE as u64))
    }

    pub(crate) fn enable(&self, queue: u16, size: u32, rings: Rings) -> bool {
        self.set(QUEUE_SEL, queue.into());
        self.set(QUEUE_NUM, size);
        let parts = [rings.descriptors, rings.available, rings.used];
        for (register, Gpa(part)) in [QUEUE_DESC, QUEUE_DRIVER, QUEUE_DEVICE].into_iter().zip(parts)
        {
            self.set(register, u32::try_from(part & 0xffff_ffff).unwrap());
            self.set(register + 4, u32::try_from(part >> 32).unwrap());
        }
        self.set(QUEUE_READY, 1);
        self.get(QUEUE_READY) == 1
    }

    /// Agrees on features, sets up all queues, and starts.
    pub(crate) fn start(&mut self, wanted: u64) {
        let features = self.negotiate(wanted);
        self.queues.clear();
        for queue in 0.. {
            if self.mmio.device().queue_most(queue) == 0 {
                break;
            }
            let frame = Mfn(FIRST_FRAME.0 + u64::from(queue));
            for word in self.ram.words(frame, 1).unwrap() {
                word.store(0, Ordering::Relaxed);
            }
            assert!(self.enable(queue, SIZE.into(), Self::rings(queue)), "queue {queue}");
            let Gpa(start) = Self::rings(queue).descriptors;
            let page = self.memory.pin(Gpa(start), PAGE_SIZE, Access::ReadWrite).unwrap();
            self.queues.push(DriverQueue::new(SIZE, page, None, features).unwrap());
        }
        let running =
            Status::ACKNOWLEDGE | Status::DRIVER | Status::FEATURES_OK | Status::DRIVER_OK;
        assert_eq!(self.status(running), running);
    }

    pub(crate) fn put(&self, offset: u64, bytes: &[u8]) {
        memory::write(&self.memory, Gpa(BUFFERS + offset), bytes).unwrap();
    }

    pub(crate) fn peek(&self, offset: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        memory::read(&self.memory, Gpa(BUFFERS + offset), &mut bytes).unwrap();
        bytes
    }

    /// Makes a chain of buffers available, and notifies if the device wants that; `(offset, length, writable)`.
    pub(crate) fn send(&mut self, queue: u16, buffers: &[(u64, u32, bool)]) -> u16 {
        let segments: Vec<_> = buffers
            .iter()
            .map(|&(offset, len, writable)| Segment {
                address: Gpa(BUFFERS + offset),
                len,
                writable,
            })
            .collect();
        let half = &mut self.queues[usize::from(queue)];
        let head = half.add(&segments).unwrap();
        if half.publish() {
            self.set(QUEUE_NOTIFY, queue.into());
        }
        head
    }

    pub(crate) fn used(&mut self, queue: u16) -> Option<Used> {
        self.queues[usize::from(queue)].pop().unwrap()
    }

    /// Sends a chain that is answered at once; the bytes written.
    pub(crate) fn ask(&mut self, queue: u16, buffers: &[(u64, u32, bool)]) -> u32 {
        let head = self.send(queue, buffers);
        let used = self.used(queue).expect("the device answers at once");
        assert_eq!(used.head, head);
        used.len
    }
}

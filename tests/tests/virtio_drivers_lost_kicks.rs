//! Why the disk and the network have a ring of our own: the `virtio-drivers` crate's loses kicks.
//!
//! Its `should_notify` compares positions with `>=`, which is wrong at the wrap of the 16-bit index, and
//! true for every request where one kick would do. (Its second fault, no fence behind the index store,
//! needs a model of the memory: `loom_finds_the_lost_kick_of_a_missing_fence` in `janus-proto`.) Each test
//! runs our driver half through the same states. If the first half of one fails, the crate has been mended.
// UNSAFETY: implements the crate's unsafe `Hal`, and calls its queue, which keeps pointers to buffers.
#![expect(unsafe_code, reason = "the crate's Hal and queue are unsafe")]
#![expect(clippy::unwrap_used, reason = "a test may panic")]
#![expect(clippy::unnecessary_safety_comment, reason = "the ledger's UNSAFETY is taken for one")]

use std::alloc::{Layout as Bytes, alloc_zeroed, dealloc};
use std::ptr::NonNull;

use janus_front::virtio::fake::ProcessMemory;
use janus_proto::abi::virtio::feature;
use janus_proto::addr::Gpa;
use janus_proto::sync::AtomicU32;
use janus_proto::virtqueue::{DeviceQueue, DriverQueue, Layout, Rings, Segment};
use virtio_drivers::queue::VirtQueue;
use virtio_drivers::transport::{DeviceStatus, DeviceType, InterruptStatus, Transport};
use virtio_drivers::{BufferDirection, Hal, PAGE_SIZE, PhysAddr};
use zerocopy::{FromBytes, Immutable, IntoBytes};

const SIZE: u16 = 8;

struct HostHal;

fn bytes(pages: usize) -> Bytes {
    Bytes::from_size_align(pages * PAGE_SIZE, PAGE_SIZE).unwrap()
}

// SAFETY: zeroed, page-aligned memory of the allocator; a device address is the pointer itself.
unsafe impl Hal for HostHal {
    fn dma_alloc(pages: usize, _: BufferDirection) -> (PhysAddr, NonNull<u8>) {
        // SAFETY: the crate asks for at least one page.
        let memory = NonNull::new(unsafe { alloc_zeroed(bytes(pages)) }).unwrap();
        (memory.as_ptr().expose_provenance() as PhysAddr, memory)
    }
    unsafe fn dma_dealloc(_: PhysAddr, memory: NonNull<u8>, pages: usize) -> i32 {
        // SAFETY: from `dma_alloc` with the same number of pages.
        unsafe { dealloc(memory.as_ptr(), bytes(pages)) };
        0
    }
    unsafe fn mmio_phys_to_virt(_: PhysAddr, _: usize) -> NonNull<u8> {
        unreachable!("there are no registers")
    }
    unsafe fn share(buffer: NonNull<[u8]>, _: BufferDirection) -> PhysAddr {
        buffer.as_ptr().cast::<u8>().expose_provenance() as PhysAddr
    }
    unsafe fn unshare(_: PhysAddr, _: NonNull<[u8]>, _: BufferDirection) {}
}

/// Remembers where the crate puts its rings.
#[derive(Default)]
struct Wire {
    rings: Option<Rings>,
}

impl Transport for Wire {
    fn device_type(&self) -> DeviceType {
        DeviceType::Block
    }
    fn read_device_features(&mut self) -> u64 {
        0
    }
    fn write_driver_features(&mut self, _: u64) {}
    fn max_queue_size(&mut self, _: u16) -> u32 {
        SIZE.into()
    }
    fn notify(&mut self, _: u16) {}
    fn get_status(&self) -> DeviceStatus {
        DeviceStatus::empty()
    }
    fn set_status(&mut self, _: DeviceStatus) {}
    fn set_guest_page_size(&mut self, _: u32) {}
    fn requires_legacy_layout(&self) -> bool {
        false
    }
    fn queue_set(
        &mut self,
        _: u16,
        _: u32,
        descriptors: PhysAddr,
        available: PhysAddr,
        used: PhysAddr,
    ) {
        self.rings = Some(Rings {
            descriptors: Gpa(descriptors),
            available: Gpa(available),
            used: Gpa(used),
        });
    }
    fn queue_unset(&mut self, _: u16) {}
    fn queue_used(&mut self, _: u16) -> bool {
        false
    }
    fn ack_interrupt(&mut self) -> InterruptStatus {
        InterruptStatus::empty()
    }
    fn read_config_generation(&self) -> u32 {
        0
    }
    fn read_config_space<T: FromBytes + IntoBytes>(&self, _: usize) -> virtio_drivers::Result<T> {
        Err(virtio_drivers::Error::Unsupported)
    }
    fn write_config_space<T: IntoBytes + Immutable>(
        &mut self,
        _: usize,
        _: T,
    ) -> virtio_drivers::Result<()> {
        Err(virtio_drivers::Error::Unsupported)
    }
}

/// A driver half under test, whoever's: adds one buffer, takes one back, says whether to notify.
trait Half {
    fn add(&mut self);
    /// Makes what was added visible (the crate has done so already); whether the device must be told.
    fn must_notify(&mut self) -> bool;
    fn take(&mut self);
}

struct Crate {
    queue: VirtQueue<HostHal, { SIZE as usize }>,
    buffer: [u8; 16],
    tokens: Vec<u16>,
}

impl Half for Crate {
    fn add(&mut self) {
        // SAFETY: the buffer is a field beside the queue and only read.
        let token = unsafe { self.queue.add(&[&self.buffer], &mut []) }.unwrap();
        self.tokens.push(token);
    }
    fn must_notify(&mut self) -> bool {
        self.queue.should_notify()
    }
    fn take(&mut self) {
        let token = self.tokens.remove(0);
        // SAFETY: the buffer that was added under this token.
        unsafe { self.queue.pop_used(token, &[&self.buffer], &mut []) }.unwrap();
    }
}

struct Ours(DriverQueue<Box<[AtomicU32]>>);

impl Half for Ours {
    fn add(&mut self) {
        self.0.add(&[Segment { address: Gpa(0x1_0000), len: 16, writable: false }]).unwrap();
    }
    fn must_notify(&mut self) -> bool {
        self.0.publish()
    }
    fn take(&mut self) {
        self.0.pop().unwrap().unwrap();
    }
}

fn theirs() -> (Crate, DeviceQueue) {
    let mut wire = Wire::default();
    let queue = VirtQueue::new(&mut wire, 0, false, true).unwrap();
    let device = DeviceQueue::new(SIZE, wire.rings.unwrap(), feature::RING_EVENT_IDX).unwrap();
    (Crate { queue, buffer: [0; 16], tokens: Vec::new() }, device)
}

fn ours() -> (Ours, DeviceQueue) {
    let layout = Layout::new(SIZE).unwrap();
    // A start on 16 bytes, as descriptor tables need: the allocator gives large blocks so.
    let memory: Box<[AtomicU32]> = (0..4096).map(|_| AtomicU32::new(0)).collect();
    let start = Gpa(memory.as_ptr().expose_provenance() as u64);
    let queue = DriverQueue::new(SIZE, memory, None, feature::RING_EVENT_IDX).unwrap();
    (
        Ours(queue),
        DeviceQueue::new(SIZE, Rings::of(layout, start), feature::RING_EVENT_IDX).unwrap(),
    )
}

/// Takes everything that is available, gives it back, and goes to sleep.
fn serve(device: &mut DeviceQueue) -> usize {
    let mut served = 0;
    let mut chain = Vec::new();
    while let Some(head) = device.pop(&ProcessMemory, &mut chain).unwrap() {
        device.push(&ProcessMemory, head, 0).unwrap();
        served += 1;
    }
    device.publish(&ProcessMemory).unwrap();
    assert!(!device.arm(&ProcessMemory).unwrap());
    served
}

/// Moves the index to 65534, lets the device sleep there, adds two requests at once.
fn kick_across_the_wrap(mut half: impl Half, mut device: DeviceQueue) -> bool {
    device.arm(&ProcessMemory).unwrap();
    for _ in 0..65534 {
        half.add();
        half.must_notify();
        assert_eq!(serve(&mut device), 1);
        half.take();
    }
    half.add();
    half.add();
    let told = half.must_notify();
    assert_eq!(serve(&mut device), 2, "both are there: whether the device looks is the question");
    told
}

#[test]
fn the_crate_loses_the_kick_of_a_batch_across_the_index_wrap() {
    let (half, device) = theirs();
    assert!(
        !kick_across_the_wrap(half, device),
        "the crate kicks here now: its should_notify was mended"
    );
    let (half, device) = ours();
    assert!(kick_across_the_wrap(half, device));
}

/// Adds a request at a time while the device is awake and does not ask; counts the kicks.
fn kicks_for_an_awake_device(mut half: impl Half, mut device: DeviceQueue) -> u32 {
    device.arm(&ProcessMemory).unwrap();
    let mut chain = Vec::new();
    let mut kicks = 0;
    for _ in 0..1000 {
        half.add();
        kicks += u32::from(half.must_notify());
        let head = device.pop(&ProcessMemory, &mut chain).unwrap().unwrap();
        device.push(&ProcessMemory, head, 0).unwrap();
        device.publish(&ProcessMemory).unwrap();
        half.take();
    }
    kicks
}

#[test]
fn the_crate_kicks_a_thousand_times_where_one_kick_would_do() {
    let (half, device) = theirs();
    assert_eq!(kicks_for_an_awake_device(half, device), 1000);
    let (half, device) = ours();
    assert_eq!(kicks_for_an_awake_device(half, device), 1);
}

#[test]
fn the_crates_driver_half_and_our_device_half_agree() {
    let (mut half, mut device) = theirs();
    let mut in_flight = 0usize;
    // Any order of adding and serving; the crate has no batches, so each addition is visible at once.
    for step in 0..200_000u32 {
        if step.wrapping_mul(2_654_435_761) >> 30 != 0 && in_flight < usize::from(SIZE) {
            half.add();
            in_flight += 1;
        } else {
            assert_eq!(serve(&mut device), in_flight);
            for _ in 0..in_flight {
                half.take();
            }
            in_flight = 0;
        }
    }
}

//! virtio devices with a driver that does anything: every register, every word of its queues.

use std::sync::Arc;

use janus::machine::ram::{FIRST_FRAME, Ram};
use janus::netback::{Cable, Frame, NetBackend};
use janus::storage::MemoryDisk;
use janus::virtio::Model;
use janus::virtio::blk::Blk;
use janus::virtio::memory::PhysicalMemory;
use janus::virtio::mmio::{Line, Mmio};
use janus::virtio::net::Net;
use janus::virtio::rng::Rng;
use janus_proto::abi::virtio::InterruptStatus;
use janus_proto::abi::virtio::mmio::{
    DRIVER_FEATURES, DRIVER_FEATURES_SEL, QUEUE_DESC, QUEUE_DEVICE, QUEUE_DRIVER, QUEUE_NOTIFY,
    QUEUE_NUM, QUEUE_READY, QUEUE_SEL, STATUS,
};
use janus_proto::sync::Ordering;

use super::Script;

/// Pages of the guest.
const PAGES: u64 = 8;
/// Entries of the queues of a driver that behaves, and where their parts are.
const SIZE: u32 = 8;
const AVAILABLE: u32 = 0x80;
const USED: u32 = 0x100;
const QUEUE_BYTES: u32 = 0x200;

#[derive(Debug)]
struct Silent;

impl Line for Silent {
    fn raise(&self, _reason: InterruptStatus) {}
}

/// Puts a frame onto the network that the card is on.
type Feed = Box<dyn FnMut(Frame)>;

fn model(kind: u8) -> (Box<dyn Model>, Option<Feed>) {
    match kind % 3 {
        0 => (Box::new(Rng::from_source(Box::new(std::io::repeat(7)))), None),
        1 => (Box::new(Blk::new(Box::new(MemoryDisk::new(16)), 2, "fuzz")), None),
        _ => {
            let (mut ours, theirs) = Cable::pair();
            let mut bell = None;
            let card = Net::new([2; 6], 2, |ring| {
                bell = Some(ring);
                Ok::<_, std::convert::Infallible>(Box::new(theirs) as Box<dyn NetBackend + Send>)
            });
            let Ok(card) = card;
            let feed = move |frame| {
                ours.send(frame);
                while ours.receive().is_some() {}
                if let Some(bell) = &bell {
                    bell();
                }
            };
            (Box::new(card), Some(Box::new(feed)))
        }
    }
}

struct Driver {
    mmio: Arc<Mmio>,
    ram: Arc<Ram>,
}

impl Driver {
    fn set(&self, register: usize, value: u32) {
        self.mmio.write(register as u64, &value.to_le_bytes());
    }
    fn get(&self, register: usize) -> u32 {
        let mut word = [0; 4];
        self.mmio.read(register as u64, &mut word);
        u32::from_le_bytes(word)
    }
    /// A word of the guest's memory.
    fn store(&self, index: u32, value: u32) {
        let words = self.ram.words(FIRST_FRAME, PAGES).unwrap_or_default();
        if let Some(word) = words.get(index as usize % words.len().max(1)) {
            word.store(value, Ordering::Relaxed);
        }
    }
    /// What a driver that behaves does first, so that a script has not to find that.
    fn start(&self, features: [u32; 2]) {
        for status in [0, 1, 3] {
            self.set(STATUS, status);
        }
        for (half, features) in (0..).zip([features[0], features[1] | 1]) {
            self.set(DRIVER_FEATURES_SEL, half);
            self.set(DRIVER_FEATURES, features);
        }
        self.set(STATUS, 11);
        for queue in 0..3 {
            let start = queue * QUEUE_BYTES;
            self.set(QUEUE_SEL, queue);
            self.set(QUEUE_NUM, SIZE);
            for (register, at) in [(QUEUE_DESC, 0), (QUEUE_DRIVER, AVAILABLE), (QUEUE_DEVICE, USED)]
            {
                self.set(register, start + at);
                self.set(register + 4, 0);
            }
            self.set(QUEUE_READY, 1);
        }
        self.set(STATUS, 15);
    }
    /// Makes the next chain of a queue available, whatever it is.
    fn offer(&self, queue: u32, head: u32) {
        let index = (queue * QUEUE_BYTES + AVAILABLE) / 4;
        let words = self.ram.words(FIRST_FRAME, PAGES).unwrap_or_default();
        let old = words.get(index as usize).map_or(0, |word| word.load(Ordering::Relaxed)) >> 16;
        let slot = old % SIZE;
        let place = index + 1 + slot / 2;
        self.store(place, head | head << 16);
        self.store(index, (old + 1) << 16);
        self.set(QUEUE_NOTIFY, queue);
    }
}

/// One device, and a script of what its driver does.
pub(super) fn script(input: &[u8]) {
    let mut script = Script(input);
    let (model, mut feed) = model(script.byte());
    let Ok(ram) = Ram::new(PAGES) else { return };
    let ram = Arc::new(ram);
    let memory = PhysicalMemory::flat(Arc::clone(&ram));
    let mmio = Mmio::new(model, Arc::new(memory), Arc::new(Silent));
    let driver = Driver { mmio, ram };
    while !script.is_over() {
        match script.byte() % 10 {
            0 => driver.start([script.word(), script.word()]),
            1 => driver.set(usize::from(script.byte()), script.index()),
            2 => {
                let (offset, len) = (script.word() % 0x1100, script.byte() % 9);
                let value = script.word().to_le_bytes();
                let bytes = [value, value].concat();
                driver.mmio.write(offset.into(), bytes.get(..len.into()).unwrap_or(&bytes));
                driver.mmio.read(offset.into(), &mut vec![0; len.into()]);
            }
            // A descriptor: address, length, flags and next.
            3 | 4 => {
                let (queue, index) =
                    (u32::from(script.byte() % 3), u32::from(script.byte()) % SIZE);
                let at = (queue * QUEUE_BYTES + index * 16) / 4;
                let address = match script.byte() % 4 {
                    0 => script.word(),
                    // Where a table may be.
                    1 => queue * QUEUE_BYTES,
                    _ => 0x1000 + script.word() % 0x6000,
                };
                driver.store(at, address);
                driver.store(at + 1, u32::from(script.byte() == 255));
                driver.store(at + 2, script.index());
                let (flags, next) = (u32::from(script.byte() & 7), u32::from(script.byte() & 15));
                driver.store(at + 3, flags | next << 16);
            }
            5 | 6 => driver.offer(u32::from(script.byte() % 3), u32::from(script.byte() & 15)),
            7 => driver.store(script.word(), script.index()),
            8 => {
                if let Some(feed) = &mut feed {
                    let bytes = vec![script.byte(); usize::from(script.byte()) * 8];
                    feed(Frame {
                        bytes,
                        checksum_blank: script.byte() & 1 != 0,
                        ..Frame::default()
                    });
                }
            }
            _ => {
                driver.set(STATUS, 0);
                driver.set(QUEUE_SEL, 0);
                assert_eq!(
                    (driver.get(STATUS), driver.get(QUEUE_READY)),
                    (0, 0),
                    "a reset is done at once"
                );
            }
        }
    }
    // Whatever was done: after a reset it works, with rings that are empty again.
    driver.set(STATUS, 0);
    (0..3 * QUEUE_BYTES / 4).for_each(|index| driver.store(index, 0));
    driver.start([0; 2]);
    assert_eq!(driver.get(STATUS), 15);
}

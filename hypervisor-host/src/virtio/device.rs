//! A device behind any transport: its status, its features, its queues (virtio 1.2, 2 and 3).
//!
//! The driver is not trusted: what it writes out of turn is not done, what is wrong in a queue makes the device ask
//! for a reset, and a reset ends everything that the driver gave.

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, TryLockError, Weak};

use janus_proto::abi::virtio::{DeviceId, Status, feature};
use janus_proto::addr::Gpa;
use janus_proto::virtqueue::{QueueError, Rings};

use super::Model;
use super::memory::GuestMemory;
use super::queue::Queue;

/// What the queues of every device can do.
const RING_FEATURES: u64 =
    feature::VERSION_1 | feature::RING_EVENT_IDX | feature::RING_INDIRECT_DESC;

/// How a device tells its driver something. Called from any thread; does not wait.
pub trait Signal: Send + Sync + fmt::Debug {
    /// Something came back through a queue.
    fn queue(&self, queue: u16);
    /// The configuration or the status changed.
    fn config(&self);
}

/// What the driver has set up of a queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Setup {
    /// Entries.
    pub size: u16,
    /// Where its parts are.
    pub rings: Rings,
}

#[derive(Debug)]
struct Slot {
    most: u16,
    live: Mutex<Option<Queue>>,
    ready: AtomicBool,
    /// Somebody wants service while another gives it.
    again: AtomicBool,
    /// The thread that serves it, if it has one.
    thread: OnceLock<SyncSender<()>>,
}

impl Slot {
    fn lock(&self) -> MutexGuard<'_, Option<Queue>> {
        self.live.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What a device did, for statistics.
#[derive(Debug, Default)]
pub struct Counters {
    /// Notifications from the driver.
    pub notified: AtomicU64,
    /// Times that the driver was told of a queue.
    pub interrupts: AtomicU64,
    /// Resets by the driver.
    pub resets: AtomicU64,
}

/// Has a device's queues served, from any thread, as long as it is there.
#[derive(Clone, Debug, Default)]
pub struct Waker(Weak<Device>);

impl Waker {
    /// Serves a queue, here and now, or leaves it to whoever does already.
    pub fn wake(&self, queue: u16) {
        if let Some(device) = self.0.upgrade() {
            device.serve(queue);
        }
    }
    /// Tells the driver that the configuration is another one now.
    pub fn config_changed(&self) {
        if let Some(device) = self.0.upgrade() {
            device.config_changed();
        }
    }
}

/// A device.
pub struct Device {
    model: Box<dyn Model>,
    memory: Arc<dyn GuestMemory>,
    signal: Arc<dyn Signal>,
    slots: Vec<Slot>,
    status: AtomicU8,
    generation: AtomicU32,
    /// The features the driver takes; also held while the status changes.
    taken: Mutex<u64>,
    counters: Counters,
}

impl fmt::Debug for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Device")
            .field("id", &self.id())
            .field("status", &self.status())
            .finish_non_exhaustive()
    }
}

impl Device {
    /// A device that nobody has found yet.
    #[must_use]
    pub fn new(
        model: Box<dyn Model>,
        memory: Arc<dyn GuestMemory>,
        signal: Arc<dyn Signal>,
    ) -> Arc<Self> {
        let slot = |most: &u16| Slot {
            most: *most,
            live: Mutex::new(None),
            ready: AtomicBool::new(false),
            again: AtomicBool::new(false),
            thread: OnceLock::new(),
        };
        let slots = model.queues().iter().map(slot).collect();
        let device = Arc::new(Self {
            model,
            memory,
            signal,
            slots,
            status: AtomicU8::new(0),
            generation: AtomicU32::new(0),
            taken: Mutex::new(0),
            counters: Counters::default(),
        });
        device.model.attach(Waker(Arc::downgrade(&device)));
        if device.model.is_slow() {
            (0u16..).zip(&device.slots).for_each(|(index, slot)| device.start_thread(index, slot));
        }
        device
    }

    /// Gives a queue a thread. Without one, which a host may not have, it is served where it is notified.
    fn start_thread(self: &Arc<Self>, index: u16, slot: &Slot) {
        let (sender, receiver) = sync_channel(1);
        let waker = Waker(Arc::downgrade(self));
        let serve = move || {
            while receiver.recv().is_ok() {
                waker.wake(index);
            }
        };
        if std::thread::Builder::new().name("virtio".into()).spawn(serve).is_ok() {
            // Set once.
            let _ = slot.thread.set(sender);
        }
    }

    /// What kind it is.
    #[must_use]
    pub fn id(&self) -> DeviceId {
        self.model.id()
    }

    /// What it did.
    #[must_use]
    pub fn counters(&self) -> &Counters {
        &self.counters
    }

    /// The features it offers.
    #[must_use]
    pub fn features(&self) -> u64 {
        let platform =
            if self.memory.needs_platform_addresses() { feature::ACCESS_PLATFORM } else { 0 };
        self.model.features() | RING_FEATURES | platform
    }

    /// The status register.
    #[must_use]
    pub fn status(&self) -> Status {
        Status::from_bits_retain(self.status.load(Ordering::SeqCst))
    }

    fn taken(&self) -> MutexGuard<'_, u64> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The driver writes the features that it takes. Too late once they are agreed on.
    pub fn take_features(&self, change: impl FnOnce(&mut u64)) {
        let mut taken = self.taken();
        if !self.status().intersects(Status::FEATURES_OK) {
            change(&mut taken);
        }
    }

    /// The driver writes the status register: 0 resets, and is done when this returns.
    pub fn set_status(self: &Arc<Self>, new: Status) {
        let mut taken = self.taken();
        if new.is_empty() {
            self.reset(&mut taken);
            return;
        }
        let old = self.status();
        // The driver sets bits, in their order, and takes none back but by a reset (virtio 1.2, 2.1.1, 3.1.1).
        let new = (new - Status::DEVICE_NEEDS_RESET) | old;
        let mut next = old;
        if new.contains(Status::FAILED) {
            next |= Status::FAILED;
        }
        if new.contains(Status::ACKNOWLEDGE) {
            next |= Status::ACKNOWLEDGE;
        }
        if next.contains(Status::ACKNOWLEDGE) && new.contains(Status::DRIVER) {
            next |= Status::DRIVER;
        }
        let wants = new.contains(Status::FEATURES_OK) && !old.contains(Status::FEATURES_OK);
        if next.contains(Status::DRIVER) && wants && self.accepts(*taken) {
            next |= Status::FEATURES_OK;
        }
        let starts = new.contains(Status::DRIVER_OK) && !old.contains(Status::DRIVER_OK);
        let starts = starts && next.contains(Status::FEATURES_OK);
        if starts {
            self.model.start(*taken);
            next |= Status::DRIVER_OK;
        }
        // A queue may be found broken meanwhile: that bit stays.
        self.status.fetch_or(next.bits(), Ordering::SeqCst);
        drop(taken);
        if starts {
            // What the driver made available before is not told of again.
            (0u16..).zip(&self.slots).for_each(|(index, _)| self.look(index));
        }
    }

    /// Whether a driver can do with these features.
    fn accepts(&self, taken: u64) -> bool {
        let offered = self.features();
        let must = feature::VERSION_1 | offered & feature::ACCESS_PLATFORM;
        taken & !offered == 0 && taken & must == must
    }

    fn reset(&self, taken: &mut u64) {
        // First nobody begins to serve, then whoever serves is waited for.
        self.status.store(0, Ordering::SeqCst);
        for slot in &self.slots {
            slot.ready.store(false, Ordering::SeqCst);
            *slot.lock() = None;
        }
        self.model.stop();
        *taken = 0;
        self.counters.resets.fetch_add(1, Ordering::Relaxed);
    }

    /// The most entries of a queue; 0: there is no such queue.
    #[must_use]
    pub fn queue_most(&self, queue: u16) -> u16 {
        self.slots.get(usize::from(queue)).map_or(0, |slot| slot.most)
    }

    /// Whether a queue is in use.
    #[must_use]
    pub fn queue_ready(&self, queue: u16) -> bool {
        self.slots.get(usize::from(queue)).is_some_and(|slot| slot.ready.load(Ordering::SeqCst))
    }

    /// The driver gives a queue to the device. It is not taken if anything is wrong, and [`Self::queue_ready`] says so.
    pub fn enable_queue(&self, queue: u16, setup: Setup) {
        let taken = self.taken();
        let Some(slot) = self.slots.get(usize::from(queue)) else { return };
        let agreed = self.status().contains(Status::FEATURES_OK);
        if !agreed || setup.size > slot.most || slot.ready.load(Ordering::SeqCst) {
            return;
        }
        let memory = Arc::clone(&self.memory);
        let Ok(live) = Queue::new(memory, setup.size, setup.rings, *taken) else { return };
        *slot.lock() = Some(live);
        slot.ready.store(true, Ordering::SeqCst);
    }

    /// The driver takes a queue back; nobody uses it when this returns.
    pub fn disable_queue(&self, queue: u16) {
        let _taken = self.taken();
        if let Some(slot) = self.slots.get(usize::from(queue)) {
            slot.ready.store(false, Ordering::SeqCst);
            *slot.lock() = None;
        }
    }

    /// The driver asks the device to look at a queue. From any thread.
    pub fn notify(&self, queue: u16) {
        self.counters.notified.fetch_add(1, Ordering::Relaxed);
        self.look(queue);
    }

    /// The driver asks the device to look at all its queues.
    pub fn notify_all(&self) {
        self.counters.notified.fetch_add(1, Ordering::Relaxed);
        (0u16..).zip(&self.slots).for_each(|(index, _)| self.look(index));
    }

    /// Serves a queue here, or has its thread do it.
    fn look(&self, index: u16) {
        match self.slots.get(usize::from(index)).and_then(|slot| slot.thread.get()) {
            // Full: it will look anyway.
            Some(thread) => drop(thread.try_send(())),
            None => self.serve(index),
        }
    }

    fn is_running(&self) -> bool {
        let status = self.status();
        status.contains(Status::DRIVER_OK) && !status.contains(Status::DEVICE_NEEDS_RESET)
    }

    /// Serves a queue. Whoever comes while another does leaves it to that one, and does not wait.
    fn serve(&self, index: u16) {
        let Some(slot) = self.slots.get(usize::from(index)) else { return };
        slot.again.store(true, Ordering::SeqCst);
        while slot.again.load(Ordering::SeqCst) {
            let mut live = match slot.live.try_lock() {
                Ok(live) => live,
                Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
                Err(TryLockError::WouldBlock) => return,
            };
            slot.again.store(false, Ordering::SeqCst);
            // Under the lock: a reset has not gone past it.
            if !self.is_running() {
                return;
            }
            let Some(queue) = live.as_mut() else { return };
            let served = self.model.serve(index, queue).and_then(|()| queue.publish());
            let interrupt = queue.take_interrupt();
            drop(live);
            if interrupt {
                self.counters.interrupts.fetch_add(1, Ordering::Relaxed);
                self.signal.queue(index);
            }
            if served.is_err() {
                self.broken();
            }
        }
    }

    /// The driver broke a queue (virtio 1.2, 2.1.2): it is told, and nothing is served until it resets.
    fn broken(&self) {
        let needs = Status::DEVICE_NEEDS_RESET.bits();
        let running = Status::DRIVER_OK.bits();
        // Not if the driver has reset it meanwhile.
        let asked = self.status.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |status| {
            (status & running != 0 && status & needs == 0).then_some(status | needs)
        });
        if asked.is_ok() {
            self.signal.config();
        }
    }

    /// Changes with the configuration.
    #[must_use]
    pub fn generation(&self) -> u32 {
        self.generation.load(Ordering::SeqCst)
    }

    /// The configuration is another one now.
    pub fn config_changed(&self) {
        self.generation.fetch_add(1, Ordering::SeqCst);
        if self.status().contains(Status::DRIVER_OK) {
            self.signal.config();
        }
    }

    /// Reads the configuration; what is behind its end reads as 0.
    pub fn read_config(&self, offset: usize, buf: &mut [u8]) {
        let config = self.model.config();
        let there = config.get(offset..).unwrap_or_default();
        for (index, byte) in buf.iter_mut().enumerate() {
            *byte = there.get(index).copied().unwrap_or(0);
        }
    }

    /// Writes to the configuration.
    pub fn write_config(&self, offset: usize, bytes: &[u8]) {
        self.model.write_config(offset, bytes);
    }
}

/// The rings of a queue by their registers.
#[must_use]
pub fn rings([descriptors, available, used]: [u64; 3]) -> Rings {
    Rings { descriptors: Gpa(descriptors), available: Gpa(available), used: Gpa(used) }
}

/// Why a model gives a queue up that the driver did not break: a buffer of its is not memory.
#[must_use]
pub const fn bad_buffer() -> QueueError {
    QueueError::Address
}

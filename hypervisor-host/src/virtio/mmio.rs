//! virtio over MMIO, version 2 (virtio 1.2, 4.2): the register file of one device.

use std::fmt;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use janus_proto::abi::virtio::mmio::{
    CONFIG, CONFIG_GENERATION, DEVICE_FEATURES, DEVICE_FEATURES_SEL, DEVICE_ID, DRIVER_FEATURES,
    DRIVER_FEATURES_SEL, INTERRUPT_ACK, INTERRUPT_STATUS, MAGIC, MAGIC_VALUE, QUEUE_DESC,
    QUEUE_DEVICE, QUEUE_DRIVER, QUEUE_NOTIFY, QUEUE_NUM, QUEUE_NUM_MAX, QUEUE_READY, QUEUE_SEL,
    SHM_BASE, SHM_LEN, STATUS, VENDOR_ID, VERSION,
};
use janus_proto::abi::virtio::{InterruptStatus, Status};

use super::Model;
use super::device::{Device, Setup, Signal, rings};
use super::memory::GuestMemory;

/// Bytes of a device's registers: a page, so that an engine can leave it unmapped.
pub const WINDOW: u64 = 4096;
/// "Janu", as `VendorID`.
const VENDOR: u32 = u32::from_le_bytes(*b"Janu");
/// The version of the register file.
const MODERN: u32 = 2;

/// How a device's driver is interrupted. Called from any thread; does not wait.
pub trait Line: Send + Sync + fmt::Debug {
    /// There is this new reason to interrupt; `InterruptStatus` shows it already. An edge-triggered line (an
    /// eventfd of KVM's) sends an interrupt, a level-triggered one goes up.
    fn raise(&self, reason: InterruptStatus);
    /// The driver has taken back all reasons: a level-triggered line goes down.
    fn lower(&self) {}
}

/// The interrupt status, and the line that it drives.
#[derive(Debug)]
struct Interrupt {
    status: AtomicU32,
    line: Arc<dyn Line>,
}

impl Interrupt {
    fn raise(&self, reason: InterruptStatus) {
        self.status.fetch_or(reason.bits(), Ordering::SeqCst);
        self.line.raise(reason);
    }
}

impl Signal for Interrupt {
    fn queue(&self, _queue: u16) {
        self.raise(InterruptStatus::QUEUE);
    }
    fn config(&self) {
        self.raise(InterruptStatus::CONFIG);
    }
}

/// What the registers hold that is not the device's.
#[derive(Debug, Default)]
struct Selected {
    device_features: u32,
    driver_features: u32,
    queue: u16,
    queues: Vec<Registers>,
}

/// The registers of a queue that is not in use yet.
#[derive(Clone, Copy, Debug)]
struct Registers {
    size: u32,
    addresses: [u64; 3],
}

/// The registers of a device.
pub struct Mmio {
    device: Arc<Device>,
    interrupt: Arc<Interrupt>,
    selected: Mutex<Selected>,
}

impl fmt::Debug for Mmio {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Mmio").field(&self.device).finish()
    }
}

impl Mmio {
    /// Puts a device behind registers.
    #[must_use]
    pub fn new(
        model: Box<dyn Model>,
        memory: Arc<dyn GuestMemory>,
        line: Arc<dyn Line>,
    ) -> Arc<Self> {
        let interrupt = Arc::new(Interrupt { status: AtomicU32::new(0), line });
        let device = Device::new(model, memory, interrupt.clone());
        let this = Self { device, interrupt, selected: Mutex::default() };
        this.forget();
        Arc::new(this)
    }

    /// The device behind them.
    #[must_use]
    pub fn device(&self) -> &Arc<Device> {
        &self.device
    }

    /// The driver reads `buf.len()` bytes at `offset` of the window. Registers are read as words, whole; the
    /// configuration as the driver likes (virtio 1.2, 4.2.2.2). Everything else reads as 0.
    pub fn read(&self, offset: u64, buf: &mut [u8]) {
        buf.fill(0);
        let Ok(offset) = usize::try_from(offset) else { return };
        if let Some(offset) = offset.checked_sub(CONFIG) {
            self.device.read_config(offset, buf);
            return;
        }
        if let Ok(word) = <&mut [u8; 4]>::try_from(buf) {
            *word = self.register(offset).to_le_bytes();
        }
    }

    fn register(&self, offset: usize) -> u32 {
        let selected = self.selected.lock().unwrap_or_else(PoisonError::into_inner);
        match offset {
            MAGIC_VALUE => MAGIC,
            VERSION => MODERN,
            DEVICE_ID => self.device.id().0,
            VENDOR_ID => VENDOR,
            DEVICE_FEATURES => half(self.device.features(), selected.device_features),
            QUEUE_NUM_MAX => self.device.queue_most(selected.queue).into(),
            QUEUE_READY => self.device.queue_ready(selected.queue).into(),
            INTERRUPT_STATUS => self.interrupt.status.load(Ordering::SeqCst),
            STATUS => self.device.status().bits().into(),
            CONFIG_GENERATION => self.device.generation(),
            // No shared memory: of length 2^64 - 1 (virtio 1.2, 4.2.2).
            _ if (SHM_LEN..SHM_BASE + 8).step_by(4).any(|half| half == offset) => u32::MAX,
            _ => 0,
        }
    }

    /// The driver writes to `offset` of the window: a word, but for the configuration. Everything else is not done.
    pub fn write(&self, offset: u64, bytes: &[u8]) {
        let Ok(offset) = usize::try_from(offset) else { return };
        if let Some(offset) = offset.checked_sub(CONFIG) {
            self.device.write_config(offset, bytes);
            return;
        }
        let Ok(word) = <[u8; 4]>::try_from(bytes) else { return };
        let value = u32::from_le_bytes(word);
        match offset {
            // Without the lock: they lead to the device's work.
            QUEUE_NOTIFY => {
                if let Ok(queue) = u16::try_from(value) {
                    self.device.notify(queue);
                }
            }
            STATUS => self.set_status(value),
            INTERRUPT_ACK => {
                let left = self.interrupt.status.fetch_and(!value, Ordering::SeqCst) & !value;
                if left == 0 {
                    self.interrupt.line.lower();
                }
            }
            _ => self.select(offset, value),
        }
    }

    fn set_status(&self, value: u32) {
        let bits = u8::try_from(value & 0xff).unwrap_or(0);
        self.device.set_status(Status::from_bits_retain(bits));
        if bits == 0 {
            self.forget();
            self.interrupt.status.store(0, Ordering::SeqCst);
            self.interrupt.line.lower();
        }
    }

    /// The registers as they are at first.
    fn forget(&self) {
        let queues = (0..).map(|queue| self.device.queue_most(queue)).take_while(|most| *most != 0);
        let queues = queues.map(|most| Registers { size: most.into(), addresses: [0; 3] });
        let first = Selected { queues: queues.collect(), ..Selected::default() };
        *self.selected.lock().unwrap_or_else(PoisonError::into_inner) = first;
    }

    fn select(&self, offset: usize, value: u32) {
        let mut selected = self.selected.lock().unwrap_or_else(PoisonError::into_inner);
        let selected = &mut *selected;
        match offset {
            DEVICE_FEATURES_SEL => selected.device_features = value,
            DRIVER_FEATURES_SEL => selected.driver_features = value,
            DRIVER_FEATURES => self.device.take_features(|taken| match selected.driver_features {
                0 => *taken = *taken & !u64::from(u32::MAX) | u64::from(value),
                1 => *taken = *taken & u64::from(u32::MAX) | u64::from(value) << 32,
                // There are none, so none may be taken.
                _ if value != 0 => *taken = u64::MAX,
                _ => {}
            }),
            // A number that no queue has: those of 16 bits are enough to say so.
            QUEUE_SEL => selected.queue = u16::try_from(value).unwrap_or(u16::MAX),
            _ => self.set_queue(selected, offset, value),
        }
    }

    fn set_queue(&self, selected: &mut Selected, offset: usize, value: u32) {
        let queue = selected.queue;
        let Some(registers) = selected.queues.get_mut(usize::from(queue)) else { return };
        if offset == QUEUE_READY && value == 0 {
            self.device.disable_queue(queue);
            return;
        }
        if self.device.queue_ready(queue) {
            return;
        }
        let [descriptors, available, used] = &mut registers.addresses;
        match offset {
            QUEUE_NUM => registers.size = value,
            QUEUE_READY => {
                if let Ok(size) = u16::try_from(registers.size) {
                    let rings = rings(registers.addresses);
                    self.device.enable_queue(queue, Setup { size, rings });
                }
            }
            QUEUE_DESC => set_half(descriptors, 0, value),
            _ if offset == QUEUE_DESC + 4 => set_half(descriptors, 1, value),
            QUEUE_DRIVER => set_half(available, 0, value),
            _ if offset == QUEUE_DRIVER + 4 => set_half(available, 1, value),
            QUEUE_DEVICE => set_half(used, 0, value),
            _ if offset == QUEUE_DEVICE + 4 => set_half(used, 1, value),
            _ => {}
        }
    }
}

impl crate::pv::io::Registers for Mmio {
    fn read(&self, offset: u64, buf: &mut [u8]) {
        Self::read(self, offset, buf);
    }
    fn write(&self, offset: u64, bytes: &[u8]) {
        Self::write(self, offset, bytes);
    }
}

/// One half of a value; there are no more than two.
fn half(value: u64, which: u32) -> u32 {
    let shifted = value.checked_shr(which.saturating_mul(32)).unwrap_or(0);
    u32::try_from(shifted & u64::from(u32::MAX)).unwrap_or(0)
}

fn set_half(value: &mut u64, which: u32, half: u32) {
    let shift = 32 * which;
    *value = *value & !(u64::from(u32::MAX) << shift) | u64::from(half) << shift;
}

#[cfg(test)]
mod tests;

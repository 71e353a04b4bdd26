//! virtio devices of a KVM guest: each a page of registers, an interrupt by irqfd, and notifications by ioeventfd.
//!
//! A notification costs the virtual CPU a visit to the host's kernel and no more: each device has a thread that serves
//! its queues.
// UNSAFETY: takes over a file descriptor.
#![expect(unsafe_code, reason = "an eventfd of one crate becomes a descriptor of another")]

use std::fmt;
use std::io;
use std::ops::Range;
use std::os::fd::{FromRawFd as _, IntoRawFd as _, OwnedFd};
use std::sync::Arc;

use janus_proto::abi::virtio::InterruptStatus;
use janus_proto::abi::virtio::mmio::QUEUE_NOTIFY;
use janus_proto::addr::{Gpa, Mfn, PAGE_SIZE};
use kvm_ioctls::{IoEventAddress, VmFd};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::acpi::Window;
use super::layout;
use super::machine::Registers;
use crate::host::events::{EventLoop, READ, Waiting};
use crate::machine::ram::Ram;
use crate::virtio::Model;
use crate::virtio::memory::{PhysicalMemory, Region};
use crate::virtio::mmio::{Line, Mmio, WINDOW};

/// What plugging in a device can fail at.
pub(crate) type PlugError = (&'static str, io::Error);

/// An edge-triggered line.
struct Edge(EventFd);

impl fmt::Debug for Edge {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Edge")
    }
}

impl Line for Edge {
    fn raise(&self, _reason: InterruptStatus) {
        // It fails only where it has been raised 2^64 times.
        let _ = self.0.write(1);
    }
}

impl Registers for Mmio {
    fn read(&self, offset: u64, data: &mut [u8]) {
        Self::read(self, offset, data);
    }
    fn write(&self, offset: u64, data: &[u8]) {
        Self::write(self, offset, data);
    }
}

/// A device that is plugged in. Its fields are dropped in order: first nobody is waited for any more.
#[derive(Debug)]
struct Plugged {
    _notifications: Vec<Waiting>,
    _thread: EventLoop,
    mmio: Arc<Mmio>,
    window: Window,
}

/// The devices of a guest.
#[derive(Debug)]
pub(crate) struct Devices {
    memory: Arc<PhysicalMemory>,
    plugged: Vec<Plugged>,
}

impl Devices {
    /// None yet. `None`: the guest's memory is not where it should be.
    pub(crate) fn new(ram: &Arc<Ram>) -> Option<Self> {
        let page = PAGE_SIZE as u64;
        let region = |range: Range<u64>| Region {
            start: Gpa(range.start),
            frame: Mfn(range.start / page),
            frames: (range.end - range.start) / page,
        };
        let regions: Vec<_> = layout::regions(ram.frames() * page).map(region).collect();
        let memory = PhysicalMemory::new(Arc::clone(ram), &regions)?;
        Some(Self { memory: Arc::new(memory), plugged: Vec::new() })
    }

    /// Plugs in a device.
    ///
    /// # Errors
    /// There is no room for one more, or the host refuses.
    pub(crate) fn plug(&mut self, vm: &VmFd, model: Box<dyn Model>) -> Result<(), PlugError> {
        let index = self.plugged.len();
        let full = || ("a virtio device", io::Error::other("there is room for 18 of them"));
        let gsi = *layout::VIRTIO_GSIS.get(index).ok_or_else(full)?;
        let base = layout::VIRTIO + index as u64 * WINDOW;
        let window = Window {
            base: u32::try_from(base).map_err(|_| full())?,
            len: u32::try_from(WINDOW).map_err(|_| full())?,
            gsi,
        };
        let kvm = |what: &'static str| {
            move |error: kvm_ioctls::Error| (what, io::Error::from_raw_os_error(error.errno()))
        };
        let eventfd = || {
            let event = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC);
            event.map_err(|error| ("an eventfd", error))
        };
        let line = eventfd()?;
        vm.register_irqfd(&line, gsi).map_err(kvm("a device's interrupt"))?;
        let queues = model.queues().len();
        let mmio = Mmio::new(model, self.memory.clone(), Arc::new(Edge(line)));
        let thread = EventLoop::new().map_err(|error| ("a device's thread", error))?;
        let mut notifications = Vec::new();
        for queue in (0u16..).take(queues) {
            let event = eventfd()?;
            let place = IoEventAddress::Mmio(base + QUEUE_NOTIFY as u64);
            vm.register_ioevent(&event, &place, u32::from(queue))
                .map_err(kvm("a device's notifications"))?;
            // SAFETY: the descriptor is open, and given up by its former owner in the same expression.
            let fd = Arc::new(unsafe { OwnedFd::from_raw_fd(event.into_raw_fd()) });
            let (device, drained) = (Arc::clone(mmio.device()), Arc::clone(&fd));
            let serve = move |_| {
                // Empty already: then somebody has served since.
                let _ = rustix::io::read(&*drained, &mut [0; 8]);
                device.notify(queue);
            };
            let waiting = thread.add(fd, READ, Arc::new(serve));
            notifications.push(waiting.map_err(|error| ("a device's thread", error))?);
        }
        let plugged = Plugged { _notifications: notifications, _thread: thread, mmio, window };
        self.plugged.push(plugged);
        Ok(())
    }

    /// What the ACPI tables, or the command line, say of them.
    pub(crate) fn windows(&self) -> Vec<Window> {
        self.plugged.iter().map(|plugged| plugged.window).collect()
    }

    /// Their registers.
    pub(crate) fn registers(&self) -> Vec<(Range<u64>, Arc<dyn Registers>)> {
        let registers = |plugged: &Plugged| {
            let base = u64::from(plugged.window.base);
            (base..base + WINDOW, Arc::clone(&plugged.mmio) as Arc<dyn Registers>)
        };
        self.plugged.iter().map(registers).collect()
    }
}

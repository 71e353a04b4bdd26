//! virtio devices of this machine: found on PCI or as MMIO windows, set up, and registered as what they are.
//!
//! Each device gets its interrupts first (installed, still silent), then its driver, then its place in
//! [`crate::devices`]; its interrupt wakes the task that serves it ([`wake::Wake`]). A device that
//! cannot be used is one line in the log and nothing more.

pub mod mmio;
pub mod pci;
mod serve;
mod wake;

use alloc::boxed::Box;
use alloc::format;
use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt;

use janus_front::virtio::baseline::DeviceFrames;
use janus_front::virtio::mmio::MmioTransport;
use janus_front::virtio::pci::{Capabilities, PciTransport, Vectors};
use janus_front::virtio::{InitError, Interrupts, Transport};
use janus_proto::abi::virtio::DeviceId;
use janus_proto::abi::virtio::pci::{MODERN_DEVICES, TRANSITIONAL_DEVICES, VENDOR};
use janus_proto::addr::Port;

use crate::firmware::{self, WiredLine};
use crate::irq::evtchn::{self, EventChannel, EventError};
use crate::irq::ioapic::{self, Line};
use crate::irq::{IrqError, Registration, msi};
use crate::sync::IrqMutex;
use pci::{Function, Msix};
use wake::Wake;

/// Why a device found could not be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StartError {
    /// Its driver could not set it up.
    Init(InitError),
    /// Its interrupt could not be installed.
    Irq(IrqError),
    /// Its event channel could not be had.
    Event(EventError),
    /// It has no MSI-X, and the way of its interrupt line is not known.
    NoInterrupt,
}

impl From<InitError> for StartError {
    fn from(error: InitError) -> Self {
        Self::Init(error)
    }
}

impl From<IrqError> for StartError {
    fn from(error: IrqError) -> Self {
        Self::Irq(error)
    }
}

impl From<EventError> for StartError {
    fn from(error: EventError) -> Self {
        Self::Event(error)
    }
}

impl fmt::Display for StartError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Init(error) => error.fmt(f),
            Self::Irq(error) => error.fmt(f),
            Self::Event(error) => error.fmt(f),
            Self::NoInterrupt => f.write_str("no MSI-X, and no known interrupt line"),
        }
    }
}

/// A device in use.
#[derive(Debug)]
struct Device {
    name: String,
    place: String,
    wake: Arc<Wake>,
    interrupts: Interrupts,
    /// Handlers of a device live as long as it does: for good.
    _handlers: Vec<Handled>,
}

/// An interrupt that is handled as long as this lives.
#[derive(Debug)]
enum Handled {
    Message { _registration: Registration },
    Line { _line: Line },
    Event { _channel: EventChannel },
}

static DEVICES: IrqMutex<Vec<Device>> = IrqMutex::new(Vec::new());

/// A device in the list that [`list`] gives.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listed {
    /// Its name: `vda`, `eth0`, ...
    pub name: String,
    /// Where it was found.
    pub place: String,
    /// Interrupts so far.
    pub interrupts: u64,
    /// Notifications of the device so far.
    pub notifications: u64,
}

/// The virtio devices in use.
#[must_use]
pub fn list() -> Vec<Listed> {
    let listed = |device: &Device| Listed {
        name: device.name.clone(),
        place: device.place.clone(),
        interrupts: device.wake.count(),
        notifications: device.interrupts.notifications(),
    };
    DEVICES.lock().iter().map(listed).collect()
}

/// Finds and starts all virtio devices. The executor must be able to take tasks.
pub fn init(command_line: &[u8]) {
    for function in pci::functions() {
        if let Some(id) = device_id(function) {
            report(&format!("pci {function}"), id, start_pci(function, id));
        }
    }
    // Both may name the same window, which must have one driver only; the firmware knows its line better.
    let mut windows = firmware::virtio_mmio_devices();
    for window in mmio::from_command_line(command_line) {
        if windows.iter().all(|known| known.base != window.base) {
            windows.push(window);
        }
    }
    windows.into_iter().for_each(mmio::start);
}

fn report(place: &str, id: DeviceId, started: Result<Option<String>, StartError>) {
    match started {
        Ok(Some(name)) => log::info!("{name}: virtio at {place}"),
        Ok(None) => log::info!("virtio device {id:?} at {place} has no driver here"),
        Err(error) => log::warn!("virtio device {id:?} at {place} cannot be used: {error}"),
    }
}

/// The virtio device type of a PCI function, if it is one.
fn device_id(function: Function) -> Option<DeviceId> {
    let (vendor, device) = function.ids();
    if vendor != VENDOR {
        None
    } else if MODERN_DEVICES.contains(&device) {
        Some(DeviceId(u32::from(device - MODERN_DEVICES.start())))
    } else if TRANSITIONAL_DEVICES.contains(&device) {
        // Virtio 1.2, 4.1.2.3: the subsystem id says which.
        Some(DeviceId(u32::from(function.subsystem().1)))
    } else {
        None
    }
}

fn start_pci(function: Function, id: DeviceId) -> Result<Option<String>, StartError> {
    if !serve::known(id) {
        return Ok(None);
    }
    let capabilities = Capabilities::read(&function)?;
    let bars = function.memory_bars();
    let msix = Msix::enable(function, &bars);
    let vectors = match &msix {
        // One message for configuration changes and one for all queues: a device is served by one task.
        Some(msix) => Vectors::Messages { entries: msix.entries().min(2) },
        None => Vectors::Line,
    };
    let transport: Box<dyn Transport> =
        Box::new(PciTransport::new(id, capabilities, vectors, &mut |window| bars.map(window))?);
    let wake = Arc::new(Wake::new());
    let handlers = match msix {
        Some(msix) => connect_messages(&msix, vectors, transport.interrupts(), &wake)?,
        None => connect_line(function, transport.interrupts(), &wake)?,
    };
    start::<serve::Identity>(transport, format!("pci {function}"), wake, handlers)
}

/// Installs the handlers of a device with messages and fills its table.
fn connect_messages(
    msix: &Msix,
    vectors: Vectors,
    device: Interrupts,
    wake: &Arc<Wake>,
) -> Result<Vec<Handled>, StartError> {
    let mut installed = Vec::new();
    let mut install = |entry: u16, name, handler| -> Result<(), StartError> {
        let (registration, message) = msi::register_msi(name, handler)?;
        msix.set(entry, message);
        installed.push(Handled::Message { _registration: registration });
        Ok(())
    };
    let config_wake = Arc::clone(wake);
    install(
        0,
        "virtio-config",
        Box::new(move || {
            device.config_changed();
            config_wake.interrupt();
        }),
    )?;
    let queues = vectors.queue(0);
    if queues != 0 {
        let wake = Arc::clone(wake);
        install(queues, "virtio-queues", Box::new(move || wake.interrupt()))?;
    }
    Ok(installed)
}

/// Installs the handler of a device that has only its interrupt line, on bus 0.
fn connect_line(
    function: Function,
    device: Interrupts,
    wake: &Arc<Wake>,
) -> Result<Vec<Handled>, StartError> {
    if function.bus != 0 {
        return Err(StartError::NoInterrupt);
    }
    let wired = firmware::pci_line(function.device, function.interrupt_pin())
        .ok_or(StartError::NoInterrupt)?;
    function.enable(pci::Line::On);
    connect_wire(wired, "virtio-line", device, wake)
}

/// Looks at a device's interrupt status in one interrupt, at most.
const ACKNOWLEDGE_ROUNDS: usize = 16;

/// Installs the handler of a device on a line of an I/O APIC.
fn connect_wire(
    wired: WiredLine,
    name: &'static str,
    device: Interrupts,
    wake: &Arc<Wake>,
) -> Result<Vec<Handled>, StartError> {
    let wake = Arc::clone(wake);
    let handler = Box::new(move || {
        // Until nothing is left: an edge comes only after the line has gone down once.
        for _ in 0..ACKNOWLEDGE_ROUNDS {
            if device.acknowledge().is_empty() {
                break;
            }
            wake.interrupt();
        }
    });
    let line = ioapic::register_gsi(wired.gsi, wired.trigger, wired.polarity, name, handler)?;
    Ok(alloc::vec![Handled::Line { _line: line }])
}

/// Starts a device of a Xen guest, whose interrupts are events: of its queues, and of its configuration.
pub(crate) fn start_on_events<S: DeviceFrames>(
    transport: MmioTransport,
    place: String,
    ports: [Port; 2],
) {
    let id = transport.device_id();
    let started = if serve::known(id) {
        let wake = Arc::new(Wake::new());
        connect_events(ports, transport.interrupts(), &wake)
            .and_then(|handlers| start::<S>(Box::new(transport), place.clone(), wake, handlers))
    } else {
        Ok(None)
    };
    report(&place, id, started);
}

fn connect_events(
    [queues, config]: [Port; 2],
    device: Interrupts,
    wake: &Arc<Wake>,
) -> Result<Vec<Handled>, StartError> {
    let (queues_wake, config_wake) = (Arc::clone(wake), Arc::clone(wake));
    let of_queues = Box::new(move || queues_wake.interrupt());
    let of_config = Box::new(move || {
        device.config_changed();
        config_wake.interrupt();
    });
    let queues = evtchn::attach(queues, "virtio-queues", of_queues)?;
    let config = evtchn::attach(config, "virtio-config", of_config)?;
    Ok([queues, config].map(|channel| Handled::Event { _channel: channel }).into())
}

/// Starts the driver of a device whose interrupts are connected; `None`: there is no driver for it.
fn start<S: DeviceFrames>(
    transport: Box<dyn Transport>,
    place: String,
    wake: Arc<Wake>,
    handlers: Vec<Handled>,
) -> Result<Option<String>, StartError> {
    let interrupts = transport.interrupts();
    let Some(name) = serve::start::<S>(transport, &wake)? else { return Ok(None) };
    DEVICES.lock().push(Device {
        name: name.clone(),
        place,
        wake,
        interrupts,
        _handlers: handlers,
    });
    Ok(Some(name))
}

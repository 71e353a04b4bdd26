//! Joins xenstore, console, disks and cards to a guest.

use std::fmt;
use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use janus_proto::abi::xen::Errno;
use janus_proto::abi::xen::grant_table::{GNTTAB_RESERVED_CONSOLE, GNTTAB_RESERVED_XENSTORE};
use janus_proto::addr::DomId;
use janus_proto::byte_ring::ByteRingError;
use janus_proto::grant::Access;
use janus_proto::xenstore::{Request, StoreError, TransactionId};

use super::card::{CardDriver, Doorbell};
use super::console::{ConsoleCore, Endpoint, Endpoints, Output};
use super::disk::{DiskDriver, DiskOptions};
use super::events::EventLoop;
use super::guest::{Guest, Notify as _};
use super::home::{self, Writer};
use super::socket::Sockets;
use super::tap::Tap;
use crate::memory::{GrantMapper, MapError};
use crate::netback::{NetBackend, NetbackFeatures};
use crate::pv::domain::Domain;
use crate::storage::BlockBackend;
use crate::virtio::console::ConsoleGuest;
use crate::xenbus::{Device, Driver, Figures};
use crate::xenstored::ring::RingServer;
use crate::xenstored::{ConnectionId, Quota, Reply, Xenstored, home as home_of};

/// What the store says of a guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Its name.
    pub name: String,
    /// Its UUID.
    pub uuid: [u8; 16],
    /// Its memory in KiB.
    pub memory_kib: u64,
    /// What that may grow to.
    pub max_memory_kib: u64,
    /// Its virtual CPUs.
    pub vcpus: usize,
    /// The machine frames of its console and store rings.
    pub rings: (u64, u64),
}

/// A disk image of any kind.
pub type Image = Box<dyn BlockBackend + Send>;
/// A network of any kind.
pub type Network = Box<dyn NetBackend + Send>;

/// The daemons cannot do it.
#[derive(Debug)]
pub enum HostError {
    /// A page of the guest cannot be had.
    Map(MapError),
    /// An event channel cannot be had.
    Port(Errno),
    /// The guest's page makes no sense.
    Page(ByteRingError),
    /// Xenstore refused.
    Store(StoreError),
    /// There is a device of this kind and number already.
    Exists(&'static str, u32),
    /// There is no such device.
    NoDevice,
    /// There are as many of these as can be.
    Full(&'static str),
    /// The host refused something.
    Host(String, io::Error),
}

impl fmt::Display for HostError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Map(error) => error.fmt(f),
            Self::Port(error) => write!(f, "the guest's event channel cannot be had: {error:?}"),
            Self::Page(error) => error.fmt(f),
            Self::Store(error) => write!(f, "xenstore: {}", error.name()),
            Self::Exists(kind, number) => write!(f, "there is a {kind} {number} already"),
            Self::Full(kind) => write!(f, "there is no room for another {kind}"),
            Self::NoDevice => f.write_str("there is no such device"),
            Self::Host(what, error) => write!(f, "{what}: {error}"),
        }
    }
}

impl std::error::Error for HostError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Host(_, error) => Some(error),
            _ => None,
        }
    }
}

/// A card cannot be plugged in.
#[derive(Debug)]
pub enum PlugError<E> {
    /// Its network cannot be had.
    Network(E),
    /// The daemons refused.
    Host(HostError),
}

impl From<StoreError> for HostError {
    fn from(error: StoreError) -> Self {
        Self::Store(error)
    }
}

/// A device of any kind.
trait Plugged: Send {
    fn turn(&mut self, store: &mut Xenstored) -> Result<(), StoreError>;
    fn unplug(&mut self, store: &mut Xenstored) -> Result<(), StoreError>;
    fn force(&mut self, store: &mut Xenstored) -> Result<(), StoreError>;
    fn is_gone(&self) -> bool;
    fn is_connected(&self) -> bool;
    fn figures(&self) -> Figures;
    fn frontend(&self) -> &str;
}

impl<D: Driver + Send> Plugged for Device<D> {
    fn turn(&mut self, store: &mut Xenstored) -> Result<(), StoreError> {
        Self::turn(self, store)
    }
    fn unplug(&mut self, store: &mut Xenstored) -> Result<(), StoreError> {
        Self::unplug(self, store)
    }
    fn force(&mut self, store: &mut Xenstored) -> Result<(), StoreError> {
        Self::force(self, store)
    }
    fn is_gone(&self) -> bool {
        Self::is_gone(self)
    }
    fn is_connected(&self) -> bool {
        Self::is_connected(self)
    }
    fn figures(&self) -> Figures {
        self.driver.figures()
    }
    fn frontend(&self) -> &str {
        Self::frontend(self)
    }
}

/// A device and what is known of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceStatus {
    /// `vbd` or `vif`.
    pub kind: &'static str,
    /// Its number on the bus.
    pub number: u32,
    /// Whether the guest uses it.
    pub connected: bool,
    /// What went through.
    pub figures: Figures,
}

/// Is told when a guest connects or leaves a device: its kind and number, and whether it is connected. With the
/// store's lock held.
pub type OnDevice = Box<dyn Fn(&'static str, u32, bool) + Send>;

/// Names a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Name {
    kind: &'static str,
    number: u32,
}

/// A page of the guest's.
type Page<G> = <<G as Guest>::Grants as GrantMapper>::Mapping;

struct Core<G: Guest> {
    store: Xenstored,
    ring: RingServer<Page<G>>,
    toolstack: ConnectionId,
    devices: Vec<(Name, Box<dyn Plugged>)>,
    /// Events of the store that the devices have seen.
    seen: u64,
    on_device: Option<OnDevice>,
}

impl<G: Guest> Core<G> {
    /// Serves the guest's ring and the devices until nothing more happens; `true`: notify the guest.
    fn settle(&mut self) -> bool {
        let mut notify = false;
        loop {
            notify |= self.ring.serve(&mut self.store);
            let activity = self.store.activity();
            if activity == self.seen {
                return notify;
            }
            self.seen = activity;
            for (name, device) in &mut self.devices {
                let before = device.is_connected();
                // A device whose nodes cannot be written (they are gone) waits until somebody removes it.
                let _ = device.turn(&mut self.store);
                if let Some(hears) = &self.on_device
                    && device.is_connected() != before
                {
                    hears(name.kind, name.number, !before);
                }
            }
            let mut gone = Vec::new();
            self.devices.retain(|(_, device)| {
                if device.is_gone() {
                    gone.push(device.frontend().to_owned());
                }
                !device.is_gone()
            });
            for path in gone {
                let remove = Request::Remove(&path);
                // The guest may have removed it itself.
                let _ = self.store.request(self.toolstack, TransactionId::NONE, &remove);
            }
        }
    }

    fn writer(&mut self) -> Writer<'_> {
        Writer { store: &mut self.store, connection: self.toolstack }
    }
}

pub(super) struct Shared<G: Guest> {
    guest: G,
    core: Mutex<Core<G>>,
    port: OnceLock<G::Port>,
    events: Arc<EventLoop>,
}

impl<G: Guest> Shared<G> {
    fn lock(&self) -> MutexGuard<'_, Core<G>> {
        self.core.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Does something with the store, and then whatever follows from it.
    fn with<R>(&self, action: impl FnOnce(&mut Core<G>) -> R) -> R {
        let mut core = self.lock();
        let result = action(&mut core);
        while self.follow(core) {
            // Others have their turn.
            std::thread::yield_now();
            core = self.lock();
        }
        result
    }

    /// Does what follows from a change; `true`: the guest asks for more.
    fn follow(&self, mut core: MutexGuard<'_, Core<G>>) -> bool {
        let notify = core.settle();
        let (others, busy) = (core.store.others_wait(), core.ring.is_busy());
        drop(core);
        if notify && let Some(port) = self.port.get() {
            port.notify();
        }
        if others {
            self.events.wake();
        }
        busy
    }
}

impl<G: Guest> super::socket::SharedStore for Shared<G> {
    fn with_store(&self, action: &mut dyn FnMut(&mut Xenstored)) {
        self.with(|core| action(&mut core.store));
    }
}

/// The daemons around one guest. Dropping this stops them all.
pub struct Host<G: Guest = Arc<Domain>> {
    shared: Arc<Shared<G>>,
    events: Arc<EventLoop>,
    console: Arc<ConsoleCore<G>>,
    sockets: Mutex<Sockets>,
    tty: String,
    virtio: Mutex<Vec<super::virtio::Plugged>>,
    consoles: Mutex<Vec<Arc<ConsoleCore<ConsoleGuest>>>>,
}

impl<G: Guest> fmt::Debug for Host<G> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let core = self.shared.lock();
        let names: Vec<_> = core.devices.iter().map(|(name, _)| name).collect();
        f.debug_struct("Host").field("devices", &names).finish_non_exhaustive()
    }
}

impl<G: Guest> Host<G> {
    /// Makes the guest's home, and serves its xenstore and console pages. To be called before the guest has any
    /// event channel: xenstore's becomes port 1 and the console's port 2. What the guest prints goes to `output`.
    ///
    /// # Errors
    /// The pages or ports cannot be had.
    pub fn new(guest: &G, identity: &Identity, output: Output) -> Result<Self, HostError> {
        Self::with_console(guest, identity, vec![Endpoint::Writer(output)])
    }

    /// As [`Self::new`], with any number of places that the console goes to.
    ///
    /// # Errors
    /// Also: the host refuses what the console needs.
    pub fn with_console(
        guest: &G,
        identity: &Identity,
        console: Vec<Endpoint>,
    ) -> Result<Self, HostError> {
        let host = |what: &str| {
            let what = what.to_owned();
            move |error| HostError::Host(what, error)
        };
        let events = Arc::new(EventLoop::new().map_err(host("event loop"))?);
        let map = |grant| guest.grants().map(&[grant], Access::ReadWrite).map_err(HostError::Map);
        let mut store = Xenstored::new(Quota::default());
        let toolstack = store.connect(DomId(0));
        let connection = store.connect(guest.id());
        let page = map(GNTTAB_RESERVED_XENSTORE)?;
        let ring = RingServer::new(page, connection).map_err(HostError::Page)?;
        let core = Core { store, ring, toolstack, devices: Vec::new(), seen: 0, on_device: None };
        let shared = Arc::new(Shared {
            guest: guest.clone(),
            core: Mutex::new(core),
            port: OnceLock::new(),
            events: Arc::clone(&events),
        });
        let weak = Arc::downgrade(&shared);
        let handler = move || {
            if let Some(shared) = weak.upgrade() {
                shared.with(|_| ());
            }
        };
        let port = guest.bind(Arc::new(handler)).map_err(HostError::Port)?;
        let store_port = port.guest_port();
        // `with` looks for it, and nobody else sets it.
        let _ = shared.port.set(port);
        let console = Endpoints::open(console).map_err(host("console"))?;
        let tty = console.tty().unwrap_or_default().to_owned();
        let console = ConsoleCore::start(guest, console, map(GNTTAB_RESERVED_CONSOLE)?, &events)?;
        let console_port = console.guest_port();
        let sockets = Mutex::default();
        let (virtio, consoles) = (Mutex::default(), Mutex::default());
        let this = Self { shared, events, console, sockets, tty: tty.clone(), virtio, consoles };
        let id = guest.id();
        this.shared.with(|core| {
            core.store.announce("@introduceDomain");
            home::make(&mut core.writer(), id, identity, (store_port, console_port), &tty)
        })?;
        Ok(this)
    }

    pub(super) fn guest(&self) -> &G {
        &self.shared.guest
    }

    /// A virtio console's daemon lives as long as this.
    pub(super) fn keep_console(&self, daemon: Arc<ConsoleCore<ConsoleGuest>>) {
        self.consoles.lock().unwrap_or_else(PoisonError::into_inner).push(daemon);
    }

    /// Takes what the guest printed last on all its consoles.
    pub fn close_consoles(&self) {
        self.console.close();
        let consoles = self.consoles.lock().unwrap_or_else(PoisonError::into_inner);
        consoles.iter().for_each(|console| console.close());
    }

    pub(super) fn virtio_devices(&self) -> MutexGuard<'_, Vec<super::virtio::Plugged>> {
        self.virtio.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn with_writer<R>(&self, action: impl FnOnce(&mut Writer<'_>) -> R) -> R {
        self.shared.with(|core| action(&mut core.writer()))
    }

    /// The event loop, for whoever else waits for something.
    #[must_use]
    pub fn events(&self) -> &Arc<EventLoop> {
        &self.events
    }

    /// The name of the console's pseudo terminal, if it has one.
    #[must_use]
    pub fn tty(&self) -> Option<&str> {
        Some(self.tty.as_str()).filter(|tty| !tty.is_empty())
    }

    /// The console.
    #[must_use]
    pub fn console(&self) -> &Arc<ConsoleCore<G>> {
        &self.console
    }

    /// Plugs in a disk, as Linux numbers it: 51712 is `xvda`, 51728 `xvdb`.
    ///
    /// # Errors
    /// There is such a disk already.
    pub fn plug_disk(&self, number: u32, image: Image) -> Result<(), HostError> {
        self.plug_disk_with(number, image, DiskOptions::default())
    }

    /// As [`Self::plug_disk`], with options.
    ///
    /// # Errors
    /// There is such a disk already.
    pub fn plug_disk_with(
        &self,
        number: u32,
        image: Image,
        options: DiskOptions,
    ) -> Result<(), HostError> {
        let mode = if image.is_read_only() { "r" } else { "w" };
        let driver = DiskDriver::new(self.shared.guest.clone(), image, options);
        let virtual_device = number.to_string();
        let front = [("virtual-device", virtual_device.as_str()), ("device-type", "disk")];
        self.plug(number, driver, &front, &[("mode", mode), ("type", "file"), ("removable", "0")])
    }

    /// Plugs in a network card. `connect` makes its network; it is given what must be rung, on any thread and without
    /// the network's own lock, when there may be frames for the guest.
    ///
    /// # Errors
    /// There is such a card already, or the error of `connect`.
    pub fn plug_card<E>(
        &self,
        number: u32,
        mac: [u8; 6],
        connect: impl FnOnce(Doorbell) -> Result<Network, E>,
    ) -> Result<(), PlugError<E>> {
        let mac = mac.map(|byte| format!("{byte:02x}")).join(":");
        let features = NetbackFeatures::default();
        let driver = CardDriver::new(self.shared.guest.clone(), features, connect)
            .map_err(PlugError::Network)?;
        let handle = number.to_string();
        let front = [("handle", handle.as_str()), ("mac", &mac), ("mtu", "1500")];
        self.plug(number, driver, &front, &[("mac", &mac), ("handle", &handle)])
            .map_err(PlugError::Host)
    }

    /// Plugs in a network card on the host's TAP interface `name`.
    ///
    /// # Errors
    /// There is such a card already, or the interface cannot be had.
    pub fn plug_tap(&self, number: u32, mac: [u8; 6], name: &str) -> Result<(), HostError> {
        let made = self.plug_card(number, mac, |bell| {
            Tap::open(name, &self.events, bell).map(|tap| Box::new(tap) as Network)
        });
        made.map_err(|error| match error {
            PlugError::Network(error) => HostError::Host("network".into(), error),
            PlugError::Host(error) => error,
        })
    }

    fn plug<D: Driver + Send + 'static>(
        &self,
        number: u32,
        driver: D,
        front: &[(&str, &str)],
        back: &[(&str, &str)],
    ) -> Result<(), HostError> {
        let id = self.shared.guest.id();
        self.shared.with(|core| {
            let name = Name { kind: D::KIND, number };
            if core.devices.iter().any(|(other, _)| *other == name) {
                return Err(HostError::Exists(D::KIND, number));
            }
            let device = Device::plug(&mut core.store, id, number, driver, front, back)?;
            core.devices.push((name, Box::new(device)));
            Ok(())
        })
    }

    /// Asks the guest to let go of a disk (`vbd`) or card (`vif`); it is gone when the guest has.
    ///
    /// # Errors
    /// There is none.
    pub fn unplug(&self, kind: &str, number: u32) -> Result<(), HostError> {
        self.with_device(kind, number, |device, store| device.unplug(store))
    }

    /// Takes a disk or card away without asking.
    ///
    /// # Errors
    /// There is none.
    pub fn force_unplug(&self, kind: &str, number: u32) -> Result<(), HostError> {
        self.with_device(kind, number, |device, store| device.force(store))
    }

    fn with_device(
        &self,
        kind: &str,
        number: u32,
        action: impl FnOnce(&mut dyn Plugged, &mut Xenstored) -> Result<(), StoreError>,
    ) -> Result<(), HostError> {
        self.shared.with(|core| {
            let found = |(name, _): &&mut (Name, _)| name.kind == kind && name.number == number;
            let Core { devices, store, .. } = core;
            let (_, device) = devices.iter_mut().find(found).ok_or(HostError::NoDevice)?;
            action(device.as_mut(), store).map_err(HostError::from)
        })
    }

    /// Whether there is such a device, however far it is connected.
    #[must_use]
    pub fn has(&self, kind: &str, number: u32) -> bool {
        let core = self.shared.lock();
        core.devices.iter().any(|(name, _)| name.kind == kind && name.number == number)
    }

    /// Its devices, and what went through them.
    #[must_use]
    pub fn devices(&self) -> Vec<DeviceStatus> {
        let core = self.shared.lock();
        let status = |(name, device): &(Name, Box<dyn Plugged>)| DeviceStatus {
            kind: name.kind,
            number: name.number,
            connected: device.is_connected(),
            figures: device.figures(),
        };
        core.devices.iter().map(status).collect()
    }

    /// Tells `hears` of devices from now on, those first that are connected already.
    pub fn on_device(&self, hears: OnDevice) {
        let mut core = self.shared.lock();
        for (name, _) in core.devices.iter().filter(|(_, device)| device.is_connected()) {
            hears(name.kind, name.number, true);
        }
        core.on_device = Some(hears);
    }

    /// Asks the guest to shut down, by `control/shutdown`: `poweroff`, `reboot`, `suspend`.
    ///
    /// # Errors
    /// Xenstore refused.
    pub fn request_shutdown(&self, what: &str) -> Result<(), HostError> {
        let path = format!("{}/control/shutdown", home_of(self.shared.guest.id()));
        self.write(&path, what)
    }

    /// Reads a node, as domain 0.
    #[must_use]
    pub fn read(&self, path: &str) -> Option<Vec<u8>> {
        self.shared.with(|core| {
            let Core { store, toolstack, .. } = core;
            match store.request(*toolstack, TransactionId::NONE, &Request::Read(path)) {
                Ok(Reply::Payload(value)) => Some(value),
                _ => None,
            }
        })
    }

    /// Writes a node, as domain 0.
    ///
    /// # Errors
    /// Xenstore refused.
    pub fn write(&self, path: &str, value: &str) -> Result<(), HostError> {
        self.shared.with(|core| core.writer().write(path, value)).map_err(HostError::from)
    }

    /// Serves xenstore over a socket as well: `XENSTORED_PATH=... xenstore-ls` works then. The socket is removed when
    /// this is dropped.
    ///
    /// # Errors
    /// The socket cannot be made.
    pub fn listen_store(&self, path: &Path) -> Result<(), HostError> {
        let store: Arc<dyn super::socket::SharedStore> = self.shared.clone();
        self.sockets
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .listen(path, &self.events, &store)
            .map_err(|error| HostError::Host(format!("xenstore socket {}", path.display()), error))
    }
}

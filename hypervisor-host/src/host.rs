//! What surrounds a domain on its host: xenstored on the guest's ring, its devices, its console.
//!
//! [`Host`] owns them all. There is no thread for them: the guest's own CPU runs the daemon when it notifies the
//! store's port, and serves a disk or a card when it notifies theirs, so that a request costs no change of thread.
//! What comes from outside comes on threads of its own: typed input here, packets on the network's.

mod console;
mod device;
mod store;

use std::fmt;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use janus_proto::abi::xen::Errno;
use janus_proto::addr::GrantRef;
use janus_proto::grant::Access;
use janus_proto::xenstore::StoreError;

use crate::blkback::BlkbackFeatures;
use crate::memory::{GrantMapper as _, MapError};
use crate::netback::{NetBackend, NetbackFeatures};
use crate::pv::domain::{Domain, HostPort};
use crate::pv::grant::Grants;
use crate::storage::BlockBackend;
use crate::xenbus::{Card, Device, Disk};
use crate::xenstored::Xenstored;
use crate::xenstored::ring::RingServer;

pub use console::{Console, Output};
pub use device::Doorbell;
use device::{DiskDriver, Plugged, Served, VifDriver};
pub use store::Identity;

/// A disk image of any kind.
pub type Image = Box<dyn BlockBackend + Send>;
/// A network of any kind.
pub type Network = Box<dyn NetBackend + Send>;

/// The reference under which a domain's console ring is granted from the start.
const CONSOLE_GRANT: GrantRef = GrantRef(0);
/// That of its xenstore ring.
const STORE_GRANT: GrantRef = GrantRef(1);

/// Why a domain's surroundings cannot be made.
#[derive(Debug)]
pub enum HostError {
    /// The domain has no event channel left.
    Port(Errno),
    /// One of its rings cannot be mapped.
    Map(MapError),
    /// One of its rings is not one.
    Ring(janus_proto::byte_ring::ByteRingError),
    /// The daemon refused.
    Store(StoreError),
    /// The host refused.
    Host(io::Error),
}

impl fmt::Display for HostError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Port(error) => write!(f, "no event channel: {error}"),
            Self::Map(error) => write!(f, "{error}"),
            Self::Ring(error) => f.write_str(error.message()),
            Self::Store(error) => write!(f, "xenstored refused: {error:?}"),
            Self::Host(error) => write!(f, "the host refused: {error}"),
        }
    }
}

impl std::error::Error for HostError {}

impl From<StoreError> for HostError {
    fn from(error: StoreError) -> Self {
        Self::Store(error)
    }
}

type Mapping = <Grants as crate::memory::GrantMapper>::Mapping;

struct State {
    store: Xenstored,
    ring: RingServer<Mapping>,
    devices: Vec<Box<dyn Plugged>>,
}

struct Inner {
    domain: Arc<Domain>,
    state: Mutex<State>,
    port: Mutex<Option<HostPort>>,
}

impl Inner {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Serves the guest's ring and lets the devices follow, until nothing moves.
    fn serve(&self) {
        let mut state = self.state();
        let State { store, ring, devices } = &mut *state;
        let mut notify = false;
        loop {
            for device in devices.iter_mut() {
                if let Err(error) = device.turn(store) {
                    eprintln!("janus: {}: xenstored refused: {error:?}", device.name());
                }
            }
            devices.retain(|device| !device.is_gone());
            if !ring.serve(store) {
                break;
            }
            notify = true;
        }
        drop(state);
        let port = self.port.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(port) = port.as_ref().filter(|_| notify) {
            port.notify();
        }
    }
}

/// A domain's surroundings. Dropping it lets go of all that the guest shared.
pub struct Host {
    inner: Arc<Inner>,
    console: Console,
}

impl fmt::Debug for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Host").field("domain", &self.inner.domain).finish_non_exhaustive()
    }
}

/// The ports that the guest's start_info names.
#[derive(Debug)]
pub struct Ports {
    store: HostPort,
    console: HostPort,
    served: Arc<Served>,
}

impl Ports {
    /// Makes the ports, the first two of the domain; nothing answers them until [`Host::new`].
    ///
    /// # Errors
    /// The domain has none left.
    pub fn new(domain: &Arc<Domain>) -> Result<Self, HostError> {
        let served = Arc::new(Served::default());
        let (of_store, of_console) = (served.clone(), served.clone());
        let store = domain.bind(Arc::new(move || of_store.store())).map_err(HostError::Port)?;
        let console =
            domain.bind(Arc::new(move || of_console.console())).map_err(HostError::Port)?;
        Ok(Self { store, console, served })
    }

    /// The numbers, for start_info: xenstore's and the console's.
    #[must_use]
    pub fn numbers(&self) -> (u32, u32) {
        (self.store.guest_port().0, self.console.guest_port().0)
    }
}

impl Host {
    /// Serves the rings of `domain`, whose start_info names `ports`, and writes its home in the store. What the guest
    /// prints goes to `output`.
    ///
    /// # Errors
    /// See [`HostError`].
    pub fn new(
        domain: &Arc<Domain>,
        ports: Ports,
        identity: &Identity,
        output: Output,
    ) -> Result<Self, HostError> {
        let grants = domain.grants();
        let map = |grant| grants.map(&[grant], Access::ReadWrite).map_err(HostError::Map);
        let mut store = Xenstored::default();
        store::introduce(&mut store, domain.id(), identity, ports.numbers())?;
        let connection = store.connect(domain.id());
        let ring = RingServer::new(map(STORE_GRANT)?, connection).map_err(HostError::Ring)?;
        let Ports { store: store_port, console: console_port, served } = ports;
        let console = Console::new(map(CONSOLE_GRANT)?, console_port, output)?;
        let inner = Arc::new(Inner {
            domain: domain.clone(),
            state: Mutex::new(State { store, ring, devices: Vec::new() }),
            port: Mutex::new(Some(store_port)),
        });
        let of_store = Arc::downgrade(&inner);
        let store_handler = move || {
            if let Some(inner) = Weak::upgrade(&of_store) {
                inner.serve();
            }
        };
        served.set(Box::new(store_handler), console.handler());
        Ok(Self { inner, console })
    }

    /// The guest's console.
    #[must_use]
    pub fn console(&self) -> &Console {
        &self.console
    }

    /// Plugs a disk in as Linux numbers it: 51712 is `xvda`.
    ///
    /// # Errors
    /// The daemon refused.
    pub fn plug_disk(&self, number: u32, image: Image) -> Result<(), HostError> {
        let domain = &self.inner.domain;
        let disk = Disk::new(domain.grants(), image, BlkbackFeatures::default());
        let driver = DiskDriver::new(domain.clone(), disk);
        let extra = [("virtual-device", &*number.to_string()), ("device-type", "disk")];
        self.plug(number, driver, &extra)
    }

    /// Plugs a card in. `connect` makes its network; it is given what must be rung when frames for the guest came.
    ///
    /// # Errors
    /// The daemon refused, or `connect`.
    pub fn plug_card<E>(
        &self,
        handle: u32,
        mac: [u8; 6],
        connect: impl FnOnce(Doorbell) -> Result<Network, E>,
    ) -> Result<(), PlugError<E>> {
        let domain = &self.inner.domain;
        let bell = Doorbell::default();
        let network = connect(bell.clone()).map_err(PlugError::Network)?;
        let network = device::SharedNetwork::new(network);
        let card = Card::new(domain.grants(), network, NetbackFeatures::default());
        let driver = VifDriver::new(domain.clone(), card, &bell);
        let mac = mac.map(|byte| format!("{byte:02x}")).join(":");
        let extra = [("mac", &*mac), ("handle", &*handle.to_string())];
        self.plug(handle, driver, &extra).map_err(PlugError::Host)
    }

    fn plug<D: crate::xenbus::Driver + Send + 'static>(
        &self,
        number: u32,
        driver: D,
        extra: &[(&str, &str)],
    ) -> Result<(), HostError> {
        let mut state = self.inner.state();
        let guest = self.inner.domain.id();
        let device = Device::plug(&mut state.store, guest, number, driver, extra)?;
        state
            .devices
            .push(Box::new(device::Slot { device, name: format!("{} {number}", D::KIND) }));
        drop(state);
        self.inner.serve();
        Ok(())
    }

    /// Asks the guest to shut down: `poweroff`, `reboot`, `suspend`.
    ///
    /// # Errors
    /// The daemon refused.
    pub fn request_shutdown(&self, what: &str) -> Result<(), HostError> {
        store::request_shutdown(&mut self.inner.state().store, self.inner.domain.id(), what)?;
        self.inner.serve();
        Ok(())
    }

    /// Takes a device out: `vbd` and its number. `false`: there is none.
    ///
    /// # Errors
    /// The daemon refused.
    pub fn unplug(&self, name: &str) -> Result<bool, HostError> {
        let mut state = self.inner.state();
        let State { store, devices, .. } = &mut *state;
        let Some(device) = devices.iter_mut().find(|device| device.name() == name) else {
            return Ok(false);
        };
        device.unplug(store)?;
        drop(state);
        self.inner.serve();
        Ok(true)
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        self.inner.state().devices.clear();
        *self.inner.port.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}

/// A card cannot be plugged in.
#[derive(Debug)]
pub enum PlugError<E> {
    /// Its network cannot be had.
    Network(E),
    /// The domain's surroundings refused.
    Host(HostError),
}

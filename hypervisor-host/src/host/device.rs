//! Devices of a domain: the drivers of [`crate::xenbus`] with event channels, served by whoever notifies.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, TryLockError, Weak};

use janus_proto::addr::Port;
use janus_proto::xenbus::Handshake;
use janus_proto::xenstore::StoreError;

use super::{Image, Network};
use crate::netback::{Accepts, Frame, NetBackend};
use crate::pv::domain::{Domain, HostPort};
use crate::pv::grant::Grants;
use crate::xenbus::{Card, Device, Disk, Driver, NodeList};
use crate::xenstored::Xenstored;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

type Serve = Box<dyn Fn() + Send + Sync>;

/// Who answers the ports that are there before the domain's surroundings are.
#[derive(Default)]
pub(super) struct Served(OnceLock<(Serve, Serve)>);

impl std::fmt::Debug for Served {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Served")
    }
}

impl Served {
    pub(super) fn set(&self, store: Serve, console: Serve) {
        // Set once, by the one who has the ports.
        let _ = self.0.set((store, console));
    }
    pub(super) fn store(&self) {
        if let Some((store, _)) = self.0.get() {
            store();
        }
    }
    pub(super) fn console(&self) {
        if let Some((_, console)) = self.0.get() {
            console();
        }
    }
}

/// A device of any kind on the bus.
pub(super) trait Plugged: Send {
    fn name(&self) -> &str;
    fn turn(&mut self, store: &mut Xenstored) -> Result<(), StoreError>;
    fn unplug(&mut self, store: &mut Xenstored) -> Result<(), StoreError>;
    fn is_gone(&self) -> bool;
}

pub(super) struct Slot<D> {
    pub(super) device: Device<D>,
    pub(super) name: String,
}

impl<D: Driver + Send> Plugged for Slot<D> {
    fn name(&self) -> &str {
        &self.name
    }
    fn turn(&mut self, store: &mut Xenstored) -> Result<(), StoreError> {
        self.device.turn(store)
    }
    fn unplug(&mut self, store: &mut Xenstored) -> Result<(), StoreError> {
        self.device.unplug(store)
    }
    fn is_gone(&self) -> bool {
        self.device.is_gone()
    }
}

/// Binds a port that the frontend published under `name`.
fn bind(
    domain: &Arc<Domain>,
    read: &dyn Fn(&str) -> Option<String>,
    name: &str,
    serve: impl Fn() + Send + Sync + 'static,
) -> Result<HostPort, String> {
    let port = read(name).and_then(|text| text.parse().ok());
    let port = port.ok_or_else(|| format!("the frontend's node {name} is missing or nonsense"))?;
    domain
        .bind_interdomain(Port(port), Arc::new(serve))
        .map_err(|error| format!("the frontend's {name} {port} cannot be bound: {error}"))
}

struct DiskSlot {
    disk: Mutex<Disk<Grants, Image>>,
    port: Mutex<Option<HostPort>>,
}

impl DiskSlot {
    fn serve(&self) {
        let mut disk = lock(&self.disk);
        let Some(back) = disk.connected.as_mut() else { return };
        match back.serve() {
            Ok(false) => {}
            Ok(true) => {
                drop(disk);
                if let Some(port) = lock(&self.port).as_ref() {
                    port.notify();
                }
            }
            Err(error) => {
                eprintln!(
                    "janus: disk: the guest broke its ring, which is not served any more: {error}"
                );
                disk.release();
            }
        }
    }
}

/// A disk on the bus of a domain.
pub(super) struct DiskDriver {
    domain: Arc<Domain>,
    slot: Arc<DiskSlot>,
}

impl DiskDriver {
    pub(super) fn new(domain: Arc<Domain>, disk: Disk<Grants, Image>) -> Self {
        Self { domain, slot: Arc::new(DiskSlot { disk: Mutex::new(disk), port: Mutex::new(None) }) }
    }
}

impl Driver for DiskDriver {
    const KIND: &'static str = "vbd";
    const HANDSHAKE: Handshake = Handshake::Initialised;
    fn offer(&self) -> NodeList {
        lock(&self.slot.disk).offer()
    }
    fn connect(&mut self, read: &dyn Fn(&str) -> Option<String>) -> Result<NodeList, String> {
        let nodes = lock(&self.slot.disk).connect(read)?;
        let slot = Arc::downgrade(&self.slot);
        let serve = move || {
            if let Some(slot) = Weak::upgrade(&slot) {
                slot.serve();
            }
        };
        match bind(&self.domain, read, "event-channel", serve) {
            Ok(port) => *lock(&self.slot.port) = Some(port),
            Err(error) => {
                self.release();
                return Err(error);
            }
        }
        // What the frontend asked before the port was bound.
        self.slot.serve();
        Ok(nodes)
    }
    fn release(&mut self) {
        *lock(&self.slot.port) = None;
        lock(&self.slot.disk).release();
    }
}

/// A network that card and connection share.
#[derive(Clone)]
pub(super) struct SharedNetwork(Arc<Mutex<Network>>);

impl SharedNetwork {
    pub(super) fn new(network: Network) -> Self {
        Self(Arc::new(Mutex::new(network)))
    }
}

impl NetBackend for SharedNetwork {
    fn send(&mut self, frame: Frame) {
        lock(&self.0).send(frame);
    }
    fn receive(&mut self) -> Option<Frame> {
        lock(&self.0).receive()
    }
    fn connected(&mut self, accepts: Accepts) {
        lock(&self.0).connected(accepts);
    }
    fn buffer(&mut self) -> Vec<u8> {
        lock(&self.0).buffer()
    }
    fn recycle(&mut self, bytes: Vec<u8>) {
        lock(&self.0).recycle(bytes);
    }
}

/// What a network rings when frames for the guest came.
#[derive(Clone, Debug, Default)]
pub struct Doorbell(Arc<OnceLock<Weak<VifSlot>>>);

impl Doorbell {
    /// There may be frames for the guest. From any thread.
    pub fn ring(&self) {
        if let Some(slot) = self.0.get().and_then(Weak::upgrade) {
            slot.serve();
        }
    }
}

#[derive(Default)]
struct VifPorts {
    tx: Option<HostPort>,
    /// `None`: the one port is for both.
    rx: Option<HostPort>,
}

struct VifSlot {
    card: Mutex<Card<Grants, SharedNetwork>>,
    ports: Mutex<VifPorts>,
    /// Somebody wants service while another gives it.
    again: AtomicBool,
}

impl std::fmt::Debug for VifSlot {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("VifSlot")
    }
}

impl VifSlot {
    /// Serves both directions. Whoever comes while it is being served leaves it to the other.
    fn serve(&self) {
        self.again.store(true, Ordering::SeqCst);
        while self.again.load(Ordering::SeqCst) {
            let mut card = match self.card.try_lock() {
                Ok(card) => card,
                Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
                Err(TryLockError::WouldBlock) => return,
            };
            self.again.store(false, Ordering::SeqCst);
            let Some(back) = card.connected.as_mut() else { continue };
            match back.serve() {
                Ok(notify) => {
                    drop(card);
                    let ports = lock(&self.ports);
                    if let Some(tx) = ports.tx.as_ref().filter(|_| notify.tx) {
                        tx.notify();
                    }
                    if let Some(rx) = ports.rx.as_ref().or(ports.tx.as_ref()).filter(|_| notify.rx)
                    {
                        rx.notify();
                    }
                }
                Err(error) => {
                    eprintln!(
                        "janus: card: the guest broke its rings, which are not served any more: {error}"
                    );
                    card.release();
                }
            }
        }
    }
}

/// A card on the bus of a domain.
pub(super) struct VifDriver {
    domain: Arc<Domain>,
    slot: Arc<VifSlot>,
}

impl VifDriver {
    pub(super) fn new(
        domain: Arc<Domain>,
        card: Card<Grants, SharedNetwork>,
        bell: &Doorbell,
    ) -> Self {
        let slot = Arc::new(VifSlot {
            card: Mutex::new(card),
            ports: Mutex::default(),
            again: AtomicBool::new(false),
        });
        // A bell belongs to one card.
        let _ = bell.0.set(Arc::downgrade(&slot));
        Self { domain, slot }
    }

    fn serve(&self) -> impl Fn() + Send + Sync + 'static {
        let slot = Arc::downgrade(&self.slot);
        move || {
            if let Some(slot) = Weak::upgrade(&slot) {
                slot.serve();
            }
        }
    }
}

impl Driver for VifDriver {
    const KIND: &'static str = "vif";
    const HANDSHAKE: Handshake = Handshake::Connected;
    fn offer(&self) -> NodeList {
        lock(&self.slot.card).offer()
    }
    fn connect(&mut self, read: &dyn Fn(&str) -> Option<String>) -> Result<NodeList, String> {
        let nodes = lock(&self.slot.card).connect(read)?;
        let bound = if read("event-channel-tx").is_some() {
            bind(&self.domain, read, "event-channel-tx", self.serve()).and_then(|tx| {
                let rx = bind(&self.domain, read, "event-channel-rx", self.serve())?;
                Ok(VifPorts { tx: Some(tx), rx: Some(rx) })
            })
        } else {
            bind(&self.domain, read, "event-channel", self.serve())
                .map(|tx| VifPorts { tx: Some(tx), rx: None })
        };
        match bound {
            Ok(ports) => *lock(&self.slot.ports) = ports,
            Err(error) => {
                self.release();
                return Err(error);
            }
        }
        self.slot.serve();
        Ok(nodes)
    }
    fn release(&mut self) {
        *lock(&self.slot.ports) = VifPorts::default();
        lock(&self.slot.card).release();
    }
}

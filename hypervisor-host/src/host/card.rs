//! Network cards of a running guest: one netback for each pair of rings, served where the guest's event arrives, and
//! on the network's own thread when that has frames.

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, TryLockError, Weak};

use super::guest::{Guest, Notify as _};
use crate::netback::{self, Accepts, Frame, NetBackend, Netback, NetbackFeatures};
use crate::xenbus::{Driver, NodeList};
use janus_proto::xenbus::Handshake;

/// What a network rings when it has frames for the guest.
#[derive(Clone)]
pub struct Doorbell(Arc<dyn Fn() + Send + Sync>);

impl fmt::Debug for Doorbell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Doorbell")
    }
}

impl Doorbell {
    /// There may be frames for the guest. From any thread.
    pub fn ring(&self) {
        (self.0)();
    }
}

/// A network that several owners share.
#[derive(Clone)]
struct SharedNet(Arc<Mutex<Box<dyn NetBackend + Send>>>);

impl SharedNet {
    fn with<R>(&self, action: impl FnOnce(&mut dyn NetBackend) -> R) -> R {
        action(self.0.lock().unwrap_or_else(PoisonError::into_inner).as_mut())
    }
}

impl NetBackend for SharedNet {
    fn send(&mut self, frame: Frame) {
        self.with(|net| net.send(frame));
    }
    fn receive(&mut self) -> Option<Frame> {
        self.with(|net| net.receive())
    }
    fn connected(&mut self, accepts: Accepts) {
        self.with(|net| net.connected(accepts));
    }
    fn buffer(&mut self) -> Vec<u8> {
        self.with(|net| net.buffer())
    }
    fn recycle(&mut self, bytes: Vec<u8>) {
        self.with(|net| net.recycle(bytes));
    }
}

struct Rings<G: Guest> {
    back: Mutex<Netback<G::Grants, SharedNet>>,
    tx: OnceLock<G::Port>,
    /// Absent: the same as `tx`.
    rx: OnceLock<G::Port>,
    /// Somebody wants service while another gives it.
    again: AtomicBool,
}

impl<G: Guest> Rings<G> {
    /// Serves both directions. Whoever comes while another does leaves it to that one, and does not wait.
    fn serve(&self) {
        self.again.store(true, Ordering::SeqCst);
        while self.again.load(Ordering::SeqCst) {
            let mut back = match self.back.try_lock() {
                Ok(back) => back,
                Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
                Err(TryLockError::WouldBlock) => return,
            };
            self.again.store(false, Ordering::SeqCst);
            // A frontend that broke a ring is not served any more; it gets them back when it closes.
            let notify = back.serve().unwrap_or_default();
            drop(back);
            self.notify(notify);
        }
    }

    fn notify(&self, notify: netback::Notify) {
        let rx = self.rx.get();
        if (notify.tx || (notify.rx && rx.is_none()))
            && let Some(port) = self.tx.get()
        {
            port.notify();
        }
        if notify.rx
            && let Some(port) = rx
        {
            port.notify();
        }
    }
}

/// Where the network's thread finds the rings.
type Place<G> = Mutex<Weak<Rings<G>>>;

/// The card's part of a device.
pub(super) struct CardDriver<G: Guest> {
    guest: G,
    net: SharedNet,
    features: NetbackFeatures,
    rings: Option<Arc<Rings<G>>>,
    place: Arc<Place<G>>,
}

impl<G: Guest> fmt::Debug for CardDriver<G> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CardDriver").field("features", &self.features).finish_non_exhaustive()
    }
}

impl<G: Guest> CardDriver<G> {
    pub(super) fn new<E>(
        guest: G,
        features: NetbackFeatures,
        connect: impl FnOnce(Doorbell) -> Result<Box<dyn NetBackend + Send>, E>,
    ) -> Result<Self, E> {
        let place: Arc<Place<G>> = Arc::new(Mutex::new(Weak::new()));
        let of_net = Arc::downgrade(&place);
        let on_receive = move || {
            let Some(place) = of_net.upgrade() else { return };
            let rings = place.lock().unwrap_or_else(PoisonError::into_inner).upgrade();
            if let Some(rings) = rings {
                rings.serve();
            }
        };
        let net = SharedNet(Arc::new(Mutex::new(connect(Doorbell(Arc::new(on_receive)))?)));
        Ok(Self { guest, net, features, rings: None, place })
    }

    fn at(&self, rings: Weak<Rings<G>>) {
        *self.place.lock().unwrap_or_else(PoisonError::into_inner) = rings;
    }
}

impl<G: Guest> Driver for CardDriver<G> {
    const KIND: &'static str = "vif";
    const HANDSHAKE: Handshake = Handshake::Connected;
    fn offer(&self) -> NodeList {
        netback::offer_nodes(self.features)
    }
    fn connect(&mut self, read: &dyn Fn(&str) -> Option<String>) -> Result<NodeList, String> {
        self.release();
        let frontend = netback::Frontend::read(read).map_err(|error| error.to_string())?;
        let back = Netback::connect(self.guest.grants(), self.net.clone(), frontend)
            .map_err(|error| error.to_string())?;
        let rings = Arc::new(Rings {
            back: Mutex::new(back),
            tx: OnceLock::new(),
            rx: OnceLock::new(),
            again: AtomicBool::new(false),
        });
        let weak: Weak<Rings<G>> = Arc::downgrade(&rings);
        let serve = move || {
            if let Some(rings) = weak.upgrade() {
                rings.serve();
            }
        };
        let handler: crate::pv::events::Handler = Arc::new(serve);
        let bind = |port| {
            self.guest
                .bind_interdomain(port, Arc::clone(&handler))
                .map_err(|error| format!("event channel {port}: {error:?}"))
        };
        let _ = rings.tx.set(bind(frontend.tx_port)?);
        if frontend.rx_port != frontend.tx_port {
            let _ = rings.rx.set(bind(frontend.rx_port)?);
        }
        self.at(Arc::downgrade(&rings));
        // What the guest sent before the port was bound was not heard.
        rings.serve();
        self.rings = Some(rings);
        Ok(NodeList::new())
    }
    fn release(&mut self) {
        self.at(Weak::new());
        self.rings = None;
    }
}

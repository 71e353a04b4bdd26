//! Network cards of a running guest: one netback for each pair of rings, served where the guest's event arrives, and
//! on the network's own thread when that has frames.

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, TryLockError, Weak};

use super::guest::{Guest, Notify as _};
use crate::netback::{
    self, CardNet, Control, FrontendCard, NetBackend, Netback, NetbackFeatures, QueueNet,
};
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
    /// Calls `ring`, which is given no lock and must not wait.
    #[must_use]
    pub fn new(ring: impl Fn() + Send + Sync + 'static) -> Self {
        Self(Arc::new(ring))
    }
    /// There may be frames for the guest. From any thread.
    pub fn ring(&self) {
        (self.0)();
    }
}

/// A pair of rings.
struct Rings<G: Guest> {
    back: Mutex<Netback<G::Grants, QueueNet>>,
    tx: OnceLock<G::Port>,
    /// Absent: the same as `tx`.
    rx: OnceLock<G::Port>,
    /// Somebody wants service while another gives it.
    again: AtomicBool,
}

impl<G: Guest> Rings<G> {
    fn new(back: Netback<G::Grants, QueueNet>) -> Self {
        let (tx, rx) = (OnceLock::new(), OnceLock::new());
        Self { back: Mutex::new(back), tx, rx, again: AtomicBool::new(false) }
    }

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

/// How the frontend steers the queues.
struct Steering<G: Guest> {
    control: Mutex<Control<G::Grants>>,
    port: OnceLock<G::Port>,
}

impl<G: Guest> Steering<G> {
    fn serve(&self) {
        let mut control = self.control.lock().unwrap_or_else(PoisonError::into_inner);
        // A frontend that broke the ring is not served any more, on this one.
        let notify = control.serve().unwrap_or(false);
        drop(control);
        if notify && let Some(port) = self.port.get() {
            port.notify();
        }
    }
}

/// A connected card.
struct Card<G: Guest> {
    net: Arc<Mutex<CardNet>>,
    queues: Vec<Rings<G>>,
    steering: Option<Steering<G>>,
}

impl<G: Guest> Card<G> {
    /// Serves each queue: one that has no room for its frames does not keep the others from theirs.
    fn serve_all(&self) {
        for queue in 0..self.queues.len() {
            self.serve(queue);
        }
    }

    /// Serves a queue, and then those for which frames were found meanwhile.
    fn serve(&self, queue: usize) {
        if let Some(rings) = self.queues.get(queue) {
            rings.serve();
        }
        while self.queues.len() > 1 && lock(&self.net).take_stirred() {
            for (queue, rings) in self.queues.iter().enumerate() {
                if lock(&self.net).is_waited_for(queue) {
                    rings.serve();
                }
            }
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Where the network's thread finds the card.
type Place<G> = Mutex<Weak<Card<G>>>;

/// The card's part of a device.
pub(super) struct CardDriver<G: Guest> {
    guest: G,
    net: Arc<Mutex<CardNet>>,
    features: NetbackFeatures,
    card: Option<Arc<Card<G>>>,
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
            let card = lock(&place).upgrade();
            if let Some(card) = card {
                card.serve_all();
            }
        };
        let net = Arc::new(Mutex::new(CardNet::new(connect(Doorbell(Arc::new(on_receive)))?)));
        Ok(Self { guest, net, features, card: None, place })
    }

    fn open(&self, frontend: &FrontendCard) -> Result<Arc<Card<G>>, String> {
        let told = |error: netback::NetbackError| error.to_string();
        lock(&self.net).connect(frontend.queues.len(), frontend.multicast_control);
        let queues = frontend.queues.iter().enumerate().map(|(index, queue)| {
            let net = QueueNet::new(&self.net, index);
            Netback::connect(self.guest.grants(), net, *queue).map(Rings::new)
        });
        let queues = queues.collect::<Result<Vec<_>, _>>().map_err(told)?;
        let steering = match frontend.control {
            Some((ring, _)) => {
                let control = Control::connect(self.guest.grants(), ring, Arc::clone(&self.net));
                let control = Mutex::new(control.map_err(told)?);
                Some(Steering { control, port: OnceLock::new() })
            }
            None => None,
        };
        let card = Arc::new(Card { net: Arc::clone(&self.net), queues, steering });
        let bind = |port, serve: fn(&Card<G>, usize), queue| {
            let weak = Arc::downgrade(&card);
            let handler = move || {
                if let Some(card) = weak.upgrade() {
                    serve(&card, queue);
                }
            };
            self.guest
                .bind_interdomain(port, Arc::new(handler))
                .map_err(|error| format!("event channel {port}: {error:?}"))
        };
        for (index, (rings, queue)) in card.queues.iter().zip(&frontend.queues).enumerate() {
            let _ = rings.tx.set(bind(queue.tx_port, Card::serve, index)?);
            if queue.rx_port != queue.tx_port {
                let _ = rings.rx.set(bind(queue.rx_port, Card::serve, index)?);
            }
        }
        if let (Some(steering), Some((_, port))) = (&card.steering, frontend.control) {
            let serve = |card: &Card<G>, _| {
                if let Some(steering) = &card.steering {
                    steering.serve();
                }
            };
            let _ = steering.port.set(bind(port, serve, 0)?);
        }
        Ok(card)
    }

    fn at(&self, card: Weak<Card<G>>) {
        *lock(&self.place) = card;
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
        let frontend =
            FrontendCard::read(read, self.features).map_err(|error| error.to_string())?;
        let card = self.open(&frontend)?;
        self.at(Arc::downgrade(&card));
        // What the guest sent before the ports were bound was not heard.
        if let Some(steering) = &card.steering {
            steering.serve();
        }
        card.serve_all();
        self.card = Some(card);
        Ok(NodeList::new())
    }
    fn release(&mut self) {
        self.at(Weak::new());
        self.card = None;
    }
}

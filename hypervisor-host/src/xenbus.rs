//! The life of a device: what a toolstack and a backend domain do through xenstore, around the data path.
//!
//! [`Device::plug`] writes the two directories as `xl` does; [`Device::turn`] follows the frontend's state with the
//! machine of `janus_proto::xenbus` and lets a [`Driver`] connect and release its rings; [`Device::unplug`] is
//! `xl block-detach`. Several devices share one daemon; nothing here waits.

use std::fmt;

use janus_proto::addr::DomId;
use janus_proto::xenbus::{Back, BackStep, Handshake, XenbusState};
use janus_proto::xenstore::{Request, StoreError, TransactionId};

use crate::blkback::{self, Blkback, BlkbackFeatures};
use crate::memory::GrantMapper;
use crate::netback::{self, NetBackend, Netback, NetbackFeatures};
use crate::storage::BlockBackend;
use crate::xenstored::{ConnectionId, Reply, Xenstored, home, owned_by};

/// Nodes to write: names and values.
pub type NodeList = Vec<(&'static str, String)>;

/// A device's own part.
pub trait Driver {
    /// Its name in xenstore: `vbd`, `vif`.
    const KIND: &'static str;
    /// Who connects first.
    const HANDSHAKE: Handshake;
    /// What to write before the frontend connects.
    fn offer(&self) -> NodeList;
    /// Connects to what the frontend published (`read` reads its directory); answers what to write before the
    /// state becomes Connected.
    ///
    /// # Errors
    /// A text for the backend's `error` node.
    fn connect(&mut self, read: &dyn Fn(&str) -> Option<String>) -> Result<NodeList, String>;
    /// Lets go of everything the frontend shared.
    fn release(&mut self);
    /// What went through since it was plugged in.
    fn figures(&self) -> Figures {
        Figures::default()
    }
}

/// What went through a device: from the guest, and to it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Figures {
    /// Requests of a disk, or frames that the guest sent.
    pub requests: u64,
    /// Of these, refused or failed.
    pub errors: u64,
    /// Bytes written to a disk, or sent to a network.
    pub bytes_out: u64,
    /// Bytes read from a disk, or received from a network.
    pub bytes_in: u64,
    /// Frames that the guest received.
    pub received: u64,
}

impl std::ops::AddAssign for Figures {
    fn add_assign(&mut self, other: Self) {
        self.requests += other.requests;
        self.errors += other.errors;
        self.bytes_out += other.bytes_out;
        self.bytes_in += other.bytes_in;
        self.received += other.received;
    }
}

/// A disk and its frontend's ring, when there is one.
#[derive(Debug)]
pub struct Disk<G: GrantMapper, B> {
    mapper: G,
    features: BlkbackFeatures,
    /// The image while nobody is connected.
    idle: Option<B>,
    /// The data path while somebody is.
    pub connected: Option<Blkback<G, B>>,
}

impl<G: GrantMapper, B> Disk<G, B> {
    /// An idle disk.
    pub fn new(mapper: G, image: B, features: BlkbackFeatures) -> Self {
        Self { mapper, features, idle: Some(image), connected: None }
    }
}

impl<G: GrantMapper + Clone, B: BlockBackend> Driver for Disk<G, B> {
    const KIND: &'static str = "vbd";
    const HANDSHAKE: Handshake = Handshake::Initialised;
    fn offer(&self) -> NodeList {
        blkback::offer_nodes(self.features)
    }
    fn connect(&mut self, read: &dyn Fn(&str) -> Option<String>) -> Result<NodeList, String> {
        let frontend = blkback::Frontend::read(read, self.features).map_err(|e| e.to_string())?;
        let Some(image) = self.idle.take() else { return Err("the disk is in use".into()) };
        let details = blkback::detail_nodes(self.features, &image);
        match Blkback::connect(self.mapper.clone(), image, self.features, &frontend) {
            Ok(back) => self.connected = Some(back),
            Err((error, image)) => {
                self.idle = Some(image);
                return Err(error.to_string());
            }
        }
        Ok(details)
    }
    fn release(&mut self) {
        if let Some(back) = self.connected.take() {
            self.idle = Some(back.disconnect());
        }
    }
}

/// A network card and its frontend's rings, when there are any.
#[derive(Debug)]
pub struct Card<G: GrantMapper, N> {
    mapper: G,
    features: NetbackFeatures,
    net: N,
    /// The data path while somebody is connected.
    pub connected: Option<Netback<G, N>>,
}

impl<G: GrantMapper, N> Card<G, N> {
    /// An idle card, plugged into `net`.
    pub fn new(mapper: G, net: N, features: NetbackFeatures) -> Self {
        Self { mapper, features, net, connected: None }
    }
}

impl<G: GrantMapper + Clone, N: NetBackend + Clone> Driver for Card<G, N> {
    const KIND: &'static str = "vif";
    const HANDSHAKE: Handshake = Handshake::Connected;
    fn offer(&self) -> NodeList {
        netback::offer_nodes(self.features)
    }
    fn connect(&mut self, read: &dyn Fn(&str) -> Option<String>) -> Result<NodeList, String> {
        let frontend = netback::Frontend::read(read).map_err(|error| error.to_string())?;
        let back = Netback::connect(self.mapper.clone(), self.net.clone(), frontend);
        self.connected = Some(back.map_err(|error| error.to_string())?);
        Ok(NodeList::new())
    }
    fn release(&mut self) {
        self.connected = None;
    }
}

/// A plugged device.
pub struct Device<D> {
    /// Its own part.
    pub driver: D,
    machine: Back,
    connection: ConnectionId,
    front: String,
    back: String,
    destroyed: bool,
    connected: bool,
}

impl<D: fmt::Debug> fmt::Debug for Device<D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Device({}, {:?})", self.back, self.driver)
    }
}

impl<D: Driver> Device<D> {
    /// Writes the directories of device `number` of `guest`, with `extra` nodes in the frontend's and `own` ones in the
    /// backend's, and offers it.
    ///
    /// # Errors
    /// The daemon refused.
    pub fn plug(
        store: &mut Xenstored,
        guest: DomId,
        number: u32,
        driver: D,
        extra: &[(&str, &str)],
        own: &[(&str, &str)],
    ) -> Result<Self, StoreError> {
        let host = DomId(0);
        let front = format!("{}/device/{}/{number}", home(guest), D::KIND);
        let back = format!("{}/backend/{}/{guest}/{number}", home(host), D::KIND);
        let connection = store.connect(host);
        let machine = Back::new(D::HANDSHAKE);
        let (destroyed, connected) = (false, false);
        let mut this = Self { driver, machine, connection, front, back, destroyed, connected };
        let initialising = XenbusState::INITIALISING.0.to_string();
        for (directory, owner, reader) in
            [(this.front.clone(), guest, host), (this.back.clone(), host, guest)]
        {
            this.ask(store, &Request::MakeDirectory(&directory))?;
            let permissions = owned_by(owner, reader);
            this.ask(store, &Request::SetPermissions { path: &directory, permissions })?;
        }
        let (front, back) = (this.front.clone(), this.back.clone());
        for (directory, name, value) in [
            (&back, "frontend", front.as_str()),
            (&back, "frontend-id", &guest.to_string()),
            (&back, "online", "1"),
            (&back, "state", &initialising),
            (&front, "backend", &back),
            (&front, "backend-id", "0"),
            (&front, "state", &initialising),
        ] {
            this.write(store, directory, name, value)?;
        }
        for (name, value) in extra {
            this.write(store, &front, name, value)?;
        }
        for (name, value) in own {
            this.write(store, &back, name, value)?;
        }
        let (path, token) = (format!("{front}/state"), "frontend");
        this.ask(store, &Request::Watch { path: &path, token })?;
        let offer = this.machine.offer();
        this.follow(store, offer)?;
        Ok(this)
    }

    /// Looks at what the frontend did since the last call.
    ///
    /// # Errors
    /// The daemon refused.
    pub fn turn(&mut self, store: &mut Xenstored) -> Result<(), StoreError> {
        let mut fired = false;
        while store.event(self.connection).is_some() {
            fired = true;
        }
        while fired && !self.destroyed {
            let path = format!("{}/state", self.front);
            let state =
                match store.request(self.connection, TransactionId::NONE, &Request::Read(&path)) {
                    Ok(Reply::Payload(value)) => XenbusState::parse(&value),
                    _ => XenbusState::UNKNOWN,
                };
            let step = self.machine.frontend(state);
            if step == BackStep::Wait {
                break;
            }
            self.follow(store, step)?;
        }
        Ok(())
    }

    /// Asks the frontend to let go of the device for good.
    ///
    /// # Errors
    /// The daemon refused.
    pub fn unplug(&mut self, store: &mut Xenstored) -> Result<(), StoreError> {
        let back = self.back.clone();
        self.write(store, &back, "online", "0")?;
        let step = self.machine.detach();
        self.follow(store, step)
    }

    /// Takes the device away, whatever the frontend does.
    ///
    /// # Errors
    /// The daemon refused.
    pub fn force(&mut self, store: &mut Xenstored) -> Result<(), StoreError> {
        if self.destroyed { Ok(()) } else { self.follow(store, BackStep::Destroy) }
    }

    /// The frontend's directory.
    #[must_use]
    pub fn frontend(&self) -> &str {
        &self.front
    }

    /// Whether the frontend uses it.
    #[must_use]
    pub fn is_connected(&self) -> bool {
        self.connected
    }

    /// Whether the device is gone, and its directory with it.
    #[must_use]
    pub fn is_gone(&self) -> bool {
        self.destroyed
    }

    fn follow(&mut self, store: &mut Xenstored, step: BackStep) -> Result<(), StoreError> {
        match step {
            BackStep::Wait => Ok(()),
            BackStep::Write(state) => self.state(store, state),
            BackStep::Offer => {
                self.nodes(store, &self.driver.offer())?;
                self.state(store, XenbusState::INIT_WAIT)
            }
            BackStep::Connect => self.connect(store),
            BackStep::Release => {
                self.driver.release();
                self.connected = false;
                let state = self.machine.released();
                self.state(store, state)
            }
            BackStep::Destroy => {
                self.driver.release();
                (self.destroyed, self.connected) = (true, false);
                let back = self.back.clone();
                let removed = self.ask(store, &Request::Remove(&back));
                store.disconnect(self.connection);
                removed
            }
        }
    }

    fn connect(&mut self, store: &mut Xenstored) -> Result<(), StoreError> {
        let (front, connection) = (&self.front, self.connection);
        // The driver reads through a shared reference; the daemon counts what it reads.
        let cell = std::cell::RefCell::new(&mut *store);
        let read = |name: &str| {
            let path = format!("{front}/{name}");
            let request = Request::Read(&path);
            match cell.borrow_mut().request(connection, TransactionId::NONE, &request) {
                Ok(Reply::Payload(value)) => String::from_utf8(value).ok(),
                _ => None,
            }
        };
        let state = match self.driver.connect(&read) {
            Ok(nodes) => {
                self.nodes(store, &nodes)?;
                self.connected = true;
                self.machine.connected()
            }
            Err(error) => {
                let back = self.back.clone();
                self.write(store, &back, "error", &error)?;
                // As Linux's backends do (`xenbus_dev_fatal`): a frontend that is asked to close does not try again
                // by itself, so that two ends which disagree do not go round for ever.
                XenbusState::CLOSING
            }
        };
        self.state(store, state)
    }

    fn state(&mut self, store: &mut Xenstored, state: XenbusState) -> Result<(), StoreError> {
        let back = self.back.clone();
        self.write(store, &back, "state", &state.0.to_string())
    }

    fn nodes(&self, store: &mut Xenstored, nodes: &NodeList) -> Result<(), StoreError> {
        nodes.iter().try_for_each(|(name, value)| self.write(store, &self.back, name, value))
    }

    fn write(
        &self,
        store: &mut Xenstored,
        directory: &str,
        name: &str,
        value: &str,
    ) -> Result<(), StoreError> {
        let path = format!("{directory}/{name}");
        self.ask(store, &Request::Write { path: &path, value: value.as_bytes() })
    }

    fn ask(&self, store: &mut Xenstored, request: &Request<'_>) -> Result<(), StoreError> {
        store.request(self.connection, TransactionId::NONE, request).map(drop)
    }
}

//! The xenbus: finds the devices that the toolstack has given this guest, connects them, and follows them
//! through detach, reconnect and loss.
//!
//! One task watches `device`; each device has a task of its own that watches its backend's state, asks
//! [`janus_proto::xenbus::Front`] what to do, and does it with [`super::vbd`] or [`super::vif`]. A device that
//! cannot be connected is reported and left alone; the others go on.

use alloc::collections::BTreeMap;
use alloc::format;
use alloc::string::{String, ToString};
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt;
use core::time::Duration;

use janus_front::hal::{HalError, XenHal};
use janus_front::xen::nodes::NodeError;
use janus_proto::addr::DomId;
use janus_proto::xenbus::{Front, FrontStep, Loss, XenbusState};
use janus_proto::xenstore::{StoreError, valid_path};

use super::vbd::Vbd;
use super::vif::Vif;
use super::xenstore::{XenStore, XenStoreError};
use crate::devices::{self, Search};
use crate::irq::evtchn::EventError;
use crate::sync::{IrqMutex, Notify};
use crate::task::{self, Either};
use crate::time;

/// How long the boot waits for a backend; Linux's takes milliseconds, or for ever.
const BOOT_PATIENCE: Duration = Duration::from_secs(10);
/// How long it waits for one that has no state yet: toolstacks make both ends before the guest runs.
const ABSENCE_PATIENCE: Duration = Duration::from_millis(500);
/// How long `device` goes unwatched while the devices that were there at boot connect.
const UNWATCHED: Duration = Duration::from_secs(1);
/// How long a backend may take to let go of a ring before the pages are given up.
const RELEASE_PATIENCE: Duration = Duration::from_secs(5);

/// Conflicts with other writers after which a state is not written.
const MAX_CONFLICTS: u32 = 32;

/// Why a device is not connected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum BusError {
    /// xenstore failed.
    Store(XenStoreError),
    /// A node is wrong.
    Node(NodeError),
    /// No memory, grants or ports.
    Hal(HalError),
    /// No handler for its events.
    Event(EventError),
    /// The frontend's directory names no usable backend.
    NoBackend,
}

impl fmt::Display for BusError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Store(error) => error.fmt(f),
            Self::Node(error) => error.fmt(f),
            Self::Hal(error) => error.fmt(f),
            Self::Event(error) => error.fmt(f),
            Self::NoBackend => f.write_str("its directory names no backend"),
        }
    }
}

impl core::error::Error for BusError {}

impl From<XenStoreError> for BusError {
    fn from(error: XenStoreError) -> Self {
        Self::Store(error)
    }
}
impl From<NodeError> for BusError {
    fn from(error: NodeError) -> Self {
        Self::Node(error)
    }
}
impl From<HalError> for BusError {
    fn from(error: HalError) -> Self {
        Self::Hal(error)
    }
}
impl From<EventError> for BusError {
    fn from(error: EventError) -> Self {
        Self::Event(error)
    }
}

/// A device's place.
pub(super) struct Place {
    pub(super) store: Arc<XenStore>,
    pub(super) hal: &'static dyn XenHal,
    /// Our directory, relative to the domain's.
    pub(super) front: String,
    /// The backend's directory.
    pub(super) back: String,
    /// The backend's domain.
    pub(super) peer: DomId,
    /// The device's number in its class.
    pub(super) number: u32,
}

/// A device of one of the classes we drive.
enum Device {
    Vbd(Vbd),
    Vif(Vif),
}

impl Device {
    async fn publish(&mut self, place: &Place) -> Result<(), BusError> {
        match self {
            Self::Vbd(vbd) => vbd.publish(place).await,
            Self::Vif(vif) => vif.publish(place).await,
        }
    }
    async fn connect(&mut self, place: &Place) -> Result<String, BusError> {
        match self {
            Self::Vbd(vbd) => vbd.connect(place).await,
            Self::Vif(vif) => vif.connect(place),
        }
    }
    fn stop(&mut self) {
        match self {
            Self::Vbd(vbd) => vbd.stop(),
            Self::Vif(vif) => vif.stop(),
        }
    }
    fn release(&mut self) {
        match self {
            Self::Vbd(vbd) => vbd.release(),
            Self::Vif(vif) => vif.release(),
        }
    }
}

/// Network cards first: their backends take longer.
const CLASSES: [&str; 2] = ["vif", "vbd"];

/// How a directory is served.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Served {
    /// Its task runs.
    Running,
    /// Its task failed; it is tried again when the directory was removed and made anew.
    Failed,
}

struct Bus {
    store: Arc<XenStore>,
    hal: &'static dyn XenHal,
    /// The directories that have, or had, a task.
    known: IrqMutex<BTreeMap<String, Served>>,
    /// A task has ended: its directory may already be in use again.
    ended: Notify,
}

/// Starts the tasks; the devices that are there at boot are part of [`crate::devices::settled`].
pub(super) fn start(store: Arc<XenStore>, hal: &'static dyn XenHal) {
    let bus = Bus { store, hal, known: IrqMutex::new(BTreeMap::new()), ended: Notify::new() };
    let search = Search::start();
    drop(task::spawn("xenbus", Arc::new(bus).run(search)));
}

impl Bus {
    async fn run(self: Arc<Self>, search: Search) {
        if let Err(error) = self.follow(search).await {
            log::error!("no xenbus: {error}");
        }
    }

    async fn follow(self: &Arc<Self>, search: Search) -> Result<(), XenStoreError> {
        self.look(true).await?;
        drop(search);
        // Watched from the start, each node that the devices publish would come back as an event, and the daemon
        // is what the boot waits for. The watch's first event tells of anything that came in between.
        if time::timeout(UNWATCHED, devices::settled()).await.is_err() {
            log::debug!("xenbus: some backend is slow");
        }
        let mut watch = self.store.watch("device").await?;
        loop {
            match task::select(watch.changed(), self.ended.notified()).await {
                Either::First(change) => {
                    if !self.concerns(&change?) {
                        continue;
                    }
                }
                Either::Second(()) => {}
            }
            self.look(false).await?;
        }
    }

    /// Whether a change of `path` may have to do with which devices there are: what is below the directory of a
    /// device that is known has not.
    fn concerns(&self, path: &str) -> bool {
        match path.match_indices('/').nth(2).and_then(|(end, _)| path.get(..end)) {
            Some(front) => !self.known.lock().contains_key(front),
            None => true,
        }
    }

    /// Starts a task for each device that has none.
    async fn look(self: &Arc<Self>, booting: bool) -> Result<(), XenStoreError> {
        let directories = CLASSES.map(|class| format!("device/{class}"));
        let [first, second] = &directories;
        let (first, second) = task::join(self.store.list(first), self.store.list(second)).await;
        for ((class, directory), listed) in CLASSES.iter().zip(&directories).zip([first, second]) {
            let names = match listed {
                Ok(names) => names,
                Err(error) if error.is_not_found() => Vec::new(),
                Err(error) => return Err(error),
            };
            let prefix = format!("{directory}/");
            self.known.lock().retain(|front, served| match front.strip_prefix(&prefix) {
                Some(name) => *served == Served::Running || names.iter().any(|n| n == name),
                None => true,
            });
            for name in names {
                let Ok(number) = name.parse::<u32>() else {
                    log::warn!("{directory}/{name}: not a device number");
                    continue;
                };
                let front = format!("{directory}/{name}");
                let is_new = {
                    let mut known = self.known.lock();
                    let is_new = !known.contains_key(&front);
                    if is_new {
                        known.insert(front.clone(), Served::Running);
                    }
                    is_new
                };
                if is_new {
                    let search = booting.then(Search::start);
                    let bus = Arc::clone(self);
                    drop(task::spawn("xenbus device", async move {
                        match bus.serve(class, &front, number, search).await {
                            Ok(()) => {
                                bus.known.lock().remove(&front);
                                bus.ended.notify();
                            }
                            Err(error) => {
                                log::error!("{front}: {error}");
                                bus.known.lock().insert(front, Served::Failed);
                            }
                        }
                    }));
                }
            }
        }
        Ok(())
    }

    /// A device from its discovery to its end.
    async fn serve(
        &self,
        class: &str,
        front: &str,
        number: u32,
        search: Option<Search>,
    ) -> Result<(), BusError> {
        let Some(place) = self.find(front, number).await? else { return Ok(()) };
        let (device, handshake) = match class {
            "vbd" => (Device::Vbd(Vbd::default()), Vbd::HANDSHAKE),
            _ => (Device::Vif(Vif::default()), Vif::HANDSHAKE),
        };
        let front = Front::new(handshake);
        let deadline = time::now().as_nanos().saturating_add(duration_ns(BOOT_PATIENCE));
        let mut life = Life { place, device, front, search, boot_deadline_ns: deadline };
        let result = life.run().await;
        if result.is_err() {
            // The store is lost: whatever the backend does now is not seen.
            life.device.stop();
        }
        result
    }

    /// Reads where a device's backend is; `None`: the device has gone already.
    async fn find(&self, front: &str, number: u32) -> Result<Option<Place>, BusError> {
        let nodes = self.store.read_nodes(front, &["backend", "backend-id", "state"]).await?;
        let Some(back) = nodes.text("backend")? else { return Ok(None) };
        if !valid_path(back) {
            return Err(BusError::NoBackend);
        }
        let place = Place {
            store: Arc::clone(&self.store),
            hal: self.hal,
            front: front.to_string(),
            back: back.to_string(),
            peer: DomId(nodes.required("backend-id")?),
            number,
        };
        let state =
            nodes.text("state")?.map_or(XenbusState::UNKNOWN, |s| XenbusState::parse(s.as_bytes()));
        if state != XenbusState::INITIALISING {
            place.write_state(XenbusState::INITIALISING).await?;
        }
        Ok(Some(place))
    }
}

fn duration_ns(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

impl Place {
    async fn write_state(&self, state: XenbusState) -> Result<(), XenStoreError> {
        let path = format!("{}/state", self.front);
        let value = state.to_string();
        if state != XenbusState::CLOSED {
            return self.store.write(&path, value.as_bytes()).await;
        }
        // The toolstack may be removing the directory, and a write would make it again.
        for _ in 0..MAX_CONFLICTS {
            let transaction = self.store.begin().await?;
            if transaction.read(&path).await.is_err_and(XenStoreError::is_not_found) {
                return Ok(());
            }
            transaction.write(&path, value.as_bytes()).await?;
            match transaction.commit().await {
                Err(XenStoreError::Refused(StoreError::Again)) => {}
                result => return result,
            }
        }
        Err(XenStoreError::Refused(StoreError::Again))
    }

    /// Tells whoever debugs the host why a device is not used, as Linux does.
    async fn write_error(&self, error: BusError) {
        let path = format!("error/{}/error", self.front);
        // Only a courtesy.
        let _ = self.store.write(&path, error.to_string().as_bytes()).await;
    }
}

/// One device's handshake.
struct Life {
    place: Place,
    device: Device,
    front: Front,
    /// Held until the device is there, has failed, or took too long.
    search: Option<Search>,
    boot_deadline_ns: u64,
}

impl Life {
    async fn run(&mut self) -> Result<(), BusError> {
        let path = format!("{}/state", self.place.back);
        let mut watch = self.place.store.watch(&path).await?;
        // The first event comes with the watch.
        watch.changed().await?;
        loop {
            let state = match self.place.store.read(&path).await {
                Ok(value) => XenbusState::parse(&value),
                // Of a node that is not there, the daemon tells only those who may look into its parent.
                Err(XenStoreError::Refused(StoreError::NotFound | StoreError::AccessDenied)) => {
                    XenbusState::UNKNOWN
                }
                Err(error) => return Err(error.into()),
            };
            loop {
                let step = self.front.backend(state);
                if step == FrontStep::Wait {
                    break;
                }
                self.take(step).await?;
            }
            if self.front.is_connected() || self.front.is_closed() {
                self.search = None;
            }
            let has_ended = self.front.is_closed() && state == XenbusState::UNKNOWN;
            if has_ended && self.has_gone().await? {
                return Ok(());
            }
            let patience = if self.front.is_draining() {
                Some(RELEASE_PATIENCE)
            } else if self.search.is_some() {
                let left = self.boot_deadline_ns.saturating_sub(time::now().as_nanos());
                let left = Duration::from_nanos(left);
                Some(if state == XenbusState::UNKNOWN { left.min(ABSENCE_PATIENCE) } else { left })
            } else {
                None
            };
            let Some(patience) = patience else {
                watch.changed().await?;
                continue;
            };
            match time::timeout(patience, watch.changed()).await {
                Ok(change) => drop(change?),
                Err(_) if self.front.is_draining() => {
                    log::warn!("{}: the backend does not let go", self.place.front);
                    let step = self.front.lose_patience();
                    self.take(step).await?;
                }
                Err(_) => {
                    log::warn!("{}: no backend yet, going on without it", self.place.front);
                    self.search = None;
                }
            }
        }
    }

    /// Whether the toolstack has removed the device altogether.
    async fn has_gone(&self) -> Result<bool, XenStoreError> {
        let path = format!("{}/backend", self.place.front);
        Ok(self.place.store.read_if_there(&path).await?.is_none())
    }

    async fn take(&mut self, step: FrontStep) -> Result<(), BusError> {
        let place = &self.place;
        let result = match step {
            FrontStep::Wait => Ok(()),
            FrontStep::Write(state) => return self.write(state).await,
            FrontStep::Publish => match self.device.publish(place).await {
                Ok(()) => {
                    let state = self.front.published();
                    return self.write(state).await;
                }
                Err(error) => Err(error),
            },
            FrontStep::Connect => match self.device.connect(place).await {
                Ok(name) => {
                    log::info!("{name}: {} connected to domain {}", place.front, place.peer);
                    let state = self.front.connected();
                    return self.write(state).await;
                }
                Err(error) => Err(error),
            },
            FrontStep::Stop(loss) => {
                return self.stop(loss).await;
            }
            FrontStep::Release => {
                self.device.release();
                self.front.released();
                Ok(())
            }
        };
        let Err(error) = result else { return Ok(()) };
        if let BusError::Store(error) = error
            && place.store.check().is_err()
        {
            return Err(error.into());
        }
        log::error!("{}: {error}", place.front);
        place.write_error(error).await;
        match self.front.abandon() {
            FrontStep::Stop(loss) => self.stop(loss).await,
            FrontStep::Write(state) => self.write(state).await,
            _ => Ok(()),
        }
    }

    async fn stop(&mut self, loss: Loss) -> Result<(), BusError> {
        log::warn!(
            "{}: {}",
            self.place.front,
            match loss {
                Loss::BackendCloses => "detached",
                Loss::BackendReset => "the backend started over",
                Loss::BackendVanished => "the backend vanished",
                Loss::Abandoned => "given up",
            }
        );
        self.device.stop();
        let state = self.front.stopped();
        self.write(state).await
    }

    /// Writes our state; a directory that has gone takes none, which the backend's state will tell.
    async fn write(&self, state: XenbusState) -> Result<(), BusError> {
        match self.place.write_state(state).await {
            Err(error) if self.place.store.check().is_err() => Err(error.into()),
            Err(error) => {
                log::warn!("{}: {error}", self.place.front);
                Ok(())
            }
            Ok(()) => Ok(()),
        }
    }
}

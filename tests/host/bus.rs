//! Whole lives of a disk on the xenbus: both machines, both drivers, one daemon.

use janus::blkback::BlkbackFeatures;
use janus::storage::MemoryDisk;
use janus::xenbus::{Device, Disk};
use janus::xenstored::{ConnectionId, Reply, Xenstored, owned_by};
use janus_front::class::{BlockDevice as _, BlockOp, BlockStatus};
use janus_front::dma::DmaBuf;
use janus_front::fake::{FakeXen, hal_of};
use janus_front::xen::blkfront::{Blkfront, Setup};
use janus_front::xen::blkfront_xs::{DETAIL_NODES, Details, OFFER_NODES, Offer};
use janus_front::xen::grants::Grave;
use janus_front::xen::nodes::Nodes;
use janus_proto::xenbus::{Front, FrontStep, Handshake, XenbusState};
use janus_proto::xenstore::{Request, TransactionId};

use crate::world::{GUEST, HOST, Mapper};

const FRONT: &str = "device/vbd/51712";
const BACK: &str = "/local/domain/0/backend/vbd/5/51712";

/// The guest's half: what the kernel's bus does with a disk.
struct Guest {
    machine: Front,
    connection: ConnectionId,
    setup: Option<Setup>,
    disk: Option<Blkfront>,
    grave: Grave,
}

struct World {
    xen: &'static FakeXen,
    store: Xenstored,
    device: Device<Disk<Mapper, MemoryDisk>>,
    guest: Guest,
}

impl World {
    fn new() -> Self {
        let xen = FakeXen::new();
        let mut store = Xenstored::default();
        let dom0 = store.connect(HOST);
        // The toolstack makes the guest's home, which the guest may read.
        let (path, permissions) = ("/local/domain/5", owned_by(HOST, GUEST));
        for request in [Request::MakeDirectory(path), Request::SetPermissions { path, permissions }]
        {
            store.request(dom0, TransactionId::NONE, &request).unwrap();
        }
        let disk = Disk::new(Mapper(xen), MemoryDisk::new(128), BlkbackFeatures::default());
        let device = Device::plug(&mut store, GUEST, 51712, disk, &[], &[]).unwrap();
        let connection = store.connect(GUEST);
        let (path, token) = (format!("{BACK}/state"), "backend");
        let watch = Request::Watch { path: &path, token };
        store.request(connection, TransactionId::NONE, &watch).unwrap();
        let guest = Guest {
            machine: Front::new(Handshake::Initialised),
            connection,
            setup: None,
            disk: None,
            grave: Grave::default(),
        };
        Self { xen, store, device, guest }
    }

    fn read(&mut self, path: &str) -> Option<Vec<u8>> {
        match self.store.request(self.guest.connection, TransactionId::NONE, &Request::Read(path)) {
            Ok(Reply::Payload(value)) => Some(value),
            _ => None,
        }
    }

    fn backend_state(&mut self) -> XenbusState {
        self.read(&format!("{BACK}/state")).map_or(XenbusState::UNKNOWN, |v| XenbusState::parse(&v))
    }

    fn nodes(&mut self, names: &[&str]) -> Nodes {
        let mut nodes = Nodes::default();
        for name in names {
            if let Some(value) = self.read(&format!("{BACK}/{name}")) {
                nodes.insert(name, &value);
            }
        }
        nodes
    }

    fn write(&mut self, name: &str, value: &str) {
        let path = format!("{FRONT}/{name}");
        let write = Request::Write { path: &path, value: value.as_bytes() };
        self.store.request(self.guest.connection, TransactionId::NONE, &write).unwrap();
    }

    fn state(&mut self, state: XenbusState) {
        self.write("state", &state.0.to_string());
    }

    /// The guest's bus, until it has nothing to do.
    fn guest_turn(&mut self) {
        for _ in 0..20 {
            let state = self.backend_state();
            match self.guest.machine.backend(state) {
                FrontStep::Wait => return,
                FrontStep::Write(state) => self.state(state),
                FrontStep::Publish => {
                    let offer = Offer::read(&self.nodes(OFFER_NODES)).unwrap();
                    let setup = Setup::new(hal_of(self.xen), HOST, offer).unwrap();
                    for (name, value) in setup.publication() {
                        self.write(&name, &value);
                    }
                    self.guest.setup = Some(setup);
                    let state = self.guest.machine.published();
                    self.state(state);
                }
                FrontStep::Connect => {
                    let details = Details::read(&self.nodes(DETAIL_NODES)).unwrap();
                    let setup = self.guest.setup.take().unwrap();
                    self.guest.disk = Some(setup.connect(details, 51712, self.guest.grave.clone()));
                    let state = self.guest.machine.connected();
                    self.state(state);
                }
                FrontStep::Stop(_) => {
                    drop(self.guest.disk.take());
                    if let Some(setup) = self.guest.setup.take() {
                        setup.bury(&self.guest.grave);
                    }
                    let state = self.guest.machine.stopped();
                    self.state(state);
                }
                FrontStep::Release => {
                    self.guest.grave.empty();
                    self.guest.machine.released();
                }
            }
        }
        panic!("the guest's bus never comes to rest");
    }

    /// Both sides, until nothing changes any more.
    fn settle(&mut self) {
        for _ in 0..10 {
            self.guest_turn();
            self.device.turn(&mut self.store).unwrap();
        }
    }

    fn read_works(&mut self) {
        let buf = DmaBuf::new(self.xen, 512).unwrap();
        let disk = self.guest.disk.as_mut().unwrap();
        disk.submit(1, BlockOp::Read { sector: 0, len: 512, buf }).map_err(|_| ()).unwrap();
        disk.kick();
        self.device.driver.connected.as_mut().unwrap().serve().unwrap();
        let done = disk.complete().unwrap().unwrap();
        assert_eq!((done.id, done.status), (1, BlockStatus::Ok));
    }

    fn nothing_is_left(&self) {
        let left = (self.xen.granted(), self.xen.allocated_pages(), self.xen.open_ports());
        assert_eq!((left, self.xen.leaked_pages()), ((0, 0, 0), 0));
    }
}

#[test]
fn a_disk_connects_works_and_is_detached() {
    let mut world = World::new();
    world.settle();
    assert_eq!(world.backend_state(), XenbusState::CONNECTED);
    world.read_works();
    // `xl block-detach`, with a request on the ring.
    let buf = DmaBuf::new(world.xen, 4096).unwrap();
    let disk = world.guest.disk.as_mut().unwrap();
    disk.submit(2, BlockOp::Read { sector: 0, len: 4096, buf }).map_err(|_| ()).unwrap();
    disk.kick();
    world.device.unplug(&mut world.store).unwrap();
    world.settle();
    assert!(world.device.is_gone());
    assert_eq!(world.backend_state(), XenbusState::UNKNOWN, "the directory is gone");
    world.nothing_is_left();
}

#[test]
fn a_frontend_may_come_back() {
    let mut world = World::new();
    for round in 0..3 {
        world.settle();
        assert_eq!(world.backend_state(), XenbusState::CONNECTED, "round {round}");
        world.read_works();
        // The guest gives the device up, and starts over.
        let step = world.guest.machine.abandon();
        assert!(matches!(step, FrontStep::Stop(_)));
        drop(world.guest.disk.take());
        let state = world.guest.machine.stopped();
        world.state(state);
        world.settle();
        assert_eq!(world.backend_state(), XenbusState::CLOSED);
        world.nothing_is_left();
        world.guest.machine.reconnect();
        world.state(XenbusState::INITIALISING);
    }
}

#[test]
fn nonsense_from_the_frontend_is_answered_with_an_error() {
    for (name, value) in
        [("event-channel", "none"), ("ring-ref0", "4294967295"), ("ring-page-order", "77")]
    {
        let mut world = World::new();
        world.guest_turn();
        world.write(name, value);
        world.device.turn(&mut world.store).unwrap();
        assert_eq!(world.backend_state(), XenbusState::CLOSING, "{name}");
        let error = world.read(&format!("{BACK}/error")).unwrap();
        assert!(!error.is_empty());
        assert!(world.device.driver.connected.is_none());
        world.settle();
        assert_eq!(world.backend_state(), XenbusState::CLOSED, "{name}");
        world.nothing_is_left();
        // With the right nodes it works after all.
        world.guest.machine.reconnect();
        world.settle();
        world.read_works();
    }
}

#[test]
fn a_guest_that_is_destroyed_takes_its_ring_along() {
    let mut world = World::new();
    world.settle();
    world.read_works();
    let dom0 = world.store.connect(HOST);
    let remove = Request::Remove("/local/domain/5");
    world.store.request(dom0, TransactionId::NONE, &remove).unwrap();
    world.device.turn(&mut world.store).unwrap();
    assert!(world.device.driver.connected.is_none() && world.device.is_gone());
}

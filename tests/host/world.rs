//! One guest (domain 5) and domain 0 around a fake hypervisor and a real xenstore daemon.

use janus::memory::{GrantMapper, MapError};
use janus::xenstored::{ConnectionId, Reply, Xenstored, owned_by};
use janus_front::fake::{FakeXen, GrantFault, Mapping};
use janus_front::hal::GrantAccess;
use janus_front::xen::nodes::{Nodes, Publication};
use janus_proto::abi::xen::grant_table::GrantStatus;
use janus_proto::addr::{DomId, GrantRef};
use janus_proto::grant::Access;
use janus_proto::xenstore::{Request, TransactionId, parse_transaction_id};

pub(crate) const HOST: DomId = DomId(0);
pub(crate) const GUEST: DomId = DomId(5);

/// Domain 0's way to the guest's pages.
#[derive(Clone, Copy)]
pub(crate) struct Mapper(pub(crate) &'static FakeXen);

impl GrantMapper for Mapper {
    type Mapping = Mapping;
    fn map(&self, grants: &[GrantRef], access: Access) -> Result<Mapping, MapError> {
        let access = match access {
            Access::ReadOnly => GrantAccess::ReadOnly,
            Access::ReadWrite => GrantAccess::ReadWrite,
        };
        self.0.map_all(HOST, grants, access).map_err(|fault| {
            MapError(match fault {
                GrantFault::BadReference => GrantStatus::BAD_GNTREF,
                GrantFault::WrongDomain | GrantFault::ReadOnly => GrantStatus::PERMISSION_DENIED,
            })
        })
    }
}

/// Xenstore with the two directories of one device, as a toolstack makes them.
pub(crate) struct Store {
    store: Xenstored,
    host: ConnectionId,
    guest: ConnectionId,
    front: String,
    back: String,
}

impl Store {
    pub(crate) fn new(kind: &str, device: u32) -> Self {
        let mut store = Xenstored::default();
        let (host, guest) = (store.connect(HOST), store.connect(GUEST));
        let front = format!("/local/domain/{GUEST}/device/{kind}/{device}");
        let back = format!("/local/domain/{HOST}/backend/{kind}/{GUEST}/{device}");
        let mut world = Self { store, host, guest, front, back };
        for (path, permissions) in [
            (world.front.clone(), owned_by(GUEST, HOST)),
            (world.back.clone(), owned_by(HOST, GUEST)),
        ] {
            world.ask(world.host, &Request::MakeDirectory(&path));
            world.ask(world.host, &Request::SetPermissions { path: &path, permissions });
        }
        world
    }

    fn ask(&mut self, who: ConnectionId, request: &Request<'_>) -> Vec<u8> {
        match self.store.request(who, TransactionId::NONE, request).unwrap() {
            Reply::Done => Vec::new(),
            Reply::Payload(payload) => payload,
        }
    }

    fn read(&mut self, who: ConnectionId, path: &str) -> Option<Vec<u8>> {
        match self.store.request(who, TransactionId::NONE, &Request::Read(path)) {
            Ok(Reply::Payload(value)) => Some(value),
            _ => None,
        }
    }

    /// Domain 0 writes into the backend's directory.
    pub(crate) fn publish_back(&mut self, nodes: &[(&'static str, String)]) {
        for (name, value) in nodes {
            let path = format!("{}/{name}", self.back);
            self.ask(self.host, &Request::Write { path: &path, value: value.as_bytes() });
        }
    }

    /// The guest writes into the frontend's directory, all at once.
    pub(crate) fn publish_front(&mut self, nodes: &Publication) {
        let id = parse_transaction_id(&self.ask(self.guest, &Request::TransactionStart)).unwrap();
        for (name, value) in nodes {
            let path = format!("{}/{name}", self.front);
            let write = Request::Write { path: &path, value: value.as_bytes() };
            self.store.request(self.guest, id, &write).unwrap();
        }
        self.store.request(self.guest, id, &Request::Commit).unwrap();
    }

    /// The guest reads nodes of the backend.
    pub(crate) fn back_nodes(&mut self, names: &[&str]) -> Nodes {
        let mut nodes = Nodes::default();
        for name in names {
            let path = format!("{}/{name}", self.back);
            if let Some(value) = self.read(self.guest, &path) {
                nodes.insert(name, &value);
            }
        }
        nodes
    }

    /// Domain 0 reads a node of the frontend.
    pub(crate) fn front_node(&mut self, name: &str) -> Option<String> {
        let path = format!("{}/{name}", self.front);
        self.read(self.host, &path).map(|value| String::from_utf8(value).unwrap())
    }
}

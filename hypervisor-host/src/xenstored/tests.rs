//! The daemon as a guest and as domain 0 see it.

use janus_proto::byte_ring::{ByteRing, XENSTORE};
use janus_proto::sync::{AtomicU32, Ordering};
use janus_proto::xenstore::{
    Client, Event, ListStep, Listing, MessageType, parse_strings, parse_transaction_id,
};

use super::ring::RingServer;
use super::*;

const GUEST: DomId = DomId(5);
const NONE: TransactionId = TransactionId::NONE;

struct World {
    store: Xenstored,
    dom0: ConnectionId,
    guest: ConnectionId,
}

impl World {
    fn new() -> Self {
        let mut store = Xenstored::default();
        let dom0 = store.connect(DomId(0));
        let guest = store.connect(GUEST);
        let mut world = Self { store, dom0, guest };
        world.write(dom0, "/local/domain/5", "").unwrap();
        let path = "/local/domain/5";
        let permissions = owned_by(GUEST, DomId(0));
        world.ask(dom0, &Request::SetPermissions { path, permissions }).unwrap();
        world
    }
    fn ask(&mut self, who: ConnectionId, request: &Request<'_>) -> Result<Vec<u8>, StoreError> {
        self.ask_in(who, NONE, request)
    }
    fn ask_in(
        &mut self,
        who: ConnectionId,
        transaction: TransactionId,
        request: &Request<'_>,
    ) -> Result<Vec<u8>, StoreError> {
        self.store.request(who, transaction, request).map(|reply| match reply {
            Reply::Done => Vec::new(),
            Reply::Payload(payload) => payload,
        })
    }
    fn write(&mut self, who: ConnectionId, path: &str, value: &str) -> Result<(), StoreError> {
        self.ask(who, &Request::Write { path, value: value.as_bytes() }).map(|_| ())
    }
    fn read(&mut self, who: ConnectionId, path: &str) -> Result<String, StoreError> {
        self.ask(who, &Request::Read(path)).map(|value| String::from_utf8(value).unwrap())
    }
    fn start(&mut self, who: ConnectionId) -> TransactionId {
        parse_transaction_id(&self.ask(who, &Request::TransactionStart).unwrap()).unwrap()
    }
    fn events(&mut self, who: ConnectionId) -> Vec<String> {
        std::iter::from_fn(|| self.store.event(who))
            .map(|e| format!("{}:{}", e.token, e.path))
            .collect()
    }
}

#[test]
fn nodes_are_made_read_listed_and_removed() {
    let mut world = World::new();
    let guest = world.guest;
    world.write(guest, "data/a", "1").unwrap();
    world.ask(guest, &Request::MakeDirectory("data/b")).unwrap();
    assert_eq!(world.read(guest, "data/a").unwrap(), "1");
    assert_eq!(world.read(guest, "/local/domain/5/data/b").unwrap(), "");
    assert_eq!(world.ask(guest, &Request::Directory("data")).unwrap(), b"a\0b\0");
    world.ask(guest, &Request::MakeDirectory("data/a")).unwrap();
    assert_eq!(world.read(guest, "data/a").unwrap(), "1", "mkdir leaves what is there");
    world.ask(guest, &Request::Remove("data")).unwrap();
    assert_eq!(world.read(guest, "data/a"), Err(StoreError::NotFound));
    assert_eq!(world.ask(guest, &Request::Remove("data")), Ok(vec![]));
    assert_eq!(world.ask(guest, &Request::Remove("no/such")), Err(StoreError::NotFound));
    let dom0 = world.dom0;
    assert_eq!(world.ask(dom0, &Request::Remove("/")), Err(StoreError::Invalid));
}

#[test]
fn permissions_hide_and_protect() {
    let mut world = World::new();
    let (dom0, guest) = (world.dom0, world.guest);
    world.write(dom0, "/secret/a", "x").unwrap();
    for path in ["/secret/a", "/secret/missing", "/secret"] {
        assert_eq!(world.read(guest, path), Err(StoreError::AccessDenied), "{path}");
    }
    assert_eq!(world.write(guest, "/secret/b", ""), Err(StoreError::AccessDenied));
    assert_eq!(world.write(guest, "/local/domain/6/x", ""), Err(StoreError::AccessDenied));
    // What the backend shows the frontend.
    let (path, permissions) = ("/secret/a", owned_by(DomId(0), GUEST));
    world.ask(dom0, &Request::SetPermissions { path, permissions }).unwrap();
    assert_eq!(world.read(guest, "/secret/a").unwrap(), "x");
    assert_eq!(world.write(guest, "/secret/a", "y"), Err(StoreError::AccessDenied));
    assert_eq!(world.ask(guest, &Request::GetPermissions(path)).unwrap(), b"n0\0r5\0");
    // A guest cannot give its nodes away or take others'.
    let permissions = owned_by(DomId(0), GUEST);
    let request = Request::SetPermissions { path: "/local/domain/5", permissions };
    assert_eq!(world.ask(guest, &request), Err(StoreError::NotPermitted));
    world.write(guest, "mine", "").unwrap();
    assert_eq!(world.ask(guest, &Request::GetPermissions("mine")).unwrap(), b"n5\0r0\0");
}

#[test]
fn watches_tell_of_everything_below_that_may_be_seen() {
    let mut world = World::new();
    let (dom0, guest) = (world.dom0, world.guest);
    for (who, path, token) in
        [(guest, "data", "t"), (dom0, "/local/domain/5", "z"), (guest, "/", "all")]
    {
        world.ask(who, &Request::Watch { path, token }).unwrap();
    }
    assert_eq!(world.events(guest), ["t:data", "all:/"]);
    assert_eq!(world.events(dom0), ["z:/local/domain/5"]);
    world.write(guest, "data/a", "1").unwrap();
    assert_eq!(world.events(guest), ["t:data/a", "all:/local/domain/5/data/a"]);
    assert_eq!(world.events(dom0), ["z:/local/domain/5/data/a"]);
    world.write(dom0, "/hidden", "1").unwrap();
    assert_eq!(world.events(guest), [""; 0], "it may not read that node");
    // A removal tells of watched nodes below.
    let (path, token) = ("data/a", "deep");
    world.ask(guest, &Request::Watch { path, token }).unwrap();
    assert_eq!(world.events(guest), ["deep:data/a"]);
    world.ask(guest, &Request::Remove("data")).unwrap();
    assert_eq!(world.events(guest), ["t:data", "all:/local/domain/5/data", "deep:data/a"]);
    let (path, token) = ("data", "t");
    world.ask(guest, &Request::Unwatch { path, token }).unwrap();
    assert_eq!(world.ask(guest, &Request::Unwatch { path, token }), Err(StoreError::NotFound));
    world.ask(guest, &Request::ResetWatches).unwrap();
    world.write(guest, "data", "").unwrap();
    assert_eq!(world.events(guest), [""; 0]);
    let (path, token) = ("@releaseDomain", "r");
    world.ask(dom0, &Request::Watch { path, token }).unwrap();
    world.store.announce("@releaseDomain");
    assert_eq!(world.events(dom0).last().unwrap(), "r:@releaseDomain");
}

#[test]
fn transactions_are_isolated_and_conflicts_are_found() {
    let mut world = World::new();
    let (dom0, guest) = (world.dom0, world.guest);
    world.write(guest, "n", "1").unwrap();
    let tx = world.start(guest);
    world.ask_in(guest, tx, &Request::Write { path: "n", value: b"2" }).unwrap();
    assert_eq!(world.read(guest, "n").unwrap(), "1", "not committed");
    assert_eq!(world.ask_in(guest, tx, &Request::Read("n")).unwrap(), b"2");
    world.ask_in(guest, tx, &Request::Commit).unwrap();
    assert_eq!(world.read(guest, "n").unwrap(), "2");
    assert_eq!(world.ask_in(guest, tx, &Request::Commit), Err(StoreError::NotFound));

    for (conflict, path) in [(true, "/local/domain/5/n"), (false, "/elsewhere")] {
        let tx = world.start(guest);
        world.ask_in(guest, tx, &Request::Read("n")).unwrap();
        world.ask_in(guest, tx, &Request::Write { path: "m", value: b"" }).unwrap();
        world.write(dom0, path, "3").unwrap();
        let end = world.ask_in(guest, tx, &Request::Commit);
        assert_eq!(end == Err(StoreError::Again), conflict, "{path}: {end:?}");
        assert_eq!(world.read(guest, "m").is_ok(), !conflict);
    }
    let tx = world.start(guest);
    world.ask_in(guest, tx, &Request::Write { path: "gone", value: b"" }).unwrap();
    world.ask_in(guest, tx, &Request::Abandon).unwrap();
    assert_eq!(world.read(guest, "gone"), Err(StoreError::NotFound));
    let other = TransactionId(99);
    assert_eq!(world.ask_in(guest, other, &Request::Read("n")), Err(StoreError::NotFound));
}

#[test]
fn quotas_hold_for_guests_only() {
    let mut world = World::new();
    let (dom0, guest) = (world.dom0, world.guest);
    world.store.quota = Quota {
        nodes: 3,
        watches: 1,
        transactions: 1,
        value_bytes: 4,
        transaction_nodes: 3,
        permissions: 2,
        events: 2,
    };
    world.write(guest, "a", "1234").unwrap();
    assert_eq!(world.write(guest, "a", "12345"), Err(StoreError::NoSpace));
    world.write(guest, "b", "").unwrap();
    assert_eq!(world.write(guest, "c/d", ""), Err(StoreError::NoSpace));
    assert_eq!(world.read(guest, "c"), Err(StoreError::NotFound), "all or nothing");
    world.start(guest);
    assert_eq!(world.ask(guest, &Request::TransactionStart), Err(StoreError::NoSpace));
    let watch = |token| Request::Watch { path: "a", token };
    world.ask(guest, &watch("1")).unwrap();
    assert_eq!(world.ask(guest, &watch("1")), Err(StoreError::Exists));
    assert_eq!(world.ask(guest, &watch("2")), Err(StoreError::TooBig));
    for i in 0..20 {
        world.write(dom0, &format!("/x/{i}"), "123456").unwrap();
    }
    let entry = owned_by(GUEST, DomId(0));
    let longer = [entry.clone(), owned_by(DomId(3), DomId(4))].concat();
    let set = |permissions| Request::SetPermissions { path: "a", permissions };
    assert_eq!(world.ask(guest, &set(longer)), Err(StoreError::NoSpace));
    world.ask(guest, &set(entry)).unwrap();
}

#[test]
fn what_a_transaction_remembers_is_bounded() {
    let mut world = World::new();
    let guest = world.guest;
    world.store.quota.transaction_nodes = 10;
    let transaction = world.start(guest);
    let write = Request::Write { path: "n", value: b"x" };
    let done = (0..100).take_while(|_| world.ask_in(guest, transaction, &write).is_ok()).count();
    assert_eq!(done, 10);
    assert_eq!(world.ask_in(guest, transaction, &Request::Read("n")), Err(StoreError::NoSpace));
    assert_eq!(world.ask_in(guest, transaction, &Request::Commit), Ok(Vec::new()));
    let transaction = world.start(guest);
    let looked = (0..100)
        .take_while(|index| {
            let path = format!("absent{index}");
            world.ask_in(guest, transaction, &Request::Read(&path)) == Err(StoreError::NotFound)
        })
        .count();
    assert_eq!(looked, 10);
}

#[test]
fn nodes_are_counted_for_whoever_owns_them() {
    let mut world = World::new();
    let (dom0, guest) = (world.dom0, world.guest);
    assert_eq!(world.store.tree.count(GUEST), 1, "its home");
    world.write(guest, "a/b/c", "1").unwrap();
    assert_eq!(world.store.tree.count(GUEST), 4);
    let permissions = owned_by(DomId(7), GUEST);
    let path = "/local/domain/5/a/b";
    world.ask(dom0, &Request::SetPermissions { path, permissions }).unwrap();
    assert_eq!((world.store.tree.count(GUEST), world.store.tree.count(DomId(7))), (3, 1));
    let transaction = world.start(guest);
    world.ask_in(guest, transaction, &Request::Write { path: "t", value: b"" }).unwrap();
    world.ask_in(guest, transaction, &Request::Abandon).unwrap();
    assert_eq!(world.store.tree.count(GUEST), 3, "what was not committed does not count");
    world.ask(dom0, &Request::Remove("/local/domain/5/a")).unwrap();
    assert_eq!((world.store.tree.count(GUEST), world.store.tree.count(DomId(7))), (1, 0));
}

#[test]
fn a_connection_that_takes_no_events_is_bounded() {
    let mut world = World::new();
    let (dom0, guest) = (world.dom0, world.guest);
    world.store.quota.events = 100;
    world.ask(guest, &Request::Watch { path: "data", token: "t" }).unwrap();
    assert_eq!(world.events(guest), ["t:data"]);
    for _ in 0..50 {
        world.write(dom0, "/local/domain/5/data/same", "1").unwrap();
    }
    assert_eq!(world.events(guest), ["t:data/same"], "one that waits says it all");
    for index in 0..500 {
        world.write(dom0, &format!("/local/domain/5/data/{index}"), "1").unwrap();
    }
    assert_eq!(world.events(guest).len(), 100);
}

#[test]
fn a_guest_that_asks_without_end_lets_others_have_their_turn() {
    let mut wire = Wire::new();
    // More than are answered at once, in a ring that is full again as soon as it is read.
    let request = Request::Read("/");
    for _ in 0..200 {
        wire.client.request(NONE, &request).unwrap();
    }
    let (mut served, mut answered) = (0, 0);
    while answered < 200 {
        let count = wire.front.write(wire.client.outgoing()).unwrap();
        wire.client.sent(count);
        wire.server.serve(&mut wire.world.store);
        let mut buf = [0; 1024];
        let count = wire.front.read(&mut buf).unwrap();
        wire.client.received(&buf[..count]);
        let before = answered;
        while wire.client.event().unwrap().is_some() {
            answered += 1;
        }
        assert!(answered - before <= 64 + 64);
        served += 1;
        assert!(served < 1000, "it goes on");
    }
}

/// A guest's client and the daemon over one page.
struct Wire {
    world: World,
    client: Client,
    front: ByteRing<&'static [AtomicU32]>,
    server: RingServer<&'static [AtomicU32]>,
    page: &'static [AtomicU32],
}

impl Wire {
    fn new() -> Self {
        let page: &'static [AtomicU32] =
            Box::leak((0..1024).map(|_| AtomicU32::new(0)).collect::<Box<[_]>>());
        let world = World::new();
        let front = ByteRing::front(page, XENSTORE).unwrap();
        let server = RingServer::new(page, world.guest).unwrap();
        Self { world, client: Client::default(), front, server, page }
    }
    fn turn(&mut self) {
        for _ in 0..200 {
            let count = self.front.write(self.client.outgoing()).unwrap();
            self.client.sent(count);
            self.server.serve(&mut self.world.store);
            let mut buf = [0; 700];
            let count = self.front.read(&mut buf).unwrap();
            self.client.received(&buf[..count]);
        }
    }
    fn ask(&mut self, request: &Request<'_>) -> Result<Vec<u8>, StoreError> {
        let id = self.client.request(NONE, request).unwrap();
        self.turn();
        while let Some(event) = self.client.event().unwrap() {
            match event {
                Event::Reply { id: answered, result } if answered == id => return result,
                _ => {}
            }
        }
        panic!("no answer");
    }
}

#[test]
fn a_guest_reads_a_long_list_in_parts_over_the_ring() {
    let mut wire = Wire::new();
    let guest = wire.world.guest;
    let names: Vec<_> = (0..600).map(|i| format!("name-{i:05}")).collect();
    for name in &names {
        wire.world.write(guest, &format!("long/{name}"), "").unwrap();
    }
    assert_eq!(wire.ask(&Request::Directory("long")), Err(StoreError::TooBig));
    let mut listing = Listing::new("long");
    let got = loop {
        let request = listing.request();
        let reply = match &request {
            Request::Directory(_) => wire.ask(&Request::Directory("long")),
            Request::DirectoryPart { offset, .. } => {
                wire.ask(&Request::DirectoryPart { path: "long", offset: *offset })
            }
            other => panic!("{other:?}"),
        };
        let result = reply.as_deref().map_err(|error| *error);
        if let ListStep::Done(names) = listing.reply(result).unwrap() {
            break names;
        }
    };
    assert_eq!(got, names);
    let short = wire.ask(&Request::DirectoryPart { path: "long/name-00000", offset: 0 }).unwrap();
    assert!(short.ends_with(b"\0\0") && parse_strings(&short).is_ok());
}

#[test]
fn watch_events_arrive_over_the_ring() {
    let mut wire = Wire::new();
    let (_, token) = wire.client.watch("device").unwrap();
    wire.turn();
    let dom0 = wire.world.dom0;
    wire.world.write(dom0, "/local/domain/5/device/vbd", "1").unwrap();
    wire.turn();
    let mut paths = Vec::new();
    while let Some(event) = wire.client.event().unwrap() {
        if let Event::Changed { token: of, path } = event {
            assert_eq!(of, token);
            paths.push(path);
        }
    }
    assert_eq!(paths, ["device", "device/vbd"]);
}

#[test]
fn a_guest_that_breaks_the_protocol_is_cut_off() {
    use zerocopy::IntoBytes as _;
    // A payload of 5000 bytes; and an index out of range.
    let mut wire = Wire::new();
    let header = [MessageType::READ.0, 1, 0, 5000];
    wire.front.write(header.as_bytes()).unwrap();
    assert!(wire.server.serve(&mut wire.world.store) && wire.server.is_broken());
    assert_eq!(wire.page[xs_error()].load(Ordering::Relaxed), 3);
    assert!(!wire.server.serve(&mut wire.world.store));

    let mut wire = Wire::new();
    wire.page[2052 / 4].store(5000, Ordering::Relaxed);
    wire.server.serve(&mut wire.world.store);
    assert!(wire.server.is_broken());
    assert_eq!(wire.page[xs_error()].load(Ordering::Relaxed), 2);
}

fn xs_error() -> usize {
    janus_proto::abi::xen_io::xs_wire::ERROR / 4
}

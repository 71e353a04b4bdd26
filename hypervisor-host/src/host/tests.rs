//! A guest made of pages and handlers, and what its daemons do for it.

use std::collections::HashMap;
use std::ops::Deref;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use janus_proto::abi::xen::Errno;
use janus_proto::abi::xen::grant_table::GrantStatus;
use janus_proto::addr::{DomId, GrantRef, Port};
use janus_proto::byte_ring::{ByteRing, CONSOLE, XENSTORE};
use janus_proto::grant::Access;
use janus_proto::xenstore::{Decoder, Message, MessageType, Request, TransactionId};

use super::*;
use crate::memory::{GrantMapper, MapError};
use crate::pv::events::Handler;
use crate::storage::MemoryDisk;

/// A page of a guest.
#[derive(Clone, Debug)]
pub(super) struct Page(Arc<Vec<AtomicU32>>);

impl Page {
    fn new() -> Self {
        Self(Arc::new((0..1024).map(|_| AtomicU32::new(0)).collect()))
    }
}

impl Deref for Page {
    type Target = [AtomicU32];
    fn deref(&self) -> &[AtomicU32] {
        &self.0
    }
}

/// A guest with a few pages, all granted: reference `n` is page `n`.
#[derive(Clone)]
pub(super) struct FakeGuest(Arc<Inner>);

struct Inner {
    pages: Vec<Page>,
    ports: Mutex<HashMap<u32, Handler>>,
    last: AtomicUsize,
    heard: Mutex<HashMap<u32, usize>>,
}

impl FakeGuest {
    pub(super) fn new() -> Self {
        Self(Arc::new(Inner {
            pages: (0..16).map(|_| Page::new()).collect(),
            ports: Mutex::default(),
            last: AtomicUsize::new(0),
            heard: Mutex::default(),
        }))
    }
    pub(super) fn page(&self, index: usize) -> Page {
        self.0.pages[index].clone()
    }
    /// The guest sends an event.
    pub(super) fn send(&self, port: u32) {
        let handler = self.0.ports.lock().unwrap().get(&port).cloned();
        handler.expect("bound")();
    }
    /// Events since the last call.
    pub(super) fn heard(&self, port: u32) -> usize {
        self.0.heard.lock().unwrap().remove(&port).unwrap_or(0)
    }
}

impl GrantMapper for FakeGuest {
    type Mapping = Page;
    fn map(&self, grants: &[GrantRef], _access: Access) -> Result<Page, MapError> {
        let [GrantRef(number)] = grants else { return Err(MapError(GrantStatus::GENERAL_ERROR)) };
        let page = self.0.pages.get(*number as usize).cloned();
        page.ok_or(MapError(GrantStatus::BAD_GNTREF))
    }
}

pub(super) struct FakePort(FakeGuest, u32);

impl Drop for FakePort {
    fn drop(&mut self) {
        let handler = self.0.0.ports.lock().unwrap().remove(&self.1);
        drop(handler);
    }
}

impl Notify for FakePort {
    fn notify(&self) {
        *self.0.0.heard.lock().unwrap().entry(self.1).or_insert(0) += 1;
    }
    fn guest_port(&self) -> Port {
        Port(self.1)
    }
}

impl Guest for FakeGuest {
    type Grants = Self;
    type Port = FakePort;
    fn id(&self) -> DomId {
        DomId(7)
    }
    fn grants(&self) -> Self {
        self.clone()
    }
    fn bind(&self, handler: Handler) -> Result<FakePort, Errno> {
        let port = u32::try_from(self.0.last.fetch_add(1, Ordering::SeqCst) + 1).unwrap();
        self.bind_interdomain(Port(port), handler)
    }
    fn bind_interdomain(&self, port: Port, handler: Handler) -> Result<FakePort, Errno> {
        self.0.ports.lock().unwrap().insert(port.0, handler);
        Ok(FakePort(self.clone(), port.0))
    }
}

pub(super) fn devices(guest: &FakeGuest, console: Vec<Endpoint>) -> Host<FakeGuest> {
    let identity = Identity {
        name: "test".into(),
        uuid: [0x12; 16],
        memory_kib: 65_536,
        max_memory_kib: 65_536,
        vcpus: 2,
        rings: (78, 77),
    };
    Host::with_console(guest, &identity, console).unwrap()
}

/// The guest's xenstore client.
struct Client {
    guest: FakeGuest,
    ring: ByteRing<Page>,
    decoder: Decoder,
    events: Vec<Vec<u8>>,
}

impl Client {
    fn new(guest: &FakeGuest) -> Self {
        let ring = ByteRing::front(guest.page(1), XENSTORE).unwrap();
        Self { guest: guest.clone(), ring, decoder: Decoder::default(), events: Vec::new() }
    }

    fn pump(&mut self) -> Option<Message> {
        let mut buf = [0; 1024];
        let count = self.ring.read(&mut buf).unwrap();
        self.decoder.push(&buf[..count]);
        while let Some(message) = self.decoder.take().unwrap() {
            if message.kind != MessageType::WATCH_EVENT {
                return Some(message);
            }
            self.events.push(message.payload);
        }
        None
    }

    fn ask(&mut self, request: &Request<'_>) -> (MessageType, Vec<u8>) {
        let (kind, payload) = (request.kind(), request.payload());
        let transaction = TransactionId::NONE;
        let message = Message { kind, request_id: 1, transaction, payload };
        let mut bytes = Vec::new();
        message.encode(&mut bytes).unwrap();
        assert_eq!(self.ring.write(&bytes).unwrap(), bytes.len());
        self.guest.send(1);
        for _ in 0..10 {
            if let Some(answer) = self.pump() {
                return (answer.kind, answer.payload);
            }
        }
        panic!("no answer");
    }

    fn read(&mut self, path: &str) -> Option<String> {
        let (kind, payload) = self.ask(&Request::Read(path));
        (kind == MessageType::READ).then(|| String::from_utf8(payload).unwrap())
    }

    fn write(&mut self, path: &str, value: &str) {
        let (kind, _) = self.ask(&Request::Write { path, value: value.as_bytes() });
        assert_eq!(kind, MessageType::WRITE, "{path}");
    }
}

#[test]
fn the_home_is_as_a_guest_expects() {
    let guest = FakeGuest::new();
    let _devices = devices(&guest, Vec::new());
    let mut client = Client::new(&guest);
    for (path, value) in [
        ("name", "test"),
        ("domid", "7"),
        ("vm", "/vm/12121212-1212-1212-1212-121212121212"),
        ("memory/target", "65536"),
        ("console/port", "2"),
        ("console/ring-ref", "78"),
        ("store/port", "1"),
        ("cpu/1/availability", "online"),
    ] {
        assert_eq!(client.read(path).as_deref(), Some(value), "{path}");
    }
    assert_eq!(client.read("cpu/2/availability"), None);
    assert_eq!(client.ask(&Request::Write { path: "name", value: b"x" }).0, MessageType::ERROR);
    client.write("data/mine", "x");
    client.write("control/shutdown", "");
    assert_eq!(
        client.read("/vm/12121212-1212-1212-1212-121212121212/name").as_deref(),
        Some("test")
    );
}

#[test]
fn a_shutdown_request_reaches_the_guest() {
    let guest = FakeGuest::new();
    let devices = devices(&guest, Vec::new());
    let mut client = Client::new(&guest);
    client.ask(&Request::Watch { path: "control/shutdown", token: "t" });
    let _ = (client.pump(), guest.heard(1));
    client.events.clear();
    devices.request_shutdown("reboot").unwrap();
    assert!(guest.heard(1) > 0, "the guest sleeps");
    assert!(client.pump().is_none());
    assert_eq!(client.events, [b"control/shutdown\0t\0".to_vec()]);
    assert_eq!(client.read("control/shutdown").as_deref(), Some("reboot"));
}

#[test]
fn a_disk_comes_and_goes() {
    let guest = FakeGuest::new();
    let devices = devices(&guest, Vec::new());
    let mut client = Client::new(&guest);
    let disk = || Box::new(MemoryDisk::new(64));
    devices.plug_disk(51712, disk()).unwrap();
    assert!(matches!(devices.plug_disk(51712, disk()), Err(HostError::Exists("vbd", 51712))));
    let front = "device/vbd/51712";
    let back = client.read(&format!("{front}/backend")).unwrap();
    assert_eq!(back, "/local/domain/0/backend/vbd/7/51712");
    assert_eq!(client.read(&format!("{back}/state")).as_deref(), Some("2"));
    assert_eq!(client.read(&format!("{back}/mode")).as_deref(), Some("w"));
    // Two rings, on pages 4 and 5.
    client.write(&format!("{front}/multi-queue-num-queues"), "2");
    for queue in 0..2 {
        let page = guest.page(4 + queue);
        janus_proto::ring::Front::<_, 28>::new(page).unwrap();
        client.write(&format!("{front}/queue-{queue}/ring-ref"), &(4 + queue).to_string());
        client.write(&format!("{front}/queue-{queue}/event-channel"), &(20 + queue).to_string());
    }
    client.write(&format!("{front}/state"), "3");
    assert_eq!(client.read(&format!("{back}/state")).as_deref(), Some("4"));
    assert_eq!(client.read(&format!("{back}/sectors")).as_deref(), Some("64"));
    client.write(&format!("{front}/state"), "4");
    guest.send(20);
    guest.send(21);
    devices.unplug("vbd", 51712).unwrap();
    assert_eq!(client.read(&format!("{back}/state")).as_deref(), Some("5"));
    client.write(&format!("{front}/state"), "6");
    assert!(!devices.has("vbd", 51712));
    assert_eq!((client.read(&format!("{back}/state")), client.read(front)), (None, None));
    assert!(guest.0.ports.lock().unwrap().len() == 2, "its event channels were closed");
    assert!(matches!(devices.unplug("vbd", 51712), Err(HostError::NoDevice)));
}

#[test]
fn a_console_keeps_what_nobody_reads_yet_and_loses_nothing() {
    use std::io::{Read as _, Write as _};
    let directory = tempfile::tempdir().unwrap();
    let (path, file) = (directory.path().join("console"), directory.path().join("log"));
    let guest = FakeGuest::new();
    let endpoints = vec![Endpoint::Socket(path.clone()), Endpoint::File(file.clone())];
    let devices = devices(&guest, endpoints);
    let mut ring = ByteRing::front(guest.page(0), CONSOLE).unwrap();
    let text: Vec<u8> = (0..40_000_u32).map(|i| (i % 251) as u8).collect();
    let mut rest = text.as_slice();
    while !rest.is_empty() {
        let count = ring.write(rest).unwrap();
        rest = &rest[count..];
        guest.send(2);
    }
    let mut client = std::os::unix::net::UnixStream::connect(&path).unwrap();
    let mut back = vec![0; text.len()];
    client.read_exact(&mut back).unwrap();
    assert!(back == text, "the client reads all that was printed");
    assert!(std::fs::read(&file).unwrap() == text, "and so has the file");
    client.write_all(b"typed").unwrap();
    let mut typed = Vec::new();
    while typed.len() < 5 {
        let mut buf = [0; 16];
        let count = ring.read(&mut buf).unwrap();
        typed.extend_from_slice(&buf[..count]);
        std::thread::yield_now();
    }
    assert_eq!(typed, b"typed");
    // A second client after the first.
    drop(client);
    let mut client = std::os::unix::net::UnixStream::connect(&path).unwrap();
    ring.write(b"again").unwrap();
    guest.send(2);
    let mut back = [0; 5];
    client.read_exact(&mut back).unwrap();
    assert_eq!((&back, devices.console().lost()), (b"again", 0));
    drop(devices);
    assert!(!path.exists());
}

#[test]
fn the_store_can_be_reached_over_a_socket() {
    use std::io::{Read as _, Write as _};
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("store");
    let guest = FakeGuest::new();
    let devices = devices(&guest, Vec::new());
    devices.listen_store(&path).unwrap();
    let mut socket = std::os::unix::net::UnixStream::connect(&path).unwrap();
    let mut decoder = Decoder::default();
    let mut next = |socket: &mut std::os::unix::net::UnixStream| {
        loop {
            if let Some(message) = decoder.take().unwrap() {
                return (message.kind, message.payload);
            }
            let mut buf = [0; 256];
            let count = socket.read(&mut buf).unwrap();
            assert!(count > 0, "the daemon hung up");
            decoder.push(&buf[..count]);
        }
    };
    let send = |socket: &mut std::os::unix::net::UnixStream, request: &Request<'_>| {
        let (kind, payload) = (request.kind(), request.payload());
        let transaction = TransactionId::NONE;
        let mut bytes = Vec::new();
        Message { kind, request_id: 1, transaction, payload }.encode(&mut bytes).unwrap();
        socket.write_all(&bytes).unwrap();
    };
    send(&mut socket, &Request::Read("/local/domain/7/name"));
    assert_eq!(next(&mut socket), (MessageType::READ, b"test".to_vec()));
    let path_of_data = "/local/domain/7/data";
    send(&mut socket, &Request::Watch { path: path_of_data, token: "t" });
    let mut first = [next(&mut socket).0, next(&mut socket).0];
    first.sort_by_key(|kind| kind.0);
    assert_eq!(first, [MessageType::WATCH, MessageType::WATCH_EVENT]);
    // What the guest does is told to the client, and what the client writes is told to the guest.
    let mut client = Client::new(&guest);
    client.write("data/x", "1");
    let event = (MessageType::WATCH_EVENT, b"/local/domain/7/data/x\0t\0".to_vec());
    assert_eq!(next(&mut socket), event);
    send(&mut socket, &Request::Write { path: "/local/domain/7/data/y", value: b"2" });
    while next(&mut socket).0 != MessageType::WRITE {}
    assert_eq!(client.read("data/y").as_deref(), Some("2"));
    // A client that breaks the protocol is alone with it.
    socket.write_all(&[0xff; 64]).unwrap();
    let _ = socket.read_to_end(&mut Vec::new());
    assert_eq!(client.read("data/y").as_deref(), Some("2"));
    drop(devices);
    assert!(!path.exists());
}

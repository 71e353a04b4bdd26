//! A server, its clients, and clients that break the rules.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};

use super::*;
use crate::control::client::{ClientError, Connection};
use crate::control::runtime::Directory;

/// Something that remembers what was typed, eight bytes at a time.
#[derive(Default)]
struct Fake {
    typed: Mutex<Vec<u8>>,
}

impl Subject for Fake {
    fn answer(&self, request: &Request) -> Result<Value, String> {
        match request {
            Request::Pause => Ok(json!({})),
            Request::Memory { mib } => Ok(json!({ "mib": mib })),
            _ => Err("not today".into()),
        }
    }
    fn type_in(&self, bytes: &[u8]) -> usize {
        let taken = bytes.len().min(8);
        self.typed.lock().unwrap().extend(&bytes[..taken]);
        taken
    }
}

struct World {
    place: tempfile::TempDir,
    subject: Arc<Fake>,
    viewers: Arc<Viewers>,
    journal: Arc<Journal>,
    events: Arc<EventLoop>,
    server: Option<Server>,
    _claim: crate::control::runtime::Claim,
}

fn world() -> World {
    let place = tempfile::tempdir().unwrap();
    let directory = Directory::open_at(&place.path().join("d")).unwrap();
    let claim = directory.claim("guest").unwrap();
    let (subject, viewers) = (Arc::new(Fake::default()), Arc::new(Viewers::default()));
    let (journal, events) = (Arc::new(Journal::default()), Arc::new(EventLoop::new().unwrap()));
    let server = Server::start(
        &claim.listener,
        &events,
        subject.clone(),
        Arc::clone(&viewers),
        Arc::clone(&journal),
    );
    let server = Some(server.unwrap());
    World { place, subject, viewers, journal, events, server, _claim: claim }
}

impl World {
    fn connect(&self) -> Connection {
        let directory = Directory::open_at(&self.place.path().join("d")).unwrap();
        Connection::open(&directory.find("g").unwrap()).unwrap()
    }
    fn stream(&self) -> UnixStream {
        UnixStream::connect(self.place.path().join("d/guest.sock")).unwrap()
    }
}

#[test]
fn requests_are_answered_one_after_another() {
    let world = world();
    let mut connection = world.connect();
    connection.ask::<Value>(&Request::Pause).unwrap();
    let memory: Value = connection.ask(&Request::Memory { mib: Some(7) }).unwrap();
    assert_eq!(memory["mib"], 7);
    let refused = connection.ask::<Value>(&Request::Stop).unwrap_err();
    assert!(matches!(refused, ClientError::Refused(why) if why == "not today"));
}

#[test]
fn nonsense_is_answered_and_endless_nonsense_is_cut_off() {
    let world = world();
    let mut stream = world.stream();
    stream.write_all(b"{\"request\":\"fly\"}\nx\n").unwrap();
    let mut lines = BufReader::new(stream.try_clone().unwrap()).lines();
    for _ in 0..2 {
        assert!(lines.next().unwrap().unwrap().contains("\"error\":\"this is no request"));
    }
    let mut stream = world.stream();
    let _ = stream.write_all(&vec![b'x'; LONGEST * 2]);
    let mut rest = Vec::new();
    let _ = stream.read_to_end(&mut rest);
    assert!(rest.is_empty());
    world.connect().ask::<Value>(&Request::Pause).unwrap();
}

#[test]
fn several_see_the_console_and_what_each_types_arrives_whole() {
    let world = world();
    world.viewers.print(b"earlier ");
    let open = || {
        let mut connection = world.connect();
        connection.ask::<Value>(&Request::Console).unwrap();
        connection.into_inner()
    };
    let mut both = [open(), open()];
    world.viewers.print(b"later");
    for (early, stream) in &mut both {
        let mut seen = std::mem::take(early);
        while seen.len() < 13 {
            let mut buf = [0; 32];
            let count = stream.read(&mut buf).unwrap();
            assert!(count > 0, "hung up");
            seen.extend(&buf[..count]);
        }
        assert_eq!(seen, b"earlier later");
    }
    let [(_, mut first), (_, second)] = both;
    drop(second);
    first.write_all(b"more than eight bytes").unwrap();
    let server = world.server.as_ref().unwrap();
    while world.subject.typed.lock().unwrap().len() < 21 {
        if server.has_backlog() {
            server.pump();
        }
        std::thread::yield_now();
    }
    assert_eq!(*world.subject.typed.lock().unwrap(), b"more than eight bytes");
}

#[test]
fn events_and_the_end_reach_those_who_wait() {
    let mut world = world();
    world.journal.add(Event::Paused);
    let mut follower = world.connect();
    follower.ask::<Value>(&Request::Events).unwrap();
    world.journal.add(Event::Resumed);
    for name in ["paused", "resumed"] {
        let line: Value = serde_json::from_str(&follower.line().unwrap().unwrap()).unwrap();
        assert_eq!(line["event"], name);
    }
    let mut waiter = world.connect();
    let asked = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let wait = scope.spawn(|| waiter.ask::<Exit>(&Request::Wait));
        scope.spawn(|| {
            // Until the request has arrived there is nobody to answer.
            while !asked.load(Ordering::SeqCst) {
                let clients = world.server.as_ref().unwrap().shared.lock();
                asked.store(clients.values().any(|c| c.mode == Mode::Wait), Ordering::SeqCst);
            }
            world.server.as_ref().unwrap().ended(&Exit { reason: "crash".into(), code: 6 });
        });
        assert_eq!(wait.join().unwrap().unwrap().code, 6);
    });
    world.server = None;
    assert!(follower.line().unwrap().is_none(), "the connection ends with the guest");
    drop(world.events);
}

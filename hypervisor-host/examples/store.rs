//! How fast the xenstore daemon answers over a ring page, with both ends on one thread: `store [SECONDS]`.

use std::sync::atomic::AtomicU32;
use std::time::{Duration, Instant};

use janus::xenstored::ring::RingServer;
use janus::xenstored::{Quota, Xenstored};
use janus_proto::addr::DomId;
use janus_proto::byte_ring::{ByteRing, XENSTORE};
use janus_proto::xenstore::{Message, Request, TransactionId, parse_transaction_id};

type Page<'a> = &'a [AtomicU32];

struct World<'a> {
    store: Xenstored,
    server: RingServer<Page<'a>>,
    ring: ByteRing<Page<'a>>,
}

impl World<'_> {
    fn ask(&mut self, transaction: TransactionId, request: &Request<'_>) -> Vec<u8> {
        let mut bytes = Vec::new();
        let (kind, payload) = (request.kind(), request.payload());
        let message = Message { kind, request_id: 1, transaction, payload };
        message.encode(&mut bytes).expect("short enough");
        self.ring.write(&bytes).expect("a sane ring");
        self.server.serve(&mut self.store);
        let mut buf = [0; 1024];
        let count = self.ring.read(&mut buf).expect("a sane ring");
        // The header is 16 bytes long.
        buf.get(16..count).unwrap_or_default().to_vec()
    }
}

fn main() {
    let seconds = std::env::args().nth(1).and_then(|text| text.parse().ok()).unwrap_or(1.0);
    let time = Duration::from_secs_f64(seconds);
    let page: Vec<_> = (0..1024).map(|_| AtomicU32::new(0)).collect();
    let mut store = Xenstored::new(Quota::default());
    let guest = store.connect(DomId(0));
    let server = RingServer::new(&*page, guest).expect("an empty page");
    let ring = ByteRing::front(&*page, XENSTORE).expect("an empty page");
    let mut world = World { store, server, ring };
    let path = "/local/domain/5/data/bench";
    let none = TransactionId::NONE;
    let write = Request::Write { path, value: b"0123456789abcdef" };
    let mut measure = |name: &str, action: &mut dyn FnMut(&mut World<'_>)| {
        let (start, mut count) = (Instant::now(), 0_u32);
        while start.elapsed() < time {
            for _ in 0..64 {
                action(&mut world);
            }
            count += 64;
        }
        println!("{name:24} {:10.0}/s", f64::from(count) / start.elapsed().as_secs_f64());
    };
    measure("write", &mut |world| drop(world.ask(none, &write)));
    measure("read", &mut |world| drop(world.ask(none, &Request::Read(path))));
    measure("transaction, 4 writes", &mut |world| {
        let answer = world.ask(none, &Request::TransactionStart);
        let id = parse_transaction_id(&answer).expect("a transaction");
        for _ in 0..4 {
            world.ask(id, &write);
        }
        world.ask(id, &Request::Commit);
    });
}

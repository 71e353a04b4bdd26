//! What is fuzzed: functions of bytes that must neither panic nor break the rules they assert.
//!
//! Bytes are read as a script: a few small numbers choose what happens next. The same functions are run by
//! libFuzzer (`tests/fuzz`) and, with a fixed random script, by `cargo test` (`tests/host/fuzz.rs`).

#[path = "pv_memory.rs"]
mod pv_memory;
#[path = "virtio.rs"]
mod virtio;

use std::rc::Rc;
use std::sync::Arc;

use janus::blkback::{Blkback, BlkbackFeatures, Frontend};
use janus::memory::{GrantMapper, MapError};
use janus::netback::{self, Cable, Frame, NetBackend as _, Netback};
use janus::storage::MemoryDisk;
use janus::usernet::{self, UserNet};
use janus::xenstored::Xenstored;
use janus::xenstored::ring::RingServer;
use janus_proto::abi::xen::grant_table::GrantStatus;
use janus_proto::addr::{DomId, GrantRef, Port};
use janus_proto::byte_ring::{ByteRing, CONSOLE, XENSTORE};
use janus_proto::grant::Access;
use janus_proto::ring::{Back, Front};
use janus_proto::sync::{AtomicU32, Ordering};
use janus_proto::xenstore::{Client, Listing, MessageType, Request, Server, TransactionId};

/// A target: its name and what it does with an input.
pub type Target = (&'static str, fn(&[u8]));

/// All of them.
pub const TARGETS: &[Target] = &[
    ("ring", ring),
    ("byte_ring", byte_ring),
    ("xenstore_server", xenstore_server),
    ("xenstore_client", xenstore_client),
    ("blkback", blkback),
    ("netback", netback),
    ("usernet", usernet),
    ("page_tables", page_tables),
    ("kernel_image", kernel_image),
    ("virtio", virtio),
];

/// Reads an input as numbers; zeroes when it is used up.
struct Script<'a>(&'a [u8]);

impl Script<'_> {
    fn is_over(&self) -> bool {
        self.0.is_empty()
    }
    fn byte(&mut self) -> u8 {
        let (&first, rest) = self.0.split_first().unwrap_or((&0, &[]));
        self.0 = rest;
        first
    }
    fn word(&mut self) -> u32 {
        u32::from_le_bytes(std::array::from_fn(|_| self.byte()))
    }
    /// Often a small number, so that indices stay near the truth.
    fn index(&mut self) -> u32 {
        match self.byte() {
            255 => self.word(),
            small => u32::from(small).wrapping_sub(8),
        }
    }
    fn bytes(&mut self, len: usize) -> Vec<u8> {
        let (taken, rest) = self.0.split_at(len.min(self.0.len()));
        self.0 = rest;
        taken.to_vec()
    }
}

fn words(count: usize) -> Rc<[AtomicU32]> {
    (0..count).map(|_| AtomicU32::new(0)).collect()
}

fn scribble(memory: &[AtomicU32], word: usize, value: u32) {
    if let Some(word) = memory.get(word) {
        word.store(value, Ordering::Relaxed);
    }
}

/// Both ends of a request ring while a third party writes anywhere.
pub fn ring(input: &[u8]) {
    let mut script = Script(input);
    let memory = words(16 + 8 * 2);
    let start = script.index();
    let mut front = Front::<_, 2>::starting_at(memory.clone(), start).expect("there is room");
    let mut back = Back::<_, 2>::attach(memory.clone()).expect("the front end made it");
    let (mut pushed, mut popped, mut taken, mut answered) = (0_u32, 0_u32, 0_u32, 0_u32);
    while !script.is_over() {
        match script.byte() % 9 {
            0 => pushed += u32::from(front.push(&[1_u32; 2]).is_ok()),
            1 => drop(front.publish()),
            2 => popped += u32::from(matches!(front.pop::<[u32; 2]>(), Ok(Some(_)))),
            3 => drop(front.final_check_for_responses()),
            4 => taken += u32::from(matches!(back.pop::<[u32; 2]>(), Ok(Some(_)))),
            5 => answered += u32::from(back.push(&[1_u32; 2]).is_ok()),
            6 => drop(back.publish()),
            7 => drop(back.final_check_for_requests()),
            _ => {
                let word = usize::from(script.byte() % 32);
                scribble(&memory, word, start.wrapping_add(script.index()));
            }
        }
        assert!(popped <= pushed && pushed - popped <= 8, "the front end lost count");
        assert!(answered <= taken && taken - answered <= 8, "the back end lost count");
    }
}

/// Both ends of a console page while a third party writes its indices.
pub fn byte_ring(input: &[u8]) {
    let mut script = Script(input);
    let page = words(1024);
    let mut front = ByteRing::front(page.clone(), CONSOLE).expect("a new page");
    let mut back = ByteRing::back(page.clone(), CONSOLE).expect("a new page");
    while !script.is_over() {
        let mut buf = vec![7; usize::from(script.byte()) * 4];
        let done = match script.byte() % 5 {
            0 => front.write(&buf),
            1 => back.write(&buf),
            2 => front.read(&mut buf),
            3 => back.read(&mut buf),
            _ => {
                scribble(&page, 768 + usize::from(script.byte() % 4), script.index());
                continue;
            }
        };
        assert!(done.is_err() || done.is_ok_and(|done| done <= buf.len()));
    }
}

/// A guest that sends anything to the daemon; every answer must be one that a client understands.
pub fn xenstore_server(input: &[u8]) {
    let mut script = Script(input);
    let page = words(1024);
    let mut store = Xenstored::default();
    let dom0 = store.connect(DomId(0));
    let home = Request::MakeDirectory("/local/domain/7/device");
    store.request(dom0, TransactionId::NONE, &home).expect("domain 0 may");
    let connection = store.connect(DomId(7));
    let mut server = RingServer::new(page.clone(), connection).expect("a new page");
    let mut guest = ByteRing::front(page.clone(), XENSTORE).expect("a new page");
    let mut answers = Server::default();
    while !script.is_over() {
        match script.byte() % 8 {
            0 => scribble(&page, 512 + usize::from(script.byte() % 7), script.index()),
            1 => {
                let len = usize::from(script.byte());
                let _ = guest.write(&script.bytes(len));
            }
            kind => {
                // A message with an honest header and any payload.
                let kind = if kind < 7 { u32::from(script.byte() % 24) } else { script.word() };
                let len = usize::from(script.byte());
                let payload = script.bytes(len);
                let transaction = u32::from(script.byte() % 3);
                let len = u32::try_from(payload.len()).unwrap_or(0);
                for word in [kind, 1, transaction, len] {
                    let _ = guest.write(&word.to_ne_bytes());
                }
                let _ = guest.write(&payload);
                let _ = Request::parse(MessageType(kind), &payload);
            }
        }
        server.serve(&mut store);
        let mut buf = [0; 1024];
        let count = guest.read(&mut buf).unwrap_or(0);
        // The framing of answers is that of requests.
        answers.received(buf.get(..count).unwrap_or_default());
        while answers.request().is_ok_and(|message| message.is_some()) {}
    }
}

/// A daemon that answers anything to a guest.
pub fn xenstore_client(input: &[u8]) {
    let mut script = Script(input);
    let mut client = Client::default();
    let mut listing = Listing::new("device");
    while !script.is_over() {
        match script.byte() % 5 {
            0 => drop(client.request(TransactionId::NONE, &Request::Read("a"))),
            1 => drop(client.request(TransactionId::NONE, &Request::TransactionStart)),
            2 => drop(client.watch("device")),
            3 => {
                let len = usize::from(script.byte());
                let payload = script.bytes(len);
                let len = u32::try_from(payload.len()).unwrap_or(0);
                let (kind, id) = (u32::from(script.byte() % 24), u32::from(script.byte() % 8));
                for word in [kind, id, 0, len] {
                    client.received(&word.to_ne_bytes());
                }
                client.received(&payload);
                let _ = listing.reply(Ok(&payload));
            }
            _ => {
                let len = usize::from(script.byte());
                client.received(&script.bytes(len));
            }
        }
        let queued = client.outgoing().len();
        client.sent(queued);
        for _ in 0..100 {
            if !client.event().is_ok_and(|event| event.is_some()) {
                break;
            }
        }
    }
}

/// A guest's memory: reference `n` is page `n`, writable if it is even.
#[derive(Clone)]
struct Pages(Rc<[Rc<[AtomicU32]>]>);

impl Pages {
    fn new(count: usize) -> Self {
        Self((0..count).map(|_| words(1024)).collect())
    }
    fn page(&self, index: usize) -> &[AtomicU32] {
        self.0.get(index).map_or(&[], |page| page)
    }
}

impl GrantMapper for Pages {
    type Mapping = Rc<[AtomicU32]>;
    fn map(&self, grants: &[GrantRef], access: Access) -> Result<Self::Mapping, MapError> {
        let [grant] = grants else { return Err(MapError(GrantStatus::BAD_GNTREF)) };
        if access == Access::ReadWrite && grant.0 % 2 != 0 {
            return Err(MapError(GrantStatus::PERMISSION_DENIED));
        }
        let page = usize::try_from(grant.0).ok().and_then(|index| self.0.get(index));
        page.cloned().ok_or(MapError(GrantStatus::BAD_GNTREF))
    }
}

/// Writes into a page: indices, whole slots, or the segments of an indirect request.
fn mangle(script: &mut Script<'_>, page: &[AtomicU32], slot_words: usize) {
    match script.byte() % 3 {
        0 => scribble(page, usize::from(script.byte() % 4), script.index()),
        1 => {
            let slot = usize::from(script.byte() % 8);
            for word in 0..slot_words.min(8) {
                let value = u32::from(script.byte()) | u32::from(script.byte() % 32) << 16;
                scribble(page, 16 + slot * slot_words + word, value);
            }
            // One more request than before.
            let produced = page.first().map_or(0, |word| word.load(Ordering::Relaxed));
            scribble(page, 0, produced.wrapping_add(1));
        }
        _ => scribble(page, usize::from(script.byte()), script.word()),
    }
}

/// A disk whose guest writes anything into ring and segments.
pub fn blkback(input: &[u8]) {
    let mut script = Script(input);
    let pages = Pages::new(8);
    let _ = Front::<_, 28>::new(pages.page(0)).expect("a page");
    let features =
        BlkbackFeatures { persistent: script.byte() % 2 == 0, ..BlkbackFeatures::default() };
    let frontend = Frontend { ring: vec![GrantRef(0)], port: Port(1), persistent: true };
    let disk = MemoryDisk::new(64);
    let back = Blkback::connect(pages.clone(), disk, features, &frontend);
    let mut back = back.expect("an empty ring");
    while !script.is_over() {
        let page = usize::from(script.byte() % 8) % 5;
        mangle(&mut script, pages.page(page), 28);
        if back.serve().is_err() {
            break;
        }
    }
    assert_eq!(back.disconnect().bytes.len(), 64 * 512);
}

/// A card whose guest writes anything into the rings.
pub fn netback(input: &[u8]) {
    let mut script = Script(input);
    let pages = Pages::new(8);
    let _ = Front::<_, 3>::new(pages.page(0)).expect("a page");
    let _ = Front::<_, 2>::new(pages.page(2)).expect("a page");
    let flags = script.byte();
    let frontend = netback::Frontend {
        tx_ring: GrantRef(0),
        rx_ring: GrantRef(2),
        tx_port: Port(1),
        rx_port: Port(2),
        sg: flags & 1 != 0,
        gso_tcpv4: flags & 2 != 0,
        gso_tcpv6: flags & 4 != 0,
        checksum_offload: flags & 8 != 0,
        hash: flags & 16 != 0,
    };
    let (near, mut wire) = Cable::pair();
    let mut back = Netback::connect(pages.clone(), near, frontend).expect("empty rings");
    while !script.is_over() {
        let (page, slot) = if script.byte() % 2 == 0 { (0, 3) } else { (2, 2) };
        mangle(&mut script, pages.page(page), slot);
        wire.send(Frame {
            bytes: vec![1; usize::from(script.byte()) * 40 + 14],
            ..Frame::default()
        });
        let served = back.serve();
        while let Some(frame) = wire.receive() {
            assert!((14..=65_535).contains(&frame.bytes.len()), "a frame of impossible length");
        }
        if served.is_err() {
            break;
        }
    }
}

/// A guest that sends anything into a user network that lets nothing out.
pub fn usernet(input: &[u8]) {
    let mut script = Script(input);
    let config = usernet::Config {
        host_loopback: false,
        restrict: true,
        resolvers: usernet::Resolvers::Fixed(Vec::new()),
        ..usernet::Config::default()
    };
    let (net, mut backend) = UserNet::start(config, Arc::new(|| {})).expect("nothing is published");
    let all = script.byte() % 2 == 0;
    backend.connected(netback::Accepts {
        long: all,
        checksum_blank: all,
        gso_tcpv4: all,
        gso_tcpv6: all,
    });
    while !script.is_over() {
        let (kind, protocol) = (script.byte(), script.byte());
        let len = script.byte();
        let mut payload = script.bytes(usize::from(len));
        let ethertype = match kind % 4 {
            0 => [8, 6],
            3 => [script.byte(), script.byte()],
            _ => {
                // An honest header, of one of the protocols that are known.
                let to = [10, 0, 2, script.byte() % 6];
                let total = (20 + u16::from(len)).to_be_bytes();
                payload.resize(usize::from(len), 0);
                let protocol = *[1, 6, 17].get(usize::from(protocol % 4)).unwrap_or(&protocol);
                let mut ip =
                    vec![0x45, 0, total[0], total[1], 0, 0, 0, 0, 64, protocol, 0, 0, 10, 0, 2, 15];
                ip.extend(to);
                let sum = checksum(&ip).to_be_bytes();
                ip.splice(10..12, sum);
                ip.append(&mut payload);
                payload = ip;
                [8, 0]
            }
        };
        let mut bytes = vec![0x52, 0x55, 10, 0, 2, 2, 0x52, 0x54, 0, 0, 0, 1];
        bytes.extend(ethertype);
        bytes.extend(payload);
        backend.send(Frame { bytes, ..Frame::default() });
        if kind & 0x40 == 0 {
            while let Some(frame) = backend.receive() {
                assert!(frame.bytes.len() > 14 && frame.bytes.len() <= 1514);
            }
        }
    }
    assert_eq!(net.open(), (0, 0), "nothing was allowed");
}

/// The Internet checksum of a header of even length (RFC 1071).
fn checksum(header: &[u8]) -> u16 {
    let (words, _) = header.as_chunks::<2>();
    let add = |sum: u16, word: &[u8; 2]| {
        let (sum, carry) = sum.overflowing_add(u16::from_be_bytes(*word));
        sum + u16::from(carry)
    };
    !words.iter().fold(0, add)
}

/// Page table updates, pins, faults and reservations of a PV guest that means harm.
pub fn page_tables(input: &[u8]) {
    pv_memory::page_tables(input);
}

/// A file that is nearly a PV kernel.
pub fn kernel_image(input: &[u8]) {
    pv_memory::kernel_image(input);
}

/// A virtio device whose driver does anything.
pub fn virtio(input: &[u8]) {
    virtio::script(input);
}

//! The client over a page, with a small daemon at the other end of it.

use std::sync::Mutex;

use janus_proto::xenstore::Server;

use super::*;
use crate::task::{block_on, spawn, yield_now};

type Page = &'static [AtomicU32];

fn page() -> Page {
    Vec::leak((0..1024).map(|_| AtomicU32::new(0)).collect())
}

/// Keeps nodes in a map; commits fail while `conflicts` is above 0.
struct Daemon {
    ring: ByteRing<Page>,
    server: Server,
    nodes: BTreeMap<String, Vec<u8>>,
    pending: Vec<(String, Vec<u8>)>,
    watches: Vec<(String, String)>,
    conflicts: usize,
    commits: usize,
    abandoned: usize,
    generation: u64,
}

impl Daemon {
    fn new(page: Page) -> Self {
        Self {
            ring: ByteRing::back(page, XENSTORE).unwrap(),
            server: Server::default(),
            nodes: BTreeMap::new(),
            pending: Vec::new(),
            watches: Vec::new(),
            conflicts: 0,
            commits: 0,
            abandoned: 0,
            generation: 1,
        }
    }

    fn set(&mut self, path: &str, value: &[u8]) {
        self.nodes.insert(path.into(), value.into());
        for (watched, token) in &self.watches {
            if path.starts_with(watched.as_str()) {
                self.server.changed(path, token).unwrap();
            }
        }
    }

    fn children(&self, path: &str) -> Vec<u8> {
        let prefix = format!("{path}/");
        let names = self.nodes.keys().filter_map(|node| node.strip_prefix(&prefix));
        names.flat_map(|name| name.bytes().chain([0])).collect()
    }

    /// Moves bytes; answers whether any moved.
    fn run(&mut self) -> bool {
        let mut buf = [0; 300];
        let came = self.ring.read(&mut buf).unwrap();
        self.server.received(&buf[..came]);
        while let Some(message) = self.server.request().unwrap() {
            let payload = message.payload.clone();
            match Request::parse(message.kind, &payload) {
                Ok(Request::Read(path)) => match self.nodes.get(path).cloned() {
                    Some(value) => self.server.reply(&message, value),
                    None => self.server.refuse(&message, StoreError::NotFound),
                },
                Ok(Request::Write { path, value }) => {
                    if message.transaction == TransactionId::NONE {
                        self.set(path, value);
                    } else {
                        self.pending.push((path.into(), value.into()));
                    }
                    self.server.reply_ok(&message);
                }
                Ok(Request::Directory(path)) => {
                    let list = self.children(path);
                    self.server.reply(&message, list);
                }
                Ok(Request::DirectoryPart { path, offset }) => {
                    let list = self.children(path);
                    let mut part = format!("{}\0", self.generation).into_bytes();
                    let rest = &list[offset as usize..];
                    let end = rest.len().min(2000);
                    let end = rest[..end].iter().rposition(|&b| b == 0).map_or(0, |at| at + 1);
                    part.extend_from_slice(&rest[..end]);
                    if end == rest.len() {
                        part.push(0);
                    }
                    self.server.reply(&message, part);
                }
                Ok(Request::TransactionStart) => {
                    self.pending.clear();
                    self.server.reply(&message, b"17\0".to_vec());
                }
                Ok(Request::Commit) if self.conflicts > 0 => {
                    self.conflicts -= 1;
                    self.server.refuse(&message, StoreError::Again);
                }
                Ok(Request::Commit) => {
                    self.commits += 1;
                    for (path, value) in std::mem::take(&mut self.pending) {
                        self.set(&path, &value);
                    }
                    self.server.reply_ok(&message);
                }
                Ok(Request::Abandon) => {
                    self.abandoned += 1;
                    self.server.reply_ok(&message);
                }
                Ok(Request::Watch { path, token }) => {
                    self.server.reply_ok(&message);
                    self.server.changed(path, token).unwrap();
                    self.watches.push((path.into(), token.into()));
                }
                Ok(Request::Unwatch { path, token }) => {
                    self.watches.retain(|(p, t)| (p.as_str(), t.as_str()) != (path, token));
                    self.server.reply_ok(&message);
                }
                Ok(Request::GetPermissions(_)) => self.server.reply(&message, b"n5\0r0\0".to_vec()),
                Ok(other) => panic!("unexpected {other:?}"),
                Err(error) => self.server.refuse(&message, error),
            }
        }
        // Not even the index is written without need: a test spoils it.
        if self.server.outgoing().is_empty() {
            return came > 0;
        }
        let sent = self.ring.write(self.server.outgoing()).unwrap();
        self.server.sent(sent);
        came + sent > 0
    }
}

struct Rig {
    store: Arc<XenStore>,
    daemon: Arc<Mutex<Daemon>>,
    page: Page,
}

/// A client, and a daemon that runs in a task of its own.
fn rig() -> Rig {
    let page = page();
    let daemon = Arc::new(Mutex::new(Daemon::new(page)));
    let store = XenStore::start(page, Box::new(|| {})).unwrap();
    let (their_daemon, their_store) = (Arc::clone(&daemon), Arc::downgrade(&store));
    drop(spawn("daemon", async move {
        // The store's own task keeps it alive, so this ends with the test's thread.
        while let Some(store) = their_store.upgrade() {
            if their_daemon.lock().unwrap().run() {
                store.interrupt();
            }
            drop(store);
            yield_now().await;
        }
    }));
    Rig { store, daemon, page }
}

#[test]
fn requests_of_many_tasks_run_together() {
    let rig = rig();
    let store = &rig.store;
    block_on(async {
        let mut tasks = Vec::new();
        for number in 0..50 {
            let store = Arc::clone(store);
            tasks.push(spawn("user", async move {
                let path = format!("data/{number}");
                let value = vec![number; 100 + usize::from(number) * 60];
                store.write(&path, &value).await.unwrap();
                assert_eq!(store.read(&path).await.unwrap(), value);
            }));
        }
        for task in tasks {
            task.await;
        }
        assert_eq!(store.list("data").await.unwrap().len(), 50);
        assert_eq!(store.read_if_there("none").await, Ok(None));
        assert!(store.read("none").await.unwrap_err().is_not_found());
        assert_eq!(
            store.read("bad path").await,
            Err(XenStoreError::Request(ClientError::InvalidPath))
        );
        assert_eq!(store.permissions("data").await.unwrap().len(), 2);
    });
    assert!(store.inner.lock().answers.is_empty());
}

#[test]
fn a_long_list_comes_in_parts() {
    let rig = rig();
    for number in 0..900 {
        rig.daemon.lock().unwrap().nodes.insert(format!("big/{number:08}"), Vec::new());
    }
    let names = block_on(rig.store.list("big")).unwrap();
    assert_eq!(names.len(), 900);
    assert_eq!(names[899], "00000899");
}

#[test]
fn transactions_are_tried_again_and_abandoned_when_dropped() {
    let rig = rig();
    let nodes = [("a".into(), "1".into()), ("b".into(), "2".into())];
    rig.daemon.lock().unwrap().conflicts = 3;
    block_on(rig.store.write_all("dir", &nodes)).unwrap();
    assert_eq!(rig.daemon.lock().unwrap().commits, 1);
    assert_eq!(block_on(rig.store.read("dir/b")).unwrap(), b"2");
    rig.daemon.lock().unwrap().conflicts = 1000;
    let refused = block_on(rig.store.write_all("dir", &nodes));
    assert_eq!(refused, Err(XenStoreError::Refused(StoreError::Again)));
    block_on(async {
        let transaction = rig.store.begin().await.unwrap();
        transaction.write("dir/a", b"lost").await.unwrap();
        drop(transaction);
        assert_eq!(rig.store.read("dir/a").await.unwrap(), b"1");
    });
    assert_eq!(rig.daemon.lock().unwrap().abandoned, 1);
    assert!(rig.store.inner.lock().answers.is_empty());
}

#[test]
fn nodes_are_written_in_their_order_without_a_transaction() {
    let rig = rig();
    let nodes = [("a".into(), "1".into()), ("b".into(), "2".into()), ("a".into(), "3".into())];
    block_on(rig.store.write_each("dir", &nodes)).unwrap();
    assert_eq!(block_on(rig.store.read("dir/a")).unwrap(), b"3");
    assert_eq!(block_on(rig.store.read("dir/b")).unwrap(), b"2");
    assert_eq!(rig.daemon.lock().unwrap().commits, 0);
    assert!(rig.store.inner.lock().answers.is_empty());
}

#[test]
fn watches_tell_of_changes_until_dropped() {
    let rig = rig();
    block_on(async {
        let mut watch = rig.store.watch("dev").await.unwrap();
        assert_eq!(watch.changed().await.unwrap(), "dev");
        rig.store.write("other", b"").await.unwrap();
        for _ in 0..3 {
            rig.store.write("dev/state", b"4").await.unwrap();
        }
        assert_eq!(watch.changed().await.unwrap(), "dev/state");
        rig.store.write("dev/x", b"").await.unwrap();
        assert_eq!(watch.changed().await.unwrap(), "dev/x", "one event for the three");
        drop(watch);
        rig.store.write("dev/state", b"5").await.unwrap();
    });
    assert!(rig.daemon.lock().unwrap().watches.is_empty());
    assert!(rig.store.inner.lock().watches.is_empty());
}

#[test]
fn more_changes_than_a_watch_keeps_become_one_of_the_whole() {
    let rig = rig();
    block_on(async {
        let mut watch = rig.store.watch("dev").await.unwrap();
        assert_eq!(watch.changed().await.unwrap(), "dev");
        for number in 0..=WATCH_EVENTS {
            rig.store.write(&format!("dev/{number}"), b"").await.unwrap();
        }
        rig.store.write("dev/after", b"").await.unwrap();
        assert_eq!(watch.changed().await.unwrap(), "dev");
        assert_eq!(watch.changed().await.unwrap(), "dev/after");
    });
}

#[test]
fn a_lying_daemon_fails_everybody_and_hangs_nobody() {
    let page = page();
    let store = XenStore::start(page, Box::new(|| {})).unwrap();
    let mut daemon = Daemon::new(page);
    block_on(async {
        let reader = {
            let store = Arc::clone(&store);
            spawn("reader", async move { store.read("a").await })
        };
        let watcher = {
            let store = Arc::clone(&store);
            spawn("watcher", async move { store.watch("b").await.map(drop) })
        };
        yield_now().await;
        yield_now().await;
        // An answer to nothing that was asked.
        daemon.ring.write(&[2, 0, 0, 0, 99, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]).unwrap();
        store.interrupt();
        let lost = XenStoreError::Wire(WireError::UnexpectedReply(99));
        assert_eq!(reader.await, Err(lost));
        assert_eq!(watcher.await, Err(lost));
        assert_eq!(store.read("a").await, Err(lost));
        assert_eq!(store.check(), Err(lost));
    });
}

#[test]
fn a_lying_index_fails_everybody() {
    let rig = rig();
    block_on(async {
        let mut watch = rig.store.watch("b").await.unwrap();
        watch.changed().await.unwrap();
        let prod = janus_proto::abi::xen_io::xs_wire::RSP_PROD / 4;
        rig.page[prod].fetch_add(5000, core::sync::atomic::Ordering::SeqCst);
        rig.store.interrupt();
        let lost = Err(XenStoreError::Ring(ByteRingError::Index));
        assert_eq!(watch.changed().await, lost);
        assert_eq!(rig.store.read("a").await.map(drop), lost.map(drop));
    });
}

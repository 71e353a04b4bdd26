//! Xenstore over a unix socket, for the ordinary clients (`xenstore-ls`, `libxenstore`): each connection is one of
//! domain 0's.

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use janus_proto::addr::DomId;
use janus_proto::xenstore::Server;
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, SocketFlags};

use super::console::listen;
use super::events::{EventLoop, Interest, READ, WRITE, Waiting};
use crate::xenstored::{ConnectionId, Xenstored, answer};

/// Bytes queued for a client that does not read; beyond this its requests wait.
const BACKLOG: usize = 1 << 20;
/// Connections at a time.
const MOST: usize = 256;

/// A store behind a lock.
pub(super) trait SharedStore: Send + Sync {
    /// Does something with the store, and then what follows from it.
    fn with_store(&self, action: &mut dyn FnMut(&mut Xenstored));
}

struct Client {
    socket: Arc<OwnedFd>,
    connection: ConnectionId,
    server: Server,
    waiting: Option<Waiting>,
    interest: Interest,
}

struct Listening {
    store: Arc<dyn SharedStore>,
    events: Weak<EventLoop>,
    clients: Mutex<BTreeMap<u64, Client>>,
    this: Weak<Self>,
}

/// All sockets of one store.
#[derive(Default)]
pub(super) struct Sockets {
    listeners: Vec<(PathBuf, Waiting, Arc<Listening>)>,
}

impl fmt::Debug for Sockets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.listeners.iter().map(|(path, ..)| path)).finish()
    }
}

impl Sockets {
    pub(super) fn listen(
        &mut self,
        path: &Path,
        events: &Arc<EventLoop>,
        store: &Arc<dyn SharedStore>,
    ) -> io::Result<()> {
        let socket: Arc<OwnedFd> = Arc::new(listen(path)?.into());
        let listening = Arc::new_cyclic(|this| Listening {
            store: Arc::clone(store),
            events: Arc::downgrade(events),
            clients: Mutex::default(),
            this: Weak::clone(this),
        });
        let weak = Arc::downgrade(&listening);
        let of_callback = Arc::clone(&socket);
        let accept = move |_| {
            if let Some(listening) = weak.upgrade() {
                listening.accept(&of_callback);
            }
        };
        let waiting = events.add(socket, READ, Arc::new(accept))?;
        let weak = Arc::downgrade(&listening);
        events.on_wake(Arc::new(move |_| {
            if let Some(listening) = weak.upgrade() {
                listening.tell_all();
            }
        }));
        self.listeners.push((path.to_owned(), waiting, listening));
        Ok(())
    }
}

impl Drop for Sockets {
    fn drop(&mut self) {
        for (path, _, listening) in &self.listeners {
            // Somebody may have removed it.
            let _ = std::fs::remove_file(path);
            // Dropped behind the lock: their callbacks take it.
            let clients = std::mem::take(&mut *listening.lock());
            drop(clients);
        }
    }
}

impl Listening {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<u64, Client>> {
        self.clients.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn accept(&self, listener: &OwnedFd) {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let Ok(socket) = rustix::net::accept_with(listener, flags) else { return };
        let Some(events) = self.events.upgrade() else { return };
        let mut clients = self.lock();
        if clients.len() >= MOST {
            return;
        }
        let mut connection = None;
        self.store.with_store(&mut |store| connection = Some(store.connect_visitor(DomId(0))));
        let Some(connection) = connection else { return };
        let key = clients.last_key_value().map_or(0, |(key, _)| key + 1);
        let (socket, server) = (Arc::new(socket), Server::default());
        let this = self.this.clone();
        let callback = move |_| {
            if let Some(this) = this.upgrade() {
                this.serve(key);
            }
        };
        let waiting = events.add(Arc::clone(&socket), READ, Arc::new(callback)).ok();
        clients.insert(key, Client { socket, connection, server, waiting, interest: READ });
    }

    /// A client sent something, or takes something again.
    fn serve(&self, key: u64) {
        let mut clients = self.lock();
        let Some(mut client) = clients.remove(&key) else { return };
        let alive = client.serve(&*self.store);
        if alive {
            clients.insert(key, client);
            return;
        }
        drop(clients);
        self.store.with_store(&mut |store| store.disconnect(client.connection));
        drop(client);
    }

    /// Events may have come for clients.
    fn tell_all(&self) {
        let keys: Vec<_> = self.lock().keys().copied().collect();
        keys.into_iter().for_each(|key| self.serve(key));
    }
}

impl Client {
    /// `false`: the client left, or broke the protocol.
    fn serve(&mut self, store: &dyn SharedStore) -> bool {
        let mut open = true;
        let mut buf = [0; 4096];
        while open && self.server.queued() < BACKLOG {
            match rustix::net::recv(&self.socket, &mut buf, RecvFlags::DONTWAIT) {
                Ok((0, _)) => open = false,
                Ok((count, _)) => self.server.received(buf.get(..count).unwrap_or_default()),
                Err(Errno::AGAIN | Errno::INTR) => break,
                Err(_) => return false,
            }
            if !self.answer(store) {
                return false;
            }
        }
        self.answer(store) && self.send() && open
    }

    fn answer(&mut self, store: &dyn SharedStore) -> bool {
        let mut sane = true;
        store.with_store(&mut |store| {
            while let Some(event) =
                (self.server.queued() < BACKLOG).then(|| store.event(self.connection)).flatten()
            {
                // An event too long for a message is lost, as in the C daemon.
                let _ = self.server.changed(&event.path, &event.token);
            }
            loop {
                match self.server.request() {
                    Ok(Some(message)) => answer(store, self.connection, &mut self.server, &message),
                    Ok(None) => break,
                    Err(_) => {
                        sane = false;
                        break;
                    }
                }
            }
        });
        sane
    }

    fn send(&mut self) -> bool {
        while !self.server.outgoing().is_empty() {
            let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
            match rustix::net::send(&self.socket, self.server.outgoing(), flags) {
                Ok(count) => self.server.sent(count),
                Err(Errno::AGAIN | Errno::INTR) => break,
                Err(_) => return false,
            }
        }
        let mut interest = READ;
        interest.set(WRITE, !self.server.outgoing().is_empty());
        interest.set(READ, self.server.queued() < BACKLOG);
        if interest != self.interest
            && let Some(waiting) = &self.waiting
        {
            waiting.change(interest);
            self.interest = interest;
        }
        true
    }
}

//! The guest's side of its control socket, on an event loop.

use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, Shutdown, SocketFlags};
use serde_json::{Value, json};

use super::protocol::{Answer, Exit, LONGEST, Request};
use super::viewers::Viewers;
use crate::host::events::{EventLoop, Interest, READ, WRITE, Waiting};
use crate::journal::{Event, Journal};

/// Connections at a time.
const MOST: usize = 64;

/// What is controlled.
pub trait Subject: Send + Sync {
    /// Does what a request asks; `console`, `events` and `wait` do not come here.
    ///
    /// # Errors
    /// Why not, for people.
    fn answer(&self, request: &Request) -> Result<Value, String>;
    /// Types on its console; answers how much of it fits.
    fn type_in(&self, bytes: &[u8]) -> usize;
}

/// What a connection is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    Requests,
    Console,
    Events,
    Wait,
}

struct Client {
    socket: Arc<OwnedFd>,
    input: Vec<u8>,
    output: VecDeque<u8>,
    mode: Mode,
    waiting: Option<Waiting>,
    interest: Interest,
}

struct Shared {
    events: Arc<EventLoop>,
    subject: Arc<dyn Subject>,
    viewers: Arc<Viewers>,
    journal: Arc<Journal>,
    clients: Mutex<BTreeMap<u64, Client>>,
    this: Weak<Self>,
}

/// A control socket that is served. Dropping this ends all connections.
pub struct Server {
    shared: Arc<Shared>,
    _listening: Waiting,
}

impl fmt::Debug for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Server").field("clients", &self.shared.lock().len()).finish_non_exhaustive()
    }
}

impl Server {
    /// Serves a socket on this loop.
    ///
    /// # Errors
    /// The loop cannot wait for it.
    pub fn start(
        listener: &UnixListener,
        events: &Arc<EventLoop>,
        subject: Arc<dyn Subject>,
        viewers: Arc<Viewers>,
        journal: Arc<Journal>,
    ) -> io::Result<Self> {
        listener.set_nonblocking(true)?;
        let listener: Arc<OwnedFd> = Arc::new(listener.try_clone()?.into());
        let waker = Arc::downgrade(events);
        let _ = viewers.on_slow.set(Box::new(move || {
            if let Some(events) = waker.upgrade() {
                events.wake();
            }
        }));
        let shared = Arc::new_cyclic(|this| Shared {
            events: Arc::clone(events),
            subject,
            viewers,
            journal,
            clients: Mutex::default(),
            this: Weak::clone(this),
        });
        let weak = Arc::downgrade(&shared);
        let of_callback = Arc::clone(&listener);
        let accept = move |_| {
            if let Some(shared) = weak.upgrade() {
                shared.accept(&of_callback);
            }
        };
        let listening = events.add(listener, READ, Arc::new(accept))?;
        let weak = Arc::downgrade(&shared);
        events.on_wake(Arc::new(move |_| {
            if let Some(shared) = weak.upgrade() {
                shared.pump();
            }
        }));
        Ok(Self { shared, _listening: listening })
    }

    /// Whether something that was typed at a console waits for room: call [`Self::pump`] soon.
    #[must_use]
    pub fn has_backlog(&self) -> bool {
        let clients = self.shared.lock();
        clients.values().any(|client| client.mode == Mode::Console && !client.input.is_empty())
    }

    /// Looks at all connections again.
    pub fn pump(&self) {
        self.shared.pump();
    }

    /// The guest has ended: answers those who wait for that.
    pub fn ended(&self, exit: &Exit) {
        let mut clients = self.shared.lock();
        for client in clients.values_mut().filter(|client| client.mode == Mode::Wait) {
            client.mode = Mode::Requests;
            client.answer(Ok(json!(exit)));
            client.send();
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Dropped behind the lock: their callbacks take it.
        let clients = std::mem::take(&mut *self.shared.lock());
        for (key, client) in clients {
            self.shared.viewers.remove(key);
            // Whoever follows events has the socket as well.
            let _ = rustix::net::shutdown(&client.socket, Shutdown::Both);
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<u64, Client>> {
        self.clients.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn accept(&self, listener: &OwnedFd) {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let Ok(socket) = rustix::net::accept_with(listener, flags) else { return };
        // The directory keeps others out already; root may come everywhere.
        let ours = rustix::process::geteuid();
        let may = rustix::net::sockopt::socket_peercred(&socket)
            .is_ok_and(|peer| peer.uid == ours || peer.uid.is_root());
        let mut clients = self.lock();
        if !may || clients.len() >= MOST {
            return;
        }
        let key = clients.last_key_value().map_or(1, |(key, _)| key + 1);
        let socket = Arc::new(socket);
        let this = self.this.clone();
        let callback = move |_| {
            if let Some(this) = this.upgrade() {
                this.serve(key);
            }
        };
        let waiting = self.events.add(Arc::clone(&socket), READ, Arc::new(callback)).ok();
        let (input, output, mode) = (Vec::new(), VecDeque::new(), Mode::Requests);
        clients.insert(key, Client { socket, input, output, mode, waiting, interest: READ });
    }

    fn pump(&self) {
        let keys: Vec<u64> = self.lock().keys().copied().collect();
        keys.into_iter().for_each(|key| self.serve(key));
    }

    /// A client sent something, or takes something again.
    fn serve(&self, key: u64) {
        // Out of the table meanwhile: what it asks for may end in a look at the table.
        let Some(mut client) = self.lock().remove(&key) else { return };
        if client.serve(key, self) {
            self.lock().insert(key, client);
            return;
        }
        if client.mode == Mode::Console {
            self.viewers.remove(key);
            self.journal.add(Event::ConsoleDetached);
        }
        let _ = rustix::net::shutdown(&client.socket, Shutdown::Both);
    }
}

impl Client {
    fn answer(&mut self, answer: Result<Value, String>) {
        let answer = answer.map_or_else(Answer::Error, Answer::Ok);
        let text = serde_json::to_string(&answer).unwrap_or_default();
        self.output.extend(text.as_bytes());
        self.output.push_back(b'\n');
    }

    /// `false`: it left, or broke the protocol.
    fn serve(&mut self, key: u64, shared: &Shared) -> bool {
        let mut open = true;
        let mut buf = [0; 2048];
        while open && self.input.len() < LONGEST {
            match rustix::net::recv(&self.socket, &mut buf, RecvFlags::DONTWAIT) {
                Ok((0, _)) => open = false,
                Ok((count, _)) => self.input.extend(buf.get(..count).unwrap_or_default()),
                Err(Errno::AGAIN | Errno::INTR) => break,
                Err(_) => return false,
            }
        }
        let sane = self.work(key, shared);
        let alive = sane && self.send() && open;
        let slow = self.mode == Mode::Console && shared.viewers.more(key);
        let mut interest = Interest::empty();
        interest.set(READ, self.input.len() < LONGEST);
        interest.set(WRITE, slow || !self.output.is_empty());
        if interest != self.interest
            && let Some(waiting) = &self.waiting
        {
            waiting.change(interest);
            self.interest = interest;
        }
        alive
    }

    /// Does what came; `false`: it makes no sense.
    fn work(&mut self, key: u64, shared: &Shared) -> bool {
        loop {
            match self.mode {
                Mode::Console => {
                    let taken = shared.subject.type_in(&self.input);
                    self.input.drain(..taken.min(self.input.len()));
                    return true;
                }
                // Nothing more is asked for here.
                Mode::Events | Mode::Wait => {
                    self.input.clear();
                    return true;
                }
                Mode::Requests => {}
            }
            let Some(end) = self.input.iter().position(|byte| *byte == b'\n') else {
                return self.input.len() < LONGEST;
            };
            let line: Vec<u8> = self.input.drain(..=end).collect();
            match serde_json::from_slice::<Request>(&line) {
                Err(error) => self.answer(Err(format!("this is no request: {error}"))),
                Ok(Request::Wait) => self.mode = Mode::Wait,
                Ok(Request::Console) => {
                    self.answer(Ok(json!({})));
                    self.mode = Mode::Console;
                    // The answer first: what follows is the console.
                    if !self.send() || !self.output.is_empty() {
                        return false;
                    }
                    shared.viewers.add(key, Arc::clone(&self.socket));
                    shared.journal.add(Event::ConsoleAttached);
                }
                Ok(Request::Events) => {
                    self.answer(Ok(json!({})));
                    self.mode = Mode::Events;
                    if !self.send() || !self.output.is_empty() {
                        return false;
                    }
                    shared.journal.follow(follower(Arc::clone(&self.socket)));
                }
                Ok(request) => {
                    let answer = shared.subject.answer(&request);
                    self.answer(answer);
                }
            }
        }
    }

    fn send(&mut self) -> bool {
        while !self.output.is_empty() {
            let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
            match rustix::net::send(&self.socket, self.output.as_slices().0, flags) {
                Ok(count) => drop(self.output.drain(..count)),
                Err(Errno::AGAIN | Errno::INTR) => break,
                Err(_) => return false,
            }
        }
        true
    }
}

/// Sends lines to somebody who follows events; one that lets its socket fill up is let go.
fn follower(socket: Arc<OwnedFd>) -> crate::journal::Sink {
    Box::new(move |line| {
        let line = format!("{line}\n");
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        let sent = rustix::net::send(&socket, line.as_bytes(), flags);
        let whole = sent.is_ok_and(|count| count == line.len());
        if !whole {
            let _ = rustix::net::shutdown(&socket, Shutdown::Both);
        }
        whole
    })
}

#[cfg(test)]
mod tests;

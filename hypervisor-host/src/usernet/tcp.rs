//! TCP: each connection of the guest ends in a smoltcp socket of its own, and goes on in a socket of the host.
//!
//! A connection has its own smoltcp `SocketSet`, found by its addresses: the work for a packet does not depend on how
//! many connections there are. Bytes are moved between the two sockets when the guest sends, when the guest has room,
//! and when the host's socket becomes ready; what a slow side does not take stays in the other's bounded buffer and
//! closes its window.

use std::collections::{HashMap, VecDeque};
use std::net::{SocketAddr, SocketAddrV4};
use std::os::fd::OwnedFd;

use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, Shutdown};
use smoltcp::iface::{PollIngressSingleResult, SocketHandle, SocketSet, SocketStorage};
use smoltcp::socket::tcp::{self, RecvError, State};
use smoltcp::time::Duration as StackDuration;
use smoltcp::wire::{IpAddress, IpListenEndpoint};

use super::config::GATEWAY;
use super::frames::{ETHERNET, Header, Packet, TCP, u16_at};
use super::link::Link;
use super::slab::{Key, Kind, Slab, Token};
use super::sockets::{self, Connecting, Interest, READ, WRITE, would_wait};
use super::timers::Time;
use crate::netback::Frame;

/// Connections at once.
pub const MAX_CONNECTIONS: usize = 4096;
/// Connections with buffers of [`LARGE_BUFFER`] bytes in each direction; later ones get [`SMALL_BUFFER`].
pub const MAX_LARGE: usize = 64;
/// See [`MAX_LARGE`]: the window of a connection.
pub const LARGE_BUFFER: usize = 1024 * 1024;
/// See [`MAX_LARGE`].
pub const SMALL_BUFFER: usize = 64 * 1024;
/// Sockets with their buffers kept for the next connections, of each size.
const MAX_SPARE: usize = 16;
/// Bytes of the guest that are passed on at once rather than when its frames are all in: they are still in the cache.
const PASS_ON: usize = 128 * 1024;
/// Published connections that wait for a guest to show itself.
const MAX_WAITING: usize = 128;
/// The guest has so long to answer while something waits for its acknowledgement.
const SILENCE: StackDuration = StackDuration::from_secs(60);
/// When smoltcp says "at once" and then has nothing to send.
const RETRY: Time = 1_000;
/// The first port that the gateway connects from.
const FIRST_PORT: u16 = 49_152;

const FIN: u8 = 1;
const SYN: u8 = 2;
const RST: u8 = 4;
const ACK: u8 = 16;

/// Both ends as the guest sees them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Tuple {
    guest: SocketAddrV4,
    remote: SocketAddrV4,
}

/// A header of the guest.
#[derive(Clone, Copy, Debug)]
struct Segment {
    tuple: Tuple,
    sequence: u32,
    acknowledged: u32,
    flags: u8,
    payload: usize,
}

impl Segment {
    fn parse(packet: &Packet<'_>) -> Option<Self> {
        let tcp = packet.payload;
        let number = |at: usize| tcp.get(at..)?.first_chunk().map(|b| u32::from_be_bytes(*b));
        let header = usize::from(*tcp.get(12)? >> 4) * 4;
        let (source, destination) = (u16_at(tcp, 0)?, u16_at(tcp, 2)?);
        if header < 20 || source == 0 || destination == 0 {
            return None;
        }
        Some(Self {
            tuple: Tuple {
                guest: SocketAddrV4::new(packet.source, source),
                remote: SocketAddrV4::new(packet.destination, destination),
            },
            sequence: number(4)?,
            acknowledged: number(8)?,
            flags: *tcp.get(13)?,
            payload: tcp.len().checked_sub(header)?,
        })
    }

    fn is_request(&self) -> bool {
        self.flags & (SYN | ACK | RST | FIN) == SYN
    }
}

/// The guest's end of a connection.
struct Stack {
    sockets: SocketSet<'static>,
    handle: SocketHandle,
    large: bool,
}

impl Stack {
    fn new(large: bool) -> Self {
        let size = if large { LARGE_BUFFER } else { SMALL_BUFFER };
        // Zeroed memory of this size comes from the kernel untouched: it is there when it is used.
        let buffer = || tcp::SocketBuffer::new(vec![0; size]);
        let mut socket = tcp::Socket::new(buffer(), buffer());
        socket.set_nagle_enabled(false);
        socket.set_ack_delay(None); // a round's frames are answered together anyway
        socket.set_timeout(Some(SILENCE));
        let mut sockets = SocketSet::new(vec![SocketStorage::EMPTY]);
        let handle = sockets.add(socket);
        Self { sockets, handle, large }
    }

    fn socket(&mut self) -> &mut tcp::Socket<'static> {
        self.sockets.get_mut(self.handle)
    }
}

enum Progress {
    /// The host's side is being opened; the guest's request waits.
    Connecting {
        to: SocketAddr,
        request: Vec<u8>,
        len: usize,
    },
    Open(Stack),
}

struct Connection {
    tuple: Tuple,
    socket: OwnedFd,
    progress: Progress,
    /// The sequence number of the guest's request, by which another one is told from its repetition.
    request: Option<u32>,
    /// The host's socket may have something to read, may have room.
    readable: bool,
    writable: bool,
    armed: Interest,
    /// The host's side has finished sending.
    read_all: bool,
    /// The guest has finished sending, and the host's side was told.
    passed_end: bool,
    queued: bool,
    timer: Option<Time>,
}

/// What is left to do with a connection.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Left {
    Something,
    /// Both sides have finished.
    Nothing,
    /// One side broke off.
    Broken,
}

impl Connection {
    /// Moves bytes in both directions as far as they go.
    fn exchange(&mut self) {
        let Progress::Open(stack) = &mut self.progress else { return };
        let socket = stack.sockets.get_mut::<tcp::Socket<'_>>(stack.handle);
        while self.writable && socket.can_recv() {
            let sent = socket.recv(|bytes| match send(&self.socket, bytes) {
                Ok(sent) => {
                    self.writable = sent == bytes.len();
                    (sent, Ok(()))
                }
                Err(error) => (0, Err(error)),
            });
            match sent {
                Ok(Err(error)) if would_wait(error) => self.writable = false,
                Ok(Ok(())) => {}
                Ok(Err(_)) | Err(_) => return socket.abort(),
            }
        }
        let handshake =
            matches!(socket.state(), State::Listen | State::SynSent | State::SynReceived);
        if !self.passed_end
            && !handshake
            && !socket.may_recv()
            && socket.recv(|_| (0, ())) == Err(RecvError::Finished)
        {
            self.passed_end = true;
            // It fails when the connection is gone, which reading tells.
            let _ = rustix::net::shutdown(&self.socket, Shutdown::Write);
        }
        while self.readable && !self.read_all && socket.can_send() {
            let got = socket.send(|room| {
                let len = room.len();
                match rustix::net::recv(&self.socket, room, RecvFlags::empty()) {
                    // Less than there was room for: there is no more now.
                    Ok((got, _)) => (got, Ok((got, got < len))),
                    Err(error) => (0, Err(error)),
                }
            });
            match got {
                Ok(Ok((0, _))) => {
                    self.read_all = true;
                    socket.close();
                }
                Ok(Ok((_, all))) => self.readable = !all,
                Ok(Err(error)) if would_wait(error) => self.readable = false,
                Ok(Err(_)) | Err(_) => return socket.abort(),
            }
        }
    }

    fn left(&mut self) -> Left {
        let Progress::Open(stack) = &mut self.progress else { return Left::Something };
        let socket = stack.socket();
        match socket.state() {
            State::Closed | State::TimeWait if self.passed_end && self.read_all => Left::Nothing,
            // What the guest sent before it broke off still goes out, if its peer takes it.
            State::Closed if !socket.can_recv() => Left::Broken,
            _ => Left::Something,
        }
    }

    /// What the host's socket must be waited for.
    fn interest(&mut self) -> Interest {
        let mut interest = Interest::empty();
        match &mut self.progress {
            Progress::Connecting { .. } => interest |= WRITE,
            Progress::Open(stack) => {
                if !self.readable && !self.read_all && stack.socket().may_send() {
                    interest |= READ;
                }
                if !self.writable {
                    interest |= WRITE;
                }
            }
        }
        interest
    }
}

fn send(socket: &OwnedFd, bytes: &[u8]) -> Result<usize, Errno> {
    rustix::net::send(socket, bytes, SendFlags::NOSIGNAL)
}

/// All connections.
pub(super) struct Tcp {
    connections: Slab<Box<Connection>>,
    by_tuple: HashMap<Tuple, Key>,
    spare: Vec<Stack>,
    large: usize,
    /// Published connections that came before the guest did.
    waiting: VecDeque<(OwnedFd, u16)>,
    next_port: u16,
}

impl Tcp {
    pub(super) fn new() -> Self {
        Self {
            connections: Slab::new(MAX_CONNECTIONS),
            by_tuple: HashMap::new(),
            spare: Vec::new(),
            large: 0,
            waiting: VecDeque::new(),
            next_port: FIRST_PORT,
        }
    }

    pub(super) fn len(&self) -> usize {
        self.connections.len()
    }

    /// Breaks off everything.
    pub(super) fn reset(&mut self, link: &mut Link) {
        for key in self.connections.keys() {
            self.remove(link, key, Left::Broken);
        }
    }

    /// Takes a frame of the guest that holds this TCP packet.
    pub(super) fn input(&mut self, link: &mut Link, frame: Vec<u8>, len: usize) {
        let ip = frame.get(ETHERNET..ETHERNET + len).unwrap_or_default();
        let Some((segment, packet)) =
            Packet::parse(ip).ok().and_then(|packet| Some((Segment::parse(&packet)?, packet)))
        else {
            link.counters.malformed += 1;
            return link.phy.buffers().put(frame);
        };
        let _ = packet;
        if let Some(key) = self.by_tuple.get(&segment.tuple).copied() {
            let Some(connection) = self.connections.get_mut(key) else { return };
            let restarted = segment.is_request() && connection.request != Some(segment.sequence);
            match (&connection.progress, restarted) {
                // A new guest, or one that forgot: the old connection is nobody's.
                (_, true) => self.remove(link, key, Left::Broken),
                (Progress::Connecting { .. }, false) => {
                    if segment.flags & RST != 0 {
                        self.remove(link, key, Left::Broken);
                    }
                    return link.phy.buffers().put(frame);
                }
                (Progress::Open(_), false) => return self.segment(link, key, frame, len),
            }
        }
        if segment.is_request() {
            self.request(link, &segment, frame, len);
        } else {
            refuse(link, &segment);
            link.phy.buffers().put(frame);
        }
    }

    /// Gives a packet to the connection that it belongs to.
    fn segment(&mut self, link: &mut Link, key: Key, frame: Vec<u8>, len: usize) {
        let Some(connection) = self.connections.get_mut(key) else { return };
        let Progress::Open(stack) = &mut connection.progress else { return };
        link.phy.put(frame, len);
        let now = link.stack_now();
        let result = link.iface.poll_ingress_single(now, &mut link.phy, &mut stack.sockets);
        debug_assert!(result != PollIngressSingleResult::None, "there was a frame");
        if let Some(answer) = link.phy.take() {
            link.push(answer);
        }
        if stack.socket().recv_queue() >= PASS_ON {
            connection.exchange();
        }
        enqueue(link, connection, key);
    }

    /// The guest wants a connection.
    fn request(&mut self, link: &mut Link, segment: &Segment, frame: Vec<u8>, len: usize) {
        let opened = if self.connections.is_full() {
            link.counters.connections_refused += 1;
            None
        } else {
            link.destination(segment.tuple.remote).ok().and_then(|to| {
                let opened = sockets::connect_tcp(to);
                Some((to, opened.ok()?))
            })
        };
        let Some((to, (socket, state))) = opened else {
            refuse(link, segment);
            return link.phy.buffers().put(frame);
        };
        let progress = Progress::Connecting { to, request: frame, len };
        let request = Some(segment.sequence);
        let Some(key) = self.add(link, segment.tuple, socket, progress, request) else {
            return refuse(link, segment);
        };
        match state {
            Connecting::Done => self.accept(link, key),
            Connecting::Underway => {
                if let Some(connection) = self.connections.get_mut(key) {
                    arm(link, connection, key);
                }
            }
        }
    }

    fn add(
        &mut self,
        link: &mut Link,
        tuple: Tuple,
        socket: OwnedFd,
        progress: Progress,
        request: Option<u32>,
    ) -> Option<Key> {
        let connection = Connection {
            tuple,
            socket,
            progress,
            request,
            readable: true,
            writable: true,
            armed: Interest::empty(),
            read_all: false,
            passed_end: false,
            queued: false,
            timer: None,
        };
        let key = self.connections.insert(Box::new(connection)).ok()?;
        let connection = self.connections.get_mut(key)?;
        let added = link.poller.add(&connection.socket, token(key), Interest::empty());
        if added.is_err() {
            self.connections.remove(key);
            return None;
        }
        link.counters.connections += 1;
        self.by_tuple.insert(tuple, key);
        Some(key)
    }

    /// The host's side of a connection stands: the guest's request is answered.
    fn accept(&mut self, link: &mut Link, key: Key) {
        let mut stack = self.stack();
        let Some(connection) = self.connections.get_mut(key) else { return };
        let remote = connection.tuple.remote;
        let address = Some(IpAddress::Ipv4(*remote.ip()));
        // The port is not 0 and the socket is new: it cannot fail.
        let _ = stack.socket().listen(IpListenEndpoint { addr: address, port: remote.port() });
        let before = std::mem::replace(&mut connection.progress, Progress::Open(stack));
        if let Progress::Connecting { request, len, .. } = before {
            self.segment(link, key, request, len);
        }
    }

    /// A guest's end with its buffers.
    fn stack(&mut self) -> Stack {
        let large = self.large < MAX_LARGE;
        self.large += usize::from(large);
        match self.spare.iter().position(|stack| stack.large == large) {
            Some(index) => self.spare.swap_remove(index),
            None => Stack::new(large),
        }
    }

    fn remove(&mut self, link: &mut Link, key: Key, why: Left) {
        let Some(mut connection) = self.connections.remove(key) else { return };
        self.by_tuple.remove(&connection.tuple);
        link.timers.remove(&mut connection.timer, token(key));
        match connection.progress {
            Progress::Open(mut stack) => {
                self.large -= usize::from(stack.large);
                stack.socket().abort();
                if self.spare.iter().filter(|other| other.large == stack.large).count() < MAX_SPARE
                {
                    self.spare.push(stack);
                }
            }
            Progress::Connecting { request, .. } => link.phy.buffers().put(request),
        }
        match why {
            Left::Broken => sockets::reset(connection.socket),
            Left::Something | Left::Nothing => drop(connection.socket),
        }
    }

    /// Something happened to the host's socket.
    pub(super) fn event(&mut self, link: &mut Link, key: Key, what: Interest) {
        let Some(connection) = self.connections.get_mut(key) else { return };
        connection.armed = Interest::empty();
        if let Progress::Connecting { to, .. } = connection.progress {
            match sockets::resume_connect(&connection.socket, to) {
                Ok(Connecting::Done) => self.accept(link, key),
                Ok(Connecting::Underway) => arm(link, connection, key),
                Err(_) => self.give_up(link, key),
            }
            return;
        }
        let ended = what.intersects(Interest::HUP | Interest::ERR);
        connection.readable |= ended || what.intersects(READ);
        connection.writable |= ended || what.intersects(WRITE);
        // Towards the host it goes on even while the guest takes nothing.
        connection.exchange();
        arm(link, connection, key);
        enqueue(link, connection, key);
    }

    /// The host cannot connect: the guest's request is refused.
    fn give_up(&mut self, link: &mut Link, key: Key) {
        if let Some(connection) = self.connections.get_mut(key)
            && let Progress::Connecting { request, len, .. } = &connection.progress
            && let Ok(packet) = Packet::parse(request.get(ETHERNET..ETHERNET + len).unwrap_or(&[]))
            && let Some(segment) = Segment::parse(&packet)
        {
            refuse(link, &segment);
        }
        self.remove(link, key, Left::Nothing);
    }

    /// A timer of a connection is due.
    pub(super) fn timer(&mut self, link: &mut Link, key: Key) {
        if let Some(connection) = self.connections.get_mut(key) {
            connection.timer = None;
            enqueue(link, connection, key);
        }
    }

    /// The next frame of a connection for the guest.
    pub(super) fn output(&mut self, link: &mut Link, key: Key) -> Option<Frame> {
        let connection = self.connections.get_mut(key)?;
        connection.queued = false;
        connection.exchange();
        let Progress::Open(stack) = &mut connection.progress else { return None };
        let now = link.stack_now();
        link.iface.poll_egress(now, &mut link.phy, &mut stack.sockets);
        if let Some(frame) = link.phy.take() {
            enqueue(link, connection, key);
            return Some(frame);
        }
        match connection.left() {
            Left::Something => {
                arm(link, connection, key);
                let Progress::Open(stack) = &mut connection.progress else { return None };
                if let Some(at) = link.iface.poll_at(now, &stack.sockets) {
                    let at = Time::try_from(at.total_micros()).unwrap_or(0).max(link.now + RETRY);
                    link.schedule(&mut connection.timer, token(key), at);
                }
            }
            why => self.remove(link, key, why),
        }
        None
    }

    /// Whether another published connection can be taken.
    pub(super) fn has_room(&self, link: &Link) -> bool {
        if link.guest.is_some() {
            !self.connections.is_full()
        } else {
            self.waiting.len() < MAX_WAITING
        }
    }

    /// A published port was connected to.
    pub(super) fn publish(&mut self, link: &mut Link, socket: OwnedFd, port: u16) {
        sockets::prepare_tcp(&socket);
        let Some(guest) = link.guest else {
            self.waiting.push_back((socket, port));
            return;
        };
        let guest = SocketAddrV4::new(guest.address, port);
        let Some(tuple) = self.free_tuple(guest) else { return sockets::reset(socket) };
        let mut stack = self.stack();
        let local = (IpAddress::Ipv4(*tuple.remote.ip()), tuple.remote.port());
        let remote = (IpAddress::Ipv4(*guest.ip()), guest.port());
        // Neither address nor port is 0 and the socket is new: it cannot fail.
        let _ = stack.socket().connect(link.iface.context(), remote, local);
        let progress = Progress::Open(stack);
        if let Some(key) = self.add(link, tuple, socket, progress, None)
            && let Some(connection) = self.connections.get_mut(key)
        {
            enqueue(link, connection, key);
        }
    }

    /// The guest showed itself: those who waited for it are connected.
    pub(super) fn guest_came(&mut self, link: &mut Link) {
        for (socket, port) in std::mem::take(&mut self.waiting) {
            self.publish(link, socket, port);
        }
    }

    fn free_tuple(&mut self, guest: SocketAddrV4) -> Option<Tuple> {
        for _ in FIRST_PORT..=u16::MAX {
            let port = self.next_port;
            self.next_port = port.checked_add(1).unwrap_or(FIRST_PORT);
            let tuple = Tuple { guest, remote: SocketAddrV4::new(GATEWAY, port) };
            if !self.by_tuple.contains_key(&tuple) {
                return Some(tuple);
            }
        }
        None
    }
}

fn token(key: Key) -> Token {
    Token { kind: Kind::Tcp, key }
}

fn enqueue(link: &mut Link, connection: &mut Connection, key: Key) {
    if !connection.queued {
        connection.queued = true;
        link.ready.push_back(token(key));
    }
}

fn arm(link: &Link, connection: &mut Connection, key: Key) {
    let interest = connection.interest();
    if !connection.armed.contains(interest) {
        link.poller.arm(&connection.socket, token(key), interest);
        connection.armed = interest;
    }
}

/// Answers a packet that belongs to no connection with a reset (RFC 9293, 3.10.7.1).
fn refuse(link: &mut Link, segment: &Segment) {
    if segment.flags & RST != 0 {
        return;
    }
    let (sequence, acknowledged, flags) = if segment.flags & ACK != 0 {
        (segment.acknowledged, 0, RST)
    } else {
        let control = u32::from(segment.flags & SYN != 0) + u32::from(segment.flags & FIN != 0);
        let len = u32::try_from(segment.payload).unwrap_or(0) + control;
        (0, segment.sequence.wrapping_add(len), RST | ACK)
    };
    let Tuple { guest, remote } = segment.tuple;
    let mut tcp = Vec::with_capacity(20);
    tcp.extend(remote.port().to_be_bytes());
    tcp.extend(guest.port().to_be_bytes());
    tcp.extend(sequence.to_be_bytes());
    tcp.extend(acknowledged.to_be_bytes());
    tcp.extend([5 << 4, flags, 0, 0, 0, 0, 0, 0]);
    let mac = link.guest_mac();
    link.push_packet(mac, &Header::whole(*remote.ip(), *guest.ip(), TCP), &tcp);
}

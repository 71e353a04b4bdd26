//! A network for a guest that needs no rights on the host: what the guest sends ends here, and goes on through
//! ordinary sockets.
//!
//! The guest sees what QEMU's user network shows: 10.0.2.0/24 with the gateway 10.0.2.2, which is also the host's
//! loopback interface, the DNS server 10.0.2.3, and the address 10.0.2.15 by DHCP. ARP, DHCP and echo are answered
//! here ([`services`]); TCP ends in smoltcp ([`tcp`]); UDP, DNS and pings are flows with a time-out ([`datagram`]).
//! Ports of the host can be published into the guest.
//!
//! There are no queues between guest and host but the sockets' bounded buffers. [`UserNetBackend`] is driven by
//! whoever serves the card: [`NetBackend::send`] takes a frame and moves what it says to the host's sockets at once,
//! [`NetBackend::receive`] builds the next frame when the guest has room for it. An event thread waits for sockets
//! and timers; when there may be frames for the guest it calls `on_receive`, and whoever that is serves the card.
//!
//! The guest is not trusted: lengths are checked, senders that are not the guest are dropped, fragments are refused,
//! and everything that it can use up has a limit with a name.

mod config;
mod datagram;
mod frames;
mod link;
mod phy;
mod services;
mod slab;
mod sockets;
mod tcp;
mod timers;

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

pub use config::{
    Config, DNS, GATEWAY, LEASE, NETMASK, Publish, PublishError, Resolvers, Transport,
};
pub use datagram::MAX_FLOWS;
pub use tcp::{LARGE_BUFFER, MAX_CONNECTIONS, MAX_LARGE, SMALL_BUFFER};

use crate::netback::{Accepts, Frame, NetBackend};
use datagram::Datagrams;
use frames::{ETHERNET, ETHERTYPE_ARP, ETHERTYPE_IPV4, MAX_FRAME, Packet};
use link::{Guest, Link};
use slab::{Key, Kind, Token};
use sockets::{Poller, READ};
use tcp::Tcp;

/// Connections of a published port taken in one go.
const ACCEPT_BUDGET: usize = 64;
/// When the host had no file descriptor for a connection, it is tried again after so many microseconds.
const ACCEPT_RETRY: timers::Time = 100_000;

/// What happened so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Frames of the guest.
    pub sent: u64,
    /// Their bytes.
    pub sent_bytes: u64,
    /// Frames for the guest.
    pub received: u64,
    /// Their bytes.
    pub received_bytes: u64,
    /// Frames of the guest whose lengths or checksums are wrong.
    pub malformed: u64,
    /// Frames of the guest from an address that it cannot have.
    pub spoofed: u64,
    /// Fragments of packets, which are refused.
    pub fragments: u64,
    /// Frames of other protocols.
    pub unknown: u64,
    /// TCP connections.
    pub connections: u64,
    /// TCP connections refused because there are too many.
    pub connections_refused: u64,
    /// Flows of datagrams.
    pub flows: u64,
    /// Answers that the guest did not take in time.
    pub answers_lost: u64,
}

/// The network cannot be started.
#[derive(Debug)]
pub enum StartError {
    /// The MTU is not from 576 to 65521.
    Mtu(u16),
    /// A published port cannot be had.
    Publish(Publish, io::Error),
    /// The host refused something else.
    Host(io::Error),
}

impl fmt::Display for StartError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Mtu(mtu) => write!(f, "an MTU of {mtu} is not from 576 to 65521"),
            Self::Publish(publish, error) => {
                let Publish { host, transport, .. } = publish;
                match error.kind() {
                    io::ErrorKind::AddrInUse => {
                        write!(f, "cannot publish {transport} port {host}: it is in use")
                    }
                    io::ErrorKind::PermissionDenied => write!(
                        f,
                        "cannot publish {transport} port {host}: not permitted (ports below \
                         net.ipv4.ip_unprivileged_port_start need a privilege)"
                    ),
                    _ => write!(f, "cannot publish {transport} port {host}: {error}"),
                }
            }
            Self::Host(error) => write!(f, "the host refused: {error}"),
        }
    }
}

impl std::error::Error for StartError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Mtu(_) => None,
            Self::Publish(_, error) | Self::Host(error) => Some(error),
        }
    }
}

/// A published TCP port.
struct Listener {
    socket: OwnedFd,
    guest_port: u16,
    /// It waits until there is room for another connection.
    paused: bool,
    timer: Option<timers::Time>,
}

struct Net {
    link: Link,
    tcp: Tcp,
    datagrams: Datagrams,
    listeners: Vec<Listener>,
    stopping: bool,
}

impl Net {
    /// Takes a frame of the guest.
    fn input(&mut self, frame: Frame) {
        let bytes = frame.bytes;
        self.link.tick();
        self.link.counters.sent += 1;
        self.link.counters.sent_bytes += bytes.len() as u64;
        let kind = frames::ethernet(&bytes).filter(|_| bytes.len() <= MAX_FRAME);
        let payload = bytes.get(ETHERNET..).unwrap_or_default();
        let guest = match kind {
            Some((mac, ETHERTYPE_IPV4)) => match Packet::parse(payload) {
                Ok(packet) if packet.protocol == frames::TCP && self.admit(&packet, mac) => {
                    let len = packet.whole.len();
                    return self.tcp.input(&mut self.link, bytes, len);
                }
                Ok(packet) => self.packet(&packet, mac),
                Err(frames::Bad::Fragment) => {
                    self.link.counters.fragments += 1;
                    None
                }
                Err(frames::Bad::Malformed) => {
                    self.link.counters.malformed += 1;
                    None
                }
            },
            Some((_, ETHERTYPE_ARP)) => services::arp(&mut self.link, payload),
            Some(_) => {
                self.link.counters.unknown += 1;
                None
            }
            None => {
                self.link.counters.malformed += 1;
                None
            }
        };
        self.link.phy.buffers().put(bytes);
        if let Some(guest) = guest {
            self.learn(guest);
        }
    }

    /// Whether a packet comes from an address that the guest may have.
    fn admit(&mut self, packet: &Packet<'_>, mac: frames::Mac) -> bool {
        if !frames::is_guest(packet.source) {
            return false;
        }
        self.learn(Guest { mac, address: packet.source });
        true
    }

    fn learn(&mut self, guest: Guest) {
        if self.link.learn(guest) {
            self.tcp.guest_came(&mut self.link);
            self.resume_listeners();
        }
    }

    fn packet(&mut self, packet: &Packet<'_>, mac: frames::Mac) -> Option<Guest> {
        let link = &mut self.link;
        if packet.protocol == frames::UDP && services::is_dhcp(packet) {
            if packet.source.is_unspecified() || frames::is_guest(packet.source) {
                return services::dhcp(link, packet);
            }
        } else if self.admit(packet, mac) {
            self.datagram(packet);
            return None;
        }
        self.link.counters.spoofed += 1;
        None
    }

    fn datagram(&mut self, packet: &Packet<'_>) {
        let link = &mut self.link;
        match packet.protocol {
            frames::UDP => self.datagrams.udp(link, packet),
            frames::ICMP if services::is_echo_request(packet.payload) => {
                if [GATEWAY, DNS].contains(&packet.destination) {
                    services::echo(link, packet);
                } else {
                    self.datagrams.echo(link, packet);
                }
            }
            // Errors and answers that the guest sends concern nobody.
            frames::ICMP => {}
            _ => link.counters.unknown += 1,
        }
    }

    /// The next frame for the guest.
    fn output(&mut self) -> Option<Frame> {
        self.link.tick();
        let frame = self.next_frame()?;
        self.link.counters.received += 1;
        self.link.counters.received_bytes += frame.bytes.len() as u64;
        Some(frame)
    }

    fn next_frame(&mut self) -> Option<Frame> {
        loop {
            if let Some(frame) = self.link.answer() {
                return Some(frame);
            }
            let Token { kind, key } = self.link.ready.pop_front()?;
            let link = &mut self.link;
            let frame = match kind {
                Kind::Tcp => {
                    let frame = self.tcp.output(link, key);
                    self.resume_listeners();
                    frame
                }
                Kind::Datagram => self.datagrams.output(link, key),
                Kind::UdpListener => self.datagrams.listener_output(link, key),
                Kind::Wake | Kind::TcpListener => None,
            };
            if frame.is_some() {
                return frame;
            }
        }
    }

    /// Something happened to a socket.
    fn event(&mut self, token: Token, what: sockets::Interest) {
        let (link, key) = (&mut self.link, token.key);
        match token.kind {
            Kind::Tcp => self.tcp.event(link, key, what),
            Kind::Datagram => self.datagrams.event(link, key),
            Kind::UdpListener => self.datagrams.listener_event(link, key),
            Kind::TcpListener => self.accept(key),
            Kind::Wake => {}
        }
    }

    /// Looks at everything that is due.
    fn timers(&mut self) {
        while let Some(Token { kind, key }) = self.link.timers.due(self.link.now) {
            match kind {
                Kind::Tcp => self.tcp.timer(&mut self.link, key),
                Kind::Datagram => self.datagrams.timer(&mut self.link, key),
                Kind::TcpListener => {
                    if let Some(listener) = self.listeners.get_mut(key.index as usize) {
                        listener.timer = None;
                    }
                    self.accept(key);
                }
                Kind::UdpListener | Kind::Wake => {}
            }
        }
    }

    /// Takes connections of a published port.
    fn accept(&mut self, key: Key) {
        let token = Token { kind: Kind::TcpListener, key };
        let Some(listener) = self.listeners.get_mut(key.index as usize) else { return };
        for _ in 0..ACCEPT_BUDGET {
            if !self.tcp.has_room(&self.link) {
                listener.paused = true;
                return;
            }
            match sockets::accept(&listener.socket) {
                Ok(socket) => self.tcp.publish(&mut self.link, socket, listener.guest_port),
                Err(error) if sockets::would_wait(error) => break,
                // It was taken back, or (usually) there is no file descriptor for it.
                Err(_) => {
                    let at = self.link.now + ACCEPT_RETRY;
                    return self.link.schedule(&mut listener.timer, token, at);
                }
            }
        }
        self.link.poller.arm(&listener.socket, token, READ);
    }

    /// Goes on with published ports that waited for room.
    fn resume_listeners(&mut self) {
        if !self.tcp.has_room(&self.link) {
            return;
        }
        for (index, listener) in (0..).zip(&mut self.listeners) {
            if std::mem::take(&mut listener.paused) {
                self.link.poller.arm(&listener.socket, listener_token(index), READ);
            }
        }
    }
}

fn listener_token(index: u32) -> Token {
    Token { kind: Kind::TcpListener, key: Key { index, generation: 0 } }
}

struct Shared {
    net: Mutex<Net>,
    poller: Arc<Poller>,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Net> {
        self.net.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The event thread.
    fn run(&self, on_receive: &(dyn Fn() + Send + Sync)) {
        let mut events = Vec::new();
        loop {
            let most = {
                let mut net = self.lock();
                if net.stopping {
                    return;
                }
                net.link.tick();
                let next = net.link.timers.next();
                net.link.sleeps_until = Some(next.unwrap_or(timers::Time::MAX));
                next.map(|next| sockets::until(next, net.link.now))
            };
            self.poller.wait(most, &mut events);
            let work = {
                let mut net = self.lock();
                net.link.sleeps_until = None;
                net.link.tick();
                for (token, what) in events.drain(..) {
                    net.event(token, what);
                }
                net.timers();
                net.link.has_work() && !net.stopping
            };
            if work {
                on_receive();
            }
        }
    }
}

/// A running user network. Dropping it ends all its connections.
pub struct UserNet {
    shared: Arc<Shared>,
    published: Vec<(Publish, SocketAddr)>,
    thread: Option<JoinHandle<()>>,
}

impl fmt::Debug for UserNet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("UserNet").field("published", &self.published).finish_non_exhaustive()
    }
}

impl UserNet {
    /// Starts a network. `on_receive` is called on the network's own thread, with no lock held, when there may be
    /// frames for the guest: it must have somebody call [`NetBackend::receive`] until there are none, or do so itself.
    ///
    /// # Errors
    /// A published port cannot be had, or the host refuses a thread or a file descriptor.
    pub fn start(
        config: Config,
        on_receive: Arc<dyn Fn() + Send + Sync>,
    ) -> Result<(Self, UserNetBackend), StartError> {
        if !(576..=65_521).contains(&config.mtu) {
            return Err(StartError::Mtu(config.mtu));
        }
        raise_file_limit();
        let poller = Arc::new(Poller::new().map_err(StartError::Host)?);
        let publish = config.publish.clone();
        let mut net = Net {
            link: Link::new(config, Arc::clone(&poller)),
            tcp: Tcp::new(),
            datagrams: Datagrams::new(),
            listeners: Vec::new(),
            stopping: false,
        };
        let mut published = Vec::new();
        for publish in publish {
            let address =
                net.publish(publish).map_err(|error| StartError::Publish(publish, error))?;
            published.push((publish, address));
        }
        let shared = Arc::new(Shared { net: Mutex::new(net), poller });
        let of_thread = Arc::clone(&shared);
        let thread = thread::Builder::new()
            .name("usernet".into())
            .spawn(move || of_thread.run(&*on_receive))
            .map_err(StartError::Host)?;
        let backend = UserNetBackend { shared: Arc::clone(&shared) };
        Ok((Self { shared, published, thread: Some(thread) }, backend))
    }

    /// The published ports, and where the host listens for each.
    #[must_use]
    pub fn published(&self) -> &[(Publish, SocketAddr)] {
        &self.published
    }

    /// What happened so far.
    #[must_use]
    pub fn counters(&self) -> Counters {
        self.shared.lock().link.counters
    }

    /// TCP connections and flows of datagrams that are open.
    #[must_use]
    pub fn open(&self) -> (usize, usize) {
        let net = self.shared.lock();
        (net.tcp.len(), net.datagrams.len())
    }
}

impl Drop for UserNet {
    fn drop(&mut self) {
        {
            let mut net = self.shared.lock();
            net.stopping = true;
            let Net { link, tcp, datagrams, listeners, .. } = &mut *net;
            tcp.reset(link);
            datagrams.reset(link);
            listeners.clear();
        }
        self.shared.poller.wake();
        // `on_receive` may own what owns us.
        if let Some(thread) =
            self.thread.take().filter(|t| t.thread().id() != thread::current().id())
        {
            let _ = thread.join();
        }
    }
}

impl Net {
    fn publish(&mut self, publish: Publish) -> io::Result<SocketAddr> {
        let Publish { host, guest_port, transport } = publish;
        match transport {
            Transport::Tcp => {
                let socket = sockets::listen_tcp(host)?;
                let address = sockets::local_address(&socket)?;
                let index = u32::try_from(self.listeners.len()).unwrap_or(u32::MAX);
                self.link.poller.add(&socket, listener_token(index), READ)?;
                self.listeners.push(Listener { socket, guest_port, paused: false, timer: None });
                Ok(address)
            }
            Transport::Udp => {
                let socket = sockets::bind_udp(host)?;
                let address = sockets::local_address(&socket)?;
                self.datagrams.listen(&self.link, socket, guest_port)?;
                Ok(address)
            }
        }
    }
}

/// Each connection is a file descriptor: takes as many as we may without asking anybody.
fn raise_file_limit() {
    use rustix::process::{Resource, getrlimit, setrlimit};
    let mut limit = getrlimit(Resource::Nofile);
    let wanted = (MAX_CONNECTIONS + MAX_FLOWS) as u64 * 2;
    if limit.current.is_some_and(|current| current < wanted) {
        limit.current = Some(limit.maximum.map_or(wanted, |maximum| maximum.min(wanted)));
        // With fewer, connections beyond them are refused.
        let _ = setrlimit(Resource::Nofile, limit);
    }
}

/// The end of a [`UserNet`] that a card is plugged into.
pub struct UserNetBackend {
    shared: Arc<Shared>,
}

impl fmt::Debug for UserNetBackend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("UserNetBackend").finish_non_exhaustive()
    }
}

impl NetBackend for UserNetBackend {
    fn send(&mut self, frame: Frame) {
        self.shared.lock().input(frame);
    }
    fn receive(&mut self) -> Option<Frame> {
        self.shared.lock().output()
    }
    fn connected(&mut self, accepts: Accepts) {
        let mut net = self.shared.lock();
        let Net { link, tcp, datagrams, .. } = &mut *net;
        tcp.reset(link);
        link.reset(accepts);
        datagrams.reset(link);
    }
    fn buffer(&mut self) -> Vec<u8> {
        self.shared.lock().link.phy.buffers().take()
    }
    fn recycle(&mut self, bytes: Vec<u8>) {
        self.shared.lock().link.phy.buffers().put(bytes);
    }
}

#[cfg(test)]
mod tests;

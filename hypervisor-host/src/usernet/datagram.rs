//! UDP, DNS and ICMP echo: flows between the guest and one address each, with a socket of the host and a time-out.

mod dns;

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr, SocketAddrV4};
use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags};

use super::config::{DNS, DNS_PORT, GATEWAY, LEASE};
use super::frames::{self, Header, ICMP, Packet, UDP, u16_at};
use super::link::{HOST_UNREACHABLE, Link, PORT_UNREACHABLE, PROHIBITED};
use super::slab::{Key, Kind, Slab, Token};
use super::sockets::{self, READ, would_wait};
use super::timers::Time;
use crate::netback::Frame;
use dns::Question;

/// Flows at once; a new one beyond them takes the place of the one that was silent for longest.
pub const MAX_FLOWS: usize = 1024;
/// A flow that is silent for so long is forgotten, in microseconds.
const IDLE: Time = 120_000_000;
/// The same for DNS and echo, which ask and are answered.
const IDLE_QUERY: Time = 20_000_000;
/// The longest datagram.
const MAX_DATAGRAM: usize = 65_507;
/// The first port that the gateway shows for a peer of a published port.
const FIRST_PORT: u16 = 49_152;

/// Both ends as the guest sees them; of ICMP, the guest's port is the identifier and the other 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Ends {
    protocol: u8,
    guest: SocketAddrV4,
    remote: SocketAddrV4,
}

/// How a flow leaves.
enum Way {
    /// Through a socket of its own.
    Own(OwnedFd),
    /// Through a published port, to one of its peers.
    Published { socket: Arc<OwnedFd>, peer: SocketAddr, listener: usize },
    /// Through a socket of its own, to the resolvers in turn.
    Resolver { socket: OwnedFd, question: Option<Question>, tried: usize },
}

struct Flow {
    ends: Ends,
    way: Way,
    last: Time,
    queued: bool,
    timer: Option<Time>,
}

impl Flow {
    fn idle(&self) -> Time {
        match self.way {
            Way::Resolver { .. } => IDLE_QUERY,
            _ if self.ends.protocol == ICMP => IDLE_QUERY,
            _ => IDLE,
        }
    }
    fn socket(&self) -> &OwnedFd {
        match &self.way {
            Way::Own(socket) | Way::Resolver { socket, .. } => socket,
            Way::Published { socket, .. } => socket,
        }
    }
}

/// A published UDP port.
struct Listener {
    socket: Arc<OwnedFd>,
    guest_port: u16,
    queued: bool,
}

/// All flows.
pub(super) struct Datagrams {
    flows: Slab<Flow>,
    by_ends: HashMap<Ends, Key>,
    /// The flow of a published port's peer.
    by_peer: HashMap<(usize, SocketAddr), Key>,
    listeners: Vec<Listener>,
    next_port: u16,
    /// Which resolver is asked first.
    resolver: usize,
    /// Where datagrams are received.
    buffer: Vec<u8>,
}

impl Datagrams {
    pub(super) fn new() -> Self {
        Self {
            flows: Slab::new(MAX_FLOWS),
            by_ends: HashMap::new(),
            by_peer: HashMap::new(),
            listeners: Vec::new(),
            next_port: FIRST_PORT,
            resolver: 0,
            buffer: vec![0; MAX_DATAGRAM],
        }
    }

    pub(super) fn len(&self) -> usize {
        self.flows.len()
    }

    pub(super) fn reset(&mut self, link: &mut Link) {
        for key in self.flows.keys() {
            self.remove(link, key);
        }
        self.listeners.iter_mut().for_each(|listener| listener.queued = false);
        for index in 0..self.listeners.len() {
            self.arm_listener(link, index);
        }
    }

    /// Adds a published port.
    pub(super) fn listen(
        &mut self,
        link: &Link,
        socket: OwnedFd,
        guest_port: u16,
    ) -> std::io::Result<()> {
        let socket = Arc::new(socket);
        let token = listener_token(self.listeners.len());
        link.poller.add(&*socket, token, READ)?;
        self.listeners.push(Listener { socket, guest_port, queued: false });
        Ok(())
    }

    /// Takes a UDP packet of the guest that is not for a server of ours.
    pub(super) fn udp(&mut self, link: &mut Link, packet: &Packet<'_>) {
        let udp = packet.payload;
        let ports = (u16_at(udp, 0), u16_at(udp, 2), u16_at(udp, 4));
        let (Some(source), Some(destination), Some(len)) = ports else {
            link.counters.malformed += 1;
            return;
        };
        let Some(data) = udp.get(8..usize::from(len)).filter(|_| source != 0 && destination != 0)
        else {
            link.counters.malformed += 1;
            return;
        };
        let guest = SocketAddrV4::new(packet.source, source);
        let remote = SocketAddrV4::new(packet.destination, destination);
        let ends = Ends { protocol: UDP, guest, remote };
        if packet.destination == DNS && destination == DNS_PORT {
            return self.ask(link, ends, data);
        }
        let key = match self.by_ends.get(&ends) {
            Some(key) => *key,
            None => {
                let Ok(to) = link.destination(remote) else {
                    return link.unreachable(packet.whole, PROHIBITED);
                };
                let opened = sockets::connect_udp(to);
                match opened.ok().and_then(|socket| self.add(link, ends, Way::Own(socket))) {
                    Some(key) => key,
                    None => return link.unreachable(packet.whole, HOST_UNREACHABLE),
                }
            }
        };
        let Some(flow) = self.flows.get_mut(key) else { return };
        flow.last = link.now;
        let sent = match &flow.way {
            Way::Published { socket, peer, .. } => {
                rustix::net::sendto(socket, data, SendFlags::NOSIGNAL, peer)
            }
            Way::Own(socket) | Way::Resolver { socket, .. } => {
                rustix::net::send(socket, data, SendFlags::NOSIGNAL)
            }
        };
        if sent == Err(Errno::CONNREFUSED) {
            link.unreachable(packet.whole, PORT_UNREACHABLE);
        }
    }

    /// Takes a question for the DNS server.
    fn ask(&mut self, link: &mut Link, ends: Ends, data: &[u8]) {
        let Some(question) = Question::parse(data) else {
            link.counters.malformed += 1;
            return;
        };
        if link.config.restrict {
            return answer(link, ends, &question.refuse(dns::REFUSED));
        }
        let key = match self.by_ends.get(&ends) {
            Some(key) => *key,
            None => {
                let Some(socket) = self.resolver_socket(link, 0) else {
                    return answer(link, ends, &question.refuse(dns::SERVER_FAILURE));
                };
                let way = Way::Resolver { socket, question: None, tried: 0 };
                match self.add(link, ends, way) {
                    Some(key) => key,
                    None => return answer(link, ends, &question.refuse(dns::SERVER_FAILURE)),
                }
            }
        };
        let Some(flow) = self.flows.get_mut(key) else { return };
        flow.last = link.now;
        if let Way::Resolver { socket, question: last, tried } = &mut flow.way {
            *tried = 0;
            // A refusal of an earlier question shows here or when the answer is read.
            let sent = rustix::net::send(&*socket, data, SendFlags::NOSIGNAL);
            *last = Some(question);
            if sent.is_err_and(|error| !would_wait(error)) {
                self.next_resolver(link, key);
            }
        }
    }

    /// A socket for the resolver that comes `after` so many.
    fn resolver_socket(&self, link: &Link, after: usize) -> Option<OwnedFd> {
        let list = link.config.resolvers.list();
        let index = (self.resolver + after).checked_rem(list.len())?;
        sockets::connect_udp(*list.get(index)?).ok()
    }

    /// A resolver refused: the last question goes to the next one, or is answered with an error.
    fn next_resolver(&mut self, link: &mut Link, key: Key) {
        self.resolver = self.resolver.wrapping_add(1);
        let socket = self.resolver_socket(link, 0);
        let count = link.config.resolvers.list().len();
        let Some(flow) = self.flows.get_mut(key) else { return };
        let Way::Resolver { socket: old, question, tried } = &mut flow.way else { return };
        *tried += 1;
        let again = socket.filter(|_| *tried < count).zip(question.as_ref());
        if let Some((socket, question)) = again
            && link.poller.add(&socket, token(key), READ).is_ok()
            && rustix::net::send(&socket, question.bytes(), SendFlags::NOSIGNAL).is_ok()
        {
            *old = socket;
            return;
        }
        if let Some(question) = question.take() {
            let ends = flow.ends;
            answer(link, ends, &question.refuse(dns::SERVER_FAILURE));
        }
        self.remove(link, key);
    }

    /// Takes an echo request for somebody else.
    pub(super) fn echo(&mut self, link: &mut Link, packet: &Packet<'_>) {
        let Some(id) = u16_at(packet.payload, 4) else { return };
        let guest = SocketAddrV4::new(packet.source, id);
        let ends = Ends { protocol: ICMP, guest, remote: SocketAddrV4::new(packet.destination, 0) };
        let key = match self.by_ends.get(&ends) {
            Some(key) => *key,
            None => {
                let opened = match link.destination(ends.remote) {
                    Ok(to) => sockets::connect_ping(to.ip()),
                    Err(_) => Err(Errno::ACCESS),
                };
                match opened.map(|socket| self.add(link, ends, Way::Own(socket))) {
                    Ok(Some(key)) => key,
                    Err(Errno::ACCESS | Errno::PERM) => {
                        return link.unreachable(packet.whole, PROHIBITED);
                    }
                    _ => return link.unreachable(packet.whole, HOST_UNREACHABLE),
                }
            }
        };
        let Some(flow) = self.flows.get_mut(key) else { return };
        flow.last = link.now;
        // The kernel puts its own identifier and checksum in. A lost one is a lost ping.
        let _ = rustix::net::send(flow.socket(), packet.payload, SendFlags::NOSIGNAL);
    }

    fn add(&mut self, link: &mut Link, ends: Ends, way: Way) -> Option<Key> {
        if self.flows.is_full() {
            let keys = self.flows.keys().into_iter();
            let oldest =
                keys.min_by_key(|key| self.flows.get_mut(*key).map_or(Time::MAX, |flow| flow.last));
            self.remove(link, oldest?);
        }
        let flow = Flow { ends, way, last: link.now, queued: false, timer: None };
        let key = self.flows.insert(flow).ok()?;
        let flow = self.flows.get_mut(key)?;
        let (own, peer) = match &flow.way {
            Way::Published { peer, listener, .. } => (false, Some((*listener, *peer))),
            Way::Own(_) | Way::Resolver { .. } => (true, None),
        };
        if own && link.poller.add(flow.socket(), token(key), READ).is_err() {
            self.flows.remove(key);
            return None;
        }
        let at = link.now + flow.idle();
        link.schedule(&mut flow.timer, token(key), at);
        self.by_ends.insert(ends, key);
        if let Some(peer) = peer {
            self.by_peer.insert(peer, key);
        }
        link.counters.flows += 1;
        Some(key)
    }

    fn remove(&mut self, link: &mut Link, key: Key) {
        let Some(mut flow) = self.flows.remove(key) else { return };
        link.timers.remove(&mut flow.timer, token(key));
        self.by_ends.remove(&flow.ends);
        if let Way::Published { peer, listener, .. } = flow.way {
            self.by_peer.remove(&(listener, peer));
        }
    }

    /// A flow's socket has something.
    pub(super) fn event(&mut self, link: &mut Link, key: Key) {
        if let Some(flow) = self.flows.get_mut(key)
            && !flow.queued
        {
            flow.queued = true;
            link.ready.push_back(token(key));
        }
    }

    /// A published port has something.
    pub(super) fn listener_event(&mut self, link: &mut Link, key: Key) {
        if let Some(listener) = self.listeners.get_mut(key.index as usize)
            && !listener.queued
        {
            listener.queued = true;
            link.ready.push_back(Token { kind: Kind::UdpListener, key });
        }
    }

    /// A flow may have been silent for too long.
    pub(super) fn timer(&mut self, link: &mut Link, key: Key) {
        let Some(flow) = self.flows.get_mut(key) else { return };
        flow.timer = None;
        let end = flow.last + flow.idle();
        if end <= link.now {
            self.remove(link, key);
        } else {
            link.schedule(&mut flow.timer, token(key), end);
        }
    }

    /// The next datagram of a flow for the guest.
    pub(super) fn output(&mut self, link: &mut Link, key: Key) -> Option<Frame> {
        let flow = self.flows.get_mut(key)?;
        flow.queued = false;
        match rustix::net::recv(flow.socket(), self.buffer.as_mut_slice(), RecvFlags::empty()) {
            Ok((len, _)) => {
                flow.last = link.now;
                let ends = flow.ends;
                self.event(link, key);
                let data = self.buffer.get(..len)?;
                if ends.protocol == ICMP {
                    return echo_reply(link, ends, data);
                }
                Some(link.datagram(ends.remote, ends.guest, data))
            }
            Err(error) if would_wait(error) => {
                link.poller.arm(flow.socket(), token(key), READ);
                None
            }
            Err(error) => {
                if matches!(flow.way, Way::Resolver { .. }) {
                    self.next_resolver(link, key);
                } else {
                    // The packet that was refused is gone; its headers are those of the flow.
                    if error == Errno::CONNREFUSED && flow.ends.protocol == UDP {
                        let ends = flow.ends;
                        refuse(link, ends);
                    }
                    self.event(link, key);
                }
                None
            }
        }
    }

    /// The next datagram of a published port for the guest.
    pub(super) fn listener_output(&mut self, link: &mut Link, key: Key) -> Option<Frame> {
        let index = key.index as usize;
        let listener = self.listeners.get_mut(index)?;
        listener.queued = false;
        let buffer = self.buffer.as_mut_slice();
        let got = rustix::net::recvfrom(&*listener.socket, buffer, RecvFlags::empty());
        let (len, peer) = match got {
            Ok((len, _, peer)) => (len, SocketAddr::try_from(peer?).ok()),
            Err(error) => {
                if would_wait(error) {
                    self.arm_listener(link, index);
                } else {
                    self.listener_event(link, key); // an earlier answer was refused
                }
                return None;
            }
        };
        self.listener_event(link, key);
        let peer = peer?;
        let flow = match self.by_peer.get(&(index, peer)) {
            Some(flow) => *flow,
            None => self.add_peer(link, index, peer)?,
        };
        let flow = self.flows.get_mut(flow)?;
        flow.last = link.now;
        let Ends { guest, remote, .. } = flow.ends;
        Some(link.datagram(remote, guest, self.buffer.get(..len)?))
    }

    fn add_peer(&mut self, link: &mut Link, index: usize, peer: SocketAddr) -> Option<Key> {
        let listener = self.listeners.get(index)?;
        let address = link.guest.map_or(LEASE, |guest| guest.address);
        let guest = SocketAddrV4::new(address, listener.guest_port);
        let socket = Arc::clone(&listener.socket);
        let free = (FIRST_PORT..=u16::MAX).find_map(|_| {
            let port = self.next_port;
            self.next_port = port.checked_add(1).unwrap_or(FIRST_PORT);
            let ends = Ends { protocol: UDP, guest, remote: SocketAddrV4::new(GATEWAY, port) };
            (!self.by_ends.contains_key(&ends)).then_some(ends)
        })?;
        self.add(link, free, Way::Published { socket, peer, listener: index })
    }

    fn arm_listener(&self, link: &Link, index: usize) {
        if let Some(listener) = self.listeners.get(index) {
            link.poller.arm(&*listener.socket, listener_token(index), READ);
        }
    }
}

fn token(key: Key) -> Token {
    Token { kind: Kind::Datagram, key }
}

fn listener_token(index: usize) -> Token {
    let index = u32::try_from(index).unwrap_or(u32::MAX);
    Token { kind: Kind::UdpListener, key: Key { index, generation: 0 } }
}

/// Answers a datagram from the address that it went to.
fn answer(link: &mut Link, ends: Ends, data: &[u8]) {
    let frame = link.datagram(ends.remote, ends.guest, data);
    link.push(frame);
}

/// Tells the guest that nobody listens there.
fn refuse(link: &mut Link, ends: Ends) {
    let mut frame = Vec::new();
    let header = Header::whole(*ends.guest.ip(), *ends.remote.ip(), UDP);
    frames::start(&mut frame, [0; 6], &header, 8);
    frame.extend(ends.guest.port().to_be_bytes());
    frame.extend(ends.remote.port().to_be_bytes());
    frame.extend([0, 8, 0, 0]);
    link.unreachable(frame.get(frames::ETHERNET..).unwrap_or_default(), PORT_UNREACHABLE);
}

/// What a ping socket got, with the guest's identifier.
fn echo_reply(link: &mut Link, ends: Ends, data: &[u8]) -> Option<Frame> {
    let mut icmp = data.to_vec();
    icmp.get_mut(4..6)?.copy_from_slice(&ends.guest.port().to_be_bytes());
    frames::fill_icmp(&mut icmp);
    let IpAddr::V4(from) = IpAddr::V4(*ends.remote.ip()) else { return None };
    let mac = link.guest_mac();
    link.push_packet(mac, &Header::whole(from, *ends.guest.ip(), ICMP), &icmp);
    link.answer()
}

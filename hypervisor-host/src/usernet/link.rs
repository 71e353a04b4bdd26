//! What the protocols share: the way to the guest, the guest itself, time, and the host's addresses.

use std::collections::VecDeque;
use std::hash::{BuildHasher as _, RandomState};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, SocketAddrV4};
use std::sync::Arc;
use std::time::Instant;

use smoltcp::iface::{Config as InterfaceConfig, Interface};
use smoltcp::time::Instant as StackInstant;
use smoltcp::wire::{HardwareAddress, IpCidr, Ipv4Cidr};

use super::Counters;
use super::config::{Config, DNS, DNS_PORT, GATEWAY};
use super::frames::{self, BROADCAST_MAC, ETHERNET, Header, IPV4, Mac, is_inside};
use super::phy::Phy;
use super::slab::Token;
use super::sockets::Poller;
use super::timers::{Time, Timers};
use crate::netback::{Accepts, Frame};

/// Answers of ours (ARP, DHCP, echo, errors) that may wait until the guest takes them; more are lost.
const MAX_ANSWERS: usize = 256;
/// What a datagram may be cut into for the guest: 64 KiB.
const MAX_FRAGMENTS: usize = 128;

/// Bytes of a packet that an error quotes (RFC 1812, 4.3.2.3: the whole is at most 576).
const MAX_QUOTED: usize = 576 - IPV4 - 8;

/// The guest as it showed itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Guest {
    pub(super) mac: Mac,
    pub(super) address: Ipv4Addr,
}

/// See the module.
pub(super) struct Link {
    pub(super) config: Config,
    pub(super) poller: Arc<Poller>,
    pub(super) phy: Phy,
    pub(super) iface: Interface,
    pub(super) guest: Option<Guest>,
    /// What may have a frame for the guest; each at most once.
    pub(super) ready: VecDeque<Token>,
    pub(super) timers: Timers,
    pub(super) counters: Counters,
    /// Now, as of the last look at the clock.
    pub(super) now: Time,
    /// What the event thread wakes up for by itself; `None`: it is awake.
    pub(super) sleeps_until: Option<Time>,
    start: Instant,
    answers: VecDeque<Frame>,
    next_id: u16,
}

impl Link {
    pub(super) fn new(config: Config, poller: Arc<Poller>) -> Self {
        let mut phy = Phy::new(config.mtu);
        let iface = interface(&mut phy);
        Self {
            config,
            poller,
            phy,
            iface,
            guest: None,
            ready: VecDeque::new(),
            timers: Timers::default(),
            counters: Counters::default(),
            now: 0,
            sleeps_until: None,
            start: Instant::now(),
            answers: VecDeque::new(),
            next_id: 0,
        }
    }

    /// Another guest: nothing is known of it but what it can take.
    pub(super) fn reset(&mut self, accepts: Accepts) {
        self.phy.set_accepts(accepts);
        self.phy.set_guest(BROADCAST_MAC);
        self.iface = interface(&mut self.phy);
        self.guest = None;
        self.ready.clear();
        self.answers.clear();
    }

    /// Looks at the clock.
    pub(super) fn tick(&mut self) {
        self.now = u64::try_from(self.start.elapsed().as_micros()).unwrap_or(u64::MAX);
    }

    /// Now, for smoltcp.
    pub(super) fn stack_now(&self) -> StackInstant {
        StackInstant::from_micros(i64::try_from(self.now).unwrap_or(i64::MAX))
    }

    /// Has `token` looked at no later than `at`.
    pub(super) fn schedule(&mut self, entry: &mut Option<Time>, token: Token, at: Time) {
        self.timers.no_later(entry, token, at);
        if self.sleeps_until.is_some_and(|until| at < until) {
            self.sleeps_until = None;
            self.poller.wake();
        }
    }

    /// Remembers what the guest's frames say of it; whether it is the first to be known.
    pub(super) fn learn(&mut self, guest: Guest) -> bool {
        if self.guest == Some(guest) {
            return false;
        }
        self.phy.set_guest(guest.mac);
        self.guest.replace(guest).is_none()
    }

    /// Where the guest is on the wire.
    pub(super) fn guest_mac(&self) -> Mac {
        self.guest.map_or(BROADCAST_MAC, |guest| guest.mac)
    }

    /// The next answer of ours.
    pub(super) fn answer(&mut self) -> Option<Frame> {
        self.answers.pop_front()
    }

    /// Whether there is something for the guest.
    pub(super) fn has_work(&self) -> bool {
        !self.answers.is_empty() || !self.ready.is_empty()
    }

    /// Queues a frame.
    pub(super) fn push(&mut self, frame: Frame) {
        if self.answers.len() < MAX_ANSWERS {
            self.answers.push_back(frame);
        } else {
            self.counters.answers_lost += 1;
            self.phy.buffers().put(frame.bytes);
        }
    }

    /// Queues a whole packet for `to`.
    pub(super) fn push_packet(&mut self, to: Mac, header: &Header, payload: &[u8]) {
        let mut bytes = self.phy.buffers().take();
        frames::start(&mut bytes, to, header, payload.len());
        bytes.extend_from_slice(payload);
        self.push_built(bytes);
    }

    /// Queues a frame that lacks its checksum.
    fn push_built(&mut self, bytes: Vec<u8>) {
        let frame = self.finish(bytes);
        self.push(frame);
    }

    /// Fills in what a frame lacks.
    pub(super) fn finish(&mut self, mut bytes: Vec<u8>) -> Frame {
        let checksum_blank = self.phy.accepts().checksum_blank;
        frames::fill_checksum(&mut bytes, checksum_blank);
        Frame { bytes, checksum_blank, validated: true, gso: None }
    }

    /// A UDP datagram for the guest, the first frame of it; the others, where it must be cut, are queued.
    pub(super) fn datagram(&mut self, from: SocketAddrV4, to: SocketAddrV4, data: &[u8]) -> Frame {
        let len = u16::try_from(8 + data.len()).unwrap_or(u16::MAX);
        let mut udp = [0; 8];
        let [a, b, c, d, e, f, _, _] = &mut udp;
        [*a, *b] = from.port().to_be_bytes();
        [*c, *d] = to.port().to_be_bytes();
        [*e, *f] = len.to_be_bytes();
        let mut header = Header::whole(*from.ip(), *to.ip(), frames::UDP);
        let mut bytes = self.phy.buffers().take();
        frames::start(&mut bytes, self.guest_mac(), &header, usize::from(len));
        bytes.extend_from_slice(&udp);
        bytes.extend_from_slice(data);
        if IPV4 + usize::from(len) <= usize::from(self.config.mtu) {
            return self.finish(bytes);
        }
        // The parts have no transport header that could have its checksum filled in by anybody else.
        frames::fill_checksum(&mut bytes, false);
        let part = (usize::from(self.config.mtu) - IPV4) / 8 * 8;
        self.next_id = self.next_id.wrapping_add(1);
        header.id = self.next_id;
        let payload = bytes.get(ETHERNET + IPV4..).unwrap_or_default();
        let count = payload.len().div_ceil(part);
        let mut parts = Vec::with_capacity(count.min(MAX_FRAGMENTS));
        for (index, chunk) in payload.chunks(part).enumerate().take(MAX_FRAGMENTS) {
            let more = if index + 1 < count { 0x2000 } else { 0 };
            header.fragment = more | u16::try_from(index * part / 8).unwrap_or(0);
            let mut bytes = Vec::with_capacity(ETHERNET + IPV4 + chunk.len());
            frames::start(&mut bytes, self.guest_mac(), &header, chunk.len());
            bytes.extend_from_slice(chunk);
            parts.push(Frame { bytes, validated: true, ..Frame::default() });
        }
        self.phy.buffers().put(bytes);
        let mut parts = parts.into_iter();
        let first = parts.next().unwrap_or_default();
        parts.for_each(|frame| self.push(frame));
        first
    }

    /// Tells the guest that its packet (from its IP header on) did not arrive.
    pub(super) fn unreachable(&mut self, packet: &[u8], code: u8) {
        let (Some(from), Some(to)) =
            (frames::address_at(packet, 16), frames::address_at(packet, 12))
        else {
            return;
        };
        let mut icmp = vec![3, code, 0, 0, 0, 0, 0, 0];
        icmp.extend(packet.iter().take(MAX_QUOTED));
        frames::fill_icmp(&mut icmp);
        // Errors come from the gateway unless it is the destination itself that refuses.
        let from = if code == PORT_UNREACHABLE { from } else { GATEWAY };
        self.push_packet(self.guest_mac(), &Header::whole(from, to, frames::ICMP), &icmp);
    }

    /// What a destination of the guest is for the host.
    pub(super) fn destination(&self, to: SocketAddrV4) -> Result<SocketAddr, Refused> {
        let address = *to.ip();
        if let Some((_, host)) = self.config.aliases.iter().find(|(guest, _)| *guest == address) {
            return Ok(SocketAddr::new(IpAddr::V4(*host), to.port()));
        }
        if address == GATEWAY {
            let local = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), to.port());
            return if self.config.host_loopback { Ok(local) } else { Err(Refused) };
        }
        if self.config.restrict {
            return Err(Refused);
        }
        if address == DNS {
            let resolver = self.config.resolvers.list().first().copied();
            return resolver.filter(|_| to.port() == DNS_PORT).ok_or(Refused);
        }
        let special = address.is_loopback()
            || address.is_unspecified()
            || address.is_broadcast()
            || address.is_multicast()
            || address.octets().first() == Some(&0);
        if special || is_inside(address) {
            return Err(Refused);
        }
        Ok(SocketAddr::V4(to))
    }
}

/// The guest may not go there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Refused;

/// ICMP: nobody listens there.
pub(super) const PORT_UNREACHABLE: u8 = 3;
/// ICMP: it is forbidden.
pub(super) const PROHIBITED: u8 = 13;
/// ICMP: there is no way to it.
pub(super) const HOST_UNREACHABLE: u8 = 1;

fn interface(phy: &mut Phy) -> Interface {
    let mut config = InterfaceConfig::new(HardwareAddress::Ip);
    // Sequence numbers come from it; a hash with random keys is as good as it needs.
    config.random_seed = RandomState::new().hash_one(0_u8);
    let mut iface = Interface::new(config, phy, StackInstant::ZERO);
    iface.update_ip_addrs(|addresses| {
        let _ = addresses.push(IpCidr::Ipv4(Ipv4Cidr::new(GATEWAY, 24)));
    });
    // It answers as whomever the guest wants to talk with.
    iface.set_any_ip(true);
    iface
}

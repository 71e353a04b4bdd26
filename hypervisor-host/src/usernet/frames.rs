//! Ethernet and IPv4 as the guest sends and gets them: parsing that trusts nothing, and building.
//!
//! TCP itself is smoltcp's; here is what is around it, and everything of UDP and ICMP.

use std::net::Ipv4Addr;

use smoltcp::wire::checksum;
use smoltcp::wire::{IpAddress, IpProtocol};

use super::config::{BROADCAST, DNS, GATEWAY, NETMASK, NETWORK};

/// Bytes of an Ethernet header.
pub(super) const ETHERNET: usize = 14;
/// Bytes of an IPv4 header as we build them.
pub(super) const IPV4: usize = 20;
/// The longest frame: 64 KiB of IP behind an Ethernet header.
pub(super) const MAX_FRAME: usize = ETHERNET + 65_535;
/// The longest frame that we have the guest cut: whole pages, of which a Xen frame has few.
pub(super) const LONG_FRAME: usize = 16 * 4096;
/// Time to live of what we send.
const HOP_LIMIT: u8 = 64;

pub(super) const ETHERTYPE_IPV4: u16 = 0x0800;
pub(super) const ETHERTYPE_ARP: u16 = 0x0806;
pub(super) const ICMP: u8 = 1;
pub(super) const TCP: u8 = 6;
pub(super) const UDP: u8 = 17;

/// An Ethernet address.
pub(super) type Mac = [u8; 6];
/// Our own, as QEMU's.
pub(super) const GATEWAY_MAC: Mac = [0x52, 0x55, 10, 0, 2, 2];
pub(super) const BROADCAST_MAC: Mac = [0xff; 6];

/// A big-endian number in a packet.
pub(super) fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    bytes.get(at..)?.first_chunk().map(|bytes| u16::from_be_bytes(*bytes))
}

/// An address in a packet.
pub(super) fn address_at(bytes: &[u8], at: usize) -> Option<Ipv4Addr> {
    bytes.get(at..)?.first_chunk::<4>().map(|bytes| Ipv4Addr::from(*bytes))
}

/// The sender's Ethernet address and the type of a frame.
pub(super) fn ethernet(frame: &[u8]) -> Option<(Mac, u16)> {
    let source = frame.get(6..)?.first_chunk::<6>()?;
    // A multicast sender is none.
    if source.first()? & 1 != 0 {
        return None;
    }
    Some((*source, u16_at(frame, 12)?))
}

/// An IPv4 packet of the guest whose lengths hold together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Packet<'a> {
    pub(super) source: Ipv4Addr,
    pub(super) destination: Ipv4Addr,
    pub(super) protocol: u8,
    /// Header and payload, without what Ethernet pads.
    pub(super) whole: &'a [u8],
    pub(super) payload: &'a [u8],
}

/// Why a packet of the guest is not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Bad {
    /// Its lengths or its checksum are wrong.
    Malformed,
    /// It is a part of a packet.
    Fragment,
}

impl<'a> Packet<'a> {
    /// Reads what follows the Ethernet header.
    pub(super) fn parse(ip: &'a [u8]) -> Result<Self, Bad> {
        Self::checked(ip).ok_or(Bad::Malformed).and_then(|(packet, fragment)| {
            // Reassembly needs memory for as long as the guest likes; no guest with path MTU discovery fragments.
            if fragment { Err(Bad::Fragment) } else { Ok(packet) }
        })
    }

    fn checked(ip: &'a [u8]) -> Option<(Self, bool)> {
        let first = *ip.first()?;
        let header_len = usize::from(first & 0xf) * 4;
        let total = usize::from(u16_at(ip, 2)?);
        if first >> 4 != 4 || header_len < IPV4 || total < header_len {
            return None;
        }
        let whole = ip.get(..total)?;
        let (header, payload) = whole.split_at_checked(header_len)?;
        if checksum::data(header) != 0xffff {
            return None;
        }
        let packet = Self {
            source: address_at(ip, 12)?,
            destination: address_at(ip, 16)?,
            protocol: *ip.get(9)?,
            whole,
            payload,
        };
        Some((packet, u16_at(ip, 6)? & 0x3fff != 0))
    }
}

/// Whether the guest may have this address.
pub(super) fn is_guest(address: Ipv4Addr) -> bool {
    is_inside(address) && ![GATEWAY, DNS, NETWORK, BROADCAST].contains(&address)
}

/// Whether an address belongs to the guest's network.
pub(super) fn is_inside(address: Ipv4Addr) -> bool {
    u32::from(address) & u32::from(NETMASK) == u32::from(NETWORK)
}

/// Starts a frame in `buf`: Ethernet and IPv4 headers for a payload of `len` bytes.
pub(super) fn start(buf: &mut Vec<u8>, to: Mac, ip: &Header, len: usize) {
    buf.clear();
    ethernet_header(buf, to, ETHERTYPE_IPV4);
    let total = u16::try_from(IPV4 + len).unwrap_or(u16::MAX).to_be_bytes();
    let (id, fragment) = (ip.id.to_be_bytes(), ip.fragment.to_be_bytes());
    let mut header = [0_u8; IPV4];
    let fields = [0x45, 0, total[0], total[1], id[0], id[1], fragment[0], fragment[1], HOP_LIMIT];
    let rest =
        [ip.protocol, 0, 0].into_iter().chain(ip.source.octets()).chain(ip.destination.octets());
    for (to, from) in header.iter_mut().zip(fields.into_iter().chain(rest)) {
        *to = from;
    }
    let sum = !checksum::data(&header);
    [header[10], header[11]] = sum.to_be_bytes();
    buf.extend_from_slice(&header);
}

/// What an IPv4 header says.
#[derive(Clone, Copy, Debug)]
pub(super) struct Header {
    pub(super) source: Ipv4Addr,
    pub(super) destination: Ipv4Addr,
    pub(super) protocol: u8,
    /// Names a fragmented packet.
    pub(super) id: u16,
    /// Flags and offset.
    pub(super) fragment: u16,
}

impl Header {
    /// Of a packet in one piece.
    pub(super) fn whole(source: Ipv4Addr, destination: Ipv4Addr, protocol: u8) -> Self {
        Self { source, destination, protocol, id: 0, fragment: 0x4000 }
    }
}

/// Appends an Ethernet header.
pub(super) fn ethernet_header(buf: &mut Vec<u8>, to: Mac, kind: u16) {
    buf.extend_from_slice(&header_to(to, kind));
}

/// An Ethernet header.
pub(super) fn header_to(to: Mac, kind: u16) -> [u8; ETHERNET] {
    let mut header = [0; ETHERNET];
    let fields = to.into_iter().chain(GATEWAY_MAC).chain(kind.to_be_bytes());
    header.iter_mut().zip(fields).for_each(|(to, from)| *to = from);
    header
}

/// Where the checksum of a transport is.
fn checksum_offset(protocol: u8) -> Option<usize> {
    match protocol {
        TCP => Some(16),
        UDP => Some(6),
        _ => None,
    }
}

/// Fills in the TCP or UDP checksum of a frame that was built here or by smoltcp (headers without options); `blank`:
/// only the sum over the pseudo header.
pub(super) fn fill_checksum(frame: &mut [u8], blank: bool) {
    let (Some(source), Some(destination)) = (address_at(frame, 26), address_at(frame, 30)) else {
        return;
    };
    let protocol = frame.get(23).copied().unwrap_or_default();
    let Some(at) = checksum_offset(protocol) else { return };
    let Some(packet) = frame.get_mut(ETHERNET + IPV4..) else { return };
    if let Some(field) = packet.get_mut(at..at + 2) {
        field.fill(0);
    }
    let sum = pseudo_sum(source, destination, protocol, packet.len());
    let sum = if blank {
        sum
    } else {
        match !checksum::combine(&[sum, checksum::data(packet)]) {
            0 if protocol == UDP => 0xffff,
            sum => sum,
        }
    };
    if let Some(field) = packet.get_mut(at..at + 2) {
        field.copy_from_slice(&sum.to_be_bytes());
    }
}

fn pseudo_sum(source: Ipv4Addr, destination: Ipv4Addr, protocol: u8, len: usize) -> u16 {
    checksum::pseudo_header(
        &IpAddress::Ipv4(source),
        &IpAddress::Ipv4(destination),
        IpProtocol::from(protocol),
        u32::try_from(len).unwrap_or(u32::MAX),
    )
}

/// Buffers of frames, kept for the next ones.
#[derive(Debug, Default)]
pub(super) struct Buffers(Vec<Vec<u8>>);

/// Buffers that are kept.
const MAX_BUFFERS: usize = 64;

impl Buffers {
    /// One of any length and content.
    pub(super) fn take(&mut self) -> Vec<u8> {
        self.0.pop().unwrap_or_default()
    }
    /// Takes one back.
    pub(super) fn put(&mut self, buf: Vec<u8>) {
        if self.0.len() < MAX_BUFFERS && buf.capacity() <= MAX_FRAME * 2 {
            self.0.push(buf);
        }
    }
}

/// Fills in the checksum of an ICMP message.
pub(super) fn fill_icmp(icmp: &mut [u8]) {
    let field = |icmp: &mut [u8], sum: u16| {
        if let Some(field) = icmp.get_mut(2..4) {
            field.copy_from_slice(&sum.to_be_bytes());
        }
    };
    field(icmp, 0);
    let sum = !checksum::data(icmp);
    field(icmp, sum);
}

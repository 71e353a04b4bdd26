//! What the network answers by itself: ARP (RFC 826), DHCP (RFC 2131) and ICMP echo (RFC 792).

use std::net::{Ipv4Addr, SocketAddrV4};

use smoltcp::wire::{DhcpMessageType, DhcpOption, DhcpPacket, DhcpRepr, EthernetAddress};

use super::config::{BROADCAST, DNS, GATEWAY, LEASE, NETMASK};
use super::frames::{
    self, BROADCAST_MAC, ETHERNET, ETHERTYPE_ARP, GATEWAY_MAC, Header, ICMP, Mac, Packet,
    address_at, is_guest, u16_at,
};
use super::link::{Guest, Link};
use crate::netback::Frame;

/// Ethernet, IPv4, and the lengths of their addresses.
const ARP_KIND: [u8; 6] = [0, 1, 8, 0, 6, 4];
const ARP_REQUEST: u16 = 1;
const ARP_REPLY: u16 = 2;
const ECHO_REQUEST: u8 = 8;

/// The DHCP server's port, and the client's.
pub(super) const DHCP_SERVER: u16 = 67;
const DHCP_CLIENT: u16 = 68;
/// Seconds that a lease lasts.
const LEASE_TIME: u32 = 86_400;
/// DHCP option: the interface's MTU (RFC 2132, 5.1).
const OPTION_MTU: u8 = 26;
/// The shortest BOOTP message (RFC 1542, 2.1): some clients insist.
const MIN_BOOTP: usize = 300;

/// Answers an ARP packet; what it says of the guest.
pub(super) fn arp(link: &mut Link, arp: &[u8]) -> Option<Guest> {
    if arp.get(..6)? != ARP_KIND {
        link.counters.malformed += 1;
        return None;
    }
    let operation = u16_at(arp, 6)?;
    let mac: Mac = *arp.get(8..)?.first_chunk()?;
    let (sender, target) = (address_at(arp, 14)?, address_at(arp, 24)?);
    let known = is_guest(sender) && mac.first()? & 1 == 0;
    if !known && !sender.is_unspecified() {
        link.counters.spoofed += 1;
        return None;
    }
    if operation == ARP_REQUEST && [GATEWAY, DNS].contains(&target) {
        let mut bytes = link.phy.buffers().take();
        bytes.clear();
        frames::ethernet_header(&mut bytes, mac, ETHERTYPE_ARP);
        bytes.extend(ARP_KIND);
        bytes.extend(ARP_REPLY.to_be_bytes());
        bytes.extend(GATEWAY_MAC);
        bytes.extend(target.octets());
        bytes.extend(mac);
        bytes.extend(sender.octets());
        link.push(Frame { bytes, validated: true, ..Frame::default() });
    }
    known.then_some(Guest { mac, address: sender })
}

/// Answers an echo request to ourselves.
pub(super) fn echo(link: &mut Link, packet: &Packet<'_>) {
    let mut icmp = packet.payload.to_vec();
    if let Some(kind) = icmp.first_mut() {
        *kind = 0;
    }
    frames::fill_icmp(&mut icmp);
    let header = Header::whole(packet.destination, packet.source, ICMP);
    let fits = frames::IPV4 + icmp.len() <= usize::from(link.config.mtu);
    if fits {
        link.push_packet(link.guest_mac(), &header, &icmp);
    }
}

/// Whether an ICMP message is an echo request whose checksum is right.
pub(super) fn is_echo_request(icmp: &[u8]) -> bool {
    icmp.len() >= 8
        && icmp.starts_with(&[ECHO_REQUEST, 0])
        && smoltcp::wire::checksum::data(icmp) == 0xffff
}

/// Whether a UDP packet is for the DHCP server.
pub(super) fn is_dhcp(packet: &Packet<'_>) -> bool {
    let to_us = [GATEWAY, BROADCAST, Ipv4Addr::BROADCAST].contains(&packet.destination);
    to_us && u16_at(packet.payload, 2) == Some(DHCP_SERVER)
}

/// Answers a DHCP message; the guest, when it was given its address.
pub(super) fn dhcp(link: &mut Link, packet: &Packet<'_>) -> Option<Guest> {
    let len = usize::from(u16_at(packet.payload, 4)?);
    let message = DhcpPacket::new_checked(packet.payload.get(8..len)?).ok()?;
    let request = DhcpRepr::parse(&message).ok()?;
    let asked = request.requested_ip.unwrap_or(request.client_ip);
    let for_another = request.server_identifier.is_some_and(|server| server != GATEWAY);
    let kind = match request.message_type {
        DhcpMessageType::Discover => DhcpMessageType::Offer,
        DhcpMessageType::Request if for_another => return None,
        DhcpMessageType::Request if asked == LEASE => DhcpMessageType::Ack,
        DhcpMessageType::Request => DhcpMessageType::Nak,
        DhcpMessageType::Inform => DhcpMessageType::Ack,
        _ => return None,
    };
    let refused = kind == DhcpMessageType::Nak;
    let informed = request.message_type == DhcpMessageType::Inform;
    let mtu = link.config.mtu.to_be_bytes();
    let options = [DhcpOption { kind: OPTION_MTU, data: &mtu }];
    let reply = DhcpRepr {
        message_type: kind,
        transaction_id: request.transaction_id,
        secs: 0,
        client_hardware_address: request.client_hardware_address,
        client_ip: if refused { Ipv4Addr::UNSPECIFIED } else { request.client_ip },
        your_ip: if refused || informed { Ipv4Addr::UNSPECIFIED } else { LEASE },
        server_ip: if refused { Ipv4Addr::UNSPECIFIED } else { GATEWAY },
        router: (!refused).then_some(GATEWAY),
        subnet_mask: (!refused).then_some(NETMASK),
        relay_agent_ip: Ipv4Addr::UNSPECIFIED,
        broadcast: request.broadcast,
        requested_ip: None,
        client_identifier: None,
        server_identifier: Some(GATEWAY),
        parameter_request_list: None,
        dns_servers: (!refused).then(|| [DNS].into_iter().collect()),
        max_size: None,
        lease_duration: (!refused && !informed).then_some(LEASE_TIME),
        renew_duration: None,
        rebind_duration: None,
        additional_options: if refused { &[] } else { &options },
    };
    let mut data = vec![0; reply.buffer_len().max(MIN_BOOTP)];
    reply.emit(&mut DhcpPacket::new_unchecked(data.as_mut_slice())).ok()?;
    let EthernetAddress(mac) = request.client_hardware_address;
    // RFC 2131, 4.1: to the address that it uses; else it has none yet, which a broadcast always reaches.
    let (to, to_mac) = if !refused && is_guest(request.client_ip) {
        (request.client_ip, mac)
    } else {
        (Ipv4Addr::BROADCAST, BROADCAST_MAC)
    };
    let from = SocketAddrV4::new(GATEWAY, DHCP_SERVER);
    let mut frame = link.datagram(from, SocketAddrV4::new(to, DHCP_CLIENT), &data);
    if let Some(destination) = frame.bytes.get_mut(..ETHERNET).and_then(|h| h.get_mut(..6)) {
        destination.copy_from_slice(&to_mac);
    }
    link.push(frame);
    let leased = kind == DhcpMessageType::Ack && !informed && mac.first()? & 1 == 0;
    leased.then_some(Guest { mac, address: LEASE })
}

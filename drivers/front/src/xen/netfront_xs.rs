//! What netfront and its backend agree on through xenstore (`xen/include/public/io/netif.h`).
//! The data path is in [`super::netfront`].

use janus_proto::addr::{GrantRef, Port};

use super::nodes::{NodeError, NodeFault, Nodes, Publication, publish};
use crate::class::NetOffloads;

/// Nodes of the backend that a frontend reads before it publishes its rings.
pub const OFFER_NODES: &[&str] = &[
    "feature-rx-copy",
    "feature-sg",
    "feature-gso-tcpv4",
    "feature-gso-tcpv6",
    "feature-no-csum-offload",
    "feature-split-event-channels",
    "multi-queue-max-queues",
    "mtu",
];

/// Nodes of the frontend's own directory, written by the toolstack.
pub const OWN_NODES: &[&str] = &["mac", "mtu"];

/// What the backend offers, and what the toolstack says of the card.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Offer {
    /// Ethernet address.
    pub mac: [u8; 6],
    /// Largest IP packet in bytes.
    pub mtu: u16,
    /// Frames may use several slots (and so be longer than a page).
    pub scatter_gather: bool,
    /// One port for each ring.
    pub split_event_channels: bool,
    /// Pairs of rings that the card may have, at least 1.
    pub queues: u32,
    /// What the device can take over: for sending, as far as the backend offers it; for receiving, as we ask.
    pub offloads: NetOffloads,
}

impl Offer {
    /// Reads it from the backend's directory and our own; `wanted` are the offloads that the kernel can use.
    ///
    /// # Errors
    /// A node that matters is missing or nonsense, or the backend cannot copy (no backend of the last
    /// fifteen years).
    pub fn read(backend: &Nodes, own: &Nodes, wanted: NetOffloads) -> Result<Self, NodeError> {
        if !backend.feature("feature-rx-copy") {
            return Err(NodeError { node: "feature-rx-copy", fault: NodeFault::Missing });
        }
        let mac = own.text("mac")?.ok_or(NodeError { node: "mac", fault: NodeFault::Missing })?;
        let mac = parse_mac(mac).ok_or(NodeError { node: "mac", fault: NodeFault::Nonsense })?;
        let mtu = match own.number::<u16>("mtu")? {
            Some(mtu) => Some(mtu),
            None => backend.number::<u16>("mtu")?,
        };
        let mtu = mtu.unwrap_or(1500);
        // The smallest that IPv4 allows, and what fits a frame of 16-bit length with its header.
        if !(68..=65_521).contains(&mtu) {
            return Err(NodeError { node: "mtu", fault: NodeFault::OutOfRange });
        }
        let scatter_gather = backend.feature("feature-sg");
        let mut offloads = wanted;
        if backend.feature("feature-no-csum-offload") {
            offloads.remove(NetOffloads::TX_CHECKSUM | NetOffloads::TX_TSO4 | NetOffloads::TX_TSO6);
        }
        if !scatter_gather || !backend.feature("feature-gso-tcpv4") {
            offloads.remove(NetOffloads::TX_TSO4);
        }
        if !scatter_gather || !backend.feature("feature-gso-tcpv6") {
            offloads.remove(NetOffloads::TX_TSO6);
        }
        let split_event_channels = backend.feature("feature-split-event-channels");
        let queues = backend.number::<u32>("multi-queue-max-queues")?.unwrap_or(1).max(1);
        Ok(Self { mac, mtu, scatter_gather, split_event_channels, queues, offloads })
    }
}

/// Six bytes in hexadecimal, between colons.
fn parse_mac(text: &str) -> Option<[u8; 6]> {
    let mut mac = [0; 6];
    let mut parts = text.split(':');
    for byte in &mut mac {
        let part = parts.next()?;
        if part.len() != 2 || !part.bytes().all(|b| b.is_ascii_hexdigit()) {
            return None;
        }
        *byte = u8::from_str_radix(part, 16).ok()?;
    }
    let unicast = mac[0] & 1 == 0 && mac != [0; 6];
    (parts.next().is_none() && unicast).then_some(mac)
}

/// Ports of a card.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ports {
    /// One for both rings.
    Shared(Port),
    /// One for each.
    Split {
        /// Of the transmit ring.
        tx: Port,
        /// Of the receive ring.
        rx: Port,
    },
}

/// The nodes that tell the backend of the rings.
#[must_use]
pub fn publication(tx: GrantRef, rx: GrantRef, ports: Ports, offloads: NetOffloads) -> Publication {
    let mut nodes = Publication::new();
    publish(&mut nodes, "tx-ring-ref", tx);
    publish(&mut nodes, "rx-ring-ref", rx);
    match ports {
        Ports::Shared(port) => publish(&mut nodes, "event-channel", port),
        Ports::Split { tx, rx } => {
            publish(&mut nodes, "event-channel-tx", tx);
            publish(&mut nodes, "event-channel-rx", rx);
        }
    }
    publish(&mut nodes, "request-rx-copy", 1);
    publish(&mut nodes, "feature-rx-notify", 1);
    // Receive buffers are single pages, so a long MTU or a coalesced frame needs several.
    publish(&mut nodes, "feature-sg", 1);
    let checksum = offloads.contains(NetOffloads::RX_CHECKSUM);
    publish(&mut nodes, "feature-no-csum-offload", u8::from(!checksum));
    publish(&mut nodes, "feature-ipv6-csum-offload", u8::from(checksum));
    let large = checksum && offloads.contains(NetOffloads::RX_LARGE);
    publish(&mut nodes, "feature-gso-tcpv4", u8::from(large));
    publish(&mut nodes, "feature-gso-tcpv6", u8::from(large));
    nodes
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nodes(values: &[(&str, &str)]) -> Nodes {
        let mut nodes = Nodes::default();
        for (name, value) in values {
            nodes.insert(name, value.as_bytes());
        }
        nodes
    }

    const LINUX: &[(&str, &str)] = &[
        ("feature-rx-copy", "1"),
        ("feature-sg", "1"),
        ("feature-gso-tcpv4", "1"),
        ("feature-gso-tcpv6", "1"),
        ("feature-split-event-channels", "1"),
    ];

    #[test]
    fn linux_netback_is_understood() {
        let own = nodes(&[("mac", "00:16:3e:01:02:fF")]);
        let offer = Offer::read(&nodes(LINUX), &own, NetOffloads::all()).unwrap();
        assert_eq!(offer.mac, [0, 0x16, 0x3e, 1, 2, 0xff]);
        assert_eq!(offer.mtu, 1500);
        assert!(offer.scatter_gather && offer.split_event_channels);
        assert_eq!(offer.offloads, NetOffloads::all());
    }

    #[test]
    fn offloads_need_the_backend_and_each_other() {
        let own = nodes(&[("mac", "00:16:3e:01:02:03"), ("mtu", "9000")]);
        let bare = nodes(&[("feature-rx-copy", "1")]);
        let offer = Offer::read(&bare, &own, NetOffloads::all()).unwrap();
        assert_eq!(offer.mtu, 9000);
        assert!(!offer.scatter_gather && !offer.split_event_channels);
        let rx = NetOffloads::RX_CHECKSUM | NetOffloads::RX_LARGE;
        assert_eq!(offer.offloads, rx | NetOffloads::TX_CHECKSUM);
        let mut none = LINUX.to_vec();
        none.push(("feature-no-csum-offload", "1"));
        assert_eq!(Offer::read(&nodes(&none), &own, NetOffloads::all()).unwrap().offloads, rx);
        let nothing = Offer::read(&nodes(LINUX), &own, NetOffloads::empty()).unwrap();
        assert!(nothing.offloads.is_empty());
    }

    #[test]
    fn nonsense_names_its_node() {
        let read = |backend: &[(&str, &str)], own: &[(&str, &str)]| {
            Offer::read(&nodes(backend), &nodes(own), NetOffloads::all()).unwrap_err()
        };
        assert_eq!(read(&[], &[]).node, "feature-rx-copy");
        assert_eq!(read(LINUX, &[]), NodeError { node: "mac", fault: NodeFault::Missing });
        for bad in [
            "",
            "00:16:3e:01:02",
            "00:16:3e:01:02:03:04",
            "0:16:3e:01:02:03",
            "00:16:3e:01:02:+3",
            "01:16:3e:01:02:03",
            "00:00:00:00:00:00",
        ] {
            let error = read(LINUX, &[("mac", bad)]);
            assert_eq!(error, NodeError { node: "mac", fault: NodeFault::Nonsense }, "{bad}");
        }
        for bad in ["67", "65522", "70000"] {
            let error = read(LINUX, &[("mac", "00:16:3e:01:02:03"), ("mtu", bad)]);
            assert_eq!(error, NodeError { node: "mtu", fault: NodeFault::OutOfRange });
        }
    }

    #[test]
    fn publication_follows_the_offloads() {
        let (tx, rx) = (GrantRef(8), GrantRef(9));
        let value = |ports, offloads, name: &str| {
            let nodes = publication(tx, rx, ports, offloads);
            nodes.into_iter().find(|(n, _)| n == name).map(|(_, v)| v)
        };
        let shared = Ports::Shared(Port(4));
        assert_eq!(value(shared, NetOffloads::all(), "event-channel").as_deref(), Some("4"));
        assert_eq!(value(shared, NetOffloads::all(), "feature-gso-tcpv4").as_deref(), Some("1"));
        let split = Ports::Split { tx: Port(5), rx: Port(6) };
        assert_eq!(value(split, NetOffloads::empty(), "event-channel"), None);
        assert_eq!(value(split, NetOffloads::empty(), "event-channel-rx").as_deref(), Some("6"));
        // A coalesced frame has no checksum, so it needs that offload too.
        assert_eq!(value(split, NetOffloads::RX_LARGE, "feature-gso-tcpv4").as_deref(), Some("0"));
        assert_eq!(
            value(split, NetOffloads::empty(), "feature-no-csum-offload").as_deref(),
            Some("1")
        );
    }
}

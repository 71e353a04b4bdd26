//! What netback and its frontend agree on through xenstore (`xen/include/public/io/netif.h`).

use janus_proto::addr::{GrantRef, Port};

use crate::memory::{BadNode, FrontendNodes};

/// What a backend offers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NetbackFeatures {
    /// Frames in several pages.
    pub sg: bool,
    /// Long TCP frames.
    pub gso: bool,
    /// One event channel for each direction.
    pub split_event_channels: bool,
    /// The guest says which multicast groups it wants.
    pub multicast_control: bool,
    /// The guest says how flows are shared out.
    pub control_ring: bool,
    /// Pairs of rings that one card may have.
    pub max_queues: u32,
}

impl Default for NetbackFeatures {
    fn default() -> Self {
        Self {
            sg: true,
            gso: true,
            split_event_channels: true,
            multicast_control: true,
            control_ring: true,
            max_queues: 4,
        }
    }
}

/// Nodes of the backend's directory to write before a frontend connects.
#[must_use]
pub fn offer_nodes(features: NetbackFeatures) -> Vec<(&'static str, String)> {
    let flag = |on: bool| u8::from(on).to_string();
    let mut nodes = vec![
        ("feature-rx-copy", flag(true)),
        ("feature-sg", flag(features.sg)),
        ("feature-gso-tcpv4", flag(features.gso)),
        ("feature-gso-tcpv6", flag(features.gso)),
        ("feature-ipv6-csum-offload", flag(true)),
        ("feature-split-event-channels", flag(features.split_event_channels)),
        ("feature-multicast-control", flag(features.multicast_control)),
        ("feature-ctrl-ring", flag(features.control_ring)),
    ];
    if features.max_queues > 1 {
        nodes.push(("multi-queue-max-queues", features.max_queues.to_string()));
    }
    nodes
}

/// What the frontend published of one pair of rings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Frontend {
    /// Transmit ring.
    pub tx_ring: GrantRef,
    /// Receive ring.
    pub rx_ring: GrantRef,
    /// Where to notify it of transmission.
    pub tx_port: Port,
    /// Where to notify it of reception; the same port if it is not split.
    pub rx_port: Port,
    /// It takes frames in several pages.
    pub sg: bool,
    /// It takes long TCP frames over IPv4.
    pub gso_tcpv4: bool,
    /// It takes long TCP frames over IPv6.
    pub gso_tcpv6: bool,
    /// It takes frames whose checksum is not filled in.
    pub checksum_offload: bool,
    /// It has a control ring, and so takes hashes with frames.
    pub hash: bool,
}

/// What the frontend published of all its card.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FrontendCard {
    /// Its pairs of rings, at least one.
    pub queues: Vec<Frontend>,
    /// It says which multicast groups it wants.
    pub multicast_control: bool,
    /// Its control ring, and where to notify it.
    pub control: Option<(GrantRef, Port)>,
}

impl FrontendCard {
    /// Reads its directory through `read`.
    ///
    /// # Errors
    /// A node is missing or nonsense, or there are more queues than offered.
    pub fn read(
        read: &dyn Fn(&str) -> Option<String>,
        offered: NetbackFeatures,
    ) -> Result<Self, BadNode> {
        let nodes = FrontendNodes(read);
        let control = match nodes.optional("ctrl-ring-ref")?.filter(|_| offered.control_ring) {
            Some(ring) => Some((GrantRef(ring), Port(nodes.required("event-channel-ctrl")?))),
            None => None,
        };
        let queue = |prefix: &str| -> Result<Frontend, BadNode> {
            let in_queue = |node: &str| read(&format!("{prefix}{node}"));
            let rings = FrontendNodes(&in_queue);
            Ok(Frontend { hash: control.is_some(), ..Frontend::of(&rings, &nodes)? })
        };
        let queues = match nodes.optional::<u32>("multi-queue-num-queues")? {
            None | Some(1) => vec![queue("")?],
            Some(count) if count == 0 || count > offered.max_queues => {
                return Err(BadNode("multi-queue-num-queues"));
            }
            Some(count) => (0..count)
                .map(|index| queue(&format!("queue-{index}/")))
                .collect::<Result<_, _>>()?,
        };
        let multicast_control =
            offered.multicast_control && nodes.feature("request-multicast-control");
        Ok(Self { queues, multicast_control, control })
    }
}

impl Frontend {
    /// Reads the directory of a card with one pair of rings through `read`.
    ///
    /// # Errors
    /// A node is missing or nonsense, or it does not ask for reception by copy.
    pub fn read(read: &dyn Fn(&str) -> Option<String>) -> Result<Self, BadNode> {
        let nodes = FrontendNodes(read);
        Self::of(&nodes, &nodes)
    }

    /// The rings are named in one directory, what the card can do in another.
    fn of(rings: &FrontendNodes<'_>, nodes: &FrontendNodes<'_>) -> Result<Self, BadNode> {
        if !nodes.feature("request-rx-copy") {
            return Err(BadNode("request-rx-copy"));
        }
        let (tx_port, rx_port) = match rings.optional("event-channel")? {
            Some(port) => (port, port),
            None => (rings.required("event-channel-tx")?, rings.required("event-channel-rx")?),
        };
        Ok(Self {
            tx_ring: GrantRef(rings.required("tx-ring-ref")?),
            rx_ring: GrantRef(rings.required("rx-ring-ref")?),
            tx_port: Port(tx_port),
            rx_port: Port(rx_port),
            sg: nodes.feature("feature-sg"),
            gso_tcpv4: nodes.feature("feature-gso-tcpv4"),
            gso_tcpv6: nodes.feature("feature-gso-tcpv6"),
            checksum_offload: !nodes.feature("feature-no-csum-offload"),
            hash: false,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(extra: &[(&str, &str)]) -> Result<FrontendCard, BadNode> {
        let base = [("request-rx-copy", "1"), ("feature-sg", "1")];
        let find = |name: &str| {
            let mut all = extra.iter().chain(&base);
            all.find(|node| node.0 == name).map(|node| node.1.to_owned())
        };
        FrontendCard::read(&find, NetbackFeatures { max_queues: 2, ..NetbackFeatures::default() })
    }

    #[test]
    fn a_frontends_directory_is_read_with_suspicion() {
        let one = [("tx-ring-ref", "8"), ("rx-ring-ref", "9"), ("event-channel", "3")];
        let card = read(&one).unwrap();
        assert_eq!((card.queues.len(), card.multicast_control, card.control), (1, false, None));
        let both = [
            ("multi-queue-num-queues", "2"),
            ("queue-0/tx-ring-ref", "8"),
            ("queue-0/rx-ring-ref", "9"),
            ("queue-0/event-channel", "3"),
            ("queue-1/tx-ring-ref", "10"),
            ("queue-1/rx-ring-ref", "11"),
            ("queue-1/event-channel-tx", "4"),
            ("queue-1/event-channel-rx", "5"),
            ("request-multicast-control", "1"),
            ("ctrl-ring-ref", "12"),
            ("event-channel-ctrl", "6"),
        ];
        let card = read(&both).unwrap();
        assert!(card.multicast_control && card.queues.iter().all(|queue| queue.sg && queue.hash));
        assert_eq!(card.control, Some((GrantRef(12), Port(6))));
        let second = card.queues[1];
        assert_eq!((second.tx_ring, second.rx_port), (GrantRef(10), Port(5)));
        for (index, bad) in [
            (1, "tx-ring-ref"),
            (2, "rx-ring-ref"),
            (3, "event-channel-tx"),
            (6, "event-channel-tx"),
            (7, "event-channel-rx"),
            (10, "event-channel-ctrl"),
        ] {
            let mut some = both.to_vec();
            some.remove(index);
            assert_eq!(read(&some), Err(BadNode(bad)));
        }
        for count in ["0", "3", "4294967295", "-1", "x"] {
            let mut some = both.to_vec();
            some[0].1 = count;
            assert_eq!(read(&some), Err(BadNode("multi-queue-num-queues")), "{count}");
        }
        assert_eq!(read(&[("request-rx-copy", "0")]), Err(BadNode("request-rx-copy")));
    }
}

//! Which queue of a card a frame goes to: by a hash of its flow, so that a flow stays in order.

use janus_proto::abi::xen_io::netif::{HashAlgorithm, HashTypes};

/// Bytes of a Toeplitz key at most, as Linux's backend.
pub(super) const KEY_BYTES: usize = 40;

const ETHERNET: usize = 14;
const TCP: u8 = 6;

/// How flows are hashed.
#[derive(Clone, Debug)]
pub struct Hash {
    /// The frontend's choice; none: ours.
    pub algorithm: HashAlgorithm,
    /// Flows that it wants a hash of.
    pub types: HashTypes,
    /// The key of the algorithm.
    pub key: [u8; KEY_BYTES],
    /// Queues by the hash modulo its length; empty: by the hash modulo the queues.
    pub mapping: Vec<u32>,
}

impl Default for Hash {
    fn default() -> Self {
        let (algorithm, types) = (HashAlgorithm::NONE, HashTypes::empty());
        Self { algorithm, types, key: [0; KEY_BYTES], mapping: Vec::new() }
    }
}

/// A hash that the frontend asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FlowHash {
    /// Of what: one of [`HashTypes`].
    pub of: HashTypes,
    /// The hash.
    pub value: u32,
}

/// The addresses and ports of a packet, in the order of their places in it.
struct Flow {
    bytes: [u8; 36],
    /// Bytes of both addresses.
    addresses: usize,
    /// TCP, with its ports behind the addresses.
    has_ports: bool,
}

impl Flow {
    fn of(frame: &[u8]) -> Option<Self> {
        let packet = frame.get(ETHERNET..)?;
        let (addresses, transport, tcp) = match frame.get(12..ETHERNET)? {
            [0x08, 0x00] => {
                let header = usize::from(packet.first()? & 15) * 4;
                let place = u16::from_be_bytes([*packet.get(6)?, *packet.get(7)?]);
                // More fragments, or not the first: the others have no ports.
                let whole = place & 0x3fff == 0;
                (packet.get(12..20)?, packet.get(header..), whole && *packet.get(9)? == TCP)
            }
            [0x86, 0xdd] => (packet.get(8..40)?, packet.get(40..), *packet.get(6)? == TCP),
            _ => return None,
        };
        let mut bytes = [0; 36];
        bytes.get_mut(..addresses.len())?.copy_from_slice(addresses);
        let ports = transport.and_then(|transport| transport.get(..4)).filter(|_| tcp);
        if let Some(ports) = ports {
            bytes.get_mut(addresses.len()..addresses.len() + 4)?.copy_from_slice(ports);
        }
        Some(Self { bytes, addresses: addresses.len(), has_ports: ports.is_some() })
    }

    fn bytes(&self, with_ports: bool) -> &[u8] {
        let len = self.addresses + if with_ports { 4 } else { 0 };
        self.bytes.get(..len).unwrap_or_default()
    }
}

impl Hash {
    /// The hash that the frontend asked for, if the frame is of such a flow.
    #[must_use]
    pub fn of(&self, frame: &[u8]) -> Option<FlowHash> {
        if self.algorithm != HashAlgorithm::TOEPLITZ || self.types.is_empty() {
            return None;
        }
        let flow = Flow::of(frame)?;
        let (plain, tcp) = match flow.addresses {
            8 => (HashTypes::IPV4, HashTypes::IPV4_TCP),
            _ => (HashTypes::IPV6, HashTypes::IPV6_TCP),
        };
        let of = [tcp, plain]
            .into_iter()
            .find(|of| self.types.contains(*of) && (*of == plain || flow.has_ports))?;
        Some(FlowHash { of, value: toeplitz(&self.key, flow.bytes(of == tcp)) })
    }

    /// The queue of so many that a frame goes to.
    #[must_use]
    pub fn queue(&self, frame: &[u8], queues: usize) -> usize {
        let Some(last) = queues.checked_sub(1).filter(|last| *last > 0) else { return 0 };
        let value = match self.of(frame) {
            Some(hash) if !self.mapping.is_empty() => {
                let index = hash.value as usize % self.mapping.len();
                let queue = self.mapping.get(index).map_or(0, |queue| *queue as usize);
                return queue.min(last);
            }
            Some(hash) => hash.value,
            // FNV-1a (draft-eastlake-fnv): good enough for a few queues.
            None => Flow::of(frame).map_or(0, |flow| {
                let step =
                    |hash: u32, byte: &u8| (hash ^ u32::from(*byte)).wrapping_mul(0x0100_0193);
                flow.bytes(flow.has_ports).iter().fold(0x811c_9dc5, step)
            }),
        };
        value as usize % queues
    }
}

/// The Toeplitz hash (Microsoft's "RSS hashing functions"; `netif.h`).
fn toeplitz(key: &[u8; KEY_BYTES], bytes: &[u8]) -> u32 {
    let bit =
        |index: usize| key.get(index / 8).is_some_and(|byte| byte & (0x80 >> (index % 8)) != 0);
    // The 32 bits of the key that begin at the bit of the input.
    let mut window = u32::from_be_bytes([key[0], key[1], key[2], key[3]]);
    let mut hash = 0;
    for index in 0..bytes.len() * 8 {
        if bytes.get(index / 8).is_some_and(|byte| byte & (0x80 >> (index % 8)) != 0) {
            hash ^= window;
        }
        window = window << 1 | u32::from(bit(index + 32));
    }
    hash
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The key and packets of Microsoft's "Verifying the RSS hash calculation".
    const KEY: [u8; KEY_BYTES] = [
        0x6d, 0x5a, 0x56, 0xda, 0x25, 0x5b, 0x0e, 0xc2, 0x41, 0x67, 0x25, 0x3d, 0x43, 0xa3, 0x8f,
        0xb0, 0xd0, 0xca, 0x2b, 0xcb, 0xae, 0x7b, 0x30, 0xb4, 0x77, 0xcb, 0x2d, 0xa3, 0x80, 0x30,
        0xf2, 0x0c, 0x6a, 0x42, 0xb7, 0x3b, 0xbe, 0xac, 0x01, 0xfa,
    ];

    fn frame(source: [u8; 4], destination: [u8; 4], ports: [u16; 2], protocol: u8) -> Vec<u8> {
        let mut frame = vec![0; 14 + 20 + 20];
        frame[12] = 8;
        frame[14] = 0x45;
        frame[14 + 9] = protocol;
        frame[14 + 12..14 + 16].copy_from_slice(&source);
        frame[14 + 16..14 + 20].copy_from_slice(&destination);
        frame[34..36].copy_from_slice(&ports[0].to_be_bytes());
        frame[36..38].copy_from_slice(&ports[1].to_be_bytes());
        frame
    }

    #[test]
    fn hashes_are_those_of_the_published_table() {
        let types = HashTypes::ALL;
        let hash =
            Hash { algorithm: HashAlgorithm::TOEPLITZ, types, key: KEY, mapping: Vec::new() };
        for (source, destination, ports, tcp, plain) in [
            ([66, 9, 149, 187], [161, 142, 100, 80], [2794, 1766], 0x51cc_c178, 0x323e_8fc2),
            ([199, 92, 111, 2], [65, 69, 140, 83], [14230, 4739], 0xc626_b0ea, 0xd718_262a),
            ([24, 19, 198, 95], [12, 22, 207, 184], [12898, 38024], 0x5c2b_394a, 0xd2d0_a5de),
        ] {
            let frame = |protocol| frame(source, destination, ports, protocol);
            let expected = Some(FlowHash { of: HashTypes::IPV4_TCP, value: tcp });
            assert_eq!(hash.of(&frame(6)), expected);
            let expected = Some(FlowHash { of: HashTypes::IPV4, value: plain });
            assert_eq!(hash.of(&frame(17)), expected);
            let mut fragment = frame(6);
            fragment[14 + 6] = 0x20;
            assert_eq!(hash.of(&fragment), expected, "a fragment has no ports to trust");
            let only = Hash { types: HashTypes::IPV4, ..hash.clone() };
            assert_eq!(only.of(&frame(6)), expected);
        }
    }

    #[test]
    fn any_bytes_go_to_some_queue() {
        let mapping = vec![9; 3];
        let mapped =
            Hash { algorithm: HashAlgorithm::TOEPLITZ, types: HashTypes::ALL, key: KEY, mapping };
        let whole = frame([1, 2, 3, 4], [5, 6, 7, 8], [1, 2], 6);
        for hash in [Hash::default(), mapped.clone()] {
            for len in 0..whole.len() {
                for queues in [0, 1, 3, 8] {
                    let queue = hash.queue(&whole[..len], queues);
                    assert!(queue < queues.max(1), "{len} of {queues}: {queue}");
                }
            }
        }
        let spread: std::collections::BTreeSet<_> = (1..100)
            .map(|port| Hash::default().queue(&frame([1, 2, 3, 4], [5, 6, 7, 8], [port, 80], 6), 4))
            .collect();
        assert_eq!(spread.len(), 4, "flows use all queues");
        let named = Hash { mapping: vec![2], ..mapped };
        assert_eq!(named.queue(&whole, 4), 2);
    }
}

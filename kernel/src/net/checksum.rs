//! The Internet checksum (RFC 1071) in 64-bit words, and where it goes in a frame.

use janus_front::class::{PartialChecksum, Segmentation};

/// Bytes of an Ethernet header.
pub(super) const ETHERNET_HEADER: usize = 14;
const ETHERTYPE_IPV4: [u8; 2] = [0x08, 0x00];
const PROTOCOL_TCP: u8 = 6;
const PROTOCOL_UDP: u8 = 17;

/// The ones' complement sum of `data` as big-endian 16-bit words, not complemented.
#[must_use]
pub fn sum(data: &[u8]) -> u16 {
    // RFC 1071, 2 (B): the sum does not depend on byte order, so little-endian words do, swapped at the end.
    // The two halves of each word are summed apart: no carry to look after for 2^32 words.
    let (mut low, mut high) = (0_u64, 0_u64);
    let (blocks, rest) = data.as_chunks::<32>();
    for block in blocks {
        let (words, _) = block.as_chunks::<8>();
        for word in words {
            let word = u64::from_le_bytes(*word);
            low += word & 0xFFFF_FFFF;
            high += word >> 32;
        }
    }
    let (words, tail) = rest.as_chunks::<8>();
    for word in words {
        let word = u64::from_le_bytes(*word);
        low += word & 0xFFFF_FFFF;
        high += word >> 32;
    }
    let mut last = [0_u8; 8];
    for (to, from) in last.iter_mut().zip(tail) {
        *to = *from;
    }
    let last = u64::from_le_bytes(last);
    fold(low + (last & 0xFFFF_FFFF) + high + (last >> 32)).swap_bytes()
}

/// Folds a sum of words to 16 bits, carries around.
#[expect(clippy::cast_possible_truncation, reason = "the last fold leaves 16 bits")]
fn fold(sum: u64) -> u16 {
    let sum = (sum & 0xFFFF_FFFF) + (sum >> 32);
    let sum = (sum & 0xFFFF) + (sum >> 16 & 0xFFFF) + (sum >> 32);
    let sum = (sum & 0xFFFF) + (sum >> 16);
    let sum = (sum & 0xFFFF) + (sum >> 16);
    sum as u16
}

fn add(a: u16, b: u16) -> u16 {
    fold(u64::from(a) + u64::from(b))
}

/// A TCP or UDP packet over IPv4 in an Ethernet frame, unfragmented: where its parts are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Transport {
    tcp: bool,
    /// Where the TCP or UDP header starts, in the frame.
    start: usize,
    /// Where IP says that the packet ends, in the frame.
    end: usize,
    destination_port: u16,
    /// TCP's flags; 0 for UDP.
    flags: u8,
    header_len: usize,
}

fn u16_at(frame: &[u8], at: usize) -> Option<u16> {
    frame.get(at..)?.first_chunk().map(|bytes| u16::from_be_bytes(*bytes))
}

impl Transport {
    /// Finds the parts; `None` for everything else and for what does not hold together.
    pub(super) fn parse(frame: &[u8]) -> Option<Self> {
        if frame.get(12..14)? != ETHERTYPE_IPV4 {
            return None;
        }
        let ip = frame.get(ETHERNET_HEADER..)?;
        let [version_and_len, ..] = *ip.first_chunk::<20>()?;
        let ip_header = usize::from(version_and_len & 0xF) * 4;
        let total = usize::from(u16_at(ip, 2)?);
        // More fragments, or not the first: the transport header is not whole.
        if version_and_len >> 4 != 4 || u16_at(ip, 6)? & 0x3FFF != 0 {
            return None;
        }
        let protocol = *ip.get(9)?;
        let tcp = match protocol {
            PROTOCOL_TCP => true,
            PROTOCOL_UDP => false,
            _ => return None,
        };
        let minimum = if tcp { 20 } else { 8 };
        if ip_header < 20 || total < ip_header + minimum || total > ip.len() {
            return None;
        }
        let start = ETHERNET_HEADER + ip_header;
        let (flags, header_len) = if tcp {
            (*frame.get(start + 13)?, usize::from(*frame.get(start + 12)? >> 4) * 4)
        } else {
            (0, minimum)
        };
        if header_len < minimum || ip_header + header_len > total {
            return None;
        }
        Some(Self {
            tcp,
            start,
            end: ETHERNET_HEADER + total,
            destination_port: u16_at(frame, start + 2)?,
            flags,
            header_len,
        })
    }

    /// The port of a TCP connection request (SYN without ACK or RST).
    pub(super) fn connection_request(&self) -> Option<u16> {
        const FIN_SYN_RST_ACK: u8 = 0b1_0111;
        const SYN: u8 = 0b0_0010;
        (self.tcp && self.flags & FIN_SYN_RST_ACK == SYN).then_some(self.destination_port)
    }

    /// Where the checksum is, in bytes from `start`.
    fn checksum_offset(&self) -> usize {
        if self.tcp { 16 } else { 6 }
    }

    /// The sum over the pseudo header (RFC 9293, 3.1; RFC 768).
    fn pseudo_sum(&self, frame: &[u8]) -> u16 {
        let addresses = frame.get(ETHERNET_HEADER + 12..ETHERNET_HEADER + 20).unwrap_or_default();
        let protocol = if self.tcp { PROTOCOL_TCP } else { PROTOCOL_UDP };
        let len = u16::try_from(self.end - self.start).unwrap_or(u16::MAX);
        add(add(sum(addresses), u16::from(protocol)), len)
    }

    /// Whether the checksum of a received packet is right.
    pub(super) fn verify(&self, frame: &[u8]) -> bool {
        if !self.tcp && u16_at(frame, self.start + self.checksum_offset()) == Some(0) {
            return true; // RFC 768: the sender made none
        }
        let packet = frame.get(self.start..self.end).unwrap_or_default();
        add(self.pseudo_sum(frame), sum(packet)) == 0xFFFF
    }

    fn store(&self, frame: &mut [u8], checksum: u16) {
        let at = self.start + self.checksum_offset();
        if let Some(field) = frame.get_mut(at..at + 2) {
            field.copy_from_slice(&checksum.to_be_bytes());
        }
    }

    /// Fills in the whole checksum.
    pub(super) fn fill(&self, frame: &mut [u8]) {
        self.store(frame, 0);
        let packet = frame.get(self.start..self.end).unwrap_or_default();
        let checksum = !add(self.pseudo_sum(frame), sum(packet));
        let unfilled = !self.tcp && checksum == 0;
        self.store(frame, if unfilled { 0xFFFF } else { checksum });
    }

    /// Fills in the sum over the pseudo header only, and says where the device must do the rest.
    pub(super) fn fill_partially(&self, frame: &mut [u8]) -> Option<PartialChecksum> {
        let pseudo = self.pseudo_sum(frame);
        self.store(frame, pseudo);
        Some(PartialChecksum {
            start: u16::try_from(self.start).ok()?,
            offset: u16::try_from(self.checksum_offset()).ok()?,
        })
    }

    /// How the device is to cut this packet.
    pub(super) fn segmentation(&self, mss: u16) -> Option<Segmentation> {
        let header_len = u16::try_from(self.start + self.header_len).ok()?;
        self.tcp.then_some(Segmentation { mss, header_len, ipv6: false })
    }

    /// Where the TCP header starts, how long it is, and where the packet ends.
    #[cfg(test)]
    pub(super) fn extent(&self) -> (usize, usize, usize) {
        (self.start, self.header_len, self.end)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use smoltcp::wire::checksum::data as oracle;

    proptest! {
        /// Against smoltcp's own sum, at every alignment and length.
        #[test]
        fn the_sum_is_that_of_another_implementation(
            data in proptest::collection::vec(any::<u8>(), 0..3000),
            skip in 0_usize..9,
        ) {
            let data = data.get(skip..).unwrap_or_default();
            // 0 and 0xFFFF are the same number in ones' complement.
            let same = |s: u16| if s == 0xFFFF { 0 } else { s };
            prop_assert_eq!(same(sum(data)), same(oracle(data)));
        }

        #[test]
        fn no_frame_makes_the_parser_fail(data in proptest::collection::vec(any::<u8>(), 0..120)) {
            let mut frame = data;
            if let Some(kind) = frame.get_mut(12..15) {
                kind.copy_from_slice(&[8, 0, 0x45]);
            }
            if let Some(t) = Transport::parse(&frame) {
                t.verify(&frame);
                t.fill(&mut frame);
                prop_assert!(t.verify(&frame));
                prop_assert!(t.end <= frame.len() && t.start + t.header_len <= t.end);
            }
        }
    }

    #[test]
    fn long_runs_of_ones_do_not_overflow() {
        assert_eq!(sum(&vec![0xFF; 65_536]), 0xFFFF);
        assert_eq!(sum(&[0x12]), 0x1200);
        assert_eq!(sum(&[]), 0);
    }
}

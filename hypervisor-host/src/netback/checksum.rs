//! The checksum of a TCP or UDP packet in a frame, for those who fill it in or have it filled in.

/// Where a packet's checksum is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    /// Where summing begins: the header of the protocol.
    pub(crate) start: u16,
    /// Where the sum goes, from there.
    pub(crate) offset: u16,
    /// Bytes of all headers.
    pub(crate) header_len: u16,
}

/// Finds it; `None`: the frame is no TCP or UDP packet, or is cut off.
pub(crate) fn place(bytes: &[u8]) -> Option<Place> {
    const ETHERNET: usize = 14;
    let kind = u16::from_be_bytes([*bytes.get(12)?, *bytes.get(13)?]);
    let (protocol, start) = match kind {
        0x0800 => {
            (*bytes.get(ETHERNET + 9)?, ETHERNET + usize::from(bytes.get(ETHERNET)? & 15) * 4)
        }
        0x86dd => (*bytes.get(ETHERNET + 6)?, ETHERNET + 40),
        _ => return None,
    };
    let (offset, own) = match protocol {
        6 => (16, usize::from(bytes.get(start + 12)? >> 4) * 4),
        17 => (6, 8),
        _ => return None,
    };
    if start + own > bytes.len() {
        return None;
    }
    let header_len = u16::try_from(start + own).ok()?;
    Some(Place { start: u16::try_from(start).ok()?, offset, header_len })
}

/// Fills in a sum that covers everything from `start` on; `None`: there is no place for it.
pub(crate) fn fill(bytes: &mut [u8], start: u16, offset: u16) -> Option<()> {
    let (start, offset) = (usize::from(start), usize::from(offset));
    let mut sum = 0_u32;
    for pair in bytes.get(start..)?.chunks(2) {
        let word = u16::from_be_bytes([*pair.first()?, pair.get(1).copied().unwrap_or(0)]);
        sum = sum.wrapping_add(word.into());
        sum = (sum & 0xffff) + (sum >> 16);
    }
    let sum = !u16::try_from(sum & 0xffff).ok()?;
    let to = bytes.get_mut(start + offset..)?.first_chunk_mut::<2>()?;
    // A sum of 0 means "none" to UDP (RFC 768), and both zeroes are the same to the arithmetic.
    *to = if sum == 0 { u16::MAX } else { sum }.to_be_bytes();
    Some(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_filled_sum_makes_all_words_add_up_to_ones() {
        for len in [20, 21, 64, 1500] {
            let mut bytes: Vec<u8> =
                (0..len).map(|n: u32| u8::try_from(n * 7 % 256).unwrap()).collect();
            // What a driver leaves there is the sum over the pseudo header: here, nothing.
            bytes[8..10].fill(0);
            fill(&mut bytes, 2, 6).unwrap();
            let mut sum = 0_u32;
            for pair in bytes[2..].chunks(2) {
                sum += u32::from(u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)]));
            }
            while sum > 0xffff {
                sum = (sum & 0xffff) + (sum >> 16);
            }
            assert_eq!(sum, 0xffff, "{len}");
        }
        assert_eq!(fill(&mut [0; 10], 8, 1), None);
        assert_eq!(fill(&mut [0; 10], 11, 0), None);
    }
}

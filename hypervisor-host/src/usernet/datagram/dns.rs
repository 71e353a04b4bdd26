//! As much of DNS (RFC 1035) as it takes to answer with an error.

/// RCODE: the server could not answer.
pub(super) const SERVER_FAILURE: u8 = 2;
/// RCODE: the server will not answer.
pub(super) const REFUSED: u8 = 5;

/// Bytes of a header.
const HEADER: usize = 12;
/// Bytes of a name.
const MAX_NAME: usize = 255;
/// Bytes of a question over UDP that are kept.
const MAX_QUESTION: usize = 1232;

/// A question of the guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Question {
    bytes: Vec<u8>,
    /// Where the first question ends.
    end: usize,
}

impl Question {
    /// Reads a datagram; `None`: it is no question.
    pub(super) fn parse(data: &[u8]) -> Option<Self> {
        let response = *data.get(2)? & 0x80 != 0;
        if data.len() < HEADER || data.len() > MAX_QUESTION || response {
            return None;
        }
        let name = data.get(HEADER..)?.iter().take(MAX_NAME);
        let mut end = HEADER;
        let mut label = 0;
        for byte in name {
            end += 1;
            match (label, *byte) {
                (0, 0) => {
                    let end = end + 4; // type and class
                    return (end <= data.len()).then(|| Self { bytes: data.to_vec(), end });
                }
                (0, len @ 1..=63) => label = len,
                (0, _) => return None, // a pointer has nowhere to point
                _ => label -= 1,
            }
        }
        None
    }

    /// All of it.
    pub(super) fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The answer that says no.
    pub(super) fn refuse(&self, code: u8) -> Vec<u8> {
        let (id, flags) = (self.bytes.get(..2).unwrap_or_default(), self.bytes.get(2).copied());
        let mut answer = id.to_vec();
        // A response, opcode and "recursion desired" as asked; recursion available.
        answer.extend([0x80 | flags.unwrap_or_default() & 0x79, 0x80 | code]);
        answer.extend([0, 1, 0, 0, 0, 0, 0, 0]);
        answer.extend_from_slice(self.bytes.get(HEADER..self.end).unwrap_or_default());
        answer
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn questions_are_told_from_nonsense() {
        let mut data = vec![0x12, 0x34, 1, 0, 0, 1, 0, 0, 0, 0, 0, 1];
        data.extend(b"\x07example\x03org\0\0\x01\0\x01");
        let end = data.len();
        data.extend([0, 0, 41, 4, 208, 0, 0, 0, 0, 0, 0]); // EDNS
        let question = Question::parse(&data).unwrap();
        let answer = question.refuse(SERVER_FAILURE);
        assert_eq!(answer.len(), end);
        assert_eq!(answer[..12], [0x12, 0x34, 0x81, 0x82, 0, 1, 0, 0, 0, 0, 0, 0]);
        assert_eq!(answer[12..], data[12..end]);
        for cut in 0..end {
            assert_eq!(Question::parse(&data[..cut]), None, "{cut}");
        }
        data[2] |= 0x80;
        assert_eq!(Question::parse(&data), None, "an answer");
        let pointer = [0, 0, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0xc0, 12, 0, 1, 0, 1];
        assert_eq!(Question::parse(&pointer), None);
    }
}

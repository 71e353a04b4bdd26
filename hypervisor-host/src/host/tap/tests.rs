//! The headers of the frames that a TAP interface carries: where the checksum lies, and headers that lie about it.

use super::*;

/// Ethernet, IPv4 of 20 bytes, TCP of 20 bytes, one byte of data.
fn tcp() -> Vec<u8> {
    let mut bytes = vec![0; 14 + 20 + 20 + 1];
    bytes[12..14].copy_from_slice(&[8, 0]);
    bytes[14] = 0x45;
    bytes[23] = 6;
    bytes[46] = 0x50;
    bytes
}

#[test]
fn headers_tell_where_the_checksum_is() {
    let gso = Some(Gso { size: 1448, kind: GsoType::TCPV4 });
    let frame = Frame { bytes: tcp(), checksum_blank: true, validated: true, gso };
    let header = header(&frame).unwrap();
    let words: Vec<_> =
        header[2..].chunks(2).map(|pair| u16::from_ne_bytes([pair[0], pair[1]])).collect();
    assert_eq!((header[0], header[1]), (NEEDS_CSUM, GSO_TCPV4));
    assert_eq!(words, [54, 1448, 34, 16]);
}

#[test]
fn frames_that_lie_about_their_headers_are_refused() {
    for len in 0..54 {
        let mut bytes = tcp();
        bytes.truncate(len);
        let frame = Frame { bytes, checksum_blank: true, validated: false, gso: None };
        assert_eq!(header(&frame), None, "{len}");
    }
    let frame = Frame { bytes: Vec::new(), ..Frame::default() };
    assert_eq!(header(&frame), Some([0; HEADER]), "nothing to do for it");
}

//! What a client asks: the head of a request, checked.

use alloc::string::String;
use alloc::vec::Vec;

/// The methods this server knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    /// GET.
    Get,
    /// HEAD: as GET, without the body.
    Head,
    /// Any other: answered with 405.
    Other,
}

/// A byte range as asked for (RFC 9110, 14.1.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Range {
    /// `bytes=first-last`, or `bytes=first-`.
    From {
        /// First byte.
        first: u64,
        /// Last byte, inclusive; the end if absent.
        last: Option<u64>,
    },
    /// `bytes=-len`: the last bytes.
    Suffix(u64),
}

impl Range {
    /// The first byte and the length within a file of `size` bytes; `None` if nothing of it is there.
    #[must_use]
    pub fn within(self, size: u64) -> Option<(u64, u64)> {
        let (start, end) = match self {
            Self::From { first, last } => {
                (first, last.map_or(size, |last| last.saturating_add(1).min(size)))
            }
            Self::Suffix(len) => (size.saturating_sub(len), size),
        };
        (start < end).then(|| (start, end - start))
    }

    /// One range in bytes; anything else is ignored, as the standard allows.
    fn parse(value: &str) -> Option<Self> {
        let (first, last) = value.trim().strip_prefix("bytes=")?.split_once('-')?;
        let number = |text: &str| text.trim().parse().ok();
        match (first.trim(), last.trim()) {
            ("", len) => Some(Self::Suffix(number(len)?)),
            (first, "") => Some(Self::From { first: number(first)?, last: None }),
            (first, last) => {
                let (first, last) = (number(first)?, number(last)?);
                (first <= last).then_some(Self::From { first, last: Some(last) })
            }
        }
    }
}

/// A request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// What to do.
    pub method: Method,
    /// With what: decoded, without query, starting with a slash.
    pub path: String,
    /// Which part.
    pub range: Option<Range>,
    /// Whether the client wants to go on with this connection.
    pub keep_alive: bool,
}

/// Why there is no request (yet).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ParseError {
    /// More bytes are needed.
    Incomplete,
    /// Not HTTP, or a target this server cannot read.
    Bad,
    /// Not HTTP/1.
    Version,
    /// More header fields than this server takes.
    TooManyHeaders,
}

impl ParseError {
    /// The status to answer with.
    #[must_use]
    pub fn status(self) -> u16 {
        match self {
            Self::Bad => 400,
            Self::Version => 505,
            Self::Incomplete | Self::TooManyHeaders => 431,
        }
    }
}

const MAX_HEADERS: usize = 64;

/// Parses a request head; answers it and its length in bytes.
///
/// # Errors
/// See [`ParseError`].
pub fn parse(input: &[u8]) -> Result<(Request, usize), ParseError> {
    let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let mut head = httparse::Request::new(&mut headers);
    let len = match head.parse(input) {
        Ok(httparse::Status::Complete(len)) => len,
        Ok(httparse::Status::Partial) => return Err(ParseError::Incomplete),
        Err(httparse::Error::TooManyHeaders) => return Err(ParseError::TooManyHeaders),
        Err(httparse::Error::Version) => return Err(ParseError::Version),
        Err(_) => return Err(ParseError::Bad),
    };
    let method = match head.method {
        Some("GET") => Method::Get,
        Some("HEAD") => Method::Head,
        _ => Method::Other,
    };
    let path = decode_target(head.path.ok_or(ParseError::Bad)?).ok_or(ParseError::Bad)?;
    let mut request = Request { method, path, range: None, keep_alive: head.version == Some(1) };
    for header in head.headers.iter() {
        let Ok(value) = core::str::from_utf8(header.value) else { continue };
        if header.name.eq_ignore_ascii_case("range") {
            request.range = Range::parse(value);
        } else if header.name.eq_ignore_ascii_case("connection") {
            for option in value.split(',').map(str::trim) {
                if option.eq_ignore_ascii_case("close") {
                    request.keep_alive = false;
                } else if option.eq_ignore_ascii_case("keep-alive") {
                    request.keep_alive = true;
                }
            }
        } else if is_body_header(header) {
            // The body of a request that we do not take would be read as the next request: end after the answer.
            request.keep_alive = false;
        }
    }
    Ok((request, len))
}

fn is_body_header(header: &httparse::Header<'_>) -> bool {
    let length = header.name.eq_ignore_ascii_case("content-length") && header.value != b"0";
    length || header.name.eq_ignore_ascii_case("transfer-encoding")
}

/// The path of a request target: origin form or absolute form, without query, percent-decoded.
fn decode_target(target: &str) -> Option<String> {
    let target = match target.split_once("://") {
        Some((_, rest)) => rest.find('/').map_or("/", |at| rest.get(at..).unwrap_or("/")),
        None => target,
    };
    let path = target.split(['?', '#']).next()?;
    if !path.starts_with('/') {
        return None;
    }
    let mut bytes = Vec::with_capacity(path.len());
    let mut rest = path.bytes();
    while let Some(byte) = rest.next() {
        if byte == b'%' {
            let mut digit = || char::from(rest.next()?).to_digit(16);
            let value = digit()? * 16 + digit()?;
            bytes.push(u8::try_from(value).ok()?);
        } else {
            bytes.push(byte);
        }
    }
    let path = String::from_utf8(bytes).ok()?;
    (!path.contains('\0')).then_some(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plain_request_is_understood() {
        let head = b"GET /a%20b/c?x=1 HTTP/1.1\r\nHost: h\r\nRange: bytes=5-9\r\n\r\n";
        let (request, len) = parse(&[&head[..], b"next"].concat()).unwrap();
        assert_eq!(len, head.len());
        assert_eq!(request.path, "/a b/c");
        assert_eq!(request.range, Some(Range::From { first: 5, last: Some(9) }));
        assert!(request.keep_alive);
    }

    #[test]
    fn bad_requests_have_the_right_status() {
        for (text, status) in [
            (&b"GET / HTTP/2.0\r\n\r\n"[..], 505),
            (b"GET nowhere HTTP/1.1\r\n\r\n", 400),
            (b"GET /%zz HTTP/1.1\r\n\r\n", 400),
            (b"GET /%00 HTTP/1.1\r\n\r\n", 400),
            (b"\x16\x03\x01\x02\x00", 400),
        ] {
            assert_eq!(parse(text).map_err(ParseError::status), Err(status), "{text:?}");
        }
        assert_eq!(parse(b"GET / HT"), Err(ParseError::Incomplete));
    }

    #[test]
    fn ranges_stay_within_the_file() {
        for (value, size, part) in [
            ("bytes=0-0", 10, Some((0, 1))),
            ("bytes=5-", 10, Some((5, 5))),
            ("bytes=5-100", 10, Some((5, 5))),
            ("bytes=-3", 10, Some((7, 3))),
            ("bytes=-100", 10, Some((0, 10))),
            ("bytes=10-", 10, None),
            ("bytes=-0", 10, None),
            ("bytes=0-18446744073709551615", 10, Some((0, 10))),
        ] {
            assert_eq!(Range::parse(value).unwrap().within(size), part, "{value}");
        }
        for value in ["bytes=9-5", "lines=1-2", "bytes=a-b", "bytes=0-1,3-4"] {
            assert_eq!(Range::parse(value), None, "{value}");
        }
    }

    #[test]
    fn a_request_with_a_body_ends_the_connection() {
        let (request, _) = parse(b"POST / HTTP/1.1\r\nContent-Length: 3\r\n\r\nabc").unwrap();
        assert_eq!((request.method, request.keep_alive), (Method::Other, false));
    }
}

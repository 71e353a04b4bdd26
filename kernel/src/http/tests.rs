//! Whole exchanges over a stream in memory, against a volume in memory.

use std::string::String;
use std::vec::Vec;

use super::*;
use crate::fs::volume::Volume;
use crate::task::block_on;

/// A client that has said everything already, a few bytes a time, and remembers the answer.
struct Script {
    input: Vec<u8>,
    piece: usize,
    output: Vec<u8>,
    /// Bytes after which the client takes no more.
    breaks_after: usize,
}

impl Connection for Script {
    type Error = &'static str;
    async fn read(&mut self, buf: &mut [u8]) -> Result<usize, Self::Error> {
        let len = self.input.len().min(self.piece).min(buf.len());
        buf[..len].copy_from_slice(&self.input[..len]);
        self.input.drain(..len);
        Ok(len)
    }
    async fn write_all(&mut self, bytes: &[u8]) -> Result<(), Self::Error> {
        task::yield_now().await;
        self.output.extend_from_slice(bytes);
        if self.output.len() > self.breaks_after { Err("reset") } else { Ok(()) }
    }
}

struct OneVolume(Volume);

impl Files for OneVolume {
    async fn metadata(&self, path: &str) -> Result<Metadata, FsError> {
        self.0.metadata(path).await
    }
    async fn list(&self, path: &str) -> Result<Vec<DirEntry>, FsError> {
        self.0.list(path).await
    }
    async fn open(&self, path: &str) -> Result<File, FsError> {
        self.0.open(path).await
    }
}

const BIG: usize = 1_000_003;

fn big() -> Vec<u8> {
    (0..BIG).map(|n| u8::try_from(n * 7 % 251).unwrap()).collect()
}

/// A cpio archive with a few files.
fn files() -> OneVolume {
    let mut archive = Vec::new();
    let big = big();
    for (name, mode, contents) in [
        ("hello.txt", 0o100_644, &b"hello\n"[..]),
        ("big.bin", 0o100_644, &big),
        ("site", 0o040_755, b""),
        ("site/index.html", 0o100_644, b"<p>index"),
        ("plain/a b", 0o100_644, b"x"),
        ("TRAILER!!!", 0, b""),
    ] {
        let len = name.len() + 1;
        let (zero, size) = (0, contents.len());
        let fields = [zero, mode, 0, 0, 1, 0, size, 0, 0, 0, 0, len, 0];
        archive.extend_from_slice(b"070701");
        for field in fields {
            archive.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        archive.extend_from_slice(name.as_bytes());
        archive.push(0);
        archive.resize(archive.len().next_multiple_of(4), 0);
        archive.extend_from_slice(contents);
        archive.resize(archive.len().next_multiple_of(4), 0);
    }
    OneVolume(block_on(Volume::mount_module("files", archive.leak())).unwrap())
}

fn talk(input: &str, piece: usize) -> (Vec<u8>, End<&'static str>) {
    let mut script = Script {
        input: input.as_bytes().to_vec(),
        piece,
        output: Vec::new(),
        breaks_after: usize::MAX,
    };
    let end = block_on(serve(&mut script, &files()));
    (script.output, end)
}

/// The status, head and body of the first answer, and what follows it.
fn split(answer: &[u8]) -> (u16, String, &[u8], &[u8]) {
    let at = answer.windows(4).position(|w| w == b"\r\n\r\n").expect("a head") + 4;
    let head = String::from_utf8(answer[..at].to_vec()).unwrap();
    let status = head[9..12].parse().unwrap();
    let len: usize =
        head.split("Content-Length: ").nth(1).unwrap().lines().next().unwrap().parse().unwrap();
    let len = len.min(answer.len() - at);
    (status, head, &answer[at..at + len], &answer[at + len..])
}

fn get(path: &str, extra: &str) -> (u16, String, Vec<u8>) {
    let (answer, _) = talk(&format!("GET {path} HTTP/1.1\r\nHost: x\r\n{extra}\r\n"), 4096);
    let (status, head, body, rest) = split(&answer);
    assert!(rest.is_empty());
    (status, head, body.to_vec())
}

#[test]
fn a_file_comes_with_its_length_and_type() {
    let (status, head, body) = get("/hello.txt", "");
    assert_eq!((status, &body[..]), (200, &b"hello\n"[..]));
    assert!(head.contains("Content-Type: text/plain"), "{head}");
    let (status, head, body) = get("/big.bin?query", "");
    assert_eq!(status, 200);
    assert!(body == big() && head.contains("application/octet-stream"), "{head}");
    assert_eq!(get("/plain/a%20b", "").2, b"x");
}

#[test]
fn ranges_are_cut_out_or_refused() {
    let (status, head, body) = get("/big.bin", "Range: bytes=600000-600009\r\n");
    assert_eq!((status, &body[..]), (206, &big()[600_000..600_010]));
    assert!(head.contains("Content-Range: bytes 600000-600009/1000003\r\n"), "{head}");
    let (status, head, _) = get("/big.bin", "Range: bytes=1000003-\r\n");
    assert_eq!(status, 416);
    assert!(head.contains("Content-Range: bytes */1000003\r\n"), "{head}");
}

#[test]
fn directories_redirect_list_or_show_their_index() {
    let (status, head, _) = get("/site", "");
    assert!(status == 301 && head.contains("Location: /site/\r\n"), "{head}");
    assert_eq!(get("/site/", "").2, b"<p>index");
    let (status, _, body) = get("/plain/", "");
    assert!(status == 200 && String::from_utf8(body).unwrap().contains("./a%20b"));
}

#[test]
fn what_is_not_there_or_not_allowed_has_its_status() {
    assert_eq!(get("/nothing", "").0, 404);
    assert_eq!(get("/hello.txt/x", "").0, 404);
    assert_eq!(get("/../../../etc/passwd", "").0, 404);
    let (answer, _) = talk("DELETE /hello.txt HTTP/1.1\r\n\r\n", 4096);
    let (status, head, ..) = split(&answer);
    assert!(status == 405 && head.contains("Allow: GET, HEAD\r\n"), "{head}");
    for (input, status) in [("nonsense\r\n\r\n", 400), ("GET / HTTP/9.9\r\n\r\n", 505)] {
        let (answer, end) = talk(input, 4096);
        assert_eq!(split(&answer).0, status);
        assert!(matches!(end, End::Closed));
    }
    let long = format!("GET /{} HTTP/1.1\r\n\r\n", "x".repeat(2 * MAX_HEAD));
    assert_eq!(split(&talk(&long, 1000).0).0, 431);
}

#[test]
fn head_has_the_length_but_no_body() {
    let (answer, _) = talk("HEAD /big.bin HTTP/1.1\r\n\r\n", 4096);
    assert!(answer.ends_with(b"\r\n\r\n"));
    assert!(String::from_utf8(answer).unwrap().contains("Content-Length: 1000003\r\n"));
}

#[test]
fn a_connection_goes_on_until_it_is_asked_to_close() {
    let three = "GET /hello.txt HTTP/1.1\r\n\r\nGET /nothing HTTP/1.1\r\n\r\n\
                 GET /hello.txt HTTP/1.1\r\nConnection: close\r\n\r\nGET /never HTTP/1.1\r\n\r\n";
    for piece in [1, 7, 4096] {
        let (answer, end) = talk(three, piece);
        let mut rest = &answer[..];
        for expected in [200, 404, 200] {
            let (status, _, _, after) = split(rest);
            assert_eq!(status, expected, "{piece}");
            rest = after;
        }
        assert!(rest.is_empty() && matches!(end, End::Closed));
    }
    let (answer, _) = talk("GET /hello.txt HTTP/1.0\r\n\r\nGET /hello.txt HTTP/1.0\r\n\r\n", 4096);
    assert!(split(&answer).3.is_empty(), "HTTP/1.0 closes by default");
}

#[test]
fn a_client_that_goes_away_ends_the_connection() {
    let mut script = Script {
        input: b"GET /big.bin HTTP/1.1\r\n\r\n".to_vec(),
        piece: 4096,
        output: Vec::new(),
        breaks_after: 300_000,
    };
    assert!(matches!(block_on(serve(&mut script, &files())), End::Stream("reset")));
}

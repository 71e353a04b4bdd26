//! One TCP stream into or out of the guest, as Janus's `tcp-sink` and `tcp-source` do it.

use std::io::{Read as _, Result, Write as _};
use std::net::{Shutdown, TcpListener};
use std::time::Instant;

/// Bytes of one call: what a program that wants speed uses.
const BUFFER: usize = 256 * 1024;

/// Takes one connection and reads `bytes` from it, or writes so many zeroes and waits for the client's end; answers
/// the bytes moved and the microseconds since the connection.
pub(crate) fn run(port: u16, bytes: u64, inwards: bool) -> Result<(u64, u128)> {
    let listener = TcpListener::bind(("0.0.0.0", port))?;
    println!("listening on port {port}");
    let (mut stream, _) = listener.accept()?;
    let start = Instant::now();
    let mut buffer = vec![0; BUFFER];
    let mut moved = 0;
    while moved < bytes {
        let left = usize::try_from(bytes - moved).unwrap_or(BUFFER).min(BUFFER);
        let part = buffer.get_mut(..left).unwrap_or_default();
        let len = if inwards { stream.read(part)? } else { stream.write(part)? };
        if len == 0 {
            break;
        }
        moved += len as u64;
    }
    if !inwards {
        stream.shutdown(Shutdown::Write)?;
        // The client closes when it has everything.
        while stream.read(&mut buffer)? > 0 {}
    }
    Ok((moved, start.elapsed().as_micros()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpStream;

    fn connected(port: u16) -> TcpStream {
        loop {
            if let Ok(stream) = TcpStream::connect(("127.0.0.1", port)) {
                return stream;
            }
            std::thread::yield_now();
        }
    }

    #[test]
    fn streams_move_what_was_asked() {
        let port = TcpListener::bind(("127.0.0.1", 0)).unwrap().local_addr().unwrap().port();
        let sink = std::thread::spawn(move || run(port, 1_000_000, true));
        connected(port).write_all(&vec![1; 1_000_000]).unwrap();
        assert_eq!(sink.join().unwrap().unwrap().0, 1_000_000);
        let port = TcpListener::bind(("127.0.0.1", 0)).unwrap().local_addr().unwrap().port();
        let source = std::thread::spawn(move || run(port, 1_000_000, false));
        let mut all = Vec::new();
        connected(port).read_to_end(&mut all).unwrap();
        assert_eq!(all.len(), 1_000_000);
        assert_eq!(source.join().unwrap().unwrap().0, 1_000_000);
    }
}

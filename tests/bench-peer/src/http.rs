//! A file server as lean as Linux allows: one thread a connection, `sendfile` from the page cache.
// UNSAFETY: one system call that std does not offer.
#![expect(unsafe_code, reason = "sendfile(2)")]

use std::fs::File;
use std::io::{BufRead as _, BufReader, Error, Result, Write as _};
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsRawFd as _;

/// Starts serving `/mnt` on `port`.
pub(crate) fn start(port: u16) -> Result<()> {
    let listener = TcpListener::bind(("0.0.0.0", port))?;
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            std::thread::spawn(move || {
                // A client that goes away is its own affair.
                let _ = serve(&stream);
            });
        }
    });
    Ok(())
}

fn serve(mut stream: &TcpStream) -> Result<()> {
    let mut reader = BufReader::new(stream);
    let mut request = String::new();
    reader.read_line(&mut request)?;
    let mut header = String::new();
    while reader.read_line(&mut header)? > 2 {
        header.clear();
    }
    let path = request.split_whitespace().nth(1).unwrap_or("/");
    let Ok(file) = File::open(format!("/mnt{path}")) else {
        return stream.write_all(
            b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n",
        );
    };
    let mut left = file.metadata()?.len();
    let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {left}\r\nConnection: close\r\n\r\n");
    stream.write_all(head.as_bytes())?;
    while left > 0 {
        let count = usize::try_from(left).unwrap_or(usize::MAX).min(1 << 20);
        // SAFETY: two open descriptors, and no offset to write back.
        let sent = unsafe {
            libc::sendfile(stream.as_raw_fd(), file.as_raw_fd(), std::ptr::null_mut(), count)
        };
        match u64::try_from(sent) {
            Ok(0) => break,
            Ok(sent) => left -= sent.min(left),
            Err(_) => return Err(Error::last_os_error()),
        }
    }
    Ok(())
}

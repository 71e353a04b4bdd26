//! The server on the network: a port of an interface, a task for each connection.

use alloc::sync::Arc;
use core::sync::atomic::{AtomicUsize, Ordering};

use super::{Connection, End, MountedFiles, serve};
use crate::net::tcp::{Listener, Stream};
use crate::net::{Net, NetError};
use crate::task;

/// Connections served at once; the next ones wait in the stack, which refuses them when it is full too.
const MAX_CONNECTIONS: usize = 256;

static CONNECTIONS: AtomicUsize = AtomicUsize::new(0);

impl Connection for Stream {
    type Error = NetError;
    async fn read(&mut self, buf: &mut [u8]) -> Result<usize, NetError> {
        Stream::read(self, buf).await
    }
    async fn write_all(&mut self, bytes: &[u8]) -> Result<(), NetError> {
        Stream::write_all(self, bytes).await
    }
}

/// Serves the mounted volumes on `port` of an interface until it goes away.
///
/// # Errors
/// Why the port cannot be had, or that the interface has gone.
pub async fn run(net: Arc<Net>, port: u16) -> Result<(), NetError> {
    let listener = Listener::bind(&net, port)?;
    loop {
        let mut stream = listener.accept().await?;
        if CONNECTIONS.fetch_add(1, Ordering::Relaxed) >= MAX_CONNECTIONS {
            CONNECTIONS.fetch_sub(1, Ordering::Relaxed);
            log::warn!("http: more than {MAX_CONNECTIONS} connections: refused one");
            stream.abort();
            continue;
        }
        drop(task::spawn("http", async move {
            match serve(&mut stream, &MountedFiles).await {
                End::Closed => {
                    // The last bytes are on their way; a client that does not take them times out in the stack.
                    if let Err(error) = stream.close().await {
                        log::debug!("http: close: {error}");
                    }
                }
                End::TimedOut => stream.abort(),
                End::Stream(error) => log::debug!("http: {error}"),
                End::File(error) => {
                    log::warn!("http: a file could not be read to its end: {error}");
                    stream.abort();
                }
            }
            CONNECTIONS.fetch_sub(1, Ordering::Relaxed);
        }));
    }
}

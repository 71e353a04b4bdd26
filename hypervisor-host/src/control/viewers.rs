//! The end of what a guest printed, and those who look at its console over its control socket.
//!
//! The guest never waits for a viewer: one that does not read loses what it does not take, and is told so.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use rustix::io::Errno;
use rustix::net::SendFlags;

/// Bytes kept for a viewer that is slow.
const BUFFER: usize = 1 << 20;
/// Bytes of the console's end that are kept.
const KEPT: usize = 64 << 10;

/// One of them.
struct Viewer {
    key: u64,
    socket: Arc<OwnedFd>,
    waiting: VecDeque<u8>,
    lost: u64,
}

impl Viewer {
    fn add(&mut self, bytes: &[u8]) {
        let room = BUFFER.saturating_sub(self.waiting.len());
        let taken = bytes.len().min(room);
        self.waiting.extend(bytes.get(..taken).unwrap_or_default());
        self.lost += (bytes.len() - taken) as u64;
    }

    /// Sends what it takes; `false`: it is gone.
    fn flush(&mut self) -> bool {
        while !self.waiting.is_empty() {
            let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
            match rustix::net::send(&self.socket, self.waiting.as_slices().0, flags) {
                Ok(count) => drop(self.waiting.drain(..count)),
                Err(Errno::AGAIN | Errno::INTR) => return true,
                Err(_) => return false,
            }
            if self.waiting.is_empty() && self.lost > 0 {
                let lost = std::mem::take(&mut self.lost);
                self.add(format!("\r\n[janus: {lost} bytes were lost here]\r\n").as_bytes());
            }
        }
        true
    }
}

#[derive(Default)]
struct Inner {
    kept: Vec<u8>,
    viewers: Vec<Viewer>,
}

/// The end of a console, and all its viewers.
#[derive(Default)]
pub struct Viewers {
    inner: Mutex<Inner>,
    /// Is told when somebody takes less than there is.
    pub(super) on_slow: OnceLock<Box<dyn Fn() + Send + Sync>>,
}

impl std::fmt::Debug for Viewers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Viewers({})", self.lock().viewers.len())
    }
}

impl Viewers {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The last that was printed.
    #[must_use]
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.lock().kept).into_owned()
    }

    /// Adds one, who sees the last that was printed first.
    pub(super) fn add(&self, key: u64, socket: Arc<OwnedFd>) {
        let mut viewer = Viewer { key, socket, waiting: VecDeque::new(), lost: 0 };
        let mut inner = self.lock();
        let from = inner.kept.len().saturating_sub(KEPT);
        viewer.add(inner.kept.get(from..).unwrap_or_default());
        if viewer.flush() {
            inner.viewers.push(viewer);
        }
    }

    /// One left.
    pub(super) fn remove(&self, key: u64) {
        self.lock().viewers.retain(|viewer| viewer.key != key);
    }

    /// One may take more; `true`: there is more than it took.
    pub(super) fn more(&self, key: u64) -> bool {
        let mut inner = self.lock();
        let viewer = inner.viewers.iter_mut().find(|viewer| viewer.key == key);
        viewer.is_some_and(|viewer| viewer.flush() && !viewer.waiting.is_empty())
    }

    /// The guest printed something.
    pub fn print(&self, bytes: &[u8]) {
        let mut slow = false;
        let mut inner = self.lock();
        inner.kept.extend_from_slice(bytes);
        if inner.kept.len() > 2 * KEPT {
            let surplus = inner.kept.len() - KEPT;
            inner.kept.drain(..surplus);
        }
        inner.viewers.retain_mut(|viewer| {
            viewer.add(bytes);
            let here = viewer.flush();
            slow |= here && !viewer.waiting.is_empty();
            here
        });
        drop(inner);
        if slow && let Some(tell) = self.on_slow.get() {
            tell();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn the_end_of_the_console_is_kept_and_seen_by_all() {
        let viewers = Viewers::default();
        for _ in 0..1000 {
            viewers.print(&[b'x'; 1000]);
        }
        assert!(viewers.text().len() <= 2 * KEPT);
        viewers.print(b"end");
        let (mut here, there) = UnixStream::pair().unwrap();
        let reader = std::thread::spawn(move || {
            let mut all = Vec::new();
            here.read_to_end(&mut all).unwrap();
            all
        });
        viewers.add(1, Arc::new(there.into()));
        while viewers.more(1) {
            std::thread::yield_now();
        }
        viewers.remove(1);
        let all = reader.join().unwrap();
        assert!(all.len() == KEPT && all.ends_with(b"xxend"), "{}", all.len());
    }

    #[test]
    fn a_viewer_that_does_not_read_is_told_what_it_lost() {
        let viewers = Viewers::default();
        let (mut here, there) = UnixStream::pair().unwrap();
        viewers.add(1, Arc::new(there.into()));
        for _ in 0..64 {
            viewers.print(&[b'x'; 65_536]);
        }
        let reader = std::thread::spawn(move || {
            let mut all = Vec::new();
            here.read_to_end(&mut all).unwrap();
            String::from_utf8(all).unwrap()
        });
        while viewers.more(1) {
            std::thread::yield_now();
        }
        viewers.remove(1);
        let all = reader.join().unwrap();
        assert!(all.contains("bytes were lost here") && all.len() > BUFFER, "{}", all.len());
    }
}

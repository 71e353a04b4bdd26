//! Several frames of a guest, one behind the other in our address space although they are not in its file.
// UNSAFETY: maps memory and makes a slice of it.
#![expect(unsafe_code, reason = "a view of the guest's memory is a mapping")]

use std::io;
use std::ops::Deref;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::AtomicU32;

use janus_proto::addr::{Mfn, PAGE_SIZE};

use super::ram::Ram;

/// A contiguous view of scattered frames.
#[derive(Debug)]
pub struct Window {
    base: NonNull<u8>,
    length: usize,
    /// Keeps the file, of which this is a second mapping, as it is.
    _ram: Arc<Ram>,
}

// SAFETY: the memory is only handed out as atomics and lives as long as `Window`.
unsafe impl Send for Window {}
// SAFETY: as above.
unsafe impl Sync for Window {}

impl Window {
    /// Maps `frames` in this order.
    ///
    /// # Errors
    /// There are none, one of them is not the guest's, or the host has no room.
    pub fn new(ram: &Arc<Ram>, frames: &[Mfn]) -> io::Result<Self> {
        let invalid = || io::Error::from(io::ErrorKind::InvalidInput);
        let length = frames.len().checked_mul(PAGE_SIZE).filter(|n| *n > 0).ok_or_else(invalid)?;
        // SAFETY: a new mapping at an address that the kernel chooses; nothing can be done with it yet.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                length,
                libc::PROT_NONE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let base = NonNull::new(base.cast::<u8>()).ok_or_else(invalid)?;
        let window = Self { base, length, _ram: Arc::clone(ram) };
        let mut done = 0;
        for run in frames.chunk_by(|a, b| a.0.checked_add(1) == Some(b.0)) {
            let first = run.first().copied().ok_or_else(invalid)?;
            ram.words(first, run.len() as u64).ok_or_else(invalid)?;
            let offset = ram.offset(first).ok_or_else(invalid)?;
            let offset = libc::off_t::try_from(offset).map_err(|_| invalid())?;
            // SAFETY: `done` is less than `length`: inside the mapping made above.
            let to = unsafe { window.base.add(done) };
            // SAFETY: replaces pages of the mapping above, which nobody has seen yet: the runs together are as long.
            let mapped = unsafe {
                libc::mmap(
                    to.as_ptr().cast(),
                    run.len() * PAGE_SIZE,
                    libc::PROT_READ | libc::PROT_WRITE,
                    libc::MAP_SHARED | libc::MAP_FIXED,
                    ram.file().as_raw_fd(),
                    offset,
                )
            };
            if mapped == libc::MAP_FAILED {
                return Err(io::Error::last_os_error());
            }
            done += run.len() * PAGE_SIZE;
        }
        Ok(window)
    }
}

impl Deref for Window {
    type Target = [AtomicU32];
    fn deref(&self) -> &[AtomicU32] {
        // SAFETY: the mapping is `length` bytes, aligned to pages, of a file that cannot shrink; atomics may be
        // changed by others; it lives as long as `self`.
        unsafe { std::slice::from_raw_parts(self.base.as_ptr().cast(), self.length / 4) }
    }
}

impl Drop for Window {
    fn drop(&mut self) {
        // SAFETY: the mapping of `new`; all that was handed out borrowed `self`.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.length) };
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering::Relaxed;

    use super::*;
    use crate::machine::ram::FIRST_FRAME;

    fn frame(index: u64) -> Mfn {
        Mfn(FIRST_FRAME.0 + index)
    }

    #[test]
    fn scattered_frames_are_seen_in_the_order_asked_for() {
        let ram = Arc::new(Ram::new(6).unwrap());
        for index in 0..6 {
            let value = u32::try_from(index).unwrap() + 10;
            ram.words(frame(index), 1).unwrap()[5].store(value, Relaxed);
        }
        let window = Window::new(&ram, &[frame(4), frame(5), frame(1), frame(1)]).unwrap();
        let seen: Vec<_> = window.chunks(1024).map(|page| page[5].load(Relaxed)).collect();
        assert_eq!(seen, [14, 15, 11, 11]);
        window[2 * 1024].store(7, Relaxed);
        assert_eq!(ram.words(frame(1), 1).unwrap()[0].load(Relaxed), 7);
    }

    #[test]
    fn frames_that_are_not_there_are_refused() {
        let ram = Arc::new(Ram::new(2).unwrap());
        assert!(Window::new(&ram, &[]).is_err());
        assert!(Window::new(&ram, &[frame(1), frame(2)]).is_err());
        assert!(Window::new(&ram, &[Mfn(u64::MAX)]).is_err());
    }
}

//! Signals as events: those that end a program end its guest first, so that terminal and socket are left in order.

use std::io;
use std::io::Read as _;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use signal_hook::consts::{SIGCONT, SIGHUP, SIGINT, SIGQUIT, SIGTERM};
use signal_hook::low_level::pipe;

use crate::host::events::{EventLoop, READ, Waiting};

/// What ends this program.
const ENDING: [i32; 4] = [SIGHUP, SIGINT, SIGQUIT, SIGTERM];

/// Signals are events as long as this lives; afterwards they are ignored.
pub(super) struct Signals(#[expect(dead_code, reason = "it waits as long as it lives")] Waiting);

impl Signals {
    /// Calls `hears` on the loop with the number of each signal that ends a program, and of `SIGCONT`.
    ///
    /// # Errors
    /// The host refuses.
    pub(super) fn start(
        events: &EventLoop,
        hears: impl Fn(i32) + Send + Sync + 'static,
    ) -> io::Result<Self> {
        let (reader, writer) = UnixStream::pair()?;
        reader.set_nonblocking(true)?;
        let last = Arc::new(AtomicUsize::new(0));
        for signal in ENDING.into_iter().chain([SIGCONT]) {
            // A program that was started with a signal ignored (nohup) leaves it so.
            if signal != SIGCONT && is_ignored(signal) {
                continue;
            }
            let number = usize::try_from(signal).unwrap_or(0);
            signal_hook::flag::register_usize(signal, Arc::clone(&last), number)?;
            pipe::register(signal, writer.try_clone()?)?;
        }
        let fd = Arc::new(reader.try_clone()?.into());
        let reader = std::sync::Mutex::new(reader);
        let ready = move |_| {
            let mut reader = reader.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            while reader.read(&mut [0; 64]).is_ok_and(|count| count > 0) {}
            let signal = last.swap(0, Ordering::SeqCst);
            if let Ok(signal @ 1..) = i32::try_from(signal) {
                hears(signal);
            }
        };
        Ok(Self(events.add(fd, READ, Arc::new(ready))?))
    }
}

/// Whether a signal was ignored when this program was started.
fn is_ignored(signal: i32) -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let mask = mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0);
    mask >> (signal - 1) & 1 != 0
}

/// Whether a signal continues a stopped program.
pub(super) fn is_continue(signal: i32) -> bool {
    signal == SIGCONT
}

//! The development host, so that `cargo test` runs the executor, locks and services on std.

use std::io::Write;
use std::sync::LazyLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime};

use crate::power::ExitStatus;

static START: LazyLock<Instant> = LazyLock::new(Instant::now);
static DEADLINE_NS: AtomicU64 = AtomicU64::new(u64::MAX);

pub(super) fn early_write(bytes: &[u8]) {
    // Standard output may be closed; there is nowhere to report that.
    let _ = std::io::stdout().write_all(bytes);
}

pub(super) fn now_ns() -> u64 {
    u64::try_from(START.elapsed().as_nanos()).unwrap_or(u64::MAX)
}

pub(super) fn wall_clock() -> Option<Duration> {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).ok()
}

pub(super) fn set_timer(deadline_ns: Option<u64>) {
    DEADLINE_NS.store(deadline_ns.unwrap_or(u64::MAX), Ordering::Relaxed);
}

/// Sleeps until the timer's deadline, but at most a millisecond: other threads play the interrupts here.
pub(super) fn idle_wait() {
    let left = DEADLINE_NS.load(Ordering::Relaxed).saturating_sub(now_ns());
    std::thread::sleep(Duration::from_nanos(left.min(1_000_000)));
}

pub(super) fn end(status: ExitStatus) -> ! {
    std::process::exit(status.code().into())
}

//! How long the guest's kernel has been running, by its own clock.
// UNSAFETY: one system call that std does not offer.
#![expect(unsafe_code, reason = "clock_gettime(CLOCK_BOOTTIME)")]

/// Milliseconds since the kernel's clock began.
pub(crate) fn milliseconds() -> f64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: a valid place for the answer.
    let result = unsafe { libc::clock_gettime(libc::CLOCK_BOOTTIME, &raw mut time) };
    assert_eq!(result, 0, "every Linux has this clock");
    #[expect(clippy::cast_precision_loss, reason = "years fit")]
    let (seconds, nanoseconds) = (time.tv_sec as f64, time.tv_nsec as f64);
    seconds * 1e3 + nanoseconds / 1e6
}

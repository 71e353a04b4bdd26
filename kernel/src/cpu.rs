//! Single instructions of the CPU that every platform may execute.
// UNSAFETY: `rdtsc` is an intrinsic without conditions, which Rust still calls unsafe.
#![expect(unsafe_code, reason = "CPU intrinsics")]

/// The time stamp counter.
#[must_use]
#[inline]
pub fn rdtsc() -> u64 {
    // SAFETY: every x86-64 CPU has a TSC, and no platform here forbids reading it.
    unsafe { core::arch::x86_64::_rdtsc() }
}

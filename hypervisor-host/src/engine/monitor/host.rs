//! The few calls of the host that the engine needs and nobody wraps.
// UNSAFETY: system calls.
#![expect(unsafe_code, reason = "system calls")]

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::atomic::AtomicU32;

/// A call's result, with `errno` when it is -1.
fn checked(result: i64) -> io::Result<i64> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// A new file in memory that can be sealed.
pub(super) fn memory_file(name: &CStr, executable: bool) -> io::Result<File> {
    let flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING;
    let kind = if executable { libc::MFD_EXEC } else { libc::MFD_NOEXEC_SEAL };
    // SAFETY: the name is a C string; nothing else of ours is touched.
    let create = |flags| checked(i64::from(unsafe { libc::memfd_create(name.as_ptr(), flags) }));
    let fd = match create(flags | kind) {
        // Linux before 6.3 knows neither.
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => create(flags)?,
        other => other?,
    };
    let fd = i32::try_from(fd).map_err(io::Error::other)?;
    // SAFETY: the file was just opened, and belongs to nobody else.
    Ok(unsafe { File::from_raw_fd(fd) })
}

/// Fixes what a file in memory is from now on.
pub(super) fn seal(file: &File, seals: i32) -> io::Result<()> {
    // SAFETY: no memory is involved.
    checked(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, seals) }.into()).map(drop)
}

/// Waits while the word, which another process shares, is `value`, until `CLOCK_MONOTONIC` reaches so many nanoseconds;
/// ends early on whim. `false`: the time has come.
pub(super) fn futex_wait(word: &AtomicU32, value: u32, until: u64) -> bool {
    let until = libc::timespec {
        tv_sec: (until / 1_000_000_000).cast_signed(),
        tv_nsec: (until % 1_000_000_000).cast_signed(),
    };
    // SAFETY: the word is valid for the call and only read; so is the time; the second word is not used.
    let result = unsafe {
        libc::syscall(
            libc::SYS_futex,
            word.as_ptr(),
            libc::FUTEX_WAIT_BITSET,
            value,
            &raw const until,
            std::ptr::null::<u32>(),
            libc::FUTEX_BITSET_MATCH_ANY,
        )
    };
    result == 0 || io::Error::last_os_error().raw_os_error() != Some(libc::ETIMEDOUT)
}

/// Wakes whoever waits for the word.
pub(super) fn futex_wake(word: &AtomicU32) {
    // SAFETY: only the word's address is used.
    unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAKE, 1) };
}

/// Sends a signal to a process that may have ended.
pub(super) fn send(process: &OwnedFd, signal: i32) {
    // SAFETY: the information is absent, and nothing else is memory.
    unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            process.as_raw_fd(),
            signal,
            std::ptr::null::<libc::siginfo_t>(),
            0,
        )
    };
}

/// The status of a process that ended (as of `wait`), which is gone then; `None`: it runs.
pub(super) fn reap(process: &OwnedFd, wait: bool) -> Option<i32> {
    let mut info = MaybeUninit::<libc::siginfo_t>::zeroed();
    let options = libc::WEXITED | if wait { 0 } else { libc::WNOHANG };
    let id = process.as_raw_fd().cast_unsigned();
    loop {
        // SAFETY: `info` is writable, and of the type that the call writes.
        let result = unsafe { libc::waitid(libc::P_PIDFD, id, info.as_mut_ptr(), options) };
        if result == 0 {
            break;
        }
        if io::Error::last_os_error().raw_os_error() != Some(libc::EINTR) {
            return Some(0); // reaped by somebody else
        }
    }
    // SAFETY: zeros are a valid value, and the call wrote another.
    let info = unsafe { info.assume_init() };
    // SAFETY: the fields of a child's end, or zeros.
    let (pid, status) = unsafe { (info.si_pid(), info.si_status()) };
    match (pid, info.si_code) {
        (0, _) => None,
        (_, libc::CLD_EXITED) => Some((status & 0xff) << 8),
        _ => Some(status & 0x7f),
    }
}

/// The CPUs that a thread may run on, as a mask of 1024; 0 is the caller.
pub(super) type CpuMask = [u64; 16];

/// The mask of a thread.
pub(super) fn affinity(thread: i32) -> Option<CpuMask> {
    let mut mask = [0; 16];
    // SAFETY: the mask is writable and as long as said.
    let result = unsafe {
        libc::syscall(libc::SYS_sched_getaffinity, thread, size_of::<CpuMask>(), mask.as_mut_ptr())
    };
    (result > 0).then_some(mask)
}

/// Sets the mask of a thread; a wish only.
pub(super) fn set_affinity(thread: i32, mask: &CpuMask) {
    // SAFETY: the mask is readable and as long as said.
    unsafe {
        libc::syscall(libc::SYS_sched_setaffinity, thread, size_of::<CpuMask>(), mask.as_ptr())
    };
}

/// The CPU that we run on.
pub(super) fn current_cpu() -> usize {
    // SAFETY: no arguments.
    usize::try_from(unsafe { libc::sched_getcpu() }).unwrap_or(0)
}

/// Nanoseconds of `CLOCK_MONOTONIC`.
pub(super) fn now() -> u64 {
    clock(libc::CLOCK_MONOTONIC)
}

/// As [`now`], late by a few milliseconds, and cheaper.
pub(super) fn coarse_now() -> u64 {
    clock(libc::CLOCK_MONOTONIC_COARSE)
}

fn clock(clock: libc::clockid_t) -> u64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the time is writable.
    unsafe { libc::clock_gettime(clock, &raw mut time) };
    time.tv_sec.cast_unsigned() * 1_000_000_000 + time.tv_nsec.cast_unsigned()
}

/// Whether code may set the segment bases itself: bit 1 of `AT_HWCAP2`.
pub(super) fn has_fsgsbase() -> bool {
    // SAFETY: no memory is involved.
    unsafe { libc::getauxval(libc::AT_HWCAP2) & 2 != 0 }
}

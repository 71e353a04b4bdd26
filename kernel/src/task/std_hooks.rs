//! The runtime's machine on the host, for tests: every thread is a CPU, parking is idling.
// UNSAFETY: maps fiber stacks with their guard pages.
#![expect(unsafe_code, reason = "mmap and munmap of fiber stacks")]

use core::cell::Cell;
use core::ptr::NonNull;
use core::time::Duration;
use std::sync::{LazyLock, Mutex, PoisonError};
use std::thread::{self, Thread};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use super::executor::Cpu;
use super::hooks::Hooks;

const GUARD_BYTES: usize = 4096;

static START: LazyLock<Instant> = LazyLock::new(Instant::now);
/// Which thread plays which CPU, to unpark it.
static THREADS: Mutex<Vec<(&'static Cpu, Thread)>> = Mutex::new(Vec::new());

thread_local! {
    static CPU: &'static Cpu = {
        let cpu: &'static Cpu = Box::leak(Box::new(Cpu::new()));
        THREADS.lock().unwrap_or_else(PoisonError::into_inner).push((cpu, thread::current()));
        cpu
    };
    static DEADLINE_NS: Cell<Option<u64>> = const { Cell::new(None) };
}

fn now_ns() -> u64 {
    u64::try_from(START.elapsed().as_nanos()).unwrap_or(u64::MAX)
}

fn idle_wait() {
    // `unpark` before `park` is remembered by the thread, as a pending interrupt is by the CPU.
    match DEADLINE_NS.get() {
        None => thread::park(),
        Some(at) => thread::park_timeout(Duration::from_nanos(at.saturating_sub(now_ns()))),
    }
}

fn wake_cpu(cpu: &'static Cpu) {
    let threads = THREADS.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some((_, thread)) = threads.iter().find(|(c, _)| core::ptr::eq(*c, cpu)) {
        thread.unpark();
    }
}

fn stack_alloc(len: usize) -> Option<NonNull<u8>> {
    let total = len.checked_add(GUARD_BYTES)?;
    let prot = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    // SAFETY: an anonymous mapping at an address of the kernel's choice touches no existing memory.
    let base = unsafe { libc::mmap(core::ptr::null_mut(), total, prot, flags, -1, 0) };
    if base == libc::MAP_FAILED {
        return None;
    }
    // SAFETY: the first page of the mapping made above, to which no pointer has been given out.
    unsafe { libc::mprotect(base, GUARD_BYTES, libc::PROT_NONE) };
    NonNull::new(base.cast::<u8>().wrapping_add(GUARD_BYTES))
}

fn stack_free(start: NonNull<u8>, len: usize) {
    let base = start.as_ptr().wrapping_sub(GUARD_BYTES);
    // SAFETY: `start` and `len` are from `stack_alloc`, so this is exactly one of its mappings; the fiber
    // that ran on it has ended.
    unsafe { libc::munmap(base.cast(), len + GUARD_BYTES) };
}

/// The host's table.
pub(super) const HOOKS: Hooks = Hooks {
    now_ns,
    wall_clock: || SystemTime::now().duration_since(UNIX_EPOCH).ok(),
    set_timer: |at| DEADLINE_NS.set(at),
    idle_wait,
    irq_disable: || false,
    irq_enable: || {},
    current_cpu: || CPU.with(|cpu| *cpu),
    wake_cpu,
    relax: thread::yield_now,
    // Threads that play CPUs belong to different tests.
    nth_cpu: |_| None,
    stack_alloc,
    stack_free,
};

//! System calls, and turns handed from one process to another.
// UNSAFETY: system calls that std does not offer, and memory shared between processes.
#![expect(unsafe_code, reason = "fork, futex, seccomp")]

use std::sync::atomic::{AtomicU32, Ordering};

use super::{batches, refused};

/// The cheapest system call.
pub(super) fn plain() -> Vec<f64> {
    batches(20_000, || {
        // SAFETY: no memory is involved.
        unsafe { libc::syscall(libc::SYS_getppid) };
    })
}

/// The same under a filter that looks at the architecture and allows everything.
pub(super) fn filtered() -> Result<Vec<f64>, String> {
    let line = |code: u32, then, value| libc::sock_filter {
        code: u16::try_from(code).unwrap_or(0),
        jt: then,
        jf: 0,
        k: value,
    };
    let mut lines = [
        line(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 4),
        line(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 0, 0xc000_003e),
        line(libc::BPF_RET | libc::BPF_K, 0, libc::SECCOMP_RET_ALLOW),
    ];
    let program = libc::sock_fprog { len: 3, filter: lines.as_mut_ptr() };
    // SAFETY: no memory is involved.
    let fine = unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) } == 0;
    // SAFETY: the program and its lines are readable, and copied by the call.
    let result =
        unsafe { libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const program) };
    if !fine || result != 0 {
        return Err(refused("seccomp"));
    }
    Ok(plain())
}

/// Two words in memory that a child shares.
fn shared() -> Result<&'static [AtomicU32; 2], String> {
    // SAFETY: a new mapping at an address that the kernel chooses.
    let page = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            4096,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_SHARED | libc::MAP_ANONYMOUS,
            -1,
            0,
        )
    };
    if page == libc::MAP_FAILED {
        return Err(refused("mmap"));
    }
    // SAFETY: a page of zeros, aligned, never unmapped; any bytes are valid atomics.
    Ok(unsafe { &*page.cast() })
}

/// Runs `action` for ever in a child that ends with this process; answers once it was made.
fn beside(action: impl Fn()) -> Result<(), String> {
    // SAFETY: this process has one thread, so that the copy is a whole one.
    match unsafe { libc::fork() } {
        -1 => Err(refused("fork")),
        0 => {
            // SAFETY: no memory is involved.
            unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
            loop {
                action();
            }
        }
        _ => Ok(()),
    }
}

/// A byte to another process and back, by two pipes.
pub(super) fn pipe() -> Result<Vec<f64>, String> {
    let mut ends = [[0; 2]; 2];
    for pair in &mut ends {
        // SAFETY: the call writes two numbers.
        if unsafe { libc::pipe(pair.as_mut_ptr()) } != 0 {
            return Err(refused("pipe"));
        }
    }
    let [[their_in, our_out], [our_in, their_out]] = ends;
    let pass = |from, to| {
        let mut byte = 0_u8;
        // SAFETY: one byte that is writable, then readable.
        let moved = unsafe { libc::read(from, (&raw mut byte).cast(), 1) };
        if to >= 0 {
            // SAFETY: as above.
            unsafe { libc::write(to, (&raw const byte).cast(), 1) };
        }
        if moved <= 0 {
            std::process::exit(1);
        }
    };
    beside(|| pass(their_in, their_out))?;
    Ok(batches(2000, || {
        // SAFETY: a readable byte.
        unsafe { libc::write(our_out, c"x".as_ptr().cast(), 1) };
        pass(our_in, -1);
    }))
}

fn futex_call(word: &AtomicU32, operation: i32, value: u32) {
    // SAFETY: the word is valid; no time is given.
    unsafe {
        libc::syscall(
            libc::SYS_futex,
            word.as_ptr(),
            operation,
            value,
            std::ptr::null::<libc::timespec>(),
        )
    };
}

/// A turn to another process and back, by one futex: what any monitor in a process of its own costs at least.
pub(super) fn futex() -> Result<Vec<f64>, String> {
    let [turn, _] = shared()?;
    let give = |mine: u32, theirs: u32| {
        turn.store(theirs, Ordering::Release);
        futex_call(turn, libc::FUTEX_WAKE, 1);
        while turn.load(Ordering::Acquire) != mine {
            futex_call(turn, libc::FUTEX_WAIT, theirs);
        }
    };
    beside(|| {
        while turn.load(Ordering::Acquire) != 1 {
            futex_call(turn, libc::FUTEX_WAIT, 0);
        }
        turn.store(0, Ordering::Release);
        futex_call(turn, libc::FUTEX_WAKE, 1);
    })?;
    Ok(batches(2000, || give(0, 1)))
}

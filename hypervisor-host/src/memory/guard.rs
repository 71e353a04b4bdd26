//! Copies from a mapped file that may shrink, or be unreadable, at any time.
//!
//! The host then sends `SIGBUS` to whoever touches the page. Here the only instruction that does is known by its address:
//! the signal's handler ends the copy instead of the process, and what was not copied is an error. A signal from anywhere
//! else goes where it went before.
// UNSAFETY: a copy in assembly, and a handler that changes where it returns to.
#![expect(unsafe_code, reason = "a copy that a signal can end")]

use std::ffi::{c_int, c_void};
use std::io;
use std::sync::OnceLock;

use super::Piece;

std::arch::global_asm!(
    // usize janus_guarded_copy(u8 *to, const u8 *from, usize len): answers how many bytes were not copied.
    ".pushsection .text.janus_guarded_copy, \"ax\", @progbits",
    ".balign 16",
    ".type janus_guarded_copy, @function",
    "janus_guarded_copy:",
    "    mov rcx, rdx",
    "janus_guarded_copy_move:",
    "    rep movsb", // Restartable: when it faults, rcx is what is left.
    "janus_guarded_copy_out:",
    "    mov rax, rcx",
    "    ret",
    ".size janus_guarded_copy, . - janus_guarded_copy",
    ".popsection",
);

unsafe extern "C" {
    fn janus_guarded_copy(to: *mut u8, from: *const u8, len: usize) -> usize;
    static janus_guarded_copy_move: u8;
    static janus_guarded_copy_out: u8;
}

/// What `SIGBUS` did before.
static BEFORE: OnceLock<libc::sigaction> = OnceLock::new();

/// Leave to copy from mapped files: the handler is in place.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Guard(());

impl Guard {
    /// Puts the handler in place, once in a process.
    ///
    /// # Errors
    /// The host refuses.
    pub(crate) fn new() -> io::Result<Self> {
        static DONE: OnceLock<bool> = OnceLock::new();
        if *DONE.get_or_init(|| install().is_ok()) {
            Ok(Self(()))
        } else {
            Err(io::Error::other("the host refuses a handler of SIGBUS"))
        }
    }

    /// Copies a part of a mapped file into the guest's memory.
    ///
    /// # Errors
    /// The file is not there: it was cut off, or its medium failed. Some of the piece may be written.
    ///
    /// # Safety
    /// As many bytes as the piece has, from `from` on, are a mapping of a file that stays, whatever is behind it.
    pub(crate) unsafe fn copy(self, piece: &Piece<'_>, from: *const u8) -> io::Result<()> {
        // SAFETY: 1. `piece` is checked when made, and atomics may be written through a shared reference. 2. `from` is
        // the caller's promise; where the file is not, the handler ends the copy. 3. No other memory is touched, and
        // the function keeps to the C ABI.
        let left = unsafe { janus_guarded_copy(piece.address(), from, piece.len()) };
        if left == 0 { Ok(()) } else { Err(io::Error::other("the image cannot be read here")) }
    }
}

fn install() -> io::Result<()> {
    // SAFETY: all zeroes is a `sigaction`: the default, with an empty mask.
    let mut before: libc::sigaction = unsafe { std::mem::zeroed() };
    // SAFETY: asks only; `before` is a `sigaction`.
    if unsafe { libc::sigaction(libc::SIGBUS, std::ptr::null(), &raw mut before) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // Before the handler can run.
    let _ = BEFORE.set(before);
    let mut action = before;
    let handler: extern "C" fn(c_int, *mut libc::siginfo_t, *mut c_void) = on_bus_error;
    action.sa_sigaction = handler as libc::sighandler_t;
    action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_RESTART;
    // SAFETY: the handler calls nothing but what a signal handler may, and keeps to memory that is the signal's.
    if unsafe { libc::sigaction(libc::SIGBUS, &raw const action, std::ptr::null_mut()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

extern "C" fn on_bus_error(signal: c_int, info: *mut libc::siginfo_t, context: *mut c_void) {
    let machine = context.cast::<libc::ucontext_t>();
    // SAFETY: with `SA_SIGINFO` the host passes the interrupted context, which is this handler's until it returns.
    let registers = unsafe { &mut (*machine).uc_mcontext.gregs };
    if let Some(rip) = registers.get_mut(libc::REG_RIP as usize)
        && rip.cast_unsigned() == (&raw const janus_guarded_copy_move).addr() as u64
    {
        *rip = ((&raw const janus_guarded_copy_out).addr() as u64).cast_signed();
        return;
    }
    let Some(before) = BEFORE.get() else { return };
    match before.sa_sigaction {
        libc::SIG_DFL | libc::SIG_IGN => {
            // The instruction faults again, and then the host does what it always did.
            // SAFETY: `before` is what was there.
            unsafe { libc::sigaction(signal, before, std::ptr::null_mut()) };
        }
        // SAFETY: whoever set a handler set a function of one of these types, as its flags say.
        handler => unsafe {
            if before.sa_flags & libc::SA_SIGINFO == 0 {
                let handler: extern "C" fn(c_int) = std::mem::transmute(handler);
                handler(signal);
            } else {
                let handler: extern "C" fn(c_int, *mut libc::siginfo_t, *mut c_void) =
                    std::mem::transmute(handler);
                handler(signal, info, context);
            }
        },
    }
}

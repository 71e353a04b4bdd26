//! A guest's process: how it starts, and that it ends with us.
//!
//! `vfork` and the execution of a tiny program cost less than a copy of our own address space, and nothing of us is
//! ever in the child. It ends when the thread that started it does (`PR_SET_PDEATHSIG`), so that a thread that may end
//! before the process does not start any: another one does it, which never ends.
// UNSAFETY: makes a process and maps the mailbox.
#![expect(unsafe_code, reason = "a process without a library, and memory shared with it")]

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::mpsc::{Sender, channel};
use std::sync::{Mutex, OnceLock};

use super::layout::{IMAGE_FD, MAILBOX_FD, MAILBOX_SIZE, Mailbox, RAM_FD};
use super::{host, image};

/// The mailbox, as we see it.
#[derive(Debug)]
pub(super) struct Shared {
    base: NonNull<u8>,
    file: File,
}

// SAFETY: the memory is only seen through atomics, and lives as long as `Shared`.
unsafe impl Send for Shared {}
// SAFETY: as above.
unsafe impl Sync for Shared {}

impl Shared {
    fn new() -> io::Result<Self> {
        let file = host::memory_file(c"janus-mailbox", false)?;
        file.set_len(MAILBOX_SIZE as u64)?;
        // Nobody can make it smaller, which would fault here.
        host::seal(&file, libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL)?;
        // SAFETY: a new mapping at an address that the kernel chooses.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                MAILBOX_SIZE,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                file.as_raw_fd(),
                0,
            )
        };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let base = NonNull::new(base.cast()).ok_or_else(io::Error::last_os_error)?;
        Ok(Self { base, file })
    }

    /// The page of turns and registers, and that of operations.
    pub(super) fn mailbox(&self) -> &Mailbox {
        // SAFETY: the mapping is larger than a `Mailbox`, page aligned, zero or written by the guest; all of its
        // fields but the reserved ones are atomics, and any bytes are valid for them.
        unsafe { self.base.cast::<Mailbox>().as_ref() }
    }

    /// Copies bytes out; `None`: they are not all inside.
    pub(super) fn copy(&self, offset: usize, length: usize) -> Option<Vec<u8>> {
        use std::os::unix::fs::FileExt;
        if offset.checked_add(length)? > MAILBOX_SIZE {
            return None;
        }
        let mut bytes = vec![0; length];
        self.file.read_exact_at(&mut bytes, offset as u64).ok()?;
        Some(bytes)
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        // SAFETY: the mapping of `new`; what was handed out borrowed `self`.
        unsafe { libc::munmap(self.base.as_ptr().cast(), MAILBOX_SIZE) };
    }
}

/// A guest's process; ends when this is dropped.
#[derive(Debug)]
pub(super) struct Child {
    shared: Shared,
    /// Its process id.
    pid: u32,
    process: OwnedFd,
    /// The status of its end, when it was fetched.
    ended: Mutex<Option<i32>>,
}

impl Child {
    /// Starts a process that has this memory and nothing else.
    ///
    /// # Errors
    /// The host refuses a process or a file.
    pub(super) fn start(ram: BorrowedFd<'_>) -> io::Result<Self> {
        let shared = Shared::new()?;
        shared.mailbox().parent.store(std::process::id(), std::sync::atomic::Ordering::Relaxed);
        let plan = Plan {
            files: [ram.as_raw_fd(), shared.file.as_raw_fd(), image::file()?.as_raw_fd()],
            error: 0,
        };
        // SAFETY: no arguments.
        let lasting =
            i64::from(unsafe { libc::getpid() }) == unsafe { libc::syscall(libc::SYS_gettid) };
        let (pid, process) = if lasting { spawn(plan)? } else { spawn_elsewhere(plan)? };
        Ok(Self { shared, pid, process, ended: Mutex::new(None) })
    }

    pub(super) fn shared(&self) -> &Shared {
        &self.shared
    }

    /// What the mailbox's turn is while the guest runs: with the bits by which the kernel recognizes, when the process
    /// ends, that it held this futex and that somebody waits for it.
    pub(super) fn theirs(&self) -> u32 {
        self.pid | libc::FUTEX_WAITERS
    }

    pub(super) fn pid(&self) -> i32 {
        self.pid.cast_signed()
    }

    /// Interrupts the guest.
    pub(super) fn interrupt(&self) {
        host::send(&self.process, libc::SIGUSR1);
    }

    /// Ends it.
    pub(super) fn kill(&self) {
        host::send(&self.process, libc::SIGKILL);
    }

    /// The status of its end; `None`: it runs.
    pub(super) fn ended(&self, wait: bool) -> Option<i32> {
        let mut ended = self.ended.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if ended.is_none() {
            *ended = host::reap(&self.process, wait);
        }
        *ended
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        self.kill();
        let _ = self.ended(true);
    }
}

/// What the process that is to become a guest needs to know.
#[derive(Clone, Copy)]
struct Plan {
    /// The files that become 3, 4 and 5.
    files: [i32; 3],
    /// `errno`, when it failed.
    error: i32,
}

type Spawned = io::Result<(u32, OwnedFd)>;

/// [`spawn`] on a thread that lives as long as the process.
fn spawn_elsewhere(plan: Plan) -> Spawned {
    type Request = (Plan, Sender<Spawned>);
    static SPAWNER: OnceLock<Mutex<Sender<Request>>> = OnceLock::new();
    let spawner = SPAWNER.get_or_init(|| {
        let (sender, receiver) = channel::<Request>();
        // Should the host refuse the thread, then the channel is closed, and sending says so.
        let _ = std::thread::Builder::new().name("spawner".into()).spawn(move || {
            for (plan, answer) in receiver {
                let _ = answer.send(spawn(plan));
            }
        });
        Mutex::new(sender)
    });
    let (sender, receiver) = channel();
    let gone = |_| io::Error::other("no thread to start processes");
    spawner
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
        .send((plan, sender))
        .map_err(|_| gone(()))?;
    receiver.recv().map_err(|_| gone(()))?
}

/// Starts the process, and answers its id and a file for it.
fn spawn(mut plan: Plan) -> Spawned {
    const STACK: usize = 16 << 10;
    // Never written but by the child, and little of it.
    let mut stack = Vec::<u128>::with_capacity(STACK / 16);
    let top = stack.spare_capacity_mut().as_mut_ptr_range().end;
    let mut process = -1_i32;
    let mut all = std::mem::MaybeUninit::<libc::sigset_t>::uninit();
    let mut before = std::mem::MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: `all` is writable; a handler of ours must not run in a process that shares our memory.
    unsafe { libc::sigfillset(all.as_mut_ptr()) };
    // SAFETY: `all` was just filled, `before` is writable.
    unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, all.as_ptr(), before.as_mut_ptr()) };
    // SAFETY: the stack, the plan and `process` outlive the call, which returns when the child has left our memory;
    // `become_guest` makes only system calls.
    let pid = unsafe {
        libc::clone(
            become_guest,
            top.cast(),
            libc::CLONE_VM | libc::CLONE_VFORK | libc::CLONE_PIDFD | libc::SIGCHLD,
            (&raw mut plan).cast(),
            &raw mut process,
        )
    };
    let refused = io::Error::last_os_error();
    // SAFETY: `before` was written by the call above.
    unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, before.as_ptr(), std::ptr::null_mut()) };
    let Ok(pid @ 1..) = u32::try_from(pid) else { return Err(refused) };
    // SAFETY: the kernel opened it for us.
    let process = unsafe { OwnedFd::from_raw_fd(process) };
    // SAFETY: `plan` is ours; the child wrote it, if at all, before it ended.
    let error = unsafe { (&raw const plan.error).read_volatile() };
    if error != 0 {
        let _ = host::reap(&process, true);
        return Err(io::Error::from_raw_os_error(error));
    }
    Ok((pid, process))
}

/// In the new process, which shares our memory while we wait: takes its files, drops the others, and executes the stub.
extern "C" fn become_guest(plan: *mut libc::c_void) -> i32 {
    let plan = plan.cast::<Plan>();
    // SAFETY: the parent's plan, which waits for us.
    let files = unsafe { (*plan).files };
    let empty: [*const libc::c_char; 1] = [std::ptr::null()];
    let no_core = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    let targets = [RAM_FD, MAILBOX_FD, IMAGE_FD];
    // SAFETY: only system calls, on our own table of files and our own process; all pointers are to live values.
    unsafe {
        // The terminal's signals are not for guests. Not a session of its own: the host's scheduler would share out CPU
        // time between that and ours (`sched(7)`, autogroups), and make each hand-over wait for others.
        libc::setpgid(0, 0);
        libc::setrlimit(libc::RLIMIT_CORE, &raw const no_core);
        let mut fine = libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0;
        let mut copies = [-1; 3];
        for (copy, file) in copies.iter_mut().zip(files) {
            *copy = libc::fcntl(file, libc::F_DUPFD, IMAGE_FD + 1);
            fine = fine && *copy >= 0;
        }
        for (copy, target) in copies.into_iter().zip(targets) {
            fine = fine
                && libc::dup3(copy, target, if target == IMAGE_FD { libc::O_CLOEXEC } else { 0 })
                    >= 0;
        }
        fine = fine
            && libc::syscall(libc::SYS_close_range, 0, 2, 0) == 0
            && libc::syscall(libc::SYS_close_range, IMAGE_FD + 1, u32::MAX, 0) == 0;
        if fine {
            libc::syscall(
                libc::SYS_execveat,
                IMAGE_FD,
                c"".as_ptr(),
                empty.as_ptr(),
                empty.as_ptr(),
                libc::AT_EMPTY_PATH,
            );
        }
        (&raw mut (*plan).error)
            .write_volatile(io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO));
        libc::_exit(127)
    }
}

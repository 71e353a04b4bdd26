//! The system calls of a VMM that runs a guest: all others are answered as if this Linux did not have them.
//!
//! ENOSYS, and not the end of the process: libraries have their own ways to do without a call, and whoever broke in gets
//! as little from it. Numbers are those of `x86_64`; a call of another architecture ends the process.

use std::collections::BTreeMap;
use std::fmt;

use seccompiler::{
    BackendError, BpfProgram, Error, SeccompAction, SeccompCmpArgLen as Length,
    SeccompCmpOp as Compare, SeccompCondition as Condition, SeccompFilter, SeccompRule as Rule,
    TargetArch, apply_filter_all_threads,
};

/// Calls with any arguments. Waiting and waking first by frequency would be nice; the filter has them by number.
const CALLS: &[i64] = &[
    // Files that are open, or that Landlock lets be opened.
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_readv,
    libc::SYS_writev,
    libc::SYS_pread64,
    libc::SYS_pwrite64,
    libc::SYS_preadv,
    libc::SYS_pwritev,
    libc::SYS_preadv2,
    libc::SYS_pwritev2,
    libc::SYS_open,
    libc::SYS_openat,
    libc::SYS_close,
    libc::SYS_close_range,
    libc::SYS_lseek,
    libc::SYS_stat,
    libc::SYS_fstat,
    libc::SYS_lstat,
    libc::SYS_newfstatat,
    libc::SYS_statx,
    libc::SYS_statfs,
    libc::SYS_fstatfs,
    libc::SYS_access,
    libc::SYS_faccessat,
    libc::SYS_faccessat2,
    libc::SYS_readlink,
    libc::SYS_readlinkat,
    libc::SYS_getdents64,
    libc::SYS_getcwd,
    libc::SYS_fsync,
    libc::SYS_fdatasync,
    libc::SYS_sync_file_range,
    libc::SYS_fallocate,
    libc::SYS_ftruncate,
    libc::SYS_fadvise64,
    libc::SYS_flock,
    libc::SYS_fcntl,
    libc::SYS_dup,
    libc::SYS_dup2,
    libc::SYS_dup3,
    libc::SYS_unlink,
    libc::SYS_unlinkat,
    libc::SYS_chmod,
    libc::SYS_fchmod,
    libc::SYS_fchmodat,
    libc::SYS_rename,
    libc::SYS_renameat,
    libc::SYS_renameat2,
    libc::SYS_umask,
    libc::SYS_memfd_create,
    libc::SYS_pipe,
    libc::SYS_pipe2,
    libc::SYS_eventfd2,
    libc::SYS_sendfile,
    libc::SYS_copy_file_range,
    // Sockets that are open; which kinds can be made is below.
    libc::SYS_bind,
    libc::SYS_listen,
    libc::SYS_accept,
    libc::SYS_accept4,
    libc::SYS_connect,
    libc::SYS_getsockname,
    libc::SYS_getpeername,
    libc::SYS_getsockopt,
    libc::SYS_setsockopt,
    libc::SYS_shutdown,
    libc::SYS_sendto,
    libc::SYS_recvfrom,
    libc::SYS_sendmsg,
    libc::SYS_recvmsg,
    libc::SYS_sendmmsg,
    libc::SYS_recvmmsg,
    // Waiting, and time.
    libc::SYS_futex,
    libc::SYS_poll,
    libc::SYS_ppoll,
    libc::SYS_select,
    libc::SYS_pselect6,
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_wait,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_pwait2,
    libc::SYS_timerfd_create,
    libc::SYS_timerfd_settime,
    libc::SYS_timerfd_gettime,
    libc::SYS_nanosleep,
    libc::SYS_clock_nanosleep,
    libc::SYS_clock_gettime,
    libc::SYS_clock_getres,
    libc::SYS_gettimeofday,
    libc::SYS_restart_syscall,
    // Memory.
    libc::SYS_brk,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_madvise,
    libc::SYS_msync,
    libc::SYS_mincore,
    libc::SYS_mlock,
    libc::SYS_munlock,
    libc::SYS_membarrier,
    // Threads, signals, and oneself.
    libc::SYS_set_robust_list,
    libc::SYS_set_tid_address,
    libc::SYS_rseq,
    libc::SYS_sched_yield,
    libc::SYS_sched_getaffinity,
    libc::SYS_sched_setaffinity,
    libc::SYS_getcpu,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_rt_sigtimedwait,
    libc::SYS_signalfd4,
    libc::SYS_sigaltstack,
    libc::SYS_tgkill,
    libc::SYS_getpid,
    libc::SYS_getppid,
    libc::SYS_gettid,
    libc::SYS_getuid,
    libc::SYS_geteuid,
    libc::SYS_getgid,
    libc::SYS_getegid,
    libc::SYS_getrusage,
    libc::SYS_sysinfo,
    libc::SYS_uname,
    libc::SYS_getrandom,
    libc::SYS_prlimit64,
    libc::SYS_getrlimit,
    libc::SYS_setrlimit,
    libc::SYS_exit,
    libc::SYS_exit_group,
    // The guest's processes: started, told, fetched; and what the stub does before its own filter.
    libc::SYS_setsid,
    libc::SYS_wait4,
    libc::SYS_waitid,
    libc::SYS_pidfd_open,
    libc::SYS_pidfd_send_signal,
    libc::SYS_seccomp,
];

/// Requests of devices: terminals, TAP, sizes; not the one that types on the terminal for its user (`TIOCSTI`).
const REQUESTS: &[u64] = &[
    0x5401,
    0x5402,
    0x5403,
    0x5404, // TCGETS, TCSETS, TCSETSW, TCSETSF
    0x540f,
    0x5410,
    0x5413,
    0x5414, // TIOCGPGRP, TIOCSPGRP, TIOCGWINSZ, TIOCSWINSZ
    0x5421,
    0x541b,
    0x5450,
    0x5451, // FIONBIO, FIONREAD, FIONCLEX, FIOCLEX
    0x8004_5430,
    0x4004_5431,
    0x5441, // TIOCGPTN, TIOCSPTLCK, TIOCGPTPEER
    0x8008_1272,
    0x1268,
    0x127b,
    0x1277, // BLKGETSIZE64, BLKSSZGET, BLKPBSZGET, BLKDISCARD
    0x802c_542a,
    0x402c_542b,
    0x402c_542c,
    0x402c_542d, // TCGETS2, TCSETS2, TCSETSW2, TCSETSF2
    0x4004_54ca,
    0x8004_54d2,
    0x8004_54cf,
    0x4004_54d0,
    0x4004_54d8, // TUNSETIFF, GETIFF, GETFEATURES, OFFLOAD, VNETHDRSZ
];

/// Of processes: their name, their end with ours, no new privileges, whether they can be looked into.
const PRCTL: &[u64] = &[1, 2, 3, 4, 15, 16, 38, 39];

/// New namespaces (`CLONE_NEW*`), tracing, and a process that outlives us as somebody else's.
const CLONE_REFUSED: u64 = 0x7e02_0000 | 0x80 | 0x2000 | 0x8000;
/// `PROT_EXEC`.
const EXECUTE: u64 = 4;
/// `MAP_SHARED | MAP_FIXED`, and the file of its memory in a guest's process.
const GUEST_MAPPING: u64 = 0x11;
const GUEST_FILE: u64 = 3;
/// The file of the stub, and `AT_EMPTY_PATH`.
const STUB_FILE: u64 = 5;
const EMPTY_PATH: u64 = 0x1000;

/// `AF_UNIX`; and `AF_INET`, `AF_INET6`.
const LOCAL: [u64; 1] = [1];
const INTERNET: [u64; 3] = [1, 2, 10];

/// Which sockets can be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sockets {
    /// Those between processes of this machine.
    Local,
    /// Those of the Internet as well.
    Internet,
}

/// The filter cannot be installed.
#[derive(Debug)]
pub struct FilterError(Error);

impl fmt::Display for FilterError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the VMM's system calls cannot be filtered: {}", self.0)
    }
}

impl std::error::Error for FilterError {}

fn equal(argument: u8, values: &[u64]) -> Result<Vec<Rule>, BackendError> {
    let rule = |value: &u64| {
        Rule::new(vec![Condition::new(argument, Length::Dword, Compare::Eq, *value)?])
    };
    values.iter().map(rule).collect()
}

fn without(argument: u8, bits: u64) -> Result<Rule, BackendError> {
    Rule::new(vec![Condition::new(argument, Length::Dword, Compare::MaskedEq(bits), 0)?])
}

fn rules(sockets: Sockets) -> Result<BTreeMap<i64, Vec<Rule>>, BackendError> {
    let mut rules: BTreeMap<_, _> = CALLS.iter().map(|call| (*call, Vec::new())).collect();
    let families = if sockets == Sockets::Internet { &INTERNET[..] } else { &LOCAL[..] };
    rules.insert(libc::SYS_socket, equal(0, families)?);
    rules.insert(libc::SYS_socketpair, equal(0, &LOCAL)?);
    rules.insert(libc::SYS_ioctl, equal(1, REQUESTS)?);
    rules.insert(libc::SYS_prctl, equal(0, PRCTL)?);
    rules.insert(libc::SYS_clone, vec![without(0, CLONE_REFUSED)?]);
    let guest_mapping = Rule::new(vec![
        Condition::new(3, Length::Dword, Compare::Eq, GUEST_MAPPING)?,
        Condition::new(4, Length::Dword, Compare::Eq, GUEST_FILE)?,
    ])?;
    rules.insert(libc::SYS_mmap, vec![without(2, EXECUTE)?, guest_mapping]);
    rules.insert(libc::SYS_mprotect, vec![without(2, EXECUTE)?]);
    let stub = Rule::new(vec![
        Condition::new(0, Length::Dword, Compare::Eq, STUB_FILE)?,
        Condition::new(4, Length::Dword, Compare::Eq, EMPTY_PATH)?,
    ])?;
    rules.insert(libc::SYS_execveat, vec![stub]);
    Ok(rules)
}

/// The program of the filter.
///
/// # Errors
/// A rule makes no sense.
fn program(sockets: Sockets) -> Result<BpfProgram, BackendError> {
    SeccompFilter::new(
        rules(sockets)?,
        SeccompAction::Errno(libc::ENOSYS.unsigned_abs()),
        SeccompAction::Allow,
        TargetArch::x86_64,
    )?
    .try_into()
}

/// Puts the filter on all threads of this process, and on all that they start.
///
/// # Errors
/// The host refuses.
pub fn install(sockets: Sockets) -> Result<(), FilterError> {
    let program = program(sockets).map_err(|error| FilterError(Error::Backend(error)))?;
    apply_filter_all_threads(&program).map_err(FilterError)
}

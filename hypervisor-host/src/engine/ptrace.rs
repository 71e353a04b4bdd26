//! The engine of last resort: each virtual CPU is a child process that is traced.
//!
//! It is slow (a hypercall is two context switches and four system calls), needs nothing but `ptrace`, and is easy to
//! look into: for debugging, and to tell a fault of the monitor from one of the guest's. No system
//! call of the guest is ever executed (`PTRACE_SYSEMU`); those that map its memory are put into the child by the
//! tracer. What `ptrace` does not tell of a fault, its error code, is found from the instruction.
// UNSAFETY: forks, traces, and maps memory in the child.
#![expect(unsafe_code, reason = "ptrace")]

use std::fmt;
use std::io;
use std::os::fd::AsRawFd;
use std::ptr;
use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use iced_x86::{Decoder, DecoderOptions, InstructionInfoFactory, OpAccess};
use janus_proto::addr::{Mfn, PAGE_SIZE};
use libc::{c_int, c_void, pid_t};

use super::{EngineError, Exit, Fault, Kicker, Mapping, Registers, Vcpu};
use crate::machine::ram::Ram;
use crate::pv::timers::now;

/// Where the one page of ours is in the child: a `syscall` instruction. Guests end below.
pub const TOP: u64 = 0x7fff_ffe0_0000;
/// The last address that can be mapped.
const LAST: u64 = 0x7fff_ffff_f000;
/// What the library takes a request of ptrace for.
#[cfg(target_env = "musl")]
type PtraceRequest = c_int;
#[cfg(not(target_env = "musl"))]
type PtraceRequest = libc::c_uint;
/// `PTRACE_SYSEMU`, which the library does not name for every target.
const PTRACE_SYSEMU: PtraceRequest = 31;
/// The signal of a kick. The child never handles it: it stops for the tracer.
const KICK: c_int = libc::SIGUSR1;
/// The standard XSAVE area, as a note of the register sets.
const NT_X86_XSTATE: usize = 0x202;

/// What a guest's hypercall page has: each entry makes its system call, and keeps `rcx` and `r11` (as Xen's own does).
#[must_use]
pub fn hypercall_page() -> [u8; PAGE_SIZE] {
    const ENTRY: usize = 32;
    const IRET: u32 = 23;
    let mut page = [0xcc; PAGE_SIZE];
    for (number, entry) in (0..).zip(page.chunks_exact_mut(ENTRY)) {
        // push rcx; push r11
        let mut code = vec![0x51, 0x41, 0x53];
        if number == IRET {
            // push rax: what `struct iret_context` starts with (xen-x86_64.h)
            code.push(0x50);
        }
        code.push(0xb8); // mov eax, number
        code.extend(u32::to_le_bytes(number));
        code.extend([0x0f, 0x05]); // syscall
        if number != IRET {
            code.extend([0x41, 0x5b, 0x59, 0xc3]); // pop r11; pop rcx; ret
        }
        for (to, from) in entry.iter_mut().zip(code) {
            *to = from;
        }
    }
    page
}

/// A virtual CPU that is traced.
pub struct PtraceVcpu {
    ram: Arc<Ram>,
    child: Option<pid_t>,
    shared: Arc<Shared>,
    /// What was asked for before there was a child.
    waiting: Vec<Request>,
    failed: Option<EngineError>,
}

#[derive(Clone, Copy, Debug)]
enum Request {
    Map(Mapping),
    Unmap(u64, u64),
}

#[derive(Debug)]
struct Shared {
    /// The child, 0 before there is one, -1 when it was killed before.
    child: AtomicI32,
    deadline: Mutex<Timer>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Timer {
    at: Option<u64>,
    over: bool,
    /// A kick came before there was a child.
    kicked: bool,
}

impl fmt::Debug for PtraceVcpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PtraceVcpu({:?})", self.child)
    }
}

impl Kicker for Shared {
    fn kick(&self) {
        let mut timer = self.deadline.lock().unwrap_or_else(PoisonError::into_inner);
        match self.child.load(Ordering::SeqCst) {
            // SAFETY: a signal to our own child, which has not been waited for: `Drop` clears it first.
            child if child > 0 => drop(unsafe { libc::kill(child, KICK) }),
            _ => timer.kicked = true,
        }
    }
    fn kill(&self) {
        let _timer = self.deadline.lock().unwrap_or_else(PoisonError::into_inner);
        match self.child.load(Ordering::SeqCst) {
            // SAFETY: as above.
            child if child > 0 => drop(unsafe { libc::kill(child, libc::SIGKILL) }),
            _ => self.child.store(-1, Ordering::SeqCst),
        }
    }
}

impl PtraceVcpu {
    /// CPUs of one guest. Their children are made by the threads that run them: a tracer is a thread.
    ///
    /// # Errors
    /// The host has no threads left.
    pub fn new(ram: &Arc<Ram>, vcpus: usize) -> io::Result<Vec<Self>> {
        (0..vcpus).map(|_| Self::one(ram)).collect()
    }

    fn one(ram: &Arc<Ram>) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            child: AtomicI32::new(0),
            deadline: Mutex::new(Timer::default()),
            changed: Condvar::new(),
        });
        let timer = Arc::clone(&shared);
        std::thread::Builder::new().name("ptrace timer".into()).spawn(move || timer.serve())?;
        Ok(Self { ram: Arc::clone(ram), child: None, shared, waiting: Vec::new(), failed: None })
    }

    /// Makes the child, by the calling thread.
    fn start(&mut self) -> Result<pid_t, EngineError> {
        if let Some(child) = self.child {
            return Ok(child);
        }
        let child = fork_stopped().map_err(EngineError::Host)?;
        self.child = Some(child);
        let timer = self.shared.deadline.lock().unwrap_or_else(PoisonError::into_inner);
        let killed = self.shared.child.swap(child, Ordering::SeqCst) < 0;
        let kicked = timer.kicked;
        drop(timer);
        if killed {
            self.shared.kill();
        } else if kicked {
            self.shared.kick();
        }
        self.empty(child)?;
        for request in std::mem::take(&mut self.waiting) {
            self.request(request)?;
        }
        Ok(child)
    }

    /// Leaves nothing of ours in the child but the page with the instruction, and no file but the memory.
    fn empty(&self, child: pid_t) -> Result<(), EngineError> {
        let file = u64::try_from(self.ram.file().as_raw_fd()).unwrap_or(u64::MAX);
        let last = u64::from(u32::MAX);
        if file > 0 {
            inject(child, libc::SYS_close_range, [0, file - 1, 0, 0, 0, 0])?;
        }
        inject(child, libc::SYS_close_range, [file + 1, last, 0, 0, 0, 0])?;
        let page = PAGE_SIZE as u64;
        inject(child, libc::SYS_munmap, [TOP + page, LAST - TOP - page, 0, 0, 0, 0])?;
        inject(child, libc::SYS_munmap, [page, TOP - page, 0, 0, 0, 0]).map(drop)
    }

    fn request(&mut self, request: Request) -> Result<(), EngineError> {
        let Some(child) = self.child else {
            self.waiting.push(request);
            return Ok(());
        };
        match request {
            Request::Unmap(address, length) => {
                inject(child, libc::SYS_munmap, [address, length, 0, 0, 0, 0]).map(drop)
            }
            Request::Map(mapping) => {
                let Mapping { address, frame, pages, protection } = mapping;
                let offset = self.ram.offset(frame).ok_or(EngineError::Corrupt("no such frame"))?;
                let mut access = libc::PROT_READ;
                if protection.write {
                    access |= libc::PROT_WRITE;
                }
                if protection.execute {
                    access |= libc::PROT_EXEC;
                }
                let flags = libc::MAP_SHARED | libc::MAP_FIXED;
                let arguments = [
                    address,
                    (pages * PAGE_SIZE) as u64,
                    u64::from(access.cast_unsigned()),
                    u64::from(flags.cast_unsigned()),
                    u64::from(self.ram.file().as_raw_fd().cast_unsigned()),
                    offset,
                ];
                let answer = inject(child, libc::SYS_mmap, arguments)?;
                if answer == address {
                    return Ok(());
                }
                let error = i32::try_from(answer.wrapping_neg()).unwrap_or(libc::EINVAL);
                Err(EngineError::Host(io::Error::from_raw_os_error(error)))
            }
        }
    }

    /// Does what was asked for, or remembers for the next run that it could not be.
    fn ask(&mut self, request: Request) {
        if let Err(error) = self.request(request) {
            self.failed.get_or_insert(error);
        }
    }

    fn stopped(&mut self, child: pid_t, registers: &mut Registers) -> Result<Exit, EngineError> {
        let status = wait(child)?;
        if !libc::WIFSTOPPED(status) {
            return Err(EngineError::Ended(status));
        }
        let regs = get(child)?;
        *registers = from_user(&regs);
        match libc::WSTOPSIG(status) {
            signal if signal == libc::SIGTRAP | 0x80 => {
                registers.rax = regs.orig_rax;
                Ok(Exit::Syscall)
            }
            KICK => Ok(Exit::Kicked),
            signal => self.fault(child, signal, registers).map(|fault| match fault {
                Some(fault) => Exit::Fault(fault),
                None => Exit::Kicked,
            }),
        }
    }

    /// Which exception a signal was.
    fn fault(
        &self,
        child: pid_t,
        signal: c_int,
        registers: &Registers,
    ) -> Result<Option<Fault>, EngineError> {
        // SAFETY: all zero bytes are a value of this C structure.
        let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
        // SAFETY: writes the structure.
        let result = unsafe {
            libc::ptrace(libc::PTRACE_GETSIGINFO, child, ptr::null_mut::<c_void>(), &raw mut info)
        };
        if result < 0 {
            return Err(lost());
        }
        let plain = |vector| Fault { vector, error: 0, address: 0 };
        let code = info.si_code;
        Ok(Some(match signal {
            libc::SIGSEGV if code == 1 || code == 2 => {
                // SAFETY: a fault's signal carries an address.
                let address = unsafe { info.si_addr() }.addr() as u64;
                let present = u32::from(code == 2);
                let (write, fetch) = access(child, registers, address);
                let error = present | u32::from(write) << 1 | 1 << 2 | u32::from(fetch) << 4;
                Fault { vector: 14, error, address }
            }
            libc::SIGSEGV => Fault { error: selector_error(child, registers), ..plain(13) },
            libc::SIGBUS if code == 1 => plain(17),
            libc::SIGBUS => plain(12),
            libc::SIGILL => plain(6),
            // FPE_INTDIV and FPE_INTOVF, then those of the FPU.
            libc::SIGFPE if code == 1 || code == 2 => plain(0),
            libc::SIGFPE => plain(16),
            // A breakpoint has SI_KERNEL; single steps TRAP_TRACE or TRAP_HWBKPT.
            libc::SIGTRAP if code == 128 => plain(3),
            libc::SIGTRAP => plain(1),
            // Nothing of the guest's: somebody sent it from outside.
            _ => return Ok(None),
        }))
    }
}

impl Vcpu for PtraceVcpu {
    fn run(&mut self, registers: &mut Registers) -> Result<Exit, EngineError> {
        let child = self.start()?;
        if let Some(error) = self.failed.take() {
            return Err(error);
        }
        set(child, &to_user(registers, get(child)?))?;
        resume(child, PTRACE_SYSEMU)?;
        self.stopped(child, registers)
    }

    fn map(&mut self, mapping: Mapping) {
        self.ask(Request::Map(mapping));
    }

    fn unmap(&mut self, address: u64, pages: usize) {
        self.ask(Request::Unmap(address, (pages * PAGE_SIZE) as u64));
    }

    fn unmap_all(&mut self) {
        let page = PAGE_SIZE as u64;
        self.ask(Request::Unmap(page, TOP - page));
    }

    fn switch(&mut self, _root: Mfn) {
        self.unmap_all();
    }

    fn set_deadline(&mut self, nanoseconds: Option<u64>) {
        let mut timer = self.shared.deadline.lock().unwrap_or_else(PoisonError::into_inner);
        timer.at = nanoseconds;
        self.shared.changed.notify_all();
    }

    fn kicker(&self) -> Arc<dyn Kicker> {
        Arc::clone(&self.shared) as Arc<dyn Kicker>
    }

    fn fpu(&mut self) -> Result<Vec<u8>, EngineError> {
        let child = self.start()?;
        let mut area = vec![0_u8; 16 * 1024];
        let mut part = libc::iovec { iov_base: area.as_mut_ptr().cast(), iov_len: area.len() };
        // SAFETY: writes at most the area, and its length into `part`.
        let result = unsafe {
            libc::ptrace(
                libc::PTRACE_GETREGSET,
                child,
                ptr::without_provenance_mut::<c_void>(NT_X86_XSTATE),
                &raw mut part,
            )
        };
        if result < 0 {
            return Err(lost());
        }
        area.truncate(part.iov_len);
        Ok(area)
    }
}

impl Drop for PtraceVcpu {
    fn drop(&mut self) {
        let mut timer = self.shared.deadline.lock().unwrap_or_else(PoisonError::into_inner);
        timer.over = true;
        self.shared.child.store(-1, Ordering::SeqCst);
        self.shared.changed.notify_all();
        drop(timer);
        if let Some(child) = self.child {
            // SAFETY: our own child, which nobody has waited for.
            unsafe { libc::kill(child, libc::SIGKILL) };
            let mut status = 0;
            // SAFETY: writes `status`.
            unsafe { libc::waitpid(child, &raw mut status, libc::__WALL) };
        }
    }
}

impl Shared {
    /// The thread that kicks when the deadline comes.
    fn serve(&self) {
        let mut timer = self.deadline.lock().unwrap_or_else(PoisonError::into_inner);
        while !timer.over {
            let left = timer.at.map(|at| at.saturating_sub(now()));
            timer = match left {
                None => self.changed.wait(timer).unwrap_or_else(PoisonError::into_inner),
                Some(0) => {
                    timer.at = None;
                    drop(timer);
                    self.kick();
                    self.deadline.lock().unwrap_or_else(PoisonError::into_inner)
                }
                Some(left) => {
                    let wait = self.changed.wait_timeout(timer, Duration::from_nanos(left));
                    wait.unwrap_or_else(PoisonError::into_inner).0
                }
            };
        }
    }
}

fn lost() -> EngineError {
    EngineError::Host(io::Error::last_os_error())
}

/// One child is made at a time: the page for it has one address.
static MAKING: Mutex<()> = Mutex::new(());

/// A copy of this process that stands still, traced by this thread.
fn fork_stopped() -> io::Result<pid_t> {
    let _one = MAKING.lock().unwrap_or_else(PoisonError::into_inner);
    let rseq = rseq_area();
    let page = PAGE_SIZE;
    // SAFETY: a new page at an address where nothing is.
    let stub = unsafe {
        libc::mmap(
            ptr::without_provenance_mut(usize::try_from(TOP).unwrap_or(0)),
            page,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE,
            -1,
            0,
        )
    };
    if stub == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the page was just made; `syscall`.
    unsafe { stub.cast::<[u8; 2]>().write([0x0f, 0x05]) };
    // SAFETY: our own page.
    unsafe { libc::mprotect(stub, page, libc::PROT_READ | libc::PROT_EXEC) };
    // SAFETY: the child only makes system calls, and never returns from here.
    let child = unsafe { libc::fork() };
    if child == 0 {
        // SAFETY: asks to be traced; no memory is touched.
        unsafe { libc::ptrace(libc::PTRACE_TRACEME, 0, 0, 0) };
        if let Some(area) = rseq {
            // SAFETY: forgets an area that is about to be unmapped (flags 1: unregister, and the library's mark).
            unsafe { libc::syscall(libc::SYS_rseq, area, 32, 1, 0x5305_3053) };
        }
        // SAFETY: stops, until the tracer goes on with other registers.
        unsafe { libc::kill(libc::getpid(), libc::SIGSTOP) };
        // SAFETY: only reached if nobody traces.
        unsafe { libc::_exit(1) };
    }
    // SAFETY: the page of above, in this process.
    unsafe { libc::munmap(stub, page) };
    if child < 0 {
        return Err(io::Error::last_os_error());
    }
    let status = wait(child).map_err(|_| io::Error::last_os_error())?;
    if !libc::WIFSTOPPED(status) {
        return Err(io::Error::other("the child did not stop"));
    }
    let options = libc::PTRACE_O_EXITKILL | libc::PTRACE_O_TRACESYSGOOD;
    // SAFETY: no pointers.
    if unsafe { libc::ptrace(libc::PTRACE_SETOPTIONS, child, 0, options) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(child)
}

/// This thread's restartable-sequences area, if its C library registered one.
fn rseq_area() -> Option<u64> {
    // SAFETY: looks a name up.
    let offset = unsafe { libc::dlsym(libc::RTLD_DEFAULT, c"__rseq_offset".as_ptr()) };
    if offset.is_null() {
        return None;
    }
    // SAFETY: the library's `const ptrdiff_t`.
    let offset = unsafe { *offset.cast::<i64>() };
    let pointer: u64;
    // SAFETY: reads the thread pointer, which the ABI keeps at its own address.
    unsafe { std::arch::asm!("mov {}, fs:0", out(reg) pointer, options(nostack, readonly)) };
    Some(pointer.wrapping_add_signed(offset))
}

fn wait(child: pid_t) -> Result<c_int, EngineError> {
    loop {
        let mut status = 0;
        // SAFETY: writes `status`.
        let result = unsafe { libc::waitpid(child, &raw mut status, libc::__WALL) };
        if result == child {
            return Ok(status);
        }
        if io::Error::last_os_error().kind() != io::ErrorKind::Interrupted {
            return Err(lost());
        }
    }
}

fn get(child: pid_t) -> Result<libc::user_regs_struct, EngineError> {
    // SAFETY: all zero bytes are a value of this C structure.
    let mut regs: libc::user_regs_struct = unsafe { std::mem::zeroed() };
    // SAFETY: writes the structure.
    let result = unsafe {
        libc::ptrace(libc::PTRACE_GETREGS, child, ptr::null_mut::<c_void>(), &raw mut regs)
    };
    if result < 0 { Err(lost()) } else { Ok(regs) }
}

fn set(child: pid_t, regs: &libc::user_regs_struct) -> Result<(), EngineError> {
    // SAFETY: reads the structure.
    let result = unsafe {
        libc::ptrace(libc::PTRACE_SETREGS, child, ptr::null_mut::<c_void>(), ptr::from_ref(regs))
    };
    if result < 0 { Err(lost()) } else { Ok(()) }
}

fn resume(child: pid_t, how: PtraceRequest) -> Result<(), EngineError> {
    // SAFETY: no pointers.
    if unsafe { libc::ptrace(how, child, 0, 0) } < 0 { Err(lost()) } else { Ok(()) }
}

/// Makes one system call in the child; answers what it answered.
fn inject(child: pid_t, number: i64, arguments: [u64; 6]) -> Result<u64, EngineError> {
    let before = get(child)?;
    let mut regs = before;
    [regs.rdi, regs.rsi, regs.rdx, regs.r10, regs.r8, regs.r9] = arguments;
    regs.rax = number.cast_unsigned();
    // Not in a system call: the kernel must not restart one.
    regs.orig_rax = u64::MAX;
    regs.rip = TOP;
    let mut kicked = false;
    set(child, &regs)?;
    // A kick that waits is delivered before the instruction: so until it has been executed.
    let answer = loop {
        resume(child, libc::PTRACE_SINGLESTEP)?;
        let status = wait(child)?;
        if !libc::WIFSTOPPED(status) {
            return Err(EngineError::Ended(status));
        }
        kicked |= libc::WSTOPSIG(status) == KICK;
        let now = get(child)?;
        if now.rip == TOP + 2 {
            break now.rax;
        }
        if now.rip != TOP {
            return Err(EngineError::Corrupt("a system call went elsewhere"));
        }
    };
    let mut back = before;
    back.orig_rax = u64::MAX;
    set(child, &back)?;
    if kicked {
        // SAFETY: our own child: the kick is for the next run.
        unsafe { libc::kill(child, KICK) };
    }
    Ok(answer)
}

fn from_user(regs: &libc::user_regs_struct) -> Registers {
    Registers {
        r15: regs.r15,
        r14: regs.r14,
        r13: regs.r13,
        r12: regs.r12,
        rbp: regs.rbp,
        rbx: regs.rbx,
        r11: regs.r11,
        r10: regs.r10,
        r9: regs.r9,
        r8: regs.r8,
        rax: regs.rax,
        rcx: regs.rcx,
        rdx: regs.rdx,
        rsi: regs.rsi,
        rdi: regs.rdi,
        rip: regs.rip,
        rflags: regs.eflags,
        rsp: regs.rsp,
        fs_base: regs.fs_base,
        gs_base: regs.gs_base,
    }
}

fn to_user(from: &Registers, mut regs: libc::user_regs_struct) -> libc::user_regs_struct {
    (regs.r15, regs.r14, regs.r13, regs.r12) = (from.r15, from.r14, from.r13, from.r12);
    (regs.rbp, regs.rbx) = (from.rbp, from.rbx);
    (regs.r11, regs.r10, regs.r9, regs.r8) = (from.r11, from.r10, from.r9, from.r8);
    (regs.rax, regs.rcx, regs.rdx) = (from.rax, from.rcx, from.rdx);
    (regs.rsi, regs.rdi) = (from.rsi, from.rdi);
    (regs.rip, regs.rsp, regs.eflags) = (from.rip, from.rsp, from.rflags);
    (regs.fs_base, regs.gs_base) = (from.fs_base, from.gs_base);
    (regs.cs, regs.ss, regs.orig_rax) = (0x33, 0x2b, u64::MAX);
    regs
}

/// The guest's code at its instruction pointer.
fn code(child: pid_t, rip: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    for word in 0..2_u64 {
        let Ok(address) = usize::try_from(rip.wrapping_add(word * 8)) else { break };
        let mut value: u64 = 0;
        // SAFETY: reads a word of the child, through the system call itself, which writes it to `value`.
        let result = unsafe {
            libc::syscall(libc::SYS_ptrace, libc::PTRACE_PEEKDATA, child, address, &raw mut value)
        };
        if result < 0 {
            break;
        }
        bytes.extend(value.to_le_bytes());
    }
    bytes
}

/// Whether the access that faulted wrote, and whether it was the fetch of the instruction.
fn access(child: pid_t, registers: &Registers, address: u64) -> (bool, bool) {
    let code = code(child, registers.rip);
    if code.is_empty()
        || (address.wrapping_sub(registers.rip) < 15 && address >> 12 != registers.rip >> 12)
    {
        return (false, true);
    }
    let mut decoder = Decoder::with_ip(64, &code, registers.rip, DecoderOptions::NONE);
    let instruction = decoder.decode();
    let mut factory = InstructionInfoFactory::new();
    let writes = factory.info(&instruction).used_memory().iter().any(|memory| {
        let written = matches!(
            memory.access(),
            OpAccess::Write | OpAccess::CondWrite | OpAccess::ReadWrite | OpAccess::ReadCondWrite
        );
        let at = memory.virtual_address(0, |register, _, _| value(registers, register));
        // The one that faulted, if it can be told.
        written
            && at.is_none_or(|at| address.wrapping_sub(at) < 64 || at.wrapping_sub(address) < 4096)
    });
    (writes, false)
}

fn value(r: &Registers, register: iced_x86::Register) -> Option<u64> {
    use iced_x86::Register as R;
    Some(match register {
        R::FS => r.fs_base,
        R::GS => r.gs_base,
        R::CS | R::DS | R::ES | R::SS => 0,
        R::RAX => r.rax,
        R::RCX => r.rcx,
        R::RDX => r.rdx,
        R::RBX => r.rbx,
        R::RSP => r.rsp,
        R::RBP => r.rbp,
        R::RSI => r.rsi,
        R::RDI => r.rdi,
        R::R8 => r.r8,
        R::R9 => r.r9,
        R::R10 => r.r10,
        R::R11 => r.r11,
        R::R12 => r.r12,
        R::R13 => r.r13,
        R::R14 => r.r14,
        R::R15 => r.r15,
        _ => return None,
    })
}

/// The error code of a #GP, as far as the instruction tells it.
fn selector_error(child: pid_t, registers: &Registers) -> u32 {
    match code(child, registers.rip).as_slice() {
        [0xcd, vector, ..] => u32::from(*vector) << 3 | 2,
        _ => 0,
    }
}

#[cfg(test)]
mod tests;

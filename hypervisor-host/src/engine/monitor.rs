//! The engine for hosts that have nothing but Linux: each virtual CPU is a process, and the host's own MMU its.
//!
//! A guest's process has the guest's memory, a stub of two pages and a mailbox, and may ask of the host only to arrange
//! that memory (`monitor/filter.rs`). The guest leaves by a call into the hypercall page, which jumps into the stub, or by
//! any fault or system call, which the host turns into a signal that the stub handles. Either way the registers go into
//! the mailbox, and the turn to the thread in [`Vcpu::run`]. All in the mailbox is the guest's word only.
//!
//! The thread that calls [`Vcpu::run`] is held on the guest's CPU (`monitor/place.rs`).

mod child;
mod filter;
mod host;
mod image;
mod layout;
mod place;
mod queue;
mod seat;
mod stub;
#[cfg(test)]
mod tests;

use std::io;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use janus_proto::addr::{Mfn, PAGE_SIZE};

use self::child::Child;
pub use self::layout::{BOTTOM, TOP};
use self::layout::{
    COME_BACK, FPU, FPU_SIZE, Frame, INFO, SAVE_FPU, SIGNAL_STACK, SIGNAL_STACK_SIZE,
};
use self::layout::{MAILBOX, STUB, UNMAP, kind};
use self::place::{Place, Spread};
use self::queue::{Change, EVERYTHING};
use self::seat::{PATIENCE, Seat};
use super::{EngineError, Exit, Fault, Kicker, Mapping, Protection, Registers, Vcpu};
use crate::machine::ram::Ram;

/// The number of the one hypercall that is jumped to and does not return.
const IRET: u32 = 23;
/// Bytes of one entry of the hypercall page.
const ENTRY: usize = 32;
/// The selectors of user mode, with which every guest runs.
const USER_CS: u64 = 0x33;
const USER_SS: u64 = 0x2b;
/// `si_arch` of a 64-bit system call.
const ARCH_X86_64: u32 = 0xc000_003e;

/// The engine itself: makes guests.
#[derive(Debug)]
pub struct Monitor;

/// What the virtual CPUs of a guest share.
#[derive(Debug)]
struct Guest {
    ram: Arc<Ram>,
    seats: Vec<Arc<Seat>>,
}

impl Monitor {
    /// Makes the virtual CPUs of a guest with this memory, each with an empty address space.
    ///
    /// # Errors
    /// The host refuses a process, or is too old.
    #[expect(clippy::new_ret_no_self, reason = "the engine's whole state is in its virtual CPUs")]
    pub fn new(ram: Arc<Ram>, vcpus: usize) -> Result<Vec<MonitorVcpu>, EngineError> {
        if !host::has_fsgsbase() {
            return Err(EngineError::Host(io::Error::new(
                io::ErrorKind::Unsupported,
                "this CPU or kernel has no FSGSBASE (needs Linux 5.9)",
            )));
        }
        let seat = |_| Ok(Arc::new(Seat::new(Child::start(ram.file())?)));
        let seats: io::Result<Vec<_>> = (0..vcpus).map(seat).collect();
        let guest = Arc::new(Guest { ram, seats: seats.map_err(EngineError::Host)? });
        for seat in &guest.seats {
            // The process may already have told us that it is ready.
            let theirs = seat.child.theirs();
            let _ = seat.mailbox().turn.compare_exchange(
                0,
                theirs,
                std::sync::atomic::Ordering::SeqCst,
                Relaxed,
            );
        }
        let spread = Spread::new(vcpus);
        let vcpu = |(index, seat): (usize, &Arc<Seat>)| MonitorVcpu {
            guest: Arc::clone(&guest),
            seat: Arc::clone(seat),
            root: None,
            ready: false,
            fpu_frame: 0,
            place: Place::new(Arc::clone(&spread), index),
            deadline: u64::MAX,
            patience: PATIENCE,
        };
        Ok(guest.seats.iter().enumerate().map(vcpu).collect())
    }

    /// What a guest's hypercall page has: each entry loads its number and goes to the gate.
    #[must_use]
    pub fn hypercall_page() -> [u8; PAGE_SIZE] {
        let mut page = [0xcc; PAGE_SIZE];
        for (number, entry) in (0_u32..).zip(page.chunks_exact_mut(ENTRY)) {
            let mut code = Vec::with_capacity(ENTRY);
            let enter = |code: &mut Vec<u8>, gate: u64| {
                code.push(0xb8); // mov eax, number
                code.extend(number.to_le_bytes());
                code.extend([0x49, 0xbb]); // movabs r11, gate
                code.extend(gate.to_le_bytes());
            };
            if number == IRET {
                // push rcx; push r11; push rax: what `struct iret_context` starts with (xen-x86_64.h)
                code.extend([0x51, 0x41, 0x53, 0x50]);
                enter(&mut code, stub::gate_iret());
                code.extend([0x41, 0xff, 0xe3]); // jmp r11
            } else {
                // As in Xen's own page, a call keeps rcx and r11: push rcx; push r11
                code.extend([0x51, 0x41, 0x53]);
                enter(&mut code, stub::gate());
                code.extend([0x41, 0xff, 0xd3]); // call r11
                code.extend([0x41, 0x5b, 0x59, 0xc3]); // pop r11; pop rcx; ret
            }
            for (to, from) in entry.iter_mut().zip(code) {
                *to = from;
            }
        }
        page
    }
}

/// A virtual CPU; its process ends when this is dropped.
#[derive(Debug)]
pub struct MonitorVcpu {
    guest: Arc<Guest>,
    seat: Arc<Seat>,
    root: Option<Mfn>,
    /// Its process is known to wait for a turn.
    ready: bool,
    /// Where the signal frame has the FPU state since the last stop; 0: nowhere.
    fpu_frame: u64,
    place: Place,
    /// When a run is to end, in nanoseconds of `CLOCK_MONOTONIC`.
    deadline: u64,
    patience: Duration,
}

/// Whether an address has the form that the CPU wants.
fn canonical(address: u64) -> bool {
    matches!(address.cast_signed() >> 47, 0 | -1)
}

impl MonitorVcpu {
    /// Lets this thread and the guest's process run on any CPU until the next [`Vcpu::run`]: to be called before a long
    /// wait.
    pub fn rest(&mut self) {
        self.place.let_go(self.seat.child.pid());
    }

    /// Waits until the process has come to where it waits for a turn.
    fn prepare(&mut self) -> Result<(), EngineError> {
        if self.ready {
            return Ok(());
        }
        self.seat.wait(u64::MAX, self.patience)?;
        if self.seat.mailbox().kind.load(Relaxed) != kind::READY {
            return Err(self.corrupt("the first message"));
        }
        self.ready = true;
        Ok(())
    }

    /// The guest has broken the rules: ends it.
    fn corrupt(&self, what: &'static str) -> EngineError {
        self.seat.child.kill();
        EngineError::Corrupt(what)
    }

    /// Adds a change for this virtual CPU alone.
    fn change(&self, change: Change) {
        self.seat.queue.lock().unwrap_or_else(PoisonError::into_inner).push(change);
    }

    /// Adds a change for all, and sees to it that those who run notice.
    fn change_all(&self, change: Change) {
        self.change(change);
        for seat in self.guest.seats.iter().filter(|seat| !Arc::ptr_eq(seat, &self.seat)) {
            seat.change(change);
        }
    }

    /// Gives the guest's process turns until it stops for a reason of its own; with `command`, until it is done.
    fn drive(&mut self, command: u32) -> Result<Option<Stop>, EngineError> {
        let mut evicted = false;
        loop {
            // Before the announcement: from there on, whoever kicks counts on what the stub writes there.
            self.seat.mailbox().kicked.store(0, Relaxed);
            let due = self.deadline != u64::MAX && host::now() >= self.deadline;
            if (!self.seat.announce() || due) && command == 0 {
                self.seat.stop();
                return Ok(Some(Stop::Kick));
            }
            let mailbox = self.seat.mailbox();
            let (taken, all) =
                self.seat.queue.lock().unwrap_or_else(PoisonError::into_inner).take(mailbox);
            mailbox.command.store(if all { command } else { COME_BACK }, Relaxed);
            let turn = self.seat.turn(self.deadline, self.patience);
            self.seat.stop();
            turn?;
            let mailbox = self.seat.mailbox();
            match mailbox.kind.load(Relaxed) {
                kind::DONE if !all => {}
                kind::DONE if command != 0 => return Ok(None),
                kind::HYPERCALL => {
                    self.fpu_frame = 0;
                    return Ok(Some(Stop::Hypercall));
                }
                kind::KICKED => {
                    if self.seat.was_kicked() {
                        return Ok(Some(Stop::Kick));
                    }
                }
                kind::SIGNAL => {
                    self.fpu_frame = mailbox.fpu.load(Relaxed);
                    let signal = mailbox.signal.load(Relaxed).cast_signed();
                    if signal != libc::SIGUSR1 && mailbox.code.load(Relaxed) > 0 {
                        return Ok(Some(Stop::Signal(signal)));
                    }
                    // A kick, or a signal from nowhere.
                    if self.seat.was_kicked() {
                        return Ok(Some(Stop::Kick));
                    }
                }
                kind::FAILED => {
                    let error = mailbox.error.load(Relaxed).wrapping_neg();
                    let error = i32::try_from(error).unwrap_or(libc::EINVAL);
                    if error != libc::ENOMEM || evicted {
                        return Err(EngineError::Host(io::Error::from_raw_os_error(error)));
                    }
                    // Too many mappings (vm.max_map_count): away with all of them, they come back when needed.
                    evicted = true;
                    let left = usize::try_from(mailbox.ops.load(Relaxed)).unwrap_or(0);
                    let mut queue = self.seat.queue.lock().unwrap_or_else(PoisonError::into_inner);
                    for change in taken.iter().rev().take(left) {
                        queue.push_first(*change);
                    }
                    queue.push_first(EVERYTHING);
                }
                _ => return Err(self.corrupt("why it stopped")),
            }
        }
    }

    /// What a signal means.
    fn cause(&self, signal: i32, registers: &mut Registers) -> Result<Exit, EngineError> {
        let mailbox = self.seat.mailbox();
        if signal == libc::SIGSYS {
            if mailbox.arch.load(Relaxed) == ARCH_X86_64 {
                return Ok(Exit::Syscall);
            }
            // `int 0x80`: on a CPU of its own, a gate that the guest must not use.
            registers.rip = registers.rip.wrapping_sub(2);
            return Ok(Exit::Fault(Fault { vector: 13, error: (0x80 << 3) | 2, address: 0 }));
        }
        let vector = mailbox.trap.load(Relaxed);
        let vector = u8::try_from(vector).ok().filter(|vector| *vector < 32);
        let Some(vector) = vector else { return Err(self.corrupt("the exception's vector")) };
        let address = if vector == 14 { mailbox.address.load(Relaxed) } else { 0 };
        let error = (mailbox.trap_error.load(Relaxed) & 0xffff_ffff) as u32;
        Ok(Exit::Fault(Fault { vector, error, address }))
    }
}

impl Frame {
    fn write(&self, registers: &Registers) {
        let r = registers;
        let general = [
            r.r15, r.r14, r.r13, r.r12, r.rbp, r.rbx, r.r11, r.r10, r.r9, r.r8, r.rax, r.rcx,
            r.rdx, r.rsi, r.rdi,
        ];
        for (to, from) in self.general.iter().zip(general) {
            to.store(from, Relaxed);
        }
        self.rip.store(r.rip, Relaxed);
        self.cs.store(USER_CS, Relaxed);
        self.rflags.store(r.rflags, Relaxed);
        self.rsp.store(r.rsp, Relaxed);
        self.ss.store(USER_SS, Relaxed);
    }

    fn read(&self, registers: &mut Registers) {
        let [r15, r14, r13, r12, rbp, rbx, r11, r10, r9, r8, rax, rcx, rdx, rsi, rdi] =
            self.general.each_ref().map(|value| value.load(Relaxed));
        *registers = Registers {
            r15,
            r14,
            r13,
            r12,
            rbp,
            rbx,
            r11,
            r10,
            r9,
            r8,
            rax,
            rcx,
            rdx,
            rsi,
            rdi,
            rip: self.rip.load(Relaxed),
            rflags: self.rflags.load(Relaxed),
            rsp: self.rsp.load(Relaxed),
            ..*registers
        };
    }
}

/// Why the guest's process stopped.
enum Stop {
    Hypercall,
    Kick,
    Signal(i32),
}

impl Vcpu for MonitorVcpu {
    fn run(&mut self, registers: &mut Registers) -> Result<Exit, EngineError> {
        if !(canonical(registers.fs_base) && canonical(registers.gs_base)) {
            return Err(EngineError::Host(io::Error::new(
                io::ErrorKind::InvalidInput,
                "a segment base is not canonical",
            )));
        }
        self.prepare()?;
        self.place.choose(self.seat.child.pid());
        let mailbox = self.seat.mailbox();
        mailbox.frame.write(registers);
        mailbox.fs_base.store(registers.fs_base, Relaxed);
        mailbox.gs_base.store(registers.gs_base, Relaxed);
        let stop = self.drive(0)?;
        let mailbox = self.seat.mailbox();
        mailbox.frame.read(registers);
        registers.fs_base = mailbox.fs_base.load(Relaxed);
        registers.gs_base = mailbox.gs_base.load(Relaxed);
        if !(canonical(registers.fs_base) && canonical(registers.gs_base)) {
            return Err(self.corrupt("a segment base"));
        }
        self.seat.forget_kick();
        match stop {
            Some(Stop::Hypercall) => Ok(Exit::Hypercall),
            Some(Stop::Kick) => Ok(Exit::Kicked),
            Some(Stop::Signal(signal)) => self.cause(signal, registers),
            None => Err(self.corrupt("why it stopped")),
        }
    }

    fn map(&mut self, mapping: Mapping) {
        let length = (mapping.pages as u64).saturating_mul(PAGE_SIZE as u64);
        let Some(offset) = self.guest.ram.offset(mapping.frame) else { return };
        let fits = mapping.pages != 0
            && mapping.address >= BOTTOM
            && mapping.address < TOP
            && mapping.address.is_multiple_of(PAGE_SIZE as u64)
            && mapping.pages as u64 <= self.guest.ram.frames() - offset / PAGE_SIZE as u64
            && length <= TOP - mapping.address;
        if fits {
            let Protection { write, execute } = mapping.protection;
            let mut protection = libc::PROT_READ;
            protection |= if write { libc::PROT_WRITE } else { 0 };
            protection |= if execute { libc::PROT_EXEC } else { 0 };
            let protection = u64::from(protection.cast_unsigned());
            self.change(Change { address: mapping.address, length, protection, offset });
        }
    }

    fn unmap(&mut self, address: u64, pages: usize) {
        let start = (address - address % PAGE_SIZE as u64).clamp(BOTTOM, TOP);
        let length = (pages as u64).saturating_mul(PAGE_SIZE as u64);
        let end = address.saturating_add(length).clamp(start, TOP);
        if start < end {
            let length = end - start;
            self.change_all(Change { address: start, length, protection: UNMAP, offset: 0 });
        }
    }

    fn unmap_all(&mut self) {
        self.change_all(EVERYTHING);
    }

    fn switch(&mut self, root: Mfn) {
        if self.root.replace(root).is_some_and(|former| former != root) {
            self.change(EVERYTHING);
        }
    }

    fn show_info(&mut self, machine_address: Option<u64>) {
        let page = PAGE_SIZE as u64;
        let frame = machine_address.and_then(|address| self.guest.ram.offset(Mfn(address / page)));
        if let Some(offset) = frame {
            let protection = u64::from((libc::PROT_READ | libc::PROT_WRITE).cast_unsigned());
            self.change(Change { address: INFO, length: page, protection, offset });
        }
        let shown = frame.and(machine_address).map_or(0, |address| INFO + address % page);
        self.seat.mailbox().info.store(shown, Relaxed);
    }

    fn set_deadline(&mut self, nanoseconds: Option<u64>) {
        self.deadline = nanoseconds.unwrap_or(u64::MAX);
    }

    fn kicker(&self) -> Arc<dyn Kicker> {
        Arc::<Seat>::clone(&self.seat)
    }

    fn fpu(&mut self) -> Result<Vec<u8>, EngineError> {
        self.prepare()?;
        let size = std::arch::x86_64::__cpuid_count(0xd, 0).ebx as usize;
        let (offset, room) = if self.fpu_frame == 0 {
            self.drive(COME_BACK | SAVE_FPU)?;
            (FPU, FPU_SIZE)
        } else {
            let base = STUB + (MAILBOX + SIGNAL_STACK) as u64;
            let offset = self.fpu_frame.checked_sub(base);
            let offset =
                offset.and_then(|offset| usize::try_from(offset).ok()).unwrap_or(usize::MAX);
            if offset >= SIGNAL_STACK_SIZE {
                return Err(self.corrupt("the signal frame"));
            }
            (SIGNAL_STACK + offset, SIGNAL_STACK_SIZE - offset)
        };
        let state = self.seat.child.shared().copy(offset, size.min(room));
        state.ok_or_else(|| self.corrupt("the FPU state"))
    }
}

impl Drop for MonitorVcpu {
    fn drop(&mut self) {
        // The thread may have other things to do: another guest, for one.
        self.place.let_go(self.seat.child.pid());
        self.seat.leave();
    }
}

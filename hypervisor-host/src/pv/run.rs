//! The thread of a virtual CPU: from exit to exit.

use std::sync::Arc;
use std::thread;

use janus_proto::abi::xen::Virq;
use janus_proto::abi::xen::VmAssist;
use janus_proto::abi::xen::trap::{ContextFlags, VcpuGuestContext};
use janus_proto::abi::xen::vcpu::{Runstate, XEN_RUNSTATE_UPDATE};
use janus_proto::pvclock;

use super::cpu::{Cpu, Over, RFLAGS_TF};
use super::debug::DEBUG;
use super::domain::{Domain, EndReason, attention};
use super::emulate;
use super::hypercall;
use super::report::Cause;
use super::segments;
use super::space::Resolution;
use super::timers::{self, NEVER, now};
use super::traps::{self, GENERAL_PROTECTION, INVALID_OPCODE, PAGE_FAULT};
use super::vcpu_info::Mode;
use crate::engine::monitor::TOP as LOWER_END;
use crate::engine::{EngineError, Exit, Fault};

/// Says that a thread has left, whatever made it leave.
struct Leaving(Arc<Domain>);

impl Drop for Leaving {
    fn drop(&mut self) {
        if thread::panicking() {
            let error = EngineError::Corrupt("the monitor's own thread failed");
            self.0.end(EndReason::Engine(error), None);
            self.0.leave(|_| ());
        }
    }
}

/// Serves a CPU until its domain ends.
pub(crate) fn serve(mut cpu: Cpu) {
    // The guest's timers are waits of this thread, which the host would else round up by 50 us.
    timers::be_punctual();
    let guard = Leaving(Arc::clone(&cpu.domain));
    let kicker = cpu.engine.kicker();
    cpu.shared().attach(kicker);
    if cpu.index == 0 {
        cpu.shared().set_initialised();
        // As every PV CPU starts.
        cpu.shared().set_masked(true);
        cpu.shared().timers.begin();
        cpu.shared().set_up(true);
        cpu.load();
    }
    let over = go(&mut cpu).err();
    let domain = Arc::clone(&cpu.domain);
    let index = cpu.index;
    let mut fault = None;
    if let Some(Over(reason, its_fault)) = over {
        fault = its_fault;
        domain.end(reason, Some(index));
    }
    let report =
        (domain.wants_report() && cpu.shared().is_initialised()).then(|| cpu.report(fault));
    // The guest's part goes before anybody hears that the domain has ended.
    drop(cpu);
    domain.leave(|all| all.cpus.extend(report));
    drop(guard);
}

fn go(cpu: &mut Cpu) -> Result<(), Over> {
    loop {
        cpu.attend();
        if cpu.domain.is_ending() {
            return Ok(());
        }
        if !cpu.shared().is_up() {
            cpu.wait_until_up();
            continue;
        }
        if !cpu.begun {
            cpu.begin();
        }
        turn(cpu)?;
    }
}

/// Into the guest, and what it comes out for.
fn turn(cpu: &mut Cpu) -> Result<(), Over> {
    // The mode first, then the look: see `vcpu_info`.
    cpu.shared().set_mode(Mode::Guest);
    if cpu.domain.attention_of(cpu.index) != 0 || !cpu.shared().is_up() {
        cpu.shared().set_mode(Mode::Host);
        return Ok(());
    }
    let mut deadline = cpu.deadline();
    if deadline != NEVER {
        let now = now();
        if deadline <= now {
            cpu.fire_timers(now);
            deadline = cpu.deadline();
        }
        if cpu.index == 0 && cpu.domain.watchdog() <= now {
            return Err(Cause::Watchdog.into());
        }
    }
    cpu.keep_time();
    let steps = cpu.domain.steps(cpu.index);
    if !steps && cpu.has_nmi() && cpu.shared().take_nmi() {
        traps::nmi(cpu)?;
    }
    if !steps && cpu.shared().is_deliverable() {
        traps::upcall(cpu)?;
    }
    let deadline = (deadline != NEVER).then_some(deadline);
    if cpu.armed != deadline {
        cpu.engine.set_deadline(deadline);
        cpu.armed = deadline;
    }
    cpu.show_info();
    if steps {
        return step(cpu);
    }
    let exit = cpu.engine.run(&mut cpu.state.registers);
    cpu.shared().set_mode(Mode::Host);
    leave(cpu, exit)
}

/// Does what the guest came out for.
fn leave(cpu: &mut Cpu, exit: Result<Exit, EngineError>) -> Result<(), Over> {
    match exit {
        Ok(Exit::Hypercall | Exit::Syscall) if cpu.state.kernel_mode => hypercall::enter(cpu),
        Ok(Exit::Hypercall | Exit::Syscall) => Ok(traps::user_syscall(cpu)?),
        Ok(Exit::Fault(fault)) => Ok(handle(cpu, fault)?),
        Ok(Exit::Kicked) => Ok(()),
        // Killed because the domain ends: that has its reason already.
        Err(_) if cpu.domain.is_ending() => Ok(()),
        Err(error) => Err(Over(EndReason::Engine(error), None)),
    }
}

/// One instruction, for a debugger: by the trap flag, and over whatever a process cannot do in one (a hypercall by its
/// gate is outside of the guest, and one that is emulated has no trap of its own).
fn step(cpu: &mut Cpu) -> Result<(), Over> {
    let before = cpu.state.registers.rip;
    let is_guests = before < LOWER_END;
    if is_guests {
        cpu.state.registers.rflags |= RFLAGS_TF;
    }
    let exit = cpu.engine.run(&mut cpu.state.registers);
    cpu.shared().set_mode(Mode::Host);
    cpu.state.registers.rflags &= !RFLAGS_TF;
    match exit {
        Ok(Exit::Fault(Fault { vector: DEBUG, .. })) => {
            // Inside the engine's gate: it goes on from there, to the end of the hypercall.
            if cpu.state.registers.rip >= LOWER_END {
                return Ok(());
            }
        }
        exit => {
            leave(cpu, exit)?;
            if cpu.state.registers.rip == before || cpu.domain.is_ending() {
                return Ok(());
            }
        }
    }
    cpu.domain.stepped(cpu.index);
    Ok(())
}

/// An exception: maps, emulates, or tells the guest.
fn handle(cpu: &mut Cpu, fault: Fault) -> Result<(), Cause> {
    match fault.vector {
        PAGE_FAULT => match cpu.domain.space.fault(cpu.index, &mut *cpu.engine, &fault) {
            Resolution::Retry => Ok(()),
            Resolution::Guest(error) => traps::inject(cpu, Fault { error, ..fault }),
            Resolution::Emulate => emulate::access(cpu, fault),
        },
        GENERAL_PROTECTION => emulate::general_protection(cpu, fault),
        INVALID_OPCODE if emulate::forced(cpu) => Ok(()),
        _ if cpu.domain.stop_for_debugger(cpu.index, fault) => Ok(()),
        DEBUG => {
            segments::note_single_step(cpu);
            traps::inject(cpu, fault)
        }
        _ => traps::inject(cpu, fault),
    }
}

impl Cpu {
    /// Loads the kernel's page table, before the first run.
    fn load(&mut self) {
        self.domain.space.load(self.index, &mut *self.engine);
    }

    /// Stands still while the domain is paused.
    pub(crate) fn attend(&mut self) {
        if self.domain.attention_of(self.index) & (attention::PAUSE | attention::HOLD) != 0 {
            let debugged = self.domain.has_debugger();
            let fpu = if debugged { self.engine.fpu().unwrap_or_default() } else { Vec::new() };
            self.domain.stand(self.index, &mut self.state, fpu);
        }
    }

    /// Whether another CPU sent an NMI.
    pub(crate) fn has_nmi(&self) -> bool {
        self.shared().has_nmi()
    }

    /// Tells the engine where the `vcpu_info` is, unless a return to the guest means more than what is in there.
    fn show_info(&mut self) {
        // Nor while it steps: what the engine answers has no end that could be noticed.
        let is_simple =
            !self.domain.assists(VmAssist::ARCHITECTURAL_IOPL) && !self.domain.steps(self.index);
        let info = is_simple.then(|| self.shared().info_address());
        if self.shown_info != info {
            self.engine.show_info(info);
            self.shown_info = info;
        }
    }

    /// When this CPU has to look at its timers.
    pub(crate) fn deadline(&self) -> u64 {
        let own = self.shared().timers.deadline();
        if self.index == 0 { own.min(self.domain.watchdog()).min(self.domain.later()) } else { own }
    }

    /// Sends what is due.
    pub(crate) fn fire_timers(&mut self, now: u64) {
        if self.index == 0 && self.domain.later() <= now {
            self.domain.run_later();
        }
        if self.shared().timers.take_due(now) {
            self.domain.events.raise_virq(Virq::TIMER, self.index);
        }
    }

    /// Keeps the clock fresh.
    fn keep_time(&mut self) {
        if self.domain.clock.is_due() {
            self.domain.clock.update();
            // The others take it over as soon: what they make of the counter must not differ by much.
            let others = self.domain.vcpus.iter().enumerate();
            others.filter(|(index, _)| *index != self.index).for_each(|(_, shared)| shared.wake());
        }
        let changes = self.domain.clock.changes();
        if self.clock_changes != changes {
            self.clock_changes = changes;
            self.write_time();
            self.publish_time();
        }
    }

    /// Writes the clock to this CPU's `vcpu_info`. Nobody else does: the guest stands still meanwhile, however long
    /// this thread is kept from going on.
    fn write_time(&self) {
        if let Some(words) = self.shared().time() {
            pvclock::write(words, &self.domain.clock.info());
        }
    }

    /// Copies the clock to the guest's second place for it.
    pub(crate) fn publish_time(&mut self) {
        let Some(area) = self.runstate.time_area else { return };
        let mut info = self.domain.clock.info();
        // Odd, then the rest, then even: only this thread writes it, while its guest stands still.
        let changes = u32::try_from(self.domain.clock.changes() & 0x3fff_ffff).unwrap_or(0);
        info.version = changes * 2 + 1;
        let _ = self.write(area, &info);
        info.version = info.version.wrapping_add(1);
        let _ = self.write(area, &info.version);
    }

    /// Copies the time accounts to where the guest wants them.
    pub(crate) fn publish_runstate(&mut self) {
        let mut info = self.runstate.info();
        self.shared().set_runstate(info);
        let Some(area) = self.runstate.area else { return };
        if self.domain.assists(VmAssist::RUNSTATE_UPDATE_FLAG) {
            info.state_entry_time |= XEN_RUNSTATE_UPDATE;
            let _ = self.write(area, &info);
            info.state_entry_time &= !XEN_RUNSTATE_UPDATE;
            let _ = self.write(area.wrapping_add(8), &info.state_entry_time);
        } else {
            let _ = self.write(area, &info);
        }
    }

    /// Goes to sleep, for the accounts.
    pub(crate) fn begin_wait(&mut self) {
        self.runstate.change(Runstate::BLOCKED);
        if self.runstate.area.is_some() {
            self.publish_runstate();
        }
    }

    /// Woke up.
    pub(crate) fn end_wait(&mut self) {
        self.runstate.change(Runstate::RUNNING);
        if self.runstate.area.is_some() {
            self.publish_runstate();
        }
    }

    /// Sleeps until the CPU is up, the domain paused, or over.
    fn wait_until_up(&mut self) {
        self.runstate.change(Runstate::OFFLINE);
        let info = self.runstate.info();
        self.shared().set_runstate(info);
        self.shared().set_mode(Mode::Offline);
        while !self.shared().is_up() && self.domain.attention_of(self.index) == 0 {
            thread::park();
        }
        self.shared().set_mode(Mode::Host);
        self.runstate.change(Runstate::RUNNING);
    }

    /// Takes the first state, if another CPU has prepared one: before the first run, however soon this one came up.
    fn begin(&mut self) {
        self.begun = true;
        if let Some(context) = self.shared().take_context() {
            self.adopt(&context);
        }
    }

    /// Takes over the state that another CPU prepared (`arch_set_info_guest`).
    fn adopt(&mut self, context: &VcpuGuestContext) {
        let user = &context.user_regs;
        let kernel = context.flags & ContextFlags::IN_KERNEL.bits() != 0;
        let state = &mut self.state;
        let registers = &mut state.registers;
        (registers.r15, registers.r14, registers.r13, registers.r12) =
            (user.r15, user.r14, user.r13, user.r12);
        (registers.rbp, registers.rbx) = (user.rbp, user.rbx);
        (registers.r11, registers.r10, registers.r9, registers.r8) =
            (user.r11, user.r10, user.r9, user.r8);
        (registers.rax, registers.rcx, registers.rdx) = (user.rax, user.rcx, user.rdx);
        (registers.rsi, registers.rdi) = (user.rsi, user.rdi);
        (registers.rip, registers.rsp) = (user.rip, user.rsp);
        registers.rflags = traps::guest_rflags(user.rflags);
        registers.fs_base = canonical(context.fs_base);
        registers.gs_base = canonical(context.gs_base_kernel);
        state.other_gs_base = canonical(context.gs_base_user);
        state.kernel_stack = context.kernel_sp;
        let low = |selector: u64| u16::try_from(selector & 0xffff).unwrap_or(0);
        state.data = [low(user.ds), low(user.es), low(user.fs), low(user.gs)];
        state.cs = user.cs | 3;
        state.ss = low(user.ss) | 3;
        self.vectors.clear_traps();
        for info in context.trap_ctxt.iter().filter(|info| info.address != 0) {
            if traps::is_canonical(info.address) {
                self.vectors.set_trap(*info);
            }
        }
        let masks = |flag: ContextFlags| context.flags & flag.bits() != 0;
        self.vectors.event = canonical(context.event_callback_eip);
        self.vectors.failsafe = traps::Entry {
            address: canonical(context.failsafe_callback_eip),
            mask: masks(ContextFlags::FAILSAFE_DISABLES_EVENTS),
        };
        self.vectors.syscall = traps::Entry {
            address: canonical(context.syscall_callback_eip),
            mask: masks(ContextFlags::SYSCALL_DISABLES_EVENTS),
        };
        for (index, value) in context.debugreg.iter().enumerate() {
            // A register that may not have this value keeps its own.
            let _ = segments::write_debug(self, index, *value);
        }
        self.shared().timers.begin();
        self.shared().set_masked(true);
        self.write_time();
        self.load();
        if !kernel {
            // Without a user page table it starts in the kernel.
            let _ = self.toggle_mode();
        }
    }
}

/// An address that the CPU accepts in a base or as an entry: others become 0.
fn canonical(address: u64) -> u64 {
    if traps::is_canonical(address) { address } else { 0 }
}

#[cfg(test)]
mod tests;

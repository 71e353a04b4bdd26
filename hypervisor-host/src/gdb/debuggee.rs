//! A domain as gdb's target: each virtual CPU is a thread.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};

use gdbstub::common::{Signal, Tid};
use gdbstub::stub::MultiThreadStopReason;
use gdbstub::target::ext::base::BaseOps;
use gdbstub::target::ext::base::multithread::{
    MultiThreadBase, MultiThreadResume, MultiThreadResumeOps, MultiThreadSchedulerLocking,
    MultiThreadSchedulerLockingOps, MultiThreadSingleStep, MultiThreadSingleStepOps,
};
use gdbstub::target::ext::breakpoints::{
    Breakpoints, BreakpointsOps, SwBreakpoint, SwBreakpointOps,
};
use gdbstub::target::ext::monitor_cmd::{ConsoleOutput, MonitorCmd, MonitorCmdOps};
use gdbstub::target::ext::thread_extra_info::{ThreadExtraInfo, ThreadExtraInfoOps};
use gdbstub::target::{Target, TargetError, TargetResult};
use gdbstub_arch::x86::X86_64_SSE;
use gdbstub_arch::x86::reg::X86_64CoreRegs;

use super::link::Bell;
use super::{commands, registers};
use crate::engine::Fault;
use crate::pv::debug::{BREAKPOINT, Debugger};
use crate::pv::domain::{Domain, EndReason, Ended};
use crate::pv::report::CpuState;
use janus_proto::abi::xen::sched::ShutdownReason;

/// `int3`.
const INT3: u8 = 0xcc;
/// Bytes of a page.
const PAGE: u64 = 4096;

/// What cannot be survived.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Never;

impl fmt::Display for Never {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the debugger asked for a thread that there is not")
    }
}

pub(super) type Stop = MultiThreadStopReason<u64>;

/// A domain under a debugger, which holds one pause of it while it is stopped.
pub(super) struct Debuggee {
    pub(super) domain: Arc<Domain>,
    /// What was there before each breakpoint.
    breakpoints: BTreeMap<u64, u8>,
    stops: Receiver<(usize, Fault)>,
    /// CPUs that are to step, and those that are to go on; all others wait if `locked`.
    steps: u32,
    goes: u32,
    locked: bool,
    pub(super) bell: Arc<Bell>,
    /// Its end was told of, and its last state is looked at.
    pub(super) post_mortem: Option<Arc<Ended>>,
}

pub(super) fn tid(vcpu: usize) -> Tid {
    Tid::new(vcpu + 1).unwrap_or(Tid::MIN)
}

fn vcpu(tid: Tid) -> usize {
    tid.get() - 1
}

fn bit(vcpu: usize) -> u32 {
    u32::try_from(vcpu).ok().and_then(|vcpu| 1_u32.checked_shl(vcpu)).unwrap_or(0)
}

impl Debuggee {
    /// Takes a domain that is paused once, for the debugger.
    pub(super) fn new(domain: Arc<Domain>, bell: Arc<Bell>) -> Self {
        let (sender, stops) = channel();
        let rung = Arc::clone(&bell);
        domain.set_debugger(Some(Debugger(Arc::new(move |vcpu, fault| {
            // Nobody hears of it once the session is over, which lets the domain go on.
            if sender.send((vcpu, fault)).is_ok() {
                rung.ring();
            }
        }))));
        let (steps, goes, locked) = (0, 0, false);
        Self {
            domain,
            breakpoints: BTreeMap::new(),
            stops,
            steps,
            goes,
            locked,
            bell,
            post_mortem: None,
        }
    }

    /// Stops all CPUs, for the debugger's own pause.
    pub(super) fn halt(&self) {
        self.domain.pause();
        self.domain.step(0);
        self.domain.hold(0);
    }

    /// What happened since the domain went on; `None`: nothing of interest.
    pub(super) fn stopped(&mut self) -> Option<Stop> {
        if let Some(ended) = self.domain.ended() {
            return Some(self.ended(ended));
        }
        let (cpu, fault) = self.stops.try_recv().ok()?;
        // All stand still behind this: nobody stops any more.
        self.halt();
        self.domain.unpause();
        let others: Vec<_> = self.stops.try_iter().collect();
        for (other, fault) in others {
            // Behind a breakpoint that it will run into again; a step of it is simply done.
            if fault.vector == BREAKPOINT {
                let _ = self.rewind(other);
            }
            self.domain.unpause();
        }
        Some(match fault.vector {
            BREAKPOINT if self.rewind(cpu) => Stop::SwBreak(tid(cpu)),
            BREAKPOINT => Stop::SignalWithThread { tid: tid(cpu), signal: Signal::SIGTRAP },
            _ => Stop::SignalWithThread { tid: tid(cpu), signal: Signal::SIGTRAP },
        })
    }

    /// The first word of a domain's end: an exit, or a signal where its last state can be looked at.
    fn ended(&mut self, ended: Arc<Ended>) -> Stop {
        if self.post_mortem.is_some() {
            return Stop::Terminated(Signal::SIGABRT);
        }
        match (&ended.reason, &ended.report) {
            (EndReason::Shutdown(ShutdownReason::CRASH) | EndReason::Crashed(_), Some(report))
                if !report.cpus.is_empty() =>
            {
                let first = report.cpus.first().map_or(0, |cpu| cpu.vcpu);
                let cpu = ended.vcpu.unwrap_or(first);
                self.post_mortem = Some(ended);
                Stop::SignalWithThread { tid: tid(cpu), signal: Signal::SIGSEGV }
            }
            (EndReason::Shutdown(reason), _) if *reason != ShutdownReason::CRASH => Stop::Exited(0),
            (EndReason::Shutdown(_) | EndReason::Crashed(_), _) => {
                Stop::Terminated(Signal::SIGABRT)
            }
            (EndReason::Engine(_) | EndReason::Destroyed, _) => Stop::Terminated(Signal::SIGKILL),
        }
    }

    /// Puts the instruction pointer back to a breakpoint of ours; `false`: it is the guest's own.
    fn rewind(&self, cpu: usize) -> bool {
        let at = |state: &mut CpuState| {
            let before = state.registers.rip.wrapping_sub(1);
            let ours = self.breakpoints.contains_key(&before);
            if ours {
                state.registers.rip = before;
            }
            ours
        };
        self.domain.registers(cpu, at).unwrap_or(false)
    }

    /// Takes all breakpoints out and lets the domain go on without a debugger.
    pub(super) fn detach(&mut self) {
        let places: Vec<u64> = self.breakpoints.keys().copied().collect();
        for place in places {
            let _ = self.remove(place);
        }
        self.domain.set_debugger(None);
        self.domain.step(0);
        self.domain.hold(0);
        // Stops that nobody was told of each hold a pause.
        for _ in self.stops.try_iter() {
            self.domain.unpause();
        }
        self.domain.unpause();
    }

    fn remove(&mut self, place: u64) -> bool {
        let Some(byte) = self.breakpoints.remove(&place) else { return false };
        // A page that is gone took its breakpoint with it.
        let _ = self.domain.write_memory(self.any_cpu(), place, &[byte]);
        true
    }

    /// A CPU whose page tables are as good as any.
    fn any_cpu(&self) -> usize {
        (0..self.domain.vcpu_count()).find(|cpu| self.domain.is_up(*cpu)).unwrap_or(0)
    }

    /// The registers of a CPU, as they are or as they were at the end.
    pub(super) fn state(&self, cpu: usize) -> Option<CpuState> {
        if let Some(ended) = &self.post_mortem {
            let cpus = ended.report.iter().flat_map(|report| &report.cpus);
            return cpus.into_iter().find(|report| report.vcpu == cpu).map(|report| report.state);
        }
        self.domain.registers(cpu, |state| *state)
    }
}

impl Target for Debuggee {
    type Arch = X86_64_SSE;
    type Error = Never;

    fn base_ops(&mut self) -> BaseOps<'_, Self::Arch, Self::Error> {
        BaseOps::MultiThread(self)
    }
    fn support_breakpoints(&mut self) -> Option<BreakpointsOps<'_, Self>> {
        Some(self)
    }
    fn support_monitor_cmd(&mut self) -> Option<MonitorCmdOps<'_, Self>> {
        Some(self)
    }
}

impl MultiThreadBase for Debuggee {
    fn read_registers(&mut self, regs: &mut X86_64CoreRegs, tid: Tid) -> TargetResult<(), Self> {
        let state = self.state(vcpu(tid)).ok_or(TargetError::NonFatal)?;
        *regs = registers::from(&state, &self.domain.fpu(vcpu(tid)));
        Ok(())
    }

    fn write_registers(&mut self, regs: &X86_64CoreRegs, tid: Tid) -> TargetResult<(), Self> {
        let written = self.domain.registers(vcpu(tid), |state| registers::into(regs, state));
        written.ok_or(TargetError::NonFatal)
    }

    fn read_addrs(&mut self, start: u64, data: &mut [u8], tid: Tid) -> TargetResult<usize, Self> {
        let mut done = 0;
        while done < data.len() {
            let Some(at) = start.checked_add(done as u64) else { break };
            let left = usize::try_from(PAGE - at % PAGE).unwrap_or(1);
            let end = (done + left).min(data.len());
            let Some(part) = data.get_mut(done..end) else { break };
            if self.domain.read_memory(vcpu(tid), at, part).is_err() {
                break;
            }
            // What the guest has there, not what we put there.
            for (place, byte) in self.breakpoints.range(at..at.saturating_add(part.len() as u64)) {
                let index = usize::try_from(place - at).unwrap_or(usize::MAX);
                if let Some(seen) = part.get_mut(index) {
                    *seen = *byte;
                }
            }
            done = end;
        }
        if done == 0 && !data.is_empty() { Err(TargetError::NonFatal) } else { Ok(done) }
    }

    fn write_addrs(&mut self, start: u64, data: &[u8], tid: Tid) -> TargetResult<(), Self> {
        let mut bytes = data.to_vec();
        let end = start.saturating_add(data.len() as u64);
        for (place, byte) in self.breakpoints.range_mut(start..end) {
            let index = usize::try_from(place - start).unwrap_or(usize::MAX);
            if let Some(new) = bytes.get_mut(index) {
                *byte = std::mem::replace(new, INT3);
            }
        }
        let written = self.domain.write_memory(vcpu(tid), start, &bytes);
        written.map_err(|_| TargetError::NonFatal)
    }

    fn list_active_threads(&mut self, register: &mut dyn FnMut(Tid)) -> Result<(), Never> {
        let mut any = false;
        for cpu in 0..self.domain.vcpu_count() {
            if self.state(cpu).is_some() && (self.domain.is_up(cpu) || self.post_mortem.is_some()) {
                register(tid(cpu));
                any = true;
            }
        }
        if !any {
            // gdb wants one, also of a domain that has ended.
            register(tid(0));
        }
        Ok(())
    }

    fn support_resume(&mut self) -> Option<MultiThreadResumeOps<'_, Self>> {
        Some(self)
    }
    fn support_thread_extra_info(&mut self) -> Option<ThreadExtraInfoOps<'_, Self>> {
        Some(self)
    }
}

impl ThreadExtraInfo for Debuggee {
    fn thread_extra_info(&self, tid: Tid, buf: &mut [u8]) -> Result<usize, Never> {
        let mode = match self.state(vcpu(tid)) {
            Some(state) if state.kernel_mode => "kernel",
            Some(_) => "user",
            None => "down",
        };
        let text = format!("vCPU {}, {mode}", vcpu(tid));
        let length = text.len().min(buf.len());
        if let (Some(to), Some(from)) = (buf.get_mut(..length), text.as_bytes().get(..length)) {
            to.copy_from_slice(from);
        }
        Ok(length)
    }
}

impl MultiThreadResume for Debuggee {
    fn resume(&mut self) -> Result<(), Never> {
        if self.post_mortem.is_some() {
            // There is nothing to go on: the session hears of the end.
            self.bell.ring();
            return Ok(());
        }
        let all = (0..self.domain.vcpu_count()).fold(0, |all, cpu| all | bit(cpu));
        self.domain.step(self.steps);
        self.domain.hold(if self.locked { all & !self.steps & !self.goes } else { 0 });
        self.domain.unpause();
        Ok(())
    }

    fn clear_resume_actions(&mut self) -> Result<(), Never> {
        (self.steps, self.goes, self.locked) = (0, 0, false);
        Ok(())
    }

    fn set_resume_action_continue(&mut self, tid: Tid, _: Option<Signal>) -> Result<(), Never> {
        self.goes |= bit(vcpu(tid));
        Ok(())
    }

    fn support_single_step(&mut self) -> Option<MultiThreadSingleStepOps<'_, Self>> {
        Some(self)
    }
    fn support_scheduler_locking(&mut self) -> Option<MultiThreadSchedulerLockingOps<'_, Self>> {
        Some(self)
    }
}

impl MultiThreadSingleStep for Debuggee {
    fn set_resume_action_step(&mut self, tid: Tid, _: Option<Signal>) -> Result<(), Never> {
        self.steps |= bit(vcpu(tid));
        Ok(())
    }
}

impl MultiThreadSchedulerLocking for Debuggee {
    fn set_resume_action_scheduler_lock(&mut self) -> Result<(), Never> {
        self.locked = true;
        Ok(())
    }
}

impl Breakpoints for Debuggee {
    fn support_sw_breakpoint(&mut self) -> Option<SwBreakpointOps<'_, Self>> {
        Some(self)
    }
}

impl SwBreakpoint for Debuggee {
    fn add_sw_breakpoint(&mut self, place: u64, _: usize) -> TargetResult<bool, Self> {
        if self.breakpoints.contains_key(&place) {
            return Ok(true);
        }
        let (cpu, mut byte) = (self.any_cpu(), [0]);
        if self.domain.read_memory(cpu, place, &mut byte).is_err() {
            return Ok(false);
        }
        // Through the frame itself: the guest's own tables say that text cannot be written.
        let written = self.domain.write_memory(cpu, place, &[INT3]).is_ok();
        if written {
            self.breakpoints.insert(place, byte[0]);
        }
        Ok(written)
    }

    fn remove_sw_breakpoint(&mut self, place: u64, _: usize) -> TargetResult<bool, Self> {
        Ok(self.remove(place))
    }
}

impl MonitorCmd for Debuggee {
    fn handle_monitor_cmd(
        &mut self,
        command: &[u8],
        mut out: ConsoleOutput<'_>,
    ) -> Result<(), Never> {
        let command = String::from_utf8_lossy(command);
        out.write_raw(commands::run(self, &command).as_bytes());
        Ok(())
    }
}

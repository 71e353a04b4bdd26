//! Waiting, ending and timers (`xen/include/public/sched.h`).

use std::time::Duration;

use janus_proto::abi::xen::Errno;
use janus_proto::abi::xen::sched::{Poll, SchedOp, Shutdown, ShutdownReason, Watchdog};
use janus_proto::addr::{DomId, Port};

use super::cpu::{Cpu, Over};
use super::domain::EndReason;
use super::hypercall::{Answer, low32};
use super::report::Deed;
use super::timers::{NEVER, now};
use super::vcpu_info::Mode;

/// Ports that one poll may name.
const MAX_POLL: u32 = 128;
/// Watchdogs of a domain (`NR_DOMAIN_WATCHDOG_TIMERS`).
pub(crate) const WATCHDOGS: usize = 2;
const SECOND: u64 = 1_000_000_000;

pub(crate) fn sched_op(cpu: &mut Cpu, [op, argument, ..]: [u64; 6]) -> Answer {
    let op = low32(op);
    match SchedOp(op) {
        SchedOp::YIELD => {
            std::thread::yield_now();
            Answer::ok(0)
        }
        SchedOp::BLOCK => block(cpu),
        SchedOp::SHUTDOWN => match cpu.read::<Shutdown>(argument) {
            Ok(shutdown) => self::shutdown(cpu, shutdown.reason),
            Err(error) => Answer::err(error),
        },
        SchedOp::SHUTDOWN_CODE => Answer::from(cpu.read::<Shutdown>(argument).and_then(|code| {
            if code.reason.0 > 0xff {
                return Err(Errno::EINVAL);
            }
            cpu.domain.set_shutdown_code(code.reason);
            Ok(0)
        })),
        SchedOp::POLL => poll(cpu, argument),
        SchedOp::WATCHDOG => Answer::from(cpu.read(argument).and_then(|w| watchdog(cpu, w))),
        // Another domain's shutdown is a matter of its toolstack.
        SchedOp(4) => {
            Answer::from(cpu.read::<DomId>(argument).and_then(|domain| {
                Err(if domain == DomId(0) { Errno::EPERM } else { Errno::ESRCH })
            }))
        }
        // Which host CPU it runs on is the host's affair.
        SchedOp(7) => Answer::err(Errno::EPERM),
        _ => Answer::err(Errno::ENOSYS),
    }
}

/// The calls of before 3.1, whose argument is a value.
pub(crate) fn sched_op_compat(cpu: &mut Cpu, [op, argument, ..]: [u64; 6]) -> Answer {
    let op = low32(op);
    match SchedOp(op) {
        SchedOp::YIELD => {
            std::thread::yield_now();
            Answer::ok(0)
        }
        SchedOp::BLOCK => block(cpu),
        SchedOp::SHUTDOWN => {
            let reason = u32::try_from(argument & 0xff).unwrap_or(0);
            shutdown(cpu, ShutdownReason(reason))
        }
        _ => Answer::err(Errno::ENOSYS),
    }
}

fn shutdown(cpu: &Cpu, reason: ShutdownReason) -> Answer {
    let reason = cpu.domain.shutdown_code().unwrap_or(reason);
    Answer::End(Over(EndReason::Shutdown(reason), None))
}

/// Unmasks events and waits for one.
fn block(cpu: &mut Cpu) -> Answer {
    cpu.shared().set_masked(false);
    wait(cpu, Mode::Blocked, NEVER, |cpu| cpu.shared().is_pending());
    Answer::ok(0)
}

fn poll(cpu: &mut Cpu, argument: u64) -> Answer {
    let poll: Poll = match cpu.read(argument) {
        Ok(poll) => poll,
        Err(error) => return Answer::err(error),
    };
    if poll.nr_ports > MAX_POLL {
        return Answer::err(Errno::EINVAL);
    }
    let mut ports = Vec::with_capacity(poll.nr_ports as usize);
    for index in 0..u64::from(poll.nr_ports) {
        match cpu.read::<Port>(poll.ports.wrapping_add(index * 4)) {
            Ok(port) if cpu.domain.events.is_valid(port) => ports.push(port),
            Ok(_) => return Answer::err(Errno::EINVAL),
            Err(error) => return Answer::err(error),
        }
    }
    let timeout = if poll.timeout == 0 { NEVER } else { poll.timeout };
    wait(cpu, Mode::Polling, timeout, |cpu| {
        ports.iter().any(|port| cpu.domain.events.is_pending(*port))
            || cpu.shared().is_deliverable()
    });
    Answer::ok(0)
}

/// Sleeps until `is_over`, a time, or the end of the domain. Timers of this CPU fire meanwhile.
fn wait(cpu: &mut Cpu, mode: Mode, until: u64, is_over: impl Fn(&Cpu) -> bool) {
    cpu.deeds.add(Deed::Blocked);
    if is_over(cpu) {
        return;
    }
    cpu.begin_wait();
    loop {
        // The mode first, then the look: see `vcpu_info`.
        cpu.shared().set_mode(mode);
        cpu.attend();
        if cpu.domain.is_ending() || !cpu.shared().is_up() || cpu.has_nmi() || is_over(cpu) {
            break;
        }
        let deadline = cpu.deadline().min(until);
        if deadline == NEVER {
            std::thread::park();
            continue;
        }
        let now = now();
        if deadline > now {
            std::thread::park_timeout(Duration::from_nanos(deadline - now));
            continue;
        }
        cpu.fire_timers(now);
        if until <= now {
            break;
        }
    }
    cpu.shared().set_mode(Mode::Host);
    cpu.end_wait();
}

/// Arms, changes or destroys one of the domain's watchdogs.
fn watchdog(cpu: &Cpu, argument: Watchdog) -> Result<u64, Errno> {
    let at = now().saturating_add(u64::from(argument.timeout) * SECOND);
    let answer = cpu.domain.set_watchdog(argument.id, argument.timeout, at);
    // The first CPU looks after them.
    cpu.domain.vcpu(0).wake();
    answer
}

pub(crate) fn set_timer_op(cpu: &mut Cpu, [at, ..]: [u64; 6]) -> Answer {
    // As Xen: 0 stops it, and a time that would be long past counts as now.
    cpu.shared().timers.set_singleshot(if at == 0 { NEVER } else { at.min(NEVER - 1) });
    Answer::ok(0)
}

/// `hlt`: waits for an event without unmasking them.
pub(crate) fn halt(cpu: &mut Cpu) {
    wait(cpu, Mode::Blocked, NEVER, |cpu| cpu.shared().is_pending());
}

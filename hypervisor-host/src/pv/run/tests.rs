//! The loop of a vCPU over a scripted engine: exits are dispatched, events delivered.

use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering::SeqCst;

use janus_proto::abi::xen::Hypercall;
use janus_proto::abi::xen::sched::{SchedOp, ShutdownReason};
use janus_proto::addr::{DomId, Port};
use zerocopy::{FromZeros as _, IntoBytes as _};

use super::*;
use crate::engine::{Registers, Vcpu};
use crate::pv::fake::{self, Script, Stretch, call};

const STACK: u64 = 0x8000;
const SCRATCH: u64 = 0x5000;

fn run(domain: &Arc<Domain>, script: Vec<Stretch>) {
    let engines: Vec<Box<dyn Vcpu>> = vec![Script::new(script), Script::new(Vec::new())];
    let registers = Registers { rsp: STACK, rip: 0x1000, ..Registers::default() };
    domain.start(engines, registers).unwrap();
}

fn put(domain: &Domain, address: u64, words: &[u32]) {
    let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    domain.space.write(0, address, &bytes).unwrap();
}

fn shutdown(reason: ShutdownReason) -> Vec<Stretch> {
    vec![call(Hypercall::SCHED_OP, [SchedOp::SHUTDOWN.0.into(), SCRATCH, reason.0.into()])]
}

#[test]
fn a_guest_shuts_down_and_everybody_hears_it() {
    let (domain, _) = fake::domain(2);
    put(&domain, SCRATCH, &[ShutdownReason::POWEROFF.0]);
    run(&domain, shutdown(ShutdownReason::POWEROFF));
    let ended = domain.wait();
    assert!(matches!(ended.reason, EndReason::Shutdown(ShutdownReason::POWEROFF)));
    assert!(ended.vcpu == Some(0) && ended.report.is_none());
    assert_eq!(domain.stats().calls[0].name(), "sched_op");
}

#[test]
fn a_crash_says_what_was_done_last() {
    let (domain, _) = fake::domain(2);
    let fault = Fault { vector: 14, error: 6, address: 0x1234 };
    let unknown = call(Hypercall(63), [1, 2, 3]);
    run(&domain, vec![unknown, Box::new(move |_| Exit::Fault(fault))]);
    let ended = domain.wait();
    assert!(matches!(ended.reason, EndReason::Crashed(Cause::NoHandler(f)) if f == fault));
    let report = ended.report.as_ref().unwrap();
    let cpu = &report.cpus[0];
    assert_eq!((report.cpus.len(), cpu.fault, cpu.state.cr2), (1, Some(fault), 0x1234));
    let done = [
        crate::pv::report::Deed::Hypercall(Hypercall(63), [1, 2], -38),
        crate::pv::report::Deed::Fault(fault, 0x1000),
    ];
    assert_eq!(cpu.deeds, done);
    assert_eq!(cpu.stack.len(), 64);
    assert_eq!(domain.stats().unknown_calls, 1);
}

#[test]
fn a_blocked_guest_is_woken_by_the_host_and_enters_by_its_callback() {
    let (domain, _) = fake::domain(2);
    let sent = Arc::new(AtomicUsize::new(0));
    let counter = sent.clone();
    let count = move || {
        counter.fetch_add(1, SeqCst);
    };
    let port = Arc::new(domain.bind(Arc::new(count)).unwrap());
    assert_eq!(port.guest_port(), Port(1));
    // The entry point, then a send, then a wait; the stretch behind it runs in the upcall.
    let callbacks = call(Hypercall::SET_CALLBACKS, [0x7000, 0, 0]);
    put(&domain, SCRATCH, &[1]);
    let send = call(Hypercall::EVENT_CHANNEL_OP, [4, SCRATCH, 0]);
    let block = call(Hypercall::SCHED_OP, [SchedOp::BLOCK.0.into(), 0, 0]);
    let seen = Arc::new(std::sync::Mutex::new(Registers::default()));
    let copy = seen.clone();
    put(&domain, SCRATCH + 64, &[ShutdownReason::REBOOT.0]);
    let end: Stretch = Box::new(move |registers| {
        *copy.lock().unwrap() = *registers;
        registers.rax = Hypercall::SCHED_OP.0;
        [registers.rdi, registers.rsi] = [SchedOp::SHUTDOWN.0.into(), SCRATCH + 64];
        Exit::Hypercall
    });
    run(&domain, vec![callbacks, send, block, end]);
    while sent.load(SeqCst) == 0 {
        thread::yield_now();
    }
    assert!(port.notify());
    let ended = domain.wait();
    assert!(matches!(ended.reason, EndReason::Shutdown(ShutdownReason::REBOOT)));
    let seen = *seen.lock().unwrap();
    assert_eq!((seen.rip, seen.rsp), (0x7000, STACK - 56));
    let mut frame = [0; 56];
    domain.space.read(0, seen.rsp, &mut frame).unwrap();
    let frame: Vec<_> =
        frame.chunks(8).map(|w| u64::from_le_bytes(w.try_into().unwrap())).collect();
    // rcx, r11, rip, the kernel's selector with a clear mask above it, flags with IF, rsp, ss.
    assert_eq!(frame[2..], [0x1000, 0xe030, 1 << 9, STACK, 0xe02b]);
    assert!(domain.vcpu(0).is_masked());
}

#[test]
fn a_pause_holds_the_guest_and_lets_its_registers_be_changed() {
    let (domain, _) = fake::domain(2);
    put(&domain, SCRATCH, &[ShutdownReason::POWEROFF.0]);
    assert!(domain.registers(0, |_| ()).is_none());
    run(&domain, Vec::new());
    domain.pause();
    let rip = domain.registers(0, |cpu| {
        cpu.registers.rbx = 42;
        cpu.registers.rip
    });
    assert_eq!(rip, Some(0x1000));
    domain.pause();
    domain.unpause();
    assert_eq!(domain.registers(0, |cpu| cpu.registers.rbx), Some(42));
    domain.unpause();
    domain.destroy();
    assert!(matches!(domain.wait().reason, EndReason::Destroyed));
}

#[test]
fn a_paused_domain_can_be_destroyed() {
    let (domain, _) = fake::domain(2);
    run(&domain, Vec::new());
    domain.pause();
    domain.destroy();
    assert!(matches!(domain.wait().reason, EndReason::Destroyed));
}

#[test]
fn timers_reach_a_guest_that_computes() {
    let (domain, _) = fake::domain(2);
    // VIRQ_TIMER of CPU 0, a callback, a one-shot timer that is due at once, events unmasked.
    put(&domain, SCRATCH, &[Virq::TIMER.0, 0, 0]);
    put(&domain, SCRATCH + 64, &[ShutdownReason::POWEROFF.0]);
    let bind = call(Hypercall::EVENT_CHANNEL_OP, [1, SCRATCH, 0]);
    let callbacks = call(Hypercall::SET_CALLBACKS, [0x7000, 0, 0]);
    let arm = call(Hypercall::SET_TIMER_OP, [1, 0, 0]);
    let own = domain.clone();
    let unmask: Stretch = Box::new(move |registers| {
        own.vcpu(0).set_masked(false);
        registers.rax = Hypercall::SCHED_OP.0;
        registers.rdi = SchedOp::YIELD.0.into();
        Exit::Hypercall
    });
    // Entered by the upcall, after however many stretches of computing.
    let end: Stretch = Box::new(|registers| {
        registers.rax = Hypercall::SCHED_OP.0;
        let op = if registers.rip == 0x7000 { SchedOp::SHUTDOWN } else { SchedOp::YIELD };
        [registers.rdi, registers.rsi] = [op.0.into(), SCRATCH + 64];
        Exit::Hypercall
    });
    run(&domain, vec![bind, callbacks, arm, unmask, end]);
    assert!(matches!(domain.wait().reason, EndReason::Shutdown(ShutdownReason::POWEROFF)));
}

#[test]
fn the_guests_own_watchdog_ends_it() {
    let (domain, _) = fake::domain(2);
    run(&domain, Vec::new());
    domain.set_watchdog(0, 1, 1).unwrap();
    domain.vcpu(0).wake();
    assert!(matches!(domain.wait().reason, EndReason::Crashed(Cause::Watchdog)));
}

#[test]
fn a_poll_ends_by_its_port_though_it_is_masked() {
    let (domain, _) = fake::domain(2);
    let port = domain.bind(Arc::new(|| {})).unwrap();
    domain.ram().frame(domain.shared_info()).unwrap()[2560 / 8].store(u64::MAX, SeqCst);
    domain.vcpu(0).set_masked(true);
    put(&domain, SCRATCH, &[0x5040, 0, 1, 0, 0, 0]);
    put(&domain, SCRATCH + 64, &[1]);
    put(&domain, SCRATCH + 128, &[ShutdownReason::POWEROFF.0]);
    let poll = call(Hypercall::SCHED_OP, [SchedOp::POLL.0.into(), SCRATCH, 0]);
    let end = call(Hypercall::SCHED_OP, [SchedOp::SHUTDOWN.0.into(), SCRATCH + 128, 0]);
    run(&domain, vec![poll, end]);
    while domain.vcpu(0).mode() != Mode::Polling {
        thread::yield_now();
    }
    port.notify();
    assert!(matches!(domain.wait().reason, EndReason::Shutdown(ShutdownReason::POWEROFF)));
    assert_eq!(domain.id(), DomId(7));
}

#[test]
fn a_debugger_stops_the_domain_at_a_breakpoint_and_lets_it_go() {
    let (domain, _) = fake::domain(2);
    put(&domain, SCRATCH, &[ShutdownReason::POWEROFF.0]);
    let (sender, stops) = std::sync::mpsc::channel();
    let hears = move |vcpu, fault: Fault| sender.send((vcpu, fault.vector)).unwrap();
    domain.set_debugger(Some(crate::pv::debug::Debugger(Arc::new(hears))));
    let mut script: Vec<Stretch> = vec![Box::new(|registers| {
        registers.rip = 0x2001;
        Exit::Fault(Fault { vector: 3, error: 0, address: 0 })
    })];
    script.extend(shutdown(ShutdownReason::POWEROFF));
    run(&domain, script);
    assert_eq!(stops.recv().unwrap(), (0, 3));
    domain.pause();
    assert_eq!(domain.registers(0, |cpu| cpu.registers.rip), Some(0x2001));
    domain.unpause();
    assert!(domain.ended().is_none());
    domain.unpause();
    assert!(matches!(domain.wait().reason, EndReason::Shutdown(ShutdownReason::POWEROFF)));
}

/// Takes the events of a CPU as its guest would, and begins anew on its stack: the end of every upcall here.
fn take_events(domain: &Domain, vcpu: usize, registers: &mut Registers) {
    let page = domain.ram().frame(domain.shared_info()).unwrap();
    let info = domain.vcpu(vcpu).info().unwrap();
    info[0].fetch_and(!0xff, SeqCst);
    info[1].swap(0, SeqCst);
    // All ports are in the first word; each CPU has its own.
    page[2048 / 8].fetch_and(!(2 << vcpu), SeqCst);
    (registers.rip, registers.rsp) = (0x1000, STACK - 0x800 * vcpu as u64);
}

#[test]
fn cpus_wake_each_other_and_no_event_is_lost() {
    const ROUNDS: usize = 1500;
    let (domain, _) = fake::domain(2);
    // Ports 1 and 2 are for CPUs 0 and 1.
    for vcpu in 0..2_u64 {
        put(&domain, SCRATCH + vcpu * 16, &[vcpu.try_into().unwrap(), 0]);
        put(&domain, SCRATCH + 64 + vcpu * 16, &[u32::try_from(vcpu).unwrap() + 1]);
    }
    put(&domain, SCRATCH + 128, &[ShutdownReason::POWEROFF.0]);
    let bind = |vcpu: u64| call(Hypercall::EVENT_CHANNEL_OP, [7, SCRATCH + vcpu * 16, 0]);
    let send = |vcpu: u64| call(Hypercall::EVENT_CHANNEL_OP, [4, SCRATCH + 64 + vcpu * 16, 0]);
    let callbacks = || call(Hypercall::SET_CALLBACKS, [0x7000, 0, 0]);
    let block = || call(Hypercall::SCHED_OP, [SchedOp::BLOCK.0.into(), 0, 0]);
    // A blocked CPU comes back by its upcall, and then sends.
    let answer = |vcpu: usize| -> Stretch {
        let own = domain.clone();
        Box::new(move |registers| {
            assert_eq!(registers.rip, 0x7000, "CPU {vcpu} came back without an event");
            take_events(&own, vcpu, registers);
            registers.rax = Hypercall::EVENT_CHANNEL_OP.0;
            [registers.rdi, registers.rsi] = [4, SCRATCH + 64 + (1 - vcpu as u64) * 16];
            Exit::Hypercall
        })
    };
    let mut first = vec![callbacks(), bind(0), bind(1), call(Hypercall::VCPU_OP, [0, 1, 0x9000])];
    first.extend([call(Hypercall::VCPU_OP, [1, 1, 0]), send(1)]);
    let mut second = vec![callbacks()];
    for _ in 0..ROUNDS {
        first.extend([block(), answer(0)]);
        second.extend([block(), answer(1)]);
    }
    let end = call(Hypercall::SCHED_OP, [SchedOp::SHUTDOWN.0.into(), SCRATCH + 128, 0]);
    first.push(end);
    // The second CPU's first state: a page table of its own, a stack, nothing else.
    let mut context = VcpuGuestContext::new_zeroed();
    context.flags = ContextFlags::IN_KERNEL.bits();
    context.ctrlreg[3] = fake::frame(1).0 << 12;
    (context.user_regs.rip, context.user_regs.rsp) = (0x1000, STACK - 0x800);
    domain.space.write(0, 0x9000, context.as_bytes()).unwrap();
    let engines: Vec<Box<dyn Vcpu>> = vec![Script::new(first), Script::new(second)];
    domain.start(engines, Registers { rsp: STACK, rip: 0x1000, ..Registers::default() }).unwrap();
    for _ in 0..3000 {
        if domain.ended().is_some() {
            break;
        }
        thread::sleep(std::time::Duration::from_millis(10));
    }
    let lost = domain.ended().is_none();
    domain.destroy();
    let ended = domain.wait();
    assert!(!lost, "an event was lost");
    assert!(matches!(ended.reason, EndReason::Shutdown(ShutdownReason::POWEROFF)), "{ended:?}");
}

#[test]
fn a_cpu_that_computes_with_events_masked_holds_up_nobody() {
    let (domain, _) = fake::domain(2);
    // The second CPU computes for ever, events masked; the first sends to it and to itself, and ends.
    for vcpu in 0..2_u32 {
        put(&domain, SCRATCH + u64::from(vcpu) * 16, &[vcpu, 0]);
        put(&domain, SCRATCH + 64 + u64::from(vcpu) * 16, &[vcpu + 1]);
    }
    put(&domain, SCRATCH + 128, &[ShutdownReason::POWEROFF.0]);
    let mut context = VcpuGuestContext::new_zeroed();
    context.flags = ContextFlags::IN_KERNEL.bits();
    context.ctrlreg[3] = fake::frame(1).0 << 12;
    domain.space.write(0, 0x9000, context.as_bytes()).unwrap();
    let own = domain.clone();
    let computes: Stretch = Box::new(move |registers| {
        while own.vcpu(1).mode() != Mode::Guest {
            thread::yield_now();
        }
        registers.rax = Hypercall::SCHED_OP.0;
        registers.rdi = SchedOp::YIELD.0.into();
        Exit::Hypercall
    });
    let mut first = vec![
        call(Hypercall::SET_CALLBACKS, [0x7000, 0, 0]),
        call(Hypercall::EVENT_CHANNEL_OP, [7, SCRATCH, 0]),
        call(Hypercall::EVENT_CHANNEL_OP, [7, SCRATCH + 16, 0]),
        call(Hypercall::VCPU_OP, [0, 1, 0x9000]),
        call(Hypercall::VCPU_OP, [1, 1, 0]),
        computes,
    ];
    for _ in 0..100 {
        first.push(call(Hypercall::EVENT_CHANNEL_OP, [4, SCRATCH + 80, 0]));
    }
    first.push(call(Hypercall::EVENT_CHANNEL_OP, [4, SCRATCH + 64, 0]));
    first.push(call(Hypercall::SCHED_OP, [SchedOp::BLOCK.0.into(), 0, 0]));
    first.push(call(Hypercall::SCHED_OP, [SchedOp::SHUTDOWN.0.into(), SCRATCH + 128, 0]));
    let engines: Vec<Box<dyn Vcpu>> = vec![Script::new(first), Script::new(Vec::new())];
    domain.start(engines, Registers { rsp: STACK, rip: 0x1000, ..Registers::default() }).unwrap();
    let ended = domain.wait();
    assert!(matches!(ended.reason, EndReason::Shutdown(ShutdownReason::POWEROFF)), "{ended:?}");
    assert!(domain.vcpu(1).is_pending(), "its event waits for it");
}

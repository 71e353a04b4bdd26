//! Event channels between a guest and its devices: binding, masking, delivery, nonsense.

use std::sync::atomic::AtomicUsize;

use super::*;
use crate::machine::ram::FIRST_FRAME;

const OWN: DomId = DomId(7);

fn events(vcpus: usize) -> Events {
    let ram = Arc::new(Ram::new(4).unwrap());
    let vcpus = (0..vcpus).map(|i| VcpuShared::new(ram.clone(), FIRST_FRAME, i)).collect();
    Events::new(OWN, ram, FIRST_FRAME, vcpus)
}

fn pending(events: &Events, vcpu: usize) -> (bool, u64) {
    let vcpu = &events.vcpus[vcpu];
    let selector = vcpu.selector().unwrap().swap(0, Ordering::SeqCst);
    let info = &vcpu.info().unwrap()[0];
    (info.swap(0, Ordering::SeqCst) & 1 == 1, selector)
}

#[test]
fn a_hosts_handler_runs_for_a_send_and_not_after_the_close() {
    let events = events(1);
    let calls = Arc::new(AtomicUsize::new(0));
    let port = events.alloc_unbound(DomId(0)).unwrap();
    assert!(events.send(port).unwrap().is_none());
    let counter = calls.clone();
    let count = move || {
        counter.fetch_add(1, Ordering::SeqCst);
    };
    let generation = events.bind_host(port, Arc::new(count)).unwrap();
    events.send(port).unwrap().unwrap()();
    assert_eq!(calls.load(Ordering::SeqCst), 1);
    events.close(port).unwrap();
    assert_eq!(events.send(port).err(), Some(Errno::EINVAL));
    assert!(!events.notify(port, generation));
    // The number is given out again; the old handle still has no effect.
    assert_eq!(events.alloc_unbound(DomId(0)), Ok(port));
    events.bind_host(port, Arc::new(|| {})).unwrap();
    assert!(!events.notify(port, generation));
    events.unbind_host(port, generation);
    assert_eq!(events.status(port).unwrap().status, ChannelStatus::INTERDOMAIN);
}

#[test]
fn an_event_sets_pending_selector_and_upcall_and_only_once() {
    let events = events(2);
    let port = events.bind_ipi(1).unwrap();
    events.send(port).unwrap();
    assert_eq!((pending(&events, 0), pending(&events, 1)), ((false, 0), (true, 1)));
    events.send(port).unwrap();
    assert_eq!(pending(&events, 1), (false, 0));
    assert!(events.is_pending(port));
}

#[test]
fn a_masked_port_waits_until_it_is_unmasked() {
    let events = events(1);
    let port = events.bind_ipi(0).unwrap();
    events.bits().unwrap().mask(port);
    events.send(port).unwrap();
    assert_eq!(pending(&events, 0), (false, 0));
    events.unmask(port).unwrap();
    assert_eq!(pending(&events, 0), (true, 1));
    events.unmask(port).unwrap();
    assert_eq!(pending(&events, 0), (false, 0));
}

#[test]
fn virtual_interrupts_are_bound_as_xen_binds_them() {
    let events = events(2);
    assert_eq!(events.bind_virq(Virq::TIMER, 2), Err(Errno::ENOENT));
    assert_eq!(events.bind_virq(Virq(24), 0), Err(Errno::EINVAL));
    assert_eq!(events.bind_virq(Virq::CONSOLE, 1), Err(Errno::EINVAL));
    let first = events.bind_virq(Virq::TIMER, 0).unwrap();
    let second = events.bind_virq(Virq::TIMER, 1).unwrap();
    assert_eq!(events.bind_virq(Virq::TIMER, 1), Err(Errno::EEXIST));
    assert_eq!(events.bind_vcpu(second, 0), Err(Errno::EINVAL));
    events.raise_virq(Virq::TIMER, 1);
    assert_eq!((pending(&events, 0).0, pending(&events, 1).0), (false, true));
    assert!(events.is_pending(second) && !events.is_pending(first));
    let ports: Vec<_> = events.ports().into_iter().map(|(port, _)| port).collect();
    assert_eq!(ports, [first, second]);
}

#[test]
fn two_ports_of_one_domain_are_connected_and_come_apart() {
    let events = events(1);
    let near = events.alloc_unbound(DomId::SELF).unwrap();
    let far = events.bind_own(near).unwrap();
    assert_eq!(events.bind_own(near), Err(Errno::EINVAL));
    events.bits().unwrap().clear(near);
    events.send(far).unwrap();
    assert!(events.is_pending(near));
    events.close(far).unwrap();
    assert_eq!(events.status(near).unwrap().status, ChannelStatus::UNBOUND);
    events.reset();
    assert_eq!(events.status(near).unwrap().status, ChannelStatus::CLOSED);
}

#[test]
fn there_are_only_so_many_ports() {
    let events = events(1);
    let ports = (1..MAX_PORTS).map(|_| events.bind_ipi(0).unwrap());
    assert!(ports.map(|port| port.0).eq(1..MAX_PORTS));
    assert_eq!(events.bind_ipi(0), Err(Errno::ENOSPC));
    for port in [0, MAX_PORTS, u32::MAX] {
        assert_eq!(events.close(Port(port)), Err(Errno::EINVAL));
        assert_eq!(events.send(Port(port)).err(), Some(Errno::EINVAL));
        // As in Xen, port 0 is one of the table, though it is never given out.
        let unmasked = if port == 0 { Ok(()) } else { Err(Errno::EINVAL) };
        assert_eq!(events.unmask(Port(port)), unmasked);
        assert_eq!(events.bind_vcpu(Port(port), 0), Err(Errno::EINVAL));
    }
}

#[test]
fn each_cpu_has_fifo_queues_of_its_own_and_a_moved_port_changes_queues() {
    const DEFAULT: usize = PRIORITY_DEFAULT as usize;
    let events = events(2);
    let frame = |index| Mfn(FIRST_FRAME.0 + index);
    {
        let mut table = events.lock();
        for (vcpu, offset) in [(0, 0), (1, 128)] {
            fifo::init_control(&mut table, 2, vcpu, frame(1), offset).unwrap();
        }
        fifo::expand_array(&mut table, &events.ram, &events.vcpus, frame(2)).unwrap();
    }
    // `ready` of a CPU's control block, and the head of its queue of the usual priority; both taken, as by the guest.
    let take = |vcpu: usize| {
        let block = &events.ram.words(frame(1), 1).unwrap()[vcpu * 32..];
        let ready = block[0].swap(0, Ordering::SeqCst);
        (ready, block[2 + DEFAULT].swap(0, Ordering::SeqCst))
    };
    let handled = |port: Port| {
        // Neither pending nor linked any more.
        events.ram.words(frame(2), 1).unwrap()[port.0 as usize].store(0, Ordering::SeqCst);
    };
    let ports = [events.bind_ipi(0).unwrap(), events.bind_ipi(1).unwrap()];
    for (own, other) in [(0, 1), (1, 0)] {
        events.send(ports[own]).unwrap();
        assert!(pending(&events, own).0 && !pending(&events, other).0, "CPU {own}");
        assert_eq!((take(own), take(other)), ((1 << DEFAULT, ports[own].0), (0, 0)));
        handled(ports[own]);
    }
    let moving = events.alloc_unbound(DomId(0)).unwrap();
    let generation = events.bind_host(moving, Arc::new(|| {})).unwrap();
    for vcpu in [0, 1, 0] {
        events.bind_vcpu(moving, vcpu).unwrap();
        assert!(events.notify(moving, generation));
        let (vcpu, other) = (vcpu as usize, 1 - vcpu as usize);
        assert!(pending(&events, vcpu).0 && !pending(&events, other).0, "moved to {vcpu}");
        assert_eq!((take(vcpu), take(other)), ((1 << DEFAULT, moving.0), (0, 0)));
        handled(moving);
    }
}

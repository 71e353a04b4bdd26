//! Event channels, two levels.

use alloc::format;

use janus_kernel::guest_test;
use janus_proto::abi::xen::Hypercall;

use crate::ask::{Page, SELF, ask, call, tell};

/// A port of no use, and one beyond all.
const PORTS: [(&str, u32); 5] =
    [("zero", 0), ("closed", 900), ("last", 4095), ("beyond", 4096), ("most", u32::MAX)];

fn operate(page: Page, key: &str, op: u64, halves: &[u32]) -> i64 {
    page.put_halves(halves);
    ask(format!("event_channel_op.{key}"), Hypercall::EVENT_CHANNEL_OP, &[op, page.address()])
}

fn status(page: Page, key: &str, port: u32) {
    page.put_halves(&[SELF as u32, port]);
    ask(
        format!("event_channel_op.status.{key}"),
        Hypercall::EVENT_CHANNEL_OP,
        &[5, page.address()],
    );
    // status, vcpu
    tell(format!("event_channel_op.status.{key}.is"), format!("{} {}", page.half(2), page.half(3)));
}

guest_test! {
    /// Each operation on ports that are none.
    fn events_of_bad_ports(test) {
        let Some(page) = Page::new(test) else { return };
        for (name, port) in PORTS {
            operate(page, &format!("close.{name}"), 3, &[port]);
            operate(page, &format!("send.{name}"), 4, &[port]);
            operate(page, &format!("bind_vcpu.{name}"), 8, &[port, 0]);
            operate(page, &format!("unmask.{name}"), 9, &[port]);
            operate(page, &format!("set_priority.{name}"), 13, &[port, 7]);
            status(page, name, port);
        }
    }

    /// Binding, and what the ports are then.
    fn events_bound(test) {
        let Some(page) = Page::new(test) else { return };
        let own = SELF as u32;
        // alloc_unbound: dom, remote_dom (16 bits each), port
        for (name, halves) in [
            ("self-for-0", [own, 0]),
            ("self-for-self", [own | own << 16, 0]),
            ("self-for-999", [own | 999 << 16, 0]),
            ("0-for-self", [own << 16, 0]),
            ("999-for-self", [999 | own << 16, 0]),
            ("idle-for-self", [0x7fff | own << 16, 0]),
        ] {
            operate(page, &format!("alloc_unbound.{name}"), 6, &halves);
            let port = page.half(1);
            tell(format!("event_channel_op.alloc_unbound.{name}.port-given"), port != 0);
            if port != 0 {
                status(page, &format!("of-{name}"), port);
                operate(page, &format!("alloc_unbound.{name}.send"), 4, &[port]);
                operate(page, &format!("alloc_unbound.{name}.bind_vcpu"), 8, &[port, 0]);
                operate(page, &format!("alloc_unbound.{name}.bind_vcpu.9"), 8, &[port, 9]);
                operate(page, &format!("alloc_unbound.{name}.unmask"), 9, &[port]);
                operate(page, &format!("alloc_unbound.{name}.set_priority"), 13, &[port, 7]);
                operate(page, &format!("alloc_unbound.{name}.close"), 3, &[port]);
                operate(page, &format!("alloc_unbound.{name}.close-again"), 3, &[port]);
            }
        }
        // bind_interdomain: remote_dom, pad, remote_port, local_port
        for (name, remote, port) in [
            ("self-0", own, 0), ("self-closed", own, 900), ("self-beyond", own, 5000), ("0-0", 0, 0),
            ("0-closed", 0, 900), ("999", 999, 1), ("idle", 0x7fff, 1),
        ] {
            operate(page, &format!("bind_interdomain.{name}"), 0, &[remote, port, 0]);
        }
        page.put_halves(&[own | own << 16, 0]);
        call(Hypercall::EVENT_CHANNEL_OP, &[6, page.address()]);
        let first = page.half(1);
        operate(page, "loop.bind_interdomain", 0, &[own, first, 0]);
        let second = page.half(2);
        status(page, "of-loop-first", first);
        tell("event_channel_op.loop.names-the-other", page.half(5) == second);
        operate(page, "loop.bind-again", 0, &[own, first, 0]);
        operate(page, "loop.send", 4, &[second]);
        operate(page, "loop.close-second", 3, &[second]);
        status(page, "of-loop-first-alone", first);
        operate(page, "loop.send-to-nobody", 4, &[first]);
        operate(page, "loop.close-first", 3, &[first]);
        // bind_virq: virq, vcpu, port
        for (virq, vcpu) in [
            (0, 0), (0, 1), (0, 99), (1, 0), (2, 0), (3, 0), (4, 0), (5, 0), (6, 0), (7, 0), (8, 0), (9, 0), (10, 0),
            (11, 0), (13, 0), (16, 0), (23, 0), (24, 0), (u32::MAX, 0), (2, 1),
        ] {
            operate(page, &format!("bind_virq.{virq}.{vcpu}"), 1, &[virq, vcpu, 0]);
            let port = page.half(2);
            if port != 0 {
                status(page, &format!("of-virq-{virq}-{vcpu}"), port);
                operate(page, &format!("bind_virq.{virq}.{vcpu}.again"), 1, &[virq, vcpu, 0]);
                operate(page, &format!("bind_virq.{virq}.{vcpu}.send"), 4, &[port]);
                operate(page, &format!("bind_virq.{virq}.{vcpu}.bind_vcpu"), 8, &[port, 0]);
                operate(page, &format!("bind_virq.{virq}.{vcpu}.close"), 3, &[port]);
            }
        }
        // bind_ipi: vcpu, port
        for vcpu in [0, 1, 99, u32::MAX] {
            operate(page, &format!("bind_ipi.{vcpu}"), 7, &[vcpu, 0]);
            let port = page.half(1);
            if port != 0 {
                status(page, &format!("of-ipi-{vcpu}"), port);
                operate(page, &format!("bind_ipi.{vcpu}.send"), 4, &[port]);
                operate(page, &format!("bind_ipi.{vcpu}.bind_vcpu"), 8, &[port, 0]);
                operate(page, &format!("bind_ipi.{vcpu}.close"), 3, &[port]);
            }
        }
        for irq in [0, 1, 16, 1 << 20] {
            operate(page, &format!("bind_pirq.{irq}"), 2, &[irq, 0, 0]);
        }
        for (name, dom) in [("0", 0), ("999", 999), ("idle", 0x7fff)] {
            page.put_halves(&[dom, 1]);
            ask(format!("event_channel_op.status.of-domain-{name}"), Hypercall::EVENT_CHANNEL_OP, &[5, page.address()]);
            operate(page, &format!("reset.domain-{name}"), 10, &[dom]);
        }
        operate(page, "expand_array.without-fifo", 12, &[0, 0]);
        // The last of all ports.
        let mut given = 0;
        let last = loop {
            page.put_halves(&[own, 0]);
            match call(Hypercall::EVENT_CHANNEL_OP, &[6, page.address()]) {
                0 if given < 10_000 => given += 1,
                error => break error,
            }
        };
        tell("event_channel_op.alloc_unbound.when-full", last);
        tell("event_channel_op.alloc_unbound.limit-is-about-1000", (950..1024).contains(&given));
    }
}

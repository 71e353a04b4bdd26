//! Scheduling, timers, virtual CPUs, assists, debug registers.

use alloc::format;

use janus_kernel::guest_test;
use janus_proto::abi::xen::Hypercall;

use crate::ask::{NOT_CANONICAL, Page, UNMAPPED, XENS, ask, call, tell};

guest_test! {
    /// What does not end the domain.
    fn sched_ops(test) {
        let Some(page) = Page::new(test) else { return };
        let sched = |key: &str, op: u64, words: &[u64]| {
            page.put(words);
            ask(format!("sched_op.{key}"), Hypercall::SCHED_OP, &[op, page.address()])
        };
        sched("yield", 0, &[]);
        // ports, nr_ports, timeout
        sched("poll.none-and-past", 3, &[0, 0, 1]);
        sched("poll.129", 3, &[page.address(), 129, 1]);
        sched("poll.most", 3, &[page.address(), 0xffff_ffff, 1]);
        sched("poll.list-unmapped", 3, &[UNMAPPED, 1, 1]);
        sched("poll.port-beyond", 3, &[page.address() + 24, 1, 1, 0xffff]);
        sched("poll.port-0", 3, &[page.address() + 24, 1, 1, 0]);
        sched("remote_shutdown.999", 4, &[999]);
        sched("remote_shutdown.0", 4, &[0]);
        sched("remote_shutdown.self", 4, &[crate::ask::SELF | 3 << 32]);
        // id, timeout in seconds
        sched("watchdog.none-0", 6, &[0]);
        let first = sched("watchdog.new", 6, &[30 << 32]);
        let second = sched("watchdog.new-second", 6, &[30 << 32]);
        sched("watchdog.new-third", 6, &[30 << 32]);
        sched("watchdog.kick", 6, &[1 | 30 << 32]);
        sched("watchdog.unknown", 6, &[9 | 30 << 32]);
        sched("watchdog.stop-1", 6, &[first.cast_unsigned()]);
        sched("watchdog.stop-2", 6, &[second.cast_unsigned()]);
        sched("watchdog.stop-again", 6, &[1]);
        sched("pin_override.-1", 7, &[u64::MAX]);
        sched("pin_override.0", 7, &[0]);
        for op in [0, 3, 9] {
            ask(format!("sched_op_compat.{op}"), Hypercall(6), &[op, 0]);
        }
        for (name, at) in [("0", 0), ("past", 1), ("far", i64::MAX.cast_unsigned()), ("negative", 1 << 63)] {
            ask(format!("set_timer_op.{name}"), Hypercall::SET_TIMER_OP, &[at]);
        }
        ask("set_timer_op.off", Hypercall::SET_TIMER_OP, &[0]);
    }

    /// Operations on this CPU, on one that was never started, and on none.
    fn sched_vcpu_ops(test) {
        let (Some(page), Some(other)) = (Page::new(test), Page::new(test)) else { return };
        let vcpu = |key: &str, op: u64, vcpu: u64, words: &[u64]| {
            page.clear();
            page.put(words);
            ask(format!("vcpu_op.{key}.vcpu-{vcpu}"), Hypercall::VCPU_OP, &[op, vcpu, page.address()])
        };
        for id in [0, 1, 99, 0xffff_ffff] {
            vcpu("is_up", 3, id, &[]);
            vcpu("get_runstate", 4, id, &[]);
            vcpu("stop_periodic", 7, id, &[]);
            vcpu("stop_singleshot", 9, id, &[]);
            vcpu("set_periodic.0", 6, id, &[0]);
            vcpu("set_periodic.999999", 6, id, &[999_999]);
            vcpu("set_periodic.1000000000", 6, id, &[1_000_000_000]);
            vcpu("set_periodic.most", 6, id, &[u64::MAX]);
            vcpu("set_singleshot.past", 8, id, &[1, 0]);
            vcpu("set_singleshot.past-in-future", 8, id, &[1, 1]);
            vcpu("set_singleshot.flags", 8, id, &[1 << 60, 0xfe]);
            vcpu("get_physid", 12, id, &[]);
            vcpu("up.not-initialised", 1, id.max(1), &[]);
            vcpu("register_runstate.0", 5, id, &[0]);
            vcpu("register_runstate.unmapped", 5, id, &[UNMAPPED]);
            vcpu("register_runstate.xens", 5, id, &[XENS]);
            vcpu("register_time.0", 13, id, &[0]);
            vcpu("register_time.unmapped", 13, id, &[UNMAPPED]);
            vcpu("initialise.zeroes", 0, id, &[]);
            // mfn, offset
            vcpu("register_info.offset-4", 10, id, &[other.mfn(), 4]);
            vcpu("register_info.offset-4040", 10, id, &[other.mfn(), 4040]);
            vcpu("register_info.not-ours", 10, id, &[1, 0]);
            for op in [14, 15, 16, 255] {
                vcpu(&format!("{op}"), op, id, &[]);
            }
        }
        vcpu("get_runstate", 4, 0, &[]);
        tell("vcpu_op.runstate.is", page.half(0));
        vcpu("down", 2, 1, &[]);
    }

    /// Assists: on, off, unknown.
    fn sched_assists(_test) {
        for kind in (0..8).chain(30..36).chain([63, 64, 0xffff_ffff]) {
            for (name, command) in [("enable", 0), ("disable", 1), ("2", 2)] {
                ask(format!("vm_assist.{kind}.{name}"), Hypercall::VM_ASSIST, &[command, kind]);
            }
        }
    }

    /// Debug registers: what they start as, and what they take.
    fn sched_debug_registers(_test) {
        for index in (0..10).chain([0x7fff_ffff, 0xffff_ffff]) {
            ask(format!("get_debugreg.{index}.first"), Hypercall::GET_DEBUGREG, &[index]);
            for (name, value) in [
                ("0", 0),
                ("an-address", 0x20_0000),
                ("xens", XENS),
                ("not-canonical", NOT_CANONICAL),
                ("high", 0xffff_8900_0000_0000),
                ("ones", 0xffff_ffff),
                ("33-bits", 1 << 32),
                ("io", 0x2_0000),
                ("io-active", 0x2_0002),
                ("detect", 0x2000),
            ] {
                ask(format!("set_debugreg.{index}.{name}"), Hypercall::SET_DEBUGREG, &[index, value]);
                let now = call(Hypercall::GET_DEBUGREG, &[index]);
                tell(format!("set_debugreg.{index}.{name}.then"), format!("{now:#x}"));
            }
            call(Hypercall::SET_DEBUGREG, &[index, 0]);
        }
    }

    /// The small calls.
    fn sched_small_calls(test) {
        let Some(page) = Page::new(test) else { return };
        for which in [0, 1, 4, 0xffff_ffff] {
            for (name, base) in [("0", 0), ("low", 0x1000), ("not-canonical", NOT_CANONICAL), ("xens", XENS)] {
                ask(format!("set_segment_base.{which}.{name}"), Hypercall::SET_SEGMENT_BASE, &[which, base]);
            }
        }
        ask("set_segment_base.2.not-canonical", Hypercall::SET_SEGMENT_BASE, &[2, NOT_CANONICAL]);
        for selector in [0, 3, 0x2b, 0xe02b, 0x1234] {
            ask(format!("set_segment_base.3.{selector}"), Hypercall::SET_SEGMENT_BASE, &[3, selector]);
        }
        for set in [1, 0, 0] {
            ask(format!("fpu_taskswitch.{set}"), Hypercall::FPU_TASKSWITCH, &[set]);
        }
        for iopl in [0, 1, 2, 3, 4, u32::MAX] {
            page.put_halves(&[iopl]);
            ask(format!("physdev_op.set_iopl.{iopl}"), Hypercall::PHYSDEV_OP, &[6, page.address()]);
        }
        page.put_halves(&[0]);
        call(Hypercall::PHYSDEV_OP, &[6, page.address()]);
        for (name, words) in [
            ("none", [0, 0]), ("all", [page.address(), 65536]), ("65537", [page.address(), 65537]),
            ("unmapped", [UNMAPPED, 8]), ("xens", [XENS, 8]), ("not-canonical", [NOT_CANONICAL, 8]),
        ] {
            page.put(&words);
            ask(format!("physdev_op.set_iobitmap.{name}"), Hypercall::PHYSDEV_OP, &[7, page.address()]);
        }
        for op in 0..40 {
            page.clear();
            ask(format!("physdev_op.{op}.zeroes"), Hypercall::PHYSDEV_OP, &[op, page.address()]);
        }
        for (op, count) in [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (0, 0xffff_ffff), (9, 9)] {
            ask(format!("console_io.{op}.{count}"), Hypercall::CONSOLE_IO, &[op, count, page.address()]);
        }
        // type and flags, address
        for kind in [0, 1, 2, 3, 4, 5, 6, 7, 8, 9] {
            page.put(&[kind, NOT_CANONICAL]);
            ask(format!("callback_op.register.{kind}.not-canonical"), Hypercall::CALLBACK_OP, &[0, page.address()]);
            page.put(&[kind]);
            if kind != 4 {
                ask(format!("callback_op.unregister.{kind}"), Hypercall::CALLBACK_OP, &[1, page.address()]);
            }
        }
        page.put(&[4, 0x20_0000]);
        ask("callback_op.register.nmi", Hypercall::CALLBACK_OP, &[0, page.address()]);
        ask("callback_op.register.nmi.again", Hypercall::CALLBACK_OP, &[0, page.address()]);
        ask("nmi_op.register.taken", Hypercall::NMI_OP, &[0, page.address()]);
        ask("callback_op.unregister.nmi", Hypercall::CALLBACK_OP, &[1, page.address()]);
        page.put(&[NOT_CANONICAL, 0]);
        ask("nmi_op.register.not-canonical", Hypercall::NMI_OP, &[0, page.address()]);
        page.put(&[0x20_0000, 0]);
        ask("nmi_op.register", Hypercall::NMI_OP, &[0, page.address()]);
        ask("nmi_op.unregister", Hypercall::NMI_OP, &[1, 0]);
        for entry in [NOT_CANONICAL, 1 << 63] {
            ask(format!("set_callbacks.{entry:#x}"), Hypercall::SET_CALLBACKS, &[entry, 0, 0]);
        }
    }
}

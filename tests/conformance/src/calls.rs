//! Every number, every operation: what is refused, and how.

use alloc::format;

use janus_kernel::guest_test;
use janus_proto::abi::xen::Hypercall;

use crate::ask::{BAD, Page, UNMAPPED, ask};

/// Numbers whose call without arguments does something to the one who asks: entry points, the end, a jump.
const NOT_ASKED: [u64; 4] = [0, 4, 6, 23];

/// Calls that are one operation of many: name, number, operations, and those that are not asked because they would
/// answer by waiting, ending or stopping.
const MANY: [(&str, Hypercall, u64, &[u64]); 10] = [
    ("xen_version", Hypercall::XEN_VERSION, 14, &[]),
    ("event_channel_op", Hypercall::EVENT_CHANNEL_OP, 16, &[]),
    ("memory_op", Hypercall::MEMORY_OP, 32, &[2]),
    ("physdev_op", Hypercall::PHYSDEV_OP, 40, &[]),
    ("callback_op", Hypercall::CALLBACK_OP, 5, &[]),
    ("nmi_op", Hypercall::NMI_OP, 4, &[1]),
    // Yield, block; the fourth takes no pointer.
    ("sched_op", Hypercall::SCHED_OP, 10, &[1]),
    ("hvm_op", Hypercall::HVM_OP, 30, &[]),
    ("xenpmu_op", Hypercall::XENPMU_OP, 8, &[]),
    ("argo_op", Hypercall(39), 8, &[]),
];

guest_test! {
    /// All numbers, with zeroes for arguments.
    fn calls_by_number(_test) {
        for number in (0..64_u64).filter(|number| !NOT_ASKED.contains(number)).chain([64, 100, 127]) {
            ask(format!("number.{number}"), Hypercall(number), &[]);
        }
    }

    /// All operations, with pointers to nowhere.
    fn calls_by_operation(_test) {
        for (name, number, count, not_asked) in MANY {
            for op in (0..count).filter(|op| !not_asked.contains(op)).chain([0x7fff_ffff, 0xffff_ffff]) {
                ask(format!("{name}.{op}.unmapped"), number, &[op, UNMAPPED]);
            }
        }
    }

    /// What takes pointers, with each kind of pointer that is none.
    fn calls_with_bad_pointers(_test) {
        for (what, pointer) in BAD {
            for (name, number, args) in [
                ("set_trap_table", Hypercall::SET_TRAP_TABLE, &[pointer][..]),
                ("mmu_update", Hypercall::MMU_UPDATE, &[pointer, 1, 0, crate::ask::SELF]),
                ("mmuext_op", Hypercall::MMUEXT_OP, &[pointer, 1, 0, crate::ask::SELF]),
                ("set_gdt", Hypercall::SET_GDT, &[pointer, 512]),
                ("multicall", Hypercall::MULTICALL, &[pointer, 1]),
                ("xen_version.extraversion", Hypercall::XEN_VERSION, &[1, pointer]),
                ("xen_version.get_features", Hypercall::XEN_VERSION, &[6, pointer]),
                ("event_channel_op.send", Hypercall::EVENT_CHANNEL_OP, &[4, pointer]),
                ("grant_table_op.map", Hypercall::GRANT_TABLE_OP, &[0, pointer, 1]),
                ("grant_table_op.copy", Hypercall::GRANT_TABLE_OP, &[5, pointer, 1]),
                ("memory_op.exchange", Hypercall::MEMORY_OP, &[11, pointer]),
                ("vcpu_op.get_runstate_info", Hypercall::VCPU_OP, &[4, 0, pointer]),
                ("sched_op.poll", Hypercall::SCHED_OP, &[3, pointer]),
                ("physdev_op.set_iopl", Hypercall::PHYSDEV_OP, &[6, pointer]),
                ("callback_op.register", Hypercall::CALLBACK_OP, &[0, pointer]),
                ("event_channel_op_compat", Hypercall(16), &[pointer]),
                ("physdev_op_compat", Hypercall(19), &[pointer]),
            ] {
                ask(format!("{name}.pointer.{what}"), number, args);
            }
        }
    }

    /// Lists of calls.
    fn calls_in_lists(test) {
        let Some(page) = Page::new(test) else { return };
        let list = |entries: &[[u64; 2]]| {
            page.clear();
            for (index, [op, argument]) in entries.iter().enumerate() {
                let mut words = [0; 512];
                for (to, from) in words.iter_mut().zip((0..512).map(|word| page.word(word))) {
                    *to = from;
                }
                for (to, from) in words.iter_mut().skip(index * 8).zip([*op, 77, *argument]) {
                    *to = from;
                }
                page.put(&words);
            }
        };
        let multicall = |key: &str, count: u64| {
            ask(format!("multicall.{key}"), Hypercall::MULTICALL, &[page.address(), count]);
            for index in 0..4 {
                crate::ask::tell(format!("multicall.{key}.result.{index}"), page.word(index * 8 + 1).cast_signed());
            }
        };
        list(&[[17, 0], [39, 0], [13, 0], [64, 0]]);
        multicall("mixed", 4);
        multicall("none", 0);
        list(&[[17, 0], [13, 0], [29, 0], [17, 7]]);
        multicall("nested", 4);
        list(&[[1 << 32 | 17, 0], [u64::MAX, 0], [1 << 63, 0], [0xffff_ffff, 0]]);
        multicall("large-numbers", 4);
        ask("multicall.count.2-to-the-32", Hypercall::MULTICALL, &[page.address(), 1 << 32]);
        let end = page.address() + 4096 - 64;
        // The next page may be mapped or not: a list of one that ends with its page.
        ask("multicall.at-the-end-of-a-page", Hypercall::MULTICALL, &[end, 1]);
        ask("multicall.not-aligned", Hypercall::MULTICALL, &[page.address() + 1, 0]);
    }
}

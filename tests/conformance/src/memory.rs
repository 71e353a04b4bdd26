//! Memory reservations.

use alloc::format;

use janus_kernel::guest_test;
use janus_proto::abi::xen::Hypercall;

use crate::ask::{Page, SELF, UNMAPPED, ask, call, tell};

guest_test! {
    /// How much there is, and may be.
    fn memory_of_the_domain(test) {
        let Some(page) = Page::new(test) else { return };
        for (name, op) in [("current", 3), ("maximum", 4), ("maximum_gpfn", 14)] {
            for (who, dom) in [("self", SELF), ("0", 0), ("999", 999), ("idle", 0x7fff)] {
                page.put(&[dom]);
                let answer = call(Hypercall::MEMORY_OP, &[op, page.address()]);
                // The number of pages itself depends on what the toolstack adds.
                tell(format!("memory_op.{name}.{who}"), if answer > 0 { 1 } else { answer });
            }
        }
        let answer = call(Hypercall::MEMORY_OP, &[2, 0]);
        tell("memory_op.maximum_ram_page.is-some", answer > 0);
        page.clear();
        ask("memory_op.machphys_mapping", Hypercall::MEMORY_OP, &[12, page.address()]);
        tell("memory_op.machphys_mapping.start", format!("{:#x}", page.word(0)));
        page.put(&[4, page.address() + 64, 0]);
        ask("memory_op.machphys_mfn_list", Hypercall::MEMORY_OP, &[5, page.address()]);
        tell("memory_op.machphys_mfn_list.some", page.word(2) > 0);
        page.put(&[0, page.address() + 64, 0]);
        ask("memory_op.machphys_mfn_list.0", Hypercall::MEMORY_OP, &[5, page.address()]);
        page.put(&[128, page.address() + 64]);
        ask("memory_op.memory_map", Hypercall::MEMORY_OP, &[9, page.address()]);
        ask("memory_op.machine_memory_map", Hypercall::MEMORY_OP, &[10, page.address()]);
        for op in 0..32 {
            page.clear();
            if ![0, 1, 6].contains(&op) {
                let answer = call(Hypercall::MEMORY_OP, &[op, page.address()]);
                tell(format!("memory_op.{op}.zeroes"), if answer > 0 { 1 } else { answer });
            }
        }
    }

    /// Giving and taking single pages.
    fn memory_reservations(test) {
        let (Some(page), Some(list), Some(gone)) = (Page::new(test), Page::new(test), Page::new(test)) else { return };
        let reserve = |key: &str, op: u64, words: [u64; 4]| {
            page.put(&words);
            ask(format!("memory_op.{key}"), Hypercall::MEMORY_OP, &[op, page.address()])
        };
        // extent_start, nr_extents, order and flags, domain
        let at = list.address();
        for (name, op) in [("increase", 0), ("decrease", 1), ("populate", 6)] {
            list.clear();
            reserve(&format!("{name}.none"), op, [at, 0, 0, SELF]);
            reserve(&format!("{name}.order-10"), op, [at, 1, 10, SELF]);
            reserve(&format!("{name}.order-63"), op, [at, 1, 63, SELF]);
            reserve(&format!("{name}.list-unmapped"), op, [UNMAPPED, 1, 0, SELF]);
            reserve(&format!("{name}.domain-0"), op, [at, 1, 0, 0]);
            reserve(&format!("{name}.domain-999"), op, [at, 1, 0, 999]);
            reserve(&format!("{name}.too-many"), op, [at, 1 << 60, 0, SELF]);
        }
        list.put(&[1]);
        reserve("decrease.not-ours", 1, [at, 1, 0, SELF]);
        list.put(&[gone.mfn()]);
        // Still mapped: it is given up when the last mapping goes.
        reserve("decrease.mapped", 1, [at, 1, 0, SELF]);
        reserve("decrease.again", 1, [at, 1, 0, SELF]);
        tell("memory_op.decrease.page-still-reads", gone.word(0));
        ask("memory_op.decrease.unmap", Hypercall::UPDATE_VA_MAPPING, &[gone.address(), 0, 2]);
        list.put(&[gone.pfn(), gone.pfn()]);
        reserve("populate.one", 6, [at, 1, 0, SELF]);
        let new = list.word(0);
        tell("memory_op.populate.gave-a-frame", new != gone.pfn());
        ask("memory_op.populate.map", Hypercall::UPDATE_VA_MAPPING, &[gone.address(), new << 12 | 0x67, 2]);
        list.put(&[0]);
        reserve("increase.beyond-the-maximum", 0, [at, 1, 0, SELF]);
        // add_to_physmap: domid and size, space, index, gpfn
        for space in 0..6 {
            page.put(&[SELF, space, 0, 0]);
            ask(format!("memory_op.add_to_physmap.{space}"), Hypercall::MEMORY_OP, &[7, page.address()]);
        }
        page.put(&[999, 0, 0, 0]);
        ask("memory_op.add_to_physmap.domain-999", Hypercall::MEMORY_OP, &[7, page.address()]);
        page.put(&[SELF, 1]);
        ask("memory_op.remove_from_physmap.not-ours", Hypercall::MEMORY_OP, &[15, page.address()]);
    }

    /// Exchanging pages.
    fn memory_exchange(test) {
        let (Some(page), Some(list)) = (Page::new(test), Page::new(test)) else { return };
        let exchange = |key: &str, give: [u64; 4], take: [u64; 4], done: u64| {
            let [a, b, c, d] = give;
            let [e, f, g, h] = take;
            page.put(&[a, b, c, d, e, f, g, h, done]);
            ask(format!("memory_op.exchange.{key}"), Hypercall::MEMORY_OP, &[11, page.address()]);
            tell(format!("memory_op.exchange.{key}.done"), page.word(8));
        };
        let (from, to) = (list.address(), list.address() + 2048);
        exchange("none", [from, 0, 0, SELF], [to, 0, 0, SELF], 0);
        exchange("unequal", [from, 1, 0, SELF], [to, 2, 0, SELF], 0);
        exchange("other-domains", [from, 1, 0, SELF], [to, 1, 0, 999], 0);
        exchange("domain-999", [from, 1, 0, 999], [to, 1, 0, 999], 0);
        exchange("domain-0", [from, 1, 0, 0], [to, 1, 0, 0], 0);
        exchange("done-before", [from, 1, 0, SELF], [to, 1, 0, SELF], 5);
        exchange("order-64", [from, 1, 64, SELF], [to, 1, 64, SELF], 0);
        exchange("list-unmapped", [UNMAPPED, 1, 0, SELF], [to, 1, 0, SELF], 0);
        list.put(&[1]);
        exchange("not-ours", [from, 1, 0, SELF], [to, 1, 0, SELF], 0);
        list.put(&[list.mfn()]);
        exchange("in-use", [from, 1, 0, SELF], [to, 1, 0, SELF], 0);
    }
}

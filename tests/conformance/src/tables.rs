//! Page tables: what may be one, and what may be in one.

use alloc::format;

use janus_kernel::guest_test;
use janus_kernel::test::Test;
use janus_proto::abi::xen::Hypercall;

use crate::ask::{Page, READ_ONLY, SELF, UNMAPPED, WRITABLE, XENS, ask, call, tell};

/// `MMUEXT_*`.
const PIN: [u64; 4] = [0, 1, 2, 3];
const UNPIN: u64 = 4;

/// The page with the arguments, and two to make tables of.
#[derive(Clone, Copy)]
struct Tables {
    page: Page,
    a: Page,
    b: Page,
}

impl Tables {
    fn new(test: &mut Test) -> Option<Self> {
        Some(Self { page: Page::new(test)?, a: Page::new(test)?, b: Page::new(test)? })
    }

    fn extended(self, key: &str, cmd: u64, arg1: u64, arg2: u64) -> i64 {
        self.page.put(&[cmd, arg1, arg2, 0x5555]);
        let done = self.page.address() + 24;
        let answer = call(Hypercall::MMUEXT_OP, &[self.page.address(), 1, done, SELF]);
        tell(format!("mmuext_op.{key}"), format!("{answer}, done {:#x}", self.page.half(6)));
        answer
    }

    fn update(self, key: &str, ptr: u64, val: u64) -> i64 {
        self.page.put(&[ptr, val, 0x5555]);
        let done = self.page.address() + 16;
        let answer = call(Hypercall::MMU_UPDATE, &[self.page.address(), 1, done, SELF]);
        tell(format!("mmu_update.{key}"), format!("{answer}, done {:#x}", self.page.half(4)));
        answer
    }
}

/// Entries that a table may, or may not, have: name, bits, of a frame of ours.
const ENTRIES: [(&str, u64); 22] = [
    ("not-present", 0),
    ("garbage-not-present", 0xdead_beef_0000_0000),
    ("read-only", READ_ONLY),
    ("writable", WRITABLE),
    ("kernel", 0x61),
    ("kernel-writable", 0x63),
    ("without-accessed", 0x05),
    ("write-through", 0x0d),
    ("uncached", 0x15),
    ("large-or-pat", 0x85),
    ("global", 0x105),
    ("available-9", 0x205),
    ("available-10", 0x405),
    ("available-11", 0x805),
    ("no-execute", 1 << 63 | 0x05),
    ("bit-52", 1 << 52 | 0x05),
    ("bit-53", 1 << 53 | 0x05),
    ("bit-58", 1 << 58 | 0x05),
    ("bit-59", 1 << 59 | 0x05),
    ("bit-62", 1 << 62 | 0x05),
    ("bit-51", 1 << 51 | 0x05),
    ("user-only", 0x04),
];

guest_test! {
    /// The life of a table of each level.
    fn tables_are_pinned(test) {
        let Some(t) = Tables::new(test) else { return };
        for (level, pin) in (1..).zip(PIN) {
            t.a.clear();
            let a = t.a.mfn();
            t.extended(&format!("pin-l{level}.writable"), pin, a, 0);
            tell(format!("mmuext_op.l{level}.remap-read-only"), t.a.remap(READ_ONLY));
            t.extended(&format!("pin-l{level}"), pin, a, 0);
            t.extended(&format!("pin-l{level}.again"), pin, a, 0);
            for (other, pin) in (1..).zip(PIN) {
                if other != level {
                    t.extended(&format!("pin-l{level}.as-l{other}"), pin, a, 0);
                }
            }
            tell(format!("mmuext_op.l{level}.remap-writable"), t.a.remap(WRITABLE));
            t.extended(&format!("l{level}.clear-page"), 16, a, 0);
            t.extended(&format!("l{level}.copy-page-to"), 17, a, t.b.mfn());
            t.extended(&format!("l{level}.copy-page-from"), 17, t.b.mfn(), a);
            t.extended(&format!("unpin-l{level}"), UNPIN, a, 0);
            t.extended(&format!("unpin-l{level}.again"), UNPIN, a, 0);
            tell(format!("mmuext_op.l{level}.remap-writable-then"), t.a.remap(WRITABLE));
        }
        for (name, frame) in [("0", 0), ("1", 1), ("beyond", 1 << 40), ("most", u64::MAX >> 12)] {
            for (level, pin) in (1..).zip(PIN) {
                t.extended(&format!("pin-l{level}.frame-{name}"), pin, frame, 0);
            }
            t.extended(&format!("unpin.frame-{name}"), UNPIN, frame, 0);
            t.extended(&format!("new_baseptr.frame-{name}"), 5, frame, 0);
            if frame != 0 {
                t.extended(&format!("new_user_baseptr.frame-{name}"), 15, frame, 0);
            }
            t.extended(&format!("clear_page.frame-{name}"), 16, frame, 0);
            t.extended(&format!("copy_page.frame-{name}"), 17, frame, t.a.mfn());
            t.extended(&format!("copy_page.from-{name}"), 17, t.a.mfn(), frame);
        }
    }

    /// The other operations, and lists of them.
    fn tables_extended_ops(test) {
        let Some(t) = Tables::new(test) else { return };
        let a = t.a.mfn();
        t.extended("new_baseptr.a-page", 5, a, 0);
        t.extended("new_user_baseptr.a-page", 15, a, 0);
        t.extended("new_user_baseptr.none", 15, 0, 0);
        for (name, cmd) in [("tlb_flush_local", 6), ("tlb_flush_all", 10), ("flush_cache", 12), ("flush_cache_global", 18)] {
            t.extended(name, cmd, 0, 0);
        }
        for (name, cmd) in [("invlpg_local", 7), ("invlpg_all", 11)] {
            for (what, address) in [("ours", t.a.address()), ("0", 0), ("xens", XENS), ("unmapped", UNMAPPED)] {
                t.extended(&format!("{name}.{what}"), cmd, address, 0);
            }
        }
        for (name, cmd) in [("tlb_flush_multi", 8), ("invlpg_multi", 9)] {
            for (what, mask) in [("ours", t.b.address()), ("unmapped", UNMAPPED), ("xens", XENS)] {
                t.extended(&format!("{name}.{what}"), cmd, t.a.address(), mask);
            }
        }
        for (name, address, entries) in [
            ("none", 0, 0), ("a-page", t.a.address(), 512), ("not-aligned", t.a.address() + 8, 1), ("8193", t.a.address(), 8193),
            ("xens", XENS, 1), ("unmapped", UNMAPPED, 1), ("none-again", 0, 0),
        ] {
            t.extended(&format!("set_ldt.{name}"), 13, address, entries);
        }
        for cmd in [14, 19, 20, 21, 255, 0xffff_ffff] {
            t.extended(&format!("{cmd}"), cmd, a, 0);
        }
        let extended = |key: &str, count: u64, done: u64, dom: u64| {
            t.page.put(&[6, 0, 0, 99, 0, 0, 6, 0, 0]);
            ask(format!("mmuext_op.list.{key}"), Hypercall::MMUEXT_OP, &[t.page.address(), count, done, dom]);
        };
        extended("none", 0, 0, SELF);
        extended("stops-at-the-bad-one", 3, t.page.address() + 80, SELF);
        tell("mmuext_op.list.stops-at-the-bad-one.done", t.page.half(20));
        extended("done-unmapped", 1, UNMAPPED, SELF);
        extended("domain-0", 1, 0, 0);
        extended("domain-999", 1, 0, 999);
        extended("domain-io", 1, 0, 0x7ff1);
        extended("domain-xen", 1, 0, 0x7ff2);
        extended("foreign-self", 1, 0, SELF | SELF << 16);
        for (key, count, dom) in [
            ("none", 0, SELF), ("domain-0", 1, 0), ("domain-999", 1, 999), ("domain-io", 1, 0x7ff1),
            ("domain-xen", 1, 0x7ff2), ("page-tables-of-999", 1, SELF | 1000 << 16), ("page-tables-of-0", 1, SELF | 1 << 16),
        ] {
            t.page.put(&[0, 0]);
            ask(format!("mmu_update.list.{key}"), Hypercall::MMU_UPDATE, &[t.page.address(), count, 0, dom]);
        }
    }

    /// Entries of the last level, by both calls, and what Xen makes of them.
    fn tables_entries_of_pages(test) {
        let Some(t) = Tables::new(test) else { return };
        t.a.remap(READ_ONLY);
        let (a, b) = (t.a.mfn(), t.b.mfn());
        t.extended("entries.pin", 0, a, 0);
        for (name, bits) in ENTRIES {
            t.update(&format!("l1.{name}"), a << 12, b << 12 | bits);
            let now = t.a.word(0);
            tell(format!("mmu_update.l1.{name}.is"), format!("{:#x}{}", now & !0x000f_ffff_ffff_f000,
                if now & 0x000f_ffff_ffff_f000 == b << 12 { "" } else { " elsewhere" }));
        }
        for (name, frame) in [("0", 0), ("1", 1), ("beyond", 1 << 39), ("itself", a)] {
            t.update(&format!("l1.frame-{name}"), (a << 12) + 8, frame << 12 | READ_ONLY);
            t.update(&format!("l1.frame-{name}.writable"), (a << 12) + 8, frame << 12 | WRITABLE);
        }
        for (name, ptr) in [("not-a-table", b << 12), ("frame-0", 0), ("frame-1", 1 << 12), ("beyond", 1 << 51)] {
            t.update(&format!("ptr.{name}"), ptr, 0);
        }
        for command in 0..8 {
            t.update(&format!("command.{command}"), a << 12 | command, 0);
        }
        t.update("preserve.set", a << 12, b << 12 | 0x67);
        t.update("preserve.without-ad", a << 12 | 2, b << 12 | 0x07);
        tell("mmu_update.preserve.is", format!("{:#x}", t.a.word(0) & 0xfff));
        t.update("normal.without-ad", a << 12, b << 12 | 0x07);
        tell("mmu_update.normal.is", format!("{:#x}", t.a.word(0) & 0xfff));
        t.update("machphys.ours", b << 12 | 1, t.b.pfn());
        t.update("machphys.not-ours", 1 << 12 | 1, 5);
        t.extended("entries.unpin", 4, a, 0);
        // The other call, on a page's own address.
        for (name, bits) in ENTRIES {
            ask(format!("update_va_mapping.{name}"), Hypercall::UPDATE_VA_MAPPING, &[t.b.address(), b << 12 | bits, 2]);
        }
        for (name, frame) in [("0", 0), ("1", 1), ("beyond", 1 << 39), ("a-table-of-xen", XENS >> 12 & 0xff_ffff)] {
            ask(format!("update_va_mapping.frame-{name}"), Hypercall::UPDATE_VA_MAPPING, &[t.b.address(), frame << 12 | READ_ONLY, 2]);
        }
        for flags in [0, 1, 2, 3, 4, 5, 6, 7] {
            ask(format!("update_va_mapping.flags-{flags}"), Hypercall::UPDATE_VA_MAPPING, &[t.b.address(), b << 12 | WRITABLE, flags]);
        }
        for (name, address) in [("unmapped", UNMAPPED), ("xens", XENS), ("0", 0)] {
            ask(format!("update_va_mapping.address-{name}"), Hypercall::UPDATE_VA_MAPPING, &[address, 0, 2]);
        }
        for (name, dom) in [("self", SELF), ("0", 0), ("999", 999), ("io", 0x7ff1), ("idle", 0x7fff)] {
            ask(format!("update_va_mapping_otherdomain.{name}"), Hypercall::UPDATE_VA_MAPPING_OTHERDOMAIN, &[t.b.address(), b << 12 | WRITABLE, 2, dom]);
        }
    }

    /// Tables of tables: entries of the levels above.
    fn tables_entries_of_tables(test) {
        let Some(t) = Tables::new(test) else { return };
        let (a, b) = (t.a.mfn(), t.b.mfn());
        t.b.remap(READ_ONLY);
        t.a.remap(READ_ONLY);
        for (level, (pin, below)) in (2..).zip([(1, 0), (2, 1), (3, 2)]) {
            t.extended(&format!("l{level}.below.pin"), below, b, 0);
            t.extended(&format!("l{level}.pin"), pin, a, 0);
            for (name, bits) in ENTRIES {
                t.update(&format!("l{level}.{name}"), a << 12, b << 12 | bits);
                let now = t.a.word(0);
                tell(format!("mmu_update.l{level}.{name}.is"), format!("{:#x}", now & !0x000f_ffff_ffff_f000));
            }
            t.update(&format!("l{level}.itself-read-only"), (a << 12) + 16, a << 12 | READ_ONLY);
            t.update(&format!("l{level}.itself-writable"), (a << 12) + 24, a << 12 | WRITABLE);
            t.update(&format!("l{level}.a-page"), (a << 12) + 32, t.page.mfn() << 12 | READ_ONLY);
            t.update(&format!("l{level}.unpin-below-in-use"), (a << 12) + 40, b << 12 | WRITABLE);
            t.extended(&format!("l{level}.below.unpin"), UNPIN, b, 0);
            tell(format!("mmuext_op.l{level}.below.remap-writable-in-use"), t.b.remap(WRITABLE));
            if level == 4 {
                for slot in [255, 256, 257, 258, 271, 272, 511] {
                    t.update(&format!("l4.slot-{slot}"), (a << 12) + slot * 8, b << 12 | WRITABLE);
                }
            }
            t.extended(&format!("l{level}.unpin"), UNPIN, a, 0);
            tell(format!("mmuext_op.l{level}.remap-writable"), t.a.remap(WRITABLE));
            tell(format!("mmuext_op.l{level}.below.remap-writable"), t.b.remap(WRITABLE));
            t.a.clear();
            t.b.clear();
            t.a.remap(READ_ONLY);
            t.b.remap(READ_ONLY);
        }
    }

    /// Tables that are checked when they become one.
    fn tables_are_checked_when_pinned(test) {
        let Some(t) = Tables::new(test) else { return };
        let (a, b) = (t.a.mfn(), t.b.mfn());
        let cases: [(&str, u64, u64); 12] = [
            ("a-page", 0, b << 12 | WRITABLE),
            ("itself", 0, a << 12 | READ_ONLY),
            ("itself-writable", 0, a << 12 | WRITABLE),
            ("not-ours", 0, 1 << 12 | READ_ONLY),
            ("uncached", 0, b << 12 | 0x15),
            ("l2-of-a-page", 1, b << 12 | READ_ONLY),
            ("l2-of-itself", 1, a << 12 | READ_ONLY),
            ("l2-large", 1, b << 12 | 0xe5),
            ("l3-of-itself", 2, a << 12 | READ_ONLY),
            ("l3-large", 2, b << 12 | 0xe5),
            ("l4-of-itself", 3, a << 12 | READ_ONLY),
            ("l4-of-itself-writable", 3, a << 12 | WRITABLE),
        ];
        for (name, level, entry) in cases {
            t.a.remap(WRITABLE);
            t.a.clear();
            t.a.put(&[entry]);
            t.a.remap(READ_ONLY);
            if t.extended(&format!("pin-with.{name}"), level, a, 0) == 0 {
                t.extended(&format!("unpin-with.{name}"), UNPIN, a, 0);
            }
        }
    }
}

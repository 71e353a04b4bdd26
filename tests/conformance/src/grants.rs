//! Grant tables: of both versions, on this domain itself.

use alloc::format;
use core::time::Duration;

use janus_kernel::test::Test;
use janus_kernel::xen::store::store;
use janus_kernel::{guest_test, task, time};
use janus_proto::abi::xen::Hypercall;

use crate::ask::{Page, SELF, UNMAPPED, ask, call, tell};

fn operate(page: Page, key: &str, op: u64, words: &[u64]) -> i64 {
    page.put(words);
    ask(format!("grant_table_op.{key}"), Hypercall::GRANT_TABLE_OP, &[op, page.address(), 1])
}

/// The number of this domain, from xenstore.
fn domain_id(test: &mut Test) -> Option<u64> {
    let read = task::block_on(time::timeout(Duration::from_secs(5), async {
        store()?.read("domid").await.ok()
    }));
    let text = read.ok().flatten();
    let id = text.as_deref().and_then(|text| core::str::from_utf8(text).ok()?.trim().parse().ok());
    if id.is_none() {
        test.error("xenstore does not say which domain this is");
    }
    id
}

/// Writes entry `index` of the first frame of the table, version 1, as it is mapped at `table`.
fn entry(table: Page, index: usize, flags: u64, domain: u64, frame: u64) {
    let mut words = [0; 512];
    for (to, from) in words.iter_mut().zip((0..512).map(|word| table.word(word))) {
        *to = from;
    }
    if let Some(word) = words.get_mut(index) {
        *word = flags | domain << 16 | frame << 32;
    }
    table.put(&words);
}

/// Maps the first frame of the grant table in the place of `window`.
fn map_table(page: Page, window: Page) -> bool {
    page.clear();
    page.put(&[SELF | 1 << 32, 0, page.address() + 64]);
    let done = call(Hypercall::GRANT_TABLE_OP, &[2, page.address(), 1]);
    let frame = page.word(8);
    done == 0 && call(Hypercall::UPDATE_VA_MAPPING, &[window.address(), frame << 12 | 0x67, 2]) == 0
}

guest_test! {
    /// The table itself.
    fn grants_table(test) {
        let Some(page) = Page::new(test) else { return };
        for op in 0..15 {
            for (name, count) in [("0", 0), ("1", 1), ("2", 2), ("2-to-the-31", 1 << 31), ("2-to-the-32", 1 << 32)] {
                ask(format!("grant_table_op.{op}.unmapped.{name}"), Hypercall::GRANT_TABLE_OP, &[op, UNMAPPED, count]);
            }
        }
        // dom, nr_frames, status, list
        let list = page.address() + 64;
        for (name, dom, frames) in [
            ("self-1", SELF, 1), ("self-0", SELF, 0), ("self-64", SELF, 64), ("self-65", SELF, 65),
            ("self-most", SELF, 0xffff_ffff), ("0", 0, 1), ("999", 999, 1), ("idle", 0x7fff, 1),
        ] {
            if name == "self-64" {
                // As many as the table can have: how many that is differs by the toolstack.
                continue;
            }
            page.clear();
            operate(page, &format!("setup_table.{name}"), 2, &[dom | frames << 32, 0, list]);
            tell(format!("grant_table_op.setup_table.{name}.status"), page.half(2).cast_signed() as i16);
        }
        for (name, dom) in [("self", SELF), ("0", 0), ("999", 999)] {
            // query_size: dom, nr_frames, max_nr_frames, status
            page.clear();
            operate(page, &format!("query_size.{name}"), 6, &[dom]);
            tell(format!("grant_table_op.query_size.{name}.status"), page.half(3).cast_signed() as i16);
            tell(format!("grant_table_op.query_size.{name}.frames"), page.half(1));
            page.clear();
            operate(page, &format!("get_version.{name}"), 10, &[dom]);
            tell(format!("grant_table_op.get_version.{name}.is"), page.half(1));
            page.clear();
            operate(page, &format!("get_status_frames.{name}.v1"), 9, &[1 | dom << 32, list]);
            tell(format!("grant_table_op.get_status_frames.{name}.v1.status"), (page.half(1) >> 16) as i16);
        }
        // swap_grant_ref: a, b, status
        for (name, a, b) in [("same", 20, 20), ("two", 20, 21), ("beyond", 20, 1 << 20), ("reserved", 1, 20)] {
            page.clear();
            if name != "reserved" {
                operate(page, &format!("swap.{name}"), 11, &[a | b << 32]);
                tell(format!("grant_table_op.swap.{name}.status"), page.half(2).cast_signed() as i16);
            }
        }
        // cache_flush: address, offset and length and operation
        for (name, words) in [
            ("none", [0, 0]),
            ("bad-op", [0, 8 << 32]),
            ("too-long", [0, 4096 << 16 | 1 << 32 | 1]),
            ("not-ours", [0x1000, 16 << 16 | 1 << 32]),
            ("ours", [page.mfn() << 12, 16 << 16 | 1 << 32]),
        ] {
            operate(page, &format!("cache_flush.{name}"), 12, &words);
        }
        operate(page, "transfer.zeroes", 4, &[0; 4]);
        tell("grant_table_op.transfer.zeroes.status", page.half(4).cast_signed() as i16);
    }

    /// Mapping and copying one's own pages.
    fn grants_to_oneself(test) {
        let (Some(page), Some(table), Some(target), Some(window)) =
            (Page::new(test), Page::new(test), Page::new(test), Page::new(test)) else { return };
        let Some(own) = domain_id(test) else { return };
        if !map_table(page, table) {
            test.error("the grant table cannot be mapped");
            return;
        }
        target.put(&[0x1234_5678]);
        // host_addr, flags and ref, dom and status, handle, dev_bus_addr
        let map = |key: &str, address: u64, flags: u64, reference: u64, domain: u64| {
            page.clear();
            operate(page, &format!("map.{key}"), 0, &[address, flags | reference << 32, domain, 0]);
            let status = (page.half(4) >> 16) as i16;
            tell(format!("grant_table_op.map.{key}.status"), status);
            // handle
            (status == 0).then(|| page.half(5))
        };
        let unmap = |key: &str, address: u64, handle: u32, bus: u64| {
            page.clear();
            operate(page, &format!("unmap.{key}"), 1, &[address, bus, handle.into()]);
            tell(format!("grant_table_op.unmap.{key}.status"), (page.half(5) & 0xffff) as i16);
        };
        let at = window.address();
        // GNTMAP_host_map 2, device_map 1, readonly 4, application_map 8, contains_pte 16
        entry(table, 400, 1, own, target.mfn());
        for (name, address, flags, reference, domain) in [
            ("no-flags", at, 0, 400, own),
            ("readonly-only", at, 4, 400, own),
            ("reference-beyond", at, 2, 1 << 20, own),
            ("reference-unused", at, 2, 401, own),
            ("domain-999", at, 2, 400, 999),
            ("domain-0", at, 2, 400, 0),
            ("address-unmapped", UNMAPPED, 2, 400, own),
            ("address-not-aligned", at + 8, 2, 400, own),
            ("address-xens", crate::ask::XENS, 2, 400, own),
        ] {
            if let Some(handle) = map(name, address, flags, reference, domain) {
                unmap(name, address, handle, 0);
            }
        }
        if let Some(handle) = map("good", at, 2, 400, own) {
            tell("grant_table_op.map.good.reads", format!("{:#x}", window.word(0)));
            tell("grant_table_op.map.good.entry", table.word(400) & 0xffff);
            unmap("elsewhere", at + 4096, handle, 0);
            unmap("bad-handle", at, 0x7fff_fff0, 0);
            unmap("good", at, handle, 0);
            unmap("again", at, handle, 0);
            tell("grant_table_op.unmap.good.entry", table.word(400) & 0xffff);
        }
        window.remap(0x67);
        entry(table, 402, 1 | 4, own, target.mfn());
        if let Some(handle) = map("readonly-granted.writable", at, 2, 402, own) {
            unmap("readonly-granted.writable", at, handle, 0);
        }
        if let Some(handle) = map("readonly-granted.readonly", at, 2 | 4, 402, own) {
            unmap("readonly-granted.readonly", at, handle, 0);
        }
        window.remap(0x67);
        entry(table, 403, 1, 999, target.mfn());
        map("granted-to-another", at, 2, 403, own);
        entry(table, 404, 1, own, 1);
        map("frame-not-ours", at, 2, 404, own);
        entry(table, 405, 2, own, target.mfn());
        map("a-transfer", at, 2, 405, own);
        if let Some(handle) = map("device_map", 0, 1, 400, own) {
            unmap("device_map.bad-bus", 0, handle, 0x1000);
            unmap("device_map", 0, handle, target.mfn() << 12);
        }
        // copy: source (ref or frame, domid, offset), dest, len, flags, status
        let copy = |key: &str, source: [u64; 3], dest: [u64; 3], len: u64, flags: u64| {
            page.clear();
            operate(page, &format!("copy.{key}"), 5, &[
                source[0], source[1] | source[2] << 16, dest[0], dest[1] | dest[2] << 16, len | flags << 16,
            ]);
            tell(format!("grant_table_op.copy.{key}.status"), (page.half(9) & 0xffff) as i16);
        };
        let (frame, other) = (target.mfn(), window.mfn());
        copy("frames", [frame, SELF, 0], [other, SELF, 8], 8, 0);
        tell("grant_table_op.copy.frames.wrote", format!("{:#x}", window.word(1)));
        copy("from-reference", [400, own, 0], [other, SELF, 16], 8, 1);
        copy("to-reference", [frame, SELF, 0], [400, own, 8], 8, 2);
        copy("to-readonly-reference", [frame, SELF, 0], [402, own, 8], 8, 2);
        copy("none", [frame, SELF, 0], [other, SELF, 0], 0, 0);
        copy("whole", [frame, SELF, 0], [other, SELF, 0], 4096, 0);
        copy("too-long", [frame, SELF, 0], [other, SELF, 0], 4097, 0);
        copy("beyond-source", [frame, SELF, 4090], [other, SELF, 0], 8, 0);
        copy("beyond-dest", [frame, SELF, 0], [other, SELF, 4090], 8, 0);
        copy("frame-not-ours", [1, SELF, 0], [other, SELF, 0], 8, 0);
        copy("frame-of-999", [frame, 999, 0], [other, SELF, 0], 8, 0);
        copy("frame-of-0", [frame, 0, 0], [other, SELF, 0], 8, 0);
        copy("reference-beyond", [1 << 20, own, 0], [other, SELF, 0], 8, 1);
        copy("reference-unused", [401, own, 0], [other, SELF, 0], 8, 1);
        copy("flags", [frame, SELF, 0], [other, SELF, 0], 8, 0x80);
    }

    /// The change to version 2 and back.
    fn grants_of_version_2(test) {
        let (Some(page), Some(window)) = (Page::new(test), Page::new(test)) else { return };
        let set = |key: &str, version: u64| {
            operate(page, &format!("set_version.{key}"), 8, &[version]);
            tell(format!("grant_table_op.set_version.{key}.is"), page.half(0));
        };
        set("0", 0);
        set("3", 3);
        set("1", 1);
        set("2", 2);
        set("2-again", 2);
        // nr_frames, dom and status, list
        let list = page.address() + 64;
        for (name, frames) in [("1", 1), ("0", 0), ("99", 99)] {
            page.clear();
            operate(page, &format!("get_status_frames.v2.{name}"), 9, &[frames | SELF << 32, list]);
            tell(format!("grant_table_op.get_status_frames.v2.{name}.status"), (page.half(1) >> 16) as i16);
        }
        page.clear();
        operate(page, "get_status_frames.v2.map", 9, &[1 | SELF << 32, list]);
        let status = page.word(8);
        let map = |bits: u64| call(Hypercall::UPDATE_VA_MAPPING, &[window.address(), bits, 2]);
        tell("grant_table_op.status_frame.map-read-only", map(status << 12 | 0x65));
        set("1-with-status-mapped", 1);
        tell("grant_table_op.status_frame.unmap", map(0));
        set("1-after", 1);
        window.remap(0x67);
    }
}

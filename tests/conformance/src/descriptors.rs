//! Descriptor tables.

use alloc::format;

use janus_kernel::guest_test;
use janus_proto::abi::xen::Hypercall;

use crate::ask::{Page, READ_ONLY, UNMAPPED, WRITABLE, ask, tell};

/// Descriptors: name and value.
const DESCRIPTORS: [(&str, u64); 16] = [
    ("zero", 0),
    ("not-present", 0x00af_1a00_0000_ffff),
    ("code-64", 0x00af_fa00_0000_ffff),
    ("code-64-level-0", 0x00af_9a00_0000_ffff),
    ("code-32", 0x00cf_fa00_0000_ffff),
    ("code-32-64", 0x00ef_fa00_0000_ffff),
    ("data", 0x00cf_f200_0000_ffff),
    ("data-level-1", 0x00cf_b200_0000_ffff),
    ("conforming", 0x00af_fe00_0000_ffff),
    ("tss", 0x0000_e900_0000_0067),
    ("ldt", 0x0000_e200_0000_0fff),
    ("call-gate", 0x0000_ec00_0033_1000),
    ("call-gate-to-xen", 0x0000_ec00_e008_1000),
    ("interrupt-gate", 0x0000_ee00_0033_1000),
    ("task-gate", 0x0000_e500_0033_1000),
    ("task-gate-level-0", 0x0000_8500_0033_1000),
];

guest_test! {
    /// Single descriptors, and whole tables.
    fn descriptors_are_checked(test) {
        let (Some(page), Some(table)) = (Page::new(test), Page::new(test)) else { return };
        let address = table.mfn() << 12;
        for (name, descriptor) in DESCRIPTORS {
            table.clear();
            ask(format!("update_descriptor.{name}"), Hypercall::UPDATE_DESCRIPTOR, &[address, descriptor]);
            tell(format!("update_descriptor.{name}.is"), format!("{:#018x}", table.word(0)));
        }
        for (name, at) in [("not-aligned", address + 4), ("frame-0", 0), ("frame-1", 0x1000), ("beyond", 1 << 51)] {
            ask(format!("update_descriptor.at-{name}"), Hypercall::UPDATE_DESCRIPTOR, &[at, 0]);
        }
        table.clear();
        let gdt = |key: &str, frames: &[u64], entries: u64| {
            page.put(frames);
            ask(format!("set_gdt.{key}"), Hypercall::SET_GDT, &[page.address(), entries])
        };
        gdt("writable", &[table.mfn()], 512);
        tell("set_gdt.remap", table.remap(READ_ONLY));
        for (name, entries) in [("0", 0), ("1", 1), ("512", 512), ("7169", 7169), ("2-to-the-32", 1 << 32)] {
            gdt(name, &[table.mfn()], entries);
        }
        gdt("two-frames-of-one", &[table.mfn(), table.mfn()], 1024);
        gdt("not-ours", &[1], 512);
        gdt("second-not-ours", &[table.mfn(), 1], 1024);
        ask("set_gdt.list-unmapped", Hypercall::SET_GDT, &[UNMAPPED, 512]);
        gdt("in-use", &[table.mfn()], 512);
        tell("set_gdt.in-use.remap-writable", table.remap(WRITABLE));
        ask("set_gdt.in-use.update", Hypercall::UPDATE_DESCRIPTOR, &[address + 8, 0x00af_fa00_0000_ffff]);
        tell("set_gdt.in-use.update.is", format!("{:#x}", table.word(1)));
        gdt("none", &[], 0);
        tell("set_gdt.none.remap-writable", table.remap(WRITABLE));
        for (name, descriptor) in DESCRIPTORS {
            table.remap(WRITABLE);
            table.clear();
            table.put(&[descriptor]);
            table.remap(READ_ONLY);
            gdt(&format!("with.{name}"), &[table.mfn()], 512);
            tell(format!("set_gdt.with.{name}.is"), format!("{:#018x}", table.word(0)));
            gdt("reset", &[], 0);
        }
    }
}

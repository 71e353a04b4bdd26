//! More of something than whoever is below may have of its own.
// UNSAFETY: reads pages by address.
#![expect(unsafe_code, reason = "reads pages that it has mapped, by address")]

use alloc::format;
use alloc::vec::Vec;

use janus_boot::Protocol;
use janus_kernel::{boot_info, guest_test};
use janus_proto::abi::xen::Hypercall;

use crate::ask::{Page, READ_ONLY, SELF, WRITABLE, call, tell};

/// Where nothing else is: the eleventh entry of the top table.
const SLOT: u64 = 10;
/// Tables of pages. With one page at all of their addresses no two mappings can be one: a Linux process has at most
/// 65530 (`vm.max_map_count`).
const TABLES: usize = 137;
const MARK: u64 = 0x1234_5678_9abc_def0;

guest_test! {
    /// One page at 70,144 addresses: all of them show it, in order and again.
    fn limits_of_mappings(test) {
        let Some(Protocol::XenPv(info)) = boot_info().map(|info| info.protocol) else {
            test.error("not started by the PV door");
            return;
        };
        let (Some(page), Some(shown)) = (Page::new(test), Page::new(test)) else { return };
        let (Some(upper), Some(middle)) = (Page::new(test), Page::new(test)) else { return };
        shown.put(&[MARK]);
        let mut tables = Vec::new();
        for _ in 0..TABLES {
            let Some(table) = Page::new(test) else { return };
            table.put(&[shown.mfn() << 12 | READ_ONLY; 512]);
            tables.push(table);
        }
        let entries: Vec<_> = tables.iter().map(|table| table.mfn() << 12 | WRITABLE).collect();
        middle.put(&entries);
        upper.put(&[middle.mfn() << 12 | WRITABLE]);
        for table in tables.iter().chain([&middle, &upper]) {
            table.remap(READ_ONLY);
        }
        // The top table that Xen has built is mapped at its own address, and so is every page.
        let root = crate::ask::frame_of(info.pt_base) << 12;
        page.put(&[root + SLOT * 8, upper.mfn() << 12 | WRITABLE]);
        tell("limits.mappings.hang-in", call(Hypercall::MMU_UPDATE, &[page.address(), 1, 0, SELF]));
        let read = |index: usize| {
            let address = (SLOT as usize) << 39 | index << 12;
            // SAFETY: mapped just now, to a page of ours.
            unsafe { core::ptr::with_exposed_provenance::<u64>(address).read_volatile() }
        };
        for round in 0..2 {
            let right = (0..TABLES * 512).filter(|index| read(*index) == MARK).count();
            tell(format!("limits.mappings.right.{round}"), right);
        }
        page.put(&[root + SLOT * 8, 0]);
        tell("limits.mappings.take-out", call(Hypercall::MMU_UPDATE, &[page.address(), 1, 0, SELF]));
        tell("limits.mappings.tables-are-pages-again", tables.iter().filter(|t| t.remap(WRITABLE) == 0).count());
    }
}

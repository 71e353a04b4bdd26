//! Who Xen says it is.

use alloc::format;

use janus_kernel::guest_test;
use janus_proto::abi::xen::Hypercall;

use crate::ask::{Page, ask, tell};

guest_test! {
    /// What `xen_version` says.
    fn version_of_xen(test) {
        let Some(page) = Page::new(test) else { return };
        let version = |op: u64| {
            page.clear();
            ask(format!("xen_version.{op}.is"), Hypercall::XEN_VERSION, &[op, page.address()])
        };
        version(0);
        version(1);
        tell("xen_version.extraversion.text", page.text(16));
        version(2);
        tell("xen_version.compile_info.has-text", !page.text(64).is_empty());
        version(3);
        tell("xen_version.capabilities.text", page.text(1024));
        version(4);
        version(5);
        tell("xen_version.platform_parameters", format!("{:#x}", page.word(0)));
        version(7);
        version(8);
        tell("xen_version.guest_handle.is-random", page.word(0) != 0 && page.word(1) != 0);
        version(9);
        for index in 0..4 {
            page.put_halves(&[index, 0xdead_beef]);
            ask(format!("xen_version.features.{index}"), Hypercall::XEN_VERSION, &[6, page.address()]);
            tell(format!("xen_version.features.{index}.bits"), format!("{:#x}", page.half(1)));
        }
        for room in [0_u32, 1, 4096] {
            page.put_halves(&[room, 0]);
            let answer = crate::ask::call(Hypercall::XEN_VERSION, &[10, page.address()]);
            tell(format!("xen_version.build_id.{room}"), if answer > 0 { 1 } else { answer });
        }
        for op in [11, 12, 255] {
            version(op);
        }
    }
}

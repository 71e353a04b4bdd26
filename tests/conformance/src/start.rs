//! What a domain finds when it starts: `start_info` and the shared page.

use alloc::format;

use janus_boot::Protocol;
use janus_kernel::xen::shared_info;
use janus_kernel::{boot_info, guest_test};

use crate::ask::tell;

fn word(address: u64) -> u64 {
    crate::operands::read(address)
}

guest_test! {
    /// The fields that do not depend on where things are.
    fn start_of_a_domain(test) {
        let Some(Protocol::XenPv(info)) = boot_info().map(|info| info.protocol) else {
            test.error("not started by the PV door");
            return;
        };
        let start = info.address;
        let magic: alloc::string::String = (0..4)
            .flat_map(|index| word(start + index * 8).to_le_bytes())
            .take_while(|byte| *byte != 0)
            .map(char::from)
            .collect();
        tell("start_info.magic", magic);
        tell("start_info.flags", word(start + 48) & 0xffff_ffff);
        tell("start_info.nr_pages", word(start + 32));
        tell("start_info.shared_info.page-aligned", word(start + 40).is_multiple_of(4096));
        tell("start_info.store_evtchn", word(start + 64) & 0xffff_ffff);
        tell("start_info.console_evtchn", word(start + 80) & 0xffff_ffff);
        tell("start_info.mod_start", word(start + 112));
        tell("start_info.mod_len", word(start + 120));
        tell("start_info.first_p2m_pfn", word(start + 1152));
        tell("start_info.nr_p2m_frames", word(start + 1160));
        // Behind what the image fills come the list, this structure, the two rings, the tables, and the stack.
        let list = word(start + 104);
        tell("start_info.mfn_list.behind-the-image", list >= 0x20_0000 && list.is_multiple_of(4096));
        let list_pages = word(start + 32).div_ceil(512) * 4096;
        tell("start_info.behind-the-list", start == list + list_pages);
        tell("start_info.pt_base.behind", (word(start + 88) - start) / 4096);
        let shared = shared_info::boot_vcpu();
        tell("shared_info.vcpu0.mask", shared.evtchn_upcall_mask.load(core::sync::atomic::Ordering::Relaxed));
        tell("start_info.size-of-boot-area.ends-at-4-mib", info.bootstrap_end.is_multiple_of(4 << 20));
        tell("start_info.boot-area.padding", format!("{}", info.bootstrap_end - word(start + 88) >= 512 * 1024));
    }
}

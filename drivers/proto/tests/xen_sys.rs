//! Our layouts against those of the `xen-sys` crate (bindgen output of an older header set).
//!
//! Only types are used: its hypercall functions are unsound (red-zone corruption, fifth argument in the wrong
//! register, shutdown reason by value; see ARCHITECTURE.md). Known to differ, and therefore not compared:
//! `vcpu_time_info.flags`, which it hides in `pad1[0]`; `dom0_vga_console_info`, 12 bytes short.
#![cfg(not(loom))]

use janus_proto::abi::xen::{self, event_channel, mmu, sched, shared_info, start_info, trap};

/// Compares size and the offsets of fields that have the same name in both.
macro_rules! same {
    ($ours:ty, $theirs:ty $(, $field:ident)*) => {
        assert_eq!(size_of::<$ours>(), size_of::<$theirs>(), stringify!($theirs));
        $(assert_eq!(
            std::mem::offset_of!($ours, $field),
            std::mem::offset_of!($theirs, $field),
            concat!(stringify!($theirs), ".", stringify!($field)),
        );)*
    };
}

#[test]
fn layouts_equal_those_of_xen_sys() {
    same!(xen::MulticallEntry, xen_sys::multicall_entry, op, result, args);
    same!(mmu::MmuUpdate, xen_sys::mmu_update, ptr, val);
    same!(mmu::MmuextOp, xen_sys::mmuext_op, cmd, arg1, arg2);
    same!(trap::TrapInfo, xen_sys::trap_info, vector, flags, cs, address);
    same!(trap::IretContext, xen_sys::iret_context, rax, flags, rip, rflags, rsp, ss);
    same!(
        trap::VcpuGuestContext,
        xen_sys::vcpu_guest_context,
        flags,
        user_regs,
        trap_ctxt,
        ctrlreg
    );
    same!(shared_info::VcpuTimeInfo, xen_sys::vcpu_time_info, version, system_time, tsc_shift);
    same!(shared_info::VcpuInfo, xen_sys::vcpu_info, evtchn_upcall_mask, evtchn_pending_sel, time);
    same!(shared_info::SharedInfo, xen_sys::shared_info, evtchn_mask, wc_version, wc_sec, arch);
    same!(start_info::StartInfo, xen_sys::start_info, flags, store_mfn, pt_base, mod_len, cmd_line);
    same!(sched::Poll, xen_sys::sched_poll, ports, nr_ports, timeout);
    same!(sched::Shutdown, xen_sys::sched_shutdown, reason);
    same!(event_channel::AllocUnbound, xen_sys::evtchn_alloc_unbound, dom, remote_dom, port);
    same!(event_channel::BindVirq, xen_sys::evtchn_bind_virq, virq, vcpu, port);
    same!(
        event_channel::BindInterdomain,
        xen_sys::evtchn_bind_interdomain,
        remote_port,
        local_port
    );
}

//! What is compared: our name, the C name, and where they differ the C names of fields.
//!
//! A line here is all that a new layout or constant needs.

use janus_proto::abi::{xen, xen_io};

use crate::Fact;

/// Size and offsets of a structure.
macro_rules! layout {
    ($facts:ident, $ours:ty, $c:literal $(, $field:ident $(= $name:literal)?)* $(,)?) => {
        $facts.push(Fact::new(concat!("sizeof(", $c, ")"), size_of::<$ours>()));
        $($facts.push(Fact::new(
            concat!("offsetof(", $c, ", ", layout!(@name $field $($name)?), ")"),
            std::mem::offset_of!($ours, $field),
        ));)*
    };
    (@name $field:ident) => { stringify!($field) };
    (@name $field:ident $name:literal) => { $name };
}

/// Offsets that we write as plain numbers, in units of `$unit` bytes.
macro_rules! offsets {
    ($facts:ident, $c:literal, $unit:literal $(, $ours:expr => $field:literal)* $(,)?) => {
        $($facts.push(Fact::new(concat!("offsetof(", $c, ", ", $field, ")"), $ours * $unit));)*
    };
}

/// Everything that is compared.
pub fn facts() -> Vec<Fact> {
    let mut facts = Vec::new();
    structures(&mut facts);
    device_pages(&mut facts);
    crate::constants::numbers(&mut facts);
    facts
}

fn structures(facts: &mut Vec<Fact>) {
    layout!(facts, xen::MulticallEntry, "struct multicall_entry", op, result, args);
    layout!(facts, xen::sched::Shutdown, "struct sched_shutdown", reason);
    layout!(facts, xen::sched::Poll, "struct sched_poll", ports, nr_ports, timeout);
    layout!(facts, xen::sched::Watchdog, "struct sched_watchdog", id, timeout);
    layout!(
        facts,
        xen::event_channel::AllocUnbound,
        "struct evtchn_alloc_unbound",
        dom,
        remote_dom,
        port
    );
    layout!(
        facts,
        xen::event_channel::BindInterdomain,
        "struct evtchn_bind_interdomain",
        remote_dom,
        remote_port,
        local_port
    );
    layout!(facts, xen::event_channel::BindVirq, "struct evtchn_bind_virq", virq, vcpu, port);
    layout!(facts, xen::event_channel::BindPirq, "struct evtchn_bind_pirq", pirq, flags, port);
    layout!(facts, xen::event_channel::BindIpi, "struct evtchn_bind_ipi", vcpu, port);
    layout!(facts, xen::event_channel::Close, "struct evtchn_close", port);
    layout!(facts, xen::event_channel::Send, "struct evtchn_send", port);
    layout!(
        facts,
        xen::event_channel::Status,
        "struct evtchn_status",
        dom,
        port,
        status,
        vcpu,
        arg0 = "u.pirq",
        arg1 = "u.interdomain.port"
    );
    layout!(facts, xen::event_channel::BindVcpu, "struct evtchn_bind_vcpu", port, vcpu);
    layout!(facts, xen::event_channel::Unmask, "struct evtchn_unmask", port);
    layout!(facts, xen::event_channel::Reset, "struct evtchn_reset", dom);
    layout!(
        facts,
        xen::event_channel::InitControl,
        "struct evtchn_init_control",
        control_gfn,
        offset,
        vcpu,
        link_bits
    );
    layout!(facts, xen::event_channel::ExpandArray, "struct evtchn_expand_array", array_gfn);
    layout!(facts, xen::event_channel::SetPriority, "struct evtchn_set_priority", port, priority);
    layout!(
        facts,
        xen::memory::Reservation,
        "struct xen_memory_reservation",
        extent_start,
        nr_extents,
        extent_order,
        mem_flags,
        domid
    );
    layout!(
        facts,
        xen::memory::Exchange,
        "struct xen_memory_exchange",
        give = "in",
        take = "out",
        nr_exchanged
    );
    layout!(facts, xen::memory::Domain, "struct xen_memory_domain", domid);
    layout!(
        facts,
        xen::memory::MachphysMapping,
        "struct xen_machphys_mapping",
        v_start,
        v_end,
        max_mfn
    );
    layout!(
        facts,
        xen::memory::AddToPhysmap,
        "struct xen_add_to_physmap",
        domid,
        size,
        space,
        idx,
        gpfn
    );
    layout!(facts, xen::memory::RemoveFromPhysmap, "struct xen_remove_from_physmap", domid, gpfn);
    layout!(facts, xen::memory::MemoryMap, "struct xen_memory_map", nr_entries, buffer);
    layout!(facts, xen::mmu::MmuUpdate, "struct mmu_update", ptr, val);
    layout!(facts, xen::mmu::MmuextOp, "struct mmuext_op", cmd, arg1, arg2);
    layout!(facts, xen::grant_table::GrantEntryV1, "grant_entry_v1_t", flags, domid, frame);
    layout!(
        facts,
        xen::grant_table::SetupTable,
        "struct gnttab_setup_table",
        dom,
        nr_frames,
        status,
        frame_list
    );
    layout!(
        facts,
        xen::grant_table::QuerySize,
        "struct gnttab_query_size",
        dom,
        nr_frames,
        max_nr_frames,
        status
    );
    layout!(facts, xen::grant_table::SetVersion, "struct gnttab_set_version", version);
    layout!(facts, xen::grant_table::GetVersion, "struct gnttab_get_version", dom, pad, version);
    layout!(
        facts,
        xen::grant_table::MapGrantRef,
        "struct gnttab_map_grant_ref",
        host_addr,
        flags,
        reference = "ref",
        dom,
        status,
        handle,
        dev_bus_addr
    );
    layout!(
        facts,
        xen::grant_table::UnmapGrantRef,
        "struct gnttab_unmap_grant_ref",
        host_addr,
        dev_bus_addr,
        handle,
        status
    );
    layout!(
        facts,
        xen::grant_table::CopyPtr,
        "struct gnttab_copy_ptr",
        target = "u",
        domid,
        offset
    );
    layout!(facts, xen::grant_table::Copy, "struct gnttab_copy", source, dest, len, flags, status);
    layout!(
        facts,
        xen::vcpu::RunstateInfo,
        "struct vcpu_runstate_info",
        state,
        state_entry_time,
        time
    );
    layout!(
        facts,
        xen::vcpu::RegisterMemoryArea,
        "struct vcpu_register_runstate_memory_area",
        addr
    );
    layout!(
        facts,
        xen::vcpu::SetSingleshotTimer,
        "struct vcpu_set_singleshot_timer",
        timeout_abs_ns,
        flags
    );
    layout!(
        facts,
        xen::vcpu::RegisterVcpuInfo,
        "struct vcpu_register_vcpu_info",
        mfn,
        offset,
        rsvd
    );
    layout!(facts, xen::version::FeatureInfo, "struct xen_feature_info", submap_idx, submap);
    layout!(
        facts,
        xen::version::CompileInfo,
        "struct xen_compile_info",
        compile_by,
        compile_domain,
        compile_date
    );
    layout!(
        facts,
        xen::callback::CallbackRegister,
        "struct callback_register",
        kind = "type",
        flags,
        address
    );
    layout!(
        facts,
        xen::callback::CallbackUnregister,
        "struct callback_unregister",
        kind = "type",
        unused = "_unused"
    );
    layout!(facts, xen::physdev::SetIopl, "struct physdev_set_iopl", iopl);
    layout!(facts, xen::physdev::SetIobitmap, "struct physdev_set_iobitmap", bitmap, nr_ports);
    layout!(facts, xen::physdev::Eoi, "struct physdev_eoi", irq);
    layout!(facts, xen::hvm::HvmParamValue, "struct xen_hvm_param", domid, pad, index, value);
    layout!(
        facts,
        xen::hvm::EvtchnUpcallVector,
        "struct xen_hvm_evtchn_upcall_vector",
        vcpu,
        vector
    );
    layout!(
        facts,
        xen::hvm::VcpuHvmContext,
        "struct vcpu_hvm_context",
        mode,
        pad,
        rsp = "cpu_regs.x86_64.rsp",
        rdi = "cpu_regs.x86_64.rdi",
        rip = "cpu_regs.x86_64.rip",
        rflags = "cpu_regs.x86_64.rflags",
        cr0 = "cpu_regs.x86_64.cr0",
        cr3 = "cpu_regs.x86_64.cr3",
        cr4 = "cpu_regs.x86_64.cr4",
        efer = "cpu_regs.x86_64.efer"
    );
    layout!(
        facts,
        xen::hvm::HvmStartInfo,
        "struct hvm_start_info",
        magic,
        version,
        flags,
        nr_modules,
        modlist_paddr,
        cmdline_paddr,
        rsdp_paddr,
        memmap_paddr,
        memmap_entries,
        reserved
    );
    layout!(
        facts,
        xen::hvm::HvmModlistEntry,
        "struct hvm_modlist_entry",
        paddr,
        size,
        cmdline_paddr,
        reserved
    );
    layout!(
        facts,
        xen::hvm::HvmMemmapTableEntry,
        "struct hvm_memmap_table_entry",
        addr,
        size,
        kind = "type",
        reserved
    );
    layout!(
        facts,
        xen::start_info::StartInfo,
        "struct start_info",
        magic,
        nr_pages,
        shared_info,
        flags,
        store_mfn,
        store_evtchn,
        console_mfn = "console.domU.mfn",
        console_evtchn = "console.domU.evtchn",
        pt_base,
        nr_pt_frames,
        mfn_list,
        mod_start,
        mod_len,
        cmd_line,
        first_p2m_pfn,
        nr_p2m_frames
    );
    layout!(
        facts,
        xen::shared_info::VcpuTimeInfo,
        "struct vcpu_time_info",
        version,
        pad0,
        tsc_timestamp,
        system_time,
        tsc_to_system_mul,
        tsc_shift,
        flags,
        pad1
    );
    layout!(
        facts,
        xen::shared_info::VcpuInfo,
        "struct vcpu_info",
        evtchn_upcall_pending,
        evtchn_upcall_mask,
        evtchn_pending_sel,
        cr2 = "arch.cr2",
        arch_pad = "arch.pad",
        time
    );
    layout!(
        facts,
        xen::shared_info::ArchSharedInfo,
        "struct arch_shared_info",
        max_pfn,
        pfn_to_mfn_frame_list_list,
        nmi_reason,
        p2m_cr3,
        p2m_vaddr,
        p2m_generation
    );
    layout!(
        facts,
        xen::shared_info::SharedInfo,
        "struct shared_info",
        vcpu_info,
        evtchn_pending,
        evtchn_mask,
        wc_version,
        wc_sec,
        wc_nsec,
        wc_sec_hi,
        arch
    );
    layout!(facts, xen::trap::TrapInfo, "struct trap_info", vector, flags, cs, address);
    layout!(
        facts,
        xen::trap::IretContext,
        "struct iret_context",
        rax,
        r11,
        rcx,
        flags,
        rip,
        cs,
        rflags,
        rsp,
        ss
    );
    layout!(
        facts,
        xen::trap::CpuUserRegs,
        "struct cpu_user_regs",
        r15,
        r14,
        r13,
        r12,
        rbp,
        rbx,
        r11,
        r10,
        r9,
        r8,
        rax,
        rcx,
        rdx,
        rsi,
        rdi,
        error_code,
        entry_vector,
        rip,
        cs,
        saved_upcall_mask,
        rflags,
        rsp,
        ss,
        es,
        ds,
        fs,
        gs
    );
    layout!(
        facts,
        xen::trap::VcpuGuestContext,
        "struct vcpu_guest_context",
        fpu_ctxt,
        flags,
        user_regs,
        trap_ctxt,
        ldt_base,
        ldt_ents,
        gdt_frames,
        gdt_ents,
        kernel_ss,
        kernel_sp,
        ctrlreg,
        debugreg,
        event_callback_eip,
        failsafe_callback_eip,
        syscall_callback_eip,
        vm_assist,
        fs_base,
        gs_base_kernel,
        gs_base_user
    );
    layout!(
        facts,
        xen_io::xs_wire::XsHeader,
        "struct xsd_sockmsg",
        kind = "type",
        req_id,
        tx_id,
        len
    );
    layout!(
        facts,
        xen_io::blkif::BlkifSegment,
        "struct blkif_request_segment",
        gref,
        first_sect,
        last_sect
    );
    layout!(
        facts,
        xen_io::blkif::BlkifRequest,
        "struct blkif_request",
        operation,
        nr_segments,
        handle,
        id,
        sector_number,
        seg
    );
    layout!(
        facts,
        xen_io::blkif::BlkifRequestDiscard,
        "struct blkif_request_discard",
        operation,
        flag,
        handle,
        id,
        sector_number,
        nr_sectors
    );
    layout!(
        facts,
        xen_io::blkif::BlkifRequestIndirect,
        "struct blkif_request_indirect",
        operation,
        indirect_op,
        nr_segments,
        id,
        sector_number,
        handle,
        indirect_grefs
    );
    layout!(facts, xen_io::blkif::BlkifResponse, "struct blkif_response", id, operation, status);
    layout!(
        facts,
        xen_io::netif::NetTxRequest,
        "struct netif_tx_request",
        gref,
        offset,
        flags,
        id,
        size
    );
    layout!(facts, xen_io::netif::NetTxResponse, "struct netif_tx_response", id, status);
    layout!(
        facts,
        xen_io::netif::NetExtraInfo,
        "struct netif_extra_info",
        kind = "type",
        flags,
        gso_size = "u.gso.size",
        gso_type = "u.gso.type",
        gso_pad = "u.gso.pad",
        gso_features = "u.gso.features"
    );
    layout!(facts, xen_io::netif::NetRxRequest, "struct netif_rx_request", id, pad, gref);
    layout!(
        facts,
        xen_io::netif::NetRxResponse,
        "struct netif_rx_response",
        id,
        offset,
        flags,
        status
    );
}

fn device_pages(facts: &mut Vec<Fact>) {
    offsets!(
        facts, "struct blkif_sring", 4,
        xen_io::ring::REQ_PROD => "req_prod",
        xen_io::ring::REQ_EVENT => "req_event",
        xen_io::ring::RSP_PROD => "rsp_prod",
        xen_io::ring::RSP_EVENT => "rsp_event",
        xen_io::ring::HEADER_WORDS => "ring",
    );
    offsets!(
        facts, "struct xencons_interface", 1,
        xen_io::console::IN.0 => "in",
        xen_io::console::OUT.0 => "out",
        xen_io::console::IN_CONS => "in_cons",
        xen_io::console::IN_PROD => "in_prod",
        xen_io::console::OUT_CONS => "out_cons",
        xen_io::console::OUT_PROD => "out_prod",
    );
    offsets!(
        facts, "struct xenstore_domain_interface", 1,
        xen_io::xs_wire::REQ.0 => "req",
        xen_io::xs_wire::RSP.0 => "rsp",
        xen_io::xs_wire::REQ_CONS => "req_cons",
        xen_io::xs_wire::REQ_PROD => "req_prod",
        xen_io::xs_wire::RSP_CONS => "rsp_cons",
        xen_io::xs_wire::RSP_PROD => "rsp_prod",
        xen_io::xs_wire::SERVER_FEATURES => "server_features",
        xen_io::xs_wire::CONNECTION => "connection",
        xen_io::xs_wire::ERROR => "error",
    );
}

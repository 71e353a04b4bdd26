//! Ends in words: the rule, and what to look at.

use janus_proto::abi::xen::sched::ShutdownReason;

use crate::engine::EngineError;
use crate::pv::domain::EndReason;
use crate::pv::report::{Cause, CpuReport};

const PRESENT: u64 = 1;
const WRITE: u64 = 1 << 1;
const USER: u64 = 1 << 2;
const LARGE: u64 = 1 << 7;
const NO_EXECUTE: u64 = 1 << 63;
/// Of a page fault's error code (Intel SDM volume 3, 4.7).
const BY_WRITE: u32 = 1 << 1;
const BY_FETCH: u32 = 1 << 4;

/// The name of an exception (Intel SDM volume 3, table 6-1).
pub(super) fn exception(vector: u8) -> &'static str {
    match vector {
        0 => "divide error",
        1 => "debug exception",
        2 => "NMI",
        3 => "breakpoint",
        4 => "overflow",
        5 => "bound range exceeded",
        6 => "invalid opcode",
        7 => "no FPU",
        8 => "double fault",
        10 => "invalid TSS",
        11 => "segment not present",
        12 => "stack fault",
        13 => "general protection",
        14 => "page fault",
        16 => "x87 error",
        17 => "alignment check",
        18 => "machine check",
        19 => "SIMD error",
        _ => "interrupt",
    }
}

/// The flags of a page table entry.
pub(super) fn entry(entry: u64) -> String {
    if entry & PRESENT == 0 {
        return "not present".into();
    }
    let mut flags = vec!["present", if entry & WRITE != 0 { "writable" } else { "read-only" }];
    for (bit, name) in [(USER, "user"), (LARGE, "large"), (NO_EXECUTE, "not executable")] {
        if entry & bit != 0 {
            flags.push(name);
        }
    }
    flags.join(", ")
}

/// How it ended.
pub(super) fn reason(reason: &EndReason) -> String {
    match reason {
        EndReason::Shutdown(ShutdownReason::CRASH) => "the guest says that it crashed".into(),
        EndReason::Shutdown(reason) => format!("the guest shut down: {reason:?}"),
        EndReason::Crashed(cause) => format!("the guest crashed: {cause}"),
        EndReason::Engine(error) => format!("the engine lost it: {error}"),
        EndReason::Destroyed => "it was ended from outside".into(),
    }
}

/// What is wrong with a page, as far as its tables say.
fn page(cpu: Option<&CpuReport>, error: u32) -> String {
    let Some(last) = cpu.and_then(|cpu| cpu.walk.last()) else {
        return "the address, and who computed it".into();
    };
    let cause = if last.entry & PRESENT == 0 {
        format!("nothing is mapped there: the entry of level {} is not present", last.level)
    } else if error & BY_WRITE != 0 && last.entry & WRITE == 0 {
        "it is mapped read-only: page tables, descriptor tables, text, or what was granted read-only".into()
    } else if error & BY_FETCH != 0 && last.entry & NO_EXECUTE != 0 {
        "it is mapped, but not to be executed".into()
    } else {
        "the tables map it now: were they changed meanwhile, without a flush?".into()
    };
    format!("the address and who computed it; {cause}")
}

/// The rule that was broken, and what to look at.
pub(super) fn explain(reason: &EndReason, cpu: Option<&CpuReport>) -> (String, String) {
    let (rule, advice) = match reason {
        EndReason::Crashed(Cause::NoHandler(fault)) => {
            let name = exception(fault.vector);
            let rule = format!(
                "every exception that can come has a handler (HYPERVISOR_set_trap_table); a {name} came, and there is none"
            );
            let advice = match fault.vector {
                14 => page(cpu, fault.error),
                13 => "the instruction: a PV kernel runs without privileges, and only what Xen emulates works (CR, MSR and port access, cli, sti, hlt, invlpg, cpuid); or an address that is not canonical".into(),
                6 => "the instruction: ud2 is how compilers end what must not be reached, and how kernels panic".into(),
                0 => "the divisor".into(),
                _ => "the instruction at rip; a handler set before would have told more".into(),
            };
            return (rule, advice);
        }
        EndReason::Crashed(Cause::NoEventCallback) => (
            "a guest that unmasks events has an entry point for them",
            "HYPERVISOR_set_callbacks (or callback_op) comes before evtchn_upcall_mask is cleared",
        ),
        EndReason::Crashed(Cause::BadStack(_)) => (
            "the kernel's stack can be written whenever an event or exception may come",
            "rsp in the registers: an overflow into a guard page, or HYPERVISOR_stack_switch with a stack that is not mapped",
        ),
        EndReason::Crashed(Cause::BadIret(_)) => (
            "HYPERVISOR_iret finds its frame (struct iret_context) at rsp",
            "rsp at the call: what was pushed, and whether that stack is mapped",
        ),
        EndReason::Crashed(Cause::NoUserTable) => (
            "a return to user mode has a page table for it",
            "MMUEXT_NEW_USER_BASEPTR comes first; or the selector in the frame has the wrong ring (PV kernels are in ring 3 here, too: bit VGCF_in_kernel and CS tell)",
        ),
        EndReason::Crashed(Cause::Watchdog) => (
            "whoever arms SCHEDOP_watchdog arms it again in time",
            "what kept the CPUs busy: the backtraces",
        ),
        EndReason::Shutdown(_) => (
            "none of Xen's: the guest ended itself with SHUTDOWN_crash",
            "its console, below, says why",
        ),
        EndReason::Engine(EngineError::Corrupt(_)) => (
            "a guest leaves the engine's own memory alone",
            "code that jumps or writes above the guest's addresses; a report of this is welcome",
        ),
        EndReason::Engine(EngineError::Host(_)) => (
            "the host gives what the engine needs",
            "the error; limits on memory, processes and mappings (ulimit, vm.max_map_count)",
        ),
        EndReason::Engine(_) => (
            "a guest's processes live as long as it does",
            "who ended the process: the kernel's log has out-of-memory kills",
        ),
        EndReason::Destroyed => {
            ("none: it was still running", "where the CPUs were, and the last lines of the console")
        }
    };
    (rule.into(), advice.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pv::report::WalkStep;
    use janus_proto::addr::Mfn;

    #[test]
    fn page_faults_say_what_the_tables_say() {
        let with = |entry| CpuReport {
            walk: vec![WalkStep { level: 1, table: Mfn(1), index: 0, entry }],
            ..CpuReport::default()
        };
        for (entry, error, part) in [
            (0, 0, "not present"),
            (PRESENT, BY_WRITE, "read-only"),
            (PRESENT | NO_EXECUTE, BY_FETCH, "executed"),
            (PRESENT | WRITE, BY_WRITE, "changed meanwhile"),
        ] {
            assert!(page(Some(&with(entry)), error).contains(part), "{entry:#x}");
        }
        assert_eq!(entry(PRESENT | WRITE | USER), "present, writable, user");
    }
}

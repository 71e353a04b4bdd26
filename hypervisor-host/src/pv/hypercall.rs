//! The one table of hypercalls: number, name, handler; and how often each was made and how long it took.

use std::sync::atomic::{AtomicU64, Ordering};

use janus_proto::abi::xen::{Errno, Hypercall};

use super::cpu::{Cpu, Over};
use super::report::Cause;
use super::{
    console_io, events, grant, multicall, physdev, privileged, sched, segments, timers, traps,
    vcpu, version,
};

/// Numbers that can be counted: beyond them are none.
pub const NUMBERS: usize = 64;

/// What a handler answers.
#[derive(Debug)]
pub(crate) enum Answer {
    /// Goes into `rax`: a value, or a negative error number.
    Value(i64),
    /// The handler has set all registers itself.
    Done,
    /// The domain does not survive it.
    Crash(Cause),
    /// The domain ends in this way.
    End(Over),
}

impl Answer {
    pub(crate) fn ok(value: u64) -> Self {
        Self::Value(value.cast_signed())
    }
    pub(crate) fn err(error: Errno) -> Self {
        Self::Value(-i64::from(error.0))
    }
}

impl From<Result<u64, Errno>> for Answer {
    fn from(result: Result<u64, Errno>) -> Self {
        match result {
            Ok(value) => Self::ok(value),
            Err(error) => Self::err(error),
        }
    }
}

/// What the C interface takes as an `int`: its upper half is whatever the compiler left there.
pub(crate) fn low32(argument: u64) -> u32 {
    u32::try_from(argument & 0xffff_ffff).unwrap_or(0)
}

type Handler = fn(&mut Cpu, [u64; 6]) -> Answer;

/// One hypercall.
struct Entry {
    name: &'static str,
    handler: Handler,
}

/// A call that [`super::space::Space`] makes.
const fn memory(name: &'static str) -> Option<Entry> {
    Some(Entry { name, handler: |_, _| Answer::err(Errno::ENOSYS) })
}

const fn call(name: &'static str, handler: Handler) -> Option<Entry> {
    Some(Entry { name, handler })
}

/// Calls known by number, in order; those of memory are asked of the space first.
fn entry(number: Hypercall) -> Option<Entry> {
    match number {
        Hypercall::SET_TRAP_TABLE => call("set_trap_table", traps::set_trap_table),
        Hypercall::MMU_UPDATE => memory("mmu_update"),
        Hypercall::SET_GDT => memory("set_gdt"),
        Hypercall::STACK_SWITCH => call("stack_switch", traps::stack_switch),
        Hypercall::SET_CALLBACKS => call("set_callbacks", traps::set_callbacks),
        Hypercall::FPU_TASKSWITCH => call("fpu_taskswitch", segments::fpu_taskswitch),
        Hypercall(6) => call("sched_op_compat", sched::sched_op_compat),
        Hypercall::SET_DEBUGREG => call("set_debugreg", segments::set_debugreg),
        Hypercall::GET_DEBUGREG => call("get_debugreg", segments::get_debugreg),
        Hypercall::UPDATE_DESCRIPTOR => memory("update_descriptor"),
        Hypercall::MEMORY_OP => memory("memory_op"),
        Hypercall::MULTICALL => call("multicall", multicall::multicall),
        Hypercall::UPDATE_VA_MAPPING => memory("update_va_mapping"),
        Hypercall::SET_TIMER_OP => call("set_timer_op", sched::set_timer_op),
        Hypercall(16) => call("event_channel_op_compat", events::op::compat),
        Hypercall::XEN_VERSION => call("xen_version", version::xen_version),
        Hypercall::CONSOLE_IO => call("console_io", console_io::console_io),
        Hypercall(19) => call("physdev_op_compat", physdev::compat),
        Hypercall::GRANT_TABLE_OP => call("grant_table_op", grant::op::grant_table_op),
        Hypercall::VM_ASSIST => call("vm_assist", segments::vm_assist),
        Hypercall::UPDATE_VA_MAPPING_OTHERDOMAIN => memory("update_va_mapping_otherdomain"),
        Hypercall::IRET => call("iret", traps::iret),
        Hypercall::VCPU_OP => call("vcpu_op", vcpu::vcpu_op),
        Hypercall::SET_SEGMENT_BASE => call("set_segment_base", segments::set_segment_base),
        Hypercall::MMUEXT_OP => memory("mmuext_op"),
        Hypercall::NMI_OP => call("nmi_op", traps::nmi_op),
        Hypercall::SCHED_OP => call("sched_op", sched::sched_op),
        Hypercall::CALLBACK_OP => call("callback_op", traps::callback_op),
        Hypercall::EVENT_CHANNEL_OP => call("event_channel_op", events::op::event_channel_op),
        Hypercall::PHYSDEV_OP => call("physdev_op", physdev::physdev_op),
        // For toolstacks and other guests: what a PV guest is told.
        Hypercall(7) => call("platform_op", privileged::interface),
        Hypercall(31) => call("xenoprof_op", privileged::profile),
        // HVM guests' own memory answers it first.
        Hypercall::HVM_OP => call("hvm_op", privileged::hvm_op),
        Hypercall(35) => call("sysctl", privileged::interface),
        Hypercall(36) => call("domctl", privileged::interface),
        Hypercall(37) => call("kexec_op", privileged::refused),
        Hypercall::XENPMU_OP => call("xenpmu_op", privileged::counters),
        Hypercall(41) => call("dm_op", privileged::device_model),
        Hypercall(42) => call("hypfs_op", privileged::refused),
        Hypercall(48) => call("mca", privileged::refused),
        Hypercall(49) => call("paging_domctl_cont", privileged::paging),
        _ => None,
    }
}

/// The name of a call, for tables and reports.
#[must_use]
pub fn name(number: u64) -> &'static str {
    entry(Hypercall(number)).map_or("unknown", |entry| entry.name)
}

/// How often, and how long, one virtual CPU made each call. Written by its own thread only.
#[derive(Debug)]
pub(crate) struct Counters {
    calls: [AtomicU64; NUMBERS],
    ticks: [AtomicU64; NUMBERS],
    unknown: AtomicU64,
}

impl Counters {
    pub(crate) fn new() -> Self {
        Self {
            calls: std::array::from_fn(|_| AtomicU64::new(0)),
            ticks: std::array::from_fn(|_| AtomicU64::new(0)),
            unknown: AtomicU64::new(0),
        }
    }

    fn add(&self, number: Hypercall, ticks: u64) {
        let Ok(index) = usize::try_from(number.0) else { return };
        // One writer: no need for locked operations.
        if let (Some(calls), Some(total)) = (self.calls.get(index), self.ticks.get(index)) {
            calls.store(calls.load(Ordering::Relaxed).wrapping_add(1), Ordering::Relaxed);
            total.store(total.load(Ordering::Relaxed).wrapping_add(ticks), Ordering::Relaxed);
        }
    }

    fn add_unknown(&self) {
        self.unknown.store(self.unknown.load(Ordering::Relaxed).wrapping_add(1), Ordering::Relaxed);
    }

    /// Calls and TSC ticks of each number that was used.
    pub(crate) fn used(&self) -> impl Iterator<Item = (u64, u64, u64)> {
        self.calls.iter().zip(&self.ticks).zip(0..).filter_map(|((calls, ticks), number)| {
            let calls = calls.load(Ordering::Relaxed);
            (calls > 0).then(|| (number, calls, ticks.load(Ordering::Relaxed)))
        })
    }

    pub(crate) fn unknown(&self) -> u64 {
        self.unknown.load(Ordering::Relaxed)
    }
}

/// Makes one call, counts it, and remembers it for a report.
pub(crate) fn dispatch(cpu: &mut Cpu, number: Hypercall, arguments: [u64; 6]) -> Answer {
    let start = timers::tsc();
    let Some(entry) = entry(number) else {
        cpu.shared().counters.add_unknown();
        cpu.note_call(number, [arguments[0], arguments[1]], -i64::from(Errno::ENOSYS.0));
        return Answer::err(Errno::ENOSYS);
    };
    let space = &cpu.domain.space;
    let answer = match space.hypercall(cpu.index, &mut *cpu.engine, number, arguments) {
        Some(result) => Answer::from(result),
        None => (entry.handler)(cpu, arguments),
    };
    cpu.shared().counters.add(number, timers::tsc().wrapping_sub(start));
    let value = if let Answer::Value(value) = &answer { *value } else { 0 };
    cpu.note_call(number, [arguments[0], arguments[1]], value);
    answer
}

/// A hypercall as the guest makes it: by registers.
pub(crate) fn enter(cpu: &mut Cpu) -> Result<(), Over> {
    let registers = &cpu.state.registers;
    let number = Hypercall(registers.rax);
    let arguments =
        [registers.rdi, registers.rsi, registers.rdx, registers.r10, registers.r8, registers.r9];
    match dispatch(cpu, number, arguments) {
        Answer::Value(value) => cpu.state.registers.rax = value.cast_unsigned(),
        Answer::Done => {}
        Answer::Crash(cause) => return Err(cause.into()),
        Answer::End(over) => return Err(over),
    }
    Ok(())
}

#[cfg(test)]
mod tests;

//! Entries into a PV guest's kernel: exceptions, events, system calls; and the way back
//! (`xen/include/public/arch-x86/xen-x86_64.h`; Xen's `create_bounce_frame` and `do_iret`).

use janus_proto::abi::xen::callback::{
    CallbackFlags, CallbackOp, CallbackRegister, CallbackType, CallbackUnregister,
};
use janus_proto::abi::xen::trap::{
    FLAT_RING3_CS64, FLAT_RING3_SS64, IretContext, TrapInfo, VGCF_IN_SYSCALL,
};
use janus_proto::abi::xen::{Errno, VmAssist};
use zerocopy::FromZeros as _;

use super::cpu::{
    Cpu, RFLAGS_AC, RFLAGS_GUEST, RFLAGS_IF, RFLAGS_IOPL, RFLAGS_NT, RFLAGS_RF, RFLAGS_TF,
    RFLAGS_VM,
};
use super::hypercall::{Answer, low32};
use super::report::{Cause, Deed};
use crate::engine::Fault;

/// First address that is Xen's own, and the first behind (`HYPERVISOR_VIRT_START`, `HYPERVISOR_VIRT_END`).
const HYPERVISOR: core::ops::Range<u64> = 0xffff_8000_0000_0000..0xffff_8800_0000_0000;
/// Where the lower half ends.
const LOWER_END: u64 = 1 << 47;
/// Error code of a page fault: it came from user mode.
const PFEC_USER: u32 = 1 << 2;
/// Page fault, breakpoint and overflow vectors.
pub(crate) const PAGE_FAULT: u8 = 14;
pub(crate) const GENERAL_PROTECTION: u8 = 13;
pub(crate) const INVALID_OPCODE: u8 = 6;
/// No code segment, of ring 3.
const NULL_CS: u16 = 3;
/// [`TrapInfo::flags`]: least privilege, and whether events are masked on entry.
const TI_DPL: u8 = 3;
const TI_IF: u8 = 1 << 2;

/// One entry point.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Entry {
    pub(crate) address: u64,
    /// Enter with events masked.
    pub(crate) mask: bool,
}

/// Where the guest's kernel is entered.
#[derive(Debug)]
pub(crate) struct Vectors {
    traps: Box<[TrapInfo; 256]>,
    pub(crate) event: u64,
    pub(crate) failsafe: Entry,
    pub(crate) syscall: Entry,
    syscall32: Entry,
    sysenter: Entry,
    nmi: u64,
}

impl Default for Vectors {
    fn default() -> Self {
        Self {
            traps: Box::new([TrapInfo::new_zeroed(); 256]),
            event: 0,
            failsafe: Entry::default(),
            syscall: Entry::default(),
            syscall32: Entry::default(),
            sysenter: Entry::default(),
            nmi: 0,
        }
    }
}

impl Vectors {
    fn trap(&self, vector: u8) -> TrapInfo {
        // 256 entries, and 256 vectors.
        self.traps.get(usize::from(vector)).copied().unwrap_or_else(TrapInfo::new_zeroed)
    }

    /// Sets one entry of the virtual IDT, as [`set_trap_table`] does; the entry has been checked.
    pub(crate) fn set_trap(&mut self, info: TrapInfo) {
        if let Some(place) = self.traps.get_mut(usize::from(info.vector)) {
            *place = info;
        }
    }

    /// Sets the entry of `sysenter`.
    #[cfg(test)]
    pub(crate) fn set_sysenter(&mut self, address: u64) {
        self.sysenter.address = address;
    }

    pub(crate) fn clear_traps(&mut self) {
        self.traps.fill(TrapInfo::new_zeroed());
    }

    fn entry(&mut self, kind: CallbackType) -> Option<&mut Entry> {
        match kind {
            CallbackType::FAILSAFE => Some(&mut self.failsafe),
            CallbackType::SYSCALL => Some(&mut self.syscall),
            CallbackType::SYSCALL32 => Some(&mut self.syscall32),
            CallbackType::SYSENTER => Some(&mut self.sysenter),
            _ => None,
        }
    }
}

/// Whether an address can be one at all.
pub(crate) fn is_canonical(address: u64) -> bool {
    (address.cast_signed() << 16 >> 16).cast_unsigned() == address
}

/// `__addr_ok`: neither Xen's own nor non-canonical.
pub(crate) fn is_guests(address: u64) -> bool {
    is_canonical(address) && !HYPERVISOR.contains(&address)
}

pub(crate) fn set_trap_table(cpu: &mut Cpu, [address, ..]: [u64; 6]) -> Answer {
    if address == 0 {
        cpu.vectors.clear_traps();
        return Answer::ok(0);
    }
    // One entry for each vector, and the end; Xen reads on for ever.
    for index in 0..=256_u64 {
        let info: TrapInfo = match cpu.read(address.wrapping_add(index * 16)) {
            Ok(info) => info,
            Err(error) => return Answer::err(error),
        };
        if info.address == 0 {
            break;
        }
        if !is_canonical(info.address) {
            return Answer::err(Errno::EINVAL);
        }
        cpu.vectors.set_trap(info);
    }
    Answer::ok(0)
}

pub(crate) fn set_callbacks(cpu: &mut Cpu, [event, failsafe, syscall, ..]: [u64; 6]) -> Answer {
    // As three calls of `callback_op` whose answers nobody hears: what cannot be an entry changes nothing.
    let vectors = &mut cpu.vectors;
    for (place, address) in [
        (&mut vectors.event, event),
        (&mut vectors.failsafe.address, failsafe),
        (&mut vectors.syscall.address, syscall),
    ] {
        if is_canonical(address) {
            *place = address;
        }
    }
    Answer::ok(0)
}

pub(crate) fn callback_op(cpu: &mut Cpu, [op, argument, ..]: [u64; 6]) -> Answer {
    let op = low32(op);
    Answer::from(match CallbackOp(op) {
        CallbackOp::REGISTER => register(cpu, argument),
        CallbackOp::UNREGISTER => unregister(cpu, argument),
        _ => Err(Errno::ENOSYS),
    })
}

fn register(cpu: &mut Cpu, argument: u64) -> Result<u64, Errno> {
    let callback: CallbackRegister = cpu.read(argument)?;
    if !is_canonical(callback.address) {
        return Err(Errno::EINVAL);
    }
    let mask = callback.flags.contains(CallbackFlags::MASK_EVENTS);
    match callback.kind {
        CallbackType::EVENT => cpu.vectors.event = callback.address,
        CallbackType::NMI => cpu.vectors.nmi = callback.address,
        kind => {
            let entry = cpu.vectors.entry(kind).ok_or(Errno::ENOSYS)?;
            *entry = Entry { address: callback.address, mask };
        }
    }
    Ok(0)
}

fn unregister(cpu: &mut Cpu, argument: u64) -> Result<u64, Errno> {
    let callback: CallbackUnregister = cpu.read(argument)?;
    match callback.kind {
        CallbackType::NMI => cpu.vectors.nmi = 0,
        CallbackType::EVENT
        | CallbackType::FAILSAFE
        | CallbackType::SYSCALL
        | CallbackType::SYSCALL32
        | CallbackType::SYSENTER => return Err(Errno::EINVAL),
        _ => return Err(Errno::ENOSYS),
    }
    Ok(0)
}

/// `NMI_OP`: register and unregister.
pub(crate) fn nmi_op(cpu: &mut Cpu, [op, argument, ..]: [u64; 6]) -> Answer {
    Answer::from(match op {
        // `XENNMI_register_callback`: the handler's address and one word for it.
        0 => cpu.read::<[u64; 2]>(argument).and_then(|[handler, _]| {
            if cpu.index != 0 || !is_canonical(handler) {
                return Err(Errno::EINVAL);
            }
            cpu.vectors.nmi = handler;
            Ok(0)
        }),
        1 => {
            cpu.vectors.nmi = 0;
            Ok(0)
        }
        _ => Err(Errno::ENOSYS),
    })
}

/// What a bounce needs to know.
struct Bounce {
    entry: u64,
    error: Option<u32>,
    mask: bool,
    /// What the guest crashes for without an entry point.
    without: Cause,
}

fn has_error_code(vector: u8) -> bool {
    matches!(vector, 8 | 10..=14 | 17 | 21)
}

/// Delivers an exception to the guest.
pub(crate) fn inject(cpu: &mut Cpu, fault: Fault) -> Result<(), Cause> {
    cpu.deeds.add(Deed::Fault(fault, cpu.state.registers.rip));
    let mut error = fault.error;
    if fault.vector == PAGE_FAULT {
        cpu.state.cr2 = fault.address;
        cpu.shared().set_cr2(fault.address);
        error = if cpu.state.kernel_mode { error & !PFEC_USER } else { error | PFEC_USER };
    }
    let info = cpu.vectors.trap(fault.vector);
    create_frame(
        cpu,
        &Bounce {
            entry: info.address,
            error: has_error_code(fault.vector).then_some(error),
            mask: info.flags & TI_IF != 0,
            without: Cause::NoHandler(fault),
        },
    )
}

/// An `int n` that the CPU refused: runs the guest's own handler if it lets this mode call it.
pub(crate) fn software_interrupt(cpu: &mut Cpu, vector: u8, length: u64) -> Result<bool, Cause> {
    let info = cpu.vectors.trap(vector);
    // A PV kernel counts as ring 1.
    let privilege = if cpu.state.kernel_mode { 1 } else { 3 };
    if info.flags & TI_DPL < privilege {
        return Ok(false);
    }
    let rip = &mut cpu.state.registers.rip;
    *rip = rip.wrapping_add(length);
    let fault = Fault { vector, error: 0, address: 0 };
    cpu.deeds.add(Deed::Fault(fault, cpu.state.registers.rip));
    let bounce = Bounce {
        entry: info.address,
        error: None,
        mask: info.flags & TI_IF != 0,
        without: Cause::NoHandler(fault),
    };
    create_frame(cpu, &bounce)?;
    Ok(true)
}

/// Makes the upcall for pending events.
pub(crate) fn upcall(cpu: &mut Cpu) -> Result<(), Cause> {
    cpu.deeds.add(Deed::Upcall);
    let (entry, without) = (cpu.vectors.event, Cause::NoEventCallback);
    create_frame(cpu, &Bounce { entry, error: None, mask: true, without })
}

/// Delivers an NMI, if the guest wants them.
pub(crate) fn nmi(cpu: &mut Cpu) -> Result<(), Cause> {
    let entry = cpu.vectors.nmi;
    if entry == 0 {
        return Ok(());
    }
    create_frame(cpu, &Bounce { entry, error: None, mask: true, without: Cause::NoEventCallback })
}

/// A `syscall` of the guest's user mode.
pub(crate) fn user_syscall(cpu: &mut Cpu) -> Result<(), Cause> {
    let Entry { address, mask } = cpu.vectors.syscall;
    let registers = &mut cpu.state.registers;
    if address == 0 {
        registers.rip = registers.rip.wrapping_sub(2);
        return inject(cpu, Fault { vector: INVALID_OPCODE, error: 0, address: 0 });
    }
    // As the instruction leaves them.
    (registers.rcx, registers.r11) = (registers.rip, registers.rflags);
    let without = Cause::NoEventCallback;
    create_frame(cpu, &Bounce { entry: address, error: None, mask, without })
}

/// A `sysenter`, which loses where it came from: to the guest's entry for it, or a #GP, from address 0
/// (`sysenter_entry` of `xen/arch/x86/x86_64/entry.S`).
pub(crate) fn sysenter(cpu: &mut Cpu) -> Result<(), Cause> {
    let Entry { address, mask } = cpu.vectors.sysenter;
    let state = &mut cpu.state;
    (state.registers.rip, state.registers.rsp) = (0, 0);
    (state.cs, state.ss) = (NULL_CS, FLAT_RING3_SS64);
    if address == 0 {
        return inject(cpu, Fault { vector: GENERAL_PROTECTION, error: 0, address: 0 });
    }
    let without = Cause::NoEventCallback;
    create_frame(cpu, &Bounce { entry: address, error: None, mask, without })
}

/// Pushes the frame of an entry and goes there (`create_bounce_frame`).
fn create_frame(cpu: &mut Cpu, bounce: &Bounce) -> Result<(), Cause> {
    if bounce.entry == 0 {
        return Err(bounce.without);
    }
    let before = cpu.state;
    let stack = if before.kernel_mode {
        before.registers.rsp
    } else {
        cpu.toggle_mode()?;
        before.kernel_stack
    };
    let stack = stack & !0xf;
    if stack >= LOWER_END && !is_guests(stack) {
        return Err(Cause::BadStack(stack));
    }
    // Of the kernel the guest sees the selector with ring 0.
    let cs = if before.kernel_mode { before.cs & !3 } else { before.cs };
    let mask = cpu.shared().mask_byte();
    let mut rflags = before.registers.rflags & !(RFLAGS_IF | RFLAGS_IOPL);
    if mask == 0 {
        rflags |= RFLAGS_IF;
    }
    if cpu.domain.assists(VmAssist::ARCHITECTURAL_IOPL) {
        rflags |= u64::from(cpu.iopl) << 12;
    }
    let registers = before.registers;
    let frame = [
        registers.rip,
        u64::from(cs) | u64::from(mask) << 32,
        rflags,
        registers.rsp,
        before.ss.into(),
    ];
    let mut words = [0; 8];
    let head = [registers.rcx, registers.r11];
    let error = bounce.error.map(u64::from);
    let count = head.len() + frame.len() + usize::from(error.is_some());
    let values = head.into_iter().chain(error).chain(frame);
    for (word, value) in words.iter_mut().zip(values) {
        *word = value;
    }
    let bottom = stack.wrapping_sub(count as u64 * 8);
    let words = words.get(..count).unwrap_or_default();
    cpu.write(bottom, words).map_err(|_| Cause::BadStack(bottom))?;
    if bounce.mask {
        cpu.shared().set_masked(true);
    }
    let state = &mut cpu.state;
    let cleared = RFLAGS_AC | RFLAGS_VM | RFLAGS_RF | RFLAGS_NT | RFLAGS_TF;
    state.registers.rflags &= !cleared;
    state.registers.rsp = bottom;
    state.registers.rip = bounce.entry;
    (state.cs, state.ss) = (FLAT_RING3_CS64, FLAT_RING3_SS64);
    Ok(())
}

/// What a return of the guest's leaves in `rflags`.
pub(crate) fn guest_rflags(rflags: u64) -> u64 {
    (rflags & RFLAGS_GUEST & !RFLAGS_IOPL) | RFLAGS_IF | 2
}

/// `IRET`: pops its context from the guest's stack (`do_iret`).
pub(crate) fn iret(cpu: &mut Cpu, _arguments: [u64; 6]) -> Answer {
    let stack = cpu.state.registers.rsp;
    let Ok(context) = cpu.read::<IretContext>(stack) else {
        return Answer::Crash(Cause::BadIret(stack));
    };
    if context.cs & 3 == 3
        && let Err(cause) = cpu.toggle_mode()
    {
        return Answer::Crash(cause);
    }
    if cpu.domain.assists(VmAssist::ARCHITECTURAL_IOPL) {
        cpu.iopl = u8::try_from((context.rflags & RFLAGS_IOPL) >> 12).unwrap_or(0);
    }
    let state = &mut cpu.state;
    let registers = &mut state.registers;
    registers.rip = context.rip;
    registers.rsp = context.rsp;
    registers.rflags = guest_rflags(context.rflags);
    registers.rax = context.rax;
    if context.flags & VGCF_IN_SYSCALL == 0 {
        (registers.rcx, registers.r11) = (context.rcx, context.r11);
    } else {
        (registers.rcx, registers.r11) = (context.rip, registers.rflags);
    }
    state.cs = selector(context.cs);
    state.ss = selector(context.ss);
    cpu.shared().set_masked(context.rflags & RFLAGS_IF == 0);
    Answer::Done
}

/// The low half word, in ring 3.
fn selector(value: u64) -> u16 {
    u16::try_from(value & 0xffff).unwrap_or(0) | 3
}

pub(crate) fn stack_switch(cpu: &mut Cpu, [selector, stack, ..]: [u64; 6]) -> Answer {
    let _ = selector;
    cpu.state.kernel_stack = stack;
    Answer::ok(0)
}

#[cfg(test)]
mod tests;

//! gdb's registers and ours.

use gdbstub_arch::x86::reg::{X86_64CoreRegs, X86SegmentRegs, X87FpuInternalRegs};

use crate::pv::report::CpuState;

/// What a debugger may change of `rflags`: CF, PF, AF, ZF, SF, DF, OF, AC, ID.
const RFLAGS_CHANGED: u64 = 0x0024_0cd5;

/// Ours as gdb has them; `fpu` is in the XSAVE layout, or empty.
pub(super) fn from(state: &CpuState, fpu: &[u8]) -> X86_64CoreRegs {
    let r = &state.registers;
    let [ds, es, fs, gs] = state.data;
    let mut registers = X86_64CoreRegs {
        regs: [
            r.rax, r.rbx, r.rcx, r.rdx, r.rsi, r.rdi, r.rbp, r.rsp, r.r8, r.r9, r.r10, r.r11,
            r.r12, r.r13, r.r14, r.r15,
        ],
        eflags: u32::try_from(r.rflags & 0xffff_ffff).unwrap_or(0),
        rip: r.rip,
        segments: X86SegmentRegs {
            cs: state.cs.into(),
            ss: state.ss.into(),
            ds: ds.into(),
            es: es.into(),
            fs: fs.into(),
            gs: gs.into(),
        },
        ..X86_64CoreRegs::default()
    };
    legacy(&mut registers, fpu);
    registers
}

/// The legacy area of FXSAVE (Intel SDM volume 1, 10.5.1).
fn legacy(registers: &mut X86_64CoreRegs, fpu: &[u8]) {
    let word = |at: usize| {
        fpu.get(at..at + 2).and_then(|b| b.try_into().ok()).map_or(0, u16::from_le_bytes)
    };
    let long = |at: usize| {
        fpu.get(at..at + 4).and_then(|b| b.try_into().ok()).map_or(0, u32::from_le_bytes)
    };
    registers.fpu = X87FpuInternalRegs {
        fctrl: word(0).into(),
        fstat: word(2).into(),
        ftag: word(4).into(),
        fop: word(6).into(),
        fioff: long(8),
        fiseg: long(12),
        fooff: long(16),
        foseg: long(20),
    };
    registers.mxcsr = long(24);
    for (index, st) in registers.st.iter_mut().enumerate() {
        let at = 32 + index * 16;
        if let Some(bytes) = fpu.get(at..at + 10).and_then(|bytes| bytes.try_into().ok()) {
            *st = bytes;
        }
    }
    for (index, xmm) in registers.xmm.iter_mut().enumerate() {
        let at = 160 + index * 16;
        if let Some(bytes) = fpu.get(at..at + 16).and_then(|bytes| bytes.try_into().ok()) {
            *xmm = u128::from_le_bytes(bytes);
        }
    }
}

/// gdb's into ours: general registers, instruction pointer, and the flags that are arithmetic's. Selectors and the FPU
/// stay as they are.
pub(super) fn into(registers: &X86_64CoreRegs, state: &mut CpuState) {
    let r = &mut state.registers;
    [
        r.rax, r.rbx, r.rcx, r.rdx, r.rsi, r.rdi, r.rbp, r.rsp, r.r8, r.r9, r.r10, r.r11, r.r12,
        r.r13, r.r14, r.r15,
    ] = registers.regs;
    r.rip = registers.rip;
    r.rflags = (r.rflags & !RFLAGS_CHANGED) | (u64::from(registers.eflags) & RFLAGS_CHANGED);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn registers_go_to_gdb_and_back_and_flags_stay_safe() {
        let mut state = CpuState::default();
        (state.registers.rax, state.registers.rsp, state.registers.r15) = (1, 2, 3);
        (state.registers.rip, state.registers.rflags) = (4, 0x202);
        let mut fpu = vec![0; 576];
        fpu[24..28].copy_from_slice(&0x1f80_u32.to_le_bytes());
        fpu[160] = 7;
        let mut registers = from(&state, &fpu);
        assert_eq!((registers.regs[0], registers.regs[7], registers.regs[15]), (1, 2, 3));
        assert_eq!((registers.mxcsr, registers.xmm[0], registers.rip), (0x1f80, 7, 4));
        registers.regs[0] = 9;
        registers.eflags = u32::MAX;
        let mut changed = state;
        into(&registers, &mut changed);
        assert_eq!(changed.registers.rax, 9);
        assert_eq!(changed.registers.rflags, 0x202 | RFLAGS_CHANGED, "no TF, NT, IOPL, VM");
        assert_eq!(from(&state, &[]).mxcsr, 0, "an FPU that is not known is no error");
    }
}

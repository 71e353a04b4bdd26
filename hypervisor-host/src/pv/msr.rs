//! Model-specific registers, as Xen emulates them for a PV guest (`emul-priv-op.c`).

use super::cpu::Cpu;
use super::traps::is_canonical;

const TIME_STAMP_COUNTER: u32 = 0x10;
const PLATFORM_ID: u32 = 0x17;
const PLATFORM_INFO: u32 = 0xce;
const MISC_FEATURES_ENABLES: u32 = 0x140;
const MCG_CAP: u32 = 0x179;
const MCG_STATUS: u32 = 0x17a;
const PERF_CAPABILITIES: u32 = 0x345;
const MC0_CTL: u32 = 0x400;
const HYPERCALL_PAGE: u32 = 0x4000_0000;
const APIC_BASE: u32 = 0x1b;
const BIOS_SIGN_ID: u32 = 0x8b;
const MISC_ENABLE: u32 = 0x1a0;
const DEBUGCTL: u32 = 0x1d9;
const PAT: u32 = 0x277;
const EFER: u32 = 0xc000_0080;
const FS_BASE: u32 = 0xc000_0100;
const GS_BASE: u32 = 0xc000_0101;
const KERNEL_GS_BASE: u32 = 0xc000_0102;

/// SCE, LME, LMA, NX.
const EFER_VALUE: u64 = 1 | 1 << 8 | 1 << 10 | 1 << 11;
/// The PAT that Xen sets for all (`XEN_MSR_PAT`).
const PAT_VALUE: u64 = 0x0000_0501_0007_0406;

/// Reads one; `None`: #GP.
pub(crate) fn read(cpu: &Cpu, index: u32) -> Option<u64> {
    let registers = &cpu.state.registers;
    Some(match index {
        FS_BASE => registers.fs_base,
        GS_BASE => registers.gs_base,
        KERNEL_GS_BASE => cpu.state.other_gs_base,
        EFER => EFER_VALUE,
        // The bootstrap processor's, enabled.
        APIC_BASE => 0xfee0_0900 & if cpu.index == 0 { u64::MAX } else { !0x100 },
        PAT => PAT_VALUE,
        // Fast strings; no performance monitoring, no BTS, no PEBS.
        MISC_ENABLE => 1 | 1 << 11 | 1 << 12,
        TIME_STAMP_COUNTER => super::timers::tsc(),
        // There, and nothing of it: no banks for machine checks, no features to switch on, no page yet.
        PLATFORM_ID
        | BIOS_SIGN_ID
        | DEBUGCTL
        | PLATFORM_INFO
        | MISC_FEATURES_ENABLES
        | MCG_CAP
        | MCG_STATUS
        | PERF_CAPABILITIES
        | MC0_CTL
        | HYPERCALL_PAGE => 0,
        _ => return None,
    })
}

/// Writes one; `None`: #GP.
pub(crate) fn write(cpu: &mut Cpu, index: u32, value: u64) -> Option<()> {
    let state = &mut cpu.state;
    match index {
        FS_BASE if is_canonical(value) => state.registers.fs_base = value,
        GS_BASE if is_canonical(value) => state.registers.gs_base = value,
        KERNEL_GS_BASE if is_canonical(value) => state.other_gs_base = value,
        // Kept as they are: a write of the same is nothing, and one of BIOS_SIGN_ID precedes a read.
        EFER if value == EFER_VALUE => {}
        PAT if value == PAT_VALUE => {}
        BIOS_SIGN_ID | MISC_ENABLE | MCG_CAP | MCG_STATUS | MC0_CTL => {}
        // No branch is recorded: off it may be switched.
        DEBUGCTL if value == 0 => {}
        _ => return None,
    }
    Some(())
}

//! What the CPU says of itself, and single instructions that every platform may execute.
//!
//! CPUID leaves the virtual machine (7 us and more), so each leaf is asked for once.
// UNSAFETY: `rdtsc` is an intrinsic without conditions, which Rust still calls unsafe.
#![expect(unsafe_code, reason = "CPU intrinsics")]

use core::arch::x86_64::{__cpuid, CpuidResult};

/// The first CPUID leaf of a hypervisor; its registers hold the highest leaf and the signature.
pub const HYPERVISOR_LEAF: u32 = 0x4000_0000;
/// KVM's signature in EBX, ECX, EDX (`Documentation/virt/kvm/x86/cpuid.rst`).
pub const KVM: [u8; 12] = *b"KVMKVMKVM\0\0\0";
/// Xen's signature (`xen/include/public/arch-x86/cpuid.h`).
pub const XEN: [u8; 12] = *b"XenVMMXenVMM";

/// CPUID leaf `leaf`, subleaf 0. Not under Xen PV, where the instruction answers for the machine.
#[must_use]
pub fn cpuid(leaf: u32) -> CpuidResult {
    __cpuid(leaf)
}

/// ECX of CPUID leaf 1: the feature bits that set-up code looks at.
#[must_use]
pub fn features() -> u32 {
    cpuid(1).ecx
}

/// A hypervisor as CPUID shows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hypervisor {
    /// Its first leaf; 256 apart where a hypervisor shows several faces.
    pub base: u32,
    /// Its highest leaf.
    pub max: u32,
    /// Its name.
    pub signature: [u8; 12],
}

/// The hypervisors under this CPU, the most native face first; none on a bare machine.
pub fn hypervisors() -> impl Iterator<Item = Hypervisor> {
    const CPUID_HYPERVISOR: u32 = 1 << 31;
    const FACES: u32 = 4;
    let present = features() & CPUID_HYPERVISOR != 0;
    (0..if present { FACES } else { 0 }).map_while(|face| {
        let base = HYPERVISOR_LEAF + face * 0x100;
        let leaf = cpuid(base);
        // KVM once gave 0 as its highest leaf; a leaf that is not there answers with another one's values.
        let max = if leaf.eax == 0 && face == 0 { base + 1 } else { leaf.eax };
        (base..base + 0x100).contains(&max).then(|| {
            let mut signature = [0; 12];
            for (to, from) in signature.chunks_exact_mut(4).zip([leaf.ebx, leaf.ecx, leaf.edx]) {
                to.copy_from_slice(&from.to_le_bytes());
            }
            Hypervisor { base, max, signature }
        })
    })
}

/// The time stamp counter.
#[must_use]
#[inline]
pub fn rdtsc() -> u64 {
    // SAFETY: every x86-64 CPU has a TSC, and no platform here forbids reading it.
    unsafe { core::arch::x86_64::_rdtsc() }
}

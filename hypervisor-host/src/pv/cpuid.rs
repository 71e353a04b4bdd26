//! What the CPUID instruction says to a guest that asks through Xen: the host's leaves without what a process has not,
//! and Xen's own (`xen/include/public/arch-x86/cpuid.h`).
//!
//! The instruction leaves the virtual machine on virtualised hosts, for tens of microseconds: each leaf is asked once.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use core::arch::x86_64::__cpuid_count;
use janus_proto::abi::xen::cpuid::{
    LEAF_HYPERCALL, LEAF_PV, LEAF_TIME, LEAF_VERSION, XEN_CPUID_FIRST_LEAF,
    XEN_CPUID_SIGNATURE_EBX, XEN_CPUID_SIGNATURE_ECX, XEN_CPUID_SIGNATURE_EDX,
};
use janus_proto::abi::xen::shared_info::VcpuTimeInfo;
use janus_proto::pvclock;

use super::version::VERSION;

/// eax, ebx, ecx, edx.
pub(crate) type Leaf = [u32; 4];

/// Leaf 1, ecx: DTES64, MONITOR, DS-CPL, VMX, SMX, EST, TM2, xTPR, PDCM, PCID, DCA, x2APIC, TSC deadline.
const LEAF_1_ECX_HIDDEN: u32 = 0x0126_c1fc;
/// Leaf 1, ecx: a hypervisor is there.
const HYPERVISOR: u32 = 1 << 31;
/// Leaf 1, edx: VME, PSE, SEP, MTRR, PGE, PSE36, DS, ACPI, TM, PBE: a PV guest has none.
const LEAF_1_EDX_HIDDEN: u32 = 0xa062_380a;
/// Leaf 7, ebx: SMEP, INVPCID, PQM, RDT-A, SMAP, PT, SGX, HLE, RTM.
const LEAF_7_EBX_HIDDEN: u32 = 0x0210_9494 | 1 << 11;
/// Leaf 7, ecx: UMIP, PKU, OSPKE, WAITPKG, LA57, SGX-LC, PKS.
const LEAF_7_ECX_HIDDEN: u32 = 0xc001_003c;
/// Leaf 0x8000_0001, ecx: SVM and what goes with it.
const EXTENDED_ECX_HIDDEN: u32 = 1 << 2 | 1 << 3 | 1 << 12 | 1 << 13;
/// Leaf 0x8000_0001, edx: PSE, PGE, PSE36, 1 GiB pages, RDTSCP.
const EXTENDED_EDX_HIDDEN: u32 = 1 << 3 | 1 << 13 | 1 << 17 | 1 << 26 | 1 << 27;

static CACHE: Mutex<Option<HashMap<(u32, u32), Leaf>>> = Mutex::new(None);

fn host(leaf: u32, subleaf: u32) -> Leaf {
    let mut cache = CACHE.lock().unwrap_or_else(PoisonError::into_inner);
    let known = cache.get_or_insert_default();
    // A guest cannot make it grow for ever.
    if known.len() > 1024 {
        known.clear();
    }
    *known.entry((leaf, subleaf)).or_insert_with(|| {
        let answer = __cpuid_count(leaf, subleaf);
        [answer.eax, answer.ebx, answer.ecx, answer.edx]
    })
}

/// The answer for a guest.
pub(crate) fn leaf(leaf: u32, subleaf: u32, time: &VcpuTimeInfo, os_xsave: bool) -> Leaf {
    const LAST_XEN_LEAF: u32 = XEN_CPUID_FIRST_LEAF + LEAF_PV;
    match leaf {
        0x4000_0000..=0x4fff_ffff if leaf > LAST_XEN_LEAF => [0; 4],
        0x4000_0000..=0x4fff_ffff => xen(leaf - XEN_CPUID_FIRST_LEAF, subleaf, time),
        0x8000_0000.. if leaf > host(0x8000_0000, 0)[0] => [0; 4],
        0..0x4000_0000 if leaf > host(0, 0)[0] => [0; 4],
        1 => {
            let [eax, ebx, ecx, edx] = host(1, 0);
            let os = 1 << 27;
            let ecx = (ecx & !LEAF_1_ECX_HIDDEN & !os) | HYPERVISOR | if os_xsave { os } else { 0 };
            [eax, ebx, ecx, edx & !LEAF_1_EDX_HIDDEN]
        }
        7 if subleaf == 0 => {
            let [eax, ebx, ecx, edx] = host(7, 0);
            [eax, ebx & !LEAF_7_EBX_HIDDEN, ecx & !LEAF_7_ECX_HIDDEN, edx]
        }
        // Monitoring, performance counters, trace, SGX: none.
        5 | 6 | 0xa | 0xf | 0x10 | 0x12 | 0x14 => [0; 4],
        0x8000_0001 => {
            let [eax, ebx, ecx, edx] = host(leaf, 0);
            [eax, ebx, ecx & !EXTENDED_ECX_HIDDEN, edx & !EXTENDED_EDX_HIDDEN]
        }
        _ => host(leaf, if has_subleaves(leaf) { subleaf } else { 0 }),
    }
}

fn has_subleaves(leaf: u32) -> bool {
    matches!(leaf, 4 | 7 | 0xb | 0xd | 0x14 | 0x17 | 0x18 | 0x1f | 0x8000_001d)
}

fn xen(leaf: u32, subleaf: u32, time: &VcpuTimeInfo) -> Leaf {
    match leaf {
        0 => [
            XEN_CPUID_FIRST_LEAF + LEAF_PV,
            XEN_CPUID_SIGNATURE_EBX,
            XEN_CPUID_SIGNATURE_ECX,
            XEN_CPUID_SIGNATURE_EDX,
        ],
        LEAF_VERSION => [VERSION, 0, 0, 0],
        // One page, installed by this MSR; features: MMU_PT_UPDATE_PRESERVE_AD.
        LEAF_HYPERCALL => [1, 0x4000_0000, 1, 0],
        LEAF_TIME => match subleaf {
            0 => {
                let khz = u32::try_from(pvclock::tsc_khz(time)).unwrap_or(u32::MAX);
                // Not emulated, mode 0 (default), incarnation 0.
                [1 << 1, 0, khz, 0]
            }
            1 => {
                let offset = time.tsc_timestamp;
                let low = u32::try_from(offset & 0xffff_ffff).unwrap_or(0);
                let high = u32::try_from(offset >> 32).unwrap_or(0);
                [low, high, time.tsc_to_system_mul, i32::from(time.tsc_shift).cast_unsigned()]
            }
            _ => [0; 4],
        },
        // Machine addresses are below 2^52; a grant table of version 2 can hold them.
        LEAF_PV => [0, 52, 0, 0],
        _ => [0; 4],
    }
}

#[cfg(test)]
mod tests {
    use zerocopy::FromZeros as _;

    use super::*;

    #[test]
    fn xens_leaves_are_xens_and_there_are_no_others() {
        let time = VcpuTimeInfo::new_zeroed();
        let first = leaf(0x4000_0000, 0, &time, false);
        let signature: Vec<u8> = first[1..].iter().flat_map(|word| word.to_le_bytes()).collect();
        assert_eq!((first[0], signature.as_slice()), (0x4000_0005, b"XenVMMXenVMM".as_slice()));
        assert_eq!(leaf(0x4000_0001, 0, &time, false), [0x4_0011, 0, 0, 0]);
        for beyond in [0x4000_0006, 0x4000_0100, 0x4fff_ffff, 0x3fff_ffff, 0xffff_ffff] {
            assert_eq!(leaf(beyond, 0, &time, false), [0; 4], "{beyond:#x}");
        }
    }

    #[test]
    #[cfg_attr(miri, ignore = "Miri has no CPUID")]
    fn a_guest_sees_a_hypervisor_and_nothing_of_what_it_has_not() {
        let time = VcpuTimeInfo::new_zeroed();
        let [_, _, ecx, edx] = leaf(1, 0, &time, false);
        assert!(ecx & HYPERVISOR != 0 && ecx & (1 << 5 | 1 << 21 | 1 << 27) == 0);
        assert_eq!(edx & (1 << 3 | 1 << 13), 0);
        assert_ne!(leaf(1, 0, &time, true)[2] & 1 << 27, 0);
        assert_eq!(leaf(0, 0, &time, false), leaf(0, 7, &time, false));
    }
}

//! What CPU the guest sees: the host's features as far as KVM virtualises them, less what is kept from guests here.
//!
//! Ref: Intel SDM volume 2, CPUID; Linux `Documentation/virt/kvm/x86/cpuid.rst`.

use kvm_bindings::{CpuId, kvm_cpuid_entry2};

/// Leaf 1, ECX: MONITOR, VMX (a guest is no host), SMX, and PDCM: no performance counters are promised.
const NOT_IN_1_ECX: u32 = 1 << 3 | 1 << 5 | 1 << 6 | 1 << 15;
/// Leaf 1, ECX: the timer by TSC deadline, and "there is a hypervisor".
const TSC_DEADLINE: u32 = 1 << 24;
const HYPERVISOR: u32 = 1 << 31;
/// Leaf 1, EDX: more than one CPU in the package.
const HTT: u32 = 1 << 28;
/// Leaf 0x8000_0001, ECX: SVM.
const SVM: u32 = 1 << 2;
/// The leaf behind KVM's own with the rates of the clocks in kHz, which VMware began and KVM's documents keep.
const CLOCKS: u32 = 0x4000_0010;
/// The rate of the APIC timer in KVM, in kHz.
const APIC_KHZ: u32 = 1_000_000;

/// What a CPU's identification depends on.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Cpu {
    /// Its APIC id.
    pub(crate) id: u32,
    /// How many there are.
    pub(crate) count: u32,
    /// The TSC's rate in kHz.
    pub(crate) tsc_khz: u32,
    /// Whether its timer can be set by the TSC.
    pub(crate) tsc_deadline: bool,
}

fn bits(count: u32) -> u32 {
    count.next_power_of_two().trailing_zeros()
}

/// Makes of what KVM supports what this CPU shows.
pub(crate) fn filter(cpuid: &mut CpuId, cpu: Cpu) {
    let entries = cpuid.as_mut_slice();
    for entry in &mut *entries {
        change(entry, cpu);
    }
    // The table may be full; then the guest measures.
    if cpu.tsc_khz != 0 && !entries.iter().any(|entry| entry.function == CLOCKS) {
        let clocks = kvm_cpuid_entry2 {
            function: CLOCKS,
            eax: cpu.tsc_khz,
            ebx: APIC_KHZ,
            ..kvm_cpuid_entry2::default()
        };
        if cpuid.push(clocks).is_ok()
            && let Some(first) =
                cpuid.as_mut_slice().iter_mut().find(|entry| entry.function == 0x4000_0000)
        {
            first.eax = first.eax.max(CLOCKS);
        }
    }
}

fn change(entry: &mut kvm_cpuid_entry2, cpu: Cpu) {
    match entry.function {
        1 => {
            // EBX: APIC id, number of logical CPUs, CLFLUSH line; the last byte is the host's own.
            entry.ebx = entry.ebx & 0xffff | (cpu.count & 0xff) << 16 | cpu.id << 24;
            entry.ecx = entry.ecx & !NOT_IN_1_ECX | HYPERVISOR;
            if cpu.tsc_deadline {
                entry.ecx |= TSC_DEADLINE;
            }
            if cpu.count > 1 {
                entry.edx |= HTT;
            }
        }
        // Caches: each core has its own but the last; cores of the package less one.
        4 if entry.eax & 0x1f != 0 => {
            let level = entry.eax >> 5 & 7;
            let sharing = if level >= 3 { cpu.count - 1 } else { 0 };
            entry.eax =
                entry.eax & 0x3fff | (sharing & 0xfff) << 14 | ((cpu.count - 1) & 0x3f) << 26;
        }
        // Performance counters: none.
        0xa => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0),
        // Topology: threads of a core (one), then cores of the package.
        0xb | 0x1f => {
            let (shift, count, kind) = match entry.index {
                0 => (0, 1, 1),
                1 => (bits(cpu.count), cpu.count, 2),
                _ => (0, 0, 0),
            };
            (entry.eax, entry.ebx) = (shift, count);
            (entry.ecx, entry.edx) = (entry.index | kind << 8, cpu.id);
        }
        0x8000_0001 => entry.ecx &= !SVM,
        0x8000_0008 => entry.ecx = bits(cpu.count) << 12 | (cpu.count - 1) & 0xff,
        // SVM's features.
        0x8000_000a => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0),
        0x8000_001e => (entry.eax, entry.ebx, entry.ecx) = (cpu.id, cpu.id, 0),
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(function: u32, index: u32) -> kvm_cpuid_entry2 {
        let ones = kvm_cpuid_entry2 { function, index, ..Default::default() };
        kvm_cpuid_entry2 { eax: u32::MAX, ebx: u32::MAX, ecx: u32::MAX, edx: u32::MAX, ..ones }
    }

    #[test]
    fn guests_see_no_virtualisation_of_their_own_and_their_own_number() {
        let kvm =
            kvm_cpuid_entry2 { function: 0x4000_0000, eax: 0x4000_0001, ..Default::default() };
        let entries = [entry(1, 0), entry(0xb, 1), entry(0x8000_0001, 0), entry(0xa, 0), kvm];
        let mut cpuid = CpuId::from_entries(&entries).unwrap();
        filter(&mut cpuid, Cpu { id: 2, count: 3, tsc_khz: 2_600_000, tsc_deadline: true });
        let [one, topology, extended, counters, kvm, clocks] = cpuid.as_slice() else { panic!() };
        assert_eq!(one.ecx & NOT_IN_1_ECX, 0);
        assert_eq!(one.ecx & (TSC_DEADLINE | HYPERVISOR), TSC_DEADLINE | HYPERVISOR);
        assert_eq!((one.ebx >> 24, one.ebx >> 16 & 0xff), (2, 3));
        assert_eq!((topology.eax, topology.ebx, topology.edx), (2, 3, 2));
        assert_eq!(extended.ecx & SVM, 0);
        assert_eq!(counters.eax, 0);
        assert_eq!((kvm.eax, clocks.eax, clocks.ebx), (CLOCKS, 2_600_000, APIC_KHZ));
    }
}

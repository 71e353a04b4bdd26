//! CPUID leaves of Xen (`xen/include/public/arch-x86/cpuid.h`).
//!
//! The base is [`XEN_CPUID_FIRST_LEAF`], or a multiple of 0x100 above it when Xen also shows Viridian leaves.

/// First leaf: `eax` is the last leaf, then the signature.
pub const XEN_CPUID_FIRST_LEAF: u32 = 0x4000_0000;

/// "XenV".
pub const XEN_CPUID_SIGNATURE_EBX: u32 = 0x566e_6558;

/// "MMXe".
pub const XEN_CPUID_SIGNATURE_ECX: u32 = 0x6558_4d4d;

/// "nVMM".
pub const XEN_CPUID_SIGNATURE_EDX: u32 = 0x4d4d_566e;

/// Offset of the version leaf: `eax` is major << 16 | minor.
pub const LEAF_VERSION: u32 = 1;
/// Offset of the hypercall leaf: `eax` pages, `ebx` the MSR that installs the hypercall page.
pub const LEAF_HYPERCALL: u32 = 2;
/// Offset of the time leaf; sub-leaf 0: `ecx` is the guest TSC frequency in kHz.
pub const LEAF_TIME: u32 = 3;
/// Offset of the HVM leaf: `eax` is [`HvmCpuidFlags`], `ebx` the vCPU id, `ecx` the domain id.
pub const LEAF_HVM: u32 = 4;
/// Offset of the PV leaf.
pub const LEAF_PV: u32 = 5;

open_flags! {
    /// `eax` of [`LEAF_HVM`] (`XEN_HVM_CPUID_*`).
    pub struct HvmCpuidFlags: u32 {
        /// Virtualised APIC registers.
        const APIC_ACCESS_VIRT = 1 << 0;
        /// Virtualised x2APIC.
        const X2APIC_VIRT = 1 << 1;
        /// Foreign memory has IOMMU entries.
        const IOMMU_MAPPINGS = 1 << 2;
        /// `ebx` is valid.
        const VCPU_ID_PRESENT = 1 << 3;
        /// `ecx` is valid.
        const DOMID_PRESENT = 1 << 4;
        /// 15-bit destination ids.
        const EXT_DEST_ID = 1 << 5;
        /// Per-vCPU upcall vectors work with physical interrupts.
        const UPCALL_VECTOR = 1 << 6;
    }
}

//! HVM and PVH guests (`xen/include/public/hvm/{hvm_op,params}.h`, `arch-x86/hvm/start_info.h`).

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::addr::DomId;

open_enum! {
    /// First argument of `Hypercall::HVM_OP` (`HVMOP_*`).
    pub enum HvmOp: u32 {
        /// [`HvmParamValue`].
        SET_PARAM = 0,
        /// [`HvmParamValue`].
        GET_PARAM = 1,
        /// Flushes the TLBs of all vCPUs. No argument.
        FLUSH_TLBS = 5,
        /// A hint.
        PAGETABLE_DYING = 9,
        /// [`EvtchnUpcallVector`].
        SET_EVTCHN_UPCALL_VECTOR = 23,
    }
}

open_enum! {
    /// Parameters (`HVM_PARAM_*`).
    pub enum HvmParam: u32 {
        /// How events are delivered; see [`callback_vector`].
        CALLBACK_IRQ = 0,
        /// Frame of the xenstore ring.
        STORE_PFN = 1,
        /// Its port.
        STORE_EVTCHN = 2,
        /// Frame of the console ring.
        CONSOLE_PFN = 17,
        /// Its port.
        CONSOLE_EVTCHN = 18,
        /// Address of the VM generation id.
        VM_GENERATION_ID_ADDR = 34,
    }
}

/// Reads or writes a parameter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct HvmParamValue {
    /// Normally `DomId::SELF`.
    pub domid: DomId,
    /// Zero.
    pub pad: u16,
    /// Which.
    pub index: HvmParam,
    /// IN or OUT.
    pub value: u64,
}
assert_layout!(HvmParamValue, size = 16, domid = 0, pad = 2, index = 4, value = 8);

/// [`VcpuHvmContext::mode`]: the CPU starts in 64-bit mode.
pub const VCPU_HVM_MODE_64B: u32 = 1;

/// The first state of a CPU (`hvm/hvm_vcpu.h`, `struct vcpu_hvm_context`), in its 64-bit form: flat segments.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
#[expect(missing_docs, reason = "most fields are the registers they are named after")]
pub struct VcpuHvmContext {
    /// [`VCPU_HVM_MODE_64B`].
    pub mode: u32,
    /// Zero.
    pub pad: u32,
    pub rax: u64,
    pub rcx: u64,
    pub rdx: u64,
    pub rbx: u64,
    pub rsp: u64,
    pub rbp: u64,
    pub rsi: u64,
    pub rdi: u64,
    pub rip: u64,
    pub rflags: u64,
    pub cr0: u64,
    pub cr3: u64,
    pub cr4: u64,
    pub efer: u64,
    /// The 32-bit form is longer by this.
    pub rest: [u8; 8],
}
assert_layout!(
    VcpuHvmContext,
    size = 128,
    mode = 0,
    rax = 8,
    rsp = 40,
    rdi = 64,
    rip = 72,
    rflags = 80,
    cr0 = 88,
    cr3 = 96,
    cr4 = 104,
    efer = 112
);

/// The value of [`HvmParam::CALLBACK_IRQ`] for delivery through an interrupt vector of every vCPU.
#[must_use]
pub const fn callback_vector(vector: u8) -> u64 {
    // `HVM_PARAM_CALLBACK_TYPE_VECTOR` in bits 56..64.
    2 << 56 | vector as u64
}

/// Delivers events of one vCPU through its own vector.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct EvtchnUpcallVector {
    /// Which vCPU.
    pub vcpu: u32,
    /// Vector.
    pub vector: u8,
    /// Padding; zero.
    pub pad0: [u8; 3],
}
assert_layout!(EvtchnUpcallVector, size = 8, vcpu = 0, vector = 4);

/// [`HvmStartInfo::magic`].
pub const XEN_HVM_START_MAGIC_VALUE: u32 = 0x336e_c578;

/// What the PVH entry finds in `ebx`. The last three fields exist from version 1 on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct HvmStartInfo {
    /// [`XEN_HVM_START_MAGIC_VALUE`].
    pub magic: u32,
    /// 0 or 1.
    pub version: u32,
    /// `start_info::StartFlags`.
    pub flags: u32,
    /// Modules.
    pub nr_modules: u32,
    /// Physical address of an array of [`HvmModlistEntry`].
    pub modlist_paddr: u64,
    /// Physical address of the command line.
    pub cmdline_paddr: u64,
    /// Physical address of the ACPI RSDP.
    pub rsdp_paddr: u64,
    /// Physical address of an array of [`HvmMemmapTableEntry`].
    pub memmap_paddr: u64,
    /// Its length; 0 for none.
    pub memmap_entries: u32,
    /// Zero.
    pub reserved: u32,
}
assert_layout!(
    HvmStartInfo,
    size = 56,
    magic = 0,
    version = 4,
    flags = 8,
    nr_modules = 12,
    modlist_paddr = 16,
    cmdline_paddr = 24,
    rsdp_paddr = 32,
    memmap_paddr = 40,
    memmap_entries = 48,
    reserved = 52
);

/// A module.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct HvmModlistEntry {
    /// Physical address.
    pub paddr: u64,
    /// Bytes.
    pub size: u64,
    /// Physical address of its command line, or 0.
    pub cmdline_paddr: u64,
    /// Zero.
    pub reserved: u64,
}
assert_layout!(HvmModlistEntry, size = 32, paddr = 0, size = 8, cmdline_paddr = 16, reserved = 24);

open_enum! {
    /// Kind of memory (`XEN_HVM_MEMMAP_TYPE_*`), as in E820.
    pub enum MemmapType: u32 {
        /// Usable.
        RAM = 1,
        /// Reserved.
        RESERVED = 2,
        /// ACPI tables.
        ACPI = 3,
        /// ACPI non-volatile storage.
        NVS = 4,
        /// Broken.
        UNUSABLE = 5,
        /// Disabled.
        DISABLED = 6,
        /// Persistent memory.
        PMEM = 7,
    }
}

/// A range of memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct HvmMemmapTableEntry {
    /// First byte.
    pub addr: u64,
    /// Bytes.
    pub size: u64,
    /// Kind.
    pub kind: MemmapType,
    /// Zero.
    pub reserved: u32,
}
assert_layout!(HvmMemmapTableEntry, size = 24, addr = 0, size = 8, kind = 16, reserved = 20);

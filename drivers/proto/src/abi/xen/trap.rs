//! Traps, registers and segments of a PV guest (`xen/include/public/arch-x86/{xen,xen-x86_64}.h`).

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// An entry of the virtual IDT.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct TrapInfo {
    /// Vector.
    pub vector: u8,
    /// Bits 0-1: least privilege that may call it; bit 2: enter with events masked.
    pub flags: u8,
    /// Code selector.
    pub cs: u16,
    /// Padding; zero.
    pub pad0: [u8; 4],
    /// Handler.
    pub address: u64,
}
assert_layout!(TrapInfo, size = 16, vector = 0, flags = 1, cs = 2, address = 8);

/// What `Hypercall::IRET` pops from the stack.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct IretContext {
    /// Register.
    pub rax: u64,
    /// Register.
    pub r11: u64,
    /// Register.
    pub rcx: u64,
    /// [`VGCF_IN_SYSCALL`] to return by `sysret`.
    pub flags: u64,
    /// Where to.
    pub rip: u64,
    /// Code selector.
    pub cs: u64,
    /// Flags; IF unmasks events.
    pub rflags: u64,
    /// Stack.
    pub rsp: u64,
    /// Stack selector.
    pub ss: u64,
}
assert_layout!(
    IretContext,
    size = 72,
    rax = 0,
    r11 = 8,
    rcx = 16,
    flags = 24,
    rip = 32,
    cs = 40,
    rflags = 48,
    rsp = 56,
    ss = 64
);

/// [`IretContext::flags`]: `rcx` and `r11` need not be restored.
pub const VGCF_IN_SYSCALL: u64 = 1 << 8;

/// Registers of a vCPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct CpuUserRegs {
    /// Register.
    pub r15: u64,
    /// Register.
    pub r14: u64,
    /// Register.
    pub r13: u64,
    /// Register.
    pub r12: u64,
    /// Register.
    pub rbp: u64,
    /// Register.
    pub rbx: u64,
    /// Register.
    pub r11: u64,
    /// Register.
    pub r10: u64,
    /// Register.
    pub r9: u64,
    /// Register.
    pub r8: u64,
    /// Register.
    pub rax: u64,
    /// Register.
    pub rcx: u64,
    /// Register.
    pub rdx: u64,
    /// Register.
    pub rsi: u64,
    /// Register.
    pub rdi: u64,
    /// Private to Xen.
    pub error_code: u32,
    /// Private to Xen.
    pub entry_vector: u32,
    /// Instruction pointer.
    pub rip: u64,
    /// Code selector.
    pub cs: u16,
    /// Zero.
    pub pad_cs: u16,
    /// Events masked on entry.
    pub saved_upcall_mask: u8,
    /// Zero.
    pub pad_mask: [u8; 3],
    /// Flags.
    pub rflags: u64,
    /// Stack.
    pub rsp: u64,
    /// Stack selector, in the low 16 bits.
    pub ss: u64,
    /// Selector.
    pub es: u64,
    /// Selector.
    pub ds: u64,
    /// Selector.
    pub fs: u64,
    /// Selector.
    pub gs: u64,
}
assert_layout!(
    CpuUserRegs,
    size = 200,
    r15 = 0,
    r14 = 8,
    r13 = 16,
    r12 = 24,
    rbp = 32,
    rbx = 40,
    r11 = 48,
    r10 = 56,
    r9 = 64,
    r8 = 72,
    rax = 80,
    rcx = 88,
    rdx = 96,
    rsi = 104,
    rdi = 112,
    error_code = 120,
    entry_vector = 124,
    rip = 128,
    cs = 136,
    pad_cs = 138,
    saved_upcall_mask = 140,
    pad_mask = 141,
    rflags = 144,
    rsp = 152,
    ss = 160,
    es = 168,
    ds = 176,
    fs = 184,
    gs = 192
);

/// Initial state of a PV vCPU (`VcpuOp::INITIALISE`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct VcpuGuestContext {
    /// FXSAVE image.
    pub fpu_ctxt: [u8; 512],
    /// [`ContextFlags`].
    pub flags: u64,
    /// Registers.
    pub user_regs: CpuUserRegs,
    /// Virtual IDT.
    pub trap_ctxt: [TrapInfo; 256],
    /// LDT address.
    pub ldt_base: u64,
    /// LDT entries.
    pub ldt_ents: u64,
    /// Machine frames of the GDT.
    pub gdt_frames: [u64; 16],
    /// GDT entries.
    pub gdt_ents: u64,
    /// Kernel stack selector.
    pub kernel_ss: u64,
    /// Kernel stack.
    pub kernel_sp: u64,
    /// CR0 to CR7; CR1 is the user page table.
    pub ctrlreg: [u64; 8],
    /// DR0 to DR7.
    pub debugreg: [u64; 8],
    /// Event upcall.
    pub event_callback_eip: u64,
    /// Failsafe callback.
    pub failsafe_callback_eip: u64,
    /// `syscall` from user mode.
    pub syscall_callback_eip: u64,
    /// Assists.
    pub vm_assist: u64,
    /// FS base.
    pub fs_base: u64,
    /// Kernel GS base.
    pub gs_base_kernel: u64,
    /// User GS base.
    pub gs_base_user: u64,
}
assert_layout!(
    VcpuGuestContext,
    size = 5168,
    fpu_ctxt = 0,
    flags = 512,
    user_regs = 520,
    trap_ctxt = 720,
    ldt_base = 4816,
    ldt_ents = 4824,
    gdt_frames = 4832,
    gdt_ents = 4960,
    kernel_ss = 4968,
    kernel_sp = 4976,
    ctrlreg = 4984,
    debugreg = 5048,
    event_callback_eip = 5112,
    failsafe_callback_eip = 5120,
    syscall_callback_eip = 5128,
    vm_assist = 5136,
    fs_base = 5144,
    gs_base_kernel = 5152,
    gs_base_user = 5160
);

open_flags! {
    /// [`VcpuGuestContext::flags`] (`VGCF_*`).
    pub struct ContextFlags: u64 {
        /// `fpu_ctxt` is valid.
        const I387_VALID = 1 << 0;
        /// Start in kernel mode.
        const IN_KERNEL = 1 << 2;
        /// Mask events on the failsafe callback.
        const FAILSAFE_DISABLES_EVENTS = 1 << 3;
        /// Mask events on `syscall`.
        const SYSCALL_DISABLES_EVENTS = 1 << 4;
        /// The vCPU is up.
        const ONLINE = 1 << 5;
    }
}

open_enum! {
    /// First argument of `Hypercall::SET_SEGMENT_BASE` (`SEGBASE_*`).
    pub enum SegmentBase: u32 {
        /// FS.
        FS = 0,
        /// GS of user mode.
        GS_USER = 1,
        /// GS of kernel mode.
        GS_KERNEL = 2,
        /// Selector of user GS.
        GS_USER_SEL = 3,
    }
}

/// Flat 64-bit code, kernel and user alike, in ring 3.
pub const FLAT_RING3_CS64: u16 = 0xe033;

/// Flat 32-bit code.
pub const FLAT_RING3_CS32: u16 = 0xe023;

/// Flat stack.
pub const FLAT_RING3_SS64: u16 = 0xe02b;

/// Null selector for data.
pub const FLAT_RING3_DS64: u16 = 0;

/// Flat 32-bit data.
pub const FLAT_RING3_DS32: u16 = 0xe02b;

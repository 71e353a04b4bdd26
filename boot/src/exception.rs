//! Exceptions before the kernel has traps: print the frame and end the guest, rather than a silent
//! triple fault (native) or a domain crash without a word (PV).
// UNSAFETY: loads an IDT, a TSS and Xen's trap table, reads cr2, reads the interrupted frame.
#![expect(unsafe_code, reason = "descriptor tables and the exception frame")]

use crate::early::{self, EarlyConsole};
use crate::hypercall::{self, Gate, hypercall};
use core::arch::{asm, global_asm};
use core::cell::UnsafeCell;
use core::fmt::Write;
use core::sync::atomic::{AtomicBool, Ordering};

global_asm!(include_str!("entry/exceptions.s"), options(raw));

/// What the stubs leave on the stack, lowest address first.
#[repr(C)]
#[derive(Debug)]
struct Frame {
    r15: u64,
    r14: u64,
    r13: u64,
    r12: u64,
    r11: u64,
    r10: u64,
    r9: u64,
    r8: u64,
    rdi: u64,
    rsi: u64,
    rbp: u64,
    rbx: u64,
    rdx: u64,
    rcx: u64,
    rax: u64,
    vector: u64,
    error_code: u64,
    rip: u64,
    cs: u64,
    rflags: u64,
    rsp: u64,
    ss: u64,
}

static REPORTED: AtomicBool = AtomicBool::new(false);

#[unsafe(no_mangle)]
extern "C" fn early_exception(frame: &Frame) -> ! {
    // A second fault, in the report itself: no more words.
    if !REPORTED.swap(true, Ordering::Relaxed) {
        let cr2: u64;
        // SAFETY: reads a register; under PV Xen emulates the instruction.
        unsafe { asm!("mov {}, cr2", out(reg) cr2, options(nomem, nostack)) };
        let mut console = EarlyConsole;
        // The early console cannot fail.
        let _ = writeln!(
            console,
            "janus: exception {} error {:#x} at rip {:#x} before the kernel has traps\n\
             janus: cr2 {cr2:#x} rsp {:#x} rflags {:#x} cs {:#x} ss {:#x}",
            frame.vector,
            frame.error_code,
            frame.rip,
            frame.rsp,
            frame.rflags,
            frame.cs & 0xffff,
            frame.ss
        );
        let _ = writeln!(
            console,
            "janus: rax {:#x} rbx {:#x} rcx {:#x} rdx {:#x} rsi {:#x} rdi {:#x} rbp {:#x}",
            frame.rax, frame.rbx, frame.rcx, frame.rdx, frame.rsi, frame.rdi, frame.rbp
        );
        let _ = writeln!(
            console,
            "janus: r8 {:#x} r9 {:#x} r10 {:#x} r11 {:#x} r12 {:#x} r13 {:#x} r14 {:#x} r15 {:#x}",
            frame.r8, frame.r9, frame.r10, frame.r11, frame.r12, frame.r13, frame.r14, frame.r15
        );
    }
    early::crash()
}

/// Bytes between the stubs of neighbouring vectors.
const STUB_SIZE: u64 = 16;
const VECTORS: usize = 32;

/// A table that is written once, before anything else runs, and then belongs to the CPU.
#[repr(C, align(16))]
struct BootTable<T>(UnsafeCell<T>);

// SAFETY: written by the one CPU that is up, in `load_*`, and read by hardware only.
unsafe impl<T> Sync for BootTable<T> {}

static IDT: BootTable<[[u64; 2]; VECTORS]> = BootTable(UnsafeCell::new([[0; 2]; VECTORS]));
static TSS: BootTable<[u32; 26]> = BootTable(UnsafeCell::new([0; 26]));

unsafe extern "C" {
    static early_stubs_native: u8;
    static early_stubs_pv: u8;
    static exception_stack_top: u8;
    static boot_gdt: u8;
}

/// Loads the early IDT of a native door, with a stack of its own for every vector.
pub(crate) fn load_native() {
    let stubs = (&raw const early_stubs_native).addr() as u64;
    let stack = (&raw const exception_stack_top).addr() as u64;
    let tss = TSS.0.get();
    let idt = IDT.0.get();
    let gdt =
        core::ptr::with_exposed_provenance_mut::<u64>((&raw const boot_gdt).expose_provenance());
    let tss_address = tss.expose_provenance() as u64;

    let mut tss_image = [0u32; 26];
    // IST1 is at byte 36; without an I/O bitmap its offset is the TSS's own size.
    let (low, high) = halves(stack);
    tss_image[9] = low;
    tss_image[10] = high;
    tss_image[25] = 104 << 16;
    // SAFETY: nothing else refers to the table yet (see `BootTable`).
    unsafe { tss.write(tss_image) };

    let mut gates = [[0u64; 2]; VECTORS];
    let mut handler = stubs;
    for gate in &mut gates {
        // Interrupt gate, selector 0x08, IST 1 (AMD64 volume 2, 4.8.4).
        *gate = [
            handler & 0xffff | 0x08 << 16 | 1 << 32 | 0x8e << 40 | (handler >> 16 & 0xffff) << 48,
            handler >> 32,
        ];
        handler += STUB_SIZE;
    }
    // SAFETY: as above.
    unsafe { idt.write(gates) };

    // Available 64-bit TSS at selector 0x18.
    let descriptor =
        103 | (tss_address & 0xff_ffff) << 16 | 0x89 << 40 | (tss_address >> 24 & 0xff) << 56;
    // SAFETY: the boot GDT has room for the two halves at 0x18 and nobody has loaded them yet.
    unsafe { gdt.add(3).write(descriptor) };
    // SAFETY: as above.
    unsafe { gdt.add(4).write(tss_address >> 32) };

    #[repr(C, packed)]
    struct Pointer {
        limit: u16,
        base: u64,
    }
    let pointer = Pointer { limit: 16 * 32 - 1, base: idt.expose_provenance() as u64 };
    // SAFETY: the table is complete and lives for ever.
    unsafe { asm!("lidt [{}]", in(reg) &raw const pointer, options(readonly, nostack)) };
    // SAFETY: selector 0x18 is the TSS written above.
    unsafe { asm!("ltr {0:x}", in(reg) 0x18u16, options(nostack)) };
}

fn halves(value: u64) -> (u32, u32) {
    #[expect(clippy::cast_possible_truncation, reason = "the low half is meant")]
    let low = value as u32;
    let high = (value >> 32) as u32;
    (low, high)
}

/// Registers the PV stubs with Xen (`arch-x86/xen.h`, `struct trap_info`).
pub(crate) fn load_pv() {
    #[repr(C)]
    #[derive(Clone, Copy)]
    struct TrapInfo {
        vector: u8,
        flags: u8,
        cs: u16,
        address: u64,
    }
    const FLAT_KERNEL_CS64: u16 = 0xe033;
    let mut table = [TrapInfo { vector: 0, flags: 0, cs: 0, address: 0 }; VECTORS + 1];
    let mut address = (&raw const early_stubs_pv).addr() as u64;
    let mut used = 0;
    for vector in 0u8..32 {
        // Vector 2 comes by nmi_op, and 15 and 22 to 31 do not exist under PV. A zero address ends
        // the table.
        if vector != 2
            && vector != 15
            && vector < 22
            && let Some(entry) = table.get_mut(used)
        {
            // Flag 4: mask events while the handler runs.
            *entry = TrapInfo { vector, flags: 4, cs: FLAT_KERNEL_CS64, address };
            used += 1;
        }
        address += STUB_SIZE;
    }
    let pointer = (&raw const table).expose_provenance() as u64;
    // SAFETY: Xen reads the table and copies it.
    let _ = unsafe { hypercall(Gate::Syscall, hypercall::SET_TRAP_TABLE, pointer, 0, 0) };
}

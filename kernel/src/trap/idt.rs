//! The native way into traps: interrupt descriptor table, task state segment, interrupt stacks.
//!
//! Double faults, NMIs and machine checks run on stacks of their own, so that a kernel stack that has
//! run into its guard page still gets a report (AMD64 volume 2, 8.9.4).
// UNSAFETY: loads descriptor tables; the entry stubs are assembly.
#![expect(unsafe_code, reason = "descriptor tables, entry stubs")]

use alloc::boxed::Box;
use core::cell::UnsafeCell;

use janus_proto::addr::PAGE_SIZE;
use x86_64::VirtAddr;
use x86_64::instructions::segmentation::{CS, DS, ES, SS, Segment};
use x86_64::instructions::tables::{lidt, load_tss};
use x86_64::registers::model_specific::GsBase;
use x86_64::structures::DescriptorTablePointer;
use x86_64::structures::gdt::{Descriptor, GlobalDescriptorTable};
use x86_64::structures::tss::TaskStateSegment;

use super::{DOUBLE_FAULT, MACHINE_CHECK, NMI};
use crate::percpu::{self, CpuId};

core::arch::global_asm!(
    include_str!("registers.s"),
    include_str!("entry.s"),
    include_str!("forget.s"),
    options(raw)
);

/// Bytes in each interrupt stack.
const IST_BYTES: usize = 2 * PAGE_SIZE;
/// Bytes between the stubs of neighbouring vectors (`entry.s`).
const STUB_BYTES: u64 = 16;

/// A stack in the image, for one kind of exception.
#[repr(C, align(16))]
struct IstStack(UnsafeCell<[u8; IST_BYTES]>);

/// The interrupt descriptor table as the hardware reads it: two words for each vector.
type Idt = [[u64; 2]; 256];

/// The segment tables of one CPU.
struct Tables {
    gdt: GlobalDescriptorTable,
    tss: TaskStateSegment,
}

/// The boot CPU's tables and stacks, written once and then the CPU's.
struct BootTables {
    tables: UnsafeCell<Tables>,
    idt: UnsafeCell<Idt>,
    stacks: [IstStack; 3],
}

// SAFETY: `init` writes it once, on the boot CPU, before anything else runs; then only the hardware uses it.
unsafe impl Sync for BootTables {}

static BOOT: BootTables = BootTables {
    tables: UnsafeCell::new(Tables {
        gdt: GlobalDescriptorTable::new(),
        tss: TaskStateSegment::new(),
    }),
    idt: UnsafeCell::new([[0; 2]; 256]),
    stacks: [const { IstStack(UnsafeCell::new([0; IST_BYTES])) }; 3],
};

fn stubs() -> VirtAddr {
    unsafe extern "C" {
        static trap_stubs: u8;
    }
    VirtAddr::from_ptr(&raw const trap_stubs)
}

/// Takes over exceptions and interrupts on the boot CPU: GDT, TSS, IDT, and the GS base for [`percpu`].
///
/// # Safety
/// Called once, first thing on the boot CPU, natively, with interrupts masked.
pub(crate) unsafe fn init() {
    // SAFETY: called once, before any table is loaded, so this is the only reference.
    let tables = unsafe { &mut *BOOT.tables.get() };
    // SAFETY: as above.
    let idt = unsafe { &mut *BOOT.idt.get() };

    let tops =
        BOOT.stacks.each_ref().map(|stack| VirtAddr::from_ptr(stack.0.get()) + IST_BYTES as u64);
    // SAFETY: `BOOT` is a static, and nothing but the hardware uses it from here on.
    unsafe { load_tables(tables, tops) };
    fill(idt);
    load_idt();
    if let Some(cpu) = percpu::prepare(CpuId(0)) {
        GsBase::write(VirtAddr::from_ptr(cpu));
        percpu::boot_cpu_ready();
    }
}

/// Takes over exceptions and interrupts on another CPU, with tables and stacks of its own.
///
/// # Safety
/// Called once on that CPU, natively, with interrupts masked, when its `PerCpu` is prepared.
pub(crate) unsafe fn init_other(cpu: &'static percpu::PerCpu) {
    // The heap masks interrupts by the flag alone, but finds its magazines by the GS base.
    GsBase::write(VirtAddr::from_ptr(core::ptr::from_ref(cpu)));
    load_idt();
    let tables = Box::leak(Box::new(Tables {
        gdt: GlobalDescriptorTable::new(),
        tss: TaskStateSegment::new(),
    }));
    let tops = [(); 3].map(|()| {
        // As at boot, a CPU without memory for its stacks cannot go on.
        let stack =
            crate::mm::stack::allocate(IST_BYTES).expect("memory for a CPU's interrupt stacks");
        VirtAddr::from_ptr(stack.as_ptr()) + IST_BYTES as u64
    });
    // SAFETY: leaked, so they live for good, and nothing but the hardware uses them from here on.
    unsafe { load_tables(tables, tops) };
}

/// Loads the segment tables of this CPU, with these tops of the stacks for exceptions that have their own.
///
/// # Safety
/// 1. `tables` are empty, live for good, and are not used otherwise. 2. The stacks are nobody else's.
unsafe fn load_tables(tables: &mut Tables, tops: [VirtAddr; 3]) {
    // The hardware's structure is packed: filled in as a copy.
    let mut ists = tables.tss.interrupt_stack_table;
    for (ist, top) in ists.iter_mut().zip(tops) {
        *ist = top;
    }
    tables.tss.interrupt_stack_table = ists;
    let code = tables.gdt.append(Descriptor::kernel_code_segment());
    let data = tables.gdt.append(Descriptor::kernel_data_segment());
    // SAFETY: the TSS lives as long as the descriptor (condition 1).
    let tss =
        tables.gdt.append(unsafe { Descriptor::tss_segment_unchecked(&raw const tables.tss) });
    // SAFETY: the GDT lives for good and is not changed any more (condition 1).
    unsafe { tables.gdt.load_unsafe() };
    // SAFETY: the code segment just loaded, 64-bit, ring 0.
    unsafe { CS::set_reg(code) };
    // SAFETY: the data segment just loaded.
    unsafe { SS::set_reg(data) };
    // SAFETY: as above; the loader's selectors would be meaningless in this GDT.
    unsafe { DS::set_reg(data) };
    // SAFETY: as above.
    unsafe { ES::set_reg(data) };
    // SAFETY: the TSS descriptor just appended, available.
    unsafe { load_tss(tss) };
}

/// Loads the interrupt descriptor table, which all CPUs share.
fn load_idt() {
    let base = VirtAddr::from_ptr(BOOT.idt.get());
    let pointer = DescriptorTablePointer { limit: 256 * 16 - 1, base };
    // SAFETY: the table is complete, a static, and every gate leads to a stub that keeps all registers.
    unsafe { lidt(&pointer) };
}

/// Points every gate to its stub.
fn fill(idt: &mut Idt) {
    /// Exceptions that have a stack of their own, with its index in the TSS.
    const IST: [(u8, u16); 3] = [(DOUBLE_FAULT, 0), (NMI, 1), (MACHINE_CHECK, 2)];
    let mut stub = stubs().as_u64();
    for (vector, gate) in (0_u8..=255).zip(idt) {
        let ist =
            IST.iter().find(|(v, _)| *v == vector).map_or(0, |(_, index)| u64::from(index + 1));
        // An interrupt gate: selector 8, ring 0, present, type 14 (AMD64 volume 2, 4.8.4).
        *gate = [
            stub & 0xffff | 0x08 << 16 | ist << 32 | 0x8e << 40 | (stub >> 16 & 0xffff) << 48,
            stub >> 32,
        ];
        stub += STUB_BYTES;
    }
}

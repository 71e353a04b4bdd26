//! Starting CPUs by interrupts (Intel SDM volume 3, 9.4.4; AMD64 volume 2, 16.3).
//!
//! A CPU that gets INIT and then a start-up interrupt begins in real mode at a page below 1 MiB that the interrupt
//! names. `trampoline.s` is copied there; it goes to 64-bit mode with the boot page tables and on into the image.
// UNSAFETY: writes the code that another CPU runs, sets up CPU state.
#![expect(unsafe_code, reason = "a page of code, and the state of a CPU")]

use core::sync::atomic::{AtomicU64, Ordering};
use core::time::Duration;

use janus_proto::addr::PAGE_SIZE;
use x86_64::registers::control::{Cr0, Cr3, Cr4};

use super::CpuError;
use crate::irq::apic;
use crate::mm::frames;
use crate::percpu::{CpuId, PerCpu};
use crate::platform::{self, Platform, clock};
use crate::trap::{fpu, idt};
use crate::{cpu, firmware, time};

core::arch::global_asm!(include_str!("trampoline.s"), options(raw));

/// Time for a CPU to be reset; real ones of long ago wanted ten times as much.
const RESET_TIME: Duration = Duration::from_millis(1);
/// Time after which a start-up interrupt is sent again.
const AGAIN_AFTER: Duration = Duration::from_millis(10);
const TRIES: usize = 3;

/// What `trampoline.s` loads: CR3, CR4, CR0, stack pointer, and the argument of [`smp_secondary_start_native`].
#[unsafe(no_mangle)]
static SMP_START: [AtomicU64; 5] = [const { AtomicU64::new(0) }; 5];

/// Starts a CPU on the stack that ends at `stack`.
///
/// # Errors
/// There is no page for it to start from.
pub(super) async fn start(cpu: &'static PerCpu, stack: usize) -> Result<(), CpuError> {
    unsafe extern "C" {
        static smp_trampoline: u8;
        static smp_trampoline_end: u8;
    }
    let CpuId(id) = cpu.id();
    let tables = firmware::tables().ok_or(CpuError::NoSuchCpu)?;
    let own = apic::id();
    let mut others = tables.processors.iter().filter(|apic| **apic != own);
    let target = *others.nth(id as usize - 1).ok_or(CpuError::NoSuchCpu)?;
    let page = frames::low_page().ok_or(CpuError::NoLowMemory)?;
    let address = usize::try_from(page.start().0).unwrap_or(0);
    let code = &raw const smp_trampoline;
    let bytes = (&raw const smp_trampoline_end).addr() - code.addr();
    debug_assert!(bytes <= PAGE_SIZE);
    // SAFETY: the page was kept for this, and the code lies in the image and is shorter.
    unsafe {
        core::ptr::with_exposed_provenance_mut::<u8>(address).copy_from_nonoverlapping(code, bytes);
    }
    cpu.set_apic_id(target);
    let values = [
        Cr3::read().0.start_address().as_u64(),
        Cr4::read_raw(),
        Cr0::read_raw(),
        stack as u64,
        core::ptr::from_ref(cpu).expose_provenance() as u64,
    ];
    for (place, value) in SMP_START.iter().zip(values) {
        place.store(value, Ordering::SeqCst);
    }
    apic::send(target, apic::INIT);
    time::sleep(RESET_TIME).await;
    for _ in 0..TRIES {
        apic::send(target, apic::STARTUP | u32::try_from(page.0).unwrap_or(0));
        let begun = super::until(|| super::ONLINE.load(Ordering::Acquire) & cpu.bit() != 0);
        if time::timeout(AGAIN_AFTER, begun).await.is_ok() {
            break;
        }
    }
    Ok(())
}

/// Sets up the CPU it runs on as the first one was: tables, registers, interrupt controller, clock.
pub(super) fn set_up(cpu: &'static PerCpu) {
    let features = cpu::features();
    // SAFETY: once on this CPU, with interrupts masked.
    unsafe { idt::init_other(cpu) };
    // SAFETY: natively, once, before any use.
    unsafe { fpu::init(features) };
    if let Err(error) = apic::init(features) {
        log::error!("CPU {}: interrupt controller: {error}", cpu.id().0);
    }
    cpu.set_apic_id(apic::id());
    if platform::current() == Platform::Kvm {
        apic::start_timer();
        clock::init_hypervisor_clock_here();
    }
}

/// Where `trampoline.s` ends.
#[unsafe(no_mangle)]
extern "C" fn smp_secondary_start_native(cpu: &'static PerCpu) -> ! {
    set_up(cpu);
    super::run(cpu)
}

//! The CPU: vector registers lent out, interrupts sent to oneself.
// UNSAFETY: executes SSE instructions, which the kernel's own code never does.
#![expect(unsafe_code, reason = "SSE instructions by hand: the target has no types for them")]

use alloc::boxed::Box;
use core::arch::asm;
use core::sync::atomic::{AtomicU64, Ordering};
use core::time::Duration;

use janus_kernel::irq::{self, Source, apic};
use janus_kernel::platform::{self, Platform};
use janus_kernel::trap::fpu;
use janus_kernel::{cpu, guest_test, println, task, time};

/// Adds doubles, given and answered as bits, and leaves the sum in xmm0.
fn add(a: f64, b: f64) -> u64 {
    let sum: u64;
    // SAFETY: only called inside `fpu::with`, where these registers are ours.
    unsafe {
        asm!("movq xmm0, {a}", "movq xmm1, {b}", "addsd xmm0, xmm1", "movq {sum}, xmm0",
            a = in(reg) a.to_bits(), b = in(reg) b.to_bits(), sum = lateout(reg) sum,
            options(nomem, nostack));
    }
    sum
}

/// What is in xmm0.
fn xmm0() -> u64 {
    let value: u64;
    // SAFETY: as in `add`.
    unsafe { asm!("movq {}, xmm0", out(reg) value, options(nomem, nostack)) };
    value
}

guest_test! {
    /// Floating point works inside, and an inner user leaves an outer one's registers as they were.
    fn vector_registers_are_lent_and_nest(test) {
        let (sum, inner, after) = fpu::with(|| {
            let sum = add(1.5, 2.25);
            let inner = fpu::with(|| add(100.0, 0.5));
            (sum, inner, xmm0())
        });
        test.equal("1.5 + 2.25", sum, 3.75_f64.to_bits());
        test.equal("100 + 0.5", inner, 100.5_f64.to_bits());
        test.equal("xmm0 after the inner user", after, sum);
    }

    /// The local APIC, in whichever mode the CPU has it, delivers what is sent and takes its end of interrupt.
    fn apic_interrupts_to_oneself_arrive(test) {
        static CAME: AtomicU64 = AtomicU64::new(0);
        let has_x2 = cpu::features() & 1 << 21 != 0;
        println!("x2APIC: {}", if apic::is_x2() { "in use" } else { "not in use" });
        test.equal("the x2APIC is in use where there is one", apic::is_x2(), has_x2);
        let handler = Box::new(|| {
            CAME.fetch_add(1, Ordering::Relaxed);
        });
        let registration = match irq::register_vector("self", handler) {
            Ok(registration) => registration,
            Err(error) => return test.error(format_args!("no vector: {error}")),
        };
        let Source::Vector(vector) = registration.source() else {
            return test.error("not a vector");
        };
        // The second one comes only if the first one's end was signalled.
        for expected in 1..=3 {
            apic::send(apic::id(), u32::from(vector));
            let arrived = || CAME.load(Ordering::Relaxed) >= expected;
            for _ in 0..10_000 {
                if arrived() {
                    break;
                }
                task::block_on(time::sleep(Duration::from_millis(1)));
            }
            test.equal("interrupts that came", CAME.load(Ordering::Relaxed), expected);
        }
        test.check(platform::current() != Platform::XenPv, "Xen PV has no APIC");
    }
}

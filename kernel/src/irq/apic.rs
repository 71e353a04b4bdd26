//! The local APIC: xAPIC and x2APIC, its timer, end of interrupt.
//!
//! The timer runs in TSC-deadline mode where the CPU has it, else one-shot, with the count rate measured
//! by [`crate::platform::clock`]. Ref: Intel SDM volume 3, chapter 11 (APIC); AMD64 volume 2, chapter 16.
// UNSAFETY: device registers and MSRs.
#![expect(unsafe_code, reason = "APIC registers and MSRs")]

use core::sync::atomic::{AtomicU8, AtomicU64, Ordering};

use janus_proto::addr::{Gpa, PAGE_SIZE};
use x86_64::registers::model_specific::Msr;

use crate::mm::paging::{self, MapError};
use crate::platform::{IrqGuard, clock};

/// Vectors of the APIC's own interrupts, above those for devices.
pub const TIMER_VECTOR: u8 = 0xf0;
/// Ends the wait of another CPU.
pub const WAKE_VECTOR: u8 = 0xf1;
/// Asks another CPU to forget translations.
pub const FLUSH_VECTOR: u8 = 0xf2;
/// APIC errors; counted as stray.
pub const ERROR_VECTOR: u8 = 0xfe;
/// Spurious interrupts, which get no end-of-interrupt.
pub const SPURIOUS_VECTOR: u8 = 0xff;

const MSR_APIC_BASE: u32 = 0x1b;
const APIC_BASE_ENABLE: u64 = 1 << 11;
const APIC_BASE_X2APIC: u64 = 1 << 10;
const APIC_BASE_ADDRESS: u64 = 0x000f_ffff_ffff_f000;
const MSR_TSC_DEADLINE: u32 = 0x6e0;
/// The first of the x2APIC's MSRs; register `r` of the MMIO page is MSR `0x800 + r / 16`.
const MSR_X2APIC: u32 = 0x800;

/// CPUID leaf 1, ECX.
const CPUID_X2APIC: u32 = 1 << 21;
const CPUID_TSC_DEADLINE: u32 = 1 << 24;

/// A register, by its offset in the MMIO page.
#[derive(Clone, Copy)]
struct Register(u16);

const ID: Register = Register(0x20);
const TASK_PRIORITY: Register = Register(0x80);
const EOI: Register = Register(0xb0);
const SPURIOUS: Register = Register(0xf0);
const ICR_LOW: Register = Register(0x300);
const ICR_HIGH: Register = Register(0x310);
const LVT_TIMER: Register = Register(0x320);
const LVT_LINT0: Register = Register(0x350);
const LVT_LINT1: Register = Register(0x360);
const LVT_ERROR: Register = Register(0x370);
const TIMER_INITIAL: Register = Register(0x380);
const TIMER_CURRENT: Register = Register(0x390);
const TIMER_DIVIDE: Register = Register(0x3e0);

const SPURIOUS_ENABLE: u32 = 1 << 8;
/// [`send`]: resets the CPU (delivery mode 5, asserted).
pub const INIT: u32 = 5 << 8 | 1 << 14;
/// [`send`]: starts the CPU at the page whose number is added (delivery mode 6).
pub const STARTUP: u32 = 6 << 8 | 1 << 14;
/// All CPUs but this one, whatever the target (shorthand 3), get an NMI (delivery mode 4).
const NMI_TO_OTHERS: u32 = 3 << 18 | 4 << 8 | 1 << 14;

const LVT_MASKED: u32 = 1 << 16;
const LVT_NMI: u32 = 4 << 8;
const TIMER_TSC_DEADLINE: u32 = 2 << 17;
/// Divide configuration 1011b: by one.
const DIVIDE_BY_1: u32 = 0b1011;

/// How the registers are reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
enum Mode {
    Off = 0,
    XApic = 1,
    X2Apic = 2,
}

static MODE: AtomicU8 = AtomicU8::new(Mode::Off as u8);
/// The MMIO page of the xAPIC.
static PAGE: AtomicU64 = AtomicU64::new(0);
/// Whether the timer takes TSC values.
static TSC_DEADLINE: AtomicU8 = AtomicU8::new(0);
/// Timer counts per nanosecond, with 32 fraction bits; 0 until measured.
static COUNTS_PER_NS: AtomicU64 = AtomicU64::new(0);

fn mode() -> Mode {
    match MODE.load(Ordering::Relaxed) {
        1 => Mode::XApic,
        2 => Mode::X2Apic,
        _ => Mode::Off,
    }
}

/// Whether there is a local APIC in use.
#[must_use]
pub fn is_on() -> bool {
    mode() != Mode::Off
}

/// Whether it is reached by the x2APIC's MSRs.
#[must_use]
pub fn is_x2() -> bool {
    mode() == Mode::X2Apic
}

/// Turns on this CPU's APIC, its timer masked. `features` is ECX of CPUID leaf 1.
///
/// # Errors
/// The xAPIC's page could not be mapped.
pub(crate) fn init(features: u32) -> Result<(), MapError> {
    let mut base_msr = Msr::new(MSR_APIC_BASE);
    // SAFETY: every x86-64 CPU with an APIC has this MSR, and hypervisors without one give zero.
    let mut base = unsafe { base_msr.read() } | APIC_BASE_ENABLE;
    if features & CPUID_X2APIC != 0 {
        base |= APIC_BASE_X2APIC;
    }
    // SAFETY: enables the APIC where it is; interrupts are masked.
    unsafe { base_msr.write(base) };
    if base & APIC_BASE_X2APIC != 0 {
        MODE.store(Mode::X2Apic as u8, Ordering::Relaxed);
    } else {
        let page = paging::map_mmio(Gpa(base & APIC_BASE_ADDRESS), PAGE_SIZE)?;
        PAGE.store(page.as_ptr().expose_provenance() as u64, Ordering::Relaxed);
        MODE.store(Mode::XApic as u8, Ordering::Relaxed);
    }
    TSC_DEADLINE.store(u8::from(features & CPUID_TSC_DEADLINE != 0), Ordering::Relaxed);
    write(TASK_PRIORITY, 0);
    write(LVT_LINT0, LVT_MASKED);
    write(LVT_LINT1, LVT_NMI);
    write(LVT_ERROR, u32::from(ERROR_VECTOR));
    write(LVT_TIMER, LVT_MASKED | u32::from(TIMER_VECTOR));
    write(SPURIOUS, SPURIOUS_ENABLE | u32::from(SPURIOUS_VECTOR));
    Ok(())
}

/// Whether the timer counts at a rate that must be measured.
pub(crate) fn needs_rate() -> bool {
    is_on() && TSC_DEADLINE.load(Ordering::Relaxed) == 0
}

/// Starts the counter, with its interrupt masked, for measuring its rate.
pub(crate) fn start_counting() {
    write(TIMER_DIVIDE, DIVIDE_BY_1);
    write(LVT_TIMER, LVT_MASKED | u32::from(TIMER_VECTOR));
    write(TIMER_INITIAL, u32::MAX);
}

/// Counts since [`start_counting`], which was less than 2^32 counts ago.
pub(crate) fn counted() -> u32 {
    u32::MAX - read(TIMER_CURRENT)
}

/// Ends the measurement: `counts` passed in `ns`. The timer can be used from now on.
pub(crate) fn set_rate(counts: u32, ns: u64) {
    write(TIMER_INITIAL, 0);
    let rate = (u64::from(counts) << 32) / ns.max(1);
    COUNTS_PER_NS.store(rate.max(1), Ordering::Relaxed);
    write(LVT_TIMER, u32::from(TIMER_VECTOR));
}

/// Turns the timer's TSC-deadline mode on, if it has that.
pub(crate) fn use_tsc_deadline() {
    if TSC_DEADLINE.load(Ordering::Relaxed) != 0 {
        write(LVT_TIMER, TIMER_TSC_DEADLINE | u32::from(TIMER_VECTOR));
        // Orders the mode before the first deadline (Intel SDM 11.5.4.1); the x2APIC's MSR writes are not serialising.
        core::sync::atomic::fence(Ordering::SeqCst);
    }
}

/// Starts the timer of this CPU, which counts as that of the first CPU does.
pub(crate) fn start_timer() {
    if TSC_DEADLINE.load(Ordering::Relaxed) != 0 {
        use_tsc_deadline();
    } else {
        write(TIMER_DIVIDE, DIVIDE_BY_1);
        write(LVT_TIMER, u32::from(TIMER_VECTOR));
    }
}

/// Asks for one timer interrupt at a time of [`crate::platform::now_ns`], or for none.
pub(crate) fn set_timer(deadline_ns: Option<u64>) {
    if TSC_DEADLINE.load(Ordering::Relaxed) != 0 {
        // 0 disarms; a deadline in the past interrupts at once.
        let tsc = deadline_ns.map_or(0, |ns| clock::tsc_at(ns).max(1));
        // SAFETY: the CPU has the mode, and all it does is interrupt.
        unsafe { Msr::new(MSR_TSC_DEADLINE).write(tsc) };
        return;
    }
    let rate = COUNTS_PER_NS.load(Ordering::Relaxed);
    if !is_on() || rate == 0 {
        return;
    }
    let counts = deadline_ns.map_or(0, |ns| {
        let left = ns.saturating_sub(clock::now_ns());
        let counts = (u128::from(left) * u128::from(rate)) >> 32;
        // Too long a wait ends early; whoever waits looks at the clock again.
        u32::try_from(counts + 1).unwrap_or(u32::MAX)
    });
    write(TIMER_INITIAL, counts);
}

/// Says that the interrupt in service has been handled.
#[inline]
pub(crate) fn end_of_interrupt() {
    if is_on() {
        write(EOI, 0);
    }
}

/// This CPU's APIC id, the destination of its interrupts.
#[must_use]
pub fn id() -> u32 {
    match mode() {
        Mode::Off => 0,
        Mode::XApic => read(ID) >> 24,
        Mode::X2Apic => read(ID),
    }
}

/// Sends `command` (the low word of the interrupt command register) to the CPU with APIC id `target`.
pub fn send(target: u32, command: u32) {
    match mode() {
        Mode::Off => {}
        Mode::XApic => {
            // A handler that sends, too, must not come between the two.
            let _masked = IrqGuard::new();
            write(ICR_HIGH, target << 24);
            write(ICR_LOW, command);
        }
        Mode::X2Apic => {
            // The write is not ordered behind what other CPUs are to see (Intel SDM volume 3, 11.12.3).
            core::sync::atomic::fence(Ordering::SeqCst);
            let value = u64::from(target) << 32 | u64::from(command);
            // SAFETY: the x2APIC is on; an interrupt to a CPU of ours runs our handlers.
            unsafe { Msr::new(MSR_X2APIC + u32::from(ICR_LOW.0 >> 4)).write(value) };
        }
    }
}

/// Interrupts all other CPUs, whatever they have masked.
pub(crate) fn stop_others() {
    send(0, NMI_TO_OTHERS);
}

fn read(register: Register) -> u32 {
    match mode() {
        Mode::Off => 0,
        Mode::XApic => {
            // SAFETY: `PAGE` is the APIC's page, mapped uncached for good, and registers are 32 bits wide.
            unsafe { mmio(register).read_volatile() }
        }
        Mode::X2Apic => {
            // SAFETY: the x2APIC is on, and these registers are readable.
            let value = unsafe { Msr::new(MSR_X2APIC + u32::from(register.0 >> 4)).read() };
            u32::try_from(value & 0xffff_ffff).unwrap_or(0)
        }
    }
}

fn write(register: Register, value: u32) {
    match mode() {
        Mode::Off => {}
        Mode::XApic => {
            // SAFETY: as in `read`; the values are this module's.
            unsafe { mmio(register).write_volatile(value) }
        }
        Mode::X2Apic => {
            // SAFETY: the x2APIC is on; the values are this module's.
            unsafe { Msr::new(MSR_X2APIC + u32::from(register.0 >> 4)).write(u64::from(value)) };
        }
    }
}

fn mmio(register: Register) -> *mut u32 {
    let address = PAGE.load(Ordering::Relaxed) + u64::from(register.0);
    core::ptr::with_exposed_provenance_mut(usize::try_from(address).unwrap_or(0))
}

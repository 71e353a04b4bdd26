//! KVM's clock: a page that the hypervisor keeps up to date, read by `janus_proto::pvclock`.
//!
//! Ref: Linux `Documentation/virt/kvm/x86/{cpuid,msr}.rst`.
// UNSAFETY: gives the hypervisor the address of memory to write to.
#![expect(unsafe_code, reason = "MSRs that name memory")]

use core::sync::atomic::{AtomicBool, Ordering};
use core::time::Duration;

use janus_proto::abi::xen::shared_info::{TimeFlags, VcpuTimeInfo};
use janus_proto::pvclock::{self, TIME_INFO_WORDS};
use janus_proto::sync::AtomicU32;
use x86_64::registers::model_specific::Msr;

use crate::cpu::{self, rdtsc};
use crate::percpu::MAX_CPUS;

const MSR_WALL_CLOCK: u32 = 0x4b56_4d00;
const MSR_SYSTEM_TIME: u32 = 0x4b56_4d01;
const SYSTEM_TIME_ENABLE: u64 = 1;
/// CPUID 0x40000001, EAX: the MSRs above, and that the flag in the structure can be trusted.
const FEATURE_CLOCK: u32 = 1 << 3;
const FEATURE_STABLE: u32 = 1 << 24;

/// One CPU's structure; 64-byte alignment keeps it inside a page.
#[repr(C, align(64))]
struct TimeInfo([AtomicU32; TIME_INFO_WORDS]);

#[repr(C, align(16))]
struct WallClock([AtomicU32; 3]);

static TIME: [TimeInfo; MAX_CPUS] =
    [const { TimeInfo([const { AtomicU32::new(0) }; TIME_INFO_WORDS]) }; MAX_CPUS];
static WALL: WallClock = WallClock([const { AtomicU32::new(0) }; 3]);
static AVAILABLE: AtomicBool = AtomicBool::new(false);

/// What the clock says when it is turned on.
#[derive(Clone, Copy, Debug)]
pub(super) struct Reading {
    /// The structure.
    pub(super) info: VcpuTimeInfo,
    /// Whether its scale holds for all CPUs and for good, so that it need not be read again.
    pub(super) stable: bool,
}

/// Turns the clock on for the boot CPU, if there is one.
pub(super) fn init() -> Option<Reading> {
    let hypervisor = cpu::hypervisors().find(|hypervisor| hypervisor.signature == cpu::KVM)?;
    let features = cpu::cpuid(hypervisor.base + 1).eax;
    if features & FEATURE_CLOCK == 0 {
        return None;
    }
    let [boot_cpu, ..] = &TIME;
    let address = (&raw const *boot_cpu).expose_provenance() as u64;
    // SAFETY: the MSR exists; the hypervisor writes the structure at this (guest physical = virtual)
    // address, a static that is only ever seen as atomics.
    unsafe { Msr::new(MSR_SYSTEM_TIME).write(address | SYSTEM_TIME_ENABLE) };
    let info = pvclock::try_read(&boot_cpu.0)?;
    if info.tsc_to_system_mul == 0 {
        return None;
    }
    AVAILABLE.store(true, Ordering::Relaxed);
    let stable = features & FEATURE_STABLE != 0 && info.flags.contains(TimeFlags::TSC_STABLE);
    Some(Reading { info, stable })
}

/// Turns the clock on for the calling CPU, another than the first.
pub(super) fn init_here() {
    let id = usize::try_from(crate::percpu::current().id().0).unwrap_or(usize::MAX);
    if !AVAILABLE.load(Ordering::Relaxed) {
        return;
    }
    let Some(time) = TIME.get(id) else { return };
    let address = core::ptr::from_ref(time).expose_provenance() as u64;
    // SAFETY: as in `init`.
    unsafe { Msr::new(MSR_SYSTEM_TIME).write(address | SYSTEM_TIME_ENABLE) };
}

/// The hypervisor's time now.
pub(super) fn now_ns() -> Option<u64> {
    let cpu = usize::try_from(crate::percpu::current().id().0).ok()?;
    pvclock::now(&TIME.get(cpu)?.0, rdtsc)
}

/// The time since 1970 at which the hypervisor's clock was 0.
pub(super) fn wall_clock_at_zero() -> Option<Duration> {
    if !AVAILABLE.load(Ordering::Relaxed) {
        return None;
    }
    let address = (&raw const WALL).expose_provenance() as u64;
    // SAFETY: as in `init`; the structure is written once, before the next instruction.
    unsafe { Msr::new(MSR_WALL_CLOCK).write(address) };
    pvclock::try_read_wall_clock(&WALL.0)
}

//! KVM, QEMU's TCG and any machine without Xen: time from the TSC or pvclock, the local APIC's timer,
//! and the ways to end that emulators and firmware offer.

use core::time::Duration;

use super::{calibrate, clock, native};
use crate::irq::apic;
use crate::power::{self, ExitStatus};

pub(super) fn now_ns() -> u64 {
    clock::now_ns()
}

pub(super) fn wall_clock() -> Option<Duration> {
    clock::wall_clock()
}

pub(super) fn set_timer(deadline_ns: Option<u64>) {
    calibrate::refine();
    apic::set_timer(deadline_ns);
}

pub(super) fn end(status: ExitStatus) -> ! {
    power::native_end(status);
    native::halt_forever()
}

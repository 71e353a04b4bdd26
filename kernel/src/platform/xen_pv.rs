//! Xen PV: every privileged step is a hypercall or a word in memory shared with Xen.

use core::time::Duration;

use super::native;
use crate::power::ExitStatus;

pub(super) fn irqs_enabled() -> bool {
    false
}

pub(super) fn disable_irqs() {}

pub(super) fn enable_irqs() {}

pub(super) fn idle_wait() {}

pub(super) fn now_ns() -> u64 {
    super::clock::now_ns()
}

pub(super) fn wall_clock() -> Option<Duration> {
    None
}

pub(super) fn set_timer(_deadline_ns: Option<u64>) {}

pub(super) fn wake_cpu(_cpu: &crate::percpu::PerCpu) {}

pub(super) fn end(_status: ExitStatus) -> ! {
    native::halt_forever()
}

//! Xen PVH: native CPU state, Xen's clock, timer, console and way to end.

use core::time::Duration;

use super::native;
use crate::power::ExitStatus;

pub(super) fn now_ns() -> u64 {
    super::clock::now_ns()
}

pub(super) fn wall_clock() -> Option<Duration> {
    None
}

pub(super) fn set_timer(_deadline_ns: Option<u64>) {}

pub(super) fn end(_status: ExitStatus) -> ! {
    native::halt_forever()
}

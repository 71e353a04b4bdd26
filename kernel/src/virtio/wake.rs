//! What a device's interrupt does: known only once its driver and its task exist.

use alloc::boxed::Box;
use core::fmt;
use core::sync::atomic::{AtomicU64, Ordering};

use spin::Once;

/// The far end of an interrupt handler that is installed before its device is.
pub(super) struct Wake {
    action: Once<Box<dyn Fn() + Send + Sync>>,
    count: AtomicU64,
}

impl Wake {
    pub(super) const fn new() -> Self {
        Self { action: Once::new(), count: AtomicU64::new(0) }
    }
    /// Called from interrupt context.
    pub(super) fn interrupt(&self) {
        self.count.fetch_add(1, Ordering::Relaxed);
        if let Some(action) = self.action.get() {
            action();
        }
    }
    /// Says what to do from now on, and does it once for interrupts that came before.
    pub(super) fn set(&self, action: Box<dyn Fn() + Send + Sync>) {
        self.action.call_once(|| action)();
    }
    /// Interrupts so far.
    pub(super) fn count(&self) -> u64 {
        self.count.load(Ordering::Relaxed)
    }
}

impl fmt::Debug for Wake {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Wake({} interrupts)", self.count())
    }
}

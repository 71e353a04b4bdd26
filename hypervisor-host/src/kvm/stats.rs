//! How often a guest left KVM, and why.

use std::sync::atomic::{AtomicU64, Ordering};

/// Why KVM came back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A write to a port.
    PortOut,
    /// A read of a port.
    PortIn,
    /// A read of a device's register.
    MmioRead,
    /// A write to one.
    MmioWrite,
    /// Somebody wanted it back.
    Kick,
    /// A hypercall of Xen's.
    Hypercall,
    /// Anything else.
    Other,
}

/// Their names, in order.
const NAMES: [&str; 7] =
    ["port write", "port read", "mmio read", "mmio write", "kick", "hypercall", "other"];

/// Counts.
#[derive(Debug, Default)]
pub struct Exits([AtomicU64; NAMES.len()]);

impl Exits {
    pub(crate) fn count(&self, kind: Kind) {
        if let Some(count) = self.0.get(kind as usize) {
            count.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Each kind's name, and how often it was.
    pub fn list(&self) -> impl Iterator<Item = (&'static str, u64)> {
        NAMES.into_iter().zip(self.0.iter().map(|count| count.load(Ordering::Relaxed)))
    }
}

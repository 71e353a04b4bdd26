//! Device registers in a PV guest's reach: frames that are no memory, which the domain may map.
//!
//! Xen lets a domain map a device's frames if the toolstack gave it leave (`XEN_DOMCTL_iomem_permission`); here they
//! are frames of [`FRAMES`], below all memory. What the guest does at such a mapping is a fault for the engine, which
//! has no page to put there, and the instruction is carried out here, on the device.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use janus_proto::addr::Mfn;

/// Where device registers are: from 3.25 GiB on, a frame for each device.
pub const FRAMES: Range<u64> = 0xd_0000..0xd_0100;

/// The registers of a device, in one frame.
pub trait Registers: Send + Sync + fmt::Debug {
    /// The guest reads.
    fn read(&self, offset: u64, buf: &mut [u8]);
    /// The guest writes.
    fn write(&self, offset: u64, bytes: &[u8]);
}

/// The devices of a domain by their frames.
#[derive(Debug, Default)]
pub(crate) struct Devices {
    by_frame: RwLock<BTreeMap<u64, Arc<dyn Registers>>>,
    accesses: AtomicU64,
}

impl Devices {
    /// Puts registers into the first frame that is free; `None`: there is none.
    pub(crate) fn add(&self, registers: Arc<dyn Registers>) -> Option<Mfn> {
        let mut by_frame = self.by_frame.write().unwrap_or_else(PoisonError::into_inner);
        let frame = FRAMES.into_iter().find(|frame| !by_frame.contains_key(frame))?;
        by_frame.insert(frame, registers);
        Some(Mfn(frame))
    }

    pub(crate) fn remove(&self, frame: Mfn) {
        self.by_frame.write().unwrap_or_else(PoisonError::into_inner).remove(&frame.0);
    }

    /// The registers in a frame. An access to one without is counted as well.
    pub(crate) fn at(&self, frame: Mfn) -> Option<Arc<dyn Registers>> {
        self.accesses.fetch_add(1, Ordering::Relaxed);
        self.by_frame.read().unwrap_or_else(PoisonError::into_inner).get(&frame.0).cloned()
    }

    /// Register accesses that were emulated.
    pub(crate) fn accesses(&self) -> u64 {
        self.accesses.load(Ordering::Relaxed)
    }
}

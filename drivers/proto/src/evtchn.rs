//! Two-level event channels: the bits that Xen and the guest share, both sides.
//!
//! A port has a pending and a mask bit in the shared info page; a vCPU has a selector, one bit for each
//! word of pending bits, and a flag that an upcall is due (`xen/include/public/xen.h`, `struct shared_info`
//! and `struct vcpu_info`). Both sides change all of it at any time, with locked operations only.

use crate::addr::Port;
use crate::sync::{AtomicU8, AtomicU64, Ordering, fence};

/// Bits in a word, and words in a bitmap.
const BITS: u32 = 64;

/// The bits of a vCPU (`struct vcpu_info`).
#[derive(Clone, Copy, Debug)]
pub struct VcpuBits<'a> {
    /// `evtchn_upcall_pending`.
    pub upcall_pending: &'a AtomicU8,
    /// `evtchn_pending_sel`.
    pub selector: &'a AtomicU64,
}

/// The bits of all ports (`struct shared_info`).
#[derive(Clone, Copy, Debug)]
pub struct PortBits<'a> {
    /// `evtchn_pending`.
    pub pending: &'a [AtomicU64],
    /// `evtchn_mask`.
    pub mask: &'a [AtomicU64],
}

impl<'a> PortBits<'a> {
    fn place(words: &'a [AtomicU64], port: Port) -> Option<(&'a AtomicU64, u64)> {
        words.get((port.0 / BITS) as usize).map(|word| (word, 1 << (port.0 % BITS)))
    }

    /// Guest: takes every pending, unmasked port of a vCPU once, clears it, and hands it to `handle`.
    ///
    /// Call again while `upcall_pending` is set: an event that arrives meanwhile sets it again.
    /// Answers how many ports were handled.
    pub fn drain(&self, vcpu: VcpuBits<'_>, handle: impl FnMut(Port)) -> u32 {
        self.drain_some(vcpu, |_| u64::MAX, handle)
    }

    /// Guest: as [`Self::drain`], of those ports only that `mine` has in its answer to a word's index: the others of
    /// the word interrupt other vCPUs, which are told of them by their own selectors.
    pub fn drain_some(
        &self,
        vcpu: VcpuBits<'_>,
        mine: impl Fn(usize) -> u64,
        mut handle: impl FnMut(Port),
    ) -> u32 {
        // Orders the flag before the selector: Xen sets pending, selector, flag in this order, so an
        // event whose bits we miss below finds the flag clear and sets it again.
        vcpu.upcall_pending.swap(0, Ordering::SeqCst);
        let mut handled = 0;
        for index in bits(vcpu.selector.swap(0, Ordering::SeqCst)) {
            let (Some(pending), Some(mask)) =
                (self.pending.get(index as usize), self.mask.get(index as usize))
            else {
                continue;
            };
            let due = pending.load(Ordering::Acquire)
                & !mask.load(Ordering::Relaxed)
                & mine(index as usize);
            for bit in bits(due) {
                // Cleared before it is handled, so that an event during the handler is a new one.
                pending.fetch_and(!(1 << bit), Ordering::SeqCst);
                handle(Port(index * BITS + bit));
                handled += 1;
            }
        }
        handled
    }

    /// Guest: whether an event waits at a port, masked or not.
    #[must_use]
    pub fn is_pending(&self, port: Port) -> bool {
        Self::place(self.pending, port)
            .is_some_and(|(word, bit)| word.load(Ordering::Acquire) & bit != 0)
    }

    /// Guest: forgets an event; answers whether there was one.
    pub fn clear(&self, port: Port) -> bool {
        Self::place(self.pending, port)
            .is_some_and(|(word, bit)| word.fetch_and(!bit, Ordering::SeqCst) & bit != 0)
    }

    /// Whether a port is masked. Ports that do not exist are.
    #[must_use]
    pub fn is_masked(&self, port: Port) -> bool {
        Self::place(self.mask, port)
            .is_none_or(|(word, bit)| word.load(Ordering::Relaxed) & bit != 0)
    }

    /// Guest: masks a port; answers whether it was masked.
    pub fn mask(&self, port: Port) -> bool {
        Self::place(self.mask, port)
            .is_none_or(|(word, bit)| word.fetch_or(bit, Ordering::SeqCst) & bit != 0)
    }

    /// Guest: masks every port.
    pub fn mask_all(&self) {
        for word in self.mask {
            word.store(u64::MAX, Ordering::SeqCst);
        }
    }

    /// Guest: unmasks a port. `true`: an event is waiting whose upcall Xen did not send; the port is
    /// masked again, and `EVTCHNOP_unmask` must be called, which delivers it.
    #[must_use = "a waiting event is lost without the hypercall"]
    pub fn unmask(&self, port: Port) -> bool {
        let Some((word, bit)) = Self::place(self.mask, port) else { return false };
        if word.fetch_and(!bit, Ordering::SeqCst) & bit == 0 {
            return false;
        }
        // Orders the mask before our look at pending: Xen sets pending, then looks at the mask, so
        // either it sees the port unmasked and sends the upcall, or we see the event.
        fence(Ordering::SeqCst);
        let waiting = Self::place(self.pending, port)
            .is_some_and(|(pending, bit)| pending.load(Ordering::SeqCst) & bit != 0);
        if waiting {
            word.fetch_or(bit, Ordering::SeqCst);
        }
        waiting
    }

    /// Xen: signals a port of a vCPU; `true`: the vCPU is to be sent an upcall.
    pub fn signal(&self, vcpu: VcpuBits<'_>, port: Port) -> bool {
        let Some((pending, bit)) = Self::place(self.pending, port) else { return false };
        if pending.fetch_or(bit, Ordering::SeqCst) & bit != 0 {
            return false;
        }
        // Orders pending before our look at the mask; the counterpart is in `unmask`.
        fence(Ordering::SeqCst);
        !self.is_masked(port) && Self::select(vcpu, port)
    }

    /// Xen: unmasks a port on behalf of the guest; `true`: the vCPU is to be sent an upcall.
    pub fn unmask_and_deliver(&self, vcpu: VcpuBits<'_>, port: Port) -> bool {
        let Some((word, bit)) = Self::place(self.mask, port) else { return false };
        let masked = word.fetch_and(!bit, Ordering::SeqCst) & bit != 0;
        masked && self.is_pending(port) && Self::select(vcpu, port)
    }

    fn select(vcpu: VcpuBits<'_>, port: Port) -> bool {
        let selector_bit = 1_u64.checked_shl(port.0 / BITS).unwrap_or(0);
        let first = vcpu.selector.fetch_or(selector_bit, Ordering::SeqCst) & selector_bit == 0;
        first && vcpu.upcall_pending.swap(1, Ordering::SeqCst) == 0
    }
}

/// The numbers of the bits set, lowest first.
fn bits(mut word: u64) -> impl Iterator<Item = u32> {
    core::iter::from_fn(move || {
        let bit = word.trailing_zeros();
        word &= word.wrapping_sub(1);
        (bit < BITS).then_some(bit)
    })
}

#[cfg(test)]
mod loom_tests;
#[cfg(test)]
mod tests;

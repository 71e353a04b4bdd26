//! What a debugger needs of a domain: to stop it at breakpoints, and to read and write its memory whatever the guest's
//! page tables allow.

use std::fmt;
use std::sync::Arc;

use janus_proto::abi::xen::Errno;
use janus_proto::addr::{GrantRef, Mfn, PAGE_SIZE};

use super::domain::Domain;
use super::report::WalkStep;
use crate::engine::Fault;
use crate::memory::{copy_in, copy_out};

/// The vectors that belong to a debugger: debug exceptions and breakpoints.
pub const DEBUG: u8 = 1;
/// `int3`; the instruction pointer is behind it.
pub const BREAKPOINT: u8 = 3;

/// Hears of debug exceptions. The domain is paused (once) when it is called, on the thread of the CPU; that CPU's
/// registers are to be had once [`Domain::pause`] (from another thread) returns.
#[derive(Clone)]
pub struct Debugger(pub Arc<dyn Fn(usize, Fault) + Send + Sync>);

impl fmt::Debug for Debugger {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Debugger")
    }
}

/// The frame of the last step of a complete walk.
fn frame_of(steps: &[WalkStep]) -> Option<Mfn> {
    const PRESENT: u64 = 1;
    const FRAME: u64 = 0x000f_ffff_ffff_f000;
    let last = steps.last().filter(|step| step.level == 1 && step.entry & PRESENT != 0)?;
    Some(Mfn((last.entry & FRAME) >> 12))
}

impl Domain {
    /// Copies guest memory as a CPU sees it, page by page.
    ///
    /// # Errors
    /// `EFAULT`: some of it is not mapped.
    pub fn read_memory(&self, vcpu: usize, address: u64, buf: &mut [u8]) -> Result<(), Errno> {
        self.each_page(vcpu, address, buf.len(), |words, offset, range| {
            buf.get_mut(range).is_some_and(|part| copy_out(words, offset, part))
        })
    }

    /// Writes guest memory as a CPU sees it, also where the guest may not: breakpoints.
    ///
    /// # Errors
    /// `EFAULT`: some of it is not mapped; what came before it is written.
    pub fn write_memory(&self, vcpu: usize, address: u64, bytes: &[u8]) -> Result<(), Errno> {
        self.each_page(vcpu, address, bytes.len(), |words, offset, range| {
            bytes.get(range).is_some_and(|part| copy_in(words, offset, part))
        })
    }

    /// The page tables' entries for an address, from the top.
    #[must_use]
    pub fn walk(&self, vcpu: usize, address: u64) -> Vec<WalkStep> {
        self.space.walk(vcpu, address)
    }

    /// Grants that the host uses: reference, frame, and how many read and write.
    #[must_use]
    pub fn grants_in_use(&self) -> Vec<(GrantRef, Mfn, u32, u32)> {
        self.grants.pins()
    }

    fn each_page(
        &self,
        vcpu: usize,
        address: u64,
        count: usize,
        mut copy: impl FnMut(&[std::sync::atomic::AtomicU32], usize, std::ops::Range<usize>) -> bool,
    ) -> Result<(), Errno> {
        let mut done = 0;
        while done < count {
            let at = address.checked_add(done as u64).ok_or(Errno::EFAULT)?;
            let offset = usize::try_from(at % PAGE_SIZE as u64).map_err(|_| Errno::EFAULT)?;
            let part = (count - done).min(PAGE_SIZE - offset);
            let frame = frame_of(&self.space.walk(vcpu, at)).ok_or(Errno::EFAULT)?;
            let words = self.ram().words(frame, 1).ok_or(Errno::EFAULT)?;
            if !copy(words, offset, done..done + part) {
                return Err(Errno::EFAULT);
            }
            done += part;
        }
        Ok(())
    }
}

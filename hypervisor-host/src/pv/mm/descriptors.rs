//! Descriptor tables: checked and kept from being written, as Xen does, though no process can load them.

use std::sync::atomic::Ordering;

use janus_proto::abi::xen::Errno;
use janus_proto::addr::{Mfn, PAGE_SIZE};

use super::Memory;
use super::frame::Kind;
use crate::engine::Vcpu;

/// Entries below Xen's own part of a GDT (`FIRST_RESERVED_GDT_ENTRY`).
const MAX_GDT: u64 = 14 * ENTRIES;
/// Descriptors in a page.
const ENTRIES: u64 = 512;

const PRESENT: u64 = 1 << 47;
const CODE_OR_DATA: u64 = 1 << 44;
const LEVEL: u64 = 3 << 45;
const TYPE: u64 = 0xf << 40;
const CALL_GATE: u64 = 0xc << 40;

/// Checks a descriptor that a guest wants in a table, and mends its privilege level (`check_descriptor`); `None`: it
/// would let the guest out.
pub(crate) fn check(descriptor: u64) -> Option<u64> {
    if descriptor & PRESENT == 0 {
        return Some(descriptor);
    }
    // A 64-bit guest's kernel and programs are all at level 3.
    let mended = descriptor | LEVEL;
    if descriptor & CODE_OR_DATA != 0 {
        return Some(mended);
    }
    match descriptor & TYPE {
        // The second half of a gate.
        0 => Some(descriptor),
        // Through a gate only to the guest's own code; level 0 makes its use fault, for Xen to emulate.
        CALL_GATE if is_gate_target(descriptor >> 16 & 0xffff) => Some(descriptor & !LEVEL),
        _ => None,
    }
}

/// Whether a call gate may lead to a selector (`guest_gate_selector_okay`).
fn is_gate_target(selector: u64) -> bool {
    // In the LDT, below Xen's part of the GDT, or the flat kernel code of a guest.
    selector & 4 != 0 || selector >> 3 < MAX_GDT || selector == 0xe033
}

impl Memory {
    /// Checks all descriptors of a page that is to be part of a table.
    pub(crate) fn validate_segments(&mut self, frame: Mfn) -> Result<(), Errno> {
        for word in self.words(frame)? {
            let old = word.load(Ordering::Relaxed);
            let new = check(old).ok_or(Errno::EINVAL)?;
            if new != old {
                word.store(new, Ordering::Relaxed);
            }
        }
        Ok(())
    }

    /// `set_gdt(frames, entries)`.
    ///
    /// # Errors
    /// `EINVAL`: too many entries, or a frame that cannot be a descriptor table; `EFAULT`: the list is not readable.
    pub fn set_gdt(
        &mut self,
        vcpu: usize,
        engine: &mut dyn Vcpu,
        [list, entries, ..]: [u64; 6],
    ) -> Result<u64, Errno> {
        let entries = entries & 0xffff_ffff;
        if entries > MAX_GDT {
            return Err(Errno::EINVAL);
        }
        let mut frames = [0u64; 14];
        for (frame, index) in frames.iter_mut().zip(0..entries.div_ceil(ENTRIES)) {
            let address = list.checked_add(index * 8).ok_or(Errno::EFAULT)?;
            *frame = self.fetch(vcpu, address)?;
        }
        let count = usize::try_from(entries.div_ceil(ENTRIES)).unwrap_or(0);
        self.resident.apply(engine);
        self.load_gdt(vcpu, frames.get(..count).unwrap_or_default(), entries)?;
        Ok(0)
    }

    /// Takes uses of the frames of a new GDT, and gives those of the old one back (`pv_set_gdt`).
    ///
    /// # Errors
    /// `EINVAL`: one of them cannot be a descriptor table.
    pub(crate) fn load_gdt(
        &mut self,
        vcpu: usize,
        frames: &[u64],
        entries: u64,
    ) -> Result<(), Errno> {
        let mut taken = Vec::with_capacity(frames.len());
        for frame in frames {
            let frame = Mfn(*frame);
            if let Err(error) = self.get_page_and_type(frame, Kind::Segments) {
                for frame in taken {
                    self.put_page_and_type(frame);
                }
                return Err(error);
            }
            taken.push(frame);
        }
        let cpu = self.cpus.get_mut(vcpu).ok_or(Errno::EINVAL)?;
        cpu.gdt_entries = entries;
        let old = std::mem::replace(&mut cpu.gdt, taken);
        for frame in old {
            self.put_page_and_type(frame);
        }
        Ok(())
    }

    /// `update_descriptor(machine address, descriptor)`.
    ///
    /// # Errors
    /// `EINVAL`: not a place for one, or not one that a guest may have.
    pub fn update_descriptor(
        &mut self,
        engine: &mut dyn Vcpu,
        [address, descriptor, ..]: [u64; 6],
    ) -> Result<u64, Errno> {
        let frame = Mfn(address >> 12);
        let descriptor = check(descriptor).filter(|_| address.is_multiple_of(8));
        let descriptor = descriptor.ok_or(Errno::EINVAL)?;
        let index = usize::try_from(address % PAGE_SIZE as u64 / 8).unwrap_or(0);
        self.resident.apply(engine);
        self.get_page(frame)?;
        let is_table =
            self.frame(frame).is_some_and(|frame| frame.kind == Kind::Segments && frame.uses > 0);
        let result = if is_table { Ok(()) } else { self.get_type(frame, Kind::Writable) };
        if result.is_ok() {
            if let Some(word) = self.ram.frame(frame).and_then(|words| words.get(index)) {
                word.store(descriptor, Ordering::Relaxed);
            }
            if !is_table {
                self.put_type(frame, None);
            }
        }
        self.put_page(frame);
        result.map(|()| 0)
    }

    /// A descriptor as the guest's tables have it, for what a process must emulate; `None`: there is none.
    #[must_use]
    pub fn descriptor(&self, vcpu: usize, selector: u16) -> Option<u64> {
        let index = u64::from(selector >> 3);
        let cpu = self.cpus.get(vcpu)?;
        if selector & 4 != 0 {
            let (base, entries) = cpu.ldt;
            let address = base.checked_add(index * 8).filter(|_| index < entries)?;
            return self.fetch(vcpu, address).ok();
        }
        let frame = cpu.gdt.get(usize::try_from(index / ENTRIES).ok()?)?;
        let word = self.ram.frame(*frame)?.get(usize::try_from(index % ENTRIES).ok()?)?;
        (index < cpu.gdt_entries).then(|| word.load(Ordering::Relaxed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn code_and_data_are_lowered_to_the_guests_level() {
        let code = 0x00af_9a00_0000_ffff;
        assert_eq!(check(code), Some(code | LEVEL));
        assert_eq!(check(0x1234), Some(0x1234), "not present");
    }

    #[test]
    fn gates_into_the_hypervisor_and_system_segments_are_refused() {
        for kind in [2u64, 5, 9, 0xb, 0xe, 0xf] {
            assert_eq!(check(PRESENT | kind << 40), None, "type {kind}");
        }
        assert_eq!(check(PRESENT | CALL_GATE | 0xe008 << 16), None);
        assert_eq!(
            check(PRESENT | CALL_GATE | LEVEL | 0xe033 << 16),
            Some(PRESENT | CALL_GATE | 0xe033 << 16)
        );
    }
}

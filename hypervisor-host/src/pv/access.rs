//! Guest memory by address, as the guest's own page tables map it: arguments of hypercalls, stacks, rings.
//!
//! Rights are those of the tables (nothing is written through a read-only mapping), and a range may cross pages, end
//! anywhere, or not exist; only what was asked for is touched. The guest may change the memory meanwhile: callers copy
//! once and check the copy.

use std::sync::atomic::{AtomicU64, Ordering};

use janus_proto::abi::xen::Errno;
use janus_proto::addr::{Mfn, PAGE_SIZE};
use zerocopy::{FromBytes, FromZeros, IntoBytes};

use super::mm::Memory;
use super::mm::entry::Entry;

/// Calls `each` with every part of a range that lies in one page: its address, and where in the range it is.
fn pages(
    address: u64,
    length: usize,
    mut each: impl FnMut(u64, std::ops::Range<usize>) -> Result<(), Errno>,
) -> Result<(), Errno> {
    if length == 0 {
        return Ok(());
    }
    address.checked_add(length as u64 - 1).ok_or(Errno::EFAULT)?;
    let mut done = 0;
    while done < length {
        let at = address + done as u64;
        let in_page = usize::try_from(at % PAGE_SIZE as u64).unwrap_or(0);
        let part = (PAGE_SIZE - in_page).min(length - done);
        each(at, done..done + part)?;
        done += part;
    }
    Ok(())
}

/// Copies bytes out of a page.
fn load(page: &[AtomicU64; 512], offset: usize, buf: &mut [u8]) {
    let mut skip = offset % 8;
    let mut rest = buf;
    for word in page.iter().skip(offset / 8) {
        let (part, later) = rest.split_at_mut(rest.len().min(8 - skip));
        if part.is_empty() {
            return;
        }
        let bytes = word.load(Ordering::Relaxed).to_le_bytes();
        for (to, from) in part.iter_mut().zip(bytes.iter().skip(skip)) {
            *to = *from;
        }
        (rest, skip) = (later, 0);
    }
}

/// Copies bytes into a page. Bytes beside them are left alone, whoever writes them now.
pub(super) fn store(page: &[AtomicU64; 512], offset: usize, bytes: &[u8]) {
    let mut skip = offset % 8;
    let mut rest = bytes;
    for word in page.iter().skip(offset / 8) {
        let (part, later) = rest.split_at(rest.len().min(8 - skip));
        if part.is_empty() {
            return;
        }
        if let Ok(whole) = <[u8; 8]>::try_from(part) {
            word.store(u64::from_le_bytes(whole), Ordering::Relaxed);
        } else {
            let mut mask = [0; 8];
            let mut value = [0; 8];
            for ((mask, value), byte) in mask.iter_mut().zip(&mut value).skip(skip).zip(part) {
                (*mask, *value) = (0xff, *byte);
            }
            let (mask, value) = (u64::from_le_bytes(mask), u64::from_le_bytes(value));
            let merged = word.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |old| {
                Some(old & !mask | value)
            });
            debug_assert!(merged.is_ok(), "the closure always answers");
        }
        (rest, skip) = (later, 0);
    }
}

impl Memory {
    /// Copies from the address space that a CPU is on.
    ///
    /// # Errors
    /// `EFAULT`: some of it is not mapped; the buffer is then of no use.
    pub fn copy_from_guest(&self, vcpu: usize, address: u64, buf: &mut [u8]) -> Result<(), Errno> {
        let root = self.root(vcpu).ok_or(Errno::EFAULT)?;
        self.copy_from(root, address, buf)
    }

    /// Copies to the address space that a CPU is on.
    ///
    /// # Errors
    /// `EFAULT`: some of it is not mapped, or not writable; what came before it is written.
    pub fn copy_to_guest(&self, vcpu: usize, address: u64, bytes: &[u8]) -> Result<(), Errno> {
        let root = self.root(vcpu).ok_or(Errno::EFAULT)?;
        self.copy_to(root, address, bytes)
    }

    /// As [`Memory::copy_from_guest`], by a top page table.
    ///
    /// # Errors
    /// As there.
    pub fn copy_from(&self, root: Mfn, address: u64, buf: &mut [u8]) -> Result<(), Errno> {
        pages(address, buf.len(), |at, range| {
            let leaf = self.walk(root, at).ok_or(Errno::EFAULT)?;
            let page = self.ram().frame(leaf.entry.frame()).ok_or(Errno::EFAULT)?;
            self.mark(&leaf, Entry::ACCESSED);
            let part = buf.get_mut(range).ok_or(Errno::EFAULT)?;
            load(page, usize::try_from(at % PAGE_SIZE as u64).unwrap_or(0), part);
            Ok(())
        })
    }

    /// As [`Memory::copy_to_guest`], by a top page table.
    ///
    /// # Errors
    /// As there.
    pub fn copy_to(&self, root: Mfn, address: u64, bytes: &[u8]) -> Result<(), Errno> {
        pages(address, bytes.len(), |at, range| {
            let leaf = self.walk(root, at).filter(|leaf| leaf.write).ok_or(Errno::EFAULT)?;
            let page = self.ram().frame(leaf.entry.frame()).ok_or(Errno::EFAULT)?;
            self.mark(&leaf, Entry::ACCESSED | Entry::DIRTY);
            let part = bytes.get(range).ok_or(Errno::EFAULT)?;
            store(page, usize::try_from(at % PAGE_SIZE as u64).unwrap_or(0), part);
            Ok(())
        })
    }

    /// Copies one structure from the guest.
    pub(crate) fn fetch<T: FromBytes + IntoBytes + FromZeros>(
        &self,
        vcpu: usize,
        address: u64,
    ) -> Result<T, Errno> {
        let mut value = T::new_zeroed();
        self.copy_from_guest(vcpu, address, value.as_mut_bytes())?;
        Ok(value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_come_and_go_at_any_alignment() {
        let page: [AtomicU64; 512] = std::array::from_fn(|_| AtomicU64::new(u64::MAX));
        for offset in (0..17).chain(PAGE_SIZE - 17..PAGE_SIZE) {
            for length in 0..=(PAGE_SIZE - offset).min(20) {
                for word in &page {
                    word.store(u64::MAX, Ordering::Relaxed);
                }
                let bytes: Vec<u8> = (1..=20).take(length).collect();
                store(&page, offset, &bytes);
                let mut whole = vec![0; PAGE_SIZE];
                load(&page, 0, &mut whole);
                let mut want = vec![0xff; PAGE_SIZE];
                want[offset..offset + length].copy_from_slice(&bytes);
                assert_eq!(whole, want, "{length} at {offset}");
                let mut back = vec![0; length];
                load(&page, offset, &mut back);
                assert_eq!(back, bytes);
            }
        }
    }

    #[test]
    fn a_range_beyond_the_last_address_is_a_fault() {
        assert_eq!(pages(u64::MAX, 2, |_, _| Ok(())), Err(Errno::EFAULT));
        assert_eq!(pages(u64::MAX, 1, |_, _| Ok(())), Ok(()));
        let mut parts = Vec::new();
        pages(0x1ffe, 0x1004, |at, range| {
            parts.push((at, range));
            Ok(())
        })
        .unwrap();
        assert_eq!(parts, [(0x1ffe, 0..2), (0x2000, 2..0x1002), (0x3000, 0x1002..0x1004)]);
    }
}

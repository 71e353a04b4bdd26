//! Xen PV's `start_info` (`xen/include/public/xen.h`) and what follows from it.

use crate::memory::{MemoryKind, PhysicalMemory, read_u32, read_u64};
use crate::{BootError, BootInfo, Door, Problems, Protocol};
use janus_proto::addr::{Mfn, PAGE_SHIFT, PAGE_SIZE, Port};

bitflags::bitflags! {
    /// `SIF_*`.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct StartFlags: u32 {
        /// Is the domain privileged?
        const PRIVILEGED = 1 << 0;
        /// Is this the initial control domain?
        const INITDOMAIN = 1 << 1;
        /// Is the module a multiboot module list?
        const MULTIBOOT_MOD = 1 << 2;
        /// Is `mod_start` a frame number?
        const MOD_START_PFN = 1 << 3;
        /// Is the p2m list virtually mapped by tables of its own?
        const VIRT_P2M_4TOOLS = 1 << 4;
        const _ = !0;
    }
}

/// A page shared with a daemon, and the event channel that goes with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SharedPage {
    /// The page, as a machine frame.
    pub mfn: Mfn,
    /// Its event channel.
    pub port: Port,
}

/// The parts of `start_info` that the kernel needs, checked.
#[derive(Clone, Copy, Debug)]
pub struct StartInfo {
    /// Where the structure lies; virtual and pseudo-physical address are one.
    pub address: u64,
    /// Pages of this domain: frames 0 to `nr_pages - 1`.
    pub nr_pages: u64,
    /// Machine address of the shared info page.
    pub shared_info: u64,
    /// `SIF_*`.
    pub flags: StartFlags,
    /// xenstore's ring; none in a first domain.
    pub store: Option<SharedPage>,
    /// The console ring; none in a first domain, which has `console_io`.
    pub console: Option<SharedPage>,
    /// Virtual address of the level 4 page table that Xen built.
    pub pt_base: u64,
    /// Frames of Xen's page tables, from `pt_base` up.
    pub nr_pt_frames: u64,
    /// Virtual address of the list of machine frames, one u64 a page.
    pub mfn_list: u64,
    /// First byte after what Xen placed and mapped: image, module, lists, tables, stack.
    pub bootstrap_end: u64,
}

/// Bytes of `struct start_info` for a 64-bit guest.
pub const SIZE: u64 = 1168;
const CMD_LINE: usize = 128;
const MAX_GUEST_CMDLINE: usize = 1024;

impl StartInfo {
    /// Is this the first domain, which owns the machine's console?
    #[must_use]
    pub fn is_initial_domain(&self) -> bool {
        self.flags.contains(StartFlags::INITDOMAIN)
    }
}

/// Reads the structure at `address`.
///
/// # Errors
/// When it cannot be read or is not one.
pub fn parse(
    memory: &impl PhysicalMemory,
    address: u64,
    image: core::ops::Range<u64>,
) -> Result<BootInfo, BootError> {
    let raw = memory.bytes(address, SIZE).ok_or(BootError::Unreadable)?;
    if !raw.starts_with(b"xen-") {
        return Err(BootError::BadMagic);
    }
    let u32_at = |offset| read_u32(raw, offset).ok_or(BootError::Unreadable);
    let u64_at = |offset| read_u64(raw, offset).ok_or(BootError::Unreadable);

    let flags = StartFlags::from_bits_retain(u32_at(48)?);
    let initial = flags.contains(StartFlags::INITDOMAIN);
    let shared_page = |mfn: u64, port: u32| {
        (!initial && mfn != 0).then_some(SharedPage { mfn: Mfn(mfn), port: Port(port) })
    };
    let mut start_info = StartInfo {
        address,
        nr_pages: u64_at(32)?,
        shared_info: u64_at(40)?,
        flags,
        store: shared_page(u64_at(56)?, u32_at(64)?),
        console: shared_page(u64_at(72)?, u32_at(80)?),
        pt_base: u64_at(88)?,
        nr_pt_frames: u64_at(96)?,
        mfn_list: u64_at(104)?,
        bootstrap_end: 0,
    };
    let (mod_start, mod_len) = (u64_at(112)?, u64_at(120)?);

    // Xen's order (xen.h, "Start-of-day memory layout"): image, module, p2m list, start_info with its
    // two pages, page tables, stack. The stack is the last page; the rest of the 4 MiB is only mapped.
    let page = PAGE_SIZE as u64;
    let tables_end = start_info
        .nr_pt_frames
        .checked_mul(page)
        .and_then(|len| start_info.pt_base.checked_add(len))
        .and_then(|end| end.checked_add(page))
        .ok_or(BootError::Unreadable)?;
    let list_end = start_info
        .nr_pages
        .checked_mul(8)
        .and_then(|len| start_info.mfn_list.checked_add(len))
        .ok_or(BootError::Unreadable)?;
    start_info.bootstrap_end = tables_end.max(image.end).max((address | (page - 1)) + 1 + 2 * page);
    if list_end < tables_end {
        start_info.bootstrap_end = start_info.bootstrap_end.max(list_end.next_multiple_of(page));
    }

    let mut info = BootInfo::new(Door::XenPv, Protocol::XenPv(start_info), image.clone());
    let Some(bytes) = start_info.nr_pages.checked_shl(PAGE_SHIFT) else {
        return Err(BootError::Unreadable);
    };
    info.add_memory(0, bytes, MemoryKind::Usable);
    info.reserve(image.end, start_info.bootstrap_end - image.end, "Xen's boot area");

    let command_line = raw.get(CMD_LINE..).unwrap_or_default();
    let command_line = command_line.get(..MAX_GUEST_CMDLINE).unwrap_or(command_line);
    info.command_line = command_line.split(|&byte| byte == 0).next().unwrap_or_default();

    if mod_len != 0 {
        let start = if flags.contains(StartFlags::MOD_START_PFN) {
            mod_start.checked_mul(page)
        } else {
            Some(mod_start)
        };
        match start {
            Some(start) => info.add_module(memory, start, mod_len, &[]),
            None => info.problems |= Problems::MODULE_REJECTED,
        }
    }
    Ok(info)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::fake::FakeMemory;

    const BASE: u64 = 0x28_0000;
    const IMAGE: core::ops::Range<u64> = 0x20_0000..0x24_0000;

    fn start_info(flags: u32) -> Vec<u8> {
        let mut bytes = vec![0; 0x3000];
        bytes[..14].copy_from_slice(b"xen-3.0-x86_64");
        let mut put = |offset: usize, value: u64| {
            bytes[offset..offset + 8].copy_from_slice(&value.to_le_bytes());
        };
        put(32, 0x8000); // nr_pages
        put(40, 0x1234_5000); // shared_info
        put(48, u64::from(flags));
        put(56, 0x77); // store_mfn
        put(64, 1);
        put(72, 0x78); // console.domU.mfn
        put(80, 2);
        put(88, BASE + 0x3000); // pt_base
        put(96, 5); // nr_pt_frames
        put(104, 0x24_0000); // mfn_list
        put(112, BASE + 0x2000); // mod_start
        put(120, 4); // mod_len
        bytes[128..134].copy_from_slice(b"hello\0");
        bytes[0x2000..0x2004].copy_from_slice(b"data");
        bytes
    }

    #[test]
    fn a_guest_domain_has_rings_and_a_first_domain_has_none() {
        for (flags, rings) in [(0, true), (3, false)] {
            let memory = FakeMemory::new(BASE, start_info(flags));
            let info = parse(&memory, BASE, IMAGE).unwrap();
            let Protocol::XenPv(start_info) = info.protocol else { panic!("wrong protocol") };
            assert_eq!(start_info.console.map(|c| (c.mfn.0, c.port.0)), rings.then_some((0x78, 2)));
            assert_eq!(start_info.store.map(|s| (s.mfn.0, s.port.0)), rings.then_some((0x77, 1)));
            assert_eq!(info.command_line, b"hello");
            assert_eq!(info.modules[0].data, b"data");
            assert_eq!(info.memory.usable_bytes(), 0x800_0000);
        }
    }

    #[test]
    fn everything_xen_placed_is_reserved() {
        let info = parse(&FakeMemory::new(BASE, start_info(0)), BASE, IMAGE).unwrap();
        // Tables are 5 pages from 0x283000, then the stack.
        assert!(
            info.reserved.iter().any(|r| r.start.0 == 0x24_0000 && r.start.0 + r.len == 0x28_9000)
        );
    }

    #[test]
    fn impossible_numbers_are_errors() {
        for offset in [32, 88, 96, 104] {
            let mut bytes = start_info(0);
            bytes[offset..offset + 8].copy_from_slice(&u64::MAX.to_le_bytes());
            let result = parse(&FakeMemory::new(BASE, bytes), BASE, IMAGE);
            assert_eq!(result.map(|_| ()), Err(BootError::Unreadable), "offset {offset}");
        }
        let memory = FakeMemory::new(BASE, vec![0; 0x1000]);
        assert_eq!(parse(&memory, BASE, IMAGE).map(|_| ()), Err(BootError::BadMagic));
    }
}

//! What a PV guest finds in `rsi` (`xen/include/public/xen.h`, `struct start_info`).

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::addr::{Mfn, Port};

open_flags! {
    /// [`StartInfo::flags`] (`SIF_*`).
    pub struct StartFlags: u32 {
        /// The domain is privileged.
        const PRIVILEGED = 1 << 0;
        /// It is dom0.
        const INITDOMAIN = 1 << 1;
        /// `mod_start` is a multiboot module.
        const MULTIBOOT_MOD = 1 << 2;
        /// `mod_start` is a frame number.
        const MOD_START_PFN = 1 << 3;
        /// Tools understand a linear p2m.
        const VIRT_P2M_4TOOLS = 1 << 4;
    }
}

/// Bytes of [`StartInfo::cmd_line`].
pub const MAX_GUEST_CMDLINE: usize = 1024;

/// The start info page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct StartInfo {
    /// "xen-<version>-<platform>", ended by a zero byte.
    pub magic: [u8; 32],
    /// Pages of the domain.
    pub nr_pages: u64,
    /// Machine address of the shared info page.
    pub shared_info: u64,
    /// Flags.
    pub flags: StartFlags,
    /// Padding; zero.
    pub pad0: [u8; 4],
    /// Machine frame of the xenstore ring.
    pub store_mfn: Mfn,
    /// Its port.
    pub store_evtchn: Port,
    /// Padding; zero.
    pub pad1: [u8; 4],
    /// Machine frame of the console ring (dom0: offset and size of its video information).
    pub console_mfn: Mfn,
    /// Its port.
    pub console_evtchn: Port,
    /// Padding; zero.
    pub pad2: [u8; 4],
    /// Virtual address of the page directory.
    pub pt_base: u64,
    /// Frames of bootstrap page tables.
    pub nr_pt_frames: u64,
    /// Virtual address of the p2m list.
    pub mfn_list: u64,
    /// Virtual address of the module, or its frame number.
    pub mod_start: u64,
    /// Bytes of the module.
    pub mod_len: u64,
    /// Command line, ended by a zero byte.
    pub cmd_line: [u8; 1024],
    /// First frame of the initial p2m list, if not mapped.
    pub first_p2m_pfn: u64,
    /// Its frames.
    pub nr_p2m_frames: u64,
}
assert_layout!(
    StartInfo,
    size = 1168,
    magic = 0,
    nr_pages = 32,
    shared_info = 40,
    flags = 48,
    store_mfn = 56,
    store_evtchn = 64,
    console_mfn = 72,
    console_evtchn = 80,
    pt_base = 88,
    nr_pt_frames = 96,
    mfn_list = 104,
    mod_start = 112,
    mod_len = 120,
    cmd_line = 128,
    first_p2m_pfn = 1152,
    nr_p2m_frames = 1160
);

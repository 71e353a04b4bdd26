//! The grant table of this domain: which pages other domains may use.
//!
//! The entries and the rules for them are [`janus_proto::grant`]'s; here the table gets its memory, a
//! frame at a time as it fills. Its frames are Xen's: a PV guest maps them, a PVH guest has Xen put them
//! under guest frames where no memory is. Both appear at [`TABLE`], far above any RAM.
// UNSAFETY: maps the table and makes a slice of it.
#![expect(unsafe_code, reason = "maps Xen's frames and makes a slice of them")]

use alloc::vec;
use alloc::vec::Vec;
use core::sync::atomic::AtomicU32;

use janus_proto::abi::xen::Errno;
use janus_proto::abi::xen::memory::MapSpace;
use janus_proto::addr::{DomId, Gpa, GrantRef, Mfn, PAGE_SHIFT, PAGE_SIZE, Pfn};
use janus_proto::grant::{Access, EndError, GrantTable};

use crate::hypercall;
use crate::mm::paging::{self, Flags, MapError, pv};
use crate::platform::lock::IrqLock;
use crate::platform::{self, Platform};

/// Where the table is: 256 GiB, above any RAM and inside the 40 bits of every CPU that Xen runs on.
const TABLE: usize = 1 << 38;

struct State {
    table: GrantTable<&'static [AtomicU32]>,
    /// Frames mapped now.
    frames: u32,
    /// Frames that Xen allows.
    max_frames: u32,
}

static STATE: IrqLock<Option<State>> = IrqLock::new(None);

/// Why there is no grant, or no table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GrantError {
    /// Xen refused.
    Xen(Errno),
    /// The table's frame could not be mapped.
    Map(MapError),
    /// The table is as large as Xen allows, and full.
    Full,
    /// The page is not this domain's, or its number does not fit the table.
    NotOurs,
    /// Grants were not set up.
    NotReady,
}

impl core::fmt::Display for GrantError {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self {
            Self::Xen(error) => write!(f, "grant table: {error}"),
            Self::Map(error) => write!(f, "grant table: {error}"),
            Self::Full => f.write_str("the grant table is full"),
            Self::NotOurs => f.write_str("the page is not this domain's to grant"),
            Self::NotReady => f.write_str("the grant table is not set up"),
        }
    }
}

impl From<Errno> for GrantError {
    fn from(error: Errno) -> Self {
        Self::Xen(error)
    }
}

impl From<MapError> for GrantError {
    fn from(error: MapError) -> Self {
        Self::Map(error)
    }
}

/// Sets up the table with one frame; the heap and paging are there.
///
/// # Errors
/// See [`GrantError`].
pub(crate) fn init() -> Result<(), GrantError> {
    let max_frames = hypercall::grant::query_size()?.max;
    let memory = extend(0, 1)?;
    *STATE.lock() = Some(State { table: GrantTable::new(memory), frames: 1, max_frames });
    Ok(())
}

/// Makes the table `frames` long, of which the first `mapped` are mapped already.
fn extend(mapped: u32, frames: u32) -> Result<&'static [AtomicU32], GrantError> {
    let count = usize::try_from(frames).map_err(|_| GrantError::Full)?;
    if platform::current() == Platform::XenPv {
        let mut list = vec![0_u64; count];
        hypercall::grant::setup_table(&mut list)?;
        for (index, mfn) in list.iter().enumerate().skip(mapped as usize) {
            // SAFETY: nothing else is at `TABLE`; the table is only seen as atomics.
            unsafe { pv::map_machine(TABLE + index * PAGE_SIZE, Mfn(*mfn), Flags::WRITE) }?;
        }
    } else {
        for index in mapped..frames {
            let va = TABLE + index as usize * PAGE_SIZE;
            let frame = Pfn((va >> PAGE_SHIFT) as u64);
            // SAFETY: there is no memory under these frames, and nobody else puts any there.
            unsafe {
                hypercall::memory::add_to_physmap(MapSpace::GRANT_TABLE, index.into(), frame)
            }?;
            // SAFETY: as above.
            unsafe { paging::map(va, frame, 1, Flags::WRITE) }?;
        }
    }
    let words = count * PAGE_SIZE / size_of::<AtomicU32>();
    // SAFETY: this many bytes have just been mapped, for good; a page is aligned, and any bits are atomics.
    Ok(unsafe { core::slice::from_raw_parts(core::ptr::with_exposed_provenance(TABLE), words) })
}

impl State {
    fn make_longer(&mut self) -> Result<(), GrantError> {
        let frames = self.frames.saturating_mul(2).min(self.max_frames);
        if frames <= self.frames {
            return Err(GrantError::Full);
        }
        let memory = extend(self.frames, frames)?;
        self.table.grow(memory);
        self.frames = frames;
        Ok(())
    }
}

/// Lets `peer` use a page until [`end`].
///
/// # Errors
/// See [`GrantError`].
///
/// # Safety
/// Until [`end`] answers `Ok`, the page is not freed; with [`Access::ReadWrite`] no reference to its bytes
/// exists other than as atomics.
pub unsafe fn grant(peer: DomId, page: Gpa, access: Access) -> Result<GrantRef, GrantError> {
    let frame = frame_of(Pfn::containing(page)).ok_or(GrantError::NotOurs)?;
    let mut state = STATE.lock();
    let state = state.as_mut().ok_or(GrantError::NotReady)?;
    if state.table.available() == 0 {
        state.make_longer()?;
    }
    state.table.grant(peer, frame, access).ok_or(GrantError::Full)
}

/// As [`grant`], for pages of which each has the next reference.
///
/// # Errors
/// See [`GrantError`].
///
/// # Safety
/// As [`grant`], for each page.
pub(crate) unsafe fn grant_run(
    peer: DomId,
    start: Gpa,
    pages: usize,
    access: Access,
) -> Result<GrantRef, GrantError> {
    let frames = (0..pages as u64).map(|page| frame_of(Pfn(Pfn::containing(start).0 + page)));
    let frames: Vec<u32> = frames.collect::<Option<_>>().ok_or(GrantError::NotOurs)?;
    let mut state = STATE.lock();
    let state = state.as_mut().ok_or(GrantError::NotReady)?;
    loop {
        if let Some(first) = state.table.grant_run(peer, &frames, access) {
            return Ok(first);
        }
        state.make_longer()?;
    }
}

/// The number that a grant entry holds for a page of ours.
fn frame_of(page: Pfn) -> Option<u32> {
    let number = if platform::current() == Platform::XenPv { pv::mfn(page)?.0 } else { page.0 };
    u32::try_from(number).ok()
}

/// Takes a page back from the peer, and frees the reference.
///
/// # Errors
/// The peer still uses it, or it was never granted; nothing changed.
pub fn end(reference: GrantRef) -> Result<(), EndError> {
    STATE.lock().as_mut().ok_or(EndError::NotGranted)?.table.end(reference)
}

/// The state of the table, for people.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct GrantStatistics {
    /// Grants that stand.
    pub in_use: u32,
    /// References that can be had without making the table longer.
    pub available: usize,
    /// Frames of the table now.
    pub frames: u32,
    /// Frames at most.
    pub max_frames: u32,
}

/// How full the table is; all zero where there is none.
#[must_use]
pub fn statistics() -> GrantStatistics {
    STATE.lock().as_ref().map_or_else(GrantStatistics::default, |state| GrantStatistics {
        in_use: state.table.in_use(),
        available: state.table.available(),
        frames: state.frames,
        max_frames: state.max_frames,
    })
}

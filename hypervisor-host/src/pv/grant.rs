//! The grant table of one domain: what it lets others use of its memory (`xen/include/public/grant_table.h`).
//!
//! The table itself is frames that the guest writes; here is what Xen keeps beside it: which references are in use,
//! how often, and for which frame. A reference is looked at once, when its first user comes, and its use is marked in
//! the table until the last user has gone.

mod entry;
mod mapping;
pub(crate) mod op;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::fmt;
use std::hash::{BuildHasherDefault, Hasher};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use janus_proto::abi::xen::grant_table::{
    GNTTAB_RESERVED_CONSOLE, GNTTAB_RESERVED_XENSTORE, GrantStatus, MapFlags, MapGrantRef,
};
use janus_proto::addr::{DomId, GrantRef, Mfn};
use janus_proto::grant::Access;

pub use self::mapping::{GrantedPages, Grants};
use crate::machine::ram::Ram;

/// Frames that a table may grow to, as `xl` limits it (`max_grant_frames`).
pub const MAX_GRANT_FRAMES: u64 = 64;
/// Frames of status words that belong to as many version 2 entries: 2 bytes for each 16.
pub const MAX_STATUS_FRAMES: u64 = MAX_GRANT_FRAMES / 8;

/// Pages that a guest may have mapped at a time (`max_maptrack_frames`, but each entry is one of ours).
const MAX_MAPS: usize = 4096;

/// Who uses one reference.
#[derive(Clone, Copy, Debug)]
struct Pin {
    frame: Mfn,
    domain: DomId,
    readers: u32,
    writers: u32,
}

/// Hashes a reference: a small number of the guest's choice, with which it can slow down only its own devices.
#[derive(Clone, Copy, Debug, Default)]
struct ByNumber(u64);

impl Hasher for ByNumber {
    fn finish(&self) -> u64 {
        self.0
    }
    fn write(&mut self, bytes: &[u8]) {
        bytes.iter().for_each(|byte| self.write_u32(u32::from(*byte)));
    }
    fn write_u32(&mut self, number: u32) {
        // Fibonacci hashing: the odd number next to 2^64 over the golden ratio.
        self.0 = (self.0 ^ u64::from(number)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    }
}

type Pins = HashMap<u32, Pin, BuildHasherDefault<ByNumber>>;

#[derive(Debug)]
struct State {
    /// 1 or 2.
    version: u32,
    /// Frames of entries in use.
    frames: u64,
    pins: Pins,
    /// What the guest has mapped itself, by handle.
    maps: Vec<Option<Tracked>>,
}

/// One mapping by the guest.
#[derive(Clone, Copy, Debug)]
struct Tracked {
    reference: GrantRef,
    access: Access,
    frame: Mfn,
    flags: MapFlags,
}

/// Keeps a frame from changing its type while somebody of the host's writes to it.
pub trait FrameTypes: Send + Sync {
    /// Takes a reference to a frame of the guest's own memory, as a writable page or for reading.
    fn get(&self, frame: Mfn, access: Access) -> bool;
    /// Gives it back.
    fn put(&self, frame: Mfn, access: Access);
}

/// The grant table of a domain.
pub struct GrantTable {
    ram: Arc<Ram>,
    /// All frames it may have: entries, then status.
    first: Mfn,
    state: Mutex<State>,
    types: Arc<dyn FrameTypes>,
}

impl fmt::Debug for GrantTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = self.lock();
        f.debug_struct("GrantTable")
            .field("version", &state.version)
            .field("frames", &state.frames)
            .field("in_use", &state.pins.len())
            .finish_non_exhaustive()
    }
}

impl GrantTable {
    /// An empty table of version 1 whose frames, [`MAX_GRANT_FRAMES`] and then [`MAX_STATUS_FRAMES`], begin at `first`.
    pub(crate) fn new(ram: Arc<Ram>, first: Mfn, types: Arc<dyn FrameTypes>) -> Self {
        let state = State { version: 1, frames: 1, pins: Pins::default(), maps: Vec::new() };
        Self { ram, first, state: Mutex::new(state), types }
    }

    /// Grants console and xenstore rings to domain 0, as the toolstack does.
    pub(crate) fn grant_rings(&self, console: Mfn, xenstore: Mfn) {
        for (reference, frame) in
            [(GNTTAB_RESERVED_CONSOLE, console), (GNTTAB_RESERVED_XENSTORE, xenstore)]
        {
            entry::grant(&self.ram, self.first, reference, DomId(0), frame);
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets `domain` use what a reference grants; answers its frame.
    pub(crate) fn acquire(
        &self,
        reference: GrantRef,
        domain: DomId,
        access: Access,
    ) -> Result<Mfn, GrantStatus> {
        let mut state = self.lock();
        let table = entry::Entries::new(&self.ram, self.first, state.version, state.frames);
        let known = state.pins.get(&reference.0).copied();
        if let Some(pin) = known
            && pin.domain != domain
        {
            return Err(GrantStatus::GENERAL_ERROR);
        }
        let frame = match known {
            // Whoever writes has been checked for that already.
            Some(pin) if access == Access::ReadOnly || pin.writers > 0 => pin.frame,
            Some(pin) => {
                table.acquire(reference, domain, access)?;
                pin.frame
            }
            None => table.acquire(reference, domain, access)?,
        };
        let release_unused = |state: &State| {
            if known.is_none_or(|pin| pin.writers == 0) && access == Access::ReadWrite {
                entry::Entries::new(&self.ram, self.first, state.version, state.frames)
                    .release(reference, Access::ReadWrite);
            }
            if known.is_none() {
                entry::Entries::new(&self.ram, self.first, state.version, state.frames)
                    .release(reference, Access::ReadOnly);
            }
        };
        if !self.types.get(frame, access) {
            release_unused(&state);
            return Err(GrantStatus::BAD_PAGE);
        }
        let pin =
            state.pins.entry(reference.0).or_insert(Pin { frame, domain, readers: 0, writers: 0 });
        let count = match access {
            Access::ReadOnly => &mut pin.readers,
            Access::ReadWrite => &mut pin.writers,
        };
        *count = count.saturating_add(1);
        Ok(frame)
    }

    /// Gives back what [`Self::acquire`] gave.
    pub(crate) fn release(&self, reference: GrantRef, access: Access) {
        let mut state = self.lock();
        let Some(pin) = state.pins.get_mut(&reference.0) else { return };
        let count = match access {
            Access::ReadOnly => &mut pin.readers,
            Access::ReadWrite => &mut pin.writers,
        };
        *count = count.saturating_sub(1);
        let pin = *pin;
        self.types.put(pin.frame, access);
        let table = entry::Entries::new(&self.ram, self.first, state.version, state.frames);
        if pin.writers == 0 && access == Access::ReadWrite {
            table.release(reference, Access::ReadWrite);
        }
        if pin.writers == 0 && pin.readers == 0 {
            table.release(reference, Access::ReadOnly);
            state.pins.remove(&reference.0);
        }
    }

    /// Remembers a mapping of the guest's; answers its handle.
    fn track(
        &self,
        argument: &MapGrantRef,
        access: Access,
        frame: Mfn,
    ) -> Result<u32, GrantStatus> {
        let mut state = self.lock();
        let tracked =
            Tracked { reference: argument.reference, access, frame, flags: argument.flags };
        let index = match state.maps.iter().position(Option::is_none) {
            Some(index) => index,
            None if state.maps.len() < MAX_MAPS => {
                state.maps.push(None);
                state.maps.len() - 1
            }
            None => return Err(GrantStatus::NO_SPACE),
        };
        if let Some(place) = state.maps.get_mut(index) {
            *place = Some(tracked);
        }
        u32::try_from(index).map_err(|_| GrantStatus::NO_SPACE)
    }

    fn tracked(&self, handle: u32) -> Result<Tracked, GrantStatus> {
        let state = self.lock();
        state.maps.get(handle as usize).copied().flatten().ok_or(GrantStatus::BAD_HANDLE)
    }

    /// Keeps what is left of a mapping; nothing: it and its reference are given back.
    fn keep(&self, handle: u32, left: MapFlags) {
        let mut state = self.lock();
        let Some(place) = state.maps.get_mut(handle as usize) else { return };
        let Some(held) = place else { return };
        held.flags = left;
        if left.intersects(MapFlags::HOST_MAP | MapFlags::DEVICE_MAP) {
            return;
        }
        let Tracked { reference, access, .. } = *held;
        *place = None;
        drop(state);
        self.release(reference, access);
    }

    /// References that are in use: frame, readers and writers of each.
    pub(crate) fn pins(&self) -> Vec<(GrantRef, Mfn, u32, u32)> {
        let state = self.lock();
        let pin = |(reference, pin): (&u32, &Pin)| {
            (GrantRef(*reference), pin.frame, pin.readers, pin.writers)
        };
        let mut pins: Vec<_> = state.pins.iter().map(pin).collect();
        pins.sort();
        pins
    }

    /// References that are in use.
    #[must_use]
    pub fn in_use(&self) -> usize {
        self.lock().pins.len()
    }
}

//! The control ring of a card (`netif.h`, "Control protocol"): how the frontend wants flows hashed, and which queue gets
//! which.

use std::sync::{Arc, Mutex, PoisonError};

use janus_proto::abi::xen_io::netif::{
    CTRL_SLOT_WORDS, CtrlStatus, CtrlType, HashAlgorithm, HashTypes, NetCtrlRequest,
    NetCtrlResponse,
};
use janus_proto::addr::GrantRef;
use janus_proto::grant::Access;
use janus_proto::ring::Back;
use zerocopy::{IntoBytes as _, transmute};

use super::NetbackError;
use super::hash::KEY_BYTES;
use super::steer::CardNet;
use crate::memory::{GrantMapper, copy_out};

/// Entries of a mapping at most, as Linux's backend.
pub(super) const MOST_MAPPINGS: u32 = 128;
const PAGE_ENTRIES: u32 = 1024;

/// The control ring of a connected card.
#[derive(Debug)]
pub struct Control<G: GrantMapper> {
    ring: Back<G::Mapping, CTRL_SLOT_WORDS>,
    mapper: G,
    card: Arc<Mutex<CardNet>>,
}

impl<G: GrantMapper> Control<G> {
    /// Serves the ring that a frontend published.
    ///
    /// # Errors
    /// It cannot be mapped, or is nonsense.
    pub fn connect(
        mapper: G,
        ring: GrantRef,
        card: Arc<Mutex<CardNet>>,
    ) -> Result<Self, NetbackError> {
        let page = mapper.map(&[ring], Access::ReadWrite).map_err(NetbackError::Map)?;
        let ring = Back::attach(page).map_err(NetbackError::Ring)?;
        Ok(Self { ring, mapper, card })
    }

    /// Does everything that is on the ring; `true`: notify the frontend.
    ///
    /// # Errors
    /// The frontend broke the ring: disconnect.
    pub fn serve(&mut self) -> Result<bool, NetbackError> {
        let mut notify = false;
        loop {
            while let Some(slot) =
                self.ring.pop::<[u32; CTRL_SLOT_WORDS]>().map_err(NetbackError::Ring)?
            {
                let NetCtrlRequest { id, kind, data } = transmute!(slot);
                let (status, data) = self.obey(kind, data);
                let response = NetCtrlResponse { id, kind, status, data };
                self.ring.push(&response).map_err(NetbackError::Ring)?;
                notify |= self.ring.publish();
            }
            if !self.ring.final_check_for_requests() {
                return Ok(notify);
            }
        }
    }

    fn obey(&mut self, kind: CtrlType, data: [u32; 3]) -> (CtrlStatus, u32) {
        let mut card = self.card.lock().unwrap_or_else(PoisonError::into_inner);
        let queues = card.queue_count();
        let hash = card.hash_mut();
        let [first, second, third] = data;
        let done = match kind {
            CtrlType::SET_HASH_ALGORITHM => {
                let algorithm = HashAlgorithm(first);
                let known = [HashAlgorithm::NONE, HashAlgorithm::TOEPLITZ].contains(&algorithm);
                known.then(|| hash.algorithm = algorithm)
            }
            CtrlType::GET_HASH_FLAGS if hash.algorithm == HashAlgorithm::NONE => {
                return (CtrlStatus::NOT_SUPPORTED, 0);
            }
            CtrlType::GET_HASH_FLAGS => return (CtrlStatus::SUCCESS, HashTypes::ALL.bits()),
            CtrlType::SET_HASH_FLAGS => {
                let types = HashTypes::from_bits_retain(first);
                let possible =
                    hash.algorithm != HashAlgorithm::NONE && HashTypes::ALL.contains(types);
                possible.then(|| hash.types = types)
            }
            CtrlType::SET_HASH_KEY => self.key(first, second).map(|key| hash.key = key),
            CtrlType::GET_HASH_MAPPING_SIZE => return (CtrlStatus::SUCCESS, MOST_MAPPINGS),
            CtrlType::SET_HASH_MAPPING_SIZE => (first <= MOST_MAPPINGS)
                .then(|| hash.mapping = vec![0; usize::try_from(first).unwrap_or(0)]),
            CtrlType::SET_HASH_MAPPING => self.entries(first, second).and_then(|entries| {
                let start = usize::try_from(third).ok()?;
                let end = start.checked_add(entries.len())?;
                let place = hash.mapping.get_mut(start..end)?;
                // All or nothing.
                let known = entries.iter().all(|queue| (*queue as usize) < queues);
                known.then(|| place.copy_from_slice(&entries))
            }),
            _ => return (CtrlStatus::NOT_SUPPORTED, 0),
        };
        (done.map_or(CtrlStatus::INVALID_PARAMETER, |()| CtrlStatus::SUCCESS), 0)
    }

    /// A key of so many bytes, the rest zeroes.
    fn key(&self, grant: u32, len: u32) -> Option<[u8; KEY_BYTES]> {
        let mut key = [0; KEY_BYTES];
        let part = key.get_mut(..usize::try_from(len).ok()?)?;
        if part.is_empty() {
            return Some(key);
        }
        let page = self.mapper.map(&[GrantRef(grant)], Access::ReadOnly).ok()?;
        copy_out(&page, 0, part).then_some(key)
    }

    /// Entries of a mapping, from the start of a page.
    fn entries(&self, grant: u32, count: u32) -> Option<Vec<u32>> {
        let count = usize::try_from(Some(count).filter(|count| *count <= PAGE_ENTRIES)?).ok()?;
        let mut entries = vec![0; count];
        if count > 0 {
            let page = self.mapper.map(&[GrantRef(grant)], Access::ReadOnly).ok()?;
            copy_out(&page, 0, entries.as_mut_bytes()).then_some(())?;
        }
        Some(entries)
    }
}

#[cfg(test)]
mod tests;

//! The host's way to granted pages.

use std::ops::Deref;
use std::sync::Arc;
use std::sync::atomic::AtomicU32;

use janus_proto::abi::xen::grant_table::GrantStatus;
use janus_proto::addr::{DomId, GrantRef, Mfn};
use janus_proto::grant::Access;

use super::GrantTable;
use crate::machine::window::Window;
use crate::memory::{GrantMapper, MapError};

/// What a domain grants to domain 0, for the backends.
#[derive(Clone, Debug)]
pub struct Grants {
    table: Arc<GrantTable>,
}

impl Grants {
    pub(crate) fn new(table: Arc<GrantTable>) -> Self {
        Self { table }
    }
}

/// Holds references of a grant table; dropping it gives them back.
#[derive(Debug)]
struct Held {
    table: Arc<GrantTable>,
    references: Vec<GrantRef>,
    access: Access,
}

impl Drop for Held {
    fn drop(&mut self) {
        for reference in &self.references {
            self.table.release(*reference, self.access);
        }
    }
}

#[derive(Debug)]
enum View {
    /// Frames that follow each other: a part of the mapping of all memory.
    Whole { first: Mfn, pages: u64 },
    /// Others.
    Scattered(Window),
}

/// Granted pages; the mapping ends, and the guest may have them back, when this is dropped.
#[derive(Debug)]
pub struct GrantedPages {
    view: View,
    held: Held,
}

impl Deref for GrantedPages {
    type Target = [AtomicU32];
    fn deref(&self) -> &[AtomicU32] {
        match &self.view {
            View::Whole { first, pages } => {
                self.held.table.ram.words(*first, *pages).unwrap_or_default()
            }
            View::Scattered(window) => window,
        }
    }
}

impl GrantMapper for Grants {
    type Mapping = GrantedPages;
    fn map(&self, grants: &[GrantRef], access: Access) -> Result<GrantedPages, MapError> {
        let table = &self.table;
        let references = Vec::with_capacity(grants.len());
        let mut held = Held { table: Arc::clone(table), references, access };
        let mut frames = Vec::with_capacity(grants.len());
        for reference in grants {
            frames.push(table.acquire(*reference, DomId(0), access).map_err(MapError)?);
            held.references.push(*reference);
        }
        let pages = frames.len() as u64;
        let follows = |(a, b): (&Mfn, &Mfn)| a.0.checked_add(1) == Some(b.0);
        let view = match frames.first() {
            Some(first) if frames.iter().zip(frames.iter().skip(1)).all(follows) => {
                table.ram.words(*first, pages).ok_or(MapError(GrantStatus::BAD_PAGE))?;
                View::Whole { first: *first, pages }
            }
            Some(_) => View::Scattered(
                Window::new(&table.ram, &frames).map_err(|_| MapError(GrantStatus::NO_SPACE))?,
            ),
            None => return Err(MapError(GrantStatus::GENERAL_ERROR)),
        };
        Ok(GrantedPages { view, held })
    }
}

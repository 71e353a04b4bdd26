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

/// References; most mappings are of one, and take no memory for it.
#[derive(Debug)]
enum References {
    One(GrantRef),
    Many(Vec<GrantRef>),
}

/// Holds references of a grant table; dropping it gives them back.
#[derive(Debug)]
struct Held {
    table: Arc<GrantTable>,
    references: References,
    access: Access,
}

impl Drop for Held {
    fn drop(&mut self) {
        let references = match &self.references {
            References::One(reference) => std::slice::from_ref(reference),
            References::Many(references) => references,
        };
        for reference in references {
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
        let hold = |references| Held { table: Arc::clone(table), references, access };
        if let [reference] = grants {
            let first = table.acquire(*reference, DomId(0), access).map_err(MapError)?;
            let held = hold(References::One(*reference));
            table.ram.words(first, 1).ok_or(MapError(GrantStatus::BAD_PAGE))?;
            return Ok(GrantedPages { view: View::Whole { first, pages: 1 }, held });
        }
        let mut held = hold(References::Many(Vec::with_capacity(grants.len())));
        let mut frames = Vec::with_capacity(grants.len());
        for reference in grants {
            frames.push(table.acquire(*reference, DomId(0), access).map_err(MapError)?);
            if let References::Many(references) = &mut held.references {
                references.push(*reference);
            }
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

//! The guest's memory as a back half sees it: only what was granted, only as atomics.

use std::fmt;
use std::ops::Deref;

use janus_proto::abi::xen::grant_table::GrantStatus;
use janus_proto::addr::GrantRef;
use janus_proto::grant::Access;
use janus_proto::sync::AtomicU32;

mod copy;
pub(crate) mod guard;

pub use copy::{Piece, copy_in, copy_out};

/// A grant could not be mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MapError(pub GrantStatus);

impl fmt::Display for MapError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the guest's page cannot be mapped: {:?}", self.0)
    }
}

/// Maps what one guest granted to us.
pub trait GrantMapper {
    /// Mapped pages; dropping it unmaps them.
    type Mapping: Deref<Target = [AtomicU32]>;
    /// Maps whole pages, one behind the other in the order of `grants`.
    ///
    /// # Errors
    /// One of them is not granted to us, or not for this access.
    fn map(&self, grants: &[GrantRef], access: Access) -> Result<Self::Mapping, MapError>;
}

/// What a frontend wrote into its directory is missing or nonsense.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BadNode(pub &'static str);

impl fmt::Display for BadNode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the frontend's node {} is missing or nonsense", self.0)
    }
}

/// Reads a frontend's directory: the value of a node, if it is there.
pub(crate) struct FrontendNodes<'a>(pub(crate) &'a dyn Fn(&str) -> Option<String>);

impl FrontendNodes<'_> {
    /// A number, if the node is there.
    pub(crate) fn optional<T: std::str::FromStr>(
        &self,
        node: &'static str,
    ) -> Result<Option<T>, BadNode> {
        (self.0)(node).map(|text| text.parse().map_err(|_| BadNode(node))).transpose()
    }
    /// A number that must be there.
    pub(crate) fn required<T: std::str::FromStr>(&self, node: &'static str) -> Result<T, BadNode> {
        self.optional(node)?.ok_or(BadNode(node))
    }
    /// A feature node: `1`.
    pub(crate) fn feature(&self, node: &str) -> bool {
        (self.0)(node).as_deref() == Some("1")
    }
}

/// A guest's memory for tests.
#[cfg(test)]
pub(crate) mod fake {
    use std::sync::Arc;

    use super::*;

    /// Reference `n` is page `n`; odd pages are granted for reading only.
    #[derive(Clone, Debug)]
    pub(crate) struct Pages(Arc<[Arc<[AtomicU32]>]>);

    impl Pages {
        pub(crate) fn new(count: usize) -> Self {
            let page = || (0..1024).map(|_| AtomicU32::new(0)).collect();
            Self((0..count).map(|_| page()).collect())
        }
        pub(crate) fn page(&self, index: usize) -> Arc<[AtomicU32]> {
            self.0[index].clone()
        }
    }

    impl GrantMapper for Pages {
        type Mapping = Arc<[AtomicU32]>;
        fn map(&self, grants: &[GrantRef], access: Access) -> Result<Self::Mapping, MapError> {
            let [grant] = grants else { panic!("one page at a time") };
            if access == Access::ReadWrite && grant.0 % 2 != 0 {
                return Err(MapError(GrantStatus::PERMISSION_DENIED));
            }
            let page = self.0.get(grant.0 as usize).cloned();
            page.ok_or(MapError(GrantStatus::BAD_GNTREF))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_come_and_go_at_any_alignment() {
        for offset in 0..8 {
            for len in 0..(17 - offset) {
                let words: Vec<_> = (0..4).map(|_| AtomicU32::new(u32::MAX)).collect();
                let bytes: Vec<u8> = (1..=len).map(|i| u8::try_from(i).unwrap()).collect();
                assert!(copy_in(&words, offset, &bytes));
                let mut whole = [0; 16];
                assert!(copy_out(&words, 0, &mut whole));
                let mut want = [0xff; 16];
                want[offset..offset + len].copy_from_slice(&bytes);
                assert_eq!(whole, want, "{offset} {len}");
                let mut back = vec![0; len];
                assert!(copy_out(&words, offset, &mut back));
                assert_eq!(back, bytes);
            }
        }
        let words: Vec<_> = (0..4).map(|_| AtomicU32::new(0)).collect();
        assert!(!copy_in(&words, 16, &[1]) && !copy_out(&words, usize::MAX, &mut [0]));
    }
}

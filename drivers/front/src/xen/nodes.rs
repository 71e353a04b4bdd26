//! The xenstore nodes of one device: read into a table, checked on the way out; collected to be written.
//!
//! Everything in the peer's directory was written by somebody else. A missing optional node has its default,
//! nonsense in any node is an error that names it.

use alloc::collections::BTreeMap;
use alloc::string::String;
use alloc::vec::Vec;
use core::fmt;

/// What is wrong with a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NodeFault {
    /// It is needed and not there.
    Missing,
    /// It is not the number, address or text that it should be.
    Nonsense,
    /// It is a number that makes no sense here.
    OutOfRange,
}

/// A node that stops a device from connecting.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NodeError {
    /// Its name in the device's directory.
    pub node: &'static str,
    /// What is wrong.
    pub fault: NodeFault,
}

impl fmt::Display for NodeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let fault = match self.fault {
            NodeFault::Missing => "is missing",
            NodeFault::Nonsense => "is nonsense",
            NodeFault::OutOfRange => "is out of range",
        };
        write!(f, "xenstore node {} {fault}", self.node)
    }
}

impl core::error::Error for NodeError {}

/// Values of a directory, by name, as they were read.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Nodes(BTreeMap<String, Vec<u8>>);

impl Nodes {
    /// Puts a value in.
    pub fn insert(&mut self, name: &str, value: &[u8]) {
        self.0.insert(String::from(name), value.to_vec());
    }

    /// A node's text, if the node is there.
    ///
    /// # Errors
    /// [`NodeFault::Nonsense`]: not UTF-8.
    pub fn text(&self, node: &'static str) -> Result<Option<&str>, NodeError> {
        let Some(value) = self.0.get(node) else { return Ok(None) };
        match core::str::from_utf8(value) {
            Ok(text) => Ok(Some(text.trim())),
            Err(_) => Err(NodeError { node, fault: NodeFault::Nonsense }),
        }
    }

    /// A node's decimal number, if the node is there.
    ///
    /// # Errors
    /// [`NodeFault::Nonsense`], [`NodeFault::OutOfRange`].
    pub fn number<T: TryFrom<u64>>(&self, node: &'static str) -> Result<Option<T>, NodeError> {
        let Some(text) = self.text(node)? else { return Ok(None) };
        if text.is_empty() || !text.bytes().all(|b| b.is_ascii_digit()) {
            return Err(NodeError { node, fault: NodeFault::Nonsense });
        }
        let number = text.parse::<u64>().ok().and_then(|number| T::try_from(number).ok());
        number.map(Some).ok_or(NodeError { node, fault: NodeFault::OutOfRange })
    }

    /// A node's number, which must be there.
    ///
    /// # Errors
    /// [`NodeError`].
    pub fn required<T: TryFrom<u64>>(&self, node: &'static str) -> Result<T, NodeError> {
        self.number(node)?.ok_or(NodeError { node, fault: NodeFault::Missing })
    }

    /// A feature: 1 is on; 0, nonsense and absence are off, because a feature is never needed.
    #[must_use]
    pub fn feature(&self, node: &'static str) -> bool {
        self.number::<u64>(node).is_ok_and(|value| value == Some(1))
    }
}

/// Nodes to write into a device's own directory, all in one transaction.
pub type Publication = Vec<(String, String)>;

/// Joins what each queue of a device publishes: one queue as it is, several each in a directory of its own, with what
/// holds for the whole device above them (`blkif.h` and `netif.h`, "multi-queue").
pub(super) fn publish_queues(queues: impl Iterator<Item = Publication>) -> Publication {
    let mut queues: Vec<Publication> = queues.collect();
    if queues.len() == 1 {
        return queues.pop().unwrap_or_default();
    }
    let mut nodes = Publication::new();
    publish(&mut nodes, "multi-queue-num-queues", queues.len());
    for (index, queue) in queues.into_iter().enumerate() {
        for (name, value) in queue {
            let own = ["ring-ref", "tx-ring-ref", "rx-ring-ref", "event-channel"];
            if own.iter().any(|start| name.starts_with(start)) {
                nodes.push((alloc::format!("queue-{index}/{name}"), value));
            } else if index == 0 {
                nodes.push((name, value));
            }
        }
    }
    nodes
}

/// Adds a node to a publication.
pub(super) fn publish(to: &mut Publication, name: &str, value: impl fmt::Display) {
    to.push((String::from(name), alloc::format!("{value}")));
}

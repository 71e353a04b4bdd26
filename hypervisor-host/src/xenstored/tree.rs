//! The nodes: a persistent tree, so that a snapshot for a transaction costs nothing.

use std::collections::BTreeMap;
use std::sync::Arc;

use janus_proto::addr::DomId;
use janus_proto::xenstore::{Access, Permission, StoreError};

/// A node.
#[derive(Clone, Debug)]
pub struct Node {
    /// Its bytes.
    pub value: Vec<u8>,
    /// Owner first.
    pub permissions: Vec<Permission>,
    /// Changes whenever the value, the permissions or the list of children do.
    pub generation: u64,
    children: BTreeMap<String, Arc<Node>>,
}

impl Node {
    /// The names of the children, each closed by a NUL.
    #[must_use]
    pub fn list(&self) -> Vec<u8> {
        self.children.keys().flat_map(|name| name.bytes().chain([0])).collect()
    }

    fn owner(&self) -> DomId {
        self.permissions.first().map_or(DomId(0), |first| first.domain)
    }

    /// What a domain may do: the owner and domain 0 everything, others what their entry or the first says.
    fn allows(&self, domain: DomId, write: bool) -> bool {
        if domain == DomId(0) || domain == self.owner() {
            return true;
        }
        let entry = self.permissions.iter().skip(1).find(|entry| entry.domain == domain);
        let access = entry.or(self.permissions.first()).map_or(Access::None, |entry| entry.access);
        match access {
            Access::Both => true,
            Access::Write => write,
            Access::Read => !write,
            Access::None => false,
        }
    }

    /// Calls `each` with the owner of this node and of all below.
    fn owners(&self, each: &mut impl FnMut(DomId)) {
        each(self.owner());
        self.children.values().for_each(|child| child.owners(each));
    }
}

/// One change; paths are absolute.
#[derive(Clone, Debug)]
pub enum Change {
    /// Sets a value, making the node.
    Write(String, Vec<u8>),
    /// Makes an empty node, or leaves it.
    Make(String),
    /// Removes a node and all below.
    Remove(String),
    /// Replaces permissions.
    SetPermissions(String, Vec<Permission>),
}

impl Change {
    /// The node.
    #[must_use]
    pub fn path(&self) -> &str {
        match self {
            Self::Write(path, _)
            | Self::Make(path)
            | Self::Remove(path)
            | Self::SetPermissions(path, _) => path,
        }
    }
}

/// The whole store.
#[derive(Clone, Debug)]
pub struct Tree {
    root: Arc<Node>,
    generation: u64,
    /// Nodes that each domain but 0 owns.
    owned: BTreeMap<u16, usize>,
}

impl Default for Tree {
    fn default() -> Self {
        let permissions = vec![Permission { access: Access::None, domain: DomId(0) }];
        let (value, children) = (Vec::new(), BTreeMap::new());
        let root = Arc::new(Node { value, permissions, generation: 0, children });
        Self { root, generation: 0, owned: BTreeMap::new() }
    }
}

/// A path and its ancestors, nearest first, `/` last.
pub fn ancestors(path: &str) -> impl Iterator<Item = &str> {
    std::iter::successors(Some(path), |path| match path.rsplit_once('/')? {
        _ if *path == "/" => None,
        ("", _) => Some("/"),
        (parent, _) => Some(parent),
    })
}

fn components(path: &str) -> impl Iterator<Item = &str> {
    path.split('/').filter(|part| !part.is_empty())
}

impl Tree {
    /// A node, whoever asks.
    #[must_use]
    pub fn get(&self, path: &str) -> Option<&Node> {
        let mut node = &self.root;
        for part in components(path) {
            node = node.children.get(part)?;
        }
        Some(node)
    }

    /// A node that `domain` may read.
    ///
    /// # Errors
    /// [`StoreError::AccessDenied`], also for a missing node below one it may not read, so that it
    /// cannot find out; [`StoreError::NotFound`].
    pub fn readable(&self, path: &str, domain: DomId) -> Result<&Node, StoreError> {
        let (node, exact) = self.nearest(path);
        match (node.allows(domain, false), exact) {
            (false, _) => Err(StoreError::AccessDenied),
            (true, false) => Err(StoreError::NotFound),
            (true, true) => Ok(node),
        }
    }

    /// The node, or the nearest one above it that exists; and whether it is the node itself.
    fn nearest(&self, path: &str) -> (&Node, bool) {
        let mut node = &self.root;
        for part in components(path) {
            match node.children.get(part) {
                Some(child) => node = child,
                None => return (node, false),
            }
        }
        (node, true)
    }

    /// Whether the node, or the nearest one above it, lets `domain` in.
    fn allowed(&self, path: &str, domain: DomId, write: bool) -> Result<(), StoreError> {
        if self.nearest(path).0.allows(domain, write) {
            Ok(())
        } else {
            Err(StoreError::AccessDenied)
        }
    }

    /// Nodes that a domain owns.
    #[must_use]
    pub fn count(&self, domain: DomId) -> usize {
        self.owned.get(&domain.0).copied().unwrap_or(0)
    }

    fn takes(&mut self, domain: DomId) {
        if domain != DomId(0) {
            *self.owned.entry(domain.0).or_default() += 1;
        }
    }

    fn gives_up(&mut self, domain: DomId) {
        if let Some(count) = self.owned.get_mut(&domain.0) {
            *count = count.saturating_sub(1);
        }
    }

    /// Makes a change on behalf of `domain`, or none at all.
    ///
    /// # Errors
    /// What the daemon answers; `NoSpace` beyond `quota` nodes.
    pub fn apply(
        &mut self,
        change: &Change,
        domain: DomId,
        quota: usize,
    ) -> Result<(), StoreError> {
        let path = change.path();
        if path.starts_with('@') {
            return Err(StoreError::Invalid);
        }
        self.allowed(path, domain, true)?;
        match change {
            Change::Write(_, value) => {
                self.make(path, domain, quota)?;
                self.edit(path, |node| node.value.clone_from(value));
            }
            Change::Make(_) => {
                if self.get(path).is_none() {
                    self.make(path, domain, quota)?;
                }
            }
            Change::Remove(_) => {
                let (parent, name) = match ancestors(path).nth(1) {
                    // The root stays.
                    None => return Err(StoreError::Invalid),
                    Some(parent) => (parent, path.rsplit('/').next().unwrap_or_default()),
                };
                if self.get(path).is_none() {
                    // The C daemon forgives this if the parent exists.
                    return self.get(parent).map(|_| ()).ok_or(StoreError::NotFound);
                }
                let mut removed = None;
                self.edit(parent, |node| removed = node.children.remove(name));
                if let Some(removed) = removed {
                    removed.owners(&mut |owner| self.gives_up(owner));
                }
            }
            Change::SetPermissions(_, permissions) => {
                let node = self.get(path).ok_or(StoreError::NotFound)?;
                let Some(first) = permissions.first() else { return Err(StoreError::Invalid) };
                // Only the owner changes permissions, and only domain 0 gives nodes away.
                let owner = node.owner();
                if domain != DomId(0) && (domain != owner || first.domain != owner) {
                    return Err(StoreError::NotPermitted);
                }
                let next = first.domain;
                self.edit(path, |node| node.permissions.clone_from(permissions));
                if next != owner {
                    self.gives_up(owner);
                    self.takes(next);
                }
            }
        }
        Ok(())
    }

    /// Makes a node and what is missing above it; new nodes inherit permissions, and belong to their maker.
    fn make(&mut self, path: &str, domain: DomId, quota: usize) -> Result<(), StoreError> {
        let missing: Vec<_> = ancestors(path).take_while(|path| self.get(path).is_none()).collect();
        if missing.is_empty() {
            return Ok(());
        }
        if domain != DomId(0) && self.count(domain) + missing.len() > quota {
            return Err(StoreError::NoSpace);
        }
        for path in missing.into_iter().rev() {
            let parent = ancestors(path).nth(1).unwrap_or("/");
            let mut permissions =
                self.get(parent).map(|node| node.permissions.clone()).unwrap_or_default();
            if let (Some(first), true) = (permissions.first_mut(), domain != DomId(0)) {
                first.domain = domain;
            }
            self.takes(permissions.first().map_or(DomId(0), |first| first.domain));
            let name = path.rsplit('/').next().unwrap_or_default().to_owned();
            let (value, children) = (Vec::new(), BTreeMap::new());
            let generation = self.generation + 1;
            let node = Arc::new(Node { value, permissions, generation, children });
            self.edit(parent, |parent| drop(parent.children.insert(name, node)));
        }
        Ok(())
    }

    /// Changes an existing node, copying it and what is above it if a snapshot shares them.
    fn edit(&mut self, path: &str, change: impl FnOnce(&mut Node)) {
        self.generation += 1;
        let mut node = Arc::make_mut(&mut self.root);
        for part in components(path) {
            let Some(child) = node.children.get_mut(part) else { return };
            node = Arc::make_mut(child);
        }
        node.generation = self.generation;
        change(node);
    }
}

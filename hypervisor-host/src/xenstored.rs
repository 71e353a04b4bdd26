//! An in-memory xenstore daemon: tree, permissions, watches, transactions and quota.
//!
//! Behaves as the C daemon does towards a guest (`docs/misc/xenstore.txt`, `tools/xenstore`): a conflict is
//! `EAGAIN`, hidden nodes are `EACCES`, events are sent only to those who may read the node. Connections are either
//! local (a backend or the toolstack calls [`Xenstored::request`]) or served over a ring page by [`ring::RingServer`].
//! [`tree`] has the nodes; nothing here waits.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use janus_proto::abi::xen_io::xs_wire::PAYLOAD_MAX;
use janus_proto::addr::DomId;
use janus_proto::xenstore::{Message, Permission, Request, Server, StoreError, TransactionId};

pub mod ring;
#[cfg(test)]
mod tests;
pub mod tree;

use tree::{Change, Tree};

/// Limits for a domain other than 0; the defaults are the C daemon's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Quota {
    /// Nodes a domain owns.
    pub nodes: usize,
    /// Watches of a connection.
    pub watches: usize,
    /// Open transactions of a connection.
    pub transactions: usize,
    /// Bytes in a value.
    pub value_bytes: usize,
    /// Nodes that a transaction looks at, and changes that it makes.
    pub transaction_nodes: usize,
    /// Entries in a node's permissions.
    pub permissions: usize,
    /// Events that a connection does not take; further ones are lost.
    pub events: usize,
}

impl Default for Quota {
    fn default() -> Self {
        Self {
            nodes: 1000,
            watches: 128,
            transactions: 10,
            value_bytes: 2048,
            transaction_nodes: 1024,
            permissions: 5,
            events: 8192,
        }
    }
}

/// Names a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ConnectionId(u32);

/// A node under a watch changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WatchEvent {
    /// The node, relative if the watch is.
    pub path: String,
    /// As given with the watch.
    pub token: String,
}

/// What a request yields.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reply {
    /// Nothing but success.
    Done,
    /// The payload of the answer.
    Payload(Vec<u8>),
}

#[derive(Debug)]
struct Watch {
    /// Absolute, or a special name.
    path: String,
    token: String,
    /// Was given relative to the domain's home.
    relative: bool,
}

#[derive(Debug)]
struct Transaction {
    tree: Tree,
    /// Nodes looked at or changed, with their generations at the start (`None`: absent).
    seen: BTreeMap<String, Option<u64>>,
    /// The tree at the start, for `seen`.
    base: Tree,
    changes: Vec<Change>,
}

#[derive(Debug)]
struct Connection {
    domain: DomId,
    watches: Vec<Watch>,
    transactions: BTreeMap<u32, Transaction>,
    last_transaction: u32,
    events: VecDeque<WatchEvent>,
    /// Somebody else's thread takes its events.
    visitor: bool,
}

/// The daemon.
#[derive(Debug, Default)]
pub struct Xenstored {
    tree: Tree,
    quota: Quota,
    connections: BTreeMap<ConnectionId, Connection>,
    last_connection: u32,
    /// Events queued so far.
    activity: u64,
    /// There are new events for visitors.
    visitors_wait: bool,
}

/// The home of a domain.
#[must_use]
pub fn home(domain: DomId) -> String {
    format!("/local/domain/{domain}")
}

/// Whether `path` is `root` or below it.
fn is_below(path: &str, root: &str) -> bool {
    root == "/"
        || path.strip_prefix(root).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

impl Xenstored {
    /// An empty store.
    #[must_use]
    pub fn new(quota: Quota) -> Self {
        Self { quota, ..Self::default() }
    }

    /// A new connection of a domain; domain 0 may do everything.
    pub fn connect(&mut self, domain: DomId) -> ConnectionId {
        self.connect_as(domain, false)
    }

    /// As [`Self::connect`] for somebody who has to be told, by [`Self::others_wait`], that there are events.
    pub fn connect_visitor(&mut self, domain: DomId) -> ConnectionId {
        self.connect_as(domain, true)
    }

    /// How many events were queued so far: whoever sees the same number twice has missed nothing.
    #[must_use]
    pub fn activity(&self) -> u64 {
        self.activity
    }

    /// Whether there are events for visitors that were not there at the last call.
    pub fn others_wait(&mut self) -> bool {
        std::mem::take(&mut self.visitors_wait)
    }

    fn connect_as(&mut self, domain: DomId, visitor: bool) -> ConnectionId {
        self.last_connection += 1;
        let id = ConnectionId(self.last_connection);
        let connection = Connection {
            domain,
            watches: Vec::new(),
            transactions: BTreeMap::new(),
            last_transaction: 0,
            events: VecDeque::new(),
            visitor,
        };
        self.connections.insert(id, connection);
        id
    }

    /// Ends a connection with its watches and transactions.
    pub fn disconnect(&mut self, id: ConnectionId) {
        self.connections.remove(&id);
    }

    /// Takes the oldest event of a connection.
    pub fn event(&mut self, id: ConnectionId) -> Option<WatchEvent> {
        self.connections.get_mut(&id)?.events.pop_front()
    }

    /// Fires a special watch (`@introduceDomain`, `@releaseDomain`), which only domain 0 hears.
    pub fn announce(&mut self, name: &str) {
        for connection in self.connections.values_mut().filter(|c| c.domain == DomId(0)) {
            for watch in connection.watches.iter().filter(|watch| watch.path == name) {
                let (path, token) = (name.to_owned(), watch.token.clone());
                connection.events.push_back(WatchEvent { path, token });
                self.activity += 1;
                self.visitors_wait |= connection.visitor;
            }
        }
    }

    /// Does what a connection asks.
    ///
    /// # Errors
    /// What the daemon answers: see [`StoreError`].
    pub fn request(
        &mut self,
        id: ConnectionId,
        transaction: TransactionId,
        request: &Request<'_>,
    ) -> Result<Reply, StoreError> {
        let connection = self.connections.get(&id).ok_or(StoreError::Invalid)?;
        let domain = connection.domain;
        let absolute = |path: &str| match path.as_bytes().first() {
            Some(b'/' | b'@') => path.to_owned(),
            _ => format!("{}/{path}", home(domain)),
        };
        let text = |text: String| Reply::Payload((text + "\0").into_bytes());
        match request {
            Request::Watch { path, token } => {
                self.watch(id, absolute(path), token, !path.starts_with(['/', '@']))
            }
            Request::Unwatch { path, token } => {
                let path = absolute(path);
                let connection = self.connections.get_mut(&id).ok_or(StoreError::Invalid)?;
                let found = |watch: &Watch| watch.path == path && watch.token == *token;
                let index =
                    connection.watches.iter().position(found).ok_or(StoreError::NotFound)?;
                connection.watches.remove(index);
                Ok(Reply::Done)
            }
            Request::ResetWatches => {
                let connection = self.connections.get_mut(&id).ok_or(StoreError::Invalid)?;
                connection.watches.clear();
                connection.events.clear();
                connection.transactions.clear();
                Ok(Reply::Done)
            }
            Request::GetDomainPath(domain) => Ok(text(home(*domain))),
            Request::TransactionStart => self.start(id).map(|id| text(id.to_string())),
            Request::Commit => self.commit(id, transaction).map(|()| Reply::Done),
            Request::Abandon => {
                let connection = self.connections.get_mut(&id).ok_or(StoreError::Invalid)?;
                let ended = connection.transactions.remove(&transaction.0);
                ended.map(|_| Reply::Done).ok_or(StoreError::NotFound)
            }
            Request::Read(path) => {
                let node = self.look(id, transaction, &absolute(path))?;
                Ok(Reply::Payload(node.value.clone()))
            }
            Request::GetPermissions(path) => {
                let node = self.look(id, transaction, &absolute(path))?;
                let list = node.permissions.iter().map(|entry| format!("{entry}\0"));
                Ok(Reply::Payload(list.collect::<String>().into_bytes()))
            }
            Request::Directory(path) => {
                Ok(Reply::Payload(self.look(id, transaction, &absolute(path))?.list()))
            }
            Request::DirectoryPart { path, offset } => {
                let node = self.look(id, transaction, &absolute(path))?;
                Ok(Reply::Payload(part(node, *offset as usize)))
            }
            Request::Write { path, value } => {
                if domain != DomId(0) && value.len() > self.quota.value_bytes {
                    return Err(StoreError::NoSpace);
                }
                self.change(id, transaction, Change::Write(absolute(path), value.to_vec()))
            }
            Request::MakeDirectory(path) => {
                self.change(id, transaction, Change::Make(absolute(path)))
            }
            Request::Remove(path) => self.change(id, transaction, Change::Remove(absolute(path))),
            Request::SetPermissions { path, permissions } => {
                if domain != DomId(0) && permissions.len() > self.quota.permissions {
                    return Err(StoreError::NoSpace);
                }
                let change = Change::SetPermissions(absolute(path), permissions.clone());
                self.change(id, transaction, change)
            }
        }
    }

    /// A node that the connection may read, remembered by its transaction.
    fn look(
        &mut self,
        id: ConnectionId,
        transaction: TransactionId,
        path: &str,
    ) -> Result<&tree::Node, StoreError> {
        let limit = self.quota.transaction_nodes;
        let connection = self.connections.get_mut(&id).ok_or(StoreError::Invalid)?;
        let domain = connection.domain;
        if transaction == TransactionId::NONE {
            return self.tree.readable(path, domain);
        }
        let transaction =
            connection.transactions.get_mut(&transaction.0).ok_or(StoreError::NotFound)?;
        transaction.check(domain, limit)?;
        transaction.remember(path);
        transaction.tree.readable(path, domain)
    }

    fn change(
        &mut self,
        id: ConnectionId,
        transaction: TransactionId,
        change: Change,
    ) -> Result<Reply, StoreError> {
        let (quota, limit) = (self.quota.nodes, self.quota.transaction_nodes);
        let connection = self.connections.get_mut(&id).ok_or(StoreError::Invalid)?;
        let domain = connection.domain;
        if transaction == TransactionId::NONE {
            let before = Before::of(&self.tree, &change);
            self.tree.apply(&change, domain, quota)?;
            self.fire(&before, &change);
            return Ok(Reply::Done);
        }
        let transaction =
            connection.transactions.get_mut(&transaction.0).ok_or(StoreError::NotFound)?;
        transaction.check(domain, limit)?;
        // Creating or removing a node changes its parent's list too.
        for path in tree::ancestors(change.path()).take(2) {
            transaction.remember(path);
        }
        transaction.tree.apply(&change, domain, quota)?;
        transaction.changes.push(change);
        Ok(Reply::Done)
    }

    fn start(&mut self, id: ConnectionId) -> Result<u32, StoreError> {
        let limit = self.quota.transactions;
        let connection = self.connections.get_mut(&id).ok_or(StoreError::Invalid)?;
        if connection.domain != DomId(0) && connection.transactions.len() >= limit {
            return Err(StoreError::NoSpace);
        }
        loop {
            connection.last_transaction = connection.last_transaction.wrapping_add(1);
            let id = connection.last_transaction;
            if id != 0 && !connection.transactions.contains_key(&id) {
                let (tree, base) = (self.tree.clone(), self.tree.clone());
                let (seen, changes) = (BTreeMap::new(), Vec::new());
                connection.transactions.insert(id, Transaction { tree, seen, base, changes });
                return Ok(id);
            }
        }
    }

    fn commit(&mut self, id: ConnectionId, transaction: TransactionId) -> Result<(), StoreError> {
        let quota = self.quota.nodes;
        let connection = self.connections.get_mut(&id).ok_or(StoreError::Invalid)?;
        let domain = connection.domain;
        let transaction =
            connection.transactions.remove(&transaction.0).ok_or(StoreError::NotFound)?;
        let moved = |(path, generation): (&String, &Option<u64>)| {
            self.tree.get(path).map(|node| node.generation) != *generation
        };
        if transaction.seen.iter().any(moved) {
            return Err(StoreError::Again);
        }
        // All or nothing, then the events in the order of the changes.
        let mut tree = self.tree.clone();
        let mut befores = Vec::with_capacity(transaction.changes.len());
        for change in &transaction.changes {
            befores.push(Before::of(&tree, change));
            tree.apply(change, domain, quota)?;
        }
        self.tree = tree;
        for (change, before) in transaction.changes.iter().zip(befores) {
            self.fire(&before, change);
        }
        Ok(())
    }

    fn watch(
        &mut self,
        id: ConnectionId,
        path: String,
        token: &str,
        relative: bool,
    ) -> Result<Reply, StoreError> {
        let limit = self.quota.watches;
        let connection = self.connections.get_mut(&id).ok_or(StoreError::Invalid)?;
        if connection.watches.iter().any(|watch| watch.path == path && watch.token == token) {
            return Err(StoreError::Exists);
        }
        if connection.domain != DomId(0) && connection.watches.len() >= limit {
            return Err(StoreError::TooBig);
        }
        let watch = Watch { path: path.clone(), token: token.to_owned(), relative };
        // A new watch fires once, whether or not the node exists.
        connection.events.push_back(watch.event(&path, connection.domain));
        connection.watches.push(watch);
        self.activity += 1;
        self.visitors_wait |= connection.visitor;
        Ok(Reply::Done)
    }

    /// Queues the events of a change: for the node and what is above it, and after a removal for
    /// every watched node that went with it.
    fn fire(&mut self, before: &Before, change: &Change) {
        let changed = change.path();
        let most = self.quota.events;
        let removed = match before {
            Before::Nothing => None,
            Before::Unchanged => return,
            Before::Removal(tree) => Some(tree),
        };
        let mut fired = Vec::new();
        for connection in self.connections.values_mut() {
            if connection.watches.is_empty() {
                continue;
            }
            let mut paths = BTreeSet::new();
            for watch in &connection.watches {
                let gone =
                    removed.filter(|_| watch.path != changed && is_below(&watch.path, changed));
                let path = match (is_below(changed, &watch.path), gone) {
                    (true, _) => changed,
                    (false, Some(tree)) if tree.get(&watch.path).is_some() => &watch.path,
                    _ => continue,
                };
                // A removed node is judged by the permissions it had.
                let judge = removed.unwrap_or(&self.tree);
                let visible = judge.readable(path, connection.domain).is_ok();
                if visible && paths.insert((path, &watch.token, &watch.path)) {
                    fired.push(watch.event(path, connection.domain));
                }
            }
            for event in fired.drain(..) {
                if connection.queue(event, most) {
                    self.activity += 1;
                    self.visitors_wait |= connection.visitor;
                }
            }
        }
    }
}

/// What the events of a change need to know of the tree before it.
#[derive(Debug)]
enum Before {
    /// Nothing.
    Nothing,
    /// The change changes nothing.
    Unchanged,
    /// A node goes: who may hear of it is judged by this.
    Removal(Tree),
}

impl Before {
    fn of(tree: &Tree, change: &Change) -> Self {
        match change {
            Change::Write(..) | Change::SetPermissions(..) => Self::Nothing,
            Change::Make(path) if tree.get(path).is_some() => Self::Unchanged,
            Change::Make(_) => Self::Nothing,
            Change::Remove(path) if tree.get(path).is_none() => Self::Unchanged,
            Change::Remove(_) => Self::Removal(tree.clone()),
        }
    }
}

impl Watch {
    fn event(&self, path: &str, domain: DomId) -> WatchEvent {
        let path = if self.relative {
            let home = home(domain) + "/";
            path.strip_prefix(&home).unwrap_or(path)
        } else {
            path
        };
        WatchEvent { path: path.to_owned(), token: self.token.clone() }
    }
}

impl Connection {
    /// Queues an event; `false`: it is there already, or there are too many.
    fn queue(&mut self, event: WatchEvent, most: usize) -> bool {
        // What a client has not taken yet tells it all that another one of the same would. The newest suffice: a client
        // that is far behind has them in turn.
        let same = self.events.iter().rev().take(RECENT).any(|waiting| *waiting == event);
        let lost = self.domain != DomId(0) && self.events.len() >= most;
        let is_new = !same && !lost;
        if is_new {
            self.events.push_back(event);
        }
        is_new
    }
}

/// Waiting events among which a new one is looked for.
const RECENT: usize = 16;

impl Transaction {
    /// Whether a guest may do one thing more in it.
    fn check(&self, domain: DomId, limit: usize) -> Result<(), StoreError> {
        let used = self.seen.len().max(self.changes.len());
        if domain != DomId(0) && used >= limit { Err(StoreError::NoSpace) } else { Ok(()) }
    }

    fn remember(&mut self, path: &str) {
        let generation = self.base.get(path).map(|node| node.generation);
        self.seen.entry(path.to_owned()).or_insert(generation);
    }
}

/// The payload of a `DIRECTORY_PART` answer: the generation, whole names from `offset` on as they fit, and one
/// more NUL behind the last name of all.
fn part(node: &tree::Node, offset: usize) -> Vec<u8> {
    let list = node.list();
    let mut payload = format!("{}\0", node.generation).into_bytes();
    let room = PAYLOAD_MAX - payload.len() - 1;
    let rest = list.get(offset..).unwrap_or_default();
    let fits = if rest.len() <= room {
        rest.len()
    } else {
        let window = rest.get(..room).unwrap_or_default();
        window.iter().rposition(|&byte| byte == 0).map_or(0, |end| end + 1)
    };
    payload.extend_from_slice(rest.get(..fits).unwrap_or_default());
    if fits == rest.len() {
        payload.push(0);
    }
    payload
}

/// Does what a message asks, and queues the answer.
pub fn answer(
    store: &mut Xenstored,
    connection: ConnectionId,
    server: &mut Server,
    message: &Message,
) {
    let reply = Request::parse(message.kind, &message.payload)
        .and_then(|request| store.request(connection, message.transaction, &request));
    match reply {
        Ok(Reply::Done) => server.reply_ok(message),
        Ok(Reply::Payload(payload)) => server.reply(message, payload),
        Err(error) => server.refuse(message, error),
    }
}

/// The permissions that a toolstack gives a device's directory: the owner, and one reader.
#[must_use]
pub fn owned_by(owner: DomId, reader: DomId) -> Vec<Permission> {
    use janus_proto::xenstore::Access;
    vec![
        Permission { access: Access::None, domain: owner },
        Permission { access: Access::Read, domain: reader },
    ]
}

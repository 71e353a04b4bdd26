//! The xenstore client for tasks: futures over the shared ring.
//!
//! One task serves the ring: it takes what the daemon wrote, completes requests and feeds watches, and
//! sends what did not fit. Any number of tasks may have requests under way; the wire protocol and the
//! matching of answers are [`janus_proto::xenstore`]'s. The daemon is not trusted either: if it breaks the
//! protocol, every request fails from then on and the guest goes on without it.

#[cfg(test)]
mod tests;

use alloc::boxed::Box;
use alloc::collections::{BTreeMap, VecDeque};
use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt;
use core::future::Future;
use core::pin::Pin;
use core::task::{Context, Poll, Waker};

use janus_front::xen::nodes::Nodes;
use janus_proto::byte_ring::{ByteRing, ByteRingError, XENSTORE};
use janus_proto::sync::AtomicU32;
use janus_proto::xenstore::{
    Client, ClientError, Event, ListStep, Listing, Permission, Request, RequestId, StoreError,
    Token, TransactionId, WireError, parse_permissions, parse_transaction_id,
};
use spin::mutex::SpinMutex;

use crate::sync::{Notify, PlatformRelax};
use crate::task;

/// Why xenstore did not do what was asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum XenStoreError {
    /// The daemon refused.
    Refused(StoreError),
    /// The request cannot be sent.
    Request(ClientError),
    /// The daemon broke the wire protocol; the connection is lost.
    Wire(WireError),
    /// The daemon broke the ring; the connection is lost.
    Ring(ByteRingError),
}

impl XenStoreError {
    /// Whether the node is just not there.
    #[must_use]
    pub fn is_not_found(self) -> bool {
        self == Self::Refused(StoreError::NotFound)
    }
}

impl fmt::Display for XenStoreError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Refused(error) => write!(f, "xenstore: {error}"),
            Self::Request(error) => write!(f, "xenstore: {error}"),
            Self::Wire(error) => error.fmt(f),
            Self::Ring(error) => write!(f, "xenstore ring: {error}"),
        }
    }
}

impl core::error::Error for XenStoreError {}

impl From<StoreError> for XenStoreError {
    fn from(error: StoreError) -> Self {
        Self::Refused(error)
    }
}

/// The ring page: the kernel's, or a test's.
pub type Memory = &'static [AtomicU32];
/// Tells the daemon that the ring changed.
pub type NotifyDaemon = Box<dyn Fn() + Send>;

/// How a request stands.
enum Answer {
    Waiting(Option<Waker>),
    Here(Result<Vec<u8>, XenStoreError>),
    /// Nobody waits for it any more.
    Abandoned,
}

/// Changed paths that a watch keeps for its reader at most. Beyond that, the watched node itself stands for
/// whatever changed below it.
const WATCH_EVENTS: usize = 128;

struct WatchState {
    /// What is watched.
    path: String,
    changed: VecDeque<String>,
    waker: Option<Waker>,
}

struct Inner {
    client: Client,
    ring: ByteRing<Memory>,
    notify: NotifyDaemon,
    answers: BTreeMap<RequestId, Answer>,
    watches: BTreeMap<Token, WatchState>,
    broken: Option<XenStoreError>,
}

impl Inner {
    /// Moves bytes both ways until neither moves, and hands out what came.
    fn pump(&mut self) {
        if self.broken.is_some() {
            return;
        }
        if let Err(error) = self.try_pump() {
            log::error!("{error}; xenstore is lost");
            self.fail(error);
        }
    }

    fn try_pump(&mut self) -> Result<(), XenStoreError> {
        let mut buf = [0; 1024];
        let mut moved = false;
        loop {
            let mut again = false;
            while !self.client.outgoing().is_empty() {
                let sent = self.ring.write(self.client.outgoing()).map_err(XenStoreError::Ring)?;
                if sent == 0 {
                    break;
                }
                self.client.sent(sent);
                again = true;
            }
            let came = self.ring.read(&mut buf).map_err(XenStoreError::Ring)?;
            self.client.received(buf.get(..came).unwrap_or(&[]));
            while let Some(event) = self.client.event().map_err(XenStoreError::Wire)? {
                self.deliver(event);
            }
            if came == 0 && !again {
                break;
            }
            moved = true;
        }
        if moved {
            (self.notify)();
        }
        Ok(())
    }

    fn deliver(&mut self, event: Event) {
        match event {
            Event::Reply { id, result } => self.answer(id, result.map_err(XenStoreError::Refused)),
            Event::Changed { token, path } => {
                let Some(watch) = self.watches.get_mut(&token) else { return };
                if !watch.changed.contains(&path) {
                    if watch.changed.len() >= WATCH_EVENTS {
                        watch.changed.clear();
                        watch.changed.push_back(watch.path.clone());
                    } else {
                        watch.changed.push_back(path);
                    }
                }
                if let Some(waker) = watch.waker.take() {
                    waker.wake();
                }
            }
        }
    }

    fn answer(&mut self, id: RequestId, result: Result<Vec<u8>, XenStoreError>) {
        match self.answers.insert(id, Answer::Here(result)) {
            Some(Answer::Waiting(waker)) => {
                if let Some(waker) = waker {
                    waker.wake();
                }
            }
            Some(Answer::Abandoned | Answer::Here(_)) | None => {
                self.answers.remove(&id);
            }
        }
    }

    /// Ends everything that waits.
    fn fail(&mut self, error: XenStoreError) {
        self.broken = Some(error);
        let waiting: Vec<RequestId> = self.answers.keys().copied().collect();
        for id in waiting {
            if !matches!(self.answers.get(&id), Some(Answer::Here(_))) {
                self.answer(id, Err(error));
            }
        }
        for watch in self.watches.values_mut() {
            if let Some(waker) = watch.waker.take() {
                waker.wake();
            }
        }
    }

    fn send(
        &mut self,
        transaction: TransactionId,
        request: &Request<'_>,
    ) -> Result<RequestId, XenStoreError> {
        if let Some(error) = self.broken {
            return Err(error);
        }
        let id = self.client.request(transaction, request).map_err(XenStoreError::Request)?;
        self.answers.insert(id, Answer::Waiting(None));
        Ok(id)
    }
}

/// The connection to xenstore.
pub struct XenStore {
    inner: SpinMutex<Inner, PlatformRelax>,
    work: Notify,
}

impl fmt::Debug for XenStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("XenStore")
    }
}

impl XenStore {
    /// Takes over the ring in `memory` and starts the task that serves it; `notify` sends the daemon an event.
    ///
    /// # Errors
    /// The ring's indices are nonsense.
    pub fn start(memory: Memory, notify: NotifyDaemon) -> Result<Arc<Self>, ByteRingError> {
        let ring = ByteRing::front(memory, XENSTORE)?;
        let store = Arc::new(Self {
            inner: SpinMutex::new(Inner {
                client: Client::default(),
                ring,
                notify,
                answers: BTreeMap::new(),
                watches: BTreeMap::new(),
                broken: None,
            }),
            work: Notify::new(),
        });
        drop(task::spawn("xenstore", Arc::clone(&store).serve()));
        Ok(store)
    }

    /// To be called on the daemon's event, from interrupt context.
    pub fn interrupt(&self) {
        self.work.notify();
    }

    async fn serve(self: Arc<Self>) {
        loop {
            // First a look: the daemon may have written before the handler was there.
            self.inner.lock().pump();
            self.work.notified().await;
        }
    }

    /// Whether requests can succeed.
    ///
    /// # Errors
    /// What the daemon did wrong.
    pub fn check(&self) -> Result<(), XenStoreError> {
        self.inner.lock().broken.map_or(Ok(()), Err)
    }

    /// Sends a request at once; the future waits for the answer.
    fn ask(&self, transaction: TransactionId, request: &Request<'_>) -> Asked<'_> {
        let mut inner = self.inner.lock();
        let state = inner.send(transaction, request);
        inner.pump();
        Asked { store: self, state: Some(state) }
    }

    /// A node's value.
    ///
    /// # Errors
    /// [`XenStoreError`].
    pub async fn read(&self, path: &str) -> Result<Vec<u8>, XenStoreError> {
        self.ask(TransactionId::NONE, &Request::Read(path)).await
    }

    /// A node's value, or `None` if there is no such node.
    ///
    /// # Errors
    /// [`XenStoreError`].
    pub async fn read_if_there(&self, path: &str) -> Result<Option<Vec<u8>>, XenStoreError> {
        match self.read(path).await {
            Ok(value) => Ok(Some(value)),
            Err(error) if error.is_not_found() => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Nodes below `directory`, all asked for at once; those that are not there are left out.
    ///
    /// # Errors
    /// [`XenStoreError`].
    pub async fn read_nodes(
        &self,
        directory: &str,
        names: &[&str],
    ) -> Result<Nodes, XenStoreError> {
        let asked: Vec<_> = names
            .iter()
            .map(|name| {
                let path = alloc::format!("{directory}/{name}");
                (*name, self.ask(TransactionId::NONE, &Request::Read(&path)))
            })
            .collect();
        let mut nodes = Nodes::default();
        for (name, asked) in asked {
            match asked.await {
                Ok(value) => nodes.insert(name, &value),
                Err(error) if error.is_not_found() => {}
                Err(error) => return Err(error),
            }
        }
        Ok(nodes)
    }

    /// Sets a node's value, creating it and its parents.
    ///
    /// # Errors
    /// [`XenStoreError`].
    pub async fn write(&self, path: &str, value: &[u8]) -> Result<(), XenStoreError> {
        self.ask(TransactionId::NONE, &Request::Write { path, value }).await.map(drop)
    }

    /// Removes a node and everything below it.
    ///
    /// # Errors
    /// [`XenStoreError`].
    pub async fn remove(&self, path: &str) -> Result<(), XenStoreError> {
        self.ask(TransactionId::NONE, &Request::Remove(path)).await.map(drop)
    }

    /// Creates an empty node and its parents.
    ///
    /// # Errors
    /// [`XenStoreError`].
    pub async fn make_directory(&self, path: &str) -> Result<(), XenStoreError> {
        self.ask(TransactionId::NONE, &Request::MakeDirectory(path)).await.map(drop)
    }

    /// The names of a node's children, however many.
    ///
    /// # Errors
    /// [`XenStoreError`].
    pub async fn list(&self, path: &str) -> Result<Vec<String>, XenStoreError> {
        let mut listing = Listing::new(path);
        loop {
            let result = self.ask(TransactionId::NONE, &listing.request()).await;
            let step = match &result {
                Ok(payload) => listing.reply(Ok(payload)),
                Err(XenStoreError::Refused(error)) => listing.reply(Err(*error)),
                Err(error) => return Err(*error),
            };
            if let ListStep::Done(names) = step? {
                return Ok(names);
            }
        }
    }

    /// A node's permissions.
    ///
    /// # Errors
    /// [`XenStoreError`].
    pub async fn permissions(&self, path: &str) -> Result<Vec<Permission>, XenStoreError> {
        let payload = self.ask(TransactionId::NONE, &Request::GetPermissions(path)).await?;
        parse_permissions(&payload).map_err(XenStoreError::Wire)
    }

    /// Replaces a node's permissions.
    ///
    /// # Errors
    /// [`XenStoreError`].
    pub async fn set_permissions(
        &self,
        path: &str,
        permissions: Vec<Permission>,
    ) -> Result<(), XenStoreError> {
        let request = Request::SetPermissions { path, permissions };
        self.ask(TransactionId::NONE, &request).await.map(drop)
    }

    /// Writes `nodes` below `directory`, all asked for at once and done in their order. For nodes that nobody looks at
    /// before another one tells them to: a transaction costs the daemon more than they do.
    ///
    /// # Errors
    /// [`XenStoreError`]; some may have been written then.
    pub async fn write_each(
        &self,
        directory: &str,
        nodes: &[(String, String)],
    ) -> Result<(), XenStoreError> {
        let mut asked = Vec::with_capacity(nodes.len());
        for (name, value) in nodes {
            let path = alloc::format!("{directory}/{name}");
            let request = Request::Write { path: &path, value: value.as_bytes() };
            asked.push(self.ask(TransactionId::NONE, &request));
        }
        for asked in asked {
            asked.await?;
        }
        Ok(())
    }

    /// Writes `nodes` below `directory`, all or none, again whenever others got in between.
    ///
    /// # Errors
    /// [`XenStoreError`]; `EAGAIN` after many conflicts in a row.
    pub async fn write_all(
        &self,
        directory: &str,
        nodes: &[(String, String)],
    ) -> Result<(), XenStoreError> {
        let mut conflicts = 0;
        loop {
            let transaction = self.begin().await?;
            let mut asked = Vec::with_capacity(nodes.len());
            for (name, value) in nodes {
                let path = alloc::format!("{directory}/{name}");
                let request = Request::Write { path: &path, value: value.as_bytes() };
                asked.push(self.ask(transaction.id, &request));
            }
            for asked in asked {
                asked.await?;
            }
            match transaction.commit().await {
                Err(XenStoreError::Refused(StoreError::Again)) if conflicts < MAX_CONFLICTS => {
                    conflicts += 1;
                }
                result => return result,
            }
        }
    }

    /// Opens a transaction. Dropped without [`Transaction::commit`], it is abandoned.
    ///
    /// # Errors
    /// [`XenStoreError`].
    pub async fn begin(&self) -> Result<Transaction<'_>, XenStoreError> {
        let payload = self.ask(TransactionId::NONE, &Request::TransactionStart).await?;
        let id = parse_transaction_id(&payload).map_err(XenStoreError::Wire)?;
        Ok(Transaction { store: self, id, open: true })
    }

    /// Watches a node and everything below it. The first event comes at once.
    ///
    /// # Errors
    /// [`XenStoreError`].
    pub async fn watch(self: &Arc<Self>, path: &str) -> Result<Watch, XenStoreError> {
        let (asked, watch) = {
            let mut inner = self.inner.lock();
            if let Some(error) = inner.broken {
                return Err(error);
            }
            let (id, token) = inner.client.watch(path).map_err(XenStoreError::Request)?;
            inner.answers.insert(id, Answer::Waiting(None));
            let path = String::from(path);
            let state = WatchState { path: path.clone(), changed: VecDeque::new(), waker: None };
            inner.watches.insert(token, state);
            inner.pump();
            (
                Asked { store: self, state: Some(Ok(id)) },
                Watch { store: Arc::clone(self), path, token },
            )
        };
        asked.await?;
        Ok(watch)
    }
}

/// Conflicts after which [`XenStore::write_all`] gives up.
const MAX_CONFLICTS: u32 = 32;

/// A request under way.
struct Asked<'a> {
    store: &'a XenStore,
    /// `None` once it has ended.
    state: Option<Result<RequestId, XenStoreError>>,
}

impl Future for Asked<'_> {
    type Output = Result<Vec<u8>, XenStoreError>;
    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let id = match self.state {
            Some(Ok(id)) => id,
            Some(Err(error)) => return Poll::Ready(Err(error)),
            None => return Poll::Ready(Err(XenStoreError::Refused(StoreError::Io))),
        };
        let result = {
            let mut inner = self.store.inner.lock();
            match inner.answers.remove(&id) {
                Some(Answer::Here(result)) => result,
                _ => {
                    inner.answers.insert(id, Answer::Waiting(Some(cx.waker().clone())));
                    return Poll::Pending;
                }
            }
        };
        self.state = None;
        Poll::Ready(result)
    }
}

impl Drop for Asked<'_> {
    fn drop(&mut self) {
        let Some(Ok(id)) = self.state else { return };
        let mut inner = self.store.inner.lock();
        if let Some(Answer::Waiting(_)) = inner.answers.remove(&id) {
            inner.answers.insert(id, Answer::Abandoned);
        }
    }
}

/// A transaction: what it reads and writes is seen by others all at once, or never.
#[derive(Debug)]
#[must_use = "dropping it abandons what was written"]
pub struct Transaction<'a> {
    store: &'a XenStore,
    id: TransactionId,
    open: bool,
}

impl Transaction<'_> {
    /// As [`XenStore::read`].
    ///
    /// # Errors
    /// [`XenStoreError`].
    pub async fn read(&self, path: &str) -> Result<Vec<u8>, XenStoreError> {
        self.store.ask(self.id, &Request::Read(path)).await
    }

    /// As [`XenStore::write`].
    ///
    /// # Errors
    /// [`XenStoreError`].
    pub async fn write(&self, path: &str, value: &[u8]) -> Result<(), XenStoreError> {
        self.store.ask(self.id, &Request::Write { path, value }).await.map(drop)
    }

    /// As [`XenStore::remove`].
    ///
    /// # Errors
    /// [`XenStoreError`].
    pub async fn remove(&self, path: &str) -> Result<(), XenStoreError> {
        self.store.ask(self.id, &Request::Remove(path)).await.map(drop)
    }

    /// Makes it all visible.
    ///
    /// # Errors
    /// [`StoreError::Again`]: somebody changed what it touched; start a new one.
    pub async fn commit(mut self) -> Result<(), XenStoreError> {
        self.open = false;
        self.store.ask(self.id, &Request::Commit).await.map(drop)
    }
}

impl Drop for Transaction<'_> {
    fn drop(&mut self) {
        if self.open {
            // The answer goes to nobody.
            drop(self.store.ask(self.id, &Request::Abandon));
        }
    }
}

/// Events of a watched node. Dropping it removes the watch.
#[derive(Debug)]
pub struct Watch {
    store: Arc<XenStore>,
    path: String,
    token: Token,
}

impl Watch {
    /// What is watched.
    #[must_use]
    pub fn path(&self) -> &str {
        &self.path
    }

    /// Waits for a change and answers the node that changed. Changes of one node between two calls count once.
    ///
    /// # Errors
    /// The connection is lost.
    pub fn changed(&mut self) -> NextChange<'_> {
        NextChange(self)
    }
}

/// Waiting for a change: see [`Watch::changed`].
#[derive(Debug)]
pub struct NextChange<'a>(&'a mut Watch);

impl Future for NextChange<'_> {
    type Output = Result<String, XenStoreError>;
    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let mut inner = self.0.store.inner.lock();
        let broken = inner.broken;
        let Some(watch) = inner.watches.get_mut(&self.0.token) else { return Poll::Pending };
        if let Some(path) = watch.changed.pop_front() {
            return Poll::Ready(Ok(path));
        }
        if let Some(error) = broken {
            return Poll::Ready(Err(error));
        }
        watch.waker = Some(cx.waker().clone());
        Poll::Pending
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        let mut inner = self.store.inner.lock();
        inner.watches.remove(&self.token);
        // Its answer goes to nobody. It fails only when the connection is lost.
        if let Ok(id) = inner.client.unwatch(&self.path, self.token) {
            inner.answers.insert(id, Answer::Abandoned);
            inner.pump();
        }
    }
}

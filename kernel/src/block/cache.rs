//! Small reads served from large chunks, with read-ahead for sequential readers.
//!
//! A file system reads a few bytes here and a block there, then a file from end to end. [`Cached`] reads whole
//! chunks, keeps the recent ones, and when chunk follows chunk it reads further ahead each time.

use alloc::collections::BTreeMap;
use alloc::sync::Arc;

use super::{Block, BlockError};
use crate::dma_pool::PooledBuf;
use crate::sync::{IrqMutex, Notify};
use crate::task;

/// Bytes of a chunk, if the disk takes such requests.
const CHUNK: usize = 64 * 1024;
/// Chunks kept.
const KEPT: usize = 32;
/// The furthest read-ahead, in chunks.
const AHEAD_MAX: u64 = 8;

/// A chunk, or the wait for it.
#[derive(Debug)]
struct Chunk {
    contents: IrqMutex<Option<Result<Arc<PooledBuf>, BlockError>>>,
    loaded: Notify,
}

impl Chunk {
    async fn wait(&self) -> Result<Arc<PooledBuf>, BlockError> {
        loop {
            let contents = self.contents.lock().clone();
            if let Some(result) = contents {
                // The signal goes from waiter to waiter.
                self.loaded.notify();
                return result;
            }
            self.loaded.notified().await;
        }
    }
}

#[derive(Debug)]
struct Kept {
    chunk: Arc<Chunk>,
    last_used: u64,
}

#[derive(Debug, Default)]
struct State {
    chunks: BTreeMap<u64, Kept>,
    uses: u64,
    /// The chunk after the one read last, and how far ahead to read when it comes.
    expected: u64,
    ahead: u64,
    /// [`Block::changes`] when the chunks were read.
    changes: u64,
    hits: u64,
    misses: u64,
}

/// A disk behind a cache of chunks. Cheap to clone; clones share the cache.
#[derive(Clone, Debug)]
pub struct Cached {
    block: Arc<Block>,
    chunk_len: usize,
    state: Arc<IrqMutex<State>>,
}

impl Cached {
    /// An empty cache over `block`.
    #[must_use]
    pub fn new(block: Arc<Block>) -> Self {
        let chunk_len = block.max_request().min(CHUNK);
        Self { block, chunk_len, state: Arc::default() }
    }

    /// The disk.
    #[must_use]
    pub fn block(&self) -> &Arc<Block> {
        &self.block
    }

    /// Chunks found in the cache, and chunks read from the disk.
    #[must_use]
    pub fn hits_and_misses(&self) -> (u64, u64) {
        let state = self.state.lock();
        (state.hits, state.misses)
    }

    /// Fills `target` from the disk, from byte `offset` on.
    ///
    /// # Errors
    /// [`BlockError`]; `target` may then be partly filled.
    pub async fn read_into(&self, offset: u64, target: &mut [u8]) -> Result<(), BlockError> {
        let end = offset.checked_add(target.len() as u64).ok_or(BlockError::OutOfRange)?;
        if end > self.block.capacity() {
            return Err(BlockError::OutOfRange);
        }
        let mut at = offset;
        let mut rest = target;
        while !rest.is_empty() {
            let index = at / self.chunk_len as u64;
            let within = usize::try_from(at % self.chunk_len as u64).unwrap_or(0);
            let contents = self.chunk(index).wait().await;
            if contents.is_err() {
                // The next reader tries again.
                self.state.lock().chunks.remove(&index);
            }
            let contents = contents?;
            let found = contents.get(within..).filter(|f| !f.is_empty());
            let found = found.ok_or(BlockError::OutOfRange)?;
            let len = found.len().min(rest.len());
            let (head, tail) = rest.split_at_mut(len);
            head.copy_from_slice(found.get(..len).unwrap_or_default());
            rest = tail;
            at += len as u64;
        }
        Ok(())
    }

    /// The chunk, with its read (and the reads of those to come) under way if need be.
    fn chunk(&self, index: u64) -> Arc<Chunk> {
        let (chunk, ahead) = {
            let mut state = self.state.lock();
            let changes = self.block.changes();
            if state.changes != changes {
                state.chunks.clear();
                state.changes = changes;
            }
            let sequential = index == state.expected;
            if index + 1 != state.expected {
                state.ahead = if sequential { (state.ahead * 2).clamp(1, AHEAD_MAX) } else { 0 };
                state.expected = index + 1;
            }
            (self.find_or_load(&mut state, index, true), state.ahead)
        };
        for next in index + 1..=index + ahead {
            if next * self.chunk_len as u64 >= self.block.capacity() {
                break;
            }
            let mut state = self.state.lock();
            self.find_or_load(&mut state, next, false);
        }
        chunk
    }

    fn find_or_load(&self, state: &mut State, index: u64, wanted: bool) -> Arc<Chunk> {
        state.uses += 1;
        let now = state.uses;
        if let Some(kept) = state.chunks.get_mut(&index) {
            if wanted {
                kept.last_used = now;
                state.hits += 1;
            }
            return Arc::clone(&kept.chunk);
        }
        state.misses += 1;
        if state.chunks.len() >= KEPT {
            let oldest = state.chunks.iter().min_by_key(|(_, kept)| kept.last_used);
            if let Some(oldest) = oldest.map(|(index, _)| *index) {
                state.chunks.remove(&oldest);
            }
        }
        let chunk = Arc::new(Chunk { contents: IrqMutex::new(None), loaded: Notify::new() });
        state.chunks.insert(index, Kept { chunk: Arc::clone(&chunk), last_used: now });
        let (block, loading) = (Arc::clone(&self.block), Arc::clone(&chunk));
        let offset = index * self.chunk_len as u64;
        let left = usize::try_from(block.capacity() - offset).unwrap_or(usize::MAX);
        let len = self.chunk_len.min(left);
        drop(task::spawn("read-ahead", async move {
            let result = block.read(offset, len).await;
            *loading.contents.lock() = Some(result.map(Arc::new));
            loading.loaded.notify();
        }));
        chunk
    }
}

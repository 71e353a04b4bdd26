//! Pieces of files that were read lately, as whole buffers: a file that is served again needs neither its file
//! system nor its disk, and no copy.
//!
//! The pieces take memory that nobody else wants: up to half of it, leaving an eighth free, and they go, oldest
//! first, when anybody asks for more ([`crate::mm::reclaim`]).

use alloc::collections::BTreeMap;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicU64, Ordering};

use janus_proto::addr::PAGE_SIZE;

use crate::mm::{frames, reclaim};
use crate::sync::IrqMutex;

/// Bytes of a piece; the last one of a file may be shorter.
pub const PIECE: usize = 256 * 1024;
/// Bytes that may be cached where the machine does not say how much memory it has: in tests on a host.
const UNKNOWN_BUDGET: usize = 8 << 20;

/// Part of a file's contents.
pub type Piece = Arc<Vec<u8>>;

/// Which piece: the volume's number, the file's path there, the piece's number.
type Key = (u64, Arc<str>, u64);

struct Kept {
    piece: Piece,
    last_used: u64,
    /// How often the disk had been written to.
    generation: u64,
}

struct Cache {
    pieces: BTreeMap<Key, Kept>,
    bytes: usize,
    uses: u64,
    hits: u64,
    misses: u64,
}

static CACHE: IrqMutex<Cache> = IrqMutex::new(Cache::new());

static VOLUMES: AtomicU64 = AtomicU64::new(0);

/// The state of the cache, for people.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileCacheStatistics {
    /// Bytes cached now.
    pub bytes: usize,
    /// Pieces found.
    pub hits: u64,
    /// Pieces read.
    pub misses: u64,
}

/// How the cache stands.
#[must_use]
pub fn statistics() -> FileCacheStatistics {
    let cache = CACHE.lock();
    FileCacheStatistics { bytes: cache.bytes, hits: cache.hits, misses: cache.misses }
}

/// A number for a volume, by which its pieces are known.
pub(super) fn new_volume() -> u64 {
    reclaim::register(free_oldest);
    VOLUMES.fetch_add(1, Ordering::Relaxed)
}

/// Forgets the pieces of a volume.
pub(super) fn forget(volume: u64) {
    CACHE.lock().forget(volume);
}

/// The piece, if it is here and the disk has not been written to since.
pub(super) fn find(volume: u64, path: &Arc<str>, index: u64, generation: u64) -> Option<Piece> {
    CACHE.lock().find(&(volume, Arc::clone(path), index), generation)
}

/// Keeps a piece, if there is room; older ones make some.
pub(super) fn keep(volume: u64, path: &Arc<str>, index: u64, generation: u64, piece: &Piece) {
    let memory = frames::statistics();
    let (budget, room) = match memory.total * PAGE_SIZE {
        0 => (UNKNOWN_BUDGET, usize::MAX),
        total => (total / 2, (memory.free * PAGE_SIZE).saturating_sub(total / 8)),
    };
    CACHE.lock().keep((volume, Arc::clone(path), index), generation, piece, budget, room);
}

/// For [`reclaim`]: frees the oldest piece; `false` if there is none, or the cache is in use right now.
fn free_oldest() -> bool {
    CACHE.try_lock().is_some_and(|mut cache| cache.remove_oldest() > 0)
}

impl Cache {
    const fn new() -> Self {
        Self { pieces: BTreeMap::new(), bytes: 0, uses: 0, hits: 0, misses: 0 }
    }

    fn find(&mut self, key: &Key, generation: u64) -> Option<Piece> {
        self.uses += 1;
        let found = self.pieces.get_mut(key).filter(|kept| kept.generation == generation);
        let Some(kept) = found else {
            self.misses += 1;
            return None;
        };
        kept.last_used = self.uses;
        self.hits += 1;
        Some(Arc::clone(&kept.piece))
    }

    /// Keeps a piece among at most `budget` bytes; with no `room` beyond what it has, others go first.
    fn keep(&mut self, key: Key, generation: u64, piece: &Piece, budget: usize, mut room: usize) {
        self.remove(&key);
        while self.bytes + piece.len() > budget || room == 0 {
            match self.remove_oldest() {
                0 => return,
                freed => room = room.saturating_add(freed),
            }
        }
        self.uses += 1;
        self.bytes += piece.len();
        let kept = Kept { piece: Arc::clone(piece), last_used: self.uses, generation };
        self.pieces.insert(key, kept);
    }

    fn forget(&mut self, volume: u64) {
        let first: Key = (volume, Arc::from(""), 0);
        let next: Key = (volume + 1, Arc::from(""), 0);
        while let Some(key) = self.pieces.range(&first..&next).next().map(|(key, _)| key.clone()) {
            self.remove(&key);
        }
    }

    fn remove(&mut self, key: &Key) -> usize {
        let len = self.pieces.remove(key).map_or(0, |kept| kept.piece.len());
        self.bytes -= len;
        len
    }

    /// Removes the piece that nobody has used for longest, and answers its length; 0: there is none.
    fn remove_oldest(&mut self) -> usize {
        // A few hundred pieces at most, and none is searched for while memory is plenty.
        let oldest = self.pieces.iter().min_by_key(|(_, kept)| kept.last_used);
        let Some(key) = oldest.map(|(key, _)| key.clone()) else { return 0 };
        // An empty piece is never kept.
        self.remove(&key)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(volume: u64, path: &str, index: u64) -> Key {
        (volume, Arc::from(path), index)
    }

    #[test]
    fn pieces_are_found_until_the_disk_changes_or_the_volume_goes() {
        let mut cache = Cache::new();
        let piece = Arc::new(Vec::from([7; 10]));
        for (volume, path, index) in [(1, "/a", 0), (1, "/a", 1), (1, "/b", 0), (2, "/a", 0)] {
            cache.keep(key(volume, path, index), 5, &piece, 1000, 1000);
        }
        assert_eq!(cache.find(&key(1, "/a", 1), 5), Some(Arc::clone(&piece)));
        assert_eq!(cache.find(&key(1, "/a", 1), 6), None, "written to since");
        assert_eq!(cache.find(&key(1, "/a", 2), 5), None);
        assert_eq!((cache.bytes, cache.hits, cache.misses), (40, 1, 2));
        cache.forget(1);
        assert_eq!(cache.find(&key(1, "/b", 0), 5), None);
        assert!(cache.find(&key(2, "/a", 0), 5).is_some());
        assert_eq!(cache.bytes, 10);
    }

    #[test]
    fn the_oldest_makes_room() {
        let mut cache = Cache::new();
        let piece = Arc::new(Vec::from([7; 10]));
        for index in 0..3 {
            cache.keep(key(0, "/", index), 0, &piece, 30, 1000);
        }
        assert!(cache.find(&key(0, "/", 0), 0).is_some());
        cache.keep(key(0, "/", 3), 0, &piece, 30, 1000);
        assert!(cache.find(&key(0, "/", 1), 0).is_none(), "the one not used for longest");
        assert!(cache.find(&key(0, "/", 0), 0).is_some());
        // No memory: one goes for one that comes, and nothing comes when nothing is there.
        cache.keep(key(0, "/", 4), 0, &piece, 1000, 0);
        assert_eq!(cache.bytes, 30);
        let mut empty = Cache::new();
        empty.keep(key(0, "/", 0), 0, &piece, 1000, 0);
        empty.keep(key(0, "/", 0), 0, &piece, 5, 1000);
        assert_eq!((empty.bytes, empty.remove_oldest()), (0, 0));
        // The same piece again counts once.
        cache.keep(key(0, "/", 4), 0, &piece, 1000, 1000);
        assert_eq!(cache.bytes, 30);
    }
}

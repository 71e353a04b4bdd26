//! What is kept only because memory was free, given up when it is not.
//!
//! Caches register what frees some of theirs; the heap and the frame allocator ask before they refuse. They ask from
//! anywhere, so whoever is asked only tries its locks, frees, and neither allocates nor waits.

use spin::Once;

static CACHE: Once<fn() -> bool> = Once::new();

/// Makes `free_some` the one that is asked; it answers whether it freed anything. There is one cache so far.
pub(crate) fn register(free_some: fn() -> bool) {
    CACHE.call_once(|| free_some);
}

/// Frees something; `false`: there is nothing to free.
pub(crate) fn free_some() -> bool {
    CACHE.get().is_some_and(|free_some| free_some())
}

/// Tries to get memory, and again after each thing that could be given up for it.
pub(crate) fn until<T>(mut attempt: impl FnMut() -> Option<T>) -> Option<T> {
    loop {
        if let Some(got) = attempt() {
            return Some(got);
        }
        if !free_some() {
            return None;
        }
    }
}

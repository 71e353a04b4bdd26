//! Which CPU a task belongs to now, in one word that wakers read from anywhere.
// UNSAFETY: makes a reference of a pointer that was one.
#![expect(unsafe_code, reason = "an atomic cannot hold a reference")]

use core::marker::PhantomData;
use core::sync::atomic::{AtomicPtr, Ordering};

/// A reference that lives for good, and can be exchanged.
#[derive(Debug)]
pub(super) struct AtomicRef<T: Sync + 'static> {
    pointer: AtomicPtr<T>,
    _reference: PhantomData<&'static T>,
}

impl<T: Sync + 'static> AtomicRef<T> {
    pub(super) const fn new(target: &'static T) -> Self {
        Self {
            pointer: AtomicPtr::new(core::ptr::from_ref(target).cast_mut()),
            _reference: PhantomData,
        }
    }
    /// The present target.
    pub(super) fn get(&self) -> &'static T {
        // SAFETY: only ever made from `&'static T`, and used as that; `T` may be shared between CPUs.
        unsafe { &*self.pointer.load(Ordering::Acquire) }
    }
    pub(super) fn set(&self, target: &'static T) {
        self.pointer.store(core::ptr::from_ref(target).cast_mut(), Ordering::Release);
    }
}

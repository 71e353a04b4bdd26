//! The lock of the kernel core: a spin lock with interrupts masked while it is held.

use core::fmt;
use core::ops::{Deref, DerefMut};

use spin::mutex::{SpinMutex, SpinMutexGuard};
use spin::relax::RelaxStrategy;

use super::IrqGuard;

/// How a CPU waits for a lock that another one has.
#[derive(Debug)]
pub struct Relax;

impl RelaxStrategy for Relax {
    #[inline]
    fn relax() {
        super::relax();
    }
}

/// A value behind a spin lock that interrupt handlers may take too.
pub struct IrqLock<T>(SpinMutex<T, Relax>);

/// Access to the value of an [`IrqLock`].
pub struct IrqLockGuard<'a, T> {
    // Declared before the guard: unlocked first, unmasked second.
    value: SpinMutexGuard<'a, T, Relax>,
    _irq: IrqGuard,
}

impl<T> IrqLock<T> {
    /// An unlocked value.
    #[must_use]
    pub const fn new(value: T) -> Self {
        Self(SpinMutex::new(value))
    }
    /// Masks interrupts and takes the lock.
    #[inline]
    pub fn lock(&self) -> IrqLockGuard<'_, T> {
        let irq = IrqGuard::new();
        IrqLockGuard { value: self.0.lock(), _irq: irq }
    }
    /// Takes the lock unless somebody holds it: for reports after a failure, which must not wait.
    pub fn try_lock(&self) -> Option<IrqLockGuard<'_, T>> {
        let irq = IrqGuard::new();
        Some(IrqLockGuard { value: self.0.try_lock()?, _irq: irq })
    }
}

impl<T> Deref for IrqLockGuard<'_, T> {
    type Target = T;
    #[inline]
    fn deref(&self) -> &T {
        &self.value
    }
}

impl<T> DerefMut for IrqLockGuard<'_, T> {
    #[inline]
    fn deref_mut(&mut self) -> &mut T {
        &mut self.value
    }
}

impl<T> fmt::Debug for IrqLock<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("IrqLock")
    }
}

impl<T> fmt::Debug for IrqLockGuard<'_, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("IrqLockGuard")
    }
}

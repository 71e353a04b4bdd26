//! Locks and signals: [`IrqMutex`] for short sections, the rest for tasks that wait.
//!
//! Everything that wakes ([`Notify::notify`], [`Semaphore::release`], [`Channel::try_send`]) may be called from
//! interrupt context: it takes `IrqMutex`es only and does not wait. Waiting is for tasks and fibers.

use alloc::collections::VecDeque;
use core::fmt;
use core::future::Future;
use core::ops::{Deref, DerefMut};
use core::pin::Pin;
use core::task::{Context, Poll, Waker};

use spin::mutex::{SpinMutex, SpinMutexGuard};
use spin::relax::RelaxStrategy;

use crate::task::hooks::hooks;

/// How a spinning CPU waits: as the platform wishes (`pause`, or a yield to the hypervisor).
#[derive(Debug)]
pub struct PlatformRelax;

impl RelaxStrategy for PlatformRelax {
    fn relax() {
        (hooks().relax)();
    }
}

/// Masks interrupts until dropped; nests.
#[derive(Debug)]
pub struct IrqGuard {
    restore: bool,
    /// The mask belongs to this CPU.
    _not_send: core::marker::PhantomData<*const ()>,
}

impl IrqGuard {
    /// Masks interrupts on this CPU.
    #[must_use]
    pub fn new() -> Self {
        Self { restore: (hooks().irq_disable)(), _not_send: core::marker::PhantomData }
    }
}

impl Default for IrqGuard {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for IrqGuard {
    fn drop(&mut self) {
        if self.restore {
            (hooks().irq_enable)();
        }
    }
}

/// A spin lock that keeps interrupts masked while held, so that handlers may take it too.
pub struct IrqMutex<T: ?Sized>(SpinMutex<T, PlatformRelax>);

/// Access to what an [`IrqMutex`] protects.
pub struct IrqMutexGuard<'a, T: ?Sized> {
    // Dropped in this order: unlock, then unmask.
    value: SpinMutexGuard<'a, T, PlatformRelax>,
    _irq: IrqGuard,
}

impl<T> IrqMutex<T> {
    /// A free lock around `value`.
    #[must_use]
    pub const fn new(value: T) -> Self {
        Self(SpinMutex::new(value))
    }
    /// The value, when the lock is no longer needed.
    #[must_use]
    pub fn into_inner(self) -> T {
        self.0.into_inner()
    }
}

impl<T: ?Sized> IrqMutex<T> {
    /// Masks interrupts and takes the lock.
    pub fn lock(&self) -> IrqMutexGuard<'_, T> {
        let irq = IrqGuard::new();
        IrqMutexGuard { value: self.0.lock(), _irq: irq }
    }
    /// As [`Self::lock`], but answers `None` when somebody holds it (for panic and trap paths).
    pub fn try_lock(&self) -> Option<IrqMutexGuard<'_, T>> {
        let irq = IrqGuard::new();
        Some(IrqMutexGuard { value: self.0.try_lock()?, _irq: irq })
    }
    /// The value, without locking, which exclusive access makes needless.
    pub fn get_mut(&mut self) -> &mut T {
        self.0.get_mut()
    }
}

impl<T: Default> Default for IrqMutex<T> {
    fn default() -> Self {
        Self::new(T::default())
    }
}

impl<T: ?Sized> Deref for IrqMutexGuard<'_, T> {
    type Target = T;
    fn deref(&self) -> &T {
        &self.value
    }
}

impl<T: ?Sized> DerefMut for IrqMutexGuard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        &mut self.value
    }
}

impl<T: ?Sized> fmt::Debug for IrqMutex<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("IrqMutex")
    }
}

impl<T: ?Sized> fmt::Debug for IrqMutexGuard<'_, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("IrqMutexGuard")
    }
}

/// A counter of permits with tasks queueing for them, first come, first served.
#[derive(Debug)]
pub struct Semaphore(IrqMutex<Permits>);

#[derive(Debug)]
struct Permits {
    free: usize,
    next_id: u64,
    waiting: VecDeque<(u64, Waker)>,
    /// Permits already given to waiters that have not run since.
    granted: VecDeque<u64>,
}

impl Semaphore {
    /// A semaphore with `free` permits.
    #[must_use]
    pub const fn new(free: usize) -> Self {
        Self(IrqMutex::new(Permits {
            free,
            next_id: 0,
            waiting: VecDeque::new(),
            granted: VecDeque::new(),
        }))
    }
    /// Waits for one permit and takes it. Give it back with [`Self::release`].
    pub fn acquire(&self) -> Acquire<'_> {
        Acquire { semaphore: self, id: None }
    }
    /// Takes a permit if one is free now and nobody waits.
    #[must_use]
    pub fn try_acquire(&self) -> bool {
        let mut permits = self.0.lock();
        let taken = permits.free > 0;
        permits.free -= usize::from(taken);
        taken
    }
    /// Gives one permit: to the first waiter, or to the free ones up to `limit`.
    fn release_up_to(&self, limit: usize) {
        let waker = {
            let mut permits = self.0.lock();
            match permits.waiting.pop_front() {
                Some((id, waker)) => {
                    // Room was reserved when the waiter queued up: no allocation in interrupt context.
                    permits.granted.push_back(id);
                    Some(waker)
                }
                None => {
                    permits.free = (permits.free + 1).min(limit);
                    None
                }
            }
        };
        if let Some(waker) = waker {
            waker.wake();
        }
    }
    /// Gives one permit.
    pub fn release(&self) {
        self.release_up_to(usize::MAX);
    }
    /// How many tasks wait.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.0.lock().waiting.len()
    }
}

/// Waiting for a permit: see [`Semaphore::acquire`]. Dropped early, it leaves the queue and passes on its permit.
#[derive(Debug)]
pub struct Acquire<'a> {
    semaphore: &'a Semaphore,
    /// The place in the queue, once queued.
    id: Option<u64>,
}

impl Future for Acquire<'_> {
    type Output = ();
    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let mut permits = self.semaphore.0.lock();
        let id = match self.id {
            None => {
                if permits.free > 0 {
                    permits.free -= 1;
                    return Poll::Ready(());
                }
                let id = permits.next_id;
                permits.next_id += 1;
                permits.waiting.push_back((id, cx.waker().clone()));
                let room = permits.waiting.len() + permits.granted.len();
                let missing = room.saturating_sub(permits.granted.capacity());
                permits.granted.reserve(missing + room);
                id
            }
            Some(id) => {
                if let Some(at) = permits.granted.iter().position(|g| *g == id) {
                    permits.granted.remove(at);
                    drop(permits);
                    self.id = None;
                    return Poll::Ready(());
                }
                if let Some((_, waker)) = permits.waiting.iter_mut().find(|(w, _)| *w == id)
                    && !waker.will_wake(cx.waker())
                {
                    waker.clone_from(cx.waker());
                }
                id
            }
        };
        drop(permits);
        self.id = Some(id);
        Poll::Pending
    }
}

impl Drop for Acquire<'_> {
    fn drop(&mut self) {
        let Some(id) = self.id else { return };
        let mut permits = self.semaphore.0.lock();
        permits.waiting.retain(|(w, _)| *w != id);
        if let Some(at) = permits.granted.iter().position(|g| *g == id) {
            permits.granted.remove(at);
            drop(permits);
            self.semaphore.release();
        }
    }
}

/// A signal: [`Self::notify`] lets one waiter through, the present one or the next one.
///
/// Several notifications before anybody waits count as one. For an interrupt handler and the task that serves it.
#[derive(Debug)]
pub struct Notify(Semaphore);

impl Notify {
    /// A signal that has not been given.
    #[must_use]
    pub const fn new() -> Self {
        Self(Semaphore::new(0))
    }
    /// Gives the signal. From any context.
    pub fn notify(&self) {
        self.0.release_up_to(1);
    }
    /// Lets everybody through who waits now.
    pub fn notify_all(&self) {
        for _ in 0..self.0.waiting() {
            self.0.release_up_to(1);
        }
    }
    /// Waits for the signal and consumes it.
    pub fn notified(&self) -> Acquire<'_> {
        self.0.acquire()
    }
}

impl Default for Notify {
    fn default() -> Self {
        Self::new()
    }
}

/// A lock for tasks: may be held across `.await`; waiting for it lets other tasks run.
#[derive(Debug)]
pub struct Mutex<T: ?Sized> {
    turn: Semaphore,
    /// Never contended: the semaphore lets one holder through.
    value: SpinMutex<T, PlatformRelax>,
}

/// Access to what a [`Mutex`] protects.
pub struct MutexGuard<'a, T: ?Sized> {
    // Dropped in this order: the inner lock, then the turn.
    value: SpinMutexGuard<'a, T, PlatformRelax>,
    _turn: Turn<'a>,
}

struct Turn<'a>(&'a Semaphore);

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.0.release();
    }
}

impl<T> Mutex<T> {
    /// A free lock around `value`.
    #[must_use]
    pub const fn new(value: T) -> Self {
        Self { turn: Semaphore::new(1), value: SpinMutex::new(value) }
    }
    /// Waits for the lock and takes it.
    pub async fn lock(&self) -> MutexGuard<'_, T> {
        self.turn.acquire().await;
        let turn = Turn(&self.turn);
        MutexGuard { value: self.value.lock(), _turn: turn }
    }
    /// Takes the lock if it is free.
    pub fn try_lock(&self) -> Option<MutexGuard<'_, T>> {
        if !self.turn.try_acquire() {
            return None;
        }
        let turn = Turn(&self.turn);
        Some(MutexGuard { value: self.value.lock(), _turn: turn })
    }
}

impl<T: ?Sized> Deref for MutexGuard<'_, T> {
    type Target = T;
    fn deref(&self) -> &T {
        &self.value
    }
}

impl<T: ?Sized> DerefMut for MutexGuard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        &mut self.value
    }
}

impl<T: ?Sized> fmt::Debug for MutexGuard<'_, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("MutexGuard")
    }
}

/// A bounded queue between tasks, or from a handler to a task. Share it in an `Arc` or a `static`.
#[derive(Debug)]
pub struct Channel<T> {
    queue: IrqMutex<VecDeque<T>>,
    capacity: usize,
    items: Semaphore,
    room: Notify,
}

impl<T> Channel<T> {
    /// A channel that holds up to `capacity` values; its memory is allocated here.
    #[must_use]
    pub fn new(capacity: usize) -> Self {
        Self {
            queue: IrqMutex::new(VecDeque::with_capacity(capacity)),
            capacity,
            items: Semaphore::new(0),
            room: Notify::new(),
        }
    }
    /// Puts a value in, from any context.
    ///
    /// # Errors
    /// The value, when the channel is full.
    pub fn try_send(&self, value: T) -> Result<(), T> {
        {
            let mut queue = self.queue.lock();
            if queue.len() >= self.capacity {
                return Err(value);
            }
            queue.push_back(value);
        }
        self.items.release();
        Ok(())
    }
    /// Puts a value in, waiting for room.
    pub async fn send(&self, mut value: T) {
        while let Err(back) = self.try_send(value) {
            value = back;
            self.room.notified().await;
        }
        // Several places may have come free for one signal: pass it on.
        if self.queue.lock().len() < self.capacity {
            self.room.notify();
        }
    }
    /// Takes the oldest value, waiting for one.
    pub async fn recv(&self) -> T {
        loop {
            self.items.acquire().await;
            let value = self.queue.lock().pop_front();
            if let Some(value) = value {
                self.room.notify();
                return value;
            }
        }
    }
    /// Takes the oldest value, if there is one.
    pub fn try_recv(&self) -> Option<T> {
        if !self.items.try_acquire() {
            return None;
        }
        let value = self.queue.lock().pop_front();
        self.room.notify();
        value
    }
}

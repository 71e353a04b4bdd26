//! Tasks: an executor per CPU that blocks when idle, and fibers for code that cannot be `async`.
//!
//! - `executor.rs`: run queues, [`spawn`], [`block_on`], idling without lost wake-ups;
//! - `fiber.rs`: tasks with a stack of their own ([`spawn_fiber`]), for synchronous libraries over async devices;
//! - `hooks.rs`: what the platform supplies.
//!
//! A task belongs to one CPU at a time and is only polled there: the one that spawned it, until another takes it over
//! (`share.rs`). A fiber stays where it began. Wakers work from anywhere: another CPU, an interrupt handler. They allocate nothing. Freeing a task may happen in a waker, so the heap must be usable with
//! interrupts masked.

pub mod executor;
pub mod fiber;
mod home;
pub mod hooks;
pub mod share;
#[cfg(not(target_os = "none"))]
mod std_hooks;
#[cfg(test)]
mod tests;

use core::future::{Future, poll_fn};
use core::pin::pin;
use core::task::Poll;

pub use executor::{CpuStatistics, JoinHandle, TaskStatus, block_on, spawn, statistics, tasks};
pub use share::{spawn_anywhere, spawn_on};

pub use fiber::{NoStack, spawn_fiber, try_spawn_fiber};

/// Lets every other task that is ready run once.
pub async fn yield_now() {
    let mut yielded = false;
    poll_fn(|cx| {
        if yielded {
            return Poll::Ready(());
        }
        yielded = true;
        cx.waker().wake_by_ref();
        Poll::Pending
    })
    .await;
}

/// Which of two futures was ready first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Either<A, B> {
    /// The first one, with its output.
    First(A),
    /// The second one, with its output.
    Second(B),
}

/// Waits for the first of two futures and drops the other.
pub async fn select<A: Future, B: Future>(a: A, b: B) -> Either<A::Output, B::Output> {
    let mut a = pin!(a);
    let mut b = pin!(b);
    poll_fn(|cx| {
        if let Poll::Ready(output) = a.as_mut().poll(cx) {
            return Poll::Ready(Either::First(output));
        }
        b.as_mut().poll(cx).map(Either::Second)
    })
    .await
}

/// Runs two futures at once and waits for both.
pub async fn join<A: Future, B: Future>(a: A, b: B) -> (A::Output, B::Output) {
    let mut a = pin!(a);
    let mut b = pin!(b);
    let (mut first, mut second) = (None, None);
    poll_fn(|cx| {
        if first.is_none()
            && let Poll::Ready(output) = a.as_mut().poll(cx)
        {
            first = Some(output);
        }
        if second.is_none()
            && let Poll::Ready(output) = b.as_mut().poll(cx)
        {
            second = Some(output);
        }
        match (first.take(), second.take()) {
            (Some(first), Some(second)) => Poll::Ready((first, second)),
            (one, other) => {
                (first, second) = (one, other);
                Poll::Pending
            }
        }
    })
    .await
}

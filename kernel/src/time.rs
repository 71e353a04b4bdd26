//! Time for tasks: [`now`], [`sleep`], [`timeout`], and the per-CPU queue of timers behind them.
//!
//! A timer is a waker under its deadline. The executor asks the platform for one interrupt at the earliest
//! deadline before it idles, and wakes what is due whenever it looks; the timer interrupt itself does nothing
//! but end the idling.

use alloc::collections::BTreeMap;
use core::fmt;
use core::future::{Future, poll_fn};
use core::ops::{Add, AddAssign, Sub};
use core::pin::{Pin, pin};
use core::task::{Context, Poll, Waker};
use core::time::Duration;

use crate::task::executor::{self, Cpu};
use crate::task::hooks::hooks;

/// A point in time: nanoseconds since boot, the same on all CPUs, never running backwards.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Instant(u64);

impl Instant {
    /// The instant `ns` nanoseconds after boot.
    #[must_use]
    pub const fn from_nanos(ns: u64) -> Self {
        Self(ns)
    }
    /// Nanoseconds since boot.
    #[must_use]
    pub const fn as_nanos(self) -> u64 {
        self.0
    }
    /// The time since `earlier`; zero when that is later.
    #[must_use]
    pub const fn since(self, earlier: Self) -> Duration {
        Duration::from_nanos(self.0.saturating_sub(earlier.0))
    }
    /// The time since this instant.
    #[must_use]
    pub fn elapsed(self) -> Duration {
        now().since(self)
    }
}

fn as_ns(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

impl Add<Duration> for Instant {
    type Output = Self;
    fn add(self, duration: Duration) -> Self {
        Self(self.0.saturating_add(as_ns(duration)))
    }
}

impl AddAssign<Duration> for Instant {
    fn add_assign(&mut self, duration: Duration) {
        *self = *self + duration;
    }
}

impl Sub<Duration> for Instant {
    type Output = Self;
    fn sub(self, duration: Duration) -> Self {
        Self(self.0.saturating_sub(as_ns(duration)))
    }
}

impl Sub for Instant {
    type Output = Duration;
    fn sub(self, earlier: Self) -> Duration {
        self.since(earlier)
    }
}

impl fmt::Display for Instant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{:06}", self.0 / 1_000_000_000, self.0 % 1_000_000_000 / 1000)
    }
}

/// The present time.
#[must_use]
pub fn now() -> Instant {
    Instant((hooks().now_ns)())
}

/// Time since the UNIX epoch, where the platform knows it.
#[must_use]
pub fn wall_clock() -> Option<Duration> {
    (hooks().wall_clock)()
}

/// Timers of one CPU: wakers under (deadline in ns, sequence number).
#[derive(Debug)]
pub(crate) struct Timers {
    queue: BTreeMap<(u64, u64), Waker>,
    next_sequence: u64,
}

impl Timers {
    pub(crate) const fn new() -> Self {
        Self { queue: BTreeMap::new(), next_sequence: 0 }
    }
    /// The earliest deadline.
    pub(crate) fn earliest(&self) -> Option<u64> {
        self.queue.first_key_value().map(|((deadline_ns, _), _)| *deadline_ns)
    }
    /// Takes one timer that is due.
    pub(crate) fn pop_due(&mut self, now_ns: u64) -> Option<Waker> {
        let first = self.queue.first_entry()?;
        (first.key().0 <= now_ns).then(|| first.remove())
    }
}

/// A wait for a point in time: see [`sleep_until`].
#[derive(Debug)]
pub struct Sleep {
    deadline: Instant,
    /// Where the timer is queued, and under which sequence number.
    queued: Option<(&'static Cpu, u64)>,
}

impl Sleep {
    /// When it ends.
    #[must_use]
    pub fn deadline(&self) -> Instant {
        self.deadline
    }
}

impl Future for Sleep {
    type Output = ();
    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        if now() >= self.deadline {
            return Poll::Ready(());
        }
        let deadline_ns = self.deadline.as_nanos();
        if let Some((cpu, sequence)) = self.queued {
            let mut timers = cpu.timers();
            if let Some(waker) = timers.queue.get_mut(&(deadline_ns, sequence)) {
                if !waker.will_wake(cx.waker()) {
                    waker.clone_from(cx.waker());
                }
                return Poll::Pending;
            }
        }
        let cpu = executor::current_cpu();
        let mut timers = cpu.timers();
        let sequence = timers.next_sequence;
        timers.next_sequence += 1;
        timers.queue.insert((deadline_ns, sequence), cx.waker().clone());
        drop(timers);
        self.queued = Some((cpu, sequence));
        Poll::Pending
    }
}

impl Drop for Sleep {
    fn drop(&mut self) {
        if let Some((cpu, sequence)) = self.queued {
            let waker = cpu.timers().queue.remove(&(self.deadline.as_nanos(), sequence));
            drop(waker); // outside the lock: it may be a task's last reference
        }
    }
}

/// Waits for `duration`.
pub fn sleep(duration: Duration) -> Sleep {
    sleep_until(now() + duration)
}

/// Waits until `deadline`.
pub fn sleep_until(deadline: Instant) -> Sleep {
    Sleep { deadline, queued: None }
}

/// The time was up first: see [`timeout`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Elapsed;

impl fmt::Display for Elapsed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the time is up")
    }
}

impl core::error::Error for Elapsed {}

/// Waits for `future`, but no longer than `duration`.
///
/// # Errors
/// [`Elapsed`] when the time was up first; the future is dropped then.
pub async fn timeout<F: Future>(duration: Duration, future: F) -> Result<F::Output, Elapsed> {
    let mut future = pin!(future);
    let mut sleep = pin!(sleep(duration));
    poll_fn(|cx| {
        if let Poll::Ready(output) = future.as_mut().poll(cx) {
            return Poll::Ready(Ok(output));
        }
        sleep.as_mut().poll(cx).map(|()| Err(Elapsed))
    })
    .await
}

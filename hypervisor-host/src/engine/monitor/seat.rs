//! One virtual CPU as others see it: what they may do to it while its own thread runs it.

use std::sync::atomic::Ordering::{Acquire, Relaxed, Release, SeqCst};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64};
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::child::Child;
use super::host;
use super::layout::{Mailbox, OURS};
use super::queue::{Change, Queue};
use crate::engine::{EngineError, Kicker};

/// How long a guest may leave a kick unanswered: it cannot even on a machine that is very busy, unless it blocked the
/// signal.
pub(super) const PATIENCE: Duration = Duration::from_secs(10);

/// How often to look for what the kernel does not tell of.
const LOOK: Duration = Duration::from_millis(500);

/// As nanoseconds.
fn nanoseconds(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

#[derive(Debug)]
pub(super) struct Seat {
    pub(super) child: Child,
    pub(super) queue: Mutex<Queue>,
    /// The guest may be running; false again when it surely stopped.
    running: AtomicBool,
    /// Somebody wants [`crate::engine::Exit::Kicked`].
    kicked: AtomicBool,
    /// How often the guest has stopped.
    stops: AtomicU64,
    /// How many wait for it to stop.
    waiting: AtomicU32,
    stopped: (Mutex<()>, Condvar),
    /// It did not stop when told to.
    hung: AtomicBool,
    /// Its owner dropped it.
    gone: AtomicBool,
}

impl Seat {
    pub(super) fn new(child: Child) -> Self {
        Self {
            child,
            queue: Mutex::default(),
            running: AtomicBool::new(false),
            kicked: AtomicBool::new(false),
            stops: AtomicU64::new(0),
            waiting: AtomicU32::new(0),
            stopped: (Mutex::new(()), Condvar::new()),
            hung: AtomicBool::new(false),
            gone: AtomicBool::new(false),
        }
    }

    pub(super) fn mailbox(&self) -> &Mailbox {
        self.child.shared().mailbox()
    }

    /// Announces that the guest will run; `false`: somebody kicked, and it must not.
    pub(super) fn announce(&self) -> bool {
        self.running.store(true, SeqCst);
        !self.kicked.load(SeqCst)
    }

    /// Whether somebody kicked since the last [`Seat::forget_kick`].
    pub(super) fn was_kicked(&self) -> bool {
        self.kicked.load(SeqCst)
    }

    /// The caller of `run` is about to look at everything that it could have been kicked for.
    pub(super) fn forget_kick(&self) {
        self.kicked.store(false, SeqCst);
    }

    /// The guest has stopped.
    pub(super) fn stop(&self) {
        self.running.store(false, SeqCst);
        self.stops.fetch_add(1, SeqCst);
        if self.waiting.load(SeqCst) != 0 {
            let _guard = self.stopped.0.lock().unwrap_or_else(PoisonError::into_inner);
            self.stopped.1.notify_all();
        }
    }

    /// Gives the guest its turn, and waits for ours.
    pub(super) fn turn(&self, deadline: u64, patience: Duration) -> Result<(), EngineError> {
        let turn = &self.mailbox().turn;
        turn.store(self.child.theirs(), Release);
        host::futex_wake(turn);
        self.wait(deadline, patience)
    }

    /// Waits for our turn, from `deadline` on (nanoseconds of `CLOCK_MONOTONIC`) less patiently.
    pub(super) fn wait(&self, mut deadline: u64, patience: Duration) -> Result<(), EngineError> {
        let turn = &self.mailbox().turn;
        let theirs = self.child.theirs();
        let period = nanoseconds(LOOK.min(patience));
        let mut kicked_since = None;
        let mut look = u64::MAX;
        loop {
            match turn.load(Acquire) {
                OURS => return Ok(()),
                value if value == theirs => {}
                value => {
                    // The kernel marks a futex whose owner ended; anything else is the guest's.
                    self.child.kill();
                    let status = self.child.ended(true).unwrap_or(0);
                    return Err(match value {
                        _ if self.hung.load(Relaxed) => EngineError::Hung,
                        value if value & libc::FUTEX_OWNER_DIED != 0 => EngineError::Ended(status),
                        _ => EngineError::Corrupt("whose turn it is"),
                    });
                }
            }
            if look == u64::MAX {
                look = host::coarse_now() + period;
            }
            if host::futex_wait(turn, theirs, look.min(deadline)) {
                continue;
            }
            if deadline < look {
                deadline = u64::MAX;
                self.kick();
                continue;
            }
            look = u64::MAX;
            // Nobody came for a long time. The guest may compute, or have hidden its end from the kernel.
            if turn.load(Acquire) == theirs
                && let Some(status) = self.child.ended(false)
            {
                return Err(if self.hung.load(Relaxed) {
                    EngineError::Hung
                } else {
                    EngineError::Ended(status)
                });
            }
            if self.was_kicked() {
                let since = *kicked_since.get_or_insert_with(Instant::now);
                if since.elapsed() >= patience {
                    self.hung.store(true, Relaxed);
                    self.child.kill();
                }
            }
        }
    }

    /// Has a change made before the guest runs again; if it runs now, it has stopped once when this returns.
    pub(super) fn change(&self, change: Change) {
        if self.gone.load(SeqCst) {
            return;
        }
        self.queue.lock().unwrap_or_else(PoisonError::into_inner).push(change);
        if !self.running.load(SeqCst) {
            return;
        }
        let before = self.stops.load(SeqCst);
        self.waiting.fetch_add(1, SeqCst);
        let since = Instant::now();
        self.child.interrupt();
        let mut guard = self.stopped.0.lock().unwrap_or_else(PoisonError::into_inner);
        while self.running.load(SeqCst) && self.stops.load(SeqCst) == before {
            let waited = self.stopped.1.wait_timeout(guard, Duration::from_millis(100));
            guard = waited.unwrap_or_else(PoisonError::into_inner).0;
            if since.elapsed() > PATIENCE {
                self.hung.store(true, Relaxed);
                self.child.kill();
            }
        }
        drop(guard);
        self.waiting.fetch_sub(1, SeqCst);
    }

    /// Ends the guest's process, and waits for its end.
    pub(super) fn leave(&self) {
        self.gone.store(true, SeqCst);
        self.child.kill();
        let _ = self.child.ended(true);
    }
}

impl Kicker for Seat {
    fn kick(&self) {
        self.kicked.store(true, SeqCst);
        if self.running.load(SeqCst) {
            self.child.interrupt();
        }
    }

    fn kill(&self) {
        self.child.kill();
    }
}

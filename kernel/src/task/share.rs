//! How tasks get from one CPU to another.
//!
//! Waking a task where it ran last is cheap, and interrupting another CPU is not: it takes microseconds, tens of them
//! where that CPU has to be woken. So tasks stay where they are until one waits for longer than that would take.

use alloc::vec::Vec;
use core::future::Future;
use core::sync::atomic::{Ordering, fence};

use super::executor::{self, Cpu, JoinHandle, current_cpu};
use super::hooks::hooks;
use crate::{smp, time};

/// A poll that takes longer than this keeps others waiting.
const LONG_NS: u64 = 50_000;

/// Whether there are CPUs to share with.
#[inline]
pub(super) fn is_shared() -> bool {
    smp::several()
}

/// All CPUs in use; outside the guest, the calling thread's.
pub(super) fn for_each_cpu(mut work: impl FnMut(&'static Cpu)) {
    if (hooks().nth_cpu)(0).is_none() {
        return work(current_cpu());
    }
    for cpu in (0..).map_while(|n| (hooks().nth_cpu)(n)) {
        work(cpu);
    }
}

/// The CPUs in use other than `own`.
fn others(own: &Cpu) -> impl Iterator<Item = &'static Cpu> {
    (0..).map_while(|n| (hooks().nth_cpu)(n)).filter(move |cpu| !core::ptr::eq(*cpu, own))
}

impl Cpu {
    /// Before each poll, with the time at which this round of polls has begun.
    pub(super) fn note_poll(&'static self, begun_ns: u64) {
        let now_ns = time::now().as_nanos();
        self.polling_since_ns.store(now_ns, Ordering::Relaxed);
        if now_ns.saturating_sub(begun_ns) > LONG_NS {
            self.offer();
        }
    }

    /// After something was put into the queue, by anybody.
    pub(super) fn offer_behind_long_poll(&'static self) {
        if !self.polling.load(Ordering::Relaxed) {
            return;
        }
        let since_ns = self.polling_since_ns.load(Ordering::Relaxed);
        if time::now().as_nanos().saturating_sub(since_ns) > LONG_NS {
            self.offer();
        }
    }

    /// Lets an idle CPU take what waits here, if anything here can move.
    fn offer(&'static self) {
        if self.queue.lock().first_movable().is_none() {
            return;
        }
        self.overloaded.store(true, Ordering::Relaxed);
        // Orders the store before the look for an idle CPU; pairs with the fence in `idle`.
        fence(Ordering::SeqCst);
        let idle = others(self).find(|cpu| cpu.idle.load(Ordering::Relaxed));
        // If that is the calling CPU, in an interrupt, it looks around when this has been handled.
        if let Some(cpu) = idle.filter(|cpu| !core::ptr::eq(*cpu, current_cpu())) {
            (hooks().wake_cpu)(cpu);
        }
    }

    /// Whether there is something to take, before idling.
    pub(super) fn could_take(&self) -> bool {
        is_shared() && others(self).any(|cpu| cpu.overloaded.load(Ordering::Relaxed))
    }

    /// Makes this CPU the home of one task that waits elsewhere; `false`: there is none.
    pub(super) fn take_one(&'static self) -> bool {
        if !is_shared() {
            return false;
        }
        for cpu in others(self).filter(|cpu| cpu.overloaded.load(Ordering::Relaxed)) {
            let taken = {
                let mut queue = cpu.queue.lock();
                let taken = queue.first_movable().and_then(|place| queue.ready.remove(place));
                if queue.first_movable().is_none() {
                    cpu.overloaded.store(false, Ordering::Relaxed);
                }
                if let Some(runnable) = &taken {
                    // Nobody else schedules it: its turn is here.
                    runnable.metadata().home.set(self);
                    queue.live -= 1;
                }
                taken
            };
            if let Some(runnable) = taken {
                let mut queue = self.queue.lock();
                queue.adopt();
                queue.ready.push_back(runnable);
                return true;
            }
        }
        false
    }

    /// Asks the CPU to stop; `false`: it has tasks that cannot move.
    pub(crate) fn ask_to_stop(&'static self) -> bool {
        if self.queue.lock().pinned > 0 {
            return false;
        }
        self.stopping.store(true, Ordering::SeqCst);
        self.kick();
        true
    }

    /// Gives all tasks to another CPU, for good; called on this CPU, which stops, with interrupts masked. `false`: it
    /// has got one that cannot move, and goes on.
    pub(crate) fn give_up(&'static self, heir: &'static Self) -> bool {
        let ready = {
            let mut queue = self.queue.lock();
            if queue.pinned > 0 {
                self.stopping.store(false, Ordering::SeqCst);
                return false;
            }
            // From here on, whoever wakes one of its tasks waits until that has another home.
            queue.closed = true;
            core::mem::take(&mut queue.ready)
        };
        for_each_cpu(|cpu| {
            let infos: Vec<_> =
                cpu.tasks.lock().iter().filter_map(alloc::sync::Weak::upgrade).collect();
            for info in infos.iter().filter(|info| core::ptr::eq(info.home.get(), self)) {
                heir.queue.lock().adopt();
                self.queue.lock().live -= 1;
                info.home.set(heir);
            }
        });
        heir.queue.lock().ready.extend(ready);
        heir.kick();
        // A wait whose timer is gone asks for another when its task looks.
        loop {
            let due = self.timers().pop_due(u64::MAX);
            match due {
                Some(waker) => waker.wake(),
                None => return true,
            }
        }
    }

    /// The CPU runs again.
    pub(crate) fn take_up(&'static self) {
        self.queue.lock().closed = false;
        self.stopping.store(false, Ordering::SeqCst);
    }
}

/// Starts a task on a CPU that has nothing to do, if there is one, or else on this one.
///
/// For work that takes long without waiting; a task that mostly waits is best spawned where it is ([`super::spawn`]).
pub fn spawn_anywhere<T: Send + 'static>(
    name: &'static str,
    future: impl Future<Output = T> + Send + 'static,
) -> JoinHandle<T> {
    let own = current_cpu();
    let quiet =
        |cpu: &&Cpu| !cpu.polling.load(Ordering::Relaxed) && cpu.queue.lock().ready.is_empty();
    let home = others(own).find(quiet).unwrap_or(own);
    executor::spawn_at(home, false, name, future)
}

/// Starts a task on the `n`th CPU in use, where it stays; `None`: there is none.
pub fn spawn_on<T: Send + 'static>(
    n: usize,
    name: &'static str,
    future: impl Future<Output = T> + Send + 'static,
) -> Option<JoinHandle<T>> {
    let home = (hooks().nth_cpu)(n)?;
    Some(executor::spawn_at(home, true, name, future))
}

//! The executor: a run queue per CPU, and idling that cannot lose a wake-up.
//!
//! A task is woken and polled on its home, the CPU that spawned it. Where there are several, a CPU at which a task waits
//! behind one that runs for long says so ([`Cpu::offer`]), and an idle one makes itself that task's home (`share.rs`).

use alloc::collections::VecDeque;
use alloc::sync::{Arc, Weak};
use alloc::task::Wake;
use alloc::vec::Vec;
use core::future::Future;
use core::pin::{Pin, pin};
use core::sync::atomic::{AtomicBool, AtomicPtr, AtomicU64, Ordering, fence};
use core::task::{Context, Poll, Waker};
use core::time::Duration;

use super::fiber;
use super::home::AtomicRef;
use super::hooks::hooks;
use crate::percpu::{self, CpuId};
use crate::sync::{IrqGuard, IrqMutex, IrqMutexGuard};
use crate::time::{self, Timers};

/// Tasks polled before the timers are looked at again.
const BATCH: usize = 64;
/// No timer interrupt is asked for.
const UNARMED: u64 = u64::MAX;

pub(super) type Runnable = async_task::Runnable<Arc<TaskInfo>>;

#[derive(Debug)]
pub(super) struct RunQueue {
    pub(super) ready: VecDeque<Runnable>,
    /// Tasks whose home this is; each is in `ready` at most once, so this much room means that waking never allocates.
    pub(super) live: usize,
    /// Those of them that cannot move.
    pub(super) pinned: usize,
    /// The CPU is stopped: nothing may be put in.
    pub(super) closed: bool,
}

impl RunQueue {
    /// Where the first task is that another CPU may take.
    pub(super) fn first_movable(&self) -> Option<usize> {
        self.ready.iter().position(|waiting| !waiting.metadata().pinned)
    }

    /// Makes room for one more task.
    pub(super) fn adopt(&mut self) {
        self.live += 1;
        let room = self.live.saturating_sub(self.ready.len());
        self.ready.reserve(room);
    }
}

/// The runtime's part of the per-CPU data.
#[derive(Debug)]
pub struct Cpu {
    pub(super) queue: IrqMutex<RunQueue>,
    pub(super) timers: IrqMutex<Timers>,
    /// All tasks that were spawned at this CPU; dead ones are swept when new ones come.
    pub(super) tasks: IrqMutex<Vec<Weak<TaskInfo>>>,
    /// In (or on the way into) `idle_wait`: a waker on another CPU must interrupt it.
    pub(super) idle: AtomicBool,
    /// A task is being polled, on this stack or on a fiber's.
    pub(super) polling: AtomicBool,
    /// Since when, where there are other CPUs to care.
    pub(super) polling_since_ns: AtomicU64,
    /// Tasks wait here that others may take.
    pub(super) overloaded: AtomicBool,
    /// Somebody wants it stopped.
    pub(super) stopping: AtomicBool,
    /// The fiber that runs now, if any.
    pub(super) fiber: AtomicPtr<fiber::Frame>,
    /// The deadline that the platform's timer was last set to.
    armed_ns: AtomicU64,
    polls: AtomicU64,
    passes: AtomicU64,
    idles: AtomicU64,
    idle_ns: AtomicU64,
}

#[cfg(target_os = "none")]
static BOOT_CPU: Cpu = Cpu::new();

/// The boot CPU's state; other CPUs keep theirs in their per-CPU area.
#[cfg(target_os = "none")]
pub fn boot_cpu() -> &'static Cpu {
    &BOOT_CPU
}

impl Cpu {
    /// State of a CPU without tasks.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            queue: IrqMutex::new(RunQueue {
                ready: VecDeque::new(),
                live: 0,
                pinned: 0,
                closed: false,
            }),
            timers: IrqMutex::new(Timers::new()),
            tasks: IrqMutex::new(Vec::new()),
            idle: AtomicBool::new(false),
            polling: AtomicBool::new(false),
            polling_since_ns: AtomicU64::new(0),
            overloaded: AtomicBool::new(false),
            stopping: AtomicBool::new(false),
            fiber: AtomicPtr::new(core::ptr::null_mut()),
            armed_ns: AtomicU64::new(UNARMED),
            polls: AtomicU64::new(0),
            passes: AtomicU64::new(0),
            idles: AtomicU64::new(0),
            idle_ns: AtomicU64::new(0),
        }
    }

    pub(crate) fn timers(&self) -> IrqMutexGuard<'_, Timers> {
        self.timers.lock()
    }

    /// Ends this CPU's idling after something was put into its queue.
    pub(super) fn kick(&'static self) {
        if !core::ptr::eq(self, current_cpu()) {
            // Orders the queue's unlock before the load; pairs with the fence in `idle`.
            fence(Ordering::SeqCst);
            if self.idle.load(Ordering::Relaxed) {
                (hooks().wake_cpu)(self);
            }
        }
    }

    /// Puts a task into its home's queue, and sees to it that somebody looks there.
    fn push(runnable: Runnable) {
        let home = loop {
            let home = runnable.metadata().home.get();
            let mut queue = home.queue.lock();
            if !queue.closed {
                queue.ready.push_back(runnable);
                break home;
            }
            // Its tasks are being given another home.
            drop(queue);
            (hooks().relax)();
        };
        home.kick();
        if super::share::is_shared() {
            home.offer_behind_long_poll();
        }
    }

    fn pop(&self) -> Option<Runnable> {
        self.queue.lock().ready.pop_front()
    }

    /// Polls what is ready, one batch at most, and wakes what is due.
    fn run_batch(&'static self) {
        self.passes.fetch_add(1, Ordering::Relaxed);
        let shared = super::share::is_shared();
        let begun_ns = if shared { time::now().as_nanos() } else { 0 };
        for _ in 0..BATCH {
            let Some(runnable) = self.pop() else { break };
            if shared {
                self.note_poll(begun_ns);
            }
            self.polls.fetch_add(1, Ordering::Relaxed);
            runnable.metadata().polls.fetch_add(1, Ordering::Relaxed);
            self.polling.store(true, Ordering::Relaxed);
            let polling = Polling(self);
            runnable.run();
            drop(polling);
        }
        if self.timers().earliest().is_none() {
            return;
        }
        let now_ns = time::now().as_nanos();
        loop {
            let due = self.timers().pop_due(now_ns);
            match due {
                Some(waker) => waker.wake(),
                None => return,
            }
        }
    }

    /// Waits for an interrupt, unless there is something to do.
    fn idle(&'static self, must_run: impl Fn() -> bool) {
        let _masked = IrqGuard::new();
        self.idle.store(true, Ordering::Relaxed);
        // Orders the store before the look at the queue; pairs with the fence in `kick`.
        fence(Ordering::SeqCst);
        // From here on, a handler's wake-up stays pending until `idle_wait` unmasks and waits in one step.
        if self.queue.lock().ready.is_empty() && !must_run() && !self.could_take() {
            let now_ns = time::now().as_nanos();
            let deadline_ns = self.timers().earliest().unwrap_or(UNARMED);
            if deadline_ns > now_ns {
                let armed_ns = self.armed_ns.load(Ordering::Relaxed);
                // A timer that goes off early costs one look; setting it anew costs a hypercall or an exit.
                if armed_ns <= now_ns || armed_ns > deadline_ns {
                    let deadline = (deadline_ns != UNARMED).then_some(deadline_ns);
                    (hooks().set_timer)(deadline);
                    self.armed_ns.store(deadline_ns, Ordering::Relaxed);
                }
                (hooks().idle_wait)();
                let idle_ns = time::now().as_nanos().saturating_sub(now_ns);
                self.idles.fetch_add(1, Ordering::Relaxed);
                self.idle_ns.fetch_add(idle_ns, Ordering::Relaxed);
            }
        }
        self.idle.store(false, Ordering::Relaxed);
    }
}

impl Default for Cpu {
    fn default() -> Self {
        Self::new()
    }
}

/// Clears [`Cpu::polling`], also when a test's task panics.
struct Polling<'a>(&'a Cpu);

impl Drop for Polling<'_> {
    fn drop(&mut self) {
        self.0.polling.store(false, Ordering::Relaxed);
    }
}

/// The calling CPU's runtime state.
#[must_use]
pub fn current_cpu() -> &'static Cpu {
    (hooks().current_cpu)()
}

/// What is known of a task; lives as long as the task.
#[derive(Debug)]
pub(super) struct TaskInfo {
    name: &'static str,
    /// Changed by whoever has the task's turn to run, or has closed its home's queue.
    pub(super) home: AtomicRef<Cpu>,
    /// It stays at its home.
    pub(super) pinned: bool,
    polls: AtomicU64,
}

impl Drop for TaskInfo {
    fn drop(&mut self) {
        let mut queue = self.home.get().queue.lock();
        queue.live -= 1;
        queue.pinned -= usize::from(self.pinned);
    }
}

/// A handle on a task's result; dropping it lets the task run on by itself.
#[derive(Debug)]
pub struct JoinHandle<T>(Option<async_task::Task<T, Arc<TaskInfo>>>);

impl<T> JoinHandle<T> {
    /// Stops the task at its next `.await` and drops it; `Some` if it had already finished.
    pub async fn cancel(mut self) -> Option<T> {
        match self.0.take() {
            Some(task) => task.cancel().await,
            None => None,
        }
    }
    /// Whether the task has ended.
    #[must_use]
    pub fn is_finished(&self) -> bool {
        self.0.as_ref().is_none_or(async_task::Task::is_finished)
    }
}

impl<T> Future for JoinHandle<T> {
    type Output = T;
    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<T> {
        match self.0.as_mut() {
            Some(task) => Pin::new(task).poll(cx),
            None => Poll::Pending,
        }
    }
}

impl<T> Drop for JoinHandle<T> {
    fn drop(&mut self) {
        if let Some(task) = self.0.take() {
            task.detach();
        }
    }
}

/// Starts a task on this CPU; another one may take it over.
pub fn spawn<T: Send + 'static>(
    name: &'static str,
    future: impl Future<Output = T> + Send + 'static,
) -> JoinHandle<T> {
    spawn_at(current_cpu(), false, name, future)
}

/// Starts a task at `home`; with `pinned` it stays there.
pub(super) fn spawn_at<T: Send + 'static>(
    home: &'static Cpu,
    pinned: bool,
    name: &'static str,
    future: impl Future<Output = T> + Send + 'static,
) -> JoinHandle<T> {
    let home = {
        let mut queue = home.queue.lock();
        let home = if queue.closed {
            drop(queue);
            let home = current_cpu();
            queue = home.queue.lock();
            home
        } else {
            home
        };
        queue.adopt();
        queue.pinned += usize::from(pinned);
        home
    };
    let info =
        Arc::new(TaskInfo { name, home: AtomicRef::new(home), pinned, polls: AtomicU64::new(0) });
    {
        let mut tasks = home.tasks.lock();
        if tasks.len() == tasks.capacity() {
            tasks.retain(|task| task.strong_count() > 0);
        }
        tasks.push(Arc::downgrade(&info));
    }
    let (runnable, task) =
        async_task::Builder::new().metadata(info).spawn(move |_| future, Cpu::push);
    runnable.schedule();
    JoinHandle(Some(task))
}

/// The waker of the future that [`block_on`] runs outside any task.
struct MainWaker {
    cpu: &'static Cpu,
    woken: AtomicBool,
}

impl Wake for MainWaker {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }
    fn wake_by_ref(self: &Arc<Self>) {
        self.woken.store(true, Ordering::Release);
        self.cpu.kick();
    }
}

/// Runs a future to its end: in a fiber by parking the fiber, elsewhere by running this CPU's tasks meanwhile.
///
/// # Panics
/// Inside an async task, which must use `.await`: nothing else could run.
pub fn block_on<F: Future>(future: F) -> F::Output {
    let cpu = current_cpu();
    if fiber::is_current(cpu) {
        return fiber::block_on(cpu, future);
    }
    assert!(
        !cpu.polling.load(Ordering::Relaxed),
        "block_on inside an async task: use .await there, or a fiber"
    );
    let mut future = pin!(future);
    let main = Arc::new(MainWaker { cpu, woken: AtomicBool::new(true) });
    let waker = Waker::from(Arc::clone(&main));
    let mut cx = Context::from_waker(&waker);
    loop {
        if main.woken.swap(false, Ordering::Acquire)
            && let Poll::Ready(output) = future.as_mut().poll(&mut cx)
        {
            return output;
        }
        cpu.run_batch();
        if !cpu.take_one() {
            cpu.idle(|| main.woken.load(Ordering::Acquire));
        }
    }
}

/// Runs tasks on a CPU without a main function until it is to stop; `stop` then stops it, and returns when it goes on.
pub(crate) fn run_until_stopped(stop: impl FnOnce()) {
    let cpu = current_cpu();
    let unmasked = Unmasked::begin();
    while !cpu.stopping.load(Ordering::Acquire) {
        cpu.run_batch();
        if !cpu.take_one() {
            cpu.idle(|| cpu.stopping.load(Ordering::Acquire));
        }
    }
    drop(unmasked);
    stop();
}

/// Lets interrupts in while it lives, on a CPU that has started with them masked.
struct Unmasked;

impl Unmasked {
    fn begin() -> Self {
        (hooks().irq_enable)();
        Self
    }
}

impl Drop for Unmasked {
    fn drop(&mut self) {
        (hooks().irq_disable)();
    }
}

/// A task, for the shell.
#[derive(Clone, Copy, Debug)]
pub struct TaskStatus {
    /// The name given to [`spawn`].
    pub name: &'static str,
    /// How often it ran.
    pub polls: u64,
    /// Its home; `None` for a thread of the host.
    pub cpu: Option<CpuId>,
}

/// The tasks of all CPUs, by where they were spawned, oldest first.
#[must_use]
pub fn tasks() -> Vec<TaskStatus> {
    let mut infos = Vec::new();
    super::share::for_each_cpu(|cpu| {
        infos.extend(cpu.tasks.lock().iter().filter_map(Weak::upgrade));
    });
    infos
        .iter()
        .map(|info| TaskStatus {
            name: info.name,
            polls: info.polls.load(Ordering::Relaxed),
            cpu: percpu::of_runtime(info.home.get()).map(percpu::PerCpu::id),
        })
        .collect()
}

/// What a CPU has done.
#[derive(Clone, Copy, Debug)]
pub struct CpuStatistics {
    /// Task polls.
    pub polls: u64,
    /// Times it went through its run queue and timers.
    pub passes: u64,
    /// Times it waited for an interrupt.
    pub idles: u64,
    /// Time spent waiting.
    pub idle: Duration,
}

/// This CPU's counters.
#[must_use]
pub fn statistics() -> CpuStatistics {
    statistics_of(current_cpu())
}

/// The counters of a CPU.
#[must_use]
pub fn statistics_of(cpu: &Cpu) -> CpuStatistics {
    CpuStatistics {
        polls: cpu.polls.load(Ordering::Relaxed),
        passes: cpu.passes.load(Ordering::Relaxed),
        idles: cpu.idles.load(Ordering::Relaxed),
        idle: Duration::from_nanos(cpu.idle_ns.load(Ordering::Relaxed)),
    }
}

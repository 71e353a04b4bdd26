//! The executor: a run queue per CPU, tasks that stay on their CPU, idling that cannot lose a wake-up.

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
use super::hooks::hooks;
use crate::sync::{IrqGuard, IrqMutex, IrqMutexGuard};
use crate::time::{self, Timers};

/// Tasks polled before the timers are looked at again.
const BATCH: usize = 64;
/// No timer interrupt is asked for.
const UNARMED: u64 = u64::MAX;

type Runnable = async_task::Runnable<Arc<TaskInfo>>;

#[derive(Debug)]
struct RunQueue {
    ready: VecDeque<Runnable>,
    /// Tasks that exist; each is in `ready` at most once, so this much room means that waking never allocates.
    live: usize,
}

/// The runtime's part of the per-CPU data.
#[derive(Debug)]
pub struct Cpu {
    queue: IrqMutex<RunQueue>,
    timers: IrqMutex<Timers>,
    /// All tasks of this CPU, for the shell; dead ones are swept when new ones come.
    tasks: IrqMutex<Vec<Weak<TaskInfo>>>,
    /// In (or on the way into) `idle_wait`: a waker on another CPU must interrupt it.
    idle: AtomicBool,
    /// A task is being polled, on this stack or on a fiber's.
    polling: AtomicBool,
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
            queue: IrqMutex::new(RunQueue { ready: VecDeque::new(), live: 0 }),
            timers: IrqMutex::new(Timers::new()),
            tasks: IrqMutex::new(Vec::new()),
            idle: AtomicBool::new(false),
            polling: AtomicBool::new(false),
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
    fn kick(&'static self) {
        if !core::ptr::eq(self, current_cpu()) {
            // Orders the queue's unlock before the load; pairs with the fence in `idle`.
            fence(Ordering::SeqCst);
            if self.idle.load(Ordering::Relaxed) {
                (hooks().wake_cpu)(self);
            }
        }
    }

    fn push(&'static self, runnable: Runnable) {
        self.queue.lock().ready.push_back(runnable);
        self.kick();
    }

    fn pop(&self) -> Option<Runnable> {
        self.queue.lock().ready.pop_front()
    }

    /// Polls what is ready, one batch at most, and wakes what is due.
    fn run_batch(&self) {
        self.passes.fetch_add(1, Ordering::Relaxed);
        for _ in 0..BATCH {
            let Some(runnable) = self.pop() else { break };
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
    fn idle(&self, must_run: impl Fn() -> bool) {
        let _masked = IrqGuard::new();
        self.idle.store(true, Ordering::Relaxed);
        // Orders the store before the look at the queue; pairs with the fence in `kick`.
        fence(Ordering::SeqCst);
        // From here on, a handler's wake-up stays pending until `idle_wait` unmasks and waits in one step.
        if self.queue.lock().ready.is_empty() && !must_run() {
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
struct TaskInfo {
    name: &'static str,
    home: &'static Cpu,
    polls: AtomicU64,
}

impl Drop for TaskInfo {
    fn drop(&mut self) {
        self.home.queue.lock().live -= 1;
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

/// Starts a task on this CPU.
pub fn spawn<T: Send + 'static>(
    name: &'static str,
    future: impl Future<Output = T> + Send + 'static,
) -> JoinHandle<T> {
    let home = current_cpu();
    {
        let mut queue = home.queue.lock();
        queue.live += 1;
        let room = queue.live.saturating_sub(queue.ready.len());
        queue.ready.reserve(room);
    }
    let info = Arc::new(TaskInfo { name, home, polls: AtomicU64::new(0) });
    {
        let mut tasks = home.tasks.lock();
        if tasks.len() == tasks.capacity() {
            tasks.retain(|task| task.strong_count() > 0);
        }
        tasks.push(Arc::downgrade(&info));
    }
    let schedule = |runnable: Runnable| {
        let home = runnable.metadata().home;
        home.push(runnable);
    };
    let (runnable, task) =
        async_task::Builder::new().metadata(info).spawn(move |_| future, schedule);
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
        cpu.idle(|| main.woken.load(Ordering::Acquire));
    }
}

/// A task, for the shell.
#[derive(Clone, Copy, Debug)]
pub struct TaskStatus {
    /// The name given to [`spawn`].
    pub name: &'static str,
    /// How often it ran.
    pub polls: u64,
}

/// The tasks of this CPU, oldest first.
#[must_use]
pub fn tasks() -> Vec<TaskStatus> {
    let infos: Vec<_> = current_cpu().tasks.lock().iter().filter_map(Weak::upgrade).collect();
    infos
        .iter()
        .map(|info| TaskStatus { name: info.name, polls: info.polls.load(Ordering::Relaxed) })
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
    let cpu = current_cpu();
    CpuStatistics {
        polls: cpu.polls.load(Ordering::Relaxed),
        passes: cpu.passes.load(Ordering::Relaxed),
        idles: cpu.idles.load(Ordering::Relaxed),
        idle: Duration::from_nanos(cpu.idle_ns.load(Ordering::Relaxed)),
    }
}

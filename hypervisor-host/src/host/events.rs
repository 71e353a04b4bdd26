//! The event loop: one thread, started when something is first waited for, that calls whoever waits for a file
//! descriptor.

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Instant;

use rustix::event::{EventfdFlags, Timespec, epoll, eventfd};

/// What is waited for, or what happened.
pub type Interest = epoll::EventFlags;
/// Something can be read, or the other end is gone.
pub const READ: Interest = epoll::EventFlags::IN.union(epoll::EventFlags::RDHUP);
/// There is room to write.
pub const WRITE: Interest = epoll::EventFlags::OUT;

/// Is called on the loop's thread, with no lock held.
pub type Callback = Arc<dyn Fn(Interest) + Send + Sync>;

/// Events taken at once.
const BATCH: usize = 32;
/// The key of the eventfd.
const WAKE: u64 = 0;

#[derive(Default)]
struct State {
    entries: BTreeMap<u64, Callback>,
    last: u64,
    thread: Option<JoinHandle<()>>,
    /// Called at each wake-up.
    on_wake: Vec<Callback>,
    /// No thread is started: see [`EventLoop::run_until`].
    by_hand: bool,
}

struct Shared {
    epoll: OwnedFd,
    wake: OwnedFd,
    stopping: AtomicBool,
    woken: AtomicBool,
    state: Mutex<State>,
}

/// The loop; the thread ends when this is dropped.
pub struct EventLoop {
    shared: Arc<Shared>,
}

impl fmt::Debug for EventLoop {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EventLoop").field("waited_for", &self.shared.lock().entries.len()).finish()
    }
}

/// Waits for one file descriptor; dropping it ends that. It owns the descriptor.
pub struct Waiting {
    shared: Arc<Shared>,
    key: u64,
    fd: Arc<OwnedFd>,
}

impl fmt::Debug for Waiting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Waiting({:?})", self.fd)
    }
}

impl Waiting {
    /// Waits for something else from now on; nothing at all: for errors only.
    pub fn change(&self, interest: Interest) {
        // The descriptor is ours and was added: it can be changed.
        let _ = epoll::modify(
            &self.shared.epoll,
            &*self.fd,
            epoll::EventData::new_u64(self.key),
            interest,
        );
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        let _ = epoll::delete(&self.shared.epoll, &*self.fd);
        // Dropped behind the lock: it may own another of us.
        let callback = self.shared.lock().entries.remove(&self.key);
        drop(callback);
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wake(&self) {
        if !self.woken.swap(true, Ordering::SeqCst) {
            // It fails only when it is woken already.
            let _ = rustix::io::write(&self.wake, &1_u64.to_ne_bytes());
        }
    }

    fn run(&self) {
        let mut events = Vec::with_capacity(BATCH);
        while !self.stopping.load(Ordering::SeqCst) {
            self.turn(&mut events, None);
        }
    }

    /// Waits once, and calls whom it concerns.
    fn turn(&self, events: &mut Vec<epoll::Event>, most: Option<&Timespec>) {
        events.clear();
        // It fails when a signal comes, and then there is nothing.
        let _ = epoll::wait(&self.epoll, rustix::buffer::spare_capacity(events), most);
        {
            for epoll::Event { flags, data, .. } in events.iter().copied() {
                if data.u64() == WAKE {
                    let _ = rustix::io::read(&self.wake, &mut [0; 8]);
                    self.woken.store(false, Ordering::SeqCst);
                    let callbacks = self.lock().on_wake.clone();
                    callbacks.iter().for_each(|callback| callback(Interest::empty()));
                    continue;
                }
                let callback = self.lock().entries.get(&data.u64()).cloned();
                if let Some(callback) = callback {
                    callback(flags);
                }
            }
        }
    }
}

impl EventLoop {
    /// A loop that waits for nothing yet.
    ///
    /// # Errors
    /// The host has no file descriptor left.
    pub fn new() -> io::Result<Self> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        epoll::add(&epoll, &wake, epoll::EventData::new_u64(WAKE), Interest::IN)?;
        let (stopping, woken) = (AtomicBool::new(false), AtomicBool::new(false));
        let state = Mutex::default();
        Ok(Self { shared: Arc::new(Shared { epoll, wake, stopping, woken, state }) })
    }

    /// A loop without a thread: it runs inside [`Self::run_until`] only.
    ///
    /// # Errors
    /// The host has no file descriptor left.
    pub fn by_hand() -> io::Result<Self> {
        let this = Self::new()?;
        this.shared.lock().by_hand = true;
        Ok(this)
    }

    /// Runs the loop on the calling thread until `is_done`, which is asked after every turn, or `deadline`.
    /// Another thread that changes what `is_done` says calls [`Self::wake`].
    pub fn run_until(&self, deadline: Option<Instant>, is_done: impl Fn() -> bool) {
        let mut events = Vec::with_capacity(BATCH);
        while !is_done() {
            let left = deadline.map(|at| at.saturating_duration_since(Instant::now()));
            if left.is_some_and(|left| left.is_zero()) {
                return;
            }
            let most = left.map(|left| Timespec {
                tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
                tv_nsec: left.subsec_nanos().into(),
            });
            self.shared.turn(&mut events, most.as_ref());
        }
    }

    /// Calls `callback` whenever there is something of `interest` (or an error) at `fd`.
    ///
    /// # Errors
    /// The host cannot wait for it (a regular file), or has no thread left.
    pub fn add(
        &self,
        fd: Arc<OwnedFd>,
        interest: Interest,
        callback: Callback,
    ) -> io::Result<Waiting> {
        let mut state = self.shared.lock();
        self.start(&mut state)?;
        state.last += 1;
        let key = state.last;
        epoll::add(&self.shared.epoll, &*fd, epoll::EventData::new_u64(key), interest)?;
        state.entries.insert(key, callback);
        Ok(Waiting { shared: Arc::clone(&self.shared), key, fd })
    }

    /// Calls `callback` soon after each [`Self::wake`], and at other times.
    pub fn on_wake(&self, callback: Callback) {
        self.shared.lock().on_wake.push(callback);
    }

    /// Wakes the thread, if it was started.
    pub fn wake(&self) {
        self.shared.wake();
    }

    fn start(&self, state: &mut State) -> io::Result<()> {
        if state.thread.is_none() && !state.by_hand {
            let shared = Arc::clone(&self.shared);
            let thread = std::thread::Builder::new().name("events".into());
            state.thread = Some(thread.spawn(move || shared.run())?);
        }
        Ok(())
    }
}

impl Drop for EventLoop {
    fn drop(&mut self) {
        self.shared.stopping.store(true, Ordering::SeqCst);
        self.shared.wake();
        let (thread, entries, callbacks) = {
            let mut state = self.shared.lock();
            let entries = std::mem::take(&mut state.entries);
            (state.thread.take(), entries, std::mem::take(&mut state.on_wake))
        };
        // What a callback owns may own what owns us, and be dropped by the thread itself.
        if let Some(thread) = thread.filter(|t| t.thread().id() != std::thread::current().id()) {
            let _ = thread.join();
        }
        drop((entries, callbacks));
    }
}

//! The thread beside the guest's: what is typed, the control socket, signals and the time-out. It is started when there
//! is something to do for it; a guest that ends at once, and is typed nothing, does without.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::outcome::Cut;
use super::signals::{self, Signals};
use super::tail::Tail;
use super::terminal::{Input, Raw};
use super::{crash, detach};
use crate::control::protocol::Exit;
use crate::control::runtime::{Claim, Directory};
use crate::control::server::Server;
use crate::host::events::EventLoop;
use crate::journal::Journal;
use crate::pv::report::CpuReport;
use crate::supervise::Supervised;

/// How often typed bytes are offered again to a guest without room.
const RETRY: Duration = Duration::from_millis(10);

/// What the thread works for.
pub(super) struct Work {
    pub(super) supervised: Arc<Supervised>,
    pub(super) tail: Tail,
    pub(super) journal: Arc<Journal>,
    /// The guest's name, for a socket that is made late; `None`: there shall be none.
    pub(super) name: Option<String>,
    pub(super) raw: Option<Arc<Raw>>,
    /// Standard input goes to the guest.
    pub(super) takes_input: bool,
}

#[derive(Default)]
struct State {
    thread: Option<JoinHandle<()>>,
    events: Option<Arc<EventLoop>>,
    claim: Option<Claim>,
    server: Option<Arc<Server>>,
    deadline: Option<Instant>,
    stopped: Vec<CpuReport>,
}

/// The thread, whether it was started or not.
pub(super) struct Helper {
    work: Work,
    state: Mutex<State>,
    over: AtomicBool,
}

impl Helper {
    pub(super) fn new(work: Work) -> Arc<Self> {
        Arc::new(Self { work, state: Mutex::default(), over: AtomicBool::new(false) })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the guest's name at once.
    pub(super) fn claim(&self) -> Result<(), String> {
        let Some(name) = &self.work.name else { return Ok(()) };
        let mut state = self.lock();
        if state.claim.is_none() {
            let claim = Directory::open().and_then(|directory| directory.claim(name));
            state.claim = Some(claim.map_err(|error| error.to_string())?);
        }
        Ok(())
    }

    /// When the guest is ended.
    pub(super) fn set_deadline(&self, deadline: Option<Instant>) {
        let mut state = self.lock();
        state.deadline = deadline;
        if let Some(events) = &state.events {
            events.wake();
        }
    }

    /// Where the CPUs were when the time was over.
    pub(super) fn stopped(&self) -> Vec<CpuReport> {
        std::mem::take(&mut self.lock().stopped)
    }

    /// Starts the thread, unless it runs.
    pub(super) fn start(self: &Arc<Self>) -> Result<(), String> {
        let mut state = self.lock();
        if state.thread.is_some() {
            return Ok(());
        }
        let events = EventLoop::by_hand().map_err(|error| format!("event loop: {error}"))?;
        let events = Arc::clone(state.events.insert(Arc::new(events)));
        let this = Arc::clone(self);
        let run = move || {
            if let Err(error) = this.run(&events) {
                eprintln!("janus: {error}\r");
            }
        };
        let thread = std::thread::Builder::new().name("helper".into()).spawn(run);
        state.thread = Some(thread.map_err(|error| format!("no thread for control: {error}"))?);
        Ok(())
    }

    /// Answers those who wait for the end.
    pub(super) fn ended(&self, exit: &Exit) {
        let server = self.lock().server.clone();
        if let Some(server) = server {
            server.ended(exit);
        }
    }

    /// Ends the thread, and gives the name back.
    pub(super) fn finish(&self) {
        self.over.store(true, Ordering::SeqCst);
        let thread = {
            let mut state = self.lock();
            if let Some(events) = &state.events {
                events.wake();
            }
            state.thread.take()
        };
        if let Some(thread) = thread {
            let _ = thread.join();
        }
        let state = std::mem::take(&mut *self.lock());
        drop(state);
    }

    fn run(self: &Arc<Self>, events: &Arc<EventLoop>) -> Result<(), String> {
        let Work { supervised, tail, journal, raw, takes_input, .. } = &self.work;
        let (ends, continues) = (Arc::clone(supervised), raw.clone());
        let hears = move |signal| match &continues {
            Some(raw) if signals::is_continue(signal) => raw.again(),
            _ if signals::is_continue(signal) => {}
            _ => ends.end(Cut::Signal(signal)),
        };
        let _signals =
            Signals::start(events, hears).map_err(|error| format!("signals: {error}"))?;
        let input = if *takes_input { Some(self.input(events)?) } else { None };
        if let Err(error) = self.claim() {
            // Its name was our choice: it runs all the same.
            eprintln!("janus: no control socket: {error}\r");
        }
        let listener = self.lock().claim.as_ref().map(|claim| claim.listener.try_clone());
        let server = match listener {
            None => None,
            Some(listener) => {
                let started = listener.and_then(|listener| {
                    let (tail, journal) = (Arc::clone(&tail.0), Arc::clone(journal));
                    Server::start(&listener, events, supervised.clone(), tail, journal)
                });
                let server = Arc::new(started.map_err(|error| format!("control socket: {error}"))?);
                self.lock().server = Some(Arc::clone(&server));
                Some(server)
            }
        };
        if let Some(name) = &self.work.name {
            detach::started(name);
        }
        self.turn(events, input.as_deref(), server.as_deref());
        Ok(())
    }

    fn input(&self, events: &EventLoop) -> Result<Arc<Input>, String> {
        let (typed, left) = (Arc::clone(&self.work.supervised), Arc::clone(&self.work.supervised));
        let leave = self
            .work
            .raw
            .is_some()
            .then(|| -> Box<dyn Fn() + Send + Sync> { Box::new(move || left.end(Cut::Left)) });
        let typing = Box::new(move |bytes: &[u8]| typed.type_on_console(bytes));
        Input::start(events, typing, leave).map_err(|error| format!("standard input: {error}"))
    }

    /// Serves until it is over.
    fn turn(&self, events: &EventLoop, input: Option<&Input>, server: Option<&Server>) {
        let over = || self.over.load(Ordering::SeqCst);
        let typed = || input.filter(|input| input.has_backlog());
        let backlog = || typed().is_some() || server.is_some_and(Server::has_backlog);
        while !over() {
            let deadline = self.lock().deadline;
            if deadline.is_some_and(|deadline| deadline <= Instant::now()) {
                self.set_deadline(None);
                self.time_is_over();
                continue;
            }
            let changed = || self.lock().deadline != deadline;
            if !backlog() {
                events.run_until(deadline, || over() || backlog() || changed());
                continue;
            }
            if let Some(input) = typed() {
                input.pump();
            }
            if let Some(server) = server {
                server.pump();
            }
            if backlog() {
                events.run_until(Some(Instant::now() + RETRY), || over() || changed());
            }
        }
    }

    fn time_is_over(&self) {
        if let Some(guest) = self.work.supervised.running() {
            let stopped = crash::stopped(&guest);
            self.lock().stopped = stopped;
            self.work.supervised.end(Cut::Timeout);
        }
    }
}

//! The guest's console: the ring on one side, any writer and typed bytes on the other.

use std::collections::VecDeque;
use std::fmt;
use std::io::Write;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use janus_proto::byte_ring::{ByteRing, CONSOLE};

use super::{HostError, Mapping};
use crate::pv::domain::HostPort;

/// Where the guest's output goes.
pub type Output = Box<dyn Write + Send>;

/// Bytes of input kept for a guest that does not read; whoever types waits then.
const INPUT: usize = 64 * 1024;

struct State {
    ring: ByteRing<Mapping>,
    output: Output,
    input: VecDeque<u8>,
    broken: bool,
    closed: bool,
}

struct Inner {
    state: Mutex<State>,
    room: Condvar,
    port: HostPort,
}

impl Inner {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes what the guest printed, and gives it what was typed.
    fn serve(&self) {
        let mut state = self.state();
        let notify = state.pump();
        drop(state);
        self.room.notify_all();
        if notify {
            self.port.notify();
        }
    }
}

impl State {
    /// `true`: notify the guest.
    fn pump(&mut self) -> bool {
        let mut notify = false;
        let mut buf = [0; 2048];
        while !self.broken {
            let Ok(count) = self.ring.read(&mut buf) else {
                self.broken = true;
                eprintln!("janus: the guest broke its console ring; nothing more is taken from it");
                break;
            };
            if count > 0 {
                notify = true;
                // Somebody who does not listen any more is no fault of the guest's.
                let _ = self.output.write_all(buf.get(..count).unwrap_or_default());
            }
            let typed = self.input.make_contiguous();
            let given = if typed.is_empty() { 0 } else { self.ring.write(typed).unwrap_or(0) };
            self.input.drain(..given);
            notify |= given > 0;
            if count == 0 && given == 0 {
                break;
            }
        }
        let _ = self.output.flush();
        notify
    }
}

/// A guest's console.
#[derive(Clone)]
pub struct Console(Arc<Inner>);

impl fmt::Debug for Console {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Console").finish_non_exhaustive()
    }
}

impl Console {
    pub(super) fn new(page: Mapping, port: HostPort, output: Output) -> Result<Self, HostError> {
        let ring = ByteRing::back(page, CONSOLE).map_err(HostError::Ring)?;
        let state = State { ring, output, input: VecDeque::new(), broken: false, closed: false };
        Ok(Self(Arc::new(Inner { state: Mutex::new(state), room: Condvar::new(), port })))
    }

    pub(super) fn handler(&self) -> Box<dyn Fn() + Send + Sync> {
        let inner = Arc::downgrade(&self.0);
        Box::new(move || {
            if let Some(inner) = inner.upgrade() {
                inner.serve();
            }
        })
    }

    /// Types: waits while the guest has far too much to read already. `false`: the console is closed.
    pub fn type_bytes(&self, bytes: &[u8]) -> bool {
        for part in bytes.chunks(1024) {
            let mut state = self.0.state();
            while state.input.len() + part.len() > INPUT && !state.closed {
                state = self.0.room.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
            if state.closed {
                return false;
            }
            state.input.extend(part);
            drop(state);
            self.0.serve();
        }
        true
    }

    /// Takes what the guest printed last; whoever types is let go.
    pub fn close(&self) {
        let mut state = self.0.state();
        state.pump();
        state.closed = true;
        drop(state);
        self.0.room.notify_all();
    }
}

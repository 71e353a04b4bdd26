//! What is typed: from the terminal, or whatever standard input is, to the guest's console.
//!
//! A terminal is in raw mode meanwhile, and gets its own settings back on every way out: when this is dropped, after a
//! signal (`signals.rs`), and when this program panics. Nothing is read that the guest has no room for, so that what is
//! pasted early waits where it is.

use std::io;
use std::os::fd::AsFd as _;
use std::sync::{Arc, Mutex, MutexGuard, Once, PoisonError};

use rustix::fs::FileType;
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetpgrp, tcsetattr};

use super::outcome::Cut;
use crate::host::events::{EventLoop, Interest, READ, Waiting};

/// Ctrl-].
const LEAVE: u8 = 0x1d;

/// The settings to go back to, for a panic.
static SETTINGS: Mutex<Option<Termios>> = Mutex::new(None);

fn set(settings: &Termios) {
    // Nobody is there to tell.
    let _ = tcsetattr(io::stdin(), OptionalActions::Now, settings);
}

fn restore() {
    let settings = SETTINGS.lock().unwrap_or_else(PoisonError::into_inner).take();
    if let Some(settings) = settings {
        set(&settings);
    }
}

/// A terminal in raw mode; put back when this is dropped.
#[derive(Debug)]
pub(super) struct Raw(Termios);

impl Raw {
    /// Changes the terminal at standard input, if it is one and this program has it.
    pub(super) fn enter() -> Option<Self> {
        static PANICS: Once = Once::new();
        let settings = tcgetattr(io::stdin()).ok()?;
        // In the background it is another's: reading would stop us.
        if tcgetpgrp(io::stdin()).ok() != Some(rustix::process::getpgrp()) {
            return None;
        }
        *SETTINGS.lock().unwrap_or_else(PoisonError::into_inner) = Some(settings.clone());
        PANICS.call_once(|| {
            let before = std::panic::take_hook();
            std::panic::set_hook(Box::new(move |info| {
                restore();
                before(info);
            }));
        });
        let mut raw = settings.clone();
        raw.make_raw();
        // Lines of the guest and of this program both end as they always do.
        raw.output_modes = settings.output_modes;
        set(&raw);
        Some(Self(raw))
    }

    /// Gives the terminal its own settings back; [`Self::again`] takes it again.
    pub(super) fn leave(&self) {
        if let Some(settings) = SETTINGS.lock().unwrap_or_else(PoisonError::into_inner).as_ref() {
            set(settings);
        }
    }

    /// Once more, after this program was stopped and continued.
    pub(super) fn again(&self) {
        if tcgetpgrp(io::stdin()).ok() == Some(rustix::process::getpgrp()) {
            set(&self.0);
        }
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        restore();
    }
}

/// Whether anything can come from standard input: not from `/dev/null`.
pub(super) fn has_input() -> bool {
    rustix::fs::fstat(io::stdin()).is_ok_and(|stat| {
        let is_device = FileType::from_raw_mode(stat.st_mode) == FileType::CharacterDevice;
        !(is_device && stat.st_rdev == rustix::fs::makedev(1, 3))
    })
}

/// Gives the terminal to a guest whose console waits by itself: `type_bytes` gets what is typed, and says whether
/// anybody still wants it; `end` is called when somebody leaves.
pub(super) fn attach(
    type_bytes: impl Fn(&[u8]) -> bool + Send + 'static,
    end: impl Fn(Cut) + Send + 'static,
) -> Option<Raw> {
    let raw = Raw::enter();
    let interactive = raw.is_some();
    if interactive {
        eprintln!("janus: Ctrl-] leaves and ends the guest\r");
    }
    let typed = move || {
        let mut buf = [0; 1024];
        loop {
            match rustix::io::read(io::stdin(), &mut buf) {
                Ok(count @ 1..) => {
                    let bytes = buf.get(..count).unwrap_or_default();
                    if interactive && bytes.contains(&LEAVE) {
                        return end(Cut::Left);
                    }
                    if !type_bytes(bytes) {
                        return;
                    }
                }
                Err(rustix::io::Errno::INTR) => {}
                // The end of what was typed is not the end of the guest.
                Ok(0) | Err(_) => return,
            }
        }
    };
    // Without the thread the guest only cannot be typed to.
    if has_input()
        && let Err(error) = std::thread::Builder::new().name("typed".into()).spawn(typed)
    {
        eprintln!("janus: nothing can be typed: {error}");
    }
    raw
}

/// Takes typed bytes; answers how many.
pub(super) type Typing = Box<dyn Fn(&[u8]) -> usize + Send + Sync>;

#[derive(Default)]
struct Inner {
    /// Read, and not taken yet.
    pending: Vec<u8>,
    /// Nothing more will come.
    is_over: bool,
    /// `None`: a regular file, which is always ready.
    waiting: Option<Waiting>,
}

/// Standard input, on its way to a console.
pub(super) struct Input {
    inner: Mutex<Inner>,
    typing: Typing,
    /// What Ctrl-] does, on a terminal.
    leave: Option<Box<dyn Fn() + Send + Sync>>,
}

impl Input {
    /// Reads on this loop; `leave` is called when Ctrl-] is typed.
    ///
    /// # Errors
    /// The host cannot wait for it.
    pub(super) fn start(
        events: &EventLoop,
        typing: Typing,
        leave: Option<Box<dyn Fn() + Send + Sync>>,
    ) -> io::Result<Arc<Self>> {
        let this = Arc::new(Self { inner: Mutex::default(), typing, leave });
        let fd = Arc::new(io::stdin().as_fd().try_clone_to_owned()?);
        let weak = Arc::downgrade(&this);
        let ready = move |_| {
            if let Some(this) = weak.upgrade() {
                this.pump();
            }
        };
        match events.add(fd, READ, Arc::new(ready)) {
            Ok(waiting) => this.lock().waiting = Some(waiting),
            Err(error) if error.raw_os_error() == Some(libc::EPERM) => {}
            Err(error) => return Err(error),
        }
        Ok(this)
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether [`Self::pump`] has something to do soon that no event tells of.
    pub(super) fn has_backlog(&self) -> bool {
        let inner = self.lock();
        !inner.pending.is_empty() || (inner.waiting.is_none() && !inner.is_over)
    }

    /// Moves what can be moved.
    pub(super) fn pump(&self) {
        let mut inner = self.lock();
        let mut left = false;
        loop {
            if inner.pending.is_empty() && !inner.is_over {
                left = self.read(&mut inner);
            }
            let taken = (self.typing)(&inner.pending).min(inner.pending.len());
            inner.pending.drain(..taken);
            // A file has more; anything else says when.
            if !inner.pending.is_empty() || inner.waiting.is_some() || inner.is_over {
                break;
            }
        }
        let interest = if inner.pending.is_empty() { READ } else { Interest::empty() };
        if inner.is_over {
            inner.waiting = None;
        } else if let Some(waiting) = &inner.waiting {
            waiting.change(interest);
        }
        drop(inner);
        if left && let Some(leave) = &self.leave {
            leave();
        }
    }

    /// Reads once; `true`: somebody leaves.
    fn read(&self, inner: &mut Inner) -> bool {
        let mut buf = [0; 1024];
        let bytes = match rustix::io::read(io::stdin(), &mut buf) {
            Ok(count @ 1..) => buf.get(..count).unwrap_or_default(),
            Err(rustix::io::Errno::INTR | rustix::io::Errno::AGAIN) => return false,
            // The end of what was typed is not the end of the guest.
            Ok(0) | Err(_) => {
                inner.is_over = true;
                return false;
            }
        };
        let leave = bytes.iter().position(|byte| *byte == LEAVE).filter(|_| self.leave.is_some());
        inner.pending.extend(bytes.get(..leave.unwrap_or(bytes.len())).unwrap_or_default());
        leave.is_some()
    }
}

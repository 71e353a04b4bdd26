//! The terminal while a guest has it: typed bytes go to its console, one at a time and unchanged.

use std::io::{self, IsTerminal as _, Read as _};

use rustix::termios::{OptionalActions, Termios, tcgetattr, tcsetattr};

use super::outcome::Cut;

/// Ctrl-].
const LEAVE: u8 = 0x1d;

/// The terminal's own settings; put back when this is dropped.
pub(super) struct Attached(Option<Termios>);

impl Drop for Attached {
    fn drop(&mut self) {
        if let Some(settings) = &self.0 {
            // Nobody is there to tell.
            let _ = tcsetattr(io::stdin(), OptionalActions::Now, settings);
        }
    }
}

/// Whether nothing will ever be typed: standard input is `/dev/null`.
fn is_nowhere() -> bool {
    let null = rustix::fs::makedev(1, 3);
    rustix::fs::fstat(io::stdin()).is_ok_and(|status| status.st_rdev == null)
}

/// Gives the terminal to a guest's console: `type_bytes` gets what is typed, and says whether anybody still wants it;
/// `end` is called when somebody leaves.
pub(super) fn attach(
    type_bytes: impl Fn(&[u8]) -> bool + Send + 'static,
    end: impl Fn(Cut) + Send + 'static,
) -> Attached {
    let interactive = io::stdin().is_terminal();
    let settings = interactive.then(|| tcgetattr(io::stdin()).ok()).flatten();
    if let Some(settings) = &settings {
        let mut raw = settings.clone();
        raw.make_raw();
        // Lines of the guest and of this program both end as they always do.
        raw.output_modes = settings.output_modes;
        let _ = tcsetattr(io::stdin(), OptionalActions::Now, &raw);
        eprintln!("janus: Ctrl-] leaves and ends the guest\r");
    }
    let typed = move || {
        let mut buf = [0; 1024];
        loop {
            match io::stdin().lock().read(&mut buf) {
                Ok(count @ 1..) => {
                    let bytes = buf.get(..count).unwrap_or_default();
                    if interactive && bytes.contains(&LEAVE) {
                        return end(Cut::Left);
                    }
                    if !type_bytes(bytes) {
                        return;
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // The end of what was typed is not the end of the guest.
                Ok(0) | Err(_) => return,
            }
        }
    };
    if !interactive && is_nowhere() {
        return Attached(settings);
    }
    // Without the thread the guest only cannot be typed to.
    if let Err(error) = std::thread::Builder::new().name("typed".into()).spawn(typed) {
        eprintln!("janus: nothing can be typed: {error}");
    }
    Attached(settings)
}

//! `janus run --detach`: the guest in a process of its own, which this one waits for only until it has started.

use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::process::CommandExt as _;
use std::process::{Command, Stdio};

use super::outcome::USAGE;

/// Set for the process that becomes the guest's.
const VARIABLE: &str = "JANUS_DETACHED";
/// How that process says that its guest has started.
const STARTED: &str = "janus-detached: started ";

/// Whether this is the process that runs a guest in the background.
pub(super) fn is_detached() -> bool {
    std::env::var_os(VARIABLE).is_some()
}

/// Starts the other process with the same command line; answers the exit code of this one.
pub(super) fn launch(name: &str) -> Result<u8, String> {
    let failed = |error| format!("cannot go into the background: {error}");
    let mut command = Command::new("/proc/self/exe");
    command.args(std::env::args_os().skip(1)).env(VARIABLE, name);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).process_group(0);
    let mut child = command.spawn().map_err(failed)?;
    let errors = child.stderr.take().map(BufReader::new);
    for line in errors.into_iter().flat_map(BufReader::lines).map_while(Result::ok) {
        match line.strip_prefix(STARTED) {
            Some(name) => {
                println!("{name}");
                return Ok(0);
            }
            None => eprintln!("{line}"),
        }
    }
    let status = child.wait().map_err(failed)?;
    Ok(status.code().and_then(|code| u8::try_from(code).ok()).unwrap_or(USAGE))
}

/// The name that the process in the background has to use: its number is not that of the one that was asked.
pub(super) fn name() -> Option<String> {
    std::env::var(VARIABLE).ok()
}

/// In the background: tells that the guest runs, and lets go of whoever waits for that.
pub(super) fn started(name: &str) {
    if !is_detached() {
        return;
    }
    // A session of its own: no terminal's end is ours.
    let _ = rustix::process::setsid();
    let _ = writeln!(std::io::stderr(), "{STARTED}{name}");
    if let Ok(null) = std::fs::File::options().write(true).open("/dev/null") {
        let _ = rustix::stdio::dup2_stderr(&null);
    }
}

//! `janus console`: looks at a guest's console and types on it, until Ctrl-] or its end.

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use serde_json::Value;

use super::guests::{Named, find};
use super::signals::{self, Signals};
use super::terminal::{self, Input, Raw};
use crate::control::client::Connection;
use crate::control::protocol::Request;
use crate::host::events::{EventLoop, READ};

/// Attaches this terminal.
pub(super) fn attach(named: &Named) -> Result<u8, String> {
    let guest = find(named)?;
    let mut connection = Connection::open(&guest).map_err(|error| error.to_string())?;
    connection
        .ask::<Value>(&Request::Console)
        .map_err(|error| format!("{}: {error}", guest.name))?;
    let (early, stream) = connection.into_inner();
    let failed = |error: std::io::Error| format!("{}: {error}", guest.name);
    stream.set_nonblocking(true).map_err(failed)?;
    let events = EventLoop::by_hand().map_err(failed)?;
    let over = Arc::new(AtomicBool::new(false));
    let raw = Raw::enter().map(Arc::new);
    if raw.is_some() {
        eprintln!("janus: the console of {}; Ctrl-] leaves, and the guest goes on\r", guest.name);
    }
    let signal = Arc::new(std::sync::atomic::AtomicI32::new(0));
    let (ends, continues, number) = (Arc::clone(&over), raw.clone(), Arc::clone(&signal));
    let _signals = Signals::start(&events, move |signal| match &continues {
        Some(raw) if signals::is_continue(signal) => raw.again(),
        _ if signals::is_continue(signal) => {}
        _ => {
            number.store(signal, Ordering::SeqCst);
            ends.store(true, Ordering::SeqCst);
        }
    })
    .map_err(failed)?;
    let mut out = std::io::stdout();
    let printed = out.write_all(&early).and_then(|()| out.flush());
    printed.map_err(failed)?;
    let ends = Arc::clone(&over);
    let fd = Arc::new(stream.try_clone().map_err(failed)?.into());
    let from = stream.try_clone().map_err(failed)?;
    let _waiting = events.add(fd, READ, Arc::new(move |_| print(&from, &ends))).map_err(failed)?;
    let input = match terminal::has_input() {
        false => None,
        true => {
            let ends = Arc::clone(&over);
            let leave = raw.is_some().then(|| -> Box<dyn Fn() + Send + Sync> {
                Box::new(move || ends.store(true, Ordering::SeqCst))
            });
            let typing = Box::new(move |bytes: &[u8]| (&stream).write(bytes).unwrap_or(0));
            Some(Input::start(&events, typing, leave).map_err(failed)?)
        }
    };
    while !over.load(Ordering::SeqCst) {
        let backlog = || input.as_ref().is_some_and(|input| input.has_backlog());
        if !backlog() {
            events.run_until(None, || over.load(Ordering::SeqCst) || backlog());
            continue;
        }
        let retry = std::time::Instant::now() + std::time::Duration::from_millis(10);
        events.run_until(Some(retry), || over.load(Ordering::SeqCst));
        if let Some(input) = &input {
            input.pump();
        }
    }
    drop(raw);
    // The guest's last line may have no end.
    eprintln!();
    let signal = u8::try_from(signal.load(Ordering::SeqCst)).unwrap_or(0);
    Ok(if signal == 0 { 0 } else { 128 + signal })
}

/// Prints what came.
fn print(mut from: &UnixStream, over: &AtomicBool) {
    let mut buf = [0; 4096];
    loop {
        match from.read(&mut buf) {
            Ok(count @ 1..) => {
                let mut out = std::io::stdout();
                let bytes = buf.get(..count).unwrap_or_default();
                if out.write_all(bytes).and_then(|()| out.flush()).is_err() {
                    over.store(true, Ordering::SeqCst);
                    return;
                }
            }
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => return,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Ok(0) | Err(_) => {
                over.store(true, Ordering::SeqCst);
                return;
            }
        }
    }
}

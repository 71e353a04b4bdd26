//! What a machine prints: collected by a thread, searched while it grows, optionally shown live.

use std::fmt::Write as _;
use std::io::{Read, Write as _};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Whether the text is also shown to the person who waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Echo {
    /// Kept only.
    Quiet,
    /// Kept, and passed on to standard output as it arrives.
    Live,
}

/// Why a wait ended without what it waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Missed {
    /// The time was up.
    Timeout,
    /// The other side closed: nothing more will come.
    Closed,
}

impl std::fmt::Display for Missed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Timeout => "timed out",
            Self::Closed => "ended",
        })
    }
}

#[derive(Debug, Default)]
struct State {
    bytes: Vec<u8>,
    /// When each line was complete, with the offset behind its newline.
    lines: Vec<(usize, Instant)>,
    closed: bool,
}

/// A growing text, shared with the thread that reads it. Clones see the same text.
#[derive(Clone, Debug, Default)]
pub(crate) struct Console {
    shared: Arc<(Mutex<State>, Condvar)>,
}

impl Console {
    /// Starts collecting from `reader`, until it ends.
    pub(crate) fn attach(mut reader: impl Read + Send + 'static, echo: Echo) -> Self {
        let console = Self::default();
        let writer = console.clone();
        std::thread::spawn(move || {
            let mut buffer = [0; 16 * 1024];
            loop {
                match reader.read(&mut buffer) {
                    Ok(0) => break,
                    Ok(count) => {
                        let bytes = buffer.get(..count).unwrap_or_default();
                        if echo == Echo::Live {
                            let mut out = std::io::stdout().lock();
                            // A closed standard output must not stop the collecting.
                            let _ = out.write_all(bytes).and_then(|()| out.flush());
                        }
                        writer.append(bytes);
                    }
                    Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                    Err(_) => break,
                }
            }
            writer.lock().closed = true;
            writer.shared.1.notify_all();
        });
        console
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.shared.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn append(&self, bytes: &[u8]) {
        let now = Instant::now();
        let mut state = self.lock();
        for &byte in bytes {
            // Carriage returns are the terminal's business.
            if byte != b'\r' {
                state.bytes.push(byte);
            }
            if byte == b'\n' {
                let end = state.bytes.len();
                state.lines.push((end, now));
            }
        }
        drop(state);
        self.shared.1.notify_all();
    }

    /// Everything so far.
    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&self.lock().bytes).into_owned()
    }

    /// Whether nothing more will come.
    pub(crate) fn is_closed(&self) -> bool {
        self.lock().closed
    }

    /// Waits until nothing more will come, or the deadline.
    pub(crate) fn finished(&self, deadline: Instant) {
        let mut state = self.lock();
        while let Ok(next) = self.more(state, deadline) {
            state = next;
        }
    }

    /// Bytes so far: a place to search from later.
    pub(crate) fn position(&self) -> usize {
        self.lock().bytes.len()
    }

    /// The last `count` lines, indented, for an error message.
    pub(crate) fn tail(&self, count: usize) -> String {
        tail(&self.text(), count)
    }

    /// Waits until a complete line behind `cursor` satisfies `wanted`; leaves the cursor behind it.
    ///
    /// # Errors
    /// The deadline passed, or the text ended, first.
    pub(crate) fn line<T>(
        &self,
        cursor: &mut usize,
        deadline: Instant,
        mut wanted: impl FnMut(&str) -> Option<T>,
    ) -> Result<(T, Instant), Missed> {
        let mut state = self.lock();
        loop {
            let index = state.lines.partition_point(|(end, _)| *end <= *cursor);
            for &(end, at) in state.lines.get(index..).unwrap_or_default() {
                let bytes = state.bytes.get(*cursor..end.saturating_sub(1)).unwrap_or_default();
                let found = wanted(&String::from_utf8_lossy(bytes));
                *cursor = end;
                if let Some(found) = found {
                    return Ok((found, at));
                }
            }
            state = self.more(state, deadline)?;
        }
    }

    /// Waits until `text` appears behind `from`, in a complete line or not (a prompt); answers the offset behind it.
    ///
    /// # Errors
    /// The deadline passed, or the text ended, first.
    pub(crate) fn contains(
        &self,
        from: usize,
        text: &str,
        deadline: Instant,
    ) -> Result<usize, Missed> {
        let mut state = self.lock();
        loop {
            let rest = state.bytes.get(from..).unwrap_or_default();
            if let Some(at) = rest.windows(text.len()).position(|window| window == text.as_bytes())
            {
                return Ok(from + at + text.len());
            }
            state = self.more(state, deadline)?;
        }
    }

    fn more<'a>(
        &'a self,
        state: MutexGuard<'a, State>,
        deadline: Instant,
    ) -> Result<MutexGuard<'a, State>, Missed> {
        if state.closed {
            return Err(Missed::Closed);
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left == Duration::ZERO {
            return Err(Missed::Timeout);
        }
        let waited = self.shared.1.wait_timeout(state, left);
        Ok(waited.unwrap_or_else(PoisonError::into_inner).0)
    }
}

/// The last `count` lines of `text`, indented.
pub(crate) fn tail(text: &str, count: usize) -> String {
    let lines: Vec<&str> = text.lines().collect();
    let from = lines.len().saturating_sub(count);
    let mut out = String::new();
    for line in lines.get(from..).unwrap_or_default() {
        // Writing to a String cannot fail.
        let _ = write!(out, "\n    | {line}");
    }
    if out.is_empty() { "\n    | (nothing on its console)".to_owned() } else { out }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(5)
    }

    #[test]
    fn lines_are_found_in_order_and_the_end_is_reported() {
        let console = Console::attach(&b"one\r\ntwo 2\nprompt>"[..], Echo::Quiet);
        let mut cursor = 0;
        let (number, _) = console
            .line(&mut cursor, soon(), |line| line.strip_prefix("two ").map(str::to_owned))
            .unwrap();
        assert_eq!(number, "2");
        assert!(console.contains(cursor, "prompt>", soon()).is_ok());
        assert_eq!(console.line(&mut cursor, soon(), |_| Some(())).unwrap_err(), Missed::Closed);
        assert_eq!(console.text(), "one\ntwo 2\nprompt>");
    }

    #[test]
    fn a_silent_machine_times_out() {
        let (reader, _writer) = std::io::pipe().unwrap();
        let console = Console::attach(reader, Echo::Quiet);
        let deadline = Instant::now() + Duration::from_millis(20);
        assert_eq!(console.contains(0, "x", deadline), Err(Missed::Timeout));
        assert!(console.tail(3).contains("nothing"));
    }
}

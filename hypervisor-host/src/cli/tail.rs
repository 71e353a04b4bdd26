//! The end of what a guest printed.

use std::io::Write;
use std::sync::{Arc, Mutex, PoisonError};

/// Bytes of the console's end that are kept for a report.
const TAIL: usize = 64 * 1024;

/// The console's end, and the code that the guest reported there.
#[derive(Clone, Default)]
pub(super) struct Tail(Arc<Mutex<Vec<u8>>>);

impl Tail {
    fn add(&self, bytes: &[u8]) {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        kept.extend_from_slice(bytes);
        if kept.len() > 2 * TAIL {
            let surplus = kept.len() - TAIL;
            kept.drain(..surplus);
        }
    }
    pub(super) fn text(&self) -> String {
        let kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        String::from_utf8_lossy(&kept).into_owned()
    }
    /// N of the last line `janus-report: {"exit":N}`.
    pub(super) fn reported_exit(&self) -> Option<u8> {
        let text = self.text();
        let mut codes = text.lines().filter_map(|line| {
            let rest = line.split_once("janus-report: {\"exit\":")?.1;
            rest.split_once('}')?.0.trim().parse().ok()
        });
        codes.next_back()
    }
}

/// The guest's output: to our own, and its end kept.
pub(super) struct Out(pub(super) Tail);

impl Write for Out {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.add(bytes);
        std::io::stdout().write_all(bytes)?;
        Ok(bytes.len())
    }
    fn flush(&mut self) -> std::io::Result<()> {
        std::io::stdout().flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_report_is_the_guests_code() {
        let tail = Tail::default();
        tail.add(b"janus-report: {\"exec\":1}\njanus-report: {\"exit\":3}\nx janus-report: {\"exit\":127}\n");
        assert_eq!(tail.reported_exit(), Some(127));
        tail.add(b"janus-report: {\"exit\":4000}\n");
        assert_eq!(tail.reported_exit(), Some(127), "no code is that large");
    }

    #[test]
    fn the_end_of_the_console_is_kept() {
        let tail = Tail::default();
        for _ in 0..1000 {
            tail.add(&[b'x'; 1000]);
        }
        assert!(tail.text().len() <= 2 * TAIL);
    }
}

//! The end of what a guest printed, and the code that it reported there.

use std::io::Write;
use std::sync::Arc;

use crate::control::viewers::Viewers;

/// The console's end, which others may look at as well.
#[derive(Clone, Debug, Default)]
pub(super) struct Tail(pub(super) Arc<Viewers>);

impl Tail {
    pub(super) fn text(&self) -> String {
        self.0.text()
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

impl Write for Tail {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.print(bytes);
        Ok(bytes.len())
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// The guest's output: to our own, and its end kept.
pub(super) struct Out(pub(super) Tail);

impl Write for Out {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.0.print(bytes);
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
        tail.0.print(b"janus-report: {\"exec\":1}\njanus-report: {\"exit\":3}\nx janus-report: {\"exit\":127}\n");
        assert_eq!(tail.reported_exit(), Some(127));
        tail.0.print(b"janus-report: {\"exit\":4000}\n");
        assert_eq!(tail.reported_exit(), Some(127), "no code is that large");
    }
}

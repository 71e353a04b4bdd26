//! The `log` facade's sink: a ring of recent lines, and the console for what is important enough.

use alloc::collections::VecDeque;
use alloc::string::String;
use core::fmt::Write;
use core::sync::atomic::{AtomicUsize, Ordering};

use log::{Level, LevelFilter, Log, Metadata, Record};

use crate::console::Console;
use crate::platform;
use crate::platform::lock::IrqLock;

/// Bytes of lines that are kept.
const KEPT: usize = 32 << 10;
/// Bytes of one line; longer ones are cut.
const LINE: usize = 512;

struct Logger;

static LOGGER: Logger = Logger;
static RING: IrqLock<VecDeque<u8>> = IrqLock::new(VecDeque::new());
/// Lines at this level, or more serious, go to the console too.
static CONSOLE_LEVEL: AtomicUsize = AtomicUsize::new(LevelFilter::Info as usize);

/// A line put together without allocation, so that logging works when memory is short.
struct Line {
    bytes: [u8; LINE],
    len: usize,
}

impl Write for Line {
    fn write_str(&mut self, text: &str) -> core::fmt::Result {
        // Room stays for the newline.
        let room = (LINE - 1).saturating_sub(self.len);
        let taken = text.floor_char_boundary(room.min(text.len()));
        if let (Some(to), Some(from)) =
            (self.bytes.get_mut(self.len..self.len + taken), text.as_bytes().get(..taken))
        {
            to.copy_from_slice(from);
            self.len += taken;
        }
        Ok(())
    }
}

impl Log for Logger {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        // What libraries find worth telling is detail here.
        let ours = metadata.target().starts_with("janus");
        let level =
            if metadata.level() == Level::Info && !ours { Level::Debug } else { metadata.level() };
        level <= log::max_level()
    }
    fn log(&self, record: &Record<'_>) {
        if !self.enabled(record.metadata()) {
            return;
        }
        let us = platform::now_ns() / 1000;
        let mut line = Line { bytes: [0; LINE], len: 0 };
        let level = match record.level() {
            Level::Error => "error: ",
            Level::Warn => "warning: ",
            Level::Info => "",
            Level::Debug => "debug: ",
            Level::Trace => "trace: ",
        };
        // A `Line` takes everything, cutting what is too long.
        let _ =
            write!(line, "[{:5}.{:06}] {level}{}", us / 1_000_000, us % 1_000_000, record.args());
        if let Some(end) = line.bytes.get_mut(line.len) {
            *end = b'\n';
            line.len += 1;
        }
        let bytes = line.bytes.get(..line.len).unwrap_or(&[]);
        keep(bytes);
        if record.level() as usize <= CONSOLE_LEVEL.load(Ordering::Relaxed)
            && let Ok(text) = core::str::from_utf8(bytes)
        {
            let _ = Console.write_str(text);
        }
    }
    fn flush(&self) {}
}

fn keep(line: &[u8]) {
    let mut ring = RING.lock();
    // Whole lines make room.
    while ring.len() + line.len() > KEPT {
        let Some(end) = ring.iter().position(|byte| *byte == b'\n') else {
            ring.clear();
            break;
        };
        ring.drain(..=end);
    }
    ring.extend(line);
}

/// Makes this the sink of the `log` facade. `command_line` may say `log=error|warn|info|debug|trace`.
pub(crate) fn init(command_line: &str) {
    let word = command_line.split_ascii_whitespace().find_map(|word| word.strip_prefix("log="));
    let level = word.and_then(|word| word.parse().ok()).unwrap_or(LevelFilter::Info);
    set_console_level(level);
    // Fails only if a logger is set already, which would be this one.
    let _ = log::set_logger(&LOGGER);
}

/// Sets from which level on lines go to the console; the ring takes them from `info` on, or from there.
pub fn set_console_level(level: LevelFilter) {
    CONSOLE_LEVEL.store(level as usize, Ordering::Relaxed);
    log::set_max_level(level.max(LevelFilter::Info));
}

/// The recent lines, oldest first.
#[must_use]
pub fn recent() -> String {
    let (first, second) = {
        let ring = RING.lock();
        let (first, second) = ring.as_slices();
        (first.to_vec(), second.to_vec())
    };
    let bytes = [first, second].concat();
    String::from_utf8(bytes).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ring_keeps_the_last_whole_lines() {
        for number in 0..5000 {
            keep(std::format!("line number {number}\n").as_bytes());
        }
        let recent = recent();
        assert!(recent.len() <= KEPT && recent.len() > KEPT - 64);
        assert!(recent.starts_with("line number ") && recent.ends_with("line number 4999\n"));
    }

    #[test]
    fn a_long_line_is_cut_between_characters() {
        let mut line = Line { bytes: [0; LINE], len: 0 };
        for _ in 0..300 {
            let _ = line.write_str("\u{e4}\u{20ac}");
        }
        assert!(line.len < LINE && core::str::from_utf8(&line.bytes[..line.len]).is_ok());
    }
}

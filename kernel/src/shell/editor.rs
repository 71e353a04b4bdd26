//! A line editor: keys in, what to print out; no I/O of its own.
//!
//! Emacs keys and cursor keys, history, Tab completion. It redraws the line with the few control sequences that every
//! terminal knows (ECMA-48: CUB, EL), and takes plain input without them, as from a script.

use alloc::collections::VecDeque;
use alloc::string::String;
use alloc::vec::Vec;
use core::fmt::Write;

/// The longest line, in bytes; more keys ring the bell.
const MAX_LINE: usize = 4096;
/// Lines remembered.
const HISTORY: usize = 200;

/// What a key led to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// The line goes on.
    None,
    /// Return was pressed on this line.
    Line(String),
    /// Ctrl-C: the line was thrown away.
    Interrupt,
    /// Ctrl-D on an empty line.
    EndOfInput,
    /// Tab: the caller looks for completions of this, the line up to the cursor, and calls [`Editor::complete`].
    Complete(String),
}

/// Where the input is within a control sequence (ECMA-48, 5.4).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Sequence {
    None,
    Escape,
    /// After `ESC [`, with the number so far.
    Csi(u16),
    /// After `ESC O` (cursor and home keys in application mode).
    Ss3,
}

/// See the module.
#[derive(Debug)]
pub struct Editor {
    prompt: &'static str,
    line: Vec<char>,
    cursor: usize,
    history: VecDeque<String>,
    /// Where in the history the line came from, from the newest; the line being typed is kept aside.
    recalled: usize,
    aside: Vec<char>,
    sequence: Sequence,
    /// Bytes of a character that is not complete yet.
    utf8: Vec<u8>,
    /// The last byte was a return, so a line feed after it is no second one.
    after_return: bool,
}

impl Editor {
    /// An empty line behind `prompt`.
    #[must_use]
    pub fn new(prompt: &'static str) -> Self {
        Self {
            prompt,
            line: Vec::new(),
            cursor: 0,
            history: VecDeque::new(),
            recalled: 0,
            aside: Vec::new(),
            sequence: Sequence::None,
            utf8: Vec::new(),
            after_return: false,
        }
    }

    /// Prints the prompt and the line so far, as after other output.
    pub fn redraw(&self, out: &mut String) {
        out.push('\r');
        out.push_str(self.prompt);
        out.extend(self.line.iter());
        out.push_str("\x1b[K");
        let back = self.line.len() - self.cursor;
        if back > 0 {
            // Writing to a String cannot fail.
            let _ = write!(out, "\x1b[{back}D");
        }
    }

    /// Takes one byte of input; what is to be printed is appended to `out`.
    pub fn key(&mut self, byte: u8, out: &mut String) -> Event {
        let after_return = core::mem::replace(&mut self.after_return, byte == b'\r');
        match core::mem::replace(&mut self.sequence, Sequence::None) {
            Sequence::None => {}
            Sequence::Escape => {
                match byte {
                    b'[' => self.sequence = Sequence::Csi(0),
                    b'O' => self.sequence = Sequence::Ss3,
                    b'b' => self.move_to(self.word_start(), out),
                    b'f' => self.move_to(self.word_end(), out),
                    b'd' => self.delete(self.cursor, self.word_end(), out),
                    0x7f | 8 => self.delete(self.word_start(), self.cursor, out),
                    _ => {}
                }
                return Event::None;
            }
            Sequence::Csi(number) => {
                match byte {
                    b'0'..=b'9' => {
                        let number =
                            number.saturating_mul(10).saturating_add(u16::from(byte - b'0'));
                        self.sequence = Sequence::Csi(number);
                    }
                    // Parameters this editor has no use for (modifiers).
                    b' '..=b'?' => self.sequence = Sequence::Csi(0),
                    b'~' => self.numbered_key(number, out),
                    final_byte => self.cursor_key(final_byte, out),
                }
                return Event::None;
            }
            Sequence::Ss3 => {
                self.cursor_key(byte, out);
                return Event::None;
            }
        }
        match byte {
            b'\n' if after_return => Event::None,
            b'\r' | b'\n' => self.finish(out),
            1 => self.moved(0, out),
            2 => self.moved(self.cursor.saturating_sub(1), out),
            3 => {
                out.push_str("^C\r\n");
                self.clear();
                Event::Interrupt
            }
            4 if self.line.is_empty() => Event::EndOfInput,
            4 => self.deleted(self.cursor, self.cursor + 1, out),
            5 => self.moved(self.line.len(), out),
            6 => self.moved(self.cursor + 1, out),
            8 | 0x7f => self.deleted(self.cursor.saturating_sub(1), self.cursor, out),
            b'\t' => {
                Event::Complete(self.line.get(..self.cursor).unwrap_or_default().iter().collect())
            }
            11 => self.deleted(self.cursor, self.line.len(), out),
            12 => {
                out.push_str("\x1b[H\x1b[2J");
                self.redraw(out);
                Event::None
            }
            14 => self.recall(self.recalled.saturating_sub(1), out),
            16 => self.recall(self.recalled + 1, out),
            21 => self.deleted(0, self.cursor, out),
            23 => self.deleted(self.word_start(), self.cursor, out),
            27 => {
                self.sequence = Sequence::Escape;
                Event::None
            }
            0..=31 => Event::None,
            byte => {
                self.text_byte(byte, out);
                Event::None
            }
        }
    }

    /// Takes the completions of what [`Event::Complete`] gave: adds what they share, or lists them.
    pub fn complete(&mut self, candidates: &[String], out: &mut String) {
        let before: String = self.line.get(..self.cursor).unwrap_or_default().iter().collect();
        let word = before.rsplit([' ', ';']).next().unwrap_or_default();
        let Some(first) = candidates.first() else {
            out.push('\x07');
            return;
        };
        let shared = candidates.iter().fold(first.as_str(), |shared, other| {
            let same = shared.chars().zip(other.chars()).take_while(|(a, b)| a == b);
            let len: usize = same.map(|(c, _)| c.len_utf8()).sum();
            shared.get(..len).unwrap_or_default()
        });
        let mut addition = String::from(shared.strip_prefix(word).unwrap_or_default());
        if candidates.len() == 1 && !shared.ends_with('/') {
            addition.push(' ');
        }
        if addition.is_empty() {
            out.push_str("\r\n");
            for candidate in candidates {
                out.push_str(candidate);
                out.push_str("  ");
            }
            out.push_str("\r\n");
        }
        for c in addition.chars() {
            self.insert(c);
        }
        self.redraw(out);
    }

    /// Lines entered before, oldest first.
    pub fn history(&self) -> impl Iterator<Item = &str> {
        self.history.iter().map(String::as_str)
    }

    fn clear(&mut self) {
        self.line.clear();
        self.cursor = 0;
        self.recalled = 0;
        self.utf8.clear();
    }

    fn finish(&mut self, out: &mut String) -> Event {
        out.push_str("\r\n");
        let line: String = self.line.iter().collect();
        self.clear();
        if !line.trim().is_empty() && self.history.back() != Some(&line) {
            if self.history.len() == HISTORY {
                self.history.pop_front();
            }
            self.history.push_back(line.clone());
        }
        Event::Line(line)
    }

    fn text_byte(&mut self, byte: u8, out: &mut String) {
        self.utf8.push(byte);
        match core::str::from_utf8(&self.utf8) {
            Ok(text) => {
                if let Some(c) = text.chars().next() {
                    self.utf8.clear();
                    self.type_char(c, out);
                }
            }
            // Not wrong yet, only not complete.
            Err(error) if error.error_len().is_none() => {}
            Err(_) => {
                self.utf8.clear();
                self.type_char(char::REPLACEMENT_CHARACTER, out);
            }
        }
    }

    fn type_char(&mut self, c: char, out: &mut String) {
        if self.line.len() >= MAX_LINE {
            out.push('\x07');
            return;
        }
        self.insert(c);
        if self.cursor == self.line.len() {
            out.push(c);
        } else {
            self.redraw(out);
        }
    }

    fn insert(&mut self, c: char) {
        self.line.insert(self.cursor.min(self.line.len()), c);
        self.cursor += 1;
    }

    fn moved(&mut self, to: usize, out: &mut String) -> Event {
        self.move_to(to, out);
        Event::None
    }

    fn move_to(&mut self, to: usize, out: &mut String) {
        self.cursor = to.min(self.line.len());
        self.redraw(out);
    }

    fn deleted(&mut self, from: usize, to: usize, out: &mut String) -> Event {
        self.delete(from, to, out);
        Event::None
    }

    fn delete(&mut self, from: usize, to: usize, out: &mut String) {
        let to = to.min(self.line.len());
        let from = from.min(to);
        self.line.drain(from..to);
        self.cursor = from;
        self.redraw(out);
    }

    fn word_start(&self) -> usize {
        let before = self.line.get(..self.cursor).unwrap_or_default();
        let end = before.iter().rposition(|c| *c != ' ').map_or(0, |at| at + 1);
        before.get(..end).unwrap_or_default().iter().rposition(|c| *c == ' ').map_or(0, |at| at + 1)
    }

    fn word_end(&self) -> usize {
        let after = self.line.get(self.cursor..).unwrap_or_default();
        let start = after.iter().position(|c| *c != ' ').unwrap_or(after.len());
        let word = after.get(start..).unwrap_or_default();
        self.cursor + start + word.iter().position(|c| *c == ' ').unwrap_or(word.len())
    }

    fn cursor_key(&mut self, key: u8, out: &mut String) {
        match key {
            b'A' => drop(self.recall(self.recalled + 1, out)),
            b'B' => drop(self.recall(self.recalled.saturating_sub(1), out)),
            b'C' => self.move_to(self.cursor + 1, out),
            b'D' => self.move_to(self.cursor.saturating_sub(1), out),
            b'H' => self.move_to(0, out),
            b'F' => self.move_to(self.line.len(), out),
            _ => {}
        }
    }

    fn numbered_key(&mut self, number: u16, out: &mut String) {
        match number {
            1 | 7 => self.move_to(0, out),
            3 => self.delete(self.cursor, self.cursor + 1, out),
            4 | 8 => self.move_to(self.line.len(), out),
            _ => {}
        }
    }

    /// Shows the line that was entered `back` lines ago; 0 is the one being typed.
    fn recall(&mut self, back: usize, out: &mut String) -> Event {
        if back == self.recalled {
            return Event::None;
        }
        let line = match back {
            0 => core::mem::take(&mut self.aside),
            back => {
                match self.history.len().checked_sub(back).and_then(|at| self.history.get(at)) {
                    Some(line) => line.chars().collect(),
                    None => {
                        out.push('\x07');
                        return Event::None;
                    }
                }
            }
        };
        let old = core::mem::replace(&mut self.line, line);
        if self.recalled == 0 {
            self.aside = old;
        }
        self.recalled = back;
        self.cursor = self.line.len();
        self.redraw(out);
        Event::None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn feed(editor: &mut Editor, keys: &str) -> Vec<Event> {
        let mut out = String::new();
        keys.bytes()
            .map(|b| editor.key(b, &mut out))
            .filter(|event| *event != Event::None)
            .collect()
    }

    fn line(keys: &str) -> String {
        match feed(&mut Editor::new("> "), &format!("{keys}\r")).pop() {
            Some(Event::Line(line)) => line,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn keys_edit_the_line() {
        for (keys, expected) in [
            ("hello", "hello"),
            ("helo\x1b[Dl", "hello"),
            ("hellooo\x7f\x08", "hello"),
            ("world\x01hello \x05!", "hello world!"),
            ("one two\x17three", "one three"),
            ("one two\x15three", "three"),
            ("one two\x01\x0bthree", "three"),
            ("abc\x1b[D\x1b[3~d", "abd"),
            ("one two\x1bbX", "one Xtwo"),
            ("one\x01\x1bfX", "oneX"),
            ("gr\u{fc}n\x1b[D\x7f", "grn"),
            ("\x1b[1;5Dabc\x1b[99zd", "abcd"),
            ("a\x1b[H\x1bOFb\x1bOHc", "cab"),
        ] {
            assert_eq!(line(keys), expected, "{keys:?}");
        }
    }

    #[test]
    fn history_goes_back_and_forth_without_losing_the_new_line() {
        let mut editor = Editor::new("> ");
        feed(&mut editor, "one\rtwo\r\ntwo\r   \r");
        assert_eq!(editor.history().collect::<Vec<_>>(), ["one", "two"]);
        let events = feed(&mut editor, "new\x1b[A\x1b[A\x1b[A\x1b[B\x1b[B!\r");
        assert_eq!(events, [Event::Line("new!".into())]);
        assert_eq!(feed(&mut editor, "\x10\x10\x0e\r"), [Event::Line("new!".into())]);
        assert_eq!(feed(&mut editor, "kept\x0e\r"), [Event::Line("kept".into())]);
    }

    #[test]
    fn control_keys_end_or_drop_the_line() {
        let mut editor = Editor::new("> ");
        assert_eq!(feed(&mut editor, "abc\x03"), [Event::Interrupt]);
        assert_eq!(feed(&mut editor, "\x04"), [Event::EndOfInput]);
        assert_eq!(
            feed(&mut editor, "a\x04\n\r\n"),
            [Event::Line("a".into()), Event::Line("".into())]
        );
    }

    #[test]
    fn completion_adds_what_is_shared_and_lists_the_rest() {
        let mut editor = Editor::new("> ");
        assert_eq!(feed(&mut editor, "cat /h\t"), [Event::Complete("cat /h".into())]);
        let mut out = String::new();
        editor.complete(&["/hello".into(), "/help".into()], &mut out);
        assert!(out.ends_with("cat /hel\x1b[K"), "{out:?}");
        out.clear();
        editor.complete(&["/hello".into(), "/help".into()], &mut out);
        assert!(out.contains("/hello  /help"), "{out:?}");
        editor.complete(&["/hello".into()], &mut out);
        assert_eq!(feed(&mut editor, "x\r"), [Event::Line("cat /hello x".into())]);
        out.clear();
        editor.complete(&[], &mut out);
        assert_eq!(out, "\x07");
    }

    #[test]
    fn any_bytes_at_all_are_survived() {
        let mut editor = Editor::new("> ");
        let mut out = String::new();
        let mut seed = 1u32;
        for _ in 0..200_000 {
            seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            if let Event::Complete(_) = editor.key(seed.to_be_bytes()[0], &mut out) {
                editor.complete(&["alpha".into(), "al".into()], &mut out);
            }
            out.clear();
        }
    }
}

//! The shell: a line at a time from a console, or all at once from `--exec` on the kernel's command line.
//!
//! - `editor.rs`: keys in, an edited line out, with history and completion;
//! - `interactive.rs`: the loop that joins the two on the console;
//! - `parse.rs`: a line into commands and words;
//! - `commands/`: what can be said, one subject a file.

pub mod commands;
pub mod editor;
pub mod interactive;
pub mod parse;

use alloc::string::String;
use alloc::vec::Vec;
use core::fmt;

use commands::{Command, TABLE};

/// How a command ended: 0 is success, as everywhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Status(pub u8);

impl Status {
    /// Done.
    pub const SUCCESS: Self = Self(0);
    /// It failed; the reason was printed.
    pub const FAILURE: Self = Self(1);
    /// It was called wrongly; the right way was printed.
    pub const USAGE: Self = Self(2);
    /// There is no such command, as in other shells.
    pub const UNKNOWN: Self = Self(127);
}

/// Where a command's output goes.
pub trait Output: Send {
    /// Takes bytes, unchanged.
    fn write_bytes(&mut self, bytes: &[u8]);
}

/// The kernel's console.
#[derive(Clone, Copy, Debug)]
pub struct ConsoleOutput;

impl Output for ConsoleOutput {
    fn write_bytes(&mut self, bytes: &[u8]) {
        crate::console::write_bytes(bytes);
    }
}

impl Output for Vec<u8> {
    fn write_bytes(&mut self, bytes: &[u8]) {
        self.extend_from_slice(bytes);
    }
}

/// What a command works in.
pub struct Session<'o> {
    output: &'o mut dyn Output,
    last: Status,
}

impl fmt::Debug for Session<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Session").field("last", &self.last).finish_non_exhaustive()
    }
}

impl fmt::Write for Session<'_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        self.output.write_bytes(text.as_bytes());
        Ok(())
    }
}

impl<'o> Session<'o> {
    /// A session whose commands write to `output`.
    pub fn new(output: &'o mut dyn Output) -> Self {
        Self { output, last: Status::SUCCESS }
    }
    /// Writes bytes that need not be text.
    pub fn write_bytes(&mut self, bytes: &[u8]) {
        self.output.write_bytes(bytes);
    }
    /// How the last command ended.
    #[must_use]
    pub fn last_status(&self) -> Status {
        self.last
    }
    /// Prints why something failed, and answers the status of a failure.
    pub fn fail(&mut self, what: impl fmt::Display) -> Status {
        // Writing to a session cannot fail.
        let _ = fmt::Write::write_fmt(self, format_args!("{what}\n"));
        Status::FAILURE
    }

    /// Runs a line: commands between `;`, each after the other whatever the one before said; answers the last status
    /// that was not success, or success.
    ///
    /// `--exec` wants one status for a whole line, and a failure in its middle must not be lost.
    pub async fn run_line(&mut self, line: &str) -> Status {
        let mut overall = Status::SUCCESS;
        let commands = match parse::split(line) {
            Ok(commands) => commands,
            Err(error) => {
                self.last = Status::USAGE;
                self.fail(error);
                return Status::USAGE;
            }
        };
        for words in commands {
            self.last = self.run(&words).await;
            if self.last != Status::SUCCESS {
                overall = self.last;
            }
        }
        overall
    }

    async fn run(&mut self, words: &[String]) -> Status {
        let Some((name, arguments)) = words.split_first() else { return Status::SUCCESS };
        let Some(command) = find(name) else {
            self.fail(format_args!("{name}: unknown command; `help` lists them"));
            return Status::UNKNOWN;
        };
        let status = (command.run)(self, arguments).await;
        if status == Status::USAGE {
            self.fail(format_args!("usage: {} {}", command.name, command.arguments));
        }
        status
    }
}

/// The command of this name.
fn find(name: &str) -> Option<&'static Command> {
    TABLE.iter().flat_map(|group| group.iter()).find(|command| command.name == name)
}

/// The words that may stand where `line` ends, each whole: command names for the first word, paths for others.
pub async fn complete(line: &str) -> Vec<String> {
    let start = line.rfind([' ', ';']).map_or(0, |at| at + 1);
    let (before, word) = line.split_at(start);
    let first = before.trim_end().is_empty() || before.trim_end().ends_with(';');
    if first {
        let names = TABLE.iter().flat_map(|group| group.iter()).map(|command| command.name);
        return names.filter(|name| name.starts_with(word)).map(String::from).collect();
    }
    let (directory, _) = word.split_at(word.rfind('/').map_or(0, |at| at + 1));
    let entries = crate::fs::mounts::list(directory).await.unwrap_or_default();
    let mut found = Vec::new();
    for entry in entries {
        let is_directory = entry.metadata.kind == crate::fs::NodeKind::Directory;
        let path =
            alloc::format!("{directory}{}{}", entry.name, if is_directory { "/" } else { "" });
        if path.starts_with(word) {
            found.push(path);
        }
    }
    found
}

#[cfg(test)]
mod tests;

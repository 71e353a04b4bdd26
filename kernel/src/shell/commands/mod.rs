//! What can be said to the shell.
//!
//! A command is a row of a table: its name, its arguments, one line of help, and an async function. Each subject has
//! a file and a table; [`TABLE`] is all of them.

mod bench;
mod block;
mod exchange;
mod files;
mod general;
mod measure;
mod network;
mod stream;
mod system;
mod xen;

use alloc::boxed::Box;
use alloc::string::String;
use core::future::Future;
use core::pin::Pin;

use super::{Session, Status};

/// A command at work.
pub type Running<'a> = Pin<Box<dyn Future<Output = Status> + Send + 'a>>;

/// A command.
#[derive(Debug)]
pub struct Command {
    /// The word that calls it.
    pub name: &'static str,
    /// Its arguments, as the usage line shows them.
    pub arguments: &'static str,
    /// What it does, in one line.
    pub help: &'static str,
    /// Does it.
    pub run: for<'a> fn(&'a mut Session<'_>, &'a [String]) -> Running<'a>,
}

/// Every command, by subject.
pub static TABLE: &[&[Command]] = &[
    general::COMMANDS,
    files::COMMANDS,
    block::COMMANDS,
    bench::COMMANDS,
    measure::COMMANDS,
    network::COMMANDS,
    exchange::COMMANDS,
    stream::COMMANDS,
    system::COMMANDS,
    xen::COMMANDS,
];

/// Bytes for people: exact below 10 KiB, then with a unit.
pub(super) struct Size(pub(super) u64);

impl core::fmt::Display for Size {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        let mut value = self.0;
        for unit in ["B", "KiB", "MiB", "GiB"] {
            if value < 10 * 1024 {
                return f.pad(&alloc::format!("{value} {unit}"));
            }
            value /= 1024;
        }
        f.pad(&alloc::format!("{value} TiB"))
    }
}

/// A number, decimal or 0x hexadecimal, with an optional K, M or G for powers of 1024.
pub(super) fn number(text: &str) -> Option<u64> {
    let (digits, shift) = match text.as_bytes().last()? {
        b'k' | b'K' => (text.get(..text.len() - 1)?, 10),
        b'm' | b'M' => (text.get(..text.len() - 1)?, 20),
        b'g' | b'G' => (text.get(..text.len() - 1)?, 30),
        _ => (text, 0),
    };
    let value: u64 = match digits.strip_prefix("0x") {
        Some(hex) => u64::from_str_radix(hex, 16).ok()?,
        None => digits.parse().ok()?,
    };
    value.checked_mul(1 << shift)
}

/// A hash in the usual form.
pub(super) fn hex(bytes: &[u8]) -> String {
    use core::fmt::Write;
    let mut text = String::with_capacity(2 * bytes.len());
    for byte in bytes {
        // Writing to a String cannot fail.
        let _ = write!(text, "{byte:02x}");
    }
    text
}

//! The console: output for everybody, input for the shell.

use core::fmt;

use crate::platform;
use crate::sync::{IrqMutex, Notify};

/// Writes bytes to the console.
pub fn write_bytes(bytes: &[u8]) {
    platform::early_write(bytes);
}

/// The console as a formatter's target.
#[derive(Clone, Copy, Debug)]
pub struct Console;

impl fmt::Write for Console {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        write_bytes(text.as_bytes());
        Ok(())
    }
}

/// Prints to the console.
#[macro_export]
macro_rules! print {
    ($($arg:tt)*) => {{
        let _ = core::fmt::Write::write_fmt(&mut $crate::console::Console, format_args!($($arg)*));
    }};
}

/// Prints a line to the console.
#[macro_export]
macro_rules! println {
    () => { $crate::print!("\n") };
    ($($arg:tt)*) => { $crate::print!("{}\n", format_args!($($arg)*)) };
}

/// Input that the shell has not read yet; more than this, typed or pasted ahead, is lost.
const INPUT_SIZE: usize = 1024;

struct Input {
    bytes: [u8; INPUT_SIZE],
    /// Free-running positions; their difference is what is waiting.
    read: usize,
    written: usize,
}

static INPUT: IrqMutex<Input> =
    IrqMutex::new(Input { bytes: [0; INPUT_SIZE], read: 0, written: 0 });
static TYPED: Notify = Notify::new();

/// Takes input from a console device; callable from interrupt context. Bytes that do not fit are lost.
pub fn push_input(bytes: &[u8]) {
    let mut input = INPUT.lock();
    for &byte in bytes {
        if input.written.wrapping_sub(input.read) >= INPUT_SIZE {
            break;
        }
        let at = input.written % INPUT_SIZE;
        if let Some(slot) = input.bytes.get_mut(at) {
            *slot = byte;
        }
        input.written = input.written.wrapping_add(1);
    }
    drop(input);
    TYPED.notify();
}

/// Waits for input and moves what there is into `buf`; answers how many bytes, at least one.
pub async fn read(buf: &mut [u8]) -> usize {
    loop {
        let mut count = 0;
        {
            let mut input = INPUT.lock();
            for slot in &mut *buf {
                if input.read == input.written {
                    break;
                }
                *slot = input.bytes.get(input.read % INPUT_SIZE).copied().unwrap_or(0);
                input.read = input.read.wrapping_add(1);
                count += 1;
            }
        }
        if count > 0 || buf.is_empty() {
            return count;
        }
        TYPED.notified().await;
    }
}

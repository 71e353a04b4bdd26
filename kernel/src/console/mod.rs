//! The console: output for everybody, input for the shell.
//!
//! Behind it are any number of devices: the serial port ([`uart`]), Xen's console ring, virtio
//! consoles. What is written goes to all of them, what is typed at any of them is one stream. Before
//! the first device is attached, output takes the platform's early way.

use alloc::boxed::Box;
use alloc::collections::VecDeque;
use alloc::vec::Vec;
use core::fmt;
use core::sync::atomic::{AtomicBool, Ordering};

use janus_front::class::ConsoleDevice;

use crate::platform;
use crate::platform::lock::IrqLock;
use crate::sync::Notify;

pub mod uart;

/// Bytes that wait for a device whose queue is full; older ones than these are given up.
const BACKLOG: usize = 256 << 10;
/// Typed bytes that nobody has read yet; what comes beyond is lost, as on any terminal.
const TYPED: usize = 4096;
/// How long to wait for the devices to take the backlog before the machine ends.
const FLUSH_NS: u64 = 200_000_000;
/// Looks at them at most, should the clock stand still.
const FLUSH_TRIES: u32 = 10_000_000;

/// A device in the list of those behind the console; names it for [`service`] and [`detach`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceId(u32);

struct Attached {
    id: DeviceId,
    device: Box<dyn ConsoleDevice>,
    /// What the device had no room for.
    backlog: VecDeque<u8>,
}

impl Attached {
    fn write(&mut self, bytes: &[u8]) {
        self.flush();
        let taken = if self.backlog.is_empty() { self.device.write(bytes) } else { 0 };
        let rest = bytes.get(taken..).unwrap_or(&[]);
        self.backlog.extend(rest);
        let excess = self.backlog.len().saturating_sub(BACKLOG);
        self.backlog.drain(..excess);
    }
    /// Moves the backlog into the device as far as it has room.
    fn flush(&mut self) {
        while !self.backlog.is_empty() {
            let taken = self.device.write(self.backlog.as_slices().0);
            if taken == 0 {
                return;
            }
            self.backlog.drain(..taken.min(self.backlog.len()));
        }
    }
}

struct Devices {
    list: Vec<Attached>,
    next: u32,
}

static DEVICES: IrqLock<Devices> = IrqLock::new(Devices { list: Vec::new(), next: 0 });
/// Whether the list has a device: until then nobody needs to lock it.
static ATTACHED: AtomicBool = AtomicBool::new(false);
static INPUT: IrqLock<VecDeque<u8>> = IrqLock::new(VecDeque::new());
static TYPED_SOMETHING: Notify = Notify::new();

/// Puts a device behind the console. Its interrupt handler calls [`service`].
pub fn attach(device: Box<dyn ConsoleDevice>) -> DeviceId {
    let mut devices = DEVICES.lock();
    let id = DeviceId(devices.next);
    devices.next += 1;
    devices.list.push(Attached { id, device, backlog: VecDeque::new() });
    ATTACHED.store(true, Ordering::Release);
    id
}

/// Takes a device from behind the console and gives it back.
pub fn detach(id: DeviceId) -> Option<Box<dyn ConsoleDevice>> {
    let mut devices = DEVICES.lock();
    let index = devices.list.iter().position(|attached| attached.id == id)?;
    let attached = devices.list.remove(index);
    ATTACHED.store(!devices.list.is_empty(), Ordering::Release);
    Some(attached.device)
}

/// Looks after a device: takes what was typed there, gives it what waits. For interrupt handlers.
pub fn service(id: DeviceId) {
    let mut typed = [0; 64];
    loop {
        let count = {
            let mut devices = DEVICES.lock();
            let Some(attached) = devices.list.iter_mut().find(|attached| attached.id == id) else {
                return;
            };
            attached.flush();
            attached.device.read(&mut typed)
        };
        if count == 0 {
            return;
        }
        input(typed.get(..count).unwrap_or(&[]));
    }
}

/// Takes typed bytes; for drivers that bring them by themselves.
pub fn input(bytes: &[u8]) {
    let mut input = INPUT.lock();
    let room = TYPED.saturating_sub(input.len());
    input.extend(bytes.iter().take(room));
    drop(input);
    TYPED_SOMETHING.notify();
}

/// Takes typed bytes that are there; answers how many.
pub fn try_read(buf: &mut [u8]) -> usize {
    let mut input = INPUT.lock();
    let count = buf.len().min(input.len());
    for (to, from) in buf.iter_mut().zip(input.drain(..count)) {
        *to = from;
    }
    count
}

/// Waits for typed bytes and takes them; answers how many, at least 1 unless `buf` is empty.
pub async fn read(buf: &mut [u8]) -> usize {
    loop {
        let count = try_read(buf);
        if count > 0 || buf.is_empty() {
            return count;
        }
        // The signal waits for us if a byte was typed in between.
        TYPED_SOMETHING.notified().await;
    }
}

/// Writes bytes to the console, with a carriage return before each newline. Never waits for a device.
pub fn write_bytes(bytes: &[u8]) {
    let pieces = || bytes.split_inclusive(|byte| *byte == b'\n');
    if !ATTACHED.load(Ordering::Acquire) {
        for piece in pieces() {
            with_return(piece, platform::early_write);
        }
        return;
    }
    let mut devices = DEVICES.lock();
    for attached in &mut devices.list {
        for piece in pieces() {
            with_return(piece, |bytes| attached.write(bytes));
        }
    }
}

fn with_return(piece: &[u8], mut write: impl FnMut(&[u8])) {
    match piece.strip_suffix(b"\n") {
        Some(line) => {
            write(line);
            write(b"\r\n");
        }
        None => write(piece),
    }
}

/// Tries for a while to get everything out that waits: before the machine ends.
pub fn flush() {
    let end_ns = platform::now_ns().saturating_add(FLUSH_NS);
    for _ in 0..FLUSH_TRIES {
        // A report after a failure may stand where the lock was held.
        let Some(mut devices) = DEVICES.try_lock() else { return };
        let mut waiting = false;
        for attached in &mut devices.list {
            attached.flush();
            waiting |= !attached.backlog.is_empty() || attached.device.output_pending();
        }
        if !waiting || platform::now_ns() > end_ns {
            return;
        }
        core::hint::spin_loop();
    }
}

/// The console as a formatter's target. What one `write!` writes stays together, up to [`TOGETHER`] bytes: other CPUs
/// write, too.
#[derive(Clone, Copy, Debug)]
pub struct Console;

/// Bytes that reach the devices in one piece.
const TOGETHER: usize = 512;

/// Collects the pieces of one `write!`.
struct Piece {
    bytes: [u8; TOGETHER],
    len: usize,
}

impl Piece {
    fn flush(&mut self) {
        write_bytes(self.bytes.get(..self.len).unwrap_or(&[]));
        self.len = 0;
    }
}

impl fmt::Write for Piece {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        if text.len() > TOGETHER - self.len {
            self.flush();
        }
        match self.bytes.get_mut(self.len..self.len + text.len()) {
            Some(room) => {
                room.copy_from_slice(text.as_bytes());
                self.len += text.len();
            }
            None => write_bytes(text.as_bytes()),
        }
        Ok(())
    }
}

impl fmt::Write for Console {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        write_bytes(text.as_bytes());
        Ok(())
    }
    fn write_fmt(&mut self, arguments: fmt::Arguments<'_>) -> fmt::Result {
        let mut piece = Piece { bytes: [0; TOGETHER], len: 0 };
        let result = fmt::write(&mut piece, arguments);
        piece.flush();
        result
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::{Arc, Mutex};

    /// Takes `room` bytes and then says that it is full.
    struct Narrow {
        room: usize,
        out: Arc<Mutex<Vec<u8>>>,
    }

    impl ConsoleDevice for Narrow {
        fn write(&mut self, bytes: &[u8]) -> usize {
            let taken = bytes.len().min(self.room);
            self.room -= taken;
            self.out.lock().unwrap().extend(&bytes[..taken]);
            taken
        }
        fn read(&mut self, _: &mut [u8]) -> usize {
            self.room = 6;
            0
        }
    }

    #[test]
    fn what_a_full_device_could_not_take_follows_in_order() {
        let out = Arc::new(Mutex::new(Vec::new()));
        let id = attach(Box::new(Narrow { room: 3, out: out.clone() }));
        write_bytes(b"one\ntwo\n");
        assert_eq!(*out.lock().unwrap(), b"one");
        service(id);
        service(id);
        assert_eq!(*out.lock().unwrap(), b"one\r\ntwo\r");
        write_bytes(b"!");
        assert_eq!(*out.lock().unwrap(), b"one\r\ntwo\r\n!");
        detach(id).expect("still attached");
    }
}

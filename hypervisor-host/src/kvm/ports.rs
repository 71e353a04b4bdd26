//! The devices behind I/O ports: a 16550, the keyboard controller's reset line, pvpanic, QEMU's exit device, and ACPI's
//! power registers.

use std::io::{self, Write};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use vm_superio::serial::SerialEvents;
use vm_superio::{I8042Device, Serial, Trigger};
use vmm_sys_util::eventfd::EventFd;

use super::acpi;
use super::layout::port;
use crate::host::Output;

/// ACPI's PM1 registers: the power button, and that the kernel gets the events (the only state there is here).
const POWER_BUTTON: u16 = 1 << 8;
const SCI_ENABLE: u16 = 1 << 0;
const SLEEP_ENABLE: u16 = 1 << 13;
const SLEEP_TYPE_SHIFT: u32 = 10;
/// pvpanic: the guest panicked.
const PANICKED: u8 = 1 << 0;
/// What reads where nothing is.
const NOTHING: u8 = 0xff;

/// What a guest asks for by a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wish {
    /// Power off.
    PowerOff,
    /// A reset.
    Reset,
    /// The end, with this value written to the exit device.
    Exit(u8),
    /// It has panicked.
    Panicked,
}

/// An interrupt line by eventfd.
#[derive(Debug)]
pub(crate) struct Line(pub(crate) EventFd);

impl Trigger for Line {
    type E = io::Error;
    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

/// Whoever types waits here until the guest has read.
#[derive(Debug, Default)]
pub(crate) struct Room {
    /// Its input is empty, or nobody reads any more.
    ready: Mutex<bool>,
    changed: Condvar,
}

impl Room {
    fn tell(&self) {
        *self.ready.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.changed.notify_all();
    }
    fn wait(&self) {
        let mut ready = self.ready.lock().unwrap_or_else(PoisonError::into_inner);
        while !*ready {
            ready = self.changed.wait(ready).unwrap_or_else(PoisonError::into_inner);
        }
        *ready = false;
    }
}

/// Tells [`Room`] when the receive buffer is empty.
#[derive(Debug)]
struct Emptied(Arc<Room>);

impl SerialEvents for Emptied {
    fn buffer_read(&self) {}
    fn out_byte(&self) {}
    fn tx_lost_byte(&self) {}
    fn in_buffer_empty(&self) {
        self.0.tell();
    }
}

/// ACPI's event and control registers.
#[derive(Clone, Copy, Debug, Default)]
struct Power {
    status: u16,
    enable: u16,
}

/// The level of ACPI's interrupt.
pub(crate) type Level = Box<dyn Fn(bool) + Send + Sync>;

/// All of them.
pub(crate) struct Ports {
    serial: Mutex<Serial<Line, Emptied, Output>>,
    room: Arc<Room>,
    closed: std::sync::atomic::AtomicBool,
    power: Mutex<Power>,
    sci: Level,
}

impl std::fmt::Debug for Ports {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ports").field("power", &self.power).finish_non_exhaustive()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Ports {
    /// Devices whose output goes to `output`; `serial` is the serial port's interrupt, `sci` ACPI's.
    pub(crate) fn new(output: Output, serial: EventFd, sci: Level) -> Self {
        let room = Arc::new(Room::default());
        let serial = Serial::with_events(Line(serial), Emptied(Arc::clone(&room)), output);
        Self {
            serial: Mutex::new(serial),
            room,
            closed: std::sync::atomic::AtomicBool::new(false),
            power: Mutex::new(Power::default()),
            sci,
        }
    }

    /// Types on the serial port; waits while the guest has not read what was typed before. `false`: it has ended.
    pub(crate) fn type_bytes(&self, mut bytes: &[u8]) -> bool {
        while !bytes.is_empty() {
            if self.closed.load(std::sync::atomic::Ordering::SeqCst) {
                return false;
            }
            let taken = lock(&self.serial).enqueue_raw_bytes(bytes).unwrap_or(0);
            bytes = bytes.get(taken..).unwrap_or_default();
            if taken == 0 {
                self.room.wait();
            }
        }
        true
    }

    /// Nobody will read any more.
    pub(crate) fn close(&self) {
        self.closed.store(true, std::sync::atomic::Ordering::SeqCst);
        self.room.tell();
        let _ = lock(&self.serial).writer_mut().flush();
    }

    /// Presses the power button.
    pub(crate) fn press_power_button(&self) {
        let mut power = lock(&self.power);
        power.status |= POWER_BUTTON;
        (self.sci)(power.status & power.enable != 0);
    }

    /// The guest writes.
    pub(crate) fn write(&self, at: u16, data: &[u8]) -> Option<Wish> {
        let first = data.first().copied().unwrap_or(0);
        let word = u16::from_le_bytes([first, data.get(1).copied().unwrap_or(0)]);
        match at {
            port::SERIAL..0x400 => {
                let mut serial = lock(&self.serial);
                let offset = u8::try_from(at - port::SERIAL).unwrap_or(0);
                for byte in data {
                    // An interrupt that cannot be told is as one that the guest has masked.
                    let _ = serial.write(offset, *byte);
                }
                None
            }
            port::I8042_COMMAND => {
                let reset = std::sync::atomic::AtomicBool::new(false);
                let mut controller = I8042Device::new(Noted(&reset));
                let offset = u8::try_from(port::I8042_COMMAND - port::I8042).unwrap_or(0);
                let _ = controller.write(offset, first);
                reset.load(std::sync::atomic::Ordering::Relaxed).then_some(Wish::Reset)
            }
            port::DEBUG_EXIT => Some(Wish::Exit(first)),
            port::PVPANIC if first & PANICKED != 0 => Some(Wish::Panicked),
            port::RESET if first == acpi::RESET => Some(Wish::Reset),
            port::PM1_EVENT => {
                // A one clears.
                let mut power = lock(&self.power);
                power.status &= !word;
                (self.sci)(power.status & power.enable != 0);
                None
            }
            0x602 => {
                let mut power = lock(&self.power);
                power.enable = word;
                (self.sci)(power.status & power.enable != 0);
                None
            }
            port::PM1_CONTROL if word & SLEEP_ENABLE != 0 => {
                let kind = word >> SLEEP_TYPE_SHIFT & 7;
                (kind == u16::from(acpi::SOFT_OFF)).then_some(Wish::PowerOff)
            }
            _ => None,
        }
    }

    /// The guest reads.
    pub(crate) fn read(&self, at: u16, data: &mut [u8]) {
        let power = |word: fn(&Power) -> u16| word(&lock(&self.power)).to_le_bytes();
        let bytes = match at {
            port::SERIAL..0x400 => {
                let offset = u8::try_from(at - port::SERIAL).unwrap_or(0);
                let mut serial = lock(&self.serial);
                data.iter_mut().for_each(|byte| *byte = serial.read(offset));
                return;
            }
            port::I8042 | port::I8042_COMMAND => [0, 0],
            port::PVPANIC => [PANICKED, 0],
            port::PM1_EVENT => power(|power| power.status),
            0x602 => power(|power| power.enable),
            port::PM1_CONTROL => SCI_ENABLE.to_le_bytes(),
            _ => [NOTHING, NOTHING],
        };
        let filler = if bytes == [NOTHING, NOTHING] { NOTHING } else { 0 };
        data.fill(filler);
        for (to, from) in data.iter_mut().zip(bytes) {
            *to = from;
        }
    }
}

/// Notes that the keyboard controller would reset the machine.
struct Noted<'a>(&'a std::sync::atomic::AtomicBool);

impl Trigger for Noted<'_> {
    type E = io::Error;
    fn trigger(&self) -> io::Result<()> {
        self.0.store(true, std::sync::atomic::Ordering::Relaxed);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;

    #[derive(Clone, Default)]
    struct Kept(Arc<Mutex<Vec<u8>>>);

    impl Write for Kept {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn ports() -> (Ports, Kept, Arc<AtomicBool>) {
        let (kept, level) = (Kept::default(), Arc::new(AtomicBool::new(false)));
        let sci = Arc::clone(&level);
        let line = EventFd::new(0).unwrap();
        let ports = Ports::new(
            Box::new(kept.clone()),
            line,
            Box::new(move |high| sci.store(high, Ordering::SeqCst)),
        );
        (ports, kept, level)
    }

    #[test]
    fn every_way_to_end_is_understood_and_nothing_else_is() {
        let (ports, ..) = ports();
        for (at, data, wish) in [
            (0xf4, &[0x10][..], Some(Wish::Exit(0x10))),
            (0x64, &[0xfe], Some(Wish::Reset)),
            (0x64, &[0xd1], None),
            (0x60, &[0xfe], None),
            (0x505, &[1], Some(Wish::Panicked)),
            (0x505, &[2], None),
            (0x608, &[1], Some(Wish::Reset)),
            (0x608, &[6], None),
            (0x604, &[0, 0x34], Some(Wish::PowerOff)),
            (0x604, &[0, 0x14], None),
            (0x604, &[0x34], None),
            (0x80, &[1, 2, 3, 4], None),
            (0xffff, &[], None),
        ] {
            assert_eq!(ports.write(at, data), wish, "{at:#x} {data:x?}");
        }
    }

    #[test]
    fn the_serial_port_takes_strings_and_gives_what_was_typed() {
        let (ports, kept, _) = ports();
        assert_eq!(ports.write(0x3f8, b"one line\n"), None);
        assert_eq!(*kept.0.lock().unwrap(), b"one line\n");
        assert!(ports.type_bytes(b"ab"));
        let mut read = [0; 3];
        ports.read(0x3f8, &mut read);
        assert_eq!(&read, b"ab\0");
        ports.close();
        assert!(!ports.type_bytes(&[0; 1000]));
    }

    #[test]
    fn the_power_button_is_a_level_until_it_is_acknowledged() {
        let (ports, _, level) = ports();
        ports.press_power_button();
        assert!(!level.load(Ordering::SeqCst), "not enabled yet");
        ports.write(0x602, &[0, 1]);
        assert!(level.load(Ordering::SeqCst));
        let mut status = [0; 2];
        ports.read(0x600, &mut status);
        assert_eq!(status, [0, 1]);
        ports.write(0x600, &[0, 1]);
        assert!(!level.load(Ordering::SeqCst));
        ports.read(0x600, &mut status);
        assert_eq!(status, [0, 0]);
        ports.read(0x1234, &mut status);
        assert_eq!(status, [0xff, 0xff]);
    }
}

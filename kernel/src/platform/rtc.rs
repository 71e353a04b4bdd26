//! The PC's real-time clock (MC146818): the date, where no hypervisor tells it better.
// UNSAFETY: port I/O.
#![expect(unsafe_code, reason = "port I/O")]

use core::time::Duration;

use super::native::{inb, outb};

const INDEX: u16 = 0x70;
const DATA: u16 = 0x71;
const SECONDS: u8 = 0;
const MINUTES: u8 = 2;
const HOURS: u8 = 4;
const DAY: u8 = 7;
const MONTH: u8 = 8;
const YEAR: u8 = 9;
const STATUS_A: u8 = 0x0a;
const STATUS_B: u8 = 0x0b;
/// Where PCs keep the century (ACPI's FADT names it; it is always this one).
const CENTURY: u8 = 0x32;

const A_UPDATING: u8 = 1 << 7;
const B_24_HOURS: u8 = 1 << 1;
const B_BINARY: u8 = 1 << 2;
const PM: u8 = 1 << 7;
/// Looks at the clock before it is taken for a missing one; an update takes 2 ms at most.
const TRIES: u32 = 10_000;

/// The registers, read twice alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Registers {
    second: u8,
    minute: u8,
    hour: u8,
    day: u8,
    month: u8,
    year: u8,
    century: u8,
    status_b: u8,
}

/// The date and time as a time since 1970, taking the clock for UTC.
#[must_use]
pub(super) fn read() -> Option<Duration> {
    let mut last = None;
    for _ in 0..TRIES {
        if register(STATUS_A) & A_UPDATING != 0 {
            continue;
        }
        let now = Registers {
            second: register(SECONDS),
            minute: register(MINUTES),
            hour: register(HOURS),
            day: register(DAY),
            month: register(MONTH),
            year: register(YEAR),
            century: register(CENTURY),
            status_b: register(STATUS_B),
        };
        // An update between two reads would show.
        if last == Some(now) {
            return since_1970(now);
        }
        last = Some(now);
    }
    None
}

fn register(index: u8) -> u8 {
    // SAFETY: selects a register of the clock, with NMIs left enabled (bit 7).
    unsafe { outb(INDEX, index) }
    // SAFETY: reads it.
    unsafe { inb(DATA) }
}

fn since_1970(r: Registers) -> Option<Duration> {
    let number = |value: u8| {
        if r.status_b & B_BINARY != 0 {
            u64::from(value)
        } else {
            u64::from(value >> 4) * 10 + u64::from(value & 15)
        }
    };
    let hour = if r.status_b & B_24_HOURS != 0 {
        number(r.hour)
    } else {
        number(r.hour & !PM) % 12 + if r.hour & PM != 0 { 12 } else { 0 }
    };
    let century = match number(r.century) {
        century @ 19..=21 => century,
        _ => 20,
    };
    let (year, month, day) = (century * 100 + number(r.year), number(r.month), number(r.day));
    if year < 1970 || !(1..=12).contains(&month) || !(1..=31).contains(&day) {
        return None;
    }
    let (minute, second) = (number(r.minute), number(r.second));
    if hour > 23 || minute > 59 || second > 60 {
        return None;
    }
    let seconds = ((days_since_1970(year, month, day) * 24 + hour) * 60 + minute) * 60 + second;
    Some(Duration::from_secs(seconds))
}

/// Days from 1970-01-01, counting years from March so that the leap day comes last.
fn days_since_1970(year: u64, month: u64, day: u64) -> u64 {
    let (year, month) = if month > 2 { (year, month - 3) } else { (year - 1, month + 9) };
    let days = year * 365 + year / 4 - year / 100 + year / 400 + (153 * month + 2) / 5 + day - 1;
    // The same sum for 1970-01-01.
    days - 719_468
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_become_seconds() {
        let binary = Registers {
            second: 40,
            minute: 46,
            hour: 1,
            day: 9,
            month: 9,
            year: 1,
            century: 20,
            status_b: B_BINARY | B_24_HOURS,
        };
        // 10^9 seconds after the epoch.
        assert_eq!(since_1970(binary), Some(Duration::from_secs(1_000_000_000)));
        // The same in BCD and 12 hours, in the afternoon.
        let bcd = Registers {
            second: 0x40,
            minute: 0x46,
            hour: 0x81,
            year: 0x01,
            century: 0x20,
            status_b: 0,
            ..binary
        };
        assert_eq!(since_1970(bcd), Some(Duration::from_secs(1_000_000_000 + 12 * 3600)));
        assert_eq!(since_1970(Registers { month: 0, ..binary }), None);
        assert_eq!(since_1970(Registers { hour: 77, ..binary }), None);
    }

    #[test]
    fn days_agree_with_the_calendar() {
        for (date, days) in [
            ((1970, 1, 1), 0),
            ((1972, 2, 29), 789),
            ((1972, 3, 1), 790),
            ((2000, 3, 1), 11017),
            ((2100, 3, 1), 47541),
        ] {
            assert_eq!(days_since_1970(date.0, date.1, date.2), days, "{date:?}");
        }
    }
}

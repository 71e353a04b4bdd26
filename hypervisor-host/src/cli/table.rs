//! Figures as tables for people.

use std::fmt::Write as _;

use crate::control::protocol::{DeviceStat, Info, Stat, State};

/// Rows under a head, each column as wide as it must be; numbers stand to the right.
pub(super) fn table(head: &[&str], rows: &[Vec<String>]) -> String {
    let width = |column: usize| {
        let cells = rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count());
        cells.chain(head.get(column).map(|name| name.len())).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..head.len()).map(width).collect();
    let is_number = |cell: &str| cell.starts_with(|c: char| c.is_ascii_digit());
    let mut text = String::new();
    let head: Vec<String> = head.iter().map(|name| (*name).to_owned()).collect();
    for row in std::iter::once(&head).chain(rows) {
        let mut line = String::new();
        for (column, (cell, width)) in row.iter().zip(&widths).enumerate() {
            let right =
                column > 0 && rows.iter().filter_map(|row| row.get(column)).all(|c| is_number(c));
            let _ = match right {
                true => write!(line, "{cell:>width$}  "),
                false => write!(line, "{cell:<width$}  "),
            };
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

/// `1h02m`, `3m04s`, `5s`.
fn age(seconds: u64) -> String {
    match (seconds / 3600, seconds / 60 % 60, seconds % 60) {
        (0, 0, seconds) => format!("{seconds}s"),
        (0, minutes, seconds) => format!("{minutes}m{seconds:02}s"),
        (hours, minutes, _) => format!("{hours}h{minutes:02}m"),
    }
}

/// `janus ls`.
pub(super) fn guests(guests: &[Info]) -> String {
    let row = |guest: &Info| {
        let state = match guest.state {
            State::Running => "running",
            State::Paused => "paused",
            State::Ended => "ended",
        };
        vec![
            guest.name.clone(),
            guest.pid.to_string(),
            state.to_owned(),
            age(guest.age_s),
            format!("{} MiB", guest.memory_mib),
            guest.vcpus.to_string(),
            guest.ports.join(" "),
            guest.image.clone(),
        ]
    };
    let rows: Vec<_> = guests.iter().map(row).collect();
    table(&["NAME", "PID", "STATE", "AGE", "MEMORY", "CPUS", "PORTS", "IMAGE"], &rows)
}

/// The name of a device as people know it.
fn device(device: &DeviceStat) -> String {
    match (device.kind.as_str(), device.number.checked_sub(51712)) {
        ("vbd", Some(offset)) if offset < 256 => {
            let letter = char::from(b'a' + u8::try_from(offset / 16).unwrap_or(0));
            match offset % 16 {
                0 => format!("vbd xvd{letter}"),
                part => format!("vbd xvd{letter}{part}"),
            }
        }
        (kind, _) => format!("{kind} {}", device.number),
    }
}

/// `janus stat`.
pub(super) fn stat(stat: &Stat) -> String {
    let mut text = String::new();
    let calls: Vec<_> = stat
        .hypercalls
        .iter()
        .map(|call| {
            let each = call.ns / call.calls.max(1);
            vec![
                call.name.clone(),
                call.calls.to_string(),
                (call.ns / 1000).to_string(),
                each.to_string(),
            ]
        })
        .collect();
    text.push_str(&table(&["hypercall", "calls", "us", "ns each"], &calls));
    let devices: Vec<_> = stat
        .devices
        .iter()
        .map(|status| {
            let connected = if status.connected { "connected" } else { "-" };
            let mut row = vec![device(status), connected.to_owned()];
            row.extend(
                [
                    status.requests,
                    status.received,
                    status.errors,
                    status.bytes_out,
                    status.bytes_in,
                ]
                .map(|figure| figure.to_string()),
            );
            row
        })
        .collect();
    if !devices.is_empty() {
        text.push('\n');
        let head = ["device", "state", "requests", "received", "errors", "bytes out", "bytes in"];
        text.push_str(&table(&head, &devices));
    }
    let target =
        stat.memory_target_kib.map(|kib| format!(", told to keep {kib}")).unwrap_or_default();
    let _ = writeln!(
        text,
        "\n{} events sent by the host, {} event channels, {} grants in use, {} unknown hypercalls\n\
         memory: {} KiB of at most {}{target}; {} KiB resident on the host\n\
         {:.1} s since the start",
        stat.events_sent,
        stat.ports,
        stat.grants_in_use,
        stat.unknown_calls,
        stat.memory_kib,
        stat.memory_most_kib,
        stat.resident_kib,
        stat.age_us as f64 / 1e6,
    );
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_they_must_be() {
        let rows = [vec!["a".to_owned(), "1".to_owned()], vec!["long".to_owned(), "22".to_owned()]];
        assert_eq!(table(&["x", "count"], &rows), "x     count\na         1\nlong     22\n");
        assert_eq!((age(5), age(64), age(3720)), ("5s".into(), "1m04s".into(), "1h02m".into()));
    }

    #[test]
    fn devices_have_the_names_of_linux() {
        let named = |kind: &str, number| {
            device(&DeviceStat {
                kind: kind.into(),
                number,
                connected: true,
                requests: 0,
                received: 0,
                errors: 0,
                bytes_out: 0,
                bytes_in: 0,
            })
        };
        for (kind, number, name) in [
            ("vbd", 51712, "vbd xvda"),
            ("vbd", 51729, "vbd xvdb1"),
            ("vbd", 768, "vbd 768"),
            ("vif", 0, "vif 0"),
        ] {
            assert_eq!(named(kind, number), name);
        }
    }
}

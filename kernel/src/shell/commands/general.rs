//! The shell itself, time, and the end.

use alloc::boxed::Box;
use alloc::string::String;
use core::fmt::Write;
use core::time::Duration;

use super::{Command, TABLE};
use crate::power::{self, ExitStatus};
use crate::shell::{Session, Status};
use crate::{task, time};

pub(super) const COMMANDS: &[Command] = &[
    Command {
        name: "help",
        arguments: "[COMMAND]",
        help: "lists the commands, or explains one",
        run: |session, arguments| Box::pin(async move { help(session, arguments) }),
    },
    Command {
        name: "echo",
        arguments: "[WORD ...]",
        help: "prints its arguments",
        run: |session, arguments| {
            Box::pin(async move {
                let _ = writeln!(session, "{}", arguments.join(" "));
                Status::SUCCESS
            })
        },
    },
    Command {
        name: "uptime",
        arguments: "",
        help: "prints the time since boot, the date, and how idle the CPU was",
        run: |session, _| Box::pin(async move { uptime(session) }),
    },
    Command {
        name: "sleep",
        arguments: "SECONDS",
        help: "waits",
        run: |_, arguments| {
            Box::pin(async move {
                let Some(seconds) = arguments.first().and_then(|text| text.parse::<f64>().ok())
                else {
                    return Status::USAGE;
                };
                let Ok(duration) = Duration::try_from_secs_f64(seconds) else {
                    return Status::USAGE;
                };
                time::sleep(duration).await;
                Status::SUCCESS
            })
        },
    },
    Command {
        name: "time",
        arguments: "COMMAND [ARGUMENT ...]",
        help: "runs a command and prints how long it took",
        run: |session, arguments| {
            Box::pin(async move {
                if arguments.is_empty() {
                    return Status::USAGE;
                }
                let start = time::now();
                let status = session.run(arguments).await;
                let elapsed = start.elapsed();
                let _ = writeln!(session, "{}.{:06} s", elapsed.as_secs(), elapsed.subsec_micros());
                status
            })
        },
    },
    Command {
        name: "panic",
        arguments: "[WORD ...]",
        help: "crashes the kernel on purpose",
        run: |_, arguments| {
            Box::pin(async move { panic!("asked for by the shell: {}", arguments.join(" ")) })
        },
    },
    Command {
        name: "reboot",
        arguments: "",
        help: "restarts the machine",
        run: |_, _| Box::pin(async { power::exit(ExitStatus::Reboot) }),
    },
    Command {
        name: "poweroff",
        arguments: "[STATUS]",
        help: "switches the machine off; hosts that can see STATUS",
        run: |_, arguments| {
            Box::pin(async move {
                match arguments.first().map_or(Ok(0), |text| text.parse()) {
                    Ok(status) => power::exit(ExitStatus::PowerOff(status)),
                    Err(_) => Status::USAGE,
                }
            })
        },
    },
];

fn help(session: &mut Session<'_>, arguments: &[String]) -> Status {
    let mut found = false;
    for group in TABLE {
        for command in group.iter().filter(|c| arguments.first().is_none_or(|name| name == c.name))
        {
            found = true;
            let usage = alloc::format!("{} {}", command.name, command.arguments);
            let _ = writeln!(session, "  {usage:<36} {}", command.help);
        }
    }
    if found { Status::SUCCESS } else { session.fail("no such command") }
}

fn uptime(session: &mut Session<'_>) -> Status {
    let up = Duration::from_nanos(time::now().as_nanos());
    let statistics = task::statistics();
    let _ = write!(session, "up {}.{:03} s", up.as_secs(), up.subsec_millis());
    if let Some(date) = time::wall_clock() {
        let _ = write!(session, ", {} UTC", Date(date));
    }
    let idle =
        statistics.idle.as_nanos().saturating_mul(100).checked_div(up.as_nanos()).unwrap_or(0);
    let _ = writeln!(session, ", idle {idle} %, {} task switches", statistics.polls);
    Status::SUCCESS
}

/// A time since the UNIX epoch as a date.
struct Date(Duration);

impl core::fmt::Display for Date {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        let seconds = self.0.as_secs();
        let (days, second) = (seconds / 86_400, seconds % 86_400);
        // Days to a civil date, counting years from March so that the leap day comes last.
        let shifted = days + 719_468;
        let (era, day_of_era) = (shifted / 146_097, shifted % 146_097);
        let year_of_era =
            (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
        let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let month = (5 * day_of_year + 2) / 153;
        let day = day_of_year - (153 * month + 2) / 5 + 1;
        let (year, month) = if month < 10 {
            (era * 400 + year_of_era, month + 3)
        } else {
            (era * 400 + year_of_era + 1, month - 9)
        };
        let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
        write!(f, "{year:04}-{month:02}-{day:02} {hour:02}:{minute:02}:{second:02}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_civil() {
        for (seconds, date) in [
            (0, "1970-01-01 00:00:00"),
            (951_782_399, "2000-02-28 23:59:59"),
            (951_782_400, "2000-02-29 00:00:00"),
            (1_795_226_400, "2026-11-21 02:00:00"),
            (4_107_542_400, "2100-03-01 00:00:00"),
        ] {
            assert_eq!(format!("{}", Date(Duration::from_secs(seconds))), date);
        }
    }
}

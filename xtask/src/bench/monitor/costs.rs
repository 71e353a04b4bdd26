//! What leaving and entering a guest costs, and what computing in it does.

use anyhow::{Context, Result};

use super::row::{Goal, Row, Unit};
use super::{Bench, samples};

/// What the guest measures, in the order of its commands.
const NAMES: [&str; 9] =
    ["null-call", "monitor-call", "event", "map", "unmap", "switch", "timer", "loop", "copy"];

/// Rows A5 to A8 and A15, and what else there is of the kind.
pub(super) fn rows(bench: &Bench<'_>) -> Result<Vec<Row>> {
    let commands = NAMES.map(|name| format!("measure {name}")).join("; ");
    let lines = bench.guest(&[], &commands)?;
    let guest = |name: &str| {
        let line = lines.iter().find(|line| line.get("what").is_some_and(|what| what == name));
        samples(line.with_context(|| format!("the guest did not measure {name}"))?, "ns")
    };
    let futex = bench.limit(&["futex"])?;
    let filtered = bench.limit(&["filtered-call"])?;
    let call = bench.limit(&["call"])?;
    let pipe = bench.limit(&["pipe"])?;
    Ok(vec![
        Row::new("A5", "hypercall without effect", Unit::Nanoseconds, guest("null-call")?)
            .fixed("solo5-spt, elsewhere", 113.0, Goal::AtMost(0.25))
            .beside("system call", call, Goal::AtMost(1.0)),
        Row::new("A7", "hypercall to the monitor", Unit::Nanoseconds, guest("monitor-call")?)
            .beside("futex round trip", futex.clone(), Goal::AtMost(1.1))
            .beside("filtered system call", filtered, Goal::AtMost(30.0)),
        Row::new("A8", "event to itself, handled", Unit::Nanoseconds, guest("event")?).beside(
            "pipe round trip",
            pipe,
            Goal::AtMost(1.5),
        ),
        Row::new("", "map a page and touch it", Unit::Nanoseconds, guest("map")?).beside(
            "touch of new memory",
            bench.limit(&["touch"])?,
            Goal::AtMost(5.0),
        ),
        Row::new("", "unmap a touched page", Unit::Nanoseconds, guest("unmap")?).beside(
            "replace a touched page",
            bench.limit(&["unmap"])?,
            Goal::AtMost(2.0),
        ),
        Row::new("", "from task to task", Unit::Nanoseconds, guest("switch")?).beside(
            "futex round trip",
            futex,
            Goal::AtMost(0.1),
        ),
        Row::new("", "lateness of a sleep of 300 us", Unit::Microseconds, guest("timer")?),
        Row::new("A15", "a loop, a million turns", Unit::Microseconds, guest("loop")?).beside(
            "outside",
            bench.limit(&["loop"])?,
            Goal::AtMost(1.02),
        ),
        Row::new("A15", "copying, a MiB", Unit::Microseconds, guest("copy")?).beside(
            "outside",
            bench.limit(&["copy"])?,
            Goal::AtMost(1.02),
        ),
    ])
}

//! What asking xenstore over the guest's ring costs.

use anyhow::{Context, Result};

use super::row::{Goal, Row, Unit};
use super::{Bench, samples};

/// Questions a second that Xen's C daemon answers on its socket, and transactions of four writes, on one CPU of this kind.
const C_DAEMON: [f64; 3] = [112_800.0, 111_600.0, 16_900.0];

/// Row A14.
pub(super) fn rows(bench: &Bench<'_>) -> Result<Vec<Row>> {
    let kinds = ["read", "write", "transaction"];
    let depths = [1, 16];
    let mut commands = Vec::new();
    for kind in kinds {
        for depth in depths {
            commands.push(format!("store-bench {kind} {depth}"));
        }
    }
    let lines = bench.guest(&[], &commands.join("; "))?;
    let futex = bench.limit(&["futex"])?;
    let mut rows = Vec::new();
    let mut lines = lines.iter();
    for (kind, theirs) in kinds.into_iter().zip(C_DAEMON) {
        for depth in depths {
            let line = lines.next().with_context(|| format!("no answer to {kind}"))?;
            let times = samples(line, "ns")?;
            let rate = times.iter().map(|time| 1e9 / time).collect();
            let name = match kind {
                "transaction" => "transaction of 4 writes",
                kind => kind,
            };
            let what = format!("xenstore {name}, of {depth} at once");
            let trip = futex.iter().map(|time| 1e9 / time).collect();
            rows.push(
                Row::new("A14", &what, Unit::PerSecond, rate)
                    .fixed("C daemon, elsewhere", theirs, Goal::AtLeast(4.0))
                    .beside(
                        "futex round trips",
                        trip,
                        Goal::AtLeast(if depth == 1 { 0.4 } else { 1.0 }),
                    ),
            );
        }
    }
    Ok(rows)
}

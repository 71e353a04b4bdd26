//! What reading a disk through blkfront and blkback costs.

use anyhow::{Context, Result};
use serde_json::Value;

use super::Bench;
use super::row::{Goal, Row, Unit};

/// Measurements of each kind; each lasts a second.
const SAMPLES: usize = 5;
/// The kinds: pattern, bytes, requests at once.
const KINDS: [(&str, u64, u64); 4] =
    [("random", 4096, 1), ("random", 4096, 32), ("seq", 1 << 20, 1), ("seq", 1 << 20, 4)];

fn count(line: &Value, name: &str) -> Result<f64> {
    line.get(name).and_then(Value::as_f64).with_context(|| format!("no {name} in {line}"))
}

/// Rows A9 and A10.
pub(super) fn rows(bench: &Bench<'_>) -> Result<Vec<Row>> {
    // An image in memory, as large as what the limits are measured with: the same file.
    let image = std::env::temp_dir().join(format!("janus-bench-{}.img", std::process::id()));
    std::fs::copy(&bench.disk, &image).context("no room for an image")?;
    let rows = on(bench, &image.display().to_string());
    std::fs::remove_file(&image)?;
    rows
}

fn on(bench: &Bench<'_>, image: &str) -> Result<Vec<Row>> {
    let mut commands = Vec::new();
    for _ in 0..SAMPLES {
        for (pattern, bytes, depth) in KINDS {
            commands.push(format!("bench xvda {pattern} {bytes} {depth} 1"));
        }
    }
    let disk = format!("{image},ro,format=raw");
    let lines = bench.guest(&["--disk", &disk], &commands.join("; "))?;
    let kind = |(pattern, bytes, depth): (&str, u64, u64)| -> Vec<&Value> {
        let is = |line: &&Value| {
            line.get("random").and_then(Value::as_bool) == Some(pattern == "random")
                && line.get("size").and_then(Value::as_u64) == Some(bytes)
                && line.get("depth").and_then(Value::as_u64) == Some(depth)
        };
        lines.iter().filter(is).collect()
    };
    let time = |kind: &[&Value]| -> Result<Vec<f64>> {
        kind.iter().map(|line| Ok(count(line, "us")? * 1e3 / count(line, "requests")?)).collect()
    };
    let each = |kind: &[&Value], name: &str| -> Result<Vec<f64>> {
        kind.iter().map(|line| Ok(count(line, name)? / count(line, "requests")?)).collect()
    };
    let [random_1, random_32, large_1, large_4] = KINDS.map(kind);
    let pread = bench.limit(&["read", image])?;
    let mapped = bench.limit(&["read-mapped", image])?;
    let stream = bench.limit(&["stream", image])?;
    let stream_mapped = bench.limit(&["stream-mapped", image])?;
    let mut rows = vec![
        Row::new("A9", "4 KiB random read, one at a time", Unit::Nanoseconds, time(&random_1)?)
            .beside("pread", pread.clone(), Goal::AtMost(0.85))
            .beside("copy from a mapping", mapped.clone(), Goal::AtMost(2.0)),
        Row::new("A9", "4 KiB random read, of 32 at once", Unit::Nanoseconds, time(&random_32)?)
            .beside("pread", pread, Goal::AtMost(0.85))
            .beside("copy from a mapping", mapped, Goal::AtMost(2.0)),
        Row::new("", "  notifications for each", Unit::Each, each(&random_32, "kicks")?),
        Row::new("", "  events for each", Unit::Each, each(&random_32, "events")?),
    ];
    for (name, kind) in [("one at a time", large_1), ("of 4 at once", large_4)] {
        let what = format!("1 MiB sequential read, {name}");
        rows.push(
            Row::new("A10", &what, Unit::Microseconds, time(&kind)?)
                .beside("pread", stream.clone(), Goal::AtMost(0.67))
                .beside("copy from a mapping", stream_mapped.clone(), Goal::AtMost(1.25)),
        );
        rows.push(Row::new("", "  notifications for each", Unit::Each, each(&kind, "kicks")?));
    }
    Ok(rows)
}

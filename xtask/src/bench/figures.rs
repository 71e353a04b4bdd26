//! Figures of the bench: samples, medians with their spread, ratios, the table.

use std::collections::BTreeMap;

use serde::Serialize;

/// What is measured; the order is that of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Metric {
    /// From the start of the machine to a served disk, in milliseconds.
    Ready,
    /// The guest's own share of that, by its own clock: from its kernel's first reading of it.
    GuestReady,
    /// 1 MiB reads in sequence, one at a time, in MiB/s.
    Sequential,
    /// 4 KiB reads all over the disk, one at a time, a second.
    Random1,
    /// The same with 32 in flight.
    Random32,
    /// A 64 MiB file over HTTP, the first time, in MiB/s.
    HttpCold,
    /// The same again.
    Http,
    /// One TCP stream into the guest, in Mbit/s.
    TcpIn,
    /// One TCP stream out of it.
    TcpOut,
}

impl Metric {
    fn name(self) -> &'static str {
        match self {
            Self::Ready => "start to ready, ms",
            Self::GuestReady => "  the guest's own part of it, ms",
            Self::Sequential => "sequential 1 MiB reads, MiB/s",
            Self::Random1 => "random 4 KiB reads, 1 in flight, /s",
            Self::Random32 => "random 4 KiB reads, 32 in flight, /s",
            Self::HttpCold => "HTTP 64 MiB, first fetch, MiB/s",
            Self::Http => "HTTP 64 MiB, again, MiB/s",
            Self::TcpIn => "TCP stream in, Mbit/s",
            Self::TcpOut => "TCP stream out, Mbit/s",
        }
    }

    /// How often Janus beats the other: above 1 is better, for times and for rates.
    fn ratio(self, janus: f64, other: f64) -> f64 {
        if matches!(self, Self::Ready | Self::GuestReady) { other / janus } else { janus / other }
    }
}

/// Who is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Side {
    /// Our image.
    Janus,
    /// Debian's cloud kernel.
    Linux,
    /// Our image with the virtio drivers of the `virtio-drivers` crate.
    Crate,
}

impl Side {
    fn name(self) -> &'static str {
        match self {
            Self::Janus => "Janus",
            Self::Linux => "Linux 6.1",
            Self::Crate => "crate's drivers",
        }
    }
}

/// One line of the table: Janus beside another.
struct Row<'a> {
    place: &'a str,
    metric: Metric,
    peer: Side,
    janus: Option<Spread>,
    other: Option<Spread>,
}

impl Row<'_> {
    fn ratio(&self) -> Option<f64> {
        let (janus, other) = self.janus.zip(self.other)?;
        Some(self.metric.ratio(janus.median, other.median))
    }
}

/// All samples.
#[derive(Debug, Default)]
pub(crate) struct Figures {
    samples: BTreeMap<(String, Metric, Side), Vec<f64>>,
}

/// Several samples in short.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(super) struct Spread {
    pub(super) median: f64,
    pub(super) min: f64,
    pub(super) max: f64,
    samples: usize,
}

/// Their median and extremes; `None`: there are none.
pub(super) fn spread(samples: &[f64]) -> Option<Spread> {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    let (min, max) = (*sorted.first()?, *sorted.last()?);
    let low = *sorted.get((sorted.len() - 1) / 2)?;
    let high = *sorted.get(sorted.len() / 2)?;
    Some(Spread { median: f64::midpoint(low, high), min, max, samples: sorted.len() })
}

impl Figures {
    /// Whether nothing was measured.
    pub(crate) fn is_empty(&self) -> bool {
        self.samples.is_empty()
    }

    /// Adds a sample.
    pub(crate) fn add(&mut self, place: &str, metric: Metric, side: Side, value: f64) {
        self.samples.entry((place.to_owned(), metric, side)).or_default().push(value);
    }

    fn rows(&self) -> Vec<Row<'_>> {
        let get = |place: &str, metric, side| {
            self.samples.get(&(place.to_owned(), metric, side)).and_then(|samples| spread(samples))
        };
        let mut rows: Vec<Row<'_>> = Vec::new();
        for peer in [Side::Linux, Side::Crate] {
            for (place, metric, side) in self.samples.keys() {
                // A place where only Janus was measured is still worth a line.
                let wanted = *side == peer || (*side == Side::Janus && peer == Side::Linux);
                let known = rows
                    .iter()
                    .any(|row| row.place == place && row.metric == *metric && row.peer == peer);
                if wanted && !known {
                    let (janus, other) =
                        (get(place, *metric, Side::Janus), get(place, *metric, peer));
                    rows.push(Row { place, metric: *metric, peer, janus, other });
                }
            }
        }
        rows.sort_by_key(|row| (row.place, row.peer, row.metric));
        rows
    }

    /// The table: medians with minimum and maximum, and the ratio.
    pub(crate) fn table(&self) -> String {
        let show = |spread: Option<Spread>| {
            spread.map_or_else(
                || "-".to_owned(),
                |s| format!("{:.0} ({:.0}..{:.0})", s.median, s.min, s.max),
            )
        };
        let mut table = format!(
            "{:<8} {:<37} {:>24} {:>24} {:<15} {:>7}\n",
            "where", "what", "Janus", "the other", "", "ratio"
        );
        for row in self.rows() {
            let ratio = row.ratio().map_or_else(|| "-".to_owned(), |ratio| format!("{ratio:.2}"));
            table.push_str(&format!(
                "{:<8} {:<37} {:>24} {:>24} {:<15} {ratio:>7}\n",
                row.place,
                row.metric.name(),
                show(row.janus),
                show(row.other),
                row.peer.name(),
            ));
        }
        table
    }

    /// The same as JSON.
    pub(crate) fn json(&self) -> serde_json::Value {
        let rows: Vec<serde_json::Value> = self
            .rows()
            .into_iter()
            .map(|row| {
                serde_json::json!({
                    "place": row.place, "metric": row.metric, "what": row.metric.name().trim(),
                    "peer": row.peer, "janus": row.janus, "other": row.other, "ratio": row.ratio(),
                })
            })
            .collect();
        serde_json::json!({ "unit_of_ratio": "above 1: Janus is better", "figures": rows })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_and_ratios_are_right_way_round() {
        let mut figures = Figures::default();
        for value in [30.0, 10.0, 20.0] {
            figures.add("q35", Metric::Ready, Side::Janus, value);
        }
        for value in [400.0, 600.0] {
            figures.add("q35", Metric::Ready, Side::Linux, value);
        }
        figures.add("q35", Metric::Http, Side::Janus, 200.0);
        figures.add("q35", Metric::Http, Side::Linux, 100.0);
        figures.add("q35", Metric::Http, Side::Crate, 400.0);
        let table = figures.table();
        assert!(table.contains("20 (10..30)") && table.contains("500 (400..600)"), "{table}");
        assert!(table.contains(" 25.00\n") && table.contains(" 2.00\n"), "{table}");
        assert!(table.contains("crate's drivers    0.50\n"), "{table}");
        assert_eq!(figures.json()["figures"].as_array().unwrap().len(), 3);
    }
}

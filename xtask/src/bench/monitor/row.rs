//! A row of the monitor's table: our figure, what it is held against, and whether it is as good as it was to be.

use serde_json::{Value, json};

use super::super::figures::{Spread, spread};

/// What a figure counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Unit {
    /// Nanoseconds.
    Nanoseconds,
    /// Microseconds, of samples in nanoseconds.
    Microseconds,
    /// Milliseconds, of samples in nanoseconds.
    Milliseconds,
    /// KiB.
    Kibibytes,
    /// How many.
    Count,
    /// How often a second.
    PerSecond,
    /// How many for each.
    Each,
}

impl Unit {
    fn name(self) -> &'static str {
        match self {
            Self::Nanoseconds => "ns",
            Self::Microseconds => "us",
            Self::Milliseconds => "ms",
            Self::Kibibytes => "KiB",
            Self::Count => "",
            Self::PerSecond => "/s",
            Self::Each => "each",
        }
    }

    /// What a sample is divided by to be shown.
    fn scale(self) -> f64 {
        match self {
            Self::Microseconds => 1e3,
            Self::Milliseconds => 1e6,
            _ => 1.0,
        }
    }

    fn show(self, value: f64) -> String {
        let value = value / self.scale();
        match value {
            _ if value >= 100.0 => format!("{value:.0}"),
            _ if value >= 10.0 => format!("{value:.1}"),
            _ => format!("{value:.3}"),
        }
    }

    fn show_spread(self, spread: &Spread) -> String {
        let [median, min, max] = [spread.median, spread.min, spread.max].map(|v| self.show(v));
        format!("{median} ({min}..{max})")
    }
}

/// How large the ratio of our figure to the other may be, or has to be.
#[derive(Clone, Copy, Debug)]
pub(super) enum Goal {
    /// A time or a size: at most so many times the other's.
    AtMost(f64),
    /// A rate: at least so many times the other's.
    AtLeast(f64),
}

impl Goal {
    fn is_met(self, ratio: f64) -> bool {
        match self {
            Self::AtMost(limit) => ratio <= limit,
            Self::AtLeast(limit) => ratio >= limit,
        }
    }

    fn text(self) -> String {
        match self {
            Self::AtMost(limit) => format!("<= {limit}"),
            Self::AtLeast(limit) => format!(">= {limit}"),
        }
    }
}

/// Somebody else's figure, or a limit, beside ours.
#[derive(Clone, Debug)]
pub(super) struct Other {
    who: String,
    samples: Vec<f64>,
    goal: Goal,
}

/// A row.
#[derive(Clone, Debug)]
pub(crate) struct Row {
    /// Its name in the goals: A1 and so on.
    id: &'static str,
    what: String,
    unit: Unit,
    ours: Vec<f64>,
    others: Vec<Other>,
}

impl Row {
    /// Our samples.
    pub(super) fn new(id: &'static str, what: &str, unit: Unit, ours: Vec<f64>) -> Self {
        Self { id, what: what.to_owned(), unit, ours, others: Vec::new() }
    }

    /// Adds what they are held against; without samples, that it was not to be had.
    #[must_use]
    pub(super) fn beside(mut self, who: &str, samples: Vec<f64>, goal: Goal) -> Self {
        self.others.push(Other { who: who.to_owned(), samples, goal });
        self
    }

    /// Adds a fixed limit, in the unit of the samples.
    #[must_use]
    pub(super) fn fixed(self, who: &str, value: f64, goal: Goal) -> Self {
        self.beside(who, vec![value], goal)
    }
}

/// The ratio of medians, and that of the best samples: on a busy machine the second one is what the code is worth.
fn ratios(goal: Goal, ours: &Spread, other: &Spread) -> [f64; 2] {
    let best = match goal {
        Goal::AtMost(_) => ours.min / other.min,
        Goal::AtLeast(_) => ours.max / other.max,
    };
    [ours.median / other.median, best]
}

/// The table.
pub(crate) fn table(rows: &[Row]) -> String {
    let mut table = format!(
        "{:<4} {:<46} {:<6} {:>26}  {:<24} {:>26} {:>7} {:>7} {:>8}\n",
        "", "what", "unit", "Janus", "beside", "", "ratio", "(best)", "goal"
    );
    for row in rows {
        let ours = spread(&row.ours);
        let mut name = row.what.as_str();
        for other in &row.others {
            let theirs = spread(&other.samples);
            let (ratio, best, verdict) = match ours.zip(theirs) {
                Some((ours, theirs)) => {
                    let [ratio, best] = ratios(other.goal, &ours, &theirs);
                    let verdict = if other.goal.is_met(ratio) { "met" } else { "missed" };
                    (format!("{ratio:.3}"), format!("{best:.3}"), verdict)
                }
                None => ("-".to_owned(), "-".to_owned(), ""),
            };
            let show = |spread: Option<Spread>, none: &str| {
                spread.map_or_else(|| none.to_owned(), |spread| row.unit.show_spread(&spread))
            };
            table.push_str(&format!(
                "{:<4} {:<46} {:<6} {:>26}  {:<24} {:>26} {ratio:>7} {best:>7} {:>8} {verdict}\n",
                if name.is_empty() { "" } else { row.id },
                name,
                if name.is_empty() { "" } else { row.unit.name() },
                if name.is_empty() { String::new() } else { show(ours, "-") },
                other.who,
                show(theirs, "not given"),
                other.goal.text(),
            ));
            name = "";
        }
        if row.others.is_empty() {
            let shown = ours.map_or_else(|| "-".to_owned(), |ours| row.unit.show_spread(&ours));
            table.push_str(&format!(
                "{:<4} {:<46} {:<6} {shown:>26}\n",
                row.id,
                row.what,
                row.unit.name()
            ));
        }
    }
    table
}

/// The same as JSON, in the unit of the samples.
pub(crate) fn json(rows: &[Row]) -> Value {
    let rows: Vec<Value> = rows
        .iter()
        .map(|row| {
            let ours = spread(&row.ours);
            let others: Vec<Value> = row
                .others
                .iter()
                .map(|other| {
                    let theirs = spread(&other.samples);
                    let both = ours.zip(theirs);
                    let ratios = both.map(|(ours, theirs)| ratios(other.goal, &ours, &theirs));
                    json!({
                        "who": other.who, "figure": theirs, "goal": other.goal.text(),
                        "ratio": ratios.map(|[ratio, _]| ratio),
                        "ratio_of_best": ratios.map(|[_, best]| best),
                        "met": ratios.map(|[ratio, _]| other.goal.is_met(ratio)),
                    })
                })
                .collect();
            json!({
                "id": row.id, "what": row.what, "unit": row.unit.name(),
                "samples_per_unit": row.unit.scale(), "janus": ours, "beside": others,
            })
        })
        .collect();
    Value::Array(rows)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn goals_are_judged_by_the_median() {
        let rows = [
            Row::new("A1", "start", Unit::Milliseconds, vec![3e5, 1e5, 2e5])
                .beside("slow", vec![8e5, 4e5, 6e5], Goal::AtMost(0.4))
                .beside("absent", vec![], Goal::AtMost(1.0))
                .fixed("limit", 1e5, Goal::AtMost(1.5)),
            Row::new("A9", "reads", Unit::PerSecond, vec![150.0]).beside(
                "them",
                vec![100.0],
                Goal::AtLeast(1.2),
            ),
        ];
        let table = table(&rows);
        let lines: Vec<&str> = table.lines().collect();
        assert!(lines[1].contains("0.200 (0.100..0.300)") && lines[1].ends_with("<= 0.4 met"));
        assert!(lines[2].contains("not given") && lines[2].trim_end().ends_with("<= 1"));
        assert!(lines[3].contains("2.000") && lines[3].ends_with("<= 1.5 missed"), "{table}");
        assert!(lines[4].contains("1.500") && lines[4].ends_with(">= 1.2 met"), "{table}");
        let json = json(&rows);
        assert_eq!(json[0]["beside"][0]["met"], true);
        assert_eq!(json[0]["beside"][1]["met"], Value::Null);
        assert_eq!(json[0]["beside"][2]["ratio_of_best"], 1.0);
    }
}

//! How a test ended: a small lattice that only rises, so that no later success hides a failure.

use core::fmt;

use crate::power::code;

/// How a test ended, from harmless to worst.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Outcome {
    /// Everything was as it should be.
    Success,
    /// The test does not apply here (no such device, another platform).
    Skip,
    /// The test could not be carried out: its set-up is wrong, not the thing tested.
    Error,
    /// The thing tested is wrong.
    Failure,
    /// The kernel itself failed.
    Crash,
}

impl Outcome {
    /// The word in report lines.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Success => "success",
            Self::Skip => "skip",
            Self::Error => "error",
            Self::Failure => "failure",
            Self::Crash => "crash",
        }
    }

    /// The exit code of the machine.
    #[must_use]
    pub const fn code(self) -> u8 {
        match self {
            Self::Success => code::SUCCESS,
            Self::Skip => code::SKIP,
            Self::Error => code::ERROR,
            Self::Failure => code::FAILURE,
            Self::Crash => code::CRASH,
        }
    }

    /// Goes up to `other` if that is worse; never down.
    pub fn raise(&mut self, other: Self) {
        *self = (*self).max(other);
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_outcome_only_rises() {
        let order =
            [Outcome::Success, Outcome::Skip, Outcome::Error, Outcome::Failure, Outcome::Crash];
        for (i, &first) in order.iter().enumerate() {
            for (j, &second) in order.iter().enumerate() {
                let mut outcome = first;
                outcome.raise(second);
                assert_eq!(outcome, order[i.max(j)]);
            }
        }
    }
}

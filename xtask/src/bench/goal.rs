//! What a figure is wanted to be, and what came of it.

use std::fmt::{Display, Formatter, Result};

/// A bound.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Wanted {
    /// Not less.
    AtLeast(f64),
    /// Not more.
    AtMost(f64),
}

/// A figure or a ratio of two, beside what it should be. Shown as an item of a list.
#[derive(Debug, Clone, PartialEq)]
pub struct Goal {
    /// What it is of.
    pub what: String,
    /// What was measured.
    pub value: f64,
    /// What it should be.
    pub wanted: Wanted,
}

impl Goal {
    /// `value` should be `bound` at least.
    pub fn at_least(what: impl Into<String>, value: f64, bound: f64) -> Self {
        Self { what: what.into(), value, wanted: Wanted::AtLeast(bound) }
    }

    /// `value` should be `bound` at most.
    pub fn at_most(what: impl Into<String>, value: f64, bound: f64) -> Self {
        Self { what: what.into(), value, wanted: Wanted::AtMost(bound) }
    }

    /// Whether it is as wanted; never so if nothing was measured.
    pub fn is_met(&self) -> bool {
        match self.wanted {
            Wanted::AtLeast(bound) => self.value >= bound,
            Wanted::AtMost(bound) => self.value <= bound,
        }
    }
}

impl Display for Goal {
    fn fmt(&self, f: &mut Formatter<'_>) -> Result {
        let (side, bound) = match self.wanted {
            Wanted::AtLeast(bound) => ("at least", bound),
            Wanted::AtMost(bound) => ("at most", bound),
        };
        let verdict = if self.is_met() { "" } else { ": **missed**" };
        write!(f, "- {}: {:.2}, wanted {side} {bound}{verdict}", self.what, self.value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn missed_goal_says_so() {
        assert_eq!(Goal::at_least("a", 0.9, 0.8).to_string(), "- a: 0.90, wanted at least 0.8");
        assert_eq!(Goal::at_most("b", 11.0, 10.0).to_string(), "- b: 11.00, wanted at most 10: **missed**");
    }

    #[test]
    fn nothing_measured_meets_no_goal() {
        assert!(!Goal::at_least("a", f64::NAN, 0.0).is_met() && !Goal::at_most("a", f64::NAN, 1.0).is_met());
    }
}

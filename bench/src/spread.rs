//! What many measurements of one thing come to.

use std::fmt;
use std::time::Duration;

/// Sorted durations.
#[derive(Debug, Clone, Default)]
pub struct Spread(Vec<Duration>);

impl Spread {
    /// Of these measurements.
    pub fn of(measured: impl IntoIterator<Item = Duration>) -> Self {
        let mut sorted: Vec<_> = measured.into_iter().collect();
        sorted.sort_unstable();
        Self(sorted)
    }

    /// Whether nothing was measured.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The least measurement that so many percent of all do not exceed.
    #[must_use]
    pub fn percentile(&self, percent: usize) -> Duration {
        let rank = (self.0.len() * percent).div_ceil(100).max(1);
        self.0.get(rank - 1).copied().unwrap_or_default()
    }
}

/// With few measurements their range, with many the 99th percentile.
impl fmt::Display for Spread {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (median, least, most) = (self.percentile(50), self.percentile(0), self.percentile(100));
        if self.0.len() < 100 {
            write!(f, "{median:.1?} ({least:.1?} to {most:.1?}, {} times)", self.0.len())
        } else {
            write!(f, "{median:.2?}, p99 {:.2?}, at most {most:.2?} ({} times)", self.percentile(99), self.0.len())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_measurements() {
        let spread = Spread::of((1..=200).rev().map(Duration::from_millis));
        assert_eq!([0, 50, 99, 100].map(|percent| spread.percentile(percent).as_millis()), [1, 100, 198, 200]);
        assert_eq!(Spread::default().percentile(50), Duration::ZERO);
    }
}

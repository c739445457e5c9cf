//! Figures for people, at the end of a run and in between.

use super::contender::DIRECT;
use crate::results::{Samples, Series, median};

/// Three significant digits and more, for people.
pub(super) fn shown(value: f64) -> String {
    match value.abs() {
        size if size >= 1e9 => format!("{:.2}G", value / 1e9),
        size if size >= 1e6 => format!("{:.2}M", value / 1e6),
        size if size >= 1e4 => format!("{:.1}k", value / 1e3),
        size if size >= 100.0 => format!("{value:.0}"),
        _ => format!("{value:.2}"),
    }
}

/// Everything, each contender's ratio to direct traffic of the same round.
pub(super) fn table(samples: &Samples) -> String {
    let mut lines = vec![format!(
        "{:<66} {:<20} {:>9} {:<9} {:>6}  {:<13} {}",
        "WHAT", "WHO", "MEDIAN", "UNIT", "RATIO", "MIN..MAX", "ROUNDS"
    )];
    for series in &samples.series {
        let is_base =
            |base: &&Series| base.name == DIRECT && base.group == series.group && base.parameters == series.parameters;
        let base = samples.series.iter().find(is_base);
        let mut ratios = base.map(|base| series.ratios(base)).unwrap_or_default();
        ratios.sort_by(f64::total_cmp);
        let range = match (ratios.first(), ratios.last()) {
            (Some(least), Some(most)) => format!("{least:.3}..{most:.3}"),
            _ => String::new(),
        };
        let parameters: String = series.parameters.iter().map(|(name, value)| format!(" {name}={value}")).collect();
        lines.push(format!(
            "{:<66} {:<20} {:>9} {:<9} {:>6}  {range:<13} {}",
            format!("{}{parameters}", series.group),
            series.name,
            series.median().map_or("-".to_owned(), shown),
            series.unit,
            median(ratios).map_or("-".to_owned(), |ratio| format!("{ratio:.3}")),
            series.samples.iter().flatten().count(),
        ));
    }
    // Those to be compared stand together.
    lines[1..].sort_by_key(|line| line[..66].to_owned());
    lines.join("\n")
}

//! Which plots there are of a part.

use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result};

use super::figures::{Part, Ratio, count, distinct, parameter, row_name};
use crate::results::Series;

mod canvas;
mod growth;
mod ratios;

pub use growth::{Line, Panel, Point, Scale, growth};
pub use ratios::{Row, ratios};

/// Draws the plots of a part. Their titles and files.
///
/// # Errors
/// When a file cannot be written.
pub fn draw(part: &Part, folder: &Path) -> Result<Vec<(String, String)>> {
    let plots = match part.samples.part.as_str() {
        "packet_path" => packet_path(part)?,
        "control" => control(part)?,
        _ => traffic(part)?,
    };
    plots
        .into_iter()
        .map(|Drawn { title, name, svg }| {
            let words: Vec<_> = name.split(|c: char| !c.is_alphanumeric()).filter(|word| !word.is_empty()).collect();
            let file = format!("{}.svg", words.join("-").to_lowercase());
            let path = folder.join(&file);
            fs::write(&path, svg).with_context(|| format!("cannot write {}", path.display()))?;
            Ok((title, file))
        })
        .collect()
}

struct Drawn {
    title: String,
    /// Of the file: the same whatever the sizes.
    name: String,
    svg: String,
}

/// Growth over flows and over services, of packets that follow a flow and of those that open one.
fn packet_path(part: &Part) -> Result<Vec<Drawn>> {
    let panel = |group: &str, family: &str, along: &str, fixed: (&str, &str), title: String| {
        let of = |name: &str| {
            let is_of = |series: &&Series| {
                series.name == name
                    && parameter(series, "family") == Some(family)
                    && parameter(series, "protocol") == Some("TCP")
                    && parameter(series, fixed.0) == Some(fixed.1)
            };
            line(name, part.of(group).filter(is_of), along)
        };
        Panel { title, lines: ["viaduct", "floor"].map(of).into() }
    };
    let mut plots = Vec::new();
    for (group, what) in [("established", "An established packet"), ("first packet", "A first packet")] {
        for (along, fixed, told) in
            [("flows", ("services", "1000"), "1,000 services"), ("services", ("flows", "10000"), "10,000 flows")]
        {
            let panels: Vec<_> = ["IPv4", "IPv6"]
                .map(|family| panel(group, family, along, fixed, format!("{family}, TCP, {told}")))
                .into_iter()
                .filter(Panel::is_worth_drawing)
                .collect();
            if panels.is_empty() {
                continue;
            }
            let title = format!("{what} by {along}");
            let svg = growth(&title, &panels, along, &Scale::Linear("nanoseconds"))?;
            plots.push(Drawn { title, name: format!("{group} by {along}"), svg });
        }
    }
    Ok(plots)
}

/// A plot for each group over services, but for those that go into the details of another.
fn control(part: &Part) -> Result<Vec<Drawn>> {
    let mut plots = Vec::new();
    for group in part.groups().into_iter().filter(|group| !group.contains([':', ','])) {
        let lines = part
            .names(group)
            .into_iter()
            .map(|name| line(name, part.of(group).filter(|series| series.name == name), "services"));
        let unit = part.of(group).next().map_or("", |series| series.unit.as_str());
        let panel = Panel { title: String::new(), lines: lines.collect() };
        if panel.is_worth_drawing() {
            let title = format!("Control: {group}");
            let svg = growth(&title, &[panel], "services", &Scale::Logarithmic(unit))?;
            plots.push(Drawn { name: title.clone(), title, svg });
        }
    }
    Ok(plots)
}

fn line<'a>(name: &str, series: impl Iterator<Item = &'a Series>, along: &str) -> Line {
    let mut points: Vec<_> = series.filter_map(|series| point(series, along)).collect();
    points.sort_by(|one, other| one.x.total_cmp(&other.x));
    Line { name: name.to_owned(), points }
}

fn point(series: &Series, along: &str) -> Option<Point> {
    let x = parameter(series, along)?.parse().ok()?;
    let all = Ratio::of(series.samples.iter().flatten().copied().collect())?;
    Some(Point { x, median: all.median, least: all.least, most: all.most })
}

/// Ratios to direct traffic, with the most services: for each topology one plot of what is better when it is more, and one of the
/// rest.
fn traffic(part: &Part) -> Result<Vec<Drawn>> {
    let mut plots = Vec::new();
    let place = |series: &Series| {
        [parameter(series, "topology").unwrap_or_default(), parameter(series, "services").unwrap_or_default()]
            .map(str::to_owned)
    };
    let places = distinct(part.samples.series.iter().map(place));
    let size = |services: &str| services.parse::<u64>().unwrap_or_default();
    let most = places.iter().map(|[_, services]| size(services)).max();
    for [topology, services] in places.iter().filter(|[_, services]| Some(size(services)) == most) {
        for (more_is_better, what) in [(true, "Speed"), (false, "Cost")] {
            let here: Vec<_> = part
                .samples
                .series
                .iter()
                .filter(|series| place(series) == [topology.as_str(), services])
                .filter(|series| series.more_is_better == more_is_better && series.name != "direct")
                .collect();
            let rows = distinct(here.iter().map(|series| row_name(series)));
            let rows = rows.into_iter().map(|name| {
                let of = here.iter().filter(|series| row_name(series) == name);
                Row { points: of.filter_map(|series| Some((series.name.clone(), part.ratio(series)?))).collect(), name }
            });
            let rows: Vec<_> = rows.filter(|row| !row.points.is_empty()).collect();
            if rows.is_empty() {
                continue;
            }
            let services = count(services, "service");
            let title = format!("{what} as a ratio to direct, {}, {services}", topology.replace('-', " "));
            let better = if more_is_better { "more is better" } else { "less is better" };
            let svg = ratios(&title, better, &rows)?;
            plots.push(Drawn { title, name: format!("traffic {what} {topology}"), svg });
        }
    }
    Ok(plots)
}

#[cfg(test)]
mod tests {
    use super::canvas::{INK_TEXT, STYLE, short};
    use super::*;

    #[test]
    fn text_is_text_in_the_readers_colour_and_contenders_have_their_own() {
        let point = |x: f64| Point { x, median: 100.0 + x, least: 90.0, most: 2000.0 };
        let line = |name: &str| Line { name: name.to_owned(), points: [1.0, 1000.0].map(point).into() };
        let panel = Panel { title: "IPv4".to_owned(), lines: vec![line("viaduct"), line("floor")] };
        let ratio = Ratio { median: 0.95, least: 0.9, most: 1.1 };
        let row = Row { name: "connections".to_owned(), points: vec![("viaduct".to_owned(), ratio)] };
        for scale in [Scale::Linear("nanoseconds"), Scale::Logarithmic("ns")] {
            let svg = growth("By flows", std::slice::from_ref(&panel), "flows", &scale).unwrap();
            for told in ["By flows", "IPv4", "viaduct", "floor", "flows", "1k", "currentColor", "#2F81F7", STYLE] {
                assert!(svg.contains(told), "{told}");
            }
            assert!(!svg.contains(INK_TEXT));
        }
        let svg = ratios("Speed", "more is better", &[row]).unwrap();
        for told in ["Speed", "ratio to direct: more is better", "connections", "0.5", "#2F81F7", STYLE] {
            assert!(svg.contains(told), "{told}");
        }
    }

    #[test]
    fn figures_on_axes_are_short() {
        assert_eq!([0.0, 0.25, 150.0, 1200.0, 1e6].map(short), ["0", "0.25", "150", "1.2k", "1M"]);
        assert_eq!(Scale::Logarithmic("s").label(0.1), "100 ms");
        assert_eq!(Scale::Logarithmic("MiB").label(10.0), "10 MiB");
    }
}

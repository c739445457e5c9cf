//! The report as Markdown.

use std::fmt::Write as _;

use super::figures::{Part, Ratio, count, distinct, figure, number, parameter, row_name, sorted};
use crate::results::Series;

/// A fact longer than this stands below the table of facts.
const LONG: usize = 48;

/// The beginning: what was measured where.
#[must_use]
pub fn head(parts: &[Part]) -> String {
    let mut text = "# Figures of a run\n\nWritten by `cargo xtask bench`, not by hand. How they come about, and what floor and \
                    direct are: [performance.md](../performance.md). Read ratios first: they come from rounds in which all \
                    contenders took turns, and say more than the figures of one machine. Of each, the median of the rounds \
                    counts; where a range follows, it is that of the rounds.\n\n"
        .to_owned();
    let names: Vec<_> = parts.iter().map(|part| title(&part.samples.part)).collect();
    let _ = writeln!(text, "| | {} |\n|{}", names.join(" | "), " --- |".repeat(names.len() + 1));
    let facts = distinct(parts.iter().flat_map(|part| part.samples.facts.keys()));
    let value = |part: &Part, fact: &String| part.samples.facts.get(fact).cloned().unwrap_or_default();
    let is_long = |fact: &&&String| parts.iter().any(|part| value(part, fact).len() > LONG);
    for fact in facts.iter().filter(|fact| !is_long(fact)) {
        let values: Vec<_> = parts.iter().map(|part| value(part, fact)).collect();
        let _ = writeln!(text, "| {fact} | {} |", values.join(" | "));
    }
    text += "\n";
    for fact in facts.iter().filter(is_long) {
        for value in distinct(parts.iter().map(|part| value(part, fact))).iter().filter(|value| !value.is_empty()) {
            let _ = writeln!(text, "- **{fact}**: {value}");
        }
    }
    text
}

/// One part, with its plots.
#[must_use]
pub fn part(part: &Part, plots: &[(String, String)]) -> String {
    let mut text = format!("\n## {}\n\n", title(&part.samples.part));
    for (title, file) in plots {
        let _ = writeln!(text, "![{title}]({file})\n");
    }
    text += &match part.samples.part.as_str() {
        "packet_path" => packet_path(part),
        "control" => control(part),
        _ => traffic(part),
    };
    text
}

fn title(part: &str) -> String {
    match part {
        "packet_path" => "Packet path".to_owned(),
        other => other[..1].to_uppercase() + &other[1..],
    }
}

/// A table for each family and protocol by flows, and one by services.
fn packet_path(part: &Part) -> String {
    let mut text =
        "Nanoseconds of a program, the harness subtracted. In brackets the ratio to the floor; of packets that have \
                    none, in italics, the ratio to an established packet.\n"
            .to_owned();
    let kinds = distinct(part.samples.series.iter().map(|series| {
        (parameter(series, "family").unwrap_or_default(), parameter(series, "protocol").unwrap_or_default())
    }));
    for (family, protocol) in kinds {
        let of = |name: &str, value: &str| -> Vec<&Series> {
            let is_of = |series: &&Series| {
                parameter(series, "family") == Some(family)
                    && parameter(series, "protocol") == Some(protocol)
                    && parameter(series, name) == Some(value)
            };
            part.samples.series.iter().filter(is_of).collect()
        };
        for (fixed, value, along) in
            [("services", usual(part, "services"), "flows"), ("flows", usual(part, "flows"), "services")]
        {
            let table = of(fixed, &value);
            let columns = sorted(table.iter().filter_map(|series| parameter(series, along)));
            if columns.len() < 2 {
                continue;
            }
            let heads: Vec<_> = columns.iter().map(|column| count(column, "")).collect();
            let _ = writeln!(text, "\n### {family}, {protocol}, {}\n", count(&value, fixed.trim_end_matches('s')));
            let _ = writeln!(text, "| {along} | {} |\n| --- |{}", heads.join(" | "), " ---: |".repeat(columns.len()));
            for group in distinct(table.iter().map(|series| series.group.as_str())) {
                let cells = columns.iter().map(|column| {
                    let is_it = |series: &&&Series| {
                        series.group == group && series.name == "viaduct" && parameter(series, along) == Some(column)
                    };
                    table.iter().find(is_it).map_or_else(String::new, |series| cell(part, series))
                });
                let _ = writeln!(text, "| {group} | {} |", cells.collect::<Vec<_>>().join(" | "));
            }
        }
    }
    text
}

fn cell(part: &Part, series: &Series) -> String {
    let Some(median) = series.median() else { return String::new() };
    let ratio = match (part.ratio(series), part.base(series)) {
        (Some(ratio), Some(base)) if base.group == series.group => format!(" ({:.2})", ratio.median),
        (Some(ratio), _) => format!(" (*{:.2}*)", ratio.median),
        _ => String::new(),
    };
    format!("{}{ratio}", number(median))
}

/// The value of a parameter that most series have.
fn usual(part: &Part, name: &str) -> String {
    let values: Vec<_> = part.samples.series.iter().filter_map(|series| parameter(series, name)).collect();
    let most =
        distinct(values.iter()).into_iter().max_by_key(|value| values.iter().filter(|other| other == value).count());
    most.map_or_else(String::new, |value| (*value).to_owned())
}

/// A table for each topology and number of services: what direct traffic reaches, and the ratio of each contender to it.
fn traffic(part: &Part) -> String {
    let mut text =
        "*direct* is the figure of direct traffic, the rest are ratios to it, with the range of the rounds.\n"
            .to_owned();
    let place =
        |series: &Series| ["topology", "services"].map(|name| parameter(series, name).unwrap_or_default().to_owned());
    for here in distinct(part.samples.series.iter().map(place)) {
        let [topology, services] = &here;
        let _ = writeln!(text, "\n### {}, {}", topology.replace('-', " "), count(services, "service"));
        for (more_is_better, better) in [(true, "More is better"), (false, "Less is better")] {
            let is_here = |series: &&Series| place(series) == here && series.more_is_better == more_is_better;
            let table: Vec<_> = part.samples.series.iter().filter(is_here).collect();
            let contenders = distinct(table.iter().map(|series| series.name.as_str()));
            let _ = writeln!(text, "\n| {better} | {} |", contenders.join(" | "));
            let _ = writeln!(text, "| --- |{}", " ---: |".repeat(contenders.len()));
            for row in distinct(table.iter().map(|series| row_name(series))) {
                let cells = contenders.iter().map(|name| {
                    let found = table.iter().find(|series| row_name(series) == row && series.name == *name);
                    let told = |series: &&&Series| match part.ratio(series) {
                        Some(Ratio { median, least, most }) => Some(format!("{median:.2} ({least:.2} to {most:.2})")),
                        None => Some(figure(series.median()?, &series.unit)),
                    };
                    found.and_then(|series| told(&series)).unwrap_or_else(|| "-".to_owned())
                });
                let _ = writeln!(text, "| {row} | {} |", cells.collect::<Vec<_>>().join(" | "));
            }
        }
    }
    text
}

/// A table for each group: contenders, by services.
fn control(part: &Part) -> String {
    let mut text =
        "The median, with the range of the rounds; in bold, how many times that of Viaduct it is. Less is better.\n"
            .to_owned();
    for group in part.groups() {
        let columns = sorted(part.of(group).filter_map(|series| parameter(series, "services")));
        let heads: Vec<_> = columns.iter().map(|column| count(column, "service")).collect();
        let _ = writeln!(text, "\n| {group} | {} |\n| --- |{}", heads.join(" | "), " ---: |".repeat(columns.len()));
        for name in part.names(group) {
            let cells = columns.iter().map(|column| {
                let is_it = |series: &&Series| series.name == name && parameter(series, "services") == Some(column);
                let found = part.of(group).find(is_it).and_then(|series| {
                    let all = Ratio::of(series.samples.iter().flatten().copied().collect())?;
                    let [median, least, most] =
                        [all.median, all.least, all.most].map(|value| figure(value, &series.unit));
                    let range = if least == most { String::new() } else { format!(" ({least} to {most})") };
                    let times = part.ratio(series).map(|ratio| format!(", **{} ×**", number(ratio.median)));
                    Some(format!("{median}{range}{}", times.unwrap_or_default()))
                });
                found.unwrap_or_else(|| "-".to_owned())
            });
            let _ = writeln!(text, "| {name} | {} |", cells.collect::<Vec<_>>().join(" | "));
        }
    }
    text
}

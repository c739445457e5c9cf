//! Two kinds of plots, as SVG that is read on light and on dark ground: text and axes take the colour that the reader's
//! surroundings ask for, contenders have one each that is told from both.

#![expect(clippy::cast_possible_truncation, clippy::cast_possible_wrap, reason = "pixels")]

use std::ops::Range;

use anyhow::{Result, anyhow};
use plotters::chart::ChartContext;
use plotters::coord::Shift;
use plotters::coord::combinators::{BindKeyPoints as _, IntoLogRange as _, LogCoord, WithKeyPoints};
use plotters::coord::ranged1d::{Ranged, ValueFormatter};
use plotters::coord::types::RangedCoordf64;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use super::super::figures::{Ratio, distinct, figure};

/// Stands for the colour of text, and is replaced by it in the end.
const INK: RGBColor = RGBColor(1, 2, 3);
const INK_TEXT: &str = "#010203";
/// The colour of lines that only lead the eye.
const GRID: RGBColor = RGBColor(128, 128, 128);
const STYLE: &str = "<style>svg{color:#1f2328}text{font-family:system-ui,sans-serif}@media \
                     (prefers-color-scheme:dark){svg{color:#e6edf3}}</style>";
const WIDTH: u32 = 860;
const TITLE: u32 = 34;
const LEGEND: u32 = 26;

/// A figure at some size.
#[derive(Debug, Clone, Copy)]
pub struct Point {
    /// The size.
    pub x: f64,
    /// The figure.
    pub median: f64,
    /// The least of the rounds.
    pub least: f64,
    /// The most.
    pub most: f64,
}

/// How the figures of a contender grow.
pub struct Line {
    /// The contender.
    pub name: String,
    /// In the order of size.
    pub points: Vec<Point>,
}

/// Lines in one frame.
pub struct Panel {
    /// What it is about.
    pub title: String,
    /// The lines.
    pub lines: Vec<Line>,
}

/// What contenders reach in one thing.
pub struct Row {
    /// The thing.
    pub name: String,
    /// Contenders and their ratios.
    pub points: Vec<(String, Ratio)>,
}

/// The axis of figures.
pub enum Scale<'a> {
    /// From 0 on, with what the numbers are.
    Linear(&'a str),
    /// Of figures in this unit.
    Logarithmic(&'a str),
}

impl Scale<'_> {
    fn label(&self, value: f64) -> String {
        match self {
            Self::Linear(_) => short(value),
            Self::Logarithmic(unit) => {
                let told = figure(value, unit);
                let (number, unit) = told.split_once(' ').unwrap_or((&told, ""));
                format!("{} {unit}", trimmed(number))
            }
        }
    }
}

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

impl Panel {
    /// Whether any line has two points.
    #[must_use]
    pub fn is_worth_drawing(&self) -> bool {
        self.lines.iter().any(|line| line.points.len() > 1)
    }

    fn points(&self) -> impl Iterator<Item = &Point> {
        self.lines.iter().flat_map(|line| &line.points)
    }
}

/// Panels side by side: figures over sizes, whose axis is logarithmic.
///
/// # Errors
/// When it cannot be drawn.
pub fn growth(title: &str, panels: &[Panel], x: &str, scale: &Scale<'_>) -> Result<String> {
    svg(title, 360, |area| {
        let names = distinct(
            panels
                .iter()
                .flat_map(|panel| panel.lines.iter().filter(|line| !line.points.is_empty()))
                .map(|line| line.name.as_str()),
        );
        legend(area, &names)?;
        let below = area.margin(LEGEND, 0, 0, 0);
        let most = panels.iter().flat_map(Panel::points).map(|point| point.most).fold(0.0, f64::max);
        let least = panels.iter().flat_map(Panel::points).map(|point| point.least).fold(f64::MAX, f64::min);
        for (panel, area) in panels.iter().zip(below.split_evenly((1, panels.len()))) {
            let sizes = panel
                .points()
                .fold(f64::MAX..0.0, |range: Range<f64>, point| range.start.min(point.x)..range.end.max(point.x));
            let sizes = sizes.start / 1.3..sizes.end * 1.3;
            let mut builder = ChartBuilder::on(&area);
            builder.margin(8).margin_right(18).x_label_area_size(42).y_label_area_size(62);
            if !panel.title.is_empty() {
                builder.caption(&panel.title, text(14));
            }
            let sizes = sizes.log_scale();
            let ticks = distinct(panel.points().map(|point| point.x));
            let sizes = sizes.with_key_points(ticks);
            if matches!(scale, Scale::Logarithmic(_)) {
                let figures = (least / 1.5..most * 1.5).log_scale();
                lines(builder.build_cartesian_2d(sizes, figures).map_err(failed)?, panel, x, scale)?;
            } else {
                lines(builder.build_cartesian_2d(sizes, 0.0..most * 1.08).map_err(failed)?, panel, x, scale)?;
            }
        }
        Ok(())
    })
}

type Chart<'a, 'b, Y> = ChartContext<'a, SVGBackend<'b>, Cartesian2d<WithKeyPoints<LogCoord<f64>>, Y>>;

fn lines<Y>(mut chart: Chart<'_, '_, Y>, panel: &Panel, x: &str, scale: &Scale<'_>) -> Result<()>
where
    Y: Ranged<ValueType = f64> + ValueFormatter<f64>,
{
    chart
        .configure_mesh()
        .disable_x_mesh()
        .bold_line_style(GRID.mix(0.3))
        .light_line_style(TRANSPARENT)
        .axis_style(GRID)
        .label_style(text(12))
        .axis_desc_style(text(13))
        .x_desc(x)
        .y_desc(if let Scale::Linear(name) = scale { name } else { "" })
        .x_label_formatter(&|value| short(*value))
        .y_label_formatter(&|value| scale.label(*value))
        .draw()
        .map_err(failed)?;
    for line in &panel.lines {
        let color = color(&line.name);
        for point in &line.points {
            let range = [(point.x, point.least), (point.x, point.most)];
            chart.plotting_area().draw(&PathElement::new(range, color.mix(0.55).stroke_width(2))).map_err(failed)?;
        }
        let medians: Vec<_> = line.points.iter().map(|point| (point.x, point.median)).collect();
        chart.draw_series(LineSeries::new(medians.iter().copied(), color.stroke_width(2))).map_err(failed)?;
        chart.draw_series(medians.iter().map(|&at| Circle::new(at, 4, color.filled()))).map_err(failed)?;
    }
    Ok(())
}

/// A row for each thing: the ratio of each contender, with the range of the rounds.
///
/// # Errors
/// When it cannot be drawn.
pub fn ratios(title: &str, better: &str, rows: &[Row]) -> Result<String> {
    const NAMES: u32 = 230;
    let names = distinct(rows.iter().flat_map(|row| &row.points).map(|(name, _)| name.as_str()));
    let contender = 13;
    let height = |row: &Row| 22 + contender * row.points.len().max(1) as u32;
    let all: u32 = rows.iter().map(height).sum();
    let most = rows.iter().flat_map(|row| &row.points).map(|(_, ratio)| ratio.most).fold(1.0, f64::max);
    svg(title, TITLE + LEGEND + all + 56, |area| {
        legend(area, &names)?;
        let (width, _) = area.dim_in_pixel();
        let right = width - 24;
        let axis = RangedCoordf64::from(0.0..most * 1.05);
        let at = |ratio: f64| axis.map(&ratio, (NAMES as i32, right as i32));
        let bottom = (LEGEND + all + 8) as i32;
        let top = LEGEND as i32 + 4;
        for tick in axis.key_points(9) {
            let style = GRID.mix(if (tick - 1.0).abs() < 1e-9 { 0.9 } else { 0.3 });
            area.draw(&PathElement::new([(at(tick), top), (at(tick), bottom)], style)).map_err(failed)?;
            let label = text(12).pos(Pos::new(HPos::Center, VPos::Top));
            area.draw(&Text::new(short(tick), (at(tick), bottom + 6), label)).map_err(failed)?;
        }
        let label = text(13).pos(Pos::new(HPos::Center, VPos::Top));
        let middle = (NAMES + right) as i32 / 2;
        area.draw(&Text::new(format!("ratio to direct: {better}"), (middle, bottom + 24), label)).map_err(failed)?;
        let mut y = top + 4;
        for row in rows {
            let height = height(row) as i32;
            let style = text(13).pos(Pos::new(HPos::Right, VPos::Center));
            area.draw(&Text::new(row.name.clone(), (NAMES as i32 - 10, y + height / 2), style)).map_err(failed)?;
            let between = [(10, y + height - 2), (right as i32, y + height - 2)];
            area.draw(&PathElement::new(between, GRID.mix(0.2))).map_err(failed)?;
            for ((name, ratio), index) in row.points.iter().zip(0..) {
                let y = y + 10 + index * contender as i32 + contender as i32 / 2;
                let color = color(name);
                let range = [(at(ratio.least), y), (at(ratio.most), y)];
                area.draw(&PathElement::new(range, color.mix(0.55).stroke_width(3))).map_err(failed)?;
                area.draw(&Circle::new((at(ratio.median), y), 4, color.filled())).map_err(failed)?;
            }
            y += height;
        }
        Ok(())
    })
}

fn svg(title: &str, height: u32, draw: impl FnOnce(&Area<'_>) -> Result<()>) -> Result<String> {
    let mut svg = String::new();
    {
        let area = SVGBackend::with_string(&mut svg, (WIDTH, height)).into_drawing_area();
        let heading = text(18).pos(Pos::new(HPos::Left, VPos::Top));
        area.draw(&Text::new(title, (12, 8), heading)).map_err(failed)?;
        draw(&area.margin(TITLE, 0, 0, 0))?;
        area.present().map_err(failed)?;
    }
    let svg = svg.replace(INK_TEXT, "currentColor");
    let (tag, rest) = svg.split_once(">\n").ok_or_else(|| anyhow!("an SVG without a tag"))?;
    Ok(format!("{tag}>\n{STYLE}\n{rest}"))
}

/// The contenders, each beside its colour.
fn legend(area: &Area<'_>, names: &[&str]) -> Result<()> {
    let mut x = 16;
    for name in names {
        area.draw(&Circle::new((x, 9), 5, color(name).filled())).map_err(failed)?;
        let style = text(13).pos(Pos::new(HPos::Left, VPos::Center));
        area.draw(&Text::new((*name).to_owned(), (x + 11, 9), style)).map_err(failed)?;
        x += 36 + 7 * name.len() as i32;
    }
    Ok(())
}

fn text<'a>(size: u32) -> TextStyle<'a> {
    ("sans-serif", size).into_font().color(&INK)
}

/// The same for one contender everywhere.
fn color(name: &str) -> RGBColor {
    match name {
        "viaduct" => RGBColor(0x2f, 0x81, 0xf7),
        "viaduct-bypass" => RGBColor(0xa3, 0x71, 0xf7),
        "floor" | "direct" => RGBColor(0x8b, 0x94, 0x9e),
        "nftables" => RGBColor(0x2d, 0xa4, 0x4e),
        "iptables-nft" => RGBColor(0xdb, 0x6d, 0x28),
        "iptables-legacy" => RGBColor(0xbf, 0x87, 0x00),
        "ovs" => RGBColor(0x1b, 0x9e, 0xa8),
        name if name.contains("nftables") => RGBColor(0x7c, 0xc2, 0x5a),
        name if name.starts_with("kube-proxy") => RGBColor(0xe5, 0x53, 0x4b),
        _ => RGBColor(0xdb, 0x61, 0xa2),
    }
}

/// As short as an axis wants it.
fn short(value: f64) -> String {
    let (value, unit) = match value {
        value if value >= 1e6 => (value / 1e6, "M"),
        value if value >= 1e3 => (value / 1e3, "k"),
        value => (value, ""),
    };
    format!("{}{unit}", trimmed(&format!("{value:.2}")))
}

/// Without zeros that say nothing.
fn trimmed(number: &str) -> &str {
    if number.contains('.') { number.trim_end_matches('0').trim_end_matches('.') } else { number }
}

fn failed(error: impl std::fmt::Display) -> anyhow::Error {
    anyhow!("cannot draw: {error}")
}

#[cfg(test)]
mod tests {
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

//! Figures over sizes.

use std::ops::Range;

use anyhow::Result;
use plotters::chart::ChartContext;
use plotters::coord::combinators::{BindKeyPoints as _, IntoLogRange as _, LogCoord, WithKeyPoints};
use plotters::coord::ranged1d::{Ranged, ValueFormatter};
use plotters::prelude::*;

use super::super::figures::{distinct, figure};
use super::canvas::{GRID, LEGEND, color, failed, legend, short, svg, text, trimmed};

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

/// The axis of figures.
pub enum Scale<'a> {
    /// From 0 on, with what the numbers are.
    Linear(&'a str),
    /// Of figures in this unit.
    Logarithmic(&'a str),
}

impl Scale<'_> {
    pub(super) fn label(&self, value: f64) -> String {
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

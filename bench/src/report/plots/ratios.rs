//! What contenders reach, as ratios.

#![expect(clippy::cast_possible_truncation, clippy::cast_possible_wrap, reason = "pixels")]

use anyhow::Result;
use plotters::coord::ranged1d::Ranged as _;
use plotters::coord::types::RangedCoordf64;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use super::super::figures::{Ratio, distinct};
use super::canvas::{GRID, LEGEND, TITLE, color, failed, legend, short, svg, text};

/// What contenders reach in one thing.
pub struct Row {
    /// The thing.
    pub name: String,
    /// Contenders and their ratios.
    pub points: Vec<(String, Ratio)>,
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

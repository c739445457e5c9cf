//! What all plots share: SVG that is read on light and on dark ground. Text and axes take the colour that the reader's surroundings
//! ask for, contenders have one each that is told from both.

#![expect(clippy::cast_possible_truncation, clippy::cast_possible_wrap, reason = "pixels")]

use anyhow::{Result, anyhow};
use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

/// Stands for the colour of text, and is replaced by it in the end.
const INK: RGBColor = RGBColor(1, 2, 3);
/// The same as it is written.
pub(super) const INK_TEXT: &str = "#010203";
/// The colour of lines that only lead the eye.
pub(super) const GRID: RGBColor = RGBColor(128, 128, 128);
/// What makes [`INK`] the colour of text.
pub(super) const STYLE: &str = "<style>svg{color:#1f2328}text{font-family:system-ui,sans-serif}@media \
                     (prefers-color-scheme:dark){svg{color:#e6edf3}}</style>";
const WIDTH: u32 = 860;
/// Height of the title, pixels.
pub(super) const TITLE: u32 = 34;
/// Height of the legend, pixels.
pub(super) const LEGEND: u32 = 26;

pub(super) type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

pub(super) fn svg(title: &str, height: u32, draw: impl FnOnce(&Area<'_>) -> Result<()>) -> Result<String> {
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
pub(super) fn legend(area: &Area<'_>, names: &[&str]) -> Result<()> {
    let mut x = 16;
    for name in names {
        area.draw(&Circle::new((x, 9), 5, color(name).filled())).map_err(failed)?;
        let style = text(13).pos(Pos::new(HPos::Left, VPos::Center));
        area.draw(&Text::new((*name).to_owned(), (x + 11, 9), style)).map_err(failed)?;
        x += 36 + 7 * name.len() as i32;
    }
    Ok(())
}

pub(super) fn text<'a>(size: u32) -> TextStyle<'a> {
    ("sans-serif", size).into_font().color(&INK)
}

/// The same for one contender everywhere.
pub(super) fn color(name: &str) -> RGBColor {
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
pub(super) fn short(value: f64) -> String {
    let (value, unit) = match value {
        value if value >= 1e6 => (value / 1e6, "M"),
        value if value >= 1e3 => (value / 1e3, "k"),
        value => (value, ""),
    };
    format!("{}{unit}", trimmed(&format!("{value:.2}")))
}

/// Without zeros that say nothing.
pub(super) fn trimmed(number: &str) -> &str {
    if number.contains('.') { number.trim_end_matches('0').trim_end_matches('.') } else { number }
}

pub(super) fn failed(error: impl std::fmt::Display) -> anyhow::Error {
    anyhow!("cannot draw: {error}")
}

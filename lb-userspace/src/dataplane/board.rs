//! What stands in an agent's way, for `viaduct status`: in a pinned map, since nothing else leads from the command line to an
//! agent wherever both are.

use std::time::Duration;

use anyhow::{Context, Result};
use aya::maps::{Array, MapData};
use serde::{Deserialize, Serialize};

use super::maps::{array, array_or_new};
use super::{Pins, clock};

const PIN: &str = "PROBLEMS";
/// Bytes of JSON, and how many problems are told. The log tells all.
const SIZE: usize = 16_384;
const MOST: usize = 50;
/// How many reasons why packets stay in the stack.
const MOST_REASONS: usize = 5;

/// The map that an agent writes to.
pub struct Board {
    map: Array<MapData, [u8; SIZE]>,
}

/// What is told.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Notice {
    /// How many problems stand.
    pub count: usize,
    /// The first of them.
    pub problems: Vec<Standing>,
    /// Why packets stay in the stack that could go past it, the first of these reasons.
    #[serde(default)]
    pub in_stack: Vec<String>,
}

/// A problem that stands.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Standing {
    /// Since when, by [`clock`].
    pub since: Duration,
    /// What it is, in one line.
    pub problem: String,
}

impl Board {
    /// The map of the datapath. What an agent before has told is nobody's any more.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn open(pins: &Pins) -> Result<Self> {
        let mut board = Self { map: array_or_new(pins, PIN, 1)? };
        board.show(Vec::new(), Vec::new())?;
        Ok(board)
    }

    /// Tells what stands now.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn show(&mut self, mut problems: Vec<Standing>, mut in_stack: Vec<String>) -> Result<()> {
        let count = problems.len();
        problems.truncate(MOST);
        in_stack.truncate(MOST_REASONS);
        let mut notice = Notice { count, problems, in_stack };
        let mut json = serde_json::to_vec(&notice)?;
        while json.len() > SIZE && notice.problems.pop().is_some() {
            json = serde_json::to_vec(&notice)?;
        }
        let mut bytes = [0; SIZE];
        bytes[..json.len()].copy_from_slice(&json);
        self.map.set(0, bytes, 0).with_context(|| format!("cannot write to {PIN}"))
    }
}

impl Notice {
    /// What the agent told last, if it is one that tells.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn read(pins: &Pins) -> Result<Self> {
        let Some(map) = array::<[u8; SIZE]>(pins, PIN)? else { return Ok(Self::default()) };
        let bytes = map.get(&0, 0).with_context(|| format!("cannot read {PIN}"))?;
        let json = bytes.split(|&byte| byte == 0).next().unwrap_or_default();
        // Empty before an agent has told anything, and torn in the moment that it does.
        Ok(serde_json::from_slice(json).unwrap_or_default())
    }
}

impl Standing {
    /// For how long.
    #[must_use]
    pub fn age(&self) -> Duration {
        clock::now().unwrap_or_default().saturating_sub(self.since)
    }
}

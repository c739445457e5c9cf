//! What is promised, in one place.

use std::fmt::Display;
use std::time::Duration;

/// What a client may count on.
pub(crate) struct Promise(&'static str);

/// Of the flow tables being lost.
pub(crate) const LOST_STATE: Promise = Promise("no connection breaks while the flow tables are flushed every second");
/// Of agents that are killed.
pub(crate) const RESTARTS: Promise =
    Promise("no connection breaks and no packet is lost while agents are killed, upgraded and downgraded");
/// Of a node that goes silent.
pub(crate) const SILENT_NODE: Promise =
    Promise("a silent node costs new connections one retransmission, and a moment later nothing");
/// Of floods.
pub(crate) const FLOOD: Promise =
    Promise("a flood of one service breaks no connection of another, and new ones succeed");
/// Of a long life.
pub(crate) const LIFE: Promise = Promise("after a long life the maps equal a fresh agent's, and nothing has leaked");

/// The longest time for a connection to open that meets a silent node first: Linux sends a SYN again after a second.
pub(crate) const ONE_RETRANSMISSION: Duration = Duration::from_millis(1100);
/// How long new connections may notice that a node is silent.
pub(crate) const UNTIL_NOBODY_NOTICES: Duration = Duration::from_secs(3);
/// How long it may take until a node that is back gets new connections.
pub(crate) const UNTIL_BACK: Duration = Duration::from_secs(5);
/// What an agent's memory may grow by in a long life, beyond that of a fresh one: what the allocator keeps.
pub(crate) const MEMORY: f64 = 8e6;

impl Promise {
    /// Prints what was found; fails if that is not what is promised.
    pub(crate) fn check(&self, is_good: bool, found: impl Display) {
        println!("{}: {}\n  {found}", if is_good { "yes" } else { "NO" }, self.0);
        assert!(is_good, "{}: {found}", self.0);
    }
}

/// How many times longer than by default a test takes.
pub(crate) fn factor() -> u32 {
    let factor = std::env::var("VIADUCT_RELIABILITY_FACTOR").map(|text| text.parse::<u32>());
    factor.map_or(1, |factor| factor.expect("VIADUCT_RELIABILITY_FACTOR is a whole number"))
}

/// The seed of what is random, printed.
pub(crate) fn seed() -> u64 {
    let seed = std::env::var("VIADUCT_RELIABILITY_SEED").map(|text| text.parse::<u64>());
    let seed =
        seed.map_or_else(|_| fastrand::u64(..), |seed| seed.expect("VIADUCT_RELIABILITY_SEED is a whole number"));
    println!("VIADUCT_RELIABILITY_SEED={seed}");
    seed
}

//! Nothing breaks a connection: the promises of docs/reliability.md, each shown with traffic that is counted at both ends.
//!
//! They are long: by default as long as it takes to see something, and by `VIADUCT_RELIABILITY_FACTOR` so many times longer.
//! What is random follows from a seed that is printed, and that `VIADUCT_RELIABILITY_SEED` sets.

#![cfg(test)]

mod cluster;
mod flood;
mod life;
mod lost_state;
mod promises;
mod restarts;
mod silence;

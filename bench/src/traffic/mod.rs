//! Traffic through a service, side by side with what users would pick instead.
//!
//! - [`contender`]: who is compared;
//! - [`bed`]: the lab of each, which stays up for the whole run;
//! - [`load`], [`server`]: what clients send and pods answer;
//! - [`rounds`]: the order of things, and what is kept of them.
//!
//! Speeds are only compared within a round, in which the contenders have their turns one right after the other.

mod batch;
pub mod bed;
pub mod contender;
pub mod load;
mod ovs;
mod processor;
pub mod rounds;
pub mod server;

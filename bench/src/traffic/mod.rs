//! Traffic through a service, side by side with what users would pick instead.
//!
//! - [`contender`]: who is compared;
//! - [`bed`], [`serving`]: the lab of each, which stays up for the whole run, and what is started there;
//! - [`load`], [`server`]: what clients send and pods answer;
//! - [`rounds`]: the order of things; `measurement`, `method`, `table`: what is kept of them, and what a reader must know.
//!
//! Speeds are only compared within a round, in which the contenders have their turns one right after the other.

mod batch;
pub mod bed;
pub mod contender;
pub mod load;
mod measurement;
mod method;
mod ovs;
mod processor;
pub mod rounds;
pub mod server;
pub mod serving;
mod table;

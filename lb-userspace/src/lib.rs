//! The agent and the command line of Viaduct.

pub mod maglev;
pub mod model;
pub mod plan;
pub mod source;

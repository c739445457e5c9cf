//! The agent and the command line of Viaduct.
//!
//! ```text
//! source -> model -> plan -> state -> dataplane
//!           \____ pure ______________/   maps, programs, links
//! ```
//!
//! [`agent`] is the loop that drives them; [`cli`] reads the pinned maps, with or without an agent.

pub mod agent;
pub mod cli;
pub mod config;
pub mod dataplane;
pub mod host_routing;
pub mod interfaces;
pub mod maglev;
pub mod model;
mod netlink;
pub mod observe;
pub mod plan;
pub mod source;
pub mod state;

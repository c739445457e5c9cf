//! How others see the agent: health for kubelet and load balancers, metrics for Prometheus.
//!
//! The agent's loop tells [`Health`] and [`Metrics`] what it does; [`serve`] answers from them on tokio's worker, so that
//! they are heard while a large sync runs on the main thread. Names and meanings are kube-proxy's wherever it has one.

mod health;
mod kernel;
mod metrics;
mod rest;
pub mod serve;

pub use health::Health;
pub use metrics::{Metrics, SyncKind, TrafficPolicy};
pub use rest::{Counted, RestMetrics};

use crate::model::Family;

/// The name that Kubernetes gives an IP family.
const fn family_name(family: Family) -> &'static str {
    match family {
        Family::V4 => "IPv4",
        Family::V6 => "IPv6",
    }
}

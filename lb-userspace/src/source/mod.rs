//! Where Services and EndpointSlices come from.

pub mod convert;
pub mod manifests;

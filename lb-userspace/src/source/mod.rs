//! Where Services and EndpointSlices come from. Each source delivers objects of the model.

pub mod convert;
pub mod kube;
pub mod manifests;

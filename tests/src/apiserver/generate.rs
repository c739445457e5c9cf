//! Clusters of any size, for benchmarks.

use std::net::{IpAddr, Ipv4Addr};

use serde_json::Value;

use crate::manifests::{Endpoint, EndpointSliceManifest, Manifest, Protocol, ServiceManifest};

/// `services` Services with an address of 10.96.0.0/12 each, and an EndpointSlice of `endpoints` for each.
pub fn cluster(services: u32, endpoints: u32) -> impl Iterator<Item = Value> {
    (0..services).flat_map(move |number| {
        let service = ServiceManifest::new("default", &name(number));
        let service = service.cluster_ip(&address([10, 96, 0, 0], number + 1).to_string());
        let service = service.port("http", Protocol::Tcp, 80);
        [service.object().clone(), endpoint_slice(number, endpoints, true).object().clone()]
    })
}

/// The EndpointSlice of the `number`th Service of a [`cluster`], with endpoints in 10.128.0.0/9 on 16 nodes, of which the
/// first may be unready: a change to make again and again.
#[must_use]
pub fn endpoint_slice(number: u32, endpoints: u32, first_is_ready: bool) -> EndpointSliceManifest {
    let slice = EndpointSliceManifest::new("default", &name(number)).port("http", Protocol::Tcp, 8080);
    (0..endpoints).fold(slice, |slice, index| {
        let ready = index > 0 || first_is_ready;
        let endpoint = Endpoint::at(address([10, 128, 0, 0], number * endpoints + index + 1));
        let endpoint = endpoint.conditions(ready, ready, false).set("/nodeName", format!("node{}", index % 16 + 1));
        slice.endpoint(endpoint)
    })
}

fn name(number: u32) -> String {
    format!("svc-{number:06}")
}

fn address(network: [u8; 4], number: u32) -> IpAddr {
    Ipv4Addr::from_bits(Ipv4Addr::from(network).to_bits() + number).into()
}

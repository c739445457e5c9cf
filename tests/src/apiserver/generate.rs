//! Clusters of any size, for benchmarks.

use std::net::{IpAddr, Ipv4Addr};

use serde_json::Value;

use crate::manifests::{Endpoint, EndpointSliceManifest, Manifest, Protocol, ServiceManifest};

/// `services` Services with an address of 10.96.0.0/12 each, and an EndpointSlice of `endpoints` for each, in 10.128.0.0/9.
pub fn cluster(services: u32, endpoints: u32) -> impl Iterator<Item = Value> {
    (0..services).flat_map(move |number| {
        let name = format!("svc-{number:06}");
        let service = ServiceManifest::new("default", &name);
        let service = service.cluster_ip(&address([10, 96, 0, 0], number + 1).to_string());
        let service = service.port("http", Protocol::Tcp, 80);
        let slice = EndpointSliceManifest::new("default", &name).port("http", Protocol::Tcp, 8080);
        let slice = (0..endpoints).fold(slice, |slice, index| {
            let node = format!("node{}", index % 16 + 1);
            slice
                .endpoint(Endpoint::at(address([10, 128, 0, 0], number * endpoints + index + 1)).set("/nodeName", node))
        });
        [service.object().clone(), slice.object().clone()]
    })
}

fn address(network: [u8; 4], number: u32) -> IpAddr {
    Ipv4Addr::from_bits(Ipv4Addr::from(network).to_bits() + number).into()
}

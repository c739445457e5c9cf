//! What programs at sockets cost a system call, by a UDP socket of a node, since those calls do next to nothing else: without an
//! agent, with one to an address that is no service's, and to a service. Needs root.

use std::net::{SocketAddr, UdpSocket};

use anyhow::Result;
use viaduct_tests::Protocol::Udp;
use viaduct_tests::{EndpointSliceManifest, Lab, ServiceManifest, Topology};

fn main() -> Result<()> {
    if !viaduct_bench::may_use_kernel("sockets") {
        return Ok(());
    }
    let lab = Lab::builder().node("node1", Topology::Routed, ["backend"]).pcap(false).build()?;
    lab.manifests().apply(&ServiceManifest::new("default", "dns").cluster_ip("10.96.0.53").port("dns", Udp, 53))?;
    let slice = EndpointSliceManifest::new("default", "dns").port("dns", Udp, 5353).pods([lab.pod("backend")]);
    lab.manifests().apply(&slice)?;
    let backend = SocketAddr::new(lab.pod("backend").address(), 5353);
    let service: SocketAddr = "10.96.0.53:53".parse()?;
    // Somebody who takes datagrams, so that none comes back as an error.
    let _sink = lab.pod("backend").namespace().run(|| UdpSocket::bind(backend))?;
    let socket = lab.node("node1").namespace().run(|| UdpSocket::bind("0.0.0.0:0"))?;

    let mut criterion = viaduct_bench::criterion();
    let mut measure = |name: &str, to: SocketAddr| {
        criterion.bench_function(&format!("sockets/connect/{name}"), |bench| bench.iter(|| socket.connect(to)));
        let unconnected = lab.node("node1").namespace().run(|| UdpSocket::bind("0.0.0.0:0"));
        let unconnected = unconnected.unwrap_or_else(|error| panic!("{error}"));
        criterion
            .bench_function(&format!("sockets/sendto/{name}"), |bench| bench.iter(|| unconnected.send_to(b"x", to)));
    };
    measure("without-agent", backend);
    lab.node("node1").start_agent()?;
    measure("no-service", backend);
    measure("service", service);
    criterion.final_summary();
    Ok(())
}

//! What makes a contender serve: a service of two ports, one for each place, among services of other people.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::Path;
use std::thread;

use anyhow::{Context as _, Result};
use nix::unistd::Pid;
use viaduct_tests::Protocol::{Tcp, Udp};
use viaduct_tests::manifests::Manifest as _;
use viaduct_tests::traffic::{KubeProxy, KubeProxyMode, KubeProxyService};
use viaduct_tests::{EndpointSliceManifest, ServiceManifest, apiserver};

use super::bed::{Bed, PORT, Place, Process, VIP};
use super::ovs;
use crate::kube_proxy;

impl Bed {
    fn endpoint(&self, place: Place) -> SocketAddr {
        SocketAddr::new(self.lab.pod(if place == Place::OneNode { "near" } else { "far" }).address(), PORT)
    }

    fn fill_api(&self, services: u32) -> Result<()> {
        let api = self.lab.api();
        api.fill(apiserver::cluster(services.saturating_sub(1), 1))?;
        let mut service = ServiceManifest::new("bench", "ours").cluster_ip(&VIP.to_string());
        for place in Place::ALL {
            let mut slice = EndpointSliceManifest::new("bench", "ours")
                .set("/metadata/name", format!("ours-{}", place.name()))
                .pods([self.lab.pod(if place == Place::OneNode { "near" } else { "far" })]);
            for protocol in [Tcp, Udp] {
                let port = format!("{}-{}", place.name(), if protocol == Tcp { "tcp" } else { "udp" });
                service = service.port(&port, protocol, place.service_port());
                slice = slice.port(&port, protocol, PORT);
            }
            api.apply_value(slice.object().clone())?;
        }
        api.apply(&service)
    }

    pub(super) fn start_agents(&mut self, services: u32, arguments: &[&str]) -> Result<()> {
        self.fill_api(services)?;
        let root = self.cgroup.as_ref().context("an agent has a cgroup")?.path();
        // The default size of the flow table of a machine like this, which labs have smaller.
        let arguments = [&["--max-flows", "262144", "--cgroup-root", root], arguments].concat();
        for node in self.lab.nodes() {
            let agent = node.start_agent_with(&arguments)?;
            self.processes.push(Process { pid: Pid::from_raw(i32::try_from(agent.pid())?), child: None });
        }
        Ok(())
    }

    /// All services, as kube-proxy knows them.
    fn services(&self, services: u32) -> Vec<KubeProxyService> {
        let mut all: Vec<_> = generated(services.saturating_sub(1), 1).collect();
        let ours = Place::ALL.into_iter().flat_map(|place| {
            [Tcp, Udp].map(|protocol| KubeProxyService {
                vip: SocketAddr::new(VIP.into(), place.service_port()),
                protocol,
                endpoints: vec![self.endpoint(place)],
            })
        });
        // In a list that is gone through from its beginning, they are neither first nor last.
        all.splice(all.len() / 2..all.len() / 2, ours);
        all
    }

    pub(super) fn write_rules(&self, mode: KubeProxyMode, services: u32) -> Result<()> {
        let all = self.services(services);
        thread::scope(|scope| {
            let start = |node: &viaduct_tests::Node| KubeProxy::start(node.namespace(), mode, &all).map(drop);
            let nodes: Vec<_> = self.lab.nodes().iter().map(|node| scope.spawn(move || start(node))).collect();
            nodes.into_iter().try_for_each(|node| match node.join() {
                Ok(outcome) => outcome,
                Err(panic) => std::panic::resume_unwind(panic),
            })
        })
    }

    pub(super) fn start_kube_proxies(&mut self, binary: &Path, mode: &str, services: u32) -> Result<()> {
        self.fill_api(services)?;
        for node in self.lab.nodes() {
            self.processes.push(Process::of(kube_proxy::start(&self.lab, node, binary, mode)?)?);
        }
        Ok(())
    }

    pub(super) fn start_ovs(&mut self, services: u32) -> Result<()> {
        self.offloads(false)?;
        let all = self.services(services);
        for node in self.lab.nodes() {
            for child in ovs::start(&self.lab, node, &all)? {
                self.processes.push(Process::of(child)?);
            }
        }
        Ok(())
    }
}

/// Services of other people, with so many endpoints each, none of which exists.
pub fn generated(services: u32, endpoints: u32) -> impl Iterator<Item = KubeProxyService> {
    (0..services).map(move |number| {
        let at = |network: [u8; 4], number: u32, port| {
            SocketAddr::new(IpAddr::V4(Ipv4Addr::from_bits(Ipv4Addr::from(network).to_bits() + number + 1)), port)
        };
        let endpoints = (0..endpoints).map(|index| at([10, 128, 0, 0], number * endpoints + index, PORT)).collect();
        KubeProxyService { vip: at([10, 96, 0, 0], number, 80), protocol: Tcp, endpoints }
    })
}

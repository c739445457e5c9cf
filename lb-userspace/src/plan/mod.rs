//! What this node should serve: frontends and the backends behind them, out of the [`Model`].
//!
//! Pure: every rule of Kubernetes about which endpoints a client may get lives here or in `backends`, and is tested
//! without kernel and network. Slots and map entries are made from the result elsewhere.
//!
//! Planned is what clients inside the cluster dial: cluster IPs, external IPs and addresses of load balancers, in both
//! families. The model holds what clients outside dial as well.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::Duration;

use ipnet::IpNet;
use lb_common::Protocol;
pub use lb_common::abi::Scope;

use crate::model::{Family, Model, ObjectName, Problem, Problems, Service, ServicePort, TrafficPolicy};

mod backends;

use backends::Endpoints;

/// Everything that this node should serve.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Plan {
    /// What to serve, by the name of the service port.
    pub service_ports: BTreeMap<ServicePortName, ServicePortPlan>,
    /// What cannot be served as the objects say.
    pub problems: Vec<Problem>,
}

/// Names one port of one Service: the unit that is balanced.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ServicePortName {
    /// The Service.
    pub object: ObjectName,
    /// Name of the port, often empty.
    pub port: Arc<str>,
    /// Its protocol.
    pub protocol: Protocol,
    /// Family of its frontends and backends: one Service may have both, and they have nothing to do with each other.
    pub family: Family,
    /// Which endpoints are its backends, where frontends of one port differ in that.
    pub endpoints: TrafficPolicy,
}

impl fmt::Display for ServicePortName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}/{}", self.object, self.port, self.protocol)?;
        if self.family == Family::V6 {
            f.write_str(" IPv6")?;
        }
        match self.endpoints {
            TrafficPolicy::Cluster => Ok(()),
            TrafficPolicy::Local => f.write_str(" local"),
        }
    }
}

/// What to serve for one service port.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ServicePortPlan {
    /// Where clients dial.
    pub frontends: BTreeSet<Frontend>,
    /// The Service's cluster IP, if a frontend is there. The other addresses may be those of machines.
    pub cluster_ip: Option<IpAddr>,
    /// Who answers; in order of address, each address once.
    pub backends: Vec<Backend>,
    /// Endpoints that serve but get no new flows (they terminate, or a policy or hints exclude them now), in order: flows that
    /// are theirs stay with them.
    pub lingering: Vec<SocketAddr>,
    /// What becomes of clients while there are no backends.
    pub when_empty: WhenEmpty,
    /// How long a client stays with its backend after its last new connection; `None` without session affinity.
    pub affinity: Option<Duration>,
    /// Whether backends that do not answer are treated as those that do.
    pub ignores_failures: bool,
    /// How many connections may be opened each second; `None` without a budget.
    pub new_connections_per_second: Option<NonZeroU32>,
    /// Who may dial the addresses of the load balancer; empty: everybody. Those for which it is not empty are not among
    /// the frontends, since the data plane cannot tell clients apart yet.
    pub source_ranges: Vec<IpNet>,
}

/// What becomes of clients of a service port without backends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum WhenEmpty {
    /// They are told, so that they need not wait: the Service has no usable endpoint anywhere.
    #[default]
    Refuse,
    /// Their packets are dropped: there are endpoints, on nodes that the traffic policy excludes.
    Drop,
}

/// What clients dial.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Frontend {
    /// The address.
    pub address: IpAddr,
    /// The port.
    pub port: u16,
    /// The protocol.
    pub protocol: Protocol,
    /// For which clients.
    pub scope: Scope,
}

/// An endpoint that takes new connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Backend {
    /// Where packets go.
    pub address: SocketAddr,
    /// Used only because no endpoint is ready: it will be gone soon.
    pub terminating: bool,
}

/// The plan for all Services.
#[must_use]
pub fn plan(model: &Model) -> Plan {
    let mut plan = Plan::default();
    for service in model.services() {
        let part = plan_service(model, &service.name);
        // Not `append`, which rebuilds the whole map.
        plan.service_ports.extend(part.service_ports);
        plan.problems.extend(part.problems);
    }
    plan
}

/// The part of the plan that is due to one Service; empty if there is none of this name.
///
/// [`plan`] is the union of these parts, so after a change only the parts of the touched Services are to be made again.
#[must_use]
pub fn plan_service(model: &Model, name: &ObjectName) -> Plan {
    let Some(service) = model.service(name) else { return Plan::default() };
    let mut problems = Problems::new(service.origin.clone(), format!("Service {name}"));
    let mut service_ports = BTreeMap::new();
    for &cluster_ip in &service.cluster_ips {
        let addresses = addresses(service, cluster_ip, &mut problems);
        for port in &service.ports {
            plan_port(model, service, port, &addresses, &mut service_ports, &mut problems);
        }
    }
    Plan { service_ports, problems: problems.finish() }
}

/// Where a Service is dialled in one family, and by whom.
struct Addresses {
    family: Family,
    cluster_ip: IpAddr,
    /// Each with the endpoints that clients within the cluster get there, and the field that it comes from.
    dialled: Vec<(IpAddr, TrafficPolicy, &'static str)>,
    source_ranges: Vec<IpNet>,
}

/// The policy for internal traffic is about the cluster IP alone, and that for external traffic about clients outside: from
/// inside, the other addresses lead to all endpoints, wherever they are.
fn addresses(service: &Service, cluster_ip: IpAddr, problems: &mut Problems) -> Addresses {
    let family = Family::of(cluster_ip);
    let mut dialled = vec![(cluster_ip, service.internal_policy, "spec.clusterIP")];
    for address in service.external_addresses().filter(|&address| Family::of(address) == family) {
        let by_load_balancer = service.load_balancer_ips.binary_search(&address).is_ok();
        let field = if by_load_balancer { "status.loadBalancer.ingress" } else { "spec.externalIPs" };
        dialled.push((address, TrafficPolicy::Cluster, field));
    }
    let left = service.load_balancer_ips.iter().filter(|&&address| Family::of(address) == family);
    for address in left.filter(|&&address| service.is_left_to_load_balancer(address)) {
        let message = "is left to the load balancer: ranges that exclude clients are not enforced here yet";
        problems.add("spec.loadBalancerSourceRanges", format!("{address} {message}"));
    }
    Addresses { family, cluster_ip, dialled, source_ranges: service.source_ranges_of(family) }
}

/// Plans a port in one family, once for each set of endpoints that some frontend leads to.
fn plan_port(
    model: &Model,
    service: &Service,
    port: &ServicePort,
    addresses: &Addresses,
    service_ports: &mut BTreeMap<ServicePortName, ServicePortPlan>,
    problems: &mut Problems,
) {
    let mut sets: BTreeMap<TrafficPolicy, BTreeSet<Frontend>> = BTreeMap::new();
    for &(address, policy, field) in &addresses.dialled {
        let frontend = Frontend { address, port: port.port.get(), protocol: port.protocol, scope: Scope::Cluster };
        match model.owner(&(address, frontend.port, port.protocol)) {
            Some(owner) if owner.name != service.name => {
                let dialled = SocketAddr::new(address, frontend.port);
                let advice = "give one of them another address or port";
                let message =
                    format!("{dialled}/{} already belongs to Service {}; {advice}", port.protocol, owner.name);
                problems.add(field, message);
            }
            _ => {
                sets.entry(policy).or_default().insert(frontend);
            }
        }
    }
    if sets.is_empty() {
        return;
    }
    let available = Endpoints::of(model, service, port, addresses.family);
    if available.left_out > 0 {
        let (number, left_out) = (port.port, available.left_out);
        let message = format!(
            "port {number}/SCTP: endpoints that listen on another port ({left_out}) get nothing: SCTP's ports are not \
             translated; make targetPort {number} too"
        );
        problems.add("spec.ports", message);
    }
    for (endpoints, frontends) in sets {
        let (backends, when_empty) = available.choose(endpoints);
        let name = ServicePortName {
            object: service.name.clone(),
            port: port.name.clone(),
            protocol: port.protocol,
            family: addresses.family,
            endpoints,
        };
        let lingering = available.lingering(&backends);
        let (affinity, source_ranges) = (service.affinity, addresses.source_ranges.clone());
        let is_there = frontends.iter().any(|frontend| frontend.address == addresses.cluster_ip);
        let cluster_ip = is_there.then_some(addresses.cluster_ip);
        let plan = ServicePortPlan {
            frontends,
            cluster_ip,
            backends,
            lingering,
            when_empty,
            affinity,
            ignores_failures: service.ignores_failures,
            new_connections_per_second: service.new_connections_per_second,
            source_ranges,
        };
        service_ports.insert(name, plan);
    }
}

#[cfg(test)]
mod tests;

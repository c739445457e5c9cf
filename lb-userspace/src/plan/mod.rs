//! What this node should serve: frontends and the backends behind them, out of the [`Model`].
//!
//! Pure: every rule of Kubernetes about which endpoints a client may get lives here or in `backends`, and is tested
//! without kernel and network. Slots and map entries are made from the result elsewhere.
//!
//! Only IPv4 and cluster IPs are planned; the model holds more.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use ipnet::IpNet;
use lb_common::Protocol;
use tracing::debug;

use crate::model::{Family, Model, ObjectName, Problem, Problems, Service, ServicePort, TrafficPolicy};

mod backends;

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
    /// Who answers; in order of address, each address once.
    pub backends: Vec<Backend>,
    /// What becomes of clients while there are no backends.
    pub when_empty: WhenEmpty,
    /// How long a client stays with its backend after its last new connection; `None` without session affinity.
    pub affinity: Option<Duration>,
    /// Who may dial the addresses of the load balancer, as far as they are of this family; empty: everybody. Frontends
    /// that the data plane would have to filter are left out as yet.
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

/// Who dials a frontend; the traffic policies differ.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Scope {
    /// Pods and the hosts of the cluster.
    Cluster,
    /// Clients that come in from outside.
    External,
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
    let service_ports = service
        .ports
        .iter()
        .map(|port| {
            let frontends = frontends(model, service, port, &mut problems);
            let backends = backends::choose(model, service, port);
            let name = ServicePortName {
                object: name.clone(),
                port: port.name.clone(),
                protocol: port.protocol,
                family: Family::V4,
                endpoints: TrafficPolicy::Cluster,
            };
            (name, ServicePortPlan { frontends, backends, affinity: service.affinity, ..ServicePortPlan::default() })
        })
        .collect();
    Plan { service_ports, problems: problems.finish() }
}

/// Where clients dial a port: those addresses of the Service that no older Service claims.
fn frontends(model: &Model, service: &Service, port: &ServicePort, problems: &mut Problems) -> BTreeSet<Frontend> {
    let mut frontends = BTreeSet::new();
    for &address in &service.cluster_ips {
        if Family::of(address) != Family::V4 {
            debug!(service = %service.name, %address, "IPv6 is not served yet");
            continue;
        }
        let number = port.port.get();
        match model.owner(&(address, number, port.protocol)) {
            Some(owner) if owner.name != service.name => {
                let frontend = format!("{}/{}", SocketAddr::new(address, number), port.protocol);
                let advice = "give one of them another address or port";
                problems
                    .add("spec.clusterIP", format!("{frontend} already belongs to Service {}; {advice}", owner.name));
            }
            _ => {
                frontends.insert(Frontend { address, port: number, protocol: port.protocol, scope: Scope::Cluster });
            }
        }
    }
    frontends
}

#[cfg(test)]
mod tests;

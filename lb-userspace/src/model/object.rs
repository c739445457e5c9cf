//! The objects of the model. A value of these types is valid: whoever makes one has checked addresses, ports and names.

use std::fmt;
use std::net::IpAddr;
use std::num::{NonZeroU16, NonZeroU32};
use std::sync::Arc;
use std::time::Duration;

use ipnet::IpNet;
use lb_common::Protocol;
pub use lb_common::abi::{Family, TrafficPolicy};

use super::Origin;

/// Namespace and name of an object.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ObjectName {
    /// `default` where the object names none.
    pub namespace: Arc<str>,
    /// Unique among the objects of one kind in the namespace.
    pub name: Arc<str>,
}

impl ObjectName {
    /// A name out of its two parts; an empty namespace means `default`.
    pub fn new(namespace: &str, name: &str) -> Self {
        Self { namespace: if namespace.is_empty() { "default" } else { namespace }.into(), name: name.into() }
    }
}

impl fmt::Display for ObjectName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// Whether `name` can be the name of an object, a namespace or a port: what DNS allows, in lower case.
#[must_use]
pub fn is_name(name: &str) -> bool {
    let alphanumeric = |c: u8| c.is_ascii_lowercase() || c.is_ascii_digit();
    let bytes = name.as_bytes();
    bytes.len() <= 253
        && bytes.first().is_some_and(|&c| alphanumeric(c))
        && bytes.last().is_some_and(|&c| alphanumeric(c))
        && bytes.iter().all(|&c| alphanumeric(c) || c == b'-' || c == b'.')
}

/// A Service that is to be served on this node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Service {
    /// Its name.
    pub name: ObjectName,
    /// Where it was read.
    pub origin: Origin,
    /// Creation time in seconds since 1970: decides which of two Services gets a frontend that both claim.
    pub created: Option<i64>,
    /// One address per IP family at most, the primary one first; never empty.
    pub cluster_ips: Vec<IpAddr>,
    /// Ports with names and numbers that are unique within the Service.
    pub ports: Vec<ServicePort>,
    /// Addresses outside the cluster's range at which it is served as well: sorted, each once.
    pub external_ips: Vec<IpAddr>,
    /// Addresses that a load balancer passes through unchanged (ipMode VIP): sorted, each once.
    pub load_balancer_ips: Vec<IpAddr>,
    /// Who may dial the addresses of the load balancer; empty: everybody.
    pub source_ranges: Vec<IpNet>,
    /// Where a load balancer asks whether this node has endpoints; only where `external_policy` is `Local`.
    pub health_check_node_port: Option<NonZeroU16>,
    /// Which endpoints clients within the cluster get.
    pub internal_policy: TrafficPolicy,
    /// Which endpoints clients outside get; `Local` only where the type of the Service lets it count.
    pub external_policy: TrafficPolicy,
    /// How long a client stays with its endpoint after its last new connection; `None` without session affinity.
    pub affinity: Option<Duration>,
    /// Whether endpoints that do not answer are treated as those that do.
    pub ignores_failures: bool,
    /// How many connections each of its ports may open on a node each second; `None` without a budget.
    pub new_connections_per_second: Option<NonZeroU32>,
}

impl Service {
    /// Addresses beside the cluster IPs at which it is served, each once: a Service has none in a family in which it has no
    /// cluster IP.
    pub fn external_addresses(&self) -> impl Iterator<Item = IpAddr> {
        let known = |family| self.cluster_ips.iter().any(|&address| Family::of(address) == family);
        let also_external = |address: &&IpAddr| self.external_ips.binary_search(address).is_ok();
        self.external_ips
            .iter()
            .chain(self.load_balancer_ips.iter().filter(move |address| !also_external(address)))
            .copied()
            .filter(move |&address| known(Family::of(address)) && !self.cluster_ips.contains(&address))
            .filter(|&address| !self.is_left_to_load_balancer(address))
    }

    /// Who may dial the addresses of the load balancer in one family; empty: everybody.
    #[must_use]
    pub fn source_ranges_of(&self, family: Family) -> Vec<IpNet> {
        let ranges = self.source_ranges.iter().filter(|range| Family::of(range.addr()) == family);
        let ranges: Vec<_> = ranges.copied().collect();
        let excludes = IpNet::aggregate(&ranges).iter().all(|range| range.prefix_len() > 0);
        if excludes { ranges } else { Vec::new() }
    }

    /// Whether an address of the load balancer is not served here: the data plane cannot tell yet who may pass, so where
    /// the source ranges exclude anybody the load balancer has to do it.
    #[must_use]
    pub fn is_left_to_load_balancer(&self, address: IpAddr) -> bool {
        self.load_balancer_ips.binary_search(&address).is_ok() && !self.source_ranges_of(Family::of(address)).is_empty()
    }
}

/// A port of a Service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServicePort {
    /// Joins it to the ports of slices; empty where the only port has no name.
    pub name: Arc<str>,
    /// TCP or UDP.
    pub protocol: Protocol,
    /// What clients dial. The endpoints' own port is in the slices.
    pub port: NonZeroU16,
    /// What clients dial on the addresses of the nodes.
    pub node_port: Option<NonZeroU16>,
}

/// A part of the endpoints of a Service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EndpointSlice {
    /// Its own name, without meaning for what is served.
    pub name: ObjectName,
    /// Name of the Service, in the same namespace.
    pub service: Arc<str>,
    /// Family of all endpoint addresses.
    pub family: Family,
    /// Ports that every endpoint of this slice listens on.
    pub ports: Box<[SlicePort]>,
    /// Endpoints in any order, possibly with duplicates.
    pub endpoints: Box<[Endpoint]>,
    /// When the change that the slice shows was made, in nanoseconds since 1970: for metrics, without meaning for what is
    /// served.
    pub triggered: Option<i64>,
}

impl EndpointSlice {
    /// The full name of its Service.
    #[must_use]
    pub fn service_name(&self) -> ObjectName {
        ObjectName { namespace: self.name.namespace.clone(), name: self.service.clone() }
    }

    /// Whether it differs from another one at most in what has no meaning for what is served.
    #[must_use]
    pub fn serves_the_same(&self, other: &Self) -> bool {
        let Self { name, service, family, ports, endpoints, triggered: _ } = self;
        (name, service, family, ports, endpoints)
            == (&other.name, &other.service, &other.family, &other.ports, &other.endpoints)
    }
}

/// A port of the endpoints of a slice.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SlicePort {
    /// Name of the Service port that it is for.
    pub name: Arc<str>,
    /// Must equal that of the Service port.
    pub protocol: Protocol,
    /// What the endpoints listen on.
    pub port: NonZeroU16,
}

/// An endpoint of a Service. There may be very many: whatever several have in common is shared.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Endpoint {
    /// Where packets go.
    pub address: IpAddr,
    /// Takes new connections.
    pub ready: bool,
    /// Works, though it may be terminating.
    pub serving: bool,
    /// Is being deleted.
    pub terminating: bool,
    /// Where it is, and who should use it.
    pub topology: Arc<Topology>,
}

const _: () = assert!(size_of::<Endpoint>() <= 32);

/// Where an endpoint is, and who should use it rather than others. Empty hints are no hints.
#[derive(Debug, Clone, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Topology {
    /// The node it runs on.
    pub node: Option<Arc<str>>,
    /// Nodes whose clients should use it.
    pub for_nodes: Box<[Arc<str>]>,
    /// Zones whose clients should use it.
    pub for_zones: Box<[Arc<str>]>,
}

impl Topology {
    /// Whether anybody should use it rather than others.
    #[must_use]
    pub fn has_hints(&self) -> bool {
        !self.for_nodes.is_empty() || !self.for_zones.is_empty()
    }
}

/// The node that this agent serves.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Node {
    /// What endpoints and hints call it.
    pub name: Arc<str>,
    /// Its label `topology.kubernetes.io/zone`, once it is known and if it has one.
    pub zone: Option<Arc<str>>,
}

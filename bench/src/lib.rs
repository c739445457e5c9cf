//! What the benches share: how long they measure, and what to measure with.
//!
//! - [`cluster`], [`seen`], [`process`], [`spread`]: a real agent that reads from an API server; [`control`]: what
//!   that takes, and [`control_rules`] what changes cost others;
//! - [`path`](mod@path): what a packet costs in the kernel programs;
//! - [`traffic`]: connections, requests and datagrams through services of Viaduct and of others;
//! - [`options`], [`facts`], [`results`]: how parts of `cargo xtask bench` are called, and what they leave; [`report`]: tables
//!   and plots of that; [`check`]: whether it is within its budgets;
//! - the rest, for parts of the agent: Services with one TCP port and one EndpointSlice each, numbered from 0. No two
//!   share an endpoint.

use std::fmt::Write as _;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::num::NonZeroU16;
use std::sync::Arc;
use std::time::Duration;

use criterion::Criterion;
use lb_common::Protocol;
use lb_userspace::model::{
    Endpoint, EndpointSlice, Family, Model, ObjectName, Origin, Service, ServicePort, SlicePort, Topology,
    TrafficPolicy,
};
use lb_userspace::state::{Found, Limits, State};

pub mod check;
pub mod cluster;
pub mod control;
pub mod control_rules;
pub mod facts;
pub mod kube_proxy;
pub mod options;
pub mod path;
pub mod process;
pub mod report;
pub mod results;
pub mod seen;
pub mod spread;
pub mod traffic;

/// Services of the large cluster.
pub const SERVICES: u32 = 5000;
/// Endpoints of each Service.
pub const ENDPOINTS: u32 = 4;
/// The sizes that the agent has by default.
pub const LIMITS: Limits = Limits { frontends: 65_536, service_ports: 16_384, backends: 131_072, slots: 1 << 22 };

const SERVICE_PORT: NonZeroU16 = NonZeroU16::new(80).expect("not 0");
const TARGET_PORT: NonZeroU16 = NonZeroU16::new(8080).expect("not 0");

/// Measures briefly, so that all benches together take about two minutes; flags of the command line come first.
#[must_use]
pub fn criterion() -> Criterion {
    Criterion::default()
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(1))
        .sample_size(20)
        .configure_from_args()
}

/// Whether this process may use BPF; says so once if not.
#[must_use]
pub fn may_use_kernel(what: &str) -> bool {
    let may = viaduct_tests::is_root();
    if !may {
        println!("{what}: left out, needs root: run `sudo -E env PATH=\"$PATH\" cargo bench -p viaduct-bench`");
    }
    may
}

/// A model of the first `services` Services.
#[must_use]
pub fn model(services: u32) -> Model {
    let mut model = Model::default();
    model.replace((0..services).map(service), (0..services).map(|number| slice(number, false)));
    model
}

/// The state of a node whose maps are empty.
#[must_use]
pub fn empty_state() -> State {
    State::adopt(Found::default(), LIMITS)
}

fn name(number: u32) -> String {
    format!("service-{number}")
}

fn cluster_ip(number: u32) -> Ipv4Addr {
    Ipv4Addr::from_bits(0x0a60_0000 + number)
}

/// Addresses of the endpoints of a Service; if `changed`, the last one is another.
fn endpoint_addresses(number: u32, changed: bool) -> impl Iterator<Item = Ipv4Addr> {
    let first = 0x0af4_0000 + number * 2 * ENDPOINTS;
    (0..ENDPOINTS).map(move |index| {
        let moved = u32::from(changed && index == ENDPOINTS - 1);
        Ipv4Addr::from_bits(first + index + moved)
    })
}

/// A Service of the cluster.
#[must_use]
pub fn service(number: u32) -> Service {
    Service {
        name: ObjectName::new("default", &name(number)),
        origin: Origin::Api,
        created: None,
        cluster_ips: vec![IpAddr::V4(cluster_ip(number))],
        ports: vec![ServicePort { name: "http".into(), protocol: Protocol::Tcp, port: SERVICE_PORT, node_port: None }],
        external_ips: Vec::new(),
        load_balancer_ips: Vec::new(),
        source_ranges: Vec::new(),
        health_check_node_port: None,
        internal_policy: TrafficPolicy::Cluster,
        external_policy: TrafficPolicy::Cluster,
        affinity: None,
        ignores_failures: false,
        new_connections_per_second: None,
    }
}

/// The slice of a Service; if `changed`, one of its endpoints was replaced by another.
#[must_use]
pub fn slice(number: u32, changed: bool) -> EndpointSlice {
    let topology = Arc::new(Topology { node: Some("node-1".into()), ..Topology::default() });
    EndpointSlice {
        name: ObjectName::new("default", &format!("{}-1", name(number))),
        service: name(number).into(),
        family: Family::V4,
        ports: [SlicePort { name: "http".into(), protocol: Protocol::Tcp, port: TARGET_PORT }].into(),
        endpoints: endpoint_addresses(number, changed)
            .map(|address| Endpoint {
                address: IpAddr::V4(address),
                ready: true,
                serving: true,
                terminating: false,
                topology: topology.clone(),
            })
            .collect(),
        triggered: None,
    }
}

/// Addresses of `count` backends of one service port.
#[must_use]
pub fn backends(count: u32) -> Vec<SocketAddr> {
    (0..count).map(|index| SocketAddr::from((Ipv4Addr::from_bits(0x0af4_0000 + index), TARGET_PORT.get()))).collect()
}

/// A Service as `kubectl get -o yaml` prints it.
#[must_use]
pub fn service_yaml(number: u32) -> String {
    let (name, address) = (name(number), cluster_ip(number));
    format!(
        "apiVersion: v1
kind: Service
metadata:
  creationTimestamp: \"2026-01-01T00:00:00Z\"
  labels:
    app: {name}
  name: {name}
  namespace: default
  resourceVersion: \"1000\"
  uid: 8f2f57ad-3f0c-4d4e-9f0e-{number:012}
spec:
  clusterIP: {address}
  clusterIPs:
  - {address}
  internalTrafficPolicy: Cluster
  ipFamilies:
  - IPv4
  ipFamilyPolicy: SingleStack
  ports:
  - name: http
    port: {SERVICE_PORT}
    protocol: TCP
    targetPort: {TARGET_PORT}
  selector:
    app: {name}
  sessionAffinity: None
  type: ClusterIP
status:
  loadBalancer: {{}}
"
    )
}

/// The slice of a Service, in the same way.
#[must_use]
pub fn slice_yaml(number: u32) -> String {
    let name = name(number);
    let mut yaml = "addressType: IPv4\napiVersion: discovery.k8s.io/v1\nendpoints:\n".to_owned();
    for (index, address) in endpoint_addresses(number, false).enumerate() {
        // Writing to a string cannot fail.
        let _ = write!(
            yaml,
            "- addresses:
  - {address}
  conditions:
    ready: true
    serving: true
    terminating: false
  nodeName: node-1
  targetRef:
    kind: Pod
    name: {name}-{index}
    namespace: default
    uid: 4b6c0a53-6f0b-4a55-8c57-{number:012}
"
        );
    }
    let _ = write!(
        yaml,
        "kind: EndpointSlice
metadata:
  creationTimestamp: \"2026-01-01T00:00:00Z\"
  labels:
    app: {name}
    endpointslice.kubernetes.io/managed-by: endpointslice-controller.k8s.io
    kubernetes.io/service-name: {name}
  name: {name}-1
  namespace: default
  resourceVersion: \"1000\"
ports:
- name: http
  port: {TARGET_PORT}
  protocol: TCP
"
    );
    yaml
}

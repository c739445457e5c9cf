//! A plan is applied to a pretended kernel that holds the maps as plain collections, and adopted from there.

mod backends;
mod kernel;
mod restarts;
mod service_ports;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Duration;

use lb_common::abi::{BackendState, TrafficPolicy};
use lb_common::tuple::Zero;

use self::kernel::{Kernel, Served};
use super::*;
use crate::plan::{self, Frontend, Plan, Scope, ServicePortPlan};

const LIMITS: Limits = Limits { frontends: 8, service_ports: 16, backends: 16, slots: 4096 };

/// Service ports in one family, each with its port and the last octets of its backends.
fn plan_of(family: Family, services: &[(&str, u16, &[u8])]) -> Plan {
    let mut plan = Plan::default();
    let (vip, endpoint) = match family {
        Family::V4 => ("10.96.0.1", "10.244.0."),
        Family::V6 => ("fd00::1", "fd00:1::"),
    };
    for (name, port, backends) in services {
        let name = ServicePortName {
            object: ObjectName::new("default", name),
            port: "".into(),
            protocol: Protocol::Tcp,
            family,
            endpoints: TrafficPolicy::Cluster,
        };
        let address = vip.parse().unwrap();
        let frontend = Frontend { address, port: *port, protocol: Protocol::Tcp, scope: Scope::Cluster };
        let address = |last: &u8| SocketAddr::new(format!("{endpoint}{last}").parse().unwrap(), 8080);
        let backends =
            backends.iter().map(|last| plan::Backend { address: address(last), terminating: false }).collect();
        plan.service_ports
            .insert(name, ServicePortPlan { frontends: [frontend].into(), backends, ..ServicePortPlan::default() });
    }
    plan
}

fn plan(services: &[(&str, u16, &[u8])]) -> Plan {
    plan_of(Family::V4, services)
}

/// Endpoints of all service ports that serve but are not chosen.
fn with_lingering(mut plan: Plan, lingering: &[u8]) -> Plan {
    for (name, port) in &mut plan.service_ports {
        let all = plan_of(name.family, &[("", 1, lingering)]).service_ports.into_values().next().unwrap().backends;
        let is_chosen = |address: &SocketAddr| port.backends.iter().any(|backend| backend.address == *address);
        port.lingering = all.iter().map(|backend| backend.address).filter(|address| !is_chosen(address)).collect();
    }
    plan
}

fn expected(plan: &Plan) -> Served {
    let (mut frontends, mut vips, mut origins) = (BTreeMap::new(), BTreeMap::new(), BTreeSet::new());
    for port in plan.service_ports.values() {
        for frontend in &port.frontends {
            let addresses: Vec<_> = port.backends.iter().map(|backend| backend.address).collect();
            *vips.entry(frontend.address).or_default() |= u32::from(!addresses.is_empty());
            let dialled = SocketAddr::new(frontend.address, frontend.port);
            origins.extend(addresses.iter().map(|&backend| (backend, frontend.protocol, dialled)));
            let affinity = port.affinity.map_or(0, |time| u32::try_from(time.as_secs()).unwrap());
            let flags = u32::from(port.when_empty == plan::WhenEmpty::Drop) | u32::from(port.ignores_failures) << 1;
            let budget = port.new_connections_per_second.map_or(0, NonZeroU32::get);
            frontends.insert(*frontend, (addresses, Settings { affinity, flags, budget }));
        }
    }
    Served { frontends, vips, origins }
}

fn apply(state: &mut State, kernel: &mut Kernel, plan: &Plan) -> Vec<Write> {
    let result = state.reconcile(plan);
    carry_out(result, kernel)
}

/// The same by way of the Services that differ alone.
fn apply_difference(state: &mut State, kernel: &mut Kernel, before: &Plan, after: &Plan) {
    let names = before.service_ports.keys().chain(after.service_ports.keys());
    let differ = |name: &&ServicePortName| before.service_ports.get(*name) != after.service_ports.get(*name);
    let services: BTreeSet<_> = names.filter(differ).map(|name| name.object.clone()).collect();
    let mut part = after.clone();
    part.service_ports.retain(|name, _| services.contains(&name.object));
    carry_out(state.reconcile_services(&services, &part), kernel);
}

fn carry_out(result: Reconciled, kernel: &mut Kernel) -> Vec<Write> {
    let Reconciled { writes, shortages, .. } = result;
    assert_eq!(shortages, []);
    writes.iter().for_each(|write| kernel.write(write));
    writes
}

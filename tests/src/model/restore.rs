//! Flows that were lost while their backends speak.

use lb_common::Protocol;
use lb_common::abi::{Hook, ORIGINS};

use super::flows::{Attempt, Flow, Tuple};
use super::programs::Model;

impl Model {
    /// Puts the flow back whose replies look like `reply`: what its client sends.
    pub(super) fn restore(&mut self, reply: Tuple, now: u64) -> Option<Tuple> {
        if reply.protocol == Protocol::Udp || self.any_flow(reply).is_some() {
            return None;
        }
        let is_v6 = reply.source.is_ipv6();
        let is_hairpin = reply.destination.ip() == self.settings.hairpin(!is_v6);
        let origins = self.services.origins(reply.source, reply.protocol);
        for (frontend, id) in origins.into_iter().take(ORIGINS.into()) {
            if reply.protocol == Protocol::Sctp && frontend.port() != reply.source.port() {
                // Its ports are not translated.
                continue;
            }
            let mut from = Tuple { destination: frontend, ..reply.swap() };
            if is_hairpin {
                from.source.set_ip(reply.source.ip());
            }
            let flow = match self.flows.get(from) {
                Some(flow) if flow.to == reply.swap() => flow,
                Some(_) => continue,
                None => {
                    let backend = self.services.backends[&(is_v6, id)];
                    // There are no sockets to ask.
                    if self.services.slots[&backend.service_port].is_empty()
                        || self.choice(from, backend.service_port, 0) != Some(id)
                    {
                        continue;
                    }
                    Flow {
                        to: reply.swap(),
                        backend: id,
                        generation: backend.generation,
                        service_port: backend.service_port,
                        hook: if is_hairpin { Hook::Hairpin } else { Hook::FromPod },
                        fin: false,
                        reset: false,
                        established: true,
                        last_seen: now,
                        packets: 0,
                        bytes: 0,
                        sequence: 0,
                        attempt: Attempt::default(),
                    }
                }
            };
            self.counts.note("flow put back");
            self.flows.insert(reply, flow.mirror(from, now));
            if self.flows.get(from).is_none() {
                self.flows.insert(from, flow);
            }
            return Some(from);
        }
        None
    }
}

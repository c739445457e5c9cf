//! Flows that were lost while their backends speak.

use lb_common::Protocol;
use lb_common::abi::{Hook, ORIGINS};

use super::flows::{Attempt, Flow, Tuple};
use super::programs::{Model, Place};

impl Model {
    /// Puts the flow back whose replies look like `reply`: what its client sends.
    pub(super) fn restore(&mut self, reply: Tuple, now: u64) -> Option<Tuple> {
        if reply.protocol == Protocol::Udp {
            return None;
        }
        if let Some(mirror) = self.any_flow(reply) {
            self.counts.note("refused before the flow was back");
            return Some(mirror.to.swap());
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
            let known = [Place::Flows, Place::HalfOpen].into_iter().find_map(|place| {
                let half = self.table(place).get(from)?;
                Some((place, half))
            });
            if let Some((place, half)) = known {
                if half.to != reply.swap() {
                    continue;
                }
                self.counts.note("mirror of a refused reply put back");
                self.table(place).insert(reply, half.mirror(from, now));
                return Some(from);
            }
            let backend = self.services.backends[&(is_v6, id)];
            let has_left = self.detours.get(from).is_some_and(|detour| detour.backend != id);
            // There are no sockets to ask.
            if has_left
                || self.services.slots[&backend.service_port].is_empty()
                || self.choice(from, backend.service_port, 0) != Some(id)
            {
                continue;
            }
            let flow = Flow {
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
            };
            self.counts.note("flow of a refused reply put back");
            self.add(Place::HalfOpen, from, &flow, now);
            return Some(from);
        }
        None
    }
}

//! Opening a flow: which backend, under which ports.

use lb_common::abi::{Hook, Reason};
use lb_common::{Address4, Address6, Protocol, hash};

use super::abi;
use super::flows::{Affinity, AffinityKey, Flow, Tuple};
use super::programs::{Model, NO_BACKEND, Packet};
use super::services::Backend;

/// How many choices a flow has.
const ATTEMPTS: u32 = 6;
/// Source ports for flows all of whose choices would take the replies of others, and how many of them are tried.
const SPARE_PORTS: std::ops::RangeInclusive<u16> = 61_000..=65_535;
const SPARE_ATTEMPTS: u32 = 4;
/// How many of them are tried for a connection without a service.
const DIRECT_ATTEMPTS: u32 = 4;
const SECOND: u64 = 1_000_000_000;

/// What the packets of a flow become.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Opened {
    /// Addresses and ports with which they leave.
    pub to: Tuple,
    /// Where they are changed.
    pub hook: Hook,
}

impl Opened {
    /// Of a flow that is there.
    pub const fn of(flow: &Flow) -> Self {
        Self { to: flow.to, hook: flow.hook }
    }
}

impl Flow {
    /// The entry for the replies, which has seen none yet.
    pub const fn mirror(&self, from: Tuple, now: u64) -> Self {
        let hook = match self.hook {
            Hook::Hairpin => Hook::HairpinReply,
            _ => Hook::ToPod,
        };
        Self {
            to: from.swap(),
            hook,
            fin: false,
            reset: false,
            established: false,
            last_seen: now,
            packets: 0,
            bytes: 0,
            ..*self
        }
    }
}

impl Model {
    /// Opens a flow for the first packet to a frontend.
    pub(super) fn open(&mut self, packet: &Packet<'_>, service_port: u32, now: u64) -> Result<Opened, Reason> {
        let from = packet.tuple;
        if from.source.ip() == from.destination.ip() {
            return Err(Reason::Land);
        }
        if self.services.is_vip(from.source.ip()) {
            return Err(Reason::VipSource);
        }
        let port = &self.services.ports[&service_port];
        let affinity = port.affinity;
        if self.services.slots[&service_port].is_empty() {
            return Err(if port.drop_when_empty { Reason::NoBackend } else { Reason::Refused });
        }
        let key = AffinityKey { client: from.source.ip(), service_port };
        let stays = if affinity == 0 { None } else { self.stays_with(key, affinity, now) };
        match (affinity, self.affinities.get(key), stays) {
            (0, ..) | (_, None, _) => {}
            (_, Some(_), Some(_)) => self.counts.note("client stays with its backend"),
            (_, Some(_), None) => {
                self.counts.note("client no longer stays with its backend");
                self.affinities.remove(key);
            }
        }
        let choices = match stays {
            Some(id) => vec![Some(id)],
            None => (0..ATTEMPTS).map(|attempt| self.choice(from, service_port, attempt)).collect(),
        };
        let mut chosen = None;
        for id in &choices {
            let id = id.ok_or(Reason::BadSlot)?;
            chosen = self.take(from, id, now).map(|opened| (id, opened));
            if chosen.is_some() {
                break;
            }
        }
        let (id, opened) = match (chosen, choices[0]) {
            (Some(chosen), _) => chosen,
            (None, first) => {
                self.counts.note("no choice left but another source port");
                let id = first.ok_or(Reason::BadSlot)?;
                (id, self.take_under_spare_port(from, id, now).ok_or(Reason::ReplyTaken)?)
            }
        };
        let backend = self.backend(from, id);
        if affinity != 0 {
            self.affinities.insert(key, Affinity { backend: id, generation: backend.generation, last_used: now });
        }
        let flow = packet.flow(opened, id, backend.generation, service_port, now);
        self.add(from, &flow, now);
        self.counts.note(if opened.hook == Hook::Hairpin { "hairpin flow opened" } else { "flow opened" });
        Ok(opened)
    }

    /// A SYN to what is no frontend. When the replies would be taken for those of a flow that is alive, the
    /// connection gets a flow of its own, under another source port. A flow that is over makes room.
    pub(super) fn dial(&mut self, packet: &Packet<'_>, now: u64) -> Result<Option<Opened>, Reason> {
        let from = packet.tuple;
        let Some(mirror) = self.flows.get(from.swap()) else { return Ok(None) };
        let owner = mirror.to.swap();
        if mirror.hook != Hook::ToPod || owner == from || self.replies_are_free(from, from, now) {
            return Ok(None);
        }
        if from.protocol == Protocol::Sctp {
            return Err(Reason::ReplyTaken);
        }
        for attempt in 0..DIRECT_ATTEMPTS {
            let mut to = from;
            to.source.set_port(self.spare_port(from, attempt));
            if self.replies_are_free(from, to, now) {
                let opened = Opened { to, hook: Hook::FromPod };
                self.counts.note("connection without a service got another source port");
                self.add(from, &packet.flow(opened, NO_BACKEND, 0, NO_BACKEND, now), now);
                return Ok(Some(opened));
            }
        }
        Err(Reason::ReplyTaken)
    }

    fn add(&mut self, from: Tuple, flow: &Flow, now: u64) {
        self.flows.insert(flow.to.swap(), flow.mirror(from, now));
        self.flows.insert(from, *flow);
    }

    /// The backend with which a client stays, if its time is not over and it still gets new flows.
    fn stays_with(&self, key: AffinityKey, seconds: u32, now: u64) -> Option<u32> {
        let found = self.affinities.get(key)?;
        let is_fresh = now.saturating_sub(found.last_used) < u64::from(seconds) * SECOND;
        (is_fresh && self.services.is_active(key.client.is_ipv6(), found.backend, found.generation))
            .then_some(found.backend)
    }

    /// The backend in the slot that is chosen. `None`: the slot names none.
    fn choice(&self, from: Tuple, service_port: u32, attempt: u32) -> Option<u32> {
        let slots = &self.services.slots[&service_port];
        let count = u32::try_from(slots.len()).expect("few slots");
        let id = slots[hash::slot(self.hash(from, attempt), count) as usize];
        self.services.backends.contains_key(&(from.source.is_ipv6(), id)).then_some(id)
    }

    fn hash(&self, tuple: Tuple, attempt: u32) -> u32 {
        if tuple.source.is_ipv4() {
            hash::selection(&abi::tuple::<Address4>(&tuple), self.settings.seed, attempt)
        } else {
            hash::selection(&abi::tuple::<Address6>(&tuple), self.settings.seed, attempt)
        }
    }

    fn backend(&self, from: Tuple, id: u32) -> Backend {
        self.services.backends[&(from.source.is_ipv6(), id)]
    }

    /// A flow to a backend under the client's own port, if it would be told from all others.
    fn take(&mut self, from: Tuple, id: u32, now: u64) -> Option<Opened> {
        let opened = self.flow_to(from, id, from.source.port());
        // The checksum of SCTP covers ports, and all of the packet: they are not changed.
        let is_possible = from.protocol != Protocol::Sctp || opened.to.destination.port() == from.destination.port();
        (is_possible && self.replies_are_free(from, opened.to, now)).then_some(opened)
    }

    fn take_under_spare_port(&mut self, from: Tuple, id: u32, now: u64) -> Option<Opened> {
        if from.protocol == Protocol::Sctp {
            return None;
        }
        (ATTEMPTS..ATTEMPTS + SPARE_ATTEMPTS).find_map(|attempt| {
            let opened = self.flow_to(from, id, self.spare_port(from, attempt));
            self.replies_are_free(from, opened.to, now).then_some(opened)
        })
    }

    fn spare_port(&self, from: Tuple, attempt: u32) -> u16 {
        let count = u32::from(SPARE_PORTS.end() - SPARE_PORTS.start()) + 1;
        let number = hash::slot(self.hash(from, attempt), count);
        SPARE_PORTS.start() + u16::try_from(number).expect("fewer than there are ports")
    }

    fn flow_to(&self, from: Tuple, id: u32, source_port: u16) -> Opened {
        let mut to = Tuple { destination: self.backend(from, id).at, ..from };
        to.source.set_port(source_port);
        // A pod does not hear from itself under its own address.
        let is_hairpin = to.destination.ip() == from.source.ip();
        if is_hairpin {
            to.source.set_ip(self.settings.hairpin(from.source.is_ipv4()));
        }
        Opened { to, hook: if is_hairpin { Hook::Hairpin } else { Hook::FromPod } }
    }

    /// Whether no other flow that is alive owns the replies of `from -> to`. The entries of one that is over make room.
    fn replies_are_free(&mut self, from: Tuple, to: Tuple, now: u64) -> bool {
        let Some(present) = self.flows.get(to.swap()) else { return true };
        let owner = present.to.swap();
        if owner == from {
            return true;
        }
        // A mirror that was left behind when the client's half went elsewhere is nobody's.
        let flow = self.flows.get(owner).filter(|flow| flow.to == to);
        let is_over = flow.is_none_or(|flow| {
            flow.has_ended(Some(&present)) || flow.is_expired(Some(&present), now, &self.settings.idle)
        });
        if is_over {
            self.counts.note("flow that was over made room");
            if flow.is_some() {
                self.flows.remove(owner);
            }
            self.flows.remove(to.swap());
        }
        is_over
    }
}

impl Packet<'_> {
    fn flow(&self, opened: Opened, backend: u32, generation: u32, service_port: u32, now: u64) -> Flow {
        Flow {
            to: opened.to,
            backend,
            generation,
            service_port,
            hook: opened.hook,
            fin: self.is_fin(),
            reset: self.is_reset(),
            established: !self.is_first(),
            last_seen: now,
            packets: 1,
            bytes: self.length(),
        }
    }
}

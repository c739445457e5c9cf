//! Opening a flow: which backend, under which ports.

use lb_common::abi::{Hook, Reason};
use lb_common::{Address4, Address6, Protocol, hash};

use super::abi;
use super::flows::{Affinity, AffinityKey, Attempt, Flow, Tuple};
use super::programs::{Model, NO_BACKEND, Packet, Place};
use super::services::Backend;

/// How many choices a flow has.
const CHOICES: u32 = 16;
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

/// A backend that a flow may have.
#[derive(Clone, Copy, Debug)]
pub(super) struct Choice {
    /// Its id.
    pub(super) id: u32,
    /// By which of the choices it was found.
    pub(super) number: u32,
    /// What the packets would become.
    pub(super) opened: Opened,
}

/// What looking for one has brought.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Picked {
    /// None if all are suspect, or have the replies of other flows.
    pub(super) choice: Option<Choice>,
    /// The choice of a suspect that is to be tried with a copy of the SYN.
    probe: Option<u32>,
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
        if !packet.is_new()
            && let Some(opened) = self.take_detour(packet, service_port, now)
        {
            return Ok(opened);
        }
        if packet.is_new() && !self.is_within_budget(service_port, now) {
            return Err(Reason::Budget);
        }
        let key = AffinityKey { client: from.source.ip(), service_port };
        let had = if affinity == 0 { None } else { self.stays_with(key, affinity, now) };
        match (affinity, self.affinities.get(key), had) {
            (0, ..) | (_, None, _) => {}
            (_, Some(_), Some(_)) => self.counts.note("client stays with its backend"),
            (_, Some(_), None) => {
                self.counts.note("client no longer stays with its backend");
                self.affinities.remove(key);
            }
        }
        // The answer of another backend will tell with whom the client stays from then on.
        let leaves =
            had.is_some_and(|id| packet.is_new() && self.is_watched(service_port) && self.is_suspect(from.backend(id)));
        if leaves {
            self.counts.note("client leaves its suspect backend");
        }
        let stays = had.filter(|_| !leaves);
        let picked = match stays {
            Some(_) => Picked::default(),
            None => self.pick(packet, service_port, (0, None), true, now)?,
        };
        // Where all are suspect, its own is as good as any.
        let stays = if picked.choice.is_none() { had } else { stays };
        let leaves = leaves && stays.is_none();
        let choice = match (picked.choice, stays) {
            (Some(choice), _) => choice,
            (None, stays) => {
                let id = stays.or_else(|| self.choice(from, service_port, 0)).ok_or(Reason::BadSlot)?;
                Choice { id, number: 0, opened: self.take_any_port(from, id, now).ok_or(Reason::ReplyTaken)? }
            }
        };
        let Choice { id, opened, .. } = choice;
        let generation = self.backend(from, id).generation;
        if affinity != 0 && !leaves {
            self.affinities.insert(key, Affinity { backend: id, generation, last_used: now });
        }
        let flow = self.enter(packet, service_port, choice, now);
        if let Some(number) = picked.probe {
            self.probe(packet, service_port, number, &flow, now);
        }
        Ok(opened)
    }

    /// Adds a flow to a backend.
    fn enter(&mut self, packet: &Packet<'_>, service_port: u32, choice: Choice, now: u64) -> Flow {
        let Choice { id, number, opened } = choice;
        let generation = self.backend(packet.tuple, id).generation;
        let attempt = Attempt { number, ..Attempt::default() };
        let flow = Flow { attempt, ..packet.flow(opened, id, generation, service_port, now) };
        let place = self.place_for(packet, opened);
        self.add(place, packet.tuple, &flow, now);
        self.counts.backend(packet.tuple.backend(id)).connections += 1;
        self.counts.note(if opened.hook == Hook::Hairpin { "hairpin flow opened" } else { "flow opened" });
        flow
    }

    /// Takes up a connection whose flow was lost where it was, if that is not where selection would lead it.
    fn take_detour(&mut self, packet: &Packet<'_>, service_port: u32, now: u64) -> Option<Opened> {
        let from = packet.tuple;
        let detour = self.detours.get(from)?;
        let backend = self.services.backends.get(&(from.source.is_ipv6(), detour.backend))?;
        if backend.generation != detour.generation || backend.service_port != service_port {
            return None;
        }
        let opened = self.take(from, detour.backend, detour.source_port, now)?;
        self.counts.note("detour taken up");
        self.enter(packet, service_port, Choice { id: detour.backend, number: 1, opened }, now);
        Some(opened)
    }

    /// Whether a service port may open one more flow in this second.
    fn is_within_budget(&mut self, service_port: u32, now: u64) -> bool {
        let limit = self.services.ports[&service_port].budget;
        if limit == 0 {
            return true;
        }
        let budget = self.budgets.entry(service_port).or_default();
        let second = now / SECOND;
        if budget.0 != second {
            *budget = (second, 0);
        }
        let is_within = budget.1 < limit;
        // What was turned away counts as well, should the budget become larger within the second.
        budget.1 += 1;
        self.counts.note(if is_within { "within the budget" } else { "budget used up" });
        is_within
    }

    /// Where a new flow belongs. When its mirror is left in the table of those that have proved themselves, its client's half was
    /// evicted there, and answers go by that mirror: it goes on there. A SYN begins anew.
    pub(super) fn place_for(&mut self, packet: &Packet<'_>, opened: Opened) -> Place {
        let key = opened.to.swap();
        if self.flows.get(key).is_none_or(|mirror| mirror.to != packet.tuple.swap()) {
            return Place::HalfOpen;
        }
        if packet.is_first() {
            self.flows.remove(key);
            return Place::HalfOpen;
        }
        self.counts.note("evicted half of the client's added again");
        Place::Flows
    }

    /// The first of the choices, from one on, that is not `except`, not suspect, and would be told from all other flows.
    pub(super) fn pick(
        &mut self,
        packet: &Packet<'_>,
        service_port: u32,
        (first, except): (u32, Option<u32>),
        is_watched: bool,
        now: u64,
    ) -> Result<Picked, Reason> {
        let from = packet.tuple;
        let is_datagram = from.protocol == Protocol::Udp;
        // Who goes on with a connection whose flow was lost needs its backend, whether that answers or not.
        let is_watched = is_watched && packet.is_new() && self.is_watched(service_port);
        let mut probe = None;
        for number in first..first + CHOICES {
            let id = self.choice(from, service_port, number).ok_or(Reason::BadSlot)?;
            if except == Some(id) {
                continue;
            }
            let backend = from.backend(id);
            if is_watched && self.is_suspect(backend) {
                // One trial for one opening.
                let is_due = except.is_none() && probe.is_none() && self.is_probe_due(backend, is_datagram, now);
                if !is_due || !is_datagram {
                    self.counts.backend(backend).skipped += 1;
                    self.counts.note("suspect passed over");
                    if is_due {
                        probe = Some(number);
                    }
                    continue;
                }
                self.counts.note("datagram tries a suspect");
            }
            if let Some(opened) = self.take(from, id, from.source.port(), now) {
                return Ok(Picked { choice: Some(Choice { id, number, opened }), probe });
            }
        }
        Ok(Picked { choice: None, probe })
    }

    /// A copy of the SYN that has opened a flow goes to a suspect. All that is seen of it is the mirror for the answer.
    fn probe(&mut self, packet: &Packet<'_>, service_port: u32, number: u32, flow: &Flow, now: u64) {
        let from = packet.tuple;
        let Some(id) = self.choice(from, service_port, number) else { return };
        let Some(opened) = self.take(from, id, from.source.port(), now) else { return };
        let Opened { to, hook: Hook::FromPod } = opened else { return };
        self.place_for(packet, opened);
        if self.half_open.get(to.swap()).is_some() {
            return;
        }
        self.counts.note("suspect probed");
        let mirror = Flow {
            hook: Hook::ToPod,
            backend: id,
            generation: self.backend(from, id).generation,
            attempt: Attempt { number, is_probe: true, is_answered: false },
            ..flow.mirror(from, now)
        };
        self.half_open.insert(to.swap(), mirror);
    }

    /// A SYN to what is no frontend. When the replies would be taken for those of a flow that is alive, the
    /// connection gets a flow of its own, under another source port. A flow that is over makes room.
    pub(super) fn dial(&mut self, packet: &Packet<'_>, now: u64) -> Result<Option<Opened>, Reason> {
        let from = packet.tuple;
        let Some(mirror) = self.any_flow(from.swap()) else { return Ok(None) };
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
                self.add(Place::Flows, from, &packet.flow(opened, NO_BACKEND, 0, NO_BACKEND, now), now);
                return Ok(Some(opened));
            }
        }
        Err(Reason::ReplyTaken)
    }

    pub(super) fn add(&mut self, place: Place, from: Tuple, flow: &Flow, now: u64) {
        let table = self.table(place);
        table.insert(flow.to.swap(), flow.mirror(from, now));
        table.insert(from, *flow);
    }

    /// The backend with which a client stays, if its time is not over and it still gets new flows.
    fn stays_with(&self, key: AffinityKey, seconds: u32, now: u64) -> Option<u32> {
        let found = self.affinities.get(key)?;
        let is_fresh = now.saturating_sub(found.last_used) < u64::from(seconds) * SECOND;
        (is_fresh && self.services.is_active(key.client.is_ipv6(), found.backend, found.generation))
            .then_some(found.backend)
    }

    /// The backend in the slot that is chosen. `None`: the slot names none.
    pub(super) fn choice(&self, from: Tuple, service_port: u32, attempt: u32) -> Option<u32> {
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

    pub(super) fn backend(&self, from: Tuple, id: u32) -> Backend {
        self.services.backends[&(from.source.is_ipv6(), id)]
    }

    /// A flow to a backend under this source port, if it would be told from all others.
    fn take(&mut self, from: Tuple, id: u32, source_port: u16, now: u64) -> Option<Opened> {
        let opened = self.flow_to(from, id, source_port);
        // The checksum of SCTP covers ports, and all of the packet: they are not changed.
        let has_same_ports =
            source_port == from.source.port() && opened.to.destination.port() == from.destination.port();
        let is_possible = from.protocol != Protocol::Sctp || has_same_ports;
        (is_possible && self.replies_are_free(from, opened.to, now)).then_some(opened)
    }

    /// The same under the client's port or, if need be, another.
    fn take_any_port(&mut self, from: Tuple, id: u32, now: u64) -> Option<Opened> {
        let own = self.take(from, id, from.source.port(), now);
        own.or_else(|| {
            self.counts.note("no choice left but another source port");
            (1..=SPARE_ATTEMPTS).find_map(|attempt| self.take(from, id, self.spare_port(from, attempt), now))
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
        let Some(present) = self.any_flow(to.swap()) else { return true };
        let owner = present.to.swap();
        if owner == from {
            return true;
        }
        // A mirror that was left behind when the client's half went elsewhere is nobody's.
        let flow = self.any_flow(owner).filter(|flow| flow.to == to);
        let is_over = flow.is_none_or(|flow| {
            flow.has_ended(Some(&present)) || flow.is_expired(Some(&present), now, &self.settings.idle)
        });
        if is_over {
            self.counts.note("flow that was over made room");
            let gone = [flow.map(|_| owner), Some(to.swap())];
            for key in gone.into_iter().flatten() {
                self.flows.remove(key);
                self.half_open.remove(key);
            }
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
            sequence: if self.is_first() { self.numbers().0 } else { 0 },
            attempt: Attempt::default(),
        }
    }
}

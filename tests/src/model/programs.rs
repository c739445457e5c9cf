//! The two programs: what becomes of a packet at the interface of a pod.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use lb_common::Protocol;
use lb_common::abi::{IdleTimes, Reason, handover, options};

use serde::{Deserialize, Serialize};

use super::flows::{Affinity, AffinityKey, BackendId, Detour, Flow, Fragment, FragmentKey, Health, Timed, Tuple};
use super::fragments::Known;
use super::health::BackendCounts;
use super::services::{self, Services};
use super::table::Table;
use super::wire::{self, Fault, Headers, Part, protocol, tcp};

/// The backend of a connection that a client has made without a service.
pub(super) const NO_BACKEND: u32 = u32::MAX;

/// More refusals in a second than any machine can make.
pub(super) const NO_LIMIT: u32 = 1_000_000_000;

/// What the programs are told when they are loaded.
#[derive(Clone, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "as in lb_common::abi")]
pub struct Settings {
    pub seed: u64,
    pub mark: u32,
    pub options: u32,
    pub handover: u32,
    pub refusals_per_second: u32,
    pub idle: IdleTimes,
    pub hairpin_4: Ipv4Addr,
    pub hairpin_6: Ipv6Addr,
}

impl Default for Settings {
    /// Idle times are shorter than this machine has been up, so that time can pass by making entries older.
    fn default() -> Self {
        const SECOND: u64 = 1_000_000_000;
        Self {
            seed: 42,
            mark: 0x20_0000,
            options: options::ANSWER_ECHO | options::PASSIVE_HEALTH,
            handover: handover::NONE,
            refusals_per_second: NO_LIMIT,
            idle: IdleTimes {
                tcp_established: 40 * SECOND,
                tcp_half_open: 12 * SECOND,
                tcp_half_closed: 20 * SECOND,
                tcp_closed: 8 * SECOND,
                reset: 2 * SECOND,
                unreplied: 4 * SECOND,
                udp: 10 * SECOND,
                sctp: 16 * SECOND,
            },
            hairpin_4: Ipv4Addr::new(169, 254, 109, 1),
            hairpin_6: Ipv6Addr::new(0xfd00, 0x7669, 0x6164, 0x7563, 0x7400, 0, 0, 1),
        }
    }
}

impl Settings {
    /// From whom a pod hears that dials itself.
    #[must_use]
    pub fn hairpin(&self, is_v4: bool) -> IpAddr {
        if is_v4 { self.hairpin_4.into() } else { self.hairpin_6.into() }
    }
}

/// One of the two programs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Program {
    /// What the pod has sent.
    FromPod,
    /// What is about to reach the pod.
    ToPod,
}

/// A packet that comes to a program.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Arrival {
    /// Which program.
    pub program: Program,
    /// Index of the interface at which it runs.
    pub interface: u32,
    /// Index of the interface by which the packet came to this node; 0 when the node itself sends it.
    pub came_in_by: u32,
    /// `skb->mark`.
    pub mark: u32,
    /// With a sum over the whole packet, as some network cards give it (`CHECKSUM_COMPLETE`).
    pub checksum_complete: bool,
    /// From the Ethernet header on.
    pub frame: Vec<u8>,
}

/// What a program answers with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Verdict {
    /// The next program and the stack get the packet.
    Pass,
    /// Nobody gets it.
    Drop,
    /// It goes back where it came from, or comes in once more.
    Redirect,
}

/// What becomes of a packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// The program's answer.
    pub verdict: Verdict,
    /// What is counted.
    pub reason: Option<Reason>,
    /// The packet as it is now.
    pub frame: Vec<u8>,
    /// Its mark.
    pub mark: u32,
}

impl Outcome {
    /// Source and destination that the packet has now, with what is at the place of ports.
    #[must_use]
    pub fn headers(&self) -> Option<(SocketAddr, SocketAddr)> {
        let headers = Headers::of_frame(&self.frame, self.frame.get(12..14)? == wire::IPV4).ok()?;
        let port = |at: usize| wire::word(&self.frame, headers.transport + at);
        Some((SocketAddr::new(headers.source, port(0)), SocketAddr::new(headers.destination, port(2))))
    }
}

/// A packet that may be for a service.
#[derive(Debug)]
pub struct Packet<'a> {
    /// As it arrived.
    pub arrival: &'a Arrival,
    /// Its IP header.
    pub headers: Headers,
    /// Ports are 0 where it has none.
    pub tuple: Tuple,
    /// TCP flags.
    flags: u8,
}

impl Packet<'_> {
    /// The first packet of a connection.
    pub fn is_first(&self) -> bool {
        self.flags & (tcp::SYN | tcp::ACK) == tcp::SYN
    }

    /// Nothing can have come before it that matters.
    pub fn is_new(&self) -> bool {
        self.is_first() || self.tuple.protocol == Protocol::Udp
    }

    /// What answers a segment of no connection.
    pub const fn is_refusal(&self) -> bool {
        self.flags & (tcp::RST | tcp::ACK) == tcp::RST
    }

    /// Nothing more will come from this side.
    pub const fn is_fin(&self) -> bool {
        self.flags & tcp::FIN != 0
    }

    /// A backend's first segment of a TCP connection.
    pub const fn is_syn_ack(&self) -> bool {
        self.flags & (tcp::SYN | tcp::ACK) == tcp::SYN | tcp::ACK
    }

    /// Sequence and acknowledgement number of a TCP segment; 0 for what has none.
    pub fn numbers(&self) -> (u32, u32) {
        if self.tuple.protocol != Protocol::Tcp || self.headers.part == Part::Later {
            return (0, 0);
        }
        let segment = &self.arrival.frame[self.headers.transport..];
        (wire::long(segment, 4), wire::long(segment, 8))
    }

    /// The connection is no more.
    pub const fn is_reset(&self) -> bool {
        self.flags & tcp::RST != 0
    }

    /// From the IP header on, bytes.
    pub fn length(&self) -> u64 {
        (self.arrival.frame.len() - wire::ETHERNET) as u64
    }
}

/// Programs, services, and what was remembered of the packets before.
#[derive(Clone, Debug, Default)]
#[expect(missing_docs, reason = "named after their types")]
pub struct Model {
    pub settings: Settings,
    pub services: Services,
    pub flows: Table<Tuple, Flow>,
    pub half_open: Table<Tuple, Flow>,
    pub health: Table<BackendId, Health>,
    pub detours: Table<Tuple, Detour>,
    /// By service port: a second, and how many flows were opened in it.
    pub budgets: BTreeMap<u32, (u64, u32)>,
    pub affinities: Table<AffinityKey, Affinity>,
    pub fragments: Table<FragmentKey, Fragment>,
    pub counts: Counts,
}

/// Which table of flows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Place {
    /// That of those that have not proved themselves.
    HalfOpen,
    /// That of all others.
    Flows,
}

/// What was counted, by the programs and for the coverage of a run.
#[derive(Clone, Debug, Default)]
pub struct Counts {
    /// Packets by reason.
    pub reasons: BTreeMap<u32, u64>,
    /// Connections and drops by service port.
    pub services: BTreeMap<u32, (u64, u64)>,
    /// By backend.
    pub backends: BTreeMap<BackendId, BackendCounts>,
    /// What happened in the model, in words.
    pub events: BTreeMap<&'static str, u64>,
}

impl Counts {
    /// Something happened.
    pub fn note(&mut self, event: &'static str) {
        *self.events.entry(event).or_default() += 1;
    }

    /// Those of a backend.
    pub fn backend(&mut self, backend: BackendId) -> &mut BackendCounts {
        self.backends.entry(backend).or_default()
    }
}

impl Model {
    /// Nothing is served, and nothing remembered.
    #[must_use]
    pub fn new(settings: Settings, counts: Counts) -> Self {
        let mut model = Self { settings, counts, ..Self::default() };
        for id in 0..services::BACKENDS {
            for is_v6 in [false, true] {
                model.health.insert(BackendId { is_v6, id }, Health::default());
            }
        }
        model
    }

    /// A table of flows.
    pub fn table(&mut self, place: Place) -> &mut Table<Tuple, Flow> {
        match place {
            Place::HalfOpen => &mut self.half_open,
            Place::Flows => &mut self.flows,
        }
    }

    /// What becomes of packets with a tuple, in whichever table it is.
    #[must_use]
    pub fn any_flow(&self, tuple: Tuple) -> Option<Flow> {
        self.flows.get(tuple).or_else(|| self.half_open.get(tuple))
    }

    /// Runs a packet through the program of its hook, at a time.
    pub fn run(&mut self, arrival: &Arrival, now: u64) -> Outcome {
        let passed =
            || Outcome { verdict: Verdict::Pass, reason: None, frame: arrival.frame.clone(), mark: arrival.mark };
        // A packet that this node has translated is on its way to a backend.
        if arrival.program == Program::ToPod && arrival.mark & self.settings.mark != 0 && arrival.came_in_by != 0 {
            return passed();
        }
        let outcome = match self.look_at(arrival, now) {
            Ok(None) => passed(),
            Ok(Some(outcome)) => outcome,
            Err(reason) => Outcome {
                verdict: if reason.drops() { Verdict::Drop } else { Verdict::Pass },
                reason: Some(reason),
                ..passed()
            },
        };
        if let Some(reason) = outcome.reason {
            *self.counts.reasons.entry(reason as u32).or_default() += 1;
        }
        outcome
    }

    /// Time passes: everything becomes older.
    pub fn wait(&mut self, nanoseconds: u64) {
        let flows = self.flows.values_mut().chain(self.half_open.values_mut());
        let times = flows.flat_map(Timed::times);
        let times = times.chain(self.affinities.values_mut().flat_map(Timed::times));
        let times = times.chain(self.fragments.values_mut().flat_map(Timed::times));
        for time in times.chain(self.health.values_mut().flat_map(Timed::times)) {
            // 0 says that it never happened.
            if *time != 0 {
                *time = time.saturating_sub(nanoseconds).max(1);
            }
        }
    }

    /// An entry whose other half is not there, or belongs to another. Mirrors of half-open flows are left alone by design, and
    /// a pod that sends what only a backend should makes a flow of its own in the place of one.
    #[must_use]
    pub fn single_half(&self) -> Option<(Tuple, Flow)> {
        let (flows, half_open) = (self.flows.entries(), self.half_open.entries());
        let is_alone =
            |(tuple, flow): &(&Tuple, &Flow)| flows.get(&flow.to.swap()).is_none_or(|other| other.to != tuple.swap());
        let is_alone_half_open = |(tuple, flow): &(&Tuple, &Flow)| {
            let is_others = |other: &Flow| !other.is_clients() && other.to != tuple.swap();
            flow.is_clients() && half_open.get(&flow.to.swap()).is_none_or(is_others)
        };
        let found = flows.iter().find(is_alone).or_else(|| half_open.iter().find(is_alone_half_open));
        found.map(|(tuple, flow)| (*tuple, *flow))
    }

    /// Removes the flows that are over, as the agent does now and then: where they were, and their keys.
    pub fn collect(&mut self, now: u64) -> Vec<(Place, Tuple)> {
        let is_over = |flows: &BTreeMap<Tuple, Flow>, place: Place, tuple: Tuple, flow: &Flow| {
            let other = flows.get(&flow.to.swap()).filter(|other| other.to == tuple.swap());
            match (flow.is_clients(), other) {
                (true, mirror) => flow.is_expired(mirror, now, &self.settings.idle),
                (false, Some(client)) => client.is_expired(Some(flow), now, &self.settings.idle),
                (false, None) => place == Place::Flows || is_left_behind(flow, now, &self.settings.idle),
            }
        };
        let mut over = Vec::new();
        for (place, flows) in [(Place::HalfOpen, self.half_open.entries()), (Place::Flows, self.flows.entries())] {
            let entries = flows.iter().filter(|(tuple, flow)| is_over(flows, place, **tuple, flow));
            over.extend(entries.map(|(tuple, _)| (place, *tuple)));
        }
        for (place, tuple) in &over {
            self.table(*place).remove(*tuple);
        }
        over
    }

    /// `None`: the packet passes as it is.
    fn look_at(&mut self, arrival: &Arrival, now: u64) -> Result<Option<Outcome>, Reason> {
        let is_v4 = match [arrival.frame[12], arrival.frame[13]] {
            wire::IPV4 => true,
            wire::IPV6 => false,
            _ => return Ok(None),
        };
        let headers = match Headers::of_frame(&arrival.frame, is_v4) {
            Ok(headers) => headers,
            Err(Fault::OnItsWay) => return Ok(None),
            Err(Fault::Malformed) => return Err(Reason::Malformed),
            Err(Fault::ExtensionHeaders) => return Err(Reason::ExtensionHeaders),
        };
        if headers.protocol == protocol::icmp(is_v4) {
            return self.icmp(arrival, &headers, now);
        }
        let Some(protocol) = services::protocol(headers.protocol) else { return Ok(None) };
        let tuple = Tuple {
            source: SocketAddr::new(headers.source, 0),
            destination: SocketAddr::new(headers.destination, 0),
            protocol,
            interface: arrival.interface,
        };
        let mut packet = Packet { arrival, headers, tuple, flags: 0 };
        if packet.headers.part != Part::Later {
            packet.read_transport()?;
        }
        if packet.headers.part != Part::Whole
            && let Known::No(outcome) = self.fragment(&mut packet, now)?
        {
            return Ok(outcome);
        }
        match arrival.program {
            Program::FromPod => self.sent_by_pod(&packet, now),
            Program::ToPod => self.sent_to_pod(&packet, now),
        }
    }
}

/// Whether nobody waits for what is left of a half-open flow: a mirror whose client's half leads elsewhere, or is gone.
fn is_left_behind(mirror: &Flow, now: u64, idle: &IdleTimes) -> bool {
    const FRESH: u64 = 10_000_000_000;
    let is_vain = mirror.fin || mirror.reset || mirror.packets < 2;
    let client = Flow { established: true, fin: false, reset: false, ..*mirror };
    is_vain && now.saturating_sub(mirror.last_seen) > FRESH || client.is_expired(Some(mirror), now, idle)
}

impl Packet<'_> {
    /// Reads ports and flags. A header that ends behind the packet, or that claims what cannot be, is an error.
    fn read_transport(&mut self) -> Result<(), Reason> {
        let bytes = &self.arrival.frame[self.headers.transport..self.headers.end];
        // What lengths claim cannot be checked in a fragment.
        let is_whole = self.headers.part == Part::Whole;
        let is_honest = match self.tuple.protocol {
            Protocol::Tcp => {
                bytes.len() >= 20 && {
                    self.flags = bytes[13];
                    let length = usize::from(bytes[12] >> 4) * 4;
                    length >= 20 && (length <= bytes.len() || !is_whole)
                }
            }
            Protocol::Udp => {
                bytes.len() >= 8 && {
                    let length = usize::from(wire::word(bytes, 4));
                    length >= 8 && (length <= bytes.len() || !is_whole)
                }
            }
            Protocol::Sctp => {
                bytes.len() >= 16 && {
                    self.flags = match bytes[12] {
                        wire::sctp::INIT => tcp::SYN,
                        // The T bit says that there is no such association, as a RST without ACK does.
                        wire::sctp::ABORT if bytes[13] & 1 != 0 => tcp::RST,
                        wire::sctp::ABORT | wire::sctp::SHUTDOWN_COMPLETE => tcp::RST | tcp::ACK,
                        _ => 0,
                    };
                    true
                }
            }
        };
        if !is_honest {
            return Err(Reason::Malformed);
        }
        self.tuple.source.set_port(wire::word(bytes, 0));
        self.tuple.destination.set_port(wire::word(bytes, 2));
        Ok(())
    }
}

//! The two programs: what becomes of a packet at the interface of a pod.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use lb_common::Protocol;
use lb_common::abi::{Hook, IdleTimes, Reason, handover, options};

use serde::{Deserialize, Serialize};

use super::flows::{Affinity, AffinityKey, Flow, Fragment, FragmentKey, Tuple};
use super::fragments::Known;
use super::open::Opened;
use super::rewrite::rewrite;
use super::services::{self, FrontendKey, Services};
use super::table::Table;
use super::wire::{self, Fault, Headers, Part, protocol, tcp};

/// After a pause of this length, nanoseconds, or with every so many packets, a flow sees after its mirror.
const MIRROR_PAUSE: u64 = 50_000_000;
const MIRROR_PACKETS: u64 = 64;

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
            options: options::ANSWER_ECHO,
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

    /// Nothing more will come from this side.
    pub const fn is_fin(&self) -> bool {
        self.flags & tcp::FIN != 0
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
    pub affinities: Table<AffinityKey, Affinity>,
    pub fragments: Table<FragmentKey, Fragment>,
    pub counts: Counts,
}

/// What was counted, by the programs and for the coverage of a run.
#[derive(Clone, Debug, Default)]
pub struct Counts {
    /// Packets by reason.
    pub reasons: BTreeMap<u32, u64>,
    /// Connections and drops by service port.
    pub services: BTreeMap<u32, (u64, u64)>,
    /// What happened in the model, in words.
    pub events: BTreeMap<&'static str, u64>,
}

impl Counts {
    /// Something happened.
    pub fn note(&mut self, event: &'static str) {
        *self.events.entry(event).or_default() += 1;
    }
}

impl Model {
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
        let times = self.flows.values_mut().map(|flow| &mut flow.last_seen);
        let times = times.chain(self.affinities.values_mut().map(|affinity| &mut affinity.last_used));
        for time in times.chain(self.fragments.values_mut().map(|fragment| &mut fragment.seen)) {
            *time = time.saturating_sub(nanoseconds);
        }
    }

    /// An entry whose other half is not there, or belongs to another.
    #[must_use]
    pub fn single_half(&self) -> Option<(Tuple, Flow)> {
        let flows = self.flows.entries();
        let is_alone =
            |(tuple, flow): &(&Tuple, &Flow)| flows.get(&flow.to.swap()).is_none_or(|other| other.to != tuple.swap());
        flows.iter().find(is_alone).map(|(tuple, flow)| (*tuple, *flow))
    }

    /// Removes the flows that are over, as the agent does now and then: their keys.
    pub fn collect(&mut self, now: u64) -> Vec<Tuple> {
        let flows = self.flows.entries();
        let is_over = |(tuple, flow): &(&Tuple, &Flow)| {
            let other = flows.get(&flow.to.swap()).filter(|other| other.to == tuple.swap());
            let (forward, mirror) = match flow.hook {
                Hook::FromPod | Hook::Hairpin => (Some(*flow), other),
                Hook::ToPod | Hook::HairpinReply => (other, Some(*flow)),
            };
            forward.is_none_or(|forward| forward.is_expired(mirror, now, &self.settings.idle))
        };
        let over: Vec<Tuple> = flows.iter().filter(is_over).map(|(tuple, _)| *tuple).collect();
        for tuple in &over {
            self.flows.remove(*tuple);
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
            return self.icmp(arrival, &headers);
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
            Program::ToPod => Ok(self.sent_to_pod(&packet, now)),
        }
    }

    /// A packet that a pod has sent.
    fn sent_by_pod(&mut self, packet: &Packet<'_>, now: u64) -> Result<Option<Outcome>, Reason> {
        let tuple = packet.tuple;
        if let Some(flow) = self.flows.get(tuple) {
            match flow.hook {
                // The reply to a client of this node, which is translated where it reaches the client.
                Hook::ToPod => return Ok(None),
                Hook::HairpinReply => {
                    self.account(packet, now);
                    self.counts.note("hairpin reply");
                    return Ok(Some(self.translated(packet, Opened::of(&flow))));
                }
                Hook::FromPod | Hook::Hairpin => {
                    if self.may_go_on(packet, &flow) && self.has_its_mirror(tuple, &flow, now) {
                        self.account(packet, now);
                        self.counts.note("flow followed");
                        return Ok(Some(self.translated(packet, Opened::of(&flow))));
                    }
                    self.counts.note("flow left for another");
                    self.remove_pair(tuple, &flow);
                }
            }
        }
        let key = FrontendKey { at: tuple.destination, protocol: tuple.protocol };
        let Some(&service_port) = self.services.frontends.get(&key) else { return self.not_served(packet, now) };
        let is_anothers = match self.settings.handover {
            handover::FROM_ANOTHER => tuple.protocol == Protocol::Tcp && !packet.is_first(),
            handover::TO_ANOTHER => true,
            _ => false,
        };
        if is_anothers {
            self.counts.note("left to another proxy");
            return Ok(None);
        }
        let opened = self.open(packet, service_port, now);
        let counts = self.counts.services.entry(service_port).or_default();
        match opened {
            Ok(opened) => {
                counts.0 += 1;
                Ok(Some(self.translated(packet, opened)))
            }
            Err(reason) => {
                counts.1 += 1;
                if reason == Reason::Refused { self.refuse(packet).map(Some) } else { Err(reason) }
            }
        }
    }

    /// A packet without a flow, to what is no frontend.
    fn not_served(&mut self, packet: &Packet<'_>, now: u64) -> Result<Option<Outcome>, Reason> {
        if packet.is_first()
            && let Some(opened) = self.dial(packet, now)?
        {
            return Ok(Some(self.translated(packet, opened)));
        }
        if self.settings.options & options::REFUSE_UNSERVED != 0 && self.services.is_vip(packet.tuple.destination.ip())
        {
            return self.refuse(packet).map(Some);
        }
        Ok(None)
    }

    /// A packet that is about to reach a pod.
    fn sent_to_pod(&mut self, packet: &Packet<'_>, now: u64) -> Option<Outcome> {
        let flow = self.flows.get(packet.tuple).filter(|flow| flow.hook == Hook::ToPod)?;
        self.account(packet, now);
        self.counts.note("reply");
        let frame = rewrite(&packet.arrival.frame, &packet.headers, flow.to.source, flow.to.destination);
        Some(Outcome { verdict: Verdict::Pass, reason: None, frame, mark: packet.arrival.mark })
    }

    /// A packet with what its flow makes of it.
    fn translated(&self, packet: &Packet<'_>, opened: Opened) -> Outcome {
        let frame = rewrite(&packet.arrival.frame, &packet.headers, opened.to.source, opened.to.destination);
        match opened.hook {
            Hook::Hairpin | Hook::HairpinReply => self.sent_back(packet.arrival, frame),
            Hook::FromPod | Hook::ToPod => {
                Outcome { verdict: Verdict::Pass, reason: None, frame, mark: packet.arrival.mark | self.settings.mark }
            }
        }
    }

    /// A packet that goes back to the pod that has sent it, as if the node had forwarded it.
    pub(super) fn sent_back(&self, arrival: &Arrival, mut frame: Vec<u8>) -> Outcome {
        let (destination, source) = frame[..12].split_at_mut(6);
        destination.swap_with_slice(source);
        Outcome { verdict: Verdict::Redirect, reason: None, frame, mark: arrival.mark | self.settings.mark }
    }

    /// An established connection goes on, even when its backend has left the service. A datagram and a new connection
    /// under the same ports need a backend that may keep its flows, and the connection before must not have begun to end.
    fn may_go_on(&self, packet: &Packet<'_>, flow: &Flow) -> bool {
        if packet.tuple.protocol != Protocol::Udp {
            if !packet.is_first() {
                return true;
            }
            let mirror = self.flows.get(flow.to.swap());
            if flow.fin || flow.reset || mirror.is_some_and(|mirror| mirror.fin || mirror.reset) {
                return false;
            }
            if flow.established {
                // Another connection: a backend that drains gets none.
                let is_v6 = packet.tuple.source.is_ipv6();
                return flow.backend == NO_BACKEND || self.services.is_active(is_v6, flow.backend, flow.generation);
            }
        }
        flow.backend == NO_BACKEND
            || self.services.keeps_flows(packet.tuple.source.is_ipv6(), flow.backend, flow.generation)
    }

    /// Now and then, and after a pause, a flow sees after its mirror, which may have been evicted.
    fn has_its_mirror(&mut self, tuple: Tuple, flow: &Flow, now: u64) -> bool {
        if now.saturating_sub(flow.last_seen) <= MIRROR_PAUSE && !flow.packets.is_multiple_of(MIRROR_PACKETS) {
            return true;
        }
        match self.flows.get(flow.to.swap()) {
            Some(present) => present.to == tuple.swap(),
            None => {
                self.counts.note("mirror put back");
                self.flows.insert(flow.to.swap(), flow.mirror(tuple, now));
                true
            }
        }
    }

    /// Removes a flow, and its mirror unless that belongs to another one.
    fn remove_pair(&mut self, tuple: Tuple, flow: &Flow) {
        if self.flows.get(flow.to.swap()).is_some_and(|mirror| mirror.to == tuple.swap()) {
            self.flows.remove(flow.to.swap());
        }
        self.flows.remove(tuple);
    }

    fn account(&mut self, packet: &Packet<'_>, now: u64) {
        let Some(flow) = self.flows.get_mut(packet.tuple) else { return };
        flow.last_seen = now;
        flow.packets += 1;
        flow.bytes += packet.length();
        flow.fin |= packet.is_fin();
        flow.reset = packet.is_reset();
        flow.established |= !packet.is_first();
    }
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
                        wire::sctp::ABORT | wire::sctp::SHUTDOWN_COMPLETE => tcp::RST,
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

//! Random operations: few clients, ports, virtual addresses and backends, so that things happen to the same flow again and
//! again, and get into each other's way.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use fastrand::Rng;
use lb_common::Protocol;
use lb_common::abi::{Hook, handover, options};

use super::flows::{Flow, Tuple};
use super::operation::{Entry, Load, Operation, Send};
use super::packet::{Kind, Lie, Packet, Piece};
use super::programs::{Model, NO_LIMIT, Program};
use super::services::ServicePort;
use super::wire::{self, protocol, sctp};

/// The interfaces of pods, one each.
pub const INTERFACES: std::ops::RangeInclusive<u32> = 2..=4;
/// Service ports: those with an odd number are of IPv6.
const SERVICE_PORTS: u32 = 12;

/// A source of operations.
pub struct Generator {
    rng: Rng,
    /// Operations that are to come next.
    next: Vec<Operation>,
    /// Whether the tables are full now and then.
    evicts: bool,
    /// The host that hardly ever answers.
    silent: Option<u8>,
}

impl Generator {
    /// The same seed gives the same operations, if the same becomes of them.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self { rng: Rng::with_seed(seed), next: Vec::new(), evicts: false, silent: None }
    }

    /// Everything begins anew: what a sequence begins with.
    pub fn begin(&mut self) -> Vec<Operation> {
        self.next = (0..SERVICE_PORTS).map(|id| self.serve(id)).collect();
        self.evicts = self.rng.bool();
        self.silent = self.pick(&[None, Some(1), Some(2), Some(2)]);
        let most = options::ANSWER_ECHO | options::REFUSE_UNSERVED;
        let options = self.pick(&[0, most, most | options::PASSIVE_HEALTH]);
        let handover = self.pick(&[handover::NONE, handover::FROM_ANOTHER, handover::TO_ANOTHER]);
        let refusals_per_second = self.pick(&[0, NO_LIMIT]);
        // To load the programs anew takes as long as a sequence.
        if self.one_in(60) {
            vec![Operation::Load(Load { options, handover, refusals_per_second })]
        } else {
            Vec::new()
        }
    }

    /// What happens next, and may have to do with what happened before.
    pub fn next(&mut self, model: &Model) -> Operation {
        if let Some(operation) = self.next.pop() {
            return operation;
        }
        match self.rng.u32(..1000) {
            0..14 => {
                let id = self.rng.u32(..SERVICE_PORTS);
                self.serve(id)
            }
            14..20 => Operation::Wait(
                self.pick(&[40, 60, 150, 300, 1_100, 1_500, 2_500, 5_000, 9_000, 13_000, 25_000, 45_000, 70_000]),
            ),
            20..24 if self.evicts => self.evict(model),
            24..26 if self.evicts => self.lose(model).unwrap_or(Operation::Collect),
            26 => Operation::Collect,
            27..47 => self.exchange(model).unwrap_or(Operation::Collect),
            47..58 => self.trial(model).unwrap_or(Operation::Collect),
            _ => Operation::Send(self.send(model)),
        }
    }

    fn pick<T: Clone>(&mut self, choices: &[T]) -> T {
        choices[self.rng.usize(..choices.len())].clone()
    }

    fn one_in(&mut self, count: u32) -> bool {
        self.rng.u32(..count) == 0
    }

    fn serve(&mut self, id: u32) -> Operation {
        let is_v4 = id.is_multiple_of(2);
        let protocol = [protocol::TCP, protocol::TCP, protocol::UDP, protocol::UDP, protocol::TCP, protocol::SCTP]
            [(id / 2 % 6) as usize];
        let count = self.pick(&[0, 1, 1, 1, 1, 2, 2, 3]);
        let frontends = (0..count).map(|_| self.frontend(is_v4)).collect();
        let count = self.pick(&[0, 1, 1, 2, 3, 5]);
        let backends = (0..count).map(|_| self.backend(is_v4)).collect();
        let draining = if self.one_in(3) { (0..2).map(|_| self.backend(is_v4)).collect() } else { [].into() };
        let affinity = self.pick(&[0, 0, 3, 20]);
        let drop_when_empty = self.rng.bool();
        let is_broken = self.one_in(30);
        let no_passive_health = self.one_in(6);
        let budget = if self.one_in(8) { self.rng.u32(1..4) } else { 0 };
        Operation::Serve(
            id,
            ServicePort {
                frontends,
                protocol,
                backends,
                draining,
                affinity,
                drop_when_empty,
                no_passive_health,
                budget,
                is_broken,
            },
        )
    }

    fn frontend(&mut self, is_v4: bool) -> SocketAddr {
        SocketAddr::new(self.vip(is_v4), self.pick(&[80, 53]))
    }

    fn vip(&mut self, is_v4: bool) -> IpAddr {
        address(is_v4, 0, self.rng.u8(1..=3))
    }

    fn backend(&mut self, is_v4: bool) -> SocketAddr {
        let port = self.pick(&[80, 80, 53, 8080]);
        SocketAddr::new(
            if self.one_in(2) { address(is_v4, 1, self.rng.u8(2..=4)) } else { address(is_v4, 2, self.rng.u8(1..=2)) },
            port,
        )
    }

    fn client_port(&mut self) -> u16 {
        40_000 + self.rng.u16(..4)
    }

    fn interface(&mut self) -> u32 {
        self.rng.u32(INTERFACES)
    }

    fn evict(&mut self, model: &Model) -> Operation {
        match self.flow(model, |_| true) {
            Some((tuple, flow)) => evicted(model, tuple, &flow),
            None => Operation::Collect,
        }
    }

    /// A flow is lost, or its mirror alone; then one of the two sides goes on.
    fn lose(&mut self, model: &Model) -> Option<Operation> {
        let (tuple, flow) = self.flow(model, |flow| flow.is_clients() && flow.established)?;
        let is_v4 = tuple.source.is_ipv4();
        let mirror = model.any_flow(flow.to.swap())?;
        let send = if self.one_in(3) {
            let kind = self.kind(tuple.protocol, false, is_v4);
            self.sent(tuple.interface, tuple.source, tuple.destination, kind)
        } else if flow.hook == Hook::Hairpin {
            let kind = self.kind(tuple.protocol, false, is_v4);
            self.sent(tuple.interface, flow.to.destination, flow.to.source, kind)
        } else {
            let kind = match tuple.protocol {
                Protocol::Tcp => Kind::Tcp(self.pick(&["R", "R", "R", "RA"]).into()),
                Protocol::Udp => Kind::Udp,
                Protocol::Sctp => Kind::Sctp(sctp::ABORT),
            };
            self.sent(tuple.interface, flow.to.source, flow.to.destination, kind)
        };
        self.next = vec![Operation::Send(send)];
        if !self.one_in(3) {
            self.next.push(evicted(model, tuple, &flow));
        }
        Some(evicted(model, flow.to.swap(), &mirror))
    }

    /// A half of a flow that is like this, from either table.
    fn flow(&mut self, model: &Model, wanted: impl Fn(&Flow) -> bool) -> Option<(Tuple, Flow)> {
        let tables = [model.half_open.entries(), model.flows.entries()];
        let first = self.rng.usize(..2);
        let one = self.entry(tables[first], |_, flow| wanted(flow));
        one.or_else(|| self.entry(tables[1 - first], |_, flow| wanted(flow)))
    }

    fn entry(
        &mut self,
        flows: &BTreeMap<Tuple, Flow>,
        wanted: impl Fn(&Tuple, &Flow) -> bool,
    ) -> Option<(Tuple, Flow)> {
        if flows.is_empty() {
            return None;
        }
        let start = self.rng.usize(..flows.len());
        let found = flows.iter().skip(start).chain(flows.iter().take(start)).find(|(tuple, flow)| wanted(tuple, flow));
        found.map(|(tuple, flow)| (*tuple, *flow))
    }

    /// A packet, perhaps with something unusual about it.
    fn send(&mut self, model: &Model) -> Send {
        let mut send = self.honest(model);
        if self.one_in(12) {
            self.split(&mut send);
        }
        if self.one_in(15) {
            let packet = send.packet.clone();
            send.packet.lies.extend((0..self.rng.u32(1..3)).map(|_| self.lie(&packet)));
        }
        if self.one_in(20) {
            send.mark = self.pick(&[1, model.settings.mark]);
        }
        // The pod of another interface says the same.
        if self.one_in(40) {
            send.interface = self.interface();
        }
        send.own = self.one_in(20);
        send.summed = self.one_in(3);
        send
    }

    fn honest(&mut self, model: &Model) -> Send {
        let is_v4 = self.rng.bool();
        match self.rng.u32(..100) {
            0..16 => self.dialled(is_v4),
            16..22 => self.repeated(model).unwrap_or_else(|| self.dialled(is_v4)),
            22..28 => self.dialled_directly(model).unwrap_or_else(|| self.dialled(is_v4)),
            28..52 => self.continued(model).unwrap_or_else(|| self.dialled(is_v4)),
            52..74 => self.answered(model).unwrap_or_else(|| self.dialled(is_v4)),
            74..84 => self.complained(model).unwrap_or_else(|| self.dialled(is_v4)),
            84..88 => self.echo(is_v4),
            88..92 => self.odd(is_v4),
            _ => self.passing_by(model).unwrap_or_else(|| self.dialled(is_v4)),
        }
    }

    /// A client's packet to a frontend, or to a port beside one.
    fn dialled(&mut self, is_v4: bool) -> Send {
        let interface = self.interface();
        let from = SocketAddr::new(pod(is_v4, interface), self.client_port());
        let to = if self.one_in(10) { SocketAddr::new(self.vip(is_v4), 81) } else { self.frontend(is_v4) };
        let protocol = self.pick(&[Protocol::Tcp, Protocol::Tcp, Protocol::Udp, Protocol::Udp, Protocol::Sctp]);
        let is_first = self.rng.u32(..4) > 0;
        let kind = self.kind(protocol, is_first, is_v4);
        self.sent(interface, from, to, kind)
    }

    /// The connection of a client to a backend without a service, often under ports that a flow has as well.
    fn dialled_directly(&mut self, model: &Model) -> Option<Send> {
        let (_, flow) = self.flow(model, |flow| flow.hook == Hook::FromPod)?;
        let is_v4 = flow.to.source.is_ipv4();
        let is_first = self.rng.bool();
        let kind = self.kind(flow.to.protocol, is_first, is_v4);
        Some(self.sent(flow.to.interface, flow.to.source, flow.to.destination, kind))
    }

    /// The next packet of a client.
    fn continued(&mut self, model: &Model) -> Option<Send> {
        let (tuple, flow) = self.flow(model, |flow| matches!(flow.hook, Hook::FromPod | Hook::Hairpin))?;
        let is_first = self.one_in(8);
        let kind = self.kind(tuple.protocol, is_first, tuple.source.is_ipv4());
        let mut send = self.sent(tuple.interface, tuple.source, tuple.destination, kind);
        send.packet.acknowledges = self.acknowledgement(model, &flow);
        if self.one_in(20) {
            aim_at_zero(&mut send.packet, &flow);
        }
        Some(send)
    }

    /// What a client's packet acknowledges: mostly what the backend has sent, if that is known.
    fn acknowledgement(&mut self, model: &Model, flow: &Flow) -> Option<u32> {
        let expected = model.half_open.entries().get(&flow.to.swap())?.sequence;
        let further = self.pick(&[0, 0, 0, 0, 1, 1000, (1 << 20) - 1, 1 << 20, u32::MAX, 1 << 31]);
        Some(expected.wrapping_add(further))
    }

    /// A client's SYN, or INIT, once more.
    fn repeated(&mut self, model: &Model) -> Option<Send> {
        let is_syn = |flow: &Flow| flow.is_clients() && !flow.established && flow.to.protocol != Protocol::Udp;
        let (tuple, flow) = self.flow(model, is_syn)?;
        Some(self.syn_again(tuple, &flow))
    }

    fn syn_again(&mut self, tuple: Tuple, flow: &Flow) -> Send {
        let kind = if tuple.protocol == Protocol::Tcp { Kind::Tcp("S".into()) } else { Kind::Sctp(sctp::INIT) };
        let mut send = self.sent(tuple.interface, tuple.source, tuple.destination, kind);
        send.packet.sequence = Some(if self.one_in(10) { self.rng.u32(..) } else { flow.sequence });
        send
    }

    /// The answer of a backend, where it reaches the client.
    fn answered(&mut self, model: &Model) -> Option<Send> {
        let silent = self.silent.filter(|_| !self.one_in(40));
        let is_silent = |at: IpAddr| silent.is_some_and(|host| at == address(at.is_ipv4(), 2, host));
        let table = if self.rng.bool() { model.half_open.entries() } else { model.flows.entries() };
        let (tuple, flow) = self.entry(table, |tuple, flow| !flow.is_clients() && !is_silent(tuple.source.ip()))?;
        Some(self.answer_of(model, tuple, &flow))
    }

    fn answer_of(&mut self, model: &Model, tuple: Tuple, flow: &Flow) -> Send {
        let is_first = self.one_in(20);
        let kind = self.kind(tuple.protocol, is_first, tuple.source.is_ipv4());
        let mut send = self.sent(tuple.interface, tuple.source, tuple.destination, kind);
        if tuple.protocol == Protocol::Tcp && flow.packets == 0 && !self.one_in(4) {
            let client = model.any_flow(flow.to.swap());
            let any = self.rng.u32(..);
            send.packet.kind = Kind::Tcp(self.pick(&["SA", "SA", "SA", "SA", "SA", "RA"]).into());
            send.packet.sequence = Some(self.pick(&[any, any, any, u32::MAX, 0]));
            send.packet.acknowledges = client.map(|client| client.sequence.wrapping_add(1));
        }
        if flow.hook == Hook::ToPod {
            send.program = Program::ToPod;
        }
        if self.one_in(20) {
            aim_at_zero(&mut send.packet, flow);
        }
        send
    }

    /// New connections to a service with a suspect backend, when that may be tried again.
    fn trial(&mut self, model: &Model) -> Option<Operation> {
        let services = &model.services;
        let suspects = model.health.entries().iter().filter(|(_, health)| health.suspect_since != 0);
        let ports = suspects.filter_map(|(id, health)| {
            let backend = services.backends.get(&(id.is_v6, id.id))?;
            services.is_active(id.is_v6, id.id, health.generation).then_some(backend)
        });
        let ports: Vec<_> = ports.filter_map(|backend| services.ports.get(&backend.service_port)).collect();
        let port = *self.rng.choice(&ports)?;
        let frontends: Vec<SocketAddr> = port.frontends.iter().copied().collect();
        for _ in 0..4 {
            let (interface, to) = (self.interface(), self.pick(&frontends));
            // Of a port that has no flow yet.
            let from = SocketAddr::new(pod(to.is_ipv4(), interface), 50_000 + self.rng.u16(..5000));
            let kind = self.kind(port.protocol(), true, to.is_ipv4());
            let send = self.sent(interface, from, to, kind);
            self.next.push(Operation::Send(send));
        }
        Some(Operation::Wait(self.pick(&[600, 1_100, 1_100, 5_500])))
    }

    /// What goes on with a half-open flow.
    fn exchange(&mut self, model: &Model) -> Option<Operation> {
        let half_open = model.half_open.entries();
        let is_open = |flow: &Flow| flow.is_clients() && !flow.attempt.is_answered;
        let (tuple, flow) = match self.rng.u32(..8) {
            // A suspect answers the copy of a SYN.
            0 => self.entry(half_open, |_, flow| flow.attempt.is_probe && flow.packets == 0),
            // A backend answers, perhaps one that was left for another.
            1 => self.entry(half_open, |_, flow| !flow.is_clients() && flow.packets == 0),
            2 => self.entry(half_open, |_, flow| flow.is_clients() && flow.to.protocol == Protocol::Udp),
            3 => self.entry(half_open, |_, flow| flow.is_clients() && flow.attempt.is_answered),
            _ => {
                self.entry(half_open, |_, flow| is_open(flow) && !flow.established && flow.to.protocol != Protocol::Udp)
            }
        }?;
        let mut operations = Vec::new();
        match (flow.is_clients(), tuple.protocol) {
            (false, _) => operations.push(Operation::Send(self.answer_of(model, tuple, &flow))),
            // A client repeats its SYN, later each time.
            (true, Protocol::Tcp | Protocol::Sctp) if is_open(&flow) && !flow.established => {
                for time in 0..self.rng.u64(1..4) {
                    operations.push(Operation::Wait(self.pick(&[100, 210, 1_000 << time, 1_000 << time])));
                    operations.push(Operation::Send(self.syn_again(tuple, &flow)));
                }
            }
            // A client goes on; with datagrams up to as many as need no answer.
            (true, protocol) => {
                for _ in 0..if protocol == Protocol::Udp { self.pick(&[1, 2, 17]) } else { 1 } {
                    let kind = self.kind(protocol, false, tuple.source.is_ipv4());
                    let mut send = self.sent(tuple.interface, tuple.source, tuple.destination, kind);
                    send.packet.acknowledges = self.acknowledgement(model, &flow);
                    operations.push(Operation::Send(send));
                }
            }
        }
        operations.reverse();
        self.next = operations;
        self.next.pop()
    }

    /// A packet of a flow at another hook than that which translates it.
    fn passing_by(&mut self, model: &Model) -> Option<Send> {
        let (tuple, flow) = self.flow(model, |_| true)?;
        let shown = if self.rng.bool() { tuple } else { flow.to };
        let is_first = self.one_in(4);
        let kind = self.kind(shown.protocol, is_first, shown.source.is_ipv4());
        let interface = if self.rng.bool() { shown.interface } else { self.interface() };
        let mut send = self.sent(interface, shown.source, shown.destination, kind);
        if self.rng.bool() {
            send.program = Program::ToPod;
        }
        if self.rng.bool() {
            send.mark = model.settings.mark;
        }
        Some(send)
    }

    /// An ICMP error about a packet of a flow, from its receiver or from a router.
    fn complained(&mut self, model: &Model) -> Option<Send> {
        let (tuple, flow) = self.flow(model, |_| true)?;
        let is_v4 = tuple.source.is_ipv4();
        // What the complaining side saw: the packet as it left, or, more rarely, as it came.
        let seen = if self.one_in(6) { tuple } else { flow.to };
        let is_first = self.one_in(4);
        let mut about = Packet::new(seen.source, seen.destination, self.kind(seen.protocol, is_first, is_v4));
        self.vary(&mut about);
        if seen.protocol == Protocol::Tcp && !self.one_in(4) {
            about.sequence = Some(flow.sequence);
        }
        if self.one_in(6) {
            about.fragment = Some(self.piece());
        }
        if self.one_in(8) {
            let packet = about.clone();
            about.lies.push(self.lie(&packet));
        }
        let header = if is_v4 { 20 } else { 40 } + about.options.len() * 4;
        let quoted =
            if self.one_in(6) { self.rng.usize(..header + 20) } else { header + self.pick(&[8, 8, 18, 28, 500]) };
        let (kind, code) = if is_v4 {
            self.pick(&[(3, 3), (3, 4), (3, 1), (3, 13), (11, 0), (12, 0), (5, 0)])
        } else {
            self.pick(&[(1, 4), (2, 0), (3, 0), (4, 1), (1, 0), (1, 1), (137, 0)])
        };
        let router = SocketAddr::new(address(is_v4, 3, 1), 0);
        let blamed = if self.one_in(3) { router } else { seen.destination };
        // The error travels to the sender of what it is about.
        let is_from_pod = flow.hook != Hook::FromPod;
        let kind = Kind::Error { kind, code, about: Box::new(about), quoted };
        let mut send = self.sent(tuple.interface, blamed, seen.source, kind);
        if is_from_pod == self.one_in(10) {
            send.program = Program::ToPod;
        }
        Some(send)
    }

    fn echo(&mut self, is_v4: bool) -> Send {
        let interface = self.interface();
        let from = SocketAddr::new(pod(is_v4, interface), self.client_port());
        let to = if self.one_in(4) { self.backend(is_v4) } else { SocketAddr::new(self.vip(is_v4), 0) };
        let kind = if self.one_in(6) { Kind::EchoReply } else { Kind::EchoRequest };
        let mut send = self.sent(interface, from, to, kind);
        if self.one_in(6) {
            send.program = Program::ToPod;
        }
        send
    }

    /// From or to whom nobody should.
    fn odd(&mut self, is_v4: bool) -> Send {
        let interface = self.interface();
        let to = self.frontend(is_v4);
        let from = match self.rng.u32(..4) {
            // Land.
            0 => to,
            1 => self.frontend(is_v4),
            // Another pod's.
            2 => SocketAddr::new(pod(is_v4, self.interface()), self.client_port()),
            _ => SocketAddr::new(hairpin(is_v4), self.client_port()),
        };
        let protocol = self.pick(&[Protocol::Tcp, Protocol::Udp, Protocol::Sctp]);
        let kind = if self.one_in(4) { Kind::Other(self.rng.u8(..)) } else { self.kind(protocol, true, is_v4) };
        self.sent(interface, from, to, kind)
    }

    fn kind(&mut self, protocol: Protocol, is_first: bool, is_v4: bool) -> Kind {
        match protocol {
            Protocol::Tcp if is_first => Kind::Tcp(self.pick(&["S", "S", "S", "S", "SP", "SF", "SR"]).into()),
            Protocol::Tcp => {
                Kind::Tcp(self.pick(&["A", "A", "A", "A", "PA", "SA", "FA", "FA", "R", "RA", "F", ""]).into())
            }
            Protocol::Udp if is_v4 && self.one_in(4) => Kind::UdpUnchecked,
            Protocol::Udp => Kind::Udp,
            Protocol::Sctp if is_first => Kind::Sctp(sctp::INIT),
            Protocol::Sctp => Kind::Sctp(self.pick(&[sctp::DATA, 2, 3, sctp::ABORT, sctp::SHUTDOWN_COMPLETE])),
        }
    }

    fn sent(&mut self, interface: u32, from: SocketAddr, to: SocketAddr, kind: Kind) -> Send {
        let mut packet = Packet::new(from, to, kind);
        self.vary(&mut packet);
        Send { program: Program::FromPod, interface, packet, mark: 0, own: false, summed: false }
    }

    fn vary(&mut self, packet: &mut Packet) {
        packet.payload = self.pick(&[0, 0, 1, 2, 7, 32, 33, 200]);
        packet.salt = self.rng.u16(..);
        if self.one_in(8) {
            let headers = [protocol::HOP_BY_HOP, protocol::ROUTING, protocol::DESTINATION, protocol::AUTHENTICATION];
            let count = self.pick(&[1, 1, 2, 3, 6, 7, 8]);
            packet.options = (0..count).map(|_| self.pick(&headers)).collect();
        }
    }

    /// A fragment of the packet instead of all of it, and perhaps the others after or before.
    fn split(&mut self, send: &mut Send) {
        let mut piece = self.piece();
        send.packet.payload = self.pick(&[40, 64, 100]);
        if self.one_in(4) {
            send.packet.fragment = Some(piece);
            return;
        }
        // All of them, in some order.
        let length = self.pick(&[16, 24, 32]);
        let mut pieces: Vec<_> = (0..4_u16)
            .map(|number| {
                let mut part = send.clone();
                let start = number * length / 8;
                piece = Piece { id: piece.id, start, length: length.into(), more: number < 3 };
                part.packet.fragment = Some(piece.clone());
                part
            })
            .collect();
        if self.rng.bool() {
            self.rng.shuffle(&mut pieces);
        } else {
            pieces.reverse();
        }
        *send = pieces.pop().expect("there are four");
        self.next = pieces.into_iter().map(Operation::Send).collect();
    }

    fn piece(&mut self) -> Piece {
        Piece {
            id: self.rng.u16(..4),
            start: self.pick(&[0, 0, 1, 3, 100, 8191]),
            length: self.pick(&[0, 4, 8, 16, 24, 64]),
            more: self.rng.bool(),
        }
    }

    fn lie(&mut self, packet: &Packet) -> Lie {
        let is_v4 = packet.from.is_ipv4();
        let length = packet.frame().len();
        let l4 = 14 + if is_v4 { 20 } else { 40 };
        match self.rng.u32(..11) {
            10 => Lie::Unfinished,
            0 => Lie::Cut(self.rng.usize(34..length.max(35))),
            1 => Lie::Trailer(self.rng.usize(1..40)),
            // Version and IHL, total length, protocol.
            2 => Lie::Bytes(14, vec![self.rng.u8(..)]),
            3 => Lie::Bytes(if is_v4 { 16 } else { 18 }, vec![self.pick(&[0, 0, 255]), self.rng.u8(..)]),
            4 => Lie::Bytes(if is_v4 { 23 } else { 20 }, vec![self.pick(&[0, 1, 6, 17, 43, 44, 51, 58, 60, 132, 255])]),
            // A wrong checksum of the header; a wrong one or none of UDP and TCP.
            5 => Lie::Bytes(24, self.some_bytes(2)),
            6 => Lie::Bytes(l4 + self.pick(&[2, 6, 16]), self.some_bytes(2)),
            // The lengths of UDP and TCP, flags.
            7 => Lie::Bytes(l4 + self.pick(&[4, 5, 12, 13]), self.some_bytes(1)),
            8 => Lie::Bytes(12, vec![8, self.pick(&[0, 6])]),
            _ => {
                let (at, count) = (self.rng.usize(14..length.max(15)), self.rng.usize(1..60));
                Lie::Bytes(at, self.some_bytes(count))
            }
        }
    }

    fn some_bytes(&mut self, count: usize) -> Vec<u8> {
        let constant = self.pick(&[None, None, Some(0), Some(255)]);
        (0..count).map(|_| constant.unwrap_or_else(|| self.rng.u8(..))).collect()
    }
}

fn evicted(model: &Model, tuple: Tuple, flow: &Flow) -> Operation {
    Operation::Evict(Entry {
        half_open: model.half_open.entries().get(&tuple) == Some(flow),
        from: tuple.source,
        to: tuple.destination,
        protocol: tuple.protocol as u8,
        interface: tuple.interface,
    })
}

/// Gives a packet the salt with which its checksum is 0 when it is translated: that looks like none (RFC 768).
fn aim_at_zero(packet: &mut Packet, flow: &Flow) {
    packet.sequence = None;
    (packet.salt, packet.payload) = (0, if packet.kind == Kind::Udp { 2 } else { 0 });
    let translated = Packet { from: flow.to.source, to: flow.to.destination, options: Vec::new(), ..packet.clone() };
    let l4 = 14 + if packet.from.is_ipv4() { 20 } else { 40 };
    packet.salt = match packet.kind {
        Kind::Udp => wire::word(&translated.frame(), l4 + 6),
        Kind::Tcp(_) => wire::word(&translated.frame(), l4 + 16),
        _ => 0,
    };
}

/// Addresses: of virtual ones (0), pods of this node (1), pods of others (2), routers (3).
fn address(is_v4: bool, group: u8, host: u8) -> IpAddr {
    if is_v4 {
        Ipv4Addr::new(10, 100 + group, 0, host).into()
    } else {
        Ipv6Addr::new(0xfd00, 0x10, group.into(), 0, 0, 0, 0, host.into()).into()
    }
}

fn pod(is_v4: bool, interface: u32) -> IpAddr {
    address(is_v4, 1, u8::try_from(interface).unwrap_or(u8::MAX))
}

fn hairpin(is_v4: bool) -> IpAddr {
    super::programs::Settings::default().hairpin(is_v4)
}

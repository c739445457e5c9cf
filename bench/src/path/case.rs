//! What is measured in a world: which packets go through which program, beside which floor.

use anyhow::{Result, ensure};
use aya::programs::ProgramFd;
use lb_common::Protocol;
use lb_userspace::dataplane::Object;
use viaduct_tests::datapath::MARK;
use viaduct_tests::packet::verify_checksums;

use super::harness::Floor;
use super::packets::{self, Kind, Packets};
use super::tables::{Ends, Which};
use super::world::World;

/// "Next", and "redirect".
const PASS: i32 = -1;
const REDIRECT: i32 = 7;
/// First packets come from clients of numbers that no open flow has.
const OPENING_CLIENTS: u32 = 10_000_000;
/// How many packets are looked at before any is measured.
const LOOKED_AT: u64 = 100;

/// Runs of one program on packets of one kind.
pub struct Case {
    /// What it is called.
    pub name: &'static str,
    program: &'static str,
    /// What it is compared with.
    pub floor: Option<Floor>,
    packets: Packets,
    answer: i32,
    room: Room,
    warm: u32,
    runs: u32,
}

/// What becomes of the table of half-open flows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Room {
    /// No run makes an entry.
    Untouched,
    /// It is empty before each call of the kernel.
    Emptied,
    /// It is always full.
    Full,
}

/// All cases of a world, whose packets come in random order.
///
/// # Errors
/// Never but when there are more packets than numbers.
pub fn cases(world: &World) -> Result<Vec<Case>> {
    let family = world.size.family;
    let mut order: Vec<_> = world.flows().iter().zip(0..).collect();
    fastrand::Rng::with_seed(1).shuffle(&mut order);
    let packets = |kind, ends: Vec<Ends>| Packets::new(kind, world.size.protocol, &ends);
    let each = |ends: &dyn Fn(&super::world::Flow, u32) -> Ends| -> Vec<Ends> {
        order.iter().map(|&(flow, number)| ends(flow, number)).collect()
    };
    let swapped = |(from, to): Ends| (to, from);
    let stranger = |number| packets::stranger(family, number);
    let nobody = world.dialled(world.size.services);
    let flows = world.size.flows;
    let case = |name, program, floor, packets| Case {
        name,
        program,
        floor,
        packets,
        answer: PASS,
        room: Room::Untouched,
        warm: flows.clamp(1000, 200_000),
        runs: flows.clamp(50_000, 200_000),
    };
    let (from_pod, to_pod) = (Object::FROM_POD, Object::TO_POD);
    let sent = packets(Kind::Later, each(&|flow, _| flow.sent));
    let replies = packets(Kind::Later, each(&|flow, _| swapped(flow.translated)));
    let marked = packets(Kind::Later, each(&|flow, _| flow.translated)).marked(MARK);
    let outward = packets(Kind::Later, each(&|flow, number| (flow.sent.0, stranger(number))));
    let inward = packets(Kind::Later, each(&|flow, number| (stranger(number), flow.sent.0)));
    let refused = packets(Kind::Opening, each(&|flow, _| (flow.sent.0, nobody)));
    let half_open = world.size.half_open;
    let openings = |count: u32| {
        let sent = (0..count).map(|number| {
            (packets::client(family, OPENING_CLIENTS + number), world.dialled(number % world.size.services))
        });
        packets(Kind::Opening, sent.collect())
    };
    let opening = |name, room, distinct, runs| Case {
        answer: PASS,
        room,
        warm: 0,
        runs,
        ..case(name, from_pod, Some(Floor::Open), openings(distinct))
    };
    let mut cases = vec![
        case("established", from_pod, Some(Floor::Follow), sent),
        case("reply", to_pod, Some(Floor::Follow), replies),
        case("no service, from pod", from_pod, None, outward),
        case("no service, to pod", to_pod, None, inward),
        case("translated before, to pod", to_pod, None, marked),
        // Two entries each: the table is half full in the end.
        opening("first packet", Room::Emptied, half_open / 4, half_open / 4),
        opening("first packet, table full", Room::Full, half_open * 4, half_open / 2),
    ];
    // Of a datagram an ICMP error is made, which is longer: the packet after it would not be a fresh one.
    if world.size.protocol == Protocol::Tcp {
        cases.push(Case { answer: REDIRECT, ..case("refused", from_pod, None, refused) });
    }
    Ok(cases)
}

/// What is measured in one turn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Turn {
    /// The program under test.
    Program,
    /// The floor.
    Floor,
    /// Neither: the harness alone.
    Harness,
}

impl Case {
    /// What is compared, in the order of the first round.
    #[must_use]
    pub fn turns(&self) -> Vec<Turn> {
        let floor = self.floor.map(|_| Turn::Floor);
        [Turn::Program].into_iter().chain(floor).chain([Turn::Harness]).collect()
    }

    /// Prepares the packets of this case.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn prepare(&self, world: &mut World) -> Result<()> {
        world.harness.take(&self.packets)
    }

    /// Measures once: nanoseconds of a run, harness included.
    ///
    /// # Errors
    /// When the program does something else than it is to do.
    pub fn measure(&self, world: &mut World, turn: Turn) -> Result<f64> {
        let program = self.fd(world, turn)?;
        world.harness.put(&program)?;
        if self.room == Room::Emptied {
            world.table(Which::HalfOpen).clear()?;
            world.floor(Which::HalfOpen).clear()?;
        }
        let counts = turn == Turn::Program && self.room != Room::Untouched;
        let before = if counts { world.connections()? } else { 0 };
        if self.warm > 0 {
            world.harness.run(self.warm)?;
        }
        let (ran, nanoseconds) = world.harness.run(self.runs)?;
        let answer = if turn == Turn::Program { self.answer } else { PASS };
        ensure!(ran.answer == answer, "{}: {turn:?} answers with {}", self.name, ran.answer);
        if counts {
            let opened = world.connections()? - before;
            ensure!(
                opened == u64::from(self.runs),
                "{}: {} runs have opened {opened} connections",
                self.name,
                self.runs
            );
        }
        Ok(nanoseconds)
    }

    /// Looks at some packets one by one: the program and the floor make the same of them, checksums included.
    ///
    /// # Errors
    /// When they do not.
    pub fn check(&self, world: &mut World) -> Result<()> {
        self.prepare(world)?;
        for position in 0..LOOKED_AT.min(self.packets.len() as u64) {
            let mut results = Vec::new();
            for turn in self.turns() {
                let program = self.fd(world, turn)?;
                world.harness.put(&program)?;
                world.harness.seek(position)?;
                let (ran, _) = world.harness.run(1)?;
                verify_checksums(&ran.frame)?;
                results.push(ran.frame);
            }
            let (Some(program), Some(fresh)) = (results.first(), results.last()) else { continue };
            let is_changed = program != fresh;
            let changes = self.floor.is_some() || self.answer == REDIRECT;
            ensure!(is_changed == changes, "{}: packet {position} is changed: {is_changed}", self.name);
            if self.floor == Some(Floor::Follow) {
                ensure!(results[0] == results[1], "{}: the floor makes something else of packet {position}", self.name);
            }
        }
        Ok(())
    }

    fn fd(&self, world: &mut World, turn: Turn) -> Result<ProgramFd> {
        match (turn, self.floor) {
            (Turn::Program, _) => world.program(self.program),
            (Turn::Floor, Some(floor)) => world.harness.program(floor),
            _ => world.harness.program(Floor::Empty),
        }
    }
}

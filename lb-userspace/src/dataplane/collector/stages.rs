//! The tables, each of which is a stage of a round.

use std::collections::BTreeMap;

use anyhow::Result;
use lb_common::abi::{
    Affinity, AffinityKey, Backend, BackendState, Detour, Flow, Fragment, FragmentKey, IdleTimes, ServicePort,
};
use lb_common::{Address, Protocol, Tuple};

use super::judge::{Cause, Judge, Verdict, is_clients};
use super::{Round, Tick};
use crate::dataplane::{Entry, MapUse, Names, Pins, Table, Walk};

/// Entries at a time: what takes a tenth of a millisecond when all are to stay, and half of one when all are to go.
const BATCH: usize = 256;
/// In which rounds each half of a flow is judged by itself: one of so many.
const EACH_HALF: u32 = 4;

/// A table and how far this round has come in it.
pub(super) trait Stage {
    /// Goes on with a batch. False when it was the last.
    fn step(&mut self, now: u64, times: &IdleTimes, tick: &mut Tick) -> Result<bool>;

    /// Tells what the round has met, and makes ready for the next.
    fn conclude(&mut self, round: &mut Round);
}

pub(super) struct Flows<A: Address>
where
    Tuple<A>: Entry,
    Flow<A>: Entry,
    Backend<A>: Entry,
{
    table: Table<Tuple<A>, Flow<A>>,
    backends: Table<u32, Backend<A>>,
    detours: Table<Tuple<A>, Detour>,
    walk: Walk,
    met: BTreeMap<Protocol, u64>,
    is_half_open: bool,
    has_room: bool,
    rounds: u32,
}

impl<A: Address> Flows<A>
where
    Tuple<A>: Entry,
    Flow<A>: Entry,
    Backend<A>: Entry,
{
    pub(super) fn open(pins: &Pins) -> Result<Self> {
        Self::of(pins, Names::of(A::FAMILY).flows, false)
    }

    /// Of half-open flows nothing is put back: who sends on makes them anew.
    pub(super) fn half_open(pins: &Pins) -> Result<Self> {
        Self::of(pins, Names::of(A::FAMILY).half_open, true)
    }

    fn of(pins: &Pins, name: &'static str, is_half_open: bool) -> Result<Self> {
        Ok(Self {
            table: Table::open(pins, name)?,
            backends: Table::open(pins, Names::of(A::FAMILY).backends)?,
            detours: Table::open(pins, Names::of(A::FAMILY).detours)?,
            walk: Walk::default(),
            met: BTreeMap::new(),
            is_half_open,
            has_room: !is_half_open,
            rounds: 0,
        })
    }

    fn is_current(&self, backend: u32, generation: u32) -> bool {
        // An entry that was never used is none: no protocol has the number 0.
        let backend = self.backends.get(&backend).ok().flatten();
        backend.is_some_and(|backend| {
            backend.generation == generation && matches!(backend.state, BackendState::Active | BackendState::Draining)
        })
    }

    /// Removes a flow unless it was used since it was read: its latest packet may be younger than the decision.
    fn remove(&self, half: (&Tuple<A>, &Flow<A>), other: Option<(&Tuple<A>, &Flow<A>)>) -> Result<bool> {
        let halves = [Some(half), other].into_iter().flatten();
        let taken = halves.map(|(key, seen)| Ok((key, seen, self.table.take(key)?))).collect::<Result<Vec<_>>>()?;
        let taken: Vec<_> = taken.into_iter().filter_map(|(key, seen, taken)| Some((key, seen, taken?))).collect();
        if taken.iter().all(|(_, seen, taken)| (taken.last_seen, taken.to) == (seen.last_seen, seen.to)) {
            return Ok(!taken.is_empty());
        }
        for (key, _, taken) in &taken {
            // Where there is one again, it is younger.
            self.table.add(key, taken)?;
        }
        Ok(false)
    }
}

impl<A: Address> Stage for Flows<A>
where
    Tuple<A>: Entry,
    Flow<A>: Entry,
    Backend<A>: Entry,
{
    fn step(&mut self, now: u64, times: &IdleTimes, tick: &mut Tick) -> Result<bool> {
        let more = self.table.read(&mut self.walk, BATCH)?;
        let judge = Judge { now, times: *times, has_room: self.has_room };
        // Whole flows are judged by their clients' halves. So the others are looked at for single ones among them only.
        let is_for_all = self.rounds.is_multiple_of(EACH_HALF);
        for entry in self.table.batch(&self.walk) {
            let (key, entry) = entry?;
            *self.met.entry(key.protocol).or_default() += 1;
            if !judge.is_idle(&entry) || !(is_for_all || is_clients(&entry)) {
                continue;
            }
            let other_key = entry.to.swap();
            let other = self.table.get(&other_key)?;
            match judge.flow(&key, &entry, other.as_ref(), |id, generation| self.is_current(id, generation)) {
                Verdict::Keep => {}
                Verdict::Remove(cause) => {
                    let other = other.as_ref().filter(|other| other.to == key.swap());
                    // The mirror of an attempt that another backend has won is no sign of a full table.
                    let cause = if self.is_half_open && cause == Cause::Single { Cause::Expired } else { cause };
                    let other = other.map(|other| (&other_key, other));
                    if self.remove((&key, &entry), other)? {
                        *tick.collected.entry(cause).or_default() += 1;
                        // Either half may be met first.
                        let mut halves = [Some((&key, &entry)), other].into_iter().flatten();
                        // One that was lost may be asked for yet.
                        if cause != Cause::Single
                            && let Some((key, _)) = halves.find(|(key, half)| is_clients(half) && half.is_detour(key))
                        {
                            self.detours.remove(key)?;
                        }
                    }
                }
                // Its flow may just have been removed, with the other half.
                Verdict::Restore(_) if self.table.get(&key)?.is_none_or(|now| now.to != entry.to) => {}
                Verdict::Restore(other) => tick.restored += u64::from(self.table.add(&other_key, &other)?),
            }
        }
        Ok(more)
    }

    fn conclude(&mut self, round: &mut Round) {
        self.rounds = self.rounds.wrapping_add(1);
        let used = self.met.values().sum::<u64>();
        let size = self.table.size();
        // A table evicts before it is quite full, since each CPU keeps some free entries.
        self.has_room = !self.is_half_open && used < u64::from(size) / 8 * 7;
        for protocol in [Protocol::Tcp, Protocol::Udp, Protocol::Sctp] {
            let count = self.met.remove(&protocol).unwrap_or_default();
            *round.flow_entries.entry((A::FAMILY, protocol)).or_default() += count;
        }
        round.maps.push(map_use(self.table.name(), used, size));
    }
}

/// A table of entries that stand alone.
pub(super) struct Records<K: Entry, V: Entry> {
    table: Table<K, V>,
    walk: Walk,
    met: u64,
    is_over: Box<IsOver<K, V>>,
}

type IsOver<K, V> = dyn Fn(&Judge, &K, &V) -> Result<bool> + Send;

pub(super) fn affinities<A: Address>(pins: &Pins) -> Result<Records<AffinityKey<A>, Affinity>>
where
    AffinityKey<A>: Entry + 'static,
{
    let service_ports = Table::<u32, ServicePort>::open(pins, "SERVICE_PORTS")?;
    Records::open(pins, Names::of(A::FAMILY).affinity, move |judge, key: &AffinityKey<A>, entry| {
        let service_port = service_ports.get(&key.service_port)?;
        Ok(judge.affinity(entry, service_port.map_or(0, |service_port| service_port.affinity)))
    })
}

pub(super) fn fragments<A: Address>(pins: &Pins) -> Result<Records<FragmentKey<A>, Fragment>>
where
    FragmentKey<A>: Entry + 'static,
{
    Records::open(pins, Names::of(A::FAMILY).fragments, |judge, _: &FragmentKey<A>, entry| {
        Ok(judge.fragment(entry, A::FAMILY))
    })
}

impl<K: Entry, V: Entry> Records<K, V> {
    fn open(
        pins: &Pins,
        name: &'static str,
        is_over: impl Fn(&Judge, &K, &V) -> Result<bool> + Send + 'static,
    ) -> Result<Self> {
        let table = Table::open(pins, name)?;
        Ok(Self { table, walk: Walk::default(), met: 0, is_over: Box::new(is_over) })
    }
}

impl<K: Entry, V: Entry + PartialEq> Stage for Records<K, V> {
    fn step(&mut self, now: u64, times: &IdleTimes, _: &mut Tick) -> Result<bool> {
        let more = self.table.read(&mut self.walk, BATCH)?;
        let judge = Judge { now, times: *times, has_room: true };
        for entry in self.table.batch(&self.walk) {
            let (key, entry) = entry?;
            self.met += 1;
            if !(self.is_over)(&judge, &key, &entry)? {
                continue;
            }
            // One that was used meanwhile is back at once.
            if let Some(taken) = self.table.take(&key)?.filter(|taken| *taken != entry) {
                self.table.add(&key, &taken)?;
            }
        }
        Ok(more)
    }

    fn conclude(&mut self, round: &mut Round) {
        round.maps.push(map_use(self.table.name(), std::mem::take(&mut self.met), self.table.size()));
    }
}

fn map_use(name: &'static str, used: u64, size: u32) -> MapUse {
    MapUse { name, used: usize::try_from(used).unwrap_or(usize::MAX), size }
}

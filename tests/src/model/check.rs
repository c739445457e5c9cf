//! Runs operations through model and kernel, and compares.

use std::fmt::Debug;
use std::ops::RangeInclusive;

use anyhow::{Result, ensure};
use lb_common::abi::{Hook, Reason};

use super::abi::{Decode, Encode, OfFamily};
use super::flows::{BackendId, Timed};
use super::health::BackendCounts;
use super::kernel::{Kernel, Output};
use super::operation::{self, Operation};
use super::programs::{Arrival, Counts, Model, Outcome, Place, Settings, Verdict};
use super::services::{BACKENDS, SERVICE_PORTS, Services};
use super::table::Table;

/// Model and kernel side by side.
pub struct Check {
    object: Vec<u8>,
    kernel: Kernel,
    /// The model.
    pub model: Model,
    /// Halves of flows may be alone.
    has_evicted: bool,
}

/// Something that the two do not agree on.
#[derive(Debug)]
pub struct Difference {
    /// What kind of thing.
    pub what: &'static str,
    /// What each of them has.
    pub text: String,
}

impl std::fmt::Display for Difference {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {}", self.what, self.text)
    }
}

impl Difference {
    fn between(what: &'static str, model: &impl Debug, kernel: &impl Debug) -> Self {
        Self { what, text: format!("\n  model:    {model:?}\n  programs: {kernel:?}") }
    }
}

impl From<anyhow::Error> for Difference {
    fn from(error: anyhow::Error) -> Self {
        Self { what: "error", text: format!("{error:#}") }
    }
}

impl Check {
    /// Loads a build of the programs.
    ///
    /// # Errors
    /// When the kernel refuses it.
    pub fn new(object: &[u8]) -> Result<Self> {
        let kernel = Kernel::load(object, &Settings::default())?;
        let model = Model::new(Settings::default(), Counts::default());
        Ok(Self { object: object.to_vec(), kernel, model, has_evicted: false })
    }

    /// Begins anew: nothing is served, and nothing remembered.
    ///
    /// # Errors
    /// When the kernel refuses something.
    pub fn reset(&mut self, settings: &Settings) -> Result<()> {
        if self.model.settings != *settings {
            self.kernel = Kernel::load(&self.object, settings)?;
        }
        self.kernel.clear()?;
        self.kernel.publish(&self.model.services, &Services::default())?;
        let events = std::mem::take(&mut self.model.counts.events);
        let counts = Counts { events, ..self.kernel_counts()? };
        self.model = Model::new(settings.clone(), counts);
        self.has_evicted = false;
        Ok(())
    }

    /// Runs operations one by one up to the first that makes a difference: that one's index and the difference. Everything
    /// is compared after each.
    pub fn replay(&mut self, operations: &[Operation]) -> Option<(usize, Difference)> {
        self.replay_and_tell(operations, |_, _| ())
    }

    /// The same; what became of each packet is told.
    pub fn replay_and_tell(
        &mut self,
        operations: &[Operation],
        mut tell: impl FnMut(&Operation, &Outcome),
    ) -> Option<(usize, Difference)> {
        if let Err(error) = self.reset(&operation::settings(operations)) {
            return Some((0, error.into()));
        }
        operations.iter().enumerate().find_map(|(index, operation)| {
            let result = self.step(operation).and_then(|outcome| {
                outcome.iter().for_each(|outcome| tell(operation, outcome));
                self.compare_all()
            });
            Some((index, result.err()?))
        })
    }

    /// Carries out one operation. Of what is remembered, that with which the packet had to do is compared.
    ///
    /// # Errors
    /// The first difference.
    pub fn step(&mut self, operation: &Operation) -> Result<Option<Outcome>, Difference> {
        match operation {
            Operation::Load(..) => {}
            Operation::Send(send) => return self.send(&send.arrival()).map(Some),
            Operation::Serve(id, wanted) => {
                if *id < SERVICE_PORTS {
                    let before = self.model.services.clone();
                    self.model.services.set(*id, wanted.clone());
                    self.kernel.publish(&before, &self.model.services)?;
                }
            }
            Operation::Wait(milliseconds) => {
                // What is written back below must be what is there.
                self.compare_all()?;
                self.model.wait(milliseconds * 1_000_000);
                self.write_back()?;
            }
            Operation::Evict(entry) => {
                if let Some(tuple) = entry.tuple() {
                    self.has_evicted = true;
                    self.model.table(entry.place()).remove(tuple);
                    self.kernel.remove(name(entry.place()), &tuple)?;
                }
            }
            Operation::Collect => {
                let now = now()?;
                for (place, tuple) in self.model.collect(now) {
                    self.kernel.remove(name(place), &tuple)?;
                }
            }
        }
        Ok(None)
    }

    fn send(&mut self, arrival: &Arrival) -> Result<Outcome, Difference> {
        let before = now()?;
        let output = self.kernel.run(arrival);
        let after = now()?;
        let output = output?;
        // Of a tick they have the time at which one of them first asked in it.
        let times = before.saturating_sub(TICK)..=after;
        let asked = self.kernel.clock()?;
        if asked > after {
            return Err(Difference::between("clock", &after, &asked));
        }
        // None that needs the time has run for longer.
        let outcome = self.model.run(arrival, if times.contains(&asked) { asked } else { after });
        self.compare(arrival, &outcome, output.as_ref(), &times).map(|()| outcome)
    }

    fn compare(
        &mut self,
        arrival: &Arrival,
        outcome: &Outcome,
        output: Option<&Output>,
        times: &RangeInclusive<u64>,
    ) -> Result<(), Difference> {
        match output {
            Some(output) => compare_packets(outcome, output)?,
            // The kernel takes the sum away when a packet is cut off, as it is for a refusal, and looks at it here all the same.
            None if outcome.reason == Some(Reason::Refused) && outcome.frame != arrival.frame => {}
            None => {
                return Err(Difference { what: "sum", text: "the sum over the whole packet does not fit".to_owned() });
            }
        }
        if let Some(reason) = outcome.reason {
            let counted = self.kernel.reason(reason)?;
            let expected = self.model.counts.reasons.get(&(reason as u32)).copied().unwrap_or(0);
            if counted != expected {
                return Err(Difference::between("reason", &(reason, expected), &counted));
            }
        }
        touched(&self.kernel, "FLOWS", &mut self.model.flows, times)?;
        touched(&self.kernel, "HALF_OPEN", &mut self.model.half_open, times)?;
        touched(&self.kernel, "HEALTH", &mut self.model.health, times)?;
        touched(&self.kernel, "DETOURS", &mut self.model.detours, times)?;
        touched(&self.kernel, "AFFINITY", &mut self.model.affinities, times)?;
        touched(&self.kernel, "FRAGMENTS", &mut self.model.fragments, times)
    }

    /// Compares everything that is remembered and counted.
    ///
    /// # Errors
    /// The first difference.
    pub fn compare_all(&mut self) -> Result<(), Difference> {
        all(&self.kernel, "FLOWS", &self.model.flows)?;
        all(&self.kernel, "HALF_OPEN", &self.model.half_open)?;
        all(&self.kernel, "HEALTH", &self.model.health)?;
        all(&self.kernel, "DETOURS", &self.model.detours)?;
        all(&self.kernel, "AFFINITY", &self.model.affinities)?;
        all(&self.kernel, "FRAGMENTS", &self.model.fragments)?;
        for (key, flow) in self.model.flows.entries() {
            if flow.hook != Hook::ToPod && !self.kernel.is_known(key.destination.ip())? {
                return Err(Difference { what: "the address of a flow is not known", text: format!("{key:?}") });
            }
        }
        if !self.has_evicted
            && let Some(half) = self.model.single_half()
        {
            return Err(Difference { what: "a half of a flow is alone", text: format!("{half:?}") });
        }
        let counts = self.kernel_counts()?;
        let model = &self.model.counts;
        for (what, expected, counted) in [
            ("reasons", format!("{:?}", model.reasons), format!("{:?}", counts.reasons)),
            ("service counts", format!("{:?}", model.services), format!("{:?}", counts.services)),
            ("backend counts", format!("{:?}", model.backends), format!("{:?}", counts.backends)),
        ] {
            if expected != counted {
                return Err(Difference { what, text: format!("\n  model:    {expected}\n  programs: {counted}") });
            }
        }
        Ok(())
    }

    fn kernel_counts(&self) -> Result<Counts> {
        let mut counts = Counts::default();
        for reason in Reason::ALL {
            match self.kernel.reason(*reason)? {
                0 => {}
                count => drop(counts.reasons.insert(*reason as u32, count)),
            }
        }
        for id in 0..SERVICE_PORTS {
            match self.kernel.service_stats(id)? {
                (0, 0) => {}
                stats => drop(counts.services.insert(id, stats)),
            }
        }
        for backend in (0..BACKENDS).flat_map(|id| [false, true].map(|is_v6| BackendId { is_v6, id })) {
            match self.kernel.backend_stats(backend)? {
                none if none == BackendCounts::default() => {}
                stats => drop(counts.backends.insert(backend, stats)),
            }
        }
        Ok(counts)
    }

    fn write_back(&self) -> Result<()> {
        write_back(&self.kernel, "FLOWS", &self.model.flows)?;
        write_back(&self.kernel, "HALF_OPEN", &self.model.half_open)?;
        write_back(&self.kernel, "HEALTH", &self.model.health)?;
        write_back(&self.kernel, "AFFINITY", &self.model.affinities)?;
        write_back(&self.kernel, "FRAGMENTS", &self.model.fragments)
    }
}

/// The kernel's name of a table.
const fn name(place: Place) -> &'static str {
    match place {
        Place::HalfOpen => "HALF_OPEN",
        Place::Flows => "FLOWS",
    }
}

fn compare_packets(outcome: &Outcome, output: &Output) -> Result<(), Difference> {
    if output.verdict != Ok(outcome.verdict) {
        return Err(Difference::between("verdict", &(outcome.verdict, outcome.reason), &output.verdict));
    }
    // Nobody sees what was dropped.
    if outcome.verdict == Verdict::Drop {
        return Ok(());
    }
    if output.frame != outcome.frame {
        return Err(Difference { what: "packet", text: hex_difference(&outcome.frame, &output.frame) });
    }
    if output.mark != outcome.mark {
        return Err(Difference::between("mark", &outcome.mark, &output.mark));
    }
    Ok(())
}

/// A tick is no longer than this, nanoseconds, however late the next one comes.
const TICK: u64 = 100_000_000;

/// The clock that the programs read (`bpf_ktime_get_ns`).
fn now() -> Result<u64> {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the kernel writes a `timespec`.
    let result = unsafe { libc::syscall(libc::SYS_clock_gettime, libc::CLOCK_MONOTONIC, &raw mut time) };
    ensure!(result == 0, "clock_gettime: {}", std::io::Error::last_os_error());
    Ok(u64::try_from(time.tv_sec)? * 1_000_000_000 + u64::try_from(time.tv_nsec)?)
}

/// Compares the entries with which a packet had to do. A time that is uncertain is what it is in the kernel.
fn touched<K, V>(
    kernel: &Kernel,
    name: &'static str,
    table: &mut Table<K, V>,
    times: &RangeInclusive<u64>,
) -> Result<(), Difference>
where
    K: Encode + OfFamily + Copy + Ord + Debug,
    V: Decode + Timed + Copy + PartialEq + Debug,
{
    for key in table.take_touched() {
        let mut found: Option<V> = kernel.get(name, &key)?;
        let mut expected = table.peek_mut(&key);
        if let (Some(found), Some(expected)) = (&mut found, &mut expected) {
            for (found, expected) in found.times().into_iter().zip(expected.times()) {
                if times.contains(found) && times.contains(expected) {
                    *expected = *found;
                }
            }
        }
        if expected.as_deref() != found.as_ref() {
            return Err(Difference::between(name, &(key, expected), &found));
        }
    }
    Ok(())
}

fn all<K, V>(kernel: &Kernel, name: &'static str, table: &Table<K, V>) -> Result<(), Difference>
where
    K: Decode + Copy + Ord + Debug,
    V: Decode + Copy + PartialEq + Debug,
{
    let found = kernel.all::<K, V>(name)?;
    if found == *table.entries() {
        return Ok(());
    }
    let keys = table.entries().keys().chain(found.keys());
    let key = keys.into_iter().find(|key| found.get(key) != table.entries().get(key));
    Err(Difference::between(name, &key.map(|key| (key, table.entries().get(key))), &key.map(|key| found.get(key))))
}

fn write_back<K, V>(kernel: &Kernel, name: &'static str, table: &Table<K, V>) -> Result<()>
where
    K: Encode + OfFamily + Copy + Ord,
    V: Encode + Copy,
{
    table.entries().iter().try_for_each(|(key, value)| kernel.put(name, key, value))
}

/// Both packets, and where they differ.
fn hex_difference(model: &[u8], programs: &[u8]) -> String {
    let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    let at: Vec<usize> = (0..model.len().max(programs.len())).filter(|&at| model.get(at) != programs.get(at)).collect();
    format!("bytes {at:?}\n  model:    {}\n  programs: {}", hex(model), hex(programs))
}

//! The programs under test with services and flows, and the floor with the same flows.

use std::net::IpAddr;
use std::process::Command;
use std::sync::atomic::{AtomicI32, Ordering};

use anyhow::{Context as _, Result, ensure};
use aya::programs::ProgramFd;
use lb_common::abi::PodInterface;
use lb_common::{Family, Protocol};
use lb_userspace::dataplane::{Maps, OBJECT, Object, Pins, Settings, Table, WantedSizes};
use lb_userspace::model::{ObjectName, TrafficPolicy};
use lb_userspace::plan::{Backend, Frontend, Plan, Scope, ServicePortName, ServicePortPlan};
use lb_userspace::state::State;
use nix::sched::{CloneFlags, CpuSet, sched_setaffinity, unshare};
use nix::unistd::Pid;
use viaduct_tests::command;
use viaduct_tests::datapath::{LO, MARK, SEED};
use viaduct_tests::reaper::Reaper;

use super::harness::{Harness, pins_beside};
use super::packets::{self, ENDPOINTS, Kind, Packets};
use super::tables::{Ends, Flows, Which};

/// What a world has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Size {
    /// IP family of all.
    pub family: Family,
    /// Transport protocol of all.
    pub protocol: Protocol,
    /// Services, with [`ENDPOINTS`] each, and one more without any.
    pub services: u32,
    /// Open flows.
    pub flows: u32,
    /// Entries of the table of flows.
    pub table: u32,
    /// Entries of that of half-open flows.
    pub half_open: u32,
}

/// Loaded programs, with maps of their own.
pub struct World {
    /// What it has.
    pub size: Size,
    /// Runs programs.
    pub harness: Harness,
    object: Object,
    maps: Maps,
    pins: Pins,
    beside: Pins,
    flows: Vec<Flow>,
    // Last, so that the pins are removed when nothing here needs them any more.
    _reaper: Reaper,
}

/// An open flow.
#[derive(Debug, Clone, Copy)]
pub struct Flow {
    /// The client's packets as it sends them.
    pub sent: Ends,
    /// The same as the backend gets them.
    pub translated: Ends,
}

/// Takes this thread into a network namespace of its own, and to one processor.
///
/// # Errors
/// When it may not.
pub fn enter() -> Result<()> {
    unshare(CloneFlags::CLONE_NEWNET).context("a network namespace of its own (this needs root)")?;
    let mut processors = CpuSet::new();
    let last = std::thread::available_parallelism()?.get() - 1;
    processors.set(last)?;
    sched_setaffinity(Pid::from_raw(0), &processors).with_context(|| format!("cannot stay on processor {last}"))
}

impl World {
    /// Loads the programs, makes the services and opens the flows. To be called after [`enter`].
    ///
    /// # Errors
    /// When the kernel refuses something.
    pub fn new(size: Size) -> Result<Self> {
        let reaper = Reaper::start()?;
        let pins = Pins::new(reaper.bpffs());
        pins.create()?;
        let other = if size.family == Family::V4 { Family::V6 } else { Family::V4 };
        let endpoints = size.services * ENDPOINTS;
        let wanted = WantedSizes {
            max_flows: Some(size.table),
            max_half_open_flows: Some(size.half_open),
            max_frontends: Some((size.services + 1).max(1 << 16)),
            max_service_ports: Some((size.services + 1).max(1 << 14)),
            max_backends: Some((endpoints + 1).max(1 << 17)),
            max_slots: Some((endpoints * 64).next_power_of_two().max(1 << 23)),
            ..WantedSizes::default()
        };
        let sizes = wanted.here(&pins, Some(other))?;
        // Refusals are measured, not their limit.
        let settings = Settings { seed: SEED, mark: MARK, refusals_per_second: u32::MAX, ..Settings::default() };
        let object = Object::load(OBJECT, &pins, &sizes, settings)?;
        let maps = Maps::open(&pins, true)?;
        let beside = pins_beside(&pins);
        std::fs::create_dir(beside.layout()).context("cannot make a folder of pins")?;
        // For a packet of each flow that fits in, and for the most first packets that a case takes.
        let records = (size.table / 2).max(4 * size.half_open);
        let mut harness = Harness::load(size.family, &beside, size.table, size.half_open, records)?;
        let target = packets::endpoint(size.family, 0, 0);
        match target.ip() {
            IpAddr::V4(address) => harness.set_target(&address.octets(), target.port())?,
            IpAddr::V6(address) => harness.set_target(&address.octets(), target.port())?,
        }
        let mut world = Self { size, harness, object, maps, pins, beside, flows: Vec::new(), _reaper: reaper };
        world.serve()?;
        world.know_the_pod()?;
        world.open(size.flows)?;
        Ok(world)
    }

    fn serve(&mut self) -> Result<()> {
        let Size { family, protocol, services, .. } = self.size;
        let service = |number: u32| {
            let (address, port) = (self.dialled(number).ip(), self.dialled(number).port());
            let frontend = Frontend { address, port, protocol, scope: Scope::Cluster };
            let object = ObjectName::new("default", &format!("service-{number:05}"));
            let name = ServicePortName { object, port: "".into(), protocol, family, endpoints: TrafficPolicy::Cluster };
            let endpoints = if number < services { ENDPOINTS } else { 0 };
            let addresses = (0..endpoints).map(|endpoint| packets::endpoint(family, number, endpoint));
            let backends = addresses.map(|address| Backend { address, terminating: false }).collect();
            let (frontends, cluster_ip) = ([frontend].into(), Some(address));
            (name, ServicePortPlan { frontends, cluster_ip, backends, ..ServicePortPlan::default() })
        };
        let plan = Plan { service_ports: (0..=services).map(service).collect(), problems: Vec::new() };
        let mut state = State::adopt(self.maps.read()?, self.maps.limits());
        let result = state.reconcile(&plan);
        ensure!(result.shortages.is_empty(), "{:?}", result.shortages);
        self.maps.write(&result.writes)
    }

    /// The interface of all packets leads to a pod, in whose network namespace sockets are looked for.
    fn know_the_pod(&self) -> Result<()> {
        let lab = self.pins.root().file_name().context("pins in no folder")?.to_string_lossy();
        // By which the network namespace of the bench knows those of the pods, one of each world.
        static NUMBERS: AtomicI32 = AtomicI32::new(1);
        let netns_id = NUMBERS.fetch_add(1, Ordering::Relaxed);
        for arguments in [format!("netns add {lab}-pod"), format!("netns set {lab}-pod {netns_id}")] {
            command::run(Command::new("ip").args(arguments.split(' ')))?;
        }
        Table::<u32, PodInterface>::open(&self.pins, "INTERFACES")?
            .insert(&LO, &PodInterface { netns_id, flags: 0, bypass_until: 0 })
    }

    /// What is dialled at a service; that after the last has no endpoint.
    #[must_use]
    pub fn dialled(&self, service: u32) -> std::net::SocketAddr {
        packets::virtual_address(self.size.family, service)
    }

    /// One of the programs under test.
    ///
    /// # Errors
    /// When it is not loaded.
    pub fn program(&mut self, name: &str) -> Result<ProgramFd> {
        Ok(self.object.program(name)?.fd()?.try_clone()?)
    }

    /// The open flows.
    #[must_use]
    pub fn flows(&self) -> &[Flow] {
        &self.flows
    }

    /// Opens so many flows, by the packets that open flows, and gives the floor the same.
    fn open(&mut self, count: u32) -> Result<()> {
        let step = self.size.half_open / 4;
        for first in (0..count).step_by(step as usize) {
            self.open_some(first..count.min(first + step))?;
        }
        self.floor(Which::HalfOpen).clear()?;
        self.table(Which::HalfOpen).clear()?;
        self.floor(Which::Flows).copy_from(&self.table(Which::Flows))?;
        for table in [self.table(Which::Flows), self.floor(Which::Flows)] {
            let entries = table.count()?;
            ensure!(entries == 2 * count as usize, "{entries} entries for {count} flows");
        }
        Ok(())
    }

    fn open_some(&mut self, numbers: std::ops::Range<u32>) -> Result<()> {
        let Size { family, services, .. } = self.size;
        let sent: Vec<Ends> =
            numbers.map(|number| (packets::client(family, number), self.dialled(number % services))).collect();
        self.send(Object::FROM_POD, Kind::Opening, &sent)?;
        let led = self.table(Which::HalfOpen).clients()?;
        let flow = |sent: &Ends| {
            let translated = *led.get(sent).with_context(|| format!("no flow from {} to {}", sent.0, sent.1))?;
            Ok(Flow { sent: *sent, translated })
        };
        let flows: Vec<Flow> = sent.iter().map(flow).collect::<Result<_>>()?;
        let answers: Vec<Ends> = flows.iter().map(|flow| (flow.translated.1, flow.translated.0)).collect();
        self.send(Object::TO_POD, Kind::Answer, &answers)?;
        self.send(Object::FROM_POD, Kind::Later, &sent)?;
        self.flows.extend(flows);
        Ok(())
    }

    /// One packet between each of these ends.
    fn send(&mut self, program: &str, kind: Kind, ends: &[Ends]) -> Result<()> {
        let program = self.program(program)?;
        self.harness.put(&program)?;
        self.harness.take(&Packets::new(kind, self.size.protocol, ends))?;
        self.harness.run(u32::try_from(ends.len())?)?;
        Ok(())
    }

    /// A table of the programs.
    #[must_use]
    pub const fn table(&self, which: Which) -> Flows<'_> {
        Flows::new(&self.pins, self.size.family, which)
    }

    /// The same of the floor.
    #[must_use]
    pub const fn floor(&self, which: Which) -> Flows<'_> {
        Flows::new(&self.beside, self.size.family, which)
    }

    /// Connections that were opened so far.
    ///
    /// # Errors
    /// When counters cannot be read.
    pub fn connections(&self) -> Result<u64> {
        (0..=self.size.services).map(|id| Ok(self.maps.service_stats(id)?.connections)).sum()
    }
}

//! The kernel programs without a network: they are loaded with maps of their own, and single packets are run through them
//! by `BPF_PROG_TEST_RUN`.

use std::net::SocketAddr;
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::time::Duration;

use anyhow::{Result, ensure};
use lb_common::Protocol;
use lb_userspace::dataplane::{Maps, OBJECT, Object, Pins, Settings, Sizes};
use lb_userspace::model::{Family, ObjectName, TrafficPolicy};
use lb_userspace::plan::{Backend, Frontend, Plan, Scope, ServicePortName, ServicePortPlan};
use lb_userspace::state::{Limits, State, Write};

use crate::reaper::Reaper;
use crate::test_run::{SkBuff, test_run};

/// The mark that the programs are told to use.
pub const MARK: u32 = 0x20_0000;
/// The seed that they are told to use: none that a node would have by chance.
pub const SEED: u64 = 42;

/// Index of the loopback interface, which each network namespace has.
pub const LO: u32 = 1;

/// Entries of the flow table of each family.
pub const FLOWS: u32 = 1 << 16;
/// Entries of the tables of half-open flows.
pub const HALF_OPEN: u32 = 1 << 14;

/// What a program answers with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// `TCX_NEXT`: the next program and the stack get the packet.
    Pass,
    /// The packet is dropped.
    Drop,
    /// The packet goes to the interface that the program has named, which is not told.
    Redirect,
    /// Something that no program of ours may answer with.
    Other(i32),
}

/// A packet as the programs get it.
#[derive(Debug, Clone)]
pub struct Input {
    /// From the Ethernet header on.
    pub frame: Vec<u8>,
    /// `skb->mark`.
    pub mark: u32,
    /// Index of the interface by which it came to this node; 0 when the node itself sends it.
    pub came_in_by: u32,
    /// Index of the pod's interface, at which the program is: one that there is in the network namespace of the test. 1 is
    /// `lo`.
    pub interface: u32,
    /// With a checksum over the whole packet, as some network cards give it (`CHECKSUM_COMPLETE`). The kernel then checks
    /// that the sum still fits the packet when the program is done, and answers with `EBADMSG` if not.
    pub checksum_complete: bool,
}

impl From<Vec<u8>> for Input {
    fn from(frame: Vec<u8>) -> Self {
        Self { frame, mark: 0, came_in_by: LO, interface: LO, checksum_complete: false }
    }
}

/// What became of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Output {
    /// The program's verdict.
    pub verdict: Verdict,
    /// From the Ethernet header on.
    pub frame: Vec<u8>,
    /// `skb->mark`.
    pub mark: u32,
}

/// Loaded programs, their maps, and the services that they serve.
pub struct Datapath {
    object: Object,
    /// The maps, for looking at and for upsetting.
    pub maps: Maps,
    state: State,
    plan: Plan,
    pins: Pins,
    /// Whether each packet is given a checksum over all of it, where the kernel can do that, so that the kernel checks what
    /// becomes of it. It takes the sum for wrong when a program has cut the packet, although the sum counts no more then.
    pub checks_sums: bool,
    // Last, so that the pins are removed when nothing here needs them any more.
    _reaper: Reaper,
}

impl Datapath {
    /// The programs as the agent carries them.
    pub fn new() -> Result<Self> {
        Self::with(OBJECT, Self::settings())
    }

    /// Another build of the programs.
    pub fn with_object(object: &[u8]) -> Result<Self> {
        Self::with(object, Self::settings())
    }

    /// The settings that [`Self::new`] gives the programs: those of a node, but for mark and seed.
    #[must_use]
    pub fn settings() -> Settings {
        Settings { seed: SEED, mark: MARK, ..Settings::default() }
    }

    /// Any build of the programs with any settings.
    pub fn with(object: &[u8], settings: Settings) -> Result<Self> {
        Self::with_pins(object, settings, |_| Ok(()))
    }

    /// With maps that `prepare` may pin before the programs are loaded, which adopt them.
    pub fn with_pins(object: &[u8], settings: Settings, prepare: impl FnOnce(&Pins) -> Result<()>) -> Result<Self> {
        let reaper = Reaper::start()?;
        let pins = Pins::new(reaper.bpffs());
        pins.create()?;
        prepare(&pins)?;
        let limits = Limits { frontends: 1024, service_ports: 1024, backends: 4096, slots: 1 << 16 };
        let sizes = Sizes {
            limits,
            flows: FLOWS,
            half_open: HALF_OPEN,
            affinity: 1 << 12,
            sockets: 1 << 12,
            fragments: 1 << 13,
            interfaces: 1 << 13,
            unserved: None,
        };
        let object = Object::load(object, &pins, &sizes, settings)?;
        let maps = Maps::open(&pins, true)?;
        let state = State::adopt(maps.read()?, maps.limits());
        let checks_sums = has_checksum_complete()?;
        Ok(Self { object, maps, state, plan: Plan::default(), pins, checks_sums, _reaper: reaper })
    }

    /// Adds a service, or replaces its backends.
    pub fn serve(
        &mut self,
        name: &str,
        protocol: Protocol,
        frontend: SocketAddr,
        backends: &[SocketAddr],
    ) -> Result<()> {
        self.serve_with(name, protocol, frontend, backends, |_| {})
    }

    /// The same for one that is special, say with session affinity.
    pub fn serve_with(
        &mut self,
        name: &str,
        protocol: Protocol,
        frontend: SocketAddr,
        backends: &[SocketAddr],
        change: impl FnOnce(&mut ServicePortPlan),
    ) -> Result<()> {
        let key = key(name, protocol, Family::of(frontend.ip()));
        let frontend = Frontend { address: frontend.ip(), port: frontend.port(), protocol, scope: Scope::Cluster };
        let mut backends: Vec<_> = backends.iter().map(|&address| Backend { address, terminating: false }).collect();
        backends.sort_unstable();
        let cluster_ip = Some(frontend.address);
        let mut port =
            ServicePortPlan { frontends: [frontend].into(), cluster_ip, backends, ..ServicePortPlan::default() };
        change(&mut port);
        self.plan.service_ports.insert(key, port);
        self.publish()
    }

    /// Removes a service, in both families.
    pub fn withdraw(&mut self, name: &str, protocol: Protocol) -> Result<()> {
        for family in Family::ALL {
            self.plan.service_ports.remove(&key(name, protocol, family));
        }
        self.publish()
    }

    fn publish(&mut self) -> Result<()> {
        let result = self.state.reconcile(&self.plan);
        ensure!(result.shortages.is_empty(), "{:?}", result.shortages);
        self.maps.write(&result.writes)
    }

    /// What an agent would write that starts now, and is to serve the same.
    pub fn writes_of_a_successor(&self) -> Result<Vec<Write>> {
        let mut state = State::adopt(self.maps.read()?, self.maps.limits());
        state.verify(|range| self.maps.slots(range));
        Ok(state.reconcile(&self.plan).writes)
    }

    /// Runs a packet through `from_pod`.
    pub fn from_pod(&mut self, input: impl Into<Input>) -> Result<Output> {
        self.run(Object::FROM_POD, &input.into())
    }

    /// Runs a packet through `to_pod`.
    pub fn to_pod(&mut self, input: impl Into<Input>) -> Result<Output> {
        self.run(Object::TO_POD, &input.into())
    }

    fn run(&mut self, program: &str, input: &Input) -> Result<Output> {
        let checksum_complete = input.checksum_complete || self.checks_sums;
        let (output, _) = self.repeat(program, &Input { checksum_complete, ..input.clone() }, 1)?;
        Ok(output)
    }

    /// Runs a packet that [`Verdict::Redirect`] sends round to where it was: so many times in all, the last one counts.
    pub fn from_pod_and_round(&mut self, input: impl Into<Input>, runs: u32) -> Result<Output> {
        Ok(self.repeat(Object::FROM_POD, &input.into(), runs)?.0)
    }

    /// Runs the same packet many times; the mean duration of a run. The packet is not restored in between: take one that
    /// passes unchanged, or that is translated to what is translated no further.
    pub fn time(&mut self, program: &str, input: &Input, runs: u32) -> Result<Duration> {
        Ok(self.repeat(program, input, runs)?.1)
    }

    fn repeat(&mut self, program: &str, input: &Input, repeat: u32) -> Result<(Output, Duration)> {
        let program = self.object.program(program)?;
        let fd = program.fd()?.as_fd().as_raw_fd();
        let context = SkBuff::new(input.mark, input.came_in_by, input.interface);
        let ran = test_run(fd, &input.frame, context, input.checksum_complete, repeat)?;
        let verdict = match ran.answer {
            -1 => Verdict::Pass,
            2 => Verdict::Drop,
            7 => Verdict::Redirect,
            other => Verdict::Other(other),
        };
        Ok((Output { verdict, frame: ran.frame, mark: ran.mark }, ran.duration))
    }

    /// The loaded object, for its globals and programs.
    pub fn object(&mut self) -> &mut Object {
        &mut self.object
    }

    /// Where the maps are pinned.
    #[must_use]
    pub const fn pins(&self) -> &Pins {
        &self.pins
    }
}

fn key(name: &str, protocol: Protocol, family: Family) -> ServicePortName {
    ServicePortName {
        object: ObjectName::new("default", name),
        port: "".into(),
        protocol,
        family,
        endpoints: TrafficPolicy::Cluster,
    }
}

/// Whether the kernel can run programs on packets with [`Input::checksum_complete`].
pub fn has_checksum_complete() -> Result<bool> {
    let release = nix::sys::utsname::uname()?.release().to_string_lossy().into_owned();
    let mut numbers = release.split(['.', '-']).map_while(|number| number.parse::<u32>().ok());
    Ok((numbers.next(), numbers.next()) >= (Some(6), Some(15)))
}

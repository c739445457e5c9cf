//! Loading the programs, with the maps that are pinned already or new ones.

use std::fs::File;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::path::Path;

use anyhow::{Context, Result, bail};
use aya::maps::MapData;
use aya::pin::PinError;
use aya::programs::links::FdLink;
use aya::programs::{
    CgroupAttachMode, CgroupSockAddr, Program, ProgramError, ProgramFd, ProgramInfo, ProgramType, SchedClassifier,
    SockOps,
};
use aya::sys::{BpfHelper, is_helper_supported};
use aya::{Ebpf, EbpfLoader};
use lb_common::abi::{IdleTimes, handover, options};
use lb_common::hash::DEFAULT_SEED;

use super::attach::cgroup::PROGRAMS as AT_SOCKETS;
use super::kernel::network_namespace;
use super::{MapShape, Maps, Pins, Sizes};
use crate::host_routing::HostRouting;

/// The kernel programs, built from `lb-ebpf` and part of this binary.
pub static OBJECT: &[u8] = aya::include_bytes_aligned!(env!("VIADUCT_BPF_OBJECT"));

/// What the programs are told at load time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Settings {
    /// Seed of backend selection; the same on all nodes of a cluster.
    pub seed: u64,
    /// Bits of the packet mark that say "translated on this node"; 0 for none.
    pub mark: u32,
    /// Which connections are left to another proxy.
    pub handover: Handover,
    /// Whether an ICMP echo request to a cluster IP that has a backend is answered.
    pub answer_echo: bool,
    /// Whether backends that do not answer are passed over.
    pub passive_health: PassiveHealth,
    /// What becomes of packets to ports that a cluster IP does not serve.
    pub unserved_ports: UnservedPorts,
    /// How long flows may be idle.
    pub idle: IdleTimes,
    /// From where a pod that is its own backend sees its connections come.
    pub hairpin: (Ipv4Addr, Ipv6Addr),
    /// How many refusals are sent each second, on each CPU to the pods of a few interfaces.
    pub refusals_per_second: u32,
    /// Whose sockets are served.
    pub socket_lb: SocketLb,
    /// Which way packets go between interfaces.
    pub host_routing: HostRouting,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            seed: DEFAULT_SEED,
            mark: 0,
            handover: Handover::None,
            answer_echo: true,
            passive_health: PassiveHealth::On,
            unserved_ports: UnservedPorts::Pass,
            idle: IdleTimes::DEFAULT,
            hairpin: (Ipv4Addr::new(169, 254, 109, 1), Ipv6Addr::new(0xfd00, 0x7669, 0x6164, 0x7563, 0x7400, 0, 0, 1)),
            refusals_per_second: 1000,
            socket_lb: SocketLb::Host,
            host_routing: HostRouting::Stack,
        }
    }
}

/// Whether a SYN that is sent again goes to another backend, and new connections pass over backends that do not answer.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum PassiveHealth {
    /// They do.
    #[default]
    On,
    /// All backends are treated alike, whether they answer or not.
    Off,
}

/// What becomes of packets to ports that a cluster IP does not serve.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum UnservedPorts {
    /// They pass on untouched, as to any other address.
    #[default]
    Pass,
    /// Their senders are told at once that nobody listens.
    Refuse,
}

/// Which processes are served at their sockets, where no packet needs to be touched.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, serde::Serialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum SocketLb {
    /// Those in the network namespace of the agent, which is that of the node. Pods are served by their packets.
    #[default]
    Host,
    /// All of the node, those in pods too.
    All,
    /// None: processes of the host are not served.
    Off,
}

impl SocketLb {
    /// The word that people see.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Host => "host",
            Self::All => "all",
            Self::Off => "off",
        }
    }
}

/// How connections fare while a node changes between kube-proxy and Viaduct.
#[repr(u32)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Handover {
    /// No other proxy serves this node.
    #[default]
    None = handover::NONE,
    /// TCP packets of connections that Viaduct has not opened pass on untouched, so that connections opened through
    /// kube-proxy live on.
    FromKubeProxy = handover::FROM_ANOTHER,
    /// No new connections are translated, those that Viaduct has opened live on.
    ToKubeProxy = handover::TO_ANOTHER,
}

impl Settings {
    fn options(&self) -> u32 {
        let echo = if self.answer_echo { options::ANSWER_ECHO } else { 0 };
        let unserved = match self.unserved_ports {
            UnservedPorts::Pass => 0,
            UnservedPorts::Refuse => options::REFUSE_UNSERVED,
        };
        let health = match self.passive_health {
            PassiveHealth::On => options::PASSIVE_HEALTH,
            PassiveHealth::Off => 0,
        };
        let bypass = if self.host_routing == HostRouting::Stack { 0 } else { options::BYPASS };
        echo | unserved | health | bypass
    }
}

/// The loaded programs.
pub struct Object {
    ebpf: Ebpf,
    socket_lb: SocketLb,
}

/// A program at sockets.
pub enum SocketProgram<'a> {
    /// At a system call that names an address.
    Call(&'a mut CgroupSockAddr),
    /// At what happens to a TCP connection.
    Event(&'a mut SockOps),
}

impl SocketProgram<'_> {
    fn load(&mut self) -> Result<(), ProgramError> {
        match self {
            Self::Call(program) => program.load(),
            Self::Event(program) => program.load(),
        }
    }

    fn pin(&mut self, path: &Path) -> Result<(), PinError> {
        match self {
            Self::Call(program) => program.pin(path),
            Self::Event(program) => program.pin(path),
        }
    }

    /// # Errors
    /// When it is not loaded.
    pub fn fd(&self) -> Result<&ProgramFd, ProgramError> {
        match self {
            Self::Call(program) => program.fd(),
            Self::Event(program) => program.fd(),
        }
    }

    /// What the kernel says of it.
    ///
    /// # Errors
    /// When it is not loaded.
    pub fn info(&self) -> Result<ProgramInfo, ProgramError> {
        match self {
            Self::Call(program) => program.info(),
            Self::Event(program) => program.info(),
        }
    }

    /// Attaches it to a cgroup, by a link that stands beside those of others.
    pub(super) fn attach(&mut self, cgroup: &File) -> Result<FdLink> {
        let mode = CgroupAttachMode::Single;
        Ok(match self {
            Self::Call(program) => {
                let id = program.attach(cgroup, mode)?;
                program.take_link(id)?.try_into()?
            }
            Self::Event(program) => {
                let id = program.attach(cgroup, mode)?;
                program.take_link(id)?.try_into()?
            }
        })
    }
}

impl Object {
    /// Names of the programs in the object: one for each direction at a pod's interface.
    pub const FROM_POD: &'static str = "from_pod";
    /// See [`Self::FROM_POD`].
    pub const TO_POD: &'static str = "to_pod";

    /// Loads `object`. Maps that are pinned already are adopted, the others are made and pinned.
    ///
    /// # Errors
    /// When a pinned map has other keys or values than this version, or when the kernel refuses something.
    pub fn load(object: &[u8], pins: &Pins, sizes: &Sizes, settings: Settings) -> Result<Self> {
        let shapes = sizes.shapes();
        for shape in &shapes {
            check_pinned(pins, shape)?;
        }
        let mut loader = EbpfLoader::new();
        let handover = settings.handover as u32;
        let options = settings.options();
        let idle: [u8; size_of::<IdleTimes>()] = zerocopy::transmute!(settings.idle);
        let socket_lb = settings.socket_lb;
        let network_namespace = if socket_lb == SocketLb::Host { network_namespace()? } else { 0 };
        let set_retval = is_helper_supported(ProgramType::CgroupSockAddr, BpfHelper::BPF_FUNC_set_retval);
        // In doubt, processes hear EPERM.
        let set_retval = u32::from(set_retval.unwrap_or(false));
        let hairpin = (settings.hairpin.0.octets(), settings.hairpin.1.octets());
        loader
            .override_global("SEED", &settings.seed, true)
            .override_global("MARK", &settings.mark, true)
            .override_global("HANDOVER", &handover, true)
            .override_global("OPTIONS", &options, true)
            .override_global("IDLE", &idle, true)
            .override_global("HAIRPIN_4", &hairpin.0, true)
            .override_global("HAIRPIN_6", &hairpin.1, true)
            .override_global("NETNS", &network_namespace, true)
            .override_global("SET_RETVAL", &set_retval, true)
            .override_global("REFUSALS_PER_SECOND", &settings.refusals_per_second, true);
        for shape in &shapes {
            loader.map_max_entries(shape.name, shape.entries).map_pin_path(shape.name, pins.map(shape.name));
        }
        if settings.host_routing == HostRouting::Stack {
            // Nobody asks for routes.
            loader.map_max_entries("HOPS_4", 1).map_max_entries("HOPS_6", 1);
        }
        let mut ebpf = loader
            .load(object)
            .context("the kernel refused the maps: it must be 5.15 or later, this process needs CAP_BPF, and its cgroup memory for them")?;
        for name in [Self::FROM_POD, Self::TO_POD] {
            program(&mut ebpf, name)?.load().with_context(|| format!("the kernel refused the program {name}"))?;
        }
        let maps = Maps::open(pins, true)?;
        maps.v4.note(settings.hairpin.0.into());
        maps.v6.note(settings.hairpin.1.into());
        let mut object = Self { ebpf, socket_lb };
        for name in object.at_sockets() {
            let refused = || format!("the kernel refused the program {name}, which --socket-lb=off does without");
            object.socket_program(name)?.load().with_context(refused)?;
        }
        Ok(object)
    }

    fn at_sockets(&self) -> &'static [&'static str] {
        if self.socket_lb == SocketLb::Off { &[] } else { &AT_SOCKETS }
    }

    /// Whether there is a program at sockets of that name, and it is to be attached.
    #[must_use]
    pub fn has_socket_program(&self, name: &str) -> bool {
        self.at_sockets().contains(&name)
    }

    /// One of the programs at sockets.
    ///
    /// # Errors
    /// When the object has no such program.
    pub fn socket_program(&mut self, name: &str) -> Result<SocketProgram<'_>> {
        match self.ebpf.program_mut(name) {
            Some(Program::CgroupSockAddr(program)) => Ok(SocketProgram::Call(program)),
            Some(Program::SockOps(program)) => Ok(SocketProgram::Event(program)),
            Some(_) => bail!("{name} is no program at sockets"),
            None => bail!("the object has no program {name}"),
        }
    }

    /// One of the two programs on interfaces.
    ///
    /// # Errors
    /// When the object has no such program.
    pub fn program(&mut self, name: &str) -> Result<&mut SchedClassifier> {
        program(&mut self.ebpf, name)
    }

    /// The ids of the two.
    ///
    /// # Errors
    /// When one is not loaded.
    pub fn program_ids(&mut self) -> Result<Vec<u32>> {
        [Self::FROM_POD, Self::TO_POD].into_iter().map(|name| Ok(self.program(name)?.info()?.id())).collect()
    }

    /// The loaded object itself, for what tests look at beyond the programs.
    pub fn ebpf(&mut self) -> &mut Ebpf {
        &mut self.ebpf
    }

    /// Pins the programs in the place of the ones before.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn pin(&mut self, pins: &Pins) -> Result<()> {
        for name in [Self::FROM_POD, Self::TO_POD] {
            let path = pins.programs().join(name);
            super::attach::remove_pin(&path)?;
            self.program(name)?.pin(&path).with_context(|| format!("cannot pin {}", path.display()))?;
        }
        for name in AT_SOCKETS {
            super::attach::remove_pin(&pins.programs().join(name))?;
        }
        for name in self.at_sockets() {
            let path = pins.programs().join(name);
            self.socket_program(name)?.pin(&path).with_context(|| format!("cannot pin {}", path.display()))?;
        }
        Ok(())
    }
}

fn program<'a>(ebpf: &'a mut Ebpf, name: &str) -> Result<&'a mut SchedClassifier> {
    let program = ebpf.program_mut(name).with_context(|| format!("the object has no program {name}"))?;
    program.try_into().with_context(|| format!("{name} is no TC program"))
}

fn check_pinned(pins: &Pins, shape: &MapShape) -> Result<()> {
    let path = pins.map(shape.name);
    if !path.exists() {
        return Ok(());
    }
    let info = MapData::from_pin(&path)
        .and_then(|map| map.info())
        .with_context(|| format!("cannot open {}", path.display()))?;
    if info.key_size() != shape.key || info.value_size() != shape.value {
        bail!(
            "layout mismatch: {} has keys of {} and values of {} bytes, this viaduct expects {} and {}; run `viaduct \
             cleanup --bpffs {}` if no agent needs it",
            path.display(),
            info.key_size(),
            info.value_size(),
            shape.key,
            shape.value,
            pins.root().display(),
        );
    }
    Ok(())
}

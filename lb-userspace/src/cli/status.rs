//! `viaduct status`.

use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::Result;
use aya::programs::ProgramInfo;
use lb_common::abi::LAYOUT;
use serde::Serialize;

use super::{Format, open, output};
use crate::dataplane::attach::{self, cgroup};
use crate::dataplane::{MapUse, Maps, Notice, Object, Pins, SocketLb, TurnedAway, flag_for};

#[derive(Debug, Serialize)]
struct Status {
    bpffs: PathBuf,
    layout: u32,
    agent: AgentStatus,
    /// `tcx` or `clsact`; none before an interface is served.
    mechanism: Option<&'static str>,
    programs: Vec<ProgramStatus>,
    interfaces: Vec<InterfaceStatus>,
    routing: RoutingStatus,
    sockets: SocketsStatus,
    /// Backends that new connections pass over, since they have not answered.
    suspect_backends: usize,
    maps: Vec<MapStatus>,
    reasons: BTreeMap<&'static str, ReasonStatus>,
}

#[derive(Debug, Serialize)]
struct AgentStatus {
    running: bool,
    pid: Option<u32>,
    /// How many problems stand in its way.
    problem_count: usize,
    /// The first of them.
    problems: Vec<ProblemStatus>,
}

#[derive(Debug, Serialize)]
struct ProblemStatus {
    /// For how long.
    seconds: f64,
    problem: String,
}

#[derive(Debug, Serialize)]
struct ProgramStatus {
    name: &'static str,
    id: u32,
    /// Of the instructions, as bpftool prints it.
    tag: String,
    /// Instructions that the verifier walked through.
    verified_instructions: Option<u32>,
}

#[derive(Debug, Serialize)]
struct InterfaceStatus {
    index: u32,
    /// Inode of the network namespace that the interface is in.
    network_namespace: u64,
    /// None when it is gone, or in another network namespace than this command.
    name: Option<String>,
    programs: Vec<String>,
}

#[derive(Debug, Serialize)]
struct RoutingStatus {
    /// Interfaces whose packets may go past the host's stack.
    bypassed: usize,
    /// Why those of others may not, the first of these reasons; none if nobody has asked for it.
    in_stack: Vec<String>,
}

#[derive(Debug, Serialize)]
struct SocketsStatus {
    processes: SocketLb,
    /// None when it is not mounted where this command could find it.
    cgroup: Option<PathBuf>,
    programs: Vec<String>,
}

#[derive(Debug, Serialize)]
struct MapStatus {
    #[serde(flatten)]
    usage: MapUse,
    /// Service ports, or interfaces, that found no room in it.
    turned_away: u32,
    /// Whether something waits, or what was used least makes room for what comes.
    full: bool,
}

#[derive(Debug, Serialize)]
struct ReasonStatus {
    packets: u64,
    dropped: bool,
}

pub(super) fn print(pins: &Pins, format: Format) -> Result<()> {
    let status = collect(pins)?;
    match format {
        Format::Json => output::print_json(&status),
        Format::Table => output::write_out(&text(&status)),
    }
}

fn collect(pins: &Pins) -> Result<Status> {
    let maps = open(pins)?;
    let attached = attach::attached(pins);
    let mut interfaces: BTreeMap<(u64, u32), InterfaceStatus> = BTreeMap::new();
    for (_, pin) in &attached {
        let status = interfaces.entry((pin.namespace, pin.index)).or_insert_with(|| InterfaceStatus {
            index: pin.index,
            network_namespace: pin.namespace,
            name: pin.interface(),
            programs: Vec::new(),
        });
        status.programs.push(pin.program.clone());
    }
    let pid = pins.holder();
    // Those of an agent that is gone are nobody's.
    let notice = if pid.is_some() { Notice::read(pins)? } else { Notice::default() };
    let problems = notice.problems.into_iter();
    let problems = problems
        .map(|standing| ProblemStatus { seconds: standing.age().as_secs_f64(), problem: standing.problem })
        .collect();
    Ok(Status {
        bpffs: pins.root().to_owned(),
        layout: LAYOUT,
        agent: AgentStatus { running: pid.is_some(), pid, problem_count: notice.count, problems },
        mechanism: attached.first().map(|(mechanism, _)| mechanism.name()),
        programs: [Object::FROM_POD, Object::TO_POD]
            .into_iter()
            .chain(cgroup::PROGRAMS)
            .filter_map(|name| program(pins, name))
            .collect(),
        interfaces: interfaces.into_values().collect(),
        routing: RoutingStatus { bypassed: maps.bypassed_interfaces()?, in_stack: notice.in_stack },
        sockets: sockets(pins),
        suspect_backends: suspects(&maps)?,
        maps: map_status(&maps, pins)?,
        reasons: maps
            .reasons()?
            .into_iter()
            .map(|(reason, packets)| (reason.name(), ReasonStatus { packets, dropped: reason.drops() }))
            .collect(),
    })
}

fn map_status(maps: &Maps, pins: &Pins) -> Result<Vec<MapStatus>> {
    let turned_away = TurnedAway::read(pins)?;
    let status = |usage: MapUse| {
        let turned_away = turned_away.get(usage.name).copied().unwrap_or(0);
        MapStatus { usage, turned_away, full: turned_away > 0 || usage.evicts() }
    };
    Ok(maps.usage()?.into_iter().map(status).collect())
}

fn sockets(pins: &Pins) -> SocketsStatus {
    let attached = cgroup::attached(pins);
    SocketsStatus {
        processes: attached.first().map_or(SocketLb::Off, |program| program.mode),
        cgroup: attached.first().and_then(cgroup::AttachedToSockets::path),
        programs: attached.into_iter().map(|program| program.program).collect(),
    }
}

fn suspects(maps: &Maps) -> Result<usize> {
    let mut count = 0;
    for (id, backend) in maps.backends()? {
        count += usize::from(maps.suspect_since(id, &backend)?.is_some());
    }
    Ok(count)
}

fn program(pins: &Pins, name: &'static str) -> Option<ProgramStatus> {
    let info = ProgramInfo::from_pin(pins.programs().join(name)).ok()?;
    Some(ProgramStatus {
        name,
        id: info.id(),
        tag: format!("{:016x}", info.tag()),
        verified_instructions: info.verified_instruction_count(),
    })
}

fn text(status: &Status) -> String {
    let agent = match status.agent.pid {
        Some(pid) => format!("running (pid {pid})"),
        None => "not running; the datapath goes on without it".to_owned(),
    };
    let full: Vec<_> = status.maps.iter().filter(|map| map.full).map(|map| map.usage.name).collect();
    let full = if full.is_empty() { String::new() } else { format!("Full maps:  {}\n", full.join(", ")) };
    let mut text = format!(
        "Agent:      {agent}\n{}Pinned in:  {} (layout {})\nAttached:   {} interfaces{}\nRouting:    {}\nSockets:    {}\n{}{full}\n",
        problems_text(&status.agent),
        status.bpffs.display(),
        status.layout,
        status.interfaces.len(),
        status.mechanism.map_or_else(String::new, |mechanism| format!(" by {mechanism}")),
        routing_text(&status.routing),
        sockets_text(&status.sockets),
        match status.suspect_backends {
            0 => String::new(),
            suspects => format!("Suspect:    {suspects} backends, see `viaduct backend list`\n"),
        },
    );
    let programs: Vec<_> = status
        .programs
        .iter()
        .map(|program| {
            let verified = program.verified_instructions.map_or("-".to_owned(), |count| count.to_string());
            [program.name.to_owned(), program.id.to_string(), program.tag.clone(), verified]
        })
        .collect();
    text.push_str(&output::table(["PROGRAM", "ID", "TAG", "VERIFIED INSTRUCTIONS"], &programs));
    text.push('\n');
    let interfaces: Vec<_> = status
        .interfaces
        .iter()
        .map(|interface| {
            let name = interface.name.clone().unwrap_or_else(|| "(not in this network namespace)".to_owned());
            [name, interface.index.to_string(), interface.programs.join(", ")]
        })
        .collect();
    text.push_str(&output::table(["INTERFACE", "INDEX", "PROGRAMS"], &interfaces));
    text.push('\n');
    let maps: Vec<_> = status
        .maps
        .iter()
        .map(|map| {
            let MapUse { name, used, size } = map.usage;
            [name.to_owned(), used.to_string(), size.to_string(), full_text(map)]
        })
        .collect();
    text.push_str(&output::table(["MAP", "USED", "SIZE", "FULL"], &maps));
    text.push('\n');
    let reasons: Vec<_> = status
        .reasons
        .iter()
        .map(|(name, reason)| {
            let fate = if reason.dropped { "dropped" } else { "passed on" };
            [(*name).to_owned(), fate.to_owned(), reason.packets.to_string()]
        })
        .collect();
    text.push_str(&output::table(["REASON", "PACKETS ARE", "COUNT"], &reasons));
    text
}

fn full_text(map: &MapStatus) -> String {
    let flag = flag_for(map.usage.name);
    match (map.turned_away, map.usage.name) {
        (0, _) if map.full => format!("what was used least makes room: {flag}"),
        (0, _) => "-".to_owned(),
        (turned_away, "INTERFACES") => format!("no room for {turned_away} interfaces: {flag}"),
        (turned_away, _) => format!("no room for {turned_away} service ports: {flag}"),
    }
}

fn problems_text(agent: &AgentStatus) -> String {
    let mut text: String = agent
        .problems
        .iter()
        .map(|standing| format!("Problem:    {} (for {:.0} s)\n", standing.problem, standing.seconds))
        .collect();
    let more = agent.problem_count - agent.problems.len().min(agent.problem_count);
    if more > 0 {
        text.push_str(&format!("Problems:   {more} more, see the agent's log\n"));
    }
    text
}

fn routing_text(routing: &RoutingStatus) -> String {
    let way = match routing.bypassed {
        0 => "through the host's stack".to_owned(),
        bypassed => format!("past the host's stack between {bypassed} interfaces"),
    };
    let reasons = routing.in_stack.iter().map(|reason| format!("\n            {reason}"));
    std::iter::once(way).chain(reasons).collect()
}

fn sockets_text(sockets: &SocketsStatus) -> String {
    if sockets.programs.is_empty() {
        return "off".to_owned();
    }
    let cgroup =
        sockets.cgroup.as_ref().map_or("a cgroup that is not mounted here".into(), |path| path.to_string_lossy());
    format!("{}, {} programs at {cgroup}", sockets.processes.name(), sockets.programs.len())
}

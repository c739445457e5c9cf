//! The rounds of a run.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use clap::Args;
use viaduct_tests::agent;

use super::bed::{Bed, Place};
use super::contender::{Contender, DIRECT, Kind};
use super::load::{Load, Sample};
use crate::facts;
use crate::results::{Samples, Series, median};

/// Who is compared in a quick run.
const QUICK: [&str; 4] = [DIRECT, "viaduct", "viaduct-bypass", "nftables"];

/// What to measure.
#[derive(Args, Debug)]
pub struct Options {
    /// A look in a minute or two: fewer rounds, shorter samples, one node, 1,000 services, no iptables, no OVS
    #[arg(long)]
    quick: bool,
    /// How often everything is measured [default: 5; quick: 3]
    #[arg(long, value_name = "N")]
    rounds: Option<usize>,
    /// Length of a sample in seconds [default: 3; quick: 0.5]
    #[arg(long, value_name = "S")]
    seconds: Option<f64>,
    /// Numbers of services [default: 1,10000; quick: 1000]
    #[arg(long, value_name = "NUMBERS", value_delimiter = ',')]
    services: Vec<u32>,
    /// Who is compared, by name or its beginning [default: everybody that is there; quick: direct,viaduct,viaduct-bypass,nftables]
    #[arg(long, value_name = "NAMES", value_delimiter = ',')]
    contenders: Vec<String>,
    /// Only what has one of these in its name: connections, requests, throughput, datagrams, first-packet
    #[arg(long, value_name = "NAMES", value_delimiter = ',')]
    loads: Vec<String>,
    /// Where the backend is: one-node, two-nodes [default: both; quick: one-node]
    #[arg(long, value_name = "NAMES", value_delimiter = ',')]
    topologies: Vec<String>,
    /// Binary of the real kube-proxy, to measure it too
    #[arg(long, value_name = "PATH")]
    kube_proxy: Option<PathBuf>,
    /// Where samples go [default: target/bench/traffic.json]
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
}

/// One kind of measurement.
struct Measurement {
    group: &'static str,
    load: Load,
    parameters: &'static [(&'static str, &'static str)],
    offloads: bool,
}

const STREAMS: &str = "streams";
const OFFLOADS: &str = "offloads";
const MEASUREMENTS: [Measurement; 8] = [
    Measurement { group: "connections", load: Load::Connections, parameters: &[], offloads: true },
    Measurement { group: "requests", load: Load::Requests, parameters: &[], offloads: true },
    Measurement { group: "datagrams", load: Load::Datagrams, parameters: &[], offloads: true },
    Measurement { group: "first-packet", load: Load::FirstPacket, parameters: &[], offloads: true },
    Measurement {
        group: "throughput",
        load: Load::Streams(1),
        parameters: &[(STREAMS, "1"), (OFFLOADS, "on")],
        offloads: true,
    },
    Measurement {
        group: "throughput",
        load: Load::Streams(8),
        parameters: &[(STREAMS, "8"), (OFFLOADS, "on")],
        offloads: true,
    },
    Measurement {
        group: "throughput",
        load: Load::Streams(1),
        parameters: &[(STREAMS, "1"), (OFFLOADS, "off")],
        offloads: false,
    },
    Measurement {
        group: "throughput",
        load: Load::Streams(8),
        parameters: &[(STREAMS, "8"), (OFFLOADS, "off")],
        offloads: false,
    },
];

/// Runs everything, and writes the samples after each round.
///
/// # Errors
/// When a contender cannot be set up. A sample that fails is told, and is missing.
pub fn run(options: &Options) -> Result<()> {
    let plan = Plan::of(options)?;
    let mut samples = Samples::new("traffic");
    samples.facts = facts(&plan.contenders, options);
    let out = options.out.clone().unwrap_or_else(|| Samples::default_path("traffic"));
    for &services in &plan.services {
        let mut beds = Vec::new();
        for &contender in &plan.contenders {
            let begun = Instant::now();
            let bed = Bed::build(contender, services, options.kube_proxy.as_deref());
            let bed = bed.with_context(|| format!("{} with {services} services", contender.name))?;
            bed.rest()?;
            println!("{:<20} {services} services, ready after {:.1?}", contender.name, begun.elapsed());
            beds.push(bed);
        }
        for round in 0..plan.rounds {
            println!("round {} of {}, {services} services", round + 1, plan.rounds);
            for &place in &plan.places {
                for measurement in &plan.measurements {
                    // Nobody is always the first, which may find the machine in another state.
                    beds.rotate_left(1);
                    plan.measure(&beds, measurement, (services, place, round), &mut samples);
                }
            }
            samples.write(&out)?;
        }
        for bed in beds.iter().filter(|bed| bed.contender.kind == Kind::Direct) {
            let found = bed.netfilter()?;
            ensure!(found.is_empty(), "direct traffic was not direct: {}", found.join(", "));
        }
    }
    println!("\n{}", table(&samples));
    println!("samples are in {}", out.display());
    Ok(())
}

/// What the options come to.
struct Plan {
    rounds: usize,
    length: Duration,
    services: Vec<u32>,
    contenders: Vec<Contender>,
    places: Vec<Place>,
    measurements: Vec<&'static Measurement>,
}

impl Plan {
    fn of(options: &Options) -> Result<Self> {
        let quick = options.quick;
        let seconds = options.seconds.unwrap_or(if quick { 0.5 } else { 3.0 });
        ensure!(seconds >= 0.1, "--seconds: a sample takes 0.1 s at least");
        let or = |given: &[u32], quick_one: &[u32], full: &[u32]| match given {
            [] if quick => quick_one.to_vec(),
            [] => full.to_vec(),
            given => given.to_vec(),
        };
        let services = or(&options.services, &[1000], &[1, 10_000]);
        ensure!(services.iter().all(|services| (1..=50_000).contains(services)), "--services: from 1 to 50000");
        let mut names = options.contenders.clone();
        let mut contenders = Contender::named(&names, options.kube_proxy.as_deref())?;
        if quick && names.is_empty() {
            names = QUICK.map(str::to_owned).to_vec();
            contenders.retain(|contender| names.iter().any(|name| name == contender.name));
        }
        let places: Vec<_> = Place::ALL
            .into_iter()
            .filter(|place| match options.topologies.as_slice() {
                [] => !quick || *place == Place::OneNode,
                names => names.iter().any(|name| name == place.name()),
            })
            .collect();
        ensure!(!places.is_empty(), "--topologies: there are one-node and two-nodes");
        let is_wanted = |measurement: &&Measurement| {
            options.loads.is_empty() || options.loads.iter().any(|name| measurement.group.contains(name.as_str()))
        };
        let measurements: Vec<_> = MEASUREMENTS.iter().filter(is_wanted).collect();
        ensure!(!measurements.is_empty(), "--loads: nothing is called {}", options.loads.join(" or "));
        Ok(Self {
            rounds: options.rounds.unwrap_or(if quick { 3 } else { 5 }).max(1),
            length: Duration::from_secs_f64(seconds),
            services,
            contenders,
            places,
            measurements,
        })
    }

    /// One sample of each contender.
    fn measure(&self, beds: &[Bed], what: &Measurement, at: (u32, Place, usize), samples: &mut Samples) {
        let (services, place, round) = at;
        let outcomes: Vec<_> = beds.iter().map(|bed| (bed.contender, self.sample(bed, what, place))).collect();
        let parameters: Vec<_> = [("services", services.to_string().as_str()), ("topology", place.name())]
            .iter()
            .chain(what.parameters)
            .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
            .collect();
        let mut add = |figure: &Figure, contender: &Contender, value: Option<f64>| {
            let series = Series {
                group: format!("{}{}", what.group, figure.suffix),
                name: contender.name.to_owned(),
                parameters: parameters.clone(),
                unit: figure.unit.to_owned(),
                more_is_better: figure.more_is_better,
                samples: Vec::new(),
            };
            samples.add(series, round, value);
        };
        let figures = what.load.figures();
        let told = &figures[0];
        let of = |outcome: &Result<Option<Sample>>| outcome.as_ref().ok().copied().flatten().map(told.of);
        let direct = outcomes.iter().find(|(contender, _)| contender.name == DIRECT);
        let direct = direct.and_then(|(_, outcome)| of(outcome));
        let mut line = format!("  {} {}", what.name(), place.name());
        let mut errors = Vec::new();
        // In the order of tables, whoever was first.
        for contender in &self.contenders {
            let Some((_, outcome)) = outcomes.iter().find(|(one, _)| one.name == contender.name) else { continue };
            for figure in figures {
                add(figure, contender, outcome.as_ref().ok().copied().flatten().map(figure.of));
            }
            line += &match (of(outcome), direct) {
                (Some(value), Some(direct)) if contender.name != DIRECT => {
                    format!("  {} {} ({:.2})", contender.name, shown(value), value / direct)
                }
                (Some(value), _) => format!("  {} {}", contender.name, shown(value)),
                (None, _) => format!("  {} -", contender.name),
            };
            errors
                .extend(outcome.as_ref().err().map(|error| format!("    {} has no sample: {error:#}", contender.name)));
        }
        println!("{line} {}", told.unit);
        errors.iter().for_each(|error| println!("{error}"));
    }

    /// One sample of one contender; nothing where it cannot be measured so.
    fn sample(&self, bed: &Bed, what: &Measurement, place: Place) -> Result<Option<Sample>> {
        let takes = bed.contender.takes_offloads();
        if !takes && what.parameters.contains(&(OFFLOADS, "on")) {
            return Ok(None);
        }
        let _stay = bed.wake()?;
        let switched = takes && !what.offloads;
        if switched {
            bed.offloads(false)?;
        }
        let warm_up = (self.length / 5).max(Duration::from_millis(100));
        let sample = what.load.sample(&bed.way(place), warm_up, self.length);
        if switched {
            bed.offloads(true)?;
        }
        bed.rest()?;
        sample.map(Some)
    }
}

impl Measurement {
    /// With what distinguishes it from others of its group.
    fn name(&self) -> String {
        let parameters = self.parameters.iter().map(|(name, value)| format!(" {name}={value}"));
        self.group.to_owned() + &parameters.collect::<String>()
    }
}

/// A number of a sample that becomes a series.
struct Figure {
    suffix: &'static str,
    unit: &'static str,
    more_is_better: bool,
    of: fn(Sample) -> f64,
}

const RATE: Figure = Figure { suffix: "", unit: "1/s", more_is_better: true, of: |sample| sample.per_second };
const BITS: Figure = Figure { suffix: "", unit: "bit/s", more_is_better: true, of: |sample| sample.per_second * 8.0 };
const MEDIAN: Figure =
    Figure { suffix: "-p50", unit: "us", more_is_better: false, of: |sample| sample.microseconds(0) };
const P99: Figure = Figure { suffix: "-p99", unit: "us", more_is_better: false, of: |sample| sample.microseconds(1) };
const ONLY_MEDIAN: Figure = Figure { suffix: "", ..MEDIAN };
const CPU: Figure =
    Figure { suffix: "-cpu", unit: "s/million", more_is_better: false, of: |sample| sample.processor * 1e6 };
const CPU_OF_BYTES: Figure =
    Figure { suffix: "-cpu", unit: "s/TB", more_is_better: false, of: |sample| sample.processor * 1e12 };

impl Load {
    /// What of a sample is kept; the first is told while it runs.
    fn figures(self) -> &'static [Figure] {
        match self {
            Self::Connections | Self::Datagrams => &[RATE, CPU],
            Self::Requests => &[RATE, MEDIAN, P99, CPU],
            Self::Streams(_) => &[BITS, CPU_OF_BYTES],
            Self::FirstPacket => &[ONLY_MEDIAN],
        }
    }
}

impl Sample {
    fn microseconds(self, index: usize) -> f64 {
        self.times.map_or(f64::NAN, |times| times[index].as_secs_f64() * 1e6)
    }
}

fn facts(contenders: &[Contender], options: &Options) -> BTreeMap<String, String> {
    let mut facts = facts::machine();
    let versions = [
        ("nftables", facts::version("nft")),
        ("iptables-nft", facts::version("iptables-nft")),
        ("iptables-legacy", facts::version("iptables-legacy")),
        ("viaduct", agent::binary().ok().and_then(facts::version)),
        ("ovs", facts::version("ovs-vswitchd")),
        ("kube-proxy", options.kube_proxy.as_ref().and_then(facts::version)),
    ];
    for (name, version) in versions {
        if let Some(version) = version.filter(|_| contenders.iter().any(|contender| contender.name.contains(name))) {
            facts.insert(name.to_owned(), version);
        }
    }
    for (name, text) in METHOD {
        facts.insert(name.to_owned(), text.to_owned());
    }
    facts
}

const METHOD: [(&str, &str); 7] = [
    (
        "direct",
        "the client dials the pod; same nodes, veth pairs and routes as the others, no rules, no tables and no tracked \
         connections in any namespace of it (checked at the end), no BPF programs",
    ),
    (
        "rules",
        "as kube-proxy writes them, on both nodes; the service that is dialled stands in the middle of the list, has one \
         endpoint; conntrack as the kernel has it",
    ),
    ("connections", "6 clients: connect, 64 bytes, 64 bytes back, the server closes first; blocking sockets"),
    ("requests", "one connection, 64 bytes each way, both ends on one processor"),
    ("datagrams", "one client, 64 bytes of payload, one way after one exchange; those that arrived"),
    ("offloads", "off: `ethtool -K IFACE gro off gso off tso off tx off` at both ends of every veth pair"),
    (
        "cpu",
        "what all processors were busy meanwhile by /proc/stat (user, nice, system, irq, softirq), clients, servers and \
         whatever else ran included",
    ),
];

/// Three significant digits and more, for people.
fn shown(value: f64) -> String {
    match value.abs() {
        size if size >= 1e9 => format!("{:.2}G", value / 1e9),
        size if size >= 1e6 => format!("{:.2}M", value / 1e6),
        size if size >= 1e4 => format!("{:.1}k", value / 1e3),
        size if size >= 100.0 => format!("{value:.0}"),
        _ => format!("{value:.2}"),
    }
}

/// Everything, each contender's ratio to direct traffic of the same round.
fn table(samples: &Samples) -> String {
    let mut lines = vec![format!(
        "{:<66} {:<20} {:>9} {:<9} {:>6}  {:<13} {}",
        "WHAT", "WHO", "MEDIAN", "UNIT", "RATIO", "MIN..MAX", "ROUNDS"
    )];
    for series in &samples.series {
        let is_base =
            |base: &&Series| base.name == DIRECT && base.group == series.group && base.parameters == series.parameters;
        let base = samples.series.iter().find(is_base);
        let mut ratios = base.map(|base| series.ratios(base)).unwrap_or_default();
        ratios.sort_by(f64::total_cmp);
        let range = match (ratios.first(), ratios.last()) {
            (Some(least), Some(most)) => format!("{least:.3}..{most:.3}"),
            _ => String::new(),
        };
        let parameters: String = series.parameters.iter().map(|(name, value)| format!(" {name}={value}")).collect();
        lines.push(format!(
            "{:<66} {:<20} {:>9} {:<9} {:>6}  {range:<13} {}",
            format!("{}{parameters}", series.group),
            series.name,
            series.median().map_or("-".to_owned(), shown),
            series.unit,
            median(ratios).map_or("-".to_owned(), |ratio| format!("{ratio:.3}")),
            series.samples.iter().flatten().count(),
        ));
    }
    // Those to be compared stand together.
    lines[1..].sort_by_key(|line| line[..66].to_owned());
    lines.join("\n")
}

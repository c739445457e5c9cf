//! The rounds of a run.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use clap::Args;

use super::bed::{Bed, Place};
use super::contender::{Contender, DIRECT, Kind};
use super::load::Sample;
use super::measurement::{Figure, MEASUREMENTS, Measurement};
use super::method;
use super::table::{shown, table};
use crate::results::{Samples, Series};

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

/// Runs everything, and writes the samples after each round.
///
/// # Errors
/// When a contender cannot be set up. A sample that fails is told, and is missing.
pub fn run(options: &Options) -> Result<()> {
    let plan = Plan::of(options)?;
    let mut samples = Samples::new("traffic");
    samples.facts = method::facts(&plan.contenders, options.kube_proxy.as_deref());
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
        if !takes && what.offloads() == Some(true) {
            return Ok(None);
        }
        let _stay = bed.wake()?;
        let switched = takes && what.offloads() == Some(false);
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

//! The rounds of a run.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use clap::Args;

use super::bed::{Bed, Place};
use super::contender::{Contender, DIRECT, Kind};
use super::load::Sample;
use super::measurement::{Figure, MEASUREMENTS, Measurement};
use super::method;
use super::table::{shown, table};
use crate::options::{Extent, Others};
use crate::results::{Samples, Series};

/// Who is compared in a quick run.
const QUICK: [&str; 4] = [DIRECT, "viaduct", "viaduct-bypass", "nftables"];

/// What to measure.
#[derive(Args, Debug, Default)]
pub struct Options {
    #[command(flatten)]
    extent: Extent,
    /// Length of a sample in seconds [default: 3, with --quick 0.4]
    #[arg(long, value_name = "S")]
    seconds: Option<f64>,
    /// Numbers of services [default: 1,10000, with --quick 1000]
    #[arg(long, value_name = "NUMBERS", value_delimiter = ',', value_parser = clap::value_parser!(u32).range(1..=50_000))]
    services: Vec<u32>,
    #[command(flatten)]
    others: Others,
    /// Only what has one of these in its name: connections, requests, throughput, datagrams, first-packet
    #[arg(long, value_name = "NAMES", value_delimiter = ',')]
    loads: Vec<String>,
    /// Where the backend is [default: both, with --quick one-node]
    #[arg(long, value_name = "NAMES", value_delimiter = ',')]
    topologies: Vec<Place>,
}

impl Options {
    /// A quick run of what has one of these in its name.
    #[must_use]
    pub fn quick(loads: Vec<String>) -> Self {
        Self { extent: Extent::quick(), loads, ..Self::default() }
    }
}

/// Measures, writes the samples after each round, and prints a table in the end.
///
/// # Errors
/// As [`samples`], or when samples cannot be written.
pub fn run(options: &Options) -> Result<()> {
    let out = options.extent.out("traffic")?;
    let samples = samples(options, |samples| samples.write(&out))?;
    println!("\n{}", table(&samples));
    println!("samples are in {}", out.display());
    Ok(())
}

/// Measures, and hands over all samples that there are after each round.
///
/// # Errors
/// When an option cannot work, or a contender cannot be set up. A sample that fails is told, and is missing.
pub fn samples(options: &Options, keep: impl Fn(&Samples) -> Result<()>) -> Result<Samples> {
    let plan = Plan::of(options)?;
    let kube_proxy = options.others.kube_proxy.as_deref();
    let mut samples = Samples::new("traffic");
    samples.facts = method::facts(&plan.contenders, kube_proxy);
    for &services in &plan.services {
        let mut beds = Vec::new();
        for &contender in &plan.contenders {
            let begun = Instant::now();
            let bed = Bed::build(contender, services, kube_proxy);
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
            keep(&samples)?;
        }
        for bed in beds.iter().filter(|bed| bed.contender.kind == Kind::Direct) {
            let found = bed.netfilter()?;
            ensure!(found.is_empty(), "direct traffic was not direct: {}", found.join(", "));
        }
    }
    Ok(samples)
}

fn or<T: Clone>(given: &[T], otherwise: &[T]) -> Vec<T> {
    if given.is_empty() { otherwise } else { given }.to_vec()
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
        let quick = options.extent.quick;
        let seconds = options.seconds.unwrap_or(if quick { 0.4 } else { 3.0 });
        ensure!(seconds >= 0.1, "--seconds: a sample takes 0.1 s at least");
        let services = or(&options.services, if quick { &[1000] } else { &[1, 10_000] });
        let mut contenders = options.others.contenders()?;
        if quick && options.others.contenders.is_empty() {
            contenders.retain(|contender| QUICK.contains(&contender.name));
        }
        let places = or(&options.topologies, if quick { &[Place::OneNode] } else { &Place::ALL });
        let is_named = |measurement: &&Measurement, name: &String| measurement.group.contains(name.as_str());
        if let Some(name) = options.loads.iter().find(|name| !MEASUREMENTS.iter().any(|one| is_named(&one, name))) {
            bail!("--loads: nothing is called {name}");
        }
        let is_wanted = |measurement: &&Measurement| {
            options.loads.is_empty() || options.loads.iter().any(|name| is_named(measurement, name))
        };
        let measurements = MEASUREMENTS.iter().filter(is_wanted).collect();
        let (rounds, length) = (options.extent.rounds(5, 5), Duration::from_secs_f64(seconds));
        Ok(Self { rounds, length, services, contenders, places, measurements })
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

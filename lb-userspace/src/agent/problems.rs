//! What stands in the way of serving everything as it is written. Each problem is logged when it comes and when it goes.

use std::collections::BTreeMap;
use std::time::Instant;

use tracing::{info, warn};

use crate::dataplane::{Standing, clock};
use crate::model::ObjectName;
use crate::source::kube;

/// What a problem is about.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum About {
    /// The folder of manifests, or something in it.
    Folder,
    /// Reading from the API server.
    Api(kube::Kind),
    /// The Node of this host.
    Node,
    /// Writing to the maps.
    Maps,
    /// Noting what has no room in the maps.
    TurnedAway,
    /// Where everything is pinned.
    Pins,
    /// Programs at the sockets of processes.
    Sockets,
    /// Interfaces as such: their list, and what programs are told of them.
    Interfaces,
    /// Programs on the interface with this index.
    Interface(u32),
    /// A Service as the API has it.
    Service(ObjectName),
    /// A slice as the API has it.
    Slice(ObjectName),
    /// Planning a Service.
    Plan(ObjectName),
    /// Room in the maps for a Service.
    Room(ObjectName),
}

/// The problems that stand.
#[derive(Debug)]
pub(super) struct Problems {
    standing: BTreeMap<About, Vec<String>>,
    /// Since when there are some.
    since: BTreeMap<About, Instant>,
    count: usize,
    /// Whether others have been told of them as they are now.
    told: bool,
}

impl Problems {
    /// None.
    pub(super) const fn new() -> Self {
        Self { standing: BTreeMap::new(), since: BTreeMap::new(), count: 0, told: false }
    }

    /// These are all problems with something now.
    pub(super) fn set(&mut self, about: About, problems: Vec<String>) {
        let before = match problems.is_empty() {
            true => self.standing.remove(&about).unwrap_or_default(),
            false => self.standing.insert(about.clone(), problems.clone()).unwrap_or_default(),
        };
        self.count = self.count + problems.len() - before.len();
        self.told &= problems == before;
        match problems.is_empty() {
            true => drop(self.since.remove(&about)),
            false => drop(self.since.entry(about.clone()).or_insert_with(Instant::now)),
        }
        // A server that cannot be reached is told once, not for each kind of object.
        let stands = |problem: &&String| {
            let elsewhere = self.api().filter(|(other, _)| **other != about);
            elsewhere.flat_map(|(_, problems)| problems).any(|other| other == *problem)
        };
        for problem in problems.iter().filter(|problem| !before.contains(problem) && !stands(problem)) {
            warn!("{problem}");
        }
        // Another error of the same server is no recovery.
        let still_fails = matches!(about, About::Api(_) | About::Maps) && !problems.is_empty();
        for problem in before.iter().filter(|problem| !still_fails && !problems.contains(problem) && !stands(problem)) {
            info!("no longer a problem: {problem}");
        }
    }

    fn api(&self) -> impl Iterator<Item = (&About, &Vec<String>)> {
        self.standing.range(About::Api(kube::Kind::Services)..=About::Api(kube::Kind::Node))
    }

    /// Since when the API server cannot be asked for everything.
    pub(super) fn api_fails_since(&self) -> Option<Instant> {
        self.api().filter_map(|(about, _)| self.since.get(about)).min().copied()
    }

    /// All of them, if they have changed since they were asked for last.
    pub(super) fn news(&mut self) -> Option<Vec<Standing>> {
        if std::mem::replace(&mut self.told, true) {
            return None;
        }
        let now = clock::now().unwrap_or_default();
        let mut all: Vec<Standing> = Vec::new();
        for (about, problems) in &self.standing {
            let age = self.since.get(about).map(Instant::elapsed).unwrap_or_default();
            for problem in problems {
                // A server that cannot be reached is one problem, not one for each kind of object.
                if !(matches!(about, About::Api(_)) && all.iter().any(|other| other.problem == *problem)) {
                    all.push(Standing { since: now.saturating_sub(age), problem: problem.clone() });
                }
            }
        }
        Some(all)
    }

    /// How many stand.
    pub(super) const fn count(&self) -> usize {
        self.count
    }

    /// The Services for which planning has met with problems.
    pub(super) fn planned(&self) -> impl Iterator<Item = &ObjectName> {
        self.standing.keys().filter_map(|about| match about {
            About::Plan(service) => Some(service),
            _ => None,
        })
    }

    /// The Services for which there was no room.
    pub(super) fn without_room(&self) -> impl Iterator<Item = &ObjectName> {
        // The last of all kinds.
        let least = About::Room(ObjectName { namespace: "".into(), name: "".into() });
        self.standing.range(least..).filter_map(|(about, _)| match about {
            About::Room(service) => Some(service),
            _ => None,
        })
    }
}

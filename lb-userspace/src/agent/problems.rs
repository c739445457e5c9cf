//! What stands in the way of serving everything as it is written. Each problem is logged when it comes and when it goes.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use tracing::{info, warn};

use crate::dataplane::{Standing, clock};
use crate::model::ObjectName;
use crate::source::kube;

/// A server that fails may say why in other words each time. After so long it is told again, and sooner while it is new.
const SAME_SERVER: Duration = Duration::from_secs(60);

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
    /// When a problem with the API server was told last, and what has failed in other words since.
    api_told: Option<Instant>,
    api_untold: BTreeSet<kube::Kind>,
    /// Whether others have been told of them as they are now.
    told: bool,
}

/// What the log tells.
#[derive(Debug, PartialEq)]
struct Change {
    come: Vec<String>,
    gone: Vec<String>,
}

impl Problems {
    /// None.
    pub(super) const fn new() -> Self {
        Self {
            standing: BTreeMap::new(),
            since: BTreeMap::new(),
            count: 0,
            api_told: None,
            api_untold: BTreeSet::new(),
            told: false,
        }
    }

    /// These are all problems with something now. The log tells what has changed.
    pub(super) fn set(&mut self, about: About, problems: Vec<String>) {
        let Change { come, gone } = self.change(about, problems, Instant::now());
        come.iter().for_each(|problem| warn!("{problem}"));
        gone.iter().for_each(|problem| info!("no longer a problem: {problem}"));
    }

    fn change(&mut self, about: About, problems: Vec<String>, now: Instant) -> Change {
        let before = match problems.is_empty() {
            true => self.standing.remove(&about).unwrap_or_default(),
            false => self.standing.insert(about.clone(), problems.clone()).unwrap_or_default(),
        };
        self.count = self.count + problems.len() - before.len();
        self.told &= problems == before;
        match problems.is_empty() {
            true => drop(self.since.remove(&about)),
            false => drop(self.since.entry(about.clone()).or_insert(now)),
        }
        let was_untold = matches!(about, About::Api(kind) if self.api_untold.remove(&kind));
        // A server that cannot be reached is told once, not for each kind of object.
        let stands = |problem: &&String| {
            let is_told = |other: &About| !matches!(other, About::Api(kind) if self.api_untold.contains(kind));
            let elsewhere = self.api().filter(|(other, _)| **other != about && is_told(other));
            elsewhere.flat_map(|(_, problems)| problems).any(|other| other == *problem)
        };
        let come = problems.iter().filter(|problem| (was_untold || !before.contains(problem)) && !stands(problem));
        let mut come: Vec<_> = come.cloned().collect();
        // Another error of the same server is no recovery.
        let still_fails = matches!(about, About::Api(_) | About::Maps) && !problems.is_empty();
        let gone = before.iter().filter(|problem| !still_fails && !problems.contains(problem) && !stands(problem));
        let gone = gone.cloned().collect();
        if let About::Api(kind) = about {
            let pause = self.since.get(&about).map_or(Duration::ZERO, |since| now.duration_since(*since) / 2);
            let is_soon = self.api_told.is_some_and(|told| now.duration_since(told) < pause.min(SAME_SERVER));
            if !come.is_empty() && is_soon && !before.is_empty() {
                come.clear();
                self.api_untold.insert(kind);
            } else if !come.is_empty() {
                self.api_told = Some(now);
            }
        }
        Change { come, gone }
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

    /// Others have not heard of them.
    pub(super) const fn tell_again(&mut self) {
        self.told = false;
    }

    /// How many stand: a server that cannot be reached is one.
    pub(super) fn count(&self) -> usize {
        let api = || self.api().flat_map(|(_, problems)| problems);
        self.count - api().count() + api().collect::<BTreeSet<_>>().len()
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::source::kube::Kind;

    /// Lines that come and go, and how many problems stand.
    fn fail(problems: &mut Problems, kind: Kind, text: &str, at: Instant) -> (usize, usize, usize) {
        let texts = if text.is_empty() { Vec::new() } else { vec![text.to_owned()] };
        let change = problems.change(About::Api(kind), texts, at);
        (change.come.len(), change.gone.len(), problems.count())
    }

    #[test]
    fn a_server_that_fails_is_told_once_and_is_one_problem() {
        let (mut problems, now) = (Problems::new(), Instant::now());
        let mut fail = |kind, text| fail(&mut problems, kind, text, now);
        assert_eq!(fail(Kind::Services, "refused"), (1, 0, 1));
        assert_eq!(fail(Kind::EndpointSlices, "refused"), (0, 0, 1));
        assert_eq!(fail(Kind::Node, "403: nodes"), (1, 0, 2));
        assert_eq!(fail(Kind::EndpointSlices, ""), (0, 0, 2));
        assert_eq!(fail(Kind::Services, ""), (0, 1, 1));
        assert_eq!(fail(Kind::Node, ""), (0, 1, 0));
        assert_eq!(fail(Kind::Services, "refused"), (1, 0, 1), "another time");
    }

    #[test]
    fn a_server_that_fails_in_other_words_each_time_is_told_once_a_minute() {
        let (mut problems, begin) = (Problems::new(), Instant::now());
        let mut told = |seconds: std::ops::Range<u64>, texts: [&str; 2]| -> usize {
            let at = |second| begin + Duration::from_secs(second);
            let mut told = 0;
            for second in seconds {
                for kind in [Kind::Services, Kind::EndpointSlices, Kind::Node] {
                    told += fail(&mut problems, kind, texts[usize::from(second % 2 == 1)], at(second)).0;
                }
            }
            told
        };
        assert!((2..8).contains(&told(0..60, ["reset", "timed out"])));
        assert!((9..12).contains(&told(60..660, ["reset", "timed out"])));
        // What comes in the end, and stays, is told too.
        assert_eq!(told(660..780, ["401", "401"]), 1);
    }
}

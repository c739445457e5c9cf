//! What the source tells, into the model, and when it has told enough to act on.

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Result, bail};
use tokio::sync::mpsc::Receiver;
use tracing::info;

use super::Source;
use super::problems::About;
use super::services::Services;
use crate::model::{EndpointSlice, Family, Node, ObjectName};
use crate::observe::Metrics;
use crate::source::kube::{self, Change, Event, Kind, Message, NodeFacts};
use crate::source::manifests::{Folder, Watcher};

/// Messages taken at once: bursts are merged, and the first of a burst does not wait for its end.
const BATCH: usize = 4096;
/// After Services and EndpointSlices are complete, the Node is waited for so long: its zone may narrow the choice of
/// endpoints, but without it they all work.
const NODE_PATIENCE: Duration = Duration::from_secs(5);

/// The source, as the agent reads it.
pub(super) enum Input {
    Folder(Manifests),
    Api(Api),
}

pub(super) struct Manifests {
    folder: Folder,
    watcher: Watcher,
}

pub(super) struct Api {
    node: String,
    receiver: Receiver<Message>,
    waiting: Vec<Message>,
    services: bool,
    slices: bool,
    node_known: bool,
    /// The Node was waited for long enough.
    node_late: bool,
    opened: Instant,
    /// When to go on without the Node; none until the lists are complete.
    deadline: Option<Instant>,
}

impl Input {
    /// # Errors
    /// When there is nothing to read from. What goes away later is waited for.
    pub(super) async fn open(source: &Source, node: &str, metrics: &Arc<Metrics>) -> Result<Self> {
        match source {
            Source::Manifests(dir) => {
                // What is not there at all is more likely mistyped than late.
                if !dir.is_dir() {
                    bail!("--manifests {}: is not a folder: create it, or name another", dir.display());
                }
                Ok(Self::Folder(Manifests { folder: Folder::new(dir), watcher: Watcher::new(dir) }))
            }
            Source::Kube(options) => Ok(Self::Api(Api {
                node: node.to_owned(),
                receiver: kube::watch(options, node, metrics).await?,
                waiting: Vec::new(),
                services: false,
                slices: false,
                node_known: false,
                node_late: false,
                opened: Instant::now(),
                deadline: None,
            })),
        }
    }

    /// Waits until there is something to read. Cancel safe.
    pub(super) async fn changed(&mut self) {
        match self {
            Self::Folder(folder) => folder.watcher.changed().await,
            Self::Api(api) => api.changed().await,
        }
    }

    /// Brings the model up to date.
    pub(super) fn read(&mut self, services: &mut Services) {
        match self {
            Self::Folder(folder) => folder.read(services),
            Self::Api(api) => api.read(services),
        }
    }
}

impl Manifests {
    fn read(&mut self, services: &mut Services) {
        let snapshot = self.folder.read();
        let mut problems: Vec<String> = snapshot.problems.iter().map(ToString::to_string).collect();
        let is_empty = snapshot.services.is_empty() && snapshot.slices.is_empty();
        if snapshot.complete && is_empty && !services.is_synced() && !services.is_empty() {
            // More likely a volume that is not mounted yet than the wish to serve nothing.
            problems.push(format!(
                "{}: the folder holds no objects, but this node serves some from before; keeping them until there are \
                 objects; run `viaduct cleanup` to serve nothing",
                self.folder.dir().display()
            ));
        } else if snapshot.complete {
            let changed = services.change(|model| model.replace(snapshot.services, snapshot.slices));
            services.observed().metrics.services_changed(changed);
            services.complete();
        }
        // Otherwise nothing is known, so nothing is touched.
        services.problems.set(About::Folder, problems);
    }
}

impl Api {
    async fn changed(&mut self) {
        let deadline = self.deadline.filter(|_| !self.node_known && !self.node_late);
        tokio::select! {
            count = self.receiver.recv_many(&mut self.waiting, BATCH) => {
                // The watching tasks never end by themselves.
                if count == 0 {
                    std::future::pending::<()>().await;
                }
            }
            () = super::sleep_until(deadline) => {
                info!(node = self.node, "the Node is not known yet: going on without its zone");
                self.node_late = true;
            }
        }
    }

    fn read(&mut self, services: &mut Services) {
        for message in std::mem::take(&mut self.waiting) {
            self.take(message, services);
        }
        if self.services && self.slices {
            self.deadline.get_or_insert_with(|| {
                info!(duration_ms = self.opened.elapsed().as_secs_f64() * 1e3, "lists complete");
                Instant::now() + NODE_PATIENCE
            });
            if self.node_known || self.node_late {
                services.complete();
            }
        }
    }

    fn take(&mut self, Message { received, event }: Message, services: &mut Services) {
        match event {
            Event::Service(change) => {
                let (name, object, problems) = split(change, |service| service.name.clone());
                services.observed().metrics.services_changed(1);
                services.problems.set(About::Service(name.clone()), problems);
                match object {
                    Object::Present(service) => services.change(|model| model.apply_service(service)),
                    Object::Absent => services.change(|model| model.delete_service(&name)),
                    Object::AsBefore => 0,
                };
            }
            Event::Slice(change) => {
                let (name, object, problems) = split(change, |slice| slice.name.clone());
                services.problems.set(About::Slice(name.clone()), problems);
                match object {
                    // A list that comes again: when it was changed says nothing of this agent.
                    Object::Present(slice) if services.serves_the_same(&slice) => {}
                    Object::Present(slice) => {
                        services.note_endpoints(received, triggered(&slice));
                        services.change(|model| model.apply_slice(slice));
                    }
                    Object::Absent => {
                        services.note_endpoints(received, None);
                        services.change(|model| model.delete_slice(&name));
                    }
                    Object::AsBefore => {}
                }
            }
            Event::Node(facts) => {
                self.node_known = true;
                self.take_node(facts, services);
            }
            Event::Complete(Kind::Services) => self.services = true,
            Event::Complete(Kind::EndpointSlices) => self.slices = true,
            Event::Complete(Kind::Node) => {
                if !std::mem::replace(&mut self.node_known, true) {
                    self.take_node(None, services);
                }
            }
            Event::Failing(kind, text) => {
                services.observed().metrics.api_errors.inc();
                services.problems.set(About::Api(kind), vec![text]);
            }
            Event::Recovered(kind) => services.problems.set(About::Api(kind), Vec::new()),
        }
    }

    fn take_node(&self, facts: Option<NodeFacts>, services: &mut Services) {
        let problem = facts.is_none().then(|| {
            format!(
                "the API has no Node {}: hints for zones are not followed; give the name of this node with \
                 --hostname-override",
                self.node
            )
        });
        services.observed().health.node(facts.as_ref().is_some_and(|facts| facts.eligible));
        services.problems.set(About::Node, problem.into_iter().collect());
        let nameless = || Node { name: self.node.as_str().into(), zone: None };
        let node = facts.map_or_else(nameless, |facts| facts.node);
        services.change(|model| model.set_node(node));
    }
}

/// When the change that a slice shows was made.
fn triggered(slice: &EndpointSlice) -> Option<(Family, SystemTime)> {
    let nanoseconds = u64::try_from(slice.triggered?).ok()?;
    Some((slice.family, SystemTime::UNIX_EPOCH + Duration::from_nanos(nanoseconds)))
}

enum Object<T> {
    Present(T),
    Absent,
    AsBefore,
}

fn split<T>(change: Change<T>, name: impl Fn(&T) -> ObjectName) -> (ObjectName, Object<T>, Vec<String>) {
    match change {
        Change::Present(object, problems) => {
            let problems = problems.iter().map(ToString::to_string).collect();
            (name(&object), Object::Present(*object), problems)
        }
        Change::Refused(name, problem) => (name, Object::AsBefore, vec![problem.to_string()]),
        Change::Absent(name) => (name, Object::Absent, Vec::new()),
    }
}

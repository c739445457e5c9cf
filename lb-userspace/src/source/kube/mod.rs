//! The API server as a source: Services, EndpointSlices and the Node of this host, by list and watch.
//!
//! One task for each kind runs kube's watcher, converts objects as they come, and sends [`Event`]s. Nothing of the API's own
//! types is kept. What the server has told completely once stays known: a stream that breaks, a server that is away, a
//! history that is gone (410) change nothing by themselves. After a new list, what it did not contain is sent as absent,
//! at its end and not before (`sweep`).

use std::sync::Arc;
use std::time::Instant;

use anyhow::Result;
use k8s_openapi::api::core::v1 as core;
use k8s_openapi::api::discovery::v1 as discovery;
use kube::runtime::watcher;
use tokio::sync::{Notify, mpsc};

use crate::model::{EndpointSlice, ObjectName, Origin, Problem, Service};
use crate::observe::Metrics;
use crate::source::convert::{self, Converted};

mod client;
mod failure;
mod node;
mod sweep;
mod watch;

pub use client::Options;
pub use node::NodeFacts;

use watch::Watch;

/// Neither headless objects nor those of another proxy are ever sent.
const NOT_OURS: &str = "!service.kubernetes.io/headless,!service.kubernetes.io/service-proxy-name";
/// Events that may wait for the agent: the lists of a large cluster come while it still loads its programs. They hold objects
/// that go into the model as they are, so that waiting takes little memory.
const QUEUE: usize = 32_768;

/// What is watched.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// Services.
    Services,
    /// EndpointSlices.
    EndpointSlices,
    /// The Node of this host.
    Node,
}

impl Kind {
    /// As the API names it in paths and rules.
    #[must_use]
    pub const fn resource(self) -> &'static str {
        match self {
            Self::Services => "services",
            Self::EndpointSlices => "endpointslices.discovery.k8s.io",
            Self::Node => "nodes",
        }
    }
}

/// What the API server tells, with the time at which it came.
#[derive(Debug)]
pub struct Message {
    /// When it was received.
    pub received: Instant,
    /// What.
    pub event: Event,
}

/// What the API server tells.
#[derive(Debug)]
pub enum Event {
    /// A Service.
    Service(Change<Service>),
    /// A slice.
    Slice(Change<EndpointSlice>),
    /// The Node of this host; none when there is none of this name.
    Node(Option<NodeFacts>),
    /// All objects of this kind have been delivered, once or again.
    Complete(Kind),
    /// The server cannot be asked for this kind, and why; it is tried again.
    Failing(Kind, String),
    /// It can again.
    Recovered(Kind),
}

/// What has become of an object.
#[derive(Debug)]
pub enum Change<T> {
    /// It is to be served, but for what the problems say.
    Present(Box<T>, Vec<Problem>),
    /// It cannot be used as it is; whatever was known of it stays.
    Refused(ObjectName, Problem),
    /// It is gone, or not ours to serve.
    Absent(ObjectName),
}

/// Begins to watch. Call it within a tokio runtime. The tasks end when the receiver is dropped.
///
/// # Errors
/// When `options` do not say how to reach a server, or name files that cannot be read. A server that does not answer is no
/// error: it is waited for.
pub async fn watch(options: &Options, node: &str, metrics: &Arc<Metrics>) -> Result<mpsc::Receiver<Message>> {
    let config = client::config(options).await?;
    let server = config.cluster_url.to_string();
    let (sender, receiver) = mpsc::channel(QUEUE);
    let objects = || watcher::Config::default().labels(NOT_OURS);
    let back = Arc::new(Notify::new());
    let watch = |kind, sender| Watch::new(kind, options, server.clone(), metrics, &back, sender);
    tokio::spawn(watch(Kind::Services, sender.clone()).run(objects().fields("spec.clusterIP!=None"), service));
    tokio::spawn(watch(Kind::EndpointSlices, sender.clone()).run(objects(), slice));
    let this_node = watcher::Config::default().fields(&format!("metadata.name={node}"));
    tokio::spawn(watch(Kind::Node, sender).run(this_node, node::convert));
    Ok(receiver)
}

/// What the API server says of an object, `None` when it is deleted.
type Convert<K> = fn(ObjectName, Option<&K>) -> Event;

fn service(name: ObjectName, object: Option<&core::Service>) -> Event {
    Event::Service(change(name, object, convert::service))
}

fn slice(name: ObjectName, object: Option<&discovery::EndpointSlice>) -> Event {
    Event::Slice(change(name, object, convert::slice))
}

fn change<K, T>(name: ObjectName, object: Option<&K>, by: fn(ObjectName, &K, Origin) -> Converted<T>) -> Change<T> {
    let Some(object) = object else { return Change::Absent(name) };
    match by(name.clone(), object, Origin::Api) {
        Converted::Served(object, problems) => Change::Present(Box::new(object), problems),
        Converted::Ignored(_) => Change::Absent(name),
        Converted::Refused(problem) => Change::Refused(name, problem),
    }
}

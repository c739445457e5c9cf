//! The border: API objects become objects of the model, or a line that says why not.
//!
//! Each item is judged alone: a bad port or endpoint is reported and left out, the rest of its object works. What the API
//! server would have refused is refused here too, since manifests come without one; what it would have filled in is
//! filled in.

use std::sync::Arc;

use k8s_openapi::api::core::v1::Node;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

use crate::model::{self, ObjectName, Origin, Problem, is_name};

mod service;
mod slice;
mod value;

pub use service::service;
pub use slice::{MAX_ENDPOINTS, MAX_PORTS, slice};

/// Gives an object to the proxy of this name: any name is that of another one.
const PROXY_NAME: &str = "service.kubernetes.io/service-proxy-name";
/// Marks what clients find through DNS alone.
const HEADLESS: &str = "service.kubernetes.io/headless";

/// The zone of a Node.
const ZONE: &str = "topology.kubernetes.io/zone";

/// What became of an API object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Converted<T> {
    /// It is to be served, but for what the problems say.
    Served(T, Vec<Problem>),
    /// It is well-formed and not ours to serve.
    Ignored(Ignored),
    /// Nothing of it can be used.
    Refused(Problem),
}

/// How a problem calls an object, which may have no name.
#[must_use]
pub fn shown(kind: &str, namespace: &str, name: &str) -> String {
    match name {
        "" => kind.into(),
        _ => format!("{kind} {}", ObjectName::new(namespace, name)),
    }
}

/// Why an object is not served.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ignored {
    /// type ExternalName: DNS alone serves it.
    ExternalName,
    /// clusterIP None: clients dial the endpoints.
    Headless,
    /// No clusterIP, since none is allocated yet.
    NoClusterIp,
    /// Its label gives it to another proxy.
    OtherProxy,
    /// A slice without a Service.
    NoService,
    /// A slice of names, not addresses.
    Fqdn,
}

/// The name of an object, or the problem that it has none.
pub fn object_name(metadata: &ObjectMeta, kind: &str, origin: &Origin) -> Result<ObjectName, Problem> {
    let namespace = metadata.namespace.as_deref().unwrap_or_default();
    let name = metadata.name.as_deref().unwrap_or_default();
    let problem = |field: &str, message: String| Problem {
        origin: origin.clone(),
        object: shown(kind, namespace, name),
        field: field.into(),
        message,
    };
    if name.is_empty() {
        return Err(problem("metadata.name", "is missing".into()));
    }
    for (field, value) in [("metadata.name", name), ("metadata.namespace", namespace)] {
        if !value.is_empty() && !is_name(value) {
            return Err(problem(field, format!("{value:?} is not a name; use a-z, 0-9, - and .")));
        }
    }
    Ok(ObjectName::new(namespace, name))
}

/// What matters of the Node that the agent runs on.
#[must_use]
pub fn node(object: &Node) -> model::Node {
    let zone = non_empty(label(&object.metadata, ZONE)).map(Arc::from);
    model::Node { name: object.metadata.name.as_deref().unwrap_or_default().into(), zone }
}

fn annotation<'a>(metadata: &'a ObjectMeta, key: &str) -> Option<&'a str> {
    metadata.annotations.as_ref().and_then(|annotations| annotations.get(key)).map(String::as_str)
}

fn label<'a>(metadata: &'a ObjectMeta, key: &str) -> Option<&'a str> {
    metadata.labels.as_ref().and_then(|labels| labels.get(key)).map(String::as_str)
}

fn has_label(metadata: &ObjectMeta, key: &str) -> bool {
    label(metadata, key).is_some()
}

fn non_empty(text: Option<&str>) -> Option<&str> {
    text.filter(|text| !text.is_empty())
}

#[cfg(test)]
mod tests;

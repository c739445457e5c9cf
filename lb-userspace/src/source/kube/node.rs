//! The Node of this host: its zone, and whether load balancers should send it traffic.

use k8s_openapi::api::core::v1::Node;

use super::Event;
use crate::model::{self, ObjectName};
use crate::source::convert;

/// The cluster autoscaler is about to delete the node.
const TO_BE_DELETED: &str = "ToBeDeletedByClusterAutoscaler";

/// What matters of a Node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeFacts {
    /// Its name and zone.
    pub node: model::Node,
    /// Whether it will stay: it is neither being deleted nor marked for it.
    pub eligible: bool,
}

pub(super) fn convert(_: ObjectName, object: Option<&Node>) -> Event {
    Event::Node(object.map(facts))
}

fn facts(node: &Node) -> NodeFacts {
    let taints = node.spec.as_ref().and_then(|spec| spec.taints.as_deref()).unwrap_or_default();
    NodeFacts {
        node: convert::node(node),
        eligible: node.metadata.deletion_timestamp.is_none() && !taints.iter().any(|taint| taint.key == TO_BE_DELETED),
    }
}

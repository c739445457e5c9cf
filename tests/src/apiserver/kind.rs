//! The kinds of objects that the server knows, with all that is peculiar to each.

use serde_json::Value;

/// A kind of objects.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// v1 Service
    Service,
    /// discovery.k8s.io/v1 EndpointSlice
    EndpointSlice,
    /// v1 Node
    Node,
}

impl Kind {
    /// All of them, in the order of their indexes.
    pub const ALL: [Self; 3] = [Self::Service, Self::EndpointSlice, Self::Node];

    /// The kind that an object says it has.
    #[must_use]
    pub fn of(object: &Value) -> Option<Self> {
        let is = |kind: &Self| object["kind"] == kind.name() && object["apiVersion"] == kind.api_version();
        Self::ALL.into_iter().find(is)
    }

    /// The kind that a path means.
    pub(super) fn at(group: &str, plural: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.group() == group && kind.plural() == plural)
    }

    pub(super) fn index(self) -> usize {
        self as usize
    }

    /// `Service`
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Service => "Service",
            Self::EndpointSlice => "EndpointSlice",
            Self::Node => "Node",
        }
    }

    /// `services`
    #[must_use]
    pub fn plural(self) -> &'static str {
        match self {
            Self::Service => "services",
            Self::EndpointSlice => "endpointslices",
            Self::Node => "nodes",
        }
    }

    pub(super) fn short_names(self) -> &'static [&'static str] {
        match self {
            Self::Service => &["svc"],
            Self::EndpointSlice => &[],
            Self::Node => &["no"],
        }
    }

    pub(super) fn group(self) -> &'static str {
        match self {
            Self::EndpointSlice => "discovery.k8s.io",
            Self::Service | Self::Node => "",
        }
    }

    pub(super) fn api_version(self) -> &'static str {
        match self {
            Self::EndpointSlice => "discovery.k8s.io/v1",
            Self::Service | Self::Node => "v1",
        }
    }

    /// `endpointslices.discovery.k8s.io`, as messages spell it.
    pub(super) fn qualified(self) -> String {
        match self.group() {
            "" => self.plural().to_owned(),
            group => format!("{}.{group}", self.plural()),
        }
    }

    pub(super) fn is_namespaced(self) -> bool {
        self != Self::Node
    }

    /// What an object of this kind must start with, where it stands alone.
    pub(super) fn head(self) -> String {
        format!(r#""kind":"{}","apiVersion":"{}","#, self.name(), self.api_version())
    }

    /// The fields beside the metadata that an object without content has: bookmarks are such objects.
    pub(super) fn blank(self) -> &'static str {
        match self {
            Self::Service => r#""spec":{},"status":{"loadBalancer":{}}"#,
            Self::EndpointSlice => r#""addressType":"","endpoints":null,"ports":null"#,
            Self::Node => {
                r#""spec":{},"status":{"daemonEndpoints":{"kubeletEndpoint":{"Port":0}},"nodeInfo":{"machineID":"","systemUUID":"","bootID":"","kernelVersion":"","osImage":"","containerRuntimeVersion":"","kubeletVersion":"","kubeProxyVersion":"","operatingSystem":"","architecture":""}}"#
            }
        }
    }

    /// The fields that field selectors may name, beside name and namespace, and where they are in an object.
    pub(super) fn selectable(self) -> &'static [(&'static str, &'static str)] {
        match self {
            Self::Service => &[("spec.clusterIP", "/spec/clusterIP"), ("spec.type", "/spec/type")],
            Self::EndpointSlice => &[],
            Self::Node => &[("spec.unschedulable", "/spec/unschedulable")],
        }
    }
}

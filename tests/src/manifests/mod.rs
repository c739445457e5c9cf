//! Manifests: the folder that agents watch, and the objects that tests put there.
//!
//! Objects are JSON values underneath, so that a test can set any field of the API with `set`; the builders only know
//! the fields that most tests need. Files look as `kubectl get -o yaml` prints them.

mod yaml;

use std::fs;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde_json::{Value, json};

use crate::addresses::Family;
use crate::lab::Pod;

/// A folder of manifests, one file per object.
#[derive(Clone, Debug)]
pub struct ManifestFolder {
    path: PathBuf,
}

/// A transport protocol, as the API spells it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// TCP
    Tcp,
    /// UDP
    Udp,
    /// SCTP
    Sctp,
}

/// An object of the API that can be written to a [`ManifestFolder`].
pub trait Manifest {
    /// The whole object.
    fn object(&self) -> &Value;
}

/// A Service.
#[derive(Clone, Debug)]
pub struct ServiceManifest(Value);

/// An EndpointSlice.
#[derive(Clone, Debug)]
pub struct EndpointSliceManifest(Value);

/// One endpoint of a slice.
#[derive(Clone, Debug)]
pub struct Endpoint(Value);

impl ManifestFolder {
    pub(crate) fn create(path: &Path) -> Result<Self> {
        fs::create_dir_all(path).with_context(|| format!("cannot make {}", path.display()))?;
        Ok(Self { path: path.to_owned() })
    }

    /// Where the folder is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Adds the object, or replaces the one of that kind, namespace and name.
    pub fn apply(&self, manifest: &impl Manifest) -> Result<()> {
        self.write(&file_name(manifest.object()), &yaml::print(manifest.object()))
    }

    /// Removes the object.
    pub fn delete(&self, manifest: &impl Manifest) -> Result<()> {
        let path = self.path.join(file_name(manifest.object()));
        fs::remove_file(&path).with_context(|| format!("cannot delete {}", path.display()))
    }

    /// Puts a file into the folder in one step: a watcher sees all of it or nothing.
    pub fn write(&self, name: &str, text: &str) -> Result<()> {
        let path = self.path.join(name);
        let unfinished = self.path.join(format!(".{name}.unfinished"));
        fs::write(&unfinished, text)
            .and_then(|()| fs::rename(&unfinished, &path))
            .with_context(|| format!("cannot write {}", path.display()))
    }
}

fn file_name(object: &Value) -> String {
    let text = |pointer| object.pointer(pointer).and_then(Value::as_str).unwrap_or_default();
    format!("{}-{}-{}.yaml", text("/kind").to_lowercase(), text("/metadata/namespace"), text("/metadata/name"))
}

impl Protocol {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Tcp => "TCP",
            Self::Udp => "UDP",
            Self::Sctp => "SCTP",
        }
    }
}

impl ServiceManifest {
    /// A Service of type ClusterIP that has no address and no port yet.
    #[must_use]
    pub fn new(namespace: &str, name: &str) -> Self {
        Self(json!({
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": metadata(namespace, name, &json!({ "app": name })),
            "spec": {
                "internalTrafficPolicy": "Cluster",
                "ipFamilyPolicy": "SingleStack",
                "ports": [],
                "selector": { "app": name },
                "sessionAffinity": "None",
                "type": "ClusterIP",
            },
            "status": { "loadBalancer": {} },
        }))
    }

    /// Adds a cluster IP; the first one is the primary.
    ///
    /// # Panics
    ///
    /// When `address` is not an IP address.
    #[must_use]
    pub fn cluster_ip(mut self, address: &str) -> Self {
        let parsed: IpAddr = address.parse().expect("an IP address");
        let spec = &mut self.0["spec"];
        if spec["clusterIP"].is_null() {
            spec["clusterIP"] = address.into();
        } else {
            spec["ipFamilyPolicy"] = "RequireDualStack".into();
        }
        push(&mut spec["clusterIPs"], address.into());
        push(&mut spec["ipFamilies"], if parsed.is_ipv4() { "IPv4" } else { "IPv6" }.into());
        self
    }

    /// Adds a port. `name` may be empty when the Service has only one.
    #[must_use]
    pub fn port(mut self, name: &str, protocol: Protocol, port: u16) -> Self {
        let mut entry = json!({ "port": port, "protocol": protocol.name(), "targetPort": port });
        if !name.is_empty() {
            entry["name"] = name.into();
        }
        push(&mut self.0["spec"]["ports"], entry);
        self
    }

    /// Gives the port that was added last a node port, and makes the Service one of type NodePort.
    ///
    /// # Panics
    ///
    /// When no port was added.
    #[must_use]
    pub fn node_port(mut self, port: u16) -> Self {
        let ports = self.0["spec"]["ports"].as_array_mut();
        let last = ports.and_then(|ports| ports.last_mut()).expect("node_port comes after port");
        last["nodePort"] = port.into();
        self.set("/spec/type", "NodePort").set("/spec/externalTrafficPolicy", "Cluster")
    }

    /// Sets any field, by its JSON pointer: `set("/spec/sessionAffinity", "ClientIP")`. Missing parents are made.
    #[must_use]
    pub fn set(mut self, pointer: &str, value: impl Into<Value>) -> Self {
        set(&mut self.0, pointer, value.into());
        self
    }
}

impl EndpointSliceManifest {
    /// A slice without ports and endpoints, named `<service>-1`, of IPv4 addresses until an endpoint says otherwise.
    #[must_use]
    pub fn new(namespace: &str, service: &str) -> Self {
        Self::named(namespace, service, "1", Family::V4)
    }

    /// The same of this family, named `<service>-ipv4` or `<service>-ipv6`: a service of two families has a slice of each.
    #[must_use]
    pub fn of_family(namespace: &str, service: &str, family: Family) -> Self {
        let suffix = if family == Family::V4 { "ipv4" } else { "ipv6" };
        Self::named(namespace, service, suffix, family)
    }

    fn named(namespace: &str, service: &str, suffix: &str, family: Family) -> Self {
        let labels = json!({
            "app": service,
            "endpointslice.kubernetes.io/managed-by": "endpointslice-controller.k8s.io",
            "kubernetes.io/service-name": service,
        });
        Self(json!({
            "addressType": if family == Family::V4 { "IPv4" } else { "IPv6" },
            "apiVersion": "discovery.k8s.io/v1",
            "endpoints": [],
            "kind": "EndpointSlice",
            "metadata": metadata(namespace, &format!("{service}-{suffix}"), &labels),
            "ports": [],
        }))
    }

    /// Adds a port, which has the name of the Service's port and the number that the pods listen on.
    #[must_use]
    pub fn port(mut self, name: &str, protocol: Protocol, port: u16) -> Self {
        push(&mut self.0["ports"], json!({ "name": name, "port": port, "protocol": protocol.name() }));
        self
    }

    /// Adds ready pods, each by its address of the slice's family.
    #[must_use]
    pub fn pods<'a>(self, pods: impl IntoIterator<Item = &'a Pod>) -> Self {
        let family = if self.0["addressType"] == "IPv6" { Family::V6 } else { Family::V4 };
        pods.into_iter().map(|pod| Endpoint::of_family(pod, family)).fold(self, Self::endpoint)
    }

    /// Adds an endpoint.
    #[must_use]
    pub fn endpoint(mut self, endpoint: Endpoint) -> Self {
        if endpoint.0["addresses"][0].as_str().is_some_and(|address| address.contains(':')) {
            self.0["addressType"] = "IPv6".into();
        }
        push(&mut self.0["endpoints"], endpoint.0);
        self
    }

    /// Sets any field, by its JSON pointer. Missing parents are made.
    #[must_use]
    pub fn set(mut self, pointer: &str, value: impl Into<Value>) -> Self {
        set(&mut self.0, pointer, value.into());
        self
    }
}

impl Endpoint {
    /// A ready endpoint that a pod of the lab is, by its address of the lab's primary family.
    #[must_use]
    pub fn of(pod: &Pod) -> Self {
        Self::of_pod(pod, pod.address())
    }

    /// The same by the pod's address of this family.
    #[must_use]
    pub fn of_family(pod: &Pod, family: Family) -> Self {
        Self::of_pod(pod, pod.address_of(family))
    }

    fn of_pod(pod: &Pod, address: IpAddr) -> Self {
        let target = json!({ "kind": "Pod", "name": pod.name(), "namespace": "default", "uid": uid(pod.name()) });
        Self::at(address).set("/nodeName", pod.node()).set("/targetRef", target)
    }

    /// A ready endpoint at an address, on no known node.
    #[must_use]
    pub fn at(address: IpAddr) -> Self {
        Self(json!({
            "addresses": [address.to_string()],
            "conditions": { "ready": true, "serving": true, "terminating": false },
        }))
    }

    /// The endpoint's conditions.
    #[must_use]
    pub fn conditions(mut self, ready: bool, serving: bool, terminating: bool) -> Self {
        self.0["conditions"] = json!({ "ready": ready, "serving": serving, "terminating": terminating });
        self
    }

    /// Sets any field, by its JSON pointer. Missing parents are made.
    #[must_use]
    pub fn set(mut self, pointer: &str, value: impl Into<Value>) -> Self {
        set(&mut self.0, pointer, value.into());
        self
    }
}

impl Manifest for ServiceManifest {
    fn object(&self) -> &Value {
        &self.0
    }
}

impl Manifest for EndpointSliceManifest {
    fn object(&self) -> &Value {
        &self.0
    }
}

fn metadata(namespace: &str, name: &str, labels: &Value) -> Value {
    json!({
        "creationTimestamp": "2026-01-01T00:00:00Z",
        "labels": labels,
        "name": name,
        "namespace": namespace,
        "resourceVersion": "1000",
        "uid": uid(&format!("{namespace}/{name}")),
    })
}

/// The same unique id each time for the same name.
pub(crate) fn uid(name: &str) -> String {
    let hash = name
        .bytes()
        .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3));
    format!("{:08x}-{:04x}-4000-8000-{:012x}", hash >> 32, hash >> 16 & 0xffff, hash & 0xffff_ffff_ffff)
}

fn push(list: &mut Value, item: Value) {
    match list {
        Value::Array(items) => items.push(item),
        other => *other = Value::Array(vec![item]),
    }
}

fn set(object: &mut Value, pointer: &str, value: Value) {
    // ~1 and ~0 are how a JSON pointer spells / and ~, which keys of annotations contain.
    let steps = pointer.split('/').skip(1).map(|step| step.replace("~1", "/").replace("~0", "~"));
    let target = steps.fold(object, |parent, step| match (parent, step.parse::<usize>()) {
        (Value::Array(items), Ok(index)) => &mut items[index],
        (parent, _) => &mut parent[step],
    });
    *target = value;
}

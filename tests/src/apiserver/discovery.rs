//! The documents by which clients find out what a server has.

use serde_json::{Value, json};

use super::kind::Kind;

/// The document at a path, if there is one.
pub(super) fn document(path: &[&str]) -> Option<Value> {
    let discovery = json!({ "groupVersion": "discovery.k8s.io/v1", "version": "v1" });
    let group = json!({ "name": "discovery.k8s.io", "versions": [&discovery], "preferredVersion": &discovery });
    Some(match path {
        ["version"] => json!({
            "major": "1",
            "minor": "34",
            "gitVersion": "v1.34.0",
            "gitCommit": "0000000000000000000000000000000000000000",
            "gitTreeState": "clean",
            "buildDate": "2025-08-27T00:00:00Z",
            "goVersion": "go1.24.6",
            "compiler": "gc",
            "platform": "linux/amd64",
        }),
        ["api"] => json!({ "kind": "APIVersions", "versions": ["v1"], "serverAddressByClientCIDRs": [] }),
        ["apis"] => json!({ "kind": "APIGroupList", "apiVersion": "v1", "groups": [group] }),
        ["apis", "discovery.k8s.io"] => {
            let mut document = json!({ "kind": "APIGroup", "apiVersion": "v1" });
            document["name"] = group["name"].clone();
            document["versions"] = group["versions"].clone();
            document["preferredVersion"] = group["preferredVersion"].clone();
            document
        }
        ["api", "v1"] => resources("", "v1"),
        ["apis", "discovery.k8s.io", "v1"] => resources("discovery.k8s.io", "discovery.k8s.io/v1"),
        ["openapi", "v3"] => json!({ "paths": {} }),
        ["openapi", "v2"] => json!({
            "swagger": "2.0",
            "info": { "title": "Kubernetes", "version": "v1.34.0" },
            "paths": {},
            "definitions": {},
        }),
        _ => return None,
    })
}

fn resources(group: &str, version: &str) -> Value {
    let kinds = Kind::ALL.into_iter().filter(|kind| kind.group() == group);
    let resource = |kind: Kind| {
        json!({
            "name": kind.plural(),
            "singularName": kind.name().to_lowercase(),
            "namespaced": kind.is_namespaced(),
            "kind": kind.name(),
            "verbs": ["get", "list", "watch"],
            "shortNames": kind.short_names(),
        })
    };
    json!({
        "kind": "APIResourceList",
        "apiVersion": "v1",
        "groupVersion": version,
        "resources": kinds.map(resource).collect::<Vec<_>>(),
    })
}

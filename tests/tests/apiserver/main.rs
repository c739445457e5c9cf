//! The lab's API server against the clients that people use: kube, kubectl and curl. What it promises is Kubernetes'
//! protocol, so the assertions are about that, and none about Viaduct.

#![cfg(test)]

mod faults;
mod kubectl;
mod protocol;
mod watcher;

use std::time::Duration;

use futures_util::{Stream, StreamExt};
use k8s_openapi::api::core::v1::Service;
use kube::api::WatchEvent;
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Client, Config, ResourceExt};
use tempfile::TempDir;
use viaduct_tests::Protocol::Tcp;
use viaduct_tests::apiserver::{ApiServer, Options};
use viaduct_tests::{ServiceManifest, scaled};

fn start(options: Options) -> ApiServer {
    ApiServer::start(None, "127.0.0.1:0".parse().unwrap(), options).unwrap()
}

/// A client as programs make it, from a kubeconfig file. The folder must outlive it.
async fn client(server: &ApiServer) -> (Client, TempDir) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("kubeconfig");
    server.kubeconfig(&path).unwrap();
    let kubeconfig = Kubeconfig::read_from(path).unwrap();
    let config = Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await.unwrap();
    (Client::try_from(config).unwrap(), folder)
}

fn service(namespace: &str, name: &str) -> ServiceManifest {
    ServiceManifest::new(namespace, name).cluster_ip("10.96.0.10").port("http", Tcp, 80)
}

fn code(error: kube::Error) -> u16 {
    match error {
        kube::Error::Api(status) => status.code,
        other => panic!("no Status: {other}"),
    }
}

/// The next item of a stream, within the time that a test may take.
async fn next<T>(stream: &mut (impl Stream<Item = T> + Unpin)) -> Option<T> {
    tokio::time::timeout(scaled(Duration::from_secs(15)), stream.next()).await.expect("an event in time")
}

/// What a watch event says, in short.
fn short(event: &WatchEvent<Service>) -> String {
    match event {
        WatchEvent::Added(object) => format!("added {}", object.name_any()),
        WatchEvent::Modified(object) => format!("modified {}", object.name_any()),
        WatchEvent::Deleted(object) => format!("deleted {}", object.name_any()),
        WatchEvent::Bookmark(_) => "bookmark".into(),
        WatchEvent::Error(status) => format!("error {}", status.code),
    }
}

/// The next events, in short.
async fn shorts(
    stream: &mut (impl Stream<Item = kube::Result<WatchEvent<Service>>> + Unpin),
    count: usize,
) -> Vec<String> {
    let mut events = Vec::new();
    for _ in 0..count {
        match next(stream).await {
            Some(Ok(event)) => events.push(short(&event)),
            Some(Err(error)) => events.push(format!("broken: {error}")),
            None => events.push("end".into()),
        }
    }
    events
}

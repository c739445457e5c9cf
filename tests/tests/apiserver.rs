//! The lab's API server against the clients that people use: kube and kubectl. What it promises is Kubernetes' protocol, so
//! the assertions are about that, and none about Viaduct.

#![cfg(test)]

use std::collections::BTreeSet;
use std::process::Command;
use std::time::Duration;

use futures_util::{Stream, StreamExt};
use k8s_openapi::api::core::v1::{Node, Service};
use kube::api::{Api, ListParams, WatchEvent, WatchParams};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Client, Config, ResourceExt};
use tempfile::TempDir;
use viaduct_tests::Protocol::Tcp;
use viaduct_tests::apiserver::{ApiServer, Options};
use viaduct_tests::{EndpointSliceManifest, Lab, ServiceManifest, Topology, command, needs_root, scaled, wait_until};

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

#[tokio::test]
async fn objects_are_read_back_as_the_server_completes_them() {
    let server = start(Options::default());
    let (client, _folder) = client(&server).await;
    let web = service("shop", "web");
    server.apply(&web).unwrap();
    let api: Api<Service> = Api::namespaced(client.clone(), "shop");
    let first = api.get("web").await.unwrap();
    assert_eq!(first.spec.as_ref().unwrap().cluster_ip.as_deref(), Some("10.96.0.10"));
    assert_eq!(first.metadata.resource_version, Some(server.resource_version().to_string()));
    assert_eq!(first.metadata.generation, Some(1));

    server.apply(&web.clone().set("/metadata/labels/tier", "front")).unwrap();
    let second = api.get("web").await.unwrap();
    assert_eq!(second.metadata.uid, first.metadata.uid);
    assert_eq!(second.metadata.generation, Some(1), "labels are no change of what is wanted");
    server.apply(&web.clone().port("more", Tcp, 81)).unwrap();
    assert_eq!(api.get("web").await.unwrap().metadata.generation, Some(2));

    server.delete(&web).unwrap();
    assert_eq!(code(api.get("web").await.unwrap_err()), 404);
    assert!(server.delete(&web).is_err());
    server.apply(&web).unwrap();
    assert_ne!(api.get("web").await.unwrap().metadata.uid, first.metadata.uid);
    assert_eq!(client.apiserver_version().await.unwrap().minor, "34");
    assert!(client.list_api_groups().await.unwrap().groups.iter().any(|group| group.name == "discovery.k8s.io"));
}

#[tokio::test]
async fn a_wrong_token_is_refused_until_the_client_has_the_new_one() {
    let server = start(Options::default());
    let (old, _folder) = client(&server).await;
    let nodes: Api<Node> = Api::all(old);
    nodes.list(&ListParams::default()).await.unwrap();
    server.set_token("another");
    assert_eq!(code(nodes.list(&ListParams::default()).await.unwrap_err()), 401);
    let (new, _folder) = client(&server).await;
    Api::<Node>::all(new).list(&ListParams::default()).await.unwrap();
    assert_eq!(server.counts().unauthorized, 1);
}

#[tokio::test]
async fn pages_come_from_one_snapshot() {
    let server = start(Options::default());
    let (client, _folder) = client(&server).await;
    for number in 0..7 {
        server.apply(&service("a", &format!("s{number}"))).unwrap();
    }
    server.apply(&service("b", "other")).unwrap();
    let api: Api<Service> = Api::namespaced(client.clone(), "a");
    let first = api.list(&ListParams::default().limit(3)).await.unwrap();
    assert_eq!((first.items.len(), first.metadata.remaining_item_count), (3, Some(4)));
    server.delete(&service("a", "s6")).unwrap();
    server.apply(&service("a", "s9")).unwrap();
    let (mut names, mut page) = (BTreeSet::new(), first.clone());
    loop {
        names.extend(page.items.iter().map(ResourceExt::name_any));
        assert_eq!(page.metadata.resource_version, first.metadata.resource_version);
        let Some(token) = page.metadata.continue_.filter(|token| !token.is_empty()) else { break };
        page = api.list(&ListParams::default().limit(3).continue_token(&token)).await.unwrap();
    }
    assert_eq!(names, (0..7).map(|number| format!("s{number}")).collect());

    let token = first.metadata.continue_.unwrap();
    server.forget_history();
    let expired = api.list(&ListParams::default().limit(3).continue_token(&token)).await.unwrap_err();
    assert_eq!(code(expired), 410);
    assert_eq!(Api::<Service>::all(client).list(&ListParams::default()).await.unwrap().items.len(), 8);
}

#[tokio::test]
async fn a_watch_tells_what_enters_and_leaves_its_selector() {
    let server = start(Options::default());
    let (client, _folder) = client(&server).await;
    let api: Api<Service> = Api::all(client);
    server.apply(&service("a", "old")).unwrap();
    let parameters = WatchParams::default().labels("!headless,tier notin (back)").fields("metadata.namespace=a");
    let stream = api.watch(&parameters, &server.resource_version().to_string()).await.unwrap();
    let mut stream = std::pin::pin!(stream);
    let web = service("a", "web");
    server.apply(&service("b", "web")).unwrap();
    server.apply(&web.clone().set("/metadata/labels/tier", "back")).unwrap();
    server.apply(&web.clone().set("/metadata/labels/tier", "front")).unwrap();
    server.apply(&web.clone().set("/metadata/labels/more", "front")).unwrap();
    server.apply(&web.clone().set("/metadata/labels/headless", "")).unwrap();
    let left = server.resource_version();
    server.delete(&web).unwrap();
    server.delete(&service("a", "old")).unwrap();
    let events = ["added web", "modified web"];
    assert_eq!(shorts(&mut stream, 2).await, events);
    let Some(Ok(WatchEvent::Deleted(object))) = next(&mut stream).await else { panic!("deleted") };
    assert_eq!(object.resource_version(), Some(left.to_string()), "under the version at which it left");
    assert!(!object.labels().contains_key("headless"), "in the state in which it was last seen");
    assert_eq!(shorts(&mut stream, 1).await, ["deleted old"]);
}

#[test]
fn kubectl_reads_and_watches() {
    if Command::new("kubectl").args(["version", "--client"]).output().is_err() {
        println!("SKIPPED kubectl_reads_and_watches: kubectl is missing: apt install kubernetes-client");
        return;
    }
    let server = start(Options::default());
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("kubeconfig");
    server.kubeconfig(&path).unwrap();
    let kubectl = |arguments: &[&str]| {
        let mut kubectl = Command::new("kubectl");
        // Its cache of what servers have is in the home folder otherwise.
        kubectl.arg("--kubeconfig").arg(&path).arg("--cache-dir").arg(folder.path().join("cache")).args(arguments);
        kubectl
    };
    server.apply(&service("default", "web")).unwrap();
    server.apply(&service("shop", "cart")).unwrap();
    server.apply(&EndpointSliceManifest::new("shop", "cart").port("http", Tcp, 8080)).unwrap();
    let run = |arguments: &[&str]| command::run(&mut kubectl(arguments)).unwrap();

    let services = run(&["get", "services"]);
    assert!(services.contains("web") && !services.contains("cart"), "{services}");
    let slices = run(&["get", "endpointslices", "-A", "-o", "yaml"]);
    assert!(slices.contains("name: cart-1") && slices.contains("kind: EndpointSlice"), "{slices}");
    assert!(run(&["get", "svc", "-n", "shop", "cart", "-o", "jsonpath={.spec.clusterIP}"]).contains("10.96.0.10"));
    assert!(run(&["get", "nodes", "-o", "name"]).is_empty());
    assert!(command::run(&mut kubectl(&["get", "service", "none"])).unwrap_err().to_string().contains("not found"));

    let log = folder.path().join("log");
    let mut watch = kubectl(&["get", "services", "-A", "--watch", "-o", "name"]);
    let mut watch = watch.stdout(std::fs::File::create(&log).unwrap()).spawn().unwrap();
    let saw = |count: usize| {
        wait_until("kubectl saw the services", Duration::from_secs(20), || {
            let text = std::fs::read_to_string(&log).unwrap();
            (text.matches("service/").count() >= count).then_some(text)
        })
    };
    let before = saw(2);
    server.apply(&service("default", "new")).unwrap();
    let after = saw(3);
    watch.kill().unwrap();
    watch.wait().unwrap();
    before.unwrap();
    assert!(after.unwrap().contains("service/new"));
}

#[test]
fn every_node_and_pod_of_a_lab_reaches_its_api_server() {
    needs_root!();
    let lab = Lab::builder().node("node1", Topology::Routed, ["pod1"]).node("node2", Topology::Bridge, ["pod2"]);
    let lab = lab.api().pcap(false).build().unwrap();
    let ca = lab.directory().join("ca.pem");
    std::fs::write(&ca, lab.api().ca_pem()).unwrap();
    for namespace in ["node1", "node2"]
        .map(|node| lab.node(node).namespace())
        .into_iter()
        .chain(["pod1", "pod2"].map(|pod| lab.pod(pod).namespace()))
    {
        let mut curl = namespace.command("curl");
        curl.args(["-sS", "--fail", "-H", "Authorization: Bearer test-token", "--cacert"]).arg(&ca);
        let nodes = command::run(curl.arg(format!("{}/api/v1/nodes", lab.api().url()))).unwrap();
        assert!(nodes.contains("node1") && nodes.contains("172.31.2.2"), "{nodes}");
    }
    assert_eq!(lab.api().counts().lists, 4);
}

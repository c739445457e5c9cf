//! Programs that are not written in Rust: kubectl, and curl from everywhere in a lab.

use std::process::Command;
use std::time::Duration;

use viaduct_tests::Protocol::Tcp;
use viaduct_tests::apiserver::Options;
use viaduct_tests::{EndpointSliceManifest, Lab, Topology, command, needs_root, wait_until};

use crate::{service, start};

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

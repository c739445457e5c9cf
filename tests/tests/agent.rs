//! The agent and the command line as programs: what they print, and what they leave behind.

#![cfg(test)]

use std::fs;
use std::os::unix::process::CommandExt as _;
use std::process::Command;

use lb_common::abi::LAYOUT;
use lb_userspace::dataplane::Pins;
use viaduct_tests::Protocol::Tcp;
use viaduct_tests::deadline::SYNC;
use viaduct_tests::{
    EndpointSliceManifest, Lab, ServiceManifest, Topology, agent, bulk_http, http_get, needs_root, wait_until,
};

/// One node with a client and a backend behind 10.96.0.10:80.
fn lab() -> Lab {
    let lab = Lab::builder().node("node1", Topology::Routed, ["client", "backend"]).build().unwrap();
    let web = ServiceManifest::new("default", "web").cluster_ip("10.96.0.10").port("http", Tcp, 80);
    lab.manifests().apply(&web).unwrap();
    let slice = EndpointSliceManifest::new("default", "web").port("http", Tcp, 8080).pods([lab.pod("backend")]);
    lab.manifests().apply(&slice).unwrap();
    lab
}

/// Runs a command that must fail; its standard error.
fn error_of(command: &mut Command) -> String {
    let output = command.output().unwrap();
    assert!(!output.status.success(), "it succeeded: {output:?}");
    String::from_utf8(output.stderr).unwrap()
}

const GOOD: &str = "
apiVersion: v1
kind: Service
metadata: {name: good, namespace: default}
spec: {clusterIP: 10.96.0.20, ports: [{name: http, port: 80}]}
";

/// Each of these files holds something bad, and the good Service besides.
const BAD: [(&str, &str, &str); 6] = [
    ("1-not-yaml.yaml", "kind: Service\n  metadata: {name: broken", "1-not-yaml.yaml:8: cannot parse this document: "),
    ("2-kind.yaml", "apiVersion: apps/v1\nkind: Deployment\nmetadata: {name: web}", "Deployment"),
    (
        "3-port-zero.yaml",
        "apiVersion: v1\nkind: Service\nmetadata: {name: zero}\nspec: {clusterIP: 10.96.0.21, ports: [{port: 0}]}",
        "Service default/zero: spec.ports[0].port: 0 is not a port",
    ),
    (
        "4-port-large.yaml",
        "apiVersion: v1\nkind: Service\nmetadata: {name: large}\nspec: {clusterIP: 10.96.0.22, ports: [{port: 70000}]}",
        "Service default/large: spec.ports[0].port: 70000 is not a port",
    ),
    (
        "5-family.yaml",
        "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\naddressType: IPv4\nmetadata: {name: six, labels: \
         {kubernetes.io/service-name: good}}\nports: [{name: http, port: 8080}]\nendpoints: [{addresses: ['fd00::1']}]",
        "EndpointSlice default/six: endpoints[0].addresses[0]: ",
    ),
    (
        "6-taken.yaml",
        "apiVersion: v1\nkind: Service\nmetadata: {name: zz-twin}\nspec: {clusterIP: 10.96.0.10, ports: [{port: 80}]}",
        "Service default/zz-twin: spec.clusterIP: 10.96.0.10:80/TCP already belongs to Service default/web",
    ),
];

#[test]
fn each_bad_manifest_gives_one_line_and_the_good_objects_beside_it_work() {
    needs_root!();
    let lab = lab();
    let _server = lab.pod("backend").http_server(8080).unwrap();
    let (node, client) = (lab.node("node1"), lab.pod("client").namespace());
    for (number, (file, bad, _)) in BAD.iter().enumerate() {
        let good = GOOD.replace("name: good", &format!("name: good{number}"));
        let good = good.replace("10.96.0.20", &format!("10.96.1.{number}"));
        let slice = format!(
            "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\naddressType: IPv4\nmetadata: {{name: good{number}, labels: \
             {{kubernetes.io/service-name: good{number}}}}}\nports: [{{name: http, port: 8080}}]\nendpoints: \
             [{{addresses: ['{}']}}]\n",
            lab.pod("backend").address()
        );
        lab.manifests().write(file, &format!("{good}---\n{bad}\n---\n{slice}")).unwrap();
    }
    let endpoints = "- addresses: [10.9.9.9]\n".repeat(100_000);
    let many = format!(
        "{GOOD}---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\naddressType: IPv4\nmetadata: {{name: many, labels: \
         {{kubernetes.io/service-name: web}}}}\nports: [{{name: http, port: 8080}}]\nendpoints:\n{endpoints}"
    );
    lab.manifests().write("7-many.yaml", &many).unwrap();

    let agent = node.start_agent().unwrap();
    let log = agent.log();
    let lines_with = |text: &str| log.lines().filter(|line| line.contains(text)).collect::<Vec<_>>();
    for (file, _, expected) in BAD {
        let lines = lines_with(file);
        assert_eq!(lines.len(), 1, "one line about {file} in:\n{log}");
        assert!(lines[0].contains("WARN") && lines[0].contains(expected), "{expected} in {}", lines[0]);
    }
    let lines = lines_with("7-many.yaml");
    assert_eq!(lines.len(), 1, "{log}");
    assert!(lines[0].contains("EndpointSlice default/many: endpoints: ") && lines[0].contains("1000"), "{}", lines[0]);
    for number in 0..BAD.len() {
        assert_eq!(http_get(client, format!("10.96.1.{number}:80").parse().unwrap()).unwrap().backend, "backend");
    }
    assert_eq!(http_get(client, "10.96.0.10:80".parse().unwrap()).unwrap().backend, "backend", "the older twin serves");
    assert!(node.viaduct(&["service", "list"]).unwrap().contains("10.96.0.20:80"), "the good one beside the many");

    // What is mended is said to be, and served.
    let mended = BAD[5].1.replace("10.96.0.10", "10.96.0.11");
    lab.manifests().write(BAD[5].0, &mended).unwrap();
    wait_until("the twin is served", SYNC, || agent.log().contains("no longer a problem: ").then_some(())).unwrap();
}

#[test]
fn a_broken_file_does_not_take_a_working_service_away() {
    needs_root!();
    let lab = lab();
    let _server = lab.pod("backend").http_server(8080).unwrap();
    let agent = lab.node("node1").start_agent().unwrap();
    for name in fs::read_dir(lab.manifests().path()).unwrap() {
        fs::write(name.unwrap().path(), "kind: {").unwrap();
    }
    wait_until("the agent complains", SYNC, || agent.log().contains("keeping").then_some(())).unwrap();
    bulk_http(lab.pod("client").namespace(), "10.96.0.10:80".parse().unwrap(), 20, 2).assert_no_errors();
    // At once: an agent that reads it half deleted takes that for the wish to serve less.
    fs::rename(lab.manifests().path(), lab.manifests().path().with_extension("gone")).unwrap();
    wait_until("the agent complains", SYNC, || agent.log().contains("cannot read the folder").then_some(())).unwrap();
    bulk_http(lab.pod("client").namespace(), "10.96.0.10:80".parse().unwrap(), 20, 2).assert_no_errors();
}

#[test]
fn cleanup_removes_everything_and_says_what() {
    needs_root!();
    let lab = lab();
    let _server = lab.pod("backend").http_server(8080).unwrap();
    let node = lab.node("node1");
    let agent = node.start_agent().unwrap();
    http_get(lab.pod("client").namespace(), "10.96.0.10:80".parse().unwrap()).unwrap();

    let refused = error_of(node.viaduct_command().unwrap().arg("cleanup").arg("--bpffs").arg(node.bpffs()));
    assert!(refused.starts_with(&format!("error: an agent (pid {}) works on ", agent.pid())), "{refused}");
    assert!(refused.contains("stop it first"), "{refused}");
    agent.stop().unwrap();
    let removed = node.viaduct(&["cleanup"]).unwrap();
    assert_eq!(removed.matches("removed attached program ").count(), 13, "{removed}");
    assert_eq!(removed.matches("removed map ").count(), 37, "{removed}");
    assert_eq!(removed.matches("removed program ").count(), 11, "{removed}");
    assert!(!node.bpffs().exists());
    let again = node.viaduct(&["cleanup"]).unwrap();
    assert_eq!(again, format!("nothing to remove in {}\n", node.bpffs().display()));
    assert!(http_get(lab.pod("client").namespace(), "10.96.0.10:80".parse().unwrap()).is_err());
}

#[test]
fn a_second_agent_on_the_same_folder_is_refused() {
    needs_root!();
    let lab = lab();
    let first = lab.node("node1").start_agent().unwrap();
    let Err(error) = lab.node("node1").start_agent() else { panic!("it runs") };
    let error = format!("{error:#}");
    assert!(error.contains(&format!("error: an agent (pid {}) works on ", first.pid())), "{error}");
    assert!(error.contains("--bpffs"), "{error}");
}

#[test]
fn maps_of_another_layout_are_named_with_the_remedy() {
    needs_root!();
    let lab = lab();
    let node = lab.node("node1");
    node.start_agent().unwrap().stop().unwrap();
    fs::rename(Pins::new(node.bpffs()).layout(), node.bpffs().join("v999")).unwrap();
    let error = error_of(node.viaduct_command().unwrap().args(["service", "list", "--bpffs"]).arg(node.bpffs()));
    assert!(error.starts_with("error: layout mismatch: the maps in "), "{error}");
    assert!(error.contains(&format!("have layout 999, this viaduct reads layout {LAYOUT}")), "{error}");
}

#[test]
fn errors_say_what_is_missing_and_how_to_get_it() {
    needs_root!();
    let lab = lab();
    let node = lab.node("node1");
    for arguments in [&["service", "list"][..], &["backend", "list"], &["flow", "list"], &["status"]] {
        let nothing = error_of(
            node.viaduct_command().unwrap().args(arguments).args(["--bpffs", "/sys/fs/bpf/there-is-no-such-folder"]),
        );
        assert!(nothing.contains("no datapath is pinned in /sys/fs/bpf/there-is-no-such-folder: start"), "{nothing}");
        let no_bpffs = error_of(node.viaduct_command().unwrap().args(arguments).args(["--bpffs", "/tmp/not-a-bpffs"]));
        assert!(no_bpffs.contains("/tmp/not-a-bpffs is not on a BPF file system: run `mount -t bpf"), "{no_bpffs}");
        let no_root = error_of(viaduct_as_nobody(&lab).args(arguments));
        assert!(no_root.contains("viaduct needs root"), "{no_root}");
    }
    let arguments = ["agent", "--manifests", "/tmp", "--bpffs", "/tmp/not-a-bpffs"];
    assert!(error_of(node.viaduct_command().unwrap().args(arguments)).contains("is not on a BPF file system"));
    assert!(error_of(viaduct_as_nobody(&lab).args(arguments)).contains("viaduct needs root"));
    for (flags, expected) in [
        (["--manifests", "/tmp/there-is-no-such-folder"], "/tmp/there-is-no-such-folder: is not a folder: create it"),
        (
            ["--log-level", "banana"],
            "invalid value 'banana' for '--log-level <LEVEL>': give error, warn, info, debug or trace",
        ),
        (["--pod-interfaces", ""], "give at least one pattern"),
        (["--mark", "3"], "give one bit of 32"),
        (["--max-slots", "1000"], "give a power of two"),
    ] {
        let mut command = node.viaduct_command().unwrap();
        command.args(["agent", "--bpffs"]).arg(node.bpffs()).args(flags);
        if flags[0] != "--manifests" {
            command.args(["--manifests", "/tmp"]);
        }
        let error = error_of(&mut command);
        assert!(error.contains(expected), "{expected} in {error}");
    }
}

/// Where nobody may read it: the target folder can be in a home.
fn viaduct_as_nobody(lab: &Lab) -> Command {
    let copy = lab.directory().join("viaduct");
    fs::copy(agent::binary().unwrap(), &copy).unwrap();
    let mut command = Command::new(&copy);
    command.uid(65_534).gid(65_534);
    command
}

#[test]
fn tables_and_json_tell_the_same() {
    needs_root!();
    let lab = lab();
    let _server = lab.pod("backend").http_server(8080).unwrap();
    let node = lab.node("node1");
    let agent = node.start_agent().unwrap();
    bulk_http(lab.pod("client").namespace(), "10.96.0.10:80".parse().unwrap(), 7, 1).assert_no_errors();
    let backend = format!("{}:8080", lab.pod("backend").address());

    let json = |arguments: &[&str]| -> serde_json::Value {
        serde_json::from_str(&node.viaduct(&[arguments, &["-o", "json"]].concat()).unwrap()).unwrap()
    };
    let services = json(&["service", "list"]);
    assert_eq!(services[0]["frontend"], "10.96.0.10:80");
    assert_eq!(services[0]["connections"], 7);
    let table = node.viaduct(&["service", "list"]).unwrap();
    let row: Vec<_> = table.lines().nth(1).unwrap().split_whitespace().collect();
    assert_eq!(row, ["default", "web", "http", "10.96.0.10:80", "TCP", "1", "-", "-", "-", "7", "0"]);

    let backends = json(&["backend", "list"]);
    assert_eq!((&backends[0]["backend"], &backends[0]["share"]), (&backend.into(), &1.0.into()));
    let flows = json(&["flow", "list"]);
    assert_eq!(flows.as_array().unwrap().len(), 7);
    assert!(flows.as_array().unwrap().iter().all(|flow| flow["state"] == "closed"), "{flows}");
    let status = json(&["status"]);
    assert_eq!(status["agent"]["pid"], agent.pid());
    assert_eq!(status["interfaces"].as_array().unwrap().len(), 2);
}

#[test]
fn cleanup_touches_nothing_that_is_not_on_a_bpf_file_system() {
    needs_root!();
    let lab = lab();
    let data = lab.directory().join("app/v2/data");
    fs::create_dir_all(&data).unwrap();
    let refused = error_of(
        lab.node("node1").viaduct_command().unwrap().arg("cleanup").arg("--bpffs").arg(lab.directory().join("app")),
    );
    assert!(refused.contains("is not on a BPF file system"), "{refused}");
    assert!(data.exists());
}

#[test]
fn an_emptied_file_or_folder_takes_no_service_away_but_a_deleted_file_does() {
    needs_root!();
    let lab = lab();
    let _server = lab.pod("backend").http_server(8080).unwrap();
    let (node, client) = (lab.node("node1"), lab.pod("client").namespace());
    let web = "10.96.0.10:80".parse().unwrap();
    let agent = node.start_agent().unwrap();
    let files: Vec<_> = fs::read_dir(lab.manifests().path()).unwrap().map(|file| file.unwrap().path()).collect();
    let contents: Vec<_> = files.iter().map(|file| fs::read(file).unwrap()).collect();
    // As a shell does for `kubectl get ... > web.yaml`, before kubectl has said anything.
    files.iter().for_each(|file| fs::write(file, "").unwrap());
    let says = |text: &str| {
        wait_until(text, SYNC, || agent.log().contains(text).then_some(())).unwrap();
    };
    says("is empty; delete the file to remove its objects");
    bulk_http(client, web, 20, 2).assert_no_errors();

    fs::remove_dir_all(lab.manifests().path()).unwrap();
    fs::create_dir(lab.manifests().path()).unwrap();
    says("it is another one than before, and empty");
    bulk_http(client, web, 20, 2).assert_no_errors();

    agent.kill9().unwrap();
    let mut command = node.viaduct_command().unwrap();
    command.args(["agent", "--pod-interfaces", "veth*", "--max-flows", "65536", "--manifests"]);
    let log = lab.directory().join("unready.log");
    command.arg(lab.manifests().path()).arg("--bpffs").arg(node.bpffs()).stderr(fs::File::create(&log).unwrap());
    let mut unready = command.spawn().unwrap();
    let says = |text: &str| {
        wait_until(text, SYNC, || fs::read_to_string(&log).unwrap().contains(text).then_some(())).unwrap();
    };
    says("the folder holds no objects, but this node serves some from before; keeping them");
    bulk_http(client, web, 20, 2).assert_no_errors();

    files.iter().zip(contents).for_each(|(file, contents)| fs::write(file, contents).unwrap());
    says(" ready ");
    files.iter().for_each(|file| fs::remove_file(file).unwrap());
    node.wait_for(&["service", "list"], "nothing is served", |list| list.as_array().unwrap().is_empty()).unwrap();
    unready.kill().unwrap();
    unready.wait().unwrap();
}

#[test]
fn a_log_that_cannot_be_written_does_not_stop_the_agent() {
    needs_root!();
    let lab = lab();
    let _server = lab.pod("backend").http_server(8080).unwrap();
    let node = lab.node("node1");
    let mut command = node.viaduct_command().unwrap();
    command.args(["agent", "--max-flows", "65536", "--manifests"]).arg(lab.manifests().path());
    command.arg("--bpffs").arg(node.bpffs()).stderr(fs::File::create("/dev/full").unwrap());
    let mut agent = command.spawn().unwrap();
    wait_until("it serves", SYNC, || http_get(lab.pod("client").namespace(), "10.96.0.10:80".parse().unwrap()).ok())
        .unwrap();
    assert_eq!(agent.try_wait().unwrap(), None);
    agent.kill().unwrap();
    agent.wait().unwrap();
}

#[test]
fn a_pin_that_somebody_removes_is_put_back() {
    needs_root!();
    let mut lab = lab();
    let _server = lab.pod("backend").http_server(8080).unwrap();
    lab.node("node1").start_agent().unwrap();
    let web = "10.96.0.10:80".parse().unwrap();
    for link in fs::read_dir(Pins::new(lab.node("node1").bpffs()).links()).unwrap() {
        fs::remove_file(link.unwrap().path()).unwrap();
    }
    // Any change of interfaces makes the agent look.
    lab.add_pod("node1", "another").unwrap();
    wait_until("the client is served again", SYNC, || http_get(lab.pod("client").namespace(), web).ok()).unwrap();
}

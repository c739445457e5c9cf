//! What an agent tells of itself: configuration, health, metrics, log lines.

#![cfg(test)]

use std::fs;
use std::net::TcpListener;
use std::time::{Duration, Instant};

use anyhow::Result;
use serde_json::{Value, json};
use viaduct_tests::Protocol::Tcp;
use viaduct_tests::deadline::SYNC;
use viaduct_tests::page::{HEALTHZ, METRICS, Page};
use viaduct_tests::{
    EndpointSliceManifest, Lab, Node, ServiceManifest, Topology, bulk_http, http_get, needs_root, wait_until,
};

/// Those of the API client, `rest_client_*`, appear with its first request.
const NAMES: [&str; 40] = [
    "kubeproxy_sync_proxy_rules_duration_seconds",
    "kubeproxy_sync_full_proxy_rules_duration_seconds",
    "kubeproxy_sync_partial_proxy_rules_duration_seconds",
    "kubeproxy_network_programming_duration_seconds",
    "kubeproxy_sync_proxy_rules_last_timestamp_seconds",
    "kubeproxy_sync_proxy_rules_last_queued_timestamp_seconds",
    "kubeproxy_sync_proxy_rules_no_local_endpoints_total",
    "kubeproxy_sync_proxy_rules_endpoint_changes_pending",
    "kubeproxy_sync_proxy_rules_endpoint_changes_total",
    "kubeproxy_sync_proxy_rules_service_changes_pending",
    "kubeproxy_sync_proxy_rules_service_changes_total",
    "kubeproxy_proxy_healthz_total",
    "kubeproxy_proxy_livez_total",
    "viaduct_build_info",
    "viaduct_endpoint_change_duration_seconds",
    "viaduct_map_entries",
    "viaduct_map_max_entries",
    "viaduct_map_full",
    "viaduct_flow_entries",
    "viaduct_flows_collected_total",
    "viaduct_flow_halves_restored_total",
    "viaduct_collector_seconds_total",
    "viaduct_dropped_packets_total",
    "viaduct_passed_packets_total",
    "viaduct_suspect_backends",
    "viaduct_backend_failures_total",
    "viaduct_backend_skips_total",
    "viaduct_backend_recoveries_total",
    "viaduct_interfaces",
    "viaduct_problems",
    "viaduct_api_errors_total",
    "viaduct_sync_failures_total",
    "viaduct_api_failing_seconds",
    "viaduct_pins_lost",
    "viaduct_shortages",
    "process_cpu_seconds_total",
    "process_resident_memory_bytes",
    "process_start_time_seconds",
    "process_open_fds",
    "process_max_fds",
];

/// One node with a client and a backend behind 10.96.0.10:80, and a Service without a backend.
fn lab() -> Lab {
    let lab = Lab::builder().node("node1", Topology::Routed, ["client", "backend"]).build().unwrap();
    let web = ServiceManifest::new("default", "web").cluster_ip("10.96.0.10").port("http", Tcp, 80);
    lab.manifests().apply(&web).unwrap();
    let slice = EndpointSliceManifest::new("default", "web").port("http", Tcp, 8080).pods([lab.pod("backend")]);
    lab.manifests().apply(&slice).unwrap();
    let empty = ServiceManifest::new("default", "empty").cluster_ip("10.96.0.11").port("http", Tcp, 80);
    lab.manifests().apply(&empty).unwrap();
    lab
}

fn get(node: &Node, address: &str, path: &str) -> Result<Page> {
    Page::get(node.namespace(), address, path)
}

fn series(page: &Page, name: &str) -> f64 {
    page.series(name).unwrap()
}

#[test]
fn every_metric_has_a_help_line_and_says_what_happened() {
    needs_root!();
    let lab = lab();
    let _server = lab.pod("backend").http_server(8080).unwrap();
    let (node, client) = (lab.node("node1"), lab.pod("client").namespace());
    let _agent = node.start_agent().unwrap();
    bulk_http(client, "10.96.0.10:80".parse().unwrap(), 10, 2).assert_no_errors();
    http_get(client, "10.96.0.11:80".parse().unwrap()).expect_err("it has no backend");
    lab.manifests().write("bad.yaml", "kind: Service").unwrap();

    let page = wait_until("the bad file is a problem, and flows are counted", SYNC, || {
        let answer = get(node, METRICS, "/metrics").unwrap();
        assert!(
            answer.code == 200 && answer.head.contains("content-type: text/plain; version=0.0.4"),
            "{}",
            answer.head
        );
        // The collector counts flows when it comes round.
        let counted = series(&answer, "viaduct_map_entries{map=\"FLOWS_4\"}") == 20.0;
        (counted && series(&answer, "viaduct_problems") > 0.0).then_some(answer)
    });
    let page = page.unwrap();
    for name in NAMES {
        let begins = |what: &str| page.body.lines().any(|line| line.starts_with(&format!("# {what} {name} ")));
        assert!(begins("HELP") && begins("TYPE"), "{name} in:\n{}", page.body);
    }
    for (name, value) in [
        ("viaduct_interfaces", 2.0),
        ("viaduct_shortages", 0.0),
        ("viaduct_map_entries{map=\"FRONTENDS_4\"}", 2.0),
        ("viaduct_map_entries{map=\"BACKENDS_4\"}", 1.0),
        ("viaduct_map_max_entries{map=\"FLOWS_4\"}", 65536.0),
        ("viaduct_flow_entries{ip_family=\"IPv4\",protocol=\"TCP\"}", 20.0),
        ("viaduct_flow_entries{ip_family=\"IPv6\",protocol=\"SCTP\"}", 0.0),
        ("viaduct_flows_collected_total{reason=\"backend-gone\"}", 0.0),
        ("viaduct_dropped_packets_total{reason=\"land\"}", 0.0),
        ("kubeproxy_sync_partial_proxy_rules_duration_seconds_count{ip_family=\"IPv4\"}", 0.0),
        ("kubeproxy_sync_full_proxy_rules_duration_seconds_bucket{ip_family=\"IPv4\",le=\"0.001\"}", f64::NAN),
        ("kubeproxy_sync_full_proxy_rules_duration_seconds_bucket{ip_family=\"IPv4\",le=\"16.384\"}", f64::NAN),
        ("kubeproxy_network_programming_duration_seconds_bucket{ip_family=\"IPv4\",le=\"300\"}", 0.0),
    ] {
        let found = series(&page, name);
        assert!(value.is_nan() || found == value, "{name} is {found}, not {value}");
    }
    assert!(series(&page, "viaduct_dropped_packets_total{reason=\"refused\"}") >= 1.0, "{}", page.body);
    let since = |name: &str| {
        let now = std::time::SystemTime::UNIX_EPOCH.elapsed().unwrap().as_secs_f64();
        now - series(&page, &format!("kubeproxy_sync_proxy_rules_{name}_seconds{{ip_family=\"IPv4\"}}"))
    };
    assert!((0.0..300.0).contains(&since("last_timestamp")));
    assert!(series(&page, "kubeproxy_sync_proxy_rules_duration_seconds_count{ip_family=\"IPv4\"}") >= 1.0);

    // The kernel's counts outlive an agent, and a counter never goes back.
    bulk_http(client, "10.96.0.10:80".parse().unwrap(), 10, 2).assert_no_errors();
    wait_until("new flows are counted", SYNC, || {
        let page = get(node, METRICS, "/metrics").unwrap();
        (series(&page, "viaduct_map_entries{map=\"FLOWS_4\"}") == 40.0).then_some(())
    })
    .unwrap();
}

#[test]
fn health_is_told_to_everybody_and_metrics_to_the_node_alone() {
    needs_root!();
    let lab = lab();
    let node = lab.node("node1");
    let agent = node.start_agent().unwrap();
    for (path, with_node) in [("/healthz", true), ("/livez", false)] {
        let answer = get(node, &format!("{}:10256", node.address()), path).unwrap();
        assert_eq!(answer.code, 200, "{}", answer.body);
        for line in ["content-type: application/json", "x-content-type-options: nosniff"] {
            assert!(answer.head.contains(line), "{}", answer.head);
        }
        let body: Value = serde_json::from_str(&answer.body).unwrap();
        assert_eq!(body["healthy"], true, "{body}");
        assert_eq!(body.get("nodeEligible"), with_node.then_some(&json!(true)), "{body}");
        assert_eq!(body["lastUpdated"], body["currentTime"], "{body}");
        assert_eq!(body["status"]["IPv4"]["healthy"], true, "{body}");
        assert!(body["status"]["IPv4"]["lastUpdated"].is_string(), "{body}");
    }
    for path in ["/", "/metrics", "/healthz/ping"] {
        assert_eq!(get(node, HEALTHZ, path).unwrap().code, 404, "{path}");
    }
    assert_eq!(get(node, METRICS, "/healthz").unwrap().body, "ok");
    assert_eq!(get(node, METRICS, "/proxyMode").unwrap().body, "ebpf");
    assert_eq!(get(node, METRICS, "/livez").unwrap().code, 404);
    assert!(get(node, &format!("{}:10249", node.address()), "/metrics").is_err());
    let page = get(node, METRICS, "/metrics").unwrap();
    assert_eq!(series(&page, "kubeproxy_proxy_healthz_total{code=\"200\"}"), 1.0);
    assert_eq!(series(&page, "kubeproxy_proxy_livez_total{code=\"503\"}"), 0.0);
    agent.stop().unwrap();

    let _silent = node.start_agent_with(&["--healthz-bind-address=", "--metrics-bind-address", ""]).unwrap();
    assert!(get(node, HEALTHZ, "/healthz").is_err() && get(node, METRICS, "/metrics").is_err());
}

#[test]
fn an_agent_of_an_api_server_counts_requests_and_changes_and_follows_its_node() {
    needs_root!();
    let lab = Lab::builder().node("node1", Topology::Routed, ["client", "backend"]).api().build().unwrap();
    let node = lab.node("node1");
    let web = ServiceManifest::new("default", "web").cluster_ip("10.96.0.10").port("http", Tcp, 80);
    lab.api().apply(&web).unwrap();
    let _agent = node.start_agent().unwrap();
    let metrics = || get(node, METRICS, "/metrics").unwrap();
    let page = metrics();
    for name in ["rest_client_requests_total", "rest_client_request_duration_seconds"] {
        assert!(
            page.body.lines().any(|line| line.starts_with(&format!("# HELP {name} "))),
            "{name} in:\n{}",
            page.body
        );
    }
    let requests = |page: &Page| {
        page.body.lines().any(|line| {
            line.starts_with("rest_client_requests_total{code=\"200\",host=\"") && line.contains("\",method=\"GET\"} ")
        })
    };
    assert!(requests(&page), "{}", page.body);

    // A slice that changes what is served, and a Service of which nothing is served.
    let slice = EndpointSliceManifest::new("default", "web").port("http", Tcp, 8080).pods([lab.pod("backend")]);
    let name = json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "name", "namespace": "default"},
        "spec": {"type": "ExternalName", "externalName": "example.org"}});
    let change = |kind: &str, apply: &dyn Fn()| {
        let changes = |page: &Page, which| series(page, &format!("kubeproxy_sync_proxy_rules_{kind}_changes_{which}"));
        let before = changes(&metrics(), "total");
        apply();
        let page = wait_until("it is counted, and nothing is pending", SYNC, || {
            Some(metrics()).filter(|page| changes(page, "total") == before + 1.0 && changes(page, "pending") == 0.0)
        });
        page.unwrap()
    };
    let page = change("endpoint", &|| lab.api().apply(&slice).unwrap());
    assert_eq!(series(&page, "viaduct_endpoint_change_duration_seconds_count"), 1.0);
    let page = change("service", &|| lab.api().apply_value(name.clone()).unwrap());
    let [applied, queued] = ["last_timestamp_seconds", "last_queued_timestamp_seconds"]
        .map(|name| series(&page, &format!("kubeproxy_sync_proxy_rules_{name}{{ip_family=\"IPv4\"}}")));
    assert!(applied >= queued, "alerts compare {applied} with {queued}");
    assert_eq!(series(&metrics(), "viaduct_map_entries{map=\"BACKENDS_4\"}"), 1.0);

    // kube-proxy's rule: traffic ends, the proxy lives.
    let codes = || ["/healthz", "/livez"].map(|path| get(node, HEALTHZ, path).unwrap().code);
    wait_until("the Node is known", SYNC, || (codes() == [200, 200]).then_some(())).unwrap();
    let with_taint = |key: &str| {
        json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": "node1"}, "spec": {"taints": [
            {"key": key, "effect": "NoSchedule"}]}})
    };
    lab.api().apply_value(with_taint("ToBeDeletedByClusterAutoscaler")).unwrap();
    wait_until("the Node is about to go", SYNC, || (codes() == [503, 200]).then_some(())).unwrap();
    lab.api().apply_value(with_taint("other")).unwrap();
    wait_until("the Node stays", SYNC, || (codes() == [200, 200]).then_some(())).unwrap();
}

#[test]
fn probes_are_answered_while_a_large_sync_runs() {
    needs_root!();
    let lab = lab();
    let node = lab.node("node1");
    let _agent = node.start_agent().unwrap();
    let synced = || {
        let page = get(node, METRICS, "/metrics").unwrap();
        series(&page, "kubeproxy_sync_proxy_rules_duration_seconds_sum{ip_family=\"IPv4\"}")
    };
    let before = synced();
    let many: String = (0..10_000)
        .map(|i| {
            format!(
                "---\napiVersion: v1\nkind: Service\nmetadata: {{name: s{i}}}\nspec: {{clusterIP: 10.97.{}.{}, ports: \
                 [{{port: 80}}]}}\n",
                i / 250,
                i % 250 + 1
            )
        })
        .collect();
    lab.manifests().write("many.yaml", &many).unwrap();
    let mut slowest = Duration::ZERO;
    let sync = wait_until("ten thousand Services are applied", 4 * SYNC, || {
        let asked = Instant::now();
        assert_eq!(get(node, HEALTHZ, "/livez").unwrap().code, 200);
        slowest = slowest.max(asked.elapsed());
        (series(&get(node, METRICS, "/metrics").unwrap(), "viaduct_map_entries{map=\"FRONTENDS_4\"}") == 10_002.0)
            .then(&synced)
    });
    let sync = Duration::from_secs_f64(sync.unwrap() - before);
    assert!(slowest < sync / 2, "the slowest answer took {slowest:?}, the sync {sync:?}");
}

#[test]
fn a_taken_port_is_tried_again_and_told_once() {
    needs_root!();
    let lab = lab();
    let node = lab.node("node1");
    let taken = node.namespace().run(|| TcpListener::bind(METRICS)).unwrap();
    let agent = node.start_agent().unwrap();
    assert_eq!(get(node, HEALTHZ, "/healthz").unwrap().code, 200);
    wait_until("the log tells", SYNC, || agent.log().contains("cannot listen").then_some(())).unwrap();
    // Longer than until the second try.
    std::thread::sleep(Duration::from_secs(6));
    drop(taken);
    wait_until("metrics are served", SYNC, || get(node, METRICS, "/metrics").ok()).unwrap();
    let log = agent.log();
    let lines: Vec<_> = log.lines().filter(|line| line.contains("--metrics-bind-address")).collect();
    let [failed, works] = lines[..] else { panic!("{log}") };
    assert!(failed.contains("WARN --metrics-bind-address 127.0.0.1:10249: cannot listen: "), "{failed}");
    assert!(works.contains("INFO") && works.ends_with("listening now"), "{works}");
}

#[test]
fn each_line_of_a_json_log_is_a_json_object() {
    needs_root!();
    let lab = lab();
    let node = lab.node("node1");
    lab.manifests().write("bad.yaml", "kind: \"Ser\\nvice\"").unwrap();
    let agent = node.start_agent_with(&["--log-format", "json", "--log-level", "debug"]).unwrap();
    lab.manifests().write("worse.yaml", "a: b: c").unwrap();
    wait_until("the log tells", SYNC, || agent.log().contains("worse.yaml").then_some(())).unwrap();
    agent.stop().unwrap();
    let log = fs::read_to_string(node.agent_log()).unwrap();
    assert!(log.contains("\"level\":\"WARN\"") && log.contains("stopped"), "{log}");
    for line in log.lines() {
        let line: Value = serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}"));
        assert!(["timestamp", "level", "message"].iter().all(|field| line[field].is_string()), "{line}");
    }
}

#[test]
fn flags_win_over_environment_over_file_over_defaults() {
    needs_root!();
    let lab = lab();
    let node = lab.node("node1");
    let file = lab.directory().join("viaduct.yaml");
    let path = file.to_str().unwrap();
    fs::write(
        &file,
        "# of node1\nmetricsBindAddress: 127.0.0.1:9999\nlogLevel: warn\nmark: 0x2000\nmaxBackends: 1000\n",
    )
    .unwrap();
    let show = |arguments: &[&str]| {
        let mut command = node.viaduct_command().unwrap();
        command
            .env("RUST_LOG", "debug")
            .args(["config", "show", "--config", path, "--max-backends", "2000"])
            .args(arguments);
        String::from_utf8(command.output().unwrap().stdout).unwrap()
    };
    let table = show(&[]);
    for (key, value, source) in [
        ("maxBackends", "2000", "--max-backends"),
        ("logLevel", "debug", "$RUST_LOG"),
        ("mark", "8192", &format!("{path}:4")),
        ("refusalsPerSecond", "1000", "default"),
        ("maxSlots", "-", "default"),
        ("kubeconfig", "-", "default"),
    ] {
        let row = table.lines().map(|line| line.split_whitespace().collect::<Vec<_>>()).find(|row| row[0] == key);
        assert_eq!(row.unwrap(), [key, value, source], "{table}");
    }
    let document: Value = serde_json::from_str(&show(&["-o", "json"])).unwrap();
    assert_eq!(document["mark"], json!({"value": 8192, "source": format!("{path}:4")}));
    // What it prints is a file that means the same.
    let again = lab.directory().join("again.yaml");
    fs::write(&again, show(&["-o", "yaml"])).unwrap();
    let output = node
        .viaduct_command()
        .unwrap()
        .args(["config", "show", "-o", "yaml", "--config"])
        .arg(&again)
        .output()
        .unwrap();
    assert_eq!(String::from_utf8(output.stdout).unwrap(), fs::read_to_string(&again).unwrap());

    // The agent agrees.
    let _agent = node.start_agent_with(&["--config", path, "--max-backends", "2000", "--log-level", "info"]).unwrap();
    let configuration: Value = serde_json::from_str(&get(node, "127.0.0.1:9999", "/configz").unwrap().body).unwrap();
    for (key, value) in [
        ("maxBackends", json!(2000)),
        ("logLevel", json!("info")),
        ("mark", json!(8192)),
        ("hostnameOverride", json!("node1")),
        ("podInterfaces", json!(["veth*"])),
        ("bpffs", json!(node.bpffs())),
    ] {
        assert_eq!(configuration[key], value, "{key} in {configuration}");
    }

    for (text, expected) in [
        ("mark: 1\nmaxFlwos: 1\n", ":2: maxFlwos: is no option; did you mean maxFlows?\n"),
        ("manifests: /tmp\nserver: https://10.0.0.1\n", ":1) and server ("),
    ] {
        fs::write(&file, text).unwrap();
        for arguments in [&["agent"][..], &["config", "show"]] {
            let output = node.viaduct_command().unwrap().args(arguments).args(["--config", path]).output().unwrap();
            let error = String::from_utf8(output.stderr).unwrap();
            assert!(error.starts_with("error: ") && error.contains(expected), "{error}");
            assert_eq!((output.status.code(), error.lines().count(), output.stdout.len()), (Some(1), 1, 0), "{error}");
        }
    }
}

#[test]
fn a_clock_that_jumps_a_day_forth_and_two_back_disturbs_nothing() {
    needs_root!();
    let lab = Lab::builder().node("node1", Topology::Routed, ["client", "backend"]).api().build().unwrap();
    let _server = lab.pod("backend").http_server(8080).unwrap();
    let web = ServiceManifest::new("default", "web").cluster_ip("10.96.0.10").port("http", Tcp, 80);
    lab.api().apply(&web).unwrap();
    let clock = lab.directory().join("clock");
    fs::write(&clock, "+0").unwrap();
    let node = lab.node("node1");
    let agent = node
        .spawn_agent_in(
            &[
                ("LD_PRELOAD", "/usr/lib/x86_64-linux-gnu/faketime/libfaketimeMT.so.1"),
                ("FAKETIME_TIMESTAMP_FILE", clock.to_str().unwrap()),
                ("FAKETIME_NO_CACHE", "1"),
                ("FAKETIME_DONT_FAKE_MONOTONIC", "1"),
            ],
            &[],
        )
        .unwrap();
    agent.wait_until_ready().unwrap();
    let now = |node| -> String {
        let answer = get(node, HEALTHZ, "/healthz").unwrap();
        assert_eq!(answer.code, 200, "{}", answer.body);
        serde_json::from_str::<Value>(&answer.body).unwrap()["currentTime"].as_str().unwrap().to_owned()
    };
    let mut days = vec![now(node)];
    for (jump, port) in [("+86400", 8080), ("-172800", 8081), ("+0", 8080)] {
        fs::write(&clock, jump).unwrap();
        let slice = EndpointSliceManifest::new("default", "web")
            .set("/metadata/annotations/endpoints.kubernetes.io~1last-change-trigger-time", "2030-01-01T00:00:00Z")
            .port("http", Tcp, port)
            .pods([lab.pod("backend")]);
        lab.api().apply(&slice).unwrap();
        node.wait_for(&["backend", "list"], "the change is applied", |list| {
            list.to_string().contains(&format!(":{port}\""))
        })
        .unwrap();
        days.push(now(node));
    }
    http_get(lab.pod("client").namespace(), "10.96.0.10:80".parse().unwrap()).unwrap();
    assert!(days[1] > days[0] && days[2] < days[0], "the clock did not jump: {days:?}");
    let page = get(node, METRICS, "/metrics").unwrap();
    assert!(series(&page, "kubeproxy_network_programming_duration_seconds_sum{ip_family=\"IPv4\"}") >= 0.0);
    assert!(!agent.log().contains(" WARN ") && !agent.log().contains(" ERROR "), "{}", agent.log());
}

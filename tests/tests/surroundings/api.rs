//! The API server is away for long: what was known is served on, one line tells, and what was missed comes when it is back.

use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use viaduct_tests::apiserver::Cut;
use viaduct_tests::deadline::SYNC;
use viaduct_tests::{needs_root, scaled, wait_until};

use super::Cluster;

/// As if it were an hour: long after the pauses between attempts have become as long as they get.
const LONG: Duration = Duration::from_secs(25);
/// Long enough to be told.
const SHORT: Duration = Duration::from_secs(6);
/// Until all kinds of objects are asked for again: a server that answers is spared for up to 30 s.
const BACK: Duration = Duration::from_secs(40);

/// Begins and ends a way of being away; what the log says of it.
type Way<'a> = (&'a str, &'a dyn Fn(), &'a dyn Fn(), &'a str, Duration);

#[test]
fn whatever_way_the_api_server_is_away_traffic_goes_on_and_its_changes_come_when_it_is_back() {
    needs_root!();
    let cluster = Cluster::new();
    let api = cluster.lab.api();
    cluster.serve("old", 20, &["backend1"]);
    let agent = cluster.node().start_agent().unwrap();
    cluster.wait_for(&[("web", 2), ("old", 1)]);
    cluster.wait_until_healthy();
    assert_eq!((cluster.metric("viaduct_api_failing_seconds"), cluster.problems().len()), (0.0, 0));
    let traffic = cluster.traffic();
    let ways: &[Way<'_>] = &[
        ("refuses connections", &|| api.stop(), &|| api.start_again().unwrap(), "cannot be asked: ", LONG),
        (
            "500",
            &|| {
                api.refuse(u32::MAX, 500);
                api.cut_watches(Cut::Broken);
            },
            &|| api.refuse(0, 500),
            "(500)",
            SHORT,
        ),
        (
            "401",
            &|| {
                api.set_token("another");
                api.cut_watches(Cut::Ended);
            },
            &|| api.set_token("test-token"),
            "refuses the credentials (401)",
            SHORT,
        ),
        (
            "403",
            &|| {
                api.refuse(u32::MAX, 403);
                api.cut_watches(Cut::Ended);
            },
            &|| api.refuse(0, 403),
            "forbids to list and watch",
            SHORT,
        ),
    ];
    let mut previous = "old".to_owned();
    for (number, (what, begin, end, told, time)) in (0_u8..).zip(ways) {
        println!("{what}");
        let (logged, begun) = (agent.log().len(), Instant::now());
        begin();
        wait_until("the log tells", SYNC, || agent.log()[logged..].contains(told).then_some(())).unwrap();
        // What nobody is told of: one Service comes, another goes.
        let name = format!("service-{number}");
        cluster.serve(&name, 30 + number, &["backend1", "backend2"]);
        cluster.delete(&previous);
        thread::sleep(scaled(*time).saturating_sub(begun.elapsed()));

        let failing = cluster.metric("viaduct_api_failing_seconds");
        assert!((2.0..begun.elapsed().as_secs_f64() + 0.1).contains(&failing), "{failing} s");
        let problems = cluster.problems();
        let (seconds, problem) = &problems[0];
        assert!(problem.contains(told) && problem.contains("serving what was known"), "{problems:?}");
        assert!((seconds - failing).abs() < 2.0, "{problems:?}, not {failing} s");
        assert_eq!(cluster.health(), Some([200, 200]), "the node serves what it knows");
        cluster.wait_for(&[("web", 2), (&previous, if previous == "old" { 1 } else { 2 })]);

        let back = Instant::now();
        end();
        cluster.wait_for(&[("web", 2), (&name, 2)]);
        println!("served {:.1} s after it was back", back.elapsed().as_secs_f64());
        // One whose server cannot be reached tries every 5 s.
        assert!(*time == SHORT || back.elapsed() < scaled(Duration::from_secs(10)));
        wait_until("it recovers", BACK, || (cluster.metric("viaduct_api_failing_seconds") == 0.0).then_some(()))
            .unwrap();
        wait_until("no problem is shown", BACK, || cluster.problems().is_empty().then_some(())).unwrap();
        let log = agent.log()[logged..].to_owned();
        let warnings = log.lines().filter(|line| line.contains(" WARN ") || line.contains(" ERROR ")).count();
        // An answer that names the kind of objects is told for each kind.
        assert!((1..=3).contains(&warnings), "{log}");
        assert!(log.contains("no longer a problem: API server"), "{log}");
        previous = name;
    }
    traffic.assert_unbroken();
    cluster.assert_equals_a_fresh_agent();
}

#[test]
fn an_agent_that_starts_while_the_api_server_is_away_serves_what_the_maps_hold() {
    needs_root!();
    let cluster = Cluster::new();
    let api = cluster.lab.api();
    cluster.node().start_agent().unwrap().kill9().unwrap();
    let traffic = cluster.traffic();
    type Away<'a> = (&'a str, &'a dyn Fn(), &'a dyn Fn());
    let ways: &[Away<'_>] = &[
        ("refuses connections", &|| api.stop(), &|| api.start_again().unwrap()),
        ("never answers", &|| api.pause(), &|| api.resume()),
        ("403", &|| api.refuse(u32::MAX, 403), &|| api.refuse(0, 403)),
        ("401", &|| api.set_token("another"), &|| api.set_token("test-token")),
    ];
    let mut expected = vec![("web".to_owned(), 2)];
    for (number, (what, begin, end)) in (0_u8..).zip(ways) {
        println!("{what}");
        begin();
        let name = format!("service-{number}");
        cluster.serve(&name, 30 + number, &["backend1"]);
        let agent = cluster.node().spawn_agent_with(&[]).unwrap();
        cluster.wait_until_healthy();
        thread::sleep(Duration::from_secs(3));
        assert_eq!(cluster.health(), Some([200, 200]), "what was served before goes on");
        let as_expected: Vec<_> = expected.iter().map(|(name, backends)| (name.as_str(), *backends)).collect();
        cluster.wait_for(&as_expected);
        // And again, for restarts may be many.
        agent.stop().unwrap();
        let agent = cluster.node().spawn_agent_with(&[]).unwrap();
        cluster.wait_until_healthy();
        end();
        agent.wait_until_ready().unwrap();
        expected.push((name, 1));
        let as_expected: Vec<_> = expected.iter().map(|(name, backends)| (name.as_str(), *backends)).collect();
        cluster.wait_for(&as_expected);
        agent.kill9().unwrap();
    }
    traffic.assert_unbroken();
    cluster.assert_equals_a_fresh_agent();
}

/// As when the identity provider is away: it is told, and goes on by itself when the plugin does.
#[test]
fn a_plugin_for_credentials_that_hangs_is_told_and_waited_for() {
    needs_root!();
    let cluster = Cluster::new();
    let folder = cluster.lab.directory();
    let given = folder.join("given");
    let token = r#"{"apiVersion": "client.authentication.k8s.io/v1", "kind": "ExecCredential", "status": {"token": "test-token"}}"#;
    let script = format!("echo >> {0}.asked; until [ -e {0} ]; do sleep 0.1; done; echo '{token}'", given.display());
    let mut kubeconfig: serde_json::Value =
        serde_json::from_str(&fs::read_to_string(folder.join("kubeconfig")).unwrap()).unwrap();
    kubeconfig["users"][0]["user"] = serde_json::json!({"exec": {
        "apiVersion": "client.authentication.k8s.io/v1", "interactiveMode": "Never", "command": "sh", "args": ["-c", script]}});
    let path = folder.join("kubeconfig.exec");
    fs::write(&path, kubeconfig.to_string()).unwrap();
    let agent = cluster.node().spawn_agent_with(&["--kubeconfig", path.to_str().unwrap()]).unwrap();
    wait_until("the log tells", Duration::from_secs(40), || {
        agent.log().contains("the plugin for credentials (kubeconfig) has given none for 30s").then_some(())
    })
    .unwrap();
    // Each kind of objects has another try by now.
    thread::sleep(Duration::from_secs(32));
    assert_eq!(agent.log().matches("has given none").count(), 1, "{}", agent.log());
    assert_eq!(fs::read_to_string(given.with_extension("asked")).unwrap().lines().count(), 3, "one for each kind");
    fs::write(&given, "").unwrap();
    agent.wait_until_ready().unwrap();
    wait_until("no problem is shown", BACK, || cluster.problems().is_empty().then_some(())).unwrap();
}

/// A load balancer must not send traffic to a node that serves nothing yet.
#[test]
fn an_agent_that_has_nothing_to_serve_yet_lives_but_is_not_ready() {
    needs_root!();
    let cluster = Cluster::new();
    cluster.lab.api().stop();
    let _agent = cluster.node().spawn_agent_with(&[]).unwrap();
    wait_until("it answers", SYNC, || cluster.health()).unwrap();
    thread::sleep(Duration::from_secs(3));
    assert_eq!(cluster.health(), Some([503, 200]));
    cluster.lab.api().start_again().unwrap();
    cluster.wait_until_healthy();
    cluster.wait_for(&[("web", 2)]);
}

//! Maps that the agent writes: what finds no room is not served, and everything else is, as it was.

use std::fs;
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use aya::maps::{Array, MapData};
use lb_userspace::dataplane::Pins;
use viaduct_tests::deadline::{AGENT_READY, SYNC};
use viaduct_tests::page::{METRICS, Page};
use viaduct_tests::{needs_root, wait_until};

use crate::{Cluster, assert_lived, told, vip};

/// Services beside the one that is there.
const MORE: u8 = 10;

#[test]
fn services_without_a_frontend_wait_for_room_and_the_others_are_served() {
    check(("--max-frontends", "4", "64"), "FRONTENDS_4", "frontends", 7);
}

#[test]
fn services_without_a_service_port_wait_for_room_and_the_others_are_served() {
    // Two are those of the first service, one of each family.
    check(("--max-service-ports", "4", "64"), "SERVICE_PORTS", "service ports", 8);
}

#[test]
fn services_without_a_backend_wait_for_room_and_the_others_are_served() {
    // One that is left over is too few.
    check(("--max-backends", "8", "64"), "BACKENDS_4", "backends", 7);
}

#[test]
fn services_without_slots_wait_for_room_and_the_others_are_served() {
    // 128 for each of them, which lie together, and one for each family of the first service.
    check(("--max-slots", "1024", "8192"), "SLOTS", "slots", 3);
}

/// `without_room`: how many of the services find none with the first size of a flag.
fn check((flag, small, large): (&str, &str, &str), map: &str, what: &str, without_room: usize) {
    needs_root!();
    let cluster = Cluster::new();
    let agent = cluster.start(&[flag, small]);
    let steady = cluster.steady(20);
    cluster.assert_nothing_is_full();
    for number in 0..MORE {
        cluster.serve_more(number, "None");
    }
    let line = format!("not brought up to date: the node has no {what} left; start the agent with a larger {flag}");
    wait_until("what finds no room is told", SYNC, || (told(&agent, &line) == without_room).then_some(())).unwrap();
    cluster.wait_until_full(map);
    assert_eq!(cluster.map(map)["turned_away"], without_room);
    assert_eq!(cluster.metric("viaduct_shortages"), without_room as f64);
    let served = || (0..MORE).filter(|&number| is_served(&cluster, vip(number))).count();
    assert_eq!(served(), usize::from(MORE) - without_room);

    // Room that is given up goes to one that waits. The others are tried as well, and nothing is told of them again.
    let gone = (0..MORE).find(|&number| is_served(&cluster, vip(number))).unwrap();
    cluster.lab.manifests().delete(&Cluster::more(gone)).unwrap();
    wait_until("another is served", SYNC, || (told(&agent, "no longer a problem: ") > 0).then_some(())).unwrap();
    assert_eq!(served(), usize::from(MORE) - without_room);
    let log = agent.log();
    assert_eq!(log.lines().filter(|told| told.contains("WARN") && told.contains(&line)).count(), without_room, "{log}");
    cluster.serve_more(gone, "None");

    // It is seen without an agent as well, and by one that has larger maps and cannot know yet who needs them.
    agent.stop().unwrap();
    assert_eq!(cluster.map(map)["full"], true);
    let slots = if flag == "--max-slots" { [].as_slice() } else { &["--max-slots", "16384"] };
    let arguments = [&["--server", "http://127.0.0.1:9", flag, large], slots].concat();
    let agent = cluster.node().spawn_agent_with(&arguments).unwrap();
    wait_until("it says what is full", AGENT_READY, || {
        let page = Page::get(cluster.node().namespace(), METRICS, "/metrics").ok()?;
        page.series(&format!("viaduct_map_full{{map=\"{map}\"}}")).ok().filter(|&full| full == 1.0)
    })
    .unwrap();
    assert_eq!(cluster.map(map)["size"].to_string(), large);
    assert_eq!(cluster.map(map)["full"], true);
    agent.stop().unwrap();
    // The next one has room for all.
    let _agent = cluster.start(&[flag, large]);
    assert_eq!(served(), usize::from(MORE));
    cluster.assert_nothing_is_full();
    assert_lived(steady);
}

/// As another version may have left it. Nothing is served by it, so it must be in nobody's way.
#[test]
fn an_account_of_another_size_is_replaced() {
    needs_root!();
    let cluster = Cluster::new();
    cluster.start(&[]).stop().unwrap();
    for (name, entries) in [("TURNED_AWAY", 4), ("TURNED_AWAY", 40), ("PROBLEMS", 1)] {
        let pin = Pins::new(cluster.node().bpffs()).map(name);
        fs::remove_file(&pin).unwrap();
        Array::<MapData, u32>::create(entries, 0).unwrap().pin(&pin).unwrap();
    }
    let agent = cluster.start(&["--max-interfaces", "1"]);
    cluster.wait_until_full("INTERFACES");
    assert!(!agent.log().contains(" ERROR "), "{}", agent.log());
}

/// They are tried again part by part, and this one is of the last.
#[test]
fn a_service_that_finds_room_is_served_behind_many_that_find_none() {
    needs_root!();
    let cluster = Cluster::new();
    // In each family, of which the first service takes one.
    let agent = cluster.start(&["--max-frontends", "20"]);
    let service = |name: &str, number: u16, vip: &str| {
        format!(
            "---\napiVersion: v1\nkind: Service\nmetadata: {{name: {name}{number}}}\nspec: {{clusterIP: '{vip}{number}', \
             ports: [{{port: 80}}]}}\n"
        )
    };
    let write = |small: std::ops::Range<u16>| {
        let many = (0..600).map(|number| service("many", number, "fd00:10:97::"));
        let small = small.map(|number| service("small", number, "10.97.0."));
        cluster.lab.manifests().write("many.yaml", &many.chain(small).collect::<String>()).unwrap();
    };
    let short = |expected: f64| (cluster.metric("viaduct_shortages") == expected).then_some(());
    write(0..20);
    wait_until("581 and one find no room", SYNC, || short(582.0)).unwrap();
    write(1..20);
    wait_until("the one finds room", SYNC, || short(581.0)).unwrap();
    assert_eq!(cluster.map("FRONTENDS_4")["used"], 20);
    assert!(!agent.log().contains(" ERROR "), "{}", agent.log());
}

/// Whether somebody answers there. The lab's servers speak another protocol than HTTP, so a connection has to do.
fn is_served(cluster: &Cluster, vip: SocketAddr) -> bool {
    cluster.client().run(|| TcpStream::connect_timeout(&vip, Duration::from_millis(300))).is_ok()
}

#[test]
fn pods_whose_interfaces_find_no_room_are_served_all_the_same() {
    needs_root!();
    let mut cluster = Cluster::new();
    let agent = cluster.start(&["--max-interfaces", "1"]);
    let steady = cluster.steady(20);
    cluster.wait_until_full("INTERFACES");
    assert_eq!(cluster.map("INTERFACES")["turned_away"], 2);
    let line = "INTERFACES is full, 2 interfaces have no room in it";
    assert_eq!(told(&agent, line), 1, "{}", agent.log());

    cluster.lab.add_pod("node1", "late").unwrap();
    wait_until("the late pod's interface is counted", SYNC, || {
        (cluster.map("INTERFACES")["turned_away"] == 3).then_some(())
    })
    .unwrap();
    let late = cluster.lab.pod("late").namespace();
    late.run(|| TcpStream::connect_timeout(&"10.96.0.10:80".parse().unwrap(), Duration::from_secs(3))).unwrap();
    assert_eq!(told(&agent, "INTERFACES is full"), 1, "{}", agent.log());

    // Room that is given up goes to others.
    for pod in ["late", "other"] {
        cluster.lab.remove_pod(pod).unwrap();
    }
    wait_until("one is left over", SYNC, || (cluster.map("INTERFACES")["turned_away"] == 1).then_some(())).unwrap();
    agent.stop().unwrap();
    let _agent = cluster.start(&["--max-interfaces", "16"]);
    cluster.assert_nothing_is_full();
    assert_eq!(cluster.map("INTERFACES")["used"], 2);
    assert_lived(steady);
}

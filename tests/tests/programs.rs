//! Real programs through a service: no errors, every byte as it was sent, and TCP sends no more segments again than without
//! a service. The programs are Debian's; `cargo xtask setup` installs them.

#![cfg(test)]

use std::fs;
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;
use serde_json::Value;
use viaduct_tests::Protocol::{Tcp, Udp};
use viaduct_tests::{
    EndpointSliceManifest, Family, Lab, Namespace, ServiceManifest, Topology, command, needs_root, wait_until,
};

/// The families that programs speak.
const FAMILIES: [Family; 2] = [Family::V4, Family::V6];
/// Where their clients run.
const CLIENTS: [Client; 2] =
    [("a pod", |lab| lab.pod("client").namespace()), ("a process of the host", |lab| lab.node("node1").namespace())];
/// How often a run through the service may be tried that sends more segments again than one without: a machine that does
/// something else for 200 ms has TCP send some again, but not each time.
const ATTEMPTS: usize = 3;

/// Whom a client is called after, and its namespace.
type Client = (&'static str, fn(&Lab) -> &Namespace);
/// A service port: its name, protocol, port, and the port of its pod.
type Port = (&'static str, viaduct_tests::Protocol, u16, u16);

/// A service of all families with one pod, which is on another node than its clients.
struct Service {
    lab: Lab,
    port: Port,
}

impl Service {
    fn new(ports: &[Port]) -> Self {
        stay_on_one_processor();
        let lab =
            Lab::builder().node("node1", Topology::Routed, ["client"]).node("node2", Topology::Bridge, ["server"]);
        let lab = lab.pcap(false).build().unwrap();
        let mut service = ServiceManifest::new("default", "program");
        for &(name, protocol, port, _) in ports {
            service = service.port(name, protocol, port);
        }
        for family in FAMILIES {
            service = service.cluster_ip(&vip(family).to_string());
            let slice = EndpointSliceManifest::of_family("default", "program", family).pods([lab.pod("server")]);
            let add = |slice: EndpointSliceManifest, port: &Port| slice.port(port.0, port.1, port.3);
            lab.manifests().apply(&ports.iter().fold(slice, add)).unwrap();
        }
        // No segment is sent again only because an acknowledgement took long on this machine.
        for end in CLIENTS.map(|(_, namespace)| namespace(&lab)).into_iter().chain([lab.pod("server").namespace()]) {
            end.run(|| fs::write("/proc/sys/net/ipv4/tcp_early_retrans", "0")).unwrap();
        }
        lab.manifests().apply(&service).unwrap();
        lab.start_agents().unwrap();
        Self { lab, port: ports[0] }
    }

    /// The addresses that the program listens on.
    fn direct(&self) -> [SocketAddr; FAMILIES.len()] {
        FAMILIES.map(|family| SocketAddr::new(self.lab.pod("server").address_of(family), self.port.3))
    }

    fn addresses(&self) -> Vec<String> {
        self.direct().map(|address| address.ip().to_string()).into()
    }

    /// Starts the program behind the service; returns when it accepts connections.
    fn serve(&self, program: &str, arguments: &[&str]) -> Server {
        let namespace = self.lab.pod("server").namespace();
        let mut command = namespace.command(program);
        command.args(arguments).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let child = command.spawn().unwrap_or_else(|error| panic!("{program}: {error}; run `cargo xtask setup`"));
        let server = Server(child);
        for address in self.direct() {
            let connects = || namespace.run(|| TcpStream::connect_timeout(&address, Duration::from_secs(1)).ok());
            wait_until(&format!("{program} listens on {address}"), Duration::from_secs(10), connects).unwrap();
        }
        server
    }

    /// Has each client do the same without and with the service, and compares what TCP had to send again.
    fn each(&self, mut use_it: impl FnMut(&Namespace, SocketAddr)) {
        for ((client, namespace), direct) in CLIENTS.into_iter().flat_map(|client| self.direct().map(|to| (client, to)))
        {
            let (from, family) = (namespace(&self.lab), Family::of(direct.ip()));
            let service = SocketAddr::new(vip(family), self.port.2);
            let mut first_port = 10_000;
            let mut sent_again = |to| {
                // Ports of its own: the server is still closing connections of the run before, which took another way, and
                // of a SYN by the other way it cannot tell that it is newer.
                let ports = format!("{first_port} {}", first_port + 7_999);
                first_port += 8_000;
                from.run(|| fs::write("/proc/sys/net/ipv4/ip_local_port_range", ports)).unwrap();
                let counted = || [from, self.lab.pod("server").namespace()].map(|end| tcp_counter(end, "RetransSegs"));
                let before: u64 = counted().iter().sum();
                use_it(from, to);
                counted().iter().sum::<u64>() - before
            };
            let without = sent_again(direct);
            let is_good = (0..ATTEMPTS).any(|_| {
                let with = sent_again(service);
                println!("{client}, {family:?}: TCP sent {without} segments again, {with} with a service");
                with <= without
            });
            assert!(is_good, "TCP sends more segments again through a service, each time");
        }
    }
}

fn vip(family: Family) -> IpAddr {
    if family == Family::V4 { "10.96.0.10" } else { "fd00:10:96::10" }.parse().unwrap()
}

/// A program that runs until this is dropped.
struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Keeps this thread, and whatever it starts, on one processor: on several, packets of a connection overtake each other on
/// their way, which TCP takes for losses.
fn stay_on_one_processor() {
    let (this, mut one) = (Pid::from_raw(0), CpuSet::new());
    let allowed = sched_getaffinity(this).unwrap();
    one.set((0..CpuSet::count()).find(|&number| allowed.is_set(number).unwrap()).unwrap()).unwrap();
    sched_setaffinity(this, &one).unwrap();
}

/// Runs a client to its end; what it printed.
fn run(command: &mut Command) -> String {
    command::run(command).unwrap_or_else(|error| panic!("{error:#}; what is not installed yet: `cargo xtask setup`"))
}

/// A counter of the line `Tcp:` of /proc/net/snmp, which counts for both families.
fn tcp_counter(namespace: &Namespace, name: &str) -> u64 {
    let text = namespace.run(|| fs::read_to_string("/proc/thread-self/net/snmp")).unwrap();
    let mut lines = text.lines().filter(|line| line.starts_with("Tcp:")).map(str::split_whitespace);
    let (mut names, mut values) = (lines.next().unwrap(), lines.next().unwrap());
    let at = names.position(|found| found == name).unwrap();
    values.nth(at).unwrap().parse().unwrap()
}

const NGINX: &str = "
daemon off;
user root;
worker_processes 1;
pid DIR/pid;
error_log stderr crit;
events { worker_connections 1024; }
http {
    access_log off;
    keepalive_requests 100000;
    client_body_temp_path DIR;
    proxy_temp_path DIR;
    fastcgi_temp_path DIR;
    uwsgi_temp_path DIR;
    scgi_temp_path DIR;
    sendfile on;
    server { LISTEN root DIR/files; }
}
";

#[test]
fn curl_downloads_a_hundred_megabytes_and_keeps_connections_open_with_nginx() {
    needs_root!();
    let service = Service::new(&[("http", Tcp, 80, 8080)]);
    let folder = service.lab.directory().join("nginx");
    let (files, configuration) = (folder.join("files"), folder.join("nginx.conf"));
    fs::create_dir_all(&files).unwrap();
    fs::write(files.join("small"), "small\n").unwrap();
    let large = files.join("large");
    random_file(&large, 100_000_000);
    let listen = service.direct().map(|address| format!("listen {address};")).join(" ");
    let text = NGINX.replace("DIR", folder.to_str().unwrap()).replace("LISTEN", &listen);
    fs::write(&configuration, text).unwrap();
    let _server = service.serve("nginx", &["-c", configuration.to_str().unwrap()]);

    service.each(|from, to| {
        let curl = |arguments: &[&str]| {
            let mut curl = from.command("curl");
            curl.args(["--silent", "--show-error", "--fail", "--globoff", "--max-time", "60"]);
            run(curl.args(arguments))
        };
        let downloaded = folder.join("downloaded");
        curl(&["--output", downloaded.to_str().unwrap(), &format!("http://{to}/large")]);
        run(Command::new("cmp").args([&large, &downloaded]));

        let urls = vec![format!("http://{to}/small"); 500];
        let urls: Vec<_> = urls.iter().map(String::as_str).collect();
        // A line for each answer: its text, and how many connections were opened for it.
        let answers = |more: &[&str]| curl(&[more, &["--write-out", "%{num_connects}\n"], &urls].concat());
        assert_eq!(answers(&[]), format!("small\n1\n{}", "small\n0\n".repeat(499)));
        assert_eq!(answers(&["--header", "Connection: close"]), "small\n1\n".repeat(500));
    });
}

fn random_file(path: &Path, length: u64) {
    let mut random = std::io::Read::take(fs::File::open("/dev/urandom").unwrap(), length);
    std::io::copy(&mut random, &mut fs::File::create(path).unwrap()).unwrap();
}

/// So many addresses that an answer by UDP comes in three fragments.
const ADDRESSES: usize = 200;

#[test]
fn dig_asks_dnsmasq_for_small_and_large_answers() {
    needs_root!();
    let service = Service::new(&[("dns", Udp, 53, 5353), ("dns-tcp", Tcp, 53, 5353)]);
    let hosts = service.lab.directory().join("hosts");
    let many = (0..ADDRESSES).map(|number| format!("198.18.0.{number} many.test\n")).collect::<String>();
    fs::write(&hosts, format!("198.18.1.1 one.test\n{many}")).unwrap();
    let (addresses, hosts) = (service.addresses().join(","), hosts.to_str().unwrap().to_owned());
    let _server = service.serve(
        "dnsmasq",
        &["--keep-in-foreground", "--conf-file=/dev/null", "--no-resolv", "--no-hosts", "--user=root", "--pid-file"]
            .into_iter()
            .chain(["--port=5353", "--edns-packet-max=4096", "--bind-interfaces", "--listen-address", &addresses])
            .chain(["--addn-hosts", &hosts])
            .collect::<Vec<_>>(),
    );
    service.each(|from, to| {
        let (server, port) = (format!("@{}", to.ip()), to.port().to_string());
        for (name, way, answers) in [
            // dig does not fall back to TCP.
            ("one.test", &["+notcp", "+ignore"][..], 1),
            ("one.test", &["+tcp"], 1),
            ("many.test", &["+notcp", "+ignore"], ADDRESSES),
            ("many.test", &["+tcp"], ADDRESSES),
        ] {
            // Each from a socket of its own.
            for _ in 0..20 {
                let mut dig = from.command("dig");
                let options = ["+short", "+tries=1", "+time=5", "+bufsize=4096"];
                let printed = run(dig.args([&server, "-p", &port]).args(options).args(way).args([name, "A"]));
                assert_eq!(printed.lines().count(), answers, "{name} {way:?}: {printed}");
            }
        }
    });
}

#[test]
fn redis_benchmark_has_no_errors_with_redis_server() {
    needs_root!();
    let service = Service::new(&[("redis", Tcp, 6379, 16379)]);
    let addresses = service.addresses();
    let mut arguments = vec!["--port", "16379", "--protected-mode", "no", "--save", "", "--bind"];
    arguments.extend(addresses.iter().map(String::as_str));
    let _server = service.serve("redis-server", &arguments);
    service.each(|from, to| {
        // Connections that stay, pipelines of large values, and a connection for each request.
        for (requests, options) in [("20000", &[][..]), ("20000", &["-P", "16", "-d", "10000"]), ("2000", &["-k", "0"])]
        {
            let mut benchmark = from.command("redis-benchmark");
            benchmark.args(["-h", &to.ip().to_string(), "-p", &to.port().to_string(), "--csv"]);
            let printed = run(benchmark.args(["-t", "set,get", "-c", "50", "-n", requests]).args(options));
            // A heading and a line for each of the two.
            assert_eq!(printed.lines().count(), 3, "{options:?}: {printed}");
        }
    });
}

#[test]
fn iperf3_sends_in_both_directions() {
    needs_root!();
    let service = Service::new(&[("iperf", Tcp, 5201, 15201)]);
    let _server = service.serve("iperf3", &["--server", "--port", "15201"]);
    service.each(|from, to| {
        for direction in [&[][..], &["--reverse"]] {
            // The server takes one client at a time, and may not be through with the one before.
            let report = wait_until("iperf3's server is free", Duration::from_secs(30), || {
                let mut iperf = from.command("iperf3");
                iperf.args(["--client", &to.ip().to_string(), "--port", &to.port().to_string(), "--json"]);
                let printed = run(iperf.args(["--bytes", "500M"]).args(direction));
                let report: Value = serde_json::from_str(&printed).unwrap();
                let is_busy = report["error"].as_str().is_some_and(|error| error.contains("busy"));
                (!is_busy).then_some(report)
            })
            .unwrap();
            // The end of the run is not waited for by the receiver, which has not read all by then.
            let received = &report["end"]["sum_received"];
            assert!(received["bytes"].as_u64().is_some_and(|bytes| bytes > 400_000_000), "{direction:?}: {report}");
            println!("{to} {direction:?}: {:.1} Gbit/s", received["bits_per_second"].as_f64().unwrap() / 1e9);
        }
    });
}

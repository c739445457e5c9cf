//! The demo (`cargo xtask demo`): a cluster of two nodes on this machine, two services, real requests, and who
//! answered them.
//!
//! It exits with 0 only when every request was answered rightly and each service's load is as even as chance allows.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::process::{Command, ExitCode};
use std::time::Instant;

use anyhow::{Context, Result};
use clap::{Parser, ValueEnum};
use nix::sys::signal::{SigSet, Signal};
use serde_json::{Value, json};
use viaduct_tests::statistics::IMPLAUSIBLE;
use viaduct_tests::{Lab, Tally, Topology, agent, bulk_http, bulk_udp, chi_squared, command, report};

/// Send real requests through Viaduct: two nodes, two services, four backends, all on this machine.
#[derive(Parser)]
#[command(name = "viaduct-demo", bin_name = "cargo xtask demo")]
struct Arguments {
    /// Requests per client and service
    #[arg(long, default_value_t = 2000, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    requests: u32,
    /// How the nodes connect their pods
    #[arg(long, value_enum, default_value_t = Connection::Routed)]
    topology: Connection,
    /// Leave everything running afterwards, to look around; Ctrl-C ends it
    #[arg(long, conflicts_with = "json")]
    keep: bool,
    /// Print one JSON report and nothing else on standard output
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum Connection {
    /// A route per pod, as with Calico
    Routed,
    /// A bridge, as with kubenet
    Bridge,
}

const NODES: [&str; 2] = ["node1", "node2"];
const CLIENTS: [&str; 2] = ["client1", "client2"];
/// The backends with their addresses, which the manifests repeat; two per node.
const BACKENDS: [(&str, &str); 4] = [
    ("backend1", "10.244.1.21"),
    ("backend2", "10.244.1.22"),
    ("backend3", "10.244.2.21"),
    ("backend4", "10.244.2.22"),
];
/// What goes into the folder that the agents read.
const MANIFESTS: [(&str, &str); 2] =
    [("web.yaml", include_str!("../../demo/web.yaml")), ("dns.yaml", include_str!("../../demo/dns.yaml"))];
const WEB: (&str, &str) = ("web", "10.96.0.10:80");
const DNS: (&str, &str) = ("dns", "10.96.0.53:53");
const HTTP_PORT: u16 = 8080;
const DNS_PORT: u16 = 5353;
/// How many requests of a client are under way at a time.
const PARALLEL: usize = 8;

/// What one client got from one service.
struct Row {
    service: &'static str,
    client: String,
    tally: Tally,
}

/// Everything that was found out about one service.
struct Verdict {
    service: &'static str,
    address: &'static str,
    counts: Vec<u64>,
    evenness: f64,
    errors: Vec<String>,
}

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> Result<bool> {
    let end = SigSet::from_iter([Signal::SIGINT, Signal::SIGTERM]);
    if arguments.keep {
        // Before any thread starts, so that none of them takes the signal that `wait` below is to get.
        end.thread_block()?;
    }
    agent::binary()?;
    let start = Instant::now();
    let lab = build(arguments.topology)?;
    eprintln!("{} nodes and {} pods are up after {:.1?}", lab.nodes().len(), lab.pods().len(), start.elapsed());
    let mut servers = (Vec::new(), Vec::new());
    for (name, _) in BACKENDS {
        servers.0.push(lab.pod(name).http_server(HTTP_PORT)?);
        servers.1.push(lab.pod(name).udp_server(DNS_PORT)?);
    }
    for (name, text) in MANIFESTS {
        lab.manifests().write(name, text)?;
    }
    let start = Instant::now();
    lab.start_agents()?;
    eprintln!("the agents are ready after {:.1?}; sending requests", start.elapsed());

    let requests = usize::try_from(arguments.requests)?;
    let rows = send_requests(&lab, requests)?;
    let verdicts = [judge(WEB, &rows, &lab), judge(DNS, &rows, &lab)];
    let mut good = verdicts.iter().all(Verdict::is_good);
    if arguments.json {
        println!("{:#}", as_json(requests, &rows, &verdicts, good));
    } else {
        print!("{}", table(&rows, &lab));
        if let Err(error) = show_tables(&lab) {
            println!("{error:#}");
            good = false;
        }
        print_verdict(&verdicts, good);
    }
    if !good {
        lab.fail_report();
    }
    if arguments.keep {
        print_tour(&lab)?;
        end.wait()?;
        eprintln!("removing everything");
    }
    Ok(good)
}

fn build(topology: Connection) -> Result<Lab> {
    let topology = match topology {
        Connection::Routed => Topology::Routed,
        Connection::Bridge => Topology::Bridge,
    };
    let mut lab = Lab::builder().pcap(false);
    for (index, node) in NODES.into_iter().enumerate() {
        let backends = BACKENDS[index * 2..][..2].iter().map(|(name, _)| *name);
        lab = lab.node(node, topology, std::iter::once(CLIENTS[index]).chain(backends));
    }
    for (name, address) in BACKENDS {
        lab = lab.fixed_address(name, address.parse()?);
    }
    lab.build()
}

fn send_requests(lab: &Lab, requests: usize) -> Result<Vec<Row>> {
    let (web, dns): (SocketAddr, SocketAddr) = (WEB.1.parse()?, DNS.1.parse()?);
    let mut rows = Vec::new();
    for client in CLIENTS {
        let from = lab.pod(client).namespace();
        let client = client.to_owned();
        rows.push(Row { service: WEB.0, client: client.clone(), tally: bulk_http(from, web, requests, PARALLEL) });
        rows.push(Row { service: DNS.0, client, tally: bulk_udp(from, dns, requests, PARALLEL) });
    }
    rows.sort_by_key(|row| row.service != WEB.0);
    Ok(rows)
}

/// Sockets of the clients accept answers from the service's address alone; what is left to check is who answered, and
/// whom the backend took for the client.
fn judge((service, address): (&'static str, &'static str), rows: &[Row], lab: &Lab) -> Verdict {
    let mut total = Tally::default();
    let mut errors = Vec::new();
    for row in rows.iter().filter(|row| row.service == service) {
        let own = lab.pod(&row.client).address();
        let others = row.tally.peers.iter().filter(|(peer, _)| **peer != own);
        errors.extend(others.map(|(peer, count)| format!("{count} requests of {} came from {peer}", row.client)));
        total.add(row.tally.clone());
    }
    let strangers = total.backends.keys().filter(|name| BACKENDS.iter().all(|(backend, _)| backend != name));
    errors.extend(strangers.map(|name| format!("'{name}' answered, which is no backend")));
    errors.append(&mut total.errors);
    let counts = total.counts(BACKENDS.map(|(name, _)| name));
    let choices = total.choices(BACKENDS.map(|(name, _)| name));
    Verdict { service, address, evenness: chi_squared(&choices), counts, errors }
}

impl Verdict {
    fn is_good(&self) -> bool {
        self.errors.is_empty() && self.counts.iter().sum::<u64>() > 0 && self.evenness >= IMPLAUSIBLE
    }
}

/// What went wrong, and a closing line.
fn print_verdict(verdicts: &[Verdict], good: bool) {
    for verdict in verdicts {
        verdict.errors.iter().take(10).for_each(|error| println!("{}: {error}", verdict.service));
    }
    let each = verdicts.iter().map(|verdict| {
        let answered = verdict.counts.iter().sum::<u64>();
        let (service, address, errors) = (verdict.service, verdict.address, verdict.errors.len());
        format!("{service} ({address}) {answered} answers, {errors} errors, evenness p = {:.3}", verdict.evenness)
    });
    println!("{}: {}", if good { "good" } else { "NOT GOOD" }, each.collect::<Vec<_>>().join("; "));
}

/// Who answered whom how often, a line per service and client, a column per backend.
fn table(rows: &[Row], lab: &Lab) -> String {
    let on_node = |pod: &str| format!("{pod} ({})", lab.pod(pod).node());
    let mut lines = vec![vec!["SERVICE".to_owned(), "CLIENT".to_owned()]];
    lines[0].extend(BACKENDS.map(|(name, _)| on_node(name)));
    lines[0].extend(["ERRORS".to_owned(), "PER SECOND".to_owned()]);
    for row in rows {
        let mut line = vec![row.service.to_owned(), on_node(&row.client)];
        line.extend(row.tally.counts(BACKENDS.map(|(name, _)| name)).iter().map(u64::to_string));
        line.extend([row.tally.errors.len().to_string(), format!("{:.0}", row.tally.rate())]);
        lines.push(line);
    }
    let widths: Vec<usize> =
        (0..lines[0].len()).map(|column| lines.iter().map(|line| line[column].len()).max().unwrap_or(0)).collect();
    let mut out = String::new();
    for line in &lines {
        for (column, (cell, width)) in line.iter().zip(&widths).enumerate() {
            // Names to the left, numbers to the right.
            let cell = if column < 2 { format!("{cell:<width$}  ") } else { format!("{cell:>width$}  ") };
            out.push_str(&cell);
        }
        out.truncate(out.trim_end().len());
        out.push('\n');
    }
    out
}

/// The service table, as the CLI shows it and as it is in the kernel.
fn show_tables(lab: &Lab) -> Result<()> {
    let node = lab.node(NODES[0]);
    println!("\n# viaduct service list --bpffs {}\n{}", node.bpffs().display(), node.viaduct(&["service", "list"])?);
    let map = report::find(node.bpffs(), "FRONTENDS_4").context("no map FRONTENDS_4 is pinned")?;
    let dump = command::run(Command::new("bpftool").args(["map", "dump", "pinned"]).arg(&map))?;
    println!("# bpftool map dump pinned {}\n{dump}", map.display());
    Ok(())
}

fn as_json(requests: usize, rows: &[Row], verdicts: &[Verdict], good: bool) -> Value {
    let client = |row: &Row| {
        json!({
            "client": row.client,
            "answers": row.tally.backends,
            "errors": row.tally.errors.len(),
            "requests_per_second": row.tally.rate().round(),
        })
    };
    let service = |verdict: &Verdict| {
        let clients = rows.iter().filter(|row| row.service == verdict.service).map(client).collect::<Vec<_>>();
        let answers: BTreeMap<_, _> = BACKENDS.iter().map(|(name, _)| name).zip(&verdict.counts).collect();
        json!({
            "service": verdict.service,
            "address": verdict.address,
            "answers": answers,
            "clients": clients,
            "evenness_p": verdict.evenness,
            "errors": verdict.errors,
            "good": verdict.is_good(),
        })
    };
    let services: Vec<_> = verdicts.iter().map(service).collect();
    json!({ "requests_per_client_and_service": requests, "services": services, "good": good })
}

/// Commands for looking around in a lab that is kept.
fn print_tour(lab: &Lab) -> Result<()> {
    let (node, client) = (lab.node(NODES[0]), lab.pod(CLIENTS[0]));
    let viaduct = agent::binary()?;
    let (viaduct, bpffs) = (viaduct.display(), node.bpffs().display());
    let (inside_node, inside_client) = (node.namespace().path(), client.namespace().path());
    println!("\nEverything runs until you press Ctrl-C. From another shell, as root:");
    println!("  nsenter --net={} {viaduct} status --bpffs {bpffs}", inside_node.display());
    println!("  {viaduct} flow list --bpffs {bpffs}");
    println!("  bpftool map show; ls -R {bpffs}");
    println!("  nsenter --net={} curl -s http://{}/", inside_client.display(), WEB.1);
    println!("  nsenter --net={} tcpdump -ni any", inside_node.display());
    println!("  $EDITOR {}   # the agents watch it", lab.manifests().path().join("web.yaml").display());
    println!("  tail -f {}", node.agent_log().display());
    let address: IpAddr = node.address();
    println!("{} has the address {address}; `ip netns` lists all namespaces, {}-*.", node.name(), lab.name());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::{BACKENDS, DNS, DNS_PORT, HTTP_PORT, MANIFESTS, WEB};

    #[test]
    fn manifests_and_program_agree_on_addresses_and_ports() {
        for ((_, text), (service, port)) in MANIFESTS.iter().zip([(WEB, HTTP_PORT), (DNS, DNS_PORT)]) {
            let (address, service_port) = service.1.split_once(':').unwrap();
            for line in BACKENDS.map(|(_, address)| format!("  - {address}\n")) {
                assert!(text.contains(&line));
            }
            for line in
                [format!("  clusterIP: {address}\n"), format!("    port: {service_port}\n"), format!("port: {port}\n")]
            {
                assert!(text.contains(&line), "{line}");
            }
        }
    }
}

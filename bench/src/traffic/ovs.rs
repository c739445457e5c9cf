//! Open vSwitch's userspace datapath as a node's service proxy, by the design of NSX-T's: one conntrack zone and one select
//! group for each service port, whose bucket commits the connection with its destination translated.
//!
//! Of that design in its plainest form: an established packet is looked up once, translated by conntrack, and sent to its pod.
//! NSX-T's own flows do more for it.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result};
use viaduct_tests::traffic::KubeProxyService;
use viaduct_tests::{Lab, Namespace, Node, command, wait_until};

const SCHEMA: &str = "/usr/share/openvswitch/vswitch.ovsschema";
const BRIDGE: &str = "services";
/// Number of the uplink's port; pods come after.
const UPLINK: usize = 1;
const STARTED: Duration = Duration::from_secs(10);

/// Starts it on a node: the node's interfaces become its ports, and the host forwards no longer. The two daemons are returned.
///
/// # Errors
/// When Open vSwitch is missing, or refuses anything.
pub(super) fn start(lab: &Lab, node: &Node, services: &[KubeProxyService]) -> Result<Vec<Child>> {
    let here = Place { folder: lab.directory().join(format!("ovs-{}", node.name())), node: node.namespace() };
    fs::create_dir(&here.folder)?;
    let database = here.path("conf.db");
    command::run(Command::new("ovsdb-tool").arg("create").arg(&database).arg(SCHEMA))
        .context("cannot make a database for Open vSwitch: apt install openvswitch-switch")?;
    let socket = format!("unix:{}", here.path("db.sock").display());
    let server = here.daemon("ovsdb-server", &[&database.display().to_string(), &format!("--remote=p{socket}")])?;
    wait_until("ovsdb-server listens", STARTED, || here.path("db.sock").exists().then_some(()))?;
    let vsctl = |arguments: &str| {
        let mut vsctl = here.command("ovs-vsctl");
        command::run(vsctl.arg(format!("--db={socket}")).args(arguments.split(' ')))
    };
    vsctl("--no-wait init")?;
    let switch = here.daemon("ovs-vswitchd", &[&socket])?;
    vsctl(&format!("add-br {BRIDGE} -- set bridge {BRIDGE} datapath_type=netdev fail_mode=secure"))?;
    let pods: Vec<_> = lab.pods().iter().filter(|pod| pod.node() == node.name()).collect();
    let interfaces = std::iter::once("eth0").chain(pods.iter().map(|pod| pod.interface()));
    for (port, interface) in interfaces.enumerate() {
        let number = UPLINK + port;
        vsctl(&format!(
            "add-port {BRIDGE} {interface} -- set interface {interface} type=system ofport_request={number}"
        ))?;
    }
    let (mut groups, mut flows) = service_flows(services);
    for (index, pod) in pods.iter().enumerate() {
        let mac = mac(pod.namespace(), "eth0")?;
        let port = UPLINK + 1 + index;
        writeln!(flows, "table=2,priority=10,ip,nw_dst={} actions=mod_dl_dst:{mac},output:{port}", pod.address())?;
    }
    let (own, next) = (mac(node.namespace(), "eth0")?, mac(lab.fabric(), node.name())?);
    writeln!(flows, "table=2,priority=0,ip actions=mod_dl_src:{own},mod_dl_dst:{next},output:{UPLINK}")?;
    let ofctl = |what: &str, text: &mut String| {
        let mut ofctl = here.command("ovs-ofctl");
        ofctl.args(["-O", "OpenFlow15", what]).arg(format!("unix:{}", here.path(&format!("{BRIDGE}.mgmt")).display()));
        command::run_with_input(ofctl.arg("-"), text)
    };
    ofctl("add-groups", &mut groups)?;
    ofctl("add-flows", &mut flows)?;
    // The host's stack sees the packets too, and would forward them a second time.
    here.node.run(|| fs::write("/proc/sys/net/ipv4/ip_forward", "0"))?;
    Ok(vec![server, switch])
}

/// Groups and flows of all services, in the text of ovs-ofctl.
fn service_flows(services: &[KubeProxyService]) -> (String, String) {
    let mut flows = String::from(
        "table=0,priority=10,ip actions=ct(zone=1,nat,table=1)
table=1,priority=20,ct_state=+trk+est,ip actions=resubmit(,2)
table=1,priority=0,ip actions=resubmit(,2)
",
    );
    let mut groups = String::new();
    for (number, service) in (1..).zip(services) {
        let KubeProxyService { vip, endpoints, .. } = service;
        let buckets =
            endpoints.iter().map(|endpoint| format!(",bucket=actions=ct(commit,zone=1,table=2,nat(dst={endpoint}))"));
        let buckets: String = buckets.collect();
        let add = |text: &mut String, line: std::fmt::Arguments<'_>| writeln!(text, "{line}").expect("memory");
        add(&mut groups, format_args!("group_id={number},type=select{buckets}"));
        let (protocol, address, port) = (service.protocol(), vip.ip(), vip.port());
        let at = format!("{protocol},nw_dst={address},tp_dst={port}");
        add(&mut flows, format_args!("table=1,priority=10,ct_state=+trk+new,{at} actions=group:{number}"));
    }
    (groups, flows)
}

/// Where one node's daemons are.
struct Place<'a> {
    folder: PathBuf,
    node: &'a Namespace,
}

impl Place<'_> {
    fn path(&self, file: &str) -> PathBuf {
        self.folder.join(file)
    }

    fn command(&self, program: &str) -> Command {
        let mut command = self.node.command(program);
        command.env("OVS_RUNDIR", &self.folder).env("OVS_LOGDIR", &self.folder).env("OVS_DBDIR", &self.folder);
        command
    }

    fn daemon(&self, program: &str, arguments: &[&str]) -> Result<Child> {
        let mut daemon = self.command(program);
        daemon.args(arguments).args(["--pidfile", "--log-file", "-vconsole:off"]);
        daemon.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        daemon.spawn().with_context(|| format!("cannot start {program}: apt install openvswitch-switch"))
    }
}

fn mac(namespace: &Namespace, interface: &str) -> Result<String> {
    let links = namespace.ip(&format!("-json link show dev {interface}"))?;
    let links: serde_json::Value = serde_json::from_str(&links)?;
    links[0]["address"].as_str().map(str::to_owned).with_context(|| format!("{interface} has no address"))
}

/// Why it cannot be measured here.
pub(super) fn missing() -> Option<String> {
    (!Path::new(SCHEMA).exists()).then(|| "Open vSwitch is not installed: apt install openvswitch-switch".to_owned())
}

//! The BPF file system is unmounted under the agent. All of this in mount namespaces of the test's own.

use std::fs;
use std::path::PathBuf;
use std::process::{Child, Stdio};

use lb_userspace::dataplane::attach;
use viaduct_tests::deadline::SYNC;
use viaduct_tests::{Agent, Namespace, command, needs_root, wait_until};

use super::{Cluster, Traffic, WEB, answers};

/// A mount namespace with a BPF file system that nobody else sees.
struct Mounts {
    keeper: Child,
    folder: PathBuf,
    namespace: Namespace,
}

impl Mounts {
    fn new(cluster: &Cluster) -> Self {
        let folder = cluster.lab.directory().join("bpf");
        fs::create_dir(&folder).unwrap();
        let namespace = cluster.node().namespace().clone();
        let mut keeper = namespace.command("unshare");
        keeper.args(["--mount", "--propagation", "private", "sleep", "infinity"]).stdin(Stdio::null());
        let mounts = Self { keeper: keeper.spawn().unwrap(), folder, namespace };
        let own = fs::read_link("/proc/self/ns/mnt").unwrap();
        let kept = format!("/proc/{}/ns/mnt", mounts.keeper.id());
        wait_until("it is another mount namespace", SYNC, || fs::read_link(&kept).ok().filter(|kept| *kept != own))
            .unwrap();
        mounts.mount();
        mounts
    }

    fn run(&self, program: &str, arguments: &[&str]) -> anyhow::Result<String> {
        let mut enter = self.namespace.command("nsenter");
        enter.arg(format!("--mount=/proc/{}/ns/mnt", self.keeper.id())).arg(program);
        command::run(enter.args(arguments))
    }

    fn mount(&self) {
        self.run("mount", &["-t", "bpf", "bpf", self.folder.to_str().unwrap()]).unwrap();
    }

    fn unmount(&self, how: &[&str]) -> anyhow::Result<String> {
        self.run("umount", &[how, &[self.folder.to_str().unwrap()]].concat())
    }

    fn root(&self) -> String {
        self.folder.join("viaduct").display().to_string()
    }

    fn start(&self, cluster: &Cluster) -> Agent {
        let script = format!("exec nsenter --mount=/proc/{}/ns/mnt VIADUCT \"$@\"", self.keeper.id());
        let agent = cluster.agent_by(&script, &["--bpffs", &self.root()]);
        agent.wait_until_ready().unwrap();
        agent
    }

    fn viaduct(&self, arguments: &[&str]) -> anyhow::Result<String> {
        let viaduct = viaduct_tests::agent::binary()?;
        self.run(viaduct.to_str().unwrap(), &[arguments, &["--bpffs", &self.root()]].concat())
    }

    /// Names of all pins.
    fn pins(&self) -> Vec<String> {
        let found = self.run("find", &[&self.root(), "-type", "f", "-printf", "%P\\n"]).unwrap();
        let mut pins: Vec<_> = found.lines().map(str::to_owned).collect();
        pins.sort();
        pins
    }
}

impl Drop for Mounts {
    fn drop(&mut self) {
        let _ = self.keeper.kill();
        let _ = self.keeper.wait();
    }
}

#[test]
fn pins_whose_file_system_is_unmounted_are_put_back_and_no_packet_notices() {
    needs_root!();
    let mut cluster = Cluster::new();
    let mounts = Mounts::new(&cluster);
    let agent = mounts.start(&cluster);
    let before = mounts.pins();
    let error = format!("{:#}", mounts.unmount(&[]).expect_err("the agent's lock is in the way"));
    assert!(error.contains("target is busy"), "{error}");
    let traffic = Traffic::start(&[cluster.lab.pod("client").namespace(), cluster.node().namespace()]);

    // Detached, it goes with its last user.
    mounts.unmount(&["--lazy"]).unwrap();
    wait_until("the log tells", SYNC, || agent.log().contains("was unmounted").then_some(())).unwrap();
    assert_eq!((cluster.metric("viaduct_pins_lost"), cluster.health()), (1.0, Some([200, 200])));
    let error = format!("{:#}", mounts.viaduct(&["status"]).expect_err("there is nothing to read"));
    assert!(error.contains("is not on a BPF file system: run `mount -t bpf bpf /sys/fs/bpf`"), "{error}");
    // Life goes on: pods and services come and go.
    cluster.lab.add_pod("node1", "late").unwrap();
    let late = cluster.lab.pod("late").namespace().clone();
    wait_until("the pod is served", SYNC, || answers(&late, WEB).then_some(())).unwrap();
    cluster.serve("new", 20, &["backend2"]);
    wait_until("the service is served", SYNC, || answers(&late, 20).then_some(())).unwrap();
    cluster.lab.remove_pod("late").unwrap();
    wait_until("it is forgotten", SYNC, || agent.log().contains("interface forgotten").then_some(())).unwrap();

    mounts.mount();
    wait_until("the pins are back", SYNC, || agent.log().contains("everything is pinned there again").then_some(()))
        .unwrap();
    assert_eq!(mounts.pins(), before);
    assert_eq!(cluster.metric("viaduct_pins_lost"), 0.0);
    let warnings: Vec<_> = agent.log().lines().filter(|line| line.contains(" WARN ")).map(str::to_owned).collect();
    assert_eq!(warnings.len(), 1, "{warnings:?}");
    assert!(!agent.log().contains(" ERROR "), "{}", agent.log());
    let status = mounts.viaduct(&["status"]).unwrap();
    assert!(status.contains("Agent:      running (pid") && status.contains("2 interfaces"), "{status}");

    // Another one mounted over it is the same.
    mounts.mount();
    wait_until("the pins are back", SYNC, || {
        (agent.log().matches("everything is pinned there again").count() == 2).then_some(())
    })
    .unwrap();
    assert_eq!(mounts.pins(), before);

    // They hold the datapath again, and the next agent adopts it.
    agent.kill9().unwrap();
    std::thread::sleep(std::time::Duration::from_secs(1));
    let agent = mounts.start(&cluster);
    assert_eq!(mounts.pins(), before);
    traffic.assert_unbroken();
    agent.stop().unwrap();
    mounts.viaduct(&["cleanup"]).unwrap();
}

/// The limit of it: links live as long as somebody holds them.
#[test]
fn what_is_unmounted_ends_with_the_agent_and_the_next_one_begins_anew() {
    needs_root!();
    let cluster = Cluster::new();
    let mounts = Mounts::new(&cluster);
    let agent = mounts.start(&cluster);
    assert!(answers(cluster.client(), WEB));
    mounts.unmount(&["--lazy"]).unwrap();
    wait_until("the log tells", SYNC, || agent.log().contains("was unmounted").then_some(())).unwrap();
    assert!(answers(cluster.client(), WEB));
    let log = agent.stop().unwrap().log;
    assert!(log.contains("so the datapath ends with the agent"), "{log}");
    wait_until("nobody serves it", SYNC, || (!answers(cluster.client(), WEB)).then_some(())).unwrap();
    mounts.mount();
    let _agent = mounts.start(&cluster);
    assert!(answers(cluster.client(), WEB));
}

/// Nothing but a new agent attaches what the kernel has detached, so the agent makes room for it, however little was removed.
#[test]
fn an_agent_whose_pins_somebody_removes_ends_and_the_next_one_attaches_anew() {
    needs_root!();
    let cluster = Cluster::new();
    let root = cluster.node().bpffs();
    let datapath = cluster.pins().layout();
    for removed in [root.to_owned(), datapath.clone(), datapath.join("links"), datapath.join("sockets")] {
        let agent = cluster.node().start_agent().unwrap();
        assert!(!attach::attached(&cluster.pins()).is_empty());
        fs::remove_dir_all(&removed).unwrap();
        let stat = format!("/proc/{}/stat", agent.pid());
        wait_until("the agent has ended", SYNC, || fs::read_to_string(&stat).unwrap().contains(") Z ").then_some(()))
            .unwrap();
        let log = agent.log();
        let errors: Vec<_> = log.lines().filter(|line| line.contains(" ERROR ") || line.contains(" WARN ")).collect();
        assert!(errors.len() == 1 && errors[0].contains("this agent ends"), "{}: {errors:?}", removed.display());
        // Its last threads may still be about to end.
        let ended = agent.stop().map_or_else(|error| format!("{error:#}"), |stopped| stopped.status.to_string());
        assert!(ended.contains("exit status: 1"), "{ended}");
    }
    let _agent = cluster.node().start_agent().unwrap();
    assert!(answers(cluster.client(), WEB));
}

//! The container image, run as kubelet has it run: as a container with the capabilities of the DaemonSet, a read-only root and
//! the node's network namespace. `cargo xtask image --test` builds the image and names it to this test.

#![cfg(test)]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::{Value, json};
use viaduct_tests::Protocol::Tcp;
use viaduct_tests::deadline::AGENT_READY;
use viaduct_tests::{
    EndpointSliceManifest, Lab, ServiceManifest, Topology, command, daemonset, http_get, needs_root, wait_until,
};

const WEB: &str = "10.96.0.10:80";

#[test]
fn the_image_says_its_version_serves_and_is_replaced_without_a_gap() {
    needs_root!();
    let Some(archive) = std::env::var_os("VIADUCT_IMAGE").map(PathBuf::from) else {
        println!(
            "SKIPPED the_image_says_its_version_serves_and_is_replaced_without_a_gap: needs an image: cargo xtask image --test"
        );
        return;
    };
    let lab = Lab::builder().node("node1", Topology::Routed, ["client", "web"]).build().unwrap();
    let (node, client) = (lab.node("node1"), lab.pod("client").namespace());
    let _server = lab.pod("web").http_server(8080).unwrap();
    let web = ServiceManifest::new("default", "web").cluster_ip("10.96.0.10").port("http", Tcp, 80);
    lab.manifests().apply(&web).unwrap();
    let slice = EndpointSliceManifest::new("default", "web").port("http", Tcp, 8080).pods([lab.pod("web")]);
    lab.manifests().apply(&slice).unwrap();
    let serves = || assert_eq!(http_get(client, WEB.parse().unwrap()).unwrap().backend, "web");

    let image = Image::unpack(&archive, &lab.directory().join("image"));
    let bpffs = node.bpffs().to_str().unwrap();
    let container = |name: &'static str, arguments: &[&str]| {
        Container::start(&image, &lab, name, &[arguments, &["--bpffs", bpffs]].concat())
    };
    let version = container("version", &["--version"]);
    wait_until("the version is printed", AGENT_READY, || version.log().contains("viaduct ").then_some(())).unwrap();
    assert!(version.log().starts_with(concat!("viaduct ", env!("CARGO_PKG_VERSION"))), "{}", version.log());

    let agent = ["agent", "--manifests", "/manifests", "--hostname-override", "node1", "--pod-interfaces", "veth*"];
    for name in ["first", "second"] {
        let running = container(name, &agent);
        wait_until("the agent is ready", AGENT_READY, || running.log().contains(" ready ").then_some(()))
            .unwrap_or_else(|error| panic!("{error:#}\n{}", running.log()));
        serves();
        // As kubelet's probes ask.
        for path in ["livez", "healthz"] {
            let url = format!("http://127.0.0.1:10256/{path}");
            command::run(node.namespace().command("curl").args(["--silent", "--show-error", "--fail", &url])).unwrap();
        }
        let services = running.execute(&["viaduct", "service", "list", "--bpffs", bpffs]);
        assert!(services.contains(WEB), "{services}");
        drop(running);
        serves();
    }
}

/// The files of an image, and what it runs.
struct Image {
    root: PathBuf,
    entrypoint: Vec<Value>,
    environment: Value,
}

impl Image {
    /// Of an OCI archive with one layer.
    fn unpack(archive: &Path, folder: &Path) -> Self {
        let root = folder.join("root");
        fs::create_dir_all(&root).unwrap();
        command::run(Command::new("tar").arg("-C").arg(folder).arg("-xf").arg(archive)).unwrap();
        let read = |path: PathBuf| -> Value { serde_json::from_slice(&fs::read(path).unwrap()).unwrap() };
        let blob =
            |descriptor: &Value| folder.join("blobs").join(descriptor["digest"].as_str().unwrap().replace(':', "/"));
        let manifest = read(blob(&read(folder.join("index.json"))["manifests"][0]));
        let layers = manifest["layers"].as_array().unwrap();
        assert_eq!(layers.len(), 1, "{manifest}");
        command::run(Command::new("tar").arg("-C").arg(&root).arg("-xzf").arg(blob(&layers[0]))).unwrap();
        let config = read(blob(&manifest["config"]))["config"].take();
        let entrypoint = config["Entrypoint"].as_array().unwrap().clone();
        Self { root, entrypoint, environment: config["Env"].clone() }
    }
}

/// A container of runc, which is killed and removed with this handle.
struct Container {
    state: PathBuf,
    name: &'static str,
    log: PathBuf,
}

impl Container {
    fn start(image: &Image, lab: &Lab, name: &'static str, arguments: &[&str]) -> Self {
        let bundle = lab.directory().join(name);
        fs::create_dir(&bundle).unwrap();
        let arguments: Vec<_> =
            image.entrypoint.iter().cloned().chain(arguments.iter().map(|word| json!(word))).collect();
        let capabilities: Vec<_> =
            daemonset::capabilities().unwrap().iter().map(|name| format!("CAP_{name}")).collect();
        let bind = |from: &Path, to: &str, mode: &str| json!({"destination": to, "type": "none", "source": from, "options": ["rbind", mode]});
        let network = lab.node("node1").namespace().path();
        let namespaces = json!([
            {"type": "pid"}, {"type": "mount"}, {"type": "ipc"}, {"type": "uts"}, {"type": "network", "path": network}
        ]);
        let spec = json!({
            "ociVersion": "1.0.2",
            "process": {
                "user": {"uid": 0, "gid": 0},
                "args": arguments,
                "env": image.environment,
                "cwd": "/",
                "noNewPrivileges": true,
                "capabilities": {"bounding": capabilities, "effective": capabilities, "permitted": capabilities},
            },
            "root": {"path": image.root, "readonly": true},
            "mounts": [
                {"destination": "/proc", "type": "proc", "source": "proc"},
                {"destination": "/dev", "type": "tmpfs", "source": "tmpfs"},
                bind(Path::new("/sys"), "/sys", "ro"),
                bind(Path::new("/sys/fs/bpf"), "/sys/fs/bpf", "rw"),
                bind(lab.manifests().path(), "/manifests", "ro"),
            ],
            "linux": {"namespaces": namespaces},
        });
        fs::write(bundle.join("config.json"), spec.to_string()).unwrap();
        let container = Self { state: lab.directory().join("runc"), name, log: bundle.join("log") };
        let log = fs::File::create(&container.log).unwrap();
        let mut runc = container.runc(&["run", "--detach", "--bundle"]);
        runc.arg(&bundle).arg(container.id()).stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log);
        let status = runc.status().unwrap();
        assert!(status.success(), "runc ended with {status}: {}", container.log());
        container
    }

    /// Runs a program of the image in the container, as `kubectl exec` does.
    fn execute(&self, arguments: &[&str]) -> String {
        command::run(self.runc(&["exec"]).arg(self.id()).args(arguments)).unwrap()
    }

    fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap()
    }

    /// Known on the whole machine, by its control group.
    fn id(&self) -> String {
        format!("viaduct-{}-{}", std::process::id(), self.name)
    }

    fn runc(&self, arguments: &[&str]) -> Command {
        let mut runc = Command::new("runc");
        runc.arg("--root").arg(&self.state).args(arguments);
        runc
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        let _ = command::run(self.runc(&["delete", "--force"]).arg(self.id()));
    }
}

//! The container image, run as kubelet has it run: as a container with the capabilities of the DaemonSet, a read-only root and
//! the node's network namespace, with configuration and service account as files, and an API server. `cargo xtask image --test` builds the image and names it to this test.

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
const EXAMPLE_SERVER: &str = "https://api.example.com:6443";

#[test]
fn the_image_says_its_version_serves_and_is_replaced_without_a_gap() {
    needs_root!();
    let Some(archive) = std::env::var_os("VIADUCT_IMAGE").map(PathBuf::from) else {
        println!(
            "SKIPPED the_image_says_its_version_serves_and_is_replaced_without_a_gap: needs an image: cargo xtask image --test"
        );
        return;
    };
    let lab = Lab::builder().node("node1", Topology::Routed, ["client", "web"]).api().build().unwrap();
    let (node, client) = (lab.node("node1"), lab.pod("client").namespace());
    let _server = lab.pod("web").http_server(8080).unwrap();
    let web = ServiceManifest::new("default", "web").cluster_ip("10.96.0.10").port("http", Tcp, 80);
    lab.api().apply(&web).unwrap();
    let slice = EndpointSliceManifest::new("default", "web").port("http", Tcp, 8080).pods([lab.pod("web")]);
    lab.api().apply(&slice).unwrap();
    let serves = || assert_eq!(http_get(client, WEB.parse().unwrap()).unwrap().backend, "web");

    let image = Image::unpack(&archive, &lab.directory().join("image"));
    write_configuration(&lab);
    let container = |name: &'static str, arguments: &[String]| Container::start(&image, &lab, name, arguments);
    let version = container("version", &["--version".to_owned()]);
    wait_until("the version is printed", AGENT_READY, || version.log().contains("viaduct ").then_some(())).unwrap();
    assert!(version.log().starts_with(concat!("viaduct ", env!("CARGO_PKG_VERSION"))), "{}", version.log());

    let (agent, bpffs) = (daemonset::arguments("node1").unwrap(), node.bpffs().to_str().unwrap());
    for name in ["first", "second"] {
        let running = container(name, &agent);
        wait_until("the agent is ready", AGENT_READY, || running.log().contains("\"ready\"").then_some(()))
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

/// The ConfigMap of the example, with the API server and the pins of the lab, and what kubelet mounts of a service account.
fn write_configuration(lab: &Lab) {
    let (config, account) = (lab.directory().join("config"), lab.directory().join("account"));
    fs::create_dir(&config).unwrap();
    fs::create_dir(&account).unwrap();
    let example = concat!(env!("CARGO_MANIFEST_DIR"), "/../deploy/kustomize/example/config.yaml");
    let example = fs::read_to_string(example).unwrap();
    assert!(example.contains(EXAMPLE_SERVER), "{example}");
    let options = example.replace(EXAMPLE_SERVER, &lab.api().url());
    let bpffs = lab.node("node1").bpffs().display();
    fs::write(config.join("config.yaml"), format!("{options}bpffs: {bpffs}\n")).unwrap();
    fs::write(account.join("ca.crt"), lab.api().ca_pem()).unwrap();
    fs::write(account.join("token"), lab.api().token().unwrap()).unwrap();
    fs::write(account.join("namespace"), "viaduct-system").unwrap();
}

/// The files of an image, and what it runs.
struct Image {
    root: PathBuf,
    entrypoint: Vec<Value>,
    environment: Vec<Value>,
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
        let list = |name: &str| config[name].as_array().unwrap().clone();
        Self { root, entrypoint: list("Entrypoint"), environment: list("Env") }
    }
}

/// A container of runc, which is killed and removed with this handle.
struct Container {
    state: PathBuf,
    name: &'static str,
    log: PathBuf,
}

impl Container {
    fn start(image: &Image, lab: &Lab, name: &'static str, arguments: &[String]) -> Self {
        let bundle = lab.directory().join(name);
        fs::create_dir(&bundle).unwrap();
        let arguments: Vec<_> =
            image.entrypoint.iter().cloned().chain(arguments.iter().map(|word| json!(word))).collect();
        let capabilities: Vec<_> =
            daemonset::capabilities().unwrap().iter().map(|name| format!("CAP_{name}")).collect();
        let bind = |from: &Path, to: &str, mode: &str| json!({"destination": to, "type": "none", "source": from, "options": ["rbind", mode]});
        // kubelet names the API server's VIP to every pod; nothing answers there.
        let of_kubelet = [json!("KUBERNETES_SERVICE_HOST=10.96.0.1"), json!("KUBERNETES_SERVICE_PORT=443")];
        let environment = [image.environment.as_slice(), &of_kubelet].concat();
        let network = lab.node("node1").namespace().path();
        let namespaces = json!([
            {"type": "pid"}, {"type": "mount"}, {"type": "ipc"}, {"type": "uts"}, {"type": "network", "path": network}
        ]);
        let spec = json!({
            "ociVersion": "1.0.2",
            "process": {
                "user": {"uid": 0, "gid": 0},
                "args": arguments,
                "env": environment,
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
                bind(&lab.directory().join("config"), "/etc/viaduct", "ro"),
                bind(&lab.directory().join("account"), "/var/run/secrets/kubernetes.io/serviceaccount", "ro"),
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

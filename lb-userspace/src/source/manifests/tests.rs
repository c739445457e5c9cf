//! Real files in real folders.

use std::fmt::Write as _;
use std::os::unix::fs::symlink;
use std::time::Instant;

use super::*;
use crate::model::Model;
use crate::plan::plan;

/// Endpoints of a large cluster. Parsing takes twenty times as long without optimization.
const MANY: u32 = if cfg!(debug_assertions) { 10_000 } else { 100_000 };

/// A folder with files, and its reader.
struct Lab {
    dir: tempfile::TempDir,
    folder: Folder,
}

impl Lab {
    fn new(files: &[(&str, &str)]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let folder = Folder::new(dir.path());
        let lab = Self { dir, folder };
        files.iter().for_each(|(name, text)| lab.write(name, text));
        lab
    }

    fn write(&self, name: &str, text: impl AsRef<[u8]>) {
        fs::write(self.dir.path().join(name), text).unwrap();
    }

    fn remove(&self, name: &str) {
        fs::remove_file(self.dir.path().join(name)).unwrap();
    }

    /// Reads, and returns the names of the objects and the problems, with the folder called `demo`.
    fn read(&mut self) -> (Vec<String>, Vec<String>) {
        let snapshot = self.folder.read();
        let services = snapshot.services.iter().map(|service| format!("{}", service.name));
        let slices = snapshot.slices.iter().map(|slice| format!("slice {}", slice.name));
        let folder = self.dir.path().to_str().unwrap();
        let problems = snapshot.problems.iter().map(|problem| problem.to_string().replace(folder, "demo"));
        (services.chain(slices).collect(), problems.collect())
    }
}

fn service(name: &str, address: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Service\nmetadata:\n  name: {name}\nspec:\n  clusterIP: {address}\n  ports:\n  - port: 80\n"
    )
}

fn slice(name: &str, endpoints: impl IntoIterator<Item = u32>) -> String {
    let mut text = format!(
        "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata:\n  name: {name}\n  labels:\n    \
         kubernetes.io/service-name: web\naddressType: IPv4\nports:\n- name: \"\"\n  port: 8080\n  protocol: TCP\n\
         endpoints:\n"
    );
    for n in endpoints {
        let address = std::net::Ipv4Addr::from(0x0a10_0000 + n);
        write!(
            text,
            "- addresses:\n  - {address}\n  conditions:\n    ready: true\n    serving: true\n    terminating: false\n  \
             nodeName: node-{}\n  targetRef:\n    kind: Pod\n    name: web-{n}\n    namespace: default\n",
            n % 100
        )
        .unwrap();
    }
    text
}

#[track_caller]
fn expect(lab: &mut Lab, objects: &[&str], problems: &[&str]) {
    let (found, told) = lab.read();
    assert_eq!(told, problems);
    assert_eq!(found, objects);
}

#[test]
fn manifests_are_read_in_the_order_of_their_names_and_other_files_are_not() {
    let (a, b, c, bad) =
        (service("a", "10.0.0.1"), service("b", "10.0.0.2"), service("c", "10.0.0.3"), "not a manifest {");
    let json = r#"{"apiVersion": "v1", "kind": "Service", "metadata": {"name": "d"},
        "spec": {"clusterIP": "10.0.0.4", "ports": [{"port": 80}]}}"#;
    let mut lab = Lab::new(&[
        ("2.yml", &a),
        ("1.yaml", &format!("{b}---\n{c}")),
        ("3.json", json),
        ("README.md", bad),
        (".hidden.yaml", bad),
        ("4.yaml.bak", bad),
        ("empty.yaml", ""),
        ("comments.yaml", "# nothing\n---\n# here\n"),
    ]);
    expect(&mut lab, &["default/b", "default/c", "default/a", "default/d"], &[]);
}

#[test]
fn a_broken_document_leaves_the_others_in_its_file_alone() {
    let text = format!("{}---\nkind: Service\n  bad: [\n---\n{}", service("a", "10.0.0.1"), service("b", "10.0.0.2"));
    let mut lab = Lab::new(&[("web.yaml", &text)]);
    expect(
        &mut lab,
        &["default/a", "default/b"],
        &["demo/web.yaml:11: cannot parse this document: mapping values are not allowed in this context"],
    );
}

#[test]
fn what_is_not_read_is_one_line_each() {
    let text = "apiVersion: apps/v1\nkind: Deployment\nmetadata:\n  name: web\n  namespace: shop\nspec:\n  selector:\n    \
                matchLabels: {app: web}\n---\n# old\napiVersion: discovery.k8s.io/v1beta1\nkind: EndpointSlice\n\
                metadata: {name: web-1}\n---\nkind: Service\n---\napiVersion: v1\n---\njust text\n---\n- 1\n";
    let mut lab = Lab::new(&[("web.yaml", &format!("{text}---\n{}", service("a", "10.0.0.1")))]);
    let read = "read are Service (v1), EndpointSlice (discovery.k8s.io/v1) and lists of them";
    let expected = [
        format!("demo/web.yaml:1: Deployment shop/web: apps/v1 Deployment is not served; {read}"),
        format!(
            "demo/web.yaml:11: EndpointSlice default/web-1: discovery.k8s.io/v1beta1 EndpointSlice is not served; {read}"
        ),
        format!("demo/web.yaml:15: apiVersion: is missing; {read}"),
        format!("demo/web.yaml:17: kind: is missing; {read}"),
        "demo/web.yaml:19: cannot parse this document: expected mapping start".into(),
        "demo/web.yaml:21: cannot parse this document: expected mapping start".into(),
    ];
    expect(&mut lab, &["default/a"], &expected.each_ref().map(String::as_str));
}

#[test]
fn a_bad_field_is_told_with_its_place_and_the_rest_works() {
    let ports = service("a", "10.0.0.1")
        .replace("  - port: 80\n", "  - {name: a, port: 0}\n  - {name: b, port: 70000}\n  - {name: c, port: 80}\n");
    let endpoints = slice("web-1", [1, 2]).replace("10.16.0.1", "fd00::1");
    let typed = service("b", "10.0.0.2").replace("port: 80", "port: eighty");
    let unnamed = service("", "10.0.0.3");
    let mut lab =
        Lab::new(&[("web.yaml", &[ports, endpoints, typed, unnamed, service("c", "10.0.0.4")].join("---\n"))]);
    expect(
        &mut lab,
        &["default/a", "default/c", "slice default/web-1"],
        &[
            "demo/web.yaml:1: Service default/a: spec.ports[0].port: 0 is not a port; use 1 to 65535",
            "demo/web.yaml:1: Service default/a: spec.ports[1].port: 70000 is not a port; use 1 to 65535",
            "demo/web.yaml:12: EndpointSlice default/web-1: endpoints[0].addresses[0]: fd00::1 is an IPv6 address in a \
             slice of addressType IPv4",
            "demo/web.yaml:47: Service default/b: spec.ports[0].port: invalid type: string \"eighty\", expected i32",
            "demo/web.yaml:56: Service: metadata.name: is missing",
        ],
    );
    let web = lab.folder.read();
    assert_eq!(web.slices[0].endpoints.len(), 1);
    assert_eq!(web.services[0].ports.len(), 1);
}

#[test]
fn what_only_an_api_server_would_fill_in_is_told() {
    let no_address = service("a", "\"\"");
    let no_service = slice("web-1", [1]).replace("kubernetes.io/service-name", "app");
    let headless = service("b", "None");
    let mut lab = Lab::new(&[("web.yaml", &[no_address, no_service, headless].join("---\n"))]);
    expect(
        &mut lab,
        &[],
        &[
            "demo/web.yaml:1: Service default/a: spec.clusterIP: is missing, and nothing allocates one here; write an \
             address",
            "demo/web.yaml:10: EndpointSlice default/web-1: metadata.labels: kubernetes.io/service-name is missing; set \
             it to the name of the Service",
        ],
    );
}

#[test]
fn of_two_definitions_the_first_counts_until_it_goes() {
    let mut lab = Lab::new(&[
        ("a.yaml", &service("web", "10.0.0.1")),
        ("b.yaml", &format!("{}---\n{}", service("web", "10.0.0.2"), service("other", "10.0.0.3"))),
    ]);
    let problem = "demo/b.yaml:1: Service default/web: is defined in demo/a.yaml:1 already; delete one of them";
    expect(&mut lab, &["default/web", "default/other"], &[problem]);
    assert_eq!(lab.folder.read().services[0].cluster_ips[0].to_string(), "10.0.0.1");
    lab.remove("a.yaml");
    expect(&mut lab, &["default/web", "default/other"], &[]);
    assert_eq!(lab.folder.read().services[0].cluster_ips[0].to_string(), "10.0.0.2");
}

#[test]
fn two_services_with_one_address_and_port_are_told_by_the_plan() {
    let mut lab = Lab::new(&[("web.yaml", &format!("{}---\n{}", service("a", "10.0.0.1"), service("b", "10.0.0.1")))]);
    let snapshot = lab.folder.read();
    let mut model = Model::default();
    model.replace(snapshot.services, snapshot.slices);
    let problems: Vec<_> = plan(&model).problems.iter().map(ToString::to_string).collect();
    let file = lab.dir.path().join("web.yaml");
    assert_eq!(
        problems,
        [format!(
            "{}:10: Service default/b: spec.clusterIP: 10.0.0.1:80/TCP already belongs to Service default/a; give one of \
             them another address or port",
            file.display()
        )]
    );
}

#[test]
fn files_that_cannot_be_read_are_told() {
    let mut lab = Lab::new(&[("a.yaml", &service("a", "10.0.0.1"))]);
    lab.write("latin1.yaml", b"# caf\xe9\n");
    fs::create_dir(lab.dir.path().join("folder.yaml")).unwrap();
    symlink("nowhere", lab.dir.path().join("link.yaml")).unwrap();
    make_pipe(&lab.dir.path().join("pipe.yaml"));
    fs::File::create(lab.dir.path().join("large.yaml")).unwrap().set_len(MAX_FILE_BYTES + 1).unwrap();
    expect(
        &mut lab,
        &["default/a"],
        &[
            "demo/folder.yaml: is not a file; move it out of this folder",
            "demo/large.yaml: is larger than 64 MiB; split it",
            "demo/latin1.yaml: is not UTF-8 text from byte 5 on; save it as UTF-8",
            "demo/link.yaml: cannot be read: No such file or directory (os error 2)",
            "demo/pipe.yaml: is not a file; move it out of this folder",
        ],
    );
}

fn make_pipe(path: &Path) {
    assert!(std::process::Command::new("mkfifo").arg(path).status().unwrap().success());
}

#[test]
fn a_file_that_breaks_keeps_what_it_defined() {
    let (a, b, c) = (service("a", "10.0.0.1"), service("b", "10.0.0.2"), service("c", "10.0.0.3"));
    let mut lab = Lab::new(&[("web.yaml", &[a.clone(), b.clone(), c.clone()].join("---\n"))]);
    expect(&mut lab, &["default/a", "default/b", "default/c"], &[]);

    // Cut off in the middle of the second document: what stands in front of it is new.
    lab.write("web.yaml", format!("{}---\nkind: [Serv", service("a", "10.0.0.9")));
    expect(
        &mut lab,
        &["default/a", "default/b", "default/c"],
        &["demo/web.yaml:10: cannot parse this document: unclosed bracket '['; keeping the last good version of 2 \
           objects from this file"],
    );
    assert_eq!(lab.folder.read().services[0].cluster_ips[0].to_string(), "10.0.0.9");

    lab.write("web.yaml", b"\xff");
    let kept = "demo/web.yaml: is not UTF-8 text from byte 0 on; save it as UTF-8; keeping the last good version of 3 \
                objects from this file";
    expect(&mut lab, &["default/b", "default/c", "default/a"], &[kept]);
    expect(&mut lab, &["default/b", "default/c", "default/a"], &[kept]);

    // One object is refused as a whole, another one now says that it is not to be served.
    let refused = format!("{}---\n{}", service("a", "127.0.0.1"), service("b", "None"));
    lab.write("web.yaml", refused);
    expect(
        &mut lab,
        &["default/c", "default/a"],
        &[
            "demo/web.yaml:1: Service default/a: spec.clusterIP: 127.0.0.1 is a loopback address; use one that a client \
           can dial; keeping the last good version of 2 objects from this file",
        ],
    );

    // A well-formed file says all: the documents that it lacks are gone.
    lab.write("web.yaml", &c);
    expect(&mut lab, &["default/c"], &[]);
    lab.remove("web.yaml");
    expect(&mut lab, &[], &[]);
}

#[test]
fn an_object_can_move_away_from_a_file_that_is_broken() {
    let mut lab = Lab::new(&[("a.yaml", &service("web", "10.0.0.1"))]);
    let _ = lab.read();
    lab.write("a.yaml", "{");
    lab.write("b.yaml", service("web", "10.0.0.2"));
    let (objects, problems) = lab.read();
    assert_eq!((objects, problems.len()), (vec!["default/web".into()], 1));
    assert_eq!(lab.folder.read().services[0].cluster_ips[0].to_string(), "10.0.0.2");
}

#[test]
fn a_folder_that_vanishes_takes_nothing_along() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("manifests");
    let mut folder = Folder::new(&path);
    let before = folder.read();
    assert_eq!((before.complete, before.services.len()), (false, 0));
    fs::create_dir(&path).unwrap();
    fs::write(path.join("web.yaml"), service("web", "10.0.0.1")).unwrap();
    let there = folder.read();
    assert_eq!((there.complete, there.services.len(), there.problems.len()), (true, 1, 0));
    fs::remove_dir_all(&path).unwrap();
    let gone = folder.read();
    assert_eq!((gone.complete, &gone.services), (true, &there.services));
    let problems: Vec<_> = gone.problems.iter().map(ToString::to_string).collect();
    let expected =
        "cannot read the folder: No such file or directory (os error 2); keeping the 1 objects known from it";
    assert_eq!(problems, [format!("{}: {expected}", path.display())]);
    fs::create_dir(&path).unwrap();
    let empty = folder.read();
    assert_eq!(empty.services, there.services, "made anew, and not filled yet");
    assert!(empty.problems[0].to_string().contains("it is another one than before, and empty"));
    fs::write(path.join("dns.yaml"), service("dns", "10.0.0.2")).unwrap();
    assert_eq!(folder.read().services.len(), 1, "filled: now it counts");
    fs::remove_file(path.join("dns.yaml")).unwrap();
    assert_eq!(folder.read().services.len(), 0, "a deleted file is meant");
}

#[test]
fn a_file_that_was_emptied_keeps_its_objects() {
    let mut lab = Lab::new(&[("a.yaml", &service("web", "10.0.0.1")), ("b.yaml", "")]);
    assert_eq!(lab.read(), (vec!["default/web".into()], vec![]));
    lab.write("a.yaml", "\n");
    let (objects, problems) = lab.read();
    assert_eq!((objects, problems.len()), (vec!["default/web".into()], 1));
    assert!(problems[0].contains("is empty; delete the file to remove its objects; keeping"), "{}", problems[0]);
}

#[test]
fn a_mounted_config_map_is_read_through_its_links() {
    let mut lab = Lab::new(&[]);
    let dir = lab.dir.path().to_path_buf();
    for (version, address) in [("..v1", "10.0.0.1"), ("..v2", "10.0.0.2")] {
        fs::create_dir(dir.join(version)).unwrap();
        fs::write(dir.join(version).join("web.yaml"), service("web", address)).unwrap();
    }
    symlink("..v1", dir.join("..data")).unwrap();
    symlink("..data/web.yaml", dir.join("web.yaml")).unwrap();
    expect(&mut lab, &["default/web"], &[]);
    symlink("..v2", dir.join("..data_tmp")).unwrap();
    fs::rename(dir.join("..data_tmp"), dir.join("..data")).unwrap();
    assert_eq!(lab.folder.read().services[0].cluster_ips[0].to_string(), "10.0.0.2");
}

#[test]
fn the_output_of_kubectl_is_a_manifest() {
    let mut lab = Lab::new(&[("kubectl.yaml", include_str!("testdata/kubectl-get.yaml"))]);
    expect(
        &mut lab,
        &["default/kubernetes", "kube-system/kube-dns", "slice default/kubernetes", "slice kube-system/kube-dns-x2v9p"],
        &["demo/kubectl.yaml:107: Pod default/web: v1 Pod is not served; read are Service (v1), EndpointSlice \
             (discovery.k8s.io/v1) and lists of them"],
    );
    let snapshot = lab.folder.read();
    assert_eq!(snapshot.services[1].ports.len(), 3);
    assert_eq!(snapshot.services[1].created, Some(1_763_628_128));
    let mut model = Model::default();
    model.replace(snapshot.services, snapshot.slices);
    let plan = plan(&model);
    let ports: Vec<_> = plan
        .service_ports
        .iter()
        .map(|(name, port)| {
            let backends: Vec<_> = port.backends.iter().map(|backend| backend.address.to_string()).collect();
            format!("{name} {}", backends.join(" "))
        })
        .collect();
    assert_eq!(
        ports,
        [
            "default/kubernetes:https/TCP 172.18.0.2:6443",
            "kube-system/kube-dns:dns/UDP 10.244.0.2:53 10.244.0.4:53",
            "kube-system/kube-dns:dns-tcp/TCP 10.244.0.2:53 10.244.0.4:53",
            "kube-system/kube-dns:metrics/TCP 10.244.0.2:9153 10.244.0.4:9153",
        ]
    );
}

#[test]
fn items_of_typed_lists_need_not_say_what_they_are() {
    let text = "apiVersion: v1\nkind: ServiceList\nitems:\n- metadata: {name: a}\n  spec: {clusterIP: 10.0.0.1, ports: \
                [{port: 80}]}\n- metadata: {name: b}\n  spec: {clusterIP: 10.0.0.2, ports: [{port: 0}]}\n- 7\n";
    let slices = "{\"apiVersion\":\"discovery.k8s.io/v1\",\"kind\":\"EndpointSliceList\",\"items\":null}";
    let mut lab = Lab::new(&[("list.yaml", text), ("slices.json", slices)]);
    expect(
        &mut lab,
        &["default/a", "default/b"],
        &[
            "demo/list.yaml:6: Service default/b: spec.ports[0].port: 0 is not a port; use 1 to 65535",
            "demo/list.yaml:8: is not an object; read are Service (v1), EndpointSlice (discovery.k8s.io/v1) and lists of \
             them",
        ],
    );
}

#[test]
fn a_slice_of_all_endpoints_of_a_large_cluster_is_one_line() {
    let mut lab = Lab::new(&[("a.yaml", &slice("web-1", 0..MANY)), ("b.yaml", &service("web", "10.0.0.1"))]);
    let start = Instant::now();
    let problem = format!(
        "demo/a.yaml:1: EndpointSlice default/web-1: endpoints: {MANY} are too many; at most 1000 fit in one slice: split it"
    );
    expect(&mut lab, &["default/web"], &[&problem]);
    println!("refused in {:?}", start.elapsed());
}

#[test]
fn all_endpoints_of_a_large_cluster_load_from_legal_slices() {
    let slices: Vec<_> = (0..MANY / 1000).map(|i| slice(&format!("web-{i}"), i * 1000..(i + 1) * 1000)).collect();
    let text = format!("{}---\n{}", service("web", "10.0.0.1"), slices.join("---\n"));
    let mut lab = Lab::new(&[("web.yaml", &text)]);
    let start = Instant::now();
    let snapshot = lab.folder.read();
    println!("{} MiB read in {:?}", text.len() >> 20, start.elapsed());
    assert_eq!(snapshot.problems, []);
    let start = Instant::now();
    assert_eq!(lab.folder.read().slices, snapshot.slices);
    println!("read again unchanged in {:?}", start.elapsed());
    let start = Instant::now();
    let mut model = Model::default();
    model.replace(snapshot.services, snapshot.slices);
    println!("modelled in {:?}", start.elapsed());
    let start = Instant::now();
    let plan = plan(&model);
    println!("planned in {:?}", start.elapsed());
    assert_eq!(plan.service_ports.values().map(|port| port.backends.len()).sum::<usize>(), MANY as usize);
}

#[test]
fn one_folder_is_read_by_name() {
    let lab = Lab::new(&[("web.yaml", &service("web", "10.0.0.1"))]);
    assert_eq!(read_folder(lab.dir.path()).services.len(), 1);
}

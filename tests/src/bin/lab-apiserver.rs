//! An API server to try agents and other clients against, and to measure them apart from what they read: it serves the
//! manifests of a folder, or a generated cluster with changes at a steady rate.

use std::collections::BTreeSet;
use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use clap::Parser;
use serde_json::Value;
use viaduct_tests::apiserver::{ApiServer, Kind, Options, cluster, endpoint_slice};

/// Serve Services, EndpointSlices and Nodes as a Kubernetes API server does.
#[derive(Parser)]
#[command(name = "lab-apiserver")]
struct Arguments {
    /// Where to listen
    #[arg(long, default_value = "127.0.0.1:6443")]
    address: SocketAddr,
    /// Write a kubeconfig file for clients here, and the token and certificate beside it
    #[arg(long, value_name = "FILE")]
    kubeconfig: Option<PathBuf>,
    /// The bearer token of clients
    #[arg(long, default_value = "test-token")]
    token: String,
    /// Serve plain HTTP
    #[arg(long)]
    no_tls: bool,
    /// Serve the YAML and JSON files of this folder, and follow their changes
    #[arg(long, value_name = "DIR")]
    manifests: Option<PathBuf>,
    /// Generate so many Services, with an EndpointSlice each
    #[arg(long, default_value_t = 0)]
    services: u32,
    /// Endpoints of each generated EndpointSlice
    #[arg(long, default_value_t = 10)]
    endpoints: u32,
    /// Change so many of the generated EndpointSlices a second, in turn
    #[arg(long, default_value_t = 0, value_parser = clap::value_parser!(u32).range(..=100_000))]
    changes: u32,
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let options = Options { tls: !arguments.no_tls, token: Some(arguments.token.clone()), ..Options::default() };
    let server = ApiServer::start(None, arguments.address, options)?;
    server.fill(cluster(arguments.services, arguments.endpoints))?;
    let mut served = BTreeSet::new();
    if let Some(folder) = &arguments.manifests {
        served = follow(&server, folder, &served)?;
    }
    if let Some(path) = &arguments.kubeconfig {
        server.kubeconfig(path)?;
    }
    println!("serving on {}, resource version {}", server.url(), server.resource_version());
    thread::scope(|scope| {
        if arguments.changes > 0 && arguments.services > 0 {
            scope.spawn(|| change(&server, &arguments));
        }
        // Looking once a second is soon enough for people, and works on every file system.
        loop {
            thread::sleep(Duration::from_secs(1));
            if let Some(folder) = &arguments.manifests {
                match follow(&server, folder, &served) {
                    Ok(now) => served = now,
                    Err(error) => eprintln!("error: {error:#}"),
                }
            }
        }
    })
}

/// Turns the readiness of one endpoint after the other.
fn change(server: &ApiServer, arguments: &Arguments) {
    let (start, mut done) = (Instant::now(), 0_u64);
    loop {
        let due = start.elapsed().as_millis() * u128::from(arguments.changes) / 1000;
        while u128::from(done) < due {
            let (turn, number) = (done / u64::from(arguments.services), done % u64::from(arguments.services));
            let number = u32::try_from(number).unwrap_or(0);
            let slice = endpoint_slice(number, arguments.endpoints, turn % 2 == 1);
            if let Err(error) = server.apply(&slice) {
                eprintln!("error: {error:#}");
            }
            done += 1;
        }
        thread::sleep(Duration::from_millis(2));
    }
}

type Name = (Kind, String, String);

/// Serves what the folder holds now, and no longer what it held before; returns what it holds.
fn follow(server: &ApiServer, folder: &Path, before: &BTreeSet<Name>) -> Result<BTreeSet<Name>> {
    let mut now = BTreeSet::new();
    for object in objects(folder)? {
        // Other kinds may lie in the same folder.
        let Some(kind) = Kind::of(&object) else { continue };
        let text = |key: &str| object["metadata"][key].as_str().map(str::to_owned);
        let namespace = if kind == Kind::Node { None } else { text("namespace").or(Some("default".into())) };
        now.insert((kind, namespace.unwrap_or_default(), text("name").unwrap_or_default()));
        server.apply_value(object)?;
    }
    for (kind, namespace, name) in before.difference(&now) {
        server.delete_named(*kind, namespace, name)?;
    }
    Ok(now)
}

/// All objects in the files of a folder, also those in lists.
fn objects(folder: &Path) -> Result<Vec<Value>> {
    let mut objects = Vec::new();
    for entry in fs::read_dir(folder).with_context(|| format!("cannot read the folder {}", folder.display()))? {
        let path = entry?.path();
        let is_manifest =
            path.extension().is_some_and(|extension| ["yaml", "yml", "json"].map(Some).contains(&extension.to_str()));
        if !is_manifest {
            continue;
        }
        let text = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        let documents: Vec<Value> =
            serde_saphyr::from_multiple(&text).with_context(|| format!("{} is no YAML", path.display()))?;
        for mut document in documents {
            match document.get_mut("items").map(Value::take) {
                Some(Value::Array(items)) => objects.extend(items),
                _ => objects.push(document),
            }
        }
    }
    Ok(objects)
}

//! A small API server: it speaks the Kubernetes protocol over HTTPS (HTTP/1.1 and HTTP/2), holds the objects that a test
//! gives it, and fails on demand. It knows no client in particular; kubectl works with it as programs do.
//!
//! Served are Services, EndpointSlices and Nodes, to read: get, list (pages, snapshots, every meaning of resourceVersion)
//! and watch (from a version, bookmarks, streaming lists). Objects are written by the test's calls only, are not
//! validated beyond what the server needs, and get no defaults. All have a generation, Services too.
//!
//! ```no_run
//! use viaduct_tests::apiserver::{ApiServer, Cut, Options};
//! use viaduct_tests::{Protocol::Tcp, ServiceManifest};
//!
//! # fn main() -> anyhow::Result<()> {
//! let server = ApiServer::start(None, "127.0.0.1:0".parse()?, Options::default())?;
//! server.apply(&ServiceManifest::new("default", "web").cluster_ip("10.96.0.10").port("http", Tcp, 80))?;
//! server.kubeconfig("/tmp/kubeconfig".as_ref())?; // kubectl --kubeconfig /tmp/kubeconfig get services --watch
//! server.cut_watches(Cut::InsideEvent);
//! # Ok(())
//! # }
//! ```
//!
//! The layers, each of which knows only those before it: `kind`, `object`, `store` (revisions, history, compaction);
//! `status`, `selectors`, `parameters` (what a request means); `faults`, `outlet` (what goes wrong on the way out);
//! `lists`, `watches`, `discovery`, `http`; `tls`, `listener`.

mod counters;
mod discovery;
mod faults;
mod generate;
mod http;
mod kind;
mod listener;
mod lists;
mod object;
mod outlet;
mod parameters;
mod selectors;
mod status;
mod store;
mod tls;
mod watches;

use std::fs;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use tokio::runtime::{Builder, Runtime};
use tokio::sync::watch;

use self::counters::Counters;
pub use self::counters::Counts;
use self::faults::Faults;
pub use self::faults::{Cut, Pace};
pub use self::generate::{cluster, endpoint_slice};
pub use self::kind::Kind;
use self::listener::Listener;
use self::store::Store;
use self::tls::Identity;
use crate::manifests::Manifest;
use crate::namespace::Namespace;

/// Choices that hold as long as the server lives.
#[derive(Clone, Debug)]
pub struct Options {
    /// HTTPS by default; plain HTTP asks for the token too.
    pub tls: bool,
    /// The bearer token that clients must send. None: nobody is asked.
    pub token: Option<String>,
    /// How many changes are remembered; watches from an earlier version get 410.
    pub history: usize,
    /// How often a watch that allows bookmarks gets one.
    pub bookmark_interval: Duration,
}

impl Default for Options {
    fn default() -> Self {
        let token = Some("test-token".to_owned());
        Self { tls: true, token, history: 10_000, bookmark_interval: Duration::from_secs(60) }
    }
}

/// An API server, which runs until it is dropped. Its methods can be called from everywhere, also from async code.
pub struct ApiServer {
    shared: Arc<Shared>,
    namespace: Option<Namespace>,
    address: SocketAddr,
    identity: Option<Identity>,
    listener: Mutex<Option<Listener>>,
    runtime: Option<Runtime>,
}

/// What requests work with.
struct Shared {
    options: Options,
    store: Mutex<Store>,
    /// Wakes the watches; its value is the store's revision.
    revision: watch::Sender<u64>,
    token: Mutex<Option<String>>,
    faults: Faults,
    counters: Counters,
}

impl Shared {
    fn store(&self) -> MutexGuard<'_, Store> {
        self.store.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the store and tells the watches.
    fn change<T>(&self, change: impl FnOnce(&mut Store) -> T) -> T {
        let mut store = self.store();
        let outcome = change(&mut store);
        // Under the lock, so that the announced revisions never go back.
        self.revision.send_replace(store.revision());
        outcome
    }

    fn accepts(&self, token: Option<&str>) -> bool {
        let expected = self.token.lock().unwrap_or_else(PoisonError::into_inner);
        expected.is_none() || expected.as_deref() == token
    }
}

impl ApiServer {
    /// Serves on `address`, inside a network namespace if one is given. Port 0 takes a free one, and keeps it.
    pub fn start(namespace: Option<&Namespace>, address: SocketAddr, options: Options) -> Result<Self> {
        let socket = Listener::bind(namespace, address)?;
        let address = socket.local_addr()?;
        let store = Store::new(options.history);
        let shared = Arc::new(Shared {
            revision: watch::Sender::new(store.revision()),
            store: Mutex::new(store),
            token: Mutex::new(options.token.clone()),
            faults: Faults::default(),
            counters: Counters::default(),
            options,
        });
        let server = Self {
            identity: shared.options.tls.then(|| Identity::new(address.ip())).transpose()?,
            shared,
            namespace: namespace.cloned(),
            address,
            listener: Mutex::default(),
            runtime: Some(Builder::new_multi_thread().worker_threads(2).thread_name("apiserver").enable_all().build()?),
        };
        server.listen(socket)?;
        Ok(server)
    }

    /// Where clients find the server.
    #[must_use]
    pub fn url(&self) -> String {
        let scheme = if self.identity.is_some() { "https" } else { "http" };
        let mut address = self.address;
        if address.ip().is_unspecified() {
            address.set_ip(IpAddr::V4(Ipv4Addr::LOCALHOST));
        }
        format!("{scheme}://{address}")
    }

    /// The certificate of the authority that signed the server's; empty without TLS.
    #[must_use]
    pub fn ca_pem(&self) -> &str {
        self.identity.as_ref().map_or("", |identity| &identity.ca_pem)
    }

    /// Writes a kubeconfig file, with the token and the authority's certificate in files beside it (`<path>.token`,
    /// `<path>.crt`). Clients read the token's file again from time to time, as they do in a pod.
    pub fn kubeconfig(&self, path: &Path) -> Result<()> {
        let beside = |extension: &str| {
            let mut path = path.as_os_str().to_owned();
            path.push(extension);
            std::path::absolute(path)
        };
        let (mut cluster, mut user) = (json!({ "server": self.url() }), json!({}));
        if self.identity.is_some() {
            let file = beside(".crt")?;
            fs::write(&file, self.ca_pem()).with_context(|| format!("cannot write {}", file.display()))?;
            cluster["certificate-authority"] = file.to_string_lossy().into();
        }
        if let Some(token) = self.token() {
            let file = beside(".token")?;
            fs::write(&file, token).with_context(|| format!("cannot write {}", file.display()))?;
            user["tokenFile"] = file.to_string_lossy().into();
        }
        let config = json!({
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{ "name": "test", "cluster": cluster }],
            "users": [{ "name": "test", "user": user }],
            "contexts": [{ "name": "test", "context": { "cluster": "test", "user": "test" } }],
            "current-context": "test",
        });
        // JSON is YAML too.
        fs::write(path, format!("{config:#}\n")).with_context(|| format!("cannot write {}", path.display()))
    }

    /// Creates the object, or replaces the one of that kind, namespace and name.
    pub fn apply(&self, manifest: &impl Manifest) -> Result<()> {
        self.apply_value(manifest.object().clone())
    }

    /// The same with any object. Its uid, creationTimestamp, resourceVersion and generation are the server's to set.
    pub fn apply_value(&self, object: Value) -> Result<()> {
        self.shared.change(|store| store.apply(object))
    }

    /// Deletes the object of the manifest's kind, namespace and name.
    pub fn delete(&self, manifest: &impl Manifest) -> Result<()> {
        let object = manifest.object();
        let kind = Kind::of(object).with_context(|| format!("no kind '{}' to delete from", object["kind"]))?;
        let text = |key: &str| object["metadata"][key].as_str().unwrap_or_default();
        self.delete_named(kind, text("namespace"), text("name"))
    }

    /// Deletes an object; the namespace of a Node is empty.
    pub fn delete_named(&self, kind: Kind, namespace: &str, name: &str) -> Result<()> {
        let deleted = self.shared.change(|store| store.delete(kind, namespace, name));
        ensure!(deleted, "API server: there is no {} '{name}' in namespace '{namespace}' to delete", kind.name());
        Ok(())
    }

    /// Creates or replaces many objects at once, without an event for each: the history is forgotten, and watches that
    /// are open get 410.
    pub fn fill(&self, objects: impl IntoIterator<Item = Value>) -> Result<()> {
        self.shared.change(|store| store.fill(objects))
    }

    /// The resource version of the last change.
    #[must_use]
    pub fn resource_version(&self) -> u64 {
        self.shared.store().revision()
    }

    /// What clients did so far.
    #[must_use]
    pub fn counts(&self) -> Counts {
        self.shared.counters.counts()
    }

    /// The newest requests word for word, oldest first, as `GET /api/v1/services?limit=500`.
    #[must_use]
    pub fn requests(&self) -> Vec<String> {
        self.shared.counters.requests()
    }

    /// The token that clients must send now.
    #[must_use]
    pub fn token(&self) -> Option<String> {
        self.shared.token.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Exchanges the token: new requests with the old one get 401, as after its expiry. Open watches go on.
    pub fn set_token(&self, token: &str) {
        *self.shared.token.lock().unwrap_or_else(PoisonError::into_inner) = Some(token.to_owned());
    }

    /// Closes the socket and all connections. The objects stay.
    pub fn stop(&self) {
        self.listener().take();
    }

    /// Serves again at the same address, with the same certificate.
    pub fn start_again(&self) -> Result<()> {
        self.listen(Listener::bind(self.namespace.as_ref(), self.address)?)
    }

    /// Puts an empty store in place, whose resource versions begin anew, as when a cluster was built again or restored
    /// from an old backup. Stop the server before: a real one does not do this while it runs.
    pub fn replace_store(&self) {
        self.shared.change(|store| *store = Store::new(self.shared.options.history));
    }

    fn listen(&self, socket: std::net::TcpListener) -> Result<()> {
        let runtime = self.runtime.as_ref().context("the API server's runtime")?;
        let tls = self.identity.as_ref().map(|identity| identity.acceptor.clone());
        let listener = Listener::start(runtime.handle(), socket, tls, http::router(&self.shared))?;
        *self.listener() = Some(listener);
        Ok(())
    }

    fn listener(&self) -> MutexGuard<'_, Option<Listener>> {
        self.listener.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for ApiServer {
    fn drop(&mut self) {
        self.stop();
        if let Some(runtime) = self.runtime.take() {
            // Waiting is not allowed where async code drops the server.
            runtime.shutdown_background();
        }
    }
}

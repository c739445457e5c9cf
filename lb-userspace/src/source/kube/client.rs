//! The way to the API server.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use hyper_util::client::legacy;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use kube::client::{Client, ClientBuilder, ConfigExt as _};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Config, config};
use tokio::sync::Notify;
use tower::ServiceBuilder;

use crate::observe::Metrics;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// A server whose machine died under an idle watch is noticed after 30 s, not when the watch would have ended.
const KEEPALIVE_AFTER: Duration = Duration::from_secs(15);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(5);
const KEEPALIVE_PROBES: u32 = 3;

/// Until the head of an answer: a load balancer may take requests for a server that is not there any more.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(60);

const SERVICE_ACCOUNT: &str = "/var/run/secrets/kubernetes.io/serviceaccount";
const IN_CLUSTER: &str = "KUBERNETES_SERVICE_HOST";

/// How to reach the API server. With nothing given: as a pod of the cluster, by its service account.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Options {
    /// A kubeconfig file, of which the current context counts.
    pub kubeconfig: Option<PathBuf>,
    /// URL of the API server, in the place of what kubeconfig or service account say. A node that serves the API server's
    /// own VIP must not need that VIP to start.
    pub server: Option<String>,
    /// Name in the server's certificate, where it is not the host of the URL.
    pub tls_server_name: Option<String>,
}

/// A client that tells of every good answer by `answers`.
///
/// # Errors
/// When certificates or credentials cannot be used. Nothing is sent to the server.
pub(super) fn client(config: &Config, metrics: &Metrics, answers: Arc<Notify>) -> Result<Client> {
    let mut http = HttpConnector::new();
    http.enforce_http(false);
    http.set_connect_timeout(Some(CONNECT_TIMEOUT));
    http.set_keepalive(Some(KEEPALIVE_AFTER));
    http.set_keepalive_interval(Some(KEEPALIVE_INTERVAL));
    http.set_keepalive_retries(Some(KEEPALIVE_PROBES));
    let https =
        config.rustls_https_connector_with_connector(http).context("cannot use the certificates for the API server")?;
    let auth = config.auth_layer().context("cannot use the credentials for the API server")?;
    let headers = config.extra_headers_layer().context("cannot use the user to act as (kubeconfig)")?;
    let service = ServiceBuilder::new()
        .layer(config.base_uri_layer())
        .option_layer(auth)
        .layer(headers)
        .map_response(move |response: http::Response<_>| {
            if response.status().is_success() {
                answers.notify_one();
            }
            response
        })
        .timeout(ANSWER_TIMEOUT)
        .map_err(tower::BoxError::from)
        .service(legacy::Client::builder(TokioExecutor::new()).build(https));
    let counted = metrics.rest(config.cluster_url.authority().map_or("", http::uri::Authority::as_str));
    Ok(ClientBuilder::new(service, config.default_namespace.as_str()).with_layer(&counted).build())
}

/// The server and the credentials that `options` lead to.
///
/// # Errors
/// When they lead to none, or to files that cannot be used.
pub(super) async fn config(options: &Options) -> Result<Config> {
    let mut config = match &options.kubeconfig {
        Some(path) => from_kubeconfig(path).await?,
        None if Path::new(SERVICE_ACCOUNT).join("token").exists() => from_service_account(options)?,
        // Without credentials: a proxy that adds them, or a server in a test.
        None => without_credentials(options)?,
    };
    if options.server.is_some() {
        config.cluster_url = http_uri(options)?;
    }
    if let Some(proxy) = &config.proxy_url {
        bail!(
            "the kubeconfig has a proxy-url, {proxy}, which is not supported: give an address that is reached without"
        );
    }
    if let Some(name) = &options.tls_server_name {
        config.tls_server_name = Some(name.clone());
    }
    Ok(config)
}

async fn from_kubeconfig(path: &Path) -> Result<Config> {
    let unusable = || format!("--kubeconfig {}: cannot be used", path.display());
    let kubeconfig = Kubeconfig::read_from(path).with_context(unusable)?;
    Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await.with_context(unusable)
}

fn from_service_account(options: &Options) -> Result<Config> {
    if std::env::var_os(IN_CLUSTER).is_some() {
        return Config::incluster().context("cannot use the service account of this pod");
    }
    let mut config = Config::new(http_uri(options)?);
    let file = |name: &str| Path::new(SERVICE_ACCOUNT).join(name);
    // Or the system's would be loaded besides, which an image need not have.
    config.root_cert = Some(Vec::new());
    config.root_cert_file = Some(file("ca.crt"));
    config.auth_info =
        config::AuthInfo { token_file: Some(file("token").display().to_string()), ..config::AuthInfo::default() };
    Ok(config)
}

fn without_credentials(options: &Options) -> Result<Config> {
    let mut config = Config::new(http_uri(options)?);
    if config.cluster_url.scheme_str() == Some("http") {
        // The system's certificates need not be there.
        config.root_cert = Some(Vec::new());
    }
    Ok(config)
}

fn http_uri(options: &Options) -> Result<http::Uri> {
    let Some(server) = &options.server else {
        bail!(
            "no API server: this is not a pod of a cluster ({IN_CLUSTER} is not set): give --kubeconfig FILE, --server \
             URL, or --manifests DIR"
        )
    };
    let uri: http::Uri = server.parse().with_context(|| format!("--server {server}: is not a URL"))?;
    if !matches!(uri.scheme_str(), Some("http" | "https")) || uri.host().is_none_or(str::is_empty) {
        bail!("--server {server}: give a URL such as https://192.0.2.1:6443");
    }
    Ok(uri)
}

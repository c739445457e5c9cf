//! The API server as a source.

use std::path::PathBuf;

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

//! Connections: accepted, wrapped in TLS, handed to the service, and all closed when the server stops.

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::sync::mpsc;
use std::time::Duration;

use anyhow::{Context, Result};
use axum::Router;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto::Builder;
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::runtime::Handle;
use tokio::sync::oneshot;
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;

use crate::namespace::Namespace;

/// A socket that listens, with its connections.
pub(super) struct Listener {
    stop: Option<oneshot::Sender<()>>,
    stopped: mpsc::Receiver<()>,
}

impl Listener {
    /// Listens inside a namespace, or where the caller is.
    pub(super) fn bind(namespace: Option<&Namespace>, address: SocketAddr) -> Result<TcpListener> {
        let bind = || TcpListener::bind(address);
        let listener = namespace.map_or_else(bind, |namespace| namespace.run(bind));
        let listener = listener.with_context(|| format!("API server: cannot listen on {address}"))?;
        listener.set_nonblocking(true)?;
        Ok(listener)
    }

    /// Begins to accept connections.
    pub(super) fn start(
        runtime: &Handle,
        listener: TcpListener,
        tls: Option<TlsAcceptor>,
        router: Router,
    ) -> Result<Self> {
        let _inside = runtime.enter();
        let listener = tokio::net::TcpListener::from_std(listener)?;
        let (stop, stopping) = oneshot::channel();
        let (done, stopped) = mpsc::channel();
        runtime.spawn(async move {
            accept(listener, tls, router, stopping).await;
            let _ = done.send(());
        });
        Ok(Self { stop: Some(stop), stopped })
    }
}

impl Drop for Listener {
    /// Returns when the socket and all connections are closed.
    fn drop(&mut self) {
        drop(self.stop.take());
        let _ = self.stopped.recv_timeout(Duration::from_secs(5));
    }
}

async fn accept(
    listener: tokio::net::TcpListener,
    tls: Option<TlsAcceptor>,
    router: Router,
    mut stopping: oneshot::Receiver<()>,
) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            _ = &mut stopping => break,
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => drop(connections.spawn(connection(stream, tls.clone(), router.clone()))),
                // Too many open files, for instance; that may pass.
                Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
            },
            Some(_) = connections.join_next() => {}
        }
    }
    drop(listener);
    connections.shutdown().await;
}

/// How it ends is the client's affair.
async fn connection(stream: TcpStream, tls: Option<TlsAcceptor>, router: Router) {
    let _ = stream.set_nodelay(true);
    match tls {
        None => serve(stream, router).await,
        Some(tls) => {
            let accepted: io::Result<_> = tls.accept(stream).await;
            if let Ok(stream) = accepted {
                serve(stream, router).await;
            }
        }
    }
}

async fn serve(stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static, router: Router) {
    let service = TowerToHyperService::new(router);
    let _ = Builder::new(TokioExecutor::new()).serve_connection(TokioIo::new(stream), service).await;
}

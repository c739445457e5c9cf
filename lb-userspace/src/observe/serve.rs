//! The HTTP servers.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::any;
use axum::{Json, Router};
use prometheus::{IntCounterVec, TEXT_FORMAT};
use serde_json::Value;
use tokio::net::TcpListener;
use tracing::{error, info, warn};

use super::health::Answer;
use super::{Health, Metrics};

/// Whoever has the port may give it up.
const RETRY: Duration = Duration::from_secs(5);

/// Answers /healthz and /livez for ever.
pub async fn health(address: SocketAddr, health: Arc<Health>, metrics: Arc<Metrics>) {
    serve(address, "--healthz-bind-address", health_router(health, metrics)).await;
}

fn health_router(health: Arc<Health>, metrics: Arc<Metrics>) -> Router {
    Router::new().route("/healthz", any(healthz)).route("/livez", any(livez)).with_state((health, metrics))
}

/// Answers /metrics, /healthz, /proxyMode and /configz, which is `configuration`, for ever.
pub async fn metrics(address: SocketAddr, metrics: Arc<Metrics>, configuration: Value) {
    let router = Router::new()
        .route("/metrics", any(text))
        .route("/healthz", any(async || "ok"))
        .route("/proxyMode", any(async || "ebpf"))
        .route("/configz", any(async move || Json(configuration)))
        .with_state(metrics);
    serve(address, "--metrics-bind-address", router).await;
}

async fn serve(address: SocketAddr, flag: &str, router: Router) {
    let listener = listen(address, flag).await;
    // It tries again by itself whatever may go wrong.
    if let Err(error) = axum::serve(listener, router).await {
        error!("{flag} {address}: {error}");
    }
}

async fn listen(address: SocketAddr, flag: &str) -> TcpListener {
    let mut failed = false;
    loop {
        match TcpListener::bind(address).await {
            Ok(listener) => {
                if failed {
                    info!("{flag} {address}: listening now");
                }
                return listener;
            }
            Err(error) if !failed => warn!("{flag} {address}: cannot listen: {error}; trying again every {RETRY:?}"),
            Err(_) => {}
        }
        failed = true;
        tokio::time::sleep(RETRY).await;
    }
}

async fn healthz(State((health, metrics)): State<(Arc<Health>, Arc<Metrics>)>) -> Response {
    answer(&health.answer(true), &metrics.healthz)
}

async fn livez(State((health, metrics)): State<(Arc<Health>, Arc<Metrics>)>) -> Response {
    answer(&health.answer(false), &metrics.livez)
}

fn answer(answer: &Answer, answers: &IntCounterVec) -> Response {
    let code = if answer.good { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    answers.with_label_values(&[code.as_str()]).inc();
    (code, [(header::X_CONTENT_TYPE_OPTIONS, "nosniff")], Json(answer)).into_response()
}

async fn text(State(metrics): State<Arc<Metrics>>) -> Response {
    // The maps are read on a thread that may wait.
    let text = tokio::task::spawn_blocking(move || metrics.text()).await;
    match text {
        Ok(Ok(text)) => ([(header::CONTENT_TYPE, TEXT_FORMAT)], text).into_response(),
        Ok(Err(error)) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
    }
}

#[cfg(test)]
mod tests {
    use axum::body::Body;
    use axum::http::Request;
    use tower::ServiceExt as _;

    use super::*;
    use crate::model::Family;

    #[tokio::test]
    async fn codes_follow_node_and_waiting_changes_and_are_counted() {
        let health = Arc::new(Health::new(&[Family::V4]));
        let metrics = Arc::new(Metrics::new(&[Family::V4]).unwrap());
        let router = health_router(Arc::clone(&health), Arc::clone(&metrics));
        let codes = async || {
            let mut codes = Vec::new();
            for path in ["/healthz", "/livez", "/", "/metrics"] {
                let request = Request::builder().uri(path).body(Body::empty()).unwrap();
                codes.push(router.clone().oneshot(request).await.unwrap().status().as_u16());
            }
            codes
        };
        assert_eq!(codes().await, [200, 200, 404, 404]);
        health.node(false);
        assert_eq!(codes().await, [503, 200, 404, 404]);
        health.node(true);
        health.queued_ago(Duration::from_secs(60));
        assert_eq!(codes().await, [503, 503, 404, 404]);
        let text = metrics.text().unwrap();
        for line in [
            r#"kubeproxy_proxy_healthz_total{code="200"} 1"#,
            r#"kubeproxy_proxy_healthz_total{code="503"} 2"#,
            r#"kubeproxy_proxy_livez_total{code="200"} 2"#,
            r#"kubeproxy_proxy_livez_total{code="503"} 1"#,
        ] {
            assert!(text.lines().any(|other| other == line), "{line} in {text}");
        }
    }
}

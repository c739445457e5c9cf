//! Counts the requests of the kube client, under the names of client-go.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Instant;

use axum::http::{Request, Response};
use prometheus::{HistogramVec, IntCounterVec};
use tower::{Layer, Service};

/// A layer for `kube::client::ClientBuilder::with_layer`, see [`super::Metrics::rest`].
#[derive(Debug, Clone)]
pub struct RestMetrics {
    pub(super) requests: IntCounterVec,
    pub(super) durations: HistogramVec,
    pub(super) host: String,
}

/// A service whose requests are counted.
#[derive(Debug, Clone)]
pub struct Counted<S> {
    inner: S,
    metrics: RestMetrics,
}

impl<S> Layer<S> for RestMetrics {
    type Service = Counted<S>;

    fn layer(&self, inner: S) -> Counted<S> {
        Counted { inner, metrics: self.clone() }
    }
}

impl<S, A, B> Service<Request<A>> for Counted<S>
where
    S: Service<Request<A>, Response = Response<B>>,
    S::Future: Send + 'static,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<S::Response, S::Error>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: Request<A>) -> Self::Future {
        let RestMetrics { requests, durations, host } = self.metrics.clone();
        let method = request.method().to_string();
        let answer = self.inner.call(request);
        Box::pin(async move {
            let begun = Instant::now();
            let answer = answer.await;
            // Until the head of the answer: a watch streams for minutes after it.
            durations.with_label_values(&[&host, &method]).observe(begun.elapsed().as_secs_f64());
            let code = answer.as_ref().map_or("<error>".to_owned(), |answer| answer.status().as_str().to_owned());
            requests.with_label_values(&[&code, &host, &method]).inc();
            answer
        })
    }
}

#[cfg(test)]
mod tests {
    use tower::ServiceExt as _;

    use crate::model::Family;
    use crate::observe::Metrics;

    use super::*;

    #[tokio::test]
    async fn requests_are_counted_by_code_host_and_method() {
        let metrics = Metrics::new(&[Family::V4]).unwrap();
        let client =
            metrics.rest("10.96.0.1:443").layer(tower::service_fn(async |request: Request<&str>| {
                match *request.body() {
                    "good" => Ok(Response::new(())),
                    "gone" => Ok(Response::builder().status(410).body(()).unwrap()),
                    _ => Err("no route to host"),
                }
            }));
        for (method, body) in [("GET", "good"), ("GET", "good"), ("GET", "gone"), ("PATCH", "cut off")] {
            let request = Request::builder().method(method).body(body).unwrap();
            assert_eq!(client.clone().oneshot(request).await.is_ok(), body != "cut off");
        }
        let text = metrics.text().unwrap();
        for line in [
            r#"rest_client_requests_total{code="200",host="10.96.0.1:443",method="GET"} 2"#,
            r#"rest_client_requests_total{code="410",host="10.96.0.1:443",method="GET"} 1"#,
            r#"rest_client_requests_total{code="<error>",host="10.96.0.1:443",method="PATCH"} 1"#,
            r#"rest_client_request_duration_seconds_count{host="10.96.0.1:443",verb="GET"} 3"#,
        ] {
            assert!(text.lines().any(|other| other == line), "{line} in {text}");
        }
    }
}

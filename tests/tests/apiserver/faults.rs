//! Each fault does what it is called, so that a test that orders it knows what it tested.

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use k8s_openapi::api::core::v1::{Node, Service};
use kube::ResourceExt;
use kube::api::{Api, ListParams, WatchEvent, WatchParams};
use viaduct_tests::apiserver::{Cut, Kind, Options, Pace};
use viaduct_tests::wait_until;

use crate::{client, code, next, service, shorts, start};

#[test]
fn streams_are_cut_in_three_ways() {
    for http in ["--http1.1", "--http2"] {
        let server = start(Options::default());
        for (cut, breaks, whole) in
            [(Cut::Ended, false, true), (Cut::Broken, true, true), (Cut::InsideEvent, true, false)]
        {
            server.apply(&service("a", "web").set("/metadata/labels/cut", format!("{cut:?}"))).unwrap();
            let mut curl = Command::new("curl");
            curl.args([http, "-sNk", "-H", "Authorization: Bearer test-token", "-w", "%{stderr}%{http_version}"]);
            let url = format!("{}/api/v1/services?watch=1", server.url());
            let curl = curl.arg(url).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
            let sent = server.counts().bytes;
            wait_until("the stream began", Duration::from_secs(15), || (server.counts().bytes > sent).then_some(()))
                .unwrap();
            server.cut_watches(cut);
            let output = curl.wait_with_output().unwrap();
            let (events, version) = (String::from_utf8(output.stdout).unwrap(), output.stderr);
            assert_eq!(output.status.success(), !breaks, "{http} {cut:?}: {:?}", output.status);
            assert_eq!(events.ends_with('\n'), whole, "{http} {cut:?}: {events}");
            assert!(events.starts_with(r#"{"type":"ADDED","object":{"kind":"Service","#), "{events}");
            assert_eq!(String::from_utf8(version).unwrap(), http.trim_start_matches("--http"));
        }
        assert_eq!((server.counts().watches, server.counts().open_watches), (3, 0));
    }
}

#[tokio::test]
async fn so_many_requests_are_refused_as_were_ordered() {
    let server = start(Options::default());
    let (client, _folder) = client(&server).await;
    let api: Api<Service> = Api::all(client);
    for status in [500, 403, 410] {
        server.refuse(2, status);
        for _ in 0..2 {
            assert_eq!(code(api.list(&ListParams::default()).await.unwrap_err()), status);
        }
        api.list(&ListParams::default()).await.unwrap();
    }
}

#[tokio::test]
async fn one_kind_can_be_refused_while_others_are_served() {
    let server = start(Options::default());
    let (client, _folder) = client(&server).await;
    let services: Api<Service> = Api::all(client.clone());
    server.refuse_kind(Kind::Service, Some(403));
    for _ in 0..3 {
        assert_eq!(code(services.list(&ListParams::default()).await.unwrap_err()), 403);
        Api::<Node>::all(client.clone()).list(&ListParams::default()).await.unwrap();
    }
    server.refuse_kind(Kind::Service, None);
    services.list(&ListParams::default()).await.unwrap();
}

#[tokio::test]
async fn a_paused_server_answers_when_it_goes_on() {
    let server = start(Options::default());
    let (client, _folder) = client(&server).await;
    let api: Api<Service> = Api::all(client);
    let stream = api.watch(&WatchParams::default(), "1").await.unwrap();
    let mut stream = std::pin::pin!(stream);
    server.pause();
    server.apply(&service("a", "web")).unwrap();
    let parameters = ListParams::default();
    let mut list = std::pin::pin!(api.list(&parameters));
    let pause = Duration::from_millis(200);
    assert!(tokio::time::timeout(pause, &mut list).await.is_err());
    assert!(tokio::time::timeout(pause, next(&mut stream)).await.is_err());
    server.resume();
    assert_eq!(list.await.unwrap().items.len(), 1);
    assert_eq!(shorts(&mut stream, 1).await, ["added web"]);
}

#[tokio::test]
async fn a_server_that_stopped_comes_back_with_its_objects_or_with_others() {
    let server = start(Options::default());
    let (client, _folder) = client(&server).await;
    let api: Api<Service> = Api::all(client);
    for number in 0..5 {
        server.apply(&service("a", &format!("s{number}"))).unwrap();
    }
    let before = server.resource_version();
    let stream = api.watch(&WatchParams::default(), &before.to_string()).await.unwrap();
    let mut stream = std::pin::pin!(stream);
    server.stop();
    assert!(!shorts(&mut stream, 1).await[0].starts_with("added"));
    assert!(api.list(&ListParams::default()).await.is_err());
    server.start_again().unwrap();
    assert_eq!(api.list(&ListParams::default()).await.unwrap().items.len(), 5);

    server.stop();
    server.replace_store();
    server.apply(&service("a", "other")).unwrap();
    server.start_again().unwrap();
    let list = api.list(&ListParams::default()).await.unwrap();
    assert_eq!((list.items.len(), list.metadata.resource_version), (1, Some("2".to_owned())));
    // A client that believes in its old version hears nothing before the new ones have passed it.
    let stream = api.watch(&WatchParams::default(), &before.to_string()).await.unwrap();
    let mut stream = std::pin::pin!(stream);
    for number in 0..6 {
        server.apply(&service("a", &format!("n{number}"))).unwrap();
    }
    assert_eq!(shorts(&mut stream, 2).await, ["added n4", "added n5"]);
}

#[tokio::test]
async fn lists_are_slow_and_break_off() {
    let server = start(Options::default());
    let (client, _folder) = client(&server).await;
    let api: Api<Service> = Api::all(client);
    for number in 0..20 {
        server.apply(&service("a", &format!("s{number}"))).unwrap();
    }
    let took = async || {
        let start = Instant::now();
        assert_eq!(api.list(&ListParams::default()).await.unwrap().items.len(), 20);
        start.elapsed()
    };
    server.page_delay(Duration::from_millis(150));
    assert!(took().await >= Duration::from_millis(150));
    server.page_delay(Duration::ZERO);
    server.list_pace(Some(Pace { bytes: 500, pause: Duration::from_millis(10) }));
    assert!(took().await >= Duration::from_millis(150), "at least 20 pieces");
    server.list_pace(None);
    server.break_lists(1);
    let broken = api.list(&ListParams::default()).await.unwrap_err();
    assert!(!matches!(broken, kube::Error::Api(_)), "{broken}");
    took().await;
}

#[tokio::test]
async fn events_come_in_pieces_and_twice() {
    let server = start(Options::default());
    let (client, _folder) = client(&server).await;
    let api: Api<Service> = Api::all(client);
    server.watch_pace(Some(Pace { bytes: 7, pause: Duration::ZERO }));
    server.deliver_twice(true);
    let stream = api.watch(&WatchParams::default(), "1").await.unwrap();
    let mut stream = std::pin::pin!(stream);
    server.apply(&service("a", "wäb")).unwrap();
    assert_eq!(shorts(&mut stream, 2).await, ["added wäb", "added wäb"]);
    server.deliver_twice(false);
    server.delete(&service("a", "wäb")).unwrap();
    let Some(Ok(WatchEvent::Deleted(object))) = next(&mut stream).await else { panic!("deleted") };
    assert_eq!(object.resource_version(), Some(server.resource_version().to_string()));
}

#[tokio::test]
async fn a_server_without_streaming_lists_refuses_them() {
    let server = start(Options::default());
    let (client, _folder) = client(&server).await;
    let api: Api<Service> = Api::all(client);
    server.watch_list(false);
    let refused = api.watch(&WatchParams::default().initial_events(), "0").await.err();
    assert_eq!(refused.map(code), Some(422));
}

#[tokio::test]
async fn a_stream_that_falls_behind_the_history_is_told_so() {
    let server = start(Options { history: 5, ..Options::default() });
    let (client, _folder) = client(&server).await;
    let api: Api<Service> = Api::all(client);
    let stream = api.watch(&WatchParams::default(), "1").await.unwrap();
    let mut stream = std::pin::pin!(stream);
    server.pause();
    server.apply(&service("a", "first")).unwrap();
    // The stream has taken it up by then, and stands still with it.
    tokio::time::sleep(Duration::from_millis(300)).await;
    for number in 0..10 {
        server.apply(&service("a", &format!("s{number}"))).unwrap();
    }
    server.resume();
    assert_eq!(shorts(&mut stream, 3).await, ["added first", "error 410", "end"]);
}

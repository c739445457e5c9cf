//! The corners of the protocol, request by request.

use std::collections::BTreeSet;
use std::process::Command;
use std::time::Duration;

use axum::http;
use k8s_openapi::api::core::v1::{Node, Service};
use kube::ResourceExt;
use kube::api::{Api, ListParams, VersionMatch, WatchEvent, WatchParams};
use kube::client::Body;
use serde_json::Value;
use viaduct_tests::Protocol::Tcp;
use viaduct_tests::apiserver::{Kind, Options};
use viaduct_tests::manifests::Manifest;

use crate::{client, code, next, service, shorts, start};

#[tokio::test]
async fn objects_are_read_back_as_the_server_completes_them() {
    let server = start(Options::default());
    let (client, _folder) = client(&server).await;
    let web = service("shop", "web");
    server.apply(&web).unwrap();
    let api: Api<Service> = Api::namespaced(client.clone(), "shop");
    let first = api.get("web").await.unwrap();
    assert_eq!(first.spec.as_ref().unwrap().cluster_ip.as_deref(), Some("10.96.0.10"));
    assert_eq!(first.metadata.resource_version, Some(server.resource_version().to_string()));
    assert_eq!(first.metadata.generation, Some(1));

    server.apply(&web.clone().set("/metadata/labels/tier", "front")).unwrap();
    let second = api.get("web").await.unwrap();
    assert_eq!(second.metadata.uid, first.metadata.uid);
    assert_eq!(second.metadata.generation, Some(1), "labels are no change of what is wanted");
    server.apply(&web.clone().port("more", Tcp, 81)).unwrap();
    assert_eq!(api.get("web").await.unwrap().metadata.generation, Some(2));

    server.delete(&web).unwrap();
    assert_eq!(code(api.get("web").await.unwrap_err()), 404);
    assert!(server.delete(&web).is_err());
    server.apply(&web).unwrap();
    assert_ne!(api.get("web").await.unwrap().metadata.uid, first.metadata.uid);
    assert_eq!(client.apiserver_version().await.unwrap().minor, "34");
    assert!(client.list_api_groups().await.unwrap().groups.iter().any(|group| group.name == "discovery.k8s.io"));
}

#[tokio::test]
async fn a_wrong_token_is_refused_until_the_client_has_the_new_one() {
    let server = start(Options::default());
    let (old, _folder) = client(&server).await;
    let nodes: Api<Node> = Api::all(old);
    nodes.list(&ListParams::default()).await.unwrap();
    server.set_token("another");
    assert_eq!(code(nodes.list(&ListParams::default()).await.unwrap_err()), 401);
    let (new, _folder) = client(&server).await;
    Api::<Node>::all(new).list(&ListParams::default()).await.unwrap();
    assert_eq!(server.counts().unauthorized, 1);
}

#[tokio::test]
async fn plain_http_is_served_too() {
    let server = start(Options { tls: false, token: None, ..Options::default() });
    assert!(server.url().starts_with("http://"));
    let (client, _folder) = client(&server).await;
    Api::<Node>::all(client).list(&ListParams::default()).await.unwrap();
}

#[tokio::test]
async fn pages_come_from_one_snapshot() {
    let server = start(Options::default());
    let (client, _folder) = client(&server).await;
    for number in 0..7 {
        server.apply(&service("a", &format!("s{number}"))).unwrap();
    }
    server.apply(&service("b", "other")).unwrap();
    let api: Api<Service> = Api::namespaced(client.clone(), "a");
    let first = api.list(&ListParams::default().limit(3)).await.unwrap();
    assert_eq!((first.items.len(), first.metadata.remaining_item_count), (3, Some(4)));
    server.delete(&service("a", "s6")).unwrap();
    server.apply(&service("a", "s9")).unwrap();
    let (mut names, mut page) = (BTreeSet::new(), first.clone());
    loop {
        names.extend(page.items.iter().map(ResourceExt::name_any));
        assert_eq!(page.metadata.resource_version, first.metadata.resource_version);
        let Some(token) = page.metadata.continue_.filter(|token| !token.is_empty()) else { break };
        page = api.list(&ListParams::default().limit(3).continue_token(&token)).await.unwrap();
    }
    assert_eq!(names, (0..7).map(|number| format!("s{number}")).collect());

    let token = first.metadata.continue_.unwrap();
    server.forget_history();
    let expired = api.list(&ListParams::default().limit(3).continue_token(&token)).await.unwrap_err();
    assert_eq!(code(expired), 410);
    assert_eq!(Api::<Service>::all(client).list(&ListParams::default()).await.unwrap().items.len(), 8);
}

#[tokio::test]
async fn a_watch_tells_what_enters_and_leaves_its_selector() {
    let server = start(Options::default());
    let (client, _folder) = client(&server).await;
    let api: Api<Service> = Api::all(client);
    server.apply(&service("a", "old")).unwrap();
    let parameters = WatchParams::default().labels("!headless,tier notin (back)").fields("metadata.namespace=a");
    let stream = api.watch(&parameters, &server.resource_version().to_string()).await.unwrap();
    let mut stream = std::pin::pin!(stream);
    let web = service("a", "web");
    server.apply(&service("b", "web")).unwrap();
    server.apply(&web.clone().set("/metadata/labels/tier", "back")).unwrap();
    server.apply(&web.clone().set("/metadata/labels/tier", "front")).unwrap();
    server.apply(&web.clone().set("/metadata/labels/more", "front")).unwrap();
    server.apply(&web.clone().set("/metadata/labels/headless", "")).unwrap();
    let left = server.resource_version();
    server.delete(&web).unwrap();
    server.delete(&service("a", "old")).unwrap();
    let events = ["added web", "modified web"];
    assert_eq!(shorts(&mut stream, 2).await, events);
    let Some(Ok(WatchEvent::Deleted(object))) = next(&mut stream).await else { panic!("deleted") };
    assert_eq!(object.resource_version(), Some(left.to_string()), "under the version at which it left");
    assert!(!object.labels().contains_key("headless"), "in the state in which it was last seen");
    assert_eq!(shorts(&mut stream, 1).await, ["deleted old"]);
}

#[tokio::test]
async fn lists_mean_the_resource_version_that_they_name() {
    let server = start(Options { history: 4, ..Options::default() });
    let (client, _folder) = client(&server).await;
    let api: Api<Service> = Api::all(client.clone());
    for number in 0..6 {
        server.apply(&service("a", &format!("s{number}"))).unwrap();
    }
    let now = server.resource_version();
    let parameters = |version: u64, matching| ListParams {
        resource_version: Some(version.to_string()),
        version_match: Some(matching),
        ..ListParams::default()
    };
    let exact = api.list(&parameters(now - 2, VersionMatch::Exact)).await.unwrap();
    assert_eq!((exact.items.len(), exact.metadata.resource_version), (4, Some((now - 2).to_string())));
    let newer = api.list(&parameters(now - 2, VersionMatch::NotOlderThan)).await.unwrap();
    assert_eq!((newer.items.len(), newer.metadata.resource_version), (6, Some(now.to_string())));
    let any = http::Request::get("/api/v1/services?resourceVersion=0&limit=2").body(Vec::new()).unwrap();
    let any: Value = client.request(any).await.unwrap();
    assert_eq!(any["items"].as_array().unwrap().len(), 6, "lists of any age come whole");
    let legacy = format!("/api/v1/services?resourceVersion={}&limit=10", now - 2);
    let legacy: Value = client.request(http::Request::get(legacy).body(Vec::new()).unwrap()).await.unwrap();
    assert_eq!(legacy["items"].as_array().unwrap().len(), 4, "a page without a match parameter is of that version");
    // The history is 4 changes long.
    assert_eq!(api.list(&parameters(now - 4, VersionMatch::Exact)).await.unwrap().items.len(), 2);
    assert_eq!(code(api.list(&parameters(now - 5, VersionMatch::Exact)).await.unwrap_err()), 410);

    // A version that is still to come is waited for, for a while.
    let coming = parameters(now + 1, VersionMatch::NotOlderThan);
    let later = async {
        tokio::time::sleep(Duration::from_millis(50)).await;
        server.apply(&service("a", "later")).unwrap();
    };
    let (list, ()) = tokio::join!(api.list(&coming), later);
    assert_eq!(list.unwrap().items.len(), 7);
    // kube would ask again and again.
    let mut curl = Command::new("curl");
    curl.args(["-sk", "-H", "Authorization: Bearer test-token"]);
    let curl = curl.arg(format!("{}/api/v1/services?resourceVersion={}", server.url(), now + 9)).output().unwrap();
    let refused: Value = serde_json::from_slice(&curl.stdout).unwrap();
    assert_eq!((&refused["code"], &refused["reason"]), (&504.into(), &"Timeout".into()), "{refused}");
}

#[tokio::test]
async fn a_list_whose_token_expired_can_go_on_without_being_consistent() {
    let server = start(Options::default());
    let (client, _folder) = client(&server).await;
    let get = async |query: &str| -> Value {
        let uri = format!("/api/v1/services?limit=2{query}");
        let request = http::Request::get(uri).body(Body::empty()).unwrap();
        let answer = client.send(request).await.unwrap().into_body().collect_bytes().await.unwrap();
        serde_json::from_slice(&answer).unwrap()
    };
    for number in 0..3 {
        server.apply(&service("a", &format!("s{number}"))).unwrap();
    }
    let page = get("").await;
    server.apply(&service("a", "s3")).unwrap();
    server.forget_history();
    let token = |answer: &Value| format!("&continue={}", answer["metadata"]["continue"].as_str().unwrap());
    let expired = get(&token(&page)).await;
    assert_eq!((&expired["reason"], &expired["code"]), (&"Expired".into(), &410.into()), "{expired}");
    let rest = get(&token(&expired)).await;
    let names: Vec<_> = rest["items"].as_array().unwrap().iter().map(|item| &item["metadata"]["name"]).collect();
    assert_eq!(names, ["s2", "s3"]);
    assert!(rest["items"][0]["kind"].is_null(), "items of a list are of the list's kind");
}

#[tokio::test]
async fn requests_that_contradict_themselves_are_refused() {
    let server = start(Options::default());
    let (client, _folder) = client(&server).await;
    for (path, code) in [
        ("/api/v1/services?resourceVersionMatch=Exact", 422),
        ("/api/v1/services?resourceVersionMatch=Exact&resourceVersion=0", 422),
        ("/api/v1/services?resourceVersionMatch=Sometimes&resourceVersion=5", 422),
        ("/api/v1/services?sendInitialEvents=true", 422),
        ("/api/v1/services?watch=1&sendInitialEvents=true", 422),
        ("/api/v1/services?watch=1&resourceVersionMatch=NotOlderThan&resourceVersion=1", 422),
        ("/api/v1/services?resourceVersion=x", 400),
        ("/api/v1/services?continue=x", 400),
        ("/api/v1/services?limit=many", 400),
        ("/api/v1/services?labelSelector=a%20b", 400),
        ("/api/v1/services?fieldSelector=spec.ports%3D1", 400),
        ("/api/v1/pods", 404),
        ("/api/v1/services/web", 404),
        ("/api/v1/namespaces/a/nodes", 404),
        ("/apis/discovery.k8s.io/v1/services", 404),
    ] {
        let request = http::Request::get(path).body(Vec::new()).unwrap();
        let error = client.request::<Value>(request).await.unwrap_err();
        assert_eq!(crate::code(error), code, "{path}");
    }
    let post = http::Request::post("/api/v1/nodes").body(Vec::new()).unwrap();
    assert_eq!(code(client.request::<Value>(post).await.unwrap_err()), 405);
    let protobuf = http::Request::get("/api/v1/nodes").header("accept", "application/vnd.kubernetes.protobuf");
    assert_eq!(code(client.request::<Value>(protobuf.body(Vec::new()).unwrap()).await.unwrap_err()), 406);
}

#[tokio::test]
async fn a_watch_without_a_version_begins_with_what_there_is() {
    let server = start(Options::default());
    let (client, _folder) = client(&server).await;
    server.apply(&service("a", "first")).unwrap();
    server.apply(&service("a", "second")).unwrap();
    let api: Api<Service> = Api::all(client);
    for version in ["0", ""] {
        let stream = api.watch(&WatchParams::default().fields("metadata.name!=second"), version).await.unwrap();
        let mut stream = std::pin::pin!(stream);
        assert_eq!(shorts(&mut stream, 1).await, ["added first"]);
        server.apply(&service("a", "third")).unwrap();
        assert_eq!(shorts(&mut stream, 1).await, ["added third"]);
        server.delete(&service("a", "third")).unwrap();
        assert_eq!(shorts(&mut stream, 1).await, ["deleted third"]);
    }
}

#[tokio::test]
async fn a_streaming_list_ends_with_its_bookmark() {
    let server = start(Options::default());
    let (client, _folder) = client(&server).await;
    server.fill([service("a", "first"), service("a", "second")].map(|service| service.object().clone())).unwrap();
    let api: Api<Service> = Api::all(client);
    let stream = api.watch(&WatchParams::default().initial_events(), "0").await.unwrap();
    let mut stream = std::pin::pin!(stream);
    assert_eq!(shorts(&mut stream, 2).await, ["added first", "added second"]);
    let Some(Ok(WatchEvent::Bookmark(bookmark))) = next(&mut stream).await else { panic!("a bookmark") };
    assert_eq!(bookmark.metadata.annotations["k8s.io/initial-events-end"], "true");
    assert_eq!(bookmark.metadata.resource_version, server.resource_version().to_string());
    server.apply(&service("a", "third")).unwrap();
    assert_eq!(shorts(&mut stream, 1).await, ["added third"]);
}

#[tokio::test]
async fn bookmarks_tell_of_versions_without_events() {
    let server = start(Options { bookmark_interval: Duration::from_millis(50), ..Options::default() });
    let (client, _folder) = client(&server).await;
    let api: Api<Service> = Api::all(client);
    let version = server.resource_version().to_string();
    let stream = api.watch(&WatchParams::default(), &version).await.unwrap();
    let mut stream = std::pin::pin!(stream);
    server
        .apply_value(serde_json::json!({
            "apiVersion": "v1", "kind": "Node", "metadata": { "name": "node1" },
        }))
        .unwrap();
    let after = server.resource_version().to_string();
    while let Some(Ok(WatchEvent::Bookmark(bookmark))) = next(&mut stream).await {
        if bookmark.metadata.resource_version == after {
            break;
        }
    }
    server.bookmarks(false);
    server.delete_named(Kind::Node, "", "node1").unwrap();
    server.apply(&service("a", "web")).unwrap();
    let mut events = shorts(&mut stream, 1).await;
    // One may have been under way.
    if events == ["bookmark"] {
        events = shorts(&mut stream, 1).await;
    }
    assert_eq!(events, ["added web"]);
    let silence = tokio::time::timeout(Duration::from_millis(200), next(&mut stream)).await;
    assert!(silence.is_err(), "{silence:?}");
}

#[tokio::test]
async fn a_watch_ends_at_its_time() {
    let server = start(Options::default());
    let (client, _folder) = client(&server).await;
    let api: Api<Service> = Api::all(client);
    let stream = api.watch(&WatchParams::default().timeout(1), "1").await.unwrap();
    assert_eq!(shorts(&mut std::pin::pin!(stream), 1).await, ["end"]);
}

#[tokio::test]
async fn a_watch_from_a_version_that_is_forgotten_is_gone() {
    let server = start(Options { history: 3, ..Options::default() });
    let (client, _folder) = client(&server).await;
    let api: Api<Service> = Api::all(client);
    for number in 0..5 {
        server.apply(&service("a", &format!("s{number}"))).unwrap();
    }
    let now = server.resource_version();
    let stream = api.watch(&WatchParams::default(), &(now - 4).to_string()).await.unwrap();
    assert_eq!(shorts(&mut std::pin::pin!(stream), 2).await, ["error 410", "end"]);
    let stream = api.watch(&WatchParams::default(), &(now - 3).to_string()).await.unwrap();
    assert_eq!(shorts(&mut std::pin::pin!(stream), 3).await, ["added s2", "added s3", "added s4"]);
    server.gone_as_status(true);
    let refused = api.watch(&WatchParams::default(), &(now - 4).to_string()).await.err();
    assert_eq!(refused.map(code), Some(410));
}

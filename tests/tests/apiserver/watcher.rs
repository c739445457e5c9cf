//! kube's watcher in both of its ways, through everything that can go wrong: in the end it has what the server has.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures_util::StreamExt;
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::runtime::watcher::{self, Event, watcher};
use kube::{Api, Client, ResourceExt};
use tokio::task::JoinHandle;
use viaduct_tests::apiserver::{ApiServer, Cut, Kind, Options, Pace, cluster};
use viaduct_tests::{EndpointSliceManifest, wait_until};

use crate::{client, start};

/// What a watcher knows: name -> label `turn`.
type Known = Arc<Mutex<BTreeMap<String, String>>>;

fn follow(client: Client, config: watcher::Config) -> (Known, JoinHandle<()>) {
    let known = Known::default();
    let mirror = Arc::clone(&known);
    let task = tokio::spawn(async move {
        let (api, mut fresh) = (Api::<EndpointSlice>::all(client), BTreeMap::new());
        let mut events = watcher(api.clone(), config.clone()).boxed();
        while let Some(event) = events.next().await {
            let entry =
                |slice: &EndpointSlice| (slice.name_any(), slice.labels().get("turn").cloned().unwrap_or_default());
            match event {
                Ok(Event::Init) => fresh.clear(),
                Ok(Event::InitApply(slice)) => fresh.extend([entry(&slice)]),
                Ok(Event::InitDone) => *mirror.lock().unwrap() = std::mem::take(&mut fresh),
                Ok(Event::Apply(slice)) => mirror.lock().unwrap().extend([entry(&slice)]),
                Ok(Event::Delete(slice)) => drop(mirror.lock().unwrap().remove(&slice.name_any())),
                // This watcher asks from the same version for ever when the answer itself is 410.
                Err(watcher::Error::WatchStartFailed(kube::Error::Api(status))) if status.code == 410 => {
                    events = watcher(api.clone(), config.clone()).boxed();
                }
                Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
            }
        }
    });
    (known, task)
}

fn slice(number: usize, turn: usize) -> EndpointSliceManifest {
    EndpointSliceManifest::new("default", &format!("s{number}")).set("/metadata/labels/turn", turn.to_string())
}

/// Changes some of 30 slices, and waits until the watcher knows all.
async fn turn(server: &ApiServer, expected: &mut BTreeMap<String, String>, turn: usize, known: &Known) {
    for number in (0..30).filter(|number| !(number + turn).is_multiple_of(3)) {
        let name = format!("s{number}-1");
        if (number + turn).is_multiple_of(5) {
            if expected.remove(&name).is_some() {
                server.delete_named(Kind::EndpointSlice, "default", &name).unwrap();
            }
        } else {
            server.apply(&slice(number, turn)).unwrap();
            expected.insert(name, turn.to_string());
        }
    }
    settled(expected, known).await;
}

async fn settled(expected: &BTreeMap<String, String>, known: &Known) {
    let (expected, known) = (expected.clone(), Arc::clone(known));
    let wait = move || {
        let same = wait_until("the watcher knows what the server has", Duration::from_secs(20), || {
            (*known.lock().unwrap() == expected).then_some(())
        });
        assert!(same.is_ok(), "expected {expected:?}\nknown {:?}", known.lock().unwrap());
    };
    tokio::task::spawn_blocking(wait).await.unwrap();
}

#[tokio::test]
async fn the_watcher_knows_what_the_server_has_after_every_fault() {
    for config in [watcher::Config::default().page_size(7), watcher::Config::default().streaming_lists()] {
        let server = start(Options { history: 50, ..Options::default() });
        let (client, _folder) = client(&server).await;
        let mut expected = BTreeMap::new();
        let (known, task) = follow(client, config.clone());
        type Fault = fn(&ApiServer);
        let faults: [(&str, Fault); 10] = [
            ("none", |_| {}),
            ("ended", |server| server.cut_watches(Cut::Ended)),
            ("broken", |server| server.cut_watches(Cut::Broken)),
            ("inside an event", |server| server.cut_watches(Cut::InsideEvent)),
            ("refused", |server| {
                server.refuse(3, 503);
                server.cut_watches(Cut::Ended);
            }),
            ("forgotten", |server| {
                server.stop();
                server.apply(&slice(99, 0)).unwrap();
                server.delete(&slice(99, 0)).unwrap();
                server.forget_history();
                server.start_again().unwrap();
            }),
            ("gone as a status", |server| {
                server.gone_as_status(true);
                server.stop();
                server.apply(&slice(99, 0)).unwrap();
                server.delete(&slice(99, 0)).unwrap();
                server.forget_history();
                server.start_again().unwrap();
            }),
            ("half a list", |server| {
                server.break_lists(2);
                server.stop();
                server.apply(&slice(99, 0)).unwrap();
                server.delete(&slice(99, 0)).unwrap();
                server.forget_history();
                server.start_again().unwrap();
            }),
            ("pieces", |server| server.watch_pace(Some(Pace { bytes: 11, pause: Duration::ZERO }))),
            ("twice", |server| server.deliver_twice(true)),
        ];
        for (number, (name, fault)) in faults.into_iter().enumerate() {
            println!("{name}");
            fault(&server);
            turn(&server, &mut expected, number, &known).await;
        }
        let requests = server.requests();
        let streaming = requests.iter().any(|request| request.contains("sendInitialEvents=true"));
        assert_eq!(streaming, server.counts().lists == 0, "{requests:#?}");
        task.abort();
    }
}

#[tokio::test]
async fn a_watcher_follows_a_large_cluster() {
    let server = start(Options::default());
    server.fill(cluster(500, 10)).unwrap();
    let (client, _folder) = client(&server).await;
    let (known, task) = follow(client, watcher::Config::default());
    let mut expected: BTreeMap<_, _> = (0..500).map(|number| (format!("svc-{number:06}-1"), String::new())).collect();
    settled(&expected, &known).await;
    assert_eq!(server.counts().lists, 1, "a page has 500 objects");
    for number in 0..200 {
        server.apply(&slice(number, 1)).unwrap();
        expected.insert(format!("s{number}-1"), "1".into());
    }
    settled(&expected, &known).await;
    task.abort();
}

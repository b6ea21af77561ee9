//! The real daemon over real brokers: what it answers it keeps.

mod common;

use std::time::Duration;

use berth_controller::config::BrokerChoice;
use berth_controller::io::bus::{Bus, BusEvents};
use berth_protocol::broker::BrokerUrl;
use common::*;

const JOB: &[u8] = br#"{"image":"host","command":["true"]}"#;

/// Sends until it is answered, as every client does; whether the answer says that the job is accepted.
async fn submit(bus: &Bus, events: &mut BusEvents, job: &str) -> bool {
    let (to, from) = (topic(&format!("jobs/default/{job}/submit")), format!("jobs/default/{job}/answer"));
    loop {
        bus.publish(&to, JOB.to_vec(), false).await;
        let answered = async {
            loop {
                let (topic, payload) = next_message(events).await;
                if topic == from {
                    return String::from_utf8(payload).unwrap().contains("\"accepted\":true");
                }
            }
        };
        if let Ok(accepted) = tokio::time::timeout(Duration::from_secs(2), answered).await {
            return accepted;
        }
    }
}

/// Asks until it is answered: the broker hears clients before the controller has subscribed.
async fn query(bus: &Bus, events: &mut BusEvents, query: &str) -> String {
    let request = format!(r#"{{"id":"q","query":{query}}}"#);
    loop {
        bus.publish(&topic("query/user/request"), request.clone().into_bytes(), false).await;
        let replied = async {
            loop {
                let (topic, payload) = next_message(events).await;
                if topic == "query/user/reply" {
                    return String::from_utf8(payload).unwrap();
                }
            }
        };
        if let Ok(reply) = tokio::time::timeout(Duration::from_secs(2), replied).await {
            return reply;
        }
    }
}

#[tokio::test]
async fn what_was_answered_is_there_after_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let daemon = TestDaemon::start(dir.path(), BrokerChoice::Embedded);
    let url = BrokerUrl::new(daemon.mqtt.unwrap());
    let (bus, mut events, _) = client(url, "user", &["jobs/+/+/answer", "query/user/reply"]).await;
    for n in 0..5 {
        assert!(submit(&bus, &mut events, &format!("job-{n}")).await);
    }
    drop(daemon);

    let daemon = TestDaemon::start(dir.path(), BrokerChoice::Embedded);
    let url = BrokerUrl::new(daemon.mqtt.unwrap());
    let (bus, mut events, _) = client(url.clone(), "user", &["jobs/+/+/status", "query/user/reply"]).await;
    for n in 0..5 {
        let reply =
            query(&bus, &mut events, &format!(r#"{{"job":{{"namespace":"default","job":"job-{n}"}}}}"#))
                .await;
        assert!(reply.contains(r#""phase":"Pending""#), "{reply}");
    }
    // The embedded broker forgot the statuses; the controller has said them again.
    let (_bus, mut late, _) = client(url, "late", &["jobs/default/job-3/status"]).await;
    assert_eq!(next_message(&mut late).await.0, "jobs/default/job-3/status");
}

#[tokio::test]
async fn it_works_with_a_broker_by_url_that_is_killed_meanwhile() {
    let port = free_port();
    let Some(first) = Mosquitto::start(port) else { return };
    let dir = tempfile::tempdir().unwrap();
    let _daemon = TestDaemon::start(dir.path(), BrokerChoice::Url(first.url()));
    let (bus, mut events, _) = client(first.url(), "user", &["jobs/+/+/answer"]).await;
    assert!(submit(&bus, &mut events, "before").await);
    drop(first);
    let _second = Mosquitto::start(port).unwrap();
    assert!(submit(&bus, &mut events, "after").await);
}

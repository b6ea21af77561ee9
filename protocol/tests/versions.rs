//! Messages as a version of the protocol wrote them, recorded: what is said to a program of that version, and what it
//! says, means the same to this one. A recorded file is never changed; where the protocol gets a new version, its files are
//! a new directory, and those of the version before stay.

use std::path::PathBuf;

use berth_protocol::codec::{ENVELOPE_VERSION, decode, encode};
use berth_protocol::ids::{ClientId, JobName, Namespace, NodeId};
use berth_protocol::log::LogMessage;
use berth_protocol::message::node::{
    Bye, Desired, Events, Heartbeat, Hello, Lease, NodeEvent, NodeRequest, SpecMessage,
};
use berth_protocol::message::query::{QueryReply, QueryRequest};
use berth_protocol::message::user::{Answer, JobCommand, JobStatus, NodeStatus};
use berth_protocol::topic::{JobTopic, NodeTopic, Topic};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

fn recorded(name: &str) -> Value {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join(format!("tests/recorded/{ENVELOPE_VERSION}/{name}.json"));
    let bytes = std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    serde_json::from_slice(&bytes).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn of_node(kind: NodeTopic) -> Topic {
    Topic::node(&NodeId::parse("box-1").unwrap(), kind)
}

fn of_job(kind: JobTopic) -> Topic {
    Topic::job(&Namespace::default_namespace(), &JobName::parse("digits").unwrap(), kind)
}

fn client() -> ClientId {
    ClientId::parse("c").unwrap()
}

/// What this program makes of a message, written down again by it.
type Meaning = fn(&Topic, &[u8]) -> Result<Value, String>;

fn meaning<T: DeserializeOwned + Serialize>(topic: &Topic, payload: &[u8]) -> Result<Value, String> {
    let message: T = decode(topic, payload).map_err(|error| error.to_string())?;
    serde_json::from_slice(&encode(topic, &message).unwrap()).map_err(|error| error.to_string())
}

fn messages() -> Vec<(&'static str, Topic, Meaning)> {
    let logs = Topic::Logs {
        namespace: Namespace::default_namespace(),
        pod: JobName::parse("digits").unwrap().pod(0),
    };
    vec![
        ("hello", of_node(NodeTopic::Hello), meaning::<Hello>),
        ("heartbeat", of_node(NodeTopic::Heartbeat), meaning::<Heartbeat>),
        ("event", of_node(NodeTopic::Event), meaning::<Events>),
        ("bye", of_node(NodeTopic::Bye), meaning::<Bye>),
        ("desired", of_node(NodeTopic::Desired), meaning::<Desired>),
        ("spec", of_node(NodeTopic::Spec), meaning::<SpecMessage>),
        ("request", of_node(NodeTopic::Request), meaning::<NodeRequest>),
        ("lease", of_node(NodeTopic::Lease), meaning::<Lease>),
        ("lease_of_all", of_node(NodeTopic::Lease), meaning::<Lease>),
        ("command", of_job(JobTopic::Command), meaning::<JobCommand>),
        ("accepted", of_job(JobTopic::Answer), meaning::<Answer>),
        ("rejected", of_job(JobTopic::Answer), meaning::<Answer>),
        ("status", of_job(JobTopic::Status), meaning::<JobStatus>),
        ("log", logs, meaning::<LogMessage>),
        ("query", Topic::QueryRequest { client: client() }, meaning::<QueryRequest>),
        ("reply", Topic::QueryReply { client: client() }, meaning::<QueryReply>),
        ("failed_reply", Topic::QueryReply { client: client() }, meaning::<QueryReply>),
        ("state", Topic::NodeState { node: NodeId::parse("box-1").unwrap() }, meaning::<NodeStatus>),
    ]
}

#[test]
fn recorded_messages_mean_what_they_did() {
    for (name, topic, meaning) in messages() {
        let recorded = recorded(name);
        let found = meaning(&topic, recorded.to_string().as_bytes());
        assert_eq!(found.unwrap_or_else(|error| panic!("{name}: {error}")), recorded, "{name}");
    }
}

#[test]
fn a_spec_is_read_as_its_job_was_meant() {
    let template = recorded("spec")["body"]["spec"].clone();
    let read: berth_protocol::job::PodTemplate = serde_json::from_value(template.clone()).unwrap();
    assert_eq!(serde_json::to_value(read).unwrap(), template);
}

/// Where an object stands for one of several things, or for names of anybody's choice, a further field is another thing.
const NO_FIELDS: [&str; 9] =
    ["/event", "/change", "/covers", "/state", "/labels", "/podCounts", "/query", "/env", "/spec"];

/// The places of all objects to which a newer version may add a field.
fn objects(value: &Value, at: String, found: &mut Vec<String>) {
    match value {
        Value::Object(fields) => {
            if !NO_FIELDS.iter().any(|name| at.ends_with(name)) {
                found.push(at.clone());
            }
            fields.iter().for_each(|(name, value)| objects(value, format!("{at}/{name}"), found));
        }
        Value::Array(items) => {
            items.iter().enumerate().for_each(|(n, value)| objects(value, format!("{at}/{n}"), found));
        }
        _ => {}
    }
}

#[test]
fn what_a_newer_version_adds_is_passed_over() {
    let mut places = 0;
    for (name, topic, meaning) in messages() {
        let recorded = recorded(name);
        let mut found = Vec::new();
        objects(&recorded, String::new(), &mut found);
        // These carry JSON as it came.
        found.retain(|at| !(at.starts_with("/body/spec") || at.starts_with("/result")));
        for at in found {
            let mut newer = recorded.clone();
            newer.pointer_mut(&at).unwrap()["addedLater"] = json!({"by": ["a", "newer", "version"]});
            let read = meaning(&topic, newer.to_string().as_bytes());
            assert_eq!(read.unwrap_or_else(|error| panic!("{name}{at}: {error}")), recorded, "{name}{at}");
            places += 1;
        }
    }
    assert!(places > 60, "{places} objects are few");
}

/// One event that this version does not know keeps back none of the others.
#[test]
fn an_event_of_a_newer_version_is_one_that_changes_nothing() {
    let mut newer = recorded("event");
    newer["body"]["events"][2]["event"] = json!({"weather": {"of": "tomorrow"}});
    newer["body"]["events"][3]["event"]["pod"]["change"] = json!({"dreaming": {}});
    let read: Events = decode(&of_node(NodeTopic::Event), newer.to_string().as_bytes()).unwrap();
    assert_eq!(read.events.len(), 14);
    assert_eq!(read.events.iter().map(|event| event.n).collect::<Vec<_>>(), (1..=14).collect::<Vec<_>>());
    let unknown = read.events.iter().filter(|event| event.event == NodeEvent::Unknown).map(|event| event.n);
    assert_eq!(unknown.collect::<Vec<_>>(), [3, 4]);
}

#[test]
fn another_version_of_the_envelope_is_refused_in_words_that_say_what_to_do() {
    let mut newer = recorded("hello");
    newer["v"] = json!(2);
    let refused = decode::<Hello>(&of_node(NodeTopic::Hello), newer.to_string().as_bytes()).unwrap_err();
    assert_eq!(refused.kind(), "version");
    assert_eq!(
        refused.to_string(),
        "the message is of version 2 of the protocol between controller and agents, this program speaks version 1: \
         upgrade the older of the two"
    );
}

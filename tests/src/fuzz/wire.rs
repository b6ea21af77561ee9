//! Any bytes as a topic, as each message, as records of a log, and as frames and manifest of a checkpoint: no panic,
//! and what is read is what is written.

use std::fmt::Debug;

use berth_protocol::chunk::{Frame, GrantRequest};
use berth_protocol::codec::{decode, encode, verify};
use berth_protocol::delegation::{Delegation, Trust};
use berth_protocol::ids::{ClientId, ClusterName, Digest, JobName, Namespace, NodeId};
use berth_protocol::log::{LogMessage, read_record};
use berth_protocol::manifest::Manifest;
use berth_protocol::message::node::{
    Bye, Desired, Events, Heartbeat, Hello, Lease, NodeRequest, SpecMessage,
};
use berth_protocol::message::query::{QueryReply, QueryRequest};
use berth_protocol::message::user::{Answer, JobCommand, JobStatus, NodeStatus};
use berth_protocol::request;
use berth_protocol::sign::PublicKey;
use berth_protocol::token;
use berth_protocol::topic::{JobTopic, NodeTopic, Topic};
use berth_protocol::units::Timestamp;
use serde::Serialize;
use serde::de::DeserializeOwned;

pub fn wire(bytes: &[u8]) {
    topic(bytes);
    records(bytes);
    messages(bytes);
    checkpoints(bytes);
    tokens(bytes);
    delegations(bytes);
}

fn topic(bytes: &[u8]) {
    let (Ok(cluster), Ok(text)) = (ClusterName::parse("lab"), std::str::from_utf8(bytes)) else { return };
    if let Some(topic) = Topic::parse(&cluster, text) {
        assert_eq!(topic.render(&cluster), text);
    }
}

fn records(mut bytes: &[u8]) {
    while let Ok((record, length)) = read_record(bytes) {
        let mut written = Vec::new();
        record.write(&mut written);
        assert_eq!(read_record(&written), Ok((record, written.len())));
        bytes = &bytes[length..];
    }
}

fn messages(bytes: &[u8]) {
    let parsed = (NodeId::parse("n"), ClientId::parse("c"), Namespace::parse("d"), JobName::parse("j"));
    let (Ok(node), Ok(client), Ok(namespace), Ok(name)) = parsed else { return };
    let of_node = |kind| Topic::node(&node, kind);
    let of_job = |kind| Topic::job(&namespace, &name, kind);
    // By nobody's key, whatever it says.
    assert!(
        ClusterName::parse("lab").is_ok_and(|lab| verify(&lab, &of_node(NodeTopic::Lease), bytes).is_err())
    );
    if let Ok(lab) = ClusterName::parse("lab") {
        let opened = request::open(&lab, &of_job(JobTopic::Submit), bytes);
        assert!(!matches!(opened, Ok(Some(_))), "signed by nobody");
    }
    there_and_back::<Hello>(&of_node(NodeTopic::Hello), bytes);
    there_and_back::<Heartbeat>(&of_node(NodeTopic::Heartbeat), bytes);
    there_and_back::<Events>(&of_node(NodeTopic::Event), bytes);
    there_and_back::<Bye>(&of_node(NodeTopic::Bye), bytes);
    there_and_back::<Desired>(&of_node(NodeTopic::Desired), bytes);
    there_and_back::<NodeRequest>(&of_node(NodeTopic::Request), bytes);
    there_and_back::<Lease>(&of_node(NodeTopic::Lease), bytes);
    there_and_back::<JobCommand>(&of_job(JobTopic::Command), bytes);
    there_and_back::<Answer>(&of_job(JobTopic::Answer), bytes);
    there_and_back::<JobStatus>(&of_job(JobTopic::Status), bytes);
    there_and_back::<LogMessage>(&Topic::Logs { namespace, pod: name.pod(0) }, bytes);
    there_and_back::<NodeStatus>(&Topic::NodeState { node: node.clone() }, bytes);
    there_and_back::<QueryRequest>(&Topic::QueryRequest { client: client.clone() }, bytes);
    // These two carry JSON as it came, whose numbers may be written otherwise.
    let _ = decode::<QueryReply>(&Topic::QueryReply { client }, bytes);
    let _ = decode::<SpecMessage>(&of_node(NodeTopic::Spec), bytes);
}

fn checkpoints(mut bytes: &[u8]) {
    if let Ok(manifest) = Manifest::parse(&Digest::of(bytes), bytes) {
        let (id, written) = manifest.render().expect("what was read is within bounds");
        assert_eq!(Manifest::parse(&id, &written).expect("what is written can be read"), manifest);
    }
    let _ = serde_json::from_slice::<GrantRequest>(bytes);
    while let Ok((frame, length)) = Frame::read(bytes) {
        let mut written = Vec::new();
        frame.write(&mut written);
        assert_eq!(written, bytes[..length]);
        bytes = &bytes[length..];
    }
}

fn tokens(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let (secret, now) = ([7; 32], Timestamp(0));
    let opened = token::verify(&secret, text, now);
    assert!(opened.is_err() || token::verify(&[8; 32], text, now).is_err(), "two secrets open {text}");
}

fn delegations(bytes: &[u8]) {
    let Ok(read) = serde_json::from_slice::<Delegation>(bytes) else { return };
    let written = serde_json::to_vec(&read).expect("what was read can be written");
    assert_eq!(serde_json::from_slice::<Delegation>(&written).expect("what is written can be read"), read);
    let (Ok(lab), root) = (ClusterName::parse("lab"), PublicKey::from_bytes([7; 32])) else { return };
    let trust = Trust::new(lab, root);
    assert!(trust.judge(&read.key.clone(), Some(read)).is_err(), "named by nobody");
}

fn there_and_back<T: DeserializeOwned + Serialize + PartialEq + Debug>(topic: &Topic, bytes: &[u8]) {
    let Ok(message) = decode::<T>(topic, bytes) else { return };
    // Escapes may make it longer than it came.
    let Ok(written) = encode(topic, &message) else { return };
    assert_eq!(decode::<T>(topic, &written).expect("what is written can be read"), message);
}

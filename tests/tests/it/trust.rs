//! A broker that lets everybody say everything, and somebody on it who does.

use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use berth_protocol::codec;
use berth_protocol::ids::{ClusterName, NodeId};
use berth_protocol::sign::{Key, SEED_BYTES, Signer};
use berth_protocol::topic::{NodeTopic, Topic};
use rumqttc::{Client, Event, MqttOptions, Packet, QoS};
use serde_json::{Value, json};

use crate::cluster::{Cluster, text, until};

/// Hears everything, and says what it likes, on its own.
struct Attacker {
    client: Client,
    heard: Receiver<(String, Vec<u8>)>,
}

impl Attacker {
    fn on(cluster: &Cluster) -> Self {
        until("the broker listens", 10, || std::net::TcpStream::connect(("127.0.0.1", cluster.port)).ok());
        let mut options = MqttOptions::new("attacker", "127.0.0.1", cluster.port);
        options.set_max_packet_size(128 * 1024, 128 * 1024);
        let (client, mut connection) = Client::new(options, 1024);
        client.subscribe("berth/#", QoS::AtLeastOnce).expect("it may ask");
        let (to, heard) = channel();
        std::thread::spawn(move || {
            for event in connection.iter() {
                let Ok(event) = event else { return };
                if let Event::Incoming(Packet::Publish(message)) = event
                    && to.send((message.topic, message.payload.to_vec())).is_err()
                {
                    return;
                }
            }
        });
        Self { client, heard }
    }

    fn say(&self, topic: &Topic, payload: Vec<u8>) {
        let topic = topic.render(&ClusterName::parse("default").expect("a name"));
        self.client.publish(topic, QoS::AtLeastOnce, false, payload).expect("it may say so");
    }

    /// All that is said on a topic, from now on and before, until something is.
    fn overhear(&self, topic: &str) -> Vec<u8> {
        let end = std::time::Instant::now() + Duration::from_secs(30);
        loop {
            let left = end.saturating_duration_since(std::time::Instant::now());
            let (on, payload) =
                self.heard.recv_timeout(left).unwrap_or_else(|_| panic!("nothing on {topic}"));
            if on == topic {
                return payload;
            }
        }
    }
}

fn of_node(node: &str, kind: NodeTopic) -> Topic {
    Topic::node(&NodeId::parse(node).expect("a name"), kind)
}

/// An order to have no pods, by a controller of the far future.
fn nothing(store: &str) -> Value {
    json!({"store": store, "term": 999_999, "generation": 999_999, "pods": []})
}

fn signed(seed: u8, cluster: &str, topic: &Topic, message: &Value) -> Vec<u8> {
    let signer =
        Signer::new(ClusterName::parse(cluster).expect("a name"), Key::from_seed(&[seed; SEED_BYTES]));
    codec::sign(&signer, topic, &codec::encode(topic, message).expect("it is small")).expect("it is JSON")
}

/// A job that runs on the only node, and an attacker who has heard all of it.
fn attacked() -> (Cluster, Attacker) {
    let mut cluster = Cluster::on_mosquitto();
    let attacker = Attacker::on(&cluster);
    cluster.agent("a1", &[]);
    let steady = "image: host\ncommand: [sleep, \"600\"]\nresources: {cpu: 100m, memory: 32Mi}\n";
    cluster.submit("steady", steady);
    cluster.until_phase("steady", "Running", 30);
    (cluster, attacker)
}

/// Nothing has happened to it.
fn assert_steady(cluster: &Cluster) {
    let job = cluster.job("steady");
    let (phase, evictions, epoch) = (&job["phase"], &job["evictions"], &job["pods"][0]["epoch"]);
    assert_eq!((phase, evictions, epoch), (&"Running".into(), &0.into(), &1.into()), "{job:#}");
}

#[test]
fn orders_that_the_controller_did_not_sign_are_not_obeyed() {
    let (cluster, attacker) = attacked();
    let real = attacker.overhear("berth/v1/default/nodes/a1/desired");
    let real: Value = serde_json::from_slice(&real).expect("JSON");
    let store = real["body"]["store"].as_str().expect("an order names its store").to_owned();
    let desired = of_node("a1", NodeTopic::Desired);

    // Its real envelope around another body; the very order for another node; a key of nobody's; of another cluster.
    let mut altered = real.clone();
    altered["body"] = nothing(&store);
    let unsigned = codec::encode(&desired, &nothing(&store)).expect("it is small");
    let forgeries = [
        (altered.to_string().into_bytes(), "the message's signature is not of this message on this topic"),
        (unsigned, "the message is unsigned"),
        (signed(1, "default", &desired, &nothing(&store)), "the message is signed by key "),
        (signed(1, "other", &desired, &nothing(&store)), "the message's signature is not of this message"),
    ];
    for (forged, refusal) in forgeries {
        attacker.say(&desired, forged);
        until(refusal, 30, || cluster.log("a1").contains(refusal).then_some(()));
    }
    // An order once given, again: it is the controller's own, and an old one.
    attacker.say(&desired, real.to_string().into_bytes());
    for kind in [NodeTopic::Lease, NodeTopic::Spec, NodeTopic::Request] {
        attacker.say(&of_node("a1", kind), b"{\"v\":1,\"body\":{}}".to_vec());
    }
    // Real orders are obeyed all the same, and nothing has happened to the pod.
    let output = cluster.run(&["run", "--image", "host", "--", "/bin/echo", "real"]);
    assert!(output.status.success(), "{}", text(&output));
    assert_steady(&cluster);
}

#[test]
fn words_that_a_node_did_not_sign_are_not_believed() {
    let (cluster, attacker) = attacked();
    let hello = attacker.overhear("berth/v1/default/nodes/a1/hello");
    let hello: Value = serde_json::from_slice(&hello).expect("JSON");

    // The node began anew and has no pods: were it believed, the pod would be placed again while it runs.
    let mut anew = hello["body"].clone();
    (anew["nonce"], anew["ledger"], anew["session"]) = ("other".into(), "other".into(), 99.into());
    let topic = of_node("a1", NodeTopic::Hello);
    attacker.say(&topic, codec::encode(&topic, &anew).expect("it is small"));
    attacker.say(&topic, signed(1, "default", &topic, &anew));
    let bye = of_node("a1", NodeTopic::Bye);
    attacker.say(&bye, signed(1, "default", &bye, &json!({"nonce": hello["body"]["nonce"]})));
    // What the first of these says is told to whoever said it.
    let end = std::time::Instant::now() + Duration::from_secs(30);
    loop {
        assert!(std::time::Instant::now() < end, "the second agent is not told");
        let lease = attacker.overhear("berth/v1/default/nodes/a1/lease");
        let lease: Value = serde_json::from_slice(&lease).expect("JSON");
        if lease["body"]["nonce"] == "other" {
            assert!(lease["body"]["refused"].as_str().is_some_and(|why| why.contains("--node")), "{lease:#}");
            break;
        }
    }
    let metrics = until("both are counted", 30, || {
        let output = std::process::Command::new("curl")
            .args(["-s", &format!("http://127.0.0.1:{}/metrics", cluster.http)])
            .output()
            .ok()?;
        let metrics = text(&output);
        metrics.contains("berth_refused_total{reason=\"other-key\"} 2").then_some(metrics)
    });
    assert!(metrics.contains("berth_refused_total{reason=\"unsigned\"} 1"), "{metrics}");
    let nodes = cluster.json(&["get", "nodes"]).expect("nodes");
    assert_eq!((&nodes[0]["node"], &nodes[0]["state"]), (&"a1".into(), &"online".into()));
    assert_steady(&cluster);
}

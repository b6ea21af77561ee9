//! The controller signs with another key, and whoever has the old one orders nothing.

use std::process::{Command, Output};

use berth_controller::io::ca::Ca;
use berth_controller::io::store::{self, StoreChoice};
use berth_controller::run::signer;
use berth_protocol::codec;
use berth_protocol::delegation::{Delegation, LIFE};
use berth_protocol::ids::{ClusterName, NodeId};
use berth_protocol::sign::{Key, SEED_BYTES, Signer};
use berth_protocol::topic::{NodeTopic, Topic};
use berth_protocol::units::Timestamp;
use berth_tests::etcd::Etcd;
use rumqttc::{Client, MqttOptions, QoS, TlsConfiguration, Transport};
use serde_json::{Value, json};

use crate::cluster::{Cluster, Daemon, free_port, program, text, until};

/// Counts into its log, once a second.
const STEADY: &str = "image: host\nnetwork: none\ncommand: [sh, -c, \"i=0; while :; do echo $i; i=$((i+1)); sleep 1; done\"]\n\
                      resources: {cpu: 100m, memory: 32Mi}\nonDisconnect: {after: 20s}\n";
const SHORT: &str =
    "image: host\nnetwork: none\ncommand: [echo, here]\nresources: {cpu: 100m, memory: 32Mi}\n";

fn lab() -> ClusterName {
    ClusterName::parse("default").expect("a name")
}

fn rotate(cluster: &Cluster, args: &[&str]) -> Output {
    let root = cluster.dir.path().join("root.key");
    cluster.run(&[&["keys", "rotate", "--root", root.to_str().expect("a plain path")], args].concat())
}

fn rotated(cluster: &Cluster, args: &[&str]) -> Value {
    let output = rotate(cluster, &[args, &["-o", "json"]].concat());
    assert!(output.status.success(), "{}", text(&output));
    serde_json::from_slice(&output.stdout).expect("a delegation")
}

fn serial(cluster: &Cluster) -> u64 {
    let shown = cluster.json(&["keys", "show"]).expect("it is told");
    shown["delegation"]["serial"].as_u64().expect("it has one")
}

/// What the agent has on disk.
fn heard(cluster: &Cluster, node: &str) -> Option<u64> {
    let file = cluster.dir.path().join(node).join("identity/delegation.json");
    let heard: Value = serde_json::from_slice(&std::fs::read(file).ok()?).expect("written whole");
    heard["serial"].as_u64()
}

/// The pod was not touched: its first run, of its first epoch.
fn assert_steady(cluster: &Cluster) {
    let job = cluster.job("steady");
    let pod = &job["pods"][0];
    assert_eq!((&job["phase"], &job["evictions"]), (&"Running".into(), &0.into()), "{job:#}");
    assert_eq!((&pod["epoch"], &pod["restarts"]), (&1.into(), &0.into()), "{job:#}");
}

/// Has read all of the store, and speaks for the controller at its broker.
struct Thief {
    signer: Signer,
    client: Client,
}

impl Thief {
    fn of(cluster: &Cluster, choice: &StoreChoice) -> Self {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        let dir = cluster.dir.path().join("controller");
        let contents = runtime.block_on(store::read(choice, &dir, &lab())).expect("it can be read");
        let secret = &contents.identity.secret;
        let (signer, _) = signer(&lab(), secret, &contents.entries).expect("it has a key");
        let ca = Ca::of(secret, &lab()).expect("the CA");
        let tls = ca.own(&["127.0.0.1".to_owned()]).expect("a certificate").client().expect("its key's");
        let mut options = MqttOptions::new("thief", "127.0.0.1", cluster.port);
        options.set_transport(Transport::tls_with_config(TlsConfiguration::Rustls(tls)));
        let (client, mut connection) = Client::new(options, 16);
        std::thread::spawn(move || while connection.recv().is_ok_and(|event| event.is_ok()) {});
        Self { signer, client }
    }

    /// Orders the node to have no pods.
    fn order(&self, node: &str, signer: &Signer) {
        let topic = Topic::node(&NodeId::parse(node).expect("a name"), NodeTopic::Desired);
        let nothing = json!({"store": "s", "term": 999_999, "generation": 999_999, "pods": []});
        let order = codec::encode(&topic, &nothing).expect("it is small");
        let order = codec::sign(signer, &topic, &order).expect("it is JSON");
        self.client.publish(topic.render(&lab()), QoS::AtLeastOnce, false, order).expect("it may try");
    }
}

fn refused(cluster: &Cluster, node: &str, why: &str) {
    until(why, 30, || cluster.log(node).contains(why).then_some(()));
}

#[test]
fn another_key_signs_no_pod_is_touched_and_the_old_one_is_of_no_use() {
    let mut cluster = Cluster::of_members_on_mosquitto();
    cluster.agent("a1", &["--allow-host-image"]);
    cluster.agent("a2", &["--allow-host-image", "--label", "late=yes"]);
    cluster.submit("steady", &format!("{STEADY}affinity: node.name == \"a1\"\n"));
    cluster.until_phase("steady", "Running", 60);
    let away = cluster.agents.len() - 1;
    cluster.agents[away].kill();
    let thief = Thief::of(&cluster, &StoreChoice::Embedded);
    let first = serial(&cluster);

    // Another cluster's root is no use, nor is a user who is no admin.
    let other = Cluster::of_members();
    let foreign = other.dir.path().join("root.key");
    let wrong = cluster.run(&["keys", "rotate", "--root", foreign.to_str().expect("a plain path")]);
    assert!(!wrong.status.success() && text(&wrong).contains("the one that the members"), "{}", text(&wrong));
    assert_eq!(serial(&cluster), first);
    drop(other);

    let second = rotated(&cluster, &[]);
    assert!(second["serial"].as_u64() > Some(first), "{second:#}");
    until("a1 has heard it", 30, || (heard(&cluster, "a1") == second["serial"].as_u64()).then_some(()));
    cluster.submit("after", &format!("{SHORT}affinity: node.name == \"a1\"\n"));
    cluster.until_phase("after", "Succeeded", 60);
    let audit = text(&cluster.run(&["audit"]));
    assert!(audit.contains("rotate") && audit.contains("the controller's key to"), "{audit}");

    // What was good until then; without what showed it; with a word of the thief's own, of another root, for another cluster.
    thief.order("a1", &thief.signer);
    refused(&cluster, "a1", &format!("the controller's key of serial {first}, which another has replaced"));
    let (own, at) = (Key::from_seed(&[7; SEED_BYTES]), Timestamp(0));
    thief.order("a1", &Signer::new(lab(), Key::from_seed(&[7; SEED_BYTES])));
    refused(&cluster, "a1", "and this node belongs to the controller of key");
    let foreign = Delegation::new(&own, &lab(), own.public(), Some(u64::MAX - 1), at, LIFE);
    thief.order("a1", &Signer::delegated(lab(), Key::from_seed(&[7; SEED_BYTES]), foreign));
    refused(&cluster, "a1", "which the cluster's root has not named");
    // Again and again: each kind is one line of the log.
    thief.order("a1", &thief.signer);
    assert_steady(&cluster);

    // A controller that starts anew has it from its store; and once more, while a2 is away still.
    cluster.controller.as_mut().expect("it runs").kill();
    cluster.start_controller();
    until("the controller answers", 30, || cluster.json(&["get", "nodes"]));
    let third = rotated(&cluster, &[]);
    until("a1 has heard it", 30, || (heard(&cluster, "a1") == third["serial"].as_u64()).then_some(()));
    cluster.agents[0].kill();
    cluster.agent("a1", &["--allow-host-image"]);
    assert_eq!(heard(&cluster, "a1"), third["serial"].as_u64());
    assert_eq!(heard(&cluster, "a2"), None, "it was away");
    cluster.agent("a2", &["--allow-host-image", "--label", "late=yes"]);
    cluster.submit("late", &format!("{SHORT}affinity: node.labels.late == \"yes\"\n"));
    cluster.until_phase("late", "Succeeded", 60);
    assert_eq!(heard(&cluster, "a2"), third["serial"].as_u64());
    // One that joins now knows at once what was replaced.
    cluster.agent("a3", &["--allow-host-image"]);
    thief.order("a3", &thief.signer);
    refused(&cluster, "a3", "which another has replaced");
    let replaced = cluster.log("a1").matches("which another has replaced").count();
    assert_eq!(replaced, 1, "{}", cluster.log("a1"));
    assert_steady(&cluster);
}

#[test]
fn with_a_key_that_has_expired_what_runs_goes_on_and_nothing_begins() {
    let mut cluster = Cluster::of_members();
    let dir = cluster.dir.path().join("ticks");
    std::fs::create_dir(&dir).expect("a directory");
    let shown = dir.display().to_string();
    cluster.agent("a1", &["--allow-host-image", "--allow-host-path", &shown]);
    let steady = STEADY.replace("echo $i", "echo $i >>/ticks/all");
    cluster.submit("steady", &format!("{steady}volumes: [{{mount: /ticks, host: {shown}}}]\n"));
    let ticks = || std::fs::read_to_string(dir.join("all")).unwrap_or_default().lines().count();
    until("it runs", 60, || (ticks() > 1).then_some(()));
    rotated(&cluster, &["--life", "1s"]);
    until("the end is told", 30, || {
        let told = String::from_utf8_lossy(&cluster.run(&["get", "nodes"]).stderr).into_owned();
        told.contains("the controller's key has expired at").then_some(())
    });
    let expired = ticks();
    cluster.submit("new", SHORT);
    refused(&cluster, "a1", "the controller's key has expired at");
    // For longer than it would without grants.
    until("it goes on", 60, || (ticks() > expired + 25).then_some(()));
    assert_steady(&cluster);
    assert_ne!(cluster.phase("new"), "Succeeded");
    let metrics = |cluster: &Cluster| {
        let admin = cluster.admin.clone().expect("it has one");
        let file = |name: &str| admin.join(name).display().to_string();
        let url = format!("https://127.0.0.1:{}/metrics", cluster.http);
        let mut curl = Command::new("curl");
        curl.args(["-s", "--cacert", &file("ca.pem"), "--cert", &file("certificate.pem")]);
        text(&curl.args(["--key", &file("key.pem"), &url]).output().expect("curl starts"))
    };
    let told = metrics(&cluster);
    assert!(told.contains("berth_controller_key_expires_seconds"), "{told}");

    rotated(&cluster, &[]);
    cluster.until_phase("new", "Succeeded", 60);
    assert_steady(&cluster);
    let told = text(&cluster.run(&["get", "nodes"]));
    assert!(!told.contains("expire"), "{told}");
}

fn controller(cluster: &Cluster, name: &str, http: u16) -> Daemon {
    let dir = cluster.dir.path();
    let mut command = Command::new(program("berth-controller"));
    command.arg("--config").arg(dir.join("controller.toml")).arg("--data-dir").arg(dir.join(name));
    command.args(["--listen-http", &format!("127.0.0.1:{http}")]);
    Daemon::start(name, &mut command, &dir.join(format!("{name}.log")))
}

fn leads(cluster: &Cluster, name: &str) -> Option<()> {
    cluster.log(name).contains("started").then_some(())
}

#[test]
fn whoever_leads_next_signs_with_it() {
    let mut cluster = Cluster::empty();
    let etcd = Etcd::start(1, cluster.dir.path(), None);
    cluster.set_up_on_mosquitto(&["--store", &etcd.url()]);

    let mut first = controller(&cluster, "first", cluster.http);
    until("the first leads", 30, || leads(&cluster, "first"));
    let _second = controller(&cluster, "second", free_port());
    until("the second stands by", 30, || cluster.log("second").contains("standing by").then_some(()));
    cluster.agent("a1", &["--allow-host-image"]);
    cluster.submit("steady", STEADY);
    cluster.until_phase("steady", "Running", 60);
    let next = rotated(&cluster, &[]);
    until("a1 has heard it", 30, || (heard(&cluster, "a1") == next["serial"].as_u64()).then_some(()));
    first.kill();
    until("the second leads", 30, || leads(&cluster, "second"));
    cluster.submit("after", SHORT);
    cluster.until_phase("after", "Succeeded", 60);
    assert!(!cluster.log("a1").contains("refused message"), "{}", cluster.log("a1"));
    assert_steady(&cluster);
}

//! A node's own policy, against a controller that wants more: a real one, and one with a stolen key.

use std::collections::BTreeMap;
use std::net::TcpListener;
use std::path::Path;
use std::process::Command;
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use berth_protocol::codec;
use berth_protocol::ids::{ClusterName, Digest, Epoch, Generation, JobUid, NodeId, StoreId, Term};
use berth_protocol::job::parse;
use berth_protocol::message::node::{Desired, DesiredPod, SpecMessage, Stage};
use berth_protocol::pod::Goal;
use berth_protocol::resources::GpuShare;
use berth_protocol::sign::{Key, SEED_BYTES, Signer};
use berth_protocol::topic::{NodeTopic, Topic};
use rumqttc::{Client, Event, MqttOptions, Packet, QoS};
use serde::Serialize;
use serde_json::{Value, json};

use crate::cluster::{Cluster, text, until};
use crate::jobs::registry_with_busybox;

/// Writes a policy file as root would, and returns its path.
fn policy(cluster: &Cluster, name: &str, text: &str) -> String {
    use std::os::unix::fs::PermissionsExt;
    let path = cluster.dir.path().join(name);
    std::fs::write(&path, text).expect("the policy is written");
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644)).expect("its mode");
    path.to_str().expect("a plain path").to_owned()
}

/// Whoever has the key that a node obeys: its real controller, as far as it can tell.
struct Thief {
    client: Client,
    signer: Signer,
    heard: Receiver<(String, Value)>,
    generation: u64,
}

const STORE: &str = "stolen";

impl Thief {
    /// On a broker of its own; the first controller that an agent hears, which it obeys from then on.
    fn on(cluster: &Cluster) -> Self {
        until("the broker listens", 10, || std::net::TcpStream::connect(("127.0.0.1", cluster.port)).ok());
        let mut options = MqttOptions::new("thief", "127.0.0.1", cluster.port);
        options.set_max_packet_size(128 * 1024, 128 * 1024);
        let (client, mut connection) = Client::new(options, 1024);
        client.subscribe("berth/#", QoS::AtLeastOnce).expect("it may ask");
        let (to, heard) = channel();
        std::thread::spawn(move || {
            for event in connection.iter() {
                let Ok(event) = event else { return };
                if let Event::Incoming(Packet::Publish(message)) = event
                    && let Ok(mut envelope) = serde_json::from_slice::<Value>(&message.payload)
                    && to.send((message.topic, envelope["body"].take())).is_err()
                {
                    return;
                }
            }
        });
        let signer =
            Signer::new(ClusterName::parse("default").expect("a name"), Key::from_seed(&[9; SEED_BYTES]));
        Self { client, signer, heard, generation: 0 }
    }

    /// The next word of the node's of that kind.
    fn hear(&self, kinds: &[&str]) -> (String, Value) {
        let end = Instant::now() + Duration::from_secs(30);
        loop {
            let left = end.saturating_duration_since(Instant::now());
            let (topic, body) = self.heard.recv_timeout(left).unwrap_or_else(|_| panic!("no {kinds:?}"));
            let kind = topic.rsplit('/').next().unwrap_or_default().to_owned();
            if kinds.contains(&kind.as_str()) {
                return (kind, body);
            }
        }
    }

    fn say(&self, kind: NodeTopic, message: &impl Serialize) {
        let topic = Topic::node(&NodeId::parse("a1").expect("a name"), kind);
        let plain = codec::encode(&topic, message).expect("it is small");
        let signed = codec::sign(&self.signer, &topic, &plain).expect("it is JSON");
        let topic = topic.render(&ClusterName::parse("default").expect("a name"));
        self.client.publish(topic, QoS::AtLeastOnce, false, signed).expect("it is sent");
    }

    fn spec(&self, template: &Value) -> Digest {
        let spec = serde_json::value::to_raw_value(template).expect("JSON");
        let digest = Digest::of(spec.get().as_bytes());
        self.say(NodeTopic::Spec, &SpecMessage { digest, spec });
        digest
    }

    /// Orders these pods to run, and grants all that the node asks for until each of them has ended: how.
    fn run(
        &mut self,
        hello: &Value,
        pods: Vec<DesiredPod>,
        stage: Vec<Stage>,
    ) -> (BTreeMap<String, Value>, Value) {
        self.generation += 1;
        let count = pods.len();
        self.say(
            NodeTopic::Desired,
            &Desired {
                store: StoreId::parse(STORE).expect("a token"),
                term: Term(1),
                generation: Generation(self.generation),
                nonce: serde_json::from_value(hello["nonce"].clone()).ok(),
                pods,
                stage,
            },
        );
        let end = Instant::now() + Duration::from_secs(120);
        let (mut ended, mut staged) = (BTreeMap::new(), Value::Null);
        while ended.len() < count || staged.as_array().is_none_or(Vec::is_empty) {
            let (kind, body) = self.hear(&["heartbeat", "event"]);
            assert!(Instant::now() < end, "{ended:#?}, {staged:#}");
            if kind == "event" {
                for event in body["events"].as_array().expect("events") {
                    let pod = &event["event"]["pod"];
                    if let Some(outcome) = pod["change"].get("ended") {
                        ended.insert(
                            pod["pod"].as_str().expect("a pod").to_owned(),
                            outcome["outcome"].clone(),
                        );
                    }
                }
                continue;
            }
            staged = body["staged"].clone();
            let lease = json!({
                "store": STORE, "term": 1, "nonce": body["nonce"], "seq": body["seq"], "covers": {"all": body["held"]},
                "ledger": hello["ledger"], "acked": 0,
            });
            self.say(NodeTopic::Lease, &lease);
        }
        (ended, staged)
    }
}

/// A template as a job file makes it, for the thief to change.
fn template(file: &str) -> Value {
    let job =
        parse(format!("name: j\n{file}").as_bytes(), None).unwrap_or_else(|errors| panic!("{errors:?}"));
    serde_json::to_value(job.spec.pod).expect("JSON")
}

#[test]
fn a_controller_with_a_stolen_key_gets_nothing_that_the_policy_forbids() {
    let mut cluster = Cluster::empty();
    cluster.start_mosquitto();
    let dir = cluster.dir.path().to_owned();
    let at = |name: &str| dir.join(name).display().to_string();
    for name in ["shared", "models", "secret"] {
        std::fs::create_dir(dir.join(name)).expect("a directory");
    }
    std::os::unix::fs::symlink(dir.join("secret"), dir.join("shared/link")).expect("a link");
    let registry = TcpListener::bind("127.0.0.1:0").expect("a port");
    let image = format!("{}/team/app:1", registry.local_addr().expect("an address"));
    let file = policy(
        &cluster,
        "policy.toml",
        &format!(
            "registries = [\"registry.invalid\"]\nhost-image = true\nnetworks = [\"none\"]\ngpus = false\n\
             host-paths = [\"{}\", {{path = \"{}\", read-only = true}}]\n[largest]\ncpu = 1\nmemory = \"256Mi\"\n",
            at("shared"),
            at("models")
        ),
    );
    let mut thief = Thief::on(&cluster);
    cluster.agent_alone("a1", &["--policy", &file], &[]);

    // Each would leave a mark where it may write, if anything of it ran.
    let plain = |name: &str, more: &str| {
        template(&format!(
            "image: host\ncommand: [sh, -c, \"echo ran > /out/{name}\"]\nnetwork: none\n\
             resources: {{cpu: 100m, memory: 32Mi}}\n\
             volumes:\n- {{mount: /out, host: {}}}\n{more}",
            at("shared")
        ))
    };
    let mount = |path: &str, more: &str| format!("- {{mount: /more, host: \"{path}\"{more}}}\n");
    let changed = |mut template: Value, at: &str, value: Value| {
        *template.pointer_mut(at).unwrap_or_else(|| panic!("no {at}")) = value;
        template
    };
    let main = "/containers/0";
    let cases: Vec<(&str, Value, Option<&str>)> = vec![
        ("good", plain("good", &mount(&at("models"), ", readOnly: true")), None),
        ("caps", plain("caps", "capabilities: [SYS_ADMIN]\n"), Some("capabilities")),
        (
            "prefix",
            changed(
                plain("prefix", "capabilities: [NET_ADMIN]\n"),
                &format!("{main}/capabilities"),
                json!(["CAP_SYS_ADMIN"]),
            ),
            Some("capabilities"),
        ),
        ("restored", plain("restored", "capabilities: [SYS_PTRACE]\n"), Some("capabilities")),
        ("etc", plain("etc", &mount("/etc", "")), Some("host-paths")),
        (
            "up",
            changed(
                plain("up", &mount(&at("models"), ", readOnly: true")),
                "/volumes/1/source/host",
                json!(format!("{}/../secret", at("shared"))),
            ),
            Some("host-paths"),
        ),
        ("link", plain("link", &mount(&at("shared/link"), "")), Some("host-paths")),
        ("models", plain("models", &mount(&at("models"), "")), Some("host-paths")),
        ("host", changed(plain("host", ""), "/network", json!("host")), Some("networks")),
        ("bridge", changed(plain("bridge", ""), "/network", json!("bridge")), Some("networks")),
        ("pulled", changed(plain("pulled", ""), &format!("{main}/image"), json!(image)), Some("registries")),
        (
            "file",
            changed(plain("file", ""), &format!("{main}/image"), json!(format!("oci:{}", at("shared")))),
            Some("image-paths"),
        ),
        ("burst", plain("burst", "limits: {cpu: 2}\n"), Some("largest")),
        (
            "boundless",
            changed(plain("boundless", ""), &format!("{main}/limits/memory"), json!(0)),
            Some("largest"),
        ),
        ("device", plain("device", ""), Some("gpus")),
    ];
    let uid = JobUid::parse("u").expect("a token");
    // It listens once it has said that it is there.
    let (_, hello) = thief.hear(&["hello"]);
    let mut pods = Vec::new();
    for (index, (name, template, _)) in (0..).zip(&cases) {
        pods.push(DesiredPod {
            pod: uid.pod(index),
            epoch: Epoch(1),
            spec: thief.spec(template),
            goal: Goal::Run,
            checkpoint: 0,
            from: (*name == "restored").then(|| Digest::of(b"a checkpoint")),
            gpus: if *name == "device" {
                vec![GpuShare { uuid: "GPU-1".into(), milli: 1000 }]
            } else {
                Vec::new()
            },
            failures: 0,
            restarts: 0,
        });
    }
    let ahead = thief.spec(&changed(plain("ahead", ""), &format!("{main}/image"), json!(image)));
    let stage =
        vec![Stage { pod: uid.pod(99), epoch: Epoch(1), spec: ahead, from: Some(Digest::of(b"another")) }];
    let (ended, staged) = thief.run(&hello, pods, stage);

    for (index, (name, _, rule)) in (0..).zip(&cases) {
        let outcome = &ended[&uid.pod(index).to_string()];
        let message = outcome["message"].as_str().unwrap_or_default();
        match rule {
            None => assert_eq!(
                (&outcome["cause"], &outcome["exitCode"]),
                (&"success".into(), &0.into()),
                "{outcome:#}"
            ),
            Some(rule) => {
                let about = (&outcome["cause"], &outcome["reason"]);
                assert_eq!(about, (&"fault".into(), &"PolicyRefused".into()), "{name}: {outcome:#}");
                assert!(message.contains(&format!("see `{rule}` in {file}")), "{name}: {message}");
            }
        }
    }
    let why = staged[0]["state"]["failed"]["why"].as_str().unwrap_or_default();
    assert!(why.contains("no image of"), "{staged:#}");
    // Nobody was asked for an image, and nothing but the good one has left a mark.
    registry.set_nonblocking(true).expect("a socket");
    assert_eq!(registry.accept().expect_err("nobody came").kind(), std::io::ErrorKind::WouldBlock);
    let marks = std::fs::read_dir(dir.join("shared")).expect("a directory").flatten();
    let mut marks: Vec<_> = marks.map(|entry| entry.file_name()).collect();
    marks.sort();
    assert_eq!(marks, ["good", "link"]);
    assert!(cluster.log("a1").contains("is refused: this node's policy allows no"), "{}", cluster.log("a1"));
}

#[test]
fn the_scheduler_knows_what_policies_refuse_and_explain_says_so() {
    let mut cluster = Cluster::new();
    let strict = policy(&cluster, "strict.toml", "host-image = true\nnetworks = [\"none\"]\n");
    for node in ["a1", "a2"] {
        cluster.agent(node, &["--policy", &strict]);
    }
    let job = |more: &str| {
        format!("image: host\ncommand: [\"true\"]\nresources: {{cpu: 100m, memory: 32Mi}}\n{more}")
    };
    cluster.submit("wide", &job("network: host\n"));
    let why = "0 of 2 nodes fit: 2 have a policy that allows no `network: host`";
    let waits = until("it waits, and says for what", 30, || {
        Some(cluster.job("wide"))
            .filter(|job| job["message"].as_str().is_some_and(|message| message.contains(why)))
    });
    assert_eq!((&waits["phase"], &waits["failures"]), (&"Pending".into(), &0.into()), "{waits:#}");
    let said = text(&cluster.run(&["explain", "wide"]));
    assert!(said.contains(why), "{said}");
    let said = text(&cluster.run(&["describe", "node", "a1"]));
    assert!(said.contains("Policy:") && said.contains("networks none"), "{said}");
    cluster.submit("narrow", &job("network: none\n"));
    cluster.until_phase("narrow", "Succeeded", 60);
    // Where a node allows it, it goes at once; and what a policy looks at that others do not, jobs are told apart by.
    let largest =
        policy(&cluster, "largest.toml", "host-image = true\nnetworks = [\"host\"]\n[largest]\ncpu = 1\n");
    cluster.agent("a3", &["--policy", &largest]);
    assert_eq!(cluster.until_phase("wide", "Succeeded", 60)["pods"][0]["node"], "a3");
    cluster.submit("burst", &job("network: host\nlimits: {cpu: 2}\n"));
    until("it waits for a larger node", 30, || {
        let message = cluster.job("burst")["message"].as_str()?.to_owned();
        message.contains("1 has a policy that allows no pods with more cores than 1").then_some(())
    });
}

#[test]
fn an_unsigned_image_does_not_run_where_a_signer_is_asked_for() {
    let mut cluster = Cluster::new();
    let (_registry, image) = registry_with_busybox(&cluster);
    let dir = cluster.dir.path().to_owned();
    let cosign = sh(&dir, &format!("{}/cosign", env!("CARGO_MANIFEST_DIR")));
    let cosign = |words: &str| sh(&dir, &format!("COSIGN_PASSWORD= HOME=$PWD {cosign} {words}"));
    cosign("generate-key-pair");
    let key = dir.join("cosign.pub");
    let signers = format!("[[signers]]\nimages = [\"*\"]\ncosign-key = \"{}\"\n", key.display());
    let file = policy(&cluster, "policy.toml", &signers);
    cluster.agent("a1", &["--policy", &file]);
    let job =
        format!("image: {image}\ncommand: [sh, -c, \"exit 0\"]\nresources: {{cpu: 100m, memory: 32Mi}}\n");
    cluster.submit("unsigned", &job);
    let job_status = cluster.until_phase("unsigned", "Failed", 60);
    let message = job_status["pods"][0]["message"].as_str().unwrap_or_default();
    assert_eq!(job_status["pods"][0]["reason"], "ImageUnsigned", "{job_status:#}");
    assert!(message.contains("it has no signature in its registry"), "{message}");
    let (repository, _) = image.rsplit_once(':').expect("a tag");
    let digest =
        sh(&dir, &format!("skopeo inspect --tls-verify=false --format '{{{{.Digest}}}}' docker://{image}"));
    cosign(&format!(
        "sign --yes --key cosign.key --tlog-upload=false --allow-http-registry {repository}@{digest}"
    ));
    cluster.submit("signed", &job);
    cluster.until_phase("signed", "Succeeded", 60);
}

fn sh(dir: &Path, script: &str) -> String {
    let output = Command::new("sh").args(["-ec", script]).current_dir(dir).output().expect("sh starts");
    assert!(output.status.success(), "{script}: {}", text(&output));
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}

#[test]
fn a_policy_that_others_may_write_is_no_policy() {
    use std::os::unix::fs::PermissionsExt;
    let cluster = Cluster::empty();
    let file = policy(&cluster, "policy.toml", "host-image = true\n");
    let starts = |more: &[&str]| {
        let mut command = Command::new(crate::cluster::program("berth-agent"));
        command.args(["doctor", "--dev", "--policy", &file, "--data-dir"]).arg(cluster.dir.path().join("a1"));
        text(&command.args(more).output().expect("berth-agent starts"))
    };
    let said = starts(&[]);
    assert!(said.contains(&format!("ok       policy: {file}: any registry; image host; networks")), "{said}");
    let said = starts(&["--allow-host-path", "/srv"]);
    assert!(said.contains("allow-host-path stands beside") && said.contains("`host-paths`"), "{said}");
    std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o666)).expect("its mode");
    let said = starts(&[]);
    assert!(
        said.contains("missing  configuration: the agent does not start: ")
            && said.contains("may be written by others than root (mode 0666)")
            && !said.contains("ok       policy"),
        "{said}"
    );
}

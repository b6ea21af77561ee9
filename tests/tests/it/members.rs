//! A cluster without `--dev`: who belongs to it works as anybody would, and nobody else gets anywhere.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::process::ExitStatusExt as _;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::sync::Arc;
use std::time::Duration;

use berth_protocol::join::{JoinToken, Membership};
use berth_protocol::request;
use berth_protocol::sign::{Key, SEED_BYTES};
use berth_protocol::tls::joining;
use berth_protocol::topic::{JobTopic, Topic};
use berth_protocol::units::Timestamp;
use rumqttc::{Client, Event, MqttOptions, Packet, QoS, SubscribeReasonCode, TlsConfiguration, Transport};

use crate::cluster::{Cluster, program, text, until};

/// A host job's output shows that the whole way works: orders, images, log, depot.
const JOB: &str = "image: host\nnetwork: none\ncommand: [sh, -c, \"echo told; mkdir -p /out; echo kept > /out/file\"]\noutputs: [/out]\nresources: {cpu: 100m, memory: 32Mi}\n";

fn millis_now() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).expect("later than 1970");
    u64::try_from(now.as_millis()).expect("before the year 500,000,000")
}

fn token_of(cluster: &Cluster, args: &[&str]) -> JoinToken {
    let output = cluster.run(&[args, &["-o", "name"]].concat());
    assert!(output.status.success(), "{args:?}: {}", text(&output));
    String::from_utf8_lossy(&output.stdout).parse().expect("a token")
}

fn join(cluster: &Cluster, node: &str, token: &JoinToken) -> Output {
    let mut command = Command::new(program("berth-agent"));
    command.args(["join", "--node", node, "--data-dir"]).arg(cluster.dir.path().join(node));
    command.arg(token.to_string()).output().expect("berth-agent starts")
}

/// Logs a user in, with a directory of the user's own.
fn login(cluster: &Cluster, user: &str, args: &[&str]) -> std::path::PathBuf {
    let dir = cluster.dir.path().join(format!("user-{user}"));
    let token = token_of(cluster, &[&["user", "token", user], args].concat());
    let output = Command::new(program("berth"))
        .env("BERTH_IDENTITY", &dir)
        .args(["login", &token.to_string()])
        .output()
        .expect("berth starts");
    assert!(output.status.success(), "{}", text(&output));
    dir
}

fn berth_as(identity: &Path, args: &[&str]) -> Output {
    let mut command = Command::new(program("berth"));
    command.env("BERTH_IDENTITY", identity).env("BERTH_REQUEST_TIMEOUT", "3s").args(args);
    command.output().expect("berth starts")
}

/// The identity in an agent's data directory, or a user's.
fn membership(dir: &Path) -> (Membership, Key) {
    let text = std::fs::read(dir.join("membership.json")).expect("it has joined");
    let seed: [u8; SEED_BYTES] =
        std::fs::read(dir.join("key")).expect("it has a key").try_into().expect("32 bytes");
    (serde_json::from_slice(&text).expect("a membership"), Key::from_seed(&seed))
}

/// An MQTT client that shows the certificate of `dir`.
fn client(cluster: &Cluster, id: &str, dir: &Path) -> (Client, rumqttc::Connection) {
    let (membership, key) = membership(dir);
    let tls = membership.credentials(&key).expect("certificates").client().expect("its key's");
    let mut options = MqttOptions::new(id, "127.0.0.1", cluster.port);
    options.set_transport(Transport::tls_with_config(TlsConfiguration::Rustls(tls)));
    Client::new(options, 16)
}

/// Whether the broker lets it in.
fn connects(cluster: &Cluster, id: &str, dir: &Path) -> bool {
    let (_client, mut connection) = client(cluster, id, dir);
    connection.iter().find_map(|event| match event {
        Ok(Event::Incoming(Packet::ConnAck(_))) => Some(true),
        Err(_) => Some(false),
        Ok(_) => None,
    }) == Some(true)
}

#[test]
fn a_job_runs_on_a_machine_that_joined_by_one_line() {
    let mut cluster = Cluster::of_members();
    cluster.agent("a1", &["--allow-host-image"]);
    cluster.submit("first", JOB);
    cluster.until_phase("first", "Succeeded", 60);
    assert_eq!(cluster.logs("first"), "told\n");
    let to = cluster.dir.path().join("results");
    until("its output is in the depot", 30, || {
        cluster.run(&["cp", "first", to.to_str().expect("a plain path")]).status.success().then_some(())
    });
    assert_eq!(std::fs::read_to_string(to.join("out/file")).expect("the output"), "kept\n");

    // A user that was let in submits as well, and lets nobody in.
    let alice = login(&cluster, "alice", &[]);
    let ran = berth_as(&alice, &["run", "--network", "none", "--no-workspace", "--", "echo", "hers"]);
    assert_eq!(String::from_utf8_lossy(&ran.stdout), "hers\n", "{}", text(&ran));
    let refused = berth_as(&alice, &["node", "token"]);
    assert!(!refused.status.success() && text(&refused).contains("alice is no admin"), "{}", text(&refused));
    let users = cluster.run(&["user", "list"]);
    let users = String::from_utf8_lossy(&users.stdout).into_owned();
    assert!(users.contains("admin") && users.contains("alice"), "{users}");

    // One that was taken out is at once nobody.
    assert!(cluster.run(&["user", "remove", "alice"]).status.success());
    let gone = berth_as(&alice, &["get", "jobs"]);
    assert!(!gone.status.success(), "{}", text(&gone));
    assert!(cluster.run(&["node", "remove", "a1"]).status.success());
    until("the node is not heard any more", 60, || {
        let nodes = cluster.json(&["get", "nodes"])?;
        (nodes[0]["state"] != "online").then_some(())
    });
    let (dir, id) = (cluster.dir.path().join("a1/identity"), "a1.other");
    assert!(!connects(&cluster, id, &dir));
    // The way back in: a token for this very node.
    let back = join(&cluster, "a1", &token_of(&cluster, &["node", "token", "a1"]));
    assert!(back.status.success(), "{}", text(&back));
    assert!(connects(&cluster, id, &dir));
}

/// Runs a program that reads a token from stdin; no list of processes shows the token.
fn tell(command: &mut Command, token: &JoinToken) -> Output {
    let command = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().expect("it starts");
    let mut stdin = child.stdin.take().expect("it is piped");
    writeln!(stdin, "{token}").expect("it reads");
    let shown = std::fs::read(format!("/proc/{}/cmdline", child.id())).expect("it has not been waited for");
    assert!(!String::from_utf8_lossy(&shown).contains(&token.id.to_string()));
    drop(stdin);
    child.wait_with_output().expect("it ends")
}

/// Ends a process as one that has a defect ends, with room for its core.
fn abort(child: &mut std::process::Child) -> std::process::ExitStatus {
    let pid = child.id().to_string();
    for (program, args) in [("prlimit", &["--core=unlimited", "--pid", &pid][..]), ("kill", &["-ABRT", &pid])]
    {
        assert!(Command::new(program).args(args).status().expect("it starts").success(), "{program}");
    }
    child.wait().expect("it is a child")
}

#[test]
fn keys_are_in_no_list_of_processes_log_or_core() {
    let mut cluster = Cluster::of_members();
    let data = cluster.dir.path().join("a1");
    let token = token_of(&cluster, &["node", "token"]);
    let mut join = Command::new(program("berth-agent"));
    let joined = tell(join.args(["join", "-", "--node", "a1", "--data-dir"]).arg(&data), &token);
    assert!(joined.status.success(), "{}", text(&joined));
    let alice = cluster.dir.path().join("alice");
    let invited = token_of(&cluster, &["user", "token", "alice"]);
    let mut login = Command::new(program("berth"));
    let joined = tell(login.env("BERTH_IDENTITY", &alice).args(["login", "-"]), &invited);
    assert!(joined.status.success(), "{}", text(&joined));

    cluster.agent_with("a1", &["--allow-host-image"], &[("BERTH_LOG", "debug")]);
    cluster.submit("first", JOB);
    cluster.until_phase("first", "Succeeded", 60);
    let logs = cluster.logs_of_all();
    assert!(logs.contains("a1"), "{logs}");
    for token in [&token, &invited] {
        let whole = token.to_string();
        let secret =
            whole.split('@').next().and_then(|front| front.rsplit('.').next()).expect("a token's parts");
        assert!(!logs.contains(secret), "{logs}");
    }
    for dir in [&data.join("identity"), &alice] {
        let key = std::fs::read(dir.join("key")).expect("it has a key");
        let hex: String = key.iter().map(|byte| format!("{byte:02x}")).collect();
        assert!(!logs.contains(&hex), "{logs}");
    }

    let mut watch = cluster.berth(&["get", "jobs", "-w"]);
    let mut watch = watch.stdout(Stdio::piped()).spawn().expect("berth starts");
    watch.stdout.as_mut().expect("it is piped").read_exact(&mut [0]).expect("it says something");
    let agent = &mut cluster.agents[0].child;
    let controller = &mut cluster.controller.as_mut().expect("it is started").child;
    for (what, child) in [("berth", &mut watch), ("agent", agent), ("controller", controller)] {
        let status = abort(child);
        assert_eq!(status.signal(), Some(6), "{what}: {status}");
        assert!(!status.core_dumped(), "{what}");
    }
}

#[test]
fn a_token_is_good_once_for_whom_it_is() {
    let cluster = Cluster::of_members();
    let token = token_of(&cluster, &["node", "token"]);
    let wrong = {
        let text = token.to_string();
        let (front, at) = text.split_once('@').expect("a token");
        let last = if front.ends_with('0') { "1" } else { "0" };
        format!("{}{last}@{at}", &front[..front.len() - 1]).parse().expect("a token")
    };
    assert!(text(&join(&cluster, "a1", &wrong)).contains("unknown, used or expired"));
    // Another CA answers, in the controller's place.
    let foreign = JoinToken { ca: Key::from_seed(&[9; SEED_BYTES]).public(), ..token.clone() };
    let refused = join(&cluster, "a1", &foreign);
    assert!(!refused.status.success() && text(&refused).contains("UnknownIssuer"), "{}", text(&refused));

    let joined = join(&cluster, "a1", &token);
    assert!(text(&joined).starts_with("this machine is a1 of the cluster default"), "{}", text(&joined));
    assert!(text(&join(&cluster, "a2", &token)).contains("unknown, used or expired"));

    let listed =
        |cluster: &Cluster| String::from_utf8_lossy(&cluster.run(&["node", "tokens"]).stdout).into_owned();
    let second = token_of(&cluster, &["node", "token"]);
    assert!(listed(&cluster).contains(&format!("{}  any node", second.id)), "{}", listed(&cluster));
    let taken = join(&cluster, "a1-copy", &second);
    assert!(taken.status.success(), "{}", text(&taken));
    let third = token_of(&cluster, &["node", "token"]);
    assert!(cluster.run(&["node", "revoke", &third.id.to_string()]).status.success());
    assert!(text(&join(&cluster, "a3", &third)).contains("unknown, used or expired"));
    // A name is one machine's.
    let other = Command::new(program("berth-agent"))
        .args(["join", "--node", "a1", "--data-dir"])
        .arg(cluster.dir.path().join("elsewhere"))
        .arg(token_of(&cluster, &["node", "token"]).to_string())
        .output()
        .expect("berth-agent starts");
    assert!(text(&other).contains("belongs to the cluster already"), "{}", text(&other));
    let named = token_of(&cluster, &["node", "token", "a7"]);
    assert!(text(&join(&cluster, "a8", &named)).contains("the token is for a7 alone"));
    // A machine is of one cluster.
    let other = Cluster::of_members();
    let elsewhere = Command::new(program("berth-agent"))
        .args(["join", "--data-dir"])
        .arg(cluster.dir.path().join("a1"))
        .arg(token_of(&other, &["node", "token"]).to_string())
        .output()
        .expect("berth-agent starts");
    assert!(text(&elsewhere).contains("belongs to another cluster"), "{}", text(&elsewhere));
    // And somebody is left who may let others in.
    let last = cluster.run(&["user", "remove", "admin"]);
    assert!(!last.status.success() && text(&last).contains("the last admin"), "{}", text(&last));
    // What init made it does not make again.
    let again = cluster.init();
    assert!(!again.status.success() && text(&again).contains("is there already"), "{}", text(&again));
}

/// What the broker says to each subscription.
fn hears(cluster: &Cluster, id: &str, dir: &Path, filters: &[&str]) -> Vec<bool> {
    let (client, mut connection) = client(cluster, id, dir);
    for filter in filters {
        client.subscribe(format!("berth/v1/default/{filter}"), QoS::AtLeastOnce).expect("it may ask");
    }
    let answers = connection.iter().filter_map(|event| match event {
        Ok(Event::Incoming(Packet::SubAck(ack))) => Some(ack.return_codes),
        Ok(_) => None,
        Err(error) => panic!("it was let in: {error}"),
    });
    let answers: Vec<_> = answers.take(filters.len()).flatten().collect();
    answers.into_iter().map(|code| code != SubscribeReasonCode::Failure).collect()
}

/// Publishes as any MQTT client may, and returns once the broker has it.
fn publish(cluster: &Cluster, id: &str, dir: &Path, topic: &str, payload: &str) {
    let (client, mut connection) = client(cluster, id, dir);
    client
        .publish(format!("berth/v1/default/{topic}"), QoS::AtLeastOnce, false, payload)
        .expect("it may try");
    let acknowledged =
        connection.iter().find(|event| matches!(event, Ok(Event::Incoming(Packet::PubAck(_)))));
    assert!(acknowledged.is_some());
}

#[test]
fn a_user_is_heard_in_the_namespaces_of_its_roles() {
    let mut cluster = Cluster::of_members();
    cluster.agent("a1", &["--allow-host-image"]);
    let carol = login(&cluster, "carol", &["--role", "team-a=submit", "--role", "team-b=view"]);
    let dave = login(&cluster, "dave", &["--role", "team-b=admin"]);
    let run = |who: &Path, space: &str, name: &str| {
        let words = ["run", "--network", "none", "--no-workspace", "--name", name, "-n", space];
        berth_as(who, &[&words[..], &["--", "echo", name]].concat())
    };
    let ran = run(&carol, "team-a", "hers");
    assert_eq!(String::from_utf8_lossy(&ran.stdout), "hers\n", "{}", text(&ran));
    let ran = run(&dave, "team-b", "his");
    assert_eq!(String::from_utf8_lossy(&ran.stdout), "his\n", "{}", text(&ran));
    let told = |output: Output| (output.status.code(), text(&output));
    // To see is not to direct; and where one has no role nothing is told.
    let (code, why) = told(run(&carol, "team-b", "x"));
    assert!(code == Some(125) && why.contains("which takes `submit` and not `view`"), "{why}");
    let (code, why) = told(run(&carol, "default", "x"));
    assert!(code == Some(125) && why.contains("have you a role in namespace default?"), "{why}");
    assert_eq!(String::from_utf8_lossy(&berth_as(&carol, &["logs", "his", "-n", "team-b"]).stdout), "his\n");
    let (code, why) = told(berth_as(&dave, &["get", "jobs", "-n", "team-a"]));
    assert!(code == Some(125) && why.contains("dave has no role in namespace team-a"), "{why}");
    let (code, why) = told(berth_as(&carol, &["drain", "a1"]));
    assert!(code == Some(125) && why.contains("carol is no admin"), "{why}");
    let all = berth_as(&carol, &["get", "jobs", "-A", "-o", "name"]);
    assert_eq!(String::from_utf8_lossy(&all.stdout), "team-a/hers\nteam-b/his\n", "{}", text(&all));

    // With any other client: by the certificate of the connection, and no further.
    let heard = hears(
        &cluster,
        "carol-1",
        &carol,
        &[
            "jobs/team-a/+/status",
            "jobs/team-b/his/status",
            "logs/team-a/hers/+",
            "state/nodes/+",
            "query/c7/reply",
            "jobs/default/+/status",
            "jobs/+/+/status",
            "jobs/team-a/hers/submit",
            "jobs/team-a/#",
            "logs/default/x/+",
            "query/+/reply",
            "query/c7/request",
            "nodes/a1/desired",
            "#",
        ],
    );
    assert_eq!(heard, [[true; 5].as_slice(), &[false; 9]].concat());
    let file = JOB.replace("outputs: [/out]\n", "");
    for (space, runs) in [("team-a", true), ("team-b", false), ("default", false)] {
        publish(&cluster, "carol-2", &carol, &format!("jobs/{space}/plain/submit"), &file);
        let row = format!("submit {:>9} job {space}/plain", "");
        let row = row.split_whitespace().collect::<Vec<_>>().join(" ");
        let outcome = until("it is in the audit log", 30, || {
            let audit = text(&cluster.run(&["audit"]));
            let lines = audit.lines().map(|line| line.split_whitespace().collect::<Vec<_>>().join(" "));
            let line = lines.rev().find(|line| line.contains(&format!("carol 127.0.0.1 {row}")))?;
            Some(line.ends_with("accepted"))
        });
        assert_eq!(outcome, runs, "{space}");
        let status = berth_as(&dave, &["describe", "job", "plain", "-n", space]);
        assert!(!status.status.success() || space == "team-b", "{}", text(&status));
    }
    // What a broker, or whoever else has it, keeps and says again.
    let (membership, key) = membership(&carol);
    let (space, job) = ("team-a".parse().expect("a name"), "again".parse().expect("a name"));
    let topic = Topic::job(&space, &job, JobTopic::Submit);
    let hour_ago = Timestamp(millis_now() - 3_600_000);
    let old = request::sign(&key, &membership.cluster, &topic, hour_ago, file.as_bytes()).expect("signed");
    publish(&cluster, "dave-1", &dave, "jobs/team-a/again/submit", &String::from_utf8_lossy(&old));
    until("the old one is refused", 30, || {
        let audit = text(&cluster.run(&["audit"]));
        audit.contains("refused: the request was signed at").then_some(())
    });
    let fresh = request::sign(&key, &membership.cluster, &topic, Timestamp(millis_now()), file.as_bytes());
    let fresh = String::from_utf8_lossy(&fresh.expect("signed")).into_owned();
    let changed = fresh.replace("told", "tols");
    publish(&cluster, "dave-2", &dave, "jobs/team-a/again/submit", &changed);
    // Signed by her, whoever brings it.
    publish(&cluster, "dave-3", &dave, "jobs/team-a/again/submit", &fresh);
    let until_again = || berth_as(&carol, &["wait", "again", "-n", "team-a"]);
    until("what she signed has run", 60, || until_again().status.success().then_some(()));
    let log = cluster.log("controller");
    assert!(log.contains("reason=\"forged\""), "{log}");

    // Roles are given by those who have them, and count at once.
    let set = |who: &Path, args: &[&str]| berth_as(who, &[&["user", "set"], args].concat());
    assert!(text(&set(&dave, &["carol", "team-a=view"])).contains("dave has no role in namespace team-a"));
    assert!(text(&set(&carol, &["carol", "--admin"])).contains("carol is no admin"));
    assert!(set(&dave, &["carol", "team-b=submit"]).status.success());
    let ran = run(&carol, "team-b", "now");
    assert_eq!(String::from_utf8_lossy(&ran.stdout), "now\n", "{}", text(&ran));
    assert!(text(&berth_as(&dave, &["audit"])).contains("dave is no admin of this cluster"));
    let own = text(&berth_as(&dave, &["audit", "-n", "team-b"]));
    assert!(own.contains("team-b/now") && !own.contains("team-a"), "{own}");
    let listed = String::from_utf8_lossy(&berth_as(&dave, &["user", "list"]).stdout).into_owned();
    assert!(listed.contains("team-b=submit") && !listed.contains("team-a"), "{listed}");
}

#[test]
fn who_connects_and_says_nothing_keeps_nobody_out() {
    let cluster = Cluster::of_members();
    let mut idle = Vec::new();
    for port in [cluster.port, cluster.http] {
        for n in 0..1_500 {
            let mut stream = TcpStream::connect(("127.0.0.1", port)).expect("it listens");
            // Half of them begin to shake hands.
            if n % 2 == 0 {
                stream.write_all(&[0x16, 0x03, 0x01, 0x02, 0x00]).expect("it may try");
            }
            idle.push(stream);
        }
    }
    let begun = std::time::Instant::now();
    assert!(cluster.json(&["get", "nodes"]).is_some(), "through the broker");
    let joined = join(&cluster, "a1", &token_of(&cluster, &["node", "token"]));
    assert!(joined.status.success(), "over HTTPS and the broker: {}", text(&joined));
    println!("a question, a token and a join beside {} silent peers: {:?}", idle.len(), begun.elapsed());
}

#[test]
fn a_mosquitto_lets_members_alone_in_and_each_to_what_is_its_own() {
    let mut cluster = Cluster::of_members_on_mosquitto();
    // Its rules are of members that have joined: a node needs none for orders, live logs want its name.
    cluster.agent("a1", &["--allow-host-image"]);
    let carol = login(&cluster, "carol", &["--role", "team-a=submit"]);
    let again = cluster.configure_mosquitto();
    assert!(text(&again).contains("access rules of 3 members"), "{}", text(&again));
    cluster.mosquitto.take();
    cluster.start_configured_mosquitto();
    until("everybody is back", 30, || {
        (cluster.json(&["get", "nodes"])?[0]["state"] == "online").then_some(())
    });
    let words = ["run", "--network", "none", "--no-workspace", "-n", "team-a", "--", "echo", "hers"];
    let ran = berth_as(&carol, &words);
    assert_eq!(String::from_utf8_lossy(&ran.stdout), "hers\n", "{}", text(&ran));
    let refused = berth_as(&carol, &["get", "jobs", "-n", "default"]);
    assert!(text(&refused).contains("carol has no role in namespace default"), "{}", text(&refused));

    // Whoever is not told does not hear: this Mosquitto grants the subscription, and serves nothing.
    let quiet = |filters: &[&str]| {
        let (client, mut connection) = client(&cluster, "carol-1", &carol);
        for filter in filters {
            client.subscribe(format!("berth/v1/default/{filter}"), QoS::AtLeastOnce).expect("it may ask");
        }
        // Something is said on each, and behind that on one that she may hear.
        cluster.submit("loud", JOB);
        cluster.until_phase("loud", "Succeeded", 60);
        assert!(
            berth_as(&carol, &[&words[..6], &["--name", "last", "--", "true"]].concat()).status.success()
        );
        let heard = connection.iter().filter_map(|event| match event.expect("it stays connected") {
            Event::Incoming(Packet::Publish(publish)) => Some(publish.topic),
            _ => None,
        });
        heard.take_while(|topic| !topic.contains("/team-a/last/")).collect::<Vec<_>>()
    };
    let heard = quiet(&[
        "jobs/team-a/+/status",
        "jobs/default/+/status",
        "logs/default/+/+",
        "nodes/+/+",
        "query/+/+",
        "#",
    ]);
    assert!(heard.iter().all(|topic| topic.contains("/jobs/team-a/")), "{heard:?}");

    // A plain job file says not who sends it; that counts at the controller's own broker alone.
    publish(&cluster, "carol-2", &carol, "jobs/team-a/plain/submit", JOB);
    let node = cluster.dir.path().join("a1/identity");
    publish(&cluster, "a1.x", &node, "nodes/a2/hello", "{}");
    publish(&cluster, "a1.y", &node, "jobs/team-a/plain/status", "{}");
    until("the plain one is refused", 30, || {
        let audit = text(&cluster.run(&["audit"]));
        audit.contains("refused: this cluster heeds only those who say who they are").then_some(())
    });
    assert!(!cluster.log("controller").contains("nodes/a2/hello"));

    // Rules that are wrong are named as a machine joins.
    let acl = cluster.dir.path().join("broker/berth.acl");
    let rules = std::fs::read_to_string(&acl).expect("it is written");
    std::fs::write(&acl, rules.replace("nodes/%u/heartbeat", "nodes/%u/heart")).expect("it is ours");
    cluster.mosquitto.take();
    cluster.start_configured_mosquitto();
    until("the controller is back", 30, || cluster.json(&["get", "nodes"]));
    let joined = join(&cluster, "a2", &token_of(&cluster, &["node", "token"]));
    let told = text(&joined);
    assert!(
        joined.status.success()
            && told.contains("do its rules let a2 say berth/v1/default/nodes/a2/heartbeat"),
        "{told}"
    );
}

#[test]
fn strangers_hear_and_say_nothing() {
    let cluster = Cluster::of_members();
    let joined = join(&cluster, "a1", &token_of(&cluster, &["node", "token"]));
    assert!(joined.status.success(), "{}", text(&joined));
    let node = cluster.dir.path().join("a1/identity");

    // In plain; with no certificate; with one of another cluster's.
    let mut plain = TcpStream::connect(("127.0.0.1", cluster.port)).expect("it listens");
    plain.set_read_timeout(Some(Duration::from_secs(20))).expect("a timeout");
    plain.write_all(b"\x10\x10\x00\x04MQTT\x04\x02\x00\x3c\x00\x04evil").expect("it may try");
    let mut answer = Vec::new();
    let _ = plain.read_to_end(&mut answer);
    // At most a TLS alert.
    assert!(!answer.starts_with(&[0x20]), "{answer:?}");
    let (membership, _) = membership(&node);
    let ca = token_of(&cluster, &["node", "token"]).ca;
    let mut options = MqttOptions::new("evil", "127.0.0.1", cluster.port);
    let nobody: Arc<_> = joining(ca).expect("a configuration");
    options.set_transport(Transport::tls_with_config(TlsConfiguration::Rustls(nobody)));
    let (_client, mut connection) = Client::new(options, 1);
    let first = connection.iter().find(|event| !matches!(event, Ok(Event::Outgoing(_))));
    assert!(matches!(first, Some(Err(_))), "without a certificate: {first:?}");
    let other = Cluster::of_members();
    let theirs = join(&other, "a1", &token_of(&other, &["node", "token"]));
    assert!(theirs.status.success(), "{}", text(&theirs));
    let forged = cluster.dir.path().join("forged");
    std::fs::create_dir(&forged).expect("a directory");
    let mut mixed = membership.clone();
    mixed.certificate = self::membership(&other.dir.path().join("a1/identity")).0.certificate;
    std::fs::write(forged.join("membership.json"), serde_json::to_vec(&mixed).expect("JSON"))
        .expect("written");
    std::fs::copy(other.dir.path().join("a1/identity/key"), forged.join("key")).expect("copied");
    assert!(!connects(&cluster, "a1.x", &forged), "a certificate of another cluster's is taken");

    // A node's certificate is that node's alone.
    assert!(connects(&cluster, "a1.x", &node));
    assert!(!connects(&cluster, "a2.x", &node), "by another node's client id");
    assert!(!connects(&cluster, "berth-controller", &node), "as the controller");
    let (client, mut connection) = client(&cluster, "a1.y", &node);
    for filter in [
        "#",
        "berth/v1/default/nodes/+/desired",
        "berth/v1/default/nodes/a2/desired",
        "berth/v1/default/jobs/#",
    ] {
        client.subscribe(filter, QoS::AtLeastOnce).expect("it may ask");
    }
    let refused = connection.iter().filter_map(|event| match event {
        Ok(Event::Incoming(Packet::SubAck(ack))) => Some(ack.return_codes),
        Ok(_) => None,
        Err(error) => panic!("it was let in: {error}"),
    });
    let refused: Vec<_> = refused.take(4).flatten().collect();
    assert!(refused.iter().all(|code| *code == SubscribeReasonCode::Failure), "{refused:?}");
    let submit = JOB.replace("image:", "name: x\nimage:");
    client
        .publish("berth/v1/default/jobs/default/x/submit", QoS::AtLeastOnce, false, submit)
        .expect("it may try");
    client.publish("berth/v1/default/nodes/a2/hello", QoS::AtLeastOnce, false, "{}").expect("it may try");
    // Both have been looked at once they are acknowledged.
    let acknowledged =
        connection.iter().filter(|event| matches!(event, Ok(Event::Incoming(Packet::PubAck(_)))));
    assert_eq!(acknowledged.take(2).count(), 2);
    let log = cluster.log("controller");
    assert!(
        log.contains("refused what the client `a1.y` said on `berth/v1/default/jobs/default/x/submit`"),
        "{log}"
    );
    assert!(!log.contains("reason=\"malformed\""), "what it said as another node was looked at: {log}");
    assert!(cluster.job("x").is_null());
}

//! A cluster of brokers, members of which die.

use std::path::PathBuf;
use std::process::Command;

use berth_tests::rabbitmq::RabbitMq;
use berth_tests::soak::history::check;
use serde_json::Value;

use crate::cluster::{Cluster, Daemon, program, text, until};

const NODES: [&str; 3] = ["a1", "a2", "a3"];
/// Twenty to a second.
const SHORT: u64 = 20;
const LONG: u64 = 400;

/// A cluster on the members of another, and all that was submitted to it.
struct Ground {
    cluster: Cluster,
    rabbitmq: RabbitMq,
    histories: PathBuf,
    /// What each job is to count to.
    jobs: Vec<(String, u64)>,
    /// Hears what users hear, from the member that lives on.
    _listener: Daemon,
}

impl Ground {
    /// The controller is at the first member, and of the nodes one at each.
    fn new() -> Self {
        let mut cluster = Cluster::empty();
        let histories = cluster.dir.path().join("histories");
        std::fs::create_dir(&histories).expect("a directory");
        let rabbitmq = RabbitMq::start(NODES.len(), cluster.dir.path());
        cluster.brokers = rabbitmq.members.clone();
        let listener = listen(&cluster, rabbitmq.members[2]);
        cluster.start_controller();
        let shared = histories.display().to_string();
        for node in NODES {
            cluster.agent_alone(node, &["--allow-host-path", &shared], &[]);
            cluster.brokers.rotate_left(1);
        }
        until("all are online", 60, || {
            let nodes = cluster.json(&["get", "nodes"])?;
            let online = nodes.as_array()?.iter().filter(|node| node["state"] == "online");
            (online.count() == NODES.len()).then_some(())
        });
        Self { cluster, rabbitmq, histories, jobs: Vec::new(), _listener: listener }
    }

    fn file(&mut self, name: &str, node: &str, ticks: u64) -> String {
        self.jobs.push((name.to_owned(), ticks));
        let (soak, dir) = (program("soak"), self.histories.display());
        let soak = soak.display();
        format!(
            "image: host\nnetwork: none\ncommand: [{soak}, tick, {dir}, {name}, \"{ticks}\", \"0\"]\n\
             affinity: node.name == \"{node}\"\nresources: {{cpu: 100m, memory: 48Mi}}\n\
             volumes: [{{mount: {dir}, host: {dir}}}]\n"
        )
    }

    /// One for each node, through each of the members, and nobody waits for what becomes of them.
    fn send(&mut self, when: &str) -> Vec<std::process::Child> {
        let sent = NODES.map(|node| {
            let name = format!("{when}-{node}");
            let file = self.file(&name, node, SHORT);
            self.cluster.brokers.rotate_left(1);
            self.cluster.submit_in_time(&name, &file)
        });
        sent.into()
    }

    /// While jobs come and go; those that go on are there before and after.
    fn kill(&mut self, member: usize) {
        let word = format!("kill{member}");
        let mut sent = self.send(&format!("{word}-before"));
        self.rabbitmq.kill(member);
        sent.extend(self.send(&format!("{word}-behind")));
        for child in sent {
            let output = child.wait_with_output().expect("it ends");
            assert!(output.status.success(), "{}", text(&output));
        }
        for job in self.jobs.iter().filter(|(job, _)| job.starts_with(&word)) {
            self.cluster.until_phase(&job.0, "Succeeded", 90);
        }
    }

    /// Each job ran to its end: in one run, and nobody was told otherwise.
    fn all_ran_once(&self) {
        for (name, ticks) in &self.jobs {
            let job = self.cluster.until_phase(name, "Succeeded", 90);
            assert_eq!((&job["evictions"], &job["failures"]), (&0.into(), &0.into()), "{job:#}");
            let pod = &job["pods"][0];
            assert_eq!((&pod["epoch"], &pod["restarts"]), (&1.into(), &0.into()), "{job:#}");
            let text = std::fs::read_to_string(self.histories.join(format!("{name}-0"))).expect("a history");
            let history = check(&text);
            assert!(history.faults.is_empty() && history.begun_anew == 0, "{name}: {history:?}\n{text}");
            assert_eq!((history.ticks, history.stopped_at), (*ticks, Some(*ticks)), "{name}\n{text}");
            until(&format!("{name}'s end is heard of"), 30, || {
                let status = |message: &Value| message["job"] == **name && message["phase"] == "Succeeded";
                self.heard().iter().any(status).then_some(())
            });
        }
        let heard = self.heard();
        let states = heard.iter().filter(|message| message["job"].is_null());
        let others: Vec<&Value> = states.filter(|message| message["state"] != "online").collect();
        assert!(others.is_empty(), "{others:#?}");
    }

    /// Payloads; the last may be on its way yet.
    fn heard(&self) -> Vec<Value> {
        self.cluster.log("heard").lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
    }

    fn has_lost(&self, name: &str, times: usize) {
        let word = if name == "controller" { "lost the broker" } else { "cannot reach the broker" };
        let log = self.cluster.log(name);
        assert_eq!(log.matches(word).count(), times, "{log}");
    }
}

/// To all statuses, of jobs and of nodes.
fn listen(cluster: &Cluster, port: u16) -> Daemon {
    let mut command = Command::new("mosquitto_sub");
    command.args(["-q", "1", "-p", &port.to_string()]);
    command.args(["-t", "berth/v1/default/jobs/+/+/status", "-t", "berth/v1/default/state/nodes/+"]);
    Daemon::start("mosquitto_sub", &mut command, &cluster.dir.path().join("heard.log"))
}

/// Nothing is taken from what a broker remembers: not from those that die, nor from one that comes back with what it knew.
#[test]
fn members_of_a_broker_cluster_die_and_nothing_is_lost() {
    let mut ground = Ground::new();
    for node in NODES {
        let name = format!("long-{node}");
        let file = ground.file(&name, node, LONG);
        ground.cluster.submit(&name, &file);
    }
    for node in NODES {
        ground.cluster.until_phase(&format!("long-{node}"), "Running", 60);
    }
    // The controller's, and one node's.
    ground.kill(0);
    ground.has_lost("controller", 1);
    ground.has_lost("a1", 1);
    ground.rabbitmq.revive(0);
    ground.rabbitmq.wait_for(0);
    // A member like the others: who knows no other is answered through it.
    let all = std::mem::replace(&mut ground.cluster.brokers, vec![ground.rabbitmq.members[0]]);
    let file = ground.file("returned", "a3", SHORT);
    ground.cluster.submit("returned", &file);
    ground.cluster.until_phase("returned", "Succeeded", 60);
    ground.cluster.brokers = all;
    // To which the controller has gone, and that node; a second one is there.
    ground.kill(1);
    ground.has_lost("controller", 2);
    ground.has_lost("a3", 0);
    ground.all_ran_once();
}

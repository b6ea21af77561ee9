//! How many pods a second go through the controller, its broker and its store: simulated agents, whose pods end as soon
//! as they are placed, and a user who submits jobs and watches their statuses.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::mpsc::{self, Receiver, Sender};
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result, ensure};
use berth_protocol::codec;
use berth_protocol::ids::{
    BootId, ClusterName, Digest, Epoch, Generation, HardwareId, LedgerId, NodeId, PodId, Run, SessionNonce,
    StoreId, Term,
};
use berth_protocol::message::node::{
    Desired, Events, Heartbeat, Hello, Lease, NodeEvent, NumberedEvent, PodChange, PodEvent, SpecMessage,
    held_digest,
};
use berth_protocol::pod::{Cause, Goal, Outcome};
use berth_protocol::resources::{CgroupVersion, Inventory, Usage};
use berth_protocol::topic::{NodeTopic, Topic};
use berth_protocol::units::{BootMs, Bytes, MilliCpu, Timestamp};
use rumqttc::{Client, Event, MqttOptions, Packet, QoS};
use serde_json::json;

use super::figures::{Figure, percentile};
use super::process::{MIB, cpu_time, pss};
use super::user::User;
use super::world::{Broker, World};

/// Connections of agents, and the nodes that speak through each.
const CONNECTIONS: usize = 4;
const NODES_EACH: usize = 16;
const PODS_PER_JOB: usize = 10;
/// Jobs that are unfinished at once while as many as possible go through.
const WINDOW_JOBS: usize = 200;
const ASKED_PER_SECOND: f64 = 2_000.0;
const BEAT: Duration = Duration::from_secs(10);
const LIMIT: Duration = Duration::from_secs(60);

/// `BENCH_SECONDS` shortens the minute for whoever develops.
fn seconds() -> u64 {
    std::env::var("BENCH_SECONDS").ok().and_then(|text| text.parse().ok()).unwrap_or(60)
}

/// As many as go through, for a minute; then half of what is asked, and how long each job waits for its first pod.
pub fn flood() -> Result<Vec<Figure>> {
    let world = World::new(Broker::Embedded)?;
    let (placed, seen) = mpsc::channel();
    for connection in 0..CONNECTIONS {
        fleet(world.port(), connection, placed.clone())?;
    }
    let mut user = world.user()?;
    let mut tide =
        Tide { user: &mut user, seen, next: 0, submitted: HashMap::new(), waits: Vec::new(), pods: 0 };
    // The nodes are there once a first job is through.
    tide.submit()?;
    tide.drain(0)?;

    let cpu = cpu_time(world.controller.pid())?;
    let (begun, before) = (Instant::now(), tide.pods);
    let length = Duration::from_secs(seconds());
    while begun.elapsed() < length {
        while tide.submitted.len() < WINDOW_JOBS {
            tide.submit()?;
        }
        tide.drain(WINDOW_JOBS - 1).with_context(|| world.said())?;
    }
    let took = begun.elapsed().as_secs_f64();
    let rate = (tide.pods - before) as f64 / took;
    let busy = (cpu_time(world.controller.pid())? - cpu).as_secs_f64() / took * 100.0;
    tide.drain(0).with_context(|| world.said())?;

    tide.waits.clear();
    let pause = Duration::from_secs_f64(PODS_PER_JOB as f64 / (ASKED_PER_SECOND / 2.0));
    let begun = Instant::now();
    let mut due = begun;
    while begun.elapsed() < length / 3 {
        while due <= Instant::now() {
            tide.submit()?;
            due += pause;
        }
        tide.hear(due.saturating_duration_since(Instant::now()))?;
    }
    tide.drain(0).with_context(|| world.said())?;
    let wait = |percent: f64| percentile(&tide.waits, percent).context("nothing was placed");
    Ok(vec![
        Figure::at_least("pods a second, submit to end, simulated agents", rate, "1/s", ASKED_PER_SECOND),
        Figure::peer("controller CPU meanwhile", busy, "%"),
        Figure::peer("submit to assigned at 1,000 pods/s, median", wait(50.0)?, "ms"),
        Figure::asked("submit to assigned at 1,000 pods/s, p99", wait(99.0)?, "ms", 50.0),
        Figure::peer("controller PSS after the flood", pss(world.controller.pid())? / MIB, "MiB"),
    ])
}

/// Jobs on their way.
struct Tide<'a> {
    user: &'a mut User,
    seen: Receiver<(String, Instant)>,
    next: usize,
    /// When, of those that have not ended.
    submitted: HashMap<String, Instant>,
    /// From submit to the agent that was told, in milliseconds.
    waits: Vec<f64>,
    /// Ended well.
    pods: usize,
}

impl Tide<'_> {
    fn submit(&mut self) -> Result<()> {
        let name = format!("f{}", self.next);
        self.next += 1;
        let file = json!({
            "image": "host", "command": ["true"], "parallelism": PODS_PER_JOB, "completions": PODS_PER_JOB,
            "ttlSecondsAfterFinished": 10
        });
        let (at, _) = self.user.submit(&name, &file)?;
        self.submitted.insert(name, at);
        Ok(())
    }

    /// Until at most so many jobs are unfinished.
    fn drain(&mut self, most: usize) -> Result<()> {
        let end = Instant::now() + LIMIT;
        while self.submitted.len() > most {
            ensure!(Instant::now() < end, "{} jobs have not ended", self.submitted.len());
            self.hear(Duration::from_secs(1))?;
        }
        Ok(())
    }

    fn hear(&mut self, patience: Duration) -> Result<()> {
        if let Some(status) = self.user.hear(patience)?
            && status.is_final()
            && self.submitted.contains_key(&status.job)
        {
            let pods = status.body["podCounts"]["Succeeded"].as_u64().unwrap_or(0) as usize;
            ensure!(pods == PODS_PER_JOB, "job {} is {}", status.job, status.body);
            self.placed();
            self.pods += pods;
            self.submitted.remove(&status.job);
        }
        Ok(())
    }

    fn placed(&mut self) {
        while let Ok((job, at)) = self.seen.try_recv() {
            if let Some(submitted) = self.submitted.get(&job) {
                self.waits.push(at.duration_since(*submitted).as_secs_f64() * 1000.0);
            }
        }
    }
}

/// One node, as far as the controller can tell.
struct Agent {
    id: NodeId,
    nonce: SessionNonce,
    ledger: LedgerId,
    seq: u64,
    last_grant: Option<u64>,
    order: (Term, Generation),
    beat_at: Instant,
    /// Epochs that have ended here, of pods that are still named.
    ended: BTreeMap<PodId, Epoch>,
    events: Vec<NumberedEvent>,
    last: u64,
}

fn inventory(agent: &str) -> Inventory {
    Inventory {
        hostname: agent.to_owned(),
        arch: "x86_64".to_owned(),
        kernel: "6.1.0".to_owned(),
        os: "Debian GNU/Linux 12".to_owned(),
        cpu: MilliCpu(64_000),
        memory: Bytes(256 * Bytes::GIB),
        disk: Bytes(1 << 40),
        cpu_model: "simulated".to_owned(),
        cpu_features: BTreeSet::new(),
        cgroup: CgroupVersion::V2,
        criu: None,
        gpus: Vec::new(),
        gpu_driver: None,
        cuda: None,
        labels: BTreeMap::new(),
        taints: BTreeSet::new(),
        host_image: true,
        bridge: true,
        agent_version: "0.1.0".to_owned(),
    }
}

fn now() -> Timestamp {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    Timestamp(since.as_millis() as u64)
}

/// Some nodes that speak through one connection, in a thread of their own, until the broker has gone.
fn fleet(port: u16, connection: usize, placed: Sender<(String, Instant)>) -> Result<()> {
    let mut options = MqttOptions::new(format!("bench-fleet-{connection}"), "127.0.0.1", port);
    options.set_max_packet_size(96 * 1024, 96 * 1024);
    let (client, mut mqtt) = Client::new(options, 64 * 1024);
    let mut network = rumqttc::NetworkOptions::new();
    network.set_tcp_nodelay(true);
    mqtt.eventloop.set_network_options(network);
    let cluster = ClusterName::parse("default").context("a name")?;
    let begun = Instant::now();
    let mut agents = BTreeMap::new();
    for n in 0..NODES_EACH {
        let name = format!("sim-{connection}-{n}");
        let id = NodeId::parse(&name)?;
        for kind in [NodeTopic::Desired, NodeTopic::Lease, NodeTopic::Spec] {
            client.subscribe(Topic::node(&id, kind).render(&cluster), QoS::AtLeastOnce)?;
        }
        let agent = Agent {
            id: id.clone(),
            nonce: SessionNonce::parse(&format!("{name}-nonce"))?,
            ledger: LedgerId::parse(&format!("{name}-ledger"))?,
            seq: 0,
            last_grant: None,
            order: (Term(0), Generation(0)),
            beat_at: begun,
            ended: BTreeMap::new(),
            events: Vec::new(),
            last: 0,
        };
        agents.insert(id, agent);
    }
    std::thread::spawn(move || {
        let mut fleet = Fleet { client, cluster, begun, agents, jobs: HashMap::new(), placed };
        let mut subscribed = 0;
        for event in mqtt.iter() {
            match event {
                Ok(Event::Incoming(Packet::SubAck(_))) => {
                    subscribed += 1;
                    if subscribed == 3 * NODES_EACH {
                        fleet.hello();
                    }
                }
                Ok(Event::Incoming(Packet::Publish(message))) => {
                    if let Some(topic) = Topic::parse(&fleet.cluster, &message.topic) {
                        fleet.take(&topic, &message.payload);
                    }
                }
                Ok(_) => fleet.beat(),
                Err(_) => return,
            }
        }
    });
    Ok(())
}

struct Fleet {
    client: Client,
    cluster: ClusterName,
    begun: Instant,
    agents: BTreeMap<NodeId, Agent>,
    /// Names of jobs by the digest of their spec.
    jobs: HashMap<Digest, String>,
    placed: Sender<(String, Instant)>,
}

impl Fleet {
    fn send<T: serde::Serialize>(&self, id: &NodeId, kind: NodeTopic, message: &T) {
        let topic = Topic::node(id, kind);
        let qos = if kind.is_qos0() { QoS::AtMostOnce } else { QoS::AtLeastOnce };
        if let Ok(payload) = codec::encode(&topic, message) {
            // What finds no place is sent again by the next beat.
            let _ = self.client.try_publish(topic.render(&self.cluster), qos, false, payload);
        }
    }

    fn hello(&mut self) {
        for agent in self.agents.values() {
            let parse = |text: &str| format!("{}-{text}", agent.id);
            let (Ok(hardware), Ok(boot)) = (HardwareId::parse(&parse("hw")), BootId::parse(&parse("boot")))
            else {
                continue;
            };
            let hello = Hello {
                nonce: agent.nonce.clone(),
                previous: None,
                session: 1,
                hardware,
                boot,
                ledger: agent.ledger.clone(),
                store: None::<StoreId>,
                term: Term(0),
                generation: Generation(0),
                events_acked: 0,
                events_last: 0,
                pods: Vec::new(),
                inventory: inventory(agent.id.as_str()),
            };
            self.send(&agent.id, NodeTopic::Hello, &hello);
        }
        self.beat();
    }

    fn beat(&mut self) {
        let due: Vec<NodeId> = self
            .agents
            .values()
            .filter(|a| a.beat_at.elapsed() >= BEAT || a.seq == 0)
            .map(|a| a.id.clone())
            .collect();
        for id in due {
            self.beat_one(&id);
        }
    }

    fn beat_one(&mut self, id: &NodeId) {
        let Some(agent) = self.agents.get_mut(id) else { return };
        agent.seq += 1;
        agent.beat_at = Instant::now();
        let beat = Heartbeat {
            nonce: agent.nonce.clone(),
            seq: agent.seq,
            boot_ms: BootMs(self.begun.elapsed().as_millis() as u64),
            last_grant: agent.last_grant,
            term: agent.order.0,
            generation: agent.order.1,
            held: held_digest(std::iter::empty()),
            usage: Usage::default(),
            pulls: Vec::new(),
            saves: Vec::new(),
            restores: Vec::new(),
            leaving: None,
        };
        let unacknowledged = agent.events.clone();
        self.send(id, NodeTopic::Heartbeat, &beat);
        self.tell(id, unacknowledged);
    }

    fn tell(&self, id: &NodeId, events: Vec<NumberedEvent>) {
        let Some(agent) = self.agents.get(id) else { return };
        for events in events.chunks(64) {
            let (nonce, ledger) = (agent.nonce.clone(), agent.ledger.clone());
            self.send(id, NodeTopic::Event, &Events { nonce, ledger, events: events.to_vec() });
        }
    }

    fn take(&mut self, topic: &Topic, payload: &[u8]) {
        let Topic::Node { node, kind } = topic else { return };
        match kind {
            NodeTopic::Spec => {
                let Ok(message) = codec::decode::<SpecMessage>(topic, payload) else { return };
                let template: serde_json::Value =
                    serde_json::from_str(message.spec.get()).unwrap_or_default();
                let job = template["job"].as_str().unwrap_or_default().to_owned();
                self.jobs.insert(message.digest, job);
            }
            NodeTopic::Lease => {
                let Ok(lease) = codec::decode::<Lease>(topic, payload) else { return };
                let Some(agent) = self.agents.get_mut(node) else { return };
                agent.last_grant = agent.last_grant.max(Some(lease.seq));
                agent.events.retain(|event| event.n > lease.acked);
            }
            NodeTopic::Desired => {
                let at = Instant::now();
                if let Ok(desired) = codec::decode::<Desired>(topic, payload) {
                    self.desired(node, &desired, at);
                }
            }
            _ => {}
        }
    }

    fn desired(&mut self, id: &NodeId, desired: &Desired, at: Instant) {
        let Some(agent) = self.agents.get_mut(id) else { return };
        if (desired.term, desired.generation) <= agent.order {
            return;
        }
        agent.order = (desired.term, desired.generation);
        let named: BTreeSet<&PodId> = desired.pods.iter().map(|pod| &pod.pod).collect();
        agent.ended.retain(|pod, _| named.contains(pod));
        let mut fresh = Vec::new();
        for pod in desired.pods.iter().filter(|pod| pod.goal == Goal::Run) {
            if agent.ended.get(&pod.pod).is_some_and(|epoch| *epoch >= pod.epoch) {
                continue;
            }
            agent.ended.insert(pod.pod.clone(), pod.epoch);
            agent.last += 1;
            let outcome = Outcome {
                exit_code: Some(0),
                cause: Cause::Success,
                reason: None,
                message: None,
                started_at: Some(now()),
                finished_at: now(),
                log_records: 0,
            };
            let change = PodChange::Ended { outcome };
            let event = PodEvent { pod: pod.pod.clone(), epoch: pod.epoch, run: Run(1), change };
            fresh.push(NumberedEvent { n: agent.last, at: now(), event: NodeEvent::Pod(event) });
            if let Some(job) = self.jobs.get(&pod.spec) {
                let _ = self.placed.send((job.clone(), at));
            }
        }
        agent.events.extend(fresh.iter().cloned());
        self.tell(id, fresh);
        // The controller sends the set again until it hears that it was applied.
        self.beat_one_quietly(id);
    }

    /// A beat without the events, which have just been told.
    fn beat_one_quietly(&mut self, id: &NodeId) {
        let Some(agent) = self.agents.get_mut(id) else { return };
        let events = std::mem::take(&mut agent.events);
        self.beat_one(id);
        if let Some(agent) = self.agents.get_mut(id) {
            agent.events = events;
        }
    }
}

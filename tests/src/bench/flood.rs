//! How many pods a second go through the controller, its broker and its store: simulated agents, whose pods end as soon
//! as they are placed, and a user who submits jobs and watches their statuses.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::mpsc::{self, Receiver, Sender};
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result, ensure};
use berth_protocol::codec;
use berth_protocol::ids::{Digest, Epoch, PodId, Run};
use berth_protocol::limits::EVENTS_PER_MESSAGE_MAX;
use berth_protocol::message::node::{
    Desired, Events, Lease, NodeEvent, NumberedEvent, PodChange, PodEvent, SpecMessage,
};
use berth_protocol::pod::{Cause, Goal, Outcome};
use berth_protocol::topic::{NodeTopic, Topic};
use berth_protocol::units::Timestamp;
use rumqttc::{Client, Event, MqttOptions, Packet, QoS};
use serde_json::json;

use super::figures::{Figure, percentile};
use super::node::{Face, KINDS};
use super::process::{MIB, cpu_time, pss};
use super::user::User;
use super::world::{Broker, World};

const NODES: usize = 64;
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

/// Half of what is asked, and how long each job waits for its first pod; then as many as go through, for a minute.
pub fn flood() -> Result<Vec<Figure>> {
    let world = World::new(Broker::Embedded)?;
    let (placed, seen) = mpsc::channel();
    for node in 0..NODES {
        start(world.port(), node, placed.clone())?;
    }
    let mut user = world.user()?;
    let mut tide =
        Tide { user: &mut user, seen, next: 0, submitted: HashMap::new(), waits: Vec::new(), pods: 0 };
    // The nodes are there once a first job is through.
    tide.submit()?;
    tide.drain(0).with_context(|| world.said())?;

    tide.waits.clear();
    let pause = Duration::from_secs_f64(PODS_PER_JOB as f64 / (ASKED_PER_SECOND / 2.0));
    let begun = Instant::now();
    let length = Duration::from_secs(seconds());
    let mut due = begun;
    while begun.elapsed() < length / 3 {
        while due <= Instant::now() {
            tide.submit()?;
            due += pause;
        }
        tide.hear(due.saturating_duration_since(Instant::now()))?;
    }
    tide.drain(0).with_context(|| world.said())?;
    let waits = std::mem::take(&mut tide.waits);

    let cpu = cpu_time(world.controller.pid())?;
    let (begun, before) = (Instant::now(), tide.pods);
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

    let wait = |percent: f64| percentile(&waits, percent).context("nothing was placed");
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
    face: Face,
    client: Client,
    /// Names of jobs by the digest of their spec.
    jobs: HashMap<Digest, String>,
    placed: Sender<(String, Instant)>,
    beat_at: Instant,
    /// Epochs that have ended here, of pods that are still named.
    ended: BTreeMap<PodId, Epoch>,
    events: Vec<NumberedEvent>,
    last: u64,
}

pub(super) fn now() -> Timestamp {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    Timestamp(since.as_millis() as u64)
}

/// A node whose pods end well at once.
pub(super) fn node(port: u16, node: usize) -> Result<()> {
    start(port, node, mpsc::channel().0)
}

/// One node, in a thread of its own until the broker has gone.
fn start(port: u16, node: usize, placed: Sender<(String, Instant)>) -> Result<()> {
    let face = Face::new(&format!("sim-{node}"))?;
    let mut options = MqttOptions::new(face.client(), "127.0.0.1", port);
    options.set_max_packet_size(96 * 1024, 96 * 1024);
    // A beat is looked for whenever anything happens: at least the connection's own.
    options.set_keep_alive(BEAT / 2);
    let (client, mut mqtt) = Client::new(options, 4 * 1024);
    let mut network = rumqttc::NetworkOptions::new();
    network.set_tcp_nodelay(true);
    mqtt.eventloop.set_network_options(network);
    for kind in KINDS {
        client.subscribe(face.topic(kind), QoS::AtLeastOnce)?;
    }
    let mut agent = Agent {
        face,
        client,
        jobs: HashMap::new(),
        placed,
        beat_at: Instant::now(),
        ended: BTreeMap::new(),
        events: Vec::new(),
        last: 0,
    };
    std::thread::spawn(move || {
        let mut subscribed = 0;
        for event in mqtt.iter() {
            match event {
                Ok(Event::Incoming(Packet::SubAck(_))) => {
                    subscribed += 1;
                    if subscribed == KINDS.len() {
                        agent.hello();
                    }
                }
                Ok(Event::Incoming(Packet::Publish(message))) => {
                    if let Some(topic) = Topic::parse(&agent.face.cluster, &message.topic) {
                        agent.take(&topic, &message.payload);
                    }
                }
                Ok(_) if agent.face.seq > 0 && agent.beat_at.elapsed() >= BEAT => agent.beat(true),
                Ok(_) => {}
                Err(_) => return,
            }
        }
    });
    Ok(())
}

impl Agent {
    fn send<T: serde::Serialize>(&self, kind: NodeTopic, message: &T) {
        if let Some((topic, qos, payload)) = self.face.message(kind, message) {
            // What finds no place is sent again by the next beat.
            let _ = self.client.try_publish(topic, qos, false, payload);
        }
    }

    fn hello(&mut self) {
        self.send(NodeTopic::Hello, &self.face.hello(None, (0, 0), std::iter::empty()));
        self.beat(true);
    }

    /// With what is unacknowledged, or alone where that has just been told.
    fn beat(&mut self, with_events: bool) {
        self.beat_at = Instant::now();
        let beat = self.face.heartbeat(std::iter::empty());
        self.send(NodeTopic::Heartbeat, &beat);
        if with_events {
            self.tell(&self.events);
        }
    }

    fn tell(&self, events: &[NumberedEvent]) {
        for events in events.chunks(EVENTS_PER_MESSAGE_MAX) {
            let (nonce, ledger) = (self.face.nonce.clone(), self.face.ledger.clone());
            self.send(NodeTopic::Event, &Events { nonce, ledger, events: events.to_vec() });
        }
    }

    fn take(&mut self, topic: &Topic, payload: &[u8]) {
        let Topic::Node { kind, .. } = topic else { return };
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
                self.face.last_grant = self.face.last_grant.max(Some(lease.seq));
                self.events.retain(|event| event.n > lease.acked);
            }
            NodeTopic::Desired => {
                let at = Instant::now();
                if let Ok(desired) = codec::decode::<Desired>(topic, payload) {
                    self.desired(&desired, at);
                }
            }
            _ => {}
        }
    }

    fn desired(&mut self, desired: &Desired, at: Instant) {
        if (desired.term, desired.generation) <= self.face.order {
            return;
        }
        self.face.order = (desired.term, desired.generation);
        let named: BTreeSet<&PodId> = desired.pods.iter().map(|pod| &pod.pod).collect();
        self.ended.retain(|pod, _| named.contains(pod));
        let specs: BTreeSet<Digest> = desired.pods.iter().map(|pod| pod.spec).collect();
        self.jobs.retain(|spec, _| specs.contains(spec));
        let mut fresh = Vec::new();
        for pod in desired.pods.iter().filter(|pod| pod.goal == Goal::Run) {
            if self.ended.get(&pod.pod).is_some_and(|epoch| *epoch >= pod.epoch) {
                continue;
            }
            self.ended.insert(pod.pod.clone(), pod.epoch);
            self.last += 1;
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
            fresh.push(NumberedEvent { n: self.last, at: now(), event: NodeEvent::Pod(event) });
            if let Some(job) = self.jobs.get(&pod.spec) {
                let _ = self.placed.send((job.clone(), at));
            }
        }
        self.tell(&fresh);
        self.events.extend(fresh);
        // The controller sends the set again until it hears that it was applied.
        self.beat(false);
    }
}

//! A controller, its store, and agents as simple as the wire allows.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use berth_protocol::checkpoint::{CheckpointInfo, CheckpointKind, Needs};
use berth_protocol::codec;
use berth_protocol::ids::*;
use berth_protocol::job::{
    Checkpoint, ContainerSpec, JobSpec, Network, OnDisconnect, Placement, PodTemplate, Restart,
};
use berth_protocol::limits::{DISCONNECT_AFTER_MS, HEARTBEAT_MS, HEARTBEAT_RETRY_MS};
use berth_protocol::message::node::*;
use berth_protocol::message::user::{Answer, JobStatus, NodeStatus};
use berth_protocol::pod::{Cause, Goal, Outcome, RESTORE_FAILED, VACATED};
use berth_protocol::resources::{CgroupVersion, Gpu, GpuVendor, Inventory, Limits, Resources, Usage};
use berth_protocol::sign::PublicKey;
use berth_protocol::topic::{JobTopic, NodeTopic, Topic};
use berth_protocol::units::{BootMs, Bytes, MilliCpu, Millis, Timestamp};

use super::super::{Config, Controller, Effect, Event, Now, Step};

/// How a pod's program behaves: read from its command, `run MS CODE`.
#[derive(Debug, Clone, Copy)]
pub struct Program {
    pub ms: u64,
    pub code: u8,
}

pub fn spec(name: &str) -> JobSpec {
    let (namespace, name) = (Namespace::default_namespace(), JobName::parse(name).unwrap());
    let container = ContainerSpec {
        name: ContainerName::parse("main").unwrap(),
        image: "oci:/images/busybox".to_owned(),
        command: ["run", "1000", "0"].map(str::to_owned).to_vec(),
        args: Vec::new(),
        env: BTreeMap::new(),
        working_dir: None,
        user: None,
        resources: Resources { cpu: MilliCpu(1000), memory: Bytes(128 * Bytes::MIB), ..Resources::default() },
        limits: Limits { cpu: MilliCpu(1000), memory: Bytes(128 * Bytes::MIB) },
        read_only_root: false,
        capabilities: BTreeSet::new(),
        secrets: Vec::new(),
    };
    JobSpec {
        namespace: namespace.clone(),
        name: name.clone(),
        pod: PodTemplate {
            namespace,
            job: name,
            containers: vec![container],
            volumes: Vec::new(),
            network: Network::Bridge,
            restart: Restart::default(),
            grace: Millis::from_secs(30),
            on_disconnect: OnDisconnect::default(),
            checkpoint: Checkpoint::default(),
            outputs: Vec::new(),
            workspace: None,
        },
        placement: Placement::default(),
        parallelism: 1,
        completions: 1,
        gang: false,
        suspend: false,
        active_deadline: None,
        ttl: Millis::from_secs(7 * 86_400),
        priority: 0,
        preemptible: true,
    }
}

/// Of every agent.
pub const KEY: PublicKey = PublicKey::from_bytes([0; 32]);

pub fn inventory(cores: u64, gpus: usize) -> Inventory {
    let gpu = |i: usize| Gpu {
        uuid: format!("GPU-{i}"),
        vendor: GpuVendor::Nvidia,
        model: "NVIDIA A100-SXM4-80GB".to_owned(),
        memory: Bytes(80 * Bytes::GIB),
        pci: None,
        unhealthy: None,
        mig: false,
        outside: Bytes::ZERO,
    };
    Inventory {
        hostname: "host".to_owned(),
        arch: "x86_64".to_owned(),
        kernel: "6.1.0".to_owned(),
        os: "Debian GNU/Linux 12".to_owned(),
        cpu: MilliCpu(cores * 1000),
        memory: Bytes(8 * Bytes::GIB),
        disk: Bytes(100 * Bytes::GIB),
        cpu_model: "model".to_owned(),
        cpu_features: BTreeSet::new(),
        cgroup: CgroupVersion::V2,
        criu: Some("4.1.1".to_owned()),
        gpus: (0..gpus).map(gpu).collect(),
        gpu_driver: None,
        saves_gpus: gpus > 0,
        cuda: None,
        labels: BTreeMap::new(),
        taints: BTreeSet::new(),
        host_image: false,
        bridge: true,
        agent_version: "0.1.0".to_owned(),
        images: Default::default(),
        policy: None,
    }
}

#[derive(Debug, Clone, PartialEq)]
pub enum Life {
    /// Waits for its spec and a grant.
    Ordered,
    Running {
        until: u64,
    },
    /// Stands still until its checkpoint's event is acknowledged; then it ends.
    Saved {
        event: u64,
    },
    Over,
}

pub struct Held {
    pub epoch: Epoch,
    pub run: Run,
    pub spec: Digest,
    pub life: Life,
    /// Its grant counts from then.
    pub granted: u64,
    pub from: Option<Digest>,
    /// Of the last checkpoint taken or failed.
    pub level: u64,
}

pub struct Agent {
    pub id: NodeId,
    pub up: bool,
    pub cut: bool,
    pub inventory: Inventory,
    pub boot: u32,
    pub session: u64,
    /// The sessions that the controller answered, the newest last.
    pub known: Vec<SessionNonce>,
    pub seq: u64,
    pub sent: BTreeMap<u64, u64>,
    pub beat_at: u64,
    pub hello_due: bool,
    /// The highest term of a lease in this session.
    pub heard: Term,
    pub last_grant: Option<u64>,
    pub order: (Term, Generation),
    pub pods: BTreeMap<PodId, Held>,
    pub specs: BTreeMap<Digest, Program>,
    pub events: VecDeque<NumberedEvent>,
    pub events_acked: u64,
    pub events_last: u64,
    pub events_at: u64,
    pub logs_asked: Vec<(PodId, Epoch)>,
    /// Neither saves nor restores work here.
    pub dumps_fail: bool,
    pub restores_fail: bool,
    /// Models of the devices whose memory is in its pods' checkpoints.
    pub gpus_saved: Vec<String>,
    /// What it makes of what is to be staged, and how often it was asked.
    pub stages: Stages,
    pub staged: BTreeMap<PodId, Staged>,
    pub asked: Vec<Stage>,
    pub chunks: Option<ChunkServer>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stages {
    AtOnce,
    Never,
    Fails,
    /// Of a version that knows nothing of it.
    Ignores,
}

impl Agent {
    pub fn nonce(&self) -> SessionNonce {
        SessionNonce::parse(&format!("{}-{}", self.id, self.session)).unwrap()
    }

    fn ledger(&self) -> LedgerId {
        LedgerId::parse(&format!("ledger-{}", self.id)).unwrap()
    }

    pub fn report(&mut self, now: u64, pod: &PodId, change: PodChange) {
        let held = &self.pods[pod];
        let event = PodEvent { pod: pod.clone(), epoch: held.epoch, run: held.run, change };
        self.events_last += 1;
        let n = self.events_last;
        self.events.push_back(NumberedEvent { n, at: Timestamp(now), event: NodeEvent::Pod(event) });
        self.events_at = now;
    }

    fn stage(&mut self, stages: &[Stage]) {
        let state = match self.stages {
            Stages::AtOnce => StageState::Ready,
            Stages::Never => StageState::Busy,
            Stages::Fails => StageState::Failed { why: "no luck".to_owned() },
            Stages::Ignores => return,
        };
        self.asked.extend(stages.iter().filter(|stage| !self.staged.contains_key(&stage.pod)).cloned());
        let staged =
            |stage: &Stage| Staged { pod: stage.pod.clone(), epoch: stage.epoch, state: state.clone() };
        self.staged = stages.iter().map(|stage| (stage.pod.clone(), staged(stage))).collect();
    }

    fn evict(&mut self, now: u64, pod: &PodId, reason: &str) {
        if let Some(held) = self.pods.get_mut(pod) {
            held.life = Life::Over;
        }
        let reason = Some(reason.to_owned());
        let outcome = Outcome { reason, ..outcome(now, Cause::Eviction, None) };
        self.report(now, pod, PodChange::Ended { outcome });
    }

    /// Takes the checkpoint that is asked for; what of the pod's program is left goes into the depot.
    fn save(&mut self, now: u64, pod: &PodId, level: u64, leaves: bool) -> Option<(Digest, u64)> {
        let held = self.pods.get_mut(pod)?;
        let Life::Running { until } = held.life else { return None };
        if held.level >= level {
            return None;
        }
        held.level = level;
        let epoch = held.epoch;
        if self.dumps_fail {
            self.report(now, pod, PodChange::CheckpointFailed { level, why: "no luck".to_owned() });
            return None;
        }
        let id = Digest::of(format!("{pod} {epoch} {level}").as_bytes());
        let info = CheckpointInfo {
            id,
            level,
            at: Timestamp(WALL + now),
            kind: CheckpointKind::Criu,
            bytes: Bytes(1000),
            new_bytes: Bytes(100),
            frozen_ms: 5,
            log_records: 1,
            needs: Needs {
                arch: self.inventory.arch.clone(),
                criu: self.inventory.criu.clone(),
                cpu_features: self.inventory.cpu_features.clone(),
                gpus: self.gpus_saved.clone(),
                ..Needs::default()
            },
        };
        self.report(now, pod, PodChange::Checkpointing { level });
        self.report(now, pod, PodChange::Checkpointed { info: Box::new(info) });
        let event = self.events_last;
        if let Some(held) = self.pods.get_mut(pod).filter(|_| leaves) {
            held.life = Life::Saved { event };
        }
        Some((id, until - now))
    }

    fn end(&mut self, now: u64, pod: &PodId, cause: Cause, code: Option<u8>) {
        if let Some(held) = self.pods.get_mut(pod) {
            held.life = Life::Over;
        }
        self.report(now, pod, PodChange::Ended { outcome: outcome(now, cause, code) });
    }

    /// Runs now, as far as its lease allows.
    pub fn runs(&self, pod: &PodId, now: u64) -> bool {
        self.pods.get(pod).is_some_and(|held| {
            matches!(held.life, Life::Running { .. }) && now < held.granted + DISCONNECT_AFTER_MS + 10_000
        })
    }

    fn held(&self) -> impl Iterator<Item = (&PodId, Epoch)> {
        self.pods.iter().filter(|(_, held)| held.life != Life::Over).map(|(pod, held)| (pod, held.epoch))
    }

    pub fn reboot(&mut self, now: u64) {
        self.boot += 1;
        let ran: Vec<PodId> = self
            .pods
            .iter()
            .filter(|(_, h)| matches!(h.life, Life::Running { .. } | Life::Saved { .. }))
            .map(|(p, _)| p.clone())
            .collect();
        for pod in ran {
            self.end(now, &pod, Cause::Eviction, None);
        }
        self.restart();
    }

    pub fn restart(&mut self) {
        self.session += 1;
        self.heard = Term(0);
        (self.seq, self.beat_at, self.last_grant, self.hello_due) = (0, 0, None, true);
        self.sent.clear();
        self.staged.clear();
        self.up = true;
    }
}

pub fn outcome(now: u64, cause: Cause, exit_code: Option<u8>) -> Outcome {
    Outcome {
        exit_code,
        cause,
        reason: None,
        message: None,
        started_at: None,
        finished_at: Timestamp(now),
        log_records: 1,
    }
}

pub struct World {
    pub controller: Controller,
    pub store: BTreeMap<String, Vec<u8>>,
    /// Keys whose values cannot be read at the next start.
    pub damaged: BTreeSet<String>,
    pub term: u64,
    pub now: u64,
    pub agents: BTreeMap<NodeId, Agent>,
    pub retained: BTreeMap<Topic, Vec<u8>>,
    pub answers: Vec<Answer>,
    pub replies: Vec<Vec<u8>>,
    pub deleted: Vec<Effect>,
    /// Checkpoints, and what of the program is left in each.
    pub depot: BTreeMap<Digest, u64>,
    pub network: VecDeque<(Topic, Vec<u8>)>,
    /// Every epoch ever desired of a pod, to see that they only grow.
    pub epochs: BTreeMap<PodId, Epoch>,
    pub messages: usize,
    /// Whether the prices that the controller asks for are made.
    pub prices: bool,
    /// How often it asked.
    pub quotes: usize,
}

const WALL: u64 = 1_700_000_000_000;

pub fn config(term: u64) -> Config {
    Config {
        cluster: ClusterName::parse("lab").unwrap(),
        store: StoreId::parse("store-1").unwrap(),
        term: Term(term),
        depot_url: "http://127.0.0.1:7420".to_owned(),
        namespaces: BTreeMap::new(),
        moves_max: 8,
        secret: [7; 32],
        ca: None,
        seed: 42 + term,
    }
}

impl World {
    pub fn new() -> Self {
        let now = 1_000_000;
        let controller = Controller::load(config(1), Vec::new(), at(now)).unwrap();
        let mut world = Self {
            controller,
            store: BTreeMap::new(),
            damaged: BTreeSet::new(),
            term: 1,
            now,
            agents: BTreeMap::new(),
            retained: BTreeMap::new(),
            answers: Vec::new(),
            replies: Vec::new(),
            deleted: Vec::new(),
            depot: BTreeMap::new(),
            network: VecDeque::new(),
            epochs: BTreeMap::new(),
            messages: 0,
            prices: true,
            quotes: 0,
        };
        world.feed(Event::BusUp);
        world
    }

    /// The controller dies and comes back from what it stored.
    pub fn restart_controller(&mut self) {
        self.restart_controller_alone();
        self.feed(Event::BusUp);
    }

    /// And finds no broker.
    pub fn restart_controller_alone(&mut self) {
        self.term += 1;
        self.controller = Controller::load(config(self.term), self.entries(), at(self.now)).unwrap();
    }

    /// As the store lists them; what is damaged has no value.
    pub fn entries(&self) -> Vec<(String, Option<Vec<u8>>)> {
        let damaged = |key: &String| self.damaged.contains(key);
        self.store.iter().map(|(key, value)| (key.clone(), (!damaged(key)).then(|| value.clone()))).collect()
    }

    pub fn add(&mut self, name: &str, inventory: Inventory) -> NodeId {
        let id = NodeId::parse(name).unwrap();
        let mut agent = Agent {
            id: id.clone(),
            up: true,
            cut: false,
            inventory,
            boot: 1,
            session: 0,
            heard: Term(0),
            known: Vec::new(),
            seq: 0,
            sent: BTreeMap::new(),
            beat_at: 0,
            hello_due: true,
            last_grant: None,
            order: (Term(0), Generation(0)),
            pods: BTreeMap::new(),
            specs: BTreeMap::new(),
            events: VecDeque::new(),
            events_acked: 0,
            events_last: 0,
            events_at: 0,
            logs_asked: Vec::new(),
            dumps_fail: false,
            restores_fail: false,
            gpus_saved: Vec::new(),
            stages: Stages::AtOnce,
            staged: BTreeMap::new(),
            asked: Vec::new(),
            chunks: None,
        };
        agent.restart();
        self.agents.insert(id.clone(), agent);
        id
    }

    pub fn feed(&mut self, event: Event) {
        let step = self.controller.step(at(self.now), event);
        self.release(step);
    }

    fn release(&mut self, step: Step) {
        for write in step.writes {
            match write.value {
                Some(value) => drop(self.store.insert(write.key, value)),
                None => drop(self.store.remove(&write.key)),
            }
        }
        let mut priced = Vec::new();
        for effect in step.effects {
            match effect {
                Effect::Price(quote) => {
                    self.quotes += 1;
                    priced.extend(self.prices.then(|| Event::Priced(Box::new(quote.prices()))));
                }
                Effect::Publish { topic, payload, retain } => {
                    self.messages += 1;
                    if retain && payload.is_empty() {
                        self.retained.remove(&topic);
                    } else if retain {
                        self.retained.insert(topic.clone(), payload.clone());
                    }
                    self.network.push_back((topic, payload));
                }
                Effect::DeleteCheckpoint(id) => drop(self.depot.remove(&id)),
                other => self.deleted.push(other),
            }
        }
        priced.into_iter().for_each(|event| self.feed(event));
    }

    pub fn submit(&mut self, spec: &JobSpec) -> Answer {
        let topic = Topic::job(&spec.namespace, &spec.name, JobTopic::Submit);
        self.submit_to(topic, serde_json::to_vec(&berth_protocol::job::render(spec)).unwrap())
    }

    pub fn submit_bytes(&mut self, job: &str, payload: &[u8]) -> Answer {
        let job = JobName::parse(job).unwrap();
        let topic = Topic::job(&Namespace::default_namespace(), &job, JobTopic::Submit);
        self.submit_to(topic, payload.to_vec())
    }

    fn submit_to(&mut self, topic: Topic, payload: Vec<u8>) -> Answer {
        self.feed(Event::Message { topic, payload, by: None });
        self.deliver_all();
        self.answers.last().cloned().unwrap()
    }

    pub fn command_with(&mut self, job: &str, command: &str, more: &str) -> Answer {
        self.order(job, command, more);
        self.deliver_all();
        self.answers.last().cloned().unwrap()
    }

    pub fn command(&mut self, job: &str, id: &str, command: &str) -> Answer {
        let topic =
            Topic::job(&Namespace::default_namespace(), &JobName::parse(job).unwrap(), JobTopic::Command);
        let payload = format!(r#"{{"id":"{id}","command":"{command}"}}"#).into_bytes();
        self.feed(Event::Message { topic, payload, by: None });
        self.deliver_all();
        self.answers.last().cloned().unwrap()
    }

    /// The next message of this kind that a node's own agent says; it arrives nowhere.
    pub fn overheard<T: serde::de::DeserializeOwned>(&mut self, node: &NodeId, kind: NodeTopic) -> T {
        let agent = self.agents.get_mut(node).unwrap();
        (agent.hello_due, agent.beat_at) = (true, self.now);
        self.agents_act();
        let said = std::mem::take(&mut self.network);
        let found = said.into_iter().find(|(topic, _)| *topic == Topic::node(node, kind));
        let (topic, payload) = found.expect("it is said");
        codec::decode(&topic, &payload).unwrap()
    }

    /// What leases are sent to the node for this.
    pub fn says<T: serde::Serialize>(
        &mut self,
        node: &NodeId,
        kind: NodeTopic,
        by: PublicKey,
        message: &T,
    ) -> Vec<Lease> {
        let topic = Topic::node(node, kind);
        let payload = codec::encode(&topic, message).unwrap();
        let step = self.controller.step(at(self.now), Event::Message { topic, payload, by: Some(by.into()) });
        let lease = |effect: Effect| match effect {
            Effect::Publish {
                topic: topic @ Topic::Node { kind: NodeTopic::Lease, .. }, payload, ..
            } => Some(codec::decode(&topic, &payload).unwrap()),
            _ => None,
        };
        step.effects.into_iter().filter_map(lease).collect()
    }

    /// Asks without waiting for what else is on its way.
    pub fn ask(&mut self, query: &str) {
        let topic = Topic::QueryRequest { client: ClientId::parse("c1").unwrap() };
        let payload = format!(r#"{{"id":"q1","query":{query}}}"#).into_bytes();
        self.feed(Event::Message { topic, payload, by: None });
    }

    /// Orders without waiting for what else is on its way.
    pub fn order(&mut self, job: &str, command: &str, more: &str) {
        let topic =
            Topic::job(&Namespace::default_namespace(), &JobName::parse(job).unwrap(), JobTopic::Command);
        let payload = format!(r#"{{"command":"{command}",{more}}}"#).into_bytes();
        self.feed(Event::Message { topic, payload, by: None });
    }

    pub fn query(&mut self, query: &str) -> serde_json::Value {
        let topic = Topic::QueryRequest { client: ClientId::parse("c1").unwrap() };
        let payload = format!(r#"{{"id":"q1","query":{query}}}"#).into_bytes();
        self.feed(Event::Message { topic, payload, by: None });
        self.deliver_all();
        serde_json::from_slice(&self.replies.pop().unwrap()).unwrap()
    }

    pub fn status(&self, job: &str) -> Option<JobStatus> {
        let topic =
            Topic::job(&Namespace::default_namespace(), &JobName::parse(job).unwrap(), JobTopic::Status);
        self.retained.get(&topic).map(|payload| serde_json::from_slice(payload).unwrap())
    }

    pub fn node(&self, node: &NodeId) -> NodeStatus {
        serde_json::from_slice(&self.retained[&Topic::NodeState { node: node.clone() }]).unwrap()
    }

    pub fn deliver_all(&mut self) {
        while let Some((topic, payload)) = self.network.pop_front() {
            self.deliver(topic, payload);
        }
    }

    /// One message reaches whoever it is for.
    pub fn deliver(&mut self, topic: Topic, payload: Vec<u8>) {
        match &topic {
            Topic::Job { kind: JobTopic::Answer, .. } => {
                self.answers.push(codec::decode(&topic, &payload).unwrap());
            }
            Topic::QueryReply { .. } => self.replies.push(payload),
            Topic::Node { node, kind } => {
                let cut = self.agents.get(node).is_none_or(|agent| !agent.up || agent.cut);
                if cut {
                    return;
                }
                let node = node.clone();
                match kind {
                    NodeTopic::Hello | NodeTopic::Heartbeat | NodeTopic::Event | NodeTopic::Bye => {
                        self.feed(Event::Message { topic, payload, by: Some(KEY.into()) });
                    }
                    NodeTopic::Desired => self.desired(&node, codec::decode(&topic, &payload).unwrap()),
                    NodeTopic::Lease => self.lease(&node, codec::decode(&topic, &payload).unwrap()),
                    NodeTopic::Spec => {
                        let message: SpecMessage = codec::decode(&topic, &payload).unwrap();
                        assert_eq!(Digest::of(message.spec.get().as_bytes()), message.digest);
                        let spec: PodTemplate = serde_json::from_str(message.spec.get()).unwrap();
                        let word = |i: usize| spec.containers[0].command[i].as_str();
                        let program =
                            Program { ms: word(1).parse().unwrap(), code: word(2).parse().unwrap() };
                        self.agents.get_mut(&node).unwrap().specs.insert(message.digest, program);
                    }
                    NodeTopic::Request => {
                        let request: NodeRequest = codec::decode(&topic, &payload).unwrap();
                        let Request::Logs { pod, epoch, .. } = request.request;
                        self.agents.get_mut(&node).unwrap().logs_asked.push((pod, epoch));
                    }
                }
            }
            _ => {}
        }
    }

    fn desired(&mut self, id: &NodeId, desired: Desired) {
        let now = self.now;
        for pod in &desired.pods {
            let known = self.epochs.entry(pod.pod.clone()).or_insert(pod.epoch);
            *known = (*known).max(pod.epoch);
        }
        let agent = self.agents.get_mut(id).unwrap();
        if (desired.term, desired.generation) <= agent.order {
            return;
        }
        agent.order = (desired.term, desired.generation);
        agent.stage(&desired.stage);
        let named: BTreeSet<&PodId> = desired.pods.iter().map(|pod| &pod.pod).collect();
        agent.pods.retain(|pod, held| {
            named.contains(pod) || matches!(held.life, Life::Running { .. } | Life::Saved { .. })
        });
        for pod in &desired.pods {
            let newer = agent.pods.get(&pod.pod).is_none_or(|held| held.epoch < pod.epoch);
            if newer && pod.goal == Goal::Run {
                assert!(!agent.runs(&pod.pod, now), "an older epoch still runs here");
                let held = Held {
                    epoch: pod.epoch,
                    run: Run(1),
                    spec: pod.spec,
                    life: Life::Ordered,
                    granted: 0,
                    from: pod.from,
                    level: 0,
                };
                agent.pods.insert(pod.pod.clone(), held);
            }
            let here = agent.pods.get(&pod.pod).is_some_and(|held| held.epoch == pod.epoch);
            if here && matches!(pod.goal, Goal::Run | Goal::Vacate) {
                let leaves = pod.goal == Goal::Vacate;
                self.depot.extend(agent.save(now, &pod.pod, pod.checkpoint, leaves));
            }
            if pod.goal == Goal::Stop {
                let held = agent.pods.get(&pod.pod).filter(|held| held.epoch == pod.epoch);
                match held.map(|held| held.life.clone()) {
                    Some(Life::Over) => {}
                    Some(_) => agent.end(now, &pod.pod, Cause::Eviction, Some(143)),
                    None if newer => {
                        let held = Held {
                            epoch: pod.epoch,
                            run: Run(1),
                            spec: pod.spec,
                            life: Life::Over,
                            granted: 0,
                            from: None,
                            level: 0,
                        };
                        agent.pods.insert(pod.pod.clone(), held);
                        agent.end(now, &pod.pod, Cause::Eviction, None);
                    }
                    None => {}
                }
            }
        }
        agent.beat_at = now;
    }

    fn lease(&mut self, id: &NodeId, lease: Lease) {
        let now = self.now;
        let agent = self.agents.get_mut(id).unwrap();
        if lease.nonce != agent.nonce() {
            return;
        }
        agent.heard = agent.heard.max(lease.term);
        if lease.hello {
            agent.hello_due = true;
            return;
        }
        if agent.known.last() != Some(&lease.nonce) {
            agent.known.push(lease.nonce.clone());
        }
        let Some(sent) = agent.sent.get(&lease.seq).copied() else { return };
        agent.last_grant = agent.last_grant.max(Some(lease.seq));
        if lease.ledger == agent.ledger() {
            agent.events_acked = agent.events_acked.max(lease.acked);
            while agent.events.front().is_some_and(|event| event.n <= lease.acked) {
                agent.events.pop_front();
            }
        }
        let saved = |held: &Held| matches!(held.life, Life::Saved { event } if event <= agent.events_acked);
        let gone: Vec<PodId> = agent.pods.iter().filter(|(_, h)| saved(h)).map(|(p, _)| p.clone()).collect();
        for pod in gone {
            agent.evict(now, &pod, VACATED);
        }
        let held: Vec<(PodId, Epoch)> = agent.held().map(|(pod, epoch)| (pod.clone(), epoch)).collect();
        let covered: Vec<(PodId, Epoch)> = match lease.covers {
            Covers::All(digest) if digest == held_digest(held.iter().map(|(p, e)| (p, *e))) => held,
            Covers::All(_) => Vec::new(),
            Covers::Pairs(pairs) => pairs.into_iter().filter(|pair| held.contains(pair)).collect(),
        };
        for (pod, _) in covered {
            let Some(held) = agent.pods.get_mut(&pod) else { continue };
            held.granted = held.granted.max(sent);
            let program = agent.specs.get(&held.spec).copied();
            if let (Life::Ordered, Some(program)) = (&held.life, program) {
                let from = held.from;
                if from.is_some() && agent.restores_fail {
                    agent.report(now, &pod, PodChange::Restoring);
                    agent.evict(now, &pod, RESTORE_FAILED);
                    continue;
                }
                let left = from.map_or(program.ms, |id| {
                    *self.depot.get(&id).expect("a checkpoint that a pod is to start from is in the depot")
                });
                held.life = Life::Running { until: now + left };
                let begins = if from.is_some() { PodChange::Restoring } else { PodChange::Starting };
                agent.report(now, &pod, begins);
                agent.report(now, &pod, PodChange::Running);
            }
        }
    }

    fn send<T: serde::Serialize>(&mut self, id: &NodeId, kind: NodeTopic, message: &T) {
        let topic = Topic::node(id, kind);
        let payload = codec::encode(&topic, message).unwrap();
        self.network.push_back((topic, payload));
    }

    /// Lets agents do what is due at this moment.
    pub fn agents_act(&mut self) {
        let now = self.now;
        let ids: Vec<NodeId> =
            self.agents.iter().filter(|(_, agent)| agent.up).map(|(id, _)| id.clone()).collect();
        for id in ids {
            let agent = self.agents.get_mut(&id).unwrap();
            let over: Vec<PodId> = agent
                .pods
                .iter()
                .filter(|(_, held)| matches!(held.life, Life::Running { until } if until <= now))
                .map(|(pod, _)| pod.clone())
                .collect();
            for pod in over {
                if !agent.runs(&pod, now) {
                    // Frozen and, in this model, killed.
                    agent.end(now, &pod, Cause::Eviction, None);
                    continue;
                }
                let code = agent.specs[&agent.pods[&pod].spec].code;
                let cause = if code == 0 { Cause::Success } else { Cause::Failure };
                agent.end(now, &pod, cause, Some(code));
            }
            if agent.hello_due {
                let before = agent.known.iter().filter(|known| **known != agent.nonce());
                let mut earlier: Vec<SessionNonce> = before.cloned().collect();
                let hello = Hello {
                    nonce: agent.nonce(),
                    previous: earlier.pop(),
                    earlier,
                    session: agent.session,
                    hardware: HardwareId::parse(&format!("hw-{id}")).unwrap(),
                    boot: BootId::parse(&format!("boot-{}", agent.boot)).unwrap(),
                    ledger: agent.ledger(),
                    store: Some(StoreId::parse("store-1").unwrap()),
                    term: agent.order.0,
                    generation: agent.order.1,
                    heard: Some(agent.heard),
                    events_acked: agent.events_acked,
                    events_last: agent.events_last,
                    pods: agent
                        .pods
                        .iter()
                        .filter(|(_, held)| held.life != Life::Over)
                        .map(|(pod, held)| HeldPod {
                            pod: pod.clone(),
                            epoch: held.epoch,
                            run: held.run,
                            alive: matches!(held.life, Life::Running { .. } | Life::Saved { .. }),
                            granted: matches!(held.life, Life::Running { .. }),
                        })
                        .collect(),
                    inventory: agent.inventory.clone(),
                    chunks: agent.chunks.clone(),
                };
                agent.hello_due = false;
                self.send(&id, NodeTopic::Hello, &hello);
            }
            let agent = self.agents.get_mut(&id).unwrap();
            if !agent.events.is_empty() && agent.events_at <= now {
                agent.events_at = now + 2_000;
                let events = Events {
                    nonce: agent.nonce(),
                    ledger: agent.ledger(),
                    events: agent.events.iter().take(64).cloned().collect(),
                };
                self.send(&id, NodeTopic::Event, &events);
            }
            let agent = self.agents.get_mut(&id).unwrap();
            if agent.beat_at <= now {
                agent.seq += 1;
                agent.sent.insert(agent.seq, now);
                let unanswered = agent.last_grant.is_none_or(|seq| seq + 1 < agent.seq);
                agent.beat_at = now + if unanswered { HEARTBEAT_RETRY_MS } else { HEARTBEAT_MS };
                let beat = Heartbeat {
                    nonce: agent.nonce(),
                    seq: agent.seq,
                    boot_ms: BootMs(now),
                    last_grant: agent.last_grant,
                    term: agent.order.0,
                    generation: agent.order.1,
                    held: held_digest(agent.held()),
                    events_acked: agent.events_acked,
                    usage: Usage::default(),
                    pulls: Vec::new(),
                    saves: Vec::new(),
                    restores: Vec::new(),
                    staged: agent.staged.values().cloned().collect(),
                    leaving: None,
                };
                self.send(&id, NodeTopic::Heartbeat, &beat);
            }
        }
    }

    /// The next moment at which somebody has something to do.
    pub fn next(&self) -> u64 {
        let agents = self.agents.values().filter(|agent| agent.up).flat_map(|agent| {
            let pods = agent.pods.values().filter_map(|held| match held.life {
                Life::Running { until } => Some(until),
                _ => None,
            });
            let events = (!agent.events.is_empty()).then_some(agent.events_at);
            pods.chain(events).chain([agent.beat_at]).collect::<Vec<_>>()
        });
        let all = agents.chain(self.controller.next_wake().map(|at| at.0));
        all.min().unwrap_or(self.now + 1000).max(self.now + 1)
    }

    /// Time goes on for `ms`, on a bus that loses nothing.
    pub fn run(&mut self, ms: u64) {
        let end = self.now + ms;
        loop {
            self.settle();
            self.now = self.next().min(end);
            if self.now >= end {
                break;
            }
            self.feed(Event::Tick);
        }
        self.settle();
    }

    fn settle(&mut self) {
        loop {
            self.agents_act();
            if self.network.is_empty() {
                break;
            }
            self.deliver_all();
        }
    }

    pub fn until(&mut self, what: &str, mut done: impl FnMut(&Self) -> bool) {
        for _ in 0..20_000 {
            if done(self) {
                return;
            }
            let next = self.next();
            self.run(next - self.now);
            self.feed(Event::Tick);
        }
        panic!("never: {what}");
    }
}

pub fn at(now: u64) -> Now {
    Now { wall: Timestamp(WALL + now), boot: BootMs(now) }
}

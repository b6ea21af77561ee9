//! One history: a controller, some nodes, a network that loses, doubles, delays and reorders, and faults, all drawn
//! from one seed.

mod faults;

use std::collections::BTreeMap;

use berth_agent::core::{Action, Event as AgentEvent, Now as AgentNow};
use berth_controller::core::{Controller, Effect, Event as ControllerEvent, Now, Quote, Step};
use berth_protocol::codec;
use berth_protocol::ids::{ClusterName, JobName, Namespace, NodeId};
use berth_protocol::message::node::{Desired, Lease, SpecMessage};
use berth_protocol::message::user::{Answer, JobPhase, JobStatus, Verdict};
use berth_protocol::rule::{Rule, kept};
use berth_protocol::topic::{JobTopic, NodeTopic, Topic};
use berth_protocol::units::{BootMs, MilliCpu, Timestamp};

use self::faults::{Fault, Jam};
use crate::node::{Depot, Node, Out};
use crate::oracle::Oracle;
use crate::wishes::Wish;

/// Civil time at the beginning of every history.
const EPOCH_MS: u64 = 1_700_000_000_000;
/// How long a history is disturbed, and how long it then has to come to rest.
pub(crate) const FAULTS_MS: u64 = 600_000;
const REST_MS: u64 = 1_800_000;

/// Something under way, due at its time.
pub(crate) enum Due {
    ToController {
        topic: Topic,
        payload: Vec<u8>,
    },
    ToNode {
        node: usize,
        /// The broker has it for this session; none: it is not at the broker yet, and any session may get it.
        session: Option<u64>,
        event: AgentEvent,
    },
    /// Within a machine: reaches whichever agent runs there.
    Local {
        node: usize,
        event: AgentEvent,
    },
    Fault(Fault),
    Submit(usize),
    /// With another `onDisconnect`.
    Resubmit(usize),
    /// Prices that whichever controller is there then gets.
    Priced(Quote),
    Wish(Wish),
}

pub(crate) struct Job {
    pub name: String,
    file: String,
    expect: JobPhase,
}

pub struct World {
    pub(crate) rng: fastrand::Rng,
    now_ms: u64,
    due: BTreeMap<(u64, u64), Due>,
    pub(crate) sequence: u64,
    controller: Option<Controller>,
    store: BTreeMap<String, Vec<u8>>,
    term: u64,
    pub(crate) nodes: Vec<Node>,
    depot: Depot,
    cut: Vec<bool>,
    /// What the network holds back for each node, while it does.
    jams: Vec<Option<Jam>>,
    /// The controller is killed in the middle of its next step that says something, after so many messages.
    controller_dies_after: Option<usize>,
    noticed: Vec<bool>,
    sessions: Vec<u64>,
    pub(crate) jobs: Vec<Job>,
    oracle: Oracle,
    burnt: Option<usize>,
    calm: bool,
    cluster: ClusterName,
    /// What happened, for a person; empty unless asked for.
    pub trace: Option<Vec<String>>,
    pub steps: u64,
}

/// Runs one seed. The error says what went wrong, and when.
pub fn run(seed: u64, trace: bool) -> (Result<u64, String>, Vec<String>) {
    let mut world = World::new(seed, trace);
    let result = world.play().map_err(|error| format!("at {} ms: {error}", world.now_ms));
    (result.map(|()| world.steps), world.trace.unwrap_or_default())
}

impl World {
    fn new(seed: u64, trace: bool) -> Self {
        let mut rng = fastrand::Rng::with_seed(seed);
        let count = rng.usize(2..8);
        let depot = Depot::default();
        let nodes: Vec<Node> = (0..count)
            .map(|n| {
                let id = NodeId::parse(&format!("n{n}")).expect("a name");
                Node::new(id, MilliCpu(rng.u64(1..5) * 1000), depot.clone())
            })
            .collect();
        let mut world = Self {
            now_ms: 0,
            due: BTreeMap::new(),
            sequence: 0,
            controller: None,
            store: BTreeMap::new(),
            term: 0,
            cut: vec![false; count],
            jams: (0..count).map(|_| None).collect(),
            controller_dies_after: None,
            noticed: vec![false; count],
            depot,
            sessions: vec![0; count],
            nodes,
            jobs: Vec::new(),
            oracle: Oracle::default(),
            burnt: None,
            calm: false,
            cluster: ClusterName::parse("sim").expect("a name"),
            trace: trace.then(Vec::new),
            steps: 0,
            rng,
        };
        world.plan();
        world
    }

    /// Draws the jobs and the faults.
    fn plan(&mut self) {
        // One machine may never return; `continue` pods on it would wait for an operator.
        let dead = self.rng.u8(0..3) == 0;
        for n in 0..self.rng.usize(1..8) {
            let code = if self.rng.u8(0..4) == 0 { 3 } else { 0 };
            let work = if self.rng.bool() { self.rng.u64(50..90_000) } else { self.rng.u64(90_000..300_000) };
            let actions: &[&str] = if dead { &["pause", "stop"] } else { &["pause", "continue", "stop"] };
            let action = self.rng.choice(actions).copied().unwrap_or("pause");
            let completions = self.rng.u32(1..4);
            let checkpoint = self
                .rng
                .choice(["{mode: none}", "{mode: criu}", "{mode: criu, interval: 7s}"])
                .unwrap_or("{}");
            let grace = self.rng.choice([5, 120]).unwrap_or(5);
            let file = format!(
                "image: host\ncommand: [work, \"{work}\", \"{code}\"]\nresources: {{cpu: 500m, memory: 64Mi}}\n\
                 completions: {completions}\nparallelism: {completions}\nonDisconnect: {{do: {action}}}\n\
                 terminationGracePeriodSeconds: {grace}\ncheckpoint: {checkpoint}\n"
            );
            let expect = if code == 0 { JobPhase::Succeeded } else { JobPhase::Failed };
            self.jobs.push(Job { name: format!("job{n}"), file, expect });
            let at = self.rng.u64(0..FAULTS_MS / 2);
            self.at(at, Due::Submit(n));
            if self.rng.u8(0..3) == 0 {
                let again = at + self.rng.u64(1_000..150_000);
                self.at(again, Due::Resubmit(n));
            }
        }
        self.at(0, Due::Fault(Fault::ControllerStart));
        for node in 0..self.nodes.len() {
            self.at(1, Due::Fault(Fault::AgentStart(node)));
        }
        if dead {
            // The first one stays, so that there is room for everything in the end.
            let (at, node) = (self.rng.u64(1_000..FAULTS_MS), self.rng.usize(1..self.nodes.len()));
            self.at(at, Due::Fault(Fault::Burn(node)));
        }
        self.plan_faults();
        self.plan_wishes();
    }

    pub(crate) fn at(&mut self, ms: u64, due: Due) {
        self.sequence += 1;
        self.due.insert((ms.max(self.now_ms), self.sequence), due);
    }

    fn now(&self) -> Now {
        Now { wall: Timestamp(EPOCH_MS + self.now_ms), boot: BootMs(1_000_000 + self.now_ms) }
    }

    fn agent_now(&self) -> AgentNow {
        let Now { wall, boot } = self.now();
        AgentNow { wall, boot }
    }

    fn note(&mut self, text: impl FnOnce() -> String) {
        let now_ms = self.now_ms;
        if let Some(trace) = &mut self.trace {
            trace.push(format!("{now_ms:>8} {}", text()));
        }
    }

    fn play(&mut self) -> Result<(), String> {
        let expect: BTreeMap<String, JobPhase> =
            self.jobs.iter().map(|job| (job.name.clone(), job.expect)).collect();
        while self.now_ms < FAULTS_MS + REST_MS {
            if self.now_ms >= FAULTS_MS && !self.calm {
                self.calm = true;
                // What was to die in the middle of its next step and has had none lives on.
                self.controller_dies_after = None;
                self.nodes.iter_mut().for_each(Node::live_on);
                self.note(|| "the faults are over".into());
            }
            if self.calm && self.oracle.all_accepted(&expect) && self.oracle.converged(&expect).is_ok() {
                return Ok(());
            }
            self.advance()?;
            self.steps += 1;
            self.oracle.check(&self.nodes)?;
        }
        if !self.oracle.all_accepted(&expect) {
            return Err("a job was never accepted".into());
        }
        self.oracle.converged(&expect)
    }

    /// The next thing that is due, anywhere.
    fn advance(&mut self) -> Result<(), String> {
        let base = BootMs(1_000_000);
        let message = self.due.keys().next().map(|(ms, _)| *ms);
        let controller = self.controller.as_ref().and_then(Controller::next_wake).map(|at| at.since(base).0);
        let nodes: Vec<Option<u64>> =
            self.nodes.iter().map(|node| node.next_wake().map(|at| at.since(base).0)).collect();
        let next = nodes.iter().flatten().copied().chain(message).chain(controller).min();
        let Some(next) = next else { return Err("nothing will ever happen again".into()) };
        // A wake that lies in the past is due now; time moves at least a millisecond, so that nothing spins.
        self.now_ms = if Some(next) == message { next.max(self.now_ms) } else { next.max(self.now_ms + 1) };
        for (node, wake) in nodes.into_iter().enumerate() {
            if wake.is_some_and(|wake| wake <= self.now_ms) {
                let now = self.agent_now();
                let mut out = self.nodes[node].advance_all(now);
                out.extend(self.nodes[node].step(now, AgentEvent::Tick));
                self.perform(node, out);
            }
        }
        if controller.is_some_and(|wake| wake <= self.now_ms) {
            self.ask_controller(ControllerEvent::Tick)?;
        }
        while let Some(entry) = self.due.first_entry() {
            if entry.key().0 > self.now_ms {
                break;
            }
            let due = entry.remove();
            self.happen(due)?;
        }
        Ok(())
    }

    fn happen(&mut self, due: Due) -> Result<(), String> {
        match due {
            Due::ToController { topic, payload } => {
                self.ask_controller(ControllerEvent::Message { topic, payload })?;
            }
            Due::ToNode { node, session, event } => {
                // A clean session forgets what waited for the last one.
                let here = session.is_none_or(|session| session == self.sessions[node]) && !self.cut[node];
                if let (Some(jam), true) = (&mut self.jams[node], here) {
                    jam.waiting.push(event);
                } else if here {
                    let now = self.agent_now();
                    let out = self.nodes[node].step(now, event);
                    if session.is_none() {
                        self.nodes[node].heard_late();
                    }
                    self.perform(node, out);
                }
            }
            Due::Local { node, event } => {
                let now = self.agent_now();
                let out = self.nodes[node].step(now, event);
                self.perform(node, out);
            }
            Due::Fault(fault) => {
                self.note(|| format!("{fault:?}"));
                self.fault(fault)?;
            }
            Due::Submit(n) => self.submit(n),
            Due::Resubmit(n) => self.resubmit(n),
            Due::Priced(quote) => {
                self.ask_controller(ControllerEvent::Priced(Box::new(quote.prices())))?;
            }
            Due::Wish(wish) => {
                self.note(|| format!("{wish:?}"));
                self.wish(&wish);
            }
        }
        Ok(())
    }

    /// A client sends its file again until it is answered.
    fn submit(&mut self, n: usize) {
        let Ok(name) = JobName::parse(&self.jobs[n].name) else { return };
        let topic = Topic::job(&Namespace::default_namespace(), &name, JobTopic::Submit);
        let payload = self.jobs[n].file.clone().into_bytes();
        self.send(topic, payload);
        let again = self.now_ms + 4_000;
        self.at(again, Due::Submit(n));
    }

    /// The file changes in what its pods do on their own; sent as often as it takes.
    fn resubmit(&mut self, n: usize) {
        let job = &mut self.jobs[n];
        let other = if job.file.contains("do: pause") { "do: stop" } else { "do: pause" };
        for action in ["do: pause", "do: stop", "do: continue"] {
            if job.file.contains(action) {
                job.file = job.file.replace(action, other);
                break;
            }
        }
        self.at(self.now_ms, Due::Submit(n));
    }

    /// Delays in the network: short as a rule, now and then long, so that messages overtake each other.
    fn delay(&mut self) -> u64 {
        match self.rng.u8(..) {
            _ if self.calm => self.rng.u64(1..20),
            0..200 => self.rng.u64(1..20),
            200..250 => self.rng.u64(20..1_000),
            _ => self.rng.u64(1_000..15_000),
        }
    }

    /// How many copies of a message arrive.
    fn copies(&mut self) -> u32 {
        match self.rng.u8(..) {
            _ if self.calm => 1,
            0..20 => 0,
            20..40 => 2,
            _ => 1,
        }
    }

    pub(crate) fn send(&mut self, topic: Topic, payload: Vec<u8>) {
        self.note(|| format!("-> {topic} {}", String::from_utf8_lossy(&payload[..payload.len().min(300)])));
        for _ in 0..self.copies() {
            let at = self.now_ms + self.delay();
            self.at(at, Due::ToController { topic: topic.clone(), payload: payload.clone() });
        }
    }

    fn perform(&mut self, node: usize, out: Vec<Out>) {
        for out in out {
            let action = match out {
                Out::Later { ms, event } => {
                    let at = self.now_ms + ms;
                    self.at(at, Due::Local { node, event });
                    continue;
                }
                Out::Send(action) => action,
            };
            let kind = match &action {
                Action::Hello(_) => NodeTopic::Hello,
                Action::Heartbeat(_) => NodeTopic::Heartbeat,
                _ => NodeTopic::Event,
            };
            let topic = Topic::node(&self.nodes[node].id, kind);
            let payload = match action {
                Action::Hello(hello) => codec::encode(&topic, &*hello),
                Action::Heartbeat(heartbeat) => codec::encode(&topic, &*heartbeat),
                Action::Events(events) => codec::encode(&topic, &events),
                _ => continue,
            };
            let lost = self.cut[node] || self.jams[node].as_ref().is_some_and(|jam| jam.mute);
            if let (Ok(payload), false) = (payload, lost) {
                self.send(topic, payload);
            }
        }
    }

    fn ask_controller(&mut self, event: ControllerEvent) -> Result<(), String> {
        let now = self.now();
        let Some(controller) = &mut self.controller else { return Ok(()) };
        let Step { writes, mut effects } = controller.step(now, event);
        let dies = self.controller_dies_after.filter(|_| !effects.is_empty() && !writes.is_empty());
        if kept(Rule::StoreFirst) || dies.is_none() {
            for write in writes {
                match write.value {
                    Some(value) => self.store.insert(write.key, value),
                    None => self.store.remove(&write.key),
                };
            }
        }
        if let Some(done) = dies {
            effects.truncate(done);
            (self.controller, self.controller_dies_after) = (None, None);
        }
        for effect in effects {
            match effect {
                Effect::Publish { topic, payload, .. } => self.published(topic, payload)?,
                Effect::Price(quote) => {
                    let at = self.now_ms + self.delay();
                    self.at(at, Due::Priced(quote));
                }
                Effect::DeleteCheckpoint(id) => drop(self.depot.borrow_mut().remove(&id)),
                Effect::DeleteLog { .. } | Effect::DeleteBlob(_) | Effect::TidyDepot | Effect::Note(_) => {}
            }
        }
        Ok(())
    }

    fn published(&mut self, topic: Topic, payload: Vec<u8>) -> Result<(), String> {
        match &topic {
            Topic::Node { node, kind } => {
                self.note(|| {
                    format!("<- {topic} {}", String::from_utf8_lossy(&payload[..payload.len().min(1_200)]))
                });
                let Some(n) = self.nodes.iter().position(|candidate| candidate.id == *node) else {
                    return Ok(());
                };
                for _ in 0..self.copies() {
                    let at = self.now_ms + self.delay();
                    let Some(event) = read(*kind, &topic, &payload) else { continue };
                    let session = (self.rng.u8(0..4) > 0).then_some(self.sessions[n]);
                    self.at(at, Due::ToNode { node: n, session, event });
                }
            }
            Topic::Job { job, kind: JobTopic::Answer, .. } => {
                let answer: Answer = codec::decode(&topic, &payload).map_err(|error| error.to_string())?;
                if answer.id.is_some() {
                    // A wish may be one that cannot be granted.
                    return Ok(());
                }
                match answer.verdict {
                    Verdict::Accepted { .. } => {
                        self.oracle.accepted(job.as_str());
                        let name = job.as_str().to_owned();
                        let done = self.jobs.iter().position(|candidate| candidate.name == name);
                        self.due.retain(|_, due| !matches!(due, Due::Submit(n) if Some(*n) == done));
                    }
                    Verdict::Rejected { rejected } => return Err(format!("{job} rejected: {rejected:?}")),
                }
            }
            Topic::Job { job, kind: JobTopic::Status, .. } if !payload.is_empty() => {
                let status: JobStatus = codec::decode(&topic, &payload).map_err(|error| error.to_string())?;
                let line = format!("{job} {:?} {:?}", status.phase, status.message);
                self.note(|| line);
                self.oracle.status(job.as_str(), status, &self.nodes)?;
            }
            _ => {}
        }
        Ok(())
    }
}

/// What a node makes of the controller's message.
fn read(kind: NodeTopic, topic: &Topic, payload: &[u8]) -> Option<AgentEvent> {
    match kind {
        NodeTopic::Desired => codec::decode::<Desired>(topic, payload).ok().map(AgentEvent::Desired),
        NodeTopic::Lease => codec::decode::<Lease>(topic, payload).ok().map(AgentEvent::Lease),
        NodeTopic::Spec => {
            let message: SpecMessage = codec::decode(topic, payload).ok()?;
            let template = serde_json::from_str(message.spec.get()).ok()?;
            Some(AgentEvent::Spec { digest: message.digest, template })
        }
        _ => None,
    }
}

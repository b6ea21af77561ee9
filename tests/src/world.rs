//! One history: a controller, some nodes, a network that loses, doubles, delays and reorders, and what its plan says.

mod damage;
mod faults;
mod leaders;
mod network;
mod rollback;

use std::collections::{BTreeMap, BTreeSet};

use berth_agent::core::{Event as AgentEvent, Now as AgentNow};
use berth_controller::core::{Effect, Event as ControllerEvent, Quote};
use berth_protocol::ids::{ClusterName, Digest, JobName, Namespace, NodeId};
use berth_protocol::topic::{JobTopic, Topic};

pub(crate) use self::damage::damage;
pub(crate) use self::faults::{Fault, mishap};
use self::leaders::Seat;
pub(crate) use self::leaders::deposition;
use self::network::Link;
use self::rollback::Backup;
pub(crate) use self::rollback::rollback;
use crate::node::{Depot, Node};
use crate::oracle::Oracle;
use crate::plan::{Expect, Item, Job, Plan};
use crate::wishes::Wish;

/// How long a history has to come to rest.
const REST_MS: u64 = 1_800_000;
/// Whoever asks whether a checkpoint is still needed looks this long after it was said.
const UNCORDON_MS: u64 = 30_000;

/// Something under way, due at its time.
#[derive(Debug)]
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
    /// A leader finds that another leads, or that it has waited for the store long enough.
    Deposed {
        seat: usize,
        term: u64,
    },
    GiveUp {
        seat: usize,
        term: u64,
    },
    Wish(Wish),
}

pub struct World {
    /// Of the controllers' machines; each link has its own.
    pub(crate) rng: fastrand::Rng,
    users: fastrand::Rng,
    now_ms: u64,
    span: u64,
    due: BTreeMap<(u64, u64), Due>,
    pub(crate) sequence: u64,
    seats: [Seat; 2],
    /// The seat whose controller leads, as the store has it.
    leader: Option<usize>,
    store: BTreeMap<String, Vec<u8>>,
    /// What the disk has in place of records of it, with their sums.
    spoilt: BTreeMap<String, Vec<u8>>,
    term: u64,
    backup: Option<Backup>,
    pub(crate) nodes: Vec<Node>,
    links: Vec<Link>,
    depot: Depot,
    /// Checkpoints that were let go.
    gone: BTreeSet<Digest>,
    /// The controller is killed in the middle of its next step that says something, after so many messages.
    controller_dies_after: Option<usize>,
    pub(crate) jobs: Vec<Job>,
    /// One of them is submitted as one that goes on without a controller.
    works_alone: bool,
    pub(crate) oracle: Oracle,
    calm: bool,
    cluster: ClusterName,
    /// What happened, for a person; empty unless asked for.
    pub trace: Option<Vec<String>>,
    pub steps: u64,
}

/// Plays a seed's history. The error says what went wrong, and when.
pub fn run(seed: u64, trace: bool) -> (Result<u64, String>, Vec<String>) {
    play(&Plan::of(seed), trace)
}

/// Plays a history as planned: how many steps it took, or what went wrong, and when.
pub fn play(plan: &Plan, trace: bool) -> (Result<u64, String>, Vec<String>) {
    let mut world = World::new(plan, trace);
    let result = world.play().map_err(|error| format!("at {} ms: {error}", world.now_ms));
    (result.map(|()| world.steps), world.trace.unwrap_or_default())
}

impl World {
    fn new(plan: &Plan, trace: bool) -> Self {
        let mut rng = fastrand::Rng::with_seed(plan.seed);
        let depot = Depot::default();
        let name = |n: usize| NodeId::parse(&format!("n{n}")).expect("a name");
        let nodes: Vec<Node> =
            plan.nodes.iter().enumerate().map(|(n, cpu)| Node::new(name(n), *cpu, depot.clone())).collect();
        let mut world = Self {
            now_ms: 0,
            span: plan.span,
            due: BTreeMap::new(),
            sequence: 0,
            seats: Seat::both(),
            leader: None,
            store: BTreeMap::new(),
            spoilt: BTreeMap::new(),
            term: 0,
            backup: None,
            links: nodes.iter().map(|_| Link::new(&mut rng)).collect(),
            controller_dies_after: None,
            depot,
            gone: BTreeSet::new(),
            nodes,
            jobs: Vec::new(),
            works_alone: false,
            oracle: Oracle::default(),
            calm: false,
            cluster: ClusterName::parse("sim").expect("a name"),
            trace: trace.then(Vec::new),
            steps: 0,
            users: rng.fork(),
            rng,
        };
        world.at(0, Due::Fault(Fault::ControllerStart));
        for node in 0..world.nodes.len() {
            world.at(1, Due::Fault(Fault::AgentStart(node)));
            // Whatever was lost on its way: in the end every node is there for pods.
            world.at(world.span + UNCORDON_MS, Due::Wish(Wish::Uncordon(node)));
        }
        for item in &plan.items {
            world.plan(item);
        }
        world
    }

    fn plan(&mut self, item: &Item) {
        match item {
            Item::Job(job) => {
                let n = self.jobs.len();
                self.at(job.at, Due::Submit(n));
                job.again.into_iter().for_each(|at| self.at(at, Due::Resubmit(n)));
                self.oracle.changed(&job.name, job.file.clone());
                self.works_alone |= job.file.contains("do: continue");
                self.jobs.push(job.clone());
            }
            Item::Mishap(faults) => faults.iter().for_each(|(at, fault)| self.at(*at, Due::Fault(*fault))),
            Item::Wish(wishes) => wishes.iter().for_each(|(at, wish)| self.at(*at, Due::Wish(*wish))),
        }
    }

    pub(crate) fn at(&mut self, ms: u64, due: Due) {
        self.sequence += 1;
        self.due.insert((ms.max(self.now_ms), self.sequence), due);
    }

    fn agent_now(&self, node: usize) -> AgentNow {
        self.nodes[node].now(self.now_ms)
    }

    fn note(&mut self, text: impl FnOnce() -> String) {
        let now_ms = self.now_ms;
        if let Some(trace) = &mut self.trace {
            trace.push(format!("{now_ms:>8} {}", text()));
        }
    }

    fn play(&mut self) -> Result<(), String> {
        let expect: BTreeMap<String, Expect> =
            self.jobs.iter().map(|job| (job.name.clone(), job.expect)).collect();
        while self.now_ms < self.span + REST_MS {
            if self.now_ms >= self.span && !self.calm {
                self.calm()?;
            }
            if self.calm && self.oracle.all_accepted(&expect) && self.oracle.converged(&expect).is_ok() {
                return Ok(());
            }
            self.advance()?;
            self.steps += 1;
            self.oracle.check(&self.nodes, self.now_ms)?;
            self.check_lacking()?;
        }
        if !self.oracle.all_accepted(&expect) {
            return Err("a job was never accepted".into());
        }
        self.oracle.converged(&expect)
    }

    /// The next thing that is due, anywhere.
    fn advance(&mut self) -> Result<(), String> {
        let message = self.due.keys().next().map(|(ms, _)| *ms);
        let seats = self.seats.each_ref().map(Seat::next_wake);
        let nodes: Vec<Option<u64>> = self.nodes.iter().map(Node::next_wake).collect();
        let calm = Some(self.span).filter(|_| !self.calm);
        let next = nodes
            .iter()
            .flatten()
            .copied()
            .chain(message)
            .chain(seats.into_iter().flatten())
            .chain(calm)
            .min();
        let Some(next) = next else { return Err("nothing will ever happen again".into()) };
        // A wake that lies in the past is due now; time moves at least a millisecond, so that nothing spins.
        self.now_ms = if Some(next) == message { next.max(self.now_ms) } else { next.max(self.now_ms + 1) };
        for (node, wake) in nodes.into_iter().enumerate() {
            if wake.is_some_and(|wake| wake <= self.now_ms) {
                let now = self.agent_now(node);
                let mut out = self.nodes[node].advance_all(now);
                out.extend(self.nodes[node].step(now, AgentEvent::Tick));
                self.perform(node, out);
            }
        }
        for (seat, wake) in seats.into_iter().enumerate() {
            if wake.is_some_and(|wake| wake <= self.now_ms) {
                self.ask(seat, ControllerEvent::Tick)?;
            }
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
                for seat in self.heard_by(&topic) {
                    let (topic, payload) = (topic.clone(), payload.clone());
                    self.ask(seat, ControllerEvent::Message { topic, payload, by: None })?;
                }
            }
            Due::ToNode { node, .. } | Due::Local { node, .. } if self.nodes[node].is_paused() => {
                self.links[node].asleep.push(due);
            }
            Due::ToNode { node, session, event } => {
                let link = &mut self.links[node];
                // A clean session forgets what waited for the last one.
                let here = session.is_none_or(|session| session == link.session) && !link.cut && !link.deaf;
                if let (Some(jam), true) = (&mut link.jam, here) {
                    jam.waiting.push(event);
                } else if here {
                    self.tell(node, event);
                }
            }
            Due::Local { node, event } => self.tell(node, event),
            Due::Fault(fault) => {
                self.note(|| format!("{fault:?}"));
                self.fault(fault)?;
            }
            Due::Submit(n) => self.submit(n),
            Due::Resubmit(n) => self.resubmit(n),
            Due::Priced(quote) => {
                for seat in 0..self.seats.len() {
                    self.ask(seat, ControllerEvent::Priced(Box::new(quote.prices())))?;
                }
            }
            Due::Deposed { seat, term } => self.deposed(seat, term),
            Due::GiveUp { seat, term } => self.give_up(seat, term),
            Due::Wish(wish) => {
                self.note(|| format!("{wish:?}"));
                self.wish(&wish);
            }
        }
        Ok(())
    }

    fn tell(&mut self, node: usize, event: AgentEvent) {
        let now = self.agent_now(node);
        let out = self.nodes[node].step(now, event);
        self.perform(node, out);
    }

    /// A client sends its file again until it is answered.
    fn submit(&mut self, n: usize) {
        let Ok(name) = JobName::parse(&self.jobs[n].name) else { return };
        let topic = Topic::job(&Namespace::default_namespace(), &name, JobTopic::Submit);
        let job = &self.jobs[n];
        let payload = format!("{}id: {}-{}\n", job.file, job.name, job.version).into_bytes();
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
        job.version += 1;
        let (name, file) = (job.name.clone(), job.file.clone());
        self.oracle.changed(&name, file);
        self.at(self.now_ms, Due::Submit(n));
    }

    fn release(&mut self, seat: usize, effects: Vec<Effect>) -> Result<(), String> {
        for effect in effects {
            match effect {
                Effect::Publish { topic, payload, .. } => self.published(seat, topic, payload)?,
                Effect::Price(quote) => {
                    let at = self.now_ms + network::delay(&mut self.rng, self.calm);
                    self.at(at, Due::Priced(quote));
                }
                Effect::DeleteCheckpoint(id) => {
                    self.depot.borrow_mut().remove(&id);
                    self.gone.insert(id);
                }
                Effect::Note(note) => self.note(|| format!("note: {note}")),
                Effect::DeleteLog { .. }
                | Effect::DeleteBlob(_)
                | Effect::TidyDepot
                | Effect::ReadAudit(_)
                | Effect::TrimAudit { .. } => {}
            }
        }
        Ok(())
    }

    /// Orders that were long on their way may name a checkpoint that was let go since. The store's may not.
    fn check_lacking(&mut self) -> Result<(), String> {
        for n in 0..self.nodes.len() {
            // A copy of a machine hears orders that are not meant for it, begun long since by the machine itself.
            let copy = self.nodes[..n].iter().any(|other| other.id == self.nodes[n].id);
            for (key, from) in std::mem::take(&mut self.nodes[n].lacking).into_iter().filter(|_| !copy) {
                if self.backup.as_ref().is_some_and(|backup| backup.lacks.contains(&from)) {
                    continue;
                }
                let record = self.store.get(&format!("pod/{}/{}", key.pod.uid, key.pod.index));
                let record = record.and_then(|bytes| serde_json::from_slice::<serde_json::Value>(bytes).ok());
                let Some(record) = record.filter(|record| record["epoch"] == key.epoch.0) else { continue };
                if record["state"]["placed"]["from"] == from.to_string() {
                    let id = &self.nodes[n].id;
                    return Err(format!(
                        "{key} was to start on {id} from {from}, which the depot does not hold"
                    ));
                }
            }
        }
        Ok(())
    }
}

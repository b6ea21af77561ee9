//! Decides everything the controller does: jobs, nodes, leases, placement. It performs no IO, reads no clock and
//! draws no randomness: `io` hands it events and carries out what it answers.

mod admit;
pub mod approval;
mod audit;
mod blindness;
mod callers;
mod checkpoints;
mod cluster;
mod drain;
mod epoch;
mod expiry;
mod faults;
mod fit;
mod given_up;
mod granted;
mod inventory;
pub mod keys;
pub mod lead;
mod lifecycle;
pub mod manage;
pub mod members;
mod moves;
mod nodes;
mod notes;
mod query;
mod records;
mod relocations;
mod requests;
pub mod restored;
mod retry;
mod saved;
pub mod schedule;
pub mod secrets;
mod session;
mod silence;
mod staging;
mod status;
mod timers;
mod wire;

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};

use berth_protocol::codec::{self, CodecError};
use berth_protocol::ids::{ClusterName, Digest, Epoch, JobUid, Namespace, NodeId, PodId, StoreId, Term};
use berth_protocol::topic::{JobTopic, NodeTopic, Topic};
use berth_protocol::units::{BootMs, Millis, Timestamp};
use serde::Serialize;
use serde::de::DeserializeOwned;

use self::audit::Audit;
pub use self::callers::{Actor, Author, Denied, Signing};
pub use self::checkpoints::Imported;
use self::cluster::Cluster;
pub use self::granted::Granted;
use self::manage::Change;
use self::members::{Joined, STRANGER};
pub use self::notes::Note;
use self::query::AuditQuestion;
pub use self::records::{AUDIT, SetAside};
use self::relocations::Relocation;
use self::restored::Hold;
use self::schedule::Scheduler;
pub use self::schedule::market::Quote;
use self::schedule::prices::Prices;
pub use self::schedule::quota::Allowance;
use self::session::OTHER_KEY;
use self::timers::{Timer, Timers};

/// The time at which an event is stepped: civil time for records, CLOCK_BOOTTIME for everything that waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Now {
    pub wall: Timestamp,
    pub boot: BootMs,
}

/// Everything that can happen to the controller. Retained messages are dropped by `io`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    Message {
        topic: Topic,
        payload: Vec<u8>,
        /// Every agent's message has one.
        by: Option<Author>,
    },
    BusUp,
    BusDown,
    /// Manifests that the depot holds, and since when.
    DepotListed(Vec<(Digest, Timestamp)>),
    /// What a `Quote` came to.
    Priced(Box<Prices>),
    /// The depot has a checkpoint from elsewhere.
    Imported(Box<Imported>),
    /// As `may_change` has allowed.
    Change(Actor, Change),
    /// As `may_join` has allowed.
    Joined(Actor, Joined),
    /// Likewise, once an admin has said so.
    Waits(Actor, Joined),
    /// Somebody has asked over HTTP for what they may not, or what cannot be: it is written down.
    Refused {
        actor: Actor,
        what: &'static str,
        on: String,
        why: String,
    },
    /// `next_wake` has come.
    Tick,
}

/// What `io` does once the step's writes are durable.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Effect {
    /// An empty payload with `retain` clears what the broker retains.
    Publish { topic: Topic, payload: Vec<u8>, retain: bool },
    /// Of the depot, if it is there.
    DeleteLog { pod: PodId, epoch: Epoch },
    /// Of the depot, if it is there.
    DeleteBlob(Digest),
    /// Its manifest, if it is there; its chunks as far as nothing else names them.
    DeleteCheckpoint(Digest),
    /// Answered by `DepotListed`; then what nothing names may go.
    TidyDepot,
    /// Answered by `Priced`: work for another thread.
    Price(Quote),
    /// For the operator's log.
    Note(Note),
    /// Published as the reply to a question: entries that this sight covers, before a key.
    ReadAudit(Box<AuditQuestion>),
    /// Of the store: entries before a key may go.
    TrimAudit { before: String },
}

/// A change of the store: `None` deletes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Write {
    pub key: String,
    pub value: Option<Vec<u8>>,
}

/// What one event led to. `effects` are released, in order, only after all `writes` are durable, in one transaction.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Step {
    pub writes: Vec<Write>,
    pub effects: Vec<Effect>,
}

/// Who this controller is, fixed for its life.
#[derive(Debug, Clone)]
pub struct Config {
    pub cluster: ClusterName,
    pub store: StoreId,
    pub term: Term,
    /// Where agents and clients reach the depot, such as `http://127.0.0.1:7420`.
    pub depot_url: String,
    /// Weights and quotas.
    pub namespaces: BTreeMap<Namespace, Allowance>,
    /// Pods that may be moved for one that waits; 0: none ever is.
    pub moves_max: usize,
    /// Signs the depot's tokens.
    pub secret: [u8; 32],
    /// Certificate of the cluster's CA, PEM, where only members are heard.
    pub ca: Option<String>,
    /// Of the generator of uids; another one at each start.
    pub seed: u64,
}

/// Why what the store holds is not a controller's state.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    #[error("the store's entry `{key}` cannot be read: {source}")]
    Entry { key: String, source: serde_json::Error },
    #[error("the store holds `{key}`, which this version of the controller does not know")]
    UnknownKey { key: String },
}

/// Figures for `/metrics`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Counters {
    /// Messages received, by kind: `submit`, `heartbeat`, …
    pub messages: BTreeMap<&'static str, u64>,
    /// Messages refused, by reason: `malformed`, `oversized`, …
    pub refused: BTreeMap<&'static str, u64>,
    /// Jobs now, by phase.
    pub jobs: BTreeMap<&'static str, u64>,
    /// Pods of unfinished jobs now, by phase.
    pub pods: BTreeMap<&'static str, u64>,
    /// Nodes now, by state.
    pub nodes: BTreeMap<&'static str, u64>,
    /// Pods placed, evicted and failed since the start.
    pub placements: u64,
    pub evictions: u64,
    pub failures: u64,
    /// Pods moved by way of a checkpoint.
    pub migrations: u64,
    /// Checkpoints taken and failed; pods started from one, and those that could not be.
    pub checkpoints: u64,
    pub checkpoint_failures: u64,
    pub restores: u64,
    pub restore_failures: u64,
    /// Times that room was given new prices.
    pub prices: u64,
    /// Silence is held to be the controller's own blindness.
    pub blind: bool,
    /// Until when the key that signs orders is good, where it has an end.
    pub key_expires: Option<Timestamp>,
    /// Records of the store that are damaged, and jobs that are set aside for it.
    pub damaged: (usize, usize),
}

/// The controller's state and every decision about it.
pub struct Controller {
    config: Config,
    cluster: Cluster,
    scheduler: Scheduler,
    timers: Timers,
    counters: Counters,
    /// The generator's state (splitmix64).
    random: u64,
    /// Of the next job accepted.
    next_seq: u64,
    bus_up: bool,
    /// Silence of many nodes at once is taken for the controller's own.
    blind: bool,
    /// Nodes of which it was noted, since the last sweep, that they speak another version.
    other_versions: BTreeSet<NodeId>,
    /// Where publishing everything anew has got to.
    republish: Option<JobUid>,
    /// Moves on their way, in the order of their plans.
    relocations: Vec<Relocation>,
    /// Of a restored store.
    hold: Option<Hold>,
    set_aside: SetAside,
    audit: Audit,
    /// When the end of the signing key was last spoken of in the log.
    key_spoken_of: Option<Timestamp>,
    dirty: Dirty,
}

/// What a step has changed, until its end turns it into writes and effects.
#[derive(Default)]
struct Dirty {
    step: Step,
    jobs: BTreeSet<JobUid>,
    runs: BTreeSet<JobUid>,
    pods: BTreeSet<PodId>,
    checkpoints: BTreeSet<Digest>,
    nodes: BTreeSet<NodeId>,
    outboxes: BTreeSet<NodeId>,
    restored: bool,
    /// Jobs whose status changed.
    status: BTreeSet<JobUid>,
    /// Nodes whose desired set changed.
    desired: BTreeSet<NodeId>,
    /// Nodes whose published state changed.
    states: BTreeSet<NodeId>,
    /// Logs to ask for behind the desired set that names their pods.
    follow: Vec<(NodeId, PodId, Epoch)>,
}

/// Nodes of other versions that are named in the log.
const OTHER_VERSIONS_MAX: usize = 256;
/// Statuses sent again at once for a broker that came back, and the pause before the next.
const REPUBLISH_JOBS: usize = 64;
const REPUBLISH_PAUSE: Millis = Millis(50);
/// Expired request ids and rejections are looked for this often.
const SWEEP: Millis = Millis(600_000);
const AUDIT_KEPT: Millis = Millis(90 * 24 * 3_600_000);

impl Controller {
    /// Rebuilds the state from the store's entries (`records` says which).
    ///
    /// A value that is none is damaged.
    ///
    /// # Errors
    /// An entry that this version cannot read: nothing is guessed.
    pub fn load(
        config: Config,
        entries: impl IntoIterator<Item = (String, Option<Vec<u8>>)>,
        now: Now,
    ) -> Result<Self, LoadError> {
        let (cluster, set_aside) = records::load(entries, now)?;
        let next_seq = cluster.jobs.values().map(|job| job.file.seq + 1).max().unwrap_or(0);
        let hold = Hold::of(&cluster, next_seq, now);
        let mut controller = Self {
            random: config.seed,
            scheduler: Scheduler::new(config.namespaces.clone()),
            config,
            cluster,
            timers: Timers::default(),
            counters: Counters::default(),
            next_seq,
            bus_up: false,
            blind: false,
            other_versions: BTreeSet::new(),
            republish: None,
            relocations: Vec::new(),
            hold,
            set_aside,
            audit: Audit::default(),
            key_spoken_of: None,
            dirty: Dirty::default(),
        };
        controller.resume(now);
        Ok(controller)
    }

    /// What follows from the records alone: indices, rooms, timers.
    fn resume(&mut self, now: Now) {
        let uids: Vec<JobUid> = self.cluster.jobs.keys().cloned().collect();
        for uid in &uids {
            let Some(job) = self.cluster.jobs.get(uid) else { continue };
            for index in job.placed() {
                let Some(assignment) = job.assignment(*index) else { continue };
                let (node, epoch) = (assignment.node.clone(), job.pods()[index].epoch);
                self.scheduler.count_in(&job.file.spec, &assignment.charge);
                if let Some(node) = self.cluster.nodes.get_mut(&node) {
                    node.pods.insert(uid.pod(*index), epoch);
                }
            }
        }
        let ids: Vec<NodeId> = self.cluster.nodes.keys().cloned().collect();
        for id in &ids {
            self.refresh_room(id);
            self.restock(id);
            self.watch(id, now);
            self.timers.arm(Timer::Leave(id.clone()), now.boot);
        }
        self.recall_shapes();
        self.resume_staging();
        for uid in &uids {
            self.wake_sleepers(uid, now);
            self.arm_interval(now, uid);
            self.reconcile(now, uid);
        }
        self.timers.arm(Timer::Sweep, now.boot.plus(SWEEP));
        // What was reconciled is what the entries said: there is nothing to write or to tell before the bus is up.
        self.dirty = Dirty::default();
    }

    /// Takes one event in. Never fails: what cannot be understood is refused and counted.
    pub fn step(&mut self, now: Now, event: Event) -> Step {
        self.steps(now, [event])
    }

    /// Takes several events in, which have all come by now: places pods and says what changed once for all of them.
    pub fn steps(&mut self, now: Now, events: impl IntoIterator<Item = Event>) -> Step {
        for event in events {
            match event {
                Event::Message { topic, payload, by } => self.message(now, topic, &payload, by),
                Event::BusUp => self.bus_up(now),
                Event::BusDown => self.bus_down(now),
                Event::DepotListed(manifests) => self.depot_listed(now, manifests),
                Event::Priced(prices) => self.priced(*prices),
                Event::Imported(imported) => self.imported(now, *imported),
                Event::Change(actor, change) => self.change(now, &actor, change),
                Event::Joined(actor, joined) => self.joined(now, &actor, joined),
                Event::Waits(actor, joined) => self.waits(now, &actor, joined),
                Event::Refused { actor, what, on, why } => self.audit_refused(now, &actor, what, on, why),
                Event::Tick => {}
            }
        }
        while let Some(timer) = self.timers.pop(now.boot) {
            self.wake(now, timer);
        }
        self.tend_staging(now);
        self.tend_relocations(now);
        self.settle_restored(now);
        self.schedule(now);
        self.schedule_particular(now);
        self.look_at_prices(now);
        self.finish(now)
    }

    /// When `Tick` is due; `None`: nothing waits.
    pub fn next_wake(&self) -> Option<BootMs> {
        self.timers.next()
    }

    pub fn counters(&self) -> &Counters {
        &self.counters
    }

    /// What of the store was not loaded.
    pub fn set_aside(&self) -> &SetAside {
        &self.set_aside
    }

    fn message(&mut self, now: Now, topic: Topic, payload: &[u8], by: Option<Author>) {
        let key = by.as_ref().map(|by| by.key);
        let result = match &topic {
            Topic::Job { namespace, job, kind: JobTopic::Submit } => {
                self.count("submit");
                self.submit(now, by.as_ref(), (namespace, job), payload);
                Ok(())
            }
            Topic::Job { namespace, job, kind: JobTopic::Command } => {
                self.count("command");
                self.command(now, by.as_ref(), (namespace, job), payload);
                Ok(())
            }
            Topic::QueryRequest { client } => {
                self.count("query");
                let read = self.read(&topic, payload);
                let read = read.map(|request| self.query(now, by.as_ref(), client, request));
                read.inspect_err(|error| self.query_unread(client, payload, error))
            }
            Topic::Node { node, .. } if !self.speaks_for(node, key) => {
                self.refuse(STRANGER);
                Ok(())
            }
            Topic::Node { node, kind: NodeTopic::Hello } => {
                self.count("hello");
                self.read(&topic, payload).map(|hello| self.hello(now, node, hello, key))
            }
            // Its name, and not its key.
            Topic::Node { node, .. }
                if self.cluster.nodes.get(node).is_some_and(|node| node.record.has_other_key(key)) =>
            {
                self.refuse(OTHER_KEY);
                Ok(())
            }
            Topic::Node { node, kind: NodeTopic::Heartbeat } => {
                self.count("heartbeat");
                self.read(&topic, payload).map(|heartbeat| self.heartbeat(now, node, heartbeat))
            }
            Topic::Node { node, kind: NodeTopic::Event } => {
                self.count("event");
                self.read(&topic, payload).map(|events| self.events(now, node, events))
            }
            Topic::Node { node, kind: NodeTopic::Bye } => {
                self.count("bye");
                self.read(&topic, payload).map(|bye| self.bye(now, node, bye))
            }
            // What the controller itself sends comes from nobody else.
            _ => {
                self.refuse("unexpected-topic");
                Ok(())
            }
        };
        if let Err(error) = result {
            self.refuse(error.kind());
            if let (CodecError::Version(_), Topic::Node { node, .. }) = (&error, topic)
                && self.other_versions.len() < OTHER_VERSIONS_MAX
                && self.other_versions.insert(node.clone())
            {
                self.note(Note::OtherVersion { node, why: error.to_string() });
            }
        }
    }

    fn read<T: DeserializeOwned>(&self, topic: &Topic, payload: &[u8]) -> Result<T, CodecError> {
        codec::decode(topic, payload)
    }

    fn count(&mut self, kind: &'static str) {
        *self.counters.messages.entry(kind).or_default() += 1;
    }

    fn refuse(&mut self, reason: &'static str) {
        *self.counters.refused.entry(reason).or_default() += 1;
    }

    /// Hands a message out with this step.
    fn publish<T: Serialize>(&mut self, topic: Topic, message: &T, retain: bool) {
        match codec::encode(&topic, message) {
            Ok(payload) => self.effect(Effect::Publish { topic, payload, retain }),
            Err(error) => self.refuse(error.kind()),
        }
    }

    fn effect(&mut self, effect: Effect) {
        self.dirty.step.effects.push(effect);
    }

    fn note(&mut self, note: Note) {
        self.effect(Effect::Note(note));
    }

    fn bus_up(&mut self, now: Now) {
        self.bus_up = true;
        // Blindness that was the bus' alone ends with it.
        if self.blind {
            self.judge_blindness(now);
        }
        self.count_silence_anew(now);
        // The broker may have forgotten what it retained.
        self.dirty.states.extend(self.cluster.nodes.keys().cloned());
        self.republish = self.cluster.jobs.keys().next().cloned();
        self.timers.arm(Timer::Republish, now.boot);
    }

    fn bus_down(&mut self, now: Now) {
        self.bus_up = false;
        self.judge_blindness(now);
    }

    fn wake(&mut self, now: Now, timer: Timer) {
        match timer {
            Timer::Node(node) => self.wake_node(now, &node),
            Timer::Job(uid) => self.wake_job(now, &uid),
            Timer::Checkpoints(uid) => self.arm_interval(now, &uid),
            Timer::Leave(node) => self.ask_leaving(&node),
            Timer::Desired(node) => drop(self.dirty.desired.insert(node)),
            Timer::Status(uid) => drop(self.dirty.status.insert(uid)),
            Timer::Schedule => self.scheduler.wanted = true,
            Timer::Prices | Timer::Staging => {}
            Timer::Sweep => self.sweep(now),
            Timer::Republish => {
                let Some(from) = self.republish.take() else { return };
                let mut jobs = self.cluster.jobs.range(from..).map(|(uid, _)| uid.clone());
                let batch: Vec<JobUid> = jobs.by_ref().take(REPUBLISH_JOBS).collect();
                self.republish = jobs.next();
                for uid in &batch {
                    if let Some(job) = self.cluster.jobs.get_mut(uid) {
                        job.published = None;
                    }
                }
                self.dirty.status.extend(batch);
                if self.republish.is_some() {
                    self.timers.arm(Timer::Republish, now.boot.plus(REPUBLISH_PAUSE));
                }
            }
        }
    }

    fn sweep(&mut self, now: Now) {
        self.timers.arm(Timer::Sweep, now.boot.plus(SWEEP));
        self.let_imported_go(now);
        self.forget_invitations(now);
        self.speak_of_key(now);
        self.other_versions.clear();
        self.effect(Effect::TidyDepot);
        let since = Timestamp(now.wall.0.saturating_sub(AUDIT_KEPT.0));
        self.effect(Effect::TrimAudit { before: records::audit_since(since) });
        self.forget_requests(now);
        let over: Vec<_> = self
            .cluster
            .rejected
            .iter()
            .filter(|(_, until)| **until <= now.wall)
            .map(|(k, _)| k.clone())
            .collect();
        for (namespace, job) in over {
            self.forget_rejection(&namespace, &job, true);
        }
    }

    /// A number nobody foresees who does not know the seed (splitmix64, Steele et al. 2014).
    fn draw(&mut self) -> u64 {
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.random ^ (self.random >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Turns what changed into writes and messages.
    fn finish(&mut self, now: Now) -> Step {
        let held_back = self.send_changed_desired(now);
        for uid in std::mem::take(&mut self.dirty.status) {
            self.publish_status(now, &uid);
        }
        for node in std::mem::take(&mut self.dirty.states) {
            self.publish_state(now, &node);
        }
        let mut dirty = std::mem::take(&mut self.dirty);
        let jobs = &self.cluster.jobs;
        let mut write = |key: String, value: Option<Vec<u8>>| dirty.step.writes.push(Write { key, value });
        for uid in &dirty.jobs {
            write(records::job(uid), jobs.get(uid).map(|job| records::bytes(&job.file)));
        }
        for uid in &dirty.runs {
            write(records::run(uid), jobs.get(uid).map(|job| records::bytes(&job.run)));
        }
        for id in &dirty.pods {
            let pod = jobs.get(&id.uid).and_then(|job| job.pod(id.index)).filter(|pod| pod.is_stored());
            write(records::pod(&id.uid, id.index), pod.map(records::bytes));
        }
        for id in &dirty.checkpoints {
            write(records::checkpoint(id), self.cluster.checkpoints.get(id).map(records::bytes));
        }
        for id in &dirty.nodes {
            write(records::node(id), self.cluster.nodes.get(id).map(|node| records::bytes(&node.record)));
        }
        for id in &dirty.outboxes {
            let outbox = self.cluster.nodes.get(id).and_then(|node| node.outbox.as_ref());
            write(records::outbox(id), outbox.map(records::bytes));
        }
        if std::mem::take(&mut dirty.restored) {
            write(records::RESTORED.to_owned(), self.cluster.restored.as_ref().map(records::bytes));
        }
        self.counters.blind = self.blind;
        self.counters.key_expires = self.key_expires();
        self.counters.damaged = (self.set_aside.damaged.len(), self.set_aside.jobs.len());
        self.dirty.follow = held_back;
        dirty.step
    }
}

//! The agent's decisions: events in, records and actions out. Touches no disk, network, clock or process.
//!
//! Records are changes of the ledger; the loop has them on disk before it performs the actions beside them. All
//! state that a restart may lose (what shims report, which pulls run) is rebuilt by asking, never remembered.

pub mod checkpoints;
pub mod departure;
pub mod grants;
mod leases;
pub mod ledger;
mod pods;
mod restart;
mod settle;
mod staging;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use berth_protocol::checkpoint::CheckpointInfo;
use berth_protocol::ids::{
    BootId, Digest, Generation, HardwareId, LedgerId, Run, SessionNonce, StoreId, Term,
};
use berth_protocol::image::Images;
use berth_protocol::job::PodTemplate;
use berth_protocol::limits;
use berth_protocol::message::node::{
    ChunkServer, DepotAccess, Desired, DesiredPod, Events, Heartbeat, HeldPod, Hello, Lease, NodeEvent,
    NumberedEvent, PodChange, PodEvent, PullProgress, held_digest,
};
use berth_protocol::pod::{Goal, POLICY_REFUSED};
use berth_protocol::resources::{GpuShare, Inventory, Usage};
use berth_protocol::rule::{Rule, kept};
use berth_protocol::units::{BootMs, Bytes, Millis, Timestamp};

use crate::policy::Granted;
use crate::task::{Exit, Order, Report, Root, Saved};
use checkpoints::NotStored;
use departure::Leaves;
use grants::Grants;
use ledger::{Judgement, Ledger, PodKey, Record};
use pods::Live;
use staging::Staging;

/// Civil time for records, boot time for leases and timers.
#[derive(Debug, Clone, Copy)]
pub struct Now {
    pub wall: Timestamp,
    pub boot: BootMs,
}

/// All that can happen to an agent.
#[derive(Debug)]
pub enum Event {
    BusUp,
    BusDown,
    Desired(Desired),
    Spec {
        digest: Digest,
        template: Box<PodTemplate>,
    },
    Lease(Lease),
    /// A pull is under way.
    Pulling {
        key: PodKey,
        done: Bytes,
        total: Bytes,
    },
    Prepared {
        key: PodKey,
        result: Result<Prepared, Unready>,
    },
    Shim {
        key: PodKey,
        report: Report,
    },
    /// The connection to the shim was lost and found again: orders may be lost with it.
    Reconnected {
        key: PodKey,
    },
    /// No shim serves this run, nothing of it is alive.
    Gone {
        key: PodKey,
        run: Run,
        exit: Result<Exit, NoExit>,
    },
    LogStored {
        key: PodKey,
        stored: bool,
    },
    OutputsStored {
        key: PodKey,
        result: Result<Option<(Digest, Bytes)>, NotStored>,
    },
    /// A checkpoint is on its way: bytes sent, and in all.
    Storing {
        key: PodKey,
        done: Bytes,
        total: Bytes,
    },
    CheckpointStored {
        key: PodKey,
        level: u64,
        result: Result<Box<CheckpointInfo>, NotStored>,
    },
    /// What was to be brought ahead of a pod is here, with that checkpoint, or will not be.
    Staged {
        key: PodKey,
        from: Option<Digest>,
        result: Result<(), String>,
    },
    /// What a probe sees; its images are `Images`' to tell.
    Inventory(Box<Inventory>),
    /// Those that are here now.
    Images(Images),
    /// The machine is about to go, or is no longer.
    Leaving(Option<Leaves>),
    Tick,
}

/// Of a run whose shim has left no exit.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct NoExit {
    /// Where more is known than that it ended without a word.
    pub why: Option<String>,
    /// Whole records in the pod's log.
    pub log_records: u64,
}

/// What a pod needs before its shim can start.
#[derive(Debug, Clone, PartialEq)]
pub struct Prepared {
    pub roots: Vec<Root>,
    pub volumes: Vec<Option<PathBuf>>,
    pub workspace: Option<PathBuf>,
    /// A checkpoint to begin from was brought to the pod's directory.
    pub restore: bool,
}

/// Why a pod cannot start.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unready {
    pub reason: String,
    pub message: String,
    /// It may work later: a registry out of reach.
    pub retriable: bool,
    /// Another node may do better.
    pub elsewhere: bool,
}

impl Unready {
    /// By the node's policy: it does not change by itself, and another node's may be another.
    pub fn forbidden(message: String) -> Self {
        Self { reason: POLICY_REFUSED.to_owned(), message, retriable: false, elsewhere: true }
    }
}

#[derive(Debug)]
pub enum Action {
    /// `pods` holds those that this ledger works on; what else a scan of the machine finds is added.
    Hello(Box<Hello>),
    /// `usage` is filled in from a probe.
    Heartbeat(Box<Heartbeat>),
    Events(Events),
    Prepare {
        key: PodKey,
        template: Box<PodTemplate>,
        /// The checkpoint to begin from, to be brought here as well.
        from: Option<Digest>,
        /// Before that one the last that is kept here, where it is whole.
        kept: bool,
    },
    CancelPrepare {
        key: PodKey,
    },
    /// Bring ahead what a pod will need that still runs elsewhere, behind whatever is for pods that are here.
    Stage {
        key: PodKey,
        template: Box<PodTemplate>,
        /// A checkpoint to keep: the one that it comes with will share much of it.
        from: Option<Digest>,
    },
    CancelStage {
        key: PodKey,
    },
    Launch(Box<Launch>),
    Order {
        key: PodKey,
        order: Order,
    },
    /// Find the shim of this run: connect, or read its exit file, or clear away what a dead one left.
    Adopt {
        key: PodKey,
        run: Run,
    },
    /// End whatever is left of the pod, by its control group.
    Kill {
        key: PodKey,
        run: Run,
    },
    StoreLog {
        key: PodKey,
    },
    StoreOutputs {
        key: PodKey,
    },
    /// Send what the shim has saved to the depot.
    StoreCheckpoint {
        key: PodKey,
        run: Run,
        spec: Digest,
        saved: Box<Saved>,
    },
    /// It is in the depot, and known to be: a start on this node need not fetch it.
    KeepCheckpoint {
        key: PodKey,
        level: u64,
        id: Digest,
    },
    /// Nobody needs the pod's directory any more.
    Drop {
        key: PodKey,
    },
    Depot(DepotAccess),
    /// For the operator's log.
    Warn(String),
}

#[derive(Debug)]
pub struct Launch {
    pub key: PodKey,
    pub run: Run,
    pub template: PodTemplate,
    pub prepared: Prepared,
    pub gpus: Vec<GpuShare>,
    pub slot: Option<u16>,
    /// Of the pod's earlier epochs.
    pub restarts: u64,
    /// From the checkpoint that was brought here.
    pub restore: bool,
}

/// What follows from an event: first the records, durably, then the actions, in order.
#[derive(Debug, Default)]
pub struct Step {
    pub records: Vec<Record>,
    pub actions: Vec<Action>,
}

/// What an agent is told at its start.
#[derive(Debug)]
pub struct Identity {
    pub hardware: HardwareId,
    pub boot: BootId,
    pub nonce: SessionNonce,
    /// For a ledger that is new, or counts its events anew.
    pub ledger: LedgerId,
    /// Records of the ledger could not be read.
    pub damaged: bool,
    /// Where other nodes are given chunks.
    pub chunks: Option<ChunkServer>,
    /// Pods that a scan of the machine finds alive under their shims.
    pub found: Vec<HeldPod>,
    /// What no order can widen.
    pub granted: Granted,
}

/// Unacknowledged events are sent again after this long.
const EVENTS_RESEND: Millis = Millis::from_secs(5);
/// What a message has beside its events.
const MESSAGE_HEAD_BYTES: usize = 1024;

pub struct Agent {
    ledger: Ledger,
    hardware: HardwareId,
    boot: BootId,
    nonce: SessionNonce,
    chunks: Option<ChunkServer>,
    inventory: Inventory,
    granted: Granted,
    grants: Grants,
    live: BTreeMap<PodKey, Live>,
    /// Pods that were alive here at the start and that this ledger knows nothing of: an earlier one is lost.
    strangers: BTreeMap<PodKey, Run>,
    staging: Staging,
    bus_up: bool,
    next_heartbeat: BootMs,
    last_heartbeat: BootMs,
    /// The last event sent in this session of the bus, and when to begin again with the first.
    sent_event: u64,
    resend_at: Option<BootMs>,
    /// The operator was told of a controller that this node does not belong to.
    said_foreign: bool,
    /// The highest that any controller was heard in. What an earlier one said and comes late counts no more: a later one may
    /// have a store that knows less, as a backup does, and waits for what the earlier has acknowledged.
    heard: Term,
    /// Of why the controller does not take this session, the last that the operator was told.
    said_refused: Option<String>,
    leaving: Option<Leaves>,
    /// When that was first heard.
    leaving_since: Option<BootMs>,
    /// When the session began.
    since: BootMs,
    /// An earlier inventory is still on its way to the controller.
    inventory_untold: bool,
    out: Step,
}

impl Agent {
    /// Begins a session on the ledger found on disk. The step holds its first records and the search for shims.
    pub fn start(ledger: Ledger, identity: Identity, inventory: Inventory, now: Now) -> (Self, Step) {
        let mut agent = Self {
            hardware: identity.hardware,
            boot: identity.boot,
            nonce: identity.nonce.clone(),
            chunks: identity.chunks,
            inventory,
            granted: identity.granted,
            grants: Grants::default(),
            live: BTreeMap::new(),
            strangers: BTreeMap::new(),
            staging: Staging::default(),
            bus_up: false,
            next_heartbeat: now.boot,
            last_heartbeat: now.boot,
            sent_event: 0,
            resend_at: None,
            said_foreign: false,
            heard: Term::default(),
            said_refused: None,
            leaving: None,
            leaving_since: None,
            since: now.boot,
            inventory_untold: false,
            out: Step::default(),
            ledger,
        };
        if agent.ledger.id.is_none() {
            agent.record(Record::Created { ledger: identity.ledger.clone() });
        }
        if identity.damaged {
            for record in agent.ledger.mended(identity.ledger) {
                agent.record(record);
            }
        }
        for pod in identity.found {
            let key = PodKey::new(&pod.pod, pod.epoch);
            if !agent.ledger.pods.contains_key(&key) {
                agent.strangers.insert(key, pod.run);
            }
        }
        let number = agent.ledger.session + 1;
        let hardware = agent.ledger.hardware.clone().or_else(|| Some(agent.hardware.clone()));
        agent.record(Record::Session { number, nonce: identity.nonce, hardware });
        if !agent.is_at_home() {
            agent.warn(
                "the data directory comes from another machine: none of its pods starts here without the controller"
                    .to_owned(),
            );
        }
        let keys: Vec<PodKey> = agent.ledger.pods.keys().cloned().collect();
        for key in &keys {
            agent.adopt(now, key);
        }
        for key in &keys {
            agent.reconcile(now, key);
        }
        let step = std::mem::take(&mut agent.out);
        (agent, step)
    }

    /// Of this session.
    pub fn nonce(&self) -> &SessionNonce {
        &self.nonce
    }

    pub fn ledger(&self) -> &Ledger {
        &self.ledger
    }

    pub fn step(&mut self, now: Now, event: Event) -> Step {
        match event {
            Event::BusUp => {
                self.bus_up = true;
                self.sent_event = 0;
                self.hello(now);
                self.heartbeat(now);
            }
            Event::BusDown => self.bus_up = false,
            Event::Desired(desired) => self.desired(now, desired),
            Event::Spec { digest, template } => self.spec(now, digest, template),
            Event::Lease(lease) => self.lease(now, lease),
            Event::Inventory(mut inventory) => {
                inventory.images.clone_from(&self.inventory.images);
                self.inventory(now, *inventory);
            }
            Event::Images(images) => self.inventory(now, Inventory { images, ..self.inventory.clone() }),
            Event::Leaving(leaving) => self.leaves(now, leaving),
            Event::Tick => self.tick(now),
            Event::Pulling { key, done, total } => self.pulling(now, &key, done, total),
            Event::Prepared { key, result } => self.prepared(now, &key, result),
            Event::Shim { key, report } => self.report(now, &key, report),
            Event::Reconnected { key } => self.reconnected(&key),
            Event::Gone { key, run, exit } => self.gone(now, &key, run, exit),
            Event::LogStored { key, stored } => self.log_stored(now, &key, stored),
            Event::OutputsStored { key, result } => self.outputs_stored(now, &key, result),
            Event::Storing { key, done, total } => {
                self.live
                    .get_mut(&key)
                    .into_iter()
                    .for_each(|live| live.checkpoint.progress = Some((done, total)));
            }
            Event::Staged { key, from, result } => self.staged(now, &key, from, result),
            Event::CheckpointStored { key, level, result } => {
                self.checkpoint_stored(now, &key, level, result);
            }
        }
        self.send_events(now);
        std::mem::take(&mut self.out)
    }

    /// When a `Tick` is due.
    pub fn next_wake(&self) -> BootMs {
        let pods = self.live.iter().filter_map(|(key, live)| self.pod_wake(key, live)).min();
        [pods, self.resend_at.filter(|_| self.bus_up)]
            .into_iter()
            .flatten()
            .fold(self.next_heartbeat, BootMs::min)
    }

    /// Digests of everything that pods of this ledger may need: their specs' images and workspaces stay.
    pub fn specs(&self) -> impl Iterator<Item = &PodTemplate> {
        self.ledger.specs.values()
    }

    fn record(&mut self, record: Record) {
        self.ledger.apply(&record);
        self.out.records.push(record);
    }

    fn act(&mut self, action: Action) {
        self.out.actions.push(action);
    }

    fn warn(&mut self, text: String) {
        self.act(Action::Warn(text));
    }

    fn event(&mut self, now: Now, event: NodeEvent) -> u64 {
        let n = self.ledger.last_event.saturating_add(1);
        self.record(Record::Event { event: Box::new(NumberedEvent { n, at: now.wall, event }) });
        n
    }

    fn inventory(&mut self, now: Now, inventory: Inventory) {
        if inventory != self.inventory {
            self.inventory = inventory;
            self.tell_inventory(now);
        }
    }

    /// One at a time: of many changes that an outage collects the last one says all.
    fn tell_inventory(&mut self, now: Now) {
        let is_inventory = |event: &NumberedEvent| matches!(event.event, NodeEvent::Inventory(_));
        self.inventory_untold = self.ledger.outbox.iter().any(is_inventory);
        if !self.inventory_untold {
            self.event(now, NodeEvent::Inventory(Box::new(self.inventory.clone())));
        }
    }

    fn pod_event(&mut self, now: Now, key: &PodKey, run: Run, change: PodChange) -> u64 {
        let event = PodEvent { pod: key.pod.clone(), epoch: key.epoch, run, change };
        self.event(now, NodeEvent::Pod(event))
    }

    fn tick(&mut self, now: Now) {
        let keys: Vec<PodKey> = self.live.keys().cloned().collect();
        for key in keys {
            self.check_deadline(now, &key);
            self.reconcile(now, &key);
        }
        if self.bus_up && self.resend_at.is_some_and(|at| at <= now.boot) {
            self.sent_event = 0;
            self.resend_at = None;
        }
        if self.next_heartbeat <= now.boot {
            if self.bus_up && self.grants.last_grant().is_none() {
                self.hello(now);
            }
            self.heartbeat(now);
        }
    }

    fn hello(&mut self, now: Now) {
        let Some(ledger) = self.ledger.id.clone() else { return };
        // None as long as none of this ledger's has heard anything, however many there were.
        let before = self.ledger.known.iter().filter(|known| **known != self.nonce);
        let mut earlier: Vec<SessionNonce> = before.cloned().collect();
        let previous = earlier.pop();
        self.act(Action::Hello(Box::new(Hello {
            nonce: self.nonce.clone(),
            previous,
            earlier,
            session: self.ledger.session,
            hardware: self.hardware.clone(),
            boot: self.boot.clone(),
            ledger,
            store: self.ledger.store.clone(),
            term: self.ledger.term,
            generation: self.ledger.generation,
            heard: Some(self.heard),
            events_acked: self.ledger.acked(),
            events_last: self.ledger.last_event,
            pods: self.working(now),
            inventory: self.inventory.clone(),
            chunks: self.chunks.clone(),
        })));
    }

    /// Pods whose end this agent will tell, whether or not a scan finds them: between two runs and before a restore they
    /// have no process.
    fn working(&self, now: Now) -> Vec<HeldPod> {
        let held = |(key, entry): (&PodKey, &ledger::PodEntry)| HeldPod {
            pod: key.pod.clone(),
            epoch: key.epoch,
            run: entry.run,
            alive: false,
            granted: self.is_granted(now, key),
        };
        self.ledger.pods.iter().filter(|(_, entry)| entry.is_wanted()).map(held).collect()
    }

    /// Pods for which a grant is wanted: named by the controller and not over.
    fn held(&self) -> Vec<PodKey> {
        let wanted = self.ledger.pods.iter().filter(|(_, entry)| entry.is_wanted());
        wanted.map(|(key, _)| key.clone()).collect()
    }

    /// The generation to report: orders whose specs are not all here are not yet applied, and are sent again.
    fn applied(&self) -> Generation {
        let lacks = |entry: &ledger::PodEntry| {
            entry.is_wanted()
                && entry.desired.goal == Goal::Run
                && !self.ledger.specs.contains_key(&entry.desired.spec)
        };
        let held = self.ledger.generation;
        let coming = self.staging.specs().any(|spec| !self.ledger.specs.contains_key(&spec));
        if coming || self.ledger.pods.values().any(lacks) {
            Generation(held.0.saturating_sub(1))
        } else {
            held
        }
    }

    fn heartbeat(&mut self, now: Now) {
        self.next_heartbeat = now.boot.plus(Millis(limits::HEARTBEAT_RETRY_MS));
        if !self.bus_up {
            return;
        }
        self.last_heartbeat = now.boot;
        let keys = self.held();
        let held = held_digest(keys.iter().map(|key| (&key.pod, key.epoch)));
        let seq = self.grants.sent(now.boot, held, keys);
        let pulls = self.live.iter().filter_map(|(key, live)| {
            let (done, total) = live.pull?;
            Some(PullProgress { pod: key.pod.clone(), epoch: key.epoch, done, total })
        });
        let saves = self.live.iter().filter_map(|(key, live)| {
            let (done, total) = live.checkpoint.progress?;
            Some(PullProgress { pod: key.pod.clone(), epoch: key.epoch, done, total })
        });
        let heartbeat = Heartbeat {
            nonce: self.nonce.clone(),
            seq,
            boot_ms: now.boot,
            last_grant: self.grants.last_grant(),
            term: self.ledger.term,
            generation: self.applied(),
            held,
            events_acked: self.ledger.acked(),
            usage: Usage::default(),
            pulls: pulls.collect(),
            saves: saves.collect(),
            restores: Vec::new(),
            staged: self.staging.told(),
            leaving: self.departure(now),
        };
        self.act(Action::Heartbeat(Box::new(heartbeat)));
    }

    fn lease(&mut self, now: Now, lease: Lease) {
        if lease.nonce != self.nonce || self.is_foreign(&lease.store) {
            return;
        }
        if let Some(why) = lease.refused {
            if self.said_refused.as_ref() != Some(&why) {
                self.warn(format!("the controller refuses this node: {why}"));
                self.said_refused = Some(why);
            }
            return self.count_on(now, lease.session);
        }
        self.heard = self.heard.max(self.ledger.term);
        if lease.term < self.heard && kept(Rule::TermsOutrank) {
            return;
        }
        self.heard = self.heard.max(lease.term);
        if lease.hello {
            self.sent_event = 0;
            self.hello(now);
        }
        if let Some(depot) = lease.depot.clone() {
            self.act(Action::Depot(depot));
            self.live.values_mut().for_each(|live| live.retry_now(now.boot));
        }
        let Some(grown) = self.grants.receive(now.boot, &self.nonce, &lease) else { return };
        self.settle_in();
        if !lease.hello && self.ledger.known.back() != Some(&self.nonce) {
            self.record(Record::Known { nonce: self.nonce.clone() });
        }
        let acks = self.ledger.id.as_ref() == Some(&lease.ledger)
            && self.ledger.outbox.front().is_some_and(|event| event.n <= lease.acked);
        if acks {
            // Never more than there were: the next event is numbered from here.
            self.record(Record::Acked { n: lease.acked.min(self.ledger.last_event) });
            self.resend_at = self.resend_at.filter(|_| !self.ledger.outbox.is_empty());
            if self.inventory_untold {
                self.tell_inventory(now);
            }
        }
        for key in &grown {
            self.renewed(key);
            self.reconcile(now, key);
        }
        if acks {
            self.reconcile_leaving(now);
            self.reconcile_ended(now);
        }
        if !self.grants.is_unanswered() {
            let waiting = !self.ledger.outbox.is_empty()
                || self.live.values().any(|live| live.pull.is_some())
                || self.staging.is_busy();
            let period = if waiting { limits::HEARTBEAT_RETRY_MS } else { limits::HEARTBEAT_MS };
            self.next_heartbeat = self.last_heartbeat.plus(Millis(period));
        }
    }

    /// The controller knows as late a session of this node, or a later one, which is another machine's or was begun on a
    /// disk that is lost. It takes none that came before.
    fn count_on(&mut self, now: Now, known: Option<u64>) {
        let known = known.filter(|known| *known >= self.ledger.session);
        let Some(number) = known.and_then(|known| known.checked_add(1)) else { return };
        let (nonce, hardware) = (self.nonce.clone(), self.ledger.hardware.clone());
        self.record(Record::Session { number, nonce, hardware });
        self.hello(now);
    }

    /// Another store than the one this node belongs to; said once.
    fn is_foreign(&mut self, store: &StoreId) -> bool {
        let Some(own) = self.ledger.store.clone().filter(|own| own != store) else { return false };
        if !std::mem::replace(&mut self.said_foreign, true) {
            self.warn(format!(
                "refused orders of store {store}: this node belongs to store {own}; if the controller was set up \
                 anew, stop the agent and remove its data directory"
            ));
        }
        true
    }

    fn spec(&mut self, now: Now, digest: Digest, template: Box<PodTemplate>) {
        if self.ledger.specs.contains_key(&digest) || self.ledger.specs.len() >= 2 * limits::PODS_PER_NODE_MAX
        {
            return;
        }
        self.record(Record::Spec { digest, template });
        let waiting: Vec<PodKey> = self
            .ledger
            .pods
            .iter()
            .filter(|(_, entry)| entry.desired.spec == digest)
            .map(|(key, _)| key.clone())
            .collect();
        for key in &waiting {
            self.reconcile(now, key);
        }
        let coming = self.staging.specs().any(|spec| spec == digest);
        if coming {
            self.next_stage();
        }
        if coming || !waiting.is_empty() {
            self.heartbeat(now);
        }
    }

    fn desired(&mut self, now: Now, desired: Desired) {
        // Of an earlier session, or of another agent of this node's name: this one's hello may not even be taken.
        if desired.nonce.as_ref().is_some_and(|nonce| *nonce != self.nonce) {
            return;
        }
        match self.ledger.judge(&desired) {
            Judgement::New => {}
            Judgement::Known => return self.heartbeat(now),
            Judgement::Stale => return,
            Judgement::OtherStore => {
                self.is_foreign(&desired.store);
                return;
            }
        }
        if desired.pods.len() > limits::PODS_PER_NODE_MAX {
            let (got, max) = (desired.pods.len(), limits::PODS_PER_NODE_MAX);
            return self.warn(format!("refused orders that name {got} pods: at most {max} are allowed"));
        }
        self.take_in_strangers(now, &desired.pods);
        let named: BTreeSet<PodKey> =
            desired.pods.iter().map(|pod| PodKey::new(&pod.pod, pod.epoch)).collect();
        for pod in desired.pods {
            self.name(pod);
        }
        let unnamed: Vec<PodKey> = self
            .ledger
            .pods
            .iter()
            .filter(|(key, entry)| !entry.unnamed && !named.contains(key))
            .map(|(key, _)| key.clone())
            .collect();
        for key in unnamed {
            if let Some(mut entry) = self.ledger.pods.get(&key).cloned() {
                entry.unnamed = true;
                self.record(Record::Pod { key, entry: Box::new(entry) });
            }
        }
        let (store, term, generation) = (desired.store, desired.term, desired.generation);
        self.record(Record::Orders { store, term, generation });
        let let_go = self.stage(desired.stage);
        self.drop_unused_specs();
        let keys: Vec<PodKey> = self.ledger.pods.keys().cloned().collect();
        for key in keys {
            self.reconcile(now, &key);
        }
        // Only now: a pull that the pod itself waits for as well goes on.
        self.out.actions.extend(let_go);
        self.next_stage();
        self.heartbeat(now);
    }

    /// Orders that name a pod which is alive here, unknown to the ledger, put it there: its shim is looked for, as after any
    /// restart. Whatever they say, nothing of it is begun before.
    fn take_in_strangers(&mut self, now: Now, pods: &[DesiredPod]) {
        for pod in pods {
            let here = self.strangers.extract_if(.., |key, _| key.pod == pod.pod);
            for (key, run) in here.collect::<Vec<_>>() {
                let desired = DesiredPod { epoch: key.epoch, ..pod.clone() };
                let entry = ledger::PodEntry { run, ..ledger::PodEntry::new(desired) };
                self.record(Record::Pod { key: key.clone(), entry: Box::new(entry) });
                self.adopt(now, &key);
            }
        }
    }

    /// Takes one line of the orders into the ledger.
    fn name(&mut self, pod: DesiredPod) {
        let key = PodKey::new(&pod.pod, pod.epoch);
        let newest = self.ledger.pods.keys().filter(|held| held.pod == key.pod).map(|held| held.epoch).max();
        // An epoch keeps the spec that it began with: a later one is the job's, and may never come here.
        let spec = self.ledger.pods.get(&key).filter(|entry| entry.run.0 > 0).map(|entry| entry.desired.spec);
        let pod = DesiredPod { spec: spec.unwrap_or(pod.spec), ..pod };
        let mut entry = match self.ledger.pods.get(&key) {
            Some(entry) if entry.desired == pod && !entry.unnamed => return,
            Some(entry) => entry.clone(),
            None if newest > Some(key.epoch) => return,
            None => ledger::PodEntry::new(pod.clone()),
        };
        entry.desired = pod;
        entry.unnamed = false;
        self.record(Record::Pod { key, entry: Box::new(entry) });
    }

    fn drop_unused_specs(&mut self) {
        let used = self.ledger.pods.values().map(|entry| entry.desired.spec);
        let used: BTreeSet<Digest> = used.chain(self.staging.specs()).collect();
        let unused: Vec<Digest> =
            self.ledger.specs.keys().filter(|digest| !used.contains(digest)).copied().collect();
        for digest in unused {
            self.record(Record::SpecDropped { digest });
        }
    }

    /// Sends what the outbox holds beyond what was sent; begins again when nothing is acknowledged for long.
    fn send_events(&mut self, now: Now) {
        if !self.bus_up || self.ledger.last_event <= self.sent_event {
            return;
        }
        let Some(ledger) = self.ledger.id.clone() else { return };
        let from = self.sent_event;
        let waiting: Vec<NumberedEvent> =
            self.ledger.outbox.iter().filter(|event| event.n > from).cloned().collect();
        let any = !waiting.is_empty();
        for events in messages(waiting) {
            let message = Events { nonce: self.nonce.clone(), ledger: ledger.clone(), events };
            self.act(Action::Events(message));
        }
        self.sent_event = self.ledger.last_event;
        if any {
            self.resend_at = Some(now.boot.plus(EVENTS_RESEND));
            let soon = self.last_heartbeat.plus(Millis(limits::HEARTBEAT_RETRY_MS));
            self.next_heartbeat = self.next_heartbeat.min(soon.max(now.boot));
        }
    }
}

/// Events in parts that a message holds, by number and by size.
fn messages(events: Vec<NumberedEvent>) -> Vec<Vec<NumberedEvent>> {
    let mut parts: Vec<Vec<NumberedEvent>> = Vec::new();
    let mut bytes = usize::MAX;
    for event in events {
        let size = serde_json::to_vec(&event).map_or(0, |json| json.len() + 1);
        let full = parts.last().is_some_and(|part| part.len() >= limits::EVENTS_PER_MESSAGE_MAX);
        if full || bytes.saturating_add(size) > limits::MESSAGE_BYTES_MAX - MESSAGE_HEAD_BYTES {
            parts.push(Vec::new());
            bytes = 0;
        }
        bytes += size;
        if let Some(part) = parts.last_mut() {
            part.push(event);
        }
    }
    parts
}

//! What an agent must not forget: the orders it holds, the pods it was given and how far they came, the events that
//! the controller has not acknowledged. Changed by records alone, which are on disk before anything is done.

use std::cmp::Ordering;
use std::collections::{BTreeMap, VecDeque};
use std::fmt;

use berth_protocol::ids::{
    Digest, Epoch, Generation, HardwareId, LedgerId, PodId, Run, SessionNonce, StoreId, Term,
};
use berth_protocol::job::PodTemplate;
use berth_protocol::message::node::{Desired, DesiredPod, NumberedEvent};
use berth_protocol::pod::Outcome;
use berth_protocol::rule::{Rule, kept};
use berth_protocol::units::Timestamp;
use serde::{Deserialize, Serialize};

use crate::task::Saved;

/// A backup of the controller's store that is older than this many sessions of the agent is not known to be of it.
const KNOWN_MAX: usize = 32;

/// One placement of a pod: the unit that an agent holds.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct PodKey {
    pub pod: PodId,
    pub epoch: Epoch,
}

impl PodKey {
    pub fn new(pod: &PodId, epoch: Epoch) -> Self {
        Self { pod: pod.clone(), epoch }
    }

    /// Reads what `Display` writes, as the pod's directory and control group are named.
    pub fn parse(text: &str) -> Option<Self> {
        let (pod, epoch) = text.rsplit_once('.')?;
        Some(Self { pod: PodId::parse(pod).ok()?, epoch: Epoch(epoch.parse().ok()?) })
    }
}

impl fmt::Display for PodKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.pod, self.epoch)
    }
}

impl fmt::Debug for PodKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

/// A change of the ledger, as the journal keeps it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Record {
    /// The first record of a new ledger.
    Created {
        ledger: LedgerId,
    },
    /// A session of the agent begins.
    Session {
        number: u64,
        nonce: SessionNonce,
        /// The machine that this ledger's pods were given to.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        hardware: Option<HardwareId>,
    },
    /// The controller has answered this session: the next names it as the one before.
    Known {
        nonce: SessionNonce,
    },
    /// A desired set was accepted; its pods are as the following records say.
    Orders {
        store: StoreId,
        term: Term,
        generation: Generation,
    },
    Spec {
        digest: Digest,
        template: Box<PodTemplate>,
    },
    SpecDropped {
        digest: Digest,
    },
    Pod {
        key: PodKey,
        entry: Box<PodEntry>,
    },
    PodDropped {
        key: PodKey,
    },
    Event {
        event: Box<NumberedEvent>,
    },
    Acked {
        n: u64,
    },
}

impl Record {
    /// Nothing is done on the word of these alone: lost in a crash, they are said or found out again. They need be on
    /// disk only with the next record.
    pub fn may_wait(&self) -> bool {
        matches!(
            self,
            Record::Spec { .. }
                | Record::SpecDropped { .. }
                | Record::PodDropped { .. }
                | Record::Acked { .. }
        )
    }
}

/// A pod as the ledger knows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PodEntry {
    pub desired: DesiredPod,
    /// The last desired set no longer named it.
    #[serde(default)]
    pub unnamed: bool,
    /// The last run begun; zero: none. Written before the run's shim starts.
    #[serde(default)]
    pub run: Run,
    /// The last run is over, durably told; the next one is due at `retry_at`.
    #[serde(default)]
    pub run_over: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retry_at: Option<Timestamp>,
    /// Failures within this epoch.
    #[serde(default)]
    pub failures: u32,
    /// And evictions after which it went on here, without the controller.
    #[serde(default)]
    pub evictions: u32,
    /// A grant has let a run of this epoch begin. Where the job says `continue`, that was for good.
    #[serde(default)]
    pub begun: bool,
    #[serde(default)]
    pub begin: Begin,
    /// In the log when the last run was over: its next may come to nothing.
    #[serde(default)]
    pub log_records: u64,
    /// The pod's place on the node's bridge.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub slot: Option<u16>,
    #[serde(default)]
    pub checkpoints: Checkpoints,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ended: Option<Ended>,
}

/// What the next run of an epoch begins from.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Begin {
    /// The checkpoint that the orders name, where they do.
    #[default]
    AsOrdered,
    /// Nothing: the run before has failed.
    Anew,
    /// The last checkpoint that this node keeps; where it keeps none, as ordered.
    Kept,
}

/// How far the pod's checkpoints came.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Checkpoints {
    /// The highest level begun; none at or below it is tried again.
    pub tried: u64,
    /// Begun without an order, while no controller was heard.
    pub own: u64,
    /// The shim was told to take one.
    pub saving: bool,
    /// It is one of those without an order.
    pub unasked: bool,
    /// The shim holds the pod still once it is taken.
    pub hold: bool,
    /// On this node's disk, and not yet in the depot.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub saved: Option<Saved>,
    /// The last one in the depot: its level, and the number of the event that told it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stored: Option<(u64, u64)>,
}

/// Levels from here on are the agent's own: the controller never comes so far, and is told of none.
const OWN_LEVELS: u64 = 1 << 32;

/// Was that one taken without an order?
pub fn is_own(level: u64) -> bool {
    level >= OWN_LEVELS
}

impl Checkpoints {
    /// Of the run before nothing more is to come.
    pub fn new_run(&mut self) {
        (self.saving, self.unasked, self.hold, self.saved) = (false, false, false, None);
    }

    /// The event that told of the checkpoint behind which the pod has stood still since: nothing has happened that it does
    /// not hold, whatever level was asked for meanwhile.
    pub fn stands_behind(&self) -> Option<u64> {
        let stands = self.hold && !self.saving && self.saved.is_none();
        self.stored.filter(|_| stands).map(|(_, event)| event)
    }

    /// The level of the one under way.
    pub fn level(&self) -> u64 {
        if self.unasked { OWN_LEVELS + self.own } else { self.tried }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Ended {
    pub outcome: Outcome,
    /// The number of the event that told it.
    pub event: u64,
    /// The log is in the depot, or there is none.
    pub log_stored: bool,
    /// The outputs are in the depot, or there are none.
    pub outputs_stored: bool,
}

impl PodEntry {
    pub fn new(desired: DesiredPod) -> Self {
        Self {
            desired,
            unnamed: false,
            run: Run::default(),
            run_over: false,
            retry_at: None,
            failures: 0,
            evictions: 0,
            begun: false,
            begin: Begin::default(),
            log_records: 0,
            slot: None,
            checkpoints: Checkpoints::default(),
            ended: None,
        }
    }

    /// Named by the last orders, and not over.
    pub fn is_wanted(&self) -> bool {
        self.ended.is_none() && !self.unnamed
    }

    /// A run may have processes, for all the ledger knows.
    pub fn may_be_alive(&self) -> bool {
        self.ended.is_none() && self.run.0 > 0 && !self.run_over
    }
}

#[derive(Debug, Clone, Default, PartialEq)]
pub struct Ledger {
    pub id: Option<LedgerId>,
    pub session: u64,
    pub nonce: Option<SessionNonce>,
    pub hardware: Option<HardwareId>,
    /// The last sessions that the controller has answered, the newest last.
    pub known: VecDeque<SessionNonce>,
    pub store: Option<StoreId>,
    pub term: Term,
    pub generation: Generation,
    pub specs: BTreeMap<Digest, PodTemplate>,
    pub pods: BTreeMap<PodKey, PodEntry>,
    pub outbox: VecDeque<NumberedEvent>,
    /// Of the last event made.
    pub last_event: u64,
}

impl Ledger {
    pub fn apply(&mut self, record: &Record) {
        match record {
            Record::Created { ledger } => self.id = Some(ledger.clone()),
            Record::Session { number, nonce, hardware } => {
                self.session = *number;
                self.nonce = Some(nonce.clone());
                self.hardware.clone_from(hardware);
            }
            Record::Known { nonce } => {
                self.known.push_back(nonce.clone());
                let more = self.known.len().saturating_sub(KNOWN_MAX);
                self.known.drain(..more);
            }
            Record::Orders { store, term, generation } => {
                self.store = Some(store.clone());
                self.term = *term;
                self.generation = *generation;
            }
            Record::Spec { digest, template } => {
                self.specs.insert(*digest, (**template).clone());
            }
            Record::SpecDropped { digest } => {
                self.specs.remove(digest);
            }
            Record::Pod { key, entry } => {
                self.pods.insert(key.clone(), (**entry).clone());
            }
            Record::PodDropped { key } => {
                self.pods.remove(key);
            }
            // A number that goes back is of a record that a damaged disk has brought back.
            Record::Event { event } if event.n <= self.last_event => {}
            Record::Event { event } => {
                self.last_event = event.n;
                self.outbox.push_back((**event).clone());
            }
            Record::Acked { n } => {
                self.last_event = self.last_event.max(*n);
                while self.outbox.front().is_some_and(|event| event.n <= *n) {
                    self.outbox.pop_front();
                }
            }
        }
    }

    /// The fewest records that make this ledger.
    pub fn snapshot(&self) -> Vec<Record> {
        let counts = [self.known.len(), self.pods.len(), self.specs.len(), self.outbox.len(), 4];
        let mut records = Vec::with_capacity(counts.iter().sum());
        records.extend(self.id.clone().map(|ledger| Record::Created { ledger }));
        records.extend(self.nonce.clone().map(|nonce| Record::Session {
            number: self.session,
            nonce,
            hardware: self.hardware.clone(),
        }));
        records.extend(self.known.iter().cloned().map(|nonce| Record::Known { nonce }));
        records.extend(self.store.clone().map(|store| Record::Orders {
            store,
            term: self.term,
            generation: self.generation,
        }));
        records.push(Record::Acked { n: self.acked() });
        records.extend(
            self.specs
                .iter()
                .map(|(digest, spec)| Record::Spec { digest: *digest, template: Box::new(spec.clone()) }),
        );
        records.extend(
            self.pods
                .iter()
                .map(|(key, entry)| Record::Pod { key: key.clone(), entry: Box::new(entry.clone()) }),
        );
        records.extend(self.outbox.iter().map(|event| Record::Event { event: Box::new(event.clone()) }));
        records
    }

    /// Of the last event that the controller has acknowledged.
    pub fn acked(&self) -> u64 {
        self.outbox.front().map_or(self.last_event, |event| event.n - 1)
    }

    /// The records that number the waiting events anew, under the name `id`: where a damaged disk lost some, the
    /// controller, which takes events without a gap alone, would wait for those for ever.
    pub fn mended(&self, id: LedgerId) -> Vec<Record> {
        let (waiting, last) = (self.outbox.front().map_or(u64::MAX, |event| event.n), self.last_event);
        let mut records = vec![Record::Created { ledger: id }, Record::Acked { n: last }];
        records.extend(
            (last.saturating_add(1)..)
                .zip(&self.outbox)
                .map(|(n, event)| Record::Event { event: Box::new(NumberedEvent { n, ..event.clone() }) }),
        );
        // What waits for an event to be told waits for all of them now.
        let last = last.saturating_add(self.outbox.len() as u64);
        for (key, entry) in &self.pods {
            let mut entry = entry.clone();
            let told = entry.ended.as_mut().map(|ended| &mut ended.event);
            let stored = entry.checkpoints.stored.as_mut().map(|(_, event)| event);
            let mut waits = false;
            for event in told.into_iter().chain(stored).filter(|event| **event >= waiting) {
                (*event, waits) = (last, true);
            }
            if waits {
                records.push(Record::Pod { key: key.clone(), entry: Box::new(entry) });
            }
        }
        records
    }

    /// May this order be obeyed? Another store's never, an older one never, the same one changes nothing.
    pub fn judge(&self, desired: &Desired) -> Judgement {
        match &self.store {
            Some(store) if *store != desired.store => Judgement::OtherStore,
            _ => match self.order_of(desired) {
                Ordering::Less if kept(Rule::OrdersNeverGoBack) => Judgement::Stale,
                Ordering::Equal if self.store.is_some() => Judgement::Known,
                _ => Judgement::New,
            },
        }
    }

    /// Whether the set comes before the one obeyed last, is that one, or comes after it.
    fn order_of(&self, desired: &Desired) -> Ordering {
        let terms = desired.term.cmp(&self.term);
        let terms = if kept(Rule::TermsOutrank) { terms } else { Ordering::Equal };
        terms.then(desired.generation.cmp(&self.generation))
    }

    /// The lowest place on the bridge that no pod holds.
    pub fn free_slot(&self) -> u16 {
        let taken: std::collections::BTreeSet<u16> =
            self.pods.values().filter(|entry| entry.ended.is_none()).filter_map(|entry| entry.slot).collect();
        (0..).find(|slot| !taken.contains(slot)).unwrap_or(u16::MAX)
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Judgement {
    New,
    Known,
    Stale,
    OtherStore,
}

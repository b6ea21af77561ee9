//! Decides everything the controller does: jobs, nodes, leases, placement. It performs no IO, reads no clock and
//! draws no randomness: `io` hands it events and carries out what it answers.

pub mod token;

use std::collections::BTreeMap;

use berth_protocol::ids::{ClusterName, Digest, Epoch, PodId, StoreId, Term};
use berth_protocol::topic::Topic;
use berth_protocol::units::{BootMs, Timestamp};

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
    },
    BusUp,
    BusDown,
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
    /// Signs the depot's tokens.
    pub secret: [u8; 32],
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
    /// Silence is held to be the controller's own blindness.
    pub blind: bool,
}

/// The controller's state and every decision about it.
pub struct Controller {
    counters: Counters,
}

impl Controller {
    /// Rebuilds the state from the store's entries (see `records` for their keys).
    pub fn load(config: Config, entries: Vec<(String, Vec<u8>)>, now: Now) -> Result<Self, LoadError> {
        let _ = (config, entries, now);
        Ok(Self { counters: Counters::default() })
    }

    /// Takes one event in. Never fails: what cannot be understood is refused and counted.
    pub fn step(&mut self, now: Now, event: Event) -> Step {
        let _ = (now, event);
        Step::default()
    }

    /// When `Tick` is due; `None`: nothing waits.
    pub fn next_wake(&self) -> Option<BootMs> {
        None
    }

    pub fn counters(&self) -> &Counters {
        &self.counters
    }
}

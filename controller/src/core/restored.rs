//! A store that was restored from a backup: what happened since, other nodes may know, and it does not. Its epochs begin
//! anew above all that may have been given, and nothing is placed as long as pods that it knows nothing of may run.

use berth_protocol::ids::Epoch;
use berth_protocol::limits::{LEASE_MARGIN_MS, LOST_AFTER_MS};
use berth_protocol::units::{BootMs, Millis};
use serde::{Deserialize, Serialize};

use super::cluster::is_zero;
use super::records;
use super::timers::Timer;
use super::{Controller, LoadError, Now};

/// No pod has had as many epochs between a backup and its restoration.
const EPOCHS: u64 = 1_000;
/// What the controller before has granted is over by then, but to pods that go on without a controller.
const HOLD: Millis = Millis(LOST_AFTER_MS + LEASE_MARGIN_MS);

/// Stored once, by `berth-controller restore`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Restored {
    /// The least that a pod is given from now on.
    pub epochs_from: Epoch,
    /// The time in which nothing is placed is over.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub settled: bool,
}

/// What is to be written beside the records of a backup that takes a store's place.
///
/// # Errors
/// A record that this version cannot read.
pub fn entry(entries: &[(String, Option<Vec<u8>>)], now: Now) -> Result<(String, Vec<u8>), LoadError> {
    let (cluster, _) = records::load(entries.iter().cloned(), now)?;
    let given = cluster.jobs.values().flat_map(|job| job.pods().values()).map(|pod| pod.epoch.0).max();
    let before = cluster.restored.map_or(0, |restored| restored.epochs_from.0);
    let epochs_from = Epoch(given.unwrap_or(0).max(before) + EPOCHS);
    Ok((records::RESTORED.to_owned(), records::bytes(&Restored { epochs_from, settled: false })))
}

impl Restored {
    /// Until when nothing is placed by a controller that starts now, if so.
    pub fn holds_until(&self, now: Now) -> Option<BootMs> {
        (!self.settled).then(|| now.boot.plus(HOLD))
    }
}

impl Controller {
    /// May anything be placed yet?
    pub(super) fn is_settled(&mut self, now: Now) -> bool {
        let Some(at) = self.settles_at else { return true };
        if now.boot < at {
            self.timers.arm(Timer::Schedule, at);
            return false;
        }
        self.settles_at = None;
        if let Some(restored) = &mut self.cluster.restored {
            restored.settled = true;
            self.dirty.restored = true;
        }
        true
    }

    /// For how long nothing is placed, if so.
    pub fn holds_for(&self, now: Now) -> Option<Millis> {
        self.settles_at.map(|at| at.since(now.boot))
    }

    /// What a pod's next epoch is at least.
    pub(super) fn epochs_from(&self) -> Epoch {
        self.cluster.restored.as_ref().map_or(Epoch(0), |restored| restored.epochs_from)
    }
}

//! A store that was restored from a backup: what happened since, other nodes may know, and it does not. Its epochs begin
//! anew above all that may have been given, and nothing is placed as long as pods that it knows nothing of may run.

use std::collections::BTreeSet;

use berth_protocol::ids::{Epoch, NodeId, PodId};
use berth_protocol::limits::{FREEZE_CONFIRM_MS, LEASE_MARGIN_MS, LOST_AFTER_MS};
use berth_protocol::message::node::Hello;
use berth_protocol::rule::{Rule, kept};
use berth_protocol::units::{BootMs, Millis};
use serde::{Deserialize, Serialize};

use super::cluster::{Cluster, Job, is_zero};
use super::records;
use super::timers::Timer;
use super::{Controller, LoadError, Now};

/// No pod has had as many epochs between a backup and its restoration.
const EPOCHS: u64 = 1_000;
/// And its term rises by that: no controller since the backup has come so far.
pub const TERMS: u64 = 1_000;
/// What the controller before has granted is over by then, but to pods that go on without a controller or end slowly.
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

/// The time in which nothing is placed, of a controller that began with a restored store.
pub(super) struct Hold {
    begun: BootMs,
    /// It is over for every job.
    ends: BootMs,
    /// Of the first job accepted since.
    next_seq: u64,
}

impl Hold {
    pub fn of(cluster: &Cluster, next_seq: u64, now: Now) -> Option<Self> {
        cluster.restored.as_ref().filter(|restored| !restored.settled && kept(Rule::RestoredWaits))?;
        let longest = cluster.jobs.values().map(longest_lease).max().unwrap_or_default();
        Some(Self { begun: now.boot, ends: now.boot.plus(HOLD.max(longest)), next_seq })
    }

    /// Until when no pod of the job is placed, if so.
    pub fn holds(&self, job: &Job, now: Now) -> Option<BootMs> {
        let lease = if job.file.seq < self.next_seq { longest_lease(job) } else { Millis::ZERO };
        Some(self.begun.plus(HOLD.max(lease))).filter(|until| now.boot < *until)
    }
}

/// Of a pod of it, and some margin: by its file, or by one of which the backup knows nothing and that stops its pods where
/// this one pauses them.
fn longest_lease(job: &Job) -> Millis {
    let pod = &job.file.spec.pod;
    let end = pod.grace.max(Millis(FREEZE_CONFIRM_MS));
    pod.on_disconnect.after.saturating_add(end).saturating_add(Millis(LEASE_MARGIN_MS))
}

impl Controller {
    /// Pods of the node that were placed before the store was restored, and of which it does not say that they run by a
    /// grant: a node that had been silent may have been given up since the backup, and its pods placed elsewhere.
    pub(super) fn doubtful(&self, id: &NodeId, hello: &Hello) -> BTreeSet<PodId> {
        let granted = hello.pods.iter().filter(|held| held.granted).map(|held| (&held.pod, held.epoch));
        let granted: BTreeSet<(&PodId, Epoch)> = granted.collect();
        let pods = self.cluster.nodes.get(id).into_iter().flat_map(|node| &node.pods);
        let before = pods.filter(|(_, epoch)| **epoch < self.epochs_from());
        before
            .filter(|(pod, epoch)| !granted.contains(&(*pod, **epoch)))
            .map(|(pod, _)| pod.clone())
            .collect()
    }

    /// Whoever starts next need not wait, once nothing does here.
    pub(super) fn settle_restored(&mut self, now: Now) {
        let Some(hold) = &self.hold else { return };
        if now.boot < hold.ends {
            return self.timers.arm(Timer::Schedule, hold.ends);
        }
        self.hold = None;
        if let Some(restored) = &mut self.cluster.restored {
            restored.settled = true;
            self.dirty.restored = true;
        }
    }

    /// For how long nothing at all is placed, if so.
    pub fn holds_for(&self, now: Now) -> Option<Millis> {
        self.hold.as_ref().map(|hold| hold.begun.plus(HOLD).since(now.boot))
    }

    /// What a pod's next epoch is at least.
    pub(super) fn epochs_from(&self) -> Epoch {
        let restored = self.cluster.restored.as_ref().filter(|_| kept(Rule::RestoredEpochsRise));
        restored.map_or(Epoch(0), |restored| restored.epochs_from)
    }
}

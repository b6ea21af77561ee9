//! The controller's store replaced by an older copy of itself, as `berth-controller restore` does it.

use std::collections::{BTreeMap, BTreeSet};

use berth_controller::core::restored;
use berth_protocol::ids::{Digest, Epoch, JobUid};

use super::{Due, Fault, World};
use crate::plan::Job;

pub(super) struct Backup {
    records: BTreeMap<String, Vec<u8>>,
    term: u64,
    /// Checkpoints that were let go by the time that it took the store's place.
    pub lacks: BTreeSet<Digest>,
}

/// Draws a backup, its restoration, and a node that is out of reach then.
pub(crate) fn rollback(rng: &mut fastrand::Rng, nodes: usize, span: u64) -> Vec<(u64, Fault)> {
    let at = rng.u64(1_000..span / 2);
    let back = at + rng.u64(1_000..span / 3);
    let mut faults = vec![
        (at, Fault::Backup),
        (back, Fault::Restore),
        (back + rng.u64(10..10_000), Fault::ControllerStart),
    ];
    if rng.u8(0..3) > 0 {
        let node = rng.usize(0..nodes);
        faults.push((back.saturating_sub(rng.u64(0..30_000)), Fault::Partition(node)));
        faults.push(((back + rng.u64(10_000..200_000)).min(span), Fault::Heal(node)));
    }
    faults.sort_by_key(|(at, _)| *at);
    faults
}

pub(super) fn number(record: Option<&Vec<u8>>, field: &str) -> u64 {
    let record = record.and_then(|bytes| serde_json::from_slice::<serde_json::Value>(bytes).ok());
    record.and_then(|record| record[field].as_u64()).unwrap_or_default()
}

impl World {
    pub(super) fn back_up(&mut self) {
        // One of what is left would lack a job.
        if !self.spoilt.is_empty() {
            return;
        }
        self.backup = Some(Backup { records: self.store.clone(), term: self.term, lacks: BTreeSet::new() });
    }

    /// With every controller stopped.
    pub(super) fn restore(&mut self) -> Result<(), String> {
        let Some(mut backup) = self.backup.take() else { return Ok(()) };
        if self.continues_since(&backup) {
            return Ok(());
        }
        self.end_all();
        self.spoilt.clear();
        let entries: Vec<_> =
            backup.records.iter().map(|(key, value)| (key.clone(), Some(value.clone()))).collect();
        let now = self.seats[0].now(self.now_ms);
        let (key, value) =
            restored::entry(&entries, now).map_err(|error| format!("cannot restore: {error}"))?;
        backup.records.insert(key.clone(), value);
        let named = backup.records.keys().filter_map(|key| key.strip_prefix("checkpoint/"));
        let named = named.filter_map(|hex| Digest::parse(&format!("sha256:{hex}")).ok());
        backup.lacks = named.filter(|id| !self.depot.borrow().contains_key(id)).collect();
        // And a copy of a disk may tell anew of what was let go since.
        backup.lacks.extend(&self.gone);
        let store = std::mem::replace(&mut self.store, std::mem::take(&mut backup.records));
        let lost = store.keys().filter(|key| !self.store.contains_key(*key));
        let lost: Vec<JobUid> =
            lost.filter_map(|key| JobUid::parse(key.strip_prefix("job/")?).ok()).collect();
        self.term = backup.term + restored::TERMS;
        self.backup = Some(backup);
        // Whoever finds a job gone, or as it was, submits it again.
        let taken = |job: &Job| self.store.contains_key(&format!("request/{}-{}", job.name, job.version));
        let waits = |n: usize| self.due.values().any(|due| matches!(due, Due::Submit(other) if *other == n));
        let again: Vec<usize> =
            (0..self.jobs.len()).filter(|n| !taken(&self.jobs[*n]) && !waits(*n)).collect();
        let names: Vec<&str> = again.iter().map(|n| self.jobs[*n].name.as_str()).collect();
        let epochs_from = Epoch(number(self.store.get(&key), "epochsFrom"));
        self.oracle.rolled_back(epochs_from, lost.into_iter(), &names);
        again.into_iter().for_each(|n| self.at(self.now_ms, Due::Submit(n)));
        Ok(())
    }

    /// A pod that goes on whatever happens was placed since. Where it is out of reach nothing ends it: an operator is told
    /// to see to that.
    fn continues_since(&self, backup: &Backup) -> bool {
        let placed_since = |key: &&String| {
            key.starts_with("pod/")
                && number(self.store.get(*key), "epoch") != number(backup.records.get(*key), "epoch")
        };
        let continues = |key: &String| {
            let job = format!("job/{}", key.split('/').nth(1).unwrap_or_default());
            // A job submitted since is another one when it is submitted again.
            let known = backup.records.get(&job);
            let files = known.into_iter().chain(self.store.get(&job).filter(|_| known.is_some()));
            files.into_iter().any(|file| String::from_utf8_lossy(file).contains("continue"))
        };
        self.store.keys().filter(placed_since).any(continues)
    }
}

//! What must hold at every step of every history.

use std::collections::{BTreeMap, BTreeSet};

use berth_agent::core::ledger::PodKey;
use berth_protocol::ids::{Epoch, Generation, JobUid, NodeId, PodId, Term};
use berth_protocol::message::user::JobStatus;

use crate::node::Node;
use crate::plan::Expect;

/// What the oracle remembers of a history.
#[derive(Default)]
pub struct Oracle {
    /// The newest that has executed, and where.
    epochs: BTreeMap<PodId, (Epoch, NodeId)>,
    accepted: BTreeSet<String>,
    statuses: BTreeMap<String, JobStatus>,
    /// By machine.
    orders: BTreeMap<usize, (u64, Term, Generation)>,
    /// What was asked of each job that makes a new generation of it.
    changes: BTreeMap<String, BTreeSet<String>>,
    /// Jobs that the controller has forgotten: what they take of a node it cannot know.
    lost: BTreeSet<JobUid>,
    /// Jobs with a damaged record, what they are called, and the epoch at which each of their pods was then.
    damaged: BTreeMap<JobUid, (String, BTreeMap<u32, Epoch>)>,
    /// What it placed before it forgot them may begin where it was placed, though it has gone on elsewhere since.
    epochs_from: Epoch,
}

impl Oracle {
    /// A pod executes in one place at most, an epoch of it on one node alone, and never one older than one that has executed;
    /// what executes on a node fits it.
    pub fn check(&mut self, nodes: &[Node], now_ms: u64) -> Result<(), String> {
        let mut where_now: BTreeMap<&PodId, (&Node, &PodKey)> = BTreeMap::new();
        for (n, node) in nodes.iter().enumerate() {
            let orders = node.orders();
            let newest = self.orders.entry(n).or_insert(orders);
            if orders < *newest {
                return Err(format!("{} went back from orders {newest:?} to {orders:?}", node.id));
            }
            *newest = orders;
            if let Some(key) = node.launched_twice.first() {
                return Err(format!("{} began a run of {key} beside another", node.id));
            }
            if let Some(key) = node.forgiven.first() {
                return Err(format!(
                    "{} goes on with {key} after more failures than its job forgives",
                    node.id
                ));
            }
            if let Some(asked) = node.overload(&self.lost) {
                return Err(format!("{} executes pods that ask for {} mCPU", node.id, asked.0));
            }
            let mut alive: BTreeSet<&PodId> = BTreeSet::new();
            if let Some(key) = node.alive().find(|key| !alive.insert(&key.pod)) {
                return Err(format!("{} holds another epoch beside {key}", node.id));
            }
            for key in node.executing() {
                let excused = |node: &Node, key| node.is_excused(key, now_ms);
                if let Some((other, theirs)) = where_now.insert(&key.pod, (node, key)) {
                    let (older, its) = if theirs.epoch < key.epoch { (other, theirs) } else { (node, key) };
                    if theirs.epoch == key.epoch || !excused(older, its) {
                        return Err(format!(
                            "pod {} runs twice: epoch {} on {} and epoch {} on {}",
                            key.pod, theirs.epoch, other.id, key.epoch, node.id
                        ));
                    }
                }
                if let Some((_, epochs)) = self.damaged.get(&key.pod.uid)
                    && epochs.get(&key.pod.index).is_none_or(|placed| key.epoch > *placed)
                {
                    return Err(format!("{key} executes, begun though a record of its job is damaged"));
                }
                let first = || (key.epoch, node.id.clone());
                let (newest, on) = self.epochs.entry(key.pod.clone()).or_insert_with(first);
                if key.epoch == *newest && node.id != *on {
                    return Err(format!(
                        "epoch {newest} of pod {} was given to {on} and {}",
                        key.pod, node.id
                    ));
                }
                if key.epoch < *newest && *newest >= self.epochs_from && !excused(node, key) {
                    return Err(format!("pod {} went back from epoch {newest} to {}", key.pod, key.epoch));
                }
                if key.epoch > *newest {
                    (*newest, *on) = first();
                }
            }
        }
        Ok(())
    }

    /// Somebody asked for what makes a new generation of the job; asked again, it is the same.
    pub fn changed(&mut self, job: &str, what: String) {
        self.changes.entry(job.to_owned()).or_default().insert(what);
    }

    /// The controller knows less than it has told, nothing of jobs that are lost, and others as they were before they were
    /// submitted `again`.
    pub fn rolled_back(&mut self, epochs_from: Epoch, lost: impl Iterator<Item = JobUid>, again: &[&str]) {
        self.epochs_from = epochs_from;
        self.damaged.clear();
        self.lost.extend(lost);
        self.accepted.retain(|job| !again.contains(&job.as_str()));
        self.statuses.clear();
    }

    /// A record of the job cannot be read: its pods are left as they are, and nobody expects it to end.
    pub fn damaged(&mut self, job: String, uid: JobUid, mut epochs: BTreeMap<u32, Epoch>) {
        // What a restored store knows nothing of may run, too.
        for (pod, (epoch, _)) in self.epochs.iter().filter(|(pod, _)| pod.uid == uid) {
            let placed = epochs.entry(pod.index).or_insert(*epoch);
            *placed = (*placed).max(*epoch);
        }
        self.lost.insert(uid.clone());
        self.damaged.insert(uid, (job, epochs));
    }

    pub fn is_damaged(&self, uid: &JobUid) -> bool {
        self.damaged.contains_key(uid)
    }

    pub fn has_accepted(&self, job: &str) -> bool {
        self.accepted.contains(job)
    }

    pub fn accepted(&mut self, job: &str) {
        self.accepted.insert(job.to_owned());
    }

    /// A job never goes back on its end, nor counts more failures than its runs had or its file forgives, nor begins
    /// anew oftener than it was asked to.
    pub fn status(
        &mut self,
        job: &str,
        status: JobStatus,
        forgives: Option<u32>,
        nodes: &[Node],
    ) -> Result<(), String> {
        let failed = |uid| nodes.iter().map(|node| node.failures(uid)).sum::<usize>();
        if let Some(had) = status.uid.as_ref().map(failed).filter(|had| status.failures as usize > *had) {
            return Err(format!("job {job} counts {} failures, and had {had}", status.failures));
        }
        if let Some(most) = forgives.map(|forgives| forgives + 1).filter(|most| status.failures > *most) {
            return Err(format!("job {job} was to end with its failure {most}, and had {}", status.failures));
        }
        let changes = self.changes.get(job).map_or(0, |changes| changes.len() as u64);
        if status.generation.0 > changes {
            return Err(format!(
                "job {job} was begun {} times, and {changes} were asked for",
                status.generation
            ));
        }
        if let Some(before) = self.statuses.get(job)
            && before.phase.is_final()
            && before.uid == status.uid
            && before.generation == status.generation
            && before.phase != status.phase
        {
            return Err(format!("job {job} was {:?} and became {:?}", before.phase, status.phase));
        }
        self.statuses.insert(job.to_owned(), status);
        Ok(())
    }

    /// Every accepted job whose records are whole has come to the end that its program has.
    pub fn converged(&self, expect: &BTreeMap<String, Expect>) -> Result<(), String> {
        let damaged = |job: &&String| self.damaged.values().any(|(name, _)| name == *job);
        for job in self.accepted.iter().filter(|job| !damaged(job)) {
            let phase = self.statuses.get(job).map(|status| status.phase);
            let wanted = expect.get(job).copied();
            if !wanted.is_some_and(|wanted| wanted.is(phase)) {
                let status = self.statuses.get(job);
                let detail = status.and_then(|s| serde_json::to_string(s).ok()).unwrap_or_default();
                return Err(format!("job {job} should end as {wanted:?}, is {phase:?}: {detail}"));
            }
        }
        Ok(())
    }

    pub fn all_accepted(&self, expect: &BTreeMap<String, Expect>) -> bool {
        self.accepted.len() == expect.len()
    }
}

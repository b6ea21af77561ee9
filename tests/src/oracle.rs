//! What must hold at every step of every history.

use std::collections::{BTreeMap, BTreeSet};

use berth_protocol::ids::{Epoch, Generation, NodeId, PodId, Term};
use berth_protocol::message::user::{JobPhase, JobStatus};

use crate::node::Node;

/// What the oracle remembers of a history.
#[derive(Default)]
pub struct Oracle {
    epochs: BTreeMap<PodId, Epoch>,
    accepted: BTreeSet<String>,
    statuses: BTreeMap<String, JobStatus>,
    orders: BTreeMap<NodeId, (Term, Generation)>,
}

impl Oracle {
    /// A pod executes in one place at most, and never in an epoch older than one that has executed; what executes on a
    /// node fits it.
    pub fn check<'a>(&mut self, nodes: impl IntoIterator<Item = &'a Node>) -> Result<(), String> {
        let mut where_now: BTreeMap<&PodId, (&NodeId, Epoch)> = BTreeMap::new();
        for node in nodes {
            if let Some(lacking) = node.lacking.first() {
                return Err(format!(
                    "{} was to start from {lacking}, which the depot does not hold",
                    node.id
                ));
            }
            let orders = node.orders();
            let newest = self.orders.entry(node.id.clone()).or_insert(orders);
            if orders < *newest {
                return Err(format!("{} went back from orders {newest:?} to {orders:?}", node.id));
            }
            *newest = orders;
            if let Some(key) = node.launched_twice.first() {
                return Err(format!("{} began a run of {key} beside another", node.id));
            }
            if let Some(asked) = node.overload() {
                return Err(format!("{} executes pods that ask for {} mCPU", node.id, asked.0));
            }
            let mut alive: BTreeSet<&PodId> = BTreeSet::new();
            if let Some(key) = node.alive().find(|key| !alive.insert(&key.pod)) {
                return Err(format!("{} holds another epoch beside {key}", node.id));
            }
            for key in node.executing() {
                if let Some((other, epoch)) = where_now.insert(&key.pod, (&node.id, key.epoch)) {
                    return Err(format!(
                        "pod {} runs twice: epoch {epoch} on {other} and epoch {} on {}",
                        key.pod, key.epoch, node.id
                    ));
                }
                let newest = self.epochs.entry(key.pod.clone()).or_insert(key.epoch);
                if key.epoch < *newest {
                    return Err(format!("pod {} went back from epoch {newest} to {}", key.pod, key.epoch));
                }
                *newest = key.epoch;
            }
        }
        Ok(())
    }

    pub fn accepted(&mut self, job: &str) {
        self.accepted.insert(job.to_owned());
    }

    /// A job never goes back on its end, nor counts more failures than its runs had.
    pub fn status(&mut self, job: &str, status: JobStatus, nodes: &[Node]) -> Result<(), String> {
        let failed = |uid| nodes.iter().map(|node| node.failures(uid)).sum::<usize>();
        if let Some(had) = status.uid.as_ref().map(failed).filter(|had| status.failures as usize > *had) {
            return Err(format!("job {job} counts {} failures, and had {had}", status.failures));
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

    /// Every accepted job has come to the end that its program has.
    pub fn converged(&self, expect: &BTreeMap<String, JobPhase>) -> Result<(), String> {
        for job in &self.accepted {
            let phase = self.statuses.get(job).map(|status| status.phase);
            if phase != expect.get(job).copied() {
                let status = self.statuses.get(job);
                let detail = status.and_then(|s| serde_json::to_string(s).ok()).unwrap_or_default();
                return Err(format!("job {job} should end as {:?}, is {phase:?}: {detail}", expect.get(job)));
            }
        }
        Ok(())
    }

    pub fn all_accepted(&self, expect: &BTreeMap<String, JobPhase>) -> bool {
        self.accepted.len() == expect.len()
    }
}

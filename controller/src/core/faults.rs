//! Nodes that could not run a pod, for want of something of their own: it goes elsewhere as long as there is an
//! elsewhere. Decides where a pod may yet be tried; what an end means otherwise is `lifecycle`'s.

use berth_protocol::ids::{NodeId, PodId};
use berth_protocol::resources::Inventory;

use super::Controller;
use super::cluster::Liveness;

/// Nodes that are tried, one after the other.
const NODES_MAX: usize = 8;

impl Controller {
    /// Keeps the pod off a node that could not run it; `false`: no other node is left that could.
    pub(super) fn avoid(&mut self, id: &PodId, node: &NodeId) -> bool {
        let elsewhere = self.has_elsewhere(id, Some(node));
        let Some(job) = self.cluster.jobs.get_mut(&id.uid) else { return false };
        let tried = job.pod(id.index).map_or(0, |pod| pod.saved.faulty_on.len());
        if !elsewhere || tried + 1 >= NODES_MAX {
            return false;
        }
        job.change(id.index, |pod| pod.saved.faulty_on.insert(node.clone()));
        true
    }

    /// A node is there, but for this one and those where the pod has failed, that could run it, now or once it has room.
    pub(super) fn has_elsewhere(&mut self, id: &PodId, but: Option<&NodeId>) -> bool {
        self.survey(&id.uid);
        let Some(job) = self.cluster.jobs.get(&id.uid) else { return false };
        let Some(pod) = job.pod(id.index) else { return false };
        let (saved, wants) = (&pod.saved, job.file.spec.pod.resources());
        let big_enough = |has: &Inventory| {
            let gpus = wants.gpu.as_ref().map_or(0, |gpu| gpu.count as usize);
            has.cpu >= wants.cpu && has.memory >= wants.memory && has.gpus.len() >= gpus
        };
        let suits = |node: &NodeId| saved.best().is_none_or(|best| self.unfit_for(&best, node).is_empty());
        self.verdicts(&id.uid).into_iter().any(|(room, reasons)| {
            let other = &self.scheduler.nodes[room];
            // What is short may come free; what a node lacks it will lack.
            but != Some(other)
                && !saved.has_failed_on(other)
                && reasons.iter().all(|reason| reason.distance() == 0)
                && suits(other)
                && self.cluster.nodes.get(other).is_some_and(|found| {
                    found.liveness == Liveness::Online && big_enough(&found.record.inventory)
                })
        })
    }

    /// Where the pod has failed it may be tried again, for the others have gone meanwhile. `false`: it is not so.
    pub(super) fn forgive_nodes(&mut self, id: &PodId) -> bool {
        let pod = self.cluster.jobs.get(&id.uid).and_then(|job| job.pod(id.index));
        let failed =
            pod.is_some_and(|pod| !pod.saved.failed_on.is_empty() || !pod.saved.faulty_on.is_empty());
        if !failed || self.has_elsewhere(id, None) {
            return false;
        }
        self.change_saved(id, |saved| {
            saved.failed_on.clear();
            saved.faulty_on.clear();
        });
        true
    }
}

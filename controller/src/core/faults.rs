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
        self.survey(&id.uid);
        let Some(job) = self.cluster.jobs.get(&id.uid) else { return false };
        let Some(pod) = job.pod(id.index) else { return false };
        let (faulty, wants) = (&pod.saved.faulty_on, job.file.spec.pod.resources());
        let big_enough = |has: &Inventory| {
            let gpus = wants.gpu.as_ref().map_or(0, |gpu| gpu.count as usize);
            has.cpu >= wants.cpu && has.memory >= wants.memory && has.gpus.len() >= gpus
        };
        let elsewhere = self.verdicts(&id.uid).into_iter().any(|(room, reasons)| {
            let other = &self.scheduler.nodes[room];
            // What is short may come free; what a node lacks it will lack.
            other != node
                && !faulty.contains(other)
                && reasons.iter().all(|reason| reason.distance() == 0)
                && self.cluster.nodes.get(other).is_some_and(|found| {
                    found.liveness == Liveness::Online && big_enough(&found.record.inventory)
                })
        });
        if !elsewhere || faulty.len() + 1 >= NODES_MAX {
            return false;
        }
        if let Some(job) = self.cluster.jobs.get_mut(&id.uid) {
            job.change(id.index, |pod| pod.saved.faulty_on.insert(node.clone()));
        }
        true
    }
}

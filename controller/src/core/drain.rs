//! Nodes that take no new pods, and nodes that are emptied: every pod of theirs is saved and goes elsewhere.

use berth_protocol::ids::NodeId;
use berth_protocol::pod::Goal;
use berth_protocol::units::{Millis, Timestamp};
use serde::{Deserialize, Serialize};

use super::checkpoints::Leaving;
use super::{Controller, Now};

/// Stored with the node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Drain {
    pub since: Timestamp,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deadline: Option<Timestamp>,
}

impl Controller {
    /// Takes no new pods from now on, or takes them again; false: there is no such node.
    pub(super) fn cordon(&mut self, now: Now, id: &NodeId, cordoned: bool) -> bool {
        let Some(node) = self.cluster.nodes.get_mut(id) else { return false };
        let drained = !cordoned && node.record.drain.take().is_some();
        if node.record.cordoned != cordoned || drained {
            node.record.cordoned = cordoned;
            self.dirty.nodes.insert(id.clone());
            self.dirty.states.insert(id.clone());
            self.refresh_room(id);
            if drained {
                self.stay(id);
            }
            self.watch(id, now);
        }
        true
    }

    /// Pods that were to leave and could not be saved stay; the others are on their way.
    fn stay(&mut self, id: &NodeId) {
        let Some(node) = self.cluster.nodes.get(id) else { return };
        for pod in node.pods.keys().cloned().collect::<Vec<_>>() {
            let Some(job) = self.cluster.jobs.get_mut(&pod.uid) else { continue };
            if let Some(assignment) = job.assignment(pod.index)
                && assignment.goal == Goal::Vacate
                && assignment.leaving == Some(Leaving::Drain)
                && assignment.asked == assignment.answered
                && job.pod(pod.index).is_some_and(|pod| pod.saved.trouble.is_some())
                && let Some(assignment) = job.assignment_mut(pod.index)
            {
                (assignment.goal, assignment.leaving) = (Goal::Run, None);
                self.dirty.pods.insert(pod.clone());
                self.dirty.desired.insert(id.clone());
                self.dirty.status.insert(pod.uid.clone());
            }
        }
    }

    /// Empties a node; false: there is no such node. Asked again it may bring the deadline forward or back.
    pub(super) fn drain(&mut self, now: Now, id: &NodeId, deadline: Option<Millis>) -> bool {
        if !self.cordon(now, id, true) {
            return false;
        }
        let Some(node) = self.cluster.nodes.get_mut(id) else { return false };
        let since = node.record.drain.as_ref().map_or(now.wall, |drain| drain.since);
        let drain = Drain { since, deadline: deadline.map(|within| now.wall.plus(within)) };
        if node.record.drain.as_ref() != Some(&drain) {
            node.record.drain = Some(drain);
            self.dirty.nodes.insert(id.clone());
            self.dirty.states.insert(id.clone());
        }
        for pod in node.pods.keys().cloned().collect::<Vec<_>>() {
            self.vacate(&pod, Leaving::Drain);
        }
        self.watch(id, now);
        true
    }

    /// What a draining node still holds at its deadline is stopped: it goes on from its last checkpoint.
    pub(super) fn judge_drain(&mut self, now: Now, id: &NodeId) {
        let Some(node) = self.cluster.nodes.get(id) else { return };
        let over =
            node.record.drain.as_ref().and_then(|drain| drain.deadline).is_some_and(|at| at <= now.wall);
        if !over {
            return;
        }
        for pod in node.pods.keys().cloned().collect::<Vec<_>>() {
            let Some(job) = self.cluster.jobs.get_mut(&pod.uid) else { continue };
            if let Some(assignment) = job.assignment_mut(pod.index)
                && assignment.goal != Goal::Stop
            {
                (assignment.goal, assignment.leaving) = (Goal::Stop, Some(Leaving::Drain));
                self.dirty.pods.insert(pod.clone());
                self.dirty.desired.insert(id.clone());
                self.dirty.status.insert(pod.uid.clone());
            }
        }
    }
}

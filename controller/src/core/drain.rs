//! Nodes that take no new pods, and nodes that are emptied: every pod of theirs is saved and goes elsewhere.

use berth_protocol::ids::{BootId, NodeId, SessionNonce};
use berth_protocol::limits::HUMAN_MESSAGE_BYTES_MAX;
use berth_protocol::message::node::Departure;
use berth_protocol::pod::Goal;
use berth_protocol::units::{Millis, Timestamp};
use serde::{Deserialize, Serialize};

use super::checkpoints::Leaving;
use super::notes::Note;
use super::{Controller, Now};

/// Stored with the node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Drain {
    pub since: Timestamp,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deadline: Option<Timestamp>,
    /// It is the node's own word, and ends with that.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub notice: Option<Notice>,
}

/// What a node has said of its machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Notice {
    pub why: String,
    /// The session and the boot that said it.
    pub nonce: SessionNonce,
    pub boot: BootId,
    /// It took no pods before.
    pub cordoned: bool,
}

/// By this heartbeat of a session its agent has looked for notices: heartbeats are 2 s apart at least.
const LOOKED_BEATS: u64 = 8;
/// A deadline told again with the next heartbeat is the same one, give or take the message's way.
const SAME: Millis = Millis(5_000);

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

    /// Pods that were to leave and run on, since they wait or could not be saved, stay; the others are on their way.
    fn stay(&mut self, id: &NodeId) {
        let Some(node) = self.cluster.nodes.get(id) else { return };
        for pod in node.pods.keys().cloned().collect::<Vec<_>>() {
            let Some(job) = self.cluster.jobs.get_mut(&pod.uid) else { continue };
            if let Some(assignment) = job.assignment(pod.index)
                && assignment.leaving == Some(Leaving::Drain)
                && (assignment.goal == Goal::Run
                    || assignment.goal == Goal::Vacate
                        && assignment.asked == assignment.answered
                        && job.pod(pod.index).is_some_and(|pod| pod.saved.trouble.is_some()))
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
        let drain = Drain { since, deadline: deadline.map(|within| now.wall.plus(within)), notice: None };
        self.begin_drain(now, id, drain);
        true
    }

    fn begin_drain(&mut self, now: Now, id: &NodeId, drain: Drain) {
        let Some(node) = self.cluster.nodes.get_mut(id) else { return };
        if node.record.drain.as_ref() != Some(&drain) {
            node.record.drain = Some(drain);
            self.dirty.nodes.insert(id.clone());
            self.dirty.states.insert(id.clone());
        }
        for pod in node.pods.keys().cloned().collect::<Vec<_>>() {
            self.send_away(now, &pod, Leaving::Drain);
        }
        self.watch(id, now);
    }

    /// What a heartbeat says of its machine: that it is about to go, or that it is not.
    pub(super) fn notice(&mut self, now: Now, id: &NodeId, beat: u64, departure: Option<Departure>) {
        let Some(node) = self.cluster.nodes.get(id) else { return };
        let (boot, nonce) = (node.record.boot.clone(), node.record.nonce.clone());
        let (drain, cordoned, pods) = (node.record.drain.clone(), node.record.cordoned, node.pods.len());
        let Some(Departure { mut why, within }) = departure else {
            // An agent that has just been started anew may not have looked yet.
            let notice = drain.and_then(|drain| drain.notice);
            let knows =
                |notice: &Notice| notice.nonce == nonce || notice.boot != boot || beat >= LOOKED_BEATS;
            if let Some(notice) = notice.filter(knows) {
                self.note(Note::NodeStays(id.clone()));
                self.cordon(now, id, false);
                self.cordon(now, id, notice.cordoned);
            }
            return;
        };
        why.truncate(why.floor_char_boundary(HUMAN_MESSAGE_BYTES_MAX));
        let deadline = now.wall.plus(within);
        let known = drain.as_ref().and_then(|drain| drain.deadline);
        let same = |known: Timestamp| known <= deadline.plus(SAME) && deadline <= known.plus(SAME);
        // What is told again with every heartbeat is not written again with every one.
        let deadline = known.filter(|known| same(*known)).unwrap_or(deadline);
        let drain = match drain {
            // An operator's own stays his; the machine may go sooner.
            Some(Drain { since, notice: None, .. }) => {
                let deadline = known.map_or(deadline, |known| known.min(deadline));
                Drain { since, deadline: Some(deadline), notice: None }
            }
            Some(Drain { since, notice: Some(before), .. }) => {
                let notice = Some(Notice { why, nonce, boot, ..before });
                Drain { since, deadline: Some(deadline), notice }
            }
            None => {
                self.note(Note::NodeLeaves { node: id.clone(), within, why: why.clone(), pods });
                let notice = Some(Notice { why, nonce, boot, cordoned });
                Drain { since: now.wall, deadline: Some(deadline), notice }
            }
        };
        let told = self.cluster.nodes.get(id).is_some_and(|node| node.record.drain.as_ref() == Some(&drain));
        if !told {
            self.cordon(now, id, true);
            self.begin_drain(now, id, drain);
        }
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

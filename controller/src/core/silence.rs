//! What a node's silence means: online, silent, lost; and when its pods may run elsewhere.

use berth_protocol::ids::{NodeId, PodId};
use berth_protocol::limits::{HEARTBEAT_MS, LEASE_MARGIN_MS, LOST_AFTER_MS};
use berth_protocol::rule::{Rule, kept};
use berth_protocol::units::{BootMs, Millis};

use super::cluster::{Liveness, Node};
use super::lifecycle::Gone;
use super::notes::Note;
use super::timers::Timer;
use super::{Controller, Now};

/// Two heartbeats and some slack for their way.
pub(super) const SILENT_AFTER: Millis = Millis(2 * HEARTBEAT_MS + 2_000);
const LOST_AFTER: Millis = Millis(LOST_AFTER_MS);
const MARGIN: Millis = Millis(LEASE_MARGIN_MS);

impl Controller {
    /// When the pod on this silent node may be replaced (fencing, rule 2); none: only when observed gone.
    fn replaceable(&self, node: &Node, pod: &PodId) -> Option<BootMs> {
        let job = self.cluster.jobs.get(&pod.uid)?;
        let assignment = job.assignment(pod.index)?;
        let mut lease = assignment.lease;
        if !kept(Rule::LeaseOfSpecPlaced) {
            lease = job.file.spec.pod.on_disconnect.lease(job.file.spec.pod.grace);
        }
        if !kept(Rule::ContinueUntilGone) {
            lease = lease.or(Some(Millis::ZERO));
        }
        let given_up = node.record.given_up;
        if given_up.is_some_and(|word| word.powered_off) {
            lease = lease.or(Some(Millis::ZERO));
        }
        let lease_over = node.granted.plus(lease?).plus(MARGIN);
        let lost = given_up.map_or(node.heard.plus(assignment.lost_after), |_| BootMs::ZERO);
        Some(if kept(Rule::ReplaceAfterLease) { lease_over.max(lost) } else { lost })
    }

    /// Arms the node's timer for whatever comes next.
    pub(super) fn watch(&mut self, id: &NodeId, now: Now) {
        let Some(node) = self.cluster.nodes.get(id) else { return };
        let silence = match node.liveness {
            Liveness::Online => Some(node.heard.plus(SILENT_AFTER)),
            Liveness::Silent => Some(node.heard.plus(LOST_AFTER)),
            Liveness::Lost => None,
        };
        let pods = (node.liveness != Liveness::Online)
            .then(|| node.pods.keys().filter_map(|pod| self.replaceable(node, pod)).min())
            .flatten();
        let resend = node.resend.map(|(at, _)| at).filter(|_| node.session.is_some());
        let drain = node.record.drain.as_ref().filter(|_| !node.pods.is_empty());
        let drain = drain.and_then(|drain| drain.deadline).map(|at| now.boot.plus(at.since(now.wall)));
        let mut due = [resend, node.ack, drain].into_iter().flatten().min();
        if self.believes_silence(node) {
            due = [due, silence, pods].into_iter().flatten().min();
        }
        if let Some(at) = due {
            self.timers.arm(Timer::Node(id.clone()), at.max(BootMs(now.boot.0 + 1)));
        }
    }

    pub(super) fn wake_node(&mut self, now: Now, id: &NodeId) {
        let Some(node) = self.cluster.nodes.get(id) else { return };
        if node.ack.is_some_and(|at| at <= now.boot) {
            self.send_lease(now, id);
        }
        self.judge_drain(now, id);
        self.resend_desired(now, id);
        self.judge_silence(now, id);
        self.watch(id, now);
    }

    /// It is the node that says nothing, not the controller that hears nothing.
    fn believes_silence(&self, node: &Node) -> bool {
        self.hears() || node.record.given_up.is_some()
    }

    fn judge_silence(&mut self, now: Now, id: &NodeId) {
        let Some(node) = self.cluster.nodes.get_mut(id) else { return };
        let quiet = now.boot.since(node.heard);
        if node.liveness == Liveness::Online && quiet >= SILENT_AFTER {
            node.liveness = Liveness::Silent;
            let note = Note::NodeSilent { node: id.clone(), pods: node.pods.len() };
            self.note(note);
            self.dirty.states.insert(id.clone());
            self.refresh_room(id);
            self.judge_blindness(now);
        }
        if !self.cluster.nodes.get(id).is_some_and(|node| self.believes_silence(node)) {
            return;
        }
        let Some(node) = self.cluster.nodes.get_mut(id) else { return };
        if node.liveness == Liveness::Silent && quiet >= LOST_AFTER {
            node.liveness = Liveness::Lost;
            let quiet = Millis(quiet.0 / 1000 * 1000);
            let note = Note::NodeLost { node: id.clone(), quiet, pods: node.pods.len() };
            self.note(note);
            self.dirty.states.insert(id.clone());
            self.touch_pods(id);
        }
        let Some(node) = self.cluster.nodes.get(id).filter(|node| node.liveness != Liveness::Online) else {
            return;
        };
        let over = |pod: &PodId| self.replaceable(node, pod).is_some_and(|at| at <= now.boot);
        let over: Vec<PodId> = node.pods.keys().filter(|pod| over(pod)).cloned().collect();
        let quiet = Millis(quiet.0 / 1000 * 1000);
        let message = match node.record.given_up {
            Some(_) => format!("node {id} was given up, silent for {quiet}"),
            None => format!("node {id} was silent for {quiet}"),
        };
        for pod in over {
            // Should the node come back, it stops what it still holds.
            if let Some(node) = self.cluster.nodes.get_mut(id)
                && let Some(epoch) = node.pods.get(&pod)
            {
                node.record.strays.insert(pod.clone(), *epoch);
                self.dirty.nodes.insert(id.clone());
            }
            self.pod_gone(now, &pod, Gone::Vanished { reason: "NodeLost", message: message.clone() });
        }
    }
}

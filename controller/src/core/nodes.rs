//! What nodes say: hello, heartbeat, events, bye. What their silence means is `silence`'s, what they are told `wire`'s.

use std::collections::{BTreeMap, BTreeSet};

use berth_protocol::ids::{Epoch, Generation, NodeId, PodId, Term};
use berth_protocol::limits::{EVENTS_PER_MESSAGE_MAX, LEASE_MARGIN_MS, URL_BYTES_MAX};
use berth_protocol::message::node::{Bye, Events, Heartbeat, Hello, NodeEvent, PodChange, PodEvent};
use berth_protocol::pod::PodPhase;
use berth_protocol::rule::{Rule, kept};
use berth_protocol::sign::PublicKey;
use berth_protocol::units::{BootMs, Millis, Timestamp};

use super::cluster::{Liveness, Node, NodeRecord, Outbox, Output, Session};
use super::lifecycle::Gone;
use super::notes::Note;
use super::session::{cloned, follows, why_withheld};
use super::{Controller, Now};

const MARGIN: Millis = Millis(LEASE_MARGIN_MS);
/// Acknowledgements of events wait this long for others to join them.
const ACK_PAUSE: Millis = Millis(200);
const STATE_PAUSE: Millis = Millis(30_000);

/// A node of which the store knows and this controller has heard nothing yet. It may hold a grant of the controller's
/// last run, so grants count from now.
pub(super) fn forgotten_node(record: NodeRecord, now: Now) -> Node {
    let granted = if kept(Rule::NewLeaderWaits) { now.boot } else { BootMs::ZERO };
    let liveness = if record.given_up.is_some() { Liveness::Lost } else { Liveness::Silent };
    Node {
        record,
        outbox: None,
        liveness,
        session: None,
        heard: now.boot,
        granted,
        last_heartbeat_at: None,
        usage: None,
        pods: BTreeMap::new(),
        held: None,
        unknown: BTreeSet::new(),
        generation: Generation(0),
        reported: (Term(0), Generation(0)),
        resend: None,
        clone_heard: None,
        desired_at: None,
        ack: None,
        specs: BTreeSet::new(),
        version: 0,
        published: None,
        counted: None,
    }
}

impl Controller {
    pub(super) fn hello(&mut self, now: Now, id: &NodeId, hello: Hello, by: Option<PublicKey>) {
        if let Some(why) = self.refused(now, id, &hello, by) {
            return self.turn_away(now, id, &hello, why);
        }
        let doubtful = self.doubtful(id, &hello);
        let inventory = self.believed(id, hello.inventory.clone());
        let record = NodeRecord {
            hardware: hello.hardware.clone(),
            key: by,
            boot: hello.boot.clone(),
            nonce: hello.nonce.clone(),
            previous: hello.previous.clone(),
            heard_us: false,
            session: hello.session,
            inventory,
            cordoned: false,
            drain: None,
            strays: BTreeMap::new(),
            given_up: None,
            unreadable: false,
        };
        let known = self.cluster.nodes.contains_key(id);
        let node =
            self.cluster.nodes.entry(id.clone()).or_insert_with(|| forgotten_node(record.clone(), now));
        let same_ledger = node.outbox.as_ref().is_some_and(|outbox| outbox.ledger == hello.ledger)
            || node.outbox.is_some() && !kept(Rule::EventsNameLedgers);
        let follows = !same_ledger || follows(&node.record, &hello);
        let heard_us = node.record.heard_us && node.record.nonce == hello.nonce;
        let granted = node.granted;
        let stranger = known && !node.record.unreadable && node.record.hardware != hello.hardware;
        if !node.record.inventory.is_but_for_images(&record.inventory) || !known {
            node.version += 1;
        }
        let drain = node.record.drain.take().filter(|_| !stranger);
        let cordoned = node.record.cordoned && !stranger;
        node.record = NodeRecord { cordoned, drain, heard_us, ..record };
        if let Some(outbox) = node.outbox.as_mut().filter(|_| same_ledger) {
            // What another machine, or the same one before its disk was put back, has told is not what this one numbers.
            let acked = if follows { outbox.told(hello.events_acked) } else { hello.events_acked };
            if outbox.set_acked(acked) {
                self.dirty.outboxes.insert(id.clone());
            }
        }
        if !same_ledger {
            node.outbox = Some(Outbox {
                ledger: hello.ledger.clone(),
                acked: hello.events_acked,
                since: (self.config.term, node.generation),
            });
            self.dirty.outboxes.insert(id.clone());
        }
        node.reported = (hello.term, hello.generation);
        node.specs.clear();
        node.held = None;

        let held: BTreeMap<&PodId, Epoch> = hello.pods.iter().map(|held| (&held.pod, held.epoch)).collect();
        let since = node.outbox.as_ref().map(|outbox| outbox.since).unwrap_or_default();
        let applied = |named| (hello.term, hello.generation) >= named || since >= named;
        let jobs = &self.cluster.jobs;
        let named =
            |pod: &PodId| jobs.get(&pod.uid)?.assignment(pod.index).map(|assignment| assignment.named);
        // An order that the agent's ledger never held was never carried out, unless by another session that this one
        // knows nothing of: it still will be, at the same epoch.
        let mut absent: BTreeMap<PodId, Epoch> = node
            .pods
            .iter()
            .filter(|(pod, epoch)| held.get(pod) != Some(epoch))
            .filter(|(pod, _)| known && !(same_ledger && follows) || named(pod).is_some_and(applied))
            .map(|(pod, epoch)| (pod.clone(), *epoch))
            .collect();
        let lease = |pod: &PodId| jobs.get(&pod.uid)?.assignment(pod.index)?.lease;
        let leases: Option<Vec<Millis>> = absent.keys().map(lease).collect();
        let longest = leases.map(|leases| leases.into_iter().max().unwrap_or_default());
        let absent_at =
            if follows { Some(now.boot) } else { longest.map(|lease| granted.plus(lease).plus(MARGIN)) };
        node.unknown.clear();
        for pod in hello.pods.iter().filter(|held| node.pods.get(&held.pod) != Some(&held.epoch)) {
            if !jobs.contains_key(&pod.pod.uid) {
                node.unknown.insert(pod.pod.clone());
            } else {
                node.record.strays.insert(pod.pod.clone(), pod.epoch);
            }
        }
        // The same session again: what it lacked, it still lacks, whatever it was ordered since.
        let again = node.session.take().filter(|session| session.nonce == hello.nonce);
        absent.extend(again.into_iter().flat_map(|session| session.absent));
        let unknown = node.unknown.len();
        node.session = Some(Session {
            nonce: hello.nonce,
            seq: 0,
            beat_at: now.boot,
            answered: None,
            held: None,
            confirmed: (None, now.boot),
            offset: None,
            stalled: None,
            depot: None,
            absent,
            absent_after: hello.events_last,
            absent_at,
            doubtful,
            chunks: hello.chunks.filter(|server| server.url.len() <= URL_BYTES_MAX),
            withheld: None,
        });
        self.dirty.nodes.insert(id.clone());
        self.dirty.desired.insert(id.clone());
        for _ in 0..unknown {
            self.refuse("unknown-pod");
        }
        self.heard_from(now, id);
        self.refresh_room(id);
        self.restock(id);
        self.stage_anew(id);
        self.settle_absent(now, id);
        self.dirty.states.insert(id.clone());
    }

    /// The node is there.
    fn heard_from(&mut self, now: Now, id: &NodeId) {
        let Some(node) = self.cluster.nodes.get_mut(id) else { return };
        node.heard = now.boot;
        if node.record.given_up.take().is_some() {
            self.dirty.nodes.insert(id.clone());
        }
        if node.liveness != Liveness::Online {
            node.liveness = Liveness::Online;
            self.note(Note::NodeOnline(id.clone()));
            self.dirty.states.insert(id.clone());
            self.touch_pods(id);
            self.refresh_room(id);
            self.judge_blindness(now);
        }
        self.watch(id, now);
    }

    /// Pods that the session's scan attests absent are gone, once the events that may tell their end are in.
    fn settle_absent(&mut self, now: Now, id: &NodeId) {
        let Some(node) = self.cluster.nodes.get_mut(id) else { return };
        let (Some(session), Some(outbox)) = (&mut node.session, &node.outbox) else { return };
        if outbox.acked < session.absent_after || session.absent_at.is_none_or(|at| now.boot < at) {
            return;
        }
        let absent = std::mem::take(&mut session.absent);
        for (pod, _) in
            absent.into_iter().filter(|(pod, epoch)| node.pods.get(pod) == Some(epoch)).collect::<Vec<_>>()
        {
            let message = format!("node {id} restarted, and the pod is no longer there");
            self.pod_gone(now, &pod, Gone::Vanished { reason: "NodeRestarted", message });
        }
    }

    pub(super) fn heartbeat(&mut self, now: Now, id: &NodeId, beat: Heartbeat) {
        let lease = self.longest_lease(id);
        let known = self.cluster.nodes.get_mut(id).and_then(|node| node.session.as_mut());
        let Some(session) = known.filter(|session| session.nonce == beat.nonce) else {
            self.ask_hello(id, &beat);
            return;
        };
        if beat.seq <= session.seq {
            self.refuse("stale-heartbeat");
            return;
        }
        session.seq = beat.seq;
        session.beat_at = now.boot;
        session.held = Some(beat.held);
        session.withheld = why_withheld(session, &beat, lease, now);
        if session.depot.is_some_and(|(_, seq)| beat.last_grant.is_none_or(|granted| granted < seq)) {
            // The lease that carried the token was lost, or overtaken.
            session.depot = None;
        }
        let heard_us = session.answered.is_some_and(|seq| beat.last_grant >= Some(seq));
        let Some(node) = self.cluster.nodes.get_mut(id) else { return };
        let cloned = cloned(node, now);
        if let Some(outbox) = &mut node.outbox
            && outbox.set_acked(outbox.told(beat.events_acked))
        {
            self.dirty.outboxes.insert(id.clone());
        }
        if let Some(session) = &mut node.session {
            session.withheld = session.withheld.or(cloned);
        }
        let silent = node.session.as_ref().is_some_and(|session| session.withheld.is_some());
        if heard_us && !node.record.heard_us {
            node.record.heard_us = true;
            self.dirty.nodes.insert(id.clone());
        }
        node.last_heartbeat_at = Some(now.wall);
        node.usage = Some(beat.usage);
        node.reported = (beat.term, beat.generation);
        if node.reported >= (self.config.term, node.generation) {
            node.resend = None;
        } else if node.resend.is_none() {
            node.resend = Some((now.boot, super::wire::RESEND_MIN));
        }
        if node.published.is_none_or(|at| now.boot.since(at) >= STATE_PAUSE) {
            self.dirty.states.insert(id.clone());
        }
        if !silent {
            self.heard_from(now, id);
        }
        self.settle_absent(now, id);
        self.notice(now, id, beat.seq, beat.leaving);
        self.staged(id, (beat.term, beat.generation), &beat.staged);
        self.note_transfers(id, "pulling the image", &beat.pulls);
        self.note_transfers(id, "saving the checkpoint", &beat.saves);
        self.note_transfers(id, "fetching the checkpoint", &beat.restores);
        self.watch(id, now);
        self.send_lease(now, id);
    }

    pub(super) fn bye(&mut self, now: Now, id: &NodeId, bye: Bye) {
        let Some(node) = self.cluster.nodes.get_mut(id) else { return };
        let current = node.session.as_ref().is_some_and(|session| session.nonce == bye.nonce);
        if current && node.liveness == Liveness::Online {
            // A hint: no new pods until it is heard again, and nothing sooner than silence alone would bring.
            node.liveness = Liveness::Silent;
            self.dirty.states.insert(id.clone());
            self.refresh_room(id);
            self.judge_blindness(now);
        }
    }

    pub(super) fn events(&mut self, now: Now, id: &NodeId, message: Events) {
        let Some(node) = self.cluster.nodes.get_mut(id) else { return self.refuse("no-session") };
        let current = node.session.as_ref().is_some_and(|session| session.nonce == message.nonce);
        let Some(outbox) = node.outbox.as_ref().filter(|outbox| current && outbox.ledger == message.ledger)
        else {
            return self.refuse("no-session");
        };
        if message.events.len() > EVENTS_PER_MESSAGE_MAX {
            return self.refuse("oversized");
        }
        let mut acked = outbox.acked;
        for event in message.events {
            // Before: sent again. After a gap: what is missing will be sent again, and this with it.
            if event.n != acked + 1 && kept(Rule::EventsOnce) {
                continue;
            }
            acked = acked.max(event.n);
            match event.event {
                NodeEvent::Pod(change) => self.pod_event(now, id, event.at, change),
                NodeEvent::Inventory(inventory) => self.inventory_changed(id, *inventory),
                NodeEvent::Unknown => self.refuse("unknown-event"),
            }
        }
        let Some(node) = self.cluster.nodes.get_mut(id) else { return };
        if let Some(outbox) = &mut node.outbox
            && outbox.set_acked(acked)
        {
            self.dirty.outboxes.insert(id.clone());
        }
        node.ack.get_or_insert(now.boot.plus(ACK_PAUSE));
        self.settle_absent(now, id);
        self.watch(id, now);
    }

    /// A result counts only for the epoch that is placed here, and for a run not yet passed.
    fn pod_event(&mut self, now: Now, id: &NodeId, at: Timestamp, event: PodEvent) {
        let PodEvent { pod, epoch, run, change } = event;
        match change {
            PodChange::LogStored => return self.log_stored(&pod, epoch),
            PodChange::OutputsStored { digest: Some(digest), bytes, .. } => {
                return self.output_stored(&pod, Output { epoch, digest, bytes, at });
            }
            PodChange::OutputsStored { digest: None, error: Some(why), .. } => {
                return self.outputs_missing(&pod, epoch, why);
            }
            PodChange::OutputsStored { .. } => return,
            _ => {}
        }
        let Some(node) = self.cluster.nodes.get_mut(id) else { return };
        if node.pods.get(&pod) != Some(&epoch) && kept(Rule::ResultsNameEpochs) {
            let ended = matches!(change, PodChange::Ended { .. });
            if ended && node.record.strays.get(&pod) == Some(&epoch) {
                node.record.strays.remove(&pod);
                self.dirty.nodes.insert(id.clone());
                self.dirty.desired.insert(id.clone());
                self.refresh_room(id);
            } else {
                self.refuse("stale-event");
            }
            return;
        }
        let Some(job) = self.cluster.jobs.get_mut(&pod.uid) else { return };
        let Some(assignment) = job.assignment_mut(pod.index).filter(|assignment| assignment.run <= run)
        else {
            return self.refuse("stale-event");
        };
        if assignment.run != run || matches!(change, PodChange::Checkpointing { .. }) {
            assignment.unresumed = None;
        }
        assignment.run = run;
        let phase = match change {
            PodChange::Pulling => PodPhase::Pulling,
            PodChange::Starting => PodPhase::Starting,
            PodChange::Running => PodPhase::Running,
            PodChange::Restoring => PodPhase::Restoring,
            PodChange::Checkpointing { .. } => PodPhase::Checkpointing,
            PodChange::Checkpointed { info } => return self.checkpointed(now, &pod, *info),
            PodChange::CheckpointFailed { level, why } => {
                return self.checkpoint_failed(now, &pod, level, why);
            }
            PodChange::ResumeFailed { why } => {
                assignment.unresumed = Some(why);
                self.dirty.status.insert(pod.uid.clone());
                self.dirty.pods.insert(pod);
                return;
            }
            PodChange::Paused => PodPhase::Paused,
            PodChange::Retrying { outcome, .. } => return self.pod_retrying(now, &pod, &outcome),
            PodChange::Ended { outcome } => return self.pod_gone(now, &pod, Gone::Ended(outcome)),
            PodChange::LogStored | PodChange::OutputsStored { .. } => return,
        };
        let restored = phase == PodPhase::Running && assignment.phase == PodPhase::Restoring;
        assignment.phase = phase;
        assignment.progress = None;
        if phase == PodPhase::Running {
            assignment.started_at.get_or_insert(at);
            if job.run.started_at.is_none() {
                job.run.started_at = Some(at);
                self.dirty.runs.insert(pod.uid.clone());
            }
        }
        if phase == PodPhase::Running && job.pod(pod.index).is_some_and(|pod| !pod.saved.faulty_on.is_empty())
        {
            job.change(pod.index, |pod| pod.saved.faulty_on.clear());
        }
        if restored {
            self.counters.restores += 1;
            job.change(pod.index, |pod| pod.saved.forget_failures());
        }
        self.dirty.status.insert(pod.uid.clone());
        self.count_active(now, &pod.uid);
        self.arm_interval(now, &pod.uid);
        self.dirty.pods.insert(pod);
    }

    /// The node's state shows in the status of its pods' jobs.
    pub(super) fn touch_pods(&mut self, id: &NodeId) {
        if let Some(node) = self.cluster.nodes.get(id) {
            self.dirty.status.extend(node.pods.keys().map(|pod| pod.uid.clone()));
        }
    }

    pub(super) fn refresh_room(&mut self, id: &NodeId) {
        let Some(node) = self.cluster.nodes.get(id) else { return };
        let jobs = &self.cluster.jobs;
        let charges =
            node.pods.keys().filter_map(|pod| Some(&jobs.get(&pod.uid)?.assignment(pod.index)?.charge));
        self.scheduler.refresh(id, node, charges);
    }
}

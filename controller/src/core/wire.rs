//! What nodes are told: desired sets, specs, leases, requests for logs. Says what `cluster` holds, and decides only
//! whether to say it again.

use std::collections::{BTreeMap, BTreeSet};

use berth_protocol::codec;
use berth_protocol::ids::{Digest, Epoch, JobUid, LedgerId, NodeId, PodId, RequestId};
use berth_protocol::limits::{DESIRED_RESEND_MS_MAX, DESIRED_RESEND_MS_MIN};
use berth_protocol::message::node::{
    Covers, DepotAccess, Desired, DesiredPod, Heartbeat, Hello, Lease, NodeRequest, Request, SpecMessage,
    held_digest,
};
use berth_protocol::pod::{Goal, PodPhase};
use berth_protocol::tls::Party;
use berth_protocol::token::{self, Scope};
use berth_protocol::topic::{NodeTopic, Topic};
use berth_protocol::units::Millis;
use serde_json::value::RawValue;

use super::cluster::Node;
use super::timers::Timer;
use super::{Controller, Now};

pub(super) const RESEND_MIN: Millis = Millis(DESIRED_RESEND_MS_MIN);
const RESEND_MAX: Millis = Millis(DESIRED_RESEND_MS_MAX);
/// A depot token's life; renewed at half of it.
const TOKEN_LIFE: Millis = Millis(600_000);

/// Between two new desired sets of one node: what changes in quick succession is told once. They are whole, and hundreds
/// of pods a second may come and go on one node.
const DESIRED_PAUSE: Millis = Millis(10);

impl Controller {
    /// Publishes the desired sets that changed, now or as soon as their pause is over, and asks for the logs of pods that
    /// they name; returns those to be asked for later.
    pub(super) fn send_changed_desired(&mut self, now: Now) -> Vec<(NodeId, PodId, Epoch)> {
        for id in std::mem::take(&mut self.dirty.desired) {
            let Some(node) = self.cluster.nodes.get_mut(&id) else { continue };
            let due = node.desired_at.map_or(now.boot, |at| at.plus(DESIRED_PAUSE));
            if due > now.boot {
                self.timers.arm(Timer::Desired(id), due);
                continue;
            }
            node.desired_at = Some(now.boot);
            self.send_desired(now, &id, true);
        }
        let told = |id: &NodeId| !self.timers.is_armed(&Timer::Desired(id.clone()));
        let follow = std::mem::take(&mut self.dirty.follow);
        let (now_due, later): (Vec<_>, Vec<_>) = follow.into_iter().partition(|(id, ..)| told(id));
        for (node, pod, epoch) in now_due {
            self.request_log(&node, pod, epoch, 1, true);
        }
        later
    }

    /// Publishes the whole desired set, its specs ahead of it. `changed`: it is a new one.
    pub(super) fn send_desired(&mut self, now: Now, id: &NodeId, changed: bool) {
        let Some(node) = self.cluster.nodes.get_mut(id) else { return };
        if changed {
            node.generation = node.generation.next();
            node.resend = Some((now.boot.plus(RESEND_MIN), RESEND_MIN));
        }
        let Some(node) = self.cluster.nodes.get(id) else { return };
        let Some(session) = &node.session else { return };
        let mut desired = Desired {
            store: self.config.store.clone(),
            term: self.config.term,
            generation: node.generation,
            nonce: Some(session.nonce.clone()),
            pods: self.desired_pods(node),
            stage: self.stages(id),
        };
        let topic = Topic::node(id, NodeTopic::Desired);
        if !desired.stage.is_empty() && codec::encode(&topic, &desired).is_err() {
            // What is for later must not keep back what is for now.
            desired.stage.clear();
        }
        // One that has lost its ledger begins nothing anew, and lacks the specs of what it has all the same.
        let lacks_some = (node.reported.0, node.reported.1.next()) == (desired.term, desired.generation);
        let unreported = |pod: &DesiredPod| {
            let assignment =
                self.cluster.jobs.get(&pod.pod.uid).and_then(|job| job.assignment(pod.pod.index));
            // An agent that has begun has the spec; another may not, whatever it reports.
            assignment.is_some_and(|a| lacks_some || a.named > node.reported || a.phase == PodPhase::Assigned)
        };
        let here = desired
            .pods
            .iter()
            .filter(|pod| pod.goal == Goal::Run)
            .filter(|pod| if changed { !node.specs.contains(&pod.spec) } else { unreported(pod) })
            .map(|pod| (pod.spec, &pod.pod.uid));
        let to_come = desired
            .stage
            .iter()
            .filter(|stage| !changed || !node.specs.contains(&stage.spec))
            .map(|stage| (stage.spec, &stage.pod.uid));
        let wanted: BTreeMap<Digest, &JobUid> = here.chain(to_come).collect();
        let specs: Vec<SpecMessage> =
            wanted.into_iter().filter_map(|(digest, uid)| self.spec(uid, digest)).collect();
        let needed: BTreeSet<Digest> = desired
            .pods
            .iter()
            .map(|pod| pod.spec)
            .chain(desired.stage.iter().map(|stage| stage.spec))
            .collect();
        if let Some(node) = self.cluster.nodes.get_mut(id) {
            node.specs.retain(|digest| needed.contains(digest));
            node.specs.extend(specs.iter().map(|spec| spec.digest));
        }
        for spec in &specs {
            self.publish(Topic::node(id, NodeTopic::Spec), spec, false);
        }
        self.publish(topic, &desired, false);
        self.stages_named(&desired.stage, (desired.term, desired.generation));
        // Saves new pods the round trip of a heartbeat: the grant counts from the last one.
        self.send_lease(now, id);
        self.watch(id, now);
    }

    fn desired_pods(&self, node: &Node) -> Vec<DesiredPod> {
        // What is about to count as gone would begin anew by what it was granted before, where a restored store has it.
        let absent =
            |pod: &PodId, epoch| node.session.as_ref().is_some_and(|session| session.lacks(pod, epoch));
        let placed = node.pods.iter().filter(|(pod, epoch)| !absent(pod, **epoch));
        let placed = placed.filter_map(|(pod, epoch)| {
            let assignment = self.cluster.jobs.get(&pod.uid)?.assignment(pod.index)?;
            Some(DesiredPod {
                pod: pod.clone(),
                epoch: *epoch,
                spec: assignment.spec,
                goal: assignment.goal,
                checkpoint: assignment.asked,
                from: assignment.from,
                gpus: assignment.charge.gpus.clone(),
                failures: assignment.failures,
                restarts: assignment.restarts,
            })
        });
        let strays = node.record.strays.iter().filter(|(pod, _)| !node.pods.contains_key(pod));
        let strays = strays.filter_map(|(pod, epoch)| {
            let spec = self.cluster.jobs.get(&pod.uid)?.template;
            Some(DesiredPod {
                pod: pod.clone(),
                epoch: *epoch,
                spec,
                goal: Goal::Stop,
                checkpoint: 0,
                from: None,
                gpus: Vec::new(),
                failures: 0,
                restarts: 0,
            })
        });
        let mut pods: Vec<DesiredPod> = placed.chain(strays).collect();
        pods.sort_by(|a, b| a.pod.cmp(&b.pod));
        pods
    }

    /// The spec's bytes; none of a generation that is gone, whose pods only stop.
    fn spec(&self, uid: &JobUid, digest: Digest) -> Option<SpecMessage> {
        let job = self.cluster.jobs.get(uid).filter(|job| job.template == digest)?;
        let spec: Box<RawValue> = serde_json::value::to_raw_value(&job.file.spec.pod).ok()?;
        Some(SpecMessage { digest, spec })
    }

    pub(super) fn resend_desired(&mut self, now: Now, id: &NodeId) {
        let Some(node) = self.cluster.nodes.get_mut(id) else { return };
        let Some((at, pause)) = node.resend else { return };
        if at <= now.boot && node.session.is_some() {
            node.resend = Some((now.boot.plus(pause), Millis(pause.0 * 2).min(RESEND_MAX)));
            self.send_desired(now, id, false);
        }
    }

    /// Answers the session's last heartbeat, and acknowledges its events.
    pub(super) fn send_lease(&mut self, now: Now, id: &NodeId) {
        let (config, tls) = (&self.config, self.identity_of(Party::Controller));
        let Some(node) = self.cluster.nodes.get_mut(id) else { return };
        let (Some(session), Some(outbox)) = (&mut node.session, &node.outbox) else { return };
        node.ack = None;
        if session.seq == 0 {
            return;
        }
        let (pods, jobs, hold) = (&node.pods, &self.cluster.jobs, self.hold.as_ref());
        let holds = |pod: &PodId| hold.zip(jobs.get(&pod.uid)).and_then(|(hold, job)| hold.holds(job, now));
        let doubtful: BTreeSet<&PodId> = session.doubtful.iter().filter(|pod| holds(pod).is_some()).collect();
        let all =
            *node.held.get_or_insert_with(|| held_digest(pods.iter().map(|(pod, epoch)| (pod, *epoch))));
        let covers = match session.withheld {
            Some(_) => Covers::Pairs(Vec::new()),
            None if session.held == Some(all) && session.absent.is_empty() && doubtful.is_empty() => {
                Covers::All(all)
            }
            // What is about to count as gone must not start again meanwhile, nor what may run elsewhere.
            None => {
                let lacking = |pod: &PodId, epoch| session.lacks(pod, epoch) || doubtful.contains(pod);
                let there = pods.iter().filter(|(pod, epoch)| !lacking(pod, **epoch));
                Covers::Pairs(there.map(|(pod, epoch)| (pod.clone(), *epoch)).collect())
            }
        };
        session.answered.get_or_insert(session.seq);
        if session.withheld.is_none() {
            node.granted = node.granted.max(session.beat_at);
        }
        let fresh = |(expires, _)| now.wall.plus(Millis(TOKEN_LIFE.0 / 2)) < expires;
        let depot = (!session.depot.is_some_and(fresh)).then(|| {
            let expires = now.wall.plus(TOKEN_LIFE);
            session.depot = Some((expires, session.seq));
            let token = token::mint(&config.secret, &Scope::Node(id.clone()), expires);
            DepotAccess { url: config.depot_url.clone(), token, expires, tls: tls.clone(), peer: None }
        });
        let lease = Lease {
            store: config.store.clone(),
            term: config.term,
            nonce: session.nonce.clone(),
            seq: session.seq,
            covers,
            ledger: outbox.ledger.clone(),
            acked: outbox.acked,
            depot,
            hello: false,
            refused: None,
            session: None,
        };
        self.publish(Topic::node(id, NodeTopic::Lease), &lease, false);
    }

    /// Answers a heartbeat of a session that said no hello to this controller: no grant.
    pub(super) fn ask_hello(&mut self, id: &NodeId, beat: &Heartbeat) {
        self.refuse("no-session");
        let outbox = self.cluster.nodes.get(id).and_then(|node| node.outbox.as_ref());
        let known = outbox.map(|outbox| (outbox.ledger.clone(), outbox.acked));
        let (ledger, acked) = known.unwrap_or_else(|| (no_ledger(), 0));
        let lease = Lease {
            store: self.config.store.clone(),
            term: self.config.term,
            nonce: beat.nonce.clone(),
            seq: beat.seq,
            covers: Covers::Pairs(Vec::new()),
            ledger,
            acked,
            depot: None,
            hello: true,
            refused: None,
            session: None,
        };
        self.publish(Topic::node(id, NodeTopic::Lease), &lease, false);
    }

    /// Says to a session that its hello is not taken, and why: nothing is granted, nothing acknowledged.
    pub(super) fn tell_refused(&mut self, id: &NodeId, hello: &Hello, why: &str, session: Option<u64>) {
        let lease = Lease {
            store: self.config.store.clone(),
            term: self.config.term,
            nonce: hello.nonce.clone(),
            seq: 0,
            covers: Covers::Pairs(Vec::new()),
            ledger: no_ledger(),
            acked: 0,
            depot: None,
            hello: false,
            refused: Some(why.to_owned()),
            session,
        };
        self.publish(Topic::node(id, NodeTopic::Lease), &lease, false);
    }

    /// Asks the node for a pod's log from a record on.
    pub(super) fn request_log(&mut self, id: &NodeId, pod: PodId, epoch: Epoch, from_seq: u64, follow: bool) {
        let Ok(request) = RequestId::parse(&format!("log-{:x}", self.draw())) else { return };
        let session = self.cluster.nodes.get(id).and_then(|node| node.session.as_ref());
        let nonce = session.map(|session| session.nonce.clone());
        let request =
            NodeRequest { id: request, nonce, request: Request::Logs { pod, epoch, from_seq, follow } };
        self.publish(Topic::node(id, NodeTopic::Request), &request, false);
    }
}

/// Acknowledges nothing, where no ledger is known yet.
fn no_ledger() -> LedgerId {
    LedgerId::parse("none").expect("a literal that is a token")
}

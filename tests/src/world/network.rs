//! What becomes of messages on their way, and what users make of those for them.

use berth_agent::core::{Action, Event as AgentEvent};
use berth_protocol::codec;
use berth_protocol::ids::SessionNonce;
use berth_protocol::message::node::{Covers, Desired, Lease, SpecMessage};
use berth_protocol::message::user::{Answer, JobStatus, Verdict};
use berth_protocol::topic::{JobTopic, NodeTopic, Topic};

use super::faults::Jam;
use super::{Due, World};
use crate::node::{Out, change_digit};

/// One in so many comes as another than it was.
const SPECS_PER_CHANGED: u64 = 16;

/// A machine's way to the controller and back.
pub(super) struct Link {
    /// Streams of chance for what goes to the node and what comes from it.
    pub to: fastrand::Rng,
    from: fastrand::Rng,
    pub cut: bool,
    /// Is not heard.
    pub mute: bool,
    /// Hears nothing, for ever.
    pub deaf: bool,
    /// Does not return.
    pub burnt: bool,
    pub noticed: bool,
    /// On this controller's half of the broker: no other one hears it, or is heard.
    pub side: Option<usize>,
    /// What the network holds back, while it does.
    pub jam: Option<Jam>,
    /// Of the bus.
    pub session: u64,
    /// The agent's session of which the controller that runs knows the clock.
    pub answered: Option<SessionNonce>,
    /// What happened on the machine or came to it while that was paused.
    pub asleep: Vec<Due>,
}

impl Link {
    pub fn new(rng: &mut fastrand::Rng) -> Self {
        Self {
            to: rng.fork(),
            from: rng.fork(),
            cut: false,
            mute: false,
            deaf: false,
            burnt: false,
            noticed: false,
            side: None,
            jam: None,
            session: 0,
            answered: None,
            asleep: Vec::new(),
        }
    }
}

/// Delays in the network: short as a rule, now and then long, so that messages overtake each other.
pub(super) fn delay(rng: &mut fastrand::Rng, calm: bool) -> u64 {
    match rng.u8(..) {
        _ if calm => rng.u64(1..20),
        0..200 => rng.u64(1..20),
        200..250 => rng.u64(20..1_000),
        _ => rng.u64(1_000..15_000),
    }
}

/// When the copies of a message arrive that do.
fn arrivals(rng: &mut fastrand::Rng, calm: bool) -> Vec<u64> {
    let copies = match rng.u8(..) {
        _ if calm => 1,
        0..20 => 0,
        20..40 => 2,
        _ => 1,
    };
    (0..copies).map(|_| delay(rng, calm)).collect()
}

impl World {
    /// A user's message.
    pub(crate) fn send(&mut self, topic: Topic, payload: Vec<u8>) {
        let arrivals = arrivals(&mut self.users, self.calm);
        self.send_so(topic, payload, arrivals);
    }

    fn send_so(&mut self, topic: Topic, payload: Vec<u8>, arrivals: Vec<u64>) {
        self.note(|| format!("-> {topic} {}", String::from_utf8_lossy(&payload[..payload.len().min(300)])));
        for delay in arrivals {
            let at = self.now_ms + delay;
            self.at(at, Due::ToController { topic: topic.clone(), payload: payload.clone() });
        }
    }

    pub(super) fn perform(&mut self, node: usize, out: Vec<Out>) {
        for out in out {
            let action = match out {
                Out::Later { ms, event } => {
                    let at = self.now_ms + ms;
                    self.at(at, Due::Local { node, event });
                    continue;
                }
                Out::Send(action) => action,
            };
            let kind = match &action {
                Action::Hello(_) => NodeTopic::Hello,
                Action::Heartbeat(_) => NodeTopic::Heartbeat,
                _ => NodeTopic::Event,
            };
            let topic = Topic::node(&self.nodes[node].id, kind);
            let payload = match action {
                Action::Hello(hello) => codec::encode(&topic, &*hello),
                Action::Heartbeat(heartbeat) => codec::encode(&topic, &*heartbeat),
                Action::Events(events) => codec::encode(&topic, &events),
                _ => continue,
            };
            let link = &mut self.links[node];
            let arrivals = arrivals(&mut link.from, self.calm);
            let lost = link.cut || link.mute || link.jam.as_ref().is_some_and(|jam| jam.mute);
            if let (Ok(payload), false) = (payload, lost) {
                self.send_so(topic, payload, arrivals);
            }
        }
    }

    pub(super) fn published(&mut self, seat: usize, topic: Topic, payload: Vec<u8>) -> Result<(), String> {
        match &topic {
            Topic::Node { node, kind } => {
                self.note(|| {
                    format!("<- {topic} {}", String::from_utf8_lossy(&payload[..payload.len().min(1_200)]))
                });
                let here = |n: &usize| {
                    self.nodes[*n].id == *node && self.links[*n].side.is_none_or(|side| side == seat)
                };
                for n in (0..self.nodes.len()).filter(here).collect::<Vec<_>>() {
                    self.publish_to(n, *kind, &topic, &payload)?;
                }
            }
            Topic::Job { job, kind: JobTopic::Answer, .. } => {
                let answer: Answer = codec::decode(&topic, &payload).map_err(|error| error.to_string())?;
                if answer.id.is_some() {
                    // A wish may be one that cannot be granted.
                    return Ok(());
                }
                match answer.verdict {
                    Verdict::Accepted { .. } => {
                        self.oracle.accepted(job.as_str());
                        let name = job.as_str().to_owned();
                        let done = self.jobs.iter().position(|candidate| candidate.name == name);
                        self.due.retain(|_, due| !matches!(due, Due::Submit(n) if Some(*n) == done));
                    }
                    // Its file has come before.
                    Verdict::Rejected { rejected } if rejected.code == "Overtaken" => {}
                    Verdict::Rejected { rejected } => return Err(format!("{job} rejected: {rejected:?}")),
                }
            }
            Topic::Job { job, kind: JobTopic::Status, .. } if !payload.is_empty() => {
                let status: JobStatus = codec::decode(&topic, &payload).map_err(|error| error.to_string())?;
                let line = format!("{job} {:?} {:?}", status.phase, status.message);
                self.note(|| line);
                let forgives = self.jobs.iter().find(|known| known.name == job.as_str());
                let forgives = forgives.and_then(|job| job.forgives);
                self.oracle.status(job.as_str(), status, forgives, &self.nodes)?;
            }
            _ => {}
        }
        Ok(())
    }

    fn publish_to(&mut self, n: usize, kind: NodeTopic, topic: &Topic, payload: &[u8]) -> Result<(), String> {
        let link = &mut self.links[n];
        let (arrivals, session) = (arrivals(&mut link.to, self.calm), link.session);
        let Some(event) = read(kind, topic, payload) else { return Ok(()) };
        if let AgentEvent::Lease(lease) = &event
            && !lease.hello
            && lease.refused.is_none()
        {
            self.links[n].answered = Some(lease.nonce.clone());
        }
        if let AgentEvent::Lease(lease) = &event
            && !matches!(&lease.covers, Covers::Pairs(pairs) if pairs.is_empty())
        {
            let (node, now_ms) = (&mut self.nodes[n], self.now_ms);
            let broke = node.clock_broke.as_ref();
            if broke.is_some_and(|(nonce, from)| lease.nonce == *nonce && lease.seq >= *from) {
                if !node.is_fenced(now_ms) {
                    return Err(format!("{} was granted time by a clock that stood still", node.id));
                }
                // What its clock says now is as good as any.
                node.clock_broke = None;
            }
            node.granted(now_ms);
        }
        for delay in arrivals {
            let mut payload = payload.to_vec();
            if kind == NodeTopic::Spec && self.sequence.is_multiple_of(SPECS_PER_CHANGED) && !self.calm {
                change_digit(&mut payload, self.sequence);
            }
            let Some(event) = read(kind, topic, &payload) else { continue };
            let at = self.now_ms + delay;
            let session = (self.links[n].to.u8(0..4) > 0).then_some(session);
            self.at(at, Due::ToNode { node: n, session, event });
        }
        Ok(())
    }
}

/// What a node makes of the controller's message.
fn read(kind: NodeTopic, topic: &Topic, payload: &[u8]) -> Option<AgentEvent> {
    match kind {
        NodeTopic::Desired => codec::decode::<Desired>(topic, payload).ok().map(AgentEvent::Desired),
        NodeTopic::Lease => codec::decode::<Lease>(topic, payload).ok().map(AgentEvent::Lease),
        NodeTopic::Spec => {
            let message: SpecMessage = codec::decode(topic, payload).ok()?;
            let template = message.is_whole().then(|| serde_json::from_str(message.spec.get()).ok())??;
            Some(AgentEvent::Spec { digest: message.digest, template })
        }
        _ => None,
    }
}

//! Which sessions of agents are believed, and which of their heartbeats are granted anything.

use berth_protocol::ids::{Epoch, Generation, LedgerId, NodeId, PodId, SessionNonce, Term};
use berth_protocol::limits::{LEASE_MARGIN_MS, LOST_AFTER_MS};
use berth_protocol::message::node::{Heartbeat, Hello};
use berth_protocol::rule::{Rule, kept};
use berth_protocol::sign::PublicKey;
use berth_protocol::units::Millis;
use serde::{Deserialize, Serialize};

use super::cluster::{Node, NodeRecord, Session};
use super::notes::Note;
use super::{Controller, Now};

const LOST_AFTER: Millis = Millis(LOST_AFTER_MS);
const MARGIN: Millis = Millis(LEASE_MARGIN_MS);
/// A clock may drift by one part in this many before it counts as having stopped.
const DRIFT_PARTS: u64 = 1_000;

/// Another machine uses the node's identity.
pub(super) const CLONED: &str = "cloned-node";
/// It says that it is the node, and has another key.
pub(super) const OTHER_KEY: &str = "other-key";
/// It has the key too, and another ledger.
const OTHER_LEDGER: &str = "other-ledger";
const OTHER_HARDWARE: &str = "other-hardware";
/// Its session was begun before the recorded one, and may be of a time before it.
const STALE: &str = "stale-hello";
/// Once a heartbeat came, an older scan says nothing new.
const REPEATED: &str = "repeated-hello";
/// It may be from before the store was restored, and what it names may have ended since: that would begin anew. One said since
/// will come, when a heartbeat is answered.
const UNHEARING: &str = "unhearing-hello";
/// Another store's node would obey none of our orders; its agent says so, and how to enrol it anew.
const OTHER_STORE: &str = "other-store";

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Liveness {
    Online,
    /// Takes no new pods.
    Silent,
    /// Its pods are replaced as their leases end.
    Lost,
}

/// How far a node's outbox is in; stored with every effect of its events.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Outbox {
    pub ledger: LedgerId,
    pub acked: u64,
    /// What was ordered up to here may have been carried out by the ledger before.
    #[serde(default)]
    pub since: (Term, Generation),
}

impl Outbox {
    /// How far it is in, by what the agent says of it. Events of which this one does not know were acknowledged by a controller
    /// whose store had more than this one, a backup, has: the agent keeps them no longer, they are lost, and waiting for
    /// them would be waiting for ever.
    pub fn told(&self, acked: u64) -> u64 {
        self.acked.max(acked)
    }

    /// False: it was so.
    pub fn set_acked(&mut self, acked: u64) -> bool {
        std::mem::replace(&mut self.acked, acked) != acked
    }
}

impl Session {
    /// Is this very epoch of the pod about to count as gone here? One that was placed since is another.
    pub fn lacks(&self, pod: &PodId, epoch: Epoch) -> bool {
        self.absent.get(pod) == Some(&epoch)
    }
}

/// Is this the recorded session, or a later one of the same agent (fencing, rule 15)? It names those in which it heard from
/// the controller: the recorded one is the last of them, or, as long as that has not heard anything, the one before is. More
/// than one lies between where the record comes from a backup.
pub(super) fn follows(record: &NodeRecord, hello: &Hello) -> bool {
    let names =
        |nonce: &SessionNonce| hello.previous.as_ref() == Some(nonce) || hello.earlier.contains(nonce);
    let before = || record.previous.as_ref().map_or(hello.previous.is_none(), names);
    hello.nonce == record.nonce || names(&record.nonce) || !record.heard_us && before()
}

/// Both of two machines of one identity wait until one of them is gone.
pub(super) fn cloned(node: &Node, now: Now) -> Option<&'static str> {
    let both = node.clone_heard.is_some_and(|at| now.boot.since(at) < LOST_AFTER);
    both.then_some(
        "another machine uses its identity, a copy of its disk as it seems: switch one of them off",
    )
}

impl Controller {
    /// Why a hello, signed with this key, is not taken.
    pub(super) fn refused(
        &self,
        now: Now,
        id: &NodeId,
        hello: &Hello,
        by: Option<PublicKey>,
    ) -> Option<&'static str> {
        let known = self.cluster.nodes.get(id).and_then(|node| refusal(node, hello, by, now));
        let foreign = || hello.store.as_ref().is_some_and(|store| *store != self.config.store);
        let unhearing = || hello.heard.is_some_and(|heard| heard < self.config.term);
        known
            .or_else(|| foreign().then_some(OTHER_STORE))
            .or_else(|| (self.cluster.restored.is_some() && unhearing()).then_some(UNHEARING))
    }

    /// A hello is not taken: it is counted, and its sender told where it cannot know.
    pub(super) fn turn_away(&mut self, now: Now, id: &NodeId, hello: &Hello, why: &'static str) {
        if why == CLONED {
            self.heard_clone(now, id);
        }
        if let Some(words) = told(why) {
            let record = self.cluster.nodes.get(id).map(|node| &node.record);
            let later = record.filter(|known| {
                matches!(why, STALE | CLONED) && known.nonce != hello.nonce && known.session >= hello.session
            });
            let session = later.map(|known| known.session);
            self.tell_refused(id, hello, words, session);
        }
        self.refuse(why);
    }

    /// Of those of the node's pods that stand still or end without a grant; no less than what pods have by default.
    pub(super) fn longest_lease(&self, id: &NodeId) -> Millis {
        let pods = self.cluster.nodes.get(id).into_iter().flat_map(|node| node.pods.keys());
        let lease = |pod: &PodId| self.cluster.jobs.get(&pod.uid)?.assignment(pod.index)?.lease;
        pods.filter_map(lease).max().unwrap_or_default().max(LOST_AFTER)
    }

    /// Another machine says that it is this node, while this one is there.
    fn heard_clone(&mut self, now: Now, id: &NodeId) {
        let Some(node) = self.cluster.nodes.get_mut(id) else { return };
        let known = cloned(node, now).is_some();
        node.clone_heard = Some(now.boot);
        if !known {
            self.note(Note::NodeCloned(id.clone()));
            self.dirty.states.insert(id.clone());
        }
    }
}

/// What an agent is told whose hello is not taken; none: it finds out by itself, or need not know.
fn told(refusal: &str) -> Option<&'static str> {
    match refusal {
        CLONED => Some(
            "another machine uses this node's identity, a copy of its disk as it seems: switch one of them off",
        ),
        OTHER_KEY | OTHER_LEDGER => Some(
            "another agent has this node's name: give this one another with --node. Where it takes that one's place, as \
             with a new data directory, it is taken a minute after the other was heard last",
        ),
        STALE => Some(
            "a later session of it is known, as where its disk was put back or copied: it counts on from there",
        ),
        OTHER_HARDWARE => Some(
            "another machine has this node's name, and pods: give this one another with --node, or drain that one first",
        ),
        _ => None,
    }
}

/// The same of a known node's, by what is known of that.
fn refusal(node: &Node, hello: &Hello, by: Option<PublicKey>, now: Now) -> Option<&'static str> {
    let same_ledger = node.outbox.as_ref().is_some_and(|outbox| outbox.ledger == hello.ledger);
    if node.record.unreadable {
        // Which machine it was is not known. Its ledger tells, where that is.
        return (!same_ledger && !node.pods.is_empty()).then_some(OTHER_HARDWARE);
    }
    // One that said goodbye and has no pods is not missed; of one with pods, the grants may hold as long as this. What
    // has lost its ledger, and what is a copy that has, look the same.
    let there = node.liveness == Liveness::Online || !node.pods.is_empty();
    if there && now.boot.since(node.heard) < LOST_AFTER {
        if node.record.has_other_key(by) {
            return Some(OTHER_KEY);
        }
        if !same_ledger && node.outbox.is_some() {
            return Some(OTHER_LEDGER);
        }
    }
    if node.record.hardware != hello.hardware {
        // A name that another machine took: only once nothing of the first can run.
        return (!node.pods.is_empty()).then_some(OTHER_HARDWARE);
    }
    if !same_ledger {
        return None;
    }
    if hello.session < node.record.session {
        return Some(STALE);
    }
    // A controller that has just begun does not know whether the recorded session lives. One that has been answered and says
    // hello anew does.
    let live = match &node.session {
        Some(session) => {
            session.nonce == node.record.nonce
                && (session.seq > 0 || node.record.heard_us)
                && now.boot.since(session.beat_at) < LOST_AFTER
        }
        None => now.boot.since(node.heard) < LOST_AFTER,
    };
    let equal = hello.session == node.record.session && hello.nonce != node.record.nonce;
    if equal || live && !follows(&node.record, hello) {
        return Some(CLONED);
    }
    // Repeated by an agent that no lease has reached yet.
    let heard = node.session.as_ref().is_some_and(|session| session.nonce == hello.nonce && session.seq > 0);
    heard.then_some(REPEATED)
}

/// Why a session gets no grant for a heartbeat (fencing, rules 9 and 10). `lease`: the longest of its pods.
pub(super) fn why_withheld(
    session: &mut Session,
    beat: &Heartbeat,
    lease: Millis,
    now: Now,
) -> Option<&'static str> {
    if beat.last_grant > session.confirmed.0 {
        session.confirmed = (beat.last_grant, now.boot);
    } else if now.boot.since(session.confirmed.1) >= LOST_AFTER && kept(Rule::OneWayLoss) {
        return Some("no lease has reached it: the way from the controller to it is broken");
    }
    let offset = i128::from(now.boot.0) - i128::from(beat.boot_ms.0);
    let least = session
        .offset
        .map_or(offset, |(least, at)| offset.min(least + i128::from(now.boot.since(at).0 / DRIFT_PARTS)));
    session.offset = Some((least, now.boot));
    let lag = offset - least;
    if lag <= i128::from(MARGIN.0 / 2) || !kept(Rule::ClockWatched) {
        session.stalled = None;
        return None;
    }
    let (since, longest) = session.stalled.unwrap_or((beat.boot_ms, lease));
    let longest = longest.max(lease);
    if beat.boot_ms.since(since) >= Millis(longest.0 + MARGIN.0) {
        // By its own clock too all that was granted before is over. What that clock says now is as good as any.
        session.offset = Some((offset, now.boot));
        session.stalled = None;
        return None;
    }
    session.stalled = Some((since, longest));
    Some("its clock stood still, or its heartbeats are delayed")
}

//! Which sessions of agents are believed, and which of their heartbeats are granted anything.

use berth_protocol::limits::{LEASE_MARGIN_MS, LOST_AFTER_MS};
use berth_protocol::message::node::{Heartbeat, Hello};
use berth_protocol::rule::{Rule, kept};
use berth_protocol::units::Millis;

use super::Now;
use super::cluster::{Node, Session};

const LOST_AFTER: Millis = Millis(LOST_AFTER_MS);
const MARGIN: Millis = Millis(LEASE_MARGIN_MS);
/// A clock may drift by one part in this many before it counts as having stopped.
const DRIFT_PARTS: u64 = 1_000;

/// Why a known node's hello is not taken.
pub(super) fn refusal(node: &Node, hello: &Hello) -> Option<&'static str> {
    let same_ledger = node.outbox.as_ref().is_some_and(|outbox| outbox.ledger == hello.ledger);
    if node.record.damaged {
        // Which machine it was is not known. Its ledger tells, where that is.
        return (!same_ledger && !node.pods.is_empty()).then_some("other-hardware");
    }
    if node.record.hardware != hello.hardware {
        // A name that another machine took: only once nothing of the first can run.
        return (!node.pods.is_empty()).then_some("other-hardware");
    }
    if !same_ledger {
        return None;
    }
    if hello.session < node.record.session {
        return Some("stale-hello");
    }
    if hello.session == node.record.session && hello.nonce != node.record.nonce {
        return Some("cloned-node");
    }
    // Repeated by an agent that no lease has reached yet; once a heartbeat came, an older scan says nothing new.
    let heard = node.session.as_ref().is_some_and(|session| session.nonce == hello.nonce && session.seq > 0);
    heard.then_some("stale-hello")
}

/// Why a session gets no grant for a heartbeat (fencing, rules 9 and 10).
pub(super) fn why_withheld(session: &mut Session, beat: &Heartbeat, now: Now) -> Option<&'static str> {
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
    (lag > i128::from(MARGIN.0 / 2) && kept(Rule::ClockWatched))
        .then_some("its clock stood still, or its heartbeats are delayed")
}

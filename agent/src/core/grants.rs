//! Which (pod, epoch) may run, and until when. A grant counts from the moment the heartbeat that it answers was
//! made, so that the agent's side of a lease always ends before the controller's.

use std::collections::{BTreeMap, VecDeque};

use berth_protocol::ids::{Digest, SessionNonce};
use berth_protocol::limits::PODS_PER_NODE_MAX;
use berth_protocol::message::node::{Covers, Lease};
use berth_protocol::rule::{Rule, kept};
use berth_protocol::units::BootMs;

use super::ledger::PodKey;

/// Heartbeats that a grant may still answer.
const HEARTBEATS_REMEMBERED: usize = 16;

#[derive(Debug)]
struct Sent {
    seq: u64,
    at: BootMs,
    digest: Digest,
    held: Vec<PodKey>,
}

/// Heartbeats sent and grants received within one session.
#[derive(Debug, Default)]
pub struct Grants {
    seq: u64,
    sent: VecDeque<Sent>,
    last_grant: Option<u64>,
    /// When the heartbeat was made that last granted each.
    granted: BTreeMap<PodKey, BootMs>,
}

impl Grants {
    /// Numbers a heartbeat made now that names these pods.
    pub fn sent(&mut self, at: BootMs, digest: Digest, held: Vec<PodKey>) -> u64 {
        self.seq += 1;
        if self.sent.len() == HEARTBEATS_REMEMBERED {
            self.sent.pop_front();
        }
        self.sent.push_back(Sent { seq: self.seq, at, digest, held });
        self.seq
    }

    /// Takes a lease in; returns the pods whose grant grew. `None`: it answers nothing that this session asked.
    pub fn receive(&mut self, now: BootMs, nonce: &SessionNonce, lease: &Lease) -> Option<Vec<PodKey>> {
        if lease.nonce != *nonce {
            return None;
        }
        let sent = self.sent.iter().find(|sent| sent.seq == lease.seq)?;
        let covered: Vec<PodKey> = match &lease.covers {
            _ if !kept(Rule::GrantsNameEpochs) => sent.held.clone(),
            Covers::All(digest) if *digest == sent.digest => sent.held.clone(),
            Covers::All(_) => return None,
            // These may be pods that the heartbeat did not know yet: they come with the orders beside this lease.
            Covers::Pairs(pairs) => {
                pairs.iter().take(PODS_PER_NODE_MAX).map(|(pod, epoch)| PodKey::new(pod, *epoch)).collect()
            }
        };
        if self.granted.len() > 4 * PODS_PER_NODE_MAX {
            // Grants for pods that never came.
            self.granted.retain(|key, _| sent.held.contains(key));
        }
        let at = if kept(Rule::GrantsCountFromSend) { sent.at } else { now };
        self.last_grant = self.last_grant.max(Some(lease.seq));
        let mut grown = Vec::new();
        for key in covered {
            let since = self.granted.entry(key.clone()).or_insert(BootMs::ZERO);
            if *since < at {
                *since = at;
                grown.push(key);
            }
        }
        Some(grown)
    }

    /// When the last grant of this pod was asked for.
    pub fn since(&self, key: &PodKey) -> Option<BootMs> {
        self.granted.get(key).copied()
    }

    pub fn forget(&mut self, key: &PodKey) {
        self.granted.remove(key);
    }

    pub fn last_grant(&self) -> Option<u64> {
        self.last_grant
    }

    /// No grant has come since the last heartbeat went out.
    pub fn is_unanswered(&self) -> bool {
        self.seq > 0 && self.last_grant != Some(self.seq)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use berth_protocol::ids::{Epoch, JobUid, LedgerId, StoreId, Term};
    use berth_protocol::message::node::held_digest;

    fn nonce(text: &str) -> SessionNonce {
        SessionNonce::parse(text).unwrap()
    }

    fn key(index: u32, epoch: u64) -> PodKey {
        PodKey::new(&JobUid::parse("u").unwrap().pod(index), Epoch(epoch))
    }

    fn lease(nonce: &SessionNonce, seq: u64, covers: Covers) -> Lease {
        Lease {
            store: StoreId::parse("s").unwrap(),
            term: Term(1),
            nonce: nonce.clone(),
            seq,
            covers,
            ledger: LedgerId::parse("l").unwrap(),
            acked: 0,
            depot: None,
            hello: false,
            refused: None,
            session: None,
        }
    }

    fn digest(keys: &[PodKey]) -> Digest {
        held_digest(keys.iter().map(|key| (&key.pod, key.epoch)))
    }

    #[test]
    fn a_grant_counts_from_the_send_of_the_heartbeat_that_it_answers() {
        let (me, held) = (nonce("a"), vec![key(0, 1), key(1, 4)]);
        let mut grants = Grants::default();
        let first = grants.sent(BootMs(100), digest(&held), held.clone());
        let second = grants.sent(BootMs(200), digest(&held), held.clone());
        assert_eq!(
            grants.receive(BootMs(9_999), &me, &lease(&me, second, Covers::All(digest(&held)))),
            Some(held.clone())
        );
        // A late answer to the first takes nothing away and adds nothing.
        assert_eq!(
            grants.receive(BootMs(9_999), &me, &lease(&me, first, Covers::All(digest(&held)))),
            Some(vec![])
        );
        assert_eq!(grants.since(&held[0]), Some(BootMs(200)));
    }

    #[test]
    fn what_was_not_asked_is_not_granted() {
        let (me, held) = (nonce("a"), vec![key(0, 1)]);
        let mut grants = Grants::default();
        let seq = grants.sent(BootMs(100), digest(&held), held.clone());
        assert_eq!(
            grants.receive(BootMs(9_999), &me, &lease(&nonce("b"), seq, Covers::All(digest(&held)))),
            None
        );
        assert_eq!(
            grants.receive(BootMs(9_999), &me, &lease(&me, seq + 1, Covers::All(digest(&held)))),
            None
        );
        assert_eq!(
            grants.receive(BootMs(9_999), &me, &lease(&me, seq, Covers::All(digest(&[key(0, 2)])))),
            None
        );
        let pairs = Covers::Pairs(vec![(key(0, 2).pod, Epoch(2))]);
        assert_eq!(grants.receive(BootMs(9_999), &me, &lease(&me, seq, pairs)), Some(vec![key(0, 2)]));
        assert_eq!((grants.since(&held[0]), grants.since(&key(0, 2))), (None, Some(BootMs(100))));
    }
}

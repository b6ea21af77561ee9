//! Who belongs to the cluster, for those parts of `io` that let in or turn away. The loop keeps it as the core says.

use std::collections::BTreeMap;
use std::sync::{PoisonError, RwLock};

use berth_protocol::ids::Namespace;
use berth_protocol::join::Role;
use berth_protocol::tls::{Party, Peer};
use tokio::sync::watch;

use crate::core::members::Member;

#[derive(Default)]
pub struct Members {
    known: RwLock<BTreeMap<Party, Member>>,
    /// Counts those that have gone, or are somewhat else now: their connections end.
    gone: watch::Sender<u64>,
}

impl Members {
    /// Is it who the cluster knows by that name?
    pub fn knows(&self, peer: &Peer) -> bool {
        self.with(peer, |_| true)
    }

    pub fn is_admin(&self, peer: &Peer) -> bool {
        self.with(peer, |member| member.admin)
    }

    fn with(&self, peer: &Peer, is: impl FnOnce(&Member) -> bool) -> bool {
        let known = self.known.read().unwrap_or_else(PoisonError::into_inner);
        known.get(&peer.party).is_some_and(|member| member.key == peer.key && is(member))
    }

    pub fn role(&self, peer: &Peer, namespace: &Namespace) -> Option<Role> {
        let known = self.known.read().unwrap_or_else(PoisonError::into_inner);
        known.get(&peer.party).filter(|member| member.key == peer.key)?.role(namespace)
    }

    /// None: it does not belong any more.
    pub fn set(&self, party: Party, member: Option<Member>) {
        let mut known = self.known.write().unwrap_or_else(PoisonError::into_inner);
        let before = match member {
            Some(member) => known.insert(party, member),
            None => known.remove(&party),
        };
        drop(known);
        if before.is_some() {
            self.gone.send_modify(|count| *count += 1);
        }
    }

    /// Ends once the peer is known no more, or may do more or less than now: what it was let hear is to be asked for anew.
    pub async fn until_changed(&self, peer: &Peer) {
        let mut gone = self.gone.subscribe();
        let now = self.get(peer);
        while now.is_some() && self.get(peer) == now && gone.changed().await.is_ok() {}
    }

    fn get(&self, peer: &Peer) -> Option<Member> {
        let known = self.known.read().unwrap_or_else(PoisonError::into_inner);
        known.get(&peer.party).filter(|member| member.key == peer.key).cloned()
    }
}

//! Machines that wait for an admin's word: their token alone does not let them in. Of each token at most one waits, the first
//! that showed it; the key that it showed then is the one that is approved.

use core::net::IpAddr;

use berth_protocol::ids::NodeId;
use berth_protocol::join::{Approval, InvitationId, JoinRequest, MustWait, WaitingStatus};
use berth_protocol::limits::WAITING_MS;
use berth_protocol::sign::PublicKey;
use berth_protocol::tls::Party;
use berth_protocol::units::{Millis, Timestamp};
use serde::{Deserialize, Serialize};

use super::callers::Actor;
use super::manage::NotChanged;
use super::members::{Invitation, Joined, NotJoined};
use super::notes::Note;
use super::{Controller, Now, Write, records};

/// Stored, with the invitation that it has shown.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Waiting {
    pub node: NodeId,
    pub key: PublicKey,
    pub since: Timestamp,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from: Option<IpAddr>,
    #[serde(default)]
    pub approved: bool,
}

impl Waiting {
    pub fn status(&self) -> WaitingStatus {
        let Self { node, key, since, from, approved } = self.clone();
        WaitingStatus { node, fingerprint: key.fingerprint(), since, from, approved }
    }
}

/// What becomes of one that shows an invitation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Admission {
    Joins(Party),
    Waits(MustWait),
}

impl Controller {
    /// Of one that might belong as `party`: at once, or once an admin has said so.
    pub(super) fn admission(
        &self,
        now: Now,
        invitation: &Invitation,
        party: Party,
        request: &JoinRequest,
    ) -> Result<Admission, NotJoined> {
        let node = match &party {
            Party::Node(node) if invitation.approve => node.clone(),
            _ => return Ok(Admission::Joins(party)),
        };
        let Some(waiting) = &invitation.waiting else {
            if self.waiting(&node).is_some() {
                return Err(NotJoined::NameWaits(node));
            }
            return Ok(Admission::Waits(MustWait { node, until: now.wall.plus(Millis(WAITING_MS)) }));
        };
        if waiting.key != request.key {
            return Err(NotJoined::TokenWaits);
        }
        if waiting.node != node {
            return Err(NotJoined::Other(Party::Node(waiting.node.clone())));
        }
        let until = invitation.expires;
        Ok(if waiting.approved {
            Admission::Joins(party)
        } else {
            Admission::Waits(MustWait { node, until })
        })
    }

    fn waiting(&self, node: &NodeId) -> Option<(&InvitationId, &Waiting)> {
        let all = self.cluster.invitations.iter();
        let mut waiting = all.filter_map(|(id, invitation)| Some((id, invitation.waiting.as_ref()?)));
        waiting.find(|(_, waiting)| waiting.node == *node)
    }

    /// As `may_join` has said. It says so again whenever it is asked.
    pub(super) fn waits(&mut self, now: Now, actor: &Actor, joined: Joined) {
        let Joined { id, party: Party::Node(node), key } = joined else { return };
        let invitation = self.cluster.invitations.get_mut(&id);
        let Some(invitation) = invitation.filter(|invitation| invitation.waiting.is_none()) else { return };
        let (since, from) = (now.wall, actor.from);
        invitation.waiting = Some(Waiting { node: node.clone(), key, since, from, approved: false });
        invitation.expires = now.wall.plus(Millis(WAITING_MS));
        self.dirty.step.writes.push(records::write(records::invitation(&id), invitation));
        let fingerprint = key.fingerprint();
        self.audit(now, actor, "wait", format!("node {node} by token {id}, key {fingerprint}"));
        self.note(Note::NodeWaits { node, fingerprint });
    }

    pub(super) fn may_approve(
        &self,
        by: &Actor,
        node: &NodeId,
        approval: Option<&Approval>,
    ) -> Result<(), NotChanged> {
        self.known(by)?.may_all()?;
        let unknown = || NotChanged::Unknown(format!("node {node} that waits: see `berth node tokens`"));
        let (_, waiting) = self.waiting(node).ok_or_else(unknown)?;
        let own = waiting.key.fingerprint();
        match approval.and_then(|approval| approval.fingerprint) {
            Some(said) if said != own => Err(NotChanged::OtherKey(node.clone(), own)),
            _ => Ok(()),
        }
    }

    /// As `may_approve` has allowed. None: it is denied, and its token is good for nothing any more.
    pub(super) fn approve(&mut self, node: &NodeId, approval: Option<Approval>) {
        let Some((&id, _)) = self.waiting(node) else { return };
        let key = records::invitation(&id);
        if approval.is_none() {
            self.cluster.invitations.remove(&id);
            return self.dirty.step.writes.push(Write { key, value: None });
        }
        let Some(invitation) = self.cluster.invitations.get_mut(&id) else { return };
        if let Some(waiting) = &mut invitation.waiting {
            waiting.approved = true;
        }
        self.dirty.step.writes.push(records::write(key, invitation));
    }
}

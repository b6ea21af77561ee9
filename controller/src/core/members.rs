//! Who belongs to the cluster and who is invited. Where there is no `--dev`, nobody else is heard.

use std::collections::BTreeMap;

use berth_protocol::ids::{Digest, NodeId};
use berth_protocol::join::{InvitationId, InvitationStatus, Invited, JoinRequest};
use berth_protocol::limits::{INVITATIONS_MAX, MEMBERS_MAX};
use berth_protocol::message::node::ServerIdentity;
use berth_protocol::sign::PublicKey;
use berth_protocol::tls::Party;
use berth_protocol::units::{Millis, Timestamp};
use serde::{Deserialize, Serialize};

use super::{Controller, Now, Write, records};

/// Its sender is not the cluster's.
pub(super) const STRANGER: &str = "not-a-member";

/// Stored.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Member {
    pub key: PublicKey,
    pub since: Timestamp,
    /// May invite and remove.
    #[serde(default)]
    pub admin: bool,
}

/// Stored; the secret that it takes is not.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Invitation {
    pub secret: Digest,
    pub who: Invited,
    pub expires: Timestamp,
}

impl Invitation {
    pub fn new(secret: Digest, who: Invited, now: Now, life: Millis) -> Self {
        Self { secret, who, expires: now.wall.plus(life) }
    }
}

/// Why an invitation is not taken, for whoever shows it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NotJoined {
    #[error(
        "the token is unknown, used or expired: each is good once and for a short while; ask for a new one"
    )]
    NotInvited,
    #[error("the request is not proven by its key")]
    Unproven,
    #[error("the token is for {0} alone")]
    Other(Party),
    #[error("the token is for a machine, and {0} is none")]
    NoNode(Party),
    #[error("the request names no node")]
    Nobody,
    #[error(
        "the node {0} belongs to the cluster already: join by another name with --node, or, where this machine takes that \
         one's place, with a token for it from `berth node token {0}`"
    )]
    Taken(NodeId),
    #[error("the cluster has {MEMBERS_MAX} members, as many as it may")]
    Full,
}

/// Why a member stays one, for whoever wants it removed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NotRemoved {
    #[error("there is no {0} in the cluster")]
    Unknown(Party),
    #[error(
        "{0} is the last admin, and nobody could let anybody in any more: let another in first, `berth user token NAME --admin`"
    )]
    LastAdmin(Party),
}

/// A change of who belongs, which an admin asked for or one that joins.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MemberChange {
    Invited(InvitationId, Invitation),
    Uninvited(InvitationId),
    /// As `may_join` has allowed, by this invitation.
    Joined {
        id: InvitationId,
        party: Party,
        key: PublicKey,
    },
    Removed(Party),
}

/// Do these records say who belongs to a cluster?
pub fn are_in(entries: &[(String, Option<Vec<u8>>)]) -> bool {
    entries.iter().any(|(key, _)| key.starts_with("member/"))
}

/// Who lets the others in.
pub fn first_admin(party: &Party, key: PublicKey, now: Now) -> Write {
    records::write(records::member(party), &Member { key, since: now.wall, admin: true })
}

impl Controller {
    /// Everybody that belongs.
    pub fn members(&self) -> &BTreeMap<Party, Member> {
        &self.cluster.members
    }

    /// Those that may still be taken.
    pub fn invitations(&self, now: Now) -> Vec<InvitationStatus> {
        let good = self.cluster.invitations.iter().filter(|(_, invitation)| invitation.expires > now.wall);
        let status = |(id, invitation): (&InvitationId, &Invitation)| InvitationStatus {
            id: *id,
            who: invitation.who.clone(),
            expires: invitation.expires,
        };
        good.map(status).collect()
    }

    pub fn is_invited(&self, id: &InvitationId) -> bool {
        self.cluster.invitations.contains_key(id)
    }

    /// # Errors
    /// It stays, and why.
    pub fn may_remove(&self, party: &Party) -> Result<(), NotRemoved> {
        let members = &self.cluster.members;
        let member = members.get(party).ok_or_else(|| NotRemoved::Unknown(party.clone()))?;
        if member.admin && members.values().filter(|member| member.admin).count() == 1 {
            return Err(NotRemoved::LastAdmin(party.clone()));
        }
        Ok(())
    }

    pub fn may_invite(&self) -> bool {
        self.cluster.invitations.len() < INVITATIONS_MAX
    }

    /// As whom one that shows an invitation would belong.
    ///
    /// # Errors
    /// It would not, and why.
    pub fn may_join(&self, now: Now, request: &JoinRequest) -> Result<Party, NotJoined> {
        let invitation = self.cluster.invitations.get(&request.id);
        let invitation = invitation.filter(|invitation| {
            invitation.expires > now.wall && invitation.secret == request.secret.digest()
        });
        let invitation = invitation.ok_or(NotJoined::NotInvited)?;
        if !request.is_proven() {
            return Err(NotJoined::Unproven);
        }
        let members = &self.cluster.members;
        let party = match &invitation.who {
            Invited::Node(None) => {
                let host = || request.host.clone().map(Party::Node);
                match request.party.clone().or_else(host).ok_or(NotJoined::Nobody)? {
                    Party::Node(node) => Party::Node(self.free_name(node, request)?),
                    other => return Err(NotJoined::NoNode(other)),
                }
            }
            Invited::Node(Some(node)) => Party::Node(node.clone()),
            Invited::User { user, .. } => Party::User(user.clone()),
        };
        if request.party.as_ref().is_some_and(|asked| *asked != party) {
            return Err(NotJoined::Other(party));
        }
        if !members.contains_key(&party) && members.len() >= MEMBERS_MAX {
            return Err(NotJoined::Full);
        }
        Ok(party)
    }

    fn free_name(&self, node: NodeId, request: &JoinRequest) -> Result<NodeId, NotJoined> {
        // Its own key again: the answer to its first request was lost.
        match self.cluster.members.get(&Party::Node(node.clone())) {
            Some(member) if member.key != request.key => Err(NotJoined::Taken(node)),
            _ => Ok(node),
        }
    }

    pub(super) fn change_members(&mut self, now: Now, change: MemberChange) {
        let cluster = &mut self.cluster;
        let written = match change {
            MemberChange::Invited(id, invitation) => {
                let write = records::write(records::invitation(&id), &invitation);
                cluster.invitations.insert(id, invitation);
                vec![write]
            }
            MemberChange::Uninvited(id) => {
                cluster.invitations.remove(&id);
                vec![Write { key: records::invitation(&id), value: None }]
            }
            MemberChange::Joined { id, party, key } => {
                let invitation = cluster.invitations.remove(&id);
                let admin =
                    matches!(invitation, Some(Invitation { who: Invited::User { admin: true, .. }, .. }));
                let member = Member { key, since: now.wall, admin };
                let write = records::write(records::member(&party), &member);
                cluster.members.insert(party, member);
                vec![Write { key: records::invitation(&id), value: None }, write]
            }
            MemberChange::Removed(party) => {
                cluster.members.remove(&party);
                vec![Write { key: records::member(&party), value: None }]
            }
        };
        self.dirty.step.writes.extend(written);
    }

    /// By what one that serves the cluster is known, where it has certificates.
    pub(super) fn identity_of(&self, party: Party) -> Option<ServerIdentity> {
        self.config.ca.clone().map(|ca| ServerIdentity { ca, party })
    }

    /// May this key speak for the node? Where everybody is let in, the node's record says.
    pub(super) fn speaks_for(&self, node: &NodeId, by: Option<PublicKey>) -> bool {
        let member = || self.cluster.members.get(&Party::Node(node.clone()));
        self.config.ca.is_none() || by.is_some_and(|key| member().is_some_and(|member| member.key == key))
    }

    pub(super) fn forget_invitations(&mut self, now: Now) {
        let over = self.cluster.invitations.iter().filter(|(_, invitation)| invitation.expires <= now.wall);
        let over: Vec<InvitationId> = over.map(|(id, _)| *id).collect();
        over.into_iter().for_each(|id| self.change_members(now, MemberChange::Uninvited(id)));
    }
}

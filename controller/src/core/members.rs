//! Who belongs to the cluster and who is invited. Where there is no `--dev`, nobody else is heard.

use std::collections::BTreeMap;

use berth_protocol::ids::{Digest, Namespace, NodeId, UserName};
use berth_protocol::join::{
    InvitationId, InvitationStatus, Invited, JoinRequest, MemberStatus, Role, Roles, first_roles,
};
use berth_protocol::limits::MEMBERS_MAX;
use berth_protocol::message::node::ServerIdentity;
use berth_protocol::sign::PublicKey;
use berth_protocol::tls::Party;
use berth_protocol::units::{Millis, Timestamp};
use serde::{Deserialize, Serialize};

use super::approval::{Admission, Waiting};
use super::callers::{Actor, Denied};
use super::manage::named;
use super::{Controller, Now, Write, records};

/// Its sender is not the cluster's.
pub(super) const STRANGER: &str = "not-a-member";

/// Stored.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Member {
    pub key: PublicKey,
    pub since: Timestamp,
    /// Of all: may invite and remove, direct nodes, and has every role everywhere.
    #[serde(default)]
    pub admin: bool,
    /// A user's.
    #[serde(default = "first_roles")]
    pub roles: Roles,
}

impl Member {
    pub fn role(&self, namespace: &Namespace) -> Option<Role> {
        if self.admin { Some(Role::Admin) } else { self.roles.get(namespace).copied() }
    }
}

/// Everybody that belongs.
#[derive(Default)]
pub(super) struct Members {
    known: BTreeMap<Party, Member>,
    /// Users by their keys.
    users: BTreeMap<PublicKey, UserName>,
}

impl Members {
    pub fn get(&self, party: &Party) -> Option<&Member> {
        self.known.get(party)
    }

    /// Whose key it is.
    pub fn user(&self, key: &PublicKey) -> Option<&UserName> {
        self.users.get(key)
    }

    /// None: it does not belong any more.
    pub fn set(&mut self, party: Party, member: Option<Member>) {
        if let Some(before) = self.known.remove(&party) {
            self.users.remove(&before.key);
        }
        let Some(member) = member else { return };
        if let Party::User(user) = &party {
            self.users.insert(member.key, user.clone());
        }
        self.known.insert(party, member);
    }
}

/// Stored; the secret that it takes is not.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Invitation {
    pub secret: Digest,
    pub who: Invited,
    pub expires: Timestamp,
    /// A machine that shows it waits for an admin's word.
    #[serde(default)]
    pub approve: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub waiting: Option<Waiting>,
}

impl Invitation {
    pub fn new(secret: Digest, who: Invited, now: Now, life: Millis) -> Self {
        Self { secret, who, expires: now.wall.plus(life), approve: false, waiting: None }
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
    #[error(
        "another machine has shown this token, and waits to be approved: was it yours? ask for a new one"
    )]
    TokenWaits,
    #[error("another machine waits to be approved as {0}: join by another name with --node")]
    NameWaits(NodeId),
    #[error("the cluster has {MEMBERS_MAX} members, as many as it may")]
    Full,
}

/// One that belongs from now on, by an invitation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Joined {
    pub id: InvitationId,
    pub party: Party,
    pub key: PublicKey,
}

/// Do these records say who belongs to a cluster?
pub fn are_in(entries: &[(String, Option<Vec<u8>>)]) -> bool {
    entries.iter().any(|(key, _)| key.starts_with("member/"))
}

/// Who belongs, as these records say; one that is damaged does not.
///
/// # Errors
/// A record of another version.
pub fn in_entries(
    entries: &[(String, Option<Vec<u8>>)],
) -> Result<BTreeMap<Party, Member>, serde_json::Error> {
    let members = entries.iter().filter_map(|(key, value)| {
        let party: Party = key.strip_prefix("member/")?.parse().ok()?;
        Some(serde_json::from_slice(value.as_deref()?).map(|member| (party, member)))
    });
    members.collect()
}

/// Who lets the others in.
pub fn first_admin(party: &Party, key: PublicKey, now: Now) -> Write {
    let member = Member { key, since: now.wall, admin: true, roles: Roles::new() };
    records::write(records::member(party), &member)
}

impl Controller {
    /// Everybody that belongs.
    pub fn members(&self) -> &BTreeMap<Party, Member> {
        &self.cluster.members.known
    }

    /// Everybody, to admins; to others themselves, and what is said of users in namespaces that they are admins of.
    ///
    /// # Errors
    /// It is nobody's to know, and why.
    pub fn members_told(&self, by: &Actor) -> Result<Vec<MemberStatus>, Denied> {
        let caller = self.known(by)?;
        let told = |(party, member): (&Party, &Member)| {
            let own = by.party.as_ref() == Some(party);
            let all = own || caller.may_all().is_ok();
            let may = |namespace: &Namespace| all || caller.may(namespace, Role::Admin).is_ok();
            let user = matches!(party, Party::User(_));
            let roles = member.roles.iter().filter(|(namespace, _)| user && may(namespace));
            let roles: Roles = roles.map(|(namespace, role)| (namespace.clone(), *role)).collect();
            let status =
                MemberStatus { party: party.clone(), since: member.since, admin: member.admin, roles };
            (all || !status.roles.is_empty()).then_some(status)
        };
        Ok(self.members().iter().filter_map(told).collect())
    }

    /// Those that may still be taken.
    ///
    /// # Errors
    /// It is for admins to know.
    pub fn invitations_told(&self, now: Now, by: &Actor) -> Result<Vec<InvitationStatus>, Denied> {
        self.known(by)?.may_all().map(|()| self.invitations(now))
    }

    pub(super) fn invitations(&self, now: Now) -> Vec<InvitationStatus> {
        let good = self.cluster.invitations.iter().filter(|(_, invitation)| invitation.expires > now.wall);
        let status = |(id, invitation): (&InvitationId, &Invitation)| InvitationStatus {
            id: *id,
            who: invitation.who.clone(),
            expires: invitation.expires,
            approve: invitation.approve,
            waiting: invitation.waiting.as_ref().map(Waiting::status),
        };
        good.map(status).collect()
    }

    /// As whom one that shows an invitation would belong, and whether it does so at once.
    ///
    /// # Errors
    /// It would not, and why.
    pub fn may_join(&self, now: Now, request: &JoinRequest) -> Result<Admission, NotJoined> {
        let invitation = self.cluster.invitations.get(&request.id);
        let invitation = invitation.filter(|invitation| {
            invitation.expires > now.wall && invitation.secret == request.secret.digest()
        });
        let invitation = invitation.ok_or(NotJoined::NotInvited)?;
        if !request.is_proven() {
            return Err(NotJoined::Unproven);
        }
        let members = self.members();
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
        self.admission(now, invitation, party, request)
    }

    fn free_name(&self, node: NodeId, request: &JoinRequest) -> Result<NodeId, NotJoined> {
        // Its own key again: the answer to its first request was lost.
        match self.members().get(&Party::Node(node.clone())) {
            Some(member) if member.key != request.key => Err(NotJoined::Taken(node)),
            _ => Ok(node),
        }
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

    /// As `may_join` has allowed.
    pub(super) fn joined(&mut self, now: Now, actor: &Actor, joined: Joined) {
        let Joined { id, party, key } = joined;
        self.audit(now, actor, "join", format!("{} by token {id}", named(&party)));
        let (admin, roles) = match self.cluster.invitations.remove(&id).map(|invitation| invitation.who) {
            Some(Invited::User { admin, roles, .. }) => (admin, roles),
            Some(Invited::Node(_)) | None => (false, Roles::new()),
        };
        self.dirty.step.writes.push(Write { key: records::invitation(&id), value: None });
        self.set_member(party, Some(Member { key, since: now.wall, admin, roles }));
    }

    /// None: it does not belong any more.
    pub(super) fn set_member(&mut self, party: Party, member: Option<Member>) {
        let value = member.as_ref().map(records::bytes);
        self.dirty.step.writes.push(Write { key: records::member(&party), value });
        self.cluster.members.set(party, member);
    }

    pub(super) fn forget_invitations(&mut self, now: Now) {
        let over = self.cluster.invitations.iter().filter(|(_, invitation)| invitation.expires <= now.wall);
        let over: Vec<InvitationId> = over.map(|(id, _)| *id).collect();
        for id in over {
            self.cluster.invitations.remove(&id);
            self.dirty.step.writes.push(Write { key: records::invitation(&id), value: None });
        }
    }
}

//! Who belongs to the cluster and who is invited. Where there is no `--dev`, nobody else is heard.

use std::collections::BTreeMap;

use berth_protocol::ids::{Digest, Namespace, NodeId, UserName};
use berth_protocol::join::{
    InvitationId, InvitationStatus, Invited, JoinRequest, Role, Roles, UserChange, first_roles,
};
use berth_protocol::limits::{INVITATIONS_MAX, MEMBERS_MAX, ROLES_MAX};
use berth_protocol::message::node::ServerIdentity;
use berth_protocol::sign::PublicKey;
use berth_protocol::tls::Party;
use berth_protocol::units::{Millis, Timestamp};
use serde::{Deserialize, Serialize};

use super::callers::Actor;
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
    users: BTreeMap<PublicKey, Party>,
}

impl Members {
    pub fn get(&self, party: &Party) -> Option<&Member> {
        self.known.get(party)
    }

    /// Whose key it is.
    pub fn user(&self, key: &PublicKey) -> Option<&Party> {
        self.users.get(key)
    }

    /// None: it does not belong any more.
    pub fn set(&mut self, party: Party, member: Option<Member>) {
        if let Some(before) = self.known.remove(&party) {
            self.users.remove(&before.key);
        }
        let Some(member) = member else { return };
        if let Party::User(_) = party {
            self.users.insert(member.key, party.clone());
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

/// Why somebody may not say who may what.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NotGranted {
    #[error("{0} is no admin of this cluster, which this takes")]
    NoAdmin(Party),
    #[error("{0} is no admin of namespace {1}, nor of this cluster")]
    NoAdminOf(Party, Namespace),
    #[error("there is no user {0} in the cluster")]
    Unknown(UserName),
    #[error("a user has a role in at most {ROLES_MAX} namespaces")]
    TooMany,
    #[error(
        "{0} is the last admin, and nobody could let anybody in any more: make another one first, `berth user set NAME --admin`"
    )]
    LastAdmin(UserName),
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
    /// As `may_set` has allowed.
    Set(UserName, UserChange),
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

fn changed(mut member: Member, change: &UserChange) -> Member {
    member.admin = change.admin.unwrap_or(member.admin);
    for (namespace, role) in &change.roles {
        match role {
            Some(role) => drop(member.roles.insert(namespace.clone(), *role)),
            None => drop(member.roles.remove(namespace)),
        }
    }
    member
}

/// As the audit log says it.
fn about(change: &MemberChange) -> (&'static str, String) {
    match change {
        MemberChange::Invited(id, invitation) => ("invite", invited(&invitation.who, id)),
        MemberChange::Uninvited(id) => ("revoke", format!("token {id}")),
        MemberChange::Joined { id, party, .. } => ("join", format!("{} by token {id}", named(party))),
        MemberChange::Removed(party) => ("remove", named(party)),
        MemberChange::Set(user, change) => ("set", format!("user {user} {}", granted(change))),
    }
}

fn named(party: &Party) -> String {
    match party {
        Party::Controller => "controller".to_owned(),
        Party::Broker => "broker".to_owned(),
        Party::Node(node) => format!("node {node}"),
        Party::User(user) => format!("user {user}"),
    }
}

fn invited(who: &Invited, id: &InvitationId) -> String {
    match who {
        Invited::Node(None) => format!("a node by token {id}"),
        Invited::Node(Some(node)) => format!("node {node} by token {id}"),
        Invited::User { user, admin, roles } => {
            let roles = roles.iter().map(|(namespace, role)| (namespace.clone(), Some(*role))).collect();
            let change = UserChange { admin: admin.then_some(true), roles };
            format!("user {user} {} by token {id}", granted(&change))
        }
    }
}

fn granted(change: &UserChange) -> String {
    let admin = change.admin.map(|admin| if admin { "admin".to_owned() } else { "no admin".to_owned() });
    let roles = change.roles.iter().map(|(namespace, role)| match role {
        Some(role) => format!("{namespace}={role}"),
        None => format!("{namespace}=none"),
    });
    admin.into_iter().chain(roles).collect::<Vec<_>>().join(" ")
}

impl Controller {
    /// Everybody that belongs.
    pub fn members(&self) -> &BTreeMap<Party, Member> {
        &self.cluster.members.known
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
        let members = self.members();
        let member = members.get(party).ok_or_else(|| NotRemoved::Unknown(party.clone()))?;
        if member.admin && members.values().filter(|member| member.admin).count() == 1 {
            return Err(NotRemoved::LastAdmin(party.clone()));
        }
        Ok(())
    }

    pub fn has_room_for_invitation(&self) -> bool {
        self.cluster.invitations.len() < INVITATIONS_MAX
    }

    /// May one member let in whom an invitation is for? Admins of a namespace bring users into it, and into nobody's
    /// place.
    ///
    /// # Errors
    /// Not so, and why.
    pub fn may_invite(&self, by: &Party, who: &Invited) -> Result<(), NotGranted> {
        match who {
            Invited::User { user, admin, roles }
                if !self.members().contains_key(&Party::User(user.clone())) =>
            {
                let roles = roles.iter().map(|(namespace, role)| (namespace.clone(), Some(*role))).collect();
                self.may_grant(by, &UserChange { admin: admin.then_some(true), roles })
            }
            _ => self.may_grant(by, &UserChange { admin: Some(true), roles: BTreeMap::new() }),
        }
    }

    fn may_grant(&self, by: &Party, change: &UserChange) -> Result<(), NotGranted> {
        let grantor = self.members().get(by);
        if change.roles.len() > ROLES_MAX {
            return Err(NotGranted::TooMany);
        }
        if grantor.is_some_and(|grantor| grantor.admin) {
            return Ok(());
        }
        if change.admin.is_some() || change.roles.is_empty() {
            return Err(NotGranted::NoAdmin(by.clone()));
        }
        let lacks =
            |namespace: &&Namespace| grantor.and_then(|grantor| grantor.role(namespace)) < Some(Role::Admin);
        match change.roles.keys().find(lacks) {
            Some(namespace) => Err(NotGranted::NoAdminOf(by.clone(), namespace.clone())),
            None => Ok(()),
        }
    }

    /// May one member have a user's roles changed so?
    ///
    /// # Errors
    /// Not so, and why.
    pub fn may_set(&self, by: &Party, user: &UserName, change: &UserChange) -> Result<(), NotGranted> {
        self.may_grant(by, change)?;
        let party = Party::User(user.clone());
        let member = self.members().get(&party).ok_or_else(|| NotGranted::Unknown(user.clone()))?;
        if change.admin == Some(false) && matches!(self.may_remove(&party), Err(NotRemoved::LastAdmin(_))) {
            return Err(NotGranted::LastAdmin(user.clone()));
        }
        if changed(member.clone(), change).roles.len() > ROLES_MAX {
            return Err(NotGranted::TooMany);
        }
        Ok(())
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
        Ok(party)
    }

    fn free_name(&self, node: NodeId, request: &JoinRequest) -> Result<NodeId, NotJoined> {
        // Its own key again: the answer to its first request was lost.
        match self.members().get(&Party::Node(node.clone())) {
            Some(member) if member.key != request.key => Err(NotJoined::Taken(node)),
            _ => Ok(node),
        }
    }

    pub(super) fn change_members(&mut self, now: Now, actor: &Actor, change: MemberChange) {
        let (what, on) = about(&change);
        self.audit(now, actor, what, on);
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
                let (admin, roles) = match cluster.invitations.remove(&id).map(|invitation| invitation.who) {
                    Some(Invited::User { admin, roles, .. }) => (admin, roles),
                    Some(Invited::Node(_)) | None => (false, Roles::new()),
                };
                let member = Member { key, since: now.wall, admin, roles };
                let write = records::write(records::member(&party), &member);
                cluster.members.set(party, Some(member));
                vec![Write { key: records::invitation(&id), value: None }, write]
            }
            MemberChange::Removed(party) => {
                let write = Write { key: records::member(&party), value: None };
                cluster.members.set(party, None);
                vec![write]
            }
            MemberChange::Set(user, change) => {
                let party = Party::User(user);
                let member = cluster.members.get(&party).cloned().map(|member| changed(member, &change));
                let write = member.as_ref().map(|member| records::write(records::member(&party), member));
                cluster.members.set(party, member);
                write.into_iter().collect()
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
        for id in over {
            self.cluster.invitations.remove(&id);
            self.dirty.step.writes.push(Write { key: records::invitation(&id), value: None });
        }
    }
}

//! What admins and users change of the cluster itself, over HTTPS: members, their roles, tokens, secrets, the
//! key that signs orders.

use berth_protocol::delegation::Delegation;
use berth_protocol::ids::{Namespace, NodeId, SecretName, UserName};
use berth_protocol::join::{Approval, InvitationId, Invited, Role, Roles, UserChange};
use berth_protocol::limits::{INVITATIONS_MAX, ROLES_MAX};
use berth_protocol::sign::Fingerprint;
use berth_protocol::tls::Party;

use super::callers::{Actor, Denied};
use super::keys::NotRotated;
use super::members::{Invitation, Member};
use super::{Controller, Now, Write, records};

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    Invite(InvitationId, Invitation),
    Uninvite(InvitationId),
    Remove(Party),
    Set(UserName, UserChange),
    /// Its value, sealed; none: it is removed.
    Secret(Namespace, SecretName, Option<String>),
    /// Another key signs orders: by which delegation, and its seed, sealed.
    Rotate(Box<Delegation>, String),
    /// A machine that waits is let in; none: it is not.
    Approve(NodeId, Option<Approval>),
}

/// Why a change is not made, for whoever asked for it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NotChanged {
    #[error(transparent)]
    Denied(#[from] Denied),
    #[error(transparent)]
    NotRotated(#[from] NotRotated),
    #[error("the machine that waits as {0} has the key {1}: it is another machine, and is to be denied")]
    OtherKey(NodeId, Fingerprint),
    #[error("there is no {0}")]
    Unknown(String),
    #[error(
        "{0} is the last admin, and nobody could let anybody in any more: make another one first, `berth user token NAME --admin` or `berth user set NAME --admin`"
    )]
    LastAdmin(Party),
    #[error("a user has a role in at most {ROLES_MAX} namespaces")]
    TooManyRoles,
    #[error("there are too many open tokens already: let them expire, or revoke some")]
    TooManyTokens,
    #[error("all secrets together take as many bytes already as they may: remove some")]
    SecretsFull,
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
pub fn about(change: &Change) -> (&'static str, String) {
    match change {
        Change::Invite(id, invitation) => ("invite", invited(&invitation.who, id)),
        Change::Uninvite(id) => ("revoke", format!("token {id}")),
        Change::Remove(party) => ("remove", named(party)),
        Change::Secret(namespace, name, sealed) => {
            let what = if sealed.is_some() { "set" } else { "remove" };
            (what, format!("secret {namespace}/{name}"))
        }
        Change::Set(user, change) => ("set", format!("user {user} {}", granted(change))),
        Change::Approve(node, Some(_)) => ("approve", format!("node {node}")),
        Change::Approve(node, None) => ("deny", format!("node {node}")),
        Change::Rotate(delegation, _) => {
            let Delegation { key, serial, expires, .. } = &**delegation;
            ("rotate", format!("the controller's key to {}, serial {serial}, until {expires}", key.short()))
        }
    }
}

pub(super) fn named(party: &Party) -> String {
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
            format!("user {user} {} by token {id}", granted(&as_change(*admin, roles)))
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

/// What an invitation's words would change of a user that has nothing.
fn as_change(admin: bool, roles: &Roles) -> UserChange {
    let roles = roles.iter().map(|(namespace, role)| (namespace.clone(), Some(*role))).collect();
    UserChange { admin: admin.then_some(true), roles }
}

impl Controller {
    /// May somebody make this change?
    ///
    /// # Errors
    /// Not so, and why.
    pub fn may_change(&self, by: &Actor, change: &Change) -> Result<(), NotChanged> {
        match change {
            Change::Invite(_, invitation) => {
                self.may_invite(by, &invitation.who)?;
                if self.cluster.invitations.len() >= INVITATIONS_MAX {
                    return Err(NotChanged::TooManyTokens);
                }
            }
            Change::Uninvite(id) => {
                self.known(by)?.may_all()?;
                if !self.cluster.invitations.contains_key(id) {
                    return Err(NotChanged::Unknown(format!("token {id}: it may be used or expired")));
                }
            }
            Change::Remove(party) => {
                self.known(by)?.may_all()?;
                let member = self.member(party)?;
                self.keeps_an_admin(party, !member.admin)?;
            }
            Change::Set(user, change) => {
                self.may_grant(by, change)?;
                let party = Party::User(user.clone());
                let member = changed(self.member(&party)?.clone(), change);
                self.keeps_an_admin(&party, member.admin)?;
                if member.roles.len() > ROLES_MAX {
                    return Err(NotChanged::TooManyRoles);
                }
            }
            Change::Approve(node, approval) => self.may_approve(by, node, approval.as_ref())?,
            Change::Rotate(delegation, _) => self.may_rotate(by, delegation)?,
            Change::Secret(namespace, name, sealed) => {
                self.known(by)?.may(namespace, Role::Submit)?;
                self.has_room_for_secret(namespace, name, sealed.as_deref())?;
            }
        }
        Ok(())
    }

    fn member(&self, party: &Party) -> Result<&Member, NotChanged> {
        let unknown = || NotChanged::Unknown(format!("{} in the cluster", named(party)));
        self.members().get(party).ok_or_else(unknown)
    }

    /// `still`: that one is an admin all the same, or never was the last.
    fn keeps_an_admin(&self, party: &Party, still: bool) -> Result<(), NotChanged> {
        let others = self.members().iter().any(|(other, member)| other != party && member.admin);
        if still || others { Ok(()) } else { Err(NotChanged::LastAdmin(party.clone())) }
    }

    /// Admins of a namespace bring users into it, and into nobody's place.
    fn may_invite(&self, by: &Actor, who: &Invited) -> Result<(), NotChanged> {
        match who {
            Invited::User { user, admin, roles }
                if !self.members().contains_key(&Party::User(user.clone())) =>
            {
                self.may_grant(by, &as_change(*admin, roles))
            }
            _ => Ok(self.known(by)?.may_all()?),
        }
    }

    /// Admins of the cluster everything, others roles in namespaces that they are admins of.
    fn may_grant(&self, by: &Actor, change: &UserChange) -> Result<(), NotChanged> {
        let caller = self.known(by)?;
        if change.roles.len() > ROLES_MAX {
            return Err(NotChanged::TooManyRoles);
        }
        if change.admin.is_some() || change.roles.is_empty() {
            caller.may_all()?;
        }
        let each = change.roles.keys().map(|namespace| caller.may(namespace, Role::Admin));
        Ok(each.collect::<Result<(), Denied>>()?)
    }

    /// As `may_change` has allowed.
    pub(super) fn change(&mut self, now: Now, actor: &Actor, change: Change) {
        let (what, on) = about(&change);
        self.audit(now, actor, what, on);
        match change {
            Change::Invite(id, invitation) => {
                self.dirty.step.writes.push(records::write(records::invitation(&id), &invitation));
                self.cluster.invitations.insert(id, invitation);
            }
            Change::Uninvite(id) => {
                self.dirty.step.writes.push(Write { key: records::invitation(&id), value: None });
                self.cluster.invitations.remove(&id);
            }
            Change::Remove(party) => self.set_member(party, None),
            Change::Set(user, change) => {
                let party = Party::User(user);
                let member = self.cluster.members.get(&party).cloned();
                self.set_member(party, member.map(|member| changed(member, &change)));
            }
            Change::Approve(node, approval) => self.approve(&node, approval),
            Change::Rotate(delegation, sealed) => self.rotate(*delegation, sealed),
            Change::Secret(namespace, name, sealed) => self.set_secret(now, actor, (namespace, name), sealed),
        }
    }
}

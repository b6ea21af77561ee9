//! Who asks for something, and what they may: everything where `--dev` lets everybody in, else what their roles say.

use core::net::IpAddr;
use std::collections::BTreeSet;

use berth_protocol::ids::{Namespace, RequestId, UserName};
use berth_protocol::join::Role;
use berth_protocol::limits::REQUEST_AGE_MS_MAX;
use berth_protocol::sign::PublicKey;
use berth_protocol::tls::Party;
use berth_protocol::units::{Millis, Timestamp};

use super::members::Member;
use super::{Controller, Now};

/// Whose message something is, as `io` has verified: by a signature, or, at the controller's own broker, by the
/// certificate of the connection that it came on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Author {
    pub key: PublicKey,
    /// Of a request that is signed itself.
    pub signed: Option<Signing>,
    pub from: Option<IpAddr>,
}

/// When a request was signed, and what tells the signature from others.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Signing {
    pub at: Timestamp,
    pub id: RequestId,
}

impl From<PublicKey> for Author {
    fn from(key: PublicKey) -> Self {
        Self { key, signed: None, from: None }
    }
}

/// Whoever asks, for those who look it up later. None: somebody, where everybody is let in.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Actor {
    pub party: Option<Party>,
    pub from: Option<IpAddr>,
}

/// Whoever asks, and may.
#[derive(Debug, Clone)]
pub(super) struct Caller {
    pub actor: Actor,
    /// None: everything.
    member: Option<Member>,
}

/// Why somebody is not heard, in their own words.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum Denied {
    #[error(
        "this cluster heeds only those who say who they are: use `berth` with your identity (`berth login TOKEN`), which \
         signs what it says, or your certificate at the controller's own broker"
    )]
    Unknown,
    #[error("the key {0} is no user's of this cluster: ask an admin for a token, then `berth login TOKEN`")]
    Stranger(String),
    #[error(
        "the request was signed at {at} and it is {now} here, more than {most} apart: is the clock right where you are?"
    )]
    Stale { at: Timestamp, now: Timestamp, most: Millis },
    #[error(
        "{user} has no role in namespace {namespace} that allows it, which takes `{least}`{has}: ask an admin for it, `berth user set {user} {namespace}={least}`"
    )]
    Role { user: UserName, namespace: Namespace, least: Role, has: String },
    #[error("{0} is no admin of this cluster, which this takes")]
    NoAdmin(UserName),
}

impl Denied {
    /// A word for counters.
    pub fn kind(&self) -> &'static str {
        match self {
            Denied::Unknown => "unsigned",
            Denied::Stranger(_) => super::members::STRANGER,
            Denied::Stale { .. } => "stale",
            Denied::Role { .. } | Denied::NoAdmin(_) => "role",
        }
    }

    /// A word for whoever asked.
    pub fn code(&self) -> &'static str {
        match self {
            Denied::Stale { .. } => "Stale",
            _ => "Forbidden",
        }
    }
}

/// Of which namespaces something may tell.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Sight {
    All,
    Of(BTreeSet<Namespace>),
}

impl Sight {
    pub fn covers(&self, namespace: &Namespace) -> bool {
        match self {
            Sight::All => true,
            Sight::Of(these) => these.contains(namespace),
        }
    }
}

impl Caller {
    pub const ANYBODY: Self = Self { actor: Actor { party: None, from: None }, member: None };

    fn user(&self) -> UserName {
        match &self.actor.party {
            Some(Party::User(user)) => user.clone(),
            // Those without a member's record may do everything.
            _ => UserName::parse("anybody").expect("a literal that is a name"),
        }
    }

    fn role(&self, namespace: &Namespace) -> Option<Role> {
        self.member.as_ref().map_or(Some(Role::Admin), |member| member.role(namespace))
    }

    pub fn may(&self, namespace: &Namespace, least: Role) -> Result<(), Denied> {
        let role = self.role(namespace);
        if role >= Some(least) {
            return Ok(());
        }
        let has = role.map(|role| format!(" and not `{role}`")).unwrap_or_default();
        Err(Denied::Role { user: self.user(), namespace: namespace.clone(), least, has })
    }

    pub fn may_all(&self) -> Result<(), Denied> {
        match &self.member {
            Some(member) if !member.admin => Err(Denied::NoAdmin(self.user())),
            _ => Ok(()),
        }
    }

    /// What an answer about one namespace, or about all, may tell.
    pub fn sight(&self, namespace: Option<&Namespace>) -> Result<Sight, Denied> {
        match (namespace, &self.member) {
            (Some(namespace), _) => {
                self.may(namespace, Role::View).map(|()| Sight::Of(BTreeSet::from([namespace.clone()])))
            }
            (None, Some(member)) if !member.admin => Ok(Sight::Of(member.roles.keys().cloned().collect())),
            (None, _) => Ok(Sight::All),
        }
    }
}

impl Controller {
    fn actor(&self, by: Option<&Author>) -> Actor {
        let party = by.and_then(|by| self.cluster.members.user(&by.key)).cloned();
        Actor { party, from: by.and_then(|by| by.from) }
    }

    pub(super) fn denied(&mut self, now: Now, by: Option<&Author>, what: &str, on: String, why: &Denied) {
        self.refuse(why.kind());
        let actor = self.actor(by);
        self.audit_refused(now, &actor, what, on, why.to_string());
    }

    /// Who has said something to the controller that anybody may say who belongs.
    ///
    /// # Errors
    /// Nobody who is heard, and why.
    pub(super) fn caller(&self, now: Now, by: Option<&Author>) -> Result<Caller, Denied> {
        let from = by.and_then(|by| by.from);
        if self.config.ca.is_none() {
            return Ok(Caller { actor: Actor { party: None, from }, ..Caller::ANYBODY });
        }
        let by = by.ok_or(Denied::Unknown)?;
        let stranger = || Denied::Stranger(by.key.short());
        let party = self.cluster.members.user(&by.key).ok_or_else(stranger)?;
        let member = self.cluster.members.get(party).ok_or_else(stranger)?;
        if let Some(Signing { at, .. }) = by.signed {
            // What was forgotten to have been taken is not taken again.
            let most = Millis(REQUEST_AGE_MS_MAX);
            let apart = now.wall.since(at).max(at.since(now.wall));
            if apart > most || self.cluster.requests.may_have_forgotten(at) {
                return Err(Denied::Stale { at, now: now.wall, most });
            }
        }
        Ok(Caller { actor: Actor { party: Some(party.clone()), from }, member: Some(member.clone()) })
    }
}

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
    /// None: whoever it is may everything.
    user: Option<(UserName, Member)>,
}

/// Why somebody is not heard, in their own words.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Denied {
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
    pub fn may(&self, namespace: &Namespace, least: Role) -> Result<(), Denied> {
        let Some((user, member)) = &self.user else { return Ok(()) };
        let role = member.role(namespace);
        if role >= Some(least) {
            return Ok(());
        }
        let has = role.map(|role| format!(" and not `{role}`")).unwrap_or_default();
        Err(Denied::Role { user: user.clone(), namespace: namespace.clone(), least, has })
    }

    pub fn may_all(&self) -> Result<(), Denied> {
        match &self.user {
            Some((user, member)) if !member.admin => Err(Denied::NoAdmin(user.clone())),
            _ => Ok(()),
        }
    }

    /// What an answer about one namespace, or about all, may tell.
    pub fn sight(&self, namespace: Option<&Namespace>) -> Result<Sight, Denied> {
        match (namespace, &self.user) {
            (Some(namespace), _) => {
                self.may(namespace, Role::View).map(|()| Sight::Of(BTreeSet::from([namespace.clone()])))
            }
            (None, Some((_, member))) if !member.admin => {
                Ok(Sight::Of(member.roles.keys().cloned().collect()))
            }
            (None, _) => Ok(Sight::All),
        }
    }
}

impl Controller {
    fn actor(&self, by: Option<&Author>) -> Actor {
        let user = by.and_then(|by| self.cluster.members.user(&by.key)).cloned();
        Actor { party: user.map(Party::User), from: by.and_then(|by| by.from) }
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
        if self.config.ca.is_none() {
            return self.known(&Actor { party: None, from: by.and_then(|by| by.from) });
        }
        let by = by.ok_or(Denied::Unknown)?;
        let actor = self.actor(Some(by));
        if actor.party.is_none() {
            return Err(Denied::Stranger(by.key.short()));
        }
        if let Some(Signing { at, .. }) = by.signed {
            // What was forgotten to have been taken is not taken again.
            let most = Millis(REQUEST_AGE_MS_MAX);
            let apart = now.wall.since(at).max(at.since(now.wall));
            if apart > most || self.cluster.requests.may_have_forgotten(at) {
                return Err(Denied::Stale { at, now: now.wall, most });
            }
        }
        self.known(&actor)
    }

    /// One that `io` knows by its certificate; where nobody has one, anybody.
    ///
    /// # Errors
    /// It is no user of this cluster.
    pub(super) fn known(&self, actor: &Actor) -> Result<Caller, Denied> {
        let user = match (&self.config.ca, &actor.party) {
            (None, _) => None,
            (Some(_), Some(party @ Party::User(user))) => {
                let member = self.cluster.members.get(party).ok_or(Denied::Unknown)?;
                Some((user.clone(), member.clone()))
            }
            (Some(_), _) => return Err(Denied::Unknown),
        };
        Ok(Caller { actor: actor.clone(), user })
    }
}

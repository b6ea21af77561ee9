//! How a machine or a person comes to belong to a cluster: one line of text from its controller, shown back to it once.
//!
//! The line is `b1{CA's key}.{id}.{secret}@{host}:{port}`: by the first whoever joins knows the controller, by the last two
//! the controller knows whoever joins. What it is for, the controller remembers.

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::{self, PemObject as _};
use serde::{Deserialize, Serialize};

use crate::delegation::Delegation;
use crate::hex;
use crate::ids::{ClusterName, Digest, Namespace, NodeId, UserName};
use crate::sign::{Fingerprint, Key, PublicKey, Signature};
use crate::tls::{Credentials, Party};
use crate::units::Timestamp;

const VERSION: &str = "b1";
const ID_BYTES: usize = 4;
const SECRET_BYTES: usize = 16;
const HOST_BYTES_MAX: usize = 300;
/// What a key signs here, it signs for nothing else.
const PROOF: &[u8] = b"berth join 1";

/// Tells one invitation from others; no secret.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct InvitationId(#[serde(with = "hex::text")] [u8; ID_BYTES]);

impl InvitationId {
    pub const fn from_bytes(bytes: [u8; ID_BYTES]) -> Self {
        Self(bytes)
    }
}

impl fmt::Display for InvitationId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(&self.0))
    }
}

impl fmt::Debug for InvitationId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for InvitationId {
    type Err = JoinTokenError;

    fn from_str(text: &str) -> Result<Self, JoinTokenError> {
        hex::decode(text).map(Self).ok_or(JoinTokenError)
    }
}

/// What only the line's holder knows. It is not printed but within a token.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Secret(#[serde(with = "hex::text")] [u8; SECRET_BYTES]);

impl Secret {
    pub const fn from_bytes(bytes: [u8; SECRET_BYTES]) -> Self {
        Self(bytes)
    }

    /// What the controller keeps of it. It has 128 bits of chance: no salt, no stretching.
    pub fn digest(&self) -> Digest {
        Digest::of(&self.0)
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("(secret)")
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "this is no token: it begins with `b1` and ends with the controller's @HOST:PORT; copy the whole line"
)]
pub struct JoinTokenError;

/// The line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JoinToken {
    /// Of the cluster's CA.
    pub ca: PublicKey,
    pub id: InvitationId,
    pub secret: Secret,
    /// `HOST:PORT` of the controller.
    pub controller: String,
}

impl fmt::Display for JoinToken {
    /// With its secret.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { ca, id, secret, controller } = self;
        write!(f, "{VERSION}{ca:?}.{id}.{}@{controller}", hex::encode(&secret.0))
    }
}

impl FromStr for JoinToken {
    type Err = JoinTokenError;

    fn from_str(text: &str) -> Result<Self, JoinTokenError> {
        let parts = || {
            let (token, controller) = text.trim().strip_prefix(VERSION)?.split_once('@')?;
            let mut parts = token.split('.');
            let ca = PublicKey::from_bytes(hex::decode(parts.next()?)?);
            let id = parts.next()?.parse().ok()?;
            let secret = Secret(hex::decode(parts.next()?)?);
            let (host, port) = controller.rsplit_once(':')?;
            let plain = |c: char| c.is_ascii_alphanumeric() || "-.:[]".contains(c);
            let fits = !host.is_empty() && host.len() <= HOST_BYTES_MAX && host.chars().all(plain);
            (parts.next().is_none() && fits && port.parse::<u16>().is_ok()).then(|| Self {
                ca,
                id,
                secret,
                controller: controller.to_owned(),
            })
        };
        parts().ok_or(JoinTokenError)
    }
}

/// What one that joins says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct JoinRequest {
    pub id: InvitationId,
    pub secret: Secret,
    /// Who it insists on being; none: whoever the invitation names.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub party: Option<Party>,
    /// What a machine calls itself, where neither says who.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host: Option<NodeId>,
    pub key: PublicKey,
    /// That it has that key.
    proof: Signature,
}

fn proven(id: InvitationId, party: Option<&Party>) -> Vec<u8> {
    let party = party.map(Party::to_string).unwrap_or_default();
    [PROOF, &id.0, party.as_bytes()].concat()
}

impl JoinRequest {
    pub fn new(token: &JoinToken, party: Option<Party>, host: Option<NodeId>, key: &Key) -> Self {
        let proof = key.sign(&proven(token.id, party.as_ref()));
        Self { id: token.id, secret: token.secret.clone(), party, host, key: key.public(), proof }
    }

    /// Whoever made it has the secret half of the key in it.
    pub fn is_proven(&self) -> bool {
        let text = proven(self.id, self.party.as_ref());
        self.key.has_signed_text(&text, &self.proof)
    }
}

/// What it then has.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Membership {
    pub cluster: ClusterName,
    pub party: Party,
    /// The CA's certificate and the party's own, PEM.
    pub ca: String,
    pub certificate: String,
    /// Until when the latter is good.
    pub expires: Timestamp,
    /// Of the cluster's root: nodes obey whom that names. Where it was set up before there were roots, the controller's
    /// own key.
    #[serde(alias = "controller")]
    pub root: PublicKey,
    /// Whom it has named last.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub delegation: Option<Delegation>,
    /// `mqtts://HOST:PORT`
    pub broker: String,
    /// Where the controller answers HTTP: `https://HOST:PORT`
    pub url: String,
}

impl Membership {
    /// By which one with this key shows that it belongs.
    ///
    /// # Errors
    /// The certificates are none.
    pub fn credentials(&self, key: &Key) -> Result<Credentials, pem::Error> {
        let certificate = |text: &str| CertificateDer::from_pem_slice(text.as_bytes());
        Ok(Credentials::new(certificate(&self.ca)?, certificate(&self.certificate)?, key))
    }
}

/// The answer to one that has to wait for an admin's word, and asks again meanwhile.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct MustWait {
    pub node: NodeId,
    /// Then its invitation is over.
    pub until: Timestamp,
}

/// A machine that waits, as those who may let it in see it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct WaitingStatus {
    pub node: NodeId,
    /// Of its key: the machine shows the same.
    pub fingerprint: Fingerprint,
    pub since: Timestamp,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from: Option<IpAddr>,
    /// It belongs once it has asked again.
    pub approved: bool,
}

/// What is said of a machine that waits. By `POST /v1/waiting/{node}`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Approval {
    /// Only where its key is that one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fingerprint: Option<Fingerprint>,
}

/// An invitation, as those who may make them see it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct InvitationStatus {
    pub id: InvitationId,
    pub who: Invited,
    pub expires: Timestamp,
    /// Whoever shows it waits for an admin's word.
    #[serde(default)]
    pub approve: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub waiting: Option<WaitingStatus>,
}

/// A member, as those who may know see it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct MemberStatus {
    pub party: Party,
    pub since: Timestamp,
    pub admin: bool,
    #[serde(default)]
    pub roles: Roles,
}

/// The key that signs the controller's orders, as everybody of the cluster may know it. A cluster of before there were roots
/// has none that could be replaced.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct KeyStatus {
    pub cluster: ClusterName,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub root: Option<PublicKey>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub delegation: Option<Delegation>,
}

/// A key that the controller has drawn, for the root to name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct DrawnKey {
    pub key: PublicKey,
}

/// Whom an invitation is for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Invited {
    /// A machine: of that name, where it belongs already in its place; else by whatever name that is free.
    Node(Option<NodeId>),
    /// This one alone; where it belongs already, in its place.
    User {
        user: UserName,
        admin: bool,
        #[serde(default = "first_roles")]
        roles: Roles,
    },
}

/// What a user may do in a namespace; each holds what stands before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Role {
    /// See its jobs, their logs and what they left.
    View,
    /// Submit jobs and direct them.
    Submit,
    /// Say who has which role there.
    Admin,
}

/// A user's, one a namespace, at most `ROLES_MAX`.
pub type Roles = BTreeMap<Namespace, Role>;

/// Of whom nobody said which: those who share one namespace need not know of any.
pub fn first_roles() -> Roles {
    Roles::from([(Namespace::default_namespace(), Role::Submit)])
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Role::View => "view",
            Role::Submit => "submit",
            Role::Admin => "admin",
        })
    }
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is no role: write view, submit or admin")]
pub struct RoleError(String);

impl FromStr for Role {
    type Err = RoleError;

    fn from_str(text: &str) -> Result<Self, RoleError> {
        let all = [Role::View, Role::Submit, Role::Admin];
        all.into_iter().find(|role| role.to_string() == text).ok_or_else(|| RoleError(text.to_owned()))
    }
}

/// A user as it is to be: what is not said stays. By `POST /v1/users/{user}`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct UserChange {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub admin: Option<bool>,
    /// None: from now on none there.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub roles: BTreeMap<Namespace, Option<Role>>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_one_line() {
        let token = JoinToken {
            ca: PublicKey::from_bytes([7; 32]),
            id: InvitationId([1; ID_BYTES]),
            secret: Secret([2; SECRET_BYTES]),
            controller: "ctl.example.org:7420".to_owned(),
        };
        let text = token.to_string();
        assert_eq!(text.parse(), Ok(token.clone()));
        assert_eq!(format!(" {text}\n").parse(), Ok(token.clone()));
        assert!(!format!("{token:?}").contains("0202"), "a secret is not printed");
        let changed =
            [&text[1..], &text.replace("@", ""), &text.replace(":7420", ""), &text.replace(".0", ".")];
        for bad in changed.into_iter().chain([&text.replace("ctl", "c/../")[..], ""]) {
            assert_eq!(bad.parse::<JoinToken>(), Err(JoinTokenError), "{bad}");
        }
    }

    #[test]
    fn a_request_is_proven_by_its_key_alone() {
        let key = Key::from_seed(&[3; 32]);
        let token = format!("b1{}.01010101.{}@h:1", "07".repeat(32), "02".repeat(16)).parse().unwrap();
        let request = JoinRequest::new(&token, "a1".parse().ok(), None, &key);
        assert!(request.is_proven());
        let other = |change: fn(&mut JoinRequest)| {
            let mut request = request.clone();
            change(&mut request);
            request.is_proven()
        };
        assert!(!other(|request| request.party = "a2".parse().ok()));
        assert!(!other(|request| request.id = InvitationId([9; ID_BYTES])));
        assert!(!other(|request| request.key = Key::from_seed(&[4; 32]).public()));
    }
}

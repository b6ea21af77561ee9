//! Identifiers: parsed once, valid ever after. No other module may build one from a string.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::hex;
use crate::limits::{NAME_BYTES_MAX, TOKEN_BYTES_MAX};

/// Why a string is not an identifier.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IdError {
    #[error("{what} is empty")]
    Empty { what: &'static str },
    #[error("{what} `{value}` is {bytes} bytes long, at most {max} are allowed")]
    TooLong { what: &'static str, value: String, bytes: usize, max: usize },
    #[error(
        "{what} `{value}` may hold only a-z, 0-9 and `-`, and must begin and end with a letter or a digit"
    )]
    NotAName { what: &'static str, value: String },
    #[error("{what} `{value}` may hold only letters, digits, `-`, `_`, `.` and `:`")]
    NotAToken { what: &'static str, value: String },
    #[error("`{value}` is not a pod: expected NAME-INDEX")]
    NotAPod { value: String },
    #[error("`{value}` is not a digest: expected sha256: and 64 hexadecimal digits")]
    NotADigest { value: String },
}

fn shorten(value: &str) -> String {
    value.chars().take(80).collect()
}

fn parse_name(what: &'static str, value: &str) -> Result<(), IdError> {
    if value.is_empty() {
        return Err(IdError::Empty { what });
    }
    if value.len() > NAME_BYTES_MAX {
        let bytes = value.len();
        return Err(IdError::TooLong { what, value: shorten(value), bytes, max: NAME_BYTES_MAX });
    }
    let alnum = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let bytes = value.as_bytes();
    let ends = alnum(bytes[0]) && alnum(bytes[bytes.len() - 1]);
    if !ends || !bytes.iter().all(|b| alnum(*b) || *b == b'-') {
        return Err(IdError::NotAName { what, value: shorten(value) });
    }
    Ok(())
}

fn parse_token(what: &'static str, value: &str) -> Result<(), IdError> {
    if value.is_empty() {
        return Err(IdError::Empty { what });
    }
    if value.len() > TOKEN_BYTES_MAX {
        let bytes = value.len();
        return Err(IdError::TooLong { what, value: shorten(value), bytes, max: TOKEN_BYTES_MAX });
    }
    if !value.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.:".contains(&b)) {
        return Err(IdError::NotAToken { what, value: shorten(value) });
    }
    Ok(())
}

macro_rules! id {
    ($(#[$doc:meta])* $name:ident, $what:literal, $parse:path) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(Box<str>);

        impl $name {
            pub fn parse(value: &str) -> Result<Self, IdError> {
                $parse($what, value)?;
                Ok(Self(value.into()))
            }

            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(&self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl FromStr for $name {
            type Err = IdError;
            fn from_str(value: &str) -> Result<Self, IdError> {
                Self::parse(value)
            }
        }

        impl TryFrom<String> for $name {
            type Error = IdError;
            fn try_from(value: String) -> Result<Self, IdError> {
                Self::parse(&value)
            }
        }

        impl From<$name> for String {
            fn from(id: $name) -> String {
                id.0.into()
            }
        }
    };
}

id!(
    /// The fleet: the first level of every topic after the version.
    ClusterName, "cluster", parse_name
);
id!(
    /// A machine with an agent; stable across reboots and reinstallations.
    NodeId, "node", parse_name
);
id!(
    /// A user, team or project.
    Namespace, "namespace", parse_name
);
id!(
    /// What the user calls a job; unique within its namespace.
    JobName, "job", parse_name
);
id!(
    /// A container of a pod; the single one of a plain job is `main`.
    ContainerName, "container", parse_name
);
id!(
    /// A named volume, kept between the pods of a job.
    VolumeName, "volume", parse_name
);
id!(
    /// A secret of a namespace.
    SecretName, "secret", parse_name
);
id!(
    /// A person, or a program that submits.
    UserName, "user", parse_name
);
id!(
    /// One client's pair of query topics.
    ClientId, "client", parse_name
);
id!(
    /// One accepted job, for ever: a later job of the same name has another.
    JobUid, "job uid", parse_name
);
id!(
    /// A controller's store, from its creation on.
    StoreId, "store id", parse_token
);
id!(
    /// An agent's ledger, from its creation on; numbers its events.
    LedgerId, "ledger id", parse_token
);
id!(
    /// One run of an agent between start and end.
    SessionNonce, "session nonce", parse_token
);
id!(
    /// The kernel's boot id: another one means that nothing of the last boot runs.
    BootId, "boot id", parse_token
);
id!(
    /// The machine itself, across reinstallations of its system.
    HardwareId, "hardware id", parse_token
);
id!(
    /// What a client calls its submit, command or query.
    RequestId, "id", parse_token
);

impl HardwareId {
    /// Of a machine whose id is not recorded; none has it.
    pub fn unknown() -> Self {
        Self("unknown".into())
    }
}

impl BootId {
    /// Of a boot whose id is not recorded; none has it.
    pub fn unknown() -> Self {
        Self("unknown".into())
    }
}

impl SessionNonce {
    /// Of a session whose nonce is not recorded; none has it.
    pub fn unknown() -> Self {
        Self("unknown".into())
    }
}

impl JobName {
    /// The name of the job's pod `index`, as users see it.
    pub fn pod(&self, index: u32) -> PodName {
        PodName { job: self.clone(), index }
    }
}

impl JobUid {
    pub fn pod(&self, index: u32) -> PodId {
        PodId { uid: self.clone(), index }
    }
}

impl Namespace {
    pub fn default_namespace() -> Self {
        Self("default".into())
    }
}

macro_rules! pod_pair {
    ($(#[$doc:meta])* $name:ident { $field:ident: $inner:ident }) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name {
            pub $field: $inner,
            pub index: u32,
        }

        impl $name {
            pub fn parse(value: &str) -> Result<Self, IdError> {
                let bad = || IdError::NotAPod { value: shorten(value) };
                let (head, index) = value.rsplit_once('-').ok_or_else(bad)?;
                let index: u32 = index.parse().map_err(|_| bad())?;
                let id = Self { $field: $inner::parse(head).map_err(|_| bad())?, index };
                // `a-+1` and `a-01` would be second spellings of one pod.
                if id.to_string() == value { Ok(id) } else { Err(bad()) }
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(&format!("{}-{}", self.$field, self.index))
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}-{}", self.$field, self.index)
            }
        }

        impl FromStr for $name {
            type Err = IdError;
            fn from_str(value: &str) -> Result<Self, IdError> {
                Self::parse(value)
            }
        }

        impl TryFrom<String> for $name {
            type Error = IdError;
            fn try_from(value: String) -> Result<Self, IdError> {
                Self::parse(&value)
            }
        }

        impl From<$name> for String {
            fn from(id: $name) -> String {
                id.to_string()
            }
        }
    };
}

pod_pair!(
    /// A pod for the programs: it outlives the job's name. Printed `{uid}-{index}`.
    PodId { uid: JobUid }
);
pod_pair!(
    /// A pod for people. Printed `{job}-{index}`.
    PodName { job: JobName }
);

macro_rules! counter {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(
            Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
        )]
        #[serde(transparent)]
        pub struct $name(pub u64);

        impl $name {
            #[must_use]
            pub fn next(self) -> Self {
                Self(self.0 + 1)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(&self.0, f)
            }
        }
    };
}

counter!(
    /// Counts a pod's placements, across the job's generations; never goes back. The first is 1.
    Epoch
);
counter!(
    /// Counts the starts of a pod within an epoch. The first is 1.
    Run
);
counter!(
    /// Counts leaders of a store.
    Term
);
counter!(
    /// Counts versions of a job's file, or of a node's desired set.
    Generation
);

/// A SHA-256 digest; printed as OCI does, `sha256:` and 64 lowercase hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Digest([u8; 32]);

impl Digest {
    pub fn of(bytes: &[u8]) -> Self {
        Self(Sha256::digest(bytes).into())
    }

    pub fn parse(value: &str) -> Result<Self, IdError> {
        let bad = || IdError::NotADigest { value: shorten(value) };
        value.strip_prefix("sha256:").and_then(hex::decode).map(Self).ok_or_else(bad)
    }

    /// Of a hash that was computed piece by piece.
    pub fn from_bytes(sha256: [u8; 32]) -> Self {
        Self(sha256)
    }

    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// The 64 digits without the algorithm's name: fit for a file's name.
    pub fn hex(&self) -> String {
        hex::encode(&self.0)
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sha256:{}", self.hex())
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sha256:{}", self.hex())
    }
}

impl FromStr for Digest {
    type Err = IdError;
    fn from_str(value: &str) -> Result<Self, IdError> {
        Self::parse(value)
    }
}

impl TryFrom<String> for Digest {
    type Error = IdError;
    fn try_from(value: String) -> Result<Self, IdError> {
        Self::parse(&value)
    }
}

impl From<Digest> for String {
    fn from(digest: Digest) -> String {
        digest.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn names() {
        for good in ["a", "0", "a-b", "digits-2", &"x".repeat(63)] {
            assert_eq!(JobName::parse(good).unwrap().as_str(), good);
        }
        for bad in ["", "-a", "a-", "A", "a_b", "a/b", "a+", "#", "é", &"x".repeat(64)] {
            assert!(JobName::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn pods_have_one_spelling() {
        assert_eq!(PodName::parse("a-b-7").unwrap(), JobName::parse("a-b").unwrap().pod(7));
        for bad in ["a", "a-", "-1", "a-+1", "a-01", "a-4294967296"] {
            assert!(PodName::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn digests_match_the_standard() {
        // FIPS 180-4, the empty message.
        let empty = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
        assert_eq!(Digest::of(b"").to_string(), empty);
    }

    proptest! {
        #[test]
        fn a_digest_goes_to_a_string_and_back(bytes: [u8; 32]) {
            let digest = Digest(bytes);
            prop_assert_eq!(Digest::parse(&digest.to_string()).unwrap(), digest);
        }

        #[test]
        fn whatever_parses_prints_the_same(text in "\\PC{0,70}") {
            if let Ok(name) = JobName::parse(&text) {
                prop_assert_eq!(name.as_str(), &text);
            }
            if let Ok(pod) = PodId::parse(&text) {
                prop_assert_eq!(pod.to_string(), text);
            }
        }
    }
}

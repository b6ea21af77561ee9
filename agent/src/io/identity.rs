//! Who this agent is, and whose orders it obeys: its own key, made at its first start, and the root of its controller,
//! both in the data directory. The secret half of the key never leaves it.

use std::fs;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use berth_protocol::ids::ClusterName;
use berth_protocol::sign::{Author, Key, MandateError, PublicKey, SEED_BYTES};
use berth_protocol::units::Timestamp;
use serde::{Deserialize, Serialize};

use super::clock;
use crate::shim::sys;

const DIR: &str = "identity";
/// The seed's bytes.
const KEY: &str = "key";
const CONTROLLER: &str = "controller.json";

#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    #[error("cannot use this node's identity in {path}")]
    File { path: PathBuf, source: io::Error },
    #[error(
        "{path} is damaged: put it back from a backup, or let this machine be a new node, without the pods that it had, by \
         removing the data directory"
    )]
    Damaged { path: PathBuf },
}

/// Why an order is not obeyed, though its signature is good.
#[derive(Debug, thiserror::Error)]
pub enum Untrusted {
    #[error(
        "the message is signed by key {by}, and this node belongs to the controller of key {root}; if that was set up \
         anew, stop the agent and remove its data directory"
    )]
    Stranger { by: String, root: String },
    #[error("the message is signed by a controller whose root this node does not know")]
    Unknown,
    #[error("the message is signed by key {by}, and {why}")]
    Mandate { by: String, why: MandateError },
    #[error("the controller that it comes from cannot be remembered, so it is not obeyed: {0}")]
    Unwritten(#[from] io::Error),
}

impl Untrusted {
    /// A word for counters.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Stranger { .. } | Self::Unknown => "other-controller",
            Self::Mandate { .. } => "mandate",
            Self::Unwritten(_) => "unwritten",
        }
    }
}

/// This node's key.
pub fn key(data_dir: &Path) -> Result<Key, IdentityError> {
    let dir = data_dir.join(DIR);
    let path = dir.join(KEY);
    let failed = |source| IdentityError::File { path: path.clone(), source };
    fs::DirBuilder::new().recursive(true).mode(0o700).create(&dir).map_err(failed)?;
    match fs::read(&path) {
        Ok(bytes) => {
            let seed: [u8; SEED_BYTES] = bytes.try_into().map_err(|_| IdentityError::Damaged { path })?;
            Ok(Key::from_seed(&seed))
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let seed = clock::random_bytes().map_err(failed)?;
            sys::write_durably(&dir, KEY, &seed).map_err(failed)?;
            Ok(Key::from_seed(&seed))
        }
        Err(error) => Err(failed(error)),
    }
}

/// Whom the node belongs to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Allegiance {
    root: PublicKey,
    /// Mandates below are void.
    #[serde(default)]
    valid_from: u64,
}

/// Knows whose orders are obeyed. The first controller that is heard is the node's, and no other after it.
pub struct Authority {
    dir: PathBuf,
    cluster: ClusterName,
    to: Option<Allegiance>,
}

impl Authority {
    pub fn open(data_dir: &Path, cluster: &ClusterName) -> Result<Self, IdentityError> {
        let dir = data_dir.join(DIR);
        let path = dir.join(CONTROLLER);
        let to = match fs::read(&path) {
            Ok(bytes) => Some(serde_json::from_slice(&bytes).map_err(|_| IdentityError::Damaged { path })?),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(source) => return Err(IdentityError::File { path, source }),
        };
        Ok(Self { dir, cluster: cluster.clone(), to })
    }

    /// Is it the controller that says this? What is learned on the way is on disk before this returns.
    pub fn check(&mut self, author: &Author, now: Timestamp) -> Result<(), Untrusted> {
        let (by, Some(to)) = (author.key.short(), &self.to) else {
            if author.mandate.is_some() {
                return Err(Untrusted::Unknown);
            }
            return Ok(self.remember(Allegiance { root: author.key, valid_from: 0 })?);
        };
        let Some(mandate) = &author.mandate else {
            if author.key == to.root {
                return Ok(());
            }
            return Err(Untrusted::Stranger { by, root: to.root.short() });
        };
        mandate
            .check(&to.root, &self.cluster, &author.key, to.valid_from, now)
            .map_err(|why| Untrusted::Mandate { by, why })?;
        if mandate.valid_from > to.valid_from {
            self.remember(Allegiance { valid_from: mandate.valid_from, ..to.clone() })?;
        }
        Ok(())
    }

    fn remember(&mut self, to: Allegiance) -> io::Result<()> {
        sys::write_durably(&self.dir, CONTROLLER, &serde_json::to_vec(&to)?)?;
        self.to = Some(to);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use berth_protocol::sign::Mandate;

    fn cluster() -> ClusterName {
        ClusterName::parse("lab").unwrap()
    }

    fn of(n: u8) -> Key {
        Key::from_seed(&[n; SEED_BYTES])
    }

    fn plain(n: u8) -> Author {
        Author { key: of(n).public(), mandate: None }
    }

    #[test]
    fn a_key_is_made_once_and_is_its_owners_alone() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let first = key(dir.path()).unwrap().public();
        assert_eq!(key(dir.path()).unwrap().public(), first);
        let mode = fs::metadata(dir.path().join(DIR)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o700);
        fs::write(dir.path().join(DIR).join(KEY), "torn").unwrap();
        assert!(matches!(key(dir.path()), Err(IdentityError::Damaged { .. })));
    }

    #[test]
    fn the_first_controller_heard_is_obeyed_and_no_other() {
        let dir = tempfile::tempdir().unwrap();
        key(dir.path()).unwrap();
        let mut authority = Authority::open(dir.path(), &cluster()).unwrap();
        assert!(authority.check(&plain(1), Timestamp(0)).is_ok());
        assert!(authority.check(&plain(1), Timestamp(0)).is_ok());
        assert!(matches!(authority.check(&plain(2), Timestamp(0)), Err(Untrusted::Stranger { .. })));
        // After a restart as well.
        let mut authority = Authority::open(dir.path(), &cluster()).unwrap();
        assert!(matches!(authority.check(&plain(2), Timestamp(0)), Err(Untrusted::Stranger { .. })));
        assert!(authority.check(&plain(1), Timestamp(0)).is_ok());
    }

    #[test]
    fn who_has_the_roots_mandate_is_obeyed_until_it_is_taken_back() {
        let dir = tempfile::tempdir().unwrap();
        key(dir.path()).unwrap();
        let mut authority = Authority::open(dir.path(), &cluster()).unwrap();
        let speaker = |root: u8, key: u8, serial, valid_from| Author {
            key: of(key).public(),
            mandate: Some(Mandate::give(
                &of(root),
                &cluster(),
                &of(key).public(),
                serial,
                valid_from,
                Timestamp(100),
            )),
        };
        let now = Timestamp(50);
        assert!(matches!(authority.check(&speaker(1, 2, 1, 0), now), Err(Untrusted::Unknown)));
        authority.check(&plain(1), now).unwrap();
        authority.check(&speaker(1, 2, 1, 0), now).unwrap();
        // Beside it the next one, while both may speak.
        authority.check(&speaker(1, 3, 2, 0), now).unwrap();
        authority.check(&speaker(1, 2, 1, 0), now).unwrap();
        assert!(authority.check(&speaker(4, 2, 9, 0), now).is_err(), "another root's");
        assert!(authority.check(&speaker(1, 3, 2, 0), Timestamp(101)).is_err(), "over");
        authority.check(&speaker(1, 3, 3, 3), now).unwrap();
        let mut authority = Authority::open(dir.path(), &cluster()).unwrap();
        assert!(authority.check(&speaker(1, 2, 1, 0), now).is_err(), "taken back");
        authority.check(&speaker(1, 3, 3, 3), now).unwrap();
    }
}

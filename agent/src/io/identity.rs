//! Who this agent is, and whose orders it obeys: its own key, made at its first start, and its controller's, both in the
//! data directory. The secret half of the agent's key never leaves it.

use std::fs;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};

use berth_protocol::join::Membership;
use berth_protocol::sign::{Key, PublicKey, SEED_BYTES};
use berth_protocol::tls::Clients;
use rustls::{ClientConfig, ServerConfig};

use super::clock;
use crate::shim::sys;

const DIR: &str = "identity";
/// The seed's bytes.
const KEY: &str = "key";
/// The controller's public key, as JSON.
const CONTROLLER: &str = "controller.json";
/// What the controller said when this node joined.
const MEMBERSHIP: &str = "membership.json";

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
        "the message is signed by key {by}, and this node belongs to the controller of key {own}; if that was set up \
         anew, stop the agent and remove its data directory"
    )]
    Stranger { by: String, own: String },
    #[error("the controller that it comes from cannot be remembered, so it is not obeyed: {0}")]
    Unwritten(#[from] io::Error),
}

impl Untrusted {
    /// A word for counters.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Stranger { .. } => "other-controller",
            Self::Unwritten(_) => "unwritten",
        }
    }
}

/// A file of the identity's; none where there is none yet.
fn read(path: &Path) -> Result<Option<Vec<u8>>, IdentityError> {
    match fs::read(path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(IdentityError::File { path: path.to_owned(), source }),
    }
}

/// This node's key.
pub fn key(data_dir: &Path) -> Result<Key, IdentityError> {
    let dir = data_dir.join(DIR);
    let path = dir.join(KEY);
    let failed = |source| IdentityError::File { path: path.clone(), source };
    // What is above the data directory is for everybody to pass through: a controller may be there.
    data_dir.parent().map_or(Ok(()), fs::create_dir_all).map_err(failed)?;
    fs::DirBuilder::new().recursive(true).mode(0o700).create(&dir).map_err(failed)?;
    let seed: [u8; SEED_BYTES] = match read(&path)? {
        Some(bytes) => bytes.try_into().map_err(|_| IdentityError::Damaged { path })?,
        None => {
            let seed = clock::random_bytes().map_err(failed)?;
            sys::write_durably(&dir, KEY, &seed).map_err(failed)?;
            seed
        }
    };
    Ok(Key::from_seed(&seed))
}

/// What this node has from the cluster that it joined; none where it joined none.
pub fn membership(data_dir: &Path) -> Result<Option<Membership>, IdentityError> {
    let path = data_dir.join(DIR).join(MEMBERSHIP);
    let read = read(&path)?.map(|bytes| serde_json::from_slice(&bytes)).transpose();
    read.map_err(|_| IdentityError::Damaged { path })
}

/// Puts it where `membership` finds it.
pub fn keep_membership(data_dir: &Path, membership: &Membership) -> Result<(), IdentityError> {
    let dir = data_dir.join(DIR);
    let failed = |source| IdentityError::File { path: dir.join(MEMBERSHIP), source };
    let text = serde_json::to_vec_pretty(membership).map_err(|error| failed(error.into()))?;
    sys::write_durably(&dir, MEMBERSHIP, &text).map_err(failed)
}

/// By what this node shows that it belongs, as long as a certificate is good.
pub struct Shown(RwLock<(Arc<ClientConfig>, Arc<ServerConfig>)>);

impl Shown {
    pub fn new(membership: &Membership, key: &Key) -> Result<Self, BadCertificate> {
        Ok(Self(RwLock::new(configs(membership, key)?)))
    }

    /// There is another certificate.
    pub fn renew(&self, membership: &Membership, key: &Key) -> Result<(), BadCertificate> {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = configs(membership, key)?;
        Ok(())
    }

    pub fn client(&self) -> Arc<ClientConfig> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).0.clone()
    }

    /// Towards other nodes, which have a token.
    pub fn server(&self) -> Arc<ServerConfig> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).1.clone()
    }
}

#[derive(Debug, thiserror::Error)]
#[error(
    "this node's certificate is damaged, or not its key's ({0}): join the cluster again, with a token from `berth node token \
     NODE` at the controller"
)]
pub struct BadCertificate(String);

fn configs(
    membership: &Membership,
    key: &Key,
) -> Result<(Arc<ClientConfig>, Arc<ServerConfig>), BadCertificate> {
    let credentials = membership.credentials(key).map_err(|error| BadCertificate(error.to_string()))?;
    let configs = credentials.client().and_then(|client| Ok((client, credentials.server(Clients::Any)?)));
    configs.map_err(|error| BadCertificate(error.to_string()))
}

/// Knows whose orders are obeyed: the controller's of the cluster that this node joined; where it joined none, the first
/// that is heard is the node's, and no other after it.
pub struct Authority {
    dir: PathBuf,
    own: Option<PublicKey>,
}

impl Authority {
    pub fn open(data_dir: &Path) -> Result<Self, IdentityError> {
        let dir = data_dir.join(DIR);
        let path = dir.join(CONTROLLER);
        if let Some(membership) = membership(data_dir)? {
            return Ok(Self { dir, own: Some(membership.controller) });
        }
        let own = read(&path)?.map(|bytes| serde_json::from_slice(&bytes)).transpose();
        Ok(Self { dir, own: own.map_err(|_| IdentityError::Damaged { path })? })
    }

    /// Is this the controller's key? The first one is on disk before this returns.
    pub fn check(&mut self, by: PublicKey) -> Result<(), Untrusted> {
        match &self.own {
            Some(own) if *own == by => Ok(()),
            Some(own) => Err(Untrusted::Stranger { by: by.short(), own: own.short() }),
            None => {
                let text = serde_json::to_vec(&by).map_err(io::Error::from)?;
                sys::write_durably(&self.dir, CONTROLLER, &text)?;
                self.own = Some(by);
                Ok(())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn of(n: u8) -> PublicKey {
        PublicKey::from_bytes([n; 32])
    }

    #[test]
    fn a_key_is_made_once_and_is_its_owners_alone() {
        let dir = tempfile::tempdir().unwrap();
        let first = key(dir.path()).unwrap().public();
        assert_eq!(key(dir.path()).unwrap().public(), first);
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(&dir.path().join(DIR)), 0o700);
        let deep = dir.path().join("lib/berth/agent");
        key(&deep).unwrap();
        assert_eq!((mode(&deep), mode(deep.parent().unwrap()) & 0o055), (0o700, 0o055));
        fs::write(dir.path().join(DIR).join(KEY), "torn").unwrap();
        assert!(matches!(key(dir.path()), Err(IdentityError::Damaged { .. })));
    }

    #[test]
    fn the_first_controller_heard_is_obeyed_and_no_other() {
        let dir = tempfile::tempdir().unwrap();
        key(dir.path()).unwrap();
        let mut authority = Authority::open(dir.path()).unwrap();
        for _ in 0..2 {
            assert!(authority.check(of(1)).is_ok());
            assert!(matches!(authority.check(of(2)), Err(Untrusted::Stranger { .. })));
            // After a restart as well.
            authority = Authority::open(dir.path()).unwrap();
        }
        fs::write(dir.path().join(DIR).join(CONTROLLER), "\"torn").unwrap();
        assert!(matches!(Authority::open(dir.path()), Err(IdentityError::Damaged { .. })));
    }
}

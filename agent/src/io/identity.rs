//! Who this agent is, and whose orders it obeys: its own key, made at its first start, the root's of its cluster, and whom
//! that has named last, all in the data directory. The secret half of the agent's key never leaves it.

use std::fs;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};

use berth_protocol::codec::Signed;
use berth_protocol::delegation::{Delegation, Distrust, Trust};
use berth_protocol::ids::ClusterName;
use berth_protocol::join::Membership;
use berth_protocol::sign::{Key, PublicKey, SEED_BYTES};
use berth_protocol::tls::Clients;
use berth_protocol::units::Timestamp;
use rustls::{ClientConfig, ServerConfig};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::clock;
use crate::shim::sys;

const DIR: &str = "identity";
/// The seed's bytes.
const KEY: &str = "key";
/// The public key of the first controller that was heard, as JSON, where this node joined no cluster.
const CONTROLLER: &str = "controller.json";
/// The latest delegation that was heard.
const DELEGATION: &str = "delegation.json";
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
    #[error(transparent)]
    Distrust(#[from] Distrust),
    #[error("the controller that it comes from cannot be remembered, so it is not obeyed: {0}")]
    Unwritten(#[from] io::Error),
}

impl Untrusted {
    /// A word for counters.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Distrust(why) => why.kind(),
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
    read_json(data_dir.join(DIR).join(MEMBERSHIP))
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

/// Knows whose orders are obeyed: whom the root of the cluster that this node joined has named last; where it joined none,
/// the first controller that is heard is the node's, and no other after it.
pub struct Authority {
    dir: PathBuf,
    cluster: ClusterName,
    /// There is a root whose word counts.
    joined: bool,
    trust: Option<Trust>,
}

impl Authority {
    pub fn open(data_dir: &Path, cluster: &ClusterName) -> Result<Self, IdentityError> {
        let dir = data_dir.join(DIR);
        let cluster = cluster.clone();
        let Some(Membership { root, delegation: told, .. }) = membership(data_dir)? else {
            let first: Option<PublicKey> = read_json(dir.join(CONTROLLER))?;
            let trust = first.map(|first| Trust::new(cluster.clone(), first));
            return Ok(Self { dir, cluster, joined: false, trust });
        };
        let mut trust = Trust::new(cluster.clone(), root);
        // What was heard since it joined; of another root, where it has joined another cluster since, it says nothing.
        let heard: Option<Delegation> = read_json(dir.join(DELEGATION))?;
        told.into_iter().chain(heard).for_each(|delegation| trust.learn(delegation));
        Ok(Self { dir, cluster, joined: true, trust: Some(trust) })
    }

    /// Does it speak for the controller? What is learnt from it is on disk before this returns.
    pub fn check(&mut self, signed: Signed) -> Result<(), Untrusted> {
        let Some(trust) = &mut self.trust else {
            sys::write_durably(&self.dir, CONTROLLER, &json(&signed.by)?)?;
            self.trust = Some(Trust::new(self.cluster.clone(), signed.by));
            return Ok(());
        };
        if let Some(later) = trust.judge(&signed.by, signed.delegation.filter(|_| self.joined))? {
            sys::write_durably(&self.dir, DELEGATION, &json(&later)?)?;
            let (key, until) = (later.key.short(), later.expires);
            tracing::info!("the controller's key is {key} from now on, by the cluster's root, until {until}");
            trust.learn(later);
        }
        Ok(())
    }

    /// May whoever speaks for it order something new?
    pub fn may_order(&self, now: Timestamp) -> Result<(), Untrusted> {
        Ok(self.trust.as_ref().map_or(Ok(()), |trust| trust.may_order(now))?)
    }
}

fn read_json<T: DeserializeOwned>(path: PathBuf) -> Result<Option<T>, IdentityError> {
    let read = read(&path)?.map(|bytes| serde_json::from_slice(&bytes)).transpose();
    read.map_err(|_| IdentityError::Damaged { path })
}

fn json<T: Serialize>(value: &T) -> io::Result<Vec<u8>> {
    Ok(serde_json::to_vec(value)?)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use berth_protocol::units::Millis;

    use super::*;

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

    fn by(n: u8, delegation: Option<Delegation>) -> Signed {
        Signed { by: key_of(n).public(), delegation }
    }

    fn key_of(n: u8) -> Key {
        Key::from_seed(&[n; SEED_BYTES])
    }

    fn lab() -> ClusterName {
        ClusterName::parse("lab").unwrap()
    }

    /// By the root 1, for the key `n`.
    fn delegated(n: u8, serial: u64) -> Delegation {
        let life = Millis(3_600_000);
        Delegation::new(&key_of(1), &lab(), key_of(n).public(), Some(serial - 1), Timestamp(7), life)
    }

    fn refusal(authority: &mut Authority, signed: Signed) -> &'static str {
        authority.check(signed).unwrap_err().kind()
    }

    #[test]
    fn the_first_controller_heard_is_obeyed_and_no_other() {
        let dir = tempfile::tempdir().unwrap();
        key(dir.path()).unwrap();
        let mut authority = Authority::open(dir.path(), &lab()).unwrap();
        // Whatever it shows of a root that this node knows nothing of.
        let of_some_root = |n: u8| {
            let key = key_of(n).public();
            Delegation::new(&key_of(9), &lab(), key, Some(n.into()), Timestamp(7), Millis(1))
        };
        for _ in 0..2 {
            assert!(authority.check(by(1, Some(of_some_root(1)))).is_ok());
            assert!(authority.check(by(1, None)).is_ok());
            assert_eq!(refusal(&mut authority, by(2, None)), "other-controller");
            assert_eq!(refusal(&mut authority, by(2, Some(of_some_root(2)))), "other-controller");
            // After a restart as well.
            authority = Authority::open(dir.path(), &lab()).unwrap();
        }
        fs::write(dir.path().join(DIR).join(CONTROLLER), "\"torn").unwrap();
        assert!(matches!(Authority::open(dir.path(), &lab()), Err(IdentityError::Damaged { .. })));
    }

    /// One that has joined the cluster of root 1, and was told then that the key 2 speaks for it.
    fn joined(dir: &Path) -> Authority {
        key(dir).unwrap();
        let membership = Membership {
            cluster: lab(),
            party: "a1".parse().unwrap(),
            ca: String::new(),
            certificate: String::new(),
            expires: Timestamp(0),
            root: key_of(1).public(),
            delegation: Some(delegated(2, 10)),
            broker: String::new(),
            url: String::new(),
        };
        keep_membership(dir, &membership).unwrap();
        Authority::open(dir, &lab()).unwrap()
    }

    #[test]
    fn the_latest_key_is_on_disk_before_it_is_obeyed() {
        let dir = tempfile::tempdir().unwrap();
        let mut authority = joined(dir.path());
        assert!(authority.check(by(2, None)).is_ok());
        assert_eq!(refusal(&mut authority, by(1, None)), "other-controller", "the root is away");
        assert!(authority.check(by(3, Some(delegated(3, 11)))).is_ok());
        for _ in 0..2 {
            assert!(authority.check(by(3, None)).is_ok());
            assert_eq!(refusal(&mut authority, by(2, Some(delegated(2, 10)))), "replaced-key");
            assert_eq!(refusal(&mut authority, by(2, None)), "other-controller");
            authority = Authority::open(dir.path(), &lab()).unwrap();
        }
        // Joined again, with an older word than was heard meanwhile.
        let mut authority = joined(dir.path());
        assert_eq!(refusal(&mut authority, by(2, Some(delegated(2, 10)))), "replaced-key");

        let file = dir.path().join(DIR).join(DELEGATION);
        fs::write(&file, "{torn").unwrap();
        assert!(matches!(Authority::open(dir.path(), &lab()), Err(IdentityError::Damaged { .. })));
        // What cannot be kept is not obeyed.
        fs::remove_file(&file).unwrap();
        let mut authority = joined(dir.path());
        fs::create_dir_all(file.join("in the way")).unwrap();
        assert_eq!(refusal(&mut authority, by(3, Some(delegated(3, 11)))), "unwritten");
        assert!(authority.check(by(2, None)).is_ok());
    }

    #[test]
    fn a_membership_of_before_there_were_roots_pins_the_controllers_own_key() {
        let dir = tempfile::tempdir().unwrap();
        joined(dir.path());
        let file = dir.path().join(DIR).join(MEMBERSHIP);
        let mut old: serde_json::Value = serde_json::from_slice(&fs::read(&file).unwrap()).unwrap();
        let old = old.as_object_mut().unwrap();
        old.remove("delegation");
        let pinned = old.remove("root").unwrap();
        old.insert("controller".to_owned(), pinned);
        fs::write(&file, serde_json::to_vec(&old).unwrap()).unwrap();
        let mut authority = Authority::open(dir.path(), &lab()).unwrap();
        assert!(authority.check(by(1, None)).is_ok());
        assert_eq!(refusal(&mut authority, by(2, None)), "other-controller");
        assert!(authority.may_order(Timestamp(u64::MAX)).is_ok());
    }
}

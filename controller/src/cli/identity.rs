//! Who this user is: a key and what the controller said when it was shown a token, in a directory of the user's own.

use std::fs;
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Context as _;
use berth_protocol::join::Membership;
use berth_protocol::request;
use berth_protocol::sign::{Key, SEED_BYTES};
use berth_protocol::topic::Topic;
use berth_protocol::units::Timestamp;
use rustls::ClientConfig;

use crate::io::ca;

const KEY: &str = "key";
const MEMBERSHIP: &str = "membership.json";
/// For other programs, such as mosquitto_pub and curl.
const KEY_PEM: &str = "key.pem";
const CA_PEM: &str = "ca.pem";
const CERTIFICATE_PEM: &str = "certificate.pem";
/// Root's, as `berth-controller init` leaves it.
pub const ADMIN: &str = "/etc/berth/admin";

#[derive(Debug, Clone)]
pub struct Identity {
    pub membership: Membership,
    key: Arc<Key>,
    dir: PathBuf,
}

impl Identity {
    pub fn new(dir: &Path, membership: Membership, key: Key) -> Self {
        Self { membership, key: Arc::new(key), dir: dir.to_owned() }
    }

    /// What is there; none where nothing is.
    pub fn load(dir: &Path) -> anyhow::Result<Option<Self>> {
        let Some(text) = read(&dir.join(MEMBERSHIP))? else { return Ok(None) };
        let damaged =
            || format!("{} is damaged: ask for a new token, then `berth login TOKEN`", dir.display());
        let membership = serde_json::from_slice(&text).with_context(damaged)?;
        let seed = read(&dir.join(KEY))?.with_context(damaged)?;
        let seed: [u8; SEED_BYTES] = seed.try_into().ok().with_context(damaged)?;
        Ok(Some(Self::new(dir, membership, Key::from_seed(&seed))))
    }

    /// Puts it where `load` finds it, for its owner alone.
    pub fn save(&self, seed: &[u8; SEED_BYTES]) -> anyhow::Result<()> {
        let dir = &self.dir;
        let failed = || format!("cannot write {}", dir.display());
        dir.parent().map_or(Ok(()), fs::create_dir_all).with_context(failed)?;
        fs::DirBuilder::new().recursive(true).mode(0o700).create(dir).with_context(failed)?;
        write(&dir.join(KEY), seed).with_context(failed)?;
        let pem = ca::key_pem(&self.key).context("the key cannot be written as PEM")?;
        write(&dir.join(KEY_PEM), pem.as_bytes()).with_context(failed)?;
        self.save_membership()
    }

    /// Likewise, of the same key.
    pub fn save_membership(&self) -> anyhow::Result<()> {
        let text = serde_json::to_vec_pretty(&self.membership)?;
        let Membership { ca, certificate, .. } = &self.membership;
        for (name, bytes) in
            [(CA_PEM, ca.as_bytes()), (CERTIFICATE_PEM, certificate.as_bytes()), (MEMBERSHIP, &text)]
        {
            write(&self.dir.join(name), bytes)
                .with_context(|| format!("cannot write {}", self.dir.display()))?;
        }
        Ok(())
    }

    /// What is said on `topic`, with this user's signature.
    pub fn sign(&self, topic: &Topic, at: Timestamp, body: &[u8]) -> anyhow::Result<Vec<u8>> {
        Ok(request::sign(&self.key, &self.membership.cluster, topic, at, body)?)
    }

    pub fn tls(&self) -> anyhow::Result<Arc<ClientConfig>> {
        let credentials = self.membership.credentials(&self.key).context("its certificates are damaged")?;
        credentials.client().context("its certificates are not its key's")
    }
}

fn read(path: &Path) -> anyhow::Result<Option<Vec<u8>>> {
    match fs::read(path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).with_context(|| format!("cannot read {}", path.display())),
    }
}

/// As a whole or not at all.
fn write(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let tmp = path.with_extension("tmp");
    let mut file = fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&tmp)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    fs::rename(tmp, path)
}

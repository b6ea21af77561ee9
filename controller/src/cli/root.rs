//! The cluster's root key, in a file that belongs on a machine, or a stick, that is switched on only to name another key for
//! the controller.

use std::fs;
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use anyhow::Context as _;
use berth_protocol::hex;
use berth_protocol::ids::ClusterName;
use berth_protocol::sign::{Key, SEED_BYTES};
use serde::{Deserialize, Serialize};

/// A larger file is not one.
const FILE_BYTES_MAX: u64 = 4096;

/// As it lies there, JSON: whoever finds it is to see what it is.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct File {
    berth_root_of: ClusterName,
    #[serde(with = "hex::text")]
    secret: [u8; SEED_BYTES],
}

pub struct Root {
    pub cluster: ClusterName,
    pub key: Key,
}

impl Root {
    pub fn load(path: &Path) -> anyhow::Result<Self> {
        let shown = path.display();
        let bytes = fs::metadata(path).with_context(|| format!("cannot read {shown}"))?.len();
        let text = (bytes <= FILE_BYTES_MAX).then(|| fs::read(path)).transpose();
        let text = text.with_context(|| format!("cannot read {shown}"))?;
        let file: Option<File> = text.and_then(|text| serde_json::from_slice(&text).ok());
        let File { berth_root_of, secret } = file.with_context(|| {
            format!("{shown} is no root of a cluster: `berth-controller init` makes one, once")
        })?;
        Ok(Self { cluster: berth_root_of, key: Key::from_seed(&secret) })
    }
}

/// A new file, for its owner alone; on disk when this returns.
pub fn save(path: &Path, cluster: &ClusterName, secret: [u8; SEED_BYTES]) -> io::Result<()> {
    let mut text = serde_json::to_vec_pretty(&File { berth_root_of: cluster.clone(), secret })?;
    text.push(b'\n');
    let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
    file.write_all(&text)?;
    file.sync_all()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn a_root_is_its_owners_alone_and_written_once() {
        let dir = tempfile::tempdir().unwrap();
        let (path, lab) = (dir.path().join("root.key"), ClusterName::parse("lab").unwrap());
        save(&path, &lab, [7; SEED_BYTES]).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        let root = Root::load(&path).unwrap();
        assert_eq!(
            (root.cluster, root.key.public()),
            (lab.clone(), Key::from_seed(&[7; SEED_BYTES]).public())
        );
        assert!(save(&path, &lab, [8; SEED_BYTES]).is_err());
        for bad in ["", "{}", "{\"berthRootOf\":\"lab\",\"secret\":\"07\"}", &"x".repeat(5_000)] {
            fs::write(&path, bad).unwrap();
            assert!(Root::load(&path).is_err(), "{bad}");
        }
    }
}

//! The pod's secrets as files in memory, for the containers that name them.

use std::fs::{self, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use berth_protocol::limits::POD_SECRETS_BYTES_MAX;
use berth_protocol::secret::SecretValues;

use super::sys;
use crate::io::secrets::are_named;
use crate::task::{Task, file};

/// Writes what comes on the standard input below `run/`, which ends with this process. Any user of a container that
/// mounts one may read it; the directory is seen by no other process.
pub fn lay_out(task: &Task, dir: &Path) -> io::Result<()> {
    if !are_named(&task.template) {
        return Ok(());
    }
    let most = u64::try_from(3 * POD_SECRETS_BYTES_MAX).unwrap_or(u64::MAX);
    let mut text = Vec::new();
    io::stdin().take(most).read_to_end(&mut text)?;
    // Nobody inherits it.
    sys::close_input()?;
    let values: SecretValues = serde_json::from_slice(&text)?;
    let at = dir.join(file::SECRETS_DIR);
    fs::create_dir(&at)?;
    for secret in task.template.containers.iter().flat_map(|container| &container.secrets) {
        let value = values.get(&secret.name).ok_or_else(|| {
            io::Error::new(io::ErrorKind::NotFound, format!("secret {} was not given", secret.name))
        })?;
        let path = at.join(secret.name.as_str());
        // Two containers may mount the same.
        if !path.exists() {
            OpenOptions::new().write(true).create_new(true).mode(0o444).open(&path)?.write_all(value)?;
            fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o444))?;
        }
    }
    Ok(())
}

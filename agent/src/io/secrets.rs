//! Secrets of pods that this node was given: straight from the controller, kept in memory as long as the pod is here.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Seek, Write};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use berth_protocol::job::PodTemplate;
use berth_protocol::message::node::DepotAccess;
use berth_protocol::secret::SecretValues;
use nix::sys::memfd::{MFdFlags, memfd_create};
use tokio::time::timeout;

use super::depot::{self, DepotError};
use super::identity::Shown;
use crate::core::Unready;
use crate::core::ledger::PodKey;

const WITHIN: Duration = Duration::from_secs(20);

/// Does any container of it mount one?
pub fn are_named(template: &PodTemplate) -> bool {
    template.containers.iter().any(|container| !container.secrets.is_empty())
}

/// They are of those that are here.
pub struct Secrets {
    /// By which the controller knows this node, where it knows nodes by certificates.
    shown: Option<Arc<Shown>>,
    held: Mutex<BTreeMap<PodKey, SecretValues>>,
}

impl Secrets {
    pub fn new(shown: Option<Arc<Shown>>) -> Self {
        Self { shown, held: Mutex::default() }
    }

    /// What a pod's supervisor is to be told.
    pub fn of(&self, key: &PodKey) -> SecretValues {
        let held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        held.get(key).cloned().unwrap_or_default()
    }

    /// Its pod is not here any more.
    pub fn forget(&self, key: &PodKey) {
        self.held.lock().unwrap_or_else(PoisonError::into_inner).remove(key);
    }

    /// Brings here what the template names, as it is now; where the controller is out of reach, what was brought before.
    pub async fn bring(
        &self,
        key: &PodKey,
        template: &PodTemplate,
        depot: Option<&DepotAccess>,
    ) -> Result<(), Unready> {
        if !are_named(template) {
            return Ok(());
        }
        let shown = self.shown.as_ref().map(|shown| shown.client());
        let fetched = timeout(WITHIN, depot::get_secrets(depot, shown, &key.pod, key.epoch)).await;
        match fetched.unwrap_or(Err(DepotError::Stalled)) {
            Ok(values) => {
                self.held.lock().unwrap_or_else(PoisonError::into_inner).insert(key.clone(), values);
                Ok(())
            }
            Err(_) if !self.of(key).is_empty() => Ok(()),
            // What is not there may be set yet, and is there for no other node either.
            Err(why) => Err(Unready {
                reason: "SecretsUnavailable".to_owned(),
                message: format!("cannot fetch the pod's secrets: {why}"),
                retriable: true,
                elsewhere: false,
            }),
        }
    }
}

/// What a supervisor reads of its standard input: on no disk, and there for it alone.
pub fn input(values: &SecretValues) -> io::Result<File> {
    let mut file = File::from(memfd_create(c"secrets", MFdFlags::MFD_CLOEXEC)?);
    file.write_all(&serde_json::to_vec(values)?)?;
    file.rewind()?;
    Ok(file)
}

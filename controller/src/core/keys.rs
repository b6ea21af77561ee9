//! The key that signs what nodes are told: by which delegation of the root's it may, and how long still. Its secret half is
//! sealed: here nobody can read it.

use berth_protocol::delegation::Delegation;
use berth_protocol::join::KeyStatus;
use berth_protocol::sign::PublicKey;
use berth_protocol::units::{Millis, Timestamp};
use serde::{Deserialize, Serialize};

use super::callers::{Actor, Denied};
use super::manage::NotChanged;
use super::notes::Note;
use super::{Controller, LoadError, Now, Write, records};

/// Its end is spoken of in the log this often.
const SPOKEN_OF_EVERY: Millis = Millis(24 * 3_600_000);

/// Stored. A cluster that was set up before there were roots has none.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SigningKey {
    /// Whose word nodes take for who speaks for the controller.
    pub root: PublicKey,
    pub delegation: Delegation,
    /// The key's seed, as `io` has sealed it, text.
    pub sealed: String,
}

/// The one of a store with these records.
///
/// # Errors
/// It is damaged, or of another version.
pub fn in_entries(entries: &[(String, Option<Vec<u8>>)]) -> Result<Option<SigningKey>, LoadError> {
    let Some((key, value)) = entries.iter().find(|(key, _)| key == records::SIGNING_KEY) else {
        return Ok(None);
    };
    let value = value.as_deref().unwrap_or_default();
    let read = serde_json::from_slice(value);
    read.map(Some).map_err(|source| LoadError::Entry { key: key.clone(), source })
}

/// As it is stored.
pub fn stored(key: &SigningKey) -> Write {
    records::write(records::SIGNING_KEY.to_owned(), key)
}

/// Why no other key is taken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NotRotated {
    #[error(
        "this cluster was set up before there were roots: its members know the controller's own key, which stays. To have \
         one that can be replaced, set the cluster up anew (`berth-controller init`), and let its machines join again"
    )]
    NoRoot,
    #[error(
        "the root that this cluster's members know has not named that key for it: is the file another cluster's?"
    )]
    NotNamed,
    #[error("the key's serial {serial} is not above that of the key in use, {latest}: begin again")]
    NotLater { serial: u64, latest: u64 },
    #[error("the controller has drawn no such key, or another one since: begin again")]
    NotDrawn,
}

impl Controller {
    pub(super) fn may_rotate(&self, by: &Actor, delegation: &Delegation) -> Result<(), NotChanged> {
        self.known(by)?.may_all()?;
        let Some(now) = &self.cluster.signing_key else { return Err(NotRotated::NoRoot.into()) };
        if !delegation.is_by(&now.root, &self.config.cluster) {
            return Err(NotRotated::NotNamed.into());
        }
        let (serial, latest) = (delegation.serial, now.delegation.serial);
        if serial <= latest {
            return Err(NotRotated::NotLater { serial, latest }.into());
        }
        Ok(())
    }

    /// As `may_rotate` has allowed.
    pub(super) fn rotate(&mut self, delegation: Delegation, sealed: String) {
        let Some(before) = self.cluster.signing_key.take() else { return };
        let key = SigningKey { root: before.root, delegation, sealed };
        self.dirty.step.writes.push(stored(&key));
        self.cluster.signing_key = Some(key);
        self.key_spoken_of = None;
    }

    /// May they rotate it at all?
    ///
    /// # Errors
    /// Not so, and why.
    pub fn may_draw_key(&self, by: &Actor) -> Result<(), NotChanged> {
        self.known(by)?.may_all()?;
        self.cluster.signing_key.as_ref().map(drop).ok_or(NotRotated::NoRoot.into())
    }

    /// What everybody of the cluster may know of it.
    ///
    /// # Errors
    /// Nobody of the cluster asks.
    pub fn key_told(&self, by: &Actor) -> Result<KeyStatus, Denied> {
        self.known(by)?;
        let key = self.cluster.signing_key.as_ref();
        Ok(KeyStatus {
            cluster: self.config.cluster.clone(),
            root: key.map(|key| key.root),
            delegation: key.map(|key| key.delegation.clone()),
        })
    }

    /// What is to be said of its end, if that is near or past.
    pub fn key_ending(&self, now: Now) -> Option<String> {
        self.cluster.signing_key.as_ref()?.delegation.ending(now.wall)
    }

    /// Until when it is good, where it has an end.
    pub(super) fn key_expires(&self) -> Option<Timestamp> {
        self.cluster.signing_key.as_ref().map(|key| key.delegation.expires)
    }

    /// Once a day.
    pub(super) fn speak_of_key(&mut self, now: Now) {
        let spoken_of = self.key_spoken_of.is_some_and(|at| now.wall.since(at) < SPOKEN_OF_EVERY);
        if !spoken_of && let Some(ending) = self.key_ending(now) {
            self.key_spoken_of = Some(now.wall);
            self.note(Note::KeyEnds(ending));
        }
    }
}

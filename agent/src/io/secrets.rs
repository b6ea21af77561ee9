//! Secrets of pods that this node was given: straight from the controller, kept in memory as long as the pod is here.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Seek, Write};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use berth_protocol::job::PodTemplate;
use berth_protocol::limits::POD_SECRETS_BYTES_MAX;
use berth_protocol::message::node::DepotAccess;
use berth_protocol::secret::SecretValues;
use bytes::Bytes;
use http_body_util::{BodyExt, Empty, Limited};
use hyper::{Request, StatusCode};
use nix::sys::memfd::{MFdFlags, memfd_create};
use tokio::time::timeout;

use super::http;
use super::identity::Shown;
use crate::core::Unready;
use crate::core::ledger::PodKey;

const WITHIN: Duration = Duration::from_secs(20);
/// Values are digits, two a byte; names and quotes are beside them.
const ANSWER_BYTES_MAX: usize = 2 * POD_SECRETS_BYTES_MAX + 64 * 1024;

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
        let failed = |message: String, retriable| Unready {
            reason: "SecretsUnavailable".to_owned(),
            message,
            retriable,
            elsewhere: false,
        };
        let fetched = match depot {
            Some(access) => {
                let fetched = timeout(WITHIN, self.fetch(key, access)).await;
                fetched.unwrap_or_else(|_| Err((io::ErrorKind::TimedOut.to_string(), true)))
            }
            None => Err(("the controller has not yet said where it is".to_owned(), true)),
        };
        match fetched {
            Ok(values) => {
                self.held.lock().unwrap_or_else(PoisonError::into_inner).insert(key.clone(), values);
                Ok(())
            }
            Err((_, true)) if !self.of(key).is_empty() => Ok(()),
            Err((why, retriable)) => Err(failed(format!("cannot fetch the pod's secrets: {why}"), retriable)),
        }
    }

    /// Or why not, and whether that may pass.
    async fn fetch(&self, key: &PodKey, access: &DepotAccess) -> Result<SecretValues, (String, bool)> {
        let passing = |error: &dyn std::fmt::Display| (error.to_string(), true);
        let (_, authority) = access.url.split_once("://").ok_or(("its address is none".to_owned(), false))?;
        let authority = authority.trim_end_matches('/');
        let mut sender = match (&access.tls, &self.shown) {
            (Some(server), Some(shown)) => {
                http::connect_as(authority, &server.party.dns_name(), shown.client()).await
            }
            _ => http::connect(authority).await,
        }
        .map_err(|error| passing(&error))?;
        let (pod, epoch) = (&key.pod, key.epoch);
        let request = Request::get(format!("/v1/pods/{}/{}/{epoch}/secrets", pod.uid, pod.index))
            .header("host", authority)
            .header("authorization", format!("Bearer {}", access.token))
            .body(Empty::<Bytes>::new())
            .map_err(|error| (error.to_string(), false))?;
        let response = sender.send_request(request).await.map_err(|error| passing(&error))?;
        let status = response.status();
        let body = Limited::new(response.into_body(), ANSWER_BYTES_MAX).collect().await;
        let body = body.map_err(|error| passing(&error))?.to_bytes();
        if status != StatusCode::OK {
            // One that is missing may be set; what is refused for long the controller places elsewhere.
            return Err((String::from_utf8_lossy(&body).trim().to_owned(), true));
        }
        serde_json::from_slice(&body).map_err(|_| ("the controller's answer is none".to_owned(), false))
    }
}

/// What a supervisor reads of its standard input: on no disk, and there for it alone.
pub fn input(values: &SecretValues) -> io::Result<File> {
    let mut file = File::from(memfd_create(c"secrets", MFdFlags::MFD_CLOEXEC)?);
    file.write_all(&serde_json::to_vec(values)?)?;
    file.rewind()?;
    Ok(file)
}

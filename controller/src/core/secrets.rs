//! Secrets of namespaces. Their values come and go sealed: here nobody can read them.

use berth_protocol::ids::{Epoch, Namespace, NodeId, PodId, SecretName};
use berth_protocol::job::JobSpec;
use berth_protocol::join::Role;
use berth_protocol::limits::SECRETS_BYTES_MAX;
use berth_protocol::message::query::SecretRow;
use berth_protocol::units::Timestamp;
use serde::{Deserialize, Serialize};

use super::callers::{Actor, Denied};
use super::cluster::Job;
use super::manage::NotChanged;
use super::{Controller, Now, Write, records};

/// Stored.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Secret {
    /// As `io` has sealed it, text.
    pub sealed: String,
    pub version: u64,
    pub at: Timestamp,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub by: Option<String>,
}

/// What one pod is to be given.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodSecrets {
    pub namespace: Namespace,
    pub sealed: Vec<(SecretName, String)>,
}

/// Why a pod is given none.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NoSecrets {
    #[error("the pod {pod} is not this node's at epoch {epoch}")]
    NotYours { pod: PodId, epoch: Epoch },
    #[error(
        "there is no secret {name} in namespace {namespace}: `berth secret set {name} -n {namespace}` makes it"
    )]
    Missing { name: SecretName, namespace: Namespace },
}

fn names(spec: &JobSpec) -> impl Iterator<Item = &SecretName> {
    let mounts = spec.pod.containers.iter().flat_map(|container| &container.secrets);
    mounts.map(|mount| &mount.name)
}

impl Controller {
    /// # Errors
    /// It is not for them to know.
    pub fn secrets_told(&self, by: &Actor, namespace: &Namespace) -> Result<Vec<SecretRow>, Denied> {
        self.known(by)?.may(namespace, Role::View)?;
        let all = self.cluster.secrets.iter().filter(|((of, _), _)| of == namespace);
        let row = |((_, name), secret): (&(Namespace, SecretName), &Secret)| SecretRow {
            name: name.clone(),
            version: secret.version,
            at: secret.at,
            by: secret.by.clone(),
        };
        Ok(all.map(row).collect())
    }

    /// For it to be set so, or, with nothing, there to be removed.
    pub(super) fn has_room_for_secret(
        &self,
        namespace: &Namespace,
        name: &SecretName,
        sealed: Option<&str>,
    ) -> Result<(), NotChanged> {
        let key = (namespace.clone(), name.clone());
        let there = self.cluster.secrets.get(&key);
        let Some(sealed) = sealed else {
            return there.map(drop).ok_or_else(|| NotChanged::Unknown(format!("secret {name}")));
        };
        let others = self.cluster.secrets.iter().filter(|(other, _)| **other != key);
        let taken: usize = others.map(|(_, secret)| secret.sealed.len()).sum();
        // Sealed a value is twice as long, being digits.
        if taken + sealed.len() > 2 * SECRETS_BYTES_MAX { Err(NotChanged::SecretsFull) } else { Ok(()) }
    }

    pub(super) fn set_secret(
        &mut self,
        now: Now,
        actor: &Actor,
        (namespace, name): (Namespace, SecretName),
        sealed: Option<String>,
    ) {
        let key = records::secret(&namespace, &name);
        let at = (namespace, name);
        // Who waits for it is looked at again, and says what for.
        let waits = |job: &Job| {
            let spec = &job.file.spec;
            spec.namespace == at.0 && !job.is_finished() && names(spec).any(|mounted| *mounted == at.1)
        };
        let jobs = self.cluster.jobs.iter().filter(|(_, job)| waits(job));
        self.dirty.status.extend(jobs.map(|(uid, _)| uid.clone()));
        self.scheduler.version += 1;
        self.scheduler.wanted = true;
        let Some(sealed) = sealed else {
            self.cluster.secrets.remove(&at);
            return self.dirty.step.writes.push(Write { key, value: None });
        };
        let version = self.cluster.secrets.get(&at).map_or(0, |before| before.version) + 1;
        let by = actor.party.as_ref().map(ToString::to_string);
        let secret = Secret { sealed, version, at: now.wall, by };
        self.dirty.step.writes.push(records::write(key, &secret));
        self.cluster.secrets.insert(at, secret);
    }

    /// What a node may have for a pod that it was given: the secrets that the pod's own file names.
    ///
    /// # Errors
    /// None, and why.
    pub fn secrets_of(&self, node: &NodeId, pod: &PodId, epoch: Epoch) -> Result<PodSecrets, NoSecrets> {
        let job = self.cluster.jobs.get(&pod.uid);
        let assigned = job.and_then(|job| {
            let assignment = job.assignment(pod.index).filter(|assignment| assignment.node == *node)?;
            let now = job.pod(pod.index).is_some_and(|pod| pod.epoch == epoch);
            (now && assignment.spec == job.template).then_some(job)
        });
        let Some(job) = assigned else { return Err(NoSecrets::NotYours { pod: pod.clone(), epoch }) };
        let namespace = job.file.spec.namespace.clone();
        let sealed = names(&job.file.spec).map(|name| {
            let found = self.secret(&namespace, name)?;
            Ok((name.clone(), found.sealed.clone()))
        });
        Ok(PodSecrets { sealed: sealed.collect::<Result<_, _>>()?, namespace: namespace.clone() })
    }

    fn secret(&self, namespace: &Namespace, name: &SecretName) -> Result<&Secret, NoSecrets> {
        let found = self.cluster.secrets.get(&(namespace.clone(), name.clone()));
        found.ok_or_else(|| NoSecrets::Missing { name: name.clone(), namespace: namespace.clone() })
    }

    /// The first that a job names and that is not there.
    pub(super) fn missing_secret(&self, spec: &JobSpec) -> Option<NoSecrets> {
        names(spec).find_map(|name| self.secret(&spec.namespace, name).err())
    }
}

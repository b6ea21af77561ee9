//! What the store holds and under which keys; nothing else knows either.
//!
//! `job/{uid}` the file accepted, `run/{uid}` how it fares, `pod/{uid}/{index}` a pod placed at least once,
//! `checkpoint/{digest's digits}` one that the depot holds and a pod names, or that was imported,
//! `node/{node}`, `outbox/{node}`, `member/{party}`, `invitation/{id}`, `secret/{ns}/{name}`, `key/signing` what signs orders, `request/{id}` when a command took effect, `rejected/{ns}/{job}` until when its
//! status says so, `audit/…` what was asked for, which is not loaded. Keys sort so that a job comes before what belongs to it.

use std::collections::BTreeSet;

use berth_protocol::ids::{Digest, JobName, JobUid, Namespace, NodeId, RequestId, SecretName, Term};
use berth_protocol::job::PodTemplate;
use berth_protocol::join::InvitationId;
use berth_protocol::rule::{Rule, kept};
use berth_protocol::tls::Party;
use berth_protocol::units::Timestamp;
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::checkpoints::Checkpoint;
use super::cluster::{Cluster, Job, JobFile, JobRun, NodeRecord, Outbox, Pod};
use super::nodes::forgotten_node;
use super::{LoadError, Now, Write};

pub(super) fn job(uid: &JobUid) -> String {
    format!("job/{uid}")
}

pub(super) fn run(uid: &JobUid) -> String {
    format!("run/{uid}")
}

pub(super) fn pod(uid: &JobUid, index: u32) -> String {
    format!("pod/{uid}/{index}")
}

pub(super) fn checkpoint(id: &Digest) -> String {
    format!("checkpoint/{}", id.hex())
}

pub(super) fn node(node: &NodeId) -> String {
    format!("node/{node}")
}

pub(super) fn outbox(node: &NodeId) -> String {
    format!("outbox/{node}")
}

pub(super) fn request(id: &RequestId) -> String {
    format!("request/{id}")
}

pub(super) fn member(party: &Party) -> String {
    format!("member/{party}")
}

pub(super) fn invitation(id: &InvitationId) -> String {
    format!("invitation/{id}")
}

pub(super) fn rejected(namespace: &Namespace, job: &JobName) -> String {
    format!("rejected/{namespace}/{job}")
}

pub(super) fn secret(namespace: &Namespace, name: &SecretName) -> String {
    format!("secret/{namespace}/{name}")
}

/// Where entries about who asked for what begin; their keys sort by time.
pub const AUDIT: &str = "audit/";

/// Where those since then begin.
pub(super) fn audit_since(at: Timestamp) -> String {
    format!("{AUDIT}{:013}", at.0)
}

pub(super) fn audit(at: Timestamp, term: Term, n: u64) -> String {
    format!("{AUDIT}{:013}-{}-{n:08}", at.0, term.0)
}

/// JSON of a record. Records are plain data, which serde writes without fail.
pub(super) fn bytes<T: Serialize>(record: &T) -> Vec<u8> {
    serde_json::to_vec(record).unwrap_or_default()
}

pub(super) fn write<T: Serialize>(key: String, record: &T) -> Write {
    Write { key, value: Some(bytes(record)) }
}

pub(super) fn template_json(template: &PodTemplate) -> Vec<u8> {
    bytes(template)
}

pub(super) fn template_digest(template: &PodTemplate) -> Digest {
    Digest::of(&template_json(template))
}

fn read<T: DeserializeOwned>(key: &str, value: &[u8]) -> Result<T, LoadError> {
    serde_json::from_slice(value).map_err(|source| LoadError::Entry { key: key.to_owned(), source })
}

/// What of the store could not be loaded. It stays there as it is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SetAside {
    /// Keys whose values are damaged.
    pub damaged: Vec<String>,
    /// Jobs with a damaged or missing record: nothing of them is acted upon. Their pods run nowhere else meanwhile.
    pub jobs: BTreeSet<JobUid>,
}

impl SetAside {
    /// What a controller that begins with these entries would set aside.
    pub fn of(entries: &[(String, Option<Vec<u8>>)], now: Now) -> Result<Self, LoadError> {
        load(entries.iter().cloned(), now).map(|(_, aside)| aside)
    }
}

/// The one key of its kind.
pub(super) const RESTORED: &str = "restored/store";
/// Likewise.
pub(super) const SIGNING_KEY: &str = "key/signing";

/// The state that the entries say, in whatever order they come, without what is damaged: a job is taken whole or not
/// at all.
pub(super) fn load(
    entries: impl IntoIterator<Item = (String, Option<Vec<u8>>)>,
    now: Now,
) -> Result<(Cluster, SetAside), LoadError> {
    let mut cluster = Cluster::default();
    let mut aside = SetAside::default();
    let mut later = Vec::new();
    for (key, value) in entries {
        let unknown = || LoadError::UnknownKey { key: key.clone() };
        let (kind, name) = key.split_once('/').ok_or_else(unknown)?;
        let Some(value) = value else {
            match kind {
                "job" | "run" | "pod" => {
                    let uid = name.split_once('/').map_or(name, |(uid, _)| uid);
                    let uid = JobUid::parse(uid).map_err(|_| unknown())?;
                    if kept(Rule::DamagedSetAside) {
                        aside.jobs.insert(uid);
                    }
                }
                "node" => {
                    let node = NodeId::parse(name).map_err(|_| unknown())?;
                    cluster.nodes.insert(node, forgotten_node(NodeRecord::unreadable(), now));
                }
                _ => {}
            }
            aside.damaged.push(key);
            continue;
        };
        match (kind, name) {
            ("job", uid) => {
                let uid = JobUid::parse(uid).map_err(|_| unknown())?;
                let file: JobFile = read(&key, &value)?;
                let template = template_digest(&file.spec.pod);
                cluster.jobs.insert(uid, Job::new(file, JobRun::default(), template));
            }
            ("node", node) => {
                let node = NodeId::parse(node).map_err(|_| unknown())?;
                let record: NodeRecord = read(&key, &value)?;
                cluster.nodes.insert(node, forgotten_node(record, now));
            }
            ("checkpoint", hex) => {
                let id = Digest::parse(&format!("sha256:{hex}")).map_err(|_| unknown())?;
                let found: Checkpoint = read(&key, &value)?;
                if found.imported.is_some() {
                    cluster.named_checkpoints.add(id);
                }
                cluster.checkpoints.insert(id, found);
            }
            ("member", party) => {
                let party: Party = party.parse().map_err(|_| unknown())?;
                cluster.members.set(party, Some(read(&key, &value)?));
            }
            ("invitation", id) => {
                let id: InvitationId = id.parse().map_err(|_| unknown())?;
                cluster.invitations.insert(id, read(&key, &value)?);
            }
            ("secret", name) => {
                let (namespace, secret) = name.split_once('/').ok_or_else(unknown)?;
                let namespace = Namespace::parse(namespace).map_err(|_| unknown())?;
                let secret = SecretName::parse(secret).map_err(|_| unknown())?;
                cluster.secrets.insert((namespace, secret), read(&key, &value)?);
            }
            // Of a backup, or of one that was looked into whole.
            ("audit", _) => {}
            ("key", "signing") => cluster.signing_key = Some(read(&key, &value)?),
            ("restored", "store") => cluster.restored = Some(read(&key, &value)?),
            ("request", id) => {
                let id = RequestId::parse(id).map_err(|_| unknown())?;
                let at: Timestamp = read(&key, &value)?;
                cluster.requests.insert(id, at);
            }
            ("rejected", name) => {
                let (namespace, job) = name.split_once('/').ok_or_else(unknown)?;
                let namespace = Namespace::parse(namespace).map_err(|_| unknown())?;
                let job = JobName::parse(job).map_err(|_| unknown())?;
                cluster.rejected.insert((namespace, job), read(&key, &value)?);
            }
            ("run" | "pod" | "outbox", _) => later.push((key, value)),
            _ => return Err(unknown()),
        }
    }
    for (key, value) in later {
        belonging(&mut cluster, &mut aside, &key, &value, now)?;
    }
    let homes = cluster.jobs.values().flat_map(|job| {
        job.placed().iter().filter_map(|index| Some(job.assignment(*index)?.node.clone())).collect::<Vec<_>>()
    });
    for node in homes.collect::<BTreeSet<_>>() {
        cluster.nodes.entry(node).or_insert_with(|| forgotten_node(NodeRecord::unreadable(), now));
    }
    aside.jobs.iter().for_each(|uid| drop(cluster.jobs.remove(uid)));
    count_names(&mut cluster, &aside);
    Ok((cluster, aside))
}

/// Entries that belong to a job or a node.
fn belonging(
    cluster: &mut Cluster,
    aside: &mut SetAside,
    key: &str,
    value: &[u8],
    now: Now,
) -> Result<(), LoadError> {
    let unknown = || LoadError::UnknownKey { key: key.to_owned() };
    let (kind, rest) = key.split_once('/').ok_or_else(unknown)?;
    if kind == "outbox" {
        let node = NodeId::parse(rest).map_err(|_| unknown())?;
        let outbox: Outbox = read(key, value)?;
        // A node's record that is lost is as good as damaged: its ledger is still known.
        let node = cluster.nodes.entry(node);
        node.or_insert_with(|| forgotten_node(NodeRecord::unreadable(), now)).outbox = Some(outbox);
        return Ok(());
    }
    let (uid, index) = rest.split_once('/').map_or((rest, None), |(uid, index)| (uid, Some(index)));
    let uid = JobUid::parse(uid).map_err(|_| unknown())?;
    let Some(job) = cluster.jobs.get_mut(&uid) else {
        // Its file is lost, or damaged.
        aside.jobs.insert(uid);
        return Ok(());
    };
    match index {
        None => job.run = read(key, value)?,
        Some(index) => {
            let index = index.parse().map_err(|_| unknown())?;
            job.put(index, read::<Pod>(key, value)?);
        }
    }
    Ok(())
}

/// What jobs and their pods name, and what the jobs are called.
fn count_names(cluster: &mut Cluster, aside: &SetAside) {
    let Cluster { jobs, names, checkpoints, named_checkpoints, named_blobs, .. } = cluster;
    let unread = checkpoints.iter().filter(|(_, found)| aside.jobs.contains(&found.uid));
    unread.for_each(|(id, _)| named_checkpoints.add(*id));
    for job in jobs.values_mut() {
        if let Some(workspace) = &job.file.spec.pod.workspace {
            named_blobs.add(workspace.digest);
        }
        let lacking = |pod: &Pod| pod.saved.checkpoints.iter().any(|id| !checkpoints.contains_key(id));
        let poorer: Vec<u32> =
            job.pods().iter().filter(|(_, pod)| lacking(pod)).map(|(index, _)| *index).collect();
        for index in poorer {
            // A checkpoint whose record is damaged: the one before it, if any, has to do.
            job.change(index, |pod| pod.saved.checkpoints.retain(|id| checkpoints.contains_key(id)));
        }
        for pod in job.pods().values() {
            pod.saved.checkpoints.iter().for_each(|id| named_checkpoints.add(*id));
            pod.output.iter().for_each(|output| named_blobs.add(output.digest));
        }
    }
    // The name of a job that is being forgotten may be a restored one's already: that comes last.
    for expired in [true, false] {
        for (uid, job) in jobs.iter().filter(|(_, job)| job.run.expired == expired) {
            let name = (job.file.spec.namespace.clone(), job.file.spec.name.clone());
            names.insert(name, uid.clone());
        }
    }
}

//! Checkpoints on their way to the depot and back, in child processes of the agent: `berth-agent checkpoint
//! store|fetch`. A child reads its `Order` as JSON from standard input and writes `Said` lines to standard output; it
//! holds a token good for this one transfer alone.

mod chunks;
mod earlier;
mod fetch;
mod http;
mod pages;
mod resume;
mod serve;
mod store;
mod verify;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::{ExitCode, Stdio};
use std::time::{Duration, SystemTime};

use berth_protocol::chain::chain;
use berth_protocol::checkpoint::{CheckpointInfo, Needs};
use berth_protocol::ids::{Digest, Epoch, NodeId, PodId, Run};
use berth_protocol::job::PodTemplate;
use berth_protocol::message::node::DepotAccess;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::process::Command;

use super::confine::{Room, confine};
use crate::core::checkpoints::NotStored;
use crate::task::Saved;

pub use serve::listen;

/// Reads bytes as an image of CRIU's, each kind of which berth looks into, of a file of so many bytes; keeps nothing.
/// `None`: they are none.
pub fn inspect(image: &[u8], file_bytes: u64) -> Option<usize> {
    verify::thread(image);
    let (_, mappings) = pages::pagemap(image)?;
    let cuts = pages::cuts(file_bytes, Some(&mappings));
    debug_assert_eq!(cuts.iter().map(|cut| u64::from(*cut)).sum::<u64>(), file_bytes);
    Some(cuts.len())
}

/// A pod that has left may come back.
const KEPT_MIN: Duration = Duration::from_secs(3600);

/// What a child is to do.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Order {
    Store(Box<Store>),
    Fetch(Box<Fetch>),
    Resume(Box<Resume>),
}

impl Order {
    fn room(&self) -> Room {
        // What is made is made beside its place, and what is there already is linked to there.
        let beside = |dir: &Path| dir.parent().unwrap_or(dir).to_owned();
        let (reads, writes, network) = match self {
            Order::Store(order) => {
                (vec![order.cache.clone()], vec![order.dir.clone()], order.access.is_some())
            }
            Order::Fetch(order) => (Vec::new(), vec![beside(&order.dir), order.cache.clone()], true),
            Order::Resume(order) => {
                let Resume { dir, own, cache, log, .. } = &**order;
                (Vec::new(), vec![beside(dir), own.clone(), cache.clone(), log.clone()], false)
            }
        };
        Room { reads, writes, capabilities: &[], network }
    }
}

/// Send a checkpoint of this node's to the depot, or make it one to begin from without the depot.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Store {
    /// `None`: it is only sealed, which is to say on disk for good, with a manifest by which every byte can be verified.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub access: Option<DepotAccess>,
    /// The checkpoint's directory, as the shim left it.
    pub dir: PathBuf,
    /// A directory of earlier checkpoints: what differs from the pod's last one is what is sent.
    pub cache: PathBuf,
    pub saved: Saved,
    pub node: NodeId,
    pub pod: PodId,
    pub epoch: Epoch,
    pub run: Run,
    pub spec: Digest,
    pub template: PodTemplate,
    /// Of each container's image, where it has one.
    pub images: Vec<Option<Digest>>,
    pub needs: Needs,
    pub versions: BTreeMap<String, String>,
    /// Bytes a second at most; zero: as fast as it goes.
    pub rate: u64,
}

/// Bring a checkpoint here.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Fetch {
    pub access: DepotAccess,
    pub checkpoint: Digest,
    /// Where it is to be once it is whole and verified.
    pub dir: PathBuf,
    /// It is to be one of the cache's, kept for this pod: nobody starts from it, nothing waits for it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub keep: Option<PodId>,
    /// A directory of earlier checkpoints; what of them fits is taken instead of being fetched.
    pub cache: PathBuf,
    /// What the pod is to be now: the checkpoint must be of this.
    pub template: PodTemplate,
    /// Of each container's image as it is here, where it has one.
    pub images: Vec<Option<Digest>>,
    pub rate: u64,
}

/// Lay out the last checkpoint of a pod that this node keeps, without the depot, and set the epoch's log back to where
/// it stood then.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Resume {
    pub pod: PodId,
    pub epoch: Epoch,
    /// Where it is to be once it is whole and verified.
    pub dir: PathBuf,
    /// The pod's own, of which the depot may not have heard: a directory each, named by its level.
    pub own: PathBuf,
    /// What the depot has too.
    pub cache: PathBuf,
    pub log: PathBuf,
    pub template: PodTemplate,
    pub images: Vec<Option<Digest>>,
}

/// What a child says.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Said {
    Progress { done: u64, total: u64 },
    Stored(Box<CheckpointInfo>),
    Sealed,
    Fetched,
    Failed { why: String, retriable: bool },
}

/// Why a transfer came to nothing.
#[derive(Debug, thiserror::Error)]
pub enum TransferError {
    #[error("the depot: {0}")]
    Depot(#[from] http::HttpError),
    #[error("{what}: {source}")]
    Io { what: String, source: io::Error },
    #[error("{0}")]
    Unfit(String),
}

impl TransferError {
    fn io(what: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let what = what.into();
        move |source| TransferError::Io { what, source }
    }

    fn retriable(&self) -> bool {
        match self {
            TransferError::Depot(error) => error.retriable(),
            TransferError::Io { source, .. } => source.kind() != io::ErrorKind::NotFound,
            TransferError::Unfit(_) => false,
        }
    }
}

/// The file in a kept checkpoint that says whose it is.
const POD: &str = "pod";

/// Says in a checkpoint's directory whose it is.
fn name(dir: &Path, pod: &PodId) -> io::Result<()> {
    fs::write(dir.join(POD), pod.to_string())
}

/// Whose the kept checkpoint is.
fn named(dir: &Path) -> Option<PodId> {
    PodId::parse(&fs::read_to_string(dir.join(POD)).ok()?).ok()
}

/// Keeps a checkpoint that is in the depot for a restore on this very node. The pod's one before is then one to let go.
///
/// # Errors
/// It stays where it is.
pub fn keep(dir: &Path, id: &Digest, pod: &PodId, cache: &Path) -> io::Result<()> {
    fs::create_dir_all(cache)?;
    // What is there already may be on disk for good.
    if named(dir).as_ref() != Some(pod) {
        name(dir, pod)?;
    }
    let kept = cache.join(id.hex());
    if kept.exists() {
        fs::remove_dir_all(&kept)?;
    }
    fs::rename(dir, kept)
}

/// Of a pod's own checkpoints those that are whole, the newest first.
pub fn own_ones(dir: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    let level = |path: &Path| path.file_name()?.to_str()?.parse::<u64>().ok();
    let mut found: Vec<(u64, PathBuf)> =
        entries.filter_map(|entry| Some((level(&entry.path())?, entry.path()))).collect();
    found.sort_by_key(|(level, _)| std::cmp::Reverse(*level));
    found.into_iter().map(|(_, path)| path).collect()
}

/// Removes all kept checkpoints but each pod's newest. Takes as long as there are files.
pub fn keep_newest(cache: &Path) {
    let mut newest: BTreeMap<PodId, (SystemTime, PathBuf)> = BTreeMap::new();
    for entry in fs::read_dir(cache).into_iter().flatten().flatten() {
        let path = entry.path();
        let kept_at = fs::metadata(path.join(POD)).and_then(|file| file.modified());
        let (Some(pod), Ok(kept_at)) = (named(&path), kept_at) else { continue };
        let older = match newest.get(&pod) {
            Some((other, _)) if *other > kept_at => Some(path),
            _ => newest.insert(pod, (kept_at, path)).map(|(_, older)| older),
        };
        // Another may do the same now.
        if let Some(older) = older
            && let Err(error) = fs::remove_dir_all(&older)
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!("cannot remove {}: {error}", older.display());
        }
    }
}

/// Removes kept checkpoints of pods that nobody names any more, and what was left of others when an agent ended. Takes as
/// long as there are files.
pub fn collect(cache: &Path, wanted: &BTreeSet<PodId>) {
    for entry in fs::read_dir(cache).into_iter().flatten().flatten() {
        let pod = named(&entry.path());
        let old = entry.metadata().and_then(|meta| meta.modified()).ok().and_then(|at| at.elapsed().ok());
        if old.is_some_and(|age| age > KEPT_MIN) && !pod.is_some_and(|pod| wanted.contains(&pod)) {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
    keep_newest(cache);
}

fn say(said: &Said) {
    // Whoever ordered it may have gone; then nobody listens.
    if let Ok(line) = serde_json::to_string(said) {
        let mut out = io::stdout().lock();
        let _ = writeln!(out, "{line}");
        let _ = out.flush();
    }
}

/// `berth-agent checkpoint`: one transfer.
pub fn worker_main() -> ExitCode {
    // With the agent it ends.
    // SAFETY: no pointers.
    unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
    let order: Order = match serde_json::from_reader(io::stdin().lock()) {
        Ok(order) => order,
        Err(error) => {
            eprintln!("berth-agent checkpoint: no order on standard input: {error}");
            return ExitCode::from(2);
        }
    };
    if let Err(error) = confine(&order.room()) {
        say(&Said::Failed { why: chain(&error), retriable: false });
        return ExitCode::FAILURE;
    }
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("berth-agent checkpoint: {error}");
            return ExitCode::FAILURE;
        }
    };
    let done = runtime.block_on(async {
        match order {
            Order::Store(order) => match &order.access {
                Some(access) => store::store(&order, access).await.map(|info| Said::Stored(Box::new(info))),
                None => store::seal(&order).map(|()| Said::Sealed),
            },
            Order::Fetch(order) => fetch::fetch(&order).await.map(|()| Said::Fetched),
            Order::Resume(order) => resume::resume(&order).map(|()| Said::Fetched),
        }
    });
    match done {
        Ok(said) => {
            say(&said);
            ExitCode::SUCCESS
        }
        Err(error) => {
            say(&Said::Failed { why: error.to_string(), retriable: error.retriable() });
            ExitCode::FAILURE
        }
    }
}

/// Runs a child on `order`, passing its progress on; returns its last word.
pub async fn run(order: &Order, mut progress: impl FnMut(u64, u64)) -> Said {
    let failed = |why: String| Said::Failed { why, retriable: true };
    let Ok(order) = serde_json::to_vec(order) else { return failed("the order has no form".to_owned()) };
    let spawned = Command::new("/proc/self/exe")
        .arg0("berth-agent")
        .arg("checkpoint")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .kill_on_drop(true)
        .spawn();
    let mut child = match spawned {
        Ok(child) => child,
        Err(error) => return failed(format!("cannot start a process to carry it: {error}")),
    };
    if let Some(mut stdin) = child.stdin.take() {
        let _ = stdin.write_all(&order).await;
    }
    let mut last = None;
    if let Some(stdout) = child.stdout.take() {
        let mut lines = BufReader::new(stdout).lines();
        while let Ok(Some(line)) = lines.next_line().await {
            match serde_json::from_str(&line) {
                Ok(Said::Progress { done, total }) => progress(done, total),
                Ok(said) => last = Some(said),
                Err(_) => {}
            }
        }
    }
    let status = child.wait().await;
    last.unwrap_or_else(|| {
        let status = status.map_or_else(|error| error.to_string(), |status| status.to_string());
        failed(format!("the process that carried it ended without a word ({status})"))
    })
}

impl From<Said> for Result<Box<CheckpointInfo>, NotStored> {
    fn from(said: Said) -> Self {
        match said {
            Said::Stored(info) => Ok(info),
            Said::Failed { why, retriable } => Err(NotStored { why, retriable }),
            Said::Progress { .. } | Said::Fetched | Said::Sealed => {
                Err(NotStored { why: "it was answered with something else".to_owned(), retriable: true })
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_each_pod_the_newest_is_kept() {
        let dir = tempfile::tempdir().unwrap();
        let cache = dir.path().join("kept");
        let pods = ["uaaaaaaaaaaa-0", "uaaaaaaaaaaa-1"].map(|text| PodId::parse(text).unwrap());
        let kept = |text: &str| cache.join(Digest::of(text.as_bytes()).hex());
        for (age, (text, pod)) in [("a", 0), ("b", 1), ("c", 0), ("d", 0)].into_iter().enumerate().rev() {
            let saved = dir.path().join(text);
            fs::create_dir(&saved).unwrap();
            keep(&saved, &Digest::of(text.as_bytes()), &pods[pod], &cache).unwrap();
            let at = SystemTime::now() - Duration::from_secs(age as u64);
            fs::File::open(kept(text).join(POD)).unwrap().set_modified(at).unwrap();
        }
        fs::create_dir(cache.join("of.nobody")).unwrap();
        keep_newest(&cache);
        assert_eq!(["a", "b", "c", "d"].map(|text| kept(text).exists()), [true, true, false, false]);
        assert!(cache.join("of.nobody").exists(), "it may be on its way here");
        collect(&cache, &BTreeSet::from([pods[0].clone()]));
        assert!(kept("b").exists(), "its pod may come back");
    }
}

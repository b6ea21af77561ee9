//! What a pod needs before its shim starts: its images unpacked, its volumes there and allowed, its workspace fetched.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use berth_protocol::chunk::{GrantFor, GrantRequest};
use berth_protocol::ids::Digest;
use berth_protocol::image::Images;
use berth_protocol::job::{PodTemplate, Volume, VolumeSource, Workspace};
use berth_protocol::message::node::{ChunkServer, DepotAccess};
use berth_protocol::pod::RESTORE_FAILED;
use berth_protocol::policy::{HostPath, Policy, Refusal, Rule};
use berth_protocol::units::Bytes;
use tokio::process::Command;
use tokio::sync::Mutex;
use tokio::sync::mpsc::UnboundedSender;
use tokio::sync::watch;

use super::checkpoint;
use super::depot;
use super::image::{ImageError, ImageRecord, ImageRef, ImageStore, RegistryConfig, StoreConfig};
use super::secrets::Secrets;
use super::shims;
use crate::config::Config;
use crate::core::ledger::PodKey;
use crate::core::{Event, Prepared, Unready};
use crate::io::identity::Shown;
use crate::policy::Granted;
use crate::task::{ImageProcess, Root, file};

/// Images not used by any pod go, oldest first, while more of the disk than this is taken.
const DISK_PERCENT_MAX: u8 = 85;
/// Checkpoints that this node has sent, by the digest of their manifest: a restore here fetches nothing.
pub const CHECKPOINTS_KEPT_DIR: &str = "checkpoints";
/// A named volume outlives its job's record (`ttlSecondsAfterFinished`), so that the job may be submitted again.
const VOLUME_UNUSED_MAX: Duration = Duration::from_secs(30 * 24 * 3600);
/// Between two looks whether a pod's supervisor has ended.
const FREE_PAUSE: Duration = Duration::from_millis(10);
const WORKSPACE_UNPACK_MAX: Duration = Duration::from_secs(300);

pub struct Preparer {
    pub secrets: Secrets,
    images: ImageStore,
    data_dir: PathBuf,
    /// The core has held the pod's template against it; what only the disk shows is held against it here.
    granted: Granted,
    /// Of checkpoints, bytes a second; zero: no bound.
    rate: u64,
    /// Taken while a workspace is brought here, by its digest: pods that share one fetch it once.
    fetching: [Mutex<()>; 16],
}

/// What this node lacks: another may have it.
fn unready(reason: &str, message: String, retriable: bool) -> Unready {
    Unready { reason: reason.to_owned(), message, retriable, elsewhere: true }
}

impl From<ImageError> for Unready {
    fn from(error: ImageError) -> Self {
        let (retriable, elsewhere) = (error.retriable(), error.elsewhere());
        Unready { reason: error.reason().to_owned(), message: error.to_string(), retriable, elsewhere }
    }
}

impl Preparer {
    /// `shown`: by which the controller knows this node.
    pub fn open(config: &Config, shown: Option<Arc<Shown>>) -> io::Result<Self> {
        let registry = RegistryConfig {
            mirrors: config.mirrors.clone(),
            insecure: config.insecure.clone(),
            auth_file: config.registry_auth.clone(),
        };
        let signers = config.policy.signers.clone();
        let store = StoreConfig { registry, signers, ..StoreConfig::default() };
        Ok(Self {
            images: ImageStore::open(&config.data_dir.join("images"), store)?,
            secrets: Secrets::new(shown),
            data_dir: config.data_dir.clone(),
            fetching: <[Mutex<()>; 16]>::default(),
            granted: config.policy.granted.clone(),
            rate: config.checkpoint_rate.0,
        })
    }

    /// The images here, and word of each one that comes or goes.
    pub fn held(&self) -> watch::Receiver<Images> {
        self.images.held()
    }

    /// Brings the checkpoint that a pod is to begin from here, verified; `dir` is the pod's.
    pub async fn bring(
        &self,
        key: &PodKey,
        checkpoint: Digest,
        template: &PodTemplate,
        dir: &Path,
        depot: Option<&DepotAccess>,
    ) -> Result<(), Unready> {
        self.fetch(key, checkpoint, template, Some(dir.join(file::RESTORE_DIR)), depot).await
    }

    /// Lays out the pod's last checkpoint that this node keeps, where one is whole; `dir` is the pod's.
    pub async fn resume(&self, key: &PodKey, template: &PodTemplate, dir: &Path) -> bool {
        // A supervisor that has told of its pod's end still clears away.
        while !shims::is_free(dir) {
            tokio::time::sleep(FREE_PAUSE).await;
        }
        let order = checkpoint::Order::Resume(Box::new(checkpoint::Resume {
            pod: key.pod.clone(),
            epoch: key.epoch,
            dir: dir.join(file::RESTORE_DIR),
            own: dir.join(file::CHECKPOINTS_DIR),
            cache: self.data_dir.join(CHECKPOINTS_KEPT_DIR),
            log: dir.join(file::LOG_DIR),
            template: template.clone(),
            images: self.image_digests(template),
        }));
        match checkpoint::run(&order, |_, _| {}).await {
            checkpoint::Said::Fetched => true,
            checkpoint::Said::Failed { why, .. } => {
                tracing::warn!("pod {key} goes on without a checkpoint of this node's: {why}");
                false
            }
            _ => false,
        }
    }

    /// Brings ahead what a pod will need that still runs elsewhere: its images and files, and that checkpoint, to be kept
    /// for what the one that it comes with will share with it.
    pub async fn stage(
        &self,
        key: &PodKey,
        checkpoint: Option<Digest>,
        template: &PodTemplate,
        depot: Option<&DepotAccess>,
        events: &UnboundedSender<Event>,
    ) -> Result<(), Unready> {
        for container in &template.containers {
            self.root(key, &container.image, events).await?;
        }
        if let Some(workspace) = &template.workspace {
            self.workspace(workspace, depot).await?;
        }
        match checkpoint {
            Some(checkpoint) => self.fetch(key, checkpoint, template, None, depot).await,
            None => Ok(()),
        }
    }

    /// Into `dir`, verified, to be started from; `None`: among those that are kept.
    async fn fetch(
        &self,
        key: &PodKey,
        checkpoint: Digest,
        template: &PodTemplate,
        dir: Option<PathBuf>,
        depot: Option<&DepotAccess>,
    ) -> Result<(), Unready> {
        let failed = |message: String, retriable| unready(RESTORE_FAILED, message, retriable);
        let what = GrantFor::Load { checkpoint };
        let request = GrantRequest { pod: key.pod.clone(), epoch: key.epoch, what };
        let access = depot::grant(depot, &request).await;
        let access = access.map_err(|error| failed(format!("cannot fetch the checkpoint: {error}"), true))?;
        let cache = self.data_dir.join(CHECKPOINTS_KEPT_DIR);
        let keep = dir.is_none().then(|| key.pod.clone());
        let dir = dir.unwrap_or_else(|| cache.join(checkpoint.hex()));
        let parent = dir.parent().unwrap_or(&dir);
        fs::create_dir_all(parent)
            .map_err(|error| failed(format!("cannot make {}: {error}", parent.display()), true))?;
        let order = checkpoint::Order::Fetch(Box::new(checkpoint::Fetch {
            access,
            checkpoint,
            dir,
            keep,
            cache,
            template: template.clone(),
            images: self.image_digests(template),
            rate: self.rate,
        }));
        match checkpoint::run(&order, |_, _| {}).await {
            checkpoint::Said::Fetched => Ok(()),
            checkpoint::Said::Failed { why, retriable } => Err(failed(why, retriable)),
            other => Err(failed(format!("fetching the checkpoint was answered with {other:?}"), true)),
        }
    }

    /// Gives other nodes what this one keeps of checkpoints, from now on.
    ///
    /// # Errors
    /// The address is not this machine's, or taken.
    pub async fn serve_chunks(
        &self,
        address: SocketAddr,
        shown: Option<Arc<Shown>>,
    ) -> std::io::Result<ChunkServer> {
        checkpoint::listen(address, self.data_dir.join(CHECKPOINTS_KEPT_DIR), shown).await
    }

    /// The digests of a template's images, where they have one and are here.
    pub fn image_digests(&self, template: &PodTemplate) -> Vec<Option<Digest>> {
        let digest = |image: &str| {
            let record = self.images.lookup(&ImageRef::parse(image).ok()?).ok()??;
            Digest::parse(&record.manifest_digest.to_string()).ok()
        };
        template.containers.iter().map(|container| digest(&container.image)).collect()
    }

    /// Brings everything here; progress of pulls goes to `events`.
    pub async fn prepare(
        &self,
        key: &PodKey,
        template: &PodTemplate,
        depot: Option<&DepotAccess>,
        events: &UnboundedSender<Event>,
    ) -> Result<Prepared, Unready> {
        let volumes =
            template.volumes.iter().map(|volume| self.volume(template, volume)).collect::<Result<_, _>>()?;
        let mut roots = Vec::with_capacity(template.containers.len());
        for container in &template.containers {
            roots.push(self.root(key, &container.image, events).await?);
        }
        let workspace = match &template.workspace {
            Some(workspace) => Some(self.workspace(workspace, depot).await?),
            None => None,
        };
        self.secrets.bring(key, template, depot).await?;
        Ok(Prepared { roots, volumes, workspace, restore: false })
    }

    async fn root(
        &self,
        key: &PodKey,
        image: &str,
        events: &UnboundedSender<Event>,
    ) -> Result<Root, Unready> {
        if image == "host" {
            return Ok(Root::Host);
        }
        let reference = ImageRef::parse(image).map_err(ImageError::from)?;
        self.permit_path(&reference)?;
        let progress = |progress: super::image::Progress| {
            let (done, total) = (Bytes(progress.bytes_done), Bytes(progress.bytes_total));
            let _ = events.send(Event::Pulling { key: key.clone(), done, total });
        };
        let record = self.images.ensure(&reference, progress).await?;
        Ok(self.image_root(record))
    }

    /// An image that is a file of this node may be a link to one elsewhere.
    fn permit_path(&self, reference: &ImageRef) -> Result<(), Unready> {
        let (ImageRef::Layout { path, .. } | ImageRef::Archive { path }) = reference else { return Ok(()) };
        // What is not there says so itself, when it is read.
        let real = fs::canonicalize(path).unwrap_or_else(|_| path.clone());
        let rules = &self.granted.rules;
        let image_paths =
            rules.image_paths.as_ref().map(|paths| paths.iter().map(|path| real_path(path)).collect());
        if (Policy { image_paths, ..Policy::default() }).image_path(&real) {
            return Ok(());
        }
        let what = format!("image from {}, where {} leads", real.display(), path.display());
        Err(self.refused(Rule::ImagePaths, what))
    }

    fn refused(&self, rule: Rule, what: String) -> Unready {
        Unready::forbidden(self.granted.words(&Refusal { rule, what }))
    }

    fn image_root(&self, record: ImageRecord) -> Root {
        let layers = record.layers.iter().map(|layer| self.images.layer_dir(layer)).collect();
        let text = |text: String| (!text.is_empty()).then_some(text);
        let config = ImageProcess {
            entrypoint: record.config.entrypoint,
            cmd: record.config.cmd,
            env: record.config.env,
            working_dir: text(record.config.working_dir),
            user: text(record.config.user),
            stop_signal: record.config.stop_signal,
        };
        Root::Image { layers, config }
    }

    /// The host's directory behind a volume; `None` for scratch, which the shim makes.
    fn volume(&self, template: &PodTemplate, volume: &Volume) -> Result<Option<PathBuf>, Unready> {
        match &volume.source {
            VolumeSource::Scratch(_) => Ok(None),
            VolumeSource::Host(path) => {
                let real = fs::canonicalize(path).map_err(|error| {
                    unready(
                        "VolumeMissing",
                        format!("volume {}: host path {path}: {error}", volume.mount),
                        false,
                    )
                })?;
                // However much is shared: in there are the node's key, and what other jobs have.
                let own = fs::canonicalize(&self.data_dir).unwrap_or_else(|_| self.data_dir.clone());
                if real.starts_with(&own) || own.starts_with(&real) {
                    let message =
                        format!("volume {}: {path} holds, or is in, the agent's own data", volume.mount);
                    return Err(unready("VolumeForbidden", message, false));
                }
                // As it is written it is allowed; a link in it may lead elsewhere.
                let allowed = self.granted.rules.host_paths.iter();
                let allowed = allowed.map(|found| HostPath { path: real_path(&found.path), ..found.clone() });
                let rules = Policy { host_paths: allowed.collect(), ..Policy::default() };
                match rules.host_path(&real) {
                    Some(found) if volume.read_only || !found.read_only => Ok(Some(real)),
                    _ => {
                        let what = format!("host path {}, where {path} leads", real.display());
                        Err(self.refused(Rule::HostPaths, what))
                    }
                }
            }
            VolumeSource::Named(name) => {
                let (namespace, job) = (template.namespace.as_str(), template.job.as_str());
                let dir = self.data_dir.join("volumes").join(namespace).join(job).join(name.as_str());
                make_named(&dir).map_err(|error| {
                    unready("VolumeFailed", format!("cannot make {}: {error}", dir.display()), true)
                })?;
                Ok(Some(dir))
            }
        }
    }

    /// A workspace's files, unpacked once however many pods use them.
    async fn workspace(
        &self,
        workspace: &Workspace,
        depot: Option<&DepotAccess>,
    ) -> Result<PathBuf, Unready> {
        let all = self.data_dir.join("workspaces");
        let name = workspace.digest.hex();
        let dir = all.join(&name);
        let turn = usize::from_str_radix(&name[..1], 16).unwrap_or(0);
        let _turn = self.fetching[turn].lock().await;
        if dir.is_dir() {
            return Ok(dir);
        }
        let failed = |message: String| unready("WorkspaceFailed", message, true);
        let access =
            depot.ok_or_else(|| failed("the controller has not yet said where the depot is".into()))?;
        fs::create_dir_all(&all)
            .map_err(|error| failed(format!("cannot make {}: {error}", all.display())))?;
        let archive = all.join(format!("{name}.tar.gz"));
        depot::get_blob(access, &workspace.digest, &archive)
            .await
            .map_err(|error| failed(format!("cannot fetch the job's files: {error}")))?;
        let half = all.join(format!("{name}.half"));
        // Of a preparation that was cancelled.
        let _ = fs::remove_dir_all(&half);
        let unpacked = Command::new("/proc/self/exe")
            .arg0("berth-agent")
            .args([Path::new("unpack"), &archive, &half])
            .stdin(Stdio::null())
            .kill_on_drop(true)
            .output();
        let output = tokio::time::timeout(WORKSPACE_UNPACK_MAX, unpacked)
            .await
            .map_err(|_| failed("unpacking the job's files takes too long".into()))?
            .map_err(|error| failed(format!("cannot unpack the job's files: {error}")))?;
        let _ = fs::remove_file(&archive);
        if !output.status.success() {
            let _ = fs::remove_dir_all(&half);
            let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
            return Err(Unready { elsewhere: false, ..unready("WorkspaceMalformed", said, false) });
        }
        fs::rename(&half, &dir).map_err(|error| failed(format!("cannot keep the job's files: {error}")))?;
        Ok(dir)
    }

    /// Removes images above the disk's watermark, and workspaces, that none of these templates name.
    pub async fn collect<'a>(&self, templates: impl Iterator<Item = &'a PodTemplate>) {
        let mut workspaces = BTreeSet::new();
        let mut jobs = BTreeSet::new();
        let mut layers = BTreeSet::new();
        for template in templates {
            workspaces.extend(template.workspace.as_ref().map(|workspace| workspace.digest));
            jobs.insert((template.namespace.to_string(), template.job.to_string()));
            for container in &template.containers {
                let Ok(reference) = ImageRef::parse(&container.image) else { continue };
                if let Ok(Some(record)) = self.images.lookup(&reference) {
                    layers.extend(record.layers);
                }
            }
        }
        let now = super::clock::now().wall.0;
        if let Err(error) = self.images.collect(&layers, DISK_PERCENT_MAX, now).await {
            tracing::warn!("cannot collect images: {error}");
        }
        let data_dir = self.data_dir.clone();
        let collect = move || {
            for entry in fs::read_dir(data_dir.join("workspaces")).into_iter().flatten().flatten() {
                let used = |name: &str| workspaces.iter().any(|digest: &Digest| digest.hex() == name);
                let path = entry.path();
                if !entry.file_name().to_str().is_some_and(used) && is_old(&path) {
                    // The archive of a preparation that was cancelled is a file.
                    let _ = if path.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) };
                }
            }
            collect_volumes(&data_dir, &jobs);
        };
        // As long as there are files: not on the agent's only thread.
        let _ = tokio::task::spawn_blocking(collect).await;
    }
}

/// Where it really is; as it is written while it is not there.
fn real_path(path: &str) -> String {
    fs::canonicalize(path).map_or_else(|_| path.to_owned(), |real| real.display().to_string())
}

/// Removes the named volumes of jobs that had no pod here for long.
fn collect_volumes(data_dir: &Path, jobs: &BTreeSet<(String, String)>) {
    for namespace in subdirectories(&data_dir.join("volumes")) {
        for job in subdirectories(&namespace) {
            let name = |path: &Path| path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            let volumes = subdirectories(&job);
            if jobs.contains(&(name(&namespace), name(&job)))
                || !volumes.iter().all(|volume| is_older(volume, VOLUME_UNUSED_MAX))
            {
                continue;
            }
            tracing::info!("removing {}: no pod of the job was here for 30 days", job.display());
            if let Err(error) = fs::remove_dir_all(&job) {
                tracing::warn!("cannot remove {}: {error}", job.display());
            }
        }
    }
}

/// A named volume: for any user of the container, as scratch is; its time says when a pod last asked for it.
fn make_named(dir: &Path) -> io::Result<()> {
    if !dir.is_dir() {
        fs::create_dir_all(dir)?;
        fs::set_permissions(dir, fs::Permissions::from_mode(0o1777))?;
    }
    File::open(dir)?.set_modified(SystemTime::now())
}

fn subdirectories(dir: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries.map(|entry| entry.path()).filter(|path| path.is_dir() && !path.is_symlink()).collect()
}

/// Untouched for an hour: nobody is about to use it.
fn is_old(path: &Path) -> bool {
    is_older(path, Duration::from_secs(3600))
}

fn is_older(path: &Path, than: Duration) -> bool {
    let modified = fs::metadata(path).and_then(|meta| meta.modified()).ok();
    modified.and_then(|at| at.elapsed().ok()).is_some_and(|age| age > than)
}

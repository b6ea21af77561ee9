//! Owns the daemon's side of images: looks records up, starts workers, lets many wait for one pull, and keeps the list
//! of what is here; it never parses an image.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use berth_protocol::image::Images;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::process::{Child, Command};
use tokio::sync::{Semaphore, watch};
use tokio::time::timeout;

use super::cosign::{Signer, keys_for};
use super::disk::{Disk, now_ms};
use super::worker::{REPORT_INTERVAL, Report, Request};
use super::{
    Collected, Digest, ImageError, ImageRecord, ImageRef, Progress, RegistryConfig, archive, layout,
};

const WORKERS_MAX: usize = 3;
const REPORT_BYTES_MAX: u64 = 1 << 20;
/// A worker reports every half second; one that is silent this long hangs.
const SILENCE_MAX: Duration = Duration::from_secs(120);
/// How long a worker that is no longer wanted has to clean up.
const LEAVE_TIME_MAX: Duration = Duration::from_secs(15);
const IMAGE_BYTES_MAX: u64 = 200 << 30;

/// How a store works.
#[derive(Debug, Clone)]
pub struct StoreConfig {
    pub registry: RegistryConfig,
    /// Whose signatures images need.
    pub signers: Vec<Signer>,
    /// Of an image's compressed layers together, and again of what they unpack to.
    pub image_bytes_max: u64,
    /// The program whose subcommand `image` is [`worker_main`](super::worker_main).
    pub worker: PathBuf,
}

impl Default for StoreConfig {
    fn default() -> StoreConfig {
        StoreConfig {
            registry: RegistryConfig::default(),
            signers: Vec::new(),
            image_bytes_max: IMAGE_BYTES_MAX,
            worker: "/proc/self/exe".into(),
        }
    }
}

/// The node's images. Cloning gives another handle to the same store.
#[derive(Debug, Clone)]
pub struct ImageStore {
    disk: Disk,
    config: Arc<StoreConfig>,
    workers: Arc<Semaphore>,
    flights: Arc<Mutex<BTreeMap<ImageRef, watch::Sender<Flight>>>>,
    /// Read from the disk at the start and after a collection; in between what happens here changes it.
    held: watch::Sender<Images>,
}

/// A pull that some wait for.
#[derive(Debug, Clone)]
enum Flight {
    Under(Progress),
    Landed(Box<Result<ImageRecord, ImageError>>),
}

impl ImageStore {
    /// Opens the store in `directory`, which is made if it is missing. [`ImageStore::collect`] should be called once
    /// after this: it removes what an earlier process left half-made.
    pub fn open(directory: &Path, config: StoreConfig) -> io::Result<ImageStore> {
        let disk = Disk::open(directory)?;
        Ok(ImageStore {
            held: watch::Sender::new(listed(&disk)),
            disk,
            config: Arc::new(config),
            workers: Arc::new(Semaphore::new(WORKERS_MAX)),
            flights: Arc::default(),
        })
    }

    /// The images here, and word of each one that comes or goes.
    pub fn held(&self) -> watch::Receiver<Images> {
        self.held.subscribe()
    }

    /// The image is here, and in use.
    fn used(&self, reference: &ImageRef) {
        // Which one was used last is worth no message of its own.
        self.held.send_if_modified(|held| held.used(reference.name()));
    }

    /// The image if it is complete here, marked as used. For layouts and archives: if the source is still what it
    /// was when the image was read.
    pub fn lookup(&self, reference: &ImageRef) -> Result<Option<ImageRecord>, ImageError> {
        let found = self.look(reference)?;
        if found.is_some() {
            self.used(reference);
        } else {
            self.held.send_if_modified(|held| held.gone(&reference.name()));
        }
        Ok(found)
    }

    fn look(&self, reference: &ImageRef) -> Result<Option<ImageRecord>, ImageError> {
        let failed = |error: io::Error| ImageError::disk(reference, self.disk.root(), &error);
        let Some(mut record) = self.disk.record(reference).map_err(failed)? else { return Ok(None) };
        let stamp = match reference {
            ImageRef::Registry(_) => None,
            // A source that is gone cannot have changed: what is here goes on being used.
            ImageRef::Layout { path, .. } => layout::stamp(path).ok(),
            ImageRef::Archive { path } => archive::stamp(path).ok(),
        };
        if stamp.is_some() && stamp != record.source_stamp {
            return Ok(None);
        }
        record.last_used_ms = now_ms();
        Ok(self.disk.touch(&record, record.last_used_ms).map_err(failed)?.then_some(record))
    }

    /// The directory that a layer of a record is unpacked in, to be an overlayfs lower directory.
    pub fn layer_dir(&self, layer: &Digest) -> PathBuf {
        self.disk.layer_tree(layer)
    }

    /// Brings an image here if it is not, and waits for it. However many wait for one image, it is pulled once;
    /// when nobody waits any more (the futures were dropped), the pull ends.
    ///
    /// `latest` asks the registry each time; where that cannot be reached, the image that is here is used.
    pub async fn ensure(
        &self,
        reference: &ImageRef,
        mut on_progress: impl FnMut(Progress),
    ) -> Result<ImageRecord, ImageError> {
        // One that was brought here under another policy is verified anew; its layers need not be fetched for that.
        let keys = keys_for(&self.config.signers, reference);
        let signed = |record: &ImageRecord| {
            keys.is_empty() || keys.iter().any(|key| record.signed_by == Some(key.id()))
        };
        let here = self.lookup(reference)?.filter(signed);
        if let Some(record) = &here
            && !reference.floats()
        {
            return Ok(record.clone());
        }
        let mut flight = self.board(reference);
        let result = loop {
            match &*flight.borrow_and_update() {
                Flight::Under(progress) => on_progress(*progress),
                Flight::Landed(result) => break (**result).clone(),
            }
            if flight.changed().await.is_err() {
                break Err(failed(reference, "its pull ended without a result"));
            }
        };
        match (result, here) {
            (Err(error @ ImageError::Unreachable { .. }), Some(record)) => {
                tracing::warn!(image = %reference, %error, "using the image that is here");
                Ok(record)
            }
            (result, _) => result,
        }
    }

    /// Removes what dead workers left; then, while more than `used_percent_max` of the file system is taken, images
    /// and layers, the longest unused first. `in_use` and what was used in the last ten minutes stays.
    pub async fn collect(
        &self,
        in_use: &BTreeSet<Digest>,
        used_percent_max: u8,
        now_ms: u64,
    ) -> Result<Collected, ImageError> {
        let request = Request::Collect {
            store: self.disk.root().to_owned(),
            in_use: in_use.clone(),
            used_permille_max: u64::from(used_percent_max) * 10,
            now_ms,
        };
        let answer = self.run(&request, |_| {}, std::future::pending()).await;
        // One that failed may have removed some before.
        if !matches!(&answer, Ok(Report::Collected(Collected { images: 0, .. }))) {
            self.held.send_replace(listed(&self.disk));
        }
        match answer {
            Ok(Report::Collected(collected)) => Ok(collected),
            Ok(Report::Failed(error)) => Err(error),
            Ok(_) => Err(failed(&"collection", "the worker answered something else")),
            Err(error) => Err(failed(&"collection", &error.to_string())),
        }
    }

    /// Joins the pull of an image, starting it if nobody else has.
    fn board(&self, reference: &ImageRef) -> watch::Receiver<Flight> {
        let mut flights = self.flights();
        if let Some(flight) = flights.get(reference) {
            return flight.subscribe();
        }
        let (sender, receiver) = watch::channel(Flight::Under(Progress::default()));
        flights.insert(reference.clone(), sender.clone());
        let (store, reference) = (self.clone(), reference.clone());
        tokio::spawn(async move { store.fly(reference, sender).await });
        receiver
    }

    async fn fly(&self, reference: ImageRef, flight: watch::Sender<Flight>) {
        let request = Request::Pull {
            store: self.disk.root().to_owned(),
            reference: reference.clone(),
            registry: self.config.registry.clone(),
            image_bytes_max: self.config.image_bytes_max,
            keys: keys_for(&self.config.signers, &reference),
        };
        let progressed = |progress| drop(flight.send_replace(Flight::Under(progress)));
        let deserted = async {
            loop {
                flight.closed().await;
                // Under the lock nobody can board; who boarded since then keeps the pull going.
                let mut flights = self.flights();
                if flight.receiver_count() == 0 {
                    flights.remove(&reference);
                    return;
                }
            }
        };
        let result = match self.run(&request, progressed, deserted).await {
            Ok(Report::Pulled(record)) => {
                self.used(&record.reference);
                Ok(*record)
            }
            Ok(Report::Failed(error)) => Err(error),
            Ok(_) => Err(failed(&reference, "the worker answered something else")),
            Err(error) => Err(failed(&reference, &error.to_string())),
        };
        let mut flights = self.flights();
        // After a desertion another pull of the same image may have taken this one's place.
        if flights.get(&reference).is_some_and(|current| current.same_channel(&flight)) {
            flights.remove(&reference);
        }
        flight.send_replace(Flight::Landed(Box::new(result)));
    }

    fn flights(&self) -> MutexGuard<'_, BTreeMap<ImageRef, watch::Sender<Flight>>> {
        self.flights.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has a worker serve `request`; asks it to leave when `unwanted` resolves.
    async fn run(
        &self,
        request: &Request,
        mut on_progress: impl FnMut(Progress),
        unwanted: impl Future<Output = ()>,
    ) -> io::Result<Report> {
        let mut unwanted = std::pin::pin!(unwanted);
        let _permit = tokio::select! {
            permit = self.workers.acquire() => permit.map_err(io::Error::other)?,
            () = &mut unwanted => return Err(io::Error::other("nobody waits for it any more")),
        };
        let mut command = Command::new(&self.config.worker);
        command.arg("image").stdin(Stdio::piped()).stdout(Stdio::piped()).kill_on_drop(true);
        let mut child = command.spawn()?;
        let pipes = child.stdin.take().zip(child.stdout.take());
        let (mut stdin, stdout) = pipes.ok_or_else(|| io::Error::other("the worker has no pipes"))?;
        let mut line = serde_json::to_vec(request)?;
        line.push(b'\n');
        stdin.write_all(&line).await?;
        let mut reports = BufReader::new(stdout);
        loop {
            let report = tokio::select! {
                report = timeout(SILENCE_MAX, next_report(&mut reports)) => report,
                () = &mut unwanted => {
                    drop(stdin);
                    // It says so in a last report that nobody reads; its death is what counts.
                    let _ = timeout(LEAVE_TIME_MAX, child.wait()).await;
                    return Err(io::Error::other("nobody waits for it any more"));
                }
            };
            match report
                .map_err(|_| io::Error::other(format!("the worker was silent for {SILENCE_MAX:?}")))??
            {
                Some(Report::Progress(progress)) => on_progress(progress),
                Some(report) => {
                    drop(stdin);
                    let _ = timeout(LEAVE_TIME_MAX, child.wait()).await;
                    return Ok(report);
                }
                None => return Err(died(&mut child).await),
            }
        }
    }
}

/// The images on the disk. Where it cannot be read nobody knows of any, and each is found when it is asked for.
fn listed(disk: &Disk) -> Images {
    let images = disk.images();
    images
        .inspect_err(|error| tracing::warn!("cannot tell which images are here: {error}"))
        .unwrap_or_default()
}

async fn next_report(reports: &mut (impl AsyncBufReadExt + Unpin)) -> io::Result<Option<Report>> {
    let mut line = Vec::new();
    reports.take(REPORT_BYTES_MAX).read_until(b'\n', &mut line).await?;
    if line.is_empty() {
        return Ok(None);
    }
    Ok(Some(serde_json::from_slice(&line)?))
}

async fn died(child: &mut Child) -> io::Error {
    match timeout(REPORT_INTERVAL, child.wait()).await {
        Ok(Ok(status)) => io::Error::other(format!("the worker ended early: {status}")),
        _ => io::Error::other("the worker closed its pipe"),
    }
}

fn failed(image: &impl ToString, why: &str) -> ImageError {
    ImageError::Failed { image: image.to_string(), why: why.to_owned() }
}

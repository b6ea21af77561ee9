//! Owns the short-lived process that reads what comes from outside: one request in, reports out, then the end.
//!
//! The request is one line of JSON on stdin. Stdin then stays open: its end means that the daemon wants no more, or
//! is dead; the worker cleans up and leaves. Reports are lines of JSON on stdout: progress twice a second, which
//! is also the sign of life, and last the result.

use std::collections::BTreeSet;
use std::future::Future;
use std::io::{self, BufRead, Read, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use berth_protocol::chain::chain;
use nix::sys::resource::{Resource, setrlimit};
use serde::{Deserialize, Serialize};
use tokio::sync::oneshot;

use super::super::confine::{Room, confine};
use super::collect::{Collected, collect};
use super::disk::Disk;
use super::pull::{Gauge, Pull};
use super::{CosignKey, Digest, ImageError, ImageRecord, ImageRef, Progress, RegistryConfig};

const REQUEST_BYTES_MAX: u64 = 4 << 20;
pub(super) const REPORT_INTERVAL: Duration = Duration::from_millis(500);
/// A pull that takes longer is given up: a registry that dribbles would hold it for ever.
const PULL_TIME_MAX: Duration = Duration::from_secs(6 * 3600);
/// How long threads that unpack have to notice that they should stop.
const STOP_TIME_MAX: Duration = Duration::from_secs(10);
/// Far above what a pull needs (zstd's largest window is 128 MiB, and three layers are unpacked at once).
const DATA_BYTES_MAX: libc::rlim_t = 1 << 30;
const NICENESS: i32 = 10;
/// What making files takes that are anybody's, devices, and marked for overlayfs (`trusted.` attributes want SYS_ADMIN).
const OF_FILES: [&str; 7] = ["CHOWN", "DAC_OVERRIDE", "FOWNER", "FSETID", "MKNOD", "SETFCAP", "SYS_ADMIN"];

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) enum Request {
    #[serde(rename_all = "camelCase")]
    Pull {
        store: PathBuf,
        reference: ImageRef,
        registry: RegistryConfig,
        image_bytes_max: u64,
        /// One of which must have signed it; none: it needs no signature.
        keys: Vec<CosignKey>,
    },
    #[serde(rename_all = "camelCase")]
    Collect { store: PathBuf, in_use: BTreeSet<Digest>, used_permille_max: u64, now_ms: u64 },
}

impl Request {
    fn room(&self) -> Room {
        let (store, reads, network) = match self {
            Request::Pull { store, reference, registry, .. } => {
                let local = match reference {
                    ImageRef::Registry(_) => None,
                    ImageRef::Layout { path, .. } | ImageRef::Archive { path } => Some(path.clone()),
                };
                let network = local.is_none();
                (store, local.into_iter().chain(registry.auth_file.clone()).collect(), network)
            }
            Request::Collect { store, .. } => (store, Vec::new(), false),
        };
        Room { reads, writes: vec![store.clone()], capabilities: &OF_FILES, network }
    }
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) enum Report {
    Progress(Progress),
    Pulled(Box<ImageRecord>),
    Collected(Collected),
    Failed(ImageError),
}

/// The whole of `berth-agent image`; to be called before any thread exists.
pub fn worker_main() -> ExitCode {
    restrain();
    let request = match read_request() {
        Ok(request) => request,
        Err(error) => {
            eprintln!("berth-agent image is berth's own, not for people: {error}");
            return ExitCode::from(2);
        }
    };
    if let Err(error) = confine(&request.room()) {
        eprintln!("{}", chain(&error));
        return ExitCode::FAILURE;
    }
    let gauge = Arc::new(Gauge::default());
    let cancelled = watch_stdin();
    let last_line_written = Arc::new(Mutex::new(false));
    let reporter = (gauge.clone(), last_line_written.clone());
    thread::spawn(move || report_progress(&reporter.0, &reporter.1));
    let report = serve(request, &gauge, cancelled);
    let mut last = last_line_written.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    *last = true;
    match write_report(&report) {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}

/// Bounds this process; whatever of it the machine does not allow is left out.
fn restrain() {
    let _ = setrlimit(Resource::RLIMIT_CORE, 0, 0);
    let _ = setrlimit(Resource::RLIMIT_DATA, DATA_BYTES_MAX, DATA_BYTES_MAX);
    // SAFETY: setpriority takes three integers and touches no memory of this process.
    unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, NICENESS) };
}

fn read_request() -> io::Result<Request> {
    let mut line = Vec::new();
    // Unbuffered beyond the line: the daemon sends nothing after it.
    io::stdin().lock().take(REQUEST_BYTES_MAX).read_until(b'\n', &mut line)?;
    Ok(serde_json::from_slice(&line)?)
}

/// Resolves when stdin ends.
fn watch_stdin() -> oneshot::Receiver<()> {
    let (sender, receiver) = oneshot::channel();
    thread::spawn(move || {
        let _ = io::copy(&mut io::stdin().lock(), &mut io::sink());
        let _ = sender.send(());
    });
    receiver
}

fn report_progress(gauge: &Gauge, last_line_written: &Mutex<bool>) {
    loop {
        thread::sleep(REPORT_INTERVAL);
        let Ok(last) = last_line_written.lock() else { return };
        if *last || write_report(&Report::Progress(gauge.progress())).is_err() {
            return;
        }
    }
}

fn write_report(report: &Report) -> io::Result<()> {
    let mut line = serde_json::to_vec(report)?;
    line.push(b'\n');
    let mut stdout = io::stdout().lock();
    stdout.write_all(&line)?;
    stdout.flush()
}

fn serve(request: Request, gauge: &Arc<Gauge>, cancelled: oneshot::Receiver<()>) -> Report {
    let result = match request {
        Request::Pull { store, reference, registry, image_bytes_max, keys } => {
            pull(&store, &reference, &registry, image_bytes_max, &keys, gauge, cancelled)
                .map(|record| Report::Pulled(Box::new(record)))
        }
        Request::Collect { store, in_use, used_permille_max, now_ms } => Disk::open(&store)
            .and_then(|disk| collect(&disk, &in_use, used_permille_max, now_ms))
            .map(Report::Collected)
            .map_err(|error| ImageError::disk(&"collection", &store, &error)),
    };
    result.unwrap_or_else(Report::Failed)
}

fn pull(
    store: &std::path::Path,
    reference: &ImageRef,
    registry: &RegistryConfig,
    image_bytes_max: u64,
    keys: &[CosignKey],
    gauge: &Arc<Gauge>,
    cancelled: oneshot::Receiver<()>,
) -> Result<ImageRecord, ImageError> {
    let disk_error = |error: io::Error| ImageError::disk(reference, store, &error);
    let failed = |why: &str| ImageError::Failed { image: reference.to_string(), why: why.to_owned() };
    let disk = Disk::open(store).map_err(disk_error)?;
    disk.sweep().map_err(disk_error)?;
    let work = disk.work_dir().map_err(disk_error)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(disk_error)?;
    let pull =
        Pull { reference, registry, image_bytes_max, keys, disk: &disk, work: &work, gauge: gauge.clone() };
    let result = runtime.block_on(async {
        tokio::select! {
            result = bounded(pull.run()) => result.unwrap_or_else(|| Err(failed("it took more than six hours"))),
            _ = cancelled => Err(failed("nobody waits for it any more")),
        }
    });
    gauge.stop();
    runtime.shutdown_timeout(STOP_TIME_MAX);
    // Only now does nobody write there any more.
    drop(work);
    result
}

async fn bounded<T>(work: impl Future<Output = T>) -> Option<T> {
    tokio::time::timeout(PULL_TIME_MAX, work).await.ok()
}

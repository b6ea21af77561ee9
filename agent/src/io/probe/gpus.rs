//! The node's GPUs of all vendors, asked from a thread of their own, since a driver with a broken device may not
//! answer for minutes and the agent's loop has leases to keep. Without a driver there is no thread.

use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::Duration;

use berth_protocol::limits::GPUS_PER_NODE_MAX;
use berth_protocol::resources::{Gpu, GpuUsage};
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout};

use super::cuda;
use super::drm::Drm;
use super::nvidia::{self, Records, Session};

/// Virtual: only what is touched counts.
const STACK_BYTES: usize = 1 << 20;
/// Questions answered without the library after it could not be loaded: trying takes 11 ms of processor time.
const RELOAD_PAUSE: u32 = 5;

/// A device as its driver tells of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    pub gpu: Gpu,
    /// `None` while it is unhealthy and says nothing.
    pub usage: Option<GpuUsage>,
    /// The device nodes that are its alone, such as `/dev/nvidia0` or `/dev/dri/renderD128`.
    pub nodes: Vec<PathBuf>,
}

impl Found {
    /// The same device, no longer to be used.
    pub fn lost(mut self, reason: String) -> Self {
        self.gpu.unhealthy = Some(reason);
        self.usage = None;
        self
    }
}

/// All that the drivers said at one time.
#[derive(Debug, Clone, Default)]
pub struct Snapshot {
    pub found: Vec<Found>,
    /// NVIDIA's driver, and the newest CUDA that it runs.
    pub driver: Option<String>,
    pub cuda: Option<String>,
    /// NVIDIA's driver can save the memory of its devices.
    pub saves: bool,
}

/// The loop's side: the last snapshot, and the thread that makes the next.
#[derive(Debug)]
pub struct Gpus {
    root: PathBuf,
    nvml: Option<PathBuf>,
    program: Option<PathBuf>,
    stuck_after: Duration,
    worker: Option<Worker>,
    snapshot: Snapshot,
}

#[derive(Debug)]
struct Worker {
    asks: SyncSender<()>,
    answers: mpsc::Receiver<Snapshot>,
    /// When the question was asked that stands unanswered.
    asked: Option<Instant>,
}

impl Gpus {
    /// Starts nothing yet. `nvml` names the library to use in place of `libnvidia-ml.so.1`; `program` is the agent's own,
    /// to ask libcuda by.
    pub fn new(
        root: PathBuf,
        nvml: Option<PathBuf>,
        program: Option<PathBuf>,
        stuck_after: Duration,
    ) -> Self {
        Self { root, nvml, program, stuck_after, worker: None, snapshot: Snapshot::default() }
    }

    pub fn snapshot(&self) -> &Snapshot {
        &self.snapshot
    }

    /// Asks the drivers, and waits at most `wait` for the answer. One that comes later is taken the next time, and
    /// is not waited for again.
    pub async fn refresh(&mut self, wait: Duration) {
        if self.worker.is_none() {
            if !(nvidia::present(&self.root, self.nvml.as_deref()) || Drm::present(&self.root)) {
                return;
            }
            self.worker = spawn(self.root.clone(), self.nvml.clone(), self.program.clone());
        }
        let Some(worker) = &mut self.worker else { return };
        if let Ok(late) = worker.answers.try_recv() {
            self.snapshot = late;
            worker.asked = None;
        }
        let wait = if worker.asked.is_some() { Duration::ZERO } else { wait };
        let asked = *worker.asked.get_or_insert_with(|| {
            // Its room of one is free: the last question was answered.
            let _ = worker.asks.try_send(());
            Instant::now()
        });
        match timeout(wait, worker.answers.recv()).await {
            Ok(Some(snapshot)) => {
                self.snapshot = snapshot;
                worker.asked = None;
            }
            Ok(None) => {
                tracing::error!("the thread that asks the GPUs' drivers has ended: starting another");
                self.worker = None;
                self.mark_all("the agent's GPU probe has failed");
            }
            Err(_) if asked.elapsed() >= self.stuck_after => {
                self.mark_all(&format!(
                    "its driver has not answered for {} s: see the kernel log",
                    self.stuck_after.as_secs()
                ));
            }
            Err(_) => {}
        }
    }

    fn mark_all(&mut self, reason: &str) {
        for found in &mut self.snapshot.found {
            found.usage = None;
            found.gpu.unhealthy.get_or_insert_with(|| reason.to_owned());
        }
    }
}

fn spawn(root: PathBuf, nvml: Option<PathBuf>, program: Option<PathBuf>) -> Option<Worker> {
    let (asks, questions) = sync_channel(1);
    let (replies, answers) = mpsc::channel(1);
    let thread = std::thread::Builder::new().name("gpus".to_owned()).stack_size(STACK_BYTES);
    match thread.spawn(move || serve(&root, nvml.as_deref(), program.as_deref(), &questions, &replies)) {
        Ok(_) => Some(Worker { asks, answers, asked: None }),
        Err(error) => {
            tracing::error!(%error, "cannot start the thread that asks the GPUs' drivers");
            None
        }
    }
}

/// The thread: one snapshot for each question, until the loop is gone.
fn serve(
    root: &Path,
    nvml: Option<&Path>,
    program: Option<&Path>,
    asks: &Receiver<()>,
    answers: &mpsc::Sender<Snapshot>,
) {
    let mut records = Records::default();
    let mut drm = Drm::new(root);
    let (mut told, mut pause) = (None, 0);
    let mut saves_told = None;
    while asks.recv().is_ok() {
        if pause > 0 && nvidia::present(root, nvml) {
            pause -= 1;
            let _ = answers.blocking_send(snapshot(records.found(), &mut drm));
            continue;
        }
        let failure = match nvidia::present(root, nvml).then(|| nvidia::load(nvml)) {
            Some(Ok(library)) => {
                // A driver that comes anew may be another.
                let saves = program.map(cuda::check);
                if saves != saves_told
                    && let Some(Err(why)) = &saves
                {
                    tracing::info!("no transparent checkpoints of pods with GPUs on this node: {why}");
                }
                saves_told.clone_from(&saves);
                let saves = saves.is_some_and(|found| found.is_ok());
                let session = Session::new(&library, root);
                // Answers this question and those that follow, while the driver is well.
                match serve_session(session, saves, &mut records, &mut drm, asks, answers) {
                    Some(failure) => Some(failure),
                    None => return,
                }
            }
            Some(Err(error)) => {
                let failure = format!("NVIDIA's driver cannot be used: {error}");
                let _ = answers.blocking_send(snapshot(records.all_lost(&failure), &mut drm));
                pause = RELOAD_PAUSE;
                Some(failure)
            }
            None => {
                let gone = records.all_lost("NVIDIA's driver is gone");
                let _ = answers.blocking_send(snapshot(gone, &mut drm));
                None
            }
        };
        if failure != told {
            if let Some(failure) = &failure {
                tracing::warn!("{failure}");
            }
            told = failure;
        }
    }
}

/// Ends with the error that the driver as a whole failed with, or `None` with the loop.
fn serve_session(
    mut session: Session<'_>,
    saves: bool,
    records: &mut Records,
    drm: &mut Drm,
    asks: &Receiver<()>,
    answers: &mpsc::Sender<Snapshot>,
) -> Option<String> {
    loop {
        let failure = session.sample(records).err().map(|e| format!("NVIDIA's driver failed: {e}"));
        let found = match &failure {
            None => records.found(),
            Some(error) => records.all_lost(error),
        };
        let mut snapshot = snapshot(found, drm);
        (snapshot.driver, snapshot.cuda) = (session.driver.clone(), session.cuda.clone());
        snapshot.saves = saves && failure.is_none();
        if answers.blocking_send(snapshot).is_err() {
            return None;
        }
        if failure.is_some() {
            return failure;
        }
        asks.recv().ok()?;
    }
}

fn snapshot(mut found: Vec<Found>, drm: &mut Drm) -> Snapshot {
    found.extend(drm.sample());
    found.truncate(GPUS_PER_NODE_MAX);
    Snapshot { found, driver: None, cuda: None, saves: false }
}

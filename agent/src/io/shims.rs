//! Shims as processes: starts them, finds them again, carries orders and reports, and clears away what a dead one
//! left. Which pod gets which order is not decided here.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use berth_protocol::ids::Run;
use berth_protocol::secret::SecretValues;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::net::unix::OwnedWriteHalf;
use tokio::process::{Child, Command};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, timeout};

use super::secrets;
use crate::core::ledger::PodKey;
use crate::core::{Event, NoExit};
use crate::shim::{self, sys};
use crate::task::{Exit, Order, Task, file};

/// A shim that does not open its socket within this time counts as dead.
const CONNECT_MAX: Duration = Duration::from_secs(30);
/// A shim that has closed its socket ends within this time, or is killed.
const END_MAX: Duration = Duration::from_secs(30);

/// Between two tries to end what is left of a pod.
const CLEAR_PAUSE: Duration = Duration::from_secs(1);

/// Moves that keep the way into control groups open, and the time between them: less than a grace period.
const MOVES: usize = 4;
const MOVE_PAUSE: Duration = Duration::from_millis(4);
/// Of the thread that makes them.
const STACK_BYTES: usize = 64 << 10;

#[derive(Debug, thiserror::Error)]
pub enum ShimError {
    #[error("cannot write {path}: {source}")]
    Task { path: PathBuf, source: io::Error },
    #[error("cannot start the pod's supervisor: {0}")]
    Spawn(#[source] io::Error),
}

/// Moves this process to the control group that it is in. The kernel lets a process into another group only after a
/// grace period of all processors, 6 to 20 ms, which it skips where somebody has waited just before (`rcu_sync` in
/// `cgroup_threadgroup_rwsem`). So the wait happens here while the shim gets ready, not later before its container;
/// the moves after the first keep the way open for a shim that takes longer. Who waits holds the lock that making a
/// group takes, so the pod's groups are there before.
fn open_groups() {
    let thread = std::thread::Builder::new().name("groups".to_owned()).stack_size(STACK_BYTES);
    let keep_open = || {
        let Some(procs) = own_procs() else { return };
        for _ in 0..MOVES {
            let _ = fs::write(&procs, "0");
            std::thread::sleep(MOVE_PAUSE);
        }
    };
    // Without it a container starts later, nothing more.
    let _ = thread.spawn(keep_open);
}

/// The file that takes processes into the control group of this one, in a hierarchy that has one.
fn own_procs() -> Option<PathBuf> {
    let groups = fs::read_to_string("/proc/self/cgroup").ok()?;
    groups.lines().find_map(|line| {
        let (controllers, path) = line.split_once(':')?.1.split_once(':')?;
        let group = Path::new("/sys/fs/cgroup").join(controllers).join(path.trim_start_matches('/'));
        Some(group.join("cgroup.procs")).filter(|procs| procs.exists())
    })
}

struct Link {
    orders: mpsc::UnboundedSender<Order>,
    served: JoinHandle<()>,
}

pub struct Shims {
    dir: PathBuf,
    links: BTreeMap<PodKey, Link>,
    events: mpsc::UnboundedSender<Event>,
}

impl Shims {
    /// `dir` holds a directory for each pod.
    pub fn new(dir: PathBuf, events: mpsc::UnboundedSender<Event>) -> Self {
        // A file system without such an attribute does as well.
        let _ = fs::create_dir_all(&dir).and_then(|()| sys::spread_directories(&dir));
        // Now, as long as this program is the file at its path.
        let _ = shim::program::path();
        Self { dir, links: BTreeMap::new(), events }
    }

    pub fn pod_dir(&self, key: &PodKey) -> PathBuf {
        self.dir.join(key.to_string())
    }

    /// Starts the shim of a run, once that of the run before has ended.
    pub fn launch(&mut self, key: &PodKey, task: Task, secrets: SecretValues) -> Result<(), ShimError> {
        let dir = self.pod_dir(key);
        let before = self.links.remove(key).map(|link| link.served).filter(|served| !served.is_finished());
        let Some(mut before) = before else {
            let child = start(&dir, &task, &secrets)?;
            self.connect(key, |key, events, orders| serve(key, dir, task.run, Some(child), orders, events));
            return Ok(());
        };
        // It tells of its pod's end before it has cleared away, and until then holds the lock and the groups.
        self.connect(key, |key, events, orders| async move {
            if timeout(2 * END_MAX, &mut before).await.is_err() {
                before.abort();
                beside(&dir, clear_away).await;
            }
            match start(&dir, &task, &secrets) {
                Ok(child) => serve(key, dir, task.run, Some(child), orders, events).await,
                Err(error) => {
                    let _ = events.send(gone(key, &dir, task.run, Some(error.to_string())));
                }
            }
        });
        Ok(())
    }

    /// A run that came to no shim.
    pub fn failed(&self, key: PodKey, run: Run, why: String) {
        let dir = self.pod_dir(&key);
        let _ = self.events.send(gone(key, &dir, run, Some(why)));
    }

    /// Looks for the shim of a run that an earlier agent started.
    pub fn adopt(&mut self, key: &PodKey, run: Run) {
        let dir = self.pod_dir(key);
        self.connect(key, |key, events, orders| serve(key, dir, run, None, orders, events));
    }

    /// Passes an order on; a shim that has ended needs none.
    pub fn order(&self, key: &PodKey, order: Order) {
        if let Some(link) = self.links.get(key) {
            let _ = link.orders.send(order);
        }
    }

    /// Ends the pod by force, its shim with it; `Gone` follows.
    pub fn kill(&mut self, key: &PodKey, run: Run) {
        if let Some(link) = self.links.remove(key) {
            link.served.abort();
        }
        let (dir, events, key) = (self.pod_dir(key), self.events.clone(), key.clone());
        let kill = move || {
            clear_away(&dir);
            let _ = events.send(gone(key.clone(), &dir, run, None));
        };
        // A thread of its own: a pod beyond its lease must not outlive it because files are being removed. Without one
        // the agent waits: the pod must go.
        let thread = std::thread::Builder::new().name("kill".to_owned());
        if thread.spawn(kill.clone()).is_err() {
            kill();
        }
    }

    /// Removes the pod's directory once its shim has ended.
    pub fn drop_pod(&mut self, key: &PodKey) {
        let dir = self.pod_dir(key);
        let link = self.links.remove(key);
        tokio::spawn(async move {
            if let Some(link) = link {
                drop(link.orders);
                let _ = timeout(END_MAX, link.served).await;
            }
            beside(&dir, remove).await;
        });
    }

    /// Removes directories of pods that the ledger does not know, where nothing of them is alive.
    pub fn sweep(&self, known: impl Fn(&PodKey) -> bool) {
        for entry in fs::read_dir(&self.dir).into_iter().flatten().flatten() {
            let Some(key) = entry.file_name().to_str().and_then(PodKey::parse) else { continue };
            let dir = entry.path();
            if !known(&key) && is_free(&dir) && try_clear_away(&dir) {
                remove(&dir);
            }
        }
    }

    /// Begins what serves a shim; orders to it are kept from here on.
    fn connect<F: Future<Output = ()> + Send + 'static>(
        &mut self,
        key: &PodKey,
        serve: impl FnOnce(PodKey, mpsc::UnboundedSender<Event>, mpsc::UnboundedReceiver<Order>) -> F,
    ) {
        let (orders, receiver) = mpsc::unbounded_channel();
        let served = tokio::spawn(serve(key.clone(), self.events.clone(), receiver));
        self.links.insert(key.clone(), Link { orders, served });
    }
}

/// The shim's process, for the run that the task describes. No fsync: after a crash of the machine there is nothing
/// left that the task names.
fn start(dir: &Path, task: &Task, secrets: &SecretValues) -> Result<Child, ShimError> {
    let path = dir.join(file::TASK);
    let write = || -> io::Result<()> {
        fs::create_dir_all(dir)?;
        fs::set_permissions(dir, std::os::unix::fs::PermissionsExt::from_mode(0o700))?;
        fs::write(&path, serde_json::to_vec(task)?)
    };
    write().map_err(|source| ShimError::Task { path: path.clone(), source })?;
    let input = match secrets.is_empty() {
        true => Stdio::null(),
        false => secrets::input(secrets).map_err(ShimError::Spawn)?.into(),
    };
    // What cannot be made the shim will say.
    let _ = shim::make_groups(task);
    open_groups();
    Command::new(shim::program::path())
        .arg0("berth-agent")
        .arg("shim")
        .arg(dir)
        .stdin(input)
        .stdout(Stdio::null())
        .spawn()
        .inspect_err(|_| drop(shim::clean_up(task, dir)))
        .map_err(ShimError::Spawn)
}

/// Off the agent's only thread: killing may wait for a device for seconds, removing is as long as there are files.
async fn beside(dir: &Path, work: fn(&Path)) {
    let dir = dir.to_owned();
    let _ = tokio::task::spawn_blocking(move || work(&dir)).await;
}

/// The life of one shim: from its socket's appearance to its end.
async fn serve(
    key: PodKey,
    dir: PathBuf,
    run: Run,
    mut child: Option<Child>,
    mut orders: mpsc::UnboundedReceiver<Order>,
    events: mpsc::UnboundedSender<Event>,
) {
    let (mut asked, mut follow, mut again) = (true, false, false);
    // A shim lets go of an agent that does not read, and is there all the same: only its end is its end.
    while let Some(stream) = connect(&dir, child.as_mut()).await {
        let (read, mut write) = stream.into_split();
        let mut lines = BufReader::with_capacity(1024, read).lines();
        if std::mem::replace(&mut again, true) {
            let _ = events.send(Event::Reconnected { key: key.clone() });
            send(&mut write, &Order::Follow { follow }).await;
        }
        loop {
            tokio::select! {
                line = lines.next_line() => {
                    let Ok(Some(line)) = line else { break };
                    match serde_json::from_str(&line) {
                        Ok(report) => drop(events.send(Event::Shim { key: key.clone(), report })),
                        Err(error) => tracing::warn!("pod {key}: its supervisor said what is not a report: {error}"),
                    }
                }
                order = orders.recv(), if asked => match order {
                    Some(order) => {
                        if let Order::Follow { follow: wanted } = order {
                            follow = wanted;
                        }
                        send(&mut write, &order).await;
                    }
                    None => asked = false,
                },
            }
        }
    }
    // Whether it has left nothing to clear away; of another agent's child nobody knows.
    let ended = async {
        match &mut child {
            Some(child) => child.wait().await.is_ok_and(|status| status.success()),
            None => {
                while !is_free(&dir) {
                    sleep(Duration::from_millis(10)).await;
                }
                false
            }
        }
    };
    let clean = timeout(END_MAX, ended).await.unwrap_or_else(|_| {
        tracing::warn!("pod {key}: its supervisor hangs, ending it");
        false
    });
    if !clean || read_exit(&dir, run).is_none() {
        beside(&dir, clear_away).await;
    }
    let _ = events.send(gone(key, &dir, run, None));
}

async fn send(to: &mut OwnedWriteHalf, order: &Order) {
    let Ok(mut line) = serde_json::to_vec(order) else { return };
    line.push(b'\n');
    // A shim that no longer reads is at its end, and its last words are still to be read; or it is found again, and
    // what it has to do decided anew.
    let _ = to.write_all(&line).await;
}

/// Connects to the shim in `dir`; `None` when there is none (any more).
async fn connect(dir: &Path, mut child: Option<&mut Child>) -> Option<UnixStream> {
    let until = Instant::now() + CONNECT_MAX;
    let mut pause = Duration::from_micros(500);
    // A socket's path is at most 108 bytes long; a descriptor's is short.
    let handle = File::open(dir).ok()?;
    let path = format!("/proc/self/fd/{}/{}", handle.as_raw_fd(), file::SOCKET);
    while Instant::now() < until {
        if let Ok(stream) = UnixStream::connect(&path).await {
            return Some(stream);
        }
        let ended = match &mut child {
            Some(child) => !matches!(child.try_wait(), Ok(None)),
            None => is_free(dir),
        };
        if ended {
            return None;
        }
        match &mut child {
            // Its end is no reason to wait longer.
            Some(child) => drop(timeout(pause, child.wait()).await),
            None => sleep(pause).await,
        }
        pause = (pause * 2).min(Duration::from_millis(20));
    }
    None
}

/// No shim lives in this directory.
pub(super) fn is_free(dir: &Path) -> bool {
    match File::open(dir.join(file::LOCK)) {
        Ok(lock) => lock.try_lock().is_ok(),
        Err(_) => true,
    }
}

/// The run is over, and nothing of it alive.
fn gone(key: PodKey, dir: &Path, run: Run, why: Option<String>) -> Event {
    let exit = read_exit(dir, run).ok_or_else(|| {
        let log = dir.join(file::LOG_DIR);
        let counted = shim::log::last_seq(&log);
        let failed = |error: &io::Error| tracing::warn!("pod {key}: cannot read {}: {error}", log.display());
        NoExit { why, log_records: counted.inspect_err(failed).unwrap_or_default() }
    });
    Event::Gone { key, run, exit }
}

fn read_exit(dir: &Path, run: Run) -> Option<Exit> {
    let bytes = fs::read(dir.join(file::exit(run))).ok()?;
    serde_json::from_slice(&bytes).ok().filter(|exit: &Exit| exit.run == run)
}

/// Ends what is alive of a pod and undoes its mounts, groups and network. Does not return while something is alive:
/// to say that the pod has ended would be a lie.
fn clear_away(dir: &Path) {
    while !try_clear_away(dir) {
        std::thread::sleep(CLEAR_PAUSE);
    }
}

/// False where something is alive still.
fn try_clear_away(dir: &Path) -> bool {
    let Ok(bytes) = fs::read(dir.join(file::TASK)) else { return true };
    let Ok(task) = serde_json::from_slice::<Task>(&bytes) else { return true };
    let cleared = shim::clean_up(&task, dir);
    if let Err(error) = &cleared {
        tracing::warn!("pod {}.{}: cannot clear away all that it left: {error}", task.pod, task.epoch);
    }
    !cleared.is_err_and(|error| error.may_be_alive())
}

fn remove(dir: &Path) {
    if let Err(error) = try_remove(dir) {
        tracing::warn!("cannot remove {}: {error}", dir.display());
    }
}

/// Removes a pod's directory, never through a mount: behind one may be somebody's data.
fn try_remove(dir: &Path) -> io::Result<()> {
    if !dir.exists() {
        return Ok(());
    }
    let real = fs::canonicalize(dir)?;
    let mounts = fs::read_to_string("/proc/self/mountinfo")?;
    let below = |line: &str| line.split(' ').nth(4).is_some_and(|point| Path::new(point).starts_with(&real));
    if mounts.lines().any(below) {
        try_clear_away(dir);
        if fs::read_to_string("/proc/self/mountinfo")?.lines().any(below) {
            return Err(io::Error::other("something is still mounted in it"));
        }
    }
    fs::remove_dir_all(dir)
}

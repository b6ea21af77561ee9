//! A pod's control groups, on v1, hybrid and v2: where they are, who is in them, frozen or not, killed, gone.
//! Limits are libcontainer's work; this module knows nothing of it, so that the daemon uses it as well.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::thread::sleep;
use std::time::{Duration, Instant};

use berth_protocol::ids::{Epoch, PodId};
use berth_protocol::units::{Bytes, MilliCpu};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

const MOUNT: &str = "/sys/fs/cgroup";
/// Groups below a pod's are its containers'; anything deeper they made themselves.
const DEPTH_MAX: usize = 16;
const POLL_MS: u64 = 2;
/// Reclaim begins this far below the limit.
const MEMORY_HIGH_PERCENT: u64 = 95;
const CPU_PERIOD_US: u64 = 100_000;
/// The least that the kernel takes.
const CPU_QUOTA_US_MIN: u64 = 1_000;

/// Why control groups do not serve.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    #[error(
        "no control groups are mounted below {MOUNT}: mount them, or boot with systemd, which does so by itself"
    )]
    NotMounted,
    #[error(
        "the control group hierarchies lack {0}, which the kernel must offer: cgroup v1 or v2 with it is needed"
    )]
    NoController(&'static str),
    #[error("cannot {action} {path}: {source}")]
    Io { action: &'static str, path: PathBuf, source: io::Error },
    #[error(
        "processes of {path} are alive {ms} ms after SIGKILL; they may wait for a device or a network disk"
    )]
    Unkillable { path: PathBuf, ms: u128 },
}

/// How the machine's control groups are mounted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Layout {
    /// One directory a hierarchy, each named for its controllers.
    V1(Vec<PathBuf>),
    V2,
}

impl Layout {
    /// Looks at the mounts, once.
    pub fn detect() -> Result<&'static Self, CgroupError> {
        static FOUND: OnceLock<Layout> = OnceLock::new();
        if let Some(found) = FOUND.get() {
            return Ok(found);
        }
        let found = Self::look()?;
        Ok(FOUND.get_or_init(|| found))
    }

    fn look() -> Result<Self, CgroupError> {
        if Path::new(MOUNT).join("cgroup.controllers").exists() {
            return Ok(Layout::V2);
        }
        let entries = fs::read_dir(MOUNT).map_err(|_| CgroupError::NotMounted)?;
        let mut roots: Vec<PathBuf> = entries
            .filter_map(|entry| Some(entry.ok()?.path()))
            // `cpu` may be a link to `cpu,cpuacct`; the directory itself is listed as well.
            .filter(|path| !path.is_symlink() && path.join("cgroup.procs").exists())
            .filter(|path| !path.join("cgroup.controllers").exists() && !path.ends_with("systemd"))
            .collect();
        roots.sort();
        if roots.is_empty() {
            return Err(CgroupError::NotMounted);
        }
        Ok(Layout::V1(roots))
    }

    /// The v1 hierarchy of a controller.
    fn root(roots: &[PathBuf], controller: &'static str) -> Result<PathBuf, CgroupError> {
        let named = |path: &&PathBuf| {
            path.file_name().and_then(|n| n.to_str()).is_some_and(|n| n.split(',').any(|c| c == controller))
        };
        roots.iter().find(named).cloned().ok_or(CgroupError::NoController(controller))
    }
}

/// The groups of one pod, or one of its containers.
#[derive(Debug, Clone)]
pub struct Cgroup {
    layout: &'static Layout,
    /// Below each mount, without a leading slash.
    path: PathBuf,
}

/// Where reclaim begins in a group with this limit.
pub fn memory_high(limit: Bytes) -> Bytes {
    Bytes(limit.0 / 100 * MEMORY_HIGH_PERCENT)
}

/// The last part of a pod's cgroup: `{uid}-{index}.{epoch}`.
pub fn pod_name(pod: &PodId, epoch: Epoch) -> String {
    format!("{pod}.{epoch}")
}

fn parse_pod_name(name: &str) -> Option<(PodId, Epoch)> {
    let (pod, epoch) = name.rsplit_once('.')?;
    let (pod, epoch) = (PodId::parse(pod).ok()?, Epoch(epoch.parse().ok()?));
    (pod_name(&pod, epoch) == name).then_some((pod, epoch))
}

/// Pods in berth's groups below `parent` in which processes live, frozen ones too. Asks the kernel alone.
pub fn scan(parent: &Path) -> Result<Vec<(PodId, Epoch)>, CgroupError> {
    let all = Cgroup::new(parent)?;
    let mut found = Vec::new();
    let entries = match fs::read_dir(all.processes_dir()?) {
        Ok(entries) => entries,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(found),
        Err(source) => return Err(CgroupError::Io { action: "read", path: parent.to_owned(), source }),
    };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let Some((pod, epoch)) = name.to_str().and_then(parse_pod_name) else { continue };
        if !Cgroup::new(&parent.join(&name))?.processes()?.is_empty() {
            found.push((pod, epoch));
        }
    }
    found.sort();
    Ok(found)
}

impl Cgroup {
    /// `path` is below each mount; nothing is made yet.
    pub fn new(path: &Path) -> Result<Self, CgroupError> {
        let path = path.strip_prefix("/").unwrap_or(path).to_owned();
        Ok(Self { layout: Layout::detect()?, path })
    }

    pub fn child(&self, name: &str) -> Self {
        Self { layout: self.layout, path: self.path.join(name) }
    }

    pub fn is_v2(&self) -> bool {
        *self.layout == Layout::V2
    }

    /// As the OCI configuration wants it.
    pub fn absolute(&self) -> PathBuf {
        Path::new("/").join(&self.path)
    }

    /// The group's directory in each hierarchy.
    pub fn dirs(&self) -> Vec<PathBuf> {
        match self.layout {
            Layout::V1(roots) => roots.iter().map(|root| root.join(&self.path)).collect(),
            Layout::V2 => vec![Path::new(MOUNT).join(&self.path)],
        }
    }

    fn dir(&self, controller: &'static str) -> Result<PathBuf, CgroupError> {
        Ok(match self.layout {
            Layout::V1(roots) => Layout::root(roots, controller)?.join(&self.path),
            Layout::V2 => Path::new(MOUNT).join(&self.path),
        })
    }

    /// Where the pod's processes are listed: the hierarchy that can freeze them.
    fn processes_dir(&self) -> Result<PathBuf, CgroupError> {
        self.dir("freezer")
    }

    /// Makes the group in every hierarchy.
    pub fn create(&self) -> Result<(), CgroupError> {
        // To ask for what is there would wait for whoever makes another beside it.
        for dir in self.dirs().into_iter().filter(|dir| !dir.is_dir()) {
            fs::create_dir_all(&dir).map_err(|source| CgroupError::Io {
                action: "make",
                path: dir,
                source,
            })?;
        }
        if self.is_v2() {
            self.hand_controllers_down();
        }
        Ok(())
    }

    /// A new v1 group allows no processor and no memory node, and takes no process: it gets those of the one above.
    pub fn fill_cpuset(&self) -> Result<(), CgroupError> {
        let Layout::V1(roots) = self.layout else { return Ok(()) };
        let Ok(mut dir) = Layout::root(roots, "cpuset") else { return Ok(()) };
        for part in &self.path {
            let above = dir.clone();
            dir.push(part);
            for file in ["cpuset.cpus", "cpuset.mems"] {
                let path = dir.join(file);
                let failed = |source| CgroupError::Io { action: "fill", path: path.clone(), source };
                if fs::read_to_string(&path).map_err(failed)?.trim().is_empty() {
                    let value = fs::read_to_string(above.join(file)).map_err(failed)?;
                    fs::write(&path, value.trim()).map_err(failed)?;
                }
            }
        }
        Ok(())
    }

    /// Bounds the group's time on processors.
    pub fn limit_cpu(&self, cores: MilliCpu) -> Result<(), CgroupError> {
        let quota = (cores.0.saturating_mul(CPU_PERIOD_US) / 1000).max(CPU_QUOTA_US_MIN);
        let files = match self.is_v2() {
            true => vec![("cpu.max", format!("{quota} {CPU_PERIOD_US}"))],
            false => vec![
                ("cpu.cfs_period_us", CPU_PERIOD_US.to_string()),
                ("cpu.cfs_quota_us", quota.to_string()),
            ],
        };
        let dir = self.dir("cpu")?;
        files.into_iter().try_for_each(|(name, value)| {
            let path = dir.join(name);
            fs::write(&path, value).map_err(|source| CgroupError::Io { action: "write", path, source })
        })
    }

    /// On v2 a group has a controller's files once all above it hand the controller down. libcontainer sees to that,
    /// and to what cannot be had, but only after the group was asked what it has.
    fn hand_controllers_down(&self) {
        let mut dir = PathBuf::from(MOUNT);
        for part in &self.path {
            for controller in ["+memory", "+cpu", "+pids", "+cpuset", "+io"] {
                let _ = fs::write(dir.join("cgroup.subtree_control"), controller);
            }
            dir.push(part);
        }
    }

    /// Can swap be bounded, of the group once it was made? Not by a kernel that does not account for it.
    pub fn accounts_swap(&self) -> bool {
        let file = if self.is_v2() { "memory.swap.max" } else { "memory.memsw.limit_in_bytes" };
        self.dir("memory").is_ok_and(|dir| dir.join(file).exists())
    }

    /// Has the group use so much memory at most, and no swap beyond; `false`: it uses more than that, and keeps the
    /// limit that it has.
    pub fn limit_memory(&self, max: Bytes) -> Result<bool, CgroupError> {
        let dir = self.dir("memory")?;
        let write = |name: &str, value: Bytes| {
            let path = dir.join(name);
            fs::write(&path, value.0.to_string()).map_err(|source| CgroupError::Io {
                action: "write",
                path,
                source,
            })
        };
        if self.is_v2() {
            // The kernel would sooner kill than refuse; what is cached it lets go.
            if self.memory_kept() > max {
                return Ok(false);
            }
            write("memory.max", max)?;
            return write("memory.high", memory_high(max)).map(|()| true);
        }
        // With swap it is never less than without: which goes first depends on which way it goes.
        let mut files = vec!["memory.memsw.limit_in_bytes", "memory.limit_in_bytes"];
        let now = fs::read_to_string(dir.join(files[1])).ok().and_then(|text| text.trim().parse().ok());
        if now.is_some_and(|now: u64| now > max.0) {
            files.reverse();
        }
        for name in files.into_iter().filter(|name| dir.join(name).exists()) {
            match write(name, max) {
                Err(CgroupError::Io { source, .. }) if source.raw_os_error() == Some(libc::EBUSY) => {
                    return Ok(false);
                }
                written => written?,
            }
        }
        Ok(true)
    }

    /// What the group holds of memory and could not let go of.
    fn memory_kept(&self) -> Bytes {
        let Ok(dir) = self.dir("memory") else { return Bytes::ZERO };
        let text = fs::read_to_string(dir.join("memory.stat")).unwrap_or_default();
        let of = |name: &str| -> u64 {
            let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
            line.and_then(|value| value.parse().ok()).unwrap_or(0)
        };
        Bytes(of("anon") + of("shmem") + of("kernel"))
    }

    /// Every process of the group and of those below it.
    pub fn processes(&self) -> Result<Vec<Pid>, CgroupError> {
        let (mut pids, dir) = (Vec::new(), self.processes_dir()?);
        collect(&dir, 0, &mut pids).map_err(|source| CgroupError::Io {
            action: "list the processes of",
            path: dir,
            source,
        })?;
        Ok(pids)
    }

    /// Asks the kernel to freeze or thaw; `is_frozen` tells when it has.
    pub fn freeze(&self, frozen: bool) -> Result<(), CgroupError> {
        let (file, value) = match (self.is_v2(), frozen) {
            (true, true) => ("cgroup.freeze", "1"),
            (true, false) => ("cgroup.freeze", "0"),
            (false, true) => ("freezer.state", "FROZEN"),
            (false, false) => ("freezer.state", "THAWED"),
        };
        let path = self.processes_dir()?.join(file);
        fs::write(&path, value).map_err(|source| CgroupError::Io { action: "write", path, source })
    }

    /// As the kernel confirms it: no task of the group runs.
    pub fn is_frozen(&self) -> bool {
        let (file, sign) = match self.is_v2() {
            true => ("cgroup.events", "frozen 1"),
            // Reading it also makes v1 look again at tasks that were busy.
            false => ("freezer.state", "FROZEN"),
        };
        let Ok(dir) = self.processes_dir() else { return false };
        fs::read_to_string(dir.join(file)).is_ok_and(|text| text.lines().any(|line| line == sign))
    }

    /// How often the kernel killed a process of this very group for want of memory.
    pub fn oom_kills(&self) -> u64 {
        let file = if self.is_v2() { "memory.events" } else { "memory.oom_control" };
        let Ok(dir) = self.dir("memory") else { return 0 };
        let text = fs::read_to_string(dir.join(file)).unwrap_or_default();
        text.lines().find_map(|line| line.strip_prefix("oom_kill ")?.parse().ok()).unwrap_or(0)
    }

    /// SIGKILL to every process, once. A frozen v1 group dies only once it is thawed after the signal.
    pub fn signal_kill(&self) -> Result<(), CgroupError> {
        if self.is_v2() && fs::write(self.processes_dir()?.join("cgroup.kill"), "1").is_ok() {
            return Ok(());
        }
        for pid in self.processes()? {
            let _ = kill(pid, Signal::SIGKILL);
        }
        let _ = self.freeze(false);
        Ok(())
    }

    /// Kills until nobody is left, at most `timeout`.
    pub fn kill(&self, timeout: Duration) -> Result<(), CgroupError> {
        let begun = Instant::now();
        while !self.processes()?.is_empty() {
            if begun.elapsed() > timeout {
                let path = self.absolute();
                return Err(CgroupError::Unkillable { path, ms: begun.elapsed().as_millis() });
            }
            self.signal_kill()?;
            sleep(Duration::from_millis(POLL_MS));
        }
        Ok(())
    }

    /// Removes the group from every hierarchy; not being there is fine.
    pub fn remove(&self) -> Result<(), CgroupError> {
        self.dirs().iter().try_for_each(|dir| remove_tree(dir, 0))
    }
}

/// Nothing is left out for want of a descriptor or of memory: who is not listed counts as dead.
fn collect(dir: &Path, depth: usize, pids: &mut Vec<Pid>) -> io::Result<()> {
    let text = match fs::read_to_string(dir.join("cgroup.procs")) {
        // It went in this moment; or it is threaded, and its processes are listed above it.
        Err(e) if matches!(e.raw_os_error(), Some(libc::ENOENT | libc::ENODEV | libc::EOPNOTSUPP)) => {
            return Ok(());
        }
        text => text?,
    };
    pids.extend(text.lines().filter_map(|line| line.parse().ok()).filter(|pid| *pid > 0).map(Pid::from_raw));
    children(dir, depth)?.iter().try_for_each(|child| collect(child, depth + 1, pids))
}

fn children(dir: &Path, depth: usize) -> io::Result<Vec<PathBuf>> {
    if depth >= DEPTH_MAX {
        return Ok(Vec::new());
    }
    let entries = match fs::read_dir(dir) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries?,
    };
    let is_dir = |entry: &fs::DirEntry| entry.file_type().is_ok_and(|t| t.is_dir());
    Ok(entries.flatten().filter(is_dir).map(|entry| entry.path()).collect())
}

/// A group whose last process has just ended may be busy for a moment.
const REMOVE_TRIES_MAX: u32 = 200;

fn remove_tree(dir: &Path, depth: usize) -> Result<(), CgroupError> {
    let failed = |source| CgroupError::Io { action: "remove", path: dir.to_owned(), source };
    for child in children(dir, depth).map_err(failed)? {
        remove_tree(&child, depth + 1)?;
    }
    let mut tries = 0;
    loop {
        match fs::remove_dir(dir) {
            Ok(()) => return Ok(()),
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(e) if e.raw_os_error() == Some(libc::EBUSY) && tries < REMOVE_TRIES_MAX => {
                tries += 1;
                sleep(Duration::from_millis(POLL_MS));
            }
            Err(source) => return Err(failed(source)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use berth_protocol::ids::JobUid;

    #[test]
    fn a_pods_group_has_one_spelling() {
        let pod = PodId { uid: JobUid::parse("a1b2").unwrap(), index: 7 };
        assert_eq!(pod_name(&pod, Epoch(3)), "a1b2-7.3");
        assert_eq!(parse_pod_name("a1b2-7.3"), Some((pod, Epoch(3))));
        for other in ["a1b2-7", "a1b2-7.03", "a1b2-07.3", "a1b2.3", "cgroup.procs", "x-1.y"] {
            assert_eq!(parse_pod_name(other), None, "{other}");
        }
    }
}

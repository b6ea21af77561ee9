//! The supervisor of one run of a pod: a process of its own with one thread, alone in knowing libcontainer. It obeys
//! whichever agent is connected and goes on without one, up to its lease; it never touches another pod's things.
//!
//! `clean_up`, `scan`, the log's reader and `rootfs::mount_result` are the daemon's side of it: they work on what a
//! shim, dead or alive, leaves in directories and control groups.

pub mod capabilities;
pub mod cgroup;
pub mod checkpoint;
mod container;
pub mod control;
mod create;
mod devices;
mod error;
mod exit;
mod init;
pub mod lease;
pub mod log;
mod mountpoints;
pub mod netlink;
pub(crate) mod network;
mod process;
pub mod program;
mod pump;
mod quota;
pub mod rootfs;
pub mod seccomp;
mod secrets;
mod spec;
mod supervisor;
pub mod sys;
#[cfg(test)]
mod testing;
pub(crate) mod users;
mod volumes;

use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::thread::sleep;
use std::time::{Duration, Instant};

use berth_protocol::ids::ContainerName;
use nix::fcntl::{Flock, FlockArg};
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};
use nix::unistd::Pid;

use crate::task::{Task, file};
use cgroup::{Cgroup, CgroupError};
use supervisor::Supervisor;

pub use cgroup::scan;

/// How long processes may take to die after SIGKILL.
pub const KILL_MS_MAX: u64 = 10_000;

/// The subcommand `shim POD_DIR`: runs the pod of `dir` once, as its `task.json` says. To be called before any
/// thread exists. What went wrong with the pod is in its exit file; what keeps the shim from even writing that is
/// printed, and its code is 1.
pub fn main(dir: &Path) -> ExitCode {
    match program::seal().and_then(|()| run(dir)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("berth-agent shim {}: {e}", dir.display());
            ExitCode::FAILURE
        }
    }
}

fn run(dir: &Path) -> io::Result<()> {
    sys::open_standard_streams()?;
    let dir = &fs::canonicalize(dir)?;
    let task: Task = serde_json::from_slice(&fs::read(dir.join(file::TASK))?)?;
    let Some(_lock) = lock(dir)? else {
        return Err(io::Error::new(io::ErrorKind::WouldBlock, "another shim holds the pod"));
    };
    let signals = prepare_process()?;
    Supervisor::new(task, dir, signals)?.run()
}

/// The pod's lock; `None` while a shim lives. The holder's process number is the file's text.
fn lock(dir: &Path) -> io::Result<Option<Flock<fs::File>>> {
    let file = fs::OpenOptions::new().create(true).truncate(false).write(true).open(dir.join(file::LOCK))?;
    match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Ok(mut lock) => {
            lock.set_len(0)?;
            lock.write_all(std::process::id().to_string().as_bytes())?;
            Ok(Some(lock))
        }
        Err((_, nix::Error::EWOULDBLOCK)) => Ok(None),
        Err((_, e)) => Err(e.into()),
    }
}

/// Makes this process fit to outlive its agent. Returns the signals that the loop reads.
fn prepare_process() -> io::Result<SigSet> {
    // The leader of a group already cannot, and need not.
    let _ = nix::unistd::setsid();
    nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(0o022));
    // SAFETY: plain prctl calls with constants and a C string.
    unsafe {
        libc::prctl(libc::PR_SET_CHILD_SUBREAPER, 1);
        libc::prctl(libc::PR_SET_NAME, c"berth-shim".as_ptr());
    }
    // Whoever has started the agent may have given it groups, which containers would keep.
    nix::unistd::setgroups(&[])?;
    protect_from_oom();
    let ignore = SigAction::new(SigHandler::SigIgn, SaFlags::empty(), SigSet::empty());
    for signal in [Signal::SIGPIPE, Signal::SIGHUP, Signal::SIGINT] {
        // SAFETY: no handler is installed.
        unsafe { sigaction(signal, &ignore) }?;
    }
    let mut mask = SigSet::empty();
    mask.add(Signal::SIGCHLD);
    mask.add(Signal::SIGTERM);
    mask.thread_block()?;
    Ok(mask)
}

/// Where allowed: without CAP_SYS_RESOURCE the score stays as it is.
fn protect_from_oom() {
    let _ = fs::write("/proc/self/oom_score_adj", "-1000");
}

/// Why a pod could not be cleaned up.
#[derive(Debug, thiserror::Error)]
pub enum CleanUpError {
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    #[error("the pod's supervisor does not end after SIGKILL; {path} is still locked")]
    Shim { path: PathBuf },
    #[error("cannot remove the pod's link: {0}")]
    Network(io::Error),
    #[error("cannot remove {path}: {source}")]
    Remove { path: PathBuf, source: io::Error },
}

impl CleanUpError {
    /// Something of the pod is perhaps still alive.
    pub fn may_be_alive(&self) -> bool {
        let groups =
            |error: &CgroupError| matches!(error, CgroupError::Unkillable { .. } | CgroupError::Io { .. });
        match self {
            CleanUpError::Cgroup(error) => groups(error),
            CleanUpError::Shim { .. } => true,
            CleanUpError::Network(_) | CleanUpError::Remove { .. } => false,
        }
    }
}

/// Ends all that is left of a pod by force: its shim if that still lives, processes, control groups, link, writable
/// layers. Task, log and exit files stay. Safe to call again, and for a pod of which nothing is left. Blocks until
/// all is dead, at most some `KILL_MS_MAX`.
pub fn clean_up(task: &Task, dir: &Path) -> Result<(), CleanUpError> {
    end_shim(dir)?;
    end(task)?;
    // Of a run that has ended by itself they are still to be stored.
    let outputs = !task.template.outputs.is_empty() && dir.join(file::exit(task.run)).exists();
    clear(dir, outputs)
}

/// Kills the holder of the pod's lock and waits until it is free.
fn end_shim(dir: &Path) -> Result<(), CleanUpError> {
    let path = dir.join(file::LOCK);
    let begun = Instant::now();
    loop {
        let held = match fs::File::open(&path) {
            Ok(file) => Flock::lock(file, FlockArg::LockExclusiveNonblock).is_err(),
            Err(_) => false,
        };
        if !held {
            return Ok(());
        }
        if begun.elapsed() > Duration::from_millis(KILL_MS_MAX) {
            return Err(CleanUpError::Shim { path });
        }
        // The lock is held, so the number is still its holder's, or that of one who died in this moment.
        let pid = fs::read_to_string(&path).ok().and_then(|text| text.parse().ok()).filter(|pid| *pid > 1);
        if let Some(pid) = pid {
            let _ = nix::sys::signal::kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
        sleep(Duration::from_millis(2));
    }
}

/// Kills the pod and removes what the kernel holds of it.
fn end(task: &Task) -> Result<(), CleanUpError> {
    let cgroup = pod_cgroup(task)?;
    cgroup.kill(Duration::from_millis(KILL_MS_MAX))?;
    cgroup.remove()?;
    network::clean_up(task).map_err(CleanUpError::Network)
}

/// Makes a pod's groups and its containers'; that some are there is fine.
pub fn make_groups(task: &Task) -> Result<(), CgroupError> {
    let pod = pod_cgroup(task)?;
    pod.create()?;
    let containers =
        task.template.containers.iter().map(|container| container_cgroup(task, &pod, &container.name));
    // On v2 libcontainer makes them.
    containers.filter(|group| !group.is_v2()).try_for_each(|group| group.create())
}

/// What is in a pod's only container is in the pod: one group does for both.
fn container_cgroup(task: &Task, pod: &Cgroup, name: &ContainerName) -> Cgroup {
    match task.template.containers.len() {
        1 => pod.clone(),
        _ => pod.child(name.as_str()),
    }
}

fn pod_cgroup(task: &Task) -> Result<Cgroup, CgroupError> {
    Cgroup::new(&task.cgroup_parent.join(cgroup::pod_name(&task.pod, task.epoch)))
}

/// Removes a run's files; with `keep_written` not what containers have written, for outputs are in there.
fn clear(dir: &Path, keep_written: bool) -> Result<(), CleanUpError> {
    let mut names = vec![file::RUN_DIR, file::CHECKPOINT_DIR, file::SOCKET, file::RESTORE_DIR];
    if !keep_written {
        names.extend([file::ROOT_DIR, "volumes"]);
    }
    for name in names {
        let path = dir.join(name);
        let removed = match fs::symlink_metadata(&path) {
            Ok(file) if file.is_dir() => fs::remove_dir_all(&path),
            Ok(_) => fs::remove_file(&path),
            Err(e) => Err(e),
        };
        match removed {
            Err(source) if source.kind() != io::ErrorKind::NotFound => {
                return Err(CleanUpError::Remove { path, source });
            }
            _ => {}
        }
    }
    Ok(())
}

fn make_private_dir(path: &Path) -> io::Result<()> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(path)
}

/// Waits for a child of this process that has ended; `None` when there is none.
fn reap() -> Option<(Pid, u8)> {
    let mut status = 0;
    // SAFETY: the pointer is to a local.
    let pid = unsafe { libc::waitpid(-1, &mut status, libc::WNOHANG) };
    let code = match libc::WIFSIGNALED(status) {
        true => 128 + libc::WTERMSIG(status) as u8,
        false => libc::WEXITSTATUS(status) as u8,
    };
    (pid > 0).then(|| (Pid::from_raw(pid), code))
}

//! What the pod has written on the node's disk, against what it may. A child does the counting, so that the shim's
//! loop never waits for a file system; the shim is single-threaded, so that it may fork.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use berth_protocol::job::VolumeSource;
use berth_protocol::limits::SCRATCH_MEMORY_BYTES_MAX;
use berth_protocol::units::{BootMs, Bytes, Millis};
use nix::sys::signal::{Signal, kill};
use nix::unistd::{ForkResult, Pid, fork};

use super::error::ShimError;
use super::rootfs::{self, Home};
use crate::task::Task;

/// Between two counts. A pod may be over its quota for so long, and the time that counting takes.
const PERIOD: Millis = Millis(10_000);
/// The exit code of a child that found nothing amiss; others are the number of the quota, from 1.
const WITHIN: u8 = 0;
const QUOTAS_MAX: usize = 200;

/// Some directories that together may hold so much.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Quota {
    dirs: Vec<PathBuf>,
    max: Bytes,
    /// What a person calls it.
    what: String,
}

/// Counts again and again while the pod lives; costs nothing where there is no quota.
pub struct Meter {
    quotas: Vec<Quota>,
    child: Option<Pid>,
    next: BootMs,
}

impl Meter {
    pub fn new(task: &Task, dir: &Path, now: BootMs) -> Self {
        let mut quotas = Vec::new();
        for (index, volume) in task.template.volumes.iter().enumerate() {
            // Smaller ones are a tmpfs, which has its bound of the kernel.
            if let VolumeSource::Scratch(max) = volume.source
                && max.0 > SCRATCH_MEMORY_BYTES_MAX
            {
                let dirs = vec![rootfs::volume_dir(dir, index)];
                quotas.push(Quota { dirs, max, what: format!("volume {}", volume.mount) });
            }
        }
        if task.scratch_bytes_max != Bytes::ZERO {
            let homes = task.template.containers.iter().map(|container| Home::new(dir, &container.name));
            let dirs = homes.flat_map(|home| [home.upper(), home.workspace_upper()]).collect();
            let what = "what the pod may write outside its volumes".to_owned();
            quotas.push(Quota { dirs, max: task.scratch_bytes_max, what });
        }
        quotas.truncate(QUOTAS_MAX);
        Self { quotas, child: None, next: now.plus(PERIOD) }
    }

    /// When [`Meter::turn`] is due.
    pub fn due(&self) -> Option<BootMs> {
        (self.child.is_none() && !self.quotas.is_empty()).then_some(self.next)
    }

    pub fn turn(&mut self, now: BootMs) {
        if self.due().is_none_or(|due| due > now) {
            return;
        }
        self.next = now.plus(PERIOD);
        // SAFETY: the process has one thread, so that the child may allocate and do file IO.
        match unsafe { fork() } {
            Ok(ForkResult::Child) => {
                let over = self.quotas.iter().position(|quota| used(&quota.dirs) > quota.max.0);
                let code = over.map_or(WITHIN, |index| index as u8 + 1);
                // SAFETY: ends the child alone, and runs nothing of what the shim has registered for its own end.
                unsafe { libc::_exit(code.into()) }
            }
            Ok(ForkResult::Parent { child }) => self.child = Some(child),
            // Too many processes: the next time.
            Err(_) => {}
        }
    }

    /// A child of the shim has ended. Was it the one that counts, and is a quota exceeded?
    pub fn ended(&mut self, pid: Pid, code: u8) -> Option<ShimError> {
        if self.child != Some(pid) {
            return None;
        }
        self.child = None;
        let quota = self.quotas.get(usize::from(code).checked_sub(1)?)?;
        Some(ShimError::ScratchFull { what: quota.what.clone(), max: quota.max })
    }
}

impl Drop for Meter {
    fn drop(&mut self) {
        if let Some(child) = self.child {
            // Not yet reaped, so the number is still its own.
            let _ = kill(child, Signal::SIGKILL);
        }
    }
}

/// What files below `dirs` take on disk, in bytes; what lies on other file systems is left out, and a file of several
/// links counts by its share in each.
fn used(dirs: &[PathBuf]) -> u64 {
    let mut total = 0;
    for dir in dirs {
        let Ok(device) = fs::symlink_metadata(dir).map(|meta| meta.dev()) else { continue };
        let mut pending = vec![dir.clone()];
        while let Some(dir) = pending.pop() {
            for entry in fs::read_dir(&dir).into_iter().flatten().flatten() {
                let Ok(meta) = entry.metadata() else { continue };
                if meta.dev() != device {
                    continue;
                }
                if meta.is_dir() {
                    total += meta.blocks() * 512;
                    pending.push(entry.path());
                } else {
                    total += meta.blocks() * 512 / meta.nlink().max(1);
                }
            }
        }
    }
    total
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_files_take_is_counted_not_what_they_claim() {
        let dir = tempfile::tempdir().unwrap();
        let inner = dir.path().join("a/b");
        fs::create_dir_all(&inner).unwrap();
        let sparse = fs::File::create(inner.join("sparse")).unwrap();
        sparse.set_len(1 << 40).unwrap();
        fs::write(inner.join("full"), vec![1; 1 << 20]).unwrap();
        fs::hard_link(inner.join("full"), dir.path().join("again")).unwrap();
        let bytes = used(&[dir.path().to_owned()]);
        assert!((1 << 20..2 << 20).contains(&bytes), "{bytes}");
        assert_eq!(used(&[dir.path().join("nowhere")]), 0);
    }

    #[test]
    fn the_child_names_the_quota_that_is_exceeded() {
        let nothing = Meter { quotas: Vec::new(), child: None, next: BootMs(5) };
        assert_eq!(nothing.due(), None);
        let quota = Quota { dirs: Vec::new(), max: Bytes(1), what: "volume /data".to_owned() };
        let mut meter = Meter { quotas: vec![quota], child: None, next: BootMs(5) };
        assert_eq!(meter.due(), Some(BootMs(5)));
        meter.child = Some(Pid::from_raw(i32::MAX));
        assert_eq!(meter.due(), None);
        assert!(meter.ended(Pid::from_raw(1), 1).is_none());
        assert!(meter.ended(Pid::from_raw(i32::MAX), WITHIN).is_none());
        meter.child = Some(Pid::from_raw(i32::MAX));
        let error = meter.ended(Pid::from_raw(i32::MAX), 1).unwrap();
        assert_eq!(error.reason(), "ScratchFull");
        assert!(error.message().contains("volume /data"), "{}", error.message());
    }
}

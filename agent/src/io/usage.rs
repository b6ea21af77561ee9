//! What a pod's control group uses, and freezing it; touches no group but the one it is given.
//!
//! Through cgroups-rs, on version 1, hybrid and version 2; two things it does not have are read here: pressure, and
//! whether the kernel has confirmed a freeze on version 2 (cgroups-rs answers what was asked for).

use std::fs;
use std::path::{Path, PathBuf};

use berth_protocol::units::Bytes;
use cgroups_rs::FreezerState;
use cgroups_rs::fs::cpu::CpuController;
use cgroups_rs::fs::cpuacct::CpuAcctController;
use cgroups_rs::fs::freezer::FreezerController;
use cgroups_rs::fs::hierarchies::{UNIFIED_MOUNTPOINT, auto};
use cgroups_rs::fs::memory::MemController;
use cgroups_rs::fs::{Cgroup, Controller};

/// What a pod has used and holds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PodUsage {
    /// Processor time since the group was made, in µs.
    pub cpu_usec: u64,
    /// Held, less file pages that the kernel would drop first.
    pub memory: Bytes,
    /// Of that, what no file backs: it cannot be dropped.
    pub anonymous: Bytes,
    /// Version 2 only, on kernels with PSI.
    pub pressure: Option<Pressure>,
}

/// The share of the last 10 s in which some process of the pod waited, in hundredths of a percent
/// (the kernel's "PSI - Pressure Stall Information").
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Pressure {
    pub cpu: u16,
    pub memory: u16,
    pub io: u16,
}

/// Why a pod's group could not be frozen, thawed or asked.
#[derive(Debug, thiserror::Error)]
pub enum FreezeError {
    #[error("control group `{path}` has no freezer: is the freezer controller mounted?")]
    NoFreezer { path: PathBuf },
    #[error("cannot {wish} control group `{path}`")]
    Failed { path: PathBuf, wish: &'static str, source: cgroups_rs::fs::error::Error },
}

/// Usage of the group at `path` below each hierarchy's mount; `None` where it is not there.
pub fn pod_usage(path: &Path) -> Option<PodUsage> {
    let group = load(path);
    let memory = group.controller_of::<MemController>().filter(|memory| memory.exists())?.memory_stat();
    let reclaimable = if group.v2() { memory.stat.inactive_file } else { memory.stat.total_inactive_file };
    let stat = |name: &str| memory.stat.raw.get(name).copied().unwrap_or(0);
    let anonymous = if group.v2() {
        ["anon", "shmem", "slab_unreclaimable", "kernel_stack", "pagetables"].map(stat).iter().sum()
    } else {
        stat("total_rss") + stat("total_shmem")
    };
    let cpu_usec = if group.v2() {
        let cpu = group.controller_of::<CpuController>()?.cpu();
        field(&cpu.stat, "usage_usec").unwrap_or(0)
    } else {
        let path = group.controller_of::<CpuAcctController>()?.path().join("cpuacct.usage");
        // cgroups-rs reads eight files for this one, some as long as the machine has processors.
        fs::read_to_string(path).ok()?.trim().parse::<u64>().ok()? / 1000
    };
    Some(PodUsage {
        cpu_usec,
        memory: Bytes(memory.usage_in_bytes.saturating_sub(reclaimable)),
        anonymous: Bytes(anonymous),
        pressure: group.v2().then(|| pressure(&unified(path))).flatten(),
    })
}

/// Asks the kernel to freeze the group and all below it; [`is_frozen`] says when it has.
pub fn freeze(path: &Path) -> Result<(), FreezeError> {
    let group = load(path);
    freezer(&group, path)?.freeze().map_err(|e| failed(path, "freeze", e))
}

/// Lets the group go on.
pub fn thaw(path: &Path) -> Result<(), FreezeError> {
    let group = load(path);
    freezer(&group, path)?.thaw().map_err(|e| failed(path, "thaw", e))
}

/// Whether the kernel has stopped every process of the group.
pub fn is_frozen(path: &Path) -> Result<bool, FreezeError> {
    let group = load(path);
    let freezer = freezer(&group, path)?;
    if group.v2() {
        let events = fs::read_to_string(unified(path).join("cgroup.events")).unwrap_or_default();
        return Ok(field(&events, "frozen") == Some(1));
    }
    let state = freezer.state().map_err(|e| failed(path, "read the state of", e))?;
    Ok(matches!(state, FreezerState::Frozen))
}

/// A handle: makes nothing.
fn load(path: &Path) -> Cgroup {
    Cgroup::load(auto(), relative(path))
}

/// An absolute path would replace the mount's own.
fn relative(path: &Path) -> &Path {
    path.strip_prefix("/").unwrap_or(path)
}

fn unified(path: &Path) -> PathBuf {
    Path::new(UNIFIED_MOUNTPOINT).join(relative(path))
}

fn freezer<'a>(group: &'a Cgroup, path: &Path) -> Result<&'a FreezerController, FreezeError> {
    let freezer = group.controller_of::<FreezerController>().filter(|freezer| freezer.exists());
    freezer.ok_or_else(|| FreezeError::NoFreezer { path: path.to_owned() })
}

fn failed(path: &Path, wish: &'static str, source: cgroups_rs::fs::error::Error) -> FreezeError {
    FreezeError::Failed { path: path.to_owned(), wish, source }
}

/// `name value` on a line of its own.
fn field(text: &str, name: &str) -> Option<u64> {
    text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.trim().parse().ok())
}

fn pressure(group: &Path) -> Option<Pressure> {
    let read = |name: &str| some_avg10(&fs::read_to_string(group.join(name)).ok()?);
    Some(Pressure { cpu: read("cpu.pressure")?, memory: read("memory.pressure")?, io: read("io.pressure")? })
}

/// From `some avg10=1.53 avg60=…`, in hundredths of a percent.
fn some_avg10(text: &str) -> Option<u16> {
    let rest = text.lines().find_map(|line| line.strip_prefix("some avg10="))?;
    let (whole, hundredths) = rest.split_once(' ')?.0.split_once('.')?;
    whole.parse::<u16>().ok()?.checked_mul(100)?.checked_add(hundredths.parse().ok()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pressure_texts() {
        for (text, expect) in [
            ("some avg10=0.00 avg60=0.00 avg300=0.00 total=0\n", Some(0)),
            (
                "some avg10=12.34 avg60=0.00 avg300=0.00 total=99\nfull avg10=9.00 avg60=0 total=1\n",
                Some(1234),
            ),
            ("some avg10=100.00 avg60=1.0\n", Some(10_000)),
            ("full avg10=9.00 avg60=0.00\n", None),
            ("", None),
        ] {
            assert_eq!(some_avg10(text), expect, "{text}");
        }
        assert_eq!(field("usage_usec 12\nuser_usec 7\n", "user_usec"), Some(7));
        assert_eq!(field("frozen_not 1\nfrozen 0\n", "frozen"), Some(0));
    }

    #[test]
    fn a_group_that_is_not_there() {
        let path = Path::new("berth-none/such");
        assert_eq!(pod_usage(path), None);
        assert!(matches!(freeze(path), Err(FreezeError::NoFreezer { .. })));
    }
}

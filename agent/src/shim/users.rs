//! A pod's user namespace: its users and groups, root among them, are none of the machine's, and what its programs may do
//! as root they may do to their own pod. On disk everything stays as it would be without: images, what is written and
//! named volumes are mounted for the pod with owners mapped, so that runs with and without a namespace share them.

use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt, lchown};
use std::path::{Path, PathBuf};

use berth_protocol::checkpoint::CheckpointKind;
use berth_protocol::job::{CheckpointMode, ContainerSpec, VolumeSource};
use berth_protocol::limits::SCRATCH_MEMORY_BYTES_MAX;
use nix::unistd::Pid;

use super::init::Init;
use super::process::User;
use super::{spec, sys};
use crate::task::{Root, Task};

/// Users, and groups, of a pod: 0 to this, as images and other engines have them.
pub const COUNT: u32 = 65_536;
/// Within what systemd leaves to containers (524,288 to 1,879,048,191), above what is handed out in /etc/subuid.
const FIRST: u32 = 0x4000_0000;
const RANGES: u32 = (0x7000_0000 - FIRST) / COUNT;

/// Where a shim, in its own mount namespace, shows what is to be seen by processes that have no rights over the
/// directories of the agent's data.
pub const STAGE: &str = "/run/berth-agent";
/// In it: one byte for each range, locked by whoever uses that.
const IN_USE: &str = "ranges";

/// Overlays of mounts with mapped owners.
const KERNEL_MIN: (u32, u32) = (5, 19);
/// The same of a tmpfs, where small scratch volumes lie.
const KERNEL_MIN_SCRATCH: (u32, u32) = (6, 3);

/// Should the pod have one? `saved`: what it is to come back from. Not
/// - where CRIU may have to bring it back, for it cannot bring a process into a user namespace that is there already;
/// - with a view of the node's files, paths, devices or network of the node's: these are the node's users';
/// - with capabilities that job and node name: they are meant as rights over the machine;
/// - with users that it has no numbers for.
fn wanted(task: &Task, saved: Option<CheckpointKind>) -> bool {
    let template = &task.template;
    let mode = template.checkpoint.mode;
    let by_criu = task.criu.is_some() && matches!(mode, CheckpointMode::Auto | CheckpointMode::Criu);
    let of_node = |source: &VolumeSource| matches!(source, VolumeSource::Host(_));
    let of_nodes = !task.devices.is_empty() || template.volumes.iter().any(|volume| of_node(&volume.source));
    let beyond = |user: &str| user.split(':').any(|part| part.parse::<u32>().is_ok_and(|id| id >= COUNT));
    let contained = |(container, root): (&ContainerSpec, &Root)| {
        let Root::Image { config, .. } = root else { return false };
        let user = container.user.as_deref().or(config.user.as_deref()).unwrap_or_default();
        container.capabilities.is_empty() && !beyond(user)
    };
    task.own_users
        && saved != Some(CheckpointKind::Criu)
        && !by_criu
        && !of_nodes
        && spec::own_network(template)
        && template.containers.iter().zip(&task.roots).all(contained)
}

/// Has the kernel what it takes, for this pod's volumes too?
fn possible(task: &Task) -> bool {
    let in_memory = |source: &VolumeSource| matches!(source, VolumeSource::Scratch(size) if size.0 <= SCRATCH_MEMORY_BYTES_MAX);
    let min = match task.template.volumes.iter().any(|volume| in_memory(&volume.source)) {
        true => KERNEL_MIN_SCRATCH,
        false => KERNEL_MIN,
    };
    kernel().is_some_and(|kernel| kernel >= min)
}

fn kernel() -> Option<(u32, u32)> {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").ok()?;
    let mut parts = release.split(|c: char| !c.is_ascii_digit());
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

/// Can pods whose directories are below `dir` have users of their own? Says why not. Before the calling process has a
/// second thread; what it starts afterwards is in another time namespace.
pub fn check(dir: &Path) -> Result<(), String> {
    let (major, minor) = KERNEL_MIN;
    if kernel().is_none_or(|kernel| kernel < KERNEL_MIN) {
        return Err(format!(
            "this kernel cannot map owners below an overlay (Linux {major}.{minor} and later can)"
        ));
    }
    let there = dir.ancestors().find(|dir| dir.is_dir()).unwrap_or(Path::new("/"));
    let range = Range::free().map_err(|e| format!("{STAGE}/{IN_USE}: {e}"))?;
    let range = range.ok_or("every range of numbers is in use")?;
    let init = Init::spawn("doctor", true, Some(range), Path::new(STAGE)).map_err(|e| {
        format!(
            "a user namespace, or /proc and /sys in one, is refused: {e} (is /proc/sys/user/max_user_namespaces 0, or \
             something mounted over a part of /proc or /sys?)"
        )
    })?;
    match init.users.as_ref().is_some_and(|users| users.can_map(there)) {
        true => Ok(()),
        false => {
            Err(format!("the file system of {} cannot map owners (ext4, XFS and btrfs can)", dir.display()))
        }
    }
}

/// Numbers of the machine's that are one pod's alone, as long as its shim lives. Where that was killed, what is left of the
/// pod may have them a moment longer.
pub struct Range {
    first: u32,
    _held: File,
}

impl Range {
    /// `None` where the pod is to have no namespace, or the machine cannot give it one.
    pub fn take(task: &Task, saved: Option<CheckpointKind>) -> Option<Self> {
        if !wanted(task, saved) || !possible(task) {
            return None;
        }
        Self::free().ok().flatten()
    }

    fn free() -> io::Result<Option<Self>> {
        fs::create_dir_all(STAGE)?;
        // Whatever the mask of who makes it first: all pass, and nobody else's lock counts.
        fs::set_permissions(STAGE, fs::Permissions::from_mode(0o711))?;
        let path = Path::new(STAGE).join(IN_USE);
        let file =
            OpenOptions::new().create(true).truncate(false).read(true).write(true).mode(0o600).open(path)?;
        file.set_permissions(fs::Permissions::from_mode(0o600))?;
        let range = (0..RANGES).find(|range| sys::lock_byte(&file, (*range).into()));
        Ok(range.map(|range| Self { first: FIRST + range * COUNT, _held: file }))
    }

    /// Gives a process that has just entered a new namespace its numbers.
    pub fn map(&self, pid: Pid) -> io::Result<()> {
        let map = format!("0 {} {COUNT}\n", self.first);
        fs::write(format!("/proc/{pid}/uid_map"), &map)?;
        fs::write(format!("/proc/{pid}/gid_map"), &map)
    }
}

/// The namespace, as the shim needs it to prepare for it.
pub struct Users {
    range: Range,
    namespace: OwnedFd,
}

impl Users {
    /// Of the process that `range` was mapped for.
    pub fn of(pid: Pid, range: Range) -> io::Result<Self> {
        Ok(Self { range, namespace: File::open(format!("/proc/{pid}/ns/user"))?.into() })
    }

    /// Do the files in `dir` lie where owners can be mapped? Not every file system can.
    pub fn can_map(&self, dir: &Path) -> bool {
        self.mapped(dir).is_ok()
    }

    /// The same of all that a pod is given, each file system asked once.
    pub fn can_map_all(&self, task: &Task, pod_dir: &Path) -> bool {
        let layers = task.roots.iter().flat_map(|root| match root {
            Root::Image { layers, .. } => layers.as_slice(),
            Root::Host => &[],
        });
        let volumes = task.volumes.iter().flatten();
        let mut asked = BTreeSet::new();
        let mut of_layers = layers.chain(&task.workspace).map(PathBuf::as_path).chain([pod_dir]);
        // Something may be mounted below a volume, which no other has.
        volumes.into_iter().all(|volume| self.can_map(volume))
            && of_layers.all(|dir| {
                let device = fs::metadata(dir).map(|dir| dir.dev());
                device.is_ok_and(|device| !asked.insert(device) || self.can_map(dir))
            })
    }

    fn mapped(&self, dir: &Path) -> io::Result<OwnedFd> {
        let tree = sys::clone_mount(dir)?;
        // SAFETY: plain integers; zero is valid for each.
        let mut attr: libc::mount_attr = unsafe { std::mem::zeroed() };
        attr.attr_set = libc::MOUNT_ATTR_IDMAP;
        attr.userns_fd = u64::from(self.namespace.as_raw_fd().unsigned_abs());
        sys::set_mounts(&tree, &attr)?;
        Ok(tree)
    }

    /// Mounts the directory `from` at the directory `at`, its owners those of the same number within the namespace.
    pub fn show(&self, from: &Path, at: &Path) -> io::Result<()> {
        sys::attach_mount(&self.mapped(from)?, at)
    }

    /// What is in a directory of memory, and itself, belongs to the pod's root.
    pub fn give(&self, dir: &Path) -> io::Result<()> {
        let root = Some(self.range.first);
        for entry in fs::read_dir(dir)? {
            lchown(entry?.path(), root, root)?;
        }
        lchown(dir, root, root)
    }

    /// The number that the machine knows a user or group by.
    pub fn outside(&self, id: u32) -> u32 {
        self.range.first.saturating_add(id)
    }

    /// What `act` makes belongs to the pod's root: where owners are mapped, the machine's own can make nothing.
    pub fn as_root<T>(&self, act: impl FnOnce() -> T) -> T {
        sys::acting_as(self.range.first, act)
    }

    /// The user as the namespace can have it, without groups that have no number there; `None` where itself has none.
    pub fn admit(mut user: User) -> Option<User> {
        user.groups.retain(|group| *group < COUNT);
        (user.uid < COUNT && user.gid < COUNT).then_some(user)
    }
}

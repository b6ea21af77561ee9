//! A container's file system: the layers under a writable one, the files that berth lays over them, volumes. All
//! mounts are made in the shim's own mount namespace, so that they end with it whatever happens.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use berth_protocol::ids::ContainerName;
use nix::fcntl::OFlag;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use nix::sys::stat::Mode;
use nix::unistd::Pid;

use super::checkpoint::archive;
use super::error::ShimError;
use super::init::Init;
use super::sys;
use super::users::{STAGE, Users};
use crate::task::{Root, Task, file};

/// Of what no program need be started from.
pub const HARMLESS: MsFlags = MsFlags::MS_NOSUID.union(MsFlags::MS_NODEV).union(MsFlags::MS_NOEXEC);
/// The image's files that the shim reads.
const IMAGE_FILE_BYTES_MAX: u64 = 4 << 20;

/// Where a container's parts lie within its pod's directory.
#[derive(Debug, Clone)]
pub struct Home {
    /// Lives as long as the run.
    bundle: PathBuf,
    /// On disk: what all containers of the pod have written.
    root: PathBuf,
    container: ContainerName,
}

impl Home {
    pub fn new(pod_dir: &Path, container: &ContainerName) -> Self {
        let bundle = pod_dir.join(file::BUNDLES_DIR).join(container.as_str());
        Self { bundle, root: pod_dir.join(file::ROOT_DIR), container: container.clone() }
    }
    /// The OCI bundle: `config.json` lies here.
    pub fn dir(&self) -> &Path {
        &self.bundle
    }
    pub fn rootfs(&self) -> PathBuf {
        self.bundle.join("rootfs")
    }
    /// What the container has written; of its own run alone.
    pub fn upper(&self) -> PathBuf {
        self.on_disk("upper")
    }
    /// v1 hierarchies as the container sees them.
    pub fn cgroups(&self) -> PathBuf {
        self.bundle.join("cgroups")
    }
    pub fn workspace(&self) -> PathBuf {
        self.bundle.join("workspace")
    }
    /// What the container has written below the workspace's path.
    pub fn workspace_upper(&self) -> PathBuf {
        self.on_disk("workspace-upper")
    }
    /// A name tells its container and its part: directories on disk are what a start spends its time on.
    fn on_disk(&self, part: &str) -> PathBuf {
        self.root.join(format!("{}.{part}", self.container))
    }
}

pub fn volume_dir(pod_dir: &Path, index: usize) -> PathBuf {
    pod_dir.join("volumes").join(index.to_string())
}

/// Where a host's path is as it was when the shim looked at it, whatever takes its name later; and other volumes with
/// their owners mapped, for a pod that has users of its own.
pub fn shown_dir(pod_dir: &Path, index: usize) -> PathBuf {
    pod_dir.join(file::SHOWN_DIR).join(index.to_string())
}

/// A pod's files that end with its run: its configuration, records and mount points, and `/run/berth`, on which its
/// programs may write.
///
/// Nobody but this process sees it, so that modes keep nobody out; those who become a container of the pod's, and are
/// not the machine's root, have to pass.
const RUN_OPTIONS: &str = "mode=711,size=4m,nr_inodes=4k";

/// Makes `run/` in memory, for this mount namespace alone: it goes with the namespace whatever happens, and some thirty
/// files on disk would take a third of the time of a pod's start.
pub fn mount_run(pod_dir: &Path) -> Result<(), ShimError> {
    let at = pod_dir.join(file::RUN_DIR);
    make_dir(&at, 0o700)?;
    // The checkpoint directory beneath it says itself what it allows.
    let flags = MsFlags::MS_NOSUID;
    mount(Some("berth"), &at, Some("tmpfs"), flags, Some(RUN_OPTIONS))
        .map_err(|e| ShimError::io("mount a tmpfs at", &at)(e.into()))
}

/// Leaves the node's mount namespace for one of the shim's own. What the node mounts and unmounts later is still
/// seen here; what is mounted here is not seen there.
pub fn enter_private_mounts() -> io::Result<()> {
    unshare(CloneFlags::CLONE_NEWNS)?;
    let none = None::<&str>;
    Ok(mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_SLAVE, none)?)
}

pub(super) fn make_dir(path: &Path, mode: u32) -> Result<(), ShimError> {
    fs::DirBuilder::new().recursive(true).mode(mode).create(path).map_err(ShimError::io("make", path))
}

/// The lowest first; overlayfs wants at least one.
fn layers(root: &Root, home: &Home) -> Result<Vec<PathBuf>, ShimError> {
    Ok(match root {
        Root::Host => vec![PathBuf::from("/")],
        Root::Image { layers, .. } if layers.is_empty() => {
            let empty = home.on_disk("empty");
            make_dir(&empty, 0o755)?;
            vec![empty]
        }
        Root::Image { layers, .. } => layers.clone(),
    })
}

/// What becomes of owners in a container's file system, and of what was there before.
#[derive(Clone, Copy)]
pub struct View<'a> {
    /// Mapped for them, where the pod has its own.
    pub users: Option<&'a Users>,
    /// A checkpoint's archive of what was written.
    pub written: Option<&'a Path>,
}

/// Mounts the container's root at `Home::rootfs`: empty of what an earlier run wrote, or with what a checkpoint's
/// archive says was written.
pub fn mount_root(root: &Root, home: &Home, view: View) -> Result<(), ShimError> {
    overlay(&layers(root, home)?, home, ("upper", "work"), &home.rootfs(), view)
}

/// Mounts a writable view of the workspace at `Home::workspace`.
pub fn mount_workspace(workspace: &Path, home: &Home, view: View) -> Result<(), ShimError> {
    let layers = [workspace.to_owned()];
    overlay(&layers, home, ("workspace-upper", "workspace-work"), &home.workspace(), view)
}

/// Puts the container's own groups of each v1 hierarchy together at `Home::cgroups`, read-only.
pub fn mount_cgroups(groups: &[PathBuf], home: &Home) -> Result<(), ShimError> {
    let at = home.cgroups();
    make_dir(&at, 0o755)?;
    for group in groups {
        // Its hierarchy: the first part below the mounts' common directory.
        let Some(name) = group.strip_prefix("/sys/fs/cgroup").ok().and_then(|path| path.iter().next()) else {
            continue;
        };
        let at = at.join(name);
        show(group, &at, None)
            .and_then(|()| restrict(&at, HARMLESS | MsFlags::MS_RDONLY))
            .map_err(ShimError::io("mount control groups at", &at))?;
    }
    Ok(())
}

/// Makes the directory `to` and shows `from` there, with owners mapped for `users`.
pub fn show(from: &Path, to: &Path, users: Option<&Users>) -> io::Result<()> {
    fs::create_dir_all(to)?;
    match users {
        Some(users) => users.show(from, to),
        None => Ok(mount(Some(from), to, None::<&str>, MsFlags::MS_BIND | MsFlags::MS_REC, None::<&str>)?),
    }
}

/// Allows on a mount what `flags` leave.
pub fn restrict(at: &Path, flags: MsFlags) -> io::Result<()> {
    let none = None::<&str>;
    Ok(mount(none, at, none, flags | MsFlags::MS_BIND | MsFlags::MS_REMOUNT, none)?)
}

/// Shows all of `run/` once more where processes without rights over the agent's directories can reach it, and names
/// the namespaces of the pod's init there, which they could not open in /proc. Returns the pod's directory as they are
/// to see it.
pub fn stage(pod_dir: &Path, init: &Init) -> io::Result<PathBuf> {
    let (run, none) = (pod_dir.join(file::RUN_DIR), None::<&str>);
    let names = pod_dir.join(file::NAMESPACES_DIR);
    fs::create_dir(&names)?;
    for kind in ["user", "pid", "ipc", "uts"] {
        let at = names.join(kind);
        File::create(&at)?;
        mount(Some(init.namespace(kind).as_str()), &at, none, MsFlags::MS_BIND, none)?;
    }
    let staged = staged();
    fs::create_dir_all(&staged)?;
    mount(Some(&run), &staged, none, MsFlags::MS_BIND | MsFlags::MS_REC, none)?;
    Ok(PathBuf::from(STAGE))
}

fn staged() -> PathBuf {
    Path::new(STAGE).join(file::RUN_DIR)
}

/// Takes away all that this process has mounted for a pod.
pub fn unmount_all(task: &Task, pod_dir: &Path) -> io::Result<()> {
    unmount(&staged())?;
    for index in 0..task.template.volumes.len() {
        unmount(&volume_dir(pod_dir, index))?;
    }
    // With all that is mounted within.
    unmount(&pod_dir.join(file::RUN_DIR))
}

/// The container's root as its run left it, read-only at `at`: for collecting outputs once the shim has gone.
pub fn mount_result(root: &Root, home: &Home, at: &Path) -> Result<(), ShimError> {
    // The run's own work directory bears the mark that nothing was synced, which is of no matter here.
    let work = home.on_disk("result-work");
    make_dir(&work, 0o700)?;
    make_dir(at, 0o755)?;
    let flags = MsFlags::MS_RDONLY | MsFlags::MS_NODEV | MsFlags::MS_NOSUID;
    mount_overlay(&layers(root, home)?, &home.upper(), &work, at, flags, "")
        .map_err(ShimError::io("mount an overlay at", at))
}

/// Takes away what `mount_result` has mounted.
pub fn unmount(at: &Path) -> io::Result<()> {
    match umount2(at, MntFlags::MNT_DETACH) {
        Ok(()) | Err(nix::Error::EINVAL | nix::Error::ENOENT) => Ok(()),
        Err(e) => Err(e.into()),
    }
}

fn overlay(
    layers: &[PathBuf],
    home: &Home,
    (upper, work): (&str, &str),
    at: &Path,
    view: View,
) -> Result<(), ShimError> {
    let (upper, work) = (&home.on_disk(upper), &home.on_disk(work));
    for fresh in [upper, work] {
        match fs::remove_dir_all(fresh) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(ShimError::io("clear", fresh)(e)),
            _ => make_dir(fresh, 0o755)?,
        }
    }
    make_dir(at, 0o755)?;
    // The root directory of the view is the upper one's: its mode is what the top layer says.
    if let Ok(top) = fs::metadata(&layers[layers.len() - 1]) {
        let mode = fs::Permissions::from_mode(top.permissions().mode() & 0o7777);
        fs::set_permissions(upper, mode).map_err(ShimError::io("set the mode of", upper))?;
        std::os::unix::fs::chown(upper, Some(owner(&top).0), Some(owner(&top).1))
            .map_err(ShimError::io("set the owner of", upper))?;
    }
    if let Some(archive) = view.written {
        archive::unpack(archive, upper).map_err(ShimError::io("bring back what was written in", upper))?;
    }
    // What a run has written counts for nothing after a crash, so it need not be synced. Linux 5.10 and later.
    let mount = |layers: &[PathBuf], upper: &Path, work: &Path| {
        let none = MsFlags::empty();
        match mount_overlay(layers, upper, work, at, none, ",volatile") {
            Err(e) if e.raw_os_error() == Some(libc::EINVAL) => {
                mount_overlay(layers, upper, work, at, none, "")
            }
            other => other,
        }
    };
    let mounted = match view.users {
        None => mount(layers, upper, work),
        Some(users) => mapped(users, home, layers, |layers, root| {
            let name = |path: &Path| root.join(path.file_name().unwrap_or_default());
            mount(layers, &name(upper), &name(work))
        }),
    };
    mounted.map_err(|source| match layers.iter().find(|layer| !layer.exists()) {
        Some(path) => ShimError::LayerMissing { path: path.clone() },
        None => {
            let what = "mount an overlay (is the kernel module there, the data on ext4, xfs or btrfs?) at";
            ShimError::io(what, at)(source)
        }
    })
}

/// Calls `mount` with the places where layers, and the directory of what is written, have mapped owners meanwhile: an
/// overlay keeps what it is made of, and works on it as who has mounted it, for whom there have to be numbers too.
fn mapped(
    users: &Users,
    home: &Home,
    layers: &[PathBuf],
    mount: impl FnOnce(&[PathBuf], &Path) -> io::Result<()>,
) -> io::Result<()> {
    let at = home.bundle.join("mapped");
    let places: Vec<PathBuf> = (0..=layers.len()).map(|index| at.join(index.to_string())).collect();
    let (root, of_layers) = places.split_last().ok_or(io::ErrorKind::InvalidInput)?;
    let show = || -> io::Result<()> {
        for (from, to) in layers.iter().zip(of_layers).chain([(&home.root, root)]) {
            fs::create_dir_all(to)?;
            users.show(from, to)?;
        }
        users.as_root(|| mount(of_layers, root))
    };
    let shown = show();
    for place in &places {
        unmount(place)?;
    }
    let _ = fs::remove_dir_all(&at);
    shown
}

fn owner(metadata: &fs::Metadata) -> (u32, u32) {
    use std::os::unix::fs::MetadataExt;
    (metadata.uid(), metadata.gid())
}

/// Directories are named by descriptor: a mount's options have one page, and paths may hold `:` or `,`.
fn mount_overlay(
    layers: &[PathBuf],
    upper: &Path,
    work: &Path,
    at: &Path,
    flags: MsFlags,
    more: &str,
) -> io::Result<()> {
    // Overlayfs wants the highest first.
    let layers: Vec<OwnedFd> = layers.iter().rev().map(|path| open_path(path)).collect::<io::Result<_>>()?;
    let lower = layers.iter().map(fd_path).collect::<Vec<_>>().join(":");
    let (upper, work) = (open_path(upper)?, open_path(work)?);
    let options = format!("lowerdir={lower},upperdir={},workdir={}{more}", fd_path(&upper), fd_path(&work));
    Ok(mount(Some("berth"), at, Some("overlay"), flags, Some(options.as_str()))?)
}

fn open_path(path: &Path) -> io::Result<OwnedFd> {
    Ok(OpenOptions::new().read(true).custom_flags(libc::O_PATH | libc::O_DIRECTORY).open(path)?.into())
}

pub(super) fn fd_path(fd: &OwnedFd) -> String {
    format!("/proc/self/fd/{}", fd.as_raw_fd())
}

/// A container's root, for touching it from outside without ever leaving it, whatever links it holds.
pub struct Inside<'a> {
    root: OwnedFd,
    users: Option<&'a Users>,
}

impl<'a> Inside<'a> {
    pub fn open(rootfs: &Path, users: Option<&'a Users>) -> Result<Self, ShimError> {
        let root = open_path(rootfs).map_err(ShimError::io("open", rootfs))?;
        Ok(Self { root, users })
    }

    /// That of a process that is in its container: to look into, or change where the pod has no users of its own.
    pub fn of_process(pid: Pid) -> io::Result<Self> {
        Ok(Self { root: open_path(Path::new(&format!("/proc/{pid}/root")))?, users: None })
    }

    pub fn fd(&self) -> &OwnedFd {
        &self.root
    }

    /// By whom what `act` makes can be made.
    fn as_root<T>(&self, act: impl FnOnce() -> T) -> T {
        match self.users {
            Some(users) => users.as_root(act),
            None => act(),
        }
    }

    /// The text of a file; empty where it is not there.
    pub fn read(&self, path: &str) -> String {
        let mut text = Vec::new();
        let Ok(fd) = sys::open_in_root(&self.root, Path::new(path), libc::O_RDONLY | libc::O_NONBLOCK) else {
            return String::new();
        };
        let _ = File::from(fd).take(IMAGE_FILE_BYTES_MAX).read_to_end(&mut text);
        String::from_utf8_lossy(&text).into_owned()
    }

    /// Makes a directory and its parents where they are missing, owned by `uid:gid`.
    pub fn make_dirs(&self, path: &str, uid: u32, gid: u32) -> io::Result<()> {
        let mut at = PathBuf::from("/");
        for part in Path::new(path).components().skip(1) {
            let parent = sys::open_in_root(&self.root, &at, libc::O_PATH | libc::O_DIRECTORY)?;
            at.push(part);
            let mode = Mode::from_bits_truncate(0o755);
            match self.as_root(|| nix::sys::stat::mkdirat(parent.as_fd(), part.as_os_str(), mode)) {
                Ok(()) => {
                    let outside = |id| self.users.map_or(id, |users| users.outside(id));
                    let owner = (Some(outside(uid).into()), Some(outside(gid).into()));
                    let flags = nix::fcntl::AtFlags::AT_SYMLINK_NOFOLLOW;
                    nix::unistd::fchownat(parent.as_fd(), part.as_os_str(), owner.0, owner.1, flags)?;
                }
                Err(nix::Error::EEXIST) => {}
                Err(e) => return Err(e.into()),
            }
        }
        Ok(())
    }

    /// Makes `name`, of the root itself, a directory to mount over, whatever else it is.
    pub fn make_mount_dir(&self, name: &str) -> io::Result<()> {
        let flags = nix::fcntl::AtFlags::AT_SYMLINK_NOFOLLOW;
        match nix::sys::stat::fstatat(self.root.as_fd(), name, flags) {
            Ok(stat) if stat.st_mode & libc::S_IFMT == libc::S_IFDIR => return Ok(()),
            Ok(_) => nix::unistd::unlinkat(self.root.as_fd(), name, nix::unistd::UnlinkatFlags::NoRemoveDir)?,
            Err(nix::Error::ENOENT) => {}
            Err(e) => return Err(e.into()),
        }
        let mode = Mode::from_bits_truncate(0o755);
        Ok(self.as_root(|| nix::sys::stat::mkdirat(self.root.as_fd(), name, mode))?)
    }

    /// Makes `dir`/`name` a plain file to mount over, where it is a link that may lead to nothing.
    pub fn make_mount_file(&self, dir: &str, name: &str) -> io::Result<()> {
        self.make_dirs(dir, 0, 0)?;
        let parent = sys::open_in_root(&self.root, Path::new(dir), libc::O_PATH | libc::O_DIRECTORY)?;
        let flags = nix::fcntl::AtFlags::AT_SYMLINK_NOFOLLOW;
        match nix::sys::stat::fstatat(parent.as_fd(), name, flags) {
            Ok(stat) if stat.st_mode & libc::S_IFMT == libc::S_IFLNK => {
                nix::unistd::unlinkat(parent.as_fd(), name, nix::unistd::UnlinkatFlags::NoRemoveDir)?;
            }
            Ok(_) => return Ok(()),
            Err(nix::Error::ENOENT) => {}
            Err(e) => return Err(e.into()),
        }
        let flags = OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC | OFlag::O_WRONLY;
        let mode = Mode::from_bits_truncate(0o644);
        self.as_root(|| nix::fcntl::openat(parent.as_fd(), name, flags, mode))?;
        Ok(())
    }
}

//! A container's file system: the layers under a writable one, the files that berth lays over them, volumes. All
//! mounts are made in the shim's own mount namespace, so that they end with it whatever happens.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use berth_protocol::ids::ContainerName;
use berth_protocol::job::VolumeSource;
use berth_protocol::limits::SCRATCH_MEMORY_BYTES_MAX;
use nix::fcntl::OFlag;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use nix::sys::stat::Mode;

use super::checkpoint::archive;
use super::error::ShimError;
use super::sys;
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

/// Where containers are given a host's path: as it was when the shim looked at it, whatever takes its name later.
pub fn shown_dir(pod_dir: &Path, index: usize) -> PathBuf {
    pod_dir.join(file::SHOWN_DIR).join(index.to_string())
}

/// A pod's files that end with its run: its configuration, records and mount points, and `/run/berth`, on which its
/// programs may write.
const RUN_OPTIONS: &str = "mode=700,size=4m,nr_inodes=4k";

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

fn make_dir(path: &Path, mode: u32) -> Result<(), ShimError> {
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

/// Mounts the container's root at `Home::rootfs`: empty of what an earlier run wrote, or with what a checkpoint's
/// archive says was written.
pub fn mount_root(root: &Root, home: &Home, written: Option<&Path>) -> Result<(), ShimError> {
    overlay(&layers(root, home)?, &home.upper(), &home.on_disk("work"), &home.rootfs(), written)
}

/// Mounts a writable view of the workspace at `Home::workspace`.
pub fn mount_workspace(workspace: &Path, home: &Home, written: Option<&Path>) -> Result<(), ShimError> {
    let layers = [workspace.to_owned()];
    let work = home.on_disk("workspace-work");
    overlay(&layers, &home.workspace_upper(), &work, &home.workspace(), written)
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
        bind(group, &at.join(name), HARMLESS | MsFlags::MS_RDONLY)
            .map_err(ShimError::io("mount control groups at", &at))?;
    }
    Ok(())
}

/// Makes the directory `to` and shows `from` there.
pub fn bind(from: &Path, to: &Path, flags: MsFlags) -> io::Result<()> {
    fs::create_dir(to)?;
    let none = None::<&str>;
    mount(Some(from), to, none, MsFlags::MS_BIND, none)?;
    // The first call minds no flags.
    Ok(mount(none, to, none, flags | MsFlags::MS_BIND | MsFlags::MS_REMOUNT, none)?)
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
    upper: &Path,
    work: &Path,
    at: &Path,
    written: Option<&Path>,
) -> Result<(), ShimError> {
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
    if let Some(archive) = written {
        archive::unpack(archive, upper).map_err(ShimError::io("bring back what was written in", upper))?;
    }
    // What a run has written counts for nothing after a crash, so it need not be synced. Linux 5.10 and later.
    let mounted = match mount_overlay(layers, upper, work, at, MsFlags::empty(), ",volatile") {
        Err(e) if e.raw_os_error() == Some(libc::EINVAL) => {
            mount_overlay(layers, upper, work, at, MsFlags::empty(), "")
        }
        other => other,
    };
    mounted.map_err(|source| match layers.iter().find(|layer| !layer.exists()) {
        Some(path) => ShimError::LayerMissing { path: path.clone() },
        None => {
            let what = "mount an overlay (is the kernel module there, the data on ext4, xfs or btrfs?) at";
            ShimError::io(what, at)(source)
        }
    })
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

fn fd_path(fd: &OwnedFd) -> String {
    format!("/proc/self/fd/{}", fd.as_raw_fd())
}

/// Makes the pod's scratch volumes and checks that the others are there.
pub fn prepare_volumes(task: &Task, pod_dir: &Path) -> Result<(), ShimError> {
    for (index, volume) in task.template.volumes.iter().enumerate() {
        let given = task.volumes.get(index).and_then(Option::as_ref);
        match (&volume.source, given) {
            (VolumeSource::Scratch(size), None) => {
                let at = volume_dir(pod_dir, index);
                make_dir(&at, 0o777)?;
                // For any user of the container, as /tmp.
                let mode = fs::Permissions::from_mode(0o1777);
                fs::set_permissions(&at, mode).map_err(ShimError::io("set the mode of", &at))?;
                if size.0 <= SCRATCH_MEMORY_BYTES_MAX {
                    let options = format!("size={},mode=1777", size.0);
                    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
                    mount(Some("scratch"), &at, Some("tmpfs"), flags, Some(options.as_str()))
                        .map_err(|e| ShimError::io("mount a tmpfs at", &at)(e.into()))?;
                }
            }
            (VolumeSource::Host(_), Some(path)) if path.exists() => {
                show(path, &shown_dir(pod_dir, index)).map_err(|source| match source.raw_os_error() {
                    Some(libc::ELOOP) => {
                        ShimError::VolumeMoved { mount: volume.mount.clone(), path: path.clone() }
                    }
                    _ => ShimError::io("mount the volume's", path)(source),
                })?;
            }
            (_, Some(path)) if path.exists() => {}
            (_, path) => {
                let path = path.cloned().unwrap_or_default();
                return Err(ShimError::VolumeMissing { mount: volume.mount.clone(), path });
            }
        }
    }
    Ok(())
}

/// Mounts a host's path at `at`. The daemon has found it allowed and free of links; what a pod that may write there has
/// put into its place since then does not count.
fn show(path: &Path, at: &Path) -> io::Result<()> {
    let file = sys::open_without_links(path, libc::O_PATH)?;
    let from = fd_path(&file);
    fs::create_dir_all(at.parent().unwrap_or(at))?;
    match fs::metadata(&from)?.is_dir() {
        true => fs::create_dir(at)?,
        false => drop(File::create(at)?),
    }
    let none = None::<&str>;
    Ok(mount(Some(from.as_str()), at, none, MsFlags::MS_BIND | MsFlags::MS_REC, none)?)
}

/// A container's root, for touching it from outside without ever leaving it, whatever links it holds.
pub struct Inside(OwnedFd);

impl Inside {
    pub fn open(rootfs: &Path) -> Result<Self, ShimError> {
        open_path(rootfs).map(Self).map_err(ShimError::io("open", rootfs))
    }

    pub fn fd(&self) -> &OwnedFd {
        &self.0
    }

    /// The text of a file; empty where it is not there.
    pub fn read(&self, path: &str) -> String {
        let mut text = Vec::new();
        let Ok(fd) = sys::open_in_root(&self.0, Path::new(path), libc::O_RDONLY | libc::O_NONBLOCK) else {
            return String::new();
        };
        let _ = File::from(fd).take(IMAGE_FILE_BYTES_MAX).read_to_end(&mut text);
        String::from_utf8_lossy(&text).into_owned()
    }

    /// Makes a directory and its parents where they are missing, owned by `uid:gid`.
    pub fn make_dirs(&self, path: &str, uid: u32, gid: u32) -> io::Result<()> {
        let mut at = PathBuf::from("/");
        for part in Path::new(path).components().skip(1) {
            let parent = sys::open_in_root(&self.0, &at, libc::O_PATH | libc::O_DIRECTORY)?;
            at.push(part);
            match nix::sys::stat::mkdirat(parent.as_fd(), part.as_os_str(), Mode::from_bits_truncate(0o755)) {
                Ok(()) => {
                    let owner = (Some(uid.into()), Some(gid.into()));
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
        match nix::sys::stat::fstatat(self.0.as_fd(), name, flags) {
            Ok(stat) if stat.st_mode & libc::S_IFMT == libc::S_IFDIR => return Ok(()),
            Ok(_) => nix::unistd::unlinkat(self.0.as_fd(), name, nix::unistd::UnlinkatFlags::NoRemoveDir)?,
            Err(nix::Error::ENOENT) => {}
            Err(e) => return Err(e.into()),
        }
        Ok(nix::sys::stat::mkdirat(self.0.as_fd(), name, Mode::from_bits_truncate(0o755))?)
    }

    /// Makes `dir`/`name` a plain file to mount over, where it is a link that may lead to nothing.
    pub fn make_mount_file(&self, dir: &str, name: &str) -> io::Result<()> {
        self.make_dirs(dir, 0, 0)?;
        let parent = sys::open_in_root(&self.0, Path::new(dir), libc::O_PATH | libc::O_DIRECTORY)?;
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
        nix::fcntl::openat(parent.as_fd(), name, flags, mode)?;
        Ok(())
    }
}

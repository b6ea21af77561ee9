//! A pod's volumes, as its containers are given them.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use berth_protocol::job::VolumeSource;
use berth_protocol::limits::SCRATCH_MEMORY_BYTES_MAX;
use nix::mount::{MsFlags, mount};

use super::error::ShimError;
use super::rootfs::{fd_path, make_dir, show, shown_dir, volume_dir};
use super::sys;
use super::users::Users;
use crate::task::Task;

/// Makes the pod's scratch volumes, checks that the others are there, and shows those that containers are not given as
/// they lie. `by_criu`: the containers come back with the mounts that they had.
pub fn prepare(task: &Task, pod_dir: &Path, users: Option<&Users>, by_criu: bool) -> Result<(), ShimError> {
    for (index, volume) in task.template.volumes.iter().enumerate() {
        let given = task.volumes.get(index).and_then(Option::as_deref);
        let at = shown_dir(pod_dir, index);
        let from = match (&volume.source, given) {
            (VolumeSource::Scratch(size), None) => {
                let dir = volume_dir(pod_dir, index);
                make_scratch(&dir, size.0)?;
                dir
            }
            (VolumeSource::Host(_), Some(path)) if path.exists() => {
                show_as_found(path, &at, by_criu).map_err(|source| match source.raw_os_error() {
                    Some(libc::ELOOP) => {
                        ShimError::VolumeMoved { mount: volume.mount.clone(), path: path.to_owned() }
                    }
                    _ => ShimError::io("mount the volume's", path)(source),
                })?;
                continue;
            }
            (_, Some(path)) if path.exists() => path.to_owned(),
            (_, path) => {
                let path = path.map(Path::to_owned).unwrap_or_default();
                return Err(ShimError::VolumeMissing { mount: volume.mount.clone(), path });
            }
        };
        if users.is_some() {
            show(&from, &at, users).map_err(ShimError::io("show the volume at", &from))?;
        }
    }
    Ok(())
}

fn make_scratch(at: &Path, size: u64) -> Result<(), ShimError> {
    make_dir(at, 0o777)?;
    // For any user of the container, as /tmp.
    let mode = fs::Permissions::from_mode(0o1777);
    fs::set_permissions(at, mode).map_err(ShimError::io("set the mode of", at))?;
    if size <= SCRATCH_MEMORY_BYTES_MAX {
        let options = format!("size={size},mode=1777");
        let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
        mount(Some("scratch"), at, Some("tmpfs"), flags, Some(options.as_str()))
            .map_err(|e| ShimError::io("mount a tmpfs at", at)(e.into()))?;
    }
    Ok(())
}

/// Mounts a host's path at `at`. The daemon has found it allowed and free of links; what a pod that may write there has
/// put into its place since then does not count.
///
/// What the host mounts below it later is not seen: of mounts that take part in that CRIU sets up all that have one
/// master by one of them, which fails unless that shows the directories of all others. What was saved while it
/// did finds it as it was.
fn show_as_found(path: &Path, at: &Path, by_criu: bool) -> io::Result<()> {
    let file = sys::open_without_links(path, libc::O_PATH)?;
    let from = fd_path(&file);
    fs::create_dir_all(at.parent().unwrap_or(at))?;
    match fs::metadata(&from)?.is_dir() {
        true => fs::create_dir(at)?,
        false => drop(File::create(at)?),
    }
    let none = None::<&str>;
    mount(Some(from.as_str()), at, none, MsFlags::MS_BIND | MsFlags::MS_REC, none)?;
    if !by_criu {
        mount(none, at, none, MsFlags::MS_PRIVATE | MsFlags::MS_REC, none)?;
    }
    Ok(())
}

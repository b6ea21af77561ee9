//! Where a container's mounts lead, looked at before libcontainer makes them.
//!
//! libcontainer keeps each mount within the container's root, wherever links of the image lead it. But then it makes
//! devices and links in `/dev` by their paths on the host: were `/dev` a link, or were something mounted over the root
//! itself, the host's own directories would be written to. And what is mounted over `/proc` hides what is masked there
//! from whoever masks it.

use std::fs;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::checkpoint::dump::is_bind;
use super::error::ShimError;
use super::rootfs::Inside;
use super::sys;
use super::users::Users;

/// Where the kernel's own file systems go.
const KERNELS: [&str; 3] = ["/dev", "/proc", "/sys"];

/// Makes the kernel's directories plain ones in the container's root, and refuses mounts that do not stay where the
/// job's file says: over the root, or into one of those by a link. `config` is the OCI configuration.
pub fn settle(rootfs: &Path, users: Option<&Users>, config: &Value) -> Result<(), ShimError> {
    let root = Inside::open(rootfs, users)?;
    for dir in KERNELS {
        root.make_mount_dir(dir.trim_start_matches('/')).map_err(ShimError::io("make in the image", dir))?;
    }
    let mounts = config["mounts"].as_array().into_iter().flatten().filter(|mount| is_bind(mount));
    let bound: Vec<(&Path, &Path)> = mounts
        .filter_map(|mount| {
            Some((mount["destination"].as_str()?.as_ref(), mount["source"].as_str()?.as_ref()))
        })
        .collect();
    for (at, _) in &bound {
        let outer = bound.iter().filter(|(other, _)| at != other && at.starts_with(other));
        let refused = |why| ShimError::MountPoint { mount: at.display().to_string(), why };
        match outer.max_by_key(|(other, _)| other.components().count()) {
            Some((outer, source)) => {
                let inner = at.strip_prefix(outer).unwrap_or(at);
                if has_links(source, inner).map_err(ShimError::io("look into", *source))? {
                    return Err(refused("a part of it is a symbolic link in the volume around it"));
                }
            }
            None => {
                let real = leads_to(root.fd(), at).map_err(ShimError::io("look for", *at))?;
                let inside = |dir: &&str| real.starts_with(dir) && !at.starts_with(dir);
                if real == Path::new("/") || KERNELS.iter().any(|dir| real == Path::new(dir) || inside(dir)) {
                    return Err(refused(
                        "it is, or a link of the image leads it to, the root, /dev, /proc or /sys",
                    ));
                }
            }
        }
    }
    Ok(())
}

/// Where `at` is within the root once every link is followed; what is missing of it is added as it is written.
fn leads_to(root: &OwnedFd, at: &Path) -> io::Result<PathBuf> {
    let path_of = |fd: &OwnedFd| fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()));
    let top = path_of(root)?;
    let mut there = at;
    loop {
        match sys::open_in_root(root, there, libc::O_PATH) {
            Ok(fd) => {
                let real = path_of(&fd)?;
                let real = Path::new("/").join(real.strip_prefix(&top).map_err(io::Error::other)?);
                return Ok(real.join(at.strip_prefix(there).unwrap_or(Path::new(""))));
            }
            Err(e) if e.kind() == io::ErrorKind::NotFound => there = there.parent().ok_or(e)?,
            Err(e) => return Err(e),
        }
    }
}

/// Is there a link on the way to `inner`, as far as that is there?
fn has_links(source: &Path, inner: &Path) -> io::Result<bool> {
    let source = fs::File::open(source)?;
    match sys::open_beneath(&source, inner, libc::O_PATH) {
        Ok(_) => Ok(false),
        Err(e) => match e.raw_os_error() {
            Some(libc::ELOOP) => Ok(true),
            // What it is instead of a directory libcontainer says.
            Some(libc::ENOENT | libc::ENOTDIR) => Ok(false),
            _ => Err(e),
        },
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use serde_json::json;

    use super::*;

    fn bind(source: &Path, at: &str) -> Value {
        json!({"type": "bind", "source": source, "destination": at, "options": ["rbind"]})
    }

    #[test]
    fn links_lead_no_mount_over_what_is_berths() {
        let tmp = tempfile::tempdir().unwrap();
        let (root, volume) = (tmp.path().join("root"), tmp.path().join("volume"));
        for dir in [root.join("data"), root.join("proc"), volume.join("plain")] {
            fs::create_dir_all(dir).unwrap();
        }
        for (link, to) in
            [("dev", "/etc"), ("top", "/"), ("up", "../.."), ("kernel", "proc"), ("run", "/var/run")]
        {
            symlink(to, root.join(link)).unwrap();
        }
        fs::create_dir_all(root.join("var/run")).unwrap();
        symlink("/", volume.join("top")).unwrap();
        let of = |mounts: Vec<Value>| settle(&root, None, &json!({"mounts": mounts}));
        for at in ["/data", "/data/new/deep", "/run/x", "/new", "/sys/fs/cgroup"] {
            assert!(of(vec![bind(&volume, at)]).is_ok(), "{at}");
        }
        assert!(fs::symlink_metadata(root.join("dev")).unwrap().is_dir());
        for at in ["/top", "/up", "/kernel", "/kernel/sys", "/dev", "/proc", "/top/proc/x"] {
            let refused = of(vec![bind(&volume, at)]);
            assert!(matches!(refused, Err(ShimError::MountPoint { .. })), "{at}: {refused:?}");
        }
        let nested = |inner: &str| of(vec![bind(&volume, "/data"), bind(&volume, inner)]);
        assert!(nested("/data/plain/x").is_ok() && nested("/data/new").is_ok());
        assert!(matches!(nested("/data/top"), Err(ShimError::MountPoint { .. })));
        assert!(matches!(nested("/data/top/etc"), Err(ShimError::MountPoint { .. })));
    }
}

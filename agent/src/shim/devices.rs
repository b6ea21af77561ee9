//! The devices that a pod was given, as its containers' configuration has them: by CDI where a specification names
//! them, else their nodes and files. Whatever was not given is neither visible nor, by the control group, usable.

use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use nix::fcntl::AtFlags;
use nix::sys::stat::{Mode, SFlag, fstatat, makedev, mknodat, umask};
use nix::unistd::{Pid, UnlinkatFlags, fchownat, unlinkat};
use serde_json::{Value, json};

use super::error::ShimError;
use super::rootfs::Inside;
use super::sys;
use crate::cdi::Specs;
use crate::task::DeviceGrant;

/// What grants without CDI bring.
#[derive(Default)]
pub struct Direct {
    /// As in the OCI configuration.
    pub nodes: Vec<Value>,
    pub files: Vec<PathBuf>,
    pub env: Vec<String>,
}

pub fn direct(grants: &[DeviceGrant]) -> Result<Direct, ShimError> {
    let mut all = Direct::default();
    for grant in grants {
        all.env.extend(grant.env.iter().cloned());
        if grant.cdi.is_some() {
            continue;
        }
        for path in &grant.nodes {
            let node =
                node(path).map_err(|message| ShimError::Device { device: grant.uuid.clone(), message })?;
            // Grants share nodes, such as /dev/nvidiactl.
            if !all.nodes.contains(&node) {
                all.nodes.push(node);
            }
        }
        let new: Vec<PathBuf> =
            grant.files.iter().filter(|path| !all.files.contains(path)).cloned().collect();
        all.files.extend(new);
    }
    Ok(all)
}

fn node(path: &Path) -> Result<Value, String> {
    let file =
        std::fs::metadata(path).map_err(|e| format!("{}: {e}; is the driver loaded?", path.display()))?;
    let kind = match file.file_type() {
        t if t.is_char_device() => "c",
        t if t.is_block_device() => "b",
        _ => return Err(format!("{} is no device", path.display())),
    };
    Ok(json!({
        "path": path, "type": kind, "fileMode": file.permissions().mode() & 0o777,
        "major": libc::major(file.rdev()), "minor": libc::minor(file.rdev()),
        "uid": file.uid(), "gid": file.gid(),
    }))
}

/// The configuration with what CDI says of the grants that name a CDI device.
pub fn inject(grants: &[DeviceGrant], oci: Value) -> Result<Value, ShimError> {
    inject_from(Path::new("/"), grants, oci)
}

fn inject_from(root: &Path, grants: &[DeviceGrant], oci: Value) -> Result<Value, ShimError> {
    let names: Vec<String> = grants.iter().filter_map(|grant| grant.cdi.clone()).collect();
    if names.is_empty() {
        return Ok(oci);
    }
    let failed = |message: String| ShimError::Device { device: names.join(", "), message };
    Specs::read(root).apply(&names, oci).map_err(failed)
}

/// Makes the nodes that a container is given in its file system, where it has come back with those that it was given
/// elsewhere. These stay, and are of no use: what was not given here its control group keeps it from.
pub fn settle(pid: Pid, nodes: &[Value]) -> io::Result<()> {
    if nodes.is_empty() {
        return Ok(());
    }
    let root = Inside::of_process(pid)?;
    for node in nodes {
        let wrong = || io::Error::new(io::ErrorKind::InvalidInput, format!("{node} is no device node"));
        let path = Path::new(node["path"].as_str().ok_or_else(wrong)?);
        let kind = match node["type"].as_str() {
            Some("b") => SFlag::S_IFBLK,
            Some("c" | "u") => SFlag::S_IFCHR,
            _ => continue,
        };
        let number = |key: &str| node[key].as_u64().ok_or_else(wrong);
        let device = makedev(number("major")?, number("minor")?);
        let (Some(dir), Some(name)) = (path.parent(), path.file_name()) else { return Err(wrong()) };
        root.make_dirs(dir.to_str().ok_or_else(wrong)?, 0, 0)?;
        let dir = sys::open_in_root(root.fd(), dir, libc::O_PATH | libc::O_DIRECTORY)?;
        match fstatat(dir.as_fd(), name, AtFlags::AT_SYMLINK_NOFOLLOW) {
            Ok(stat) if stat.st_mode & libc::S_IFMT == kind.bits() && stat.st_rdev == device => continue,
            Ok(_) => unlinkat(dir.as_fd(), name, UnlinkatFlags::NoRemoveDir)?,
            Err(nix::Error::ENOENT) => {}
            Err(e) => return Err(e.into()),
        }
        let mode = Mode::from_bits_truncate(node["fileMode"].as_u64().unwrap_or(0o666) as libc::mode_t);
        // Nothing may be changed afterwards by its name, which the container's programs can give to something else.
        let mask = umask(Mode::empty());
        let made = mknodat(dir.as_fd(), name, kind, mode, device);
        umask(mask);
        made?;
        let id = |key: &str| node[key].as_u64().unwrap_or(0) as u32;
        let flags = AtFlags::AT_SYMLINK_NOFOLLOW;
        fchownat(dir.as_fd(), name, Some(id("uid").into()), Some(id("gid").into()), flags)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn grant() -> DeviceGrant {
        DeviceGrant {
            uuid: "GPU-1".to_owned(),
            cdi: None,
            nodes: vec!["/dev/full".into()],
            files: vec!["/etc/hostname".into()],
            env: vec!["VISIBLE=GPU-1".to_owned()],
        }
    }

    #[test]
    fn without_cdi_nodes_and_files_are_named_once() {
        let direct = direct(&[grant(), DeviceGrant { uuid: "GPU-2".to_owned(), ..grant() }]).unwrap();
        assert_eq!((direct.nodes.len(), direct.files.len()), (1, 1));
        assert_eq!((&direct.nodes[0]["major"], &direct.nodes[0]["minor"]), (&json!(1), &json!(7)));
        let gone = DeviceGrant { nodes: vec!["/dev/nonesuch".into()], ..grant() };
        assert!(super::direct(&[gone]).is_err_and(|e| e.to_string().contains("driver")));
    }

    #[test]
    fn with_cdi_the_specification_is_followed() {
        let dir = tempfile::tempdir().unwrap();
        let cdi = json!({
            "cdiVersion": "0.6.0", "kind": "example.com/gpu",
            "containerEdits": {"env": ["DRIVER=1"]},
            "devices": [
                {"name": "GPU-1", "containerEdits": {"deviceNodes": [{"path": "/dev/full"}]}},
                {"name": "GPU-2", "containerEdits": {"deviceNodes": [{"path": "/dev/zero"}]}},
            ],
        });
        std::fs::create_dir_all(dir.path().join("etc/cdi")).unwrap();
        std::fs::write(dir.path().join("etc/cdi/example.json"), cdi.to_string()).unwrap();
        let oci = json!({
            "ociVersion": "1.0.2", "root": {"path": "x"}, "linux": {"resources": {}},
            "process": {"user": {"uid": 0, "gid": 0}, "args": ["x"], "env": [], "cwd": "/"},
        });
        let named = |name: &str| vec![DeviceGrant { cdi: Some(name.to_owned()), ..grant() }];
        let done = inject_from(dir.path(), &named("example.com/gpu=GPU-1"), oci.clone()).unwrap();
        let devices = done["linux"]["devices"].as_array().unwrap();
        assert_eq!((devices.len(), &devices[0]["path"]), (1, &json!("/dev/full")));
        assert!(done["process"]["env"].as_array().unwrap().contains(&json!("DRIVER=1")), "{done}");
        let allowed = done["linux"]["resources"]["devices"].as_array().unwrap();
        assert_eq!((&allowed[0]["major"], &allowed[0]["minor"]), (&json!(1), &json!(7)));
        assert!(inject_from(dir.path(), &named("example.com/gpu=GPU-9"), oci).is_err());
    }
}

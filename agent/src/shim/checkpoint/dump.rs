//! What CRIU is told to dump one container: which of its mounts, namespaces and files are the shim's.

use std::fs;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use berth_protocol::job::TcpPolicy;
use nix::sys::stat::fstat;
use nix::unistd::Pid;
use serde_json::Value;

use super::super::container::Container;
use super::super::rootfs::{Home, Inside};
use super::super::sys;
use super::rpc::Options;
use crate::task::{SavedContainer, Task};

pub const NETWORK: &str = "extRootNetNS";
pub const PIDS: &str = "extRootPidNS";
/// What masked files are bound to.
pub const NOTHING: &str = "/dev/null";
/// Seizing all tasks of a pod on a loaded machine.
const SEIZE_S_MAX: u32 = 30;
const DELETED_BYTES_MAX: u32 = 1 << 30;

/// One mount of a container, from its `mountinfo`.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Mount {
    id: u64,
    parent: u64,
    point: String,
}

fn unescape(text: &str) -> String {
    // The kernel writes space, tab, newline and backslash as three octal digits.
    let mut parts = text.split('\\');
    let mut plain = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        match part.get(..3).and_then(|octal| u8::from_str_radix(octal, 8).ok()) {
            Some(byte) => {
                plain.push(char::from(byte));
                plain.push_str(&part[3..]);
            }
            None => plain.push_str(part),
        }
    }
    plain
}

fn mounts(text: &str) -> Vec<Mount> {
    let parse = |line: &str| {
        let mut fields = line.split(' ');
        let (id, parent) = (fields.next()?.parse().ok()?, fields.next()?.parse().ok()?);
        Some(Mount { id, parent, point: unescape(fields.nth(2)?) })
    };
    text.lines().filter_map(parse).collect()
}

/// `mounts[at]` and all that is mounted within it.
fn with_inner<'a>(mounts: &'a [Mount], at: &'a Mount) -> Vec<&'a Mount> {
    let mut found = vec![at];
    let mut next = 0;
    while next < found.len() {
        let id = found[next].id;
        found.extend(mounts.iter().filter(|mount| mount.parent == id));
        next += 1;
    }
    found
}

/// The mount on which `path` lies in the container.
fn mount_id(root: &Inside, path: &str) -> io::Result<u64> {
    let fd = sys::open_in_root(root.fd(), Path::new(path), libc::O_PATH)?;
    let info = fs::read_to_string(format!("/proc/self/fdinfo/{}", fd.as_raw_fd()))?;
    let id = info.lines().find_map(|line| line.strip_prefix("mnt_id:")?.trim().parse().ok());
    id.ok_or_else(|| io::Error::other("the kernel tells no mount"))
}

/// By its type, or, as specifications of devices have it, by an option alone.
pub fn is_bind(mount: &Value) -> bool {
    let options = mount["options"].as_array().into_iter().flatten().filter_map(Value::as_str);
    mount["type"] == "bind" || options.into_iter().any(|option| option == "bind" || option == "rbind")
}

/// Mounts that come from outside: destinations that the configuration binds, each with the mounts within, as pairs
/// of where it is and what it is called. Its name is where the configuration wants it.
fn external(config: &Value, root: &Inside, all: &[Mount]) -> io::Result<Vec<(String, String)>> {
    let bound: Vec<&str> = config["mounts"]
        .as_array()
        .into_iter()
        .flatten()
        .filter(|mount| is_bind(mount))
        .filter_map(|mount| mount["destination"].as_str())
        .collect();
    let mut tops = Vec::new();
    for destination in bound {
        let id = mount_id(root, destination)?;
        let mount = all.iter().find(|mount| mount.id == id);
        tops.push((destination, mount.ok_or_else(|| io::Error::other("a mount that is not listed"))?));
    }
    let mut found: Vec<(String, String)> = Vec::new();
    for (destination, top) in &tops {
        for mount in with_inner(all, top) {
            let own = tops.iter().find(|(_, other)| other.id == mount.id);
            let name = match own {
                Some((destination, _)) => (*destination).to_owned(),
                None => format!("{destination}{}", mount.point.strip_prefix(&top.point).unwrap_or_default()),
            };
            if !found.iter().any(|(point, _)| *point == mount.point) {
                found.push((mount.point.clone(), name));
            }
        }
    }
    Ok(found)
}

/// Where masked files are: binds of the null device.
fn masked(config: &Value, root: &Inside, all: &[Mount]) -> Vec<String> {
    let paths = config["linux"]["maskedPaths"].as_array().into_iter().flatten().filter_map(Value::as_str);
    let is_file = |path: &&str| {
        let fd = sys::open_in_root(root.fd(), Path::new(path), libc::O_PATH);
        fd.is_ok_and(|fd| fstat(&fd).is_ok_and(|stat| stat.st_mode & libc::S_IFMT == libc::S_IFCHR))
    };
    let point = |path: &str| {
        let id = mount_id(root, path).ok()?;
        all.iter().find(|mount| mount.id == id).map(|mount| mount.point.clone())
    };
    paths.filter(is_file).filter_map(point).collect()
}

/// The configuration that the container was made of.
pub fn config(home: &Home) -> io::Result<Value> {
    Ok(serde_json::from_slice(&fs::read(home.dir().join("config.json"))?)?)
}

fn namespace_inode(pid: Pid, kind: &str) -> io::Result<u64> {
    Ok(fs::metadata(format!("/proc/{pid}/ns/{kind}"))?.ino())
}

/// What to ask of CRIU, and what a restore must know.
pub fn plan(task: &Task, dir: &Path, container: &Container) -> io::Result<(Options, SavedContainer)> {
    let home = Home::new(dir, &container.name);
    let config = config(&home)?;
    let pid = container.pid;
    let root = Inside::of_process(pid)?;
    let all = mounts(&fs::read_to_string(format!("/proc/{pid}/mountinfo"))?);
    let mut options = Options::default();
    options.pid(pid.as_raw()).root(b"/").leave_running().ignore_cgroups().file_locks().link_remap();
    options.orphan_pts_master().no_network_lock().timeout_s(SEIZE_S_MAX).deleted_bytes_max(DELETED_BYTES_MAX);
    tcp(&mut options, task);
    let external = external(&config, &root, &all)?;
    for (point, name) in &external {
        options.external_mount(point, name.as_bytes());
    }
    for point in masked(&config, &root, &all) {
        options.external_mount(&point, NOTHING.as_bytes());
    }
    options.external(&format!("pid[{}]:{PIDS}", namespace_inode(pid, "pid")?));
    if super::super::spec::own_network(&task.template) {
        options.external(&format!("net[{}]:{NETWORK}", namespace_inode(pid, "net")?));
    }
    let pipe = |fd| fstat(fd).map(|stat| format!("pipe:[{}]", stat.st_ino));
    let pipes = container.pumps.iter().map(|pump| pump.fd().map(pipe).transpose());
    let pipes = pipes.collect::<Result<_, _>>()?;
    let mounts = external.into_iter().map(|(_, name)| name).collect();
    Ok((options, SavedContainer { name: container.name.clone(), pipes, mounts }))
}

pub fn tcp(options: &mut Options, task: &Task) {
    match task.template.checkpoint.tcp {
        TcpPolicy::Close => options.tcp_close(),
        TcpPolicy::Keep => options.tcp_established(),
    };
}

/// A process of the container that is no descendant of its first one, which CRIU would pass over in silence.
pub fn stray(container: &Container) -> Option<String> {
    let processes = container.cgroup.processes().ok()?;
    let status = |pid: Pid| -> Option<(i32, String)> {
        let text = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
        let field = |name: &str| text.lines().find_map(|line| line.strip_prefix(name).map(str::trim));
        Some((field("PPid:")?.parse().ok()?, field("Name:")?.to_owned()))
    };
    let inside = |pid: &Pid| *pid == container.pid || processes.contains(pid);
    processes.iter().filter(|pid| **pid != container.pid).find_map(|pid| {
        let (parent, name) = status(*pid)?;
        (!inside(&Pid::from_raw(parent))).then(|| format!("{name} (process {pid})"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mounts_as_the_kernel_lists_them() {
        let text = "10 1 0:5 / / rw - overlay o rw\n11 10 0:6 / /sp\\040ace rw - tmpfs t rw\n\
                    12 11 0:7 /x /sp\\040ace/in rw shared:3 - tmpfs t rw\n13 10 0:8 / /other rw - tmpfs t rw\n";
        let all = mounts(text);
        let points = |of: &[&Mount]| of.iter().map(|mount| mount.point.clone()).collect::<Vec<_>>();
        assert_eq!(points(&with_inner(&all, &all[1])), ["/sp ace", "/sp ace/in"]);
        assert_eq!(with_inner(&all, &all[0]).len(), 4);
    }
}

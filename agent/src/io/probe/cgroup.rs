//! How control groups are mounted here, and the limits that the agent's own group and those above it set; reads only.

use std::fs;
use std::path::{Path, PathBuf};

use berth_protocol::resources::CgroupVersion;
use berth_protocol::units::{Bytes, MilliCpu};

/// One mounted hierarchy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CgroupMount {
    pub point: PathBuf,
    /// The group that the mount shows at its top: `/`, or a container's own.
    pub top: String,
    /// Controllers of version 1 by name; for version 2 what its top offers.
    pub controllers: Vec<String>,
    pub v2: bool,
}

/// The hierarchies in `/proc/self/mountinfo`.
pub fn mounts(root: &Path) -> Vec<CgroupMount> {
    let text = fs::read_to_string(root.join("proc/self/mountinfo")).unwrap_or_default();
    let mut mounts: Vec<_> = text.lines().filter_map(parse_mount).collect();
    for mount in &mut mounts {
        mount.point = root.join(mount.point.strip_prefix("/").unwrap_or(&mount.point));
        if mount.v2 {
            let offered = fs::read_to_string(mount.point.join("cgroup.controllers")).unwrap_or_default();
            mount.controllers = offered.split_ascii_whitespace().map(str::to_owned).collect();
        }
    }
    mounts
}

/// A line of mountinfo (proc_pid_mountinfo(5)): `id parent dev top point options [tags] - type source superoptions`.
fn parse_mount(line: &str) -> Option<CgroupMount> {
    let (left, right) = line.split_once(" - ")?;
    let mut left = left.split(' ').skip(3);
    let (top, point) = (left.next()?, left.next()?);
    let mut right = right.split(' ');
    let kind = right.next()?;
    let v2 = match kind {
        "cgroup" => false,
        "cgroup2" => true,
        _ => return None,
    };
    let options = if v2 { "" } else { right.nth(1)? };
    let controllers =
        options.split(',').filter(|o| !matches!(*o, "" | "rw" | "ro")).map(str::to_owned).collect();
    Some(CgroupMount { point: unescape(point), top: top.to_owned(), controllers, v2 })
}

/// The kernel writes space, tab, newline and backslash as three octal digits.
fn unescape(path: &str) -> PathBuf {
    let mut out = path.to_owned();
    for (code, plain) in [("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")] {
        out = out.replace(code, plain);
    }
    PathBuf::from(out)
}

/// By where the memory controller is: a version 2 mount without it (systemd's, on a hybrid machine) bounds nothing.
pub fn version(mounts: &[CgroupMount]) -> CgroupVersion {
    let v1 = mounts.iter().any(|m| !m.v2 && m.controllers.iter().any(|c| c == "memory" || c == "cpu"));
    let v2 = mounts.iter().any(|m| m.v2);
    match (v1, v2) {
        (false, _) => CgroupVersion::V2,
        (true, false) => CgroupVersion::V1,
        (true, true) => CgroupVersion::Hybrid,
    }
}

/// The least of the limits on the way from the agent's group to the top.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Limit {
    pub cpu: Option<MilliCpu>,
    pub memory: Option<Bytes>,
}

/// Directories whose limits bound the agent, found once; their files are read again at each sample.
#[derive(Debug, Clone, Default)]
pub struct OwnLimits {
    groups: Vec<Group>,
}

#[derive(Debug, Clone)]
struct Group {
    dir: PathBuf,
    v2: bool,
    cpu: bool,
    memory: bool,
}

impl OwnLimits {
    /// Keeps those groups that have files of limits: a machine's top group has none.
    pub fn find(root: &Path, mounts: &[CgroupMount]) -> Self {
        let own = fs::read_to_string(root.join("proc/self/cgroup")).unwrap_or_default();
        let mut groups = Vec::new();
        for mount in mounts {
            let has = |name: &str| mount.controllers.iter().any(|c| c == name);
            if !(has("cpu") || has("memory")) {
                continue;
            }
            let Some(path) = own_path(&own, mount) else { continue };
            let below = path.strip_prefix(mount.top.trim_end_matches('/')).unwrap_or(&path);
            let mut dir = mount.point.join(below.trim_start_matches('/'));
            loop {
                let (cpu_file, memory_file) =
                    if mount.v2 { ("cpu.max", "memory.max") } else { (V1_QUOTA, V1_MEMORY) };
                let cpu = has("cpu") && dir.join(cpu_file).exists();
                let memory = has("memory") && dir.join(memory_file).exists();
                if cpu || memory {
                    groups.push(Group { dir: dir.clone(), v2: mount.v2, cpu, memory });
                }
                if dir == mount.point || !dir.pop() {
                    break;
                }
            }
        }
        Self { groups }
    }

    pub fn read(&self) -> Limit {
        let mut limit = Limit::default();
        for group in &self.groups {
            let text = |name: &str| fs::read_to_string(group.dir.join(name)).unwrap_or_default();
            let cpu = group.cpu.then(|| {
                if group.v2 {
                    cpu_max(&text("cpu.max"))
                } else {
                    cpu_max(&format!("{} {}", text(V1_QUOTA).trim(), text(V1_PERIOD).trim()))
                }
            });
            let memory =
                group.memory.then(|| memory_max(&text(if group.v2 { "memory.max" } else { V1_MEMORY })));
            limit.cpu = least(limit.cpu, cpu.flatten());
            limit.memory = least(limit.memory, memory.flatten());
        }
        limit
    }
}

const V1_QUOTA: &str = "cpu.cfs_quota_us";
const V1_PERIOD: &str = "cpu.cfs_period_us";
const V1_MEMORY: &str = "memory.limit_in_bytes";

fn least<T: Ord>(a: Option<T>, b: Option<T>) -> Option<T> {
    match (a, b) {
        (Some(a), Some(b)) => Some(a.min(b)),
        (a, b) => a.or(b),
    }
}

/// The agent's group in the hierarchy, from `/proc/self/cgroup` (`id:controllers:path`).
fn own_path(own: &str, mount: &CgroupMount) -> Option<String> {
    own.lines().find_map(|line| {
        let mut parts = line.splitn(3, ':');
        let (id, controllers, path) = (parts.next()?, parts.next()?, parts.next()?);
        let this = if mount.v2 {
            id == "0" && controllers.is_empty()
        } else {
            controllers.split(',').any(|c| !c.is_empty() && mount.controllers.iter().any(|m| m == c))
        };
        this.then(|| path.to_owned())
    })
}

/// `quota period`, in µs; `max` or a negative quota is none.
fn cpu_max(text: &str) -> Option<MilliCpu> {
    let (quota, period) = text.trim().split_once(' ')?;
    let (quota, period): (u64, u64) = (quota.parse().ok()?, period.trim().parse().ok()?);
    quota.checked_mul(1000)?.checked_div(period).map(MilliCpu)
}

/// Bytes; `max`, or version 1's 2^63 rounded down to a page, is none.
fn memory_max(text: &str) -> Option<Bytes> {
    text.trim().parse().ok().filter(|bytes| *bytes < 1 << 62).map(Bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    const V1: &str = "25 20 0:21 / /sys/fs/cgroup rw - tmpfs tmpfs rw,mode=755\n\
        26 25 0:22 / /sys/fs/cgroup/cpu,cpuacct rw shared:9 - cgroup cgroup rw,cpu,cpuacct\n\
        27 25 0:23 / /sys/fs/cgroup/memory rw shared:10 - cgroup cgroup rw,memory\n\
        28 25 0:24 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,name=systemd\n";
    const UNIFIED: &str = "29 25 0:25 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n";
    const V2: &str = "26 20 0:22 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw,nsdelegate\n";
    /// systemd's hybrid layout on a kernel started with `cgroup_no_v1=all`.
    const V2_UNDER: &str = "28 25 0:24 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,name=systemd\n\
        29 25 0:25 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n";

    fn tree(files: &[(&str, &str)]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        root
    }

    #[test]
    fn versions() {
        for (mountinfo, expect) in [
            (V1.to_owned(), CgroupVersion::V1),
            (format!("{V1}{UNIFIED}"), CgroupVersion::Hybrid),
            (V2.to_owned(), CgroupVersion::V2),
            (V2_UNDER.to_owned(), CgroupVersion::V2),
        ] {
            let root = tree(&[("proc/self/mountinfo", &mountinfo)]);
            assert_eq!(version(&mounts(root.path())), expect, "{mountinfo}");
        }
    }

    #[test]
    fn limits() {
        let gib = |n: u64| Some(Bytes(n << 30));
        let no = ("none", "");
        for (name, mountinfo, own, files, cpu, memory) in [
            ("a bare machine", V2, "0::/init.scope\n", [no, no, no], None, None),
            (
                "the tightest of service and slice",
                V2,
                "0::/a.slice/b.service\n",
                [
                    ("sys/fs/cgroup/a.slice/cpu.max", "150000 100000\n"),
                    ("sys/fs/cgroup/a.slice/memory.max", "4294967296\n"),
                    ("sys/fs/cgroup/a.slice/b.service/memory.max", "max\n"),
                ],
                Some(MilliCpu(1500)),
                gib(4),
            ),
            (
                "a container with a namespace of its own",
                V2,
                "0::/\n",
                [("sys/fs/cgroup/cpu.max", "max 100000\n"), ("sys/fs/cgroup/memory.max", "1073741824\n"), no],
                None,
                gib(1),
            ),
            (
                "version 1",
                V1,
                "4:memory:/m\n1:cpu,cpuacct:/c\n0::/\n",
                [
                    ("sys/fs/cgroup/cpu,cpuacct/c/cpu.cfs_quota_us", "50000\n"),
                    ("sys/fs/cgroup/cpu,cpuacct/c/cpu.cfs_period_us", "100000\n"),
                    ("sys/fs/cgroup/memory/m/memory.limit_in_bytes", "2147483648\n"),
                ],
                Some(MilliCpu(500)),
                gib(2),
            ),
            (
                "version 1 without limits",
                V1,
                "4:memory:/m\n1:cpu,cpuacct:/\n",
                [
                    ("sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us", "-1\n"),
                    ("sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us", "100000\n"),
                    ("sys/fs/cgroup/memory/m/memory.limit_in_bytes", "9223372036854771712\n"),
                ],
                None,
                None,
            ),
        ] {
            let mut all = vec![
                ("proc/self/mountinfo", mountinfo),
                ("proc/self/cgroup", own),
                ("sys/fs/cgroup/cgroup.controllers", "cpuset cpu io memory pids\n"),
            ];
            all.extend(files);
            let root = tree(&all);
            let limits = OwnLimits::find(root.path(), &mounts(root.path()));
            assert_eq!(limits.read(), Limit { cpu, memory }, "{name}");
        }
    }

    #[test]
    fn a_container_that_sees_its_group_as_the_top_of_the_mount() {
        let mountinfo = "27 25 0:23 /docker/c1 /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n";
        let root = tree(&[
            ("proc/self/mountinfo", mountinfo),
            ("proc/self/cgroup", "4:memory:/docker/c1/x\n"),
            ("sys/fs/cgroup/memory/memory.limit_in_bytes", "1048576\n"),
            ("sys/fs/cgroup/memory/x/memory.limit_in_bytes", "9223372036854771712\n"),
        ]);
        let limits = OwnLimits::find(root.path(), &mounts(root.path()));
        assert_eq!(limits.read().memory, Some(Bytes(1 << 20)));
    }
}

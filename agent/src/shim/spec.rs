//! The OCI configuration of a container, from the task. Describes only: nothing is made or mounted here.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use berth_protocol::job::{ContainerSpec, Network, PodTemplate, Volume, VolumeSource};
use berth_protocol::units::Bytes;
use serde_json::{Value, json};

use super::cgroup;
use super::process::User;
use super::rootfs::{self, Home};
use crate::task::{Root, Task, file};

/// What a container may do beside what its user may: Docker's set.
const CAPABILITIES: [&str; 14] = [
    "AUDIT_WRITE",
    "CHOWN",
    "DAC_OVERRIDE",
    "FOWNER",
    "FSETID",
    "KILL",
    "MKNOD",
    "NET_BIND_SERVICE",
    "NET_RAW",
    "SETFCAP",
    "SETGID",
    "SETPCAP",
    "SETUID",
    "SYS_CHROOT",
];

const MASKED: [&str; 12] = [
    "/proc/acpi",
    "/proc/asound",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/sys/devices/virtual/powercap",
    "/sys/firmware",
];
const READ_ONLY: [&str; 5] = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"];

/// Processes and threads of one container.
const PIDS_MAX: u64 = 32_768;
/// Of those that the machine can have at all, what one container may: no single one leaves none for the others.
const PIDS_SHARE: u64 = 4;
const CPU_SHARES_MIN: u64 = 2;
const CPU_SHARES_MAX: u64 = 262_144;
const NOFILE_SOFT_MAX: u64 = 65_536;
const NOFILE_HARD_MAX: u64 = 1_048_576;
/// The kernel's own processes, the shim and its like come first when memory runs out.
pub const OOM_SCORE_ADJ: i32 = 500;

/// What the pod's containers share.
pub struct Pod<'a> {
    pub task: &'a Task,
    pub dir: &'a Path,
    /// `dir` as those see it who become the pod's containers: its `run/` is there.
    pub seen: &'a Path,
    /// Has it users of its own?
    pub users: bool,
    /// Where the namespaces of the pod's init have names.
    pub namespaces: PathBuf,
    /// The network namespace's file; `None`: the node's.
    pub network: Option<PathBuf>,
    pub v2: bool,
    /// Is there swap accounting? A kernel may lack it.
    pub swap: bool,
    /// Of RLIMIT_NOFILE.
    pub nofile_hard: u64,
    /// Processes and threads that the machine can have.
    pub machine_pids: u64,
}

/// One container, all decisions taken.
pub struct Container<'a> {
    pub spec: &'a ContainerSpec,
    pub root: &'a Root,
    pub args: Vec<String>,
    pub env: Vec<String>,
    pub user: User,
    pub cwd: String,
    /// In the form of the OCI configuration, beside the standard ones.
    pub devices: Vec<Value>,
    pub device_files: Vec<PathBuf>,
}

/// The pod's name as a host's: at most 63 bytes, the index kept.
pub fn hostname(task: &Task) -> String {
    let index = format!("-{}", task.pod.index);
    let job = task.template.job.as_str();
    format!("{}{index}", &job[..job.len().min(berth_protocol::limits::NAME_BYTES_MAX - index.len())])
}

/// Docker's, and what the job asks for and the node has granted. Without `CAP_`.
pub fn capabilities(spec: &ContainerSpec) -> BTreeSet<String> {
    let more = spec.capabilities.iter().map(|name| name.strip_prefix("CAP_").unwrap_or(name));
    CAPABILITIES.into_iter().chain(more).map(str::to_owned).collect()
}

/// The configuration, as `config.json` has it.
pub fn oci(pod: &Pod, container: &Container, cgroup: &Path) -> Value {
    let spec = container.spec;
    let caps: Vec<String> = capabilities(spec).iter().map(|name| format!("CAP_{name}")).collect();
    let mut namespaces = vec![json!({"type": "mount"}), json!({"type": "cgroup"})];
    for kind in pod.users.then_some("user").into_iter().chain(["pid", "ipc", "uts"]) {
        namespaces.push(json!({"type": kind, "path": pod.namespaces.join(kind)}));
    }
    namespaces.extend(pod.network.iter().map(|path| json!({"type": "network", "path": path})));
    let user = &container.user;
    let hard = pod.nofile_hard.min(NOFILE_HARD_MAX);
    let masked: Vec<PathBuf> = MASKED.iter().map(PathBuf::from).chain(own_data(pod, container)).collect();
    json!({
        "ociVersion": "1.0.2",
        "process": {
            "user": {"uid": user.uid, "gid": user.gid, "additionalGids": user.groups, "umask": 0o022},
            "args": container.args,
            "env": container.env,
            "cwd": container.cwd,
            "noNewPrivileges": true,
            "oomScoreAdj": OOM_SCORE_ADJ,
            "capabilities": {
                "bounding": caps, "effective": caps, "permitted": caps, "inheritable": [], "ambient": [],
            },
            "rlimits": [{"type": "RLIMIT_NOFILE", "soft": hard.min(NOFILE_SOFT_MAX), "hard": hard}],
        },
        "root": {"path": Home::new(pod.seen, &spec.name).rootfs(), "readonly": spec.read_only_root},
        "mounts": mounts(pod, container),
        "linux": {
            "namespaces": namespaces,
            "cgroupsPath": cgroup,
            "resources": resources(pod, container),
            "devices": container.devices,
            "maskedPaths": masked,
            "readonlyPaths": READ_ONLY,
            "rootfsPropagation": "slave",
        },
    })
}

/// On a view of the node's root berth's own data and keys are not for containers: the agent's, and what a controller and
/// a user of this machine have where they have it by default.
fn own_data(pod: &Pod, container: &Container) -> Vec<PathBuf> {
    if *container.root != Root::Host {
        return Vec::new();
    }
    let parent = pod.dir.parent().filter(|parent| parent.ends_with("pods"));
    let agents = parent.and_then(Path::parent).unwrap_or(pod.dir).to_owned();
    let others = ["/var/lib/berth", "/etc/berth", "/root/.config/berth"].map(PathBuf::from);
    // The agent's last: where it lies within another its mask is needed no more.
    let masked = others.iter().any(|other| agents.starts_with(other));
    others.into_iter().chain((!masked).then_some(agents)).collect()
}

fn mount(kind: &str, at: &str, options: &[&str]) -> Value {
    json!({"destination": at, "type": kind, "source": kind, "options": options})
}

fn bind(from: impl AsRef<Path>, at: impl AsRef<Path>, options: &[&str]) -> Value {
    let options: Vec<&str> = ["rbind"].iter().chain(options).copied().collect();
    json!({"destination": at.as_ref(), "type": "bind", "source": from.as_ref(), "options": options})
}

fn mounts(pod: &Pod, container: &Container) -> Vec<Value> {
    let spec = container.spec;
    let template = &pod.task.template;
    let shm = format!("size={}", spec.limits.memory.0.max(Bytes::MIB));
    let mut all = vec![
        mount("proc", "/proc", &["nosuid", "noexec", "nodev"]),
        mount("tmpfs", "/dev", &["nosuid", "strictatime", "mode=755", "size=65536k"]),
        mount(
            "devpts",
            "/dev/pts",
            &["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"],
        ),
        // As large as the memory that its pages count against.
        mount("tmpfs", "/dev/shm", &["nosuid", "noexec", "nodev", "mode=1777", &shm]),
        mount("mqueue", "/dev/mqueue", &["nosuid", "noexec", "nodev"]),
        mount("sysfs", "/sys", &["nosuid", "noexec", "nodev", "ro"]),
    ];
    all.push(cgroups(pod, spec));
    let harmless = ["nosuid", "nodev", "noexec"];
    all.push(bind(pod.seen.join(file::BERTH_DIR), "/run/berth", &harmless));
    for name in ["hostname", "hosts", "resolv.conf"] {
        all.push(bind(pod.seen.join(file::ETC_DIR).join(name), format!("/etc/{name}"), &harmless));
    }
    all.extend(container.device_files.iter().map(|path| bind(path, path, &["ro", "nosuid", "nodev"])));
    all.extend(volumes(pod, template));
    // Last, since it may lie in a volume.
    all.extend(
        template
            .workspace
            .as_ref()
            .map(|workspace| bind(Home::new(pod.seen, &spec.name).workspace(), &workspace.path, &["nodev"])),
    );
    all.extend(spec.secrets.iter().map(|secret| {
        let from = pod.seen.join(file::SECRETS_DIR).join(secret.name.as_str());
        bind(from, &secret.mount, &["ro", "nosuid", "nodev", "noexec"])
    }));
    all
}

/// Read-only, its own groups alone. libcontainer's own v1 mount looks up a process of the host by the container's
/// number; what is bound here the shim has put together (`rootfs::mount_cgroups`).
fn cgroups(pod: &Pod, spec: &ContainerSpec) -> Value {
    let options = ["nosuid", "noexec", "nodev", "ro"];
    match pod.v2 {
        true => mount("cgroup", "/sys/fs/cgroup", &options),
        false => bind(Home::new(pod.seen, &spec.name).cgroups(), "/sys/fs/cgroup", &options),
    }
}

fn volumes(pod: &Pod, template: &PodTemplate) -> Vec<Value> {
    let given = |index| pod.task.volumes.get(index).cloned().flatten();
    let from = |index, volume: &Volume| match volume.source {
        VolumeSource::Scratch(_) | VolumeSource::Named(_) if !pod.users => {
            given(index).unwrap_or_else(|| rootfs::volume_dir(pod.dir, index))
        }
        _ => rootfs::shown_dir(pod.seen, index),
    };
    let mut all: Vec<(&Volume, PathBuf)> =
        template.volumes.iter().enumerate().map(|(index, volume)| (volume, from(index, volume))).collect();
    // Outer ones first, so that they do not cover inner ones.
    all.sort_by_key(|(volume, _)| Path::new(&volume.mount).components().count());
    let options = |volume: &Volume| if volume.read_only { &["nodev", "ro"][..] } else { &["nodev"][..] };
    all.into_iter().map(|(volume, from)| bind(from, &volume.mount, options(volume))).collect()
}

fn resources(pod: &Pod, container: &Container) -> Value {
    let ContainerSpec { resources, limits, .. } = container.spec;
    let shares = (resources.cpu.0 * 1024 / 1000).clamp(CPU_SHARES_MIN, CPU_SHARES_MAX);
    let high = cgroup::memory_high(limits.memory).0;
    let mut memory = json!({"limit": limits.memory.0});
    if !pod.v2 {
        memory["reservation"] = json!(resources.memory.0.min(high));
        if pod.swap {
            // The sum of both: none beyond memory.
            memory["swap"] = json!(limits.memory.0);
        }
    }
    let mut devices = vec![json!({"allow": false, "access": "rwm"})];
    devices.extend(container.devices.iter().map(|device| {
        json!({
            "allow": true, "access": "rw",
            "type": device["type"], "major": device["major"], "minor": device["minor"],
        })
    }));
    let mut all = json!({
        // The limit comes with the program's start (`Container::start`).
        "cpu": {"shares": shares},
        "memory": memory,
        "pids": {"limit": pids_max(pod.machine_pids)},
        "devices": devices,
    });
    if pod.v2 {
        // libcontainer takes v2's limit of 0 on swap for none given.
        let mut unified = json!({"memory.high": high.to_string()});
        if pod.swap {
            unified["memory.swap.max"] = json!("0");
        }
        all["unified"] = unified;
    }
    all
}

fn pids_max(of_machine: u64) -> u64 {
    (of_machine / PIDS_SHARE).clamp(1, PIDS_MAX)
}

/// Does the pod have a network namespace of its own?
pub fn own_network(template: &PodTemplate) -> bool {
    template.network != Network::Host
}

//! Makes a pod's containers, in the order in which each step needs the one before; nothing runs yet.

use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use berth_protocol::checkpoint::CheckpointKind;
use berth_protocol::job::ContainerSpec;
use serde_json::{Value, json};

use super::cgroup::Cgroup;
use super::checkpoint::archive;
use super::checkpoint::restore::{self, Revival};
use super::checkpoint::{Parts, dump};
use super::container::{self, Container};
use super::devices;
use super::error::ShimError;
use super::init::Init;
use super::mountpoints;
use super::network;
use super::process::{self, UserError};
use super::rootfs::{self, Home, Inside, View};
use super::seccomp;
use super::secrets;
use super::spec::{self, Pod};
use super::sys;
use super::users::{Range, Users};
use super::volumes;
use crate::task::{ImageProcess, Root, SavedDevices, Task, file};

/// Of directories that whoever becomes a container has to pass; what they are in is seen by nobody else.
const PASSABLE: u32 = 0o711;

/// The pod as it waits for its start.
pub struct Made {
    pub init: Init,
    pub containers: Vec<Container>,
    /// Containers that are to come back from a checkpoint instead.
    pub revivals: Vec<Revival>,
    /// Memory of theirs that is to come back onto GPUs.
    pub devices: Option<SavedDevices>,
}

/// On an error the caller takes away what was made: the shim's mounts end with it, `end` removes the rest.
pub fn create(task: &Task, dir: &Path, cgroup: &Cgroup) -> Result<Made, ShimError> {
    rootfs::enter_private_mounts().map_err(ShimError::Namespace)?;
    rootfs::mount_run(dir)?;
    let saved = task.restore.then(|| restore::read(task, dir)).transpose()?;
    let init = begin(task, dir, saved.as_ref().map(|saved| saved.kind))?;
    let users = init.users.as_ref();
    let own_network = spec::own_network(&task.template);
    let network = own_network.then(|| network::set_up(task, dir, &init)).transpose()?;
    super::make_groups(task)?;
    // What saved itself begins as any program does, with its files as they were.
    let saved_by_criu = saved.filter(|saved| saved.kind == CheckpointKind::Criu);
    let mut begun = None;
    if let Some(first) = saved_by_criu.as_ref().and_then(|saved| saved.containers.first()) {
        let name = network.map(|name| dir.join(name));
        let own = super::container_cgroup(task, cgroup, &first.name);
        // What fails here is tried again, and said, when its time has come.
        begun = restore::begin(task, dir, &init, name.as_deref(), first, &own).ok();
    }
    network::write_files(task, dir).map_err(ShimError::io("write below", dir.join(file::ETC_DIR)))?;
    prepare_berth(task, dir, users).map_err(ShimError::io("prepare /run/berth in", dir))?;
    secrets::lay_out(task, dir)
        .map_err(ShimError::io("lay out secrets below", dir.join(file::SECRETS_DIR)))?;
    volumes::prepare(task, dir, users, saved_by_criu.is_some())?;
    if task.restore {
        restore::fill_volumes(task, dir)?;
    }
    let state = dir.join(file::STATE_DIR);
    rootfs::make_dir(&state, PASSABLE)?;
    let specs = || task.template.containers.iter();
    let furnished = specs().zip(&task.roots).map(|(spec, root)| furnish(task, dir, (spec, root), users));
    let furnished = furnished.collect::<Result<Vec<_>, _>>()?;
    if !cgroup.is_v2() {
        for spec in specs() {
            let own = super::container_cgroup(task, cgroup, &spec.name);
            rootfs::mount_cgroups(&own.dirs(), &Home::new(dir, &spec.name))?;
        }
    }
    let staged = users.map(|users| hand_over(dir, &init, users)).transpose();
    let staged = staged.map_err(ShimError::io("hand over to the pod's users", dir))?;
    let pod = Pod {
        task,
        dir,
        seen: staged.as_deref().unwrap_or(dir),
        users: users.is_some(),
        namespaces: match &staged {
            Some(staged) => staged.join(file::NAMESPACES_DIR),
            None => PathBuf::from(init.namespace("")),
        },
        network: network.map(|name| staged.as_deref().unwrap_or(dir).join(name)),
        v2: cgroup.is_v2(),
        swap: cgroup.accounts_swap(),
        nofile_hard: nofile_hard(),
        machine_pids: machine_pids(),
    };
    let (mut containers, mut revivals) = (Vec::new(), Vec::new());
    for (index, (spec, furnished)) in specs().zip(&furnished).enumerate() {
        let own = super::container_cgroup(task, cgroup, &spec.name);
        let oci = describe(&pod, furnished, &own)?;
        match &saved_by_criu {
            Some(saved) => {
                let container = &saved.containers[index];
                revivals.push(Revival::prepare(&pod, spec, container, &oci, (own, &init, begun.take()))?);
            }
            None => containers.push(container(dir, spec, own, users, &oci)?),
        }
    }
    Ok(Made { init, containers, revivals, devices: saved_by_criu.and_then(|saved| saved.devices) })
}

/// Makes the pod's namespaces; users of its own are among them where that is possible. `saved`: what it comes back from.
fn begin(task: &Task, dir: &Path, saved: Option<CheckpointKind>) -> Result<Init, ShimError> {
    let nothing = dir.join(file::NOTHING_DIR);
    rootfs::make_dir(&nothing, PASSABLE)?;
    let (hostname, own_network) = (spec::hostname(task), spec::own_network(&task.template));
    let spawn = |range| Init::spawn(&hostname, own_network, range, &nothing).map_err(ShimError::Namespace);
    let Some(range) = Range::take(task, saved) else { return spawn(None) };
    match spawn(Some(range)) {
        Ok(init) if init.users.as_ref().is_some_and(|users| users.can_map_all(task, dir)) => Ok(init),
        // The kernel may forbid it, or a file system not be able to.
        _ => spawn(None),
    }
}

/// What the pod's root may change of what berth has made for it, and all that is to be seen by its processes.
fn hand_over(dir: &Path, init: &Init, users: &Users) -> io::Result<PathBuf> {
    users.give(&dir.join(file::ETC_DIR))?;
    users.give(&dir.join(file::BERTH_DIR))?;
    let secrets = dir.join(file::SECRETS_DIR);
    if secrets.exists() {
        users.give(&secrets)?;
    }
    rootfs::stage(dir, init)
}

/// Makes a container of what `furnish` and `describe` have left.
fn container(
    dir: &Path,
    spec: &ContainerSpec,
    own: Cgroup,
    users: Option<&Users>,
    oci: &Value,
) -> Result<Container, ShimError> {
    let texts = |what: &Value| -> Vec<String> {
        what.as_array().into_iter().flatten().filter_map(Value::as_str).map(str::to_owned).collect()
    };
    let process = &oci["process"];
    let home = Home::new(dir, &spec.name);
    mountpoints::settle(&home.rootfs(), users, oci)?;
    Container::create(container::Plan {
        name: &spec.name,
        home: &home,
        state: &dir.join(file::STATE_DIR),
        cgroup: own,
        command: process["args"][0].as_str().unwrap_or_default(),
        env: &texts(&process["env"]),
        filter: seccomp::filter(&spec::capabilities(spec)),
        cpu_max: spec.limits.cpu,
    })
}

/// A container whose processes have ended, made anew where it was, its files as they left them.
pub fn again(
    dir: &Path,
    spec: &ContainerSpec,
    own: Cgroup,
    users: Option<&Users>,
) -> Result<Container, ShimError> {
    let state = dir.join(file::STATE_DIR).join(spec.name.as_str());
    match fs::remove_dir_all(&state) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(ShimError::io("clear", &state)(e)),
        _ => {}
    }
    let home = Home::new(dir, &spec.name);
    let oci = dump::config(&home).map_err(ShimError::io("read the configuration in", home.dir()))?;
    container(dir, spec, own, users, &oci)
}

/// Makes a container's file system and finds out in it what its program is to be.
fn furnish<'a>(
    task: &Task,
    dir: &Path,
    (spec, root): (&'a ContainerSpec, &'a Root),
    users: Option<&Users>,
) -> Result<spec::Container<'a>, ShimError> {
    let home = Home::new(dir, &spec.name);
    rootfs::make_dir(home.dir(), PASSABLE)?;
    let parts = task.restore.then(|| Parts::to_restore(dir));
    let written = parts.as_ref().map(|parts| parts.upper(&spec.name));
    rootfs::mount_root(root, &home, View { users, written: written.as_deref() })?;
    if let Some(workspace) = &task.workspace {
        let written = parts.as_ref().map(|parts| parts.workspace(&spec.name));
        rootfs::mount_workspace(workspace, &home, View { users, written: written.as_deref() })?;
    }
    let none = ImageProcess::default();
    let image = match root {
        Root::Host => &none,
        Root::Image { config, .. } => config,
    };
    let inside = Inside::open(&home.rootfs(), users)?;
    let wanted = spec.user.as_deref().or(image.user.as_deref()).unwrap_or_default();
    let user = process::user(wanted, &inside.read("/etc/passwd"), &inside.read("/etc/group"))
        .and_then(|user| {
            let beyond = UserError::Beyond { name: wanted.to_owned(), uid: user.uid, gid: user.gid };
            if users.is_some() { Users::admit(user).ok_or(beyond) } else { Ok(user) }
        })
        .map_err(|source| ShimError::User { container: spec.name.clone(), source })?;
    let given_dir = spec.working_dir.as_deref().or(image.working_dir.as_deref());
    let cwd = given_dir.filter(|dir| dir.starts_with('/')).unwrap_or("/");
    inside.make_dirs(cwd, user.uid, user.gid).map_err(ShimError::io("make the working directory", cwd))?;
    for name in ["hostname", "hosts", "resolv.conf"] {
        inside.make_mount_file("/etc", name).map_err(ShimError::io("make in the image", "/etc"))?;
    }
    let args = process::args(spec, image);
    if args.is_empty() {
        return Err(ShimError::NoCommand { container: spec.name.clone() });
    }
    let granted = devices::direct(&task.devices)?;
    let hostname = spec::hostname(task);
    let env = process::env(spec, image, granted.env.into_iter(), &hostname, &user.home, task.pod.index);
    Ok(spec::Container {
        spec,
        root,
        args,
        env,
        user,
        cwd: cwd.to_owned(),
        devices: granted.nodes,
        device_files: granted.files,
    })
}

/// Writes a container's configuration, which is returned.
fn describe(pod: &Pod, container: &spec::Container, own: &Cgroup) -> Result<Value, ShimError> {
    let home = Home::new(pod.dir, &container.spec.name);
    let oci = devices::inject(&pod.task.devices, spec::oci(pod, container, &own.absolute()))?;
    let config = home.dir().join("config.json");
    fs::write(&config, oci.to_string()).map_err(ShimError::io("write", &config))?;
    Ok(oci)
}

/// What a program may want to know about itself and its environment cannot say, since it may change, and where what it
/// saves for itself is kept: in every container below `/run/berth`.
fn prepare_berth(task: &Task, dir: &Path, users: Option<&Users>) -> io::Result<()> {
    let (berth, kept) = (dir.join(file::BERTH_DIR), dir.join(file::CHECKPOINT_DIR));
    clear(&kept)?;
    fs::create_dir(&berth)?;
    let archive = Parts::to_restore(dir).kept();
    if task.restore && archive.exists() {
        archive::unpack(&archive, &kept)?;
    }
    // For any user of the container, as /tmp is.
    for dir in [&berth, &kept] {
        fs::set_permissions(dir, fs::Permissions::from_mode(0o1777))?;
    }
    let shown = berth.join(file::CHECKPOINT_DIR);
    rootfs::show(&kept, &shown, users)?;
    rootfs::restrict(&shown, rootfs::HARMLESS)?;
    let template = &task.template;
    let facts = json!({
        "namespace": template.namespace,
        "job": template.job,
        "pod": template.job.pod(task.pod.index),
        "index": task.pod.index,
        "epoch": task.epoch,
        "run": task.run,
        "restarts": task.restarts + task.run.0.saturating_sub(1),
        "node": task.node,
        "addresses": network::addresses(task)?,
        "userNamespace": users.is_some(),
        "checkpointDir": Path::new("/run/berth").join(file::CHECKPOINT_DIR),
    });
    fs::write(berth.join(file::POD), format!("{facts}\n"))
}

fn clear(dir: &Path) -> io::Result<()> {
    match fs::remove_dir_all(dir) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
        _ => super::make_private_dir(dir),
    }
}

/// The lower of the two bounds that the kernel has; one that cannot be read is none.
fn machine_pids() -> u64 {
    let bounds = ["/proc/sys/kernel/pid_max", "/proc/sys/kernel/threads-max"];
    let read = |path: &str| fs::read_to_string(path).ok()?.trim().parse().ok();
    bounds.into_iter().filter_map(read).min().unwrap_or(u64::MAX)
}

fn nofile_hard() -> u64 {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the pointer is to a local.
    match unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit) } {
        0 => sys::wide(limit.rlim_max),
        _ => 1024,
    }
}

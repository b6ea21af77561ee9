//! Makes a pod's containers, in the order in which each step needs the one before; nothing runs yet.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use berth_protocol::job::ContainerSpec;
use serde_json::json;

use super::cgroup::Cgroup;
use super::container::{self, Container};
use super::devices;
use super::error::ShimError;
use super::init::Init;
use super::network;
use super::process;
use super::rootfs::{self, Home, Inside};
use super::seccomp;
use super::spec::{self, Pod};
use crate::task::{ImageProcess, Root, Task};

/// The pod as it waits for its start.
pub struct Made {
    pub init: Init,
    pub containers: Vec<Container>,
}

/// On an error the caller takes away what was made: the shim's mounts end with it, `end` removes the rest.
pub fn create(task: &Task, dir: &Path, cgroup: &Cgroup) -> Result<Made, ShimError> {
    let own_network = spec::own_network(&task.template);
    rootfs::enter_private_mounts().map_err(ShimError::Namespace)?;
    cgroup.create()?;
    let init = Init::spawn(&spec::hostname(task), own_network).map_err(ShimError::Namespace)?;
    let network = own_network.then(|| network::set_up(task, dir, &init)).transpose()?;
    network::write_files(task, dir).map_err(ShimError::io("write below", dir.join("etc")))?;
    write_pod_file(task, dir).map_err(ShimError::io("write below", dir.join("berth")))?;
    rootfs::prepare_volumes(task, dir)?;
    let state = dir.join("state");
    clear(&state).map_err(ShimError::io("clear", &state))?;
    let pod = Pod {
        task,
        dir,
        namespaces: PathBuf::from(init.namespace("")),
        network,
        v2: cgroup.is_v2(),
        swap: cgroup.accounts_swap(),
        nofile_hard: nofile_hard(),
    };
    let mut containers = Vec::new();
    for (container, root) in task.template.containers.iter().zip(&task.roots) {
        containers.push(create_container(&pod, container, root, &state, cgroup)?);
    }
    Ok(Made { init, containers })
}

fn create_container(
    pod: &Pod,
    spec: &ContainerSpec,
    root: &Root,
    state: &Path,
    cgroup: &Cgroup,
) -> Result<Container, ShimError> {
    let home = Home::new(pod.dir, &spec.name);
    super::make_private_dir(home.dir()).map_err(ShimError::io("make", home.dir()))?;
    rootfs::mount_root(root, &home)?;
    if let Some(workspace) = &pod.task.workspace {
        rootfs::mount_workspace(workspace, &home)?;
    }
    let none = ImageProcess::default();
    let image = match root {
        Root::Host => &none,
        Root::Image { config, .. } => config,
    };
    let inside = Inside::open(&home.rootfs())?;
    let wanted = spec.user.as_deref().or(image.user.as_deref()).unwrap_or_default();
    let user = process::user(wanted, &inside.read("/etc/passwd"), &inside.read("/etc/group"))
        .map_err(|source| ShimError::User { container: spec.name.clone(), source })?;
    let given_dir = spec.working_dir.as_deref().or(image.working_dir.as_deref());
    let cwd = given_dir.filter(|dir| dir.starts_with('/')).unwrap_or("/");
    inside.make_dirs(cwd, user.uid, user.gid).map_err(ShimError::io("make the working directory", cwd))?;
    for name in ["hostname", "hosts", "resolv.conf"] {
        inside.make_mount_file("/etc", name).map_err(ShimError::io("make in the image", "/etc"))?;
    }
    let args = process::args(spec, image);
    let command = args.first().ok_or_else(|| ShimError::NoCommand { container: spec.name.clone() })?.clone();
    let granted = devices::direct(&pod.task.devices)?;
    let hostname = spec::hostname(pod.task);
    let env = process::env(spec, image, granted.env.into_iter(), &hostname, &user.home, pod.task.pod.index);
    let container = spec::Container {
        spec,
        root,
        args,
        env: env.clone(),
        user,
        cwd: cwd.to_owned(),
        devices: granted.nodes,
        device_files: granted.files,
    };
    let own = cgroup.child(spec.name.as_str());
    if !own.is_v2() {
        own.create()?;
        rootfs::mount_cgroups(&own.dirs(), &home)?;
    }
    let oci = devices::inject(&pod.task.devices, spec::oci(pod, &container, &own.absolute()))?;
    let config = home.dir().join("config.json");
    fs::write(&config, oci.to_string()).map_err(ShimError::io("write", &config))?;
    let filter = seccomp::filter(&spec::capabilities(spec));
    let name = &spec.name;
    Container::create(container::Plan {
        name,
        home: &home,
        state,
        cgroup: own,
        command: &command,
        env: &env,
        filter,
        cpu_max: spec.limits.cpu,
    })
}

/// What a program may want to know about itself and its environment cannot say, since it may change: in every
/// container as `/run/berth/pod.json`.
fn write_pod_file(task: &Task, dir: &Path) -> io::Result<()> {
    let berth = dir.join("berth");
    clear(&berth)?;
    let template = &task.template;
    let facts = json!({
        "namespace": template.namespace,
        "job": template.job,
        "pod": template.job.pod(task.pod.index),
        "index": task.pod.index,
        "epoch": task.epoch,
        "run": task.run,
        "restarts": task.run.0.saturating_sub(1),
        "node": task.node,
    });
    fs::write(berth.join("pod.json"), format!("{facts}\n"))?;
    // Any user of the container may leave a mark here.
    fs::set_permissions(&berth, std::os::unix::fs::PermissionsExt::from_mode(0o1777))
}

fn clear(dir: &Path) -> io::Result<()> {
    match fs::remove_dir_all(dir) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
        _ => super::make_private_dir(dir),
    }
}

fn nofile_hard() -> u64 {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the pointer is to a local.
    match unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit) } {
        0 => limit.rlim_max,
        _ => 1024,
    }
}

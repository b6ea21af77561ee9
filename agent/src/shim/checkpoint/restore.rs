//! Brings one container back: everything that CRIU is to find there, made anew from the pod's specification, and what
//! CRIU is told. Of the checkpoint come the images, the written files and names, nothing else.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, chown};
use std::path::{Path, PathBuf};

use berth_protocol::ids::{ContainerName, PodId};
use berth_protocol::job::ContainerSpec;
use berth_protocol::log::Stream;
use berth_protocol::units::MilliCpu;
use libcgroups::common::{CgroupConfig, CgroupManager, ControllerOpt, create_cgroup_manager};
use libcontainer::oci_spec::runtime::LinuxResources;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::unistd::{Pid, pipe2};
use serde_json::Value;

use super::super::cgroup::{Cgroup, CgroupError};
use super::super::container::Container;
use super::super::devices;
use super::super::error::ShimError;
use super::super::init::Init;
use super::super::pump::Pump;
use super::super::rootfs::{self, Home};
use super::super::spec::Pod;
use super::super::sys;
use super::criu::{Criu, INHERITED_FD, Place};
use super::dump::{self, NETWORK, NOTHING, PIDS};
use super::rpc::{Call, Options};
use super::{Parts, archive};
use crate::task::{Saved, SavedContainer, Task};

/// Reads what the shim that saved has said.
pub fn read(task: &Task, dir: &Path) -> Result<Saved, ShimError> {
    let read =
        || -> io::Result<Saved> { Ok(serde_json::from_slice(&fs::read(Parts::to_restore(dir).saved())?)?) };
    let saved = read().map_err(ShimError::Checkpoint)?;
    let names = saved.containers.iter().map(|container| &container.name);
    if !names.eq(task.template.containers.iter().map(|container| &container.name)) {
        let other = io::Error::other("its containers are not the job's");
        return Err(ShimError::Checkpoint(other));
    }
    Ok(saved)
}

/// Brings the files of scratch volumes back, and of those that are saved with the pod.
pub fn fill_volumes(task: &Task, dir: &Path) -> Result<(), ShimError> {
    let parts = Parts::to_restore(dir);
    for (index, (volume, given)) in task.template.volumes.iter().zip(&task.volumes).enumerate() {
        let archive = parts.volume(index);
        match given {
            None => {
                let at = rootfs::volume_dir(dir, index);
                archive::unpack(&archive, &at)
                    .map_err(ShimError::io("bring back what was written in", at))?;
            }
            // What was written in it since belongs to work that is done again.
            Some(at) if volume.save => {
                set_back(&archive, at, &task.pod).map_err(ShimError::io("set back", at))?;
            }
            Some(_) => {}
        }
    }
    Ok(())
}

/// Puts what an archive holds in place of what is in a named volume. Other pods of the job may be at work there and make
/// links of directories under `tar`'s hands, so that unpacks beside it; but where the volume is a disk of its own.
fn set_back(archive: &Path, volume: &Path, pod: &PodId) -> io::Result<()> {
    let parent = volume.parent().ok_or(io::ErrorKind::InvalidInput)?;
    if fs::metadata(parent)?.dev() != fs::metadata(volume)?.dev() {
        clear(volume)?;
        return archive::unpack(archive, volume);
    }
    // No volume's name begins so.
    let beside = parent.join(format!(".restored-{pod}"));
    fs::create_dir_all(&beside)?;
    clear(&beside)?;
    archive::unpack(archive, &beside)?;
    clear(volume)?;
    for entry in fs::read_dir(&beside)? {
        let entry = entry?;
        fs::rename(entry.path(), volume.join(entry.file_name()))?;
    }
    let own = fs::metadata(&beside)?;
    chown(volume, Some(own.uid()), Some(own.gid()))?;
    fs::set_permissions(volume, own.permissions())?;
    fs::remove_dir(&beside)
}

/// Removes all that is in a directory.
fn clear(dir: &Path) -> io::Result<()> {
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        match entry.file_type()?.is_dir() {
            true => fs::remove_dir_all(entry.path())?,
            false => fs::remove_file(entry.path())?,
        }
    }
    Ok(())
}

/// What criu is to find open, at the numbers from `INHERITED_FD` on.
struct Inherited {
    fds: Vec<OwnedFd>,
    /// What the images know them by.
    names: Vec<String>,
    pumps: [Pump; 2],
}

impl Inherited {
    fn new(init: &Init, network: Option<&Path>, saved: &SavedContainer) -> io::Result<Self> {
        let (mut fds, mut names) = (Vec::new(), Vec::new());
        let mut add = |name: &str, fd: OwnedFd| {
            names.push(name.to_owned());
            fds.push(fd);
        };
        add(PIDS, File::open(init.namespace("pid"))?.into());
        if let Some(network) = network {
            add(NETWORK, File::open(network)?.into());
        }
        let mut pump = |index: usize, stream| -> io::Result<Pump> {
            let Some(Some(name)) = saved.pipes.get(index) else { return Ok(Pump::closed(stream)) };
            let (read, write) = pipe2(OFlag::O_CLOEXEC)?;
            fcntl(&read, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
            add(name, write);
            Ok(Pump::new(read, stream))
        };
        let pumps = [pump(0, Stream::Stdout)?, pump(1, Stream::Stderr)?];
        Ok(Self { fds, names, pumps })
    }
}

/// A criu that gets ready while there is still to be made what it will find.
pub struct Begun {
    criu: Criu,
    inherited: Inherited,
}

/// Begins the criu of a pod's first container. `network` is its network namespace's file.
pub fn begin(
    task: &Task,
    dir: &Path,
    init: &Init,
    network: Option<&Path>,
    saved: &SavedContainer,
    cgroup: &Cgroup,
) -> io::Result<Begun> {
    make_group(cgroup).map_err(io::Error::other)?;
    let inherited = Inherited::new(init, network, saved)?;
    let images = Parts::to_restore(dir).images(&saved.name);
    let criu = begin_criu(program(task), &images, &inherited, cgroup)?;
    Ok(Begun { criu, inherited })
}

fn begin_criu(program: &Path, images: &Path, inherited: &Inherited, cgroup: &Cgroup) -> io::Result<Criu> {
    let fds: Vec<_> = inherited.fds.iter().map(AsFd::as_fd).collect();
    let place = Place { time: host_time(), cgroups: cgroup.dirs() };
    Criu::begin(program, Call::Restore, images, &fds, place)
}

pub fn program(task: &Task) -> &Path {
    task.criu.as_deref().unwrap_or(Path::new("criu"))
}

/// A container that waits to be brought back.
pub struct Revival {
    pub name: ContainerName,
    images: PathBuf,
    cgroup: Cgroup,
    options: Options,
    inherited: Inherited,
    /// One that was begun early.
    criu: Option<Criu>,
    cpu_max: MilliCpu,
    /// The nodes of what it is given here, as in the OCI configuration.
    devices: Vec<Value>,
}

impl Revival {
    pub fn prepare(
        pod: &Pod,
        spec: &ContainerSpec,
        saved: &SavedContainer,
        oci: &Value,
        (cgroup, init, begun): (Cgroup, &Init, Option<Begun>),
    ) -> Result<Self, ShimError> {
        let failed =
            |e: io::Error| ShimError::Restore { container: spec.name.clone(), message: e.to_string() };
        let home = Home::new(pod.dir, &spec.name);
        let mut options = Options::default();
        options.root(home.rootfs().as_os_str().as_bytes()).sibling().evasive_devices();
        options.ignore_cgroups().file_locks().link_remap().orphan_pts_master().no_network_lock();
        dump::tcp(&mut options, pod.task);
        for name in &saved.mounts {
            let source = source(oci, name).map_err(failed)?;
            options.external_mount(name, source.as_os_str().as_bytes());
        }
        options.external_mount(NOTHING, NOTHING.as_bytes());
        let (criu, inherited) = match begun {
            Some(Begun { criu, inherited }) => (Some(criu), inherited),
            None => (None, Inherited::new(init, pod.network.as_deref(), saved).map_err(failed)?),
        };
        for (name, number) in inherited.names.iter().zip(INHERITED_FD..) {
            options.inherit(name, number);
        }
        limit(&cgroup, oci)
            .map_err(|message| ShimError::Restore { container: spec.name.clone(), message })?;
        let images = Parts::to_restore(pod.dir).images(&spec.name);
        let (name, cpu_max) = (spec.name.clone(), spec.limits.cpu);
        let devices = oci["linux"]["devices"].as_array().cloned().unwrap_or_default();
        Ok(Self { name, images, cgroup, options, inherited, criu, cpu_max, devices })
    }

    pub fn cgroup(&self) -> &Cgroup {
        &self.cgroup
    }

    /// Asks criu to bring it back; a pod's later containers share the first one's namespaces.
    pub fn start(&mut self, program: &Path, first: Option<Pid>) -> io::Result<Criu> {
        let mut options = self.options.clone();
        if let Some(first) = first {
            for kind in
                ["ipc", "uts", "time"].iter().filter(|kind| Path::new("/proc/self/ns").join(kind).exists())
            {
                options.join(kind, &format!("/proc/{first}/ns/{kind}"));
            }
        }
        let mut criu = match self.criu.take() {
            Some(criu) => criu,
            None => begin_criu(program, &self.images, &self.inherited, &self.cgroup)?,
        };
        criu.ask(options);
        Ok(criu)
    }

    /// criu says that it is back: look whether that is so.
    pub fn finish(self, pid: Pid, init: &Init, own_network: bool) -> Result<Container, ShimError> {
        let failed = |message: String| ShimError::Restore { container: self.name.clone(), message };
        let pidfd = match sys::pidfd(pid.as_raw()) {
            Ok(pidfd) => pidfd,
            // It has ended already, and was reaped: any descriptor that becomes readable does.
            Err(_) => {
                let (read, _) = pipe2(OFlag::O_CLOEXEC).map_err(|e| failed(e.to_string()))?;
                return Ok(Container::revived(
                    self.name,
                    pid,
                    read,
                    self.cgroup,
                    self.inherited.pumps,
                    self.cpu_max,
                ));
            }
        };
        let same = |kind: &str| {
            let of = |pid: Pid| fs::read_link(format!("/proc/{pid}/ns/{kind}")).ok();
            of(pid).is_none_or(|namespace| Some(namespace) == of(init.pid))
        };
        let shared = if own_network { &["pid", "net"][..] } else { &["pid"] };
        if let Some(kind) = shared.iter().find(|kind| !same(kind)) {
            return Err(failed(format!("it came back in another {kind} namespace than the pod's")));
        }
        if self.cgroup.processes().is_ok_and(|all| !all.contains(&pid)) && sys::is_alive(&pidfd) {
            return Err(failed("it came back outside its control group".to_owned()));
        }
        // Another node, or another day, gives it other devices of the same kind.
        devices::settle(pid, &self.devices).map_err(|e| failed(format!("cannot make its devices: {e}")))?;
        self.cgroup.limit_cpu(self.cpu_max)?;
        Ok(Container::revived(self.name, pid, pidfd, self.cgroup, self.inherited.pumps, self.cpu_max))
    }
}

/// The host's time namespace, where the kernel has them: this process's children enter the pod's.
pub fn host_time() -> Option<File> {
    File::open("/proc/self/ns/time").ok()
}

/// What the configuration binds at `name`, or at a part of it.
fn source(oci: &Value, name: &str) -> io::Result<PathBuf> {
    let mounts = oci["mounts"].as_array().into_iter().flatten().filter(|mount| dump::is_bind(mount));
    let found = mounts
        .filter_map(|mount| Some((mount["destination"].as_str()?, mount["source"].as_str()?)))
        .filter_map(|(at, from)| Some((at, from, Path::new(name).strip_prefix(at).ok()?)))
        .max_by_key(|(at, ..)| at.len());
    let Some((_, from, rest)) = found else {
        return Err(io::Error::other(format!("it has a mount at {name}, which the job does not")));
    };
    // Joining nothing would ask for a directory.
    let whole = Path::new(from);
    fs::canonicalize(if rest.as_os_str().is_empty() { whole.to_owned() } else { whole.join(rest) })
        .map_err(|e| io::Error::other(format!("what was mounted at {name} is not here: {e}")))
}

/// Makes the container's groups with its limits, for criu to enter.
fn make_group(cgroup: &Cgroup) -> Result<(), CgroupError> {
    cgroup.create()?;
    cgroup.fill_cpuset()
}

fn limit(cgroup: &Cgroup, oci: &Value) -> Result<(), String> {
    let resources: LinuxResources =
        serde_json::from_value(oci["linux"]["resources"].clone()).map_err(|e| e.to_string())?;
    make_group(cgroup).map_err(|e| e.to_string())?;
    let config =
        CgroupConfig { cgroup_path: cgroup.absolute(), systemd_cgroup: false, container_name: String::new() };
    let options = ControllerOpt {
        resources: &resources,
        disable_oom_killer: false,
        oom_score_adj: None,
        freezer_state: None,
    };
    let manager = create_cgroup_manager(config).map_err(|e| e.to_string())?;
    manager.apply(&options).map_err(|e| format!("cannot set its limits: {e}"))
}

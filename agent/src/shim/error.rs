//! Why a pod could not be made, as its outcome tells it: a reason for programs, a message for people.

use std::io;
use std::path::PathBuf;

use berth_protocol::ids::ContainerName;
use berth_protocol::limits::HUMAN_MESSAGE_BYTES_MAX;
use berth_protocol::pod::{Cause, RESTORE_FAILED};
use berth_protocol::units::Bytes;

use super::cgroup::CgroupError;

#[derive(Debug, thiserror::Error)]
pub enum ShimError {
    #[error("container {container}: no command: neither the job nor the image names one; give `command`")]
    NoCommand { container: ContainerName },
    #[error(
        "container {container}: command `{command}` not found; check its spelling and the image's PATH `{path}`"
    )]
    CommandNotFound { container: ContainerName, command: String, path: String },
    #[error("container {container}: cannot execute `{command}`: {source}; {hint}")]
    CommandNotExecutable { container: ContainerName, command: String, source: io::Error, hint: &'static str },
    #[error("container {container}: {source}")]
    User { container: ContainerName, source: super::process::UserError },
    #[error("container {container}: cannot create it: {message}")]
    Create { container: ContainerName, message: String },
    #[error(
        "container {container}: the seccomp filter is refused: {source}; the kernel needs CONFIG_SECCOMP_FILTER"
    )]
    Seccomp { container: ContainerName, source: io::Error },
    #[error("container {container} cannot be brought back from its checkpoint: {message}")]
    Restore { container: ContainerName, message: String },
    #[error("the checkpoint cannot be read: {0}")]
    Checkpoint(io::Error),
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    #[error(
        "cannot make the pod's namespaces: {0}; berth-agent needs root and a kernel with pid, ipc, uts and net namespaces"
    )]
    Namespace(io::Error),
    #[error("cannot set up the network: {0}")]
    Network(#[from] super::network::NetworkError),
    #[error("volume {mount}: {path} is not there on this node; create it, or keep the job off this node")]
    VolumeMissing { mount: String, path: PathBuf },
    #[error(
        "volume {mount}: there is a symbolic link on the way to {path} that was not there when the node allowed it"
    )]
    VolumeMoved { mount: String, path: PathBuf },
    #[error("nothing can be mounted at {mount}: {why}; choose another place")]
    MountPoint { mount: String, why: &'static str },
    #[error(
        "a layer of the image is not at {path}; it may have been removed by hand: the image must be pulled again"
    )]
    LayerMissing { path: PathBuf },
    #[error("{what} has grown beyond {max}; ask for more, or write less")]
    ScratchFull { what: String, max: Bytes },
    #[error("device {device}: {message}")]
    Device { device: String, message: String },
    #[error("container {container} ended with code {code} as a dump of it was broken off")]
    DumpInterrupted { container: ContainerName, code: u8 },
    #[error("{message}")]
    DeviceMemory { message: String },
    #[error("cannot {what} {path}: {source}")]
    Io { what: &'static str, path: PathBuf, source: io::Error },
}

impl ShimError {
    pub fn io(what: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| ShimError::Io { what, path, source }
    }

    fn source_errno(&self) -> Option<i32> {
        match self {
            ShimError::Io { source, .. } | ShimError::Namespace(source) => source.raw_os_error(),
            ShimError::Cgroup(CgroupError::Io { source, .. }) => source.raw_os_error(),
            _ => None,
        }
    }

    fn disk_full(&self) -> bool {
        let by_message =
            matches!(self, ShimError::Create { message, .. } if message.contains("No space left on device"));
        by_message || matches!(self.source_errno(), Some(libc::ENOSPC | libc::EDQUOT))
    }

    /// The outcome's reason.
    pub fn reason(&self) -> &'static str {
        match self {
            ShimError::CommandNotFound { .. } | ShimError::NoCommand { .. } => "CommandNotFound",
            ShimError::CommandNotExecutable { .. } => "CommandNotExecutable",
            ShimError::User { .. } => "UserNotFound",
            ShimError::Seccomp { .. } => "SeccompUnavailable",
            ShimError::Cgroup(_) => "CgroupUnavailable",
            ShimError::Network(_) => "NetworkUnavailable",
            ShimError::VolumeMissing { .. } => "VolumeMissing",
            ShimError::VolumeMoved { .. } => "VolumeForbidden",
            ShimError::MountPoint { .. } => "MountForbidden",
            ShimError::LayerMissing { .. } => "ImageMissing",
            ShimError::Device { .. } => "DeviceUnavailable",
            ShimError::DeviceMemory { .. } => "DeviceMemoryLost",
            ShimError::DumpInterrupted { .. } => "DumpInterrupted",
            ShimError::Restore { .. } | ShimError::Checkpoint(_) => RESTORE_FAILED,
            ShimError::ScratchFull { .. } => "ScratchFull",
            _ if self.disk_full() => "DiskFull",
            ShimError::Create { .. } | ShimError::Io { .. } | ShimError::Namespace(_) => {
                "ContainerCreateFailed"
            }
        }
    }

    /// Is it the job that asks for what is not there, the node that lacks something, or neither's doing: another
    /// checkpoint, or node, may serve?
    pub fn cause(&self) -> Cause {
        match self {
            ShimError::CommandNotFound { .. }
            | ShimError::NoCommand { .. }
            | ShimError::CommandNotExecutable { .. }
            | ShimError::User { .. }
            | ShimError::MountPoint { .. }
            | ShimError::ScratchFull { .. } => Cause::Failure,
            ShimError::Restore { .. }
            | ShimError::Checkpoint(_)
            | ShimError::DeviceMemory { .. }
            | ShimError::DumpInterrupted { .. } => Cause::Eviction,
            _ => Cause::Fault,
        }
    }

    /// The code that a shell would give, where the command itself was the matter.
    pub fn exit_code(&self) -> Option<u8> {
        match self {
            ShimError::CommandNotFound { .. } | ShimError::NoCommand { .. } => Some(127),
            ShimError::CommandNotExecutable { .. } => Some(126),
            _ => None,
        }
    }

    pub fn message(&self) -> String {
        let mut text = self.to_string();
        if self.disk_full() {
            text.push_str(
                "; the node's disk is full: free some space, or give the agent another data directory",
            );
        }
        let end = text.floor_char_boundary(HUMAN_MESSAGE_BYTES_MAX);
        text.truncate(end);
        text
    }
}

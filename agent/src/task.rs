//! What the agent and its shims say to each other: the task file, the control socket, the exit file.
//!
//! A pod's directory, `pods/{uid}-{index}.{epoch}/`, is its shim's home:
//!
//! | name | written by | what |
//! |---|---|---|
//! | `task.json` | agent, durably, before the shim starts | [`Task`] |
//! | `shim.sock` | shim | control: JSON lines, [`Order`] one way and [`Report`] the other |
//! | `shim.lock` | shim | held (flock) as long as the shim lives |
//! | `exit-{run}.json` | shim, durably, before anyone is told | [`Exit`]; nothing of the run is alive |
//! | `outputs.tar.gz` | shim, before the exit file | what the template's `outputs` name, where any was there |
//! | `log/` | shim | the epoch's log, all runs of it, in segments named by their first record's seq |
//! | `root/` | shim | what containers have written, each in `{container}.upper` beside its overlay's own `{container}.work` |
//! | `checkpoint/` | the pod's programs, as `/run/berth/checkpoint` | what they save of themselves |
//! | `run/` | shim | in its mount namespace alone a tmpfs: all that lives as long as the run |
//! | `checkpoints/{level}/` | shim | a checkpoint, whole once it has this name: [`Saved`] in `saved.json`, and each container's part |
//! | `restore/` | agent | the checkpoint to begin from, laid out likewise |
//!
//! A shim serves one run. It makes the containers, waits for [`Order::Start`], and ends when the run has ended.
//! Agents come and go on the socket; a shim without one goes on to its deadline.

use std::net::Ipv4Addr;
use std::path::PathBuf;

use berth_protocol::checkpoint::CheckpointKind;
use berth_protocol::ids::{ContainerName, Epoch, NodeId, PodId, Run};
use berth_protocol::job::PodTemplate;
use berth_protocol::pod::Outcome;
use berth_protocol::units::{BootMs, Bytes, Millis, Timestamp};
use serde::{Deserialize, Serialize};

/// All that a shim needs to know to run a pod once.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Task {
    pub node: NodeId,
    pub pod: PodId,
    pub epoch: Epoch,
    pub run: Run,
    pub template: PodTemplate,
    /// One for each container of the template, in its order.
    pub roots: Vec<Root>,
    /// Host paths of the template's volumes, in its order; `None` for scratch.
    pub volumes: Vec<Option<PathBuf>>,
    /// An unpacked workspace to lay over every container, where the template names one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub workspace: Option<PathBuf>,
    pub devices: Vec<DeviceGrant>,
    /// The pod's place on the node's bridge, where its network is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub network: Option<BridgeAddress>,
    /// Below each control group mount, such as `berth/a1`; the pod's group is `{uid}-{index}.{epoch}` in it.
    pub cgroup_parent: PathBuf,
    /// The log's size at most; older segments go first.
    pub log_bytes_max: Bytes,
    /// Writable layers together; zero: no bound.
    pub scratch_bytes_max: Bytes,
    /// A CRIU that works here.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub criu: Option<PathBuf>,
    /// The pod may have users of its own.
    #[serde(default)]
    pub own_users: bool,
    /// Begin from the checkpoint in the pod's `restore/`, every byte of which was verified.
    #[serde(default)]
    pub restore: bool,
    /// How often the pod was begun anew in its earlier epochs.
    #[serde(default)]
    pub restarts: u64,
}

/// Where a container's root file system comes from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Root {
    /// A copy-on-write view of the node's own.
    Host,
    /// Unpacked layers, the lowest first, and what the image says of its process.
    Image { layers: Vec<PathBuf>, config: ImageProcess },
}

/// The defaults that an image carries.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ImageProcess {
    pub entrypoint: Vec<String>,
    pub cmd: Vec<String>,
    /// `NAME=value`
    pub env: Vec<String>,
    pub working_dir: Option<String>,
    pub user: Option<String>,
    pub stop_signal: Option<String>,
}

/// One device that the pod may use; no other of its kind is visible.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct DeviceGrant {
    pub uuid: String,
    /// The CDI name, such as `nvidia.com/gpu=GPU-6c3b…`, where a CDI specification names the device.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cdi: Option<String>,
    /// Otherwise: device nodes, and libraries or files to bind read-only at their own path.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub nodes: Vec<PathBuf>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub files: Vec<PathBuf>,
    /// Environment for the container, such as `NVIDIA_VISIBLE_DEVICES`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub env: Vec<String>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct BridgeAddress {
    pub bridge: String,
    pub address: Ipv4Addr,
    pub prefix: u8,
    pub gateway: Ipv4Addr,
    pub dns: Vec<Ipv4Addr>,
}

/// Agent to shim.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", rename_all_fields = "camelCase")]
pub enum Order {
    /// Begin, under this lease. Sent once the pod's epoch is granted; later ones are renewals.
    Start {
        lease: Lease,
    },
    Renew {
        lease: Lease,
    },
    /// Freeze by the user's or controller's wish; `false` thaws, unless the lease has run out.
    Pause {
        pause: bool,
    },
    /// The stop signal now, SIGKILL after `grace`.
    Stop {
        grace: Millis,
    },
    /// Send [`Report::Log`] whenever the log has grown.
    Follow {
        follow: bool,
    },
    /// Take a checkpoint; with `hold` the pod stands still afterwards, until it is stopped or released.
    Save {
        level: u64,
        hold: bool,
    },
    /// Ends a hold: the pod goes on.
    Release,
}

/// Until when a pod may run unrenewed, on CLOCK_BOOTTIME; what happens then is in the template's `on_disconnect`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Lease {
    /// `after` past the send of the heartbeat that was granted; `None`: without end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deadline: Option<BootMs>,
}

/// Shim to agent: on connect, and at every change.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", rename_all_fields = "camelCase")]
pub enum Report {
    /// `network: bridge` and all mounts are there, the program has not begun.
    Created {
        run: Run,
    },
    Running {
        run: Run,
        started_at: Timestamp,
    },
    /// Frozen and confirmed by the kernel.
    Paused {
        run: Run,
        fenced: bool,
    },
    /// As `exit-{run}.json` has it.
    Exited {
        exit: Exit,
    },
    /// The last record written.
    Log {
        seq: u64,
    },
    /// The start was granted; the programs are being brought back from their checkpoint.
    Restoring {
        run: Run,
    },
    /// The checkpoint of this level is on disk, in `checkpoints/{level}/`.
    Saved {
        run: Run,
        saved: Saved,
    },
    /// It could not be taken; the pod goes on as before.
    SaveFailed {
        run: Run,
        level: u64,
        why: String,
    },
    /// The job's resume hook has not done its work; the pod goes on all the same.
    ResumeFailed {
        run: Run,
        why: String,
    },
}

/// A checkpoint as its shim made it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Saved {
    pub level: u64,
    pub at: Timestamp,
    pub kind: CheckpointKind,
    /// From the order to the programs' going on, or to the end of the saving where they are held.
    pub frozen_ms: u64,
    /// Records of the epoch's log when the programs stood.
    pub log_records: u64,
    /// In the template's order.
    pub containers: Vec<SavedContainer>,
    /// What of the programs' memory was on GPUs, and is theirs in the images.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub devices: Option<SavedDevices>,
}

/// Memory of GPUs in a checkpoint.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SavedDevices {
    /// The devices that it was on, in the order of the pod's grants.
    pub uuids: Vec<String>,
    /// So many processes had some.
    pub processes: usize,
    /// What the host's memory must hold of it until it is on devices again.
    pub bytes: Bytes,
}

/// What a restore must know of a container's images and cannot ask of them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SavedContainer {
    pub name: ContainerName,
    /// Standard output and error, as CRIU names them; none that the program had closed.
    pub pipes: Vec<Option<String>>,
    /// Mounts that come from outside the container, by where they were.
    pub mounts: Vec<String>,
}

/// How a run ended; once this file is there, nothing of the run is alive.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Exit {
    pub run: Run,
    pub outcome: Outcome,
    pub containers: Vec<ContainerExit>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ContainerExit {
    pub name: ContainerName,
    /// The code, or 128 + signal.
    pub code: u8,
    pub oom_killed: bool,
}

/// Names within a pod's directory.
pub mod file {
    pub const TASK: &str = "task.json";
    pub const SOCKET: &str = "shim.sock";
    pub const LOCK: &str = "shim.lock";
    pub const LOG_DIR: &str = "log";
    /// What the template's `outputs` name, archived at the end of the last run that had them.
    pub const OUTPUTS: &str = "outputs.tar.gz";

    /// Checkpoints taken here, a directory each, named by its level.
    pub const CHECKPOINTS_DIR: &str = "checkpoints";
    /// The checkpoint that the next run begins from.
    pub const RESTORE_DIR: &str = "restore";
    /// Within a checkpoint: what the shim says of it.
    pub const SAVED: &str = "saved.json";
    /// Within a checkpoint: the checkpoint directory of the containers.
    pub const KEPT: &str = "kept.tar";

    /// What containers have written.
    pub const ROOT_DIR: &str = "root";
    /// What ends with a run.
    pub const RUN_DIR: &str = "run";
    /// Containers' bundles, in directories of their names, which no other name here may be.
    pub const BUNDLES_DIR: &str = "run/bundles";
    /// Volumes that containers are not given as they lie, by their place in the job's file.
    pub const SHOWN_DIR: &str = "run/shown";
    /// The root of the pod's init: empty.
    pub const NOTHING_DIR: &str = "run/nothing";
    /// libcontainer's own records.
    pub const STATE_DIR: &str = "run/state";
    /// What containers see as `/etc/hostname`, `/etc/hosts` and `/etc/resolv.conf`.
    pub const ETC_DIR: &str = "run/etc";
    /// The pod's network namespace, bound.
    pub const NETNS: &str = "run/netns";
    /// The pod's other namespaces, bound, for those who could not find them in /proc.
    pub const NAMESPACES_DIR: &str = "run/namespaces";
    /// What containers see as `/run/berth`.
    pub const BERTH_DIR: &str = "run/berth";
    /// Secrets, by name.
    pub const SECRETS_DIR: &str = "run/secrets";
    /// In it: facts that may change, a word that the pod is to save itself, and the checkpoint directory.
    pub const POD: &str = "pod.json";
    pub const SAVE: &str = "save";
    /// That word before it is there.
    pub const SAVE_WORD: &str = "run/save";
    pub const CHECKPOINT_DIR: &str = "checkpoint";

    pub fn exit(run: berth_protocol::ids::Run) -> String {
        format!("exit-{run}.json")
    }
}

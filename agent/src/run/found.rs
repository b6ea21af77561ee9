//! What is there before the agent knows anything: pods of this node that are alive, by their control groups; a CRIU.

use std::path::{Path, PathBuf};
use std::time::Duration;

use berth_protocol::message::node::HeldPod;

use crate::config::Config;
use crate::core::ledger::PodKey;
use crate::io::probe::ProbeConfig;
use crate::io::probe::criu::{self, Criu};
use crate::shim;
use crate::shim::cgroup::Cgroup;
use crate::task::{Task, file};

/// What the probe is told of this node.
pub(super) fn probe_config(config: &Config, bridge: bool) -> ProbeConfig {
    ProbeConfig {
        capacity: config.capacity,
        reserved: config.reserved,
        data_dir: config.data_dir.clone(),
        labels: config.labels.clone(),
        taints: config.taints.clone(),
        policy: config.policy.granted.rules.clone(),
        bridge,
        program: Some(PathBuf::from("/proc/self/exe")),
        ..ProbeConfig::default()
    }
}

/// Named for the data directory too: two clusters may have a node of one name on one machine.
pub(super) fn cgroup_parent(config: &Config) -> PathBuf {
    let dir = config.data_dir.as_os_str().as_encoded_bytes();
    let owner = &berth_protocol::ids::Digest::of(dir).hex()[..8];
    Path::new("berth").join(format!("{}.{owner}", config.node))
}

/// Pods that are alive under their shims, whatever the ledger says. One of which nothing is left but its processes is
/// nobody's, and is ended: it could neither be fenced nor told from the outside.
pub(super) fn found_alive(config: &Config) -> Vec<HeldPod> {
    let parent = cgroup_parent(config);
    let mut found = Vec::new();
    for (pod, epoch) in shim::scan(&parent).unwrap_or_default() {
        let key = PodKey::new(&pod, epoch);
        let task = std::fs::read(config.data_dir.join("pods").join(key.to_string()).join(file::TASK));
        match task.ok().and_then(|bytes| serde_json::from_slice::<Task>(&bytes).ok()) {
            Some(task) => found.push(HeldPod { pod, epoch, run: task.run, alive: true, granted: false }),
            None => {
                tracing::warn!("pod {key} is alive, and its directory is gone: ending it");
                let group = Cgroup::new(&parent.join(shim::cgroup::pod_name(&pod, epoch)));
                if let Err(error) =
                    group.and_then(|group| group.kill(Duration::from_millis(shim::KILL_MS_MAX)))
                {
                    tracing::error!("pod {key} cannot be ended: {error}");
                }
            }
        }
    }
    found
}

/// A CRIU that works; looked for beside everything else, since its own check takes a while.
pub(super) async fn find_criu(configured: Option<PathBuf>) -> Option<Criu> {
    let program = std::env::current_exe().ok();
    let path = std::env::var("PATH").unwrap_or_default();
    match criu::find(&criu::candidates(configured.as_deref(), program.as_deref(), &path)).await {
        Ok(criu) => Some(criu),
        Err(error) => {
            tracing::info!("no transparent checkpoints on this node: {error}");
            None
        }
    }
}

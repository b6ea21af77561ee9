//! Starts pods' supervisors.

use super::Agency;
use crate::core::Launch;
use crate::io::network;
use crate::task::{Order, Task};

impl Agency {
    pub(super) fn launch(&mut self, launch: Launch) {
        let (key, run) = (launch.key.clone(), launch.run);
        if let Err(why) = self.try_launch(launch) {
            tracing::warn!("pod {key} did not start: {why}");
            self.shims.failed(key, run, why);
        }
    }

    fn try_launch(&mut self, launch: Launch) -> Result<(), String> {
        let Launch { key, run, template, prepared, gpus, slot, restarts, restore } = launch;
        let network = match (&self.bridge, slot) {
            (Some(bridge), Some(index)) => {
                let index = u8::try_from(index).unwrap_or(u8::MAX);
                let address = network::address(bridge.slot(), index, network::name_servers());
                Some(address.ok_or("no address is free on the pods' bridge")?)
            }
            _ => None,
        };
        let task = Task {
            node: self.config.node.clone(),
            pod: key.pod.clone(),
            epoch: key.epoch,
            run,
            roots: prepared.roots,
            volumes: prepared.volumes,
            workspace: prepared.workspace,
            devices: self.probe.grants(&gpus).map_err(|error| error.to_string())?,
            network,
            cgroup_parent: self.cgroup_parent(),
            log_bytes_max: self.config.log_bytes_max,
            criu: self.criu.as_ref().map(|criu| criu.path.clone()),
            own_users: self.config.user_namespaces,
            restore,
            restarts,
            scratch_bytes_max: self.config.scratch_bytes_max,
            template,
        };
        self.shims.launch(&key, task, self.preparer.secrets.of(&key)).map_err(|error| error.to_string())?;
        if self.followers.wants(&key) {
            self.shims.order(&key, Order::Follow { follow: true });
        }
        Ok(())
    }
}

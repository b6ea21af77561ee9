//! Samples for this module's unit tests.

use std::path::PathBuf;

use berth_protocol::ids::{ContainerName, Epoch, JobName, JobUid, Namespace, NodeId, Run};
use berth_protocol::job::{Checkpoint, ContainerSpec, Network, OnDisconnect, PodTemplate, Restart};
use berth_protocol::resources::{Limits, Resources};
use berth_protocol::units::{Bytes, MilliCpu, Millis};

use crate::task::{Root, Task};

pub fn container() -> ContainerSpec {
    ContainerSpec {
        name: ContainerName::parse("main").unwrap(),
        image: "host".to_owned(),
        command: Vec::new(),
        args: Vec::new(),
        env: Default::default(),
        working_dir: None,
        user: None,
        resources: Resources { cpu: MilliCpu(100), memory: Bytes(128 << 20), ..Resources::default() },
        limits: Limits { cpu: MilliCpu(1000), memory: Bytes(256 << 20) },
        read_only_root: false,
        capabilities: Default::default(),
        secrets: Vec::new(),
    }
}

/// Of one container, without devices.
pub fn task() -> Task {
    let template = PodTemplate {
        namespace: Namespace::parse("default").unwrap(),
        job: JobName::parse("digits").unwrap(),
        containers: vec![container()],
        volumes: Vec::new(),
        network: Network::None,
        restart: Restart::default(),
        grace: Millis(5000),
        on_disconnect: OnDisconnect::default(),
        checkpoint: Checkpoint::default(),
        outputs: Vec::new(),
        workspace: None,
    };
    Task {
        node: NodeId::parse("node-1").unwrap(),
        pod: JobUid::parse("a1").unwrap().pod(0),
        epoch: Epoch(1),
        run: Run(1),
        template,
        roots: vec![Root::Host],
        volumes: Vec::new(),
        workspace: None,
        devices: Vec::new(),
        network: None,
        cgroup_parent: PathBuf::from("berth/node-1"),
        log_bytes_max: Bytes(1 << 20),
        scratch_bytes_max: Bytes::ZERO,
        criu: None,
        own_users: true,
        restore: false,
        restarts: 0,
    }
}

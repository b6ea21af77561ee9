//! Samples for this module's unit tests.

use berth_protocol::ids::ContainerName;
use berth_protocol::job::ContainerSpec;
use berth_protocol::resources::{Limits, Resources};
use berth_protocol::units::{Bytes, MilliCpu};

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

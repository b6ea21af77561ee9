//! Amounts that pods ask for and nodes have.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use crate::image::Images;
use crate::policy::{self, Policy};
use crate::units::{Bytes, MilliCpu, is_zero};

/// What one container (or, summed, one pod) asks for.
#[derive(Debug, Clone, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Resources {
    pub cpu: MilliCpu,
    pub memory: Bytes,
    /// What its scratch volumes may grow to.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub disk: Bytes,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gpu: Option<GpuRequest>,
}

/// `count` devices, or a share of one.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct GpuRequest {
    pub count: u32,
    /// Thousandths of each device; below 1000 only with `count` 1.
    pub milli: u32,
    /// Device memory needed on each.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory: Option<Bytes>,
    /// Any of these models; empty: any.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub model: BTreeSet<String>,
}

/// Up to where a container may burst.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Limits {
    pub cpu: MilliCpu,
    pub memory: Bytes,
}

/// A device's place among those that berth can hand out.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Gpu {
    /// The vendor's stable name, such as `GPU-6c3b…` (NVIDIA) or the PCI address (others).
    pub uuid: String,
    pub vendor: GpuVendor,
    /// As the vendor calls it, such as `NVIDIA H200`.
    pub model: String,
    pub memory: Bytes,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pci: Option<String>,
    /// Why it takes no pod, where it does not: fell off the bus, ECC errors, an Xid.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unhealthy: Option<String>,
    /// Split by MIG: not handed out whole.
    #[serde(default)]
    pub mig: bool,
    /// Memory that programs outside berth hold, where it is more than a desktop takes.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub outside: Bytes,
}

impl Gpu {
    /// Thousandths of the device that are berth's to hand out: what others hold of its memory is theirs.
    pub fn milli(&self) -> u32 {
        let theirs = u128::from(self.outside.0.min(self.memory.0)) * 1000;
        1000 - theirs.div_ceil(u128::from(self.memory.0.max(1))).min(1000) as u32
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum GpuVendor {
    Nvidia,
    Amd,
    Intel,
}

/// A pod's part of one device.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct GpuShare {
    pub uuid: String,
    pub milli: u32,
}

/// How control groups are mounted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CgroupVersion {
    V1,
    Hybrid,
    V2,
}

/// What a node is and has: told at hello and whenever it changes. Amounts are what pods may use: the system's share is
/// taken off, and what other programs of the machine use beyond it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Inventory {
    pub hostname: String,
    /// As `uname -m` says: x86_64, aarch64, armv7l.
    pub arch: String,
    pub kernel: String,
    /// Such as `Debian GNU/Linux 12`.
    pub os: String,
    pub cpu: MilliCpu,
    pub memory: Bytes,
    /// Size of the file system that holds the agent's data.
    pub disk: Bytes,
    pub cpu_model: String,
    /// Kernel names of the processor's features, what a restored process may rely on.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub cpu_features: BTreeSet<String>,
    pub cgroup: CgroupVersion,
    /// CRIU's version where one passes its own check.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub criu: Option<String>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub gpus: Vec<Gpu>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gpu_driver: Option<String>,
    /// Its driver can save the memory of its GPUs, and bring it back (NVIDIA's alone).
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub saves_gpus: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cuda: Option<String>,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub taints: BTreeSet<String>,
    /// Runs `image: host`.
    pub host_image: bool,
    /// Can give pods a network of their own.
    pub bridge: bool,
    pub agent_version: String,
    /// Told anew when one comes or goes, not when another one is used.
    #[serde(default, skip_serializing_if = "Images::is_empty")]
    pub images: Images,
    /// What it lets pods have; `None`: not known, and the node refuses for itself.
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "policy::understood")]
    pub policy: Option<Box<Policy>>,
}

impl Inventory {
    /// Of a node whose own is not recorded: nothing, and room for nothing.
    pub fn unknown() -> Self {
        Self {
            hostname: String::new(),
            arch: String::new(),
            kernel: String::new(),
            os: String::new(),
            cpu: MilliCpu(0),
            memory: Bytes(0),
            disk: Bytes(0),
            cpu_model: String::new(),
            cpu_features: BTreeSet::new(),
            cgroup: CgroupVersion::V2,
            criu: None,
            gpus: Vec::new(),
            gpu_driver: None,
            saves_gpus: false,
            cuda: None,
            labels: BTreeMap::new(),
            taints: BTreeSet::new(),
            host_image: false,
            bridge: false,
            agent_version: String::new(),
            images: Images::default(),
            policy: None,
        }
    }

    /// Nothing differs but the images, by which no node is chosen or passed over: they decide between equals alone.
    pub fn is_but_for_images(&self, other: &Inventory) -> bool {
        let images = other.images.clone();
        Inventory { images, ..self.clone() } == *other
    }
}

/// What a node uses now, all of it, berth's pods or not.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Usage {
    pub cpu: MilliCpu,
    pub memory: Bytes,
    pub disk: Bytes,
    /// The load average of one minute, in thousandths.
    pub load_milli: u64,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub gpus: Vec<GpuUsage>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct GpuUsage {
    pub uuid: String,
    pub memory: Bytes,
    pub percent: u8,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub celsius: Option<u16>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub watts: Option<u32>,
}

impl Resources {
    /// The sum over a pod's containers; `None` where it overflows or two containers ask for devices differently.
    pub fn sum<'a>(parts: impl IntoIterator<Item = &'a Resources>) -> Option<Resources> {
        parts.into_iter().try_fold(Resources::default(), |sum, part| {
            let gpu = match (sum.gpu, &part.gpu) {
                (None, gpu) => gpu.clone(),
                (gpu, None) => gpu,
                (Some(_), Some(_)) => return None,
            };
            let cpu = sum.cpu.checked_add(part.cpu)?;
            let memory = sum.memory.checked_add(part.memory)?;
            let disk = sum.disk.checked_add(part.disk)?;
            Some(Resources { cpu, memory, disk, gpu })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::ImageName;

    #[test]
    fn inventories_of_versions_without_images_are_read_and_written_as_before() {
        let before = r#"{"hostname":"h","arch":"x86_64","kernel":"6","os":"Debian","cpu":1000,"memory":1024,
            "disk":1024,"cpuModel":"m","cgroup":"v2","hostImage":true,"bridge":true,"agentVersion":"0.1.0"}"#;
        let mut has: Inventory = serde_json::from_str(before).unwrap();
        assert!(has.images.is_empty());
        let plain = has.clone();
        assert!(!serde_json::to_string(&has).unwrap().contains("images"));
        has.images =
            Images::cut(["python:3.12-slim", "oci:/srv/layout"].map(|t| ImageName::parse(t).unwrap()));
        assert!(has.is_but_for_images(&plain) && plain.is_but_for_images(&has) && has != plain);
        let json = serde_json::to_string(&has).unwrap();
        assert!(
            json.contains(r#""images":["docker.io/library/python:3.12-slim","oci:/srv/layout"]"#),
            "{json}"
        );
        assert_eq!(serde_json::from_str::<Inventory>(&json).unwrap(), has);
        has.bridge = false;
        assert!(!has.is_but_for_images(&plain));
    }

    #[test]
    fn a_policy_that_is_not_understood_is_as_none() {
        let mut has = Inventory { policy: Some(Box::default()), ..Inventory::unknown() };
        let json = serde_json::to_string(&has).unwrap();
        assert_eq!(serde_json::from_str::<Inventory>(&json).unwrap(), has);
        let strange = json.replace("\"bridge\",", "\"mesh\",\"bridge\",");
        assert_ne!(strange, json);
        assert_eq!(serde_json::from_str::<Inventory>(&strange).unwrap().policy, None);
        let many = (0..500).map(|n| format!("CAPABILITY_{n}")).collect();
        has.policy = Some(Box::new(Policy { capabilities: many, ..Policy::default() }));
        let json = serde_json::to_string(&has).unwrap();
        assert_eq!(serde_json::from_str::<Inventory>(&json).unwrap().policy, None);
    }
}

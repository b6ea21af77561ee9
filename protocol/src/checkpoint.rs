//! A saved pod as the controller knows it: how large, how good, and what a node must have to go on from it. What it
//! is made of is `manifest`'s.

use std::collections::BTreeSet;
use std::fmt;

use serde::{Deserialize, Serialize};

use crate::ids::Digest;
use crate::limits::{CPU_FEATURES_MAX, GPUS_PER_NODE_MAX, VERSION_BYTES_MAX};
use crate::resources::Inventory;
use crate::units::{Bytes, Timestamp};

/// What people may do where CRIU cannot follow.
pub const INSTEAD: &str = "a program that saves itself can be saved all the same: give its job `checkpoint.signal` or \
                           `checkpoint.ready`";

/// How the pod was saved.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CheckpointKind {
    /// Its memory, by CRIU: the program never knows.
    Criu,
    /// By itself, into files of its own.
    Cooperative,
}

impl CheckpointKind {
    pub fn as_str(self) -> &'static str {
        match self {
            CheckpointKind::Criu => "criu",
            CheckpointKind::Cooperative => "cooperative",
        }
    }
}

impl fmt::Display for CheckpointKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// A checkpoint that is in the depot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct CheckpointInfo {
    /// The digest of the manifest's bytes.
    pub id: Digest,
    /// The order's level that this answers.
    pub level: u64,
    pub at: Timestamp,
    pub kind: CheckpointKind,
    /// Of everything it names, uncompressed and without empty memory.
    pub bytes: Bytes,
    /// What had to be sent.
    pub new_bytes: Bytes,
    /// From the freeze of its processes to their going on, or to their end where they did not.
    pub frozen_ms: u64,
    /// Records that the epoch's log held when its processes stood: what comes behind is said again after a restore.
    pub log_records: u64,
    pub needs: Needs,
}

/// What a node must have to go on from a checkpoint.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Needs {
    /// As `Inventory::arch`; empty: any.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub arch: String,
    /// Kernel names of what its code may have found the processor to have.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub cpu_features: BTreeSet<String>,
    /// The kernel it was taken on: an older one may not know what it must bring back.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kernel: Option<String>,
    /// The CRIU that wrote it: an older one may not read it. None: none is needed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub criu: Option<String>,
    /// The model of each device whose memory it holds.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub gpus: Vec<String>,
    /// The devices' driver, of which the programs have the libraries in their memory: they work with no other.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gpu_driver: Option<String>,
}

impl Needs {
    /// Everything in which `node` falls short, in words; empty: it can go on there.
    pub fn lacking(&self, node: &Inventory) -> Vec<String> {
        let mut lacking = Vec::new();
        if !self.arch.is_empty() && self.arch != node.arch {
            lacking.push(format!("the checkpoint is of {}, the node is {}", self.arch, node.arch));
        }
        let features: Vec<&str> =
            self.cpu_features.difference(&node.cpu_features).map(String::as_str).collect();
        match features[..] {
            [] => {}
            [ref some @ .., last] if some.len() < 4 => {
                let all = some.iter().map(|one| format!("{one}, ")).collect::<String>();
                lacking.push(format!("its processor lacks {all}{last}"));
            }
            ref many => {
                let (first, rest) = (many[..3].join(", "), many.len() - 3);
                lacking.push(format!("its processor lacks {first} and {rest} features more"));
            }
        }
        if let Some(kernel) = &self.kernel
            && is_older(&node.kernel, kernel, 2)
        {
            lacking.push(format!("its kernel {} is older than the checkpoint's {kernel}", node.kernel));
        }
        match (&self.criu, &node.criu) {
            (Some(_), None) => lacking.push("it has no CRIU that works".to_owned()),
            (Some(criu), Some(has)) if is_older(has, criu, 2) => {
                lacking.push(format!("its CRIU {has} is older than the checkpoint's {criu}"));
            }
            _ => {}
        }
        let mut models: Vec<&String> = node.gpus.iter().map(|gpu| &gpu.model).collect();
        for wanted in &self.gpus {
            match models.iter().position(|model| *model == wanted) {
                Some(found) => drop(models.swap_remove(found)),
                None => {
                    let n = self.gpus.iter().filter(|model| *model == wanted).count();
                    lacking.push(format!("the checkpoint needs {n} of {wanted}, which it has not"));
                    break;
                }
            }
        }
        if let Some(driver) = &self.gpu_driver {
            match &node.gpu_driver {
                Some(has) if has != driver => {
                    lacking.push(format!(
                        "its GPU driver is {has}, and the checkpoint's programs work with {driver}"
                    ));
                }
                Some(_) if !node.saves_gpus => {
                    lacking.push("its driver cannot bring back the memory of GPUs".to_owned());
                }
                Some(_) => {}
                None => lacking.push(format!("it has no GPU driver, and the checkpoint needs {driver}")),
            }
        }
        lacking
    }

    /// Within the bounds of `limits`.
    pub fn is_bounded(&self) -> bool {
        let short = |text: &str| text.len() <= VERSION_BYTES_MAX;
        let version = |text: &Option<String>| text.as_deref().is_none_or(short);
        short(&self.arch)
            && self.cpu_features.len() <= CPU_FEATURES_MAX
            && self.cpu_features.iter().all(|feature| short(feature))
            && self.gpus.len() <= GPUS_PER_NODE_MAX
            && self.gpus.iter().all(|model| short(model))
            && version(&self.kernel)
            && version(&self.criu)
            && version(&self.gpu_driver)
    }
}

/// Whether version `a` comes before `b`, by their first `parts` numbers. What is no number counts as 0.
fn is_older(a: &str, b: &str, parts: usize) -> bool {
    let numbers = |text: &str| -> Vec<u64> {
        let all = text.split(|c: char| !c.is_ascii_digit()).filter(|part| !part.is_empty());
        all.chain(std::iter::repeat("0")).take(parts).map(|part| part.parse().unwrap_or(0)).collect()
    };
    numbers(a) < numbers(b)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::resources::{CgroupVersion, Gpu, GpuVendor};
    use crate::units::MilliCpu;

    fn node() -> Inventory {
        let gpu = |n: u32| Gpu {
            uuid: format!("GPU-{n}"),
            vendor: GpuVendor::Nvidia,
            model: "NVIDIA H200".to_owned(),
            memory: Bytes(1 << 37),
            pci: None,
            unhealthy: None,
            mig: false,
            outside: Bytes::ZERO,
        };
        Inventory {
            hostname: "n".to_owned(),
            arch: "x86_64".to_owned(),
            kernel: "6.12.9-amd64".to_owned(),
            os: String::new(),
            cpu: MilliCpu(1000),
            memory: Bytes(1 << 30),
            disk: Bytes(1 << 30),
            cpu_model: String::new(),
            cpu_features: ["avx", "avx2"].map(str::to_owned).into(),
            cgroup: CgroupVersion::V2,
            criu: Some("4.1.1".to_owned()),
            gpus: vec![gpu(0), gpu(1)],
            gpu_driver: Some("580.65.06".to_owned()),
            saves_gpus: true,
            cuda: None,
            labels: Default::default(),
            taints: Default::default(),
            host_image: false,
            bridge: true,
            agent_version: String::new(),
            images: Default::default(),
            policy: None,
        }
    }

    fn full() -> Needs {
        Needs {
            arch: "x86_64".to_owned(),
            cpu_features: ["avx"].map(str::to_owned).into(),
            kernel: Some("6.1.0-30".to_owned()),
            criu: Some("4.1".to_owned()),
            gpus: vec!["NVIDIA H200".to_owned(); 2],
            gpu_driver: Some("580.65.06".to_owned()),
        }
    }

    #[test]
    fn a_node_that_has_it_all_lacks_nothing() {
        assert_eq!(full().lacking(&node()), Vec::<String>::new());
        assert_eq!(Needs::default().lacking(&node()), Vec::<String>::new());
        assert!(full().is_bounded());
    }

    #[test]
    fn each_lack_is_said() {
        type Case = (fn(&mut Needs), &'static str);
        let cases: [Case; 8] = [
            (|n| n.arch = "aarch64".to_owned(), "the checkpoint is of aarch64, the node is x86_64"),
            (
                |n| {
                    let _ = n.cpu_features.insert("amx_tile".to_owned());
                },
                "its processor lacks amx_tile",
            ),
            (
                |n| n.cpu_features.extend(["a", "b", "c", "d", "e"].map(str::to_owned)),
                "its processor lacks a, b, c and 2 features more",
            ),
            (
                |n| n.kernel = Some("6.18.1".to_owned()),
                "its kernel 6.12.9-amd64 is older than the checkpoint's 6.18.1",
            ),
            (|n| n.criu = Some("4.2.1".to_owned()), "its CRIU 4.1.1 is older than the checkpoint's 4.2.1"),
            (
                |n| n.gpus.push("NVIDIA H200".to_owned()),
                "the checkpoint needs 3 of NVIDIA H200, which it has not",
            ),
            (
                |n| n.gpus = vec!["NVIDIA A100".to_owned()],
                "the checkpoint needs 1 of NVIDIA A100, which it has not",
            ),
            (
                |n| n.gpu_driver = Some("580.82.07".to_owned()),
                "its GPU driver is 580.65.06, and the checkpoint's programs work with 580.82.07",
            ),
        ];
        for (change, expect) in cases {
            let mut needs = full();
            change(&mut needs);
            assert_eq!(needs.lacking(&node()), [expect]);
        }
        let without = Inventory { criu: None, ..node() };
        assert_eq!(full().lacking(&without), ["it has no CRIU that works"]);
        let unable = Inventory { saves_gpus: false, ..node() };
        assert_eq!(full().lacking(&unable), ["its driver cannot bring back the memory of GPUs"]);
        let none = Inventory { gpu_driver: None, ..node() };
        assert_eq!(full().lacking(&none), ["it has no GPU driver, and the checkpoint needs 580.65.06"]);
    }

    #[test]
    fn versions_compare_by_numbers() {
        for (a, b, parts, older) in [
            ("6.9", "6.12", 2, true),
            ("6.12.1", "6.12.9", 2, false),
            ("6.18.0-rc1", "6.18", 2, false),
            ("5", "5.1", 2, true),
            ("", "1", 1, true),
            ("nonsense", "nonsense", 2, false),
        ] {
            assert_eq!(is_older(a, b, parts), older, "{a} {b}");
        }
    }
}

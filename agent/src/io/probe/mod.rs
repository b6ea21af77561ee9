//! What this machine is, has and uses: owns the node's inventory and usage; it may change nothing on the machine.
//!
//! Built for a daemon of four MiB: what never changes is read once, a heartbeat's sample reads a handful of small
//! files, and a machine without GPUs has no driver library loaded and no thread started.
//!
//! - [`host`]: processors, memory, disk, load, texts about the system
//! - [`cgroup`]: how control groups are mounted, and the limits that the agent itself runs under
//! - [`gpus`]: asks the drivers from a thread of its own; [`nvidia`] through NVML, [`drm`] for AMD and Intel
//! - `outside`: what other programs of the machine use of all that
//! - [`devices`]: how an allotted GPU reaches a container; [`cdi`] finds the names of CDI specifications
//! - [`criu`]: finds a CRIU that works; [`cuda`] asks whether NVIDIA's driver can save the memory of GPUs

pub mod cdi;
pub mod cgroup;
pub mod criu;
pub mod cuda;
pub mod devices;
pub mod drm;
pub mod gpus;
pub mod host;
pub mod nvidia;
mod outside;

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use berth_protocol::image::Images;
use berth_protocol::policy::Policy;
use berth_protocol::resources::{Gpu, GpuShare, Inventory, Usage};
use berth_protocol::units::{Bytes, MilliCpu};

use crate::config::Amounts;
use crate::task::DeviceGrant;
use devices::GrantError;
use gpus::Gpus;
use host::Meter;
use outside::Outside;

/// How long the first look at the GPUs may take: without persistence mode the NVIDIA driver brings each device up
/// first. A hello that goes out sooner would tell of a node without GPUs.
const FIRST_ANSWER_MS_MAX: u64 = 15_000;
/// How long a later sample waits for the GPUs' drivers; a late answer counts at the next one.
const ANSWER_MS_MAX: u64 = 250;
/// After this long without an answer the devices count as unhealthy.
const STUCK_MS: u64 = 25_000;

/// Of a device that no pod gets.
const NOT_GRANTED: &str = "the node's policy keeps it from pods";

/// What the configuration says about the node.
#[derive(Debug, Clone, Default)]
pub struct ProbeConfig {
    /// Where the machine's files are found: `/` (also when empty), and a made-up tree in tests.
    pub root: PathBuf,
    /// The NVML library in place of `libnvidia-ml.so.1`.
    pub nvml: Option<PathBuf>,
    /// This very program, which asks libcuda in a process of its own; `None`: it is not asked.
    pub program: Option<PathBuf>,
    /// Offer no more than this (`--capacity`); what the machine has less the reserve remains the upper bound.
    pub capacity: Amounts,
    /// Kept back for the system and berth itself.
    pub reserved: Amounts,
    /// The agent's data directory: its file system is the node's disk.
    pub data_dir: PathBuf,
    pub labels: BTreeMap<String, String>,
    pub taints: BTreeSet<String>,
    pub policy: Policy,
    /// Whether pods can have a network of their own, as the agent's network code found.
    pub bridge: bool,
}

/// One look at the machine.
#[derive(Debug, Clone)]
pub struct Sample {
    pub usage: Usage,
    /// The inventory is another than at the last sample.
    pub changed: bool,
}

/// The node's inventory, kept current.
#[derive(Debug)]
pub struct Probe {
    config: ProbeConfig,
    meter: Meter,
    limits: cgroup::OwnLimits,
    gpus: Gpus,
    outside: Outside,
    looked_at: Option<Instant>,
    inventory: Inventory,
}

impl Probe {
    /// Looks at everything once. Takes milliseconds, or up to 15 s where an NVIDIA driver wakes its devices.
    /// The inventory has no CRIU until [`Probe::set_criu`].
    pub async fn new(mut config: ProbeConfig) -> Self {
        if config.root.as_os_str().is_empty() {
            config.root = PathBuf::from("/");
        }
        let facts = host::facts(&config.root);
        let mounts = cgroup::mounts(&config.root);
        let inventory = Inventory {
            hostname: facts.hostname,
            arch: facts.arch,
            kernel: facts.kernel,
            os: facts.os,
            cpu: MilliCpu::ZERO,
            memory: Bytes::ZERO,
            disk: Bytes::ZERO,
            cpu_model: facts.cpu_model,
            cpu_features: facts.cpu_features,
            cgroup: cgroup::version(&mounts),
            criu: None,
            gpus: Vec::new(),
            gpu_driver: None,
            saves_gpus: false,
            cuda: None,
            labels: config.labels.clone(),
            taints: config.taints.clone(),
            host_image: config.policy.host_image,
            bridge: config.bridge,
            agent_version: env!("CARGO_PKG_VERSION").to_owned(),
            images: Images::default(),
            policy: Some(Box::new(config.policy.clone())),
        };
        let stuck_after = Duration::from_millis(STUCK_MS);
        let gpus = Gpus::new(config.root.clone(), config.nvml.clone(), config.program.clone(), stuck_after);
        let limits = cgroup::OwnLimits::find(&config.root, &mounts);
        let (meter, outside) = (Meter::new(), Outside::default());
        let mut probe = Self { config, meter, limits, gpus, outside, looked_at: None, inventory };
        probe.look(Duration::from_millis(FIRST_ANSWER_MS_MAX)).await;
        probe
    }

    /// Without images: the machine says nothing of those.
    pub fn inventory(&self) -> &Inventory {
        &self.inventory
    }

    /// The version of the CRIU that was found to work.
    pub fn set_criu(&mut self, version: Option<String>) {
        self.inventory.criu = version;
    }

    /// Looks again: about 100 µs, with GPUs at most 250 ms and then with their drivers' last answer.
    /// CPU usage is the mean since the last sample.
    pub async fn sample(&mut self) -> Sample {
        self.look(Duration::from_millis(ANSWER_MS_MAX)).await
    }

    /// How the pod's share of the devices reaches its containers.
    pub fn grants(&self, shares: &[GpuShare]) -> Result<Vec<DeviceGrant>, GrantError> {
        devices::grants(&self.config.root, &self.gpus.snapshot().found, shares)
    }

    async fn look(&mut self, wait: Duration) -> Sample {
        self.gpus.refresh(wait).await;
        let reading = self.meter.read(&self.config.data_dir);
        let limit = self.limits.read();
        let since = self.looked_at.replace(Instant::now()).map_or(0.0, |at| at.elapsed().as_secs_f64());
        let (cpu_taken, memory_taken) = self.outside.take(since, reading.cpu_used, reading.memory_used);
        let (capacity, reserved) = (self.config.capacity, self.config.reserved);
        // Who names the cores to offer has thought of what else runs here.
        let cpu_taken = if capacity.cpu.is_some() { MilliCpu::ZERO } else { cpu_taken };
        let cpu = MilliCpu(offered(
            reading.cpu_total.0,
            cpu_taken.0,
            limit.cpu.map(|cpu| cpu.0),
            reserved.cpu.unwrap_or_default().0,
            capacity.cpu.map(|cpu| cpu.0),
        ));
        let memory = Bytes(offered(
            reading.memory_total.0,
            memory_taken.0,
            limit.memory.map(|memory| memory.0),
            reserved.memory.unwrap_or_default().0,
            capacity.memory.map(|memory| memory.0),
        ));
        let snapshot = self.gpus.snapshot();
        let mut gpus: Vec<Gpu> = snapshot.found.iter().map(|found| found.gpu.clone()).collect();
        gpus.iter_mut().for_each(|gpu| self.outside.settle(gpu));
        for gpu in gpus.iter_mut().filter(|gpu| !self.config.policy.gpus.allows(&gpu.uuid)) {
            gpu.unhealthy.get_or_insert_with(|| NOT_GRANTED.to_owned());
        }
        let known = &mut self.inventory;
        let same = (known.cpu, known.memory, known.disk) == (cpu, memory, reading.disk_total)
            && known.gpus == gpus
            && (&known.gpu_driver, &known.cuda) == (&snapshot.driver, &snapshot.cuda)
            && known.saves_gpus == snapshot.saves;
        if !same {
            (known.cpu, known.memory, known.disk) = (cpu, memory, reading.disk_total);
            known.gpus = gpus;
            known.gpu_driver.clone_from(&snapshot.driver);
            known.cuda.clone_from(&snapshot.cuda);
            known.saves_gpus = snapshot.saves;
        }
        let usage = Usage {
            cpu: reading.cpu_used,
            memory: reading.memory_used,
            disk: reading.disk_used,
            load_milli: reading.load_milli,
            gpus: snapshot.found.iter().filter_map(|found| found.usage.clone()).collect(),
        };
        Sample { usage, changed: !same }
    }
}

/// What pods may use: what others leave of the machine, the agent's own limit less the reserve, and no more than the
/// configuration offers.
fn offered(machine: u64, taken: u64, limit: Option<u64>, reserved: u64, capacity: Option<u64>) -> u64 {
    let own = limit.map_or(machine, |limit| limit.min(machine)).saturating_sub(reserved);
    own.min(machine.saturating_sub(taken)).min(capacity.unwrap_or(u64::MAX))
}

/// Cuts a text from the machine to what a message may carry of it, and takes control characters out.
fn bounded(text: &str, bytes_max: usize) -> String {
    let mut out = String::new();
    for c in text.trim().chars().filter(|c| !c.is_control()) {
        if out.len() + c.len_utf8() > bytes_max {
            break;
        }
        out.push(c);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn capacity_never_exceeds_the_machine(
            machine in any::<u64>(), taken in any::<u64>(), limit in any::<Option<u64>>(),
            reserved in any::<u64>(), capacity in any::<Option<u64>>()
        ) {
            let got = offered(machine, taken, limit, reserved, capacity);
            prop_assert!(got <= machine.saturating_sub(reserved.max(taken)));
            prop_assert!(limit.is_none_or(|limit| got <= limit.saturating_sub(reserved)));
            prop_assert!(capacity.is_none_or(|capacity| got <= capacity));
        }

        #[test]
        fn bounded_is_bounded(text in "\\PC{0,60}", max in 0usize..80) {
            prop_assert!(bounded(&text, max).len() <= max);
        }
    }

    #[tokio::test(flavor = "current_thread")]
    async fn this_machine() {
        let data = tempfile::tempdir().unwrap();
        let whole = ProbeConfig { data_dir: data.path().into(), ..ProbeConfig::default() };
        let probe = Probe::new(whole.clone()).await;
        let inventory = probe.inventory();
        assert!(inventory.cpu.0 >= 100 && inventory.memory.0 > 64 * Bytes::MIB && inventory.disk.0 > 0);
        assert!(!inventory.kernel.is_empty() && !inventory.arch.is_empty() && !inventory.os.is_empty());
        assert!(!inventory.cpu_model.is_empty() && !inventory.cpu_features.is_empty(), "{inventory:?}");

        let reserved = Bytes(inventory.memory.0 / 2 + (64 << 20));
        let mut part = Probe::new(ProbeConfig {
            capacity: Amounts { cpu: Some(MilliCpu(250)), memory: None },
            reserved: Amounts { cpu: None, memory: Some(reserved) },
            ..whole
        })
        .await;
        assert_eq!(part.inventory().cpu, MilliCpu(250));
        let (less, all) = (part.inventory().memory, inventory.memory);
        assert!(
            less < all && less.0 + reserved.0 >= all.0,
            "{less} of {all} less what others use, or {reserved}"
        );
        let sample = part.sample().await;
        assert!(sample.usage.memory.0 > 0 && sample.usage.disk.0 > 0);
    }
}

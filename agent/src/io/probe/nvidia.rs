//! NVIDIA's devices through NVML, which is loaded only where their driver is; reads, and changes nothing.
//!
//! A device that was seen once stays listed. It is unhealthy while NVML cannot reach it, while its memory has errors
//! that a reset would clear, and after a fatal Xid until it has gone and come back, as a reset makes it do.
//! NVML keeps the device nodes open: `nvidia-smi --gpu-reset` wants the agent stopped.
//!
//! Sources: NVML API Reference; NVIDIA, "GPU Deployment and Management: Xid Errors".

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use berth_protocol::limits::GPUS_PER_NODE_MAX;
use berth_protocol::resources::{Gpu, GpuUsage, GpuVendor};
use berth_protocol::units::Bytes;
use nvml_wrapper::bitmasks::event::EventTypes;
use nvml_wrapper::enum_wrappers::device::{EccCounter, MemoryError, TemperatureSensor};
use nvml_wrapper::enums::device::{SampleValue, UsedGpuMemory};
use nvml_wrapper::enums::event::XidError;
use nvml_wrapper::error::NvmlError;
use nvml_wrapper::structs::device::FieldId;
use nvml_wrapper::sys_exports::field_id::{NVML_FI_DEV_REMAPPED_FAILURE, NVML_FI_DEV_REMAPPED_PENDING};
use nvml_wrapper::{Device, EventSet, Nvml};

use super::bounded;
use super::gpus::Found;

const LIBRARY: &str = "libnvidia-ml.so.1";
/// Xids that a program causes by its own fault, or that only tell of one that ended: the device is well.
const PROGRAM_XIDS: [u64; 6] = [13, 31, 43, 45, 68, 109];
/// Memory errors: what NVML counts and has pending decides, not the Xid.
const MEMORY_XIDS: [u64; 4] = [48, 63, 92, 94];
/// Events taken at one sample from one device; the rest at the next.
const EVENTS_MAX: usize = 32;
const NAME_BYTES_MAX: usize = 96;

/// Whether the kernel has NVIDIA's driver; on other machines its library is not even looked for.
pub fn present(root: &Path, library: Option<&Path>) -> bool {
    let driver = ["dev/nvidiactl", "proc/driver/nvidia/version", "dev/dxg"];
    library.is_some() || driver.iter().any(|path| root.join(path).exists())
}

/// Loads and initialises NVML: milliseconds, and seconds where the driver must bring devices up.
pub fn load(library: Option<&Path>) -> Result<Nvml, NvmlError> {
    Nvml::builder().lib_path(library.unwrap_or(Path::new(LIBRARY)).as_os_str()).init()
}

/// The devices seen so far; outlives the library, which is loaded anew after the driver was.
#[derive(Debug, Default)]
pub struct Records {
    by_uuid: BTreeMap<String, Record>,
    /// Devices that were never well enough to tell their name.
    nameless: Vec<Found>,
}

#[derive(Debug)]
struct Record {
    found: Found,
    index: u32,
    /// The last fatal Xid since the device was last away.
    xid: Option<u64>,
    away: bool,
}

impl Records {
    pub fn found(&self) -> Vec<Found> {
        self.by_uuid
            .values()
            .map(|record| record.found.clone())
            .chain(self.nameless.iter().cloned())
            .collect()
    }

    /// The driver as a whole is gone, and with it every device.
    pub fn all_lost(&mut self, reason: &str) -> Vec<Found> {
        self.nameless.clear();
        for record in self.by_uuid.values_mut() {
            record.lose(reason.to_owned());
        }
        self.found()
    }
}

impl Record {
    fn lose(&mut self, reason: String) {
        self.away = true;
        self.found = self.found.clone().lost(reason);
    }
}

/// One loading of the library.
#[derive(Debug)]
pub struct Session<'n> {
    nvml: &'n Nvml,
    root: &'n Path,
    /// One set a device, so that a lost one says nothing about the others.
    events: BTreeMap<String, EventSet<'n>>,
    pub driver: Option<String>,
    pub cuda: Option<String>,
}

impl<'n> Session<'n> {
    pub fn new(nvml: &'n Nvml, root: &'n Path) -> Self {
        let cuda = nvml.sys_cuda_driver_version().ok();
        Self {
            nvml,
            root,
            events: BTreeMap::new(),
            driver: nvml.sys_driver_version().ok().map(|text| bounded(&text, NAME_BYTES_MAX)),
            cuda: cuda.map(|version| format!("{}.{}", version / 1000, version % 1000 / 10)),
        }
    }

    /// Looks at every device. Fails where the driver as a whole does; then the library is to be loaded anew.
    pub fn sample(&mut self, records: &mut Records) -> Result<(), NvmlError> {
        let count = self.nvml.device_count()?.min(GPUS_PER_NODE_MAX as u32);
        let mut seen = Vec::new();
        let mut failures = BTreeMap::new();
        for index in 0..count {
            match self.nvml.device_by_index(index).and_then(|device| self.look(&device, index, records)) {
                Ok(uuid) => seen.push(uuid),
                Err(error) => _ = failures.insert(index, error),
            }
        }
        for (uuid, record) in &mut records.by_uuid {
            if !seen.contains(uuid) {
                let failure = failures.remove(&record.index);
                record.lose(
                    failure.map_or_else(|| "its driver lists it no longer".to_owned(), |e| e.to_string()),
                );
                self.events.remove(uuid);
            }
        }
        records.nameless = failures.iter().map(|(index, error)| nameless(*index, error)).collect();
        Ok(())
    }

    fn look(&mut self, device: &Device<'n>, index: u32, records: &mut Records) -> Result<String, NvmlError> {
        let uuid = device.uuid()?;
        let found = read(device, &uuid, self.root)?;
        let record = records.by_uuid.entry(uuid.clone()).or_insert_with(|| Record {
            found: found.clone(),
            index,
            xid: None,
            away: true,
        });
        if std::mem::replace(&mut record.away, false) {
            record.xid = None;
            self.events.remove(&uuid);
        }
        if let Some(xid) = self.fatal_xid(device, &uuid)? {
            record.xid = Some(xid);
        }
        record.index = index;
        record.found = found;
        if let Some(xid) = record.xid {
            let reason = format!("Xid {xid}: see the kernel log, and reset the device");
            record.found.gpu.unhealthy = Some(reason);
        }
        Ok(uuid)
    }

    /// Takes what events wait, without waiting for any, and answers the last fatal Xid among them.
    fn fatal_xid(&mut self, device: &Device<'n>, uuid: &str) -> Result<Option<u64>, NvmlError> {
        let mut fatal = None;
        if let Some(set) = self.events.get(uuid) {
            for _ in 0..EVENTS_MAX {
                match set.wait(0) {
                    Ok(event) => {
                        let xid = match event.event_data {
                            Some(XidError::Value(xid)) => xid,
                            Some(XidError::Unknown) => 999,
                            None => continue,
                        };
                        if !PROGRAM_XIDS.contains(&xid) && !MEMORY_XIDS.contains(&xid) {
                            fatal = Some(xid);
                        }
                    }
                    Err(error) if unreachable_by(&error) => return Err(error),
                    Err(_) => break,
                }
            }
        } else if let Some(types) = optional(device.supported_event_types())?
            && types.contains(EventTypes::CRITICAL_XID_ERROR)
            && let Ok(set) = self.nvml.create_event_set()
            && let Ok(set) = device.register_events(EventTypes::CRITICAL_XID_ERROR, set)
        {
            self.events.insert(uuid.to_owned(), set);
        }
        Ok(fatal)
    }
}

fn nameless(index: u32, error: &NvmlError) -> Found {
    let gpu = Gpu {
        uuid: format!("nvidia-{index}"),
        vendor: GpuVendor::Nvidia,
        model: "unknown".to_owned(),
        memory: Bytes::ZERO,
        pci: None,
        unhealthy: Some(error.to_string()),
        mig: false,
        outside: Bytes::ZERO,
    };
    Found { gpu, usage: None, nodes: Vec::new() }
}

fn read(device: &Device<'_>, uuid: &str, root: &Path) -> Result<Found, NvmlError> {
    let model = bounded(&device.name()?, NAME_BYTES_MAX);
    // Devices that share the host's memory have none of their own to tell.
    let memory = optional(device.memory_info())?;
    let percent = optional(device.utilization_rates())?.map_or(0, |rates| rates.gpu.min(100) as u8);
    let celsius = optional(device.temperature(TemperatureSensor::Gpu))?;
    let milliwatts = optional(device.power_usage())?;
    let gpu = Gpu {
        uuid: uuid.to_owned(),
        vendor: GpuVendor::Nvidia,
        model,
        memory: Bytes(memory.as_ref().map_or(0, |memory| memory.total)),
        pci: optional(device.pci_info())?
            .map(|pci| format!("{:04x}:{:02x}:{:02x}.0", pci.domain, pci.bus, pci.device)),
        unhealthy: memory_errors(device)?,
        mig: optional(device.mig_mode())?.is_some_and(|mode| mode.current != 0),
        outside: outside(device, root)?,
    };
    let usage = GpuUsage {
        uuid: uuid.to_owned(),
        memory: Bytes(memory.as_ref().map_or(0, |memory| memory.used)),
        percent,
        celsius: celsius.map(|celsius| celsius.min(u32::from(u16::MAX)) as u16),
        watts: milliwatts.map(|milliwatts| milliwatts / 1000),
    };
    let nodes = optional(device.minor_number())?.map(|minor| PathBuf::from(format!("/dev/nvidia{minor}")));
    Ok(Found { gpu, usage: Some(usage), nodes: nodes.into_iter().collect() })
}

/// Memory that programs hold which are none of berth's pods.
fn outside(device: &Device<'_>, root: &Path) -> Result<Bytes, NvmlError> {
    let compute = optional(device.running_compute_processes())?.unwrap_or_default();
    let graphics = optional(device.running_graphics_processes())?.unwrap_or_default();
    // A program that does both is listed twice.
    let by_pid: BTreeMap<u32, u64> = compute
        .into_iter()
        .chain(graphics)
        .filter_map(|process| match process.used_gpu_memory {
            UsedGpuMemory::Used(bytes) => Some((process.pid, bytes)),
            UsedGpuMemory::Unavailable => None,
        })
        .collect();
    let theirs = by_pid.iter().filter(|(pid, _)| !is_pod(root, **pid));
    Ok(Bytes(theirs.fold(0, |sum, (_, bytes)| sum.saturating_add(*bytes))))
}

/// Whether a process lives in one of berth's control groups.
fn is_pod(root: &Path, pid: u32) -> bool {
    let groups = fs::read_to_string(root.join(format!("proc/{pid}/cgroup"))).unwrap_or_default();
    groups.lines().any(|line| line.splitn(3, ':').nth(2).is_some_and(|path| path.starts_with("/berth/")))
}

/// Why the device's memory is not to be trusted, where it is not.
fn memory_errors(device: &Device<'_>) -> Result<Option<String>, NvmlError> {
    let uncorrected = device.total_ecc_errors(MemoryError::Uncorrected, EccCounter::Volatile);
    if let Some(errors @ 1..) = optional(uncorrected)? {
        return Ok(Some(format!("{errors} uncorrected memory errors since it was last reset")));
    }
    if optional(device.are_pages_pending_retired())? == Some(true) {
        return Ok(Some("memory pages are to be retired: reset the device".to_owned()));
    }
    let fields = [FieldId(NVML_FI_DEV_REMAPPED_PENDING), FieldId(NVML_FI_DEV_REMAPPED_FAILURE)];
    let values = optional(device.field_values_for(&fields))?.unwrap_or_default();
    let mut set = values.into_iter().map(|value| value.and_then(|sample| sample.value).is_ok_and(non_zero));
    let (pending, failed) = (set.next() == Some(true), set.next() == Some(true));
    Ok(match (failed, pending) {
        (true, _) => Some("memory rows could not be remapped: replace the device".to_owned()),
        (_, true) => Some("memory rows are to be remapped: reset the device".to_owned()),
        _ => None,
    })
}

fn non_zero(value: SampleValue) -> bool {
    match value {
        SampleValue::U32(value) => value != 0,
        SampleValue::U64(value) => value != 0,
        SampleValue::I64(value) => value != 0,
        SampleValue::F64(value) => value != 0.0,
    }
}

/// What a device does not support, or an old driver does not know, is absent; one that cannot be reached is an error.
fn optional<T>(result: Result<T, NvmlError>) -> Result<Option<T>, NvmlError> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(error) if unreachable_by(&error) => Err(error),
        Err(_) => Ok(None),
    }
}

fn unreachable_by(error: &NvmlError) -> bool {
    matches!(
        error,
        NvmlError::GpuLost | NvmlError::ResetRequired | NvmlError::NotFound | NvmlError::Uninitialized
    )
}

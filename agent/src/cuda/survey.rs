//! Whether the memory that a pod's processes have on its devices can be saved. Asked of the driver, NVML and `/proc`
//! before anything is stopped, since the driver does not promise to leave a process well that it could not save.

use std::collections::BTreeMap;
use std::fs;
use std::ops::Range;

use berth_protocol::units::Bytes;
use nvml_wrapper::Nvml;
use nvml_wrapper::enums::device::UsedGpuMemory;

use super::library::Library;
use super::{Process, State, Survey};
use crate::io::probe::nvidia;

/// CUDA keeps this range of addresses for itself, and in it maps semaphores from `UVM`; managed memory lies where its
/// user's other memory does. (As seen in processes' maps: NVIDIA tells no way to ask for it.)
const CUDAS_OWN: Range<u64> = 0x2_0000_0000..0x4_0020_0000;
const UVM: &str = "/dev/nvidia-uvm";
/// Below it are the parts that MIG splits a device into.
const PARTS: &str = "/dev/nvidia-caps/";
const DEVICES: &str = "/dev/nvidia";

/// What there is to know of one process.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Facts {
    pid: i32,
    name: String,
    /// Where it has CUDA at work.
    state: Option<State>,
    managed: bool,
    /// It has a part of a split device open.
    part: bool,
    /// It has NVIDIA's devices open.
    open: bool,
    mps: bool,
}

/// # Errors
/// Why it cannot be saved, in words.
pub fn survey(library: &Library, pids: &[i32], devices: &[String]) -> Result<Survey, String> {
    let processes = library.states(pids)?;
    let nvml = nvidia::load(None).map_err(|e| format!("NVML cannot be used: {e}"))?;
    let use_ =
        usage(&nvml, devices).map_err(|e| format!("NVML does not tell how the devices are used: {e}"))?;
    let facts: Vec<Facts> = pids
        .iter()
        .map(|pid| Facts {
            state: processes.iter().find(|process| process.pid == *pid).map(|process| process.state),
            mps: use_.mps.contains(pid),
            ..look(*pid)
        })
        .collect();
    match refusal(&use_.split, &facts) {
        Some(why) => Err(why),
        None => {
            let bytes = |process: &Process| use_.bytes.get(&process.pid).copied().unwrap_or(0);
            let bytes = Bytes(processes.iter().map(bytes).sum());
            Ok(Survey { processes, bytes })
        }
    }
}

/// Why the memory of these processes cannot be saved.
fn refusal(split: &[String], all: &[Facts]) -> Option<String> {
    let first = |wanted: fn(&Facts) -> bool| {
        all.iter().find(|facts| wanted(facts)).map(|facts| format!("{} (process {})", facts.name, facts.pid))
    };
    if let Some(uuid) = split.first() {
        return Some(format!("{uuid} is split by MIG, whose parts the driver cannot save"));
    }
    type Kind = (fn(&Facts) -> bool, &'static str);
    let kinds: [Kind; 6] = [
        (|facts| facts.part, "uses a part of a GPU that MIG has split, which the driver cannot save"),
        (|facts| facts.mps, "uses its GPU by way of MPS, which the driver cannot save"),
        (
            |facts| facts.state.is_some() && facts.managed,
            "has managed memory (UVM), which the driver cannot save",
        ),
        (
            |facts| facts.state == Some(State::Failed),
            "has been left by the driver in a state that nothing leads out of, by an earlier checkpoint",
        ),
        (
            |facts| facts.state.is_some_and(|state| state != State::Running),
            "is locked or saved already, by something other than berth",
        ),
        (
            |facts| facts.state.is_none() && facts.open,
            "holds NVIDIA's devices open and has no CUDA at work by which it could let them go",
        ),
    ];
    kinds.into_iter().find_map(|(wanted, why)| Some(format!("{} {why}", first(wanted)?)))
}

fn look(pid: i32) -> Facts {
    let read = |name: &str| fs::read(format!("/proc/{pid}/{name}")).unwrap_or_default();
    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
    let links = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
    let open: Vec<String> = links
        .filter_map(|entry| fs::read_link(entry.path()).ok()?.into_os_string().into_string().ok())
        .filter(|path| path.starts_with(DEVICES))
        .collect();
    Facts {
        pid,
        name: text(read("comm")).trim().to_owned(),
        state: None,
        managed: has_managed(&text(read("maps"))),
        part: open.iter().any(|path| path.starts_with(PARTS)),
        open: !open.is_empty(),
        mps: false,
    }
}

/// `maps` is as the kernel lists a process's mappings.
fn has_managed(maps: &str) -> bool {
    let of_uvm = maps.lines().filter(|line| line.split_whitespace().nth(5) == Some(UVM));
    let start = |line: &str| u64::from_str_radix(line.split('-').next()?, 16).ok();
    of_uvm.filter_map(start).any(|start| !CUDAS_OWN.contains(&start))
}

/// How the pod's devices are used.
#[derive(Debug, Default)]
struct Usage {
    /// By MIG.
    split: Vec<String>,
    bytes: BTreeMap<i32, u64>,
    mps: Vec<i32>,
}

fn usage(nvml: &Nvml, devices: &[String]) -> Result<Usage, String> {
    let mut found = Usage::default();
    let mut seen = Vec::new();
    for index in 0..nvml.device_count().map_err(|e| e.to_string())? {
        let Ok(device) = nvml.device_by_index(index) else { continue };
        let Ok(uuid) = device.uuid() else { continue };
        if !devices.contains(&uuid) {
            continue;
        }
        if device.mig_mode().is_ok_and(|mode| mode.current != 0) {
            found.split.push(uuid.clone());
        }
        // Older devices know none.
        let mps = device.mps_running_compute_processes().unwrap_or_default();
        found.mps.extend(mps.iter().map(|process| process.pid as i32));
        let compute = device.running_compute_processes().map_err(|e| e.to_string())?;
        let whole = device.memory_info().map_or(0, |memory| memory.used);
        let mut here = BTreeMap::new();
        for process in compute.into_iter().chain(mps) {
            let bytes = match process.used_gpu_memory {
                UsedGpuMemory::Used(bytes) => bytes,
                // No more than all that is in use.
                UsedGpuMemory::Unavailable => whole,
            };
            here.insert(process.pid as i32, bytes);
        }
        for (pid, bytes) in here {
            *found.bytes.entry(pid).or_default() += bytes;
        }
        seen.push(uuid);
    }
    match devices.iter().find(|uuid| !seen.contains(uuid)) {
        Some(uuid) => Err(format!("it does not find {uuid}")),
        None => Ok(found),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn managed_memory_is_what_lies_outside_of_cudas_own_range() {
        let plain = "200000000-200200000 rw-s 00000000 00:05 72363                            /dev/nvidiactl\n\
            205200000-205400000 rw-s 205200000 00:05 2221468                         /dev/nvidia-uvm\n\
            7f9d2c000000-7f9d2c021000 rw-p 00000000 00:00 0 \n";
        assert!(!has_managed(plain) && !has_managed(""));
        let managed = "7ea03a000000-7ea03a200000 rw-s 7ea03a000000 00:05 5 /dev/nvidia-uvm\n";
        assert!(has_managed(&format!("{plain}{managed}")));
        assert!(!has_managed("7ea03a000000-7ea03a200000 rw-s 0 00:05 5 /dev/nvidia-uvm-tools\n"));
    }

    #[test]
    fn each_refusal_names_the_process_and_the_reason() {
        let well = Facts {
            pid: 7,
            name: "train".into(),
            state: Some(State::Running),
            open: true,
            ..Facts::default()
        };
        let shell = Facts { pid: 6, name: "sh".into(), ..Facts::default() };
        let with = |facts: Facts| refusal(&[], &[shell.clone(), facts]);
        assert_eq!(with(well.clone()), None);
        assert_eq!(refusal(&[], &[]), None);
        for (facts, expect) in [
            (Facts { part: true, ..well.clone() }, "part of a GPU that MIG"),
            (Facts { mps: true, ..well.clone() }, "MPS"),
            (Facts { managed: true, ..well.clone() }, "UVM"),
            (Facts { state: Some(State::Failed), ..well.clone() }, "earlier checkpoint"),
            (Facts { state: Some(State::Locked), ..well.clone() }, "other than berth"),
            (Facts { state: None, ..well.clone() }, "no CUDA at work"),
        ] {
            let why = with(facts).unwrap();
            assert!(why.starts_with("train (process 7) ") && why.contains(expect), "{why}");
        }
        assert!(refusal(&["GPU-1".to_owned()], &[]).unwrap().contains("GPU-1 is split by MIG"));
    }
}

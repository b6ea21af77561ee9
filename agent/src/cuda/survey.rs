//! Whether the memory that a pod's processes have on its devices can be saved. Asked of the driver, NVML and `/proc`
//! before anything is stopped, since the driver does not promise to leave a process well that it could not save: what
//! cannot be known counts as what cannot be saved.

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader};
use std::ops::Range;
use std::os::unix::ffi::OsStrExt;

use berth_protocol::units::Bytes;
use nvml_wrapper::Nvml;
use nvml_wrapper::enums::device::UsedGpuMemory;
use nvml_wrapper::error::NvmlError;

use super::library::Library;
use super::{Process, State, Survey};
use crate::io::probe::nvidia;

/// CUDA keeps this range of addresses for itself, and in it maps a pool of semaphores of this size from `UVM`; managed
/// memory lies where its user's other memory does. NVIDIA tells no way to ask for it, so that this is read from maps of
/// processes as people have published them, up to driver 595: anything else of `UVM` counts as managed.
const CUDAS_OWN: Range<u64> = 0x2_0000_0000..0x3_0020_0000;
const POOL_BYTES: u64 = 2 << 20;
const UVM: &str = "/nvidia-uvm";
const DEVICES: &[u8] = b"/dev/nvidia";

/// What there is to know of one process.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Facts {
    pid: i32,
    name: String,
    /// Where it has CUDA at work.
    state: Option<State>,
    managed: bool,
    /// It has NVIDIA's devices open.
    open: bool,
    /// Why the two above are not known.
    unseen: Option<String>,
}

/// # Errors
/// Why it cannot be saved, in words.
pub fn survey(library: &Library, pids: &[i32], devices: &[String]) -> Result<Survey, String> {
    let processes = library.states(pids)?;
    for pid in pids {
        let state = processes.iter().find(|process| process.pid == *pid).map(|process| process.state);
        if let Some(why) = refusal(&Facts { state, ..look(*pid) }) {
            return Err(why);
        }
    }
    if processes.is_empty() {
        return Ok(Survey::default());
    }
    let nvml = nvidia::load(None).map_err(|e| format!("NVML cannot be used: {e}"))?;
    let each = devices.iter().map(|uuid| usage(&nvml, uuid, &processes));
    let bytes = Bytes(each.sum::<Result<u64, String>>()?);
    Ok(Survey { processes, bytes })
}

/// Why what this process has on its devices cannot be saved.
fn refusal(facts: &Facts) -> Option<String> {
    let why = match facts.state {
        _ if facts.unseen.is_some() => "cannot be looked into",
        None if !facts.open => return None,
        None => "holds NVIDIA's devices open and has no CUDA at work by which it could let them go",
        Some(_) if facts.managed => {
            "has managed memory (UVM), or what looks like it, which the driver cannot save"
        }
        Some(State::Running) => return None,
        Some(State::Failed) => {
            "has been left by the driver in a state that nothing leads out of, by an earlier checkpoint"
        }
        Some(_) => "is locked or saved already, by something other than berth",
    };
    let because = facts.unseen.as_ref().map(|e| format!(": {e}")).unwrap_or_default();
    Some(format!("{} (process {}) {why}{because}", facts.name, facts.pid))
}

fn look(pid: i32) -> Facts {
    let path = |name: &str| format!("/proc/{pid}/{name}");
    let name = fs::read_to_string(path("comm")).unwrap_or_default().trim().to_owned();
    let seen = || -> io::Result<(bool, bool)> {
        let managed = has_managed(BufReader::new(File::open(path("maps"))?))?;
        let mut open = false;
        for entry in fs::read_dir(path("fd"))? {
            // One that was closed in this moment is not held.
            open |=
                fs::read_link(entry?.path()).is_ok_and(|to| to.as_os_str().as_bytes().starts_with(DEVICES));
        }
        Ok((managed, open))
    };
    let facts = Facts { pid, name, ..Facts::default() };
    match seen() {
        Ok((managed, open)) => Facts { managed, open, ..facts },
        // It has ended.
        Err(e) if matches!(e.raw_os_error(), Some(libc::ENOENT | libc::ESRCH)) => facts,
        Err(e) => Facts { unseen: Some(e.to_string()), ..facts },
    }
}

/// `maps` is as the kernel lists a process's mappings, line by line: a program may have very many.
fn has_managed(maps: impl BufRead) -> io::Result<bool> {
    for line in maps.split(b'\n') {
        let line = line?;
        let line = String::from_utf8_lossy(&line);
        if line.split_whitespace().nth(5).is_some_and(|path| path.ends_with(UVM)) && !is_pool(&line) {
            return Ok(true);
        }
    }
    Ok(false)
}

fn is_pool(line: &str) -> bool {
    let range = || -> Option<Range<u64>> {
        let (start, end) = line.split(' ').next()?.split_once('-')?;
        Some(u64::from_str_radix(start, 16).ok()?..u64::from_str_radix(end, 16).ok()?)
    };
    range().is_some_and(|range| {
        CUDAS_OWN.contains(&range.start)
            && range.end <= CUDAS_OWN.end
            && range.end.saturating_sub(range.start) <= POOL_BYTES
    })
}

/// What these processes hold of the device's memory.
///
/// # Errors
/// Why that cannot be saved, or known.
fn usage(nvml: &Nvml, uuid: &str, processes: &[Process]) -> Result<u64, String> {
    let failed = |e: NvmlError| format!("NVML does not tell how {uuid} is used: {e}");
    let device = nvml.device_by_uuid(uuid).map_err(failed)?;
    if supported(device.mig_mode()).map_err(failed)?.is_some_and(|mode| mode.current != 0) {
        return Err(format!("{uuid} is split by MIG, whose parts the driver cannot save"));
    }
    if supported(device.mps_running_compute_processes()).map_err(failed)?.is_some_and(|all| !all.is_empty()) {
        return Err(format!("{uuid} is used by way of MPS, whose clients the driver cannot save"));
    }
    let listed = device.running_compute_processes().map_err(failed)?;
    let bytes = |process: &Process| {
        let found = listed.iter().find(|listed| i64::from(listed.pid) == i64::from(process.pid))?;
        match found.used_gpu_memory {
            UsedGpuMemory::Used(bytes) => Some(bytes),
            UsedGpuMemory::Unavailable => None,
        }
    };
    match processes.iter().map(bytes).sum() {
        Some(bytes) => Ok(bytes),
        // It does not see all of them: together they have no more than all that is in use.
        None => Ok(device.memory_info().map_err(failed)?.used),
    }
}

/// What a device does not know it does not do.
fn supported<T>(told: Result<T, NvmlError>) -> Result<Option<T>, NvmlError> {
    match told {
        Err(NvmlError::NotSupported) => Ok(None),
        told => told.map(Some),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn has_managed(maps: &str) -> bool {
        super::has_managed(maps.as_bytes()).unwrap()
    }

    #[test]
    fn whatever_of_uvm_is_not_cudas_own_pool_is_managed_memory() {
        let plain = "200000000-200200000 rw-s 00000000 00:05 72363                            /dev/nvidiactl\n\
            205200000-205400000 rw-s 205200000 00:05 2221468                         /dev/nvidia-uvm\n\
            7f9d2c000000-7f9d2c021000 rw-p 00000000 00:00 0 \n";
        assert!(!has_managed(plain) && !has_managed(""));
        for managed in [
            "7ea03a000000-7ea03a200000 rw-s 7ea03a000000 00:05 5 /dev/nvidia-uvm\n",
            "206200000-206600000 rw-s 206200000 00:05 5 /dev/nvidia-uvm\n",
            "300100000-300300000 rw-s 300100000 00:05 5 /dev/nvidia-uvm\n",
            "7ea03a000000-7ea03a200000 rw-s 7ea03a000000 00:05 5 /run/devices/nvidia-uvm\n",
        ] {
            assert!(has_managed(&format!("{plain}{managed}")), "{managed}");
        }
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
        assert_eq!(refusal(&well), None);
        assert_eq!(refusal(&Facts { pid: 6, name: "sh".into(), ..Facts::default() }), None);
        for (facts, expect) in [
            (Facts { managed: true, ..well.clone() }, "UVM"),
            (Facts { state: Some(State::Failed), ..well.clone() }, "earlier checkpoint"),
            (Facts { state: Some(State::Locked), ..well.clone() }, "other than berth"),
            (Facts { state: None, ..well.clone() }, "no CUDA at work"),
            (Facts { unseen: Some("not allowed".into()), ..well.clone() }, "looked into: not allowed"),
        ] {
            let why = refusal(&facts).unwrap();
            assert!(why.starts_with("train (process 7) ") && why.contains(expect), "{why}");
        }
    }

    #[test]
    fn a_process_that_has_ended_has_nothing_and_one_that_runs_is_seen() {
        let gone = look(i32::MAX);
        assert_eq!((gone.managed, gone.open, gone.unseen), (false, false, None));
        assert_eq!(look(std::process::id() as i32).unseen, None);
    }
}

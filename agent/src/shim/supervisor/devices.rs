//! The memory that the pod's programs have on NVIDIA's GPUs. Before a dump it leaves the devices for the programs' own,
//! where CRIU finds it; whenever they run again it comes back, here after the dump, or where they go on.
//!
//! `out` says that some of it may be out, or a program locked, from before the first lock until all are seen to run. As
//! long as it is set, every turn in which the programs may run works at bringing them back, from how they are found:
//! so it matters to nobody whether a dump was made, CRIU or the helper was killed, or the lease ran out in between. Where
//! the shim ends, the pod ends with it.

use std::fs;
use std::os::fd::{AsFd, BorrowedFd};

use berth_protocol::checkpoint::INSTEAD;
use berth_protocol::units::{BootMs, Bytes, Millis};

use super::super::cgroup::Cgroup;
use super::super::checkpoint::helper::Helper;
use super::super::checkpoint::steps::{Next, Steps};
use super::super::error::ShimError;
use super::super::lease::EndedBy;
use super::super::sys;
use super::saving::Ahead;
use super::{Phase, Supervisor};
use crate::cuda::{self, Call, Survey};
use crate::task::{DeviceGrant, SavedDevices, Task};

/// Tries to bring the memory back, each by a helper of its own, and the pauses between them, doubled each time.
const TRIES_MAX: u32 = 4;
const RETRY_MS: u64 = 250;
/// When something else is at work with a process, and when memory's limit cannot be lowered yet.
const LOOK_MS: u64 = 200;
/// What else is at work may be a copy of all of a device's memory.
const LOOKS_MAX: u32 = 3_000;
const LOWER_MS: u64 = 1_000;
/// What the host is to have left beside what comes from the devices.
const SPARE_BYTES: u64 = 64 << 20;

#[derive(Default)]
pub struct Devices {
    helper: Option<Helper>,
    work: Option<Work>,
    out: bool,
    /// Of a pod that goes on here: where its memory was.
    origin: Option<SavedDevices>,
    /// On the devices, as far as it is known.
    bytes: Bytes,
    /// The containers' limits of memory are higher by that.
    raised: bool,
    failures: u32,
    /// Times that something else was at work with a process.
    looks: u32,
    look_at: Option<BootMs>,
}

enum Work {
    /// Before a dump.
    Ahead(Steps),
    Back(Steps),
}

fn is_nvidia(grant: &DeviceGrant) -> bool {
    cuda::uuid(&grant.uuid).is_some()
}

fn granted(task: &Task) -> Vec<String> {
    task.devices.iter().filter(|grant| is_nvidia(grant)).map(|grant| grant.uuid.clone()).collect()
}

/// Why a pod with its devices is not saved by CRIU, whatever its programs do.
pub fn unsavable(task: &Task) -> Option<String> {
    if let Some(other) = task.devices.iter().find(|grant| !is_nvidia(grant)) {
        return Some(format!("memory is saved of NVIDIA's GPUs alone, and the pod has {}", other.uuid));
    }
    match task.devices.len() {
        0 | 1 => None,
        many => Some(format!(
            "the pod has {many} GPUs, and memory that GPUs give each other access to cannot be saved"
        )),
    }
}

/// Memory that the host could give now.
fn available() -> Option<Bytes> {
    let text = fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.split_whitespace().next()?.parse().ok()?;
    Some(Bytes(kib << 10))
}

impl Devices {
    /// The pod goes on with memory that is to come back onto its devices here.
    pub fn arrive(&mut self, origin: Option<SavedDevices>, task: &Task) -> Result<(), ShimError> {
        let Some(origin) = origin else { return Ok(()) };
        let here = granted(task).len();
        if origin.uuids.len() != here || task.devices.len() != here {
            let message =
                format!("it has memory of {} of NVIDIA's GPUs, and the pod {here}", origin.uuids.len());
            return Err(ShimError::Checkpoint(std::io::Error::other(message)));
        }
        (self.bytes, self.origin, self.out) = (origin.bytes, Some(origin), true);
        Ok(())
    }

    /// The programs cannot use their GPUs, or are not known to.
    pub fn is_out(&self) -> bool {
        self.out
    }

    pub fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.helper.as_ref().filter(|helper| helper.is_busy()).map(AsFd::as_fd)
    }

    /// When nothing that `fd` names tells of what is waited for.
    pub fn look_at(&self) -> Option<BootMs> {
        let helper = self.helper.as_ref().and_then(Helper::give_up_at);
        helper.into_iter().chain(self.look_at).min()
    }

    /// The programs stand still, or are to end: nothing can be had of them, and nothing holds the devices for them.
    pub fn interrupt(&mut self) {
        (self.helper, self.work, self.look_at) = (None, None, None);
    }

    /// The dump is off; what it was about to ask for is not.
    pub fn forget_dump(&mut self) {
        if let Some(Work::Ahead(_)) = self.work {
            self.interrupt();
        }
    }

    fn ask(&mut self, call: &Call, now: BootMs) -> Result<(), String> {
        let helper = match &mut self.helper {
            Some(helper) => helper,
            none => {
                let started = Helper::start();
                none.insert(started.map_err(|e| format!("cannot start what makes the driver's calls: {e}"))?)
            }
        };
        helper.ask(call, self.bytes, now);
        Ok(())
    }
}

impl Supervisor {
    fn pids(&self) -> Vec<i32> {
        let found = self.cgroup.as_ref().and_then(|cgroup| cgroup.processes().ok());
        found.unwrap_or_default().iter().map(|pid| pid.as_raw()).collect()
    }

    /// The next step on the way to a dump: finds out what there is to save, and whether it can be.
    pub(super) fn survey_devices(&mut self, hooked: bool) {
        if let Some(saving) = &mut self.saving {
            saving.ahead = Ahead::Surveying { hooked };
        }
        (self.devices.bytes, self.devices.look_at) = (Bytes::ZERO, None);
        let steps = Steps::survey(self.pids(), granted(&self.task));
        self.begin(Work::Ahead, steps);
    }

    /// The step after it: what was found leaves the devices.
    fn leave_devices(&mut self, survey: &Survey) {
        if survey.processes.is_empty() {
            return self.dump();
        }
        let uuids = granted(&self.task);
        let Some(saving) = &mut self.saving else { return };
        saving.ahead = Ahead::Leaving;
        saving.devices = Some(SavedDevices { uuids, processes: survey.processes.len(), bytes: survey.bytes });
        saving.clock(sys::boot_now());
        self.devices.bytes = survey.bytes;
        if let Err(why) = self.raise_memory() {
            return self.abort_saving(&format!("{why}; {INSTEAD}"));
        }
        let grace = self.task.template.checkpoint.grace;
        let timeout_ms = u32::try_from(grace.0).unwrap_or(u32::MAX).max(1);
        (self.devices.out, self.devices.failures, self.devices.looks) = (true, 0, 0);
        self.begin(Work::Ahead, Steps::out(&survey.processes, timeout_ms));
    }

    /// Where the pod goes on: CRIU brings back as much more memory as was on the devices, and meanwhile the driver wakes.
    pub(super) fn await_devices(&mut self) {
        if !self.devices.out {
            return;
        }
        if let Err(why) = self.raise_memory() {
            return self.restore_failed(why);
        }
        // Should it not start now, that is said when it is needed.
        let _ = self.devices.ask(&Call::States { pids: Vec::new() }, sys::boot_now());
    }

    /// Has the programs use their GPUs again, where they may be kept from it.
    pub(super) fn bring_back(&mut self, now: BootMs) {
        let devices = &self.devices;
        let waits = devices.look_at.is_some_and(|at| at > now)
            || devices.helper.as_ref().is_some_and(Helper::is_busy);
        if waits {
            return;
        }
        self.devices.look_at = None;
        if !self.devices.out {
            self.devices.helper = None;
            return self.lower_memory(now);
        }
        if !self.restoring.is_over() || self.devices.work.is_some() || self.error.is_some() {
            return;
        }
        let (pairs, wanted) = match &self.devices.origin {
            None => (Vec::new(), 0),
            Some(origin) => {
                let pairs: Vec<_> = origin.uuids.iter().cloned().zip(granted(&self.task)).collect();
                let moved = pairs.iter().any(|(old, new)| old != new);
                (if moved { pairs } else { Vec::new() }, origin.processes)
            }
        };
        let steps = Steps::back(self.pids(), pairs, wanted);
        self.begin(Work::Back, steps);
    }

    fn begin(&mut self, kind: fn(Steps) -> Work, mut steps: Steps) {
        let next = steps.first();
        self.devices.work = Some(kind(steps));
        self.follow(next);
    }

    /// Takes in what the driver has answered.
    pub(super) fn hear_devices(&mut self) {
        let now = sys::boot_now();
        let Some(answer) = self.devices.helper.as_mut().and_then(|helper| helper.hear(now)) else { return };
        if self.devices.helper.as_ref().is_some_and(Helper::is_spent) {
            self.devices.helper = None;
        }
        let next = match &mut self.devices.work {
            Some(Work::Ahead(steps) | Work::Back(steps)) => steps.next(answer),
            None => return,
        };
        self.follow(next);
    }

    fn follow(&mut self, next: Next) {
        let now = sys::boot_now();
        let next = match next {
            Next::Ask(call) => match self.devices.ask(&call, now) {
                Ok(()) => return,
                Err(why) => Next::Failed(why),
            },
            next => next,
        };
        match self.devices.work.take() {
            Some(Work::Ahead(_)) => self.went_ahead(next),
            Some(Work::Back(_)) => self.came_back(next, now),
            None => {}
        }
    }

    fn went_ahead(&mut self, next: Next) {
        match next {
            Next::Surveyed(survey) => {
                let hooked = self
                    .saving
                    .as_ref()
                    .is_some_and(|saving| matches!(saving.ahead, Ahead::Surveying { hooked: true }));
                if hooked || self.task.template.checkpoint.quiesce.is_empty() {
                    self.leave_devices(&survey);
                } else {
                    self.run_quiesce();
                }
            }
            Next::Done => self.dump(),
            Next::Failed(why) | Next::Lost(why) => self.abort_saving(&format!("{why}; {INSTEAD}")),
            Next::Ask(_) | Next::Wait => {}
        }
    }

    fn came_back(&mut self, next: Next, now: BootMs) {
        match next {
            Next::Done => {
                let devices = &mut self.devices;
                (devices.out, devices.helper, devices.origin, devices.failures) = (false, None, None, 0);
                self.notice_begun();
            }
            Next::Wait | Next::Ask(_) | Next::Surveyed(_) => {
                self.devices.looks += 1;
                if self.devices.looks >= LOOKS_MAX {
                    return self
                        .lose_devices("another call of the driver's is at work with it and does not end");
                }
                self.devices.look_at = Some(now.plus(Millis(LOOK_MS)));
            }
            Next::Failed(why) => {
                self.devices.helper = None;
                self.devices.failures += 1;
                if self.devices.failures >= TRIES_MAX {
                    return self.lose_devices(&why);
                }
                let pause = RETRY_MS << self.devices.failures;
                self.devices.look_at = Some(now.plus(Millis(pause)));
            }
            Next::Lost(why) => self.lose_devices(&why),
        }
    }

    /// Programs that wait for their GPU for ever are worth less than their last checkpoint.
    fn lose_devices(&mut self, why: &str) {
        self.devices.interrupt();
        let name = self.containers.first().map(|container| container.name.clone());
        let message = format!("the memory of its GPU cannot be brought back: {why}");
        let error = match (self.task.restore, self.phase, name) {
            (true, Phase::Started(_), Some(container)) => ShimError::Restore { container, message },
            _ => ShimError::DeviceMemory { message },
        };
        self.error.get_or_insert(error);
        self.policy.stop(EndedBy::Container, Millis::ZERO, sys::boot_now());
    }

    /// The containers' groups, with the limits of memory that their job has.
    fn memory_limits(&self) -> Vec<(Cgroup, Bytes)> {
        let limit = |name: &_| {
            let spec = self.task.template.containers.iter().find(|spec| spec.name == *name);
            spec.map(|spec| spec.limits.memory)
        };
        let running = self.containers.iter().map(|container| (&container.name, &container.cgroup));
        let waiting = self.restoring.waiting.iter().map(|revival| (&revival.name, revival.cgroup()));
        running.chain(waiting).filter_map(|(name, cgroup)| Some((cgroup.clone(), limit(name)?))).collect()
    }

    /// What leaves the devices is memory of the programs, and counts against their limits.
    fn raise_memory(&mut self) -> Result<(), String> {
        let bytes = self.devices.bytes;
        if let Some(free) = available().filter(|free| free.0 < bytes.0.saturating_add(SPARE_BYTES)) {
            return Err(format!(
                "the node's memory must take in {bytes} that the pod has on its GPU, and {free} of it are free"
            ));
        }
        self.devices.raised = true;
        for (cgroup, limit) in self.memory_limits() {
            let more = Bytes(limit.0.saturating_add(bytes.0).saturating_add(SPARE_BYTES));
            cgroup.limit_memory(more).map_err(|e| e.to_string())?;
        }
        Ok(())
    }

    fn lower_memory(&mut self, now: BootMs) {
        if !self.devices.raised {
            return;
        }
        // The driver may take its time to give back what it has put onto the devices.
        let lowered = |(cgroup, limit): &(Cgroup, Bytes)| cgroup.limit_memory(*limit).unwrap_or(false);
        self.devices.raised = !self.memory_limits().iter().all(lowered);
        self.devices.look_at = self.devices.raised.then(|| now.plus(Millis(LOWER_MS)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ONE: &str = "GPU-01020304-0506-0708-090a-0b0c0d0e0f01";
    const TWO: &str = "GPU-01020304-0506-0708-090a-0b0c0d0e0f02";

    fn grant(uuid: &str) -> DeviceGrant {
        DeviceGrant {
            uuid: uuid.to_owned(),
            cdi: None,
            nodes: Vec::new(),
            files: Vec::new(),
            env: Vec::new(),
        }
    }

    #[test]
    fn what_no_program_of_the_pod_can_change_is_refused_at_once() {
        let mut task = super::super::super::testing::task();
        assert_eq!(unsavable(&task), None);
        task.devices = vec![grant(ONE)];
        assert_eq!(unsavable(&task), None);
        for (devices, expect) in [
            (vec![grant(ONE), grant(TWO)], "2 GPUs"),
            (vec![grant("0000:03:00.0")], "the pod has 0000:03:00.0"),
            (vec![grant("GPU-3a0f1c2b4d5e6f70")], "the pod has GPU-3a0f1c2b4d5e6f70"),
        ] {
            task.devices = devices;
            let why = unsavable(&task).unwrap();
            assert!(why.contains(expect), "{why}");
        }
    }

    #[test]
    fn memory_comes_back_only_where_there_are_as_many_devices() {
        let mut task = super::super::super::testing::task();
        let origin = SavedDevices { uuids: vec![ONE.to_owned()], processes: 1, bytes: Bytes(5) };
        assert!(Devices::default().arrive(Some(origin.clone()), &task).is_err());
        task.devices = vec![grant(TWO)];
        let mut devices = Devices::default();
        devices.arrive(Some(origin), &task).unwrap();
        assert!(devices.is_out());
        let mut devices = Devices::default();
        devices.arrive(None, &task).unwrap();
        assert!(!devices.is_out());
    }

    #[test]
    fn the_host_tells_its_free_memory() {
        assert!(available().is_some_and(|free| free.0 > 1 << 20));
    }
}

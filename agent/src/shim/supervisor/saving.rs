//! A checkpoint of the running pod: a criu for each container, all held where the tasks stand until the last does,
//! so that together they are one cut; then what the containers have written is archived, and all go on. Whatever
//! goes wrong, the pod runs on.

use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;

use berth_protocol::checkpoint::{CheckpointKind, INSTEAD};
use berth_protocol::job::{CheckpointMode, ContainerSpec};
use berth_protocol::units::{BootMs, Millis, Timestamp};
use nix::unistd::Pid;

use super::super::checkpoint::archive::{self, Archiver};
use super::super::checkpoint::criu::{Criu, Place, Word};
use super::super::checkpoint::hook::{Ended, Hook};
use super::super::checkpoint::restore::host_time;
use super::super::checkpoint::rpc::Call;
use super::super::checkpoint::{Parts, dump};
use super::super::lease::Goal;
use super::super::rootfs::{self, Home};
use super::super::sys;
use super::asking::Asking;
use super::devices;
use super::{Phase, Supervisor};
use crate::task::{Report, Saved, SavedContainer, SavedDevices, Task, file};

/// A dump that takes longer is given up.
const SAVE_MS_MAX: u64 = 600_000;
/// The stage at which everything is dumped and the tasks stand.
const STANDING: &str = "post-dump";

/// A checkpoint being taken.
pub struct Saving {
    level: u64,
    /// The pod is to stand still afterwards.
    hold: bool,
    begun: BootMs,
    at: Timestamp,
    half: Parts,
    pub kind: CheckpointKind,
    pub ahead: Ahead,
    dumps: Vec<Dump>,
    archivers: Vec<Archiver>,
    /// All tasks stand, and what they have written is being archived.
    standing: bool,
    /// The freezer holds them.
    pub frozen: bool,
    log_records: u64,
    containers: Vec<SavedContainer>,
    /// What has left its devices.
    pub devices: Option<SavedDevices>,
}

/// What comes before a dump, or instead of one.
pub enum Ahead {
    Asking(Asking),
    /// The driver is asked what there is to save; again once the hook is behind it.
    Surveying {
        hooked: bool,
    },
    Quiescing(Hook),
    /// Memory leaves the pod's devices.
    Leaving,
    Nothing,
}

struct Dump {
    criu: Criu,
    stands: bool,
    done: bool,
}

/// Why the pod cannot be saved by CRIU, whatever its programs do.
pub fn undumpable(task: &Task) -> Option<String> {
    match task.criu {
        None => Some("this node has no CRIU that works (see `berth-agent doctor`)".to_owned()),
        Some(_) => devices::unsavable(task),
    }
}

impl Saving {
    /// A criu has ended in the middle of its dump.
    pub fn is_broken_off(&self) -> bool {
        self.dumps.iter().any(|dump| dump.criu.is_broken_off())
    }

    pub fn fds(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        let dumps = self.dumps.iter().filter(|dump| !dump.done).map(|dump| dump.criu.as_fd());
        let busy = self.archivers.iter().filter(|archiver| archiver.code.is_none());
        let hook = match &self.ahead {
            Ahead::Quiescing(hook) => Some(hook),
            _ => None,
        };
        dumps.chain(busy.map(|archiver| archiver.pidfd.as_fd())).chain(hook.into_iter().flat_map(Hook::fds))
    }

    pub fn ended(&mut self, pid: Pid, code: u8) {
        if let Ahead::Quiescing(hook) = &mut self.ahead {
            hook.ended(pid, code);
        }
        if let Some(archiver) = self.archivers.iter_mut().find(|archiver| archiver.pid == pid) {
            archiver.code = Some(code);
        }
    }

    pub fn level(&self) -> u64 {
        self.level
    }

    pub fn begun(&self) -> BootMs {
        self.begun
    }

    /// From here on the programs do nothing else.
    pub fn clock(&mut self, now: BootMs) {
        self.begun = now;
    }

    pub fn give_up_at(&self) -> BootMs {
        let waits = match &self.ahead {
            Ahead::Asking(asking) => asking.answer_by().since(self.begun),
            _ => Millis::ZERO,
        };
        self.begun.plus(Millis(waits.0 + SAVE_MS_MAX))
    }

    /// When nothing that `fds` names tells of what is waited for.
    pub fn look_at(&self, now: BootMs) -> Option<BootMs> {
        match &self.ahead {
            Ahead::Asking(asking) => Some(asking.look_at(now)),
            Ahead::Quiescing(hook) => Some(hook.give_up_at()),
            // The devices' own deadlines hold.
            Ahead::Surveying { .. } | Ahead::Leaving | Ahead::Nothing => None,
        }
    }
}

impl Supervisor {
    /// Begins to save, where the pod's state allows it.
    pub(super) fn save(&mut self, level: u64, hold: bool) {
        if self.saving.as_ref().is_some_and(|saving| saving.level == level) {
            return;
        }
        // An agent that has restarted asks again, and is told again.
        let of_it = |report: &Report| match report {
            Report::Saved { saved, .. } => saved.level == level,
            Report::SaveFailed { level: failed, .. } => *failed == level,
            _ => false,
        };
        if let Some(told) = self.last_save.clone().filter(of_it) {
            return self.server.send(&told);
        }
        if let Err(why) = self.begin_saving(level, hold) {
            let run = self.task.run;
            self.tell_saved(Report::SaveFailed { run, level, why });
        }
    }

    fn begin_saving(&mut self, level: u64, hold: bool) -> Result<(), String> {
        if self.saving.is_some() {
            return Err("another checkpoint of the pod is being taken".to_owned());
        }
        let Phase::Running(_) = self.phase else { return Err("the pod does not run yet".to_owned()) };
        if self.policy.goal(sys::boot_now()) != Goal::Run || self.freeze.is_some() {
            return Err("the pod is frozen, or about to end".to_owned());
        }
        if self.containers.iter().any(|container| container.exit.is_some()) {
            return Err("one of its containers has ended".to_owned());
        }
        if !self.resuming.is_over() {
            return Err("the resume hook of the checkpoint before has not ended".to_owned());
        }
        if self.devices.is_out() {
            return Err("what the pod had on its GPU has not come back from the checkpoint before".to_owned());
        }
        self.resuming.forget();
        let all = self.dir.join(file::CHECKPOINTS_DIR);
        let half = Parts::new(all.join(format!("{level}.half")));
        remove_all(half.dir()).map_err(|e| format!("cannot begin: {e}"))?;
        self.saving = Some(Saving {
            level,
            hold,
            begun: sys::boot_now(),
            at: sys::now(),
            kind: CheckpointKind::Criu,
            ahead: Ahead::Nothing,
            dumps: Vec::new(),
            archivers: Vec::new(),
            standing: false,
            frozen: false,
            log_records: 0,
            containers: Vec::new(),
            devices: None,
            half,
        });
        let policy = &self.task.template.checkpoint;
        if policy.asks() {
            self.ask();
        } else if policy.mode == CheckpointMode::Cooperative {
            self.abort_saving("the job names neither checkpoint.signal nor checkpoint.ready to ask it by");
        } else {
            self.quiesce();
        }
        Ok(())
    }

    /// The way to a dump, as far as nothing is stopped on it: whether there can be one.
    pub(super) fn quiesce(&mut self) {
        let users = self.init.as_ref().is_some_and(|init| init.users.is_some());
        let users =
            users.then(|| "the pod has users of its own, with whom CRIU could not bring it back".to_owned());
        match undumpable(&self.task).or(users) {
            Some(why) => self.abort_saving(&format!("{why}; {INSTEAD}")),
            None if self.task.devices.is_empty() => self.run_quiesce(),
            None => self.survey_devices(false),
        }
    }

    /// The job's hook, where it has one.
    pub(super) fn run_quiesce(&mut self) {
        let command = &self.task.template.checkpoint.quiesce;
        let ahead = match command.is_empty() {
            true => Ahead::Nothing,
            false => match self.start_hook("quiesce", command) {
                Ok(hook) => Ahead::Quiescing(hook),
                Err(why) => return self.abort_saving(&why),
            },
        };
        let Some(saving) = &mut self.saving else { return };
        saving.ahead = ahead;
        if command.is_empty() {
            self.dump();
        } else {
            self.resuming.due(&self.task);
        }
    }

    fn hear_quiescing(&mut self) {
        let Some(Saving { ahead: Ahead::Quiescing(hook), .. }) = &mut self.saving else { return };
        match hook.hear(sys::boot_now()) {
            None => {}
            Some(Ended::Well) if self.task.devices.is_empty() => self.dump(),
            Some(Ended::Well) => self.survey_devices(true),
            Some(Ended::Badly(why)) => self.abort_saving(&why),
        }
    }

    /// Starts a criu for each container.
    pub(super) fn dump(&mut self) {
        let (Some(saving), Some(program)) = (&mut self.saving, &self.task.criu) else { return };
        saving.ahead = Ahead::Nothing;
        // Without their devices' memory programs may have stood for a while.
        if saving.devices.is_none() {
            saving.clock(sys::boot_now());
        }
        if self.containers.iter().any(|container| container.exit.is_some()) {
            return self.abort_saving("one of its containers has ended");
        }
        if let Some(stray) = self.containers.iter().find_map(dump::stray) {
            return self.abort_saving(&format!("{stray} belongs to none of the pod's process trees"));
        }
        let begun = self.containers.iter().try_for_each(|container| -> io::Result<()> {
            let images = saving.half.images(&container.name);
            super::super::make_private_dir(&images)?;
            let (options, facts) = dump::plan(&self.task, &self.dir, container)?;
            let place = Place { time: host_time(), cgroups: Vec::new() };
            let mut criu = Criu::begin(program, Call::Dump, &images, &[], place)?;
            criu.ask(options);
            saving.dumps.push(Dump { criu, stands: false, done: false });
            saving.containers.push(facts);
            Ok(())
        });
        match begun {
            Ok(()) => self.resuming.due(&self.task),
            Err(e) => self.abort_saving(&format!("cannot begin: {e}")),
        }
    }

    /// Programs that were asked answer while a dump is on its way already: their own files are as good, and better than
    /// a dump of nothing.
    fn hear_late_answer(&mut self) {
        let Some(saving) = &mut self.saving else { return };
        let late = !saving.standing && !matches!(saving.ahead, Ahead::Asking(_));
        if late && self.containers.iter().all(|container| container.rests) {
            saving.dumps.clear();
            saving.containers.clear();
            saving.devices = None;
            self.devices.forget_dump();
            match remove_all(saving.half.dir()) {
                Ok(()) => self.take_files(),
                Err(e) => self.abort_saving(&e.to_string()),
            }
        }
    }

    /// Takes in what the criu processes and archivers have said and done.
    pub(super) fn hear_saving(&mut self) {
        self.hear_answer();
        self.hear_quiescing();
        self.hear_late_answer();
        let Some(saving) = &mut self.saving else { return };
        let mut failed = None;
        for dump in &mut saving.dumps {
            while let Some(word) = dump.criu.hear() {
                match word {
                    Word::Stage(stage) if stage == STANDING => dump.stands = true,
                    Word::Stage(_) => dump.criu.answer(true),
                    Word::Done(_) => dump.done = true,
                    Word::Failed(why) => failed = Some(why),
                }
            }
        }
        if let Some(code) =
            saving.archivers.iter().filter_map(|archiver| archiver.code).find(|code| *code != 0)
        {
            failed = Some(format!("tar ended with code {code}: is the disk full?"));
        }
        if let Some(why) = failed {
            return self.abort_saving(&why);
        }
        if !saving.standing
            && !saving.dumps.is_empty()
            && saving.dumps.iter().all(|dump| dump.stands)
            && let Err(e) = self.stand()
        {
            return self.abort_saving(&format!("cannot archive what the pod has written: {e}"));
        }
        let Some(saving) = &mut self.saving else { return };
        let archived = saving.archivers.iter().all(|archiver| archiver.code.is_some());
        if saving.standing && archived {
            for dump in &mut saving.dumps {
                if std::mem::take(&mut dump.stands) {
                    dump.criu.answer(true);
                }
            }
            if saving.dumps.iter().all(|dump| dump.done) {
                self.complete_saving();
            }
        }
    }

    /// All tasks stand: the log ends here, and what was written is what belongs to the images.
    pub(super) fn stand(&mut self) -> io::Result<()> {
        let Some(saving) = &mut self.saving else { return Ok(()) };
        for container in &mut self.containers {
            super::super::pump::drain_rest(&mut container.pumps, &mut self.log, &container.name);
        }
        saving.log_records = self.log.last_seq();
        saving.standing = true;
        if saving.hold {
            // They go from the tracer's hold into the freezer's.
            self.policy.hold(true);
            saving.frozen = true;
            if let Some(cgroup) = &self.cgroup {
                cgroup.freeze(true).map_err(io::Error::other)?;
            }
        }
        for container in &self.task.template.containers {
            let home = Home::new(&self.dir, &container.name);
            super::super::make_private_dir(&saving.half.container(&container.name))?;
            fs::copy(home.dir().join("config.json"), saving.half.config(&container.name))?;
            saving.archivers.push(archive::pack(&home.upper(), &saving.half.upper(&container.name))?);
            if self.task.workspace.is_some() {
                let (from, to) = (home.workspace_upper(), saving.half.workspace(&container.name));
                saving.archivers.push(archive::pack(&from, &to)?);
            }
        }
        let kept = self.dir.join(file::CHECKPOINT_DIR);
        if fs::read_dir(&kept)?.next().is_some() {
            saving.archivers.push(archive::pack(&kept, &saving.half.kept())?);
        }
        fs::create_dir_all(saving.half.dir().join("volumes"))?;
        for (index, (volume, given)) in self.task.template.volumes.iter().zip(&self.task.volumes).enumerate()
        {
            if given.is_none() || volume.save {
                let from = given.clone().unwrap_or_else(|| rootfs::volume_dir(&self.dir, index));
                saving.archivers.push(archive::pack(&from, &saving.half.volume(index))?);
            }
        }
        Ok(())
    }

    fn complete_saving(&mut self) {
        let Some(mut saving) = self.saving.take() else { return };
        self.ask_no_more();
        if saving.kind == CheckpointKind::Cooperative {
            // There is nothing of theirs that a start could not find out.
            let name = |container: &ContainerSpec| container.name.clone();
            let names = self.task.template.containers.iter().map(name);
            saving.containers =
                names.map(|name| SavedContainer { name, pipes: Vec::new(), mounts: Vec::new() }).collect();
        }
        self.let_thaw(&saving);
        let saved = Saved {
            level: saving.level,
            at: saving.at,
            kind: saving.kind,
            frozen_ms: sys::boot_now().since(saving.begun).0,
            log_records: saving.log_records,
            containers: saving.containers.clone(),
            devices: saving.devices.clone(),
        };
        let whole = self.dir.join(file::CHECKPOINTS_DIR).join(saving.level.to_string());
        let kept = (|| -> io::Result<()> {
            fs::write(saving.half.saved(), serde_json::to_vec(&saved)?)?;
            remove_all(&whole)?;
            fs::rename(saving.half.dir(), &whole)
        })();
        let run = self.task.run;
        match kept {
            Ok(()) => self.tell_saved(Report::Saved { run, saved }),
            Err(e) => {
                self.policy.hold(false);
                let _ = remove_all(saving.half.dir());
                let why = format!("cannot keep the checkpoint: {e}");
                self.tell_saved(Report::SaveFailed { run, level: saved.level, why });
            }
        }
    }

    /// Gives the checkpoint up; the pod goes on, as far as its policy lets it.
    pub(super) fn abort_saving(&mut self, why: &str) {
        let Some(mut saving) = self.saving.take() else { return };
        self.devices.forget_dump();
        for dump in &mut saving.dumps {
            if dump.stands {
                // It takes back what it did to the tasks better than the kernel can.
                dump.criu.answer(false);
            } else {
                dump.criu.kill();
            }
        }
        if saving.is_broken_off() {
            self.broken_off = Some(sys::boot_now());
        }
        for archiver in saving.archivers.iter().filter(|archiver| archiver.code.is_none()) {
            let _ = nix::sys::signal::kill(archiver.pid, nix::sys::signal::Signal::SIGKILL);
        }
        self.policy.hold(false);
        self.ask_no_more();
        self.let_thaw(&saving);
        let (run, level, why) = (self.task.run, saving.level, why.to_owned());
        let half = saving.half.clone();
        drop(saving);
        let _ = remove_all(half.dir());
        self.tell_saved(Report::SaveFailed { run, level, why });
    }

    /// A thaw is to have something to undo.
    fn let_thaw(&mut self, saving: &Saving) {
        if saving.frozen && self.freeze.is_none() {
            self.freeze = Some(super::Freeze { confirmed: false, fenced: false });
        }
    }

    /// Told now, and to whoever connects later.
    fn tell_saved(&mut self, report: Report) {
        self.server.send(&report);
        self.last_save = Some(report);
    }
}

fn remove_all(dir: &Path) -> io::Result<()> {
    match fs::remove_dir_all(dir) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
        _ => Ok(()),
    }
}

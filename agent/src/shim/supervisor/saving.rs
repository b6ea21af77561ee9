//! A checkpoint of the running pod: a criu for each container, all held where the tasks stand until the last does,
//! so that together they are one cut; then what the containers have written is archived, and all go on. Whatever
//! goes wrong, the pod runs on.

use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;

use berth_protocol::checkpoint::CheckpointKind;
use berth_protocol::units::{BootMs, Millis, Timestamp};
use nix::unistd::Pid;

use super::super::checkpoint::archive::{self, Archiver};
use super::super::checkpoint::criu::{Criu, Place, Word};
use super::super::checkpoint::restore::host_time;
use super::super::checkpoint::rpc::Call;
use super::super::checkpoint::{Parts, dump};
use super::super::lease::Goal;
use super::super::rootfs::{self, Home};
use super::super::sys;
use super::{Phase, Supervisor};
use crate::task::{Report, Saved, SavedContainer, file};

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
    dumps: Vec<Dump>,
    archivers: Vec<Archiver>,
    /// All tasks stand, and what they have written is being archived.
    standing: bool,
    log_records: u64,
    containers: Vec<SavedContainer>,
}

struct Dump {
    criu: Criu,
    stands: bool,
    done: bool,
}

impl Saving {
    pub fn fds(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        let dumps = self.dumps.iter().filter(|dump| !dump.done).map(|dump| dump.criu.as_fd());
        let busy = self.archivers.iter().filter(|archiver| archiver.code.is_none());
        dumps.chain(busy.map(|archiver| archiver.pidfd.as_fd()))
    }

    pub fn ended(&mut self, pid: Pid, code: u8) {
        if let Some(archiver) = self.archivers.iter_mut().find(|archiver| archiver.pid == pid) {
            archiver.code = Some(code);
        }
    }

    pub fn give_up_at(&self) -> BootMs {
        self.begun.plus(Millis(SAVE_MS_MAX))
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
        let program = self.task.criu.clone();
        let program = program.ok_or("this node has no CRIU that works: see `berth-agent doctor`")?;
        if let Some(stray) = self.containers.iter().find_map(dump::stray) {
            return Err(format!("{stray} belongs to none of the pod's process trees"));
        }
        let all = self.dir.join(file::CHECKPOINTS_DIR);
        let half = Parts::new(all.join(format!("{level}.half")));
        let mut saving = Saving {
            level,
            hold,
            begun: sys::boot_now(),
            at: sys::now(),
            dumps: Vec::new(),
            archivers: Vec::new(),
            standing: false,
            log_records: 0,
            containers: Vec::new(),
            half,
        };
        let begun = (|| -> io::Result<()> {
            remove_all(saving.half.dir())?;
            for container in &self.containers {
                let images = saving.half.images(&container.name);
                super::super::make_private_dir(&images)?;
                let (options, facts) = dump::plan(&self.task, &self.dir, container)?;
                let place = Place { time: host_time(), cgroups: Vec::new() };
                let criu = Criu::start(&program, Call::Dump, &images, options, &[], place)?;
                saving.dumps.push(Dump { criu, stands: false, done: false });
                saving.containers.push(facts);
            }
            Ok(())
        })();
        match begun {
            Ok(()) => {
                self.saving = Some(saving);
                Ok(())
            }
            Err(e) => {
                let half = saving.half.clone();
                drop(saving);
                let _ = remove_all(half.dir());
                Err(format!("cannot begin: {e}"))
            }
        }
    }

    /// Takes in what the criu processes and archivers have said and done.
    pub(super) fn hear_saving(&mut self) {
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
    fn stand(&mut self) -> io::Result<()> {
        let Some(saving) = &mut self.saving else { return Ok(()) };
        for container in &mut self.containers {
            super::super::pump::drain_rest(&mut container.pumps, &mut self.log, &container.name);
        }
        saving.log_records = self.log.last_seq();
        saving.standing = true;
        if saving.hold {
            // They go from the tracer's hold into the freezer's.
            self.policy.hold(true);
            if let Some(cgroup) = &self.cgroup {
                cgroup.freeze(true).map_err(io::Error::other)?;
            }
        }
        for container in &self.task.template.containers {
            let home = Home::new(&self.dir, &container.name);
            saving.archivers.push(archive::pack(&home.upper(), &saving.half.upper(&container.name))?);
            if self.task.workspace.is_some() {
                let (from, to) = (home.workspace_upper(), saving.half.workspace(&container.name));
                saving.archivers.push(archive::pack(&from, &to)?);
            }
        }
        fs::create_dir_all(saving.half.dir().join("volumes"))?;
        for (index, volume) in self.task.volumes.iter().enumerate() {
            if volume.is_none() {
                let from = rootfs::volume_dir(&self.dir, index);
                saving.archivers.push(archive::pack(&from, &saving.half.volume(index))?);
            }
        }
        Ok(())
    }

    fn complete_saving(&mut self) {
        let Some(saving) = self.saving.take() else { return };
        let saved = Saved {
            level: saving.level,
            at: saving.at,
            kind: CheckpointKind::Criu,
            frozen_ms: sys::boot_now().since(saving.begun).0,
            log_records: saving.log_records,
            containers: saving.containers,
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
        for dump in &mut saving.dumps {
            if dump.stands {
                // It takes back what it did to the tasks better than the kernel can.
                dump.criu.answer(false);
            } else {
                dump.criu.kill();
            }
        }
        for archiver in saving.archivers.iter().filter(|archiver| archiver.code.is_none()) {
            let _ = nix::sys::signal::kill(archiver.pid, nix::sys::signal::Signal::SIGKILL);
        }
        self.policy.hold(false);
        if saving.standing && saving.hold && self.freeze.is_none() {
            // So that a thaw has something to undo.
            self.freeze = Some(super::Freeze { confirmed: false, fenced: false });
        }
        let (run, level, why) = (self.task.run, saving.level, why.to_owned());
        let half = saving.half.clone();
        drop(saving);
        let _ = remove_all(half.dir());
        self.tell_saved(Report::SaveFailed { run, level, why });
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

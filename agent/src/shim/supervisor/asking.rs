//! Cooperative checkpoints: the programs are asked to save themselves, and what they then have on disk is the
//! checkpoint. One that ends with `SAVED_ITSELF` begins anew where it goes on; one that leaves the job's ready file
//! stands still while its files are taken.

use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::path::Path;
use std::str::FromStr;

use berth_protocol::checkpoint::CheckpointKind;
use berth_protocol::job::CheckpointMode;
use berth_protocol::units::{BootMs, Millis};
use nix::sys::signal::{Signal, kill};
use nix::unistd::{UnlinkatFlags, unlinkat};

use super::super::container::Container;
use super::super::create;
use super::super::lease::EndedBy;
use super::super::pump::drain_rest;
use super::super::rootfs::Inside;
use super::super::sys;
use super::saving::{Ahead, undumpable};
use super::{Phase, Supervisor};
use crate::task::file;

/// "I have saved: begin me anew with the same arguments", as HTCondor has it.
pub const SAVED_ITSELF: u8 = 85;
/// How often the ready file is looked for.
const LOOK: Millis = Millis(20);
/// A dump beside its memory, and the memory that it writes in a millisecond: on the slow side of what was measured.
const DUMP_MS: u64 = 500;
const DUMP_BYTES_PER_MS: u64 = 256 << 10;

/// How long a dump of so much memory may take.
fn estimate(bytes: u64) -> Millis {
    Millis(DUMP_MS + bytes / DUMP_BYTES_PER_MS)
}

fn resident(container: &Container) -> u64 {
    let pages = |pid: &nix::unistd::Pid| -> Option<u64> {
        fs::read_to_string(format!("/proc/{pid}/statm")).ok()?.split(' ').nth(1)?.parse().ok()
    };
    let processes = container.cgroup.processes().unwrap_or_default();
    // SAFETY: no pointers.
    let page = unsafe { libc::sysconf(libc::_SC_PAGESIZE) }.max(0) as u64;
    processes.iter().filter_map(pages).sum::<u64>() * page
}

/// The programs have until then.
pub struct Asking {
    answer_by: BootMs,
    /// The ready file is there: the pod is being frozen.
    ready: bool,
}

impl Asking {
    pub fn answer_by(&self) -> BootMs {
        self.answer_by
    }

    pub fn look_at(&self, now: BootMs) -> BootMs {
        if self.ready { now.plus(Millis(super::RECHECK_MS)) } else { now.plus(LOOK).min(self.answer_by) }
    }
}

/// The file in the container, on whatever mount of its.
fn is_there(container: &Container, path: &str) -> bool {
    Inside::of_process(container.pid).is_ok_and(|root| {
        sys::open_in_root(root.fd(), Path::new(path), libc::O_PATH | libc::O_NOFOLLOW).is_ok()
    })
}

/// Takes away what an earlier checkpoint has left there.
fn remove(container: &Container, path: &str) -> io::Result<()> {
    let path = Path::new(path);
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else { return Ok(()) };
    let root = Inside::of_process(container.pid)?;
    let removed = sys::open_in_root(root.fd(), parent, libc::O_PATH | libc::O_DIRECTORY)
        .and_then(|dir| Ok(unlinkat(dir.as_fd(), name, UnlinkatFlags::NoRemoveDir)?));
    match removed {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
        _ => Ok(()),
    }
}

impl Supervisor {
    /// Asks every program of the pod: by the file `/run/berth/save`, and the job's signal.
    pub(super) fn ask(&mut self) {
        let policy = &self.task.template.checkpoint;
        let cleared = match (&policy.ready, self.containers.first()) {
            (Some(ready), Some(first)) => remove(first, ready).map_err(|e| {
                format!("cannot take away the ready file {ready} of the checkpoint before: {e}")
            }),
            _ => Ok(()),
        };
        let Some(saving) = &mut self.saving else { return };
        let (level, begun) = (saving.level(), saving.begun());
        if let Err(why) = cleared {
            return self.abort_saving(&why);
        }
        // Where CRIU can follow, it needs a part of the time.
        let dump = match policy.mode {
            CheckpointMode::Auto if undumpable(&self.task).is_none() => {
                estimate(self.containers.iter().map(resident).sum())
            }
            _ => Millis::ZERO,
        };
        let answer_by = begun.plus(policy.grace.saturating_sub(dump));
        saving.ahead = Ahead::Asking(Asking { answer_by, ready: false });
        self.asked = true;
        // A full disk loses this word alone, and so does a pod that puts something else there. It may: what is written to
        // by its name would be whatever a link of the pod's leads to.
        let (word, at) = (self.dir.join(file::SAVE_WORD), self.dir.join(file::BERTH_DIR).join(file::SAVE));
        let _ = fs::write(&word, format!("{level}\n")).and_then(|()| fs::rename(&word, at));
        let signal = policy.signal.as_deref().and_then(|name| Signal::from_str(name).ok());
        for container in self.containers.iter().filter(|container| container.exit.is_none()) {
            if let Some(signal) = signal {
                // Not yet reaped, so the number is still its own.
                let _ = kill(container.pid, signal);
            }
        }
    }

    /// Looks for an answer.
    pub(super) fn hear_answer(&mut self) {
        let now = sys::boot_now();
        let policy = &self.task.template.checkpoint;
        let Some(saving) = &mut self.saving else { return };
        let Ahead::Asking(asking) = &mut saving.ahead else { return };
        if self.containers.iter().all(|container| container.rests) {
            return self.take_files();
        }
        if !asking.ready {
            let first = self.containers.first().filter(|first| first.exit.is_none());
            asking.ready =
                first.zip(policy.ready.as_ref()).is_some_and(|(first, path)| is_there(first, path));
        }
        if asking.ready {
            let Some(cgroup) = &self.cgroup else { return };
            saving.frozen = true;
            match cgroup.freeze(true) {
                // As long as the saving may take: the kernel has only to stop it.
                Ok(()) if !cgroup.is_frozen() => {}
                Ok(()) => self.take_files(),
                Err(e) => self.abort_saving(&e.to_string()),
            }
            return;
        }
        if now < asking.answer_by {
            return;
        }
        let undumpable = undumpable(&self.task);
        if policy.mode == CheckpointMode::Auto && undumpable.is_none() {
            return self.quiesce();
        }
        let waited_for = match &policy.ready {
            Some(ready) => format!("has neither ended with code {SAVED_ITSELF} nor made {ready}"),
            None => format!("has not ended with code {SAVED_ITSELF}"),
        };
        let late = self.containers.iter().find(|container| !container.rests);
        let name = late.map_or("", |container| container.name.as_str());
        let why = format!("asked to save itself, container {name} {waited_for} within {}", policy.grace);
        let why = match (policy.mode, undumpable) {
            (CheckpointMode::Auto, Some(too)) => format!("{why}, and {too}"),
            _ => why,
        };
        self.abort_saving(&why);
    }

    /// All have saved themselves: their files are the checkpoint.
    pub(super) fn take_files(&mut self) {
        if let Some(saving) = &mut self.saving {
            saving.ahead = Ahead::Nothing;
            saving.kind = CheckpointKind::Cooperative;
            saving.clock(sys::boot_now());
        }
        if let Err(e) = self.stand() {
            self.abort_saving(&format!("cannot archive what the pod has written: {e}"));
        }
    }

    /// What ended to be begun anew begins.
    pub(super) fn begin_anew(&mut self) {
        let Phase::Running(at) = self.phase else { return };
        if !self.containers.iter().any(|container| container.rests) {
            return;
        }
        self.asked = false;
        self.phase = Phase::Started(at);
        for (container, spec) in self.containers.iter_mut().zip(&self.task.template.containers) {
            if !container.rests {
                continue;
            }
            drain_rest(&mut container.pumps, &mut self.log, &container.name);
            let users = self.init.as_ref().and_then(|init| init.users.as_ref());
            let made = create::again(&self.dir, spec, container.cgroup.clone(), users);
            match made.and_then(|made| made.start().map(|()| made)) {
                Ok(made) => *container = made,
                Err(error) => {
                    container.rests = false;
                    self.error.get_or_insert(error);
                    self.policy.stop(EndedBy::Container, Millis::ZERO, sys::boot_now());
                }
            }
        }
        super::super::protect_from_oom();
        sys::trim_memory();
    }

    /// The question is settled, one way or the other.
    pub(super) fn ask_no_more(&self) {
        let _ = fs::remove_file(self.dir.join(file::BERTH_DIR).join(file::SAVE));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn more_memory_takes_longer() {
        assert_eq!(estimate(0), Millis(500));
        assert_eq!(estimate(1 << 30), Millis(500 + 4096));
    }

    #[test]
    fn every_signal_that_a_job_may_name_is_one() {
        for name in ["SIGUSR1", "SIGTERM", "SIGCONT", "SIGPWR", "SIGIO", "SIGWINCH"] {
            assert!(Signal::from_str(name).is_ok(), "{name}");
        }
    }
}

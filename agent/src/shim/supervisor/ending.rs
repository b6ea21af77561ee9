//! The end of a run: all of the pod dead, its end on disk, then told, then everything taken away.

use std::io;
use std::time::Duration;

use berth_protocol::ids::Run;
use berth_protocol::units::Millis;

use super::super::exit::{self, Facts};
use super::super::log;
use super::super::pump::drain_rest;
use super::super::rootfs;
use super::super::sys;
use super::{Phase, Supervisor};
use crate::task::{Exit, Report, file};

impl Supervisor {
    /// All of the pod dead, its end on disk, then told, then everything taken away.
    pub(super) fn finish(mut self) -> io::Result<()> {
        self.end_processes();
        for container in &mut self.containers {
            drain_rest(&mut container.pumps, &mut self.log, &container.name);
        }
        let exit = self.describe_end();
        // Whoever hears of the end finds what led to it, whatever becomes of the machine.
        if let Err(e) = log::sync(&self.dir.join(file::LOG_DIR)) {
            eprintln!("berth-agent shim: the log may not outlast the machine's end: {e}");
        }
        if let Err(e) = exit::write(&self.dir, &exit) {
            // A full disk: what the pod itself has written makes room. Outputs are lost then.
            eprintln!("berth-agent shim: cannot write the exit file: {e}; removing what the pod has written");
            let _ = self.clean_up(false);
            exit::write(&self.dir, &exit)?;
        }
        let report = Report::Exited { exit };
        self.server.send_to_followers(&Report::Log { seq: self.log.last_seq() });
        self.server.send(&report);
        // Who connected while the end was being written is told as well, and nobody connects in vain from here on.
        let _ = std::fs::remove_file(self.dir.join(file::SOCKET));
        self.server.receive(std::slice::from_ref(&report));
        self.clean_up(!self.task.template.outputs.is_empty())
    }

    fn end_processes(&mut self) {
        // What is at work with them for the driver would hold them up.
        self.devices.interrupt();
        self.restoring.waiting.clear();
        loop {
            self.kill();
            let dead = match &self.cgroup {
                Some(cgroup) => cgroup.kill(Duration::from_millis(super::super::KILL_MS_MAX)),
                None => Ok(()),
            };
            self.reap();
            match dead {
                Ok(()) if self.init_ends() => return,
                // To say that the pod has ended would be a lie.
                Ok(()) => eprintln!("berth-agent shim: the pod's init does not end; trying again"),
                Err(e) => eprintln!("berth-agent shim: {e}; trying again"),
            }
        }
    }

    /// Waits for the end of the pod's init, which itself waits for all of its namespace: those whose parent is this process
    /// are gone only once they are reaped, and a criu that was killed leaves such.
    fn init_ends(&mut self) -> bool {
        let give_up_at = sys::boot_now().plus(Millis(super::super::KILL_MS_MAX));
        loop {
            self.reap();
            let Some(init) = &self.init else { return true };
            let mut fds = [sys::want(&init.pidfd, libc::POLLIN)];
            if sys::poll(&mut fds, Some(super::RECHECK_MS as i32)).is_ok_and(|ready| ready > 0) {
                self.reap();
                return true;
            }
            if sys::boot_now() >= give_up_at {
                return false;
            }
        }
    }

    fn describe_end(&mut self) -> Exit {
        let run: Run = self.task.run;
        let started_at = match self.phase {
            Phase::Created => None,
            Phase::Started(at) | Phase::Running(at) => Some(at),
        };
        for container in &mut self.containers {
            if let Some(Err(error)) = container.begun() {
                self.error.get_or_insert(error);
            }
        }
        exit::exit(&Facts {
            run,
            started_at,
            finished_at: sys::now(),
            log_records: self.log.last_seq(),
            exits: &self.exits,
            ended_by: self.policy.ended_by(),
            error: self.error.as_ref(),
        })
    }

    /// The run's end is known: what fails here is tried again by the agent, which sees that this shim has failed.
    fn clean_up(&self, keep_written: bool) -> io::Result<()> {
        let ended = super::super::end(&self.task).map_err(io::Error::other);
        // Removing the files through a mount would remove what is mounted.
        rootfs::unmount_all(&self.task, &self.dir)
            .map_err(|e| io::Error::other(format!("cannot unmount: {e}")))?;
        super::super::clear(&self.dir, keep_written).map_err(io::Error::other)?;
        ended
    }
}

//! A start from a checkpoint: one container after the other, each by a criu of its own, under the pod's lease like
//! anything else that runs: criu and what it restores are in the pod's control groups, so a freeze holds them all.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd};

use berth_protocol::units::{Millis, Timestamp};
use nix::unistd::Pid;

use super::super::checkpoint::criu::{Criu, Word};
use super::super::checkpoint::restore::{self, Revival};
use super::super::container;
use super::super::error::ShimError;
use super::super::lease::EndedBy;
use super::super::spec;
use super::super::sys;
use super::{Phase, Supervisor};
use crate::task::{Report, file};

/// What is still to come back.
#[derive(Default)]
pub struct Restoring {
    /// The first is at work while `criu` is there.
    pub waiting: std::collections::VecDeque<Revival>,
    criu: Option<Criu>,
    /// Children that ended before criu had said whose they are.
    ended: BTreeMap<Pid, u8>,
}

impl Restoring {
    pub fn is_over(&self) -> bool {
        self.waiting.is_empty()
    }

    pub fn is_at_work(&self) -> bool {
        self.criu.is_some()
    }

    pub fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.criu.as_ref().map(AsFd::as_fd)
    }

    /// A child ended that is no container's known process.
    pub fn ended(&mut self, pid: Pid, code: u8) {
        if !self.is_over() {
            self.ended.insert(pid, code);
        }
    }
}

impl Supervisor {
    pub(super) fn restore_next(&mut self) {
        let first = self.containers.first().map(|container| container.pid);
        let Some(revival) = self.restoring.waiting.front_mut() else { return };
        let program = restore::program(&self.task);
        match revival.start(program, first) {
            Ok(criu) => self.restoring.criu = Some(criu),
            Err(e) => self.restore_failed(format!("cannot start {}: {e}", program.display())),
        }
    }

    pub(super) fn hear_restoring(&mut self) {
        while let Some(word) = self.restoring.criu.as_mut().and_then(Criu::hear) {
            match word {
                Word::Stage(_) => self.restoring.criu.iter().for_each(|criu| criu.answer(true)),
                Word::Failed(why) => return self.restore_failed(why),
                Word::Done(None) => return self.restore_failed("criu names no process".to_owned()),
                Word::Done(Some(pid)) => self.restored(Pid::from_raw(pid)),
            }
        }
    }

    fn restored(&mut self, pid: Pid) {
        if let Some(criu) = self.restoring.criu.take() {
            criu.wait_for_end();
        }
        let own_network = spec::own_network(&self.task.template);
        let (Some(revival), Some(init)) = (self.restoring.waiting.pop_front(), &self.init) else { return };
        match revival.finish(pid, init, own_network) {
            Ok(mut container) => {
                if let Some(code) = self.restoring.ended.remove(&pid) {
                    container.exit = Some(container::Exit { code, oom_killed: false });
                    self.exits.push((container.name.clone(), container::Exit { code, oom_killed: false }));
                }
                self.containers.push(container);
                self.restore_next();
            }
            Err(error) => self.fail(error),
        }
        if self.restoring.is_over() && self.error.is_none() {
            self.resuming.due(&self.task);
            self.notice_begun();
        }
    }

    pub(super) fn now_running(&mut self, at: Timestamp) {
        self.phase = Phase::Running(at);
        self.restoring.ended.clear();
        self.server.send(&Report::Running { run: self.task.run, started_at: at });
        if self.task.restore {
            // The checkpoint has served; a later run of the epoch begins from the start.
            let _ = std::fs::remove_dir_all(self.dir.join(file::RESTORE_DIR));
            super::super::protect_from_oom();
            sys::trim_memory();
        }
    }

    pub(super) fn restore_failed(&mut self, message: String) {
        let container = self.restoring.waiting.front().map(|revival| revival.name.clone());
        self.restoring.criu = None;
        if let Some(container) = container {
            self.fail(ShimError::Restore { container, message });
        }
    }

    fn fail(&mut self, error: ShimError) {
        self.error.get_or_insert(error);
        self.restoring.waiting.clear();
        self.policy.stop(EndedBy::Container, Millis::ZERO, sys::boot_now());
    }
}

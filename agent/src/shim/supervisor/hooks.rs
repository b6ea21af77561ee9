//! The job's own commands around a dump: `quiesce` before it, without which nothing is dumped, and `resume` whenever
//! what was dumped goes on, here or elsewhere.

use std::os::fd::BorrowedFd;

use berth_protocol::log::Stream;
use berth_protocol::units::BootMs;
use nix::unistd::Pid;

use super::super::checkpoint::hook::{Ended, Hook};
use super::super::sys;
use super::{Phase, Supervisor};
use crate::task::{Report, Task};

#[derive(Default)]
pub struct Resuming {
    /// It is to run once the pod does.
    due: bool,
    hook: Option<Hook>,
    /// The last one's, for whoever connects later, until the next checkpoint begins.
    failed: Option<Report>,
}

impl Resuming {
    pub fn due(&mut self, task: &Task) {
        self.due = !task.template.checkpoint.resume.is_empty();
    }

    pub fn is_over(&self) -> bool {
        !self.due && self.hook.is_none()
    }

    pub fn failed(&self) -> Option<&Report> {
        self.failed.as_ref()
    }

    /// A checkpoint begins, which ends with a hook of its own.
    pub fn forget(&mut self) {
        self.failed = None;
    }

    pub fn fds(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.hook.iter().flat_map(Hook::fds)
    }

    pub fn give_up_at(&self) -> Option<BootMs> {
        self.hook.as_ref().map(Hook::give_up_at)
    }

    pub fn ended(&mut self, pid: Pid, code: u8) {
        self.hook.iter_mut().for_each(|hook| hook.ended(pid, code));
    }
}

impl Supervisor {
    /// Starts one of the hooks in the pod's first container.
    pub(super) fn start_hook(&self, name: &'static str, argv: &[String]) -> Result<Hook, String> {
        let (Some(container), Some(spec)) = (self.containers.first(), self.task.template.containers.first())
        else {
            return Err("the pod has no container".to_owned());
        };
        let within = self.task.template.checkpoint.grace;
        Hook::start(name, argv, (&self.dir, container, spec), within).map_err(|e| {
            let command = argv.first().map_or("", String::as_str);
            format!("the {name} hook `{command}` cannot be started in container {}: {e}", container.name)
        })
    }

    pub(super) fn resume(&mut self) {
        let Phase::Running(_) = self.phase else { return };
        if !self.resuming.due || self.devices.is_out() || self.hooks_end() {
            return;
        }
        self.resuming.due = false;
        match self.start_hook("resume", &self.task.template.checkpoint.resume) {
            Ok(hook) => self.resuming.hook = Some(hook),
            Err(why) => self.tell_unresumed(why),
        }
    }

    pub(super) fn hear_resuming(&mut self) {
        let now = sys::boot_now();
        let Some(hook) = &mut self.resuming.hook else { return };
        if self.freeze.is_some() {
            // It stands still with the pod, and has its time when they go on.
            hook.give_time(now, self.task.template.checkpoint.grace);
        }
        let Some(ended) = hook.hear(now) else { return };
        self.resuming.hook = None;
        if let Ended::Badly(why) = ended
            && !self.hooks_end()
        {
            self.tell_unresumed(why);
        }
    }

    /// The container of the hooks is gone or about to go, and they with it: that is no failure of theirs.
    fn hooks_end(&self) -> bool {
        self.policy.ended_by().is_some() || self.containers.first().is_none_or(|first| first.exit.is_some())
    }

    /// The pod goes on, perhaps as its quiesce hook has left it. Nobody waits for this one, so that it is told where
    /// somebody looks who wonders: in the pod's log, and by its message.
    fn tell_unresumed(&mut self, why: String) {
        if let Some(container) = self.containers.first() {
            let line = format!("berth: {why}\n");
            self.log.append(sys::now(), &container.name, Stream::Stderr, line.as_bytes());
            // The program may say nothing more.
            self.server.send_to_followers(&Report::Log { seq: self.log.last_seq() });
        }
        let report = Report::ResumeFailed { run: self.task.run, why };
        self.server.send(&report);
        self.resuming.failed = Some(report);
    }
}

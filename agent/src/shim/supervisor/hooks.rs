//! The job's own commands around a dump: `quiesce` before it, without which nothing is dumped, and `resume` whenever
//! what was dumped goes on, here or elsewhere.

use std::os::fd::BorrowedFd;

use berth_protocol::log::Stream;
use berth_protocol::units::BootMs;
use nix::unistd::Pid;

use super::super::checkpoint::hook::{Ended, Hook};
use super::super::sys;
use super::{Phase, Supervisor};
use crate::task::Task;

#[derive(Default)]
pub struct Resuming {
    /// It is to run once the pod does.
    due: bool,
    hook: Option<Hook>,
}

impl Resuming {
    pub fn due(&mut self, task: &Task) {
        self.due = !task.template.checkpoint.resume.is_empty();
    }

    pub fn is_over(&self) -> bool {
        !self.due && self.hook.is_none()
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
        if self.devices.is_out() || !std::mem::take(&mut self.resuming.due) {
            return;
        }
        match self.start_hook("resume", &self.task.template.checkpoint.resume) {
            Ok(hook) => self.resuming.hook = Some(hook),
            Err(why) => self.tell_in_log(&why),
        }
    }

    pub(super) fn hear_resuming(&mut self) {
        let Some(hook) = &mut self.resuming.hook else { return };
        let Some(ended) = hook.hear(sys::boot_now()) else { return };
        self.resuming.hook = None;
        if let Ended::Badly(why) = ended {
            self.tell_in_log(&why);
        }
    }

    /// Nobody waits for the hook, and whoever looks why the program is stuck looks there.
    fn tell_in_log(&mut self, why: &str) {
        let Some(container) = self.containers.first() else { return };
        let line = format!("berth: {why}\n");
        let _ = self.log.append(sys::now(), &container.name, Stream::Stderr, line.as_bytes());
    }
}

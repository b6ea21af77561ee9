//! The shim's loop: waits for orders, output, deadlines and ends, and makes the pod do what the policy says. All
//! waiting is in one poll; what happened is always asked of the kernel, never inferred from a signal.

mod restoring;
mod saving;

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use berth_protocol::ids::{ContainerName, Run};
use berth_protocol::units::{BootMs, Millis, Timestamp};
use nix::sys::signal::{SigSet, Signal, kill};
use nix::sys::signalfd::{SfdFlags, SignalFd};

use super::cgroup::Cgroup;
use super::container::{self, Container};
use super::control::Server;
use super::create::{self, Made};
use super::error::ShimError;
use super::exit::{self, Facts};
use super::init::Init;
use super::lease::{EndedBy, Goal, Policy};
use super::log::Writer;
use super::process;
use super::pump::drain_rest;
use super::quota::Meter;
use super::rootfs::{self, Home};
use super::sys::{self, Alarm};
use crate::task::{Exit, Order, Report, Task, file};
use restoring::Restoring;
use saving::Saving;

/// How soon an unconfirmed freeze and an undead process are looked at again.
const RECHECK_MS: u64 = 5;

pub struct Supervisor {
    task: Task,
    dir: PathBuf,
    signals: SignalFd,
    alarm: Alarm,
    server: Server,
    log: Writer,
    policy: Policy,
    containers: Vec<Container>,
    restoring: Restoring,
    saving: Option<Saving>,
    /// How the last saving ended.
    last_save: Option<Report>,
    cgroup: Option<Cgroup>,
    init: Option<Init>,
    meter: Meter,
    phase: Phase,
    /// The freezer was asked, and perhaps has answered.
    freeze: Option<Freeze>,
    stop_signal_sent: bool,
    /// In the order in which they ended.
    exits: Vec<(ContainerName, container::Exit)>,
    error: Option<ShimError>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// Waits for its start.
    Created,
    /// The start was ordered; programs may not have begun.
    Started(Timestamp),
    /// All programs have begun.
    Running(Timestamp),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Freeze {
    confirmed: bool,
    fenced: bool,
}

impl Supervisor {
    /// Opens socket and log; from here on agents may connect.
    pub fn new(task: Task, dir: &Path, signals: SigSet) -> io::Result<Self> {
        let policy = Policy::new(&task.template.on_disconnect, task.template.grace);
        Ok(Self {
            server: Server::bind(dir)?,
            log: Writer::open(&dir.join(file::LOG_DIR), task.log_bytes_max)?,
            signals: SignalFd::with_flags(&signals, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?,
            alarm: Alarm::new()?,
            policy,
            containers: Vec::new(),
            restoring: Restoring::default(),
            saving: None,
            last_save: None,
            cgroup: None,
            init: None,
            meter: Meter::new(&task, dir, sys::boot_now()),
            phase: Phase::Created,
            freeze: None,
            stop_signal_sent: false,
            exits: Vec::new(),
            error: None,
            dir: dir.to_owned(),
            task,
        })
    }

    /// Returns when the pod is over, told, and cleaned up.
    pub fn run(mut self) -> io::Result<()> {
        match self.create() {
            Ok(()) => {
                // Creating has lowered the score to that of the containers, and used much memory once.
                super::protect_from_oom();
                sys::trim_memory();
                self.server.send(&Report::Created { run: self.task.run });
                while !self.restoring.is_over() || self.containers.iter().any(|c| c.exit.is_none()) {
                    self.turn()?;
                }
            }
            Err(e) => self.error = Some(e),
        }
        self.finish()
    }

    fn create(&mut self) -> Result<(), ShimError> {
        let cgroup = super::pod_cgroup(&self.task)?;
        let cgroup = self.cgroup.insert(cgroup);
        let Made { init, containers, revivals } = create::create(&self.task, &self.dir, cgroup)?;
        (self.init, self.containers) = (Some(init), containers);
        self.restoring.waiting = revivals.into();
        Ok(())
    }

    /// Waits for something to happen and sees to all that has.
    fn turn(&mut self) -> io::Result<()> {
        self.wait()?;
        for order in self.server.receive(&self.greeting()) {
            self.obey(order);
        }
        self.read_signals();
        let before = self.log.last_seq();
        for container in &mut self.containers {
            container.pumps.iter_mut().for_each(|pump| pump.drain(&mut self.log, &container.name));
        }
        if self.log.last_seq() != before {
            self.server.send_to_followers(&Report::Log { seq: self.log.last_seq() });
        }
        self.notice_begun();
        self.hear_restoring();
        self.reap();
        self.hear_saving();
        self.act()
    }

    fn wait(&mut self) -> io::Result<()> {
        let mut fds = vec![sys::want(&self.signals, libc::POLLIN), sys::want(&self.alarm, libc::POLLIN)];
        fds.extend(self.server.poll_fds());
        for container in &self.containers {
            let open = container.pumps.iter().filter_map(|pump| pump.fd());
            fds.extend(open.map(|fd| sys::want(&fd, libc::POLLIN)));
            if container.exit.is_none() {
                fds.push(sys::want(&container.pidfd, libc::POLLIN));
                fds.extend(container.beginning().map(|fd| sys::want(&fd, libc::POLLIN)));
            }
        }
        let criu = self.saving.iter().flat_map(Saving::fds).chain(self.restoring.fd());
        fds.extend(criu.map(|fd| sys::want(&fd, libc::POLLIN)));
        sys::poll(&mut fds, None)?;
        Ok(())
    }

    fn obey(&mut self, order: Order) {
        let now = sys::boot_now();
        match order {
            Order::Start { lease } => self.policy.grant(lease),
            // Only a start starts.
            Order::Renew { lease } if self.phase != Phase::Created => self.policy.grant(lease),
            Order::Renew { .. } => {}
            Order::Pause { pause } => self.policy.pause(pause),
            Order::Stop { grace } => self.policy.stop(EndedBy::Order, grace, now),
            Order::Save { level, hold } => self.save(level, hold),
            Order::Release => self.policy.hold(false),
            // Seen to by the server.
            Order::Follow { .. } => {}
        }
    }

    /// SIGTERM comes when the machine shuts down: the pod has its grace, then goes elsewhere.
    fn read_signals(&mut self) {
        while let Ok(Some(signal)) = self.signals.read_signal() {
            if signal.ssi_signo == Signal::SIGTERM as u32 {
                self.policy.stop(EndedBy::Order, self.task.template.grace, sys::boot_now());
            }
        }
    }

    fn notice_begun(&mut self) {
        let Phase::Started(at) = self.phase else { return };
        if self.task.restore {
            return;
        }
        for container in &mut self.containers {
            if let Some(Err(error)) = container.begun() {
                self.error.get_or_insert(error);
            }
        }
        if self.containers.iter().all(|container| container.beginning().is_none()) && self.error.is_none() {
            self.phase = Phase::Running(at);
            self.server.send(&Report::Running { run: self.task.run, started_at: at });
        }
    }

    fn reap(&mut self) {
        while let Some((pid, code)) = super::reap() {
            let Some(container) = self.containers.iter_mut().find(|c| c.pid == pid) else {
                self.saving.iter_mut().for_each(|saving| saving.ended(pid, code));
                self.restoring.ended(pid, code);
                if let Some(error) = self.meter.ended(pid, code) {
                    self.error.get_or_insert(error);
                    self.policy.stop(EndedBy::Container, self.task.template.grace, sys::boot_now());
                }
                continue;
            };
            let oom_killed = code != 0 && container.cgroup.oom_kills() > 0;
            let exit = container::Exit { code, oom_killed };
            container.exit = Some(exit);
            if self.phase != Phase::Created {
                self.exits.push((container.name.clone(), exit));
            }
            // What it left running would be nobody's.
            let _ = container.cgroup.signal_kill();
            if code != 0 && self.containers.iter().any(|c| c.exit.is_none()) {
                self.policy.stop(EndedBy::Container, self.task.template.grace, sys::boot_now());
            }
        }
    }

    /// Brings the pod to what the policy wants of it now, and sets the alarm for when that changes.
    fn act(&mut self) -> io::Result<()> {
        let now = sys::boot_now();
        let mut recheck = None;
        match self.policy.goal(now) {
            // Tasks that a dump holds stand still already; a deadline comes before it.
            Goal::Run | Goal::Freeze { fenced: false, .. } if self.saving.is_some() => {
                let give_up_at = self.saving.as_ref().map(Saving::give_up_at).filter(|at| *at > now);
                if give_up_at.is_none() {
                    self.abort_saving("it took too long");
                }
                let next = self.policy.next_change(now).into_iter().chain(give_up_at).min();
                return self.alarm.set(next);
            }
            _ => self.abort_saving("the pod was fenced, or is to end"),
        }
        match self.policy.goal(now) {
            Goal::Wait => {}
            Goal::Run if self.phase == Phase::Created => self.start(),
            Goal::Run => self.thaw(),
            // Not begun, it is as good as frozen.
            Goal::Freeze { .. } if self.phase == Phase::Created => {}
            Goal::Freeze { confirm_by, fenced } => recheck = self.keep_frozen(now, confirm_by, fenced),
            Goal::Stop { .. } => {
                if !std::mem::replace(&mut self.stop_signal_sent, true) {
                    self.ask_to_stop();
                }
                self.thaw();
            }
            Goal::Kill => {
                self.kill();
                recheck = Some(now.plus(Millis(RECHECK_MS)));
            }
        }
        self.meter.turn(now);
        let next = self.policy.next_change(now).into_iter().chain(recheck).chain(self.meter.due()).min();
        self.alarm.set(next)
    }

    fn start(&mut self) {
        self.phase = Phase::Started(sys::now());
        if self.task.restore {
            return self.start_restoring();
        }
        for container in &self.containers {
            if let Err(error) = container.start() {
                self.error.get_or_insert(error);
                self.policy.stop(EndedBy::Container, Millis::ZERO, sys::boot_now());
            }
        }
    }

    fn thaw(&mut self) {
        if self.freeze.take().is_none() {
            return;
        }
        if let Some(cgroup) = &self.cgroup {
            let _ = cgroup.freeze(false);
        }
        if let Phase::Running(started_at) = self.phase {
            self.server.send(&Report::Running { run: self.task.run, started_at });
        }
    }

    /// Returns when to look again.
    fn keep_frozen(&mut self, now: BootMs, confirm_by: Option<BootMs>, fenced: bool) -> Option<BootMs> {
        let cgroup = self.cgroup.as_ref()?;
        let before = self.freeze;
        let mut freeze = before.unwrap_or(Freeze { confirmed: false, fenced });
        freeze.fenced = fenced;
        if !freeze.confirmed {
            // Asked again each time: v1 may answer FREEZING for ever while a task keeps coming back.
            let asked = cgroup.freeze(true);
            freeze.confirmed = asked.is_ok() && cgroup.is_frozen();
        }
        self.freeze = Some(freeze);
        if freeze.confirmed {
            if before != self.freeze {
                self.server.send(&Report::Paused { run: self.task.run, fenced });
            }
            return None;
        }
        match confirm_by {
            Some(deadline) if deadline <= now => {
                self.policy.freeze_failed(now);
                self.kill();
            }
            _ => {}
        }
        Some(now.plus(Millis(RECHECK_MS)))
    }

    /// By SIGTERM, or the signal that the container's image names.
    fn ask_to_stop(&self) {
        for (container, root) in self.containers.iter().zip(&self.task.roots) {
            if container.exit.is_none() {
                // Not yet reaped, so the number is still its own.
                let _ = kill(container.pid, process::stop_signal(root));
            }
        }
    }

    /// Everything, at once.
    fn kill(&self) {
        if let Some(init) = &self.init {
            init.kill();
        }
        if let Some(cgroup) = &self.cgroup {
            let _ = cgroup.signal_kill();
        }
    }

    /// What an agent is told that connects now.
    fn greeting(&self) -> Vec<Report> {
        let run = self.task.run;
        let mut reports = match self.phase {
            Phase::Created => vec![Report::Created { run }],
            Phase::Started(_) => Vec::new(),
            Phase::Running(started_at) => vec![Report::Running { run, started_at }],
        };
        reports.extend(self.last_save.clone());
        if let Some(Freeze { confirmed: true, fenced }) = self.freeze {
            reports.push(Report::Paused { run, fenced });
        }
        reports
    }

    /// All of the pod dead, its end on disk, then told, then everything taken away.
    fn finish(mut self) -> io::Result<()> {
        self.end_processes();
        for container in &mut self.containers {
            drain_rest(&mut container.pumps, &mut self.log, &container.name);
        }
        let exit = self.describe_end();
        if let Err(e) = exit::write(&self.dir, &exit) {
            // A full disk: what the pod itself has written makes room. Outputs are lost then.
            eprintln!("berth-agent shim: cannot write the exit file: {e}; removing what the pod has written");
            self.clean_up(false);
            exit::write(&self.dir, &exit)?;
        }
        let report = Report::Exited { exit };
        self.server.send_to_followers(&Report::Log { seq: self.log.last_seq() });
        self.server.send(&report);
        // Who connected while the end was being written is told as well, and nobody connects in vain from here on.
        let _ = std::fs::remove_file(self.dir.join(file::SOCKET));
        self.server.receive(std::slice::from_ref(&report));
        self.clean_up(!self.task.template.outputs.is_empty());
        Ok(())
    }

    fn end_processes(&mut self) {
        loop {
            self.kill();
            let dead = match &self.cgroup {
                Some(cgroup) => cgroup.kill(Duration::from_millis(super::KILL_MS_MAX)),
                None => Ok(()),
            };
            let init = self.init.as_ref().map(|init| &init.pidfd);
            let ended = init.is_none_or(|fd| {
                let mut fds = [sys::want(fd, libc::POLLIN)];
                sys::poll(&mut fds, Some(super::KILL_MS_MAX as i32)).is_ok_and(|n| n > 0)
            });
            self.reap();
            match dead {
                Ok(()) if ended => return,
                // To say that the pod has ended would be a lie.
                Ok(()) => eprintln!("berth-agent shim: the pod's init does not end; trying again"),
                Err(e) => eprintln!("berth-agent shim: {e}; trying again"),
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

    /// The run's end is known: what fails here is tried again by the agent.
    fn clean_up(&self, keep_written: bool) {
        if let Err(e) = super::end(&self.task) {
            eprintln!("berth-agent shim: {e}");
        }
        if let Err(e) = self.unmount() {
            // Removing the files through a mount would remove what is mounted.
            return eprintln!("berth-agent shim: cannot unmount: {e}");
        }
        if let Err(e) = super::clear(&self.dir, keep_written) {
            eprintln!("berth-agent shim: {e}");
        }
    }

    fn unmount(&self) -> io::Result<()> {
        for container in &self.task.template.containers {
            let home = Home::new(&self.dir, &container.name);
            for mounted in [home.rootfs(), home.workspace(), home.cgroups()] {
                rootfs::unmount(&mounted)?;
            }
        }
        for index in 0..self.task.template.volumes.len() {
            rootfs::unmount(&rootfs::volume_dir(&self.dir, index))?;
        }
        rootfs::unmount(&self.dir.join("netns"))
    }
}

//! The shim's loop: waits for orders, output, deadlines and ends, and makes the pod do what the policy says. All
//! waiting is in one poll; what happened is always asked of the kernel, never inferred from a signal.

mod asking;
mod devices;
mod ending;
mod hooks;
mod restoring;
mod saving;

use std::io;
use std::path::{Path, PathBuf};

use berth_protocol::ids::ContainerName;
use berth_protocol::units::{BootMs, Millis, Timestamp};
use nix::sys::signal::{SigSet, Signal, kill};
use nix::sys::signalfd::{SfdFlags, SignalFd};

use super::cgroup::Cgroup;
use super::container::{self, Container};
use super::control::Server;
use super::create::{self, Made};
use super::error::ShimError;
use super::init::Init;
use super::lease::{EndedBy, Goal, Policy};
use super::log::Writer;
use super::process;
use super::quota::Meter;
use super::sys::{self, Alarm};
use crate::task::{Order, Report, Task, file};
use devices::Devices;
use hooks::Resuming;
use restoring::Restoring;
use saving::Saving;

/// How soon an unconfirmed freeze and an undead process are looked at again.
const RECHECK_MS: u64 = 5;
/// A program that fails so soon after a dump of it was broken off has failed of that: what criu put into it to be told of
/// its memory it can no longer take out, and it ends there by a trap.
const BROKEN_MS: u64 = 5_000;

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
    /// When the last dump was broken off.
    broken_off: Option<BootMs>,
    /// The programs were asked to save themselves; one that then ends with `SAVED_ITSELF` wants to be begun anew.
    asked: bool,
    resuming: Resuming,
    devices: Devices,
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
            broken_off: None,
            // One whose memory was saved may have been about to answer.
            asked: task.restore && task.template.checkpoint.asks(),
            resuming: Resuming::default(),
            devices: Devices::default(),
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
                while !self.is_over() {
                    self.turn()?;
                }
            }
            Err(e) => self.error = Some(e),
        }
        self.finish()
    }

    fn is_over(&self) -> bool {
        let ends = self.policy.ended_by().is_some();
        let over = |container: &Container| container.exit.is_some() && (ends || !container.rests);
        // Where nothing has begun to come back, nothing will.
        let restored = self.restoring.is_over() || (ends && !self.restoring.is_at_work());
        restored && self.containers.iter().all(over)
    }

    fn create(&mut self) -> Result<(), ShimError> {
        let cgroup = super::pod_cgroup(&self.task)?;
        let cgroup = self.cgroup.insert(cgroup);
        let Made { init, containers, revivals, devices } = create::create(&self.task, &self.dir, cgroup)?;
        (self.init, self.containers) = (Some(init), containers);
        self.restoring.waiting = revivals.into();
        self.devices.arrive(devices, &self.task)
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
        self.hear_devices();
        self.hear_resuming();
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
        let beside = self.saving.iter().flat_map(Saving::fds).chain(self.restoring.fd());
        let beside = beside.chain(self.resuming.fds()).chain(self.devices.fd());
        fds.extend(beside.map(|fd| sys::want(&fd, libc::POLLIN)));
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
        if !self.restoring.is_over() || self.devices.is_out() {
            return;
        }
        for container in &mut self.containers {
            if let Some(Err(error)) = container.begun() {
                self.error.get_or_insert(error);
            }
        }
        if self.containers.iter().all(|container| container.beginning().is_none()) && self.error.is_none() {
            self.now_running(at);
        }
    }

    fn reap(&mut self) {
        while let Some((pid, code)) = super::reap() {
            let Some(container) = self.containers.iter_mut().find(|c| c.pid == pid) else {
                self.saving.iter_mut().for_each(|saving| saving.ended(pid, code));
                self.restoring.ended(pid, code);
                self.resuming.ended(pid, code);
                if let Some(error) = self.meter.ended(pid, code) {
                    self.error.get_or_insert(error);
                    self.policy.stop(EndedBy::Container, self.task.template.grace, sys::boot_now());
                }
                continue;
            };
            let oom_killed = code != 0 && container.cgroup.oom_kills() > 0;
            let broken_off = self.saving.as_ref().is_some_and(Saving::is_broken_off)
                || self.broken_off.is_some_and(|at| sys::boot_now() < at.plus(Millis(BROKEN_MS)));
            if code != 0 && !oom_killed && broken_off && self.policy.ended_by().is_none() {
                let container = container.name.clone();
                self.error.get_or_insert(ShimError::DumpInterrupted { container, code });
                self.policy.stop(EndedBy::Container, Millis::ZERO, sys::boot_now());
            }
            let exit = container::Exit { code, oom_killed };
            container.exit = Some(exit);
            container.rests = self.asked && code == asking::SAVED_ITSELF;
            if self.phase != Phase::Created && !container.rests {
                self.exits.push((container.name.clone(), exit));
            }
            // What it left running would be nobody's.
            let _ = container.cgroup.signal_kill();
            if container.rests {
                continue;
            }
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
                let look_at = self.saving.as_ref().and_then(|saving| saving.look_at(now));
                let due = give_up_at.into_iter().chain(look_at).chain(self.devices.look_at());
                let next = self.policy.next_change(now).into_iter().chain(due).min();
                return self.alarm.set(next);
            }
            _ => self.abort_saving("the pod was fenced, or is to end"),
        }
        match self.policy.goal(now) {
            Goal::Wait => {}
            Goal::Run if self.phase == Phase::Created => self.start(),
            Goal::Run => {
                self.thaw();
                self.begin_anew();
                self.bring_back(now);
                self.resume();
            }
            // Not begun, it is as good as frozen.
            Goal::Freeze { .. } if self.phase == Phase::Created => {}
            Goal::Freeze { confirm_by, fenced } => {
                self.devices.interrupt();
                recheck = self.keep_frozen(now, confirm_by, fenced);
            }
            Goal::Stop { .. } => {
                // What is still on its way back hears it when it is there.
                if self.restoring.is_over() && !std::mem::replace(&mut self.stop_signal_sent, true) {
                    self.ask_to_stop();
                }
                self.thaw();
                // What they do to end well may need them.
                self.bring_back(now);
            }
            Goal::Kill => {
                self.devices.interrupt();
                self.kill();
                recheck = Some(now.plus(Millis(RECHECK_MS)));
            }
        }
        self.meter.turn(now);
        let due = recheck.into_iter().chain(self.meter.due()).chain(self.resuming.give_up_at());
        let due = due.chain(self.devices.look_at());
        let next = self.policy.next_change(now).into_iter().chain(due).min();
        self.alarm.set(next)
    }

    fn start(&mut self) {
        self.phase = Phase::Started(sys::now());
        if self.task.restore {
            self.server.send(&Report::Restoring { run: self.task.run });
        }
        if !self.restoring.is_over() {
            self.await_devices();
            return self.restore_next();
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
        reports.extend(self.resuming.failed().cloned());
        if let Some(Freeze { confirmed: true, fenced }) = self.freeze {
            reports.push(Report::Paused { run, fenced });
        }
        reports
    }
}

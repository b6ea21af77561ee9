//! A made-up shim and its pod: does what its leases and orders say, as time passes.

use berth_agent::core::Now;
use berth_agent::core::ledger::PodKey;
use berth_agent::task::{Lease, Order, Report, Saved};
use berth_protocol::checkpoint::CheckpointKind;
use berth_protocol::ids::Run;
use berth_protocol::job::{DisconnectAction, PodTemplate};
use berth_protocol::pod::Cause;
use berth_protocol::rule::{Rule, kept};
use berth_protocol::units::{BootMs, Millis};

use super::fails;

/// One in so many saves fails.
const SAVES_PER_FAILURE: u8 = 8;
/// One in so many pods takes this long to freeze at the end of its lease: less than the lease allows for it.
const FREEZES_PER_SLOW: u8 = 3;
const SLOW_FREEZE: Millis = Millis(9_000);
/// What is killed at once ends this much later.
const DEATH: Millis = Millis(300);

/// How a run of a made-up program goes.
#[derive(Debug, Clone, Copy)]
pub(super) struct Program {
    pub work_ms: u64,
    pub exit_code: u8,
}

/// What the kernel and the shim together know of one run.
#[derive(Debug, Clone)]
pub(super) struct Shim {
    pub run: Run,
    pub state: ShimState,
    pub(super) template: PodTemplate,
    deadline: Option<BootMs>,
    /// By order, not by the lease.
    paused: bool,
    /// Saved, and to stand still until it is stopped or released.
    held: bool,
    /// How the last save ended.
    pub(super) last_save: Option<Report>,
    /// It begins from a checkpoint.
    pub(super) restore: bool,
    /// Work that is left, as of `since`.
    pub(super) left: Millis,
    since: BootMs,
    exit_code: u8,
    /// berth ends it then.
    kill_at: Option<BootMs>,
    /// How long its pod takes to freeze.
    freezes_in: Millis,
    /// It hangs: hears no order, fences nothing, tells nothing. Its pod goes on.
    pub(super) hangs: bool,
    /// The agent that runs has granted it time, and so knows its deadline.
    pub(super) granted: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ShimState {
    Created,
    Running,
    Frozen,
}

pub(super) enum Change {
    None,
    State,
    Exited(Cause, u8),
}

impl Shim {
    pub(super) fn new(key: &PodKey, run: Run, template: PodTemplate, now: BootMs) -> Self {
        let program = program(&template);
        let slow = fails(&format!("freeze {key}"), FREEZES_PER_SLOW);
        Self {
            run,
            state: ShimState::Created,
            template,
            deadline: None,
            paused: false,
            held: false,
            last_save: None,
            restore: false,
            left: Millis(program.work_ms),
            since: now,
            exit_code: program.exit_code,
            kill_at: None,
            freezes_in: if slow { SLOW_FREEZE } else { Millis::ZERO },
            hangs: false,
            granted: false,
        }
    }

    pub(super) fn order(&mut self, now: BootMs, order: Order) {
        if self.hangs {
            return;
        }
        match order {
            Order::Start { lease } if self.state == ShimState::Created => {
                self.grant(lease);
                self.since = now;
                self.state = ShimState::Running;
            }
            Order::Start { lease } | Order::Renew { lease } => self.grant(lease),
            Order::Pause { pause } => self.paused = pause,
            Order::Stop { grace } => {
                // The made-up program ignores the stop signal for half its grace.
                let at = now.plus(DEATH.max(Millis(grace.0 / 2)));
                self.kill_at = Some(self.kill_at.map_or(at, |kill_at| kill_at.min(at)));
            }
            Order::Release => self.held = false,
            // Seen to by the node.
            Order::Follow { .. } | Order::Save { .. } => {}
        }
    }

    /// Told again what came of it, where it was asked before.
    pub(super) fn save(&mut self, now: Now, key: &PodKey, level: u64, hold: bool) -> Report {
        let run = self.run;
        let of_it = |report: &Report| match report {
            Report::Saved { saved, .. } => saved.level == level,
            Report::SaveFailed { level: failed, .. } => *failed == level,
            _ => false,
        };
        if let Some(told) = self.last_save.clone().filter(of_it) {
            return told;
        }
        let report = if self.state != ShimState::Running || self.kill_at.is_some() {
            Report::SaveFailed { run, level, why: "it does not run".to_owned() }
        } else if fails(&format!("{key}/{run}/{level}"), SAVES_PER_FAILURE) {
            Report::SaveFailed { run, level, why: "drawn".to_owned() }
        } else {
            self.held = hold;
            let saved = Saved {
                level,
                at: now.wall,
                kind: CheckpointKind::Criu,
                frozen_ms: 30,
                log_records: 1,
                containers: Vec::new(),
                devices: None,
            };
            Report::Saved { run, saved }
        };
        self.last_save = Some(report.clone());
        report
    }

    fn grant(&mut self, lease: Lease) {
        self.granted = true;
        self.deadline = self.deadline.max(lease.deadline);
        if lease.deadline.is_none() {
            self.deadline = None;
        }
    }

    /// When its pod is still, or told to stop, for want of a grant.
    fn fence_at(&self) -> Option<BootMs> {
        let begun = self.state != ShimState::Created && kept(Rule::ShimFences);
        let pauses = self.template.on_disconnect.action == DisconnectAction::Pause;
        let slack = if pauses && self.state == ShimState::Running { self.freezes_in } else { Millis::ZERO };
        self.deadline.filter(|_| begun).map(|deadline| deadline.plus(slack))
    }

    pub(super) fn report(&self) -> Report {
        let run = self.run;
        match self.state {
            ShimState::Created => Report::Created { run },
            ShimState::Running => Report::Running { run, started_at: Default::default() },
            ShimState::Frozen => Report::Paused { run, fenced: !self.paused && !self.held },
        }
    }

    pub(super) fn advance(&mut self, now: BootMs) -> Change {
        let before = self.state;
        if self.state == ShimState::Running {
            self.left = self.left.saturating_sub(now.since(self.since));
        }
        self.since = now;
        if self.hangs {
            return Change::None;
        }
        if self.kill_at.is_some_and(|at| at <= now) {
            return Change::Exited(Cause::Eviction, 143);
        }
        if self.state == ShimState::Running && self.left == Millis::ZERO {
            let cause = if self.exit_code == 0 { Cause::Success } else { Cause::Failure };
            return Change::Exited(cause, self.exit_code);
        }
        if self.state != ShimState::Created {
            let fenced = self.fence_at().is_some_and(|at| at <= now);
            if fenced
                && self.template.on_disconnect.action == DisconnectAction::Stop
                && self.kill_at.is_none()
            {
                self.kill_at = Some(now.plus(Millis(self.template.grace.0 / 2)));
            }
            let freeze = self.template.on_disconnect.action == DisconnectAction::Pause && fenced;
            self.state =
                if freeze || self.paused || self.held { ShimState::Frozen } else { ShimState::Running };
        }
        if self.state == before { Change::None } else { Change::State }
    }

    /// Of a pod without a shim: whether its program still has work.
    pub(super) fn computes(&mut self, now: BootMs) -> bool {
        self.left = self.left.saturating_sub(now.since(self.since));
        self.since = now;
        self.left > Millis::ZERO
    }

    pub(super) fn next_change(&self) -> Option<BootMs> {
        if self.hangs {
            return None;
        }
        let work = (self.state == ShimState::Running).then(|| self.since.plus(self.left));
        let fence = self.fence_at().filter(|_| self.state == ShimState::Running);
        [work, fence, self.kill_at].into_iter().flatten().min()
    }
}

/// The program that a template names: `["work", "MS", "CODE"]`.
pub(super) fn program(template: &PodTemplate) -> Program {
    let number =
        |at: usize| template.containers.first().and_then(|c| c.command.get(at)?.parse().ok()).unwrap_or(0);
    Program { work_ms: number(1), exit_code: u8::try_from(number(2)).unwrap_or(1) }
}

//! A made-up pod and its shim: the real shim's policy decides, time passes, the program does as it is told.

use berth_agent::core::Now;
use berth_agent::core::ledger::PodKey;
use berth_agent::shim::lease::{EndedBy, Goal, Policy};
use berth_agent::task::{Lease, Order, Report, Saved};
use berth_protocol::checkpoint::CheckpointKind;
use berth_protocol::ids::Run;
use berth_protocol::job::PodTemplate;
use berth_protocol::pod::Cause;
use berth_protocol::rule::{Rule, kept};
use berth_protocol::units::{BootMs, Millis};

use super::{fails, odds};

/// One in so many saves fails.
const SAVES_PER_FAILURE: u8 = 8;
/// One in so many pods takes this long to freeze at the end of its lease: less than the lease allows for it.
const FREEZES_PER_SLOW: u8 = 3;
const SLOW_FREEZE: Millis = Millis(9_000);
/// And one in so many never does.
const FREEZES_PER_STUCK: u8 = 7;
/// What is killed at once ends this much later.
const DEATH: Millis = Millis(300);

/// What the kernel and the shim together know of one run.
#[derive(Debug, Clone)]
pub(super) struct Shim {
    pub run: Run,
    pub state: ShimState,
    pub(super) template: PodTemplate,
    policy: Policy,
    /// Frozen not for want of a grant alone.
    fenced: bool,
    /// When the freeze under way is done.
    frozen_at: Option<BootMs>,
    /// When one that is not done is given up.
    confirm_by: Option<BootMs>,
    /// How long its pod takes to freeze.
    freezes_in: Millis,
    /// When the program ends because it is told to.
    ends_at: Option<BootMs>,
    /// How the last save ended.
    pub(super) last_save: Option<Report>,
    /// It begins from a checkpoint.
    pub(super) restore: bool,
    /// Work that is left, as of `since`.
    pub(super) left: Millis,
    since: BootMs,
    exit_code: u8,
    obeys: Obeys,
    /// It hangs: hears no order, fences nothing, tells nothing. Its pod goes on.
    pub(super) hangs: bool,
    /// The agent that runs has granted it time, and so knows its deadline.
    pub(super) granted: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ShimState {
    Created,
    /// Freezing too, until that is done.
    Running,
    Frozen,
}

pub(super) enum Change {
    None,
    State,
    Exited(Cause, u8),
}

/// What the program makes of the stop signal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Obeys {
    AtOnce,
    AfterHalfItsGrace,
    Never,
}

impl Shim {
    pub(super) fn new(key: &PodKey, run: Run, template: PodTemplate, now: BootMs) -> Self {
        let number = |at: usize| {
            template.containers.first().and_then(|c| c.command.get(at)?.parse::<u64>().ok()).unwrap_or(0)
        };
        let flaky = template.containers.first().is_some_and(|c| c.command.len() > 3);
        let lucky = flaky && fails(&format!("run {key} {run}"), 2);
        let freezes_in = match odds(&format!("freeze {key}")) {
            n if n % FREEZES_PER_STUCK == 0 => Millis(u64::from(u32::MAX)),
            n if n % FREEZES_PER_SLOW == 0 => SLOW_FREEZE,
            _ => Millis::ZERO,
        };
        Self {
            run,
            state: ShimState::Created,
            policy: Policy::new(&template.on_disconnect, template.grace),
            fenced: false,
            frozen_at: None,
            confirm_by: None,
            freezes_in,
            ends_at: None,
            last_save: None,
            restore: false,
            left: Millis(number(1)),
            since: now,
            exit_code: if lucky { 0 } else { u8::try_from(number(2)).unwrap_or(1) },
            obeys: match odds(&format!("stop {key}")) % 3 {
                0 => Obeys::AtOnce,
                1 => Obeys::AfterHalfItsGrace,
                _ => Obeys::Never,
            },
            hangs: false,
            granted: false,
            template,
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
            // Of one that was not begun there is nothing to renew.
            Order::Renew { .. } if self.state == ShimState::Created => {}
            Order::Start { lease } | Order::Renew { lease } => self.grant(lease),
            Order::Pause { pause } => self.policy.pause(pause),
            Order::Stop { grace } => self.policy.stop(EndedBy::Order, grace, now),
            Order::Release => self.policy.hold(false),
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
        let runs = self.state == ShimState::Running && self.policy.ended_by().is_none();
        let report = if !runs || self.frozen_at.is_some() {
            Report::SaveFailed { run, level, why: "it does not run".to_owned() }
        } else if fails(&format!("{key}/{run}/{level}"), SAVES_PER_FAILURE) {
            Report::SaveFailed { run, level, why: "drawn".to_owned() }
        } else {
            self.policy.hold(hold);
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
        let fenced = kept(Rule::ShimFences);
        self.policy.grant(if fenced { lease } else { Lease { deadline: None } });
    }

    pub(super) fn report(&self) -> Report {
        let run = self.run;
        match self.state {
            ShimState::Created => Report::Created { run },
            ShimState::Running => Report::Running { run, started_at: Default::default() },
            ShimState::Frozen => Report::Paused { run, fenced: self.fenced },
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
        if self.state == ShimState::Running && self.left == Millis::ZERO {
            let cause = if self.exit_code == 0 { Cause::Success } else { Cause::Failure };
            return Change::Exited(cause, self.exit_code);
        }
        self.confirm_by = None;
        match self.policy.goal(now) {
            Goal::Wait => {}
            Goal::Run => (self.state, self.frozen_at) = (ShimState::Running, None),
            Goal::Freeze { confirm_by, fenced } => {
                self.fenced = fenced;
                // Frozen for something else already, it is so for this as well.
                let takes = if fenced { self.freezes_in } else { Millis::ZERO };
                if self.state == ShimState::Frozen || *self.frozen_at.get_or_insert(now.plus(takes)) <= now {
                    self.state = ShimState::Frozen;
                } else if confirm_by.is_some_and(|by| by <= now) {
                    self.policy.freeze_failed(now);
                    self.ends_at = Some(now.plus(DEATH));
                } else {
                    self.confirm_by = confirm_by;
                }
            }
            Goal::Stop { kill_at } => {
                // A frozen one goes on for it.
                (self.state, self.frozen_at) = (ShimState::Running, None);
                let at = match self.obeys {
                    Obeys::AtOnce => now.plus(DEATH),
                    Obeys::AfterHalfItsGrace => now.plus(Millis(kill_at.since(now).0 / 2)),
                    Obeys::Never => kill_at.plus(DEATH),
                };
                self.ends_at = Some(self.ends_at.map_or(at, |before| before.min(at)));
            }
            Goal::Kill => {
                let at = now.plus(DEATH);
                self.ends_at = Some(self.ends_at.map_or(at, |before| before.min(at)));
            }
        }
        if self.ends_at.is_some_and(|at| at <= now) {
            return Change::Exited(Cause::Eviction, 143);
        }
        if self.state == before { Change::None } else { Change::State }
    }

    /// Of a pod without a shim: whether its program still has work.
    pub(super) fn computes(&mut self, now: BootMs) -> bool {
        self.left = self.left.saturating_sub(now.since(self.since));
        self.since = now;
        self.left > Millis::ZERO
    }

    /// It hangs no longer, and looks at once at what it missed.
    pub(super) fn go_on(&mut self) {
        if std::mem::take(&mut self.hangs) {
            self.confirm_by = Some(self.since);
        }
    }

    pub(super) fn next_change(&self) -> Option<BootMs> {
        if self.hangs {
            return None;
        }
        let runs = self.state == ShimState::Running;
        let work = runs.then(|| self.since.plus(self.left));
        let policy = self.policy.next_change(self.since);
        let frozen = self.frozen_at.filter(|_| runs);
        [work, frozen, self.confirm_by, policy, self.ends_at].into_iter().flatten().min()
    }
}

//! One pod on its node: from the order to its end. `reconcile` compares what is wanted with what is there and takes
//! the next step, however often it is asked.

use berth_protocol::ids::Run;
use berth_protocol::job::{DisconnectAction, PodTemplate};
use berth_protocol::limits;
use berth_protocol::message::node::PodChange;
use berth_protocol::pod::{Cause, Goal, Outcome};
use berth_protocol::policy::Wants;
use berth_protocol::rule::{Rule, kept};
use berth_protocol::units::{BootMs, Bytes, Millis};

use super::checkpoints::{Leaving, Storing};
use super::ledger::{Begin, PodEntry, PodKey, Record};
use super::restart::doubled;
use super::{Action, Agent, Launch, Now, Prepared, Unready};
use crate::task::{Lease, Order, Report};

/// What is known of a pod beyond the ledger; lost with the agent and found again by asking.
#[derive(Debug, Default)]
pub(super) struct Live {
    prep: Prep,
    pub(super) shim: Shim,
    stop_sent: bool,
    /// By then its shim has ended it.
    pub(super) stop_by: Option<BootMs>,
    /// When an agent that stood still at the end of its lease looks again.
    pub(super) look_at: Option<BootMs>,
    pause_sent: bool,
    /// Failed preparations in a row, and when the next is due.
    prep_failures: u32,
    prep_at: Option<BootMs>,
    /// When the next run is due.
    retry_at: Option<BootMs>,
    /// Its last checkpoint, or else the beginning of its run, as far as this session saw either.
    pub(super) counted_from: BootMs,
    /// Bytes here and in all of a pull under way.
    pub(super) pull: Option<(Bytes, Bytes)>,
    pub(super) storing: bool,
    pub(super) store_failures: u32,
    pub(super) store_at: Option<BootMs>,
    pub(super) checkpoint: Storing,
}

#[derive(Debug, Default)]
enum Prep {
    #[default]
    No,
    Busy,
    Ready(Prepared),
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(super) enum Shim {
    /// The agent has just started and looks for it.
    Unknown,
    #[default]
    None,
    /// Spawned; makes its containers.
    Launched,
    /// Ready to begin, once granted.
    Created,
    Running,
    Paused,
    /// Being ended by force.
    Dying,
}

impl Live {
    /// It is to be ended by force; false: it is being, or there is nothing.
    fn dies(&mut self) -> bool {
        let alive = !matches!(self.shim, Shim::None | Shim::Dying | Shim::Unknown);
        if alive {
            self.shim = Shim::Dying;
        }
        alive
    }

    /// Its run is over, and the next one due then.
    pub(super) fn rest_until(&mut self, at: BootMs, begin: Begin) {
        self.shim = Shim::None;
        self.retry_at = Some(at);
        match &mut self.prep {
            Prep::Ready(prepared) if begin == Begin::Anew => prepared.restore = false,
            prep => *prep = Prep::No,
        }
    }

    /// It runs, and was last saved, or began, then.
    pub(super) fn runs_since(&self) -> Option<BootMs> {
        let undisturbed = self.shim == Shim::Running && !self.stop_sent && !self.pause_sent;
        undisturbed.then_some(self.counted_from)
    }

    /// A new token for the depot: what may have waited for one is tried again.
    pub(super) fn retry_now(&mut self, now: BootMs) {
        for at in [&mut self.prep_at, &mut self.store_at] {
            *at = at.map(|at| at.min(now));
        }
        self.checkpoint.retry_now(now);
    }
}

/// New runs wait so long for room among the events that the controller has not acknowledged.
const CROWDED_PAUSE: Millis = Millis::from_secs(10);
/// Preparations that may fail in a row before the pod does.
const PREP_ATTEMPTS_MAX: u32 = 6;
const PREP_RETRY_MS: u64 = 2_000;
const PREP_RETRY_MS_MAX: u64 = 300_000;
/// A shim that was told to end its pod has ended it this long after the grace, or the agent does.
const STOP_SLACK: Millis = Millis::from_secs(60);

impl Agent {
    /// At the agent's start: what the ledger says may live is looked for before anything else is decided.
    pub(super) fn adopt(&mut self, now: Now, key: &PodKey) {
        let Some(entry) = self.ledger.pods.get(key) else { return };
        let run = entry.run;
        let mut live = Live::default();
        if entry.may_be_alive() && kept(Rule::RestartAfterGone) {
            live.shim = Shim::Unknown;
            self.act(Action::Adopt { key: key.clone(), run });
        } else if let (Some(at), Some(template)) =
            (entry.retry_at, self.ledger.specs.get(&entry.desired.spec))
        {
            // Civil time may have jumped while the agent was away; the pause is never longer than the longest.
            let pause = at.since(now.wall).min(template.restart.retry_max);
            live.retry_at = Some(now.boot.plus(pause));
        }
        self.live.insert(key.clone(), live);
    }

    /// The next thing that time alone makes this pod need.
    pub(super) fn pod_wake(&self, key: &PodKey, live: &Live) -> Option<BootMs> {
        let entry = self.ledger.pods.get(key)?;
        if entry.ended.is_some() {
            return live.store_at.filter(|_| !live.storing);
        }
        let end = matches!(live.shim, Shim::Running | Shim::Unknown)
            .then(|| self.lease_end(key, entry))
            .flatten()
            .map(|end| live.look_at.map_or(end, |at| end.max(at)));
        let storing = live.checkpoint.wake().filter(|_| {
            let goes_on = matches!(entry.desired.goal, Goal::Run | Goal::Vacate) && !entry.unnamed;
            goes_on && matches!(live.shim, Shim::Running | Shim::Paused)
        });
        let own = self.own_checkpoint_due(key, entry);
        // What is not to run begins nothing, however long that is due.
        let begins = [live.prep_at, live.retry_at].into_iter().flatten().min();
        let begins = begins.filter(|_| matches!(self.goal(key, entry), Wanted::Run));
        [begins, end, live.stop_by, storing, own].into_iter().flatten().min()
    }

    pub(super) fn template(&self, entry: &PodEntry) -> Option<&PodTemplate> {
        self.ledger.specs.get(&entry.desired.spec)
    }

    /// A grant grew: tell the shim.
    pub(super) fn renewed(&mut self, key: &PodKey) {
        let serves = self
            .live
            .get(key)
            .is_some_and(|live| matches!(live.shim, Shim::Running | Shim::Paused | Shim::Unknown));
        let Some(entry) = self.ledger.pods.get(key).filter(|_| serves) else { return };
        let (Some(template), Some(since)) = (self.template(entry), self.grants.since(key)) else { return };
        let deadline = match template.on_disconnect.action {
            DisconnectAction::Continue => None,
            DisconnectAction::Pause | DisconnectAction::Stop => {
                Some(since.plus(template.on_disconnect.after))
            }
        };
        self.act(Action::Order { key: key.clone(), order: Order::Renew { lease: Lease { deadline } } });
    }

    /// What is wanted of the pod now, everything considered.
    fn goal(&self, key: &PodKey, entry: &PodEntry) -> Wanted {
        let superseded = self.ledger.pods.keys().any(|other| other.pod == key.pod && other.epoch > key.epoch);
        if superseded {
            return Wanted::Stop { at_once: true };
        }
        if entry.unnamed {
            return Wanted::Quarantine;
        }
        match entry.desired.goal {
            Goal::Run => Wanted::Run,
            Goal::Pause => Wanted::Pause,
            Goal::Vacate if entry.may_be_alive() => match self.leaving(entry) {
                Leaving::NotYet => Wanted::Run,
                leaving => Wanted::Stop { at_once: leaving == (Leaving::Now { at_once: true }) },
            },
            Goal::Stop | Goal::Vacate => Wanted::Stop { at_once: false },
        }
    }

    /// An older epoch of the same pod is still here.
    fn predecessor_lives(&self, key: &PodKey) -> bool {
        let older = |other: &PodKey| other.pod == key.pod && other.epoch < key.epoch;
        self.ledger.pods.iter().any(|(other, entry)| older(other) && entry.ended.is_none())
    }

    pub(super) fn reconcile(&mut self, now: Now, key: &PodKey) {
        let Some(entry) = self.ledger.pods.get(key) else { return };
        if entry.ended.is_some() {
            return self.settle(now, key);
        }
        let wanted = self.goal(key, entry);
        let Some(template) = self.template(entry) else {
            // Without its spec it never began.
            if matches!(wanted, Wanted::Stop { .. }) && entry.run == Run::default() {
                self.live.entry(key.clone()).or_default();
                self.stopped_before_start(now, key);
            } else if matches!(wanted, Wanted::Stop { .. }) {
                // Nor does it come for one that is only to go, of a ledger that was lost.
                let run = entry.run;
                if self.live.get_mut(key).is_some_and(Live::dies) {
                    self.act(Action::Kill { key: key.clone(), run });
                }
            }
            return;
        };
        let lease = self.lease_of(now, key, entry, template);
        let vacates = entry.desired.goal == Goal::Vacate;
        let grace =
            if matches!(wanted, Wanted::Stop { at_once: true }) { Millis::ZERO } else { template.grace };
        let live = self.live.entry(key.clone()).or_default();
        let order = match (live.shim, wanted) {
            (Shim::Unknown | Shim::Dying, _) => return,
            (Shim::None, Wanted::Run) => return self.advance(now, key),
            (Shim::None, Wanted::Stop { .. }) => return self.stopped_before_start(now, key),
            (Shim::None, Wanted::Pause | Wanted::Quarantine) => return,
            (_, Wanted::Stop { .. }) if !live.stop_sent => {
                live.stop_sent = true;
                live.stop_by.get_or_insert(now.boot.plus(grace).plus(STOP_SLACK));
                Order::Stop { grace }
            }
            // Not begun, it has nothing to be saved.
            (Shim::Launched | Shim::Created, Wanted::Run) if vacates && !live.stop_sent => {
                live.stop_sent = true;
                Order::Stop { grace }
            }
            (Shim::Created, Wanted::Run) => match lease {
                Some(lease) => Order::Start { lease },
                None if kept(Rule::StartNeedsGrant) => return,
                None => Order::Start { lease: Lease { deadline: None } },
            },
            (Shim::Running | Shim::Paused, Wanted::Pause | Wanted::Quarantine) if !live.pause_sent => {
                live.pause_sent = true;
                Order::Pause { pause: true }
            }
            (Shim::Running | Shim::Paused, Wanted::Run) if live.pause_sent => {
                live.pause_sent = false;
                Order::Pause { pause: false }
            }
            (Shim::Running | Shim::Paused, Wanted::Run) => return self.checkpoints(now, key, vacates),
            _ => return,
        };
        self.act(Action::Order { key: key.clone(), order });
    }

    /// What a pod that runs as it should has to do with checkpoints.
    fn checkpoints(&mut self, now: Now, key: &PodKey, vacates: bool) {
        self.store_checkpoint(now, key);
        let released = !vacates && self.release(key);
        if !released && self.live.get(key).is_some_and(|live| live.shim == Shim::Running) {
            self.checkpoint(now, key);
        }
    }

    /// Towards the next run: prepare, then launch.
    fn advance(&mut self, now: Now, key: &PodKey) {
        if self.predecessor_lives(key) {
            return;
        }
        let Some(entry) = self.ledger.pods.get(key) else { return };
        // What the machine's end has ended goes on when the machine is there again.
        let stays_down = self.leaving.is_some() && entry.begin == Begin::Kept;
        let Some(template) = self.template(entry).cloned() else { return };
        // Whatever the way here: an order, a restart in place, a checkpoint, an agent that was started anew.
        if let Some(why) = self.granted.refuses(&Wants::of(&template).with(&entry.desired.gpus)) {
            return self.refused(now, key, why);
        }
        let Some(live) = self.live.get_mut(key) else { return };
        if stays_down {
            live.retry_at = None;
            return;
        }
        let due = |at: Option<BootMs>| at.is_none_or(|at| at <= now.boot);
        if self.ledger.outbox.len() >= limits::OUTBOX_EVENTS_MAX && due(live.retry_at) {
            live.retry_at = Some(now.boot.plus(CROWDED_PAUSE));
            return;
        }
        match &live.prep {
            Prep::Busy => {}
            Prep::No if due(live.prep_at) && due(live.retry_at) => {
                live.prep = Prep::Busy;
                (live.prep_at, live.retry_at) = (None, None);
                let from = entry.desired.from.filter(|_| entry.begin != Begin::Anew);
                let kept = entry.begin == Begin::Kept;
                self.act(Action::Prepare { key: key.clone(), template: Box::new(template), from, kept });
            }
            Prep::Ready(prepared) if due(live.retry_at) => {
                let prepared = prepared.clone();
                let restore = prepared.restore;
                live.shim = Shim::Launched;
                live.retry_at = None;
                (live.stop_sent, live.stop_by, live.pause_sent) = (false, None, false);
                let mut entry = entry.clone();
                entry.run = entry.run.next();
                entry.run_over = false;
                entry.retry_at = None;
                entry.checkpoints.new_run();
                if template.network == berth_protocol::job::Network::Bridge && entry.slot.is_none() {
                    entry.slot = Some(self.ledger.free_slot());
                }
                let launch = Launch {
                    key: key.clone(),
                    run: entry.run,
                    template,
                    prepared,
                    gpus: entry.desired.gpus.clone(),
                    slot: entry.slot,
                    restarts: entry.desired.restarts,
                    restore,
                };
                self.record(Record::Pod { key: key.clone(), entry: Box::new(entry) });
                self.pod_event(now, key, launch.run, PodChange::Starting);
                self.act(Action::Launch(Box::new(launch)));
            }
            Prep::No | Prep::Ready(_) => {}
        }
    }

    fn stopped_before_start(&mut self, now: Now, key: &PodKey) {
        let Some(live) = self.live.get_mut(key) else { return };
        let log_records = self.ledger.pods.get(key).map_or(0, |entry| entry.log_records);
        if matches!(live.prep, Prep::Busy) {
            self.act(Action::CancelPrepare { key: key.clone() });
        }
        let outcome = Outcome {
            exit_code: None,
            cause: Cause::Eviction,
            reason: Some("Stopped".into()),
            message: None,
            started_at: None,
            finished_at: now.wall,
            log_records,
        };
        self.end(now, key, outcome);
    }

    pub(super) fn pulling(&mut self, now: Now, key: &PodKey, done: Bytes, total: Bytes) {
        let Some(live) = self.live.get_mut(key) else { return };
        if live.pull.replace((done, total)).is_none()
            && let Some(entry) = self.ledger.pods.get(key)
        {
            let run = entry.run;
            self.pod_event(now, key, run, PodChange::Pulling);
        }
    }

    pub(super) fn prepared(&mut self, now: Now, key: &PodKey, result: Result<Prepared, Unready>) {
        let entry = self.ledger.pods.get(key);
        let alone = entry.is_some_and(|entry| {
            self.template(entry).is_some_and(|template| self.is_on_its_own(now, key, entry, template))
        });
        let Some(live) = self.live.get_mut(key) else { return };
        live.pull = None;
        if !matches!(live.prep, Prep::Busy) {
            return;
        }
        match result {
            Ok(prepared) => {
                live.prep = Prep::Ready(prepared);
                live.prep_failures = 0;
                self.reconcile(now, key);
            }
            Err(unready) if unready.retriable && (alone || live.prep_failures + 1 < PREP_ATTEMPTS_MAX) => {
                live.prep = Prep::No;
                live.prep_at =
                    Some(now.boot.plus(doubled(PREP_RETRY_MS, live.prep_failures, PREP_RETRY_MS_MAX)));
                live.prep_failures += 1;
                self.warn(format!("pod {key}: {}: {}; trying again", unready.reason, unready.message));
            }
            Err(unready) => self.unready(now, key, unready),
        }
    }

    pub(super) fn report(&mut self, now: Now, key: &PodKey, report: Report) {
        let Some(entry) = self.ledger.pods.get(key) else { return };
        if !entry.may_be_alive() {
            return;
        }
        let current = entry.run;
        let (run, shim) = match report {
            Report::Created { run } => (run, Shim::Created),
            Report::Running { run, .. } => (run, Shim::Running),
            Report::Paused { run, .. } => (run, Shim::Paused),
            Report::Exited { exit } => return self.run_over(now, key, exit),
            Report::Saved { run, saved } if run == current => return self.saved(now, key, saved),
            Report::SaveFailed { run, level, why } if run == current => {
                return self.save_failed(now, key, level, why);
            }
            Report::Restoring { run } if run == current => {
                self.pod_event(now, key, run, PodChange::Restoring);
                return;
            }
            Report::ResumeFailed { run, why } if run == current => {
                self.warn(format!("pod {key}: {why}"));
                self.pod_event(now, key, run, PodChange::ResumeFailed { why });
                return;
            }
            Report::Log { .. }
            | Report::ResumeFailed { .. }
            | Report::Restoring { .. }
            | Report::Saved { .. }
            | Report::SaveFailed { .. } => return,
        };
        let held = self.is_held(key);
        let Some(live) = self.live.get_mut(key).filter(|live| run == current && live.shim != Shim::Dying)
        else {
            return;
        };
        let before = std::mem::replace(&mut live.shim, shim);
        if shim == Shim::Running && before != Shim::Paused && before != shim {
            live.counted_from = now.boot;
            self.note_begun(key);
        }
        if before == Shim::Unknown {
            // The shim was found again: it may not have heard the last grant or order.
            self.renewed(key);
            self.ask_saving(key);
            self.let_go_on(key, shim);
        }
        // Of one found again too: it may have come so far while nobody listened, and twice told is once known.
        if before != shim {
            match shim {
                Shim::Paused if held => {}
                Shim::Running => drop(self.pod_event(now, key, run, PodChange::Running)),
                Shim::Paused => drop(self.pod_event(now, key, run, PodChange::Paused)),
                _ => {}
            }
        }
        self.reconcile(now, key);
    }

    /// One found again may not have heard that nothing holds it any more. Both orders do nothing where nothing does.
    fn let_go_on(&mut self, key: &PodKey, shim: Shim) {
        let free = |entry: &&PodEntry| {
            let checkpoints = &entry.checkpoints;
            !checkpoints.hold && !checkpoints.saving && entry.desired.goal == Goal::Run && !entry.unnamed
        };
        if shim == Shim::Paused && self.ledger.pods.get(key).filter(free).is_some() {
            self.act(Action::Order { key: key.clone(), order: Order::Release });
            self.act(Action::Order { key: key.clone(), order: Order::Pause { pause: false } });
        }
    }

    /// As after a restart of the agent: what the shim says next tells where it is, and what it is to do is said again.
    pub(super) fn reconnected(&mut self, key: &PodKey) {
        let Some(live) = self.live.get_mut(key) else { return };
        if !matches!(live.shim, Shim::None | Shim::Dying) {
            live.shim = Shim::Unknown;
            (live.stop_sent, live.pause_sent) = (false, false);
        }
    }
}

/// What is wanted of a pod, everything considered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wanted {
    Run,
    Pause,
    Stop {
        at_once: bool,
    },
    /// Held here and unknown to the controller: frozen and listed, never ended by an order that does not name it.
    Quarantine,
}

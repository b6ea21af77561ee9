//! A pod's checkpoints: when one is taken, what follows from it, and how a pod leaves its node with one. Levels, not
//! edges: an order that names a level already tried changes nothing.

use berth_protocol::checkpoint::CheckpointInfo;
use berth_protocol::job::CheckpointMode;
use berth_protocol::message::node::PodChange;
use berth_protocol::pod::{Cause, Goal, Outcome, VACATED};
use berth_protocol::units::{BootMs, Bytes};

use super::ledger::{PodEntry, PodKey, Record, is_own};
use super::restart::doubled;
use super::{Action, Agent, Now};
use crate::task::{Order, Saved};

/// Dumps at once: each freezes its pod and reads its memory.
const SAVING_MAX: usize = 4;
const STORE_RETRY_MS: u64 = 1_000;
const STORE_RETRY_MS_MAX: u64 = 60_000;

/// Why a checkpoint, or a pod's outputs, are not in the depot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NotStored {
    pub why: String,
    /// It may work later.
    pub retriable: bool,
}

/// What of a checkpoint's way to the depot a restart of the agent may forget.
#[derive(Debug, Default)]
pub(super) struct Storing {
    busy: bool,
    failures: u32,
    at: Option<BootMs>,
    pub(super) progress: Option<(Bytes, Bytes)>,
}

impl Storing {
    pub(super) fn wake(&self) -> Option<BootMs> {
        self.at.filter(|_| !self.busy)
    }

    /// A new token, or another chance.
    pub(super) fn retry_now(&mut self, now: BootMs) {
        self.at = self.at.map(|at| at.min(now));
    }
}

/// Where a pod that is to leave stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Leaving {
    /// It runs on until its checkpoint is taken, or because none can be.
    NotYet,
    /// Its checkpoint is recorded, or it wants none.
    Now { at_once: bool },
}

impl Agent {
    /// Takes the checkpoint that the order asks for, or that is due without one, where it is time.
    pub(super) fn checkpoint(&mut self, now: Now, key: &PodKey) {
        let Some(entry) = self.ledger.pods.get(key) else { return };
        let ordered = entry.checkpoints.tried < entry.desired.checkpoint;
        let due = || self.own_checkpoint_due(key, entry).is_some_and(|due| due <= now.boot);
        if entry.checkpoints.saving || !(ordered && entry.checkpoints.saved.is_none() || due()) {
            return;
        }
        let unasked = !ordered || entry.checkpoints.saved.is_some();
        if self.all_saving() {
            return;
        }
        let hold = entry.desired.goal == Goal::Vacate;
        let mut entry = entry.clone();
        let checkpoints = &mut entry.checkpoints;
        (checkpoints.saving, checkpoints.unasked, checkpoints.hold) = (true, unasked, hold);
        match unasked {
            true => checkpoints.own += 1,
            false => checkpoints.tried = entry.desired.checkpoint,
        }
        let (run, level) = (entry.run, checkpoints.level());
        self.record(Record::Pod { key: key.clone(), entry: Box::new(entry) });
        if !unasked {
            self.pod_event(now, key, run, PodChange::Checkpointing { level });
        }
        self.act(Action::Order { key: key.clone(), order: Order::Save { level, hold } });
    }

    fn all_saving(&self) -> bool {
        self.ledger.pods.values().filter(|entry| entry.checkpoints.saving).count() >= SAVING_MAX
    }

    /// When a checkpoint is due that no controller is there to ask for: by the job's interval, and before the machine goes.
    /// `None`: not as things are. One that is still here, since the depot is out of reach, is replaced by it.
    pub(super) fn own_checkpoint_due(&self, key: &PodKey, entry: &PodEntry) -> Option<BootMs> {
        let policy = &self.template(entry)?.checkpoint;
        let live = self.live.get(key)?;
        let runs_since = live.runs_since().filter(|_| entry.desired.goal == Goal::Run && !entry.unnamed)?;
        let free = !entry.checkpoints.saving && !live.checkpoint.busy && policy.mode != CheckpointMode::None;
        let by_interval = policy.interval.map(|interval| runs_since.plus(interval));
        let before_the_end = self.leaving_since.filter(|at| runs_since < *at);
        let due = by_interval.into_iter().chain(before_the_end).min();
        due.filter(|_| free && !self.all_saving()).map(|due| due.max(self.alone_from(key)))
    }

    /// The shim was found again: it may not have heard the last order to save, and says again what came of it.
    pub(super) fn ask_saving(&mut self, key: &PodKey) {
        let Some(entry) = self.ledger.pods.get(key).filter(|entry| entry.checkpoints.saving) else { return };
        let (level, hold) = (entry.checkpoints.level(), entry.checkpoints.hold);
        self.act(Action::Order { key: key.clone(), order: Order::Save { level, hold } });
    }

    /// How a pod stands that is to vacate its node.
    pub(super) fn leaving(&self, entry: &PodEntry) -> Leaving {
        let checkpoints = &entry.checkpoints;
        let template = self.ledger.specs.get(&entry.desired.spec);
        let none = template.is_none_or(|template| template.checkpoint.mode == CheckpointMode::None);
        if none || entry.desired.checkpoint == 0 {
            return Leaving::Now { at_once: false };
        }
        let recorded = |event| self.ledger.outbox.front().is_none_or(|waiting| waiting.n > event);
        match checkpoints.stands_behind() {
            Some(event) if recorded(event) => Leaving::Now { at_once: true },
            _ => Leaving::NotYet,
        }
    }

    pub(super) fn saved(&mut self, now: Now, key: &PodKey, saved: Saved) {
        let Some(mut entry) = self.ledger.pods.get(key).cloned() else { return };
        if !entry.checkpoints.saving || entry.checkpoints.level() != saved.level {
            return;
        }
        (entry.checkpoints.saving, entry.checkpoints.unasked) = (false, false);
        entry.checkpoints.saved = Some(saved);
        self.record(Record::Pod { key: key.clone(), entry: Box::new(entry) });
        if let Some(live) = self.live.get_mut(key) {
            live.counted_from = now.boot;
            live.checkpoint = Storing::default();
        }
        self.store_checkpoint(now, key);
        self.next_to_save(now);
    }

    pub(super) fn save_failed(&mut self, now: Now, key: &PodKey, level: u64, why: String) {
        let saving = |entry: &&PodEntry| entry.checkpoints.saving && entry.checkpoints.level() == level;
        if self.ledger.pods.get(key).filter(saving).is_some() {
            if let Some(live) = self.live.get_mut(key) {
                live.counted_from = now.boot;
            }
            self.checkpoint_failed(now, key, level, why);
            self.next_to_save(now);
        }
    }

    fn checkpoint_failed(&mut self, now: Now, key: &PodKey, level: u64, why: String) {
        let Some(mut entry) = self.ledger.pods.get(key).cloned() else { return };
        let held = std::mem::take(&mut entry.checkpoints.hold);
        (entry.checkpoints.saving, entry.checkpoints.unasked) = (false, false);
        // One that waits for the depot is as good as it was.
        entry.checkpoints.saved = entry.checkpoints.saved.filter(|saved| saved.level != level);
        let run = entry.run;
        self.record(Record::Pod { key: key.clone(), entry: Box::new(entry) });
        self.warn(format!("pod {key}: no checkpoint: {why}"));
        // The controller has not asked for it, and hears of its own.
        if !is_own(level) {
            self.pod_event(now, key, run, PodChange::CheckpointFailed { level, why });
        }
        if held {
            self.act(Action::Order { key: key.clone(), order: Order::Release });
        }
    }

    /// Another pod may have waited for its turn.
    fn next_to_save(&mut self, now: Now) {
        let waits = |entry: &PodEntry| {
            let own = self.template(entry).is_some_and(|template| template.checkpoint.interval.is_some());
            (own || entry.checkpoints.tried < entry.desired.checkpoint) && entry.ended.is_none()
        };
        let waiting: Vec<PodKey> =
            self.ledger.pods.iter().filter(|(_, entry)| waits(entry)).map(|(key, _)| key.clone()).collect();
        for key in waiting {
            self.reconcile(now, &key);
        }
    }

    /// Sends what was saved to the depot, where it is time.
    pub(super) fn store_checkpoint(&mut self, now: Now, key: &PodKey) {
        let Some(entry) = self.ledger.pods.get(key) else { return };
        let Some(saved) = entry.checkpoints.saved.clone() else { return };
        let (run, spec) = (entry.run, entry.desired.spec);
        let Some(live) = self.live.get_mut(key) else { return };
        if !live.checkpoint.busy && live.checkpoint.at.is_none_or(|at| at <= now.boot) {
            live.checkpoint.busy = true;
            self.act(Action::StoreCheckpoint { key: key.clone(), run, spec, saved: Box::new(saved) });
        }
    }

    pub(super) fn checkpoint_stored(
        &mut self,
        now: Now,
        key: &PodKey,
        level: u64,
        result: Result<Box<CheckpointInfo>, NotStored>,
    ) {
        let Some(live) = self.live.get_mut(key) else { return };
        let failures = live.checkpoint.failures;
        live.checkpoint = Storing::default();
        let waits =
            |entry: &&PodEntry| entry.checkpoints.saved.as_ref().is_some_and(|saved| saved.level == level);
        let Some(mut entry) = self.ledger.pods.get(key).filter(waits).cloned() else { return };
        match result {
            Ok(mut info) => {
                let id = info.id;
                if is_own(level) {
                    info.level = 0;
                }
                let event = self.pod_event(now, key, entry.run, PodChange::Checkpointed { info });
                entry.checkpoints.saved = None;
                if !is_own(level) {
                    entry.checkpoints.stored = Some((level, event));
                }
                self.record(Record::Pod { key: key.clone(), entry: Box::new(entry) });
                // Not before it is recorded: an agent that ends in between sends it again, from where the shim left it.
                self.act(Action::KeepCheckpoint { key: key.clone(), level, id });
                self.reconcile(now, key);
            }
            Err(NotStored { why, retriable: true }) => {
                let pause = doubled(STORE_RETRY_MS, failures, STORE_RETRY_MS_MAX);
                live.checkpoint.failures = failures + 1;
                live.checkpoint.at = Some(now.boot.plus(pause));
                self.warn(format!("pod {key}: its checkpoint is not in the depot yet: {why}"));
            }
            Err(NotStored { why, .. }) => self.checkpoint_failed(now, key, level, why),
        }
    }

    /// Is its stillness the checkpoint's doing, no pause of anybody's?
    pub(super) fn is_held(&self, key: &PodKey) -> bool {
        self.ledger
            .pods
            .get(key)
            .is_some_and(|entry| entry.checkpoints.hold && entry.desired.goal == Goal::Vacate)
    }

    /// No longer to leave, and held for it: it goes on.
    pub(super) fn release(&mut self, key: &PodKey) -> bool {
        let held = |entry: &&PodEntry| entry.checkpoints.hold && !entry.checkpoints.saving;
        let Some(mut entry) = self.ledger.pods.get(key).filter(held).cloned() else { return false };
        entry.checkpoints.hold = false;
        self.record(Record::Pod { key: key.clone(), entry: Box::new(entry) });
        self.act(Action::Order { key: key.clone(), order: Order::Release });
        true
    }

    /// Pods that leave may have waited for this acknowledgement alone.
    pub(super) fn reconcile_leaving(&mut self, now: Now) {
        let leaves = |entry: &PodEntry| entry.ended.is_none() && entry.desired.goal == Goal::Vacate;
        let leaving: Vec<PodKey> =
            self.ledger.pods.iter().filter(|(_, entry)| leaves(entry)).map(|(key, _)| key.clone()).collect();
        for key in leaving {
            self.reconcile(now, &key);
        }
    }
}

/// An end by order behind a checkpoint that the controller has recorded.
pub(super) fn name_end(entry: &PodEntry, outcome: &mut Outcome) {
    let left = entry.desired.goal == Goal::Vacate && entry.checkpoints.stands_behind().is_some();
    if left && outcome.cause == Cause::Eviction {
        outcome.reason = Some(VACATED.to_owned());
        outcome.message = Some("saved, and taken off its node".to_owned());
    }
}

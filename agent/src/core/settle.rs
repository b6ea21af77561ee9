//! The end of a run and what follows: another one; or the pod's end, and after it log and outputs go to the depot, and
//! what is known of the pod is dropped once all is told.

use berth_protocol::ids::{Digest, Run};
use berth_protocol::message::node::PodChange;
use berth_protocol::pod::{Cause, Outcome, RESTORE_FAILED};
use berth_protocol::rule::{Rule, kept};
use berth_protocol::units::Bytes;

use super::checkpoints::{NotStored, name_end};
use super::ledger::{Begin, Ended, PodKey, Record};
use super::pods::Live;
use super::restart::{Next, after_run, doubled};
use super::{Action, Agent, NoExit, Now, Unready};
use crate::task::Exit;

const STORE_RETRY_MS: u64 = 5_000;
const STORE_RETRY_MS_MAX: u64 = 300_000;

impl Agent {
    pub(super) fn gone(&mut self, now: Now, key: &PodKey, run: Run, exit: Result<Exit, NoExit>) {
        let Some(entry) = self.ledger.pods.get(key) else { return };
        // The supervisor of an earlier run may end late.
        if !entry.may_be_alive() || run != entry.run && kept(Rule::ResultsNameRuns) {
            return;
        }
        let exit = exit.unwrap_or_else(|lost| Exit {
            run,
            outcome: Outcome {
                exit_code: None,
                cause: Cause::Eviction,
                reason: Some("ShimDied".into()),
                message: Some(lost.why.unwrap_or_else(|| {
                    "the pod's supervisor ended without a word (killed, or the machine restarted)".into()
                })),
                started_at: None,
                finished_at: now.wall,
                log_records: lost.log_records,
            },
            containers: Vec::new(),
        });
        self.run_over(now, key, exit);
    }

    pub(super) fn run_over(&mut self, now: Now, key: &PodKey, exit: Exit) {
        let Some(entry) = self.ledger.pods.get(key) else { return };
        if exit.run != entry.run && kept(Rule::ResultsNameRuns) || !entry.may_be_alive() {
            return;
        }
        let mut exit = exit;
        name_end(entry, &mut exit.outcome);
        let Some(template) = self.template(entry) else { return self.end(now, key, exit.outcome) };
        let alone = self.is_on_its_own(now, key, entry, template);
        let (backoff, begin) = match after_run(template, key, entry, &exit.outcome, alone) {
            Next::End => return self.end(now, key, exit.outcome),
            Next::Retry(backoff) => (backoff, Begin::Anew),
            Next::GoOn(backoff, begin) => (backoff, begin),
        };
        let mut entry = entry.clone();
        entry.run_over = true;
        entry.retry_at = Some(now.wall.plus(backoff));
        entry.begin = begin;
        match exit.outcome.cause {
            Cause::Success => {}
            Cause::Failure => entry.failures += 1,
            Cause::Eviction | Cause::Fault => entry.evictions += 1,
        }
        entry.log_records = exit.outcome.log_records;
        self.record(Record::Pod { key: key.clone(), entry: Box::new(entry) });
        let change = PodChange::Retrying { outcome: exit.outcome, backoff };
        self.pod_event(now, key, exit.run, change);
        if let Some(live) = self.live.get_mut(key) {
            live.rest_until(now.boot.plus(backoff), begin);
        }
    }

    /// Nothing of the pod is brought here, mounted or run: another node may allow it.
    pub(super) fn refused(&mut self, now: Now, key: &PodKey, why: String) {
        self.warn(format!("pod {key} is refused: {why}"));
        let unready = Unready::forbidden(why);
        self.unready(now, key, unready);
    }

    /// The epoch ends here without another run.
    pub(super) fn unready(&mut self, now: Now, key: &PodKey, unready: Unready) {
        let log_records = self.ledger.pods.get(key).map_or(0, |entry| entry.log_records);
        // Another checkpoint, or node, may serve.
        let evicted = unready.reason == RESTORE_FAILED;
        let outcome = Outcome {
            exit_code: None,
            cause: match (evicted, unready.elsewhere) {
                (true, _) => Cause::Eviction,
                (false, true) => Cause::Fault,
                (false, false) => Cause::Failure,
            },
            reason: Some(unready.reason),
            message: Some(unready.message),
            started_at: None,
            finished_at: now.wall,
            log_records,
        };
        self.end(now, key, outcome);
    }

    /// The epoch is over, for good.
    pub(super) fn end(&mut self, now: Now, key: &PodKey, outcome: Outcome) {
        let Some(mut entry) = self.ledger.pods.get(key).cloned() else { return };
        let run = entry.run;
        let log_stored = outcome.log_records == 0;
        let has_outputs =
            self.ledger.specs.get(&entry.desired.spec).is_some_and(|template| !template.outputs.is_empty());
        let outputs_stored = run == Run::default() || !has_outputs;
        let event = self.pod_event(now, key, run, PodChange::Ended { outcome: outcome.clone() });
        entry.slot = None;
        entry.run_over = true;
        entry.checkpoints.saving = false;
        entry.ended = Some(Ended { outcome, event, log_stored, outputs_stored });
        self.record(Record::Pod { key: key.clone(), entry: Box::new(entry) });
        self.grants.forget(key);
        self.live.insert(key.clone(), Live::default());
        self.settle(now, key);
        // A newer epoch may have waited for this one.
        let newer: Vec<PodKey> =
            self.ledger.pods.keys().filter(|k| k.pod == key.pod && k.epoch > key.epoch).cloned().collect();
        for key in newer {
            self.reconcile(now, &key);
        }
    }

    /// After the end: log and outputs to the depot, then forget.
    pub(super) fn settle(&mut self, now: Now, key: &PodKey) {
        let Some(entry) = self.ledger.pods.get(key) else { return };
        let Some(ended) = &entry.ended else { return };
        let told = self.ledger.outbox.front().is_none_or(|event| event.n > ended.event);
        let live = self.live.entry(key.clone()).or_default();
        if !ended.log_stored || !ended.outputs_stored {
            if !live.storing && live.store_at.is_none_or(|at| at <= now.boot) {
                live.storing = true;
                let key = key.clone();
                let action =
                    if ended.log_stored { Action::StoreOutputs { key } } else { Action::StoreLog { key } };
                self.act(action);
            }
        } else if told && entry.unnamed {
            self.record(Record::PodDropped { key: key.clone() });
            self.live.remove(key);
            self.act(Action::Drop { key: key.clone() });
        }
    }

    /// Acknowledgements may have been the last thing that ended pods waited for.
    pub(super) fn reconcile_ended(&mut self, now: Now) {
        let ended: Vec<PodKey> = self
            .ledger
            .pods
            .iter()
            .filter(|(_, entry)| entry.ended.is_some())
            .map(|(key, _)| key.clone())
            .collect();
        for key in ended {
            self.settle(now, &key);
        }
    }

    fn store_later(&mut self, now: Now, key: &PodKey) {
        let Some(live) = self.live.get_mut(key) else { return };
        live.storing = false;
        live.store_at = Some(now.boot.plus(doubled(STORE_RETRY_MS, live.store_failures, STORE_RETRY_MS_MAX)));
        live.store_failures += 1;
    }

    fn stored(&mut self, now: Now, key: &PodKey, change: PodChange, mark: fn(&mut Ended)) {
        let Some(mut entry) = self.ledger.pods.get(key).cloned() else { return };
        let Some(ended) = &mut entry.ended else { return };
        mark(ended);
        let run = entry.run;
        let event = self.pod_event(now, key, run, change);
        if let Some(ended) = &mut entry.ended {
            // The directory stays until this is told as well.
            ended.event = event;
        }
        self.record(Record::Pod { key: key.clone(), entry: Box::new(entry) });
        if let Some(live) = self.live.get_mut(key) {
            *live = Live::default();
        }
        self.settle(now, key);
    }

    pub(super) fn log_stored(&mut self, now: Now, key: &PodKey, stored: bool) {
        if stored {
            self.stored(now, key, PodChange::LogStored, |ended| ended.log_stored = true);
        } else {
            self.store_later(now, key);
        }
    }

    pub(super) fn outputs_stored(
        &mut self,
        now: Now,
        key: &PodKey,
        result: Result<Option<(Digest, Bytes)>, NotStored>,
    ) {
        let change = match result {
            Ok(Some((digest, bytes))) => {
                PodChange::OutputsStored { digest: Some(digest), bytes, error: None }
            }
            Ok(None) => {
                let error = Some("none of the paths named under outputs was there at the end".to_owned());
                PodChange::OutputsStored { digest: None, bytes: Bytes::ZERO, error }
            }
            Err(NotStored { retriable: true, .. }) => return self.store_later(now, key),
            Err(NotStored { why, .. }) => {
                PodChange::OutputsStored { digest: None, bytes: Bytes::ZERO, error: Some(why) }
            }
        };
        self.stored(now, key, change, |ended| ended.outputs_stored = true);
    }
}

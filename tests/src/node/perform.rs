//! What a machine does of what its agent decides.

use berth_agent::core::ledger::{PodKey, Record};
use berth_agent::core::{Action, Event, NoExit, Now, Prepared, Step, Unready};
use berth_agent::task::{Order, Report, Root, Saved};
use berth_protocol::checkpoint::{CheckpointInfo, Needs};
use berth_protocol::ids::Digest;
use berth_protocol::job::PodTemplate;
use berth_protocol::message::node::HeldPod;
use berth_protocol::pod::RESTORE_FAILED;
use berth_protocol::rule::{Rule, kept};
use berth_protocol::units::Bytes;

use super::shim::{Shim, ShimState};
use super::{Node, Out, fails};

/// One in so many starts from a checkpoint fails, by its name and the node's.
const RESTORES_PER_FAILURE: u8 = 12;
/// And one in so many is not sent whole.
const SENDS_PER_FAILURE: u8 = 4;
/// One in so many stagings never ends, and one fails.
const STAGES_PER_LATE: u8 = 4;
const STAGES_PER_FAILURE: u8 = 5;

fn later(ms: u64, event: Event) -> Out {
    Out::Later { ms, event }
}

impl Node {
    pub(super) fn perform(&mut self, now: Now, step: Step) -> Vec<Out> {
        let Step { mut records, mut actions } = step;
        let torn = self.dies_writing.filter(|_| !records.is_empty() && !records.iter().all(Record::may_wait));
        let launches = actions.iter().any(|action| matches!(action, Action::Launch(_)));
        let dies = self
            .dies_after
            .filter(|(_, launching)| !actions.is_empty() && !records.is_empty() && (launches || !launching));
        self.count_failures(&records);
        let half = torn.and_then(|whole| records.get(whole).cloned());
        if let Some(whole) = torn {
            records.truncate(whole);
            actions.clear();
        } else if let Some((done, _)) = dies {
            actions.truncate(done);
            if !kept(Rule::LedgerFirst) {
                records.clear();
            }
        }
        let waits = records.iter().all(Record::may_wait);
        self.unsynced.extend(records);
        if !waits {
            self.sync();
        }
        if torn.is_some() || dies.is_some() {
            self.crash();
        }
        self.tear(half);
        let mut out = Vec::new();
        for action in actions {
            self.act(now, action, &mut out);
        }
        out
    }

    /// Whether a pod that failed is to run again, and its file does not say so.
    fn count_failures(&mut self, records: &[Record]) {
        let Some(agent) = &self.agent else { return };
        for record in records {
            let Record::Pod { key, entry } = record else { continue };
            let limit = agent.ledger().specs.get(&entry.desired.spec).map(|spec| spec.restart.backoff_limit);
            let failures = entry.desired.failures + u64::from(entry.failures);
            if entry.retry_at.is_some() && limit.is_some_and(|limit| failures > u64::from(limit)) {
                self.forgiven.push(key.clone());
            }
        }
    }

    fn act(&mut self, now: Now, action: Action, out: &mut Vec<Out>) {
        match action {
            Action::Hello(mut hello) => {
                let mut alive = self.scan();
                for held in &mut alive {
                    let key = PodKey::new(&held.pod, held.epoch);
                    held.granted = self.agent.as_ref().is_some_and(|agent| agent.is_granted(now, &key));
                }
                let found = |pod: &HeldPod| alive.iter().any(|a| a.pod == pod.pod && a.epoch == pod.epoch);
                hello.pods.retain(|pod| !found(pod));
                hello.pods.extend(alive);
                out.push(Out::Send(Action::Hello(hello)));
            }
            Action::Heartbeat(heartbeat) => {
                if let Some((nonce, from)) = &mut self.clock_broke
                    && *nonce == heartbeat.nonce
                {
                    *from = heartbeat.seq.min(*from);
                }
                out.push(Out::Send(Action::Heartbeat(heartbeat)));
            }
            Action::Events(_) => out.push(Out::Send(action)),
            Action::Prepare { key, template, from, kept } => {
                let result = self.prepare(&key, &template, from, kept);
                out.push(later(20, Event::Prepared { key, result }));
            }
            Action::Launch(launch) => {
                let from = self.ledger.pods.get(&launch.key).and_then(|entry| entry.desired.from);
                let own = self.resumes.remove(&launch.key);
                let left =
                    from.filter(|_| launch.restore).and_then(|from| self.depot.borrow().get(&from).copied());
                let left = own.or(left);
                let mut shim = Shim::new(&launch.key, launch.run, launch.template, now.boot);
                (shim.restore, shim.left) = (launch.restore, left.unwrap_or(shim.left));
                if self.shims.contains_key(&launch.key) {
                    self.launched_twice.push(launch.key.clone());
                }
                self.shims.insert(launch.key.clone(), shim);
                let report = Report::Created { run: launch.run };
                out.push(later(10, Event::Shim { key: launch.key, report }));
            }
            Action::Order { key, order: Order::Save { level, hold } } => {
                out.extend(self.advance(now, &key));
                let Some(shim) = self.shims.get_mut(&key).filter(|shim| !shim.hangs) else { return };
                let report = shim.save(now, &key, level, hold);
                if matches!(report, Report::Saved { .. }) {
                    self.saved.retain(|(of, _), _| *of != key);
                    self.saved.insert((key.clone(), level), shim.left);
                }
                out.push(later(30, Event::Shim { key: key.clone(), report }));
                out.extend(self.advance(now, &key));
            }
            Action::StoreCheckpoint { key, run, saved, .. } => {
                let Some(left) = self.saved.get(&(key.clone(), saved.level)) else { return };
                let id = Digest::of(format!("{key}/{run}/{}", saved.level).as_bytes());
                // Told too early, one in some never gets there.
                if kept(Rule::CheckpointFirst) || !fails(&format!("send {id}"), SENDS_PER_FAILURE) {
                    self.depot.borrow_mut().insert(id, *left);
                }
                let result = Ok(Box::new(info(id, &saved)));
                out.push(later(200, Event::CheckpointStored { key, level: saved.level, result }));
            }
            Action::Order { key, order } => self.order(now, &key, order, out),
            Action::Adopt { key, run } | Action::Kill { key, run } if !self.shims.contains_key(&key) => {
                let exit = self.exits.get(&(key.clone(), run)).cloned().ok_or_else(NoExit::default);
                out.push(later(5, Event::Gone { key, run, exit }));
            }
            Action::Adopt { key, .. } => {
                let shim = &self.shims[&key];
                let said = [Some(shim.report()), shim.last_save.clone()].into_iter().flatten();
                out.extend(said.map(|report| later(5, Event::Shim { key: key.clone(), report })));
            }
            Action::Kill { key, run } => {
                self.shims.remove(&key);
                out.push(later(5, Event::Gone { key, run, exit: Err(NoExit::default()) }));
            }
            Action::StoreLog { key } => out.push(later(5, Event::LogStored { key, stored: true })),
            Action::StoreOutputs { key } => {
                out.push(later(5, Event::OutputsStored { key, result: Ok(None) }));
            }
            Action::Stage { key, from, .. } => {
                let (drawn, why) = (format!("{key}/{}", self.id), "drawn".to_owned());
                // Some take longer than anybody waits.
                if !fails(&drawn, STAGES_PER_LATE) {
                    let result = if fails(&drawn, STAGES_PER_FAILURE) { Err(why) } else { Ok(()) };
                    out.push(later(500, Event::Staged { key, from, result }));
                }
            }
            Action::KeepCheckpoint { .. }
            | Action::CancelPrepare { .. }
            | Action::CancelStage { .. }
            | Action::Drop { .. }
            | Action::Depot(_)
            | Action::Warn(_) => {}
        }
    }

    fn order(&mut self, now: Now, key: &PodKey, order: Order, out: &mut Vec<Out>) {
        let Some(shim) = self.shims.get_mut(key) else { return };
        let begins = shim.state == ShimState::Created && matches!(order, Order::Start { .. });
        if begins && shim.restore {
            let report = Report::Restoring { run: shim.run };
            out.push(later(1, Event::Shim { key: key.clone(), report }));
        }
        if begins {
            let report = Report::Running { run: shim.run, started_at: now.wall };
            out.push(later(3, Event::Shim { key: key.clone(), report }));
        }
        shim.order(now.boot, order);
        out.extend(self.advance(now, key));
    }

    fn prepare(
        &mut self,
        key: &PodKey,
        template: &PodTemplate,
        from: Option<Digest>,
        kept: bool,
    ) -> Result<Prepared, Unready> {
        let own = self.saved.range((key.clone(), 0)..=(key.clone(), u64::MAX)).next_back();
        let own = own.map(|(_, left)| *left).filter(|_| kept);
        self.resumes.remove(key);
        self.resumes.extend(own.map(|left| (key.clone(), left)));
        if let Some(from) = from.filter(|_| own.is_none()) {
            let lacks = !self.depot.borrow().contains_key(&from);
            if lacks {
                self.lacking.push((key.clone(), from));
            }
            if lacks || fails(&format!("{from}/{}", self.id), RESTORES_PER_FAILURE) {
                let (reason, message) = (RESTORE_FAILED.to_owned(), "drawn".to_owned());
                return Err(Unready { reason, message, retriable: false, elsewhere: true });
            }
        }
        let roots = vec![Root::Host; template.containers.len()];
        let restore = own.is_some() || from.is_some();
        Ok(Prepared { roots, volumes: Vec::new(), workspace: None, restore })
    }
}

fn info(id: Digest, saved: &Saved) -> CheckpointInfo {
    CheckpointInfo {
        id,
        level: saved.level,
        at: saved.at,
        kind: saved.kind,
        bytes: Bytes(1 << 20),
        new_bytes: Bytes(1 << 20),
        frozen_ms: saved.frozen_ms,
        log_records: saved.log_records,
        needs: Needs::default(),
    }
}

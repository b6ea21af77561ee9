//! What becomes of jobs and pods: placed, run, ended, evicted, tried again, stopped, forgotten. Knows nodes only as
//! places; what is said to them is `wire`'s.

use berth_protocol::ids::{Digest, Epoch, Generation, JobUid, NodeId, PodId, Run};
use berth_protocol::job::{JobSpec, RestartPolicy};
use berth_protocol::message::user::JobPhase;
use berth_protocol::pod::{Cause, Goal, Outcome, PodPhase, VACATED};
use berth_protocol::rule::{Rule, kept};
use berth_protocol::units::{BootMs, Millis};

use super::checkpoints::{Leaving, cut_logs, is_failed_restore};
use super::cluster::{Assignment, Charge, Ending, EpochLog, Job, JobRun, Pod, PodState, Verdict};
use super::epoch::{ending, vanished};
use super::expiry::EXPIRY;
use super::retry::failed;
use super::timers::Timer;
use super::{Controller, Now};

/// Running time is written down this often where a deadline counts it: what a restart of the controller forgets.
const ACTIVE_WRITE: Millis = Millis(60_000);
/// Logs of past epochs that a pod's record lists; older ones are deleted.
const LOGS_MAX: usize = 64;

/// How the controller knows that nothing of an epoch is alive.
pub(super) enum Gone {
    /// The agent said so, and how it ended.
    Ended(Outcome),
    /// A scan did not find it, or its lease is over.
    Vanished { reason: &'static str, message: String },
}

impl Controller {
    /// Brings the job's pods in line with what it wants now. Changes nothing where they are.
    pub(super) fn reconcile(&mut self, now: Now, uid: &JobUid) {
        let Some(job) = self.cluster.jobs.get_mut(uid) else { return };
        if job.is_finished() {
            let expiry = job.run.finished_at.unwrap_or(now.wall).plus(job.file.spec.ttl).since(now.wall);
            let at = if job.run.expired { now.boot.plus(EXPIRY) } else { now.boot.plus(expiry) };
            self.timers.arm(Timer::Job(uid.clone()), at);
            return;
        }
        if job.run.verdict.is_none() && job.succeeded() >= job.file.spec.completions {
            job.run.verdict = Some(Verdict { phase: JobPhase::Succeeded, reason: None, message: None });
            self.dirty.runs.insert(uid.clone());
        }
        let ends = job.run.verdict.is_some();
        if ends {
            self.stop_pods(uid);
        } else if job.run.suspended {
            self.suspend_pods(uid);
        } else {
            let mut changed = false;
            while job.waiting().len() + job.placed().len() < job.file.spec.parallelism as usize {
                let Some(index) = job.next_index() else { break };
                let pod = Pod::waiting(job.file.generation, job.run.epoch_floor);
                job.put(index, pod);
                changed = true;
            }
            if changed {
                self.dirty.status.insert(uid.clone());
            }
            if let Some(until) = self.hold.as_ref().and_then(|hold| hold.holds(job, now)) {
                self.timers.arm(Timer::Job(uid.clone()), until);
            } else if job.ready().next().is_some() {
                self.scheduler.enqueue(now, uid, job);
            }
        }
        self.count_active(now, uid);
        self.finish_if_over(now, uid);
    }

    fn stop_pods(&mut self, uid: &JobUid) {
        let Some(job) = self.cluster.jobs.get_mut(uid) else { return };
        self.scheduler.dequeue(uid, job);
        for index in job.placed().clone() {
            if let Some(assignment) = job.assignment_mut(index)
                && assignment.goal != Goal::Stop
            {
                assignment.goal = Goal::Stop;
                self.dirty.pods.insert(uid.pod(index));
                self.dirty.desired.insert(assignment.node.clone());
                self.dirty.status.insert(uid.clone());
            }
        }
    }

    fn finish_if_over(&mut self, now: Now, uid: &JobUid) {
        let Some(job) = self.cluster.jobs.get_mut(uid) else { return };
        if job.run.verdict.is_none() || !job.placed().is_empty() {
            return;
        }
        let mut released = Vec::new();
        for index in job.waiting().clone() {
            let Some(pod) = job.take(index) else { continue };
            job.run.epoch_floor = job.run.epoch_floor.max(pod.epoch);
            self.dirty.pods.insert(uid.pod(index));
            // A pod that ran keeps its record, for its log.
            if let PodState::Waiting { last: Some(last), .. } = &pod.state {
                let state = PodState::Ended(last.clone());
                job.put(index, Pod { state, ..pod });
            } else {
                released.extend(pod.saved.checkpoints);
            }
        }
        job.asleep.clear();
        self.scheduler.forget(job);
        job.active_since = None;
        job.particular.clear();
        job.run.finished_at = Some(now.wall);
        self.let_go(released);
        let Some(job) = self.cluster.jobs.get_mut(uid) else { return };
        self.timers.arm(Timer::Job(uid.clone()), now.boot.plus(job.file.spec.ttl));
        self.dirty.runs.insert(uid.clone());
        self.dirty.status.insert(uid.clone());
    }

    /// Gives a waiting pod a node: the next epoch, in the transaction that names the node.
    pub(super) fn place(&mut self, now: Now, uid: &JobUid, index: u32, id: NodeId, charge: Charge) {
        let epochs_from = self.epochs_from();
        let (from, mark) = self.departure(uid, index);
        let (Some(job), Some(node)) = (self.cluster.jobs.get_mut(uid), self.cluster.nodes.get_mut(&id))
        else {
            return;
        };
        let assignment = Assignment {
            node: id.clone(),
            spec: job.template,
            charge,
            goal: Goal::Run,
            leaving: None,
            staging: None,
            from,
            asked: 0,
            answered: 0,
            phase: PodPhase::Assigned,
            run: Run(0),
            started_at: None,
            lease: job.file.spec.pod.on_disconnect.lease(job.file.spec.pod.grace),
            lost_after: job.file.spec.pod.on_disconnect.lost_after,
            named: (self.config.term, node.generation.next()),
            failures: u64::from(job.run.failures),
            restarts: job.pod(index).map_or(0, |pod| u64::from(pod.restarts)),
            had_images: self.scheduler.has_images(&job.file.spec.pod, &id) == Some(true),
            last: None,
            unresumed: None,
            progress: None,
        };
        self.scheduler.count_in(&job.file.spec, &assignment.charge);
        let placed = job.change(index, |pod| {
            let next = if kept(Rule::EpochRises) { pod.epoch.next() } else { pod.epoch.max(Epoch(1)) };
            pod.epoch = next.max(epochs_from);
            pod.saved.target = None;
            pod.no_outputs = None;
            cut_logs(pod, mark);
            pod.state = PodState::Placed(Box::new(assignment));
            pod.logs.push(EpochLog {
                epoch: pod.epoch,
                node: Some(id.clone()),
                records: None,
                stored: false,
                kept: 0,
                cut: None,
            });
            let dropped = (pod.logs.len() > LOGS_MAX).then(|| pod.logs.remove(0));
            (pod.epoch, dropped)
        });
        let Some((epoch, dropped)) = placed else { return };
        job.particular.remove(&index);
        node.pods.insert(uid.pod(index), epoch);
        node.held = None;
        self.counters.placements += 1;
        self.dirty.pods.insert(uid.pod(index));
        self.dirty.desired.insert(id);
        self.dirty.status.insert(uid.clone());
        if let Some(log) = dropped {
            self.delete_log(uid.pod(index), &log);
        }
        self.follow_placed(now, uid, index);
    }

    /// The pod's epoch is over: nothing of it is alive.
    pub(super) fn pod_gone(&mut self, now: Now, id: &PodId, gone: Gone) {
        let Some(job) = self.cluster.jobs.get_mut(&id.uid) else { return };
        let Some(assignment) = job.assignment(id.index).cloned() else { return };
        self.scheduler.count_out(&job.file.spec, &assignment.charge);
        let mut counted = true;
        if let Some(node) = self.cluster.nodes.get_mut(&assignment.node) {
            node.pods.remove(id);
            node.held = None;
            counted =
                self.scheduler.release(&assignment.node, &node.record.inventory, id, &assignment.charge);
        }
        if !counted {
            self.refresh_room(&assignment.node);
        }
        let Some(job) = self.cluster.jobs.get_mut(&id.uid) else { return };
        self.dirty.desired.insert(assignment.node.clone());
        self.dirty.pods.insert(id.clone());
        self.dirty.status.insert(id.uid.clone());
        let (epoch, generation) =
            job.pod(id.index).map_or_else(Default::default, |p| (p.epoch, p.generation));
        if let (Gone::Ended(outcome), Some(log)) = (&gone, job.log_mut(id.index, epoch)) {
            log.records = Some(outcome.log_records);
        }
        let (cause, ending) = match gone {
            Gone::Ended(outcome) => (outcome.cause, ending(&assignment, &outcome)),
            Gone::Vanished { reason, message } => {
                (Cause::Eviction, vanished(&assignment, now, reason, message))
            }
        };
        if generation < job.file.generation {
            self.renew(&id.uid, id.index);
        } else {
            self.settle(now, id, cause, ending, &assignment);
        }
        self.reconcile(now, &id.uid);
    }

    /// What an end means to the job.
    fn settle(&mut self, now: Now, id: &PodId, cause: Cause, ending: Ending, was: &Assignment) {
        let Some(job) = self.cluster.jobs.get_mut(&id.uid) else { return };
        if job.run.started_at.is_none() && ending.started_at.is_some() {
            job.run.started_at = ending.started_at;
            self.dirty.runs.insert(id.uid.clone());
        }
        let restart = job.file.spec.pod.restart;
        let over = job.run.verdict.is_some();
        let cause = match cause {
            Cause::Fault if !over && self.avoid(id, &was.node) => Cause::Eviction,
            Cause::Fault => Cause::Failure,
            other => other,
        };
        let Some(job) = self.cluster.jobs.get_mut(&id.uid) else { return };
        match cause {
            Cause::Success if restart.policy != RestartPolicy::Always || over => {
                end(job, id.index, Ending { succeeded: true, ..ending });
            }
            Cause::Success => self.retry(now, id, ending, 1),
            Cause::Failure | Cause::Fault => {
                job.run.failures += 1;
                self.counters.failures += 1;
                self.dirty.runs.insert(id.uid.clone());
                if over {
                    end(job, id.index, ending);
                } else if restart.policy == RestartPolicy::Never || job.run.failures > restart.backoff_limit {
                    let verdict = failed(&job.file.spec, id.index, &ending, job.run.failures);
                    job.run.verdict = Some(verdict);
                    end(job, id.index, ending);
                } else {
                    let failures = job.run.failures;
                    self.retry(now, id, ending, failures);
                }
            }
            Cause::Eviction if over => {
                // Stopped because the job ends: the failure that ended it tells more than the stop.
                end(job, id.index, was.last.as_deref().cloned().unwrap_or(ending));
            }
            Cause::Eviction => {
                let vacated = ending.reason.as_deref() == Some(VACATED);
                let ending = match &was.leaving {
                    Some(Leaving::Preempt { message }) => Ending {
                        reason: Some("Preempted".to_owned()),
                        message: Some(message.clone()),
                        ..ending
                    },
                    Some(Leaving::Move { why, .. }) => {
                        Ending { reason: Some("Moved".to_owned()), message: Some(why.clone()), ..ending }
                    }
                    _ => ending,
                };
                let failed_restore = was.from.filter(|_| is_failed_restore(ending.reason.as_deref()));
                let by_order = matches!(
                    was.leaving,
                    Some(Leaving::Migrate { .. } | Leaving::Drain | Leaving::Move { .. })
                );
                let moved = by_order && vacated;
                let evicted = match was.leaving {
                    Some(Leaving::Suspend | Leaving::Restore) => false,
                    Some(_) => true,
                    // A restore that failed is told and counted by itself.
                    None => was.goal != Goal::Stop && failed_restore.is_none(),
                };
                if evicted {
                    job.run.evictions += 1;
                    self.counters.evictions += 1;
                    self.dirty.runs.insert(id.uid.clone());
                }
                if moved {
                    job.run.migrations += 1;
                    self.counters.migrations += 1;
                    self.dirty.runs.insert(id.uid.clone());
                }
                let why = ending.message.clone();
                job.change(id.index, |pod| {
                    if let Some(Leaving::Migrate { to }) = &was.leaving {
                        pod.saved.send_to(Some(to.clone()));
                    }
                    pod.state = PodState::Waiting { until: None, last: Some(Box::new(ending)) };
                });
                if let Some(from) = failed_restore {
                    self.restore_failed(id, &was.node, from, why.as_deref());
                }
                self.bound_for_its_seat(id);
            }
        }
    }

    fn retry(&mut self, now: Now, id: &PodId, ending: Ending, failures: u32) {
        let Some(job) = self.cluster.jobs.get_mut(&id.uid) else { return };
        let wait = job.file.spec.pod.restart.backoff(id, failures);
        job.change(id.index, |pod| {
            pod.restarts += 1;
            pod.state = PodState::Waiting { until: Some(now.wall.plus(wait)), last: Some(Box::new(ending)) };
        });
        self.sleep(&id.uid, id.index, now.boot.plus(wait));
    }

    fn sleep(&mut self, uid: &JobUid, index: u32, until: BootMs) {
        if let Some(job) = self.cluster.jobs.get_mut(uid) {
            job.asleep.insert(index, until);
            self.timers.arm(Timer::Job(uid.clone()), until);
        }
    }

    /// Backoffs of a job just loaded, at most as long as the job's file allows.
    pub(super) fn wake_sleepers(&mut self, uid: &JobUid, now: Now) {
        let Some(job) = self.cluster.jobs.get(uid) else { return };
        let most = job.file.spec.pod.restart.retry_max;
        let asleep: Vec<(u32, BootMs)> = job
            .waiting()
            .iter()
            .filter_map(|index| match &job.pods()[index].state {
                PodState::Waiting { until: Some(until), .. } => {
                    Some((*index, now.boot.plus(until.since(now.wall).min(most))))
                }
                _ => None,
            })
            .collect();
        for (index, until) in asleep {
            self.sleep(uid, index, until);
        }
    }

    /// A pod of an earlier generation has stopped: its index is the new generation's.
    fn renew(&mut self, uid: &JobUid, index: u32) {
        let Some(job) = self.cluster.jobs.get_mut(uid) else { return };
        let Some(pod) = job.take(index) else { return };
        job.run.epoch_floor = job.run.epoch_floor.max(pod.epoch);
        self.dirty.runs.insert(uid.clone());
        self.dirty.pods.insert(uid.pod(index));
        self.delete_blobs(uid.pod(index), &pod);
    }

    /// The job's file changed: its pods stop, and the new generation begins from the start.
    pub(super) fn replace_job(
        &mut self,
        now: Now,
        uid: &JobUid,
        spec: JobSpec,
        written: Digest,
        template: Digest,
    ) -> Generation {
        let Some(job) = self.cluster.jobs.get_mut(uid) else { return Generation(0) };
        // The queue and the counts go by the priority, which the new file may change.
        self.scheduler.dequeue(uid, job);
        let charges: Vec<Charge> =
            job.placed().iter().filter_map(|i| Some(job.assignment(*i)?.charge.clone())).collect();
        for charge in &charges {
            self.scheduler.count_out(&job.file.spec, charge);
            self.scheduler.count_in(&spec, charge);
        }
        (job.file.written, job.template) = (written, template);
        let old = std::mem::replace(&mut job.file.spec, spec).pod.workspace;
        let new = job.file.spec.pod.workspace.as_ref().map(|workspace| workspace.digest);
        self.name_blob(new, old.map(|workspace| workspace.digest));
        self.begin_anew(now, uid)
    }

    pub(super) fn restart(&mut self, now: Now, uid: &JobUid) {
        self.begin_anew(now, uid);
    }

    fn begin_anew(&mut self, now: Now, uid: &JobUid) -> Generation {
        let Some(job) = self.cluster.jobs.get_mut(uid) else { return Generation(0) };
        self.scheduler.dequeue(uid, job);
        job.file.generation = job.file.generation.next();
        job.file.submitted_at = now.wall;
        let generation = job.file.generation;
        let suspended = job.file.spec.suspend;
        job.run = JobRun { suspended, epoch_floor: job.run.epoch_floor, ..JobRun::default() };
        self.scheduler.forget(job);
        job.published = None;
        job.active_since = None;
        job.asleep.clear();
        job.particular.clear();
        let still: Vec<u32> = job.pods().keys().filter(|i| !job.placed().contains(i)).copied().collect();
        self.stop_pods(uid);
        for index in still {
            self.renew(uid, index);
        }
        self.dirty.jobs.insert(uid.clone());
        self.dirty.runs.insert(uid.clone());
        self.dirty.status.insert(uid.clone());
        self.reconcile(now, uid);
        generation
    }

    pub(super) fn cancel(&mut self, now: Now, uid: &JobUid) {
        let message = Some("cancelled by a command".to_owned());
        self.give_verdict(
            now,
            uid,
            Verdict { phase: JobPhase::Cancelled, reason: Some("Cancelled".to_owned()), message },
        );
    }

    fn give_verdict(&mut self, now: Now, uid: &JobUid, verdict: Verdict) {
        let Some(job) = self.cluster.jobs.get_mut(uid) else { return };
        if job.run.verdict.is_none() {
            job.run.verdict = Some(verdict);
            self.dirty.runs.insert(uid.clone());
            self.dirty.status.insert(uid.clone());
            self.reconcile(now, uid);
        }
    }

    /// Starts or stops the clock of the job's deadline as its pods run.
    pub(super) fn count_active(&mut self, now: Now, uid: &JobUid) {
        let Some(job) = self.cluster.jobs.get_mut(uid) else { return };
        let Some(deadline) = job.file.spec.active_deadline else { return };
        let runs = |phase| matches!(phase, PodPhase::Running | PodPhase::Checkpointing);
        let running = job.placed().iter().any(|i| job.assignment(*i).is_some_and(|a| runs(a.phase)));
        if let Some(since) = job.active_since.take() {
            job.run.active = job.run.active.saturating_add(now.boot.since(since));
            self.dirty.runs.insert(uid.clone());
        }
        if running && job.run.verdict.is_none() {
            job.active_since = Some(now.boot);
            let left = deadline.saturating_sub(job.run.active);
            self.timers.arm(Timer::Job(uid.clone()), now.boot.plus(left.min(ACTIVE_WRITE)));
        }
    }

    pub(super) fn wake_job(&mut self, now: Now, uid: &JobUid) {
        let Some(job) = self.cluster.jobs.get_mut(uid) else { return };
        if let Some(finished_at) = job.run.finished_at {
            let over = now.wall.since(finished_at) >= job.file.spec.ttl;
            if job.run.expired || over {
                self.expire(now, uid)
            } else {
                self.reconcile(now, uid)
            }
            return;
        }
        job.asleep.retain(|_, until| *until > now.boot);
        if let Some(next) = job.asleep.values().min() {
            self.timers.arm(Timer::Job(uid.clone()), *next);
        }
        self.count_active(now, uid);
        let Some(job) = self.cluster.jobs.get(uid) else { return };
        if let Some(deadline) = job.file.spec.active_deadline
            && job.run.active >= deadline
        {
            let message =
                Some(format!("the job ran for {deadline}, which activeDeadlineSeconds allows at most"));
            let reason = Some("DeadlineExceeded".to_owned());
            self.give_verdict(now, uid, Verdict { phase: JobPhase::Failed, reason, message });
        }
        self.reconcile(now, uid);
    }
}

fn end(job: &mut Job, index: u32, ending: Ending) {
    job.change(index, |pod| pod.state = PodState::Ended(Box::new(ending)));
}

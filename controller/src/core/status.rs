//! What users see of jobs and nodes: statuses made from the state, and when they go out.

use std::collections::BTreeMap;

use berth_protocol::ids::{JobUid, NodeId};
use berth_protocol::image::Images;
use berth_protocol::limits::{MESSAGE_BYTES_MAX, STATUS_PODS_MAX, STATUS_PUBLISH_MS_MIN};
use berth_protocol::message::node::PullProgress;
use berth_protocol::message::user::{
    Amounts, DrainStatus, JobPhase, JobStatus, NodeState, NodeStatus, PodStatus,
};
use berth_protocol::pod::{Goal, NO_OUTPUTS, PodPhase};
use berth_protocol::topic::{JobTopic, Topic};
use berth_protocol::units::{Bytes, MilliCpu, Millis};

use super::checkpoints::Leaving;
use super::cluster::{Assignment, Job, Liveness, Node, PodState};
use super::schedule::explain;
use super::timers::Timer;
use super::{Controller, Now, fit};

impl Controller {
    pub(super) fn job_status(&mut self, uid: &JobUid) -> Option<JobStatus> {
        let job = self.cluster.jobs.get(uid)?;
        let phase = job_phase(job);
        let (reason, message) = match (&job.run.verdict, phase) {
            (Some(verdict), _) if job.is_finished() => (verdict.reason.clone(), verdict.message.clone()),
            (Some(_), _) => (Some("Stopping".to_owned()), Some(self.stopping(job))),
            (None, JobPhase::Suspended) => (Some("Suspended".to_owned()), None),
            // Nobody waits for a node, or some do.
            (None, _) if job.ready().next().is_none() && job.ready_particular().next().is_some() => {
                (Some("Unschedulable".to_owned()), Some(self.why_waiting(uid).1))
            }
            (None, _) if job.ready().next().is_none() || job.refused_at.is_none() => waiting_words(job),
            (None, _) => {
                let (reason, message) = self.why_waiting(uid);
                (Some(reason), Some(message))
            }
        };
        let job = self.cluster.jobs.get(uid)?;
        let unfinished = job.placed().iter().chain(job.waiting());
        let mut failed: Vec<_> = job.failed().iter().collect();
        failed.sort_by_key(|index| match &job.pods()[index].state {
            PodState::Ended(ending) => Some(ending.finished_at),
            _ => None,
        });
        let succeeded = job.pods().iter().rev().filter(|(_, pod)| match &pod.state {
            PodState::Ended(ending) => ending.succeeded,
            _ => false,
        });
        let mut listed: Vec<u32> = unfinished.chain(failed).copied().take(STATUS_PODS_MAX).collect();
        listed.extend(succeeded.map(|(index, _)| *index).take(STATUS_PODS_MAX - listed.len()));
        // Unfinished first, then what failed in the order in which it did, then the rest.
        let end = listed.iter().position(|i| !job.placed().contains(i) && !job.waiting().contains(i));
        let done = end.map_or(0, |end| listed[end..].iter().filter(|i| job.failed().contains(i)).count());
        if let Some(end) = end {
            listed[end + done..].sort_unstable();
        }
        let pods = listed.into_iter().filter_map(|index| self.pod_status(job, index)).collect();
        Some(JobStatus {
            namespace: job.file.spec.namespace.clone(),
            job: job.file.spec.name.clone(),
            uid: Some(uid.clone()),
            generation: job.file.generation,
            phase,
            reason,
            message,
            pods,
            pod_counts: self.pod_counts(job),
            failures: job.run.failures,
            evictions: job.run.evictions,
            migrations: job.run.migrations,
            checkpoint: job.run.checkpoint.clone(),
            submitted_at: job.file.submitted_at,
            started_at: job.run.started_at,
            finished_at: job.run.finished_at,
        })
    }

    /// Transfers that a heartbeat tells of show in the status of their pods.
    pub(super) fn note_transfers(&mut self, id: &NodeId, what: &str, pulls: &[PullProgress]) {
        for pull in pulls {
            let Some(node) = self.cluster.nodes.get(id) else { return };
            if node.pods.get(&pull.pod) != Some(&pull.epoch) {
                continue;
            }
            let mib = |bytes: Bytes| bytes.0 / Bytes::MIB;
            let text = match pull.total {
                Bytes::ZERO => format!("{what}: {} MiB so far", mib(pull.done)),
                total => format!("{what}: {} of {} MiB", mib(pull.done), mib(total)),
            };
            let job = self.cluster.jobs.get_mut(&pull.pod.uid);
            if let Some(assignment) = job.and_then(|job| job.assignment_mut(pull.pod.index))
                && assignment.progress.as_ref() != Some(&text)
            {
                assignment.progress = Some(text);
                self.dirty.status.insert(pull.pod.uid.clone());
            }
        }
    }

    fn stopping(&self, job: &Job) -> String {
        let silent = job.placed().iter().filter_map(|i| {
            let id = &job.assignment(*i)?.node;
            self.cluster.nodes.get(id).filter(|node| node.liveness != Liveness::Online).map(|_| id.as_str())
        });
        let silent: std::collections::BTreeSet<&str> = silent.collect();
        let text = format!("{} of its pods are being stopped", job.placed().len());
        if silent.is_empty() {
            return text;
        }
        let names: Vec<&str> = silent.into_iter().collect();
        format!("{text}; waiting to hear from {}", names.join(", "))
    }

    pub(super) fn pod_status(&self, job: &Job, index: u32) -> Option<PodStatus> {
        let pod = job.pod(index)?;
        let mut status = PodStatus {
            pod: job.file.spec.name.pod(index),
            epoch: pod.epoch,
            node: None,
            phase: PodPhase::Pending,
            exit_code: None,
            reason: None,
            message: None,
            restarts: pod.restarts,
            started_at: None,
            finished_at: None,
            checkpoint_failed: pod.saved.failure.clone(),
            log_records: pod.logs.last().and_then(|log| log.records),
        };
        match &pod.state {
            PodState::Waiting { last, .. } => {
                if let Some(last) = last {
                    status.reason.clone_from(&last.reason);
                    status.message.clone_from(&last.message);
                    status.exit_code = last.exit_code;
                }
                if let Some(trouble) = &pod.saved.trouble {
                    status.message = Some(trouble.clone());
                }
            }
            PodState::Placed(assignment) => {
                let lost =
                    self.cluster.nodes.get(&assignment.node).is_some_and(|n| n.liveness == Liveness::Lost);
                status.node = Some(assignment.node.clone());
                status.phase = if lost { PodPhase::Lost } else { assignment.phase };
                status.started_at = assignment.started_at;
                if let Some((reason, message)) = leaving_words(assignment) {
                    status.reason = Some(reason.to_owned());
                    status.message = Some(message);
                } else if let Some(last) =
                    assignment.last.as_ref().filter(|_| assignment.phase != PodPhase::Running)
                {
                    status.reason.clone_from(&last.reason);
                    status.exit_code = last.exit_code;
                    status.message = Some("waits for its next start after a failure".to_owned());
                }
                if status.message.is_none() {
                    let troubles = [&assignment.unresumed, &pod.saved.trouble].into_iter().flatten();
                    let troubles: Vec<&str> = troubles.map(String::as_str).collect();
                    status.message = Some(troubles.join("; ")).filter(|text| !text.is_empty());
                }
                if let Some(progress) = &assignment.progress {
                    status.message = Some(progress.clone());
                }
            }
            PodState::Ended(ending) => {
                status.node.clone_from(&ending.node);
                status.phase = if ending.succeeded { PodPhase::Succeeded } else { PodPhase::Failed };
                status.exit_code = ending.exit_code;
                status.reason.clone_from(&ending.reason);
                status.message.clone_from(&ending.message);
                status.started_at = ending.started_at;
                status.finished_at = Some(ending.finished_at);
            }
        }
        if let Some(why) = &pod.no_outputs {
            let failed = status.exit_code.filter(|code| *code != 0);
            let end = failed.map(|code| format!("ended with exit code {code}"));
            let before = status.message.or(end).map(|end| format!("{end}; ")).unwrap_or_default();
            status.message = Some(format!("{before}{NO_OUTPUTS}{why}"));
        }
        Some(status)
    }

    fn pod_counts(&self, job: &Job) -> BTreeMap<PodPhase, u32> {
        let mut counts: BTreeMap<PodPhase, u32> = BTreeMap::new();
        let number = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        for index in job.placed() {
            if let Some(status) = self.pod_status(job, *index) {
                *counts.entry(status.phase).or_default() += 1;
            }
        }
        let pending = if job.is_finished() { 0 } else { number(job.waiting().len()) + job.uncreated() };
        let rest = [
            (PodPhase::Pending, pending),
            (PodPhase::Succeeded, job.succeeded()),
            (PodPhase::Failed, number(job.failed().len())),
        ];
        for (phase, n) in rest.into_iter().filter(|(_, n)| *n > 0) {
            *counts.entry(phase).or_default() += n;
        }
        counts
    }

    /// Keeps the counters of jobs and pods by phase in step with a job's status; `None`: the job is forgotten.
    pub(super) fn recount(&mut self, uid: &JobUid, status: Option<&JobStatus>) {
        let Some(job) = self.cluster.jobs.get_mut(uid) else { return };
        let phase = status.map(|status| status.phase);
        let pods =
            status.filter(|_| !job.is_finished()).map(|status| status.pod_counts.clone()).unwrap_or_default();
        if let Some(old) = std::mem::replace(&mut job.counted, phase) {
            take(&mut self.counters.jobs, job_word(old), 1);
        }
        if let Some(new) = phase {
            *self.counters.jobs.entry(job_word(new)).or_default() += 1;
        }
        for (phase, n) in std::mem::replace(&mut job.counted_pods, pods.clone()) {
            take(&mut self.counters.pods, pod_word(phase), u64::from(n));
        }
        for (phase, n) in pods {
            *self.counters.pods.entry(pod_word(phase)).or_default() += u64::from(n);
        }
    }

    pub(super) fn publish_state(&mut self, now: Now, id: &NodeId) {
        let Some(status) = self.node_status(id) else { return };
        let Some(node) = self.cluster.nodes.get_mut(id) else { return };
        if let Some(old) = node.counted.replace(status.state) {
            take(&mut self.counters.nodes, state_word(old), 1);
        }
        *self.counters.nodes.entry(state_word(status.state)).or_default() += 1;
        // Of a node not heard since the start nothing is known yet.
        if node.session.is_none() && node.liveness == Liveness::Silent {
            return;
        }
        node.published = Some(now.boot);
        self.publish(Topic::NodeState { node: id.clone() }, &status, true);
    }

    pub(super) fn node_status(&self, id: &NodeId) -> Option<NodeStatus> {
        let node = self.cluster.nodes.get(id)?;
        let has = &node.record.inventory;
        let free = &self.scheduler.rooms()[self.scheduler.room(id)?];
        let gpus_free: u64 = free.devices.iter().map(|device| u64::from(device.milli)).sum();
        let capacity =
            Amounts { cpu_milli: has.cpu, memory_bytes: has.memory, gpu_milli: has.gpus.len() as u64 * 1000 };
        let allocated = Amounts {
            cpu_milli: has.cpu.saturating_sub(MilliCpu(free.cpu_milli)),
            memory_bytes: has.memory.saturating_sub(Bytes(free.memory_bytes)),
            gpu_milli: capacity.gpu_milli.saturating_sub(gpus_free),
        };
        Some(NodeStatus {
            node: id.clone(),
            state: node_state(node),
            message: self.node_message(node),
            capacity,
            allocated,
            usage: node.usage.clone(),
            labels: has.labels.clone(),
            taints: has.taints.iter().cloned().collect(),
            gpus: has.gpus.clone(),
            hostname: has.hostname.clone(),
            arch: has.arch.clone(),
            kernel: has.kernel.clone(),
            os: has.os.clone(),
            agent_version: has.agent_version.clone(),
            criu: has.criu.clone(),
            saves_gpus: has.saves_gpus,
            pods: u32::try_from(node.pods.len()).unwrap_or(u32::MAX),
            images: Images::default(),
            policy: None,
            drain: node.record.drain.as_ref().map(|drain| DrainStatus {
                since: drain.since,
                deadline: drain.deadline,
                left: u32::try_from(node.pods.len()).unwrap_or(u32::MAX),
                notice: drain.notice.as_ref().map(|notice| notice.why.clone()),
            }),
            last_heartbeat_at: node.last_heartbeat_at,
        })
    }

    fn node_message(&self, node: &Node) -> Option<String> {
        if let Some(why) = node.session.as_ref().and_then(|session| session.withheld) {
            return Some(format!("gets no lease: {why}"));
        }
        match node.liveness {
            Liveness::Silent if self.blind => Some(
                "silent together with most nodes: the controller holds its judgement until it hears them again"
                    .to_owned(),
            ),
            Liveness::Silent => Some("heartbeats are missing".to_owned()),
            Liveness::Lost => Some("silent for too long: its pods go elsewhere as their leases end".to_owned()),
            Liveness::Online if !node.unknown.is_empty() => {
                let pods: Vec<String> = node.unknown.iter().take(8).map(ToString::to_string).collect();
                Some(format!("holds {} pods that the store does not know: {}", node.unknown.len(), pods.join(", ")))
            }
            Liveness::Online => node.record.drain.as_ref().map(|drain| {
                let how = match node.pods.len() {
                    0 => "drained: nothing of it is left".to_owned(),
                    left => format!("draining: {left} pods are still there"),
                };
                match &drain.notice {
                    Some(notice) => format!("{}; {how}", notice.why),
                    None => how,
                }
            }),
        }
    }

    /// Publishes a job's status now, or when its turn comes.
    pub(super) fn publish_status(&mut self, now: Now, uid: &JobUid) {
        let Some(job) = self.cluster.jobs.get(uid) else { return };
        let due = job.published.map(|at| at.plus(Millis(STATUS_PUBLISH_MS_MIN)));
        if let Some(due) = due
            && due > now.boot
            && !job.is_finished()
        {
            self.timers.arm(Timer::Status(uid.clone()), due);
            return;
        }
        if job.run.expired {
            return;
        }
        let Some(mut status) = self.job_status(uid) else { return };
        fit::status(&mut status, MESSAGE_BYTES_MAX);
        if let Some(job) = self.cluster.jobs.get_mut(uid) {
            job.published = Some(now.boot);
        }
        self.recount(uid, Some(&status));
        let topic = Topic::job(&status.namespace, &status.job, JobTopic::Status);
        self.publish(topic, &status, true);
    }

    /// As `verdicts`, with what keeps the first pod that waits for a node of its own from each.
    pub(super) fn verdicts_with_needs(&self, uid: &JobUid) -> Vec<(usize, Vec<explain::Reason>)> {
        let mut verdicts = self.verdicts(uid);
        let Some(job) = self.cluster.jobs.get(uid) else { return verdicts };
        let Some(index) = job.ready_particular().next().filter(|_| job.ready().next().is_none()) else {
            return verdicts;
        };
        for (room, reasons) in &mut verdicts {
            let against = self.bars(uid, index, &self.scheduler.nodes[*room]);
            reasons.extend(against.into_iter().map(explain::Reason::of_checkpoint));
        }
        verdicts
    }

    /// Every reason against one more pod of the job on this node.
    pub(super) fn verdict_on(&self, uid: &JobUid, node: &NodeId) -> Vec<String> {
        let room = self.scheduler.room(node);
        let verdict = self.verdicts(uid).into_iter().find(|(index, _)| Some(*index) == room);
        verdict
            .map(|(_, reasons)| reasons.into_iter().map(|reason| reason.text).collect())
            .unwrap_or_default()
    }
}

/// What to say of a pod that is to leave its node.
fn leaving_words(assignment: &Assignment) -> Option<(&'static str, String)> {
    let first = match (assignment.goal, &assignment.staging) {
        (Goal::Vacate, _) => "is being saved".to_owned(),
        (Goal::Stop, _) => "is being stopped".to_owned(),
        (_, Some(staging)) if staging.first.is_some() => {
            "runs on while it is saved a first time, so that it stands still for less".to_owned()
        }
        (_, Some(staging)) => format!("runs on until {} has what it needs", staging.to),
        (_, None) => return None,
    };
    let Some(leaving) = &assignment.leaving else { return Some(("Stopping", "is being stopped".to_owned())) };
    Some(match leaving {
        Leaving::Migrate { to } => ("Migrating", format!("{first}, to go on at {to}")),
        Leaving::Move { to, why } => ("Moving", format!("{first}, to go on at {to}: {why}")),
        Leaving::Drain => ("Draining", format!("{first}: its node is being drained")),
        Leaving::Suspend => ("Suspending", format!("{first}: the job is suspended")),
        Leaving::Preempt { message } => ("Preempted", message.clone()),
        Leaving::Restore => ("Restoring", format!("{first}, to go on from a checkpoint")),
    })
}

fn take(counts: &mut BTreeMap<&'static str, u64>, word: &'static str, n: u64) {
    if let Some(count) = counts.get_mut(word) {
        *count = count.saturating_sub(n);
    }
}

fn waiting_words(job: &Job) -> (Option<String>, Option<String>) {
    if job.asleep.is_empty() || !job.placed().is_empty() {
        return (None, None);
    }
    (Some("BackOff".to_owned()), Some("waits before the next start after a failure".to_owned()))
}

fn job_phase(job: &Job) -> JobPhase {
    match &job.run.verdict {
        Some(verdict) if job.is_finished() => verdict.phase,
        None if job.run.suspended => JobPhase::Suspended,
        _ if job.run.started_at.is_some() && (!job.placed().is_empty() || job.run.verdict.is_some()) => {
            JobPhase::Running
        }
        _ => JobPhase::Pending,
    }
}

fn node_state(node: &Node) -> NodeState {
    match node.liveness {
        Liveness::Online if node.session.as_ref().is_some_and(|session| session.withheld.is_some()) => {
            NodeState::Silent
        }
        Liveness::Online if node.record.cordoned => NodeState::Cordoned,
        Liveness::Online => NodeState::Online,
        Liveness::Silent => NodeState::Silent,
        Liveness::Lost => NodeState::Offline,
    }
}

fn state_word(state: NodeState) -> &'static str {
    match state {
        NodeState::Online => "online",
        NodeState::Silent => "silent",
        NodeState::Offline => "offline",
        NodeState::Cordoned => "cordoned",
    }
}

fn job_word(phase: JobPhase) -> &'static str {
    match phase {
        JobPhase::Pending => "pending",
        JobPhase::Running => "running",
        JobPhase::Suspended => "suspended",
        JobPhase::Succeeded => "succeeded",
        JobPhase::Failed => "failed",
        JobPhase::Cancelled => "cancelled",
        JobPhase::Rejected => "rejected",
    }
}

fn pod_word(phase: PodPhase) -> &'static str {
    match phase {
        PodPhase::Pending => "pending",
        PodPhase::Assigned => "assigned",
        PodPhase::Pulling => "pulling",
        PodPhase::Starting => "starting",
        PodPhase::Running => "running",
        PodPhase::Checkpointing => "checkpointing",
        PodPhase::Paused => "paused",
        PodPhase::Restoring => "restoring",
        PodPhase::Succeeded => "succeeded",
        PodPhase::Failed => "failed",
        PodPhase::Lost => "lost",
    }
}

//! Runs that begin again on their node, and the verdict on a job that too many failures bring. Pure.

use berth_protocol::ids::PodId;
use berth_protocol::job::{JobSpec, RestartPolicy};
use berth_protocol::message::user::JobPhase;
use berth_protocol::pod::{Cause, Outcome, PodPhase};

use super::cluster::{Ending, Verdict};
use super::epoch::ending;
use super::{Controller, Now};

/// The verdict that a pod's failure brings.
pub(super) fn failed(spec: &JobSpec, index: u32, ending: &Ending, failures: u32) -> Verdict {
    let pod = spec.name.pod(index);
    let how = match (&ending.message, ending.exit_code) {
        (Some(message), _) => format!("pod {pod} failed: {message}"),
        (None, Some(code)) => format!("pod {pod} ended with exit code {code}"),
        (None, None) => format!("pod {pod} failed"),
    };
    if spec.pod.restart.policy == RestartPolicy::Never {
        let reason = ending.reason.clone().or_else(|| Some("PodFailed".to_owned()));
        return Verdict { phase: JobPhase::Failed, reason, message: Some(how) };
    }
    let limit = spec.pod.restart.backoff_limit;
    let message = Some(format!("{failures} failures, backoffLimit is {limit}; the last: {how}"));
    Verdict { phase: JobPhase::Failed, reason: Some("BackoffLimitExceeded".to_owned()), message }
}

impl Controller {
    /// A run is over, and the agent starts the next one by itself.
    pub(super) fn pod_retrying(&mut self, now: Now, id: &PodId, outcome: &Outcome) {
        let Some(job) = self.cluster.jobs.get_mut(&id.uid) else { return };
        let current = job.file.generation;
        // Its node was on its own, and nobody could take the pod elsewhere.
        let evicted = matches!(outcome.cause, Cause::Eviction | Cause::Fault);
        if job.change(id.index, |pod| {
            pod.restarts += u32::from(!evicted);
            pod.generation == current
        }) != Some(true)
        {
            return;
        }
        let Some(assignment) = job.assignment_mut(id.index) else { return };
        assignment.phase = PodPhase::Starting;
        let ending = ending(assignment, outcome);
        assignment.last = Some(Box::new(ending.clone()));
        if evicted {
            job.run.evictions += 1;
            self.counters.evictions += 1;
            self.dirty.runs.insert(id.uid.clone());
        }
        if outcome.cause == Cause::Failure {
            job.run.failures += 1;
            self.counters.failures += 1;
            self.dirty.runs.insert(id.uid.clone());
            if job.run.verdict.is_none() && job.run.failures > job.file.spec.pod.restart.backoff_limit {
                job.run.verdict = Some(failed(&job.file.spec, id.index, &ending, job.run.failures));
            }
        }
        self.dirty.pods.insert(id.clone());
        self.dirty.status.insert(id.uid.clone());
        self.reconcile(now, &id.uid);
    }
}

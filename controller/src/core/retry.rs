//! What failures lead to: a verdict on the job, or a wait before the next start. Pure rules.

use berth_protocol::ids::{Digest, PodId};
use berth_protocol::job::{JobSpec, RestartPolicy};
use berth_protocol::message::user::JobPhase;
use berth_protocol::units::Millis;

use super::cluster::{Ending, Verdict};

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

/// Exponential from `retry.min` to `retry.max`, less up to a quarter so that pods that failed together do not come back
/// together; the same for the same pod and count.
pub(super) fn backoff(id: &PodId, spec: &JobSpec, failures: u32) -> Millis {
    let restart = spec.pod.restart;
    let doubled = restart.retry_min.0.saturating_mul(1 << failures.saturating_sub(1).min(32));
    let most = doubled.min(restart.retry_max.0);
    let hash = Digest::of(format!("{id} {failures}").as_bytes()).hex();
    let fraction = u64::from_str_radix(&hash[..4], 16).unwrap_or(0);
    Millis(most - most / 4 * fraction / 0xffff)
}

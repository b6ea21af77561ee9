//! The verdict on a job that too many failures bring. Pure.

use berth_protocol::job::{JobSpec, RestartPolicy};
use berth_protocol::message::user::JobPhase;

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

//! Whether a run is followed by another, and after what pause.

use berth_protocol::ids::Digest;
use berth_protocol::job::{PodTemplate, Restart, RestartPolicy};
use berth_protocol::pod::{Cause, Goal, Outcome};
use berth_protocol::units::Millis;

use super::ledger::{PodEntry, PodKey};

/// `base_ms` doubled that many times, at most `max_ms`.
pub(super) fn doubled(base_ms: u64, times: u32, max_ms: u64) -> Millis {
    Millis(base_ms.saturating_mul(1 << times.min(32)).min(max_ms))
}

/// The pause before the run after `failures` failures in a row: doubling from `retry_min` to `retry_max`, less up
/// to a tenth that the pod's name decides, so that a crowd does not come back at once.
pub(super) fn backoff(restart: &Restart, key: &PodKey, failures: u32) -> Millis {
    let whole = doubled(restart.retry_min.0, failures.saturating_sub(1), restart.retry_max.0);
    let digest = Digest::of(format!("{key}/{failures}").as_bytes()).hex();
    let share = u64::from_str_radix(&digest[..4], 16).unwrap_or(0);
    whole.saturating_sub(Millis(whole.0 / 10 * share / 0xffff))
}

/// What follows the end of a run.
pub(super) enum Next {
    Retry(Millis),
    End,
}

pub(super) fn after_run(template: &PodTemplate, key: &PodKey, entry: &PodEntry, outcome: &Outcome) -> Next {
    let restart = &template.restart;
    if entry.desired.goal != Goal::Run {
        return Next::End;
    }
    match (outcome.cause, restart.policy) {
        (Cause::Eviction | Cause::Fault, _)
        | (_, RestartPolicy::Never)
        | (Cause::Success, RestartPolicy::OnFailure) => Next::End,
        (Cause::Success, RestartPolicy::Always) => Next::Retry(backoff(restart, key, 1)),
        (Cause::Failure, RestartPolicy::OnFailure | RestartPolicy::Always) => {
            let failures = entry.failures + 1;
            let all = entry.desired.failures + u64::from(failures);
            if all > u64::from(restart.backoff_limit) {
                Next::End
            } else {
                Next::Retry(backoff(restart, key, failures))
            }
        }
    }
}

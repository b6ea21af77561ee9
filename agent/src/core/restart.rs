//! Whether a run is followed by another, and after what pause.

use berth_protocol::job::{PodTemplate, RestartPolicy};
use berth_protocol::pod::{Cause, Goal, Outcome, RESTORE_FAILED};
use berth_protocol::rule::{Rule, kept};
use berth_protocol::units::Millis;

use super::ledger::{Begin, PodEntry, PodKey};

/// `base_ms` doubled that many times, at most `max_ms`.
pub(super) fn doubled(base_ms: u64, times: u32, max_ms: u64) -> Millis {
    Millis(base_ms.saturating_mul(1 << times.min(32)).min(max_ms))
}

/// What follows the end of a run.
pub(super) enum Next {
    Retry(Millis),
    /// What evicts a pod that is on its own does not end it: there is nobody to take it elsewhere.
    GoOn(Millis, Begin),
    End,
}

/// `alone`: it may go on here whatever has ended it.
pub(super) fn after_run(
    template: &PodTemplate,
    key: &PodKey,
    entry: &PodEntry,
    outcome: &Outcome,
    alone: bool,
) -> Next {
    let restart = &template.restart;
    if entry.desired.goal != Goal::Run {
        return Next::End;
    }
    match (outcome.cause, restart.policy) {
        (Cause::Eviction | Cause::Fault, _) if alone => {
            let not_restored = outcome.reason.as_deref() == Some(RESTORE_FAILED);
            let begin = match entry.begin {
                // There is no other to go on from but the controller's to name.
                Begin::AsOrdered if not_restored => return Next::End,
                Begin::Kept if not_restored => Begin::AsOrdered,
                _ => Begin::Kept,
            };
            let pause = match entry.evictions {
                0 => Millis::ZERO,
                before => restart.backoff(key, before),
            };
            Next::GoOn(pause, begin)
        }
        (Cause::Eviction | Cause::Fault, _)
        | (_, RestartPolicy::Never)
        | (Cause::Success, RestartPolicy::OnFailure) => Next::End,
        (Cause::Success, RestartPolicy::Always) => Next::Retry(restart.backoff(key, 1)),
        (Cause::Failure, RestartPolicy::OnFailure | RestartPolicy::Always) => {
            let failures = entry.failures + 1;
            let before = if kept(Rule::FailuresAddUp) { entry.desired.failures } else { 0 };
            let all = before + u64::from(failures);
            if all > u64::from(restart.backoff_limit) {
                Next::End
            } else {
                Next::Retry(restart.backoff(key, failures))
            }
        }
    }
}

//! What `run` and `wait` end with: the contract's table of exit codes. Pure.

use berth_protocol::message::user::{JobPhase, JobStatus, PodStatus};
use berth_protocol::pod::PodPhase;

/// Bad usage, a bad job file.
pub const USAGE: u8 = 2;
/// `--timeout` ran out, or the job's own deadline.
pub const TIMEOUT: u8 = 124;
/// berth itself failed, as `docker run` has it.
pub const BERTH: u8 = 125;
/// Cancelled: what a shell says of a program that Ctrl-C ended.
pub const CANCELLED: u8 = 130;
/// Whoever read our output has gone: what a shell says of SIGPIPE.
pub const BROKEN_PIPE: u8 = 141;

/// The job's `reason` where its `activeDeadlineSeconds` ended it.
const DEADLINE_REASON: &str = "DeadlineExceeded";

/// The code for a job in this state; `None` while it goes on. `pods` are all that the job has.
pub fn of_job(status: &JobStatus, pods: &[PodStatus]) -> Option<u8> {
    match status.phase {
        JobPhase::Pending | JobPhase::Running | JobPhase::Suspended => None,
        JobPhase::Succeeded => Some(0),
        JobPhase::Cancelled => Some(CANCELLED),
        JobPhase::Rejected => Some(BERTH),
        JobPhase::Failed if status.reason.as_deref() == Some(DEADLINE_REASON) => Some(TIMEOUT),
        JobPhase::Failed => Some(first_failure(pods).unwrap_or(BERTH)),
    }
}

/// The code of the pod that failed first; `None` where nothing ever ran, which is berth's failure.
fn first_failure(pods: &[PodStatus]) -> Option<u8> {
    pods.iter()
        .filter(|pod| pod.phase == PodPhase::Failed)
        // A pod without a time never ran; one that did says more.
        .min_by_key(|pod| (pod.finished_at.is_none(), pod.finished_at, pod.pod.clone()))
        .and_then(|pod| pod.exit_code)
        .filter(|code| *code != 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn status(phase: &str, reason: Option<&str>, pods: &[(&str, Option<u8>, Option<u64>)]) -> JobStatus {
        let pods: Vec<_> = pods
            .iter()
            .enumerate()
            .map(|(index, (phase, code, finished))| {
                let mut pod = json!({"pod": format!("j-{index}"), "epoch": 1, "phase": phase, "restarts": 0});
                if let Some(code) = code {
                    pod["exitCode"] = json!(code);
                }
                if let Some(second) = finished {
                    pod["finishedAt"] = json!(format!("2026-01-01T00:00:{second:02}.000Z"));
                }
                pod
            })
            .collect();
        let mut status = json!({"namespace": "default", "job": "j", "generation": 1, "phase": phase, "pods": pods,
            "failures": 0, "evictions": 0, "migrations": 0, "submittedAt": "2026-01-01T00:00:00.000Z"});
        if let Some(reason) = reason {
            status["reason"] = json!(reason);
        }
        serde_json::from_value(status).unwrap()
    }

    #[test]
    fn the_table() {
        let ok = ("Succeeded", Some(0), Some(1));
        for (want, phase, reason, pods) in [
            (None, "Pending", None, vec![]),
            (None, "Running", None, vec![("Running", None, None)]),
            (None, "Suspended", None, vec![]),
            (Some(0), "Succeeded", None, vec![ok]),
            (Some(3), "Failed", None, vec![("Failed", Some(3), Some(1))]),
            (Some(137), "Failed", Some("OOMKilled"), vec![("Failed", Some(137), Some(1))]),
            (Some(7), "Failed", None, vec![ok, ("Failed", Some(9), Some(5)), ("Failed", Some(7), Some(4))]),
            (Some(9), "Failed", None, vec![("Failed", None, None), ("Failed", Some(9), Some(5))]),
            (Some(125), "Failed", Some("ImageNotFound"), vec![("Failed", None, Some(1))]),
            (Some(125), "Failed", None, vec![]),
            (Some(124), "Failed", Some("DeadlineExceeded"), vec![("Failed", Some(143), Some(1))]),
            (Some(130), "Cancelled", None, vec![("Failed", Some(143), Some(1))]),
            (Some(125), "Rejected", Some("InvalidJob"), vec![]),
        ] {
            let status = status(phase, reason, &pods);
            assert_eq!(of_job(&status, &status.pods), want, "{phase} {reason:?} {pods:?}");
        }
    }
}

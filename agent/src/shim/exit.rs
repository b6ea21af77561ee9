//! How a run's end is told: the outcome from what happened, and its file. Pure but for the writing.

use std::io;
use std::path::Path;

use berth_protocol::ids::{ContainerName, Run};
use berth_protocol::pod::{Cause, Outcome};
use berth_protocol::units::Timestamp;

use super::error::ShimError;
use super::lease::EndedBy;
use super::sys;
use crate::task::{ContainerExit, Exit, file};

/// What is known when nothing of the run is alive any more.
pub struct Facts<'a> {
    pub run: Run,
    pub started_at: Option<Timestamp>,
    pub finished_at: Timestamp,
    pub log_records: u64,
    /// In the order in which they ended.
    pub exits: &'a [(ContainerName, super::container::Exit)],
    pub ended_by: Option<EndedBy>,
    pub error: Option<&'a ShimError>,
}

pub fn exit(facts: &Facts) -> Exit {
    let containers = facts
        .exits
        .iter()
        .map(|(name, exit)| ContainerExit {
            name: name.clone(),
            code: exit.code,
            oom_killed: exit.oom_killed,
        })
        .collect();
    let failed = facts.exits.iter().find(|(_, exit)| exit.code != 0);
    let decisive = failed.or(facts.exits.last());
    let mut outcome = Outcome {
        exit_code: decisive.map(|(_, exit)| exit.code),
        cause: if decisive.is_some() && failed.is_none() { Cause::Success } else { Cause::Failure },
        reason: None,
        message: None,
        started_at: facts.started_at,
        finished_at: facts.finished_at,
        log_records: facts.log_records,
    };
    let mut say = |cause, reason: &str, message: String| {
        outcome.cause = cause;
        outcome.reason = Some(reason.to_owned());
        outcome.message = Some(message);
    };
    match (facts.error, facts.ended_by, failed) {
        (Some(error), ..) => {
            say(error.cause(), error.reason(), error.message());
            outcome.exit_code = error.exit_code();
        }
        (None, Some(EndedBy::Order), _) => {
            say(Cause::Eviction, "Stopped", "berth was told to stop the pod".to_owned());
        }
        (None, Some(EndedBy::Lease), _) => {
            let message = "no grant came from the controller in time, and onDisconnect says not to run on";
            say(Cause::Eviction, "LeaseExpired", message.to_owned());
        }
        (None, _, Some((name, exit))) if exit.oom_killed => {
            let message = format!("container {name} used more memory than its limit; raise limits.memory");
            say(Cause::Failure, "OOMKilled", message);
        }
        (None, _, Some((name, exit))) if exit.code > 128 => {
            say(
                Cause::Failure,
                "Signaled",
                format!("container {name} was ended by signal {}", exit.code - 128),
            );
        }
        (None, _, Some((name, exit))) => {
            say(Cause::Failure, "Error", format!("container {name} ended with code {}", exit.code));
        }
        (None, _, None) => {}
    }
    Exit { run: facts.run, outcome, containers }
}

/// Once this returns, the end is on disk.
pub fn write(dir: &Path, exit: &Exit) -> io::Result<()> {
    sys::write_durably(dir, &file::exit(exit.run), &serde_json::to_vec(exit)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outcome(exits: &[(&str, u8, bool)], ended_by: Option<EndedBy>) -> Outcome {
        let exits: Vec<_> = exits
            .iter()
            .map(|(name, code, oom_killed)| {
                let exit = super::super::container::Exit { code: *code, oom_killed: *oom_killed };
                (ContainerName::parse(name).unwrap(), exit)
            })
            .collect();
        let facts = Facts {
            run: Run(1),
            started_at: Some(Timestamp(1)),
            finished_at: Timestamp(2),
            log_records: 0,
            exits: &exits,
            ended_by,
            error: None,
        };
        exit(&facts).outcome
    }

    #[test]
    fn the_first_failure_decides_and_berths_own_doing_is_an_eviction() {
        let all_well = outcome(&[("a", 0, false), ("b", 0, false)], None);
        assert_eq!((all_well.exit_code, all_well.cause, all_well.reason), (Some(0), Cause::Success, None));
        let failed =
            outcome(&[("a", 0, false), ("b", 3, false), ("c", 143, false)], Some(EndedBy::Container));
        assert_eq!((failed.exit_code, failed.cause), (Some(3), Cause::Failure));
        let oom = outcome(&[("a", 137, true)], None);
        assert_eq!((oom.cause, oom.reason.as_deref()), (Cause::Failure, Some("OOMKilled")));
        let stopped = outcome(&[("a", 0, false)], Some(EndedBy::Order));
        assert_eq!((stopped.exit_code, stopped.cause), (Some(0), Cause::Eviction));
        let never = outcome(&[], Some(EndedBy::Order));
        assert_eq!((never.exit_code, never.cause), (None, Cause::Eviction));
    }
}

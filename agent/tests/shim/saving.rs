//! Saving pods and bringing them back, as an agent would order it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use berth_agent::task::{Order, Report, Saved, Task, file};
use berth_protocol::pod::Cause;
use berth_protocol::units::Millis;

use super::world::*;

/// Beside the program, where the agent looks as well. Where none works the test is counted as one that could not run.
pub fn criu() -> Option<PathBuf> {
    let criu = Path::new(env!("CARGO_BIN_EXE_berth-agent")).parent().unwrap().join("criu/criu");
    let works = Command::new(&criu).arg("check").output().is_ok_and(|output| output.status.success());
    if !works {
        let line = format!("checkpoints: {} does not work here: run tests/criu\n", criu.display());
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/skipped");
        let mut counted = fs::File::options().create(true).append(true).open(path).unwrap();
        std::io::Write::write_all(&mut counted, line.as_bytes()).unwrap();
    }
    works.then_some(criu)
}

pub fn saved(agent: &mut Agent, level: u64, hold: bool) -> Result<Saved, String> {
    agent.order(&Order::Save { level, hold });
    saving_ended(agent)
}

/// What comes of a saving that was ordered.
pub fn saving_ended(agent: &mut Agent) -> Result<Saved, String> {
    agent.until(|report| match report {
        Report::Saved { saved, .. } => Some(Ok(saved)),
        Report::SaveFailed { why, .. } => Some(Err(why)),
        _ => None,
    })
}

/// Saves the pod, ends it, and starts its next epoch from what was saved, as a move does.
pub fn moved(from: &mut Pod, agent: &mut Agent) -> (Pod, Agent) {
    moved_to(from, agent, |_| {})
}

/// Saves the pod and ends it; its next epoch, which is to begin from that.
pub fn departed(from: &mut Pod, agent: &mut Agent) -> Pod {
    let level = from.task.epoch.0;
    let saved = saved(agent, level, true).unwrap();
    assert_eq!(saved.log_records, log_records(from), "the log goes on behind the cut");
    agent.order(&Order::Stop { grace: Millis::ZERO });
    assert_eq!(agent.exited().outcome.cause, Cause::Eviction);
    from.wait();
    let mut next = from.next_epoch();
    let whole = from.dir.join(file::CHECKPOINTS_DIR).join(level.to_string());
    fs::rename(whole, next.dir.join(file::RESTORE_DIR)).unwrap();
    fs::remove_dir(from.dir.join(file::CHECKPOINTS_DIR)).unwrap();
    from.assert_clean();
    next.task.restore = true;
    next
}

/// As `moved`, to where what `there` changes of its task is otherwise.
pub fn moved_to(from: &mut Pod, agent: &mut Agent, there: impl FnOnce(&mut Task)) -> (Pod, Agent) {
    let mut next = departed(from, agent);
    there(&mut next.task);
    let mut agent = next.start();
    let restoring = agent.until(|report| match report {
        Report::Restoring { .. } => Some(Ok(())),
        Report::Exited { exit } => Some(Err(exit)),
        _ => None,
    });
    restoring.unwrap();
    let came_back = agent.until(|report| match report {
        Report::Running { .. } => Some(Ok(())),
        Report::Exited { exit } => Some(Err(exit)),
        _ => None,
    });
    came_back.unwrap();
    (next, agent)
}

pub fn log_records(pod: &Pod) -> u64 {
    berth_agent::shim::log::read_from(&pod.dir.join(file::LOG_DIR), 1).count() as u64
}

pub fn ended(mut pod: Pod, mut agent: Agent) {
    agent.order(&Order::Stop { grace: Millis::ZERO });
    agent.exited();
    pod.wait();
    pod.assert_clean();
}

/// Numbers from 1, none left out and none twice.
pub fn assert_counts(lines: &str) {
    let numbers: Vec<u64> =
        lines.lines().map(|line| line.parse().unwrap_or_else(|_| panic!("{line}"))).collect();
    assert_eq!(numbers, (1..=numbers.len() as u64).collect::<Vec<_>>());
    assert!(!numbers.is_empty());
}

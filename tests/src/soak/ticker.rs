//! The program of the jobs: inside its container it writes down when it runs, and nothing else.

use std::fs::File;
use std::io::Write as _;
use std::path::Path;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result};
use serde_json::Value;

use super::history::{Kind, Line};

const PACE: Duration = Duration::from_millis(50);
/// Written by berth, anew wherever the pod goes on.
const FACTS: &str = "/run/berth/pod.json";

/// Ticks `count` times; false where this is one of the first `failures` tries, which are to fail.
pub fn tick(dir: &Path, count: u64, failures: u64) -> Result<bool> {
    write(dir, Kind::Start, 0)?;
    for n in 1..=count {
        std::thread::sleep(PACE);
        write(dir, Kind::Tick, n)?;
    }
    let restarts = write(dir, Kind::Stop, count)?;
    Ok(restarts >= failures)
}

/// Returns how often the pod has failed before.
fn write(dir: &Path, kind: Kind, n: u64) -> Result<u64> {
    let facts: Value = serde_json::from_slice(&std::fs::read(FACTS).with_context(|| format!("no {FACTS}"))?)?;
    let pod = facts["pod"].as_str().context("a pod has a name")?.to_owned();
    // Not kept open: a checkpoint of an open file wants it unchanged, and it goes on growing.
    let mut file = File::options().create(true).append(true).open(dir.join(&pod))?;
    // Read again: the pod may have been moved since, and what is written must be what holds at that moment.
    let facts: Value = serde_json::from_slice(&std::fs::read(FACTS)?)?;
    let number = |name: &str| facts[name].as_u64().with_context(|| format!("{FACTS} has no {name}"));
    let (epoch, run, restarts) = (number("epoch")?, number("run")?, number("restarts")?);
    let at_ns = u64::try_from(SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?.as_nanos())?;
    let line = Line { at_ns, pod, epoch, run, kind, n };
    file.write_all(format!("{line}\n").as_bytes())?;
    Ok(restarts)
}

//! Many pods: all at once, and one after the other.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::json;

use super::figures::{Figure, median};
use super::user::Status;
use super::world::{World, host_job};

const CROWD: usize = 200;
const ARRAY: usize = 500;
const REPEATS: usize = 3;
const LIMIT: Duration = Duration::from_secs(120);

/// 200 pods that stay, on one agent, until the status says that all of them run; it comes at most 0.2 s late.
pub fn crowd() -> Result<Vec<Figure>> {
    let took = repeated(|| {
        let world = World::with_agent("cpu=64,memory=64Gi")?;
        let mut user = world.user()?;
        let mut file = host_job(&["/bin/sleep", "600"], "none");
        // A machine of two cores has room for them.
        file["resources"] = json!({"cpu": "10m", "memory": "16Mi"});
        file["limits"] = json!({"cpu": "1"});
        file["parallelism"] = CROWD.into();
        file["completions"] = CROWD.into();
        let (begun, _) = user.submit("crowd", &file)?;
        let all = |status: &Status| status.body["podCounts"]["Running"] == CROWD;
        let job = user.wait("crowd", LIMIT, all).with_context(|| world.said())?;
        ensure!(job.body["evictions"] == 0 && job.body["failures"] == 0, "pods were lost: {}", job.body);
        Ok(job.at.duration_since(begun).as_secs_f64())
    })?;
    Ok(vec![Figure::asked("200 containers at once, until all have started", took, "s", 10.0)])
}

/// A job of 500 short pods through room for two at a time.
pub fn array() -> Result<Vec<Figure>> {
    let took = repeated(|| {
        // As much room as two of the pods need.
        let world = World::with_agent("cpu=200m,memory=64Mi")?;
        let mut user = world.user()?;
        let mut file = host_job(&["/bin/true"], "host");
        file["parallelism"] = 2.into();
        file["completions"] = ARRAY.into();
        let (begun, _) = user.submit("array", &file)?;
        let job = user.wait_success("array", LIMIT).with_context(|| world.said())?;
        ensure!(job.body["podCounts"]["Succeeded"] == ARRAY, "pods were lost: {}", job.body["podCounts"]);
        Ok(job.at.duration_since(begun).as_secs_f64())
    })?;
    Ok(vec![Figure::asked("a job of 500 short pods, two at a time", took, "s", 8.0)])
}

fn repeated(mut once: impl FnMut() -> Result<f64>) -> Result<f64> {
    let values: Vec<f64> = (0..REPEATS).map(|_| once()).collect::<Result<_>>()?;
    median(&values).context("nothing was measured")
}

/// Jobs of one pod each, at most two unfinished; returns how long all took.
pub fn many_jobs(world: &World, count: usize) -> Result<Duration> {
    let mut user = world.user()?;
    let file = host_job(&["/bin/true"], "host");
    let begun = Instant::now();
    let (mut submitted, mut ended) = (0, 0);
    while ended < count {
        while submitted < count && submitted - ended < 2 {
            user.submit(&format!("one-{submitted}"), &file)?;
            submitted += 1;
        }
        let status = user.next(LIMIT)?;
        match status.phase() {
            "Succeeded" => ended += 1,
            _ if status.is_final() => bail!("job {} is {}", status.job, status.body),
            _ => {}
        }
    }
    Ok(begun.elapsed())
}

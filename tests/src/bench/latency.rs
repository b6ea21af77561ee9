//! How soon a job speaks, and how long `berth run` takes as a whole process.

use std::time::{Duration, UNIX_EPOCH};

use anyhow::{Context, Result};

use super::figures::{Figure, median, percentile};
use super::process::timed;
use super::world::{World, host_job};

const JOBS: usize = 100;
const RUNS: usize = 50;
const LIMIT: Duration = Duration::from_secs(30);

/// From the publish of a job file to the container's first output: the moment that the program itself prints, so
/// that neither the log's way back nor its reader is in it.
pub fn submit_to_output(network: &str) -> Result<Vec<Figure>> {
    let world = World::with_agent("cpu=4,memory=2Gi")?;
    let mut user = world.user()?;
    let mut took = Vec::new();
    // The first ones warm caches.
    for number in 0..JOBS + 3 {
        let job = format!("speak-{number}");
        let (_, published) = user.submit(&job, &host_job(&["/bin/date", "+%s%N"], network))?;
        user.wait_success(&job, LIMIT).with_context(|| world.said())?;
        let printed: u64 = world.logs(&job)?.trim().parse().context("the job printed no time")?;
        let printed = UNIX_EPOCH + Duration::from_nanos(printed);
        took.push(printed.duration_since(published).context("the clock was set back")?.as_secs_f64() * 1e3);
    }
    let took = &took[3..];
    let of = |percent| percentile(took, percent).context("nothing was measured");
    Ok(vec![
        Figure::asked(&format!("submit to first output, {network} network, p50"), of(50.0)?, "ms", 30.0),
        Figure::asked(&format!("submit to first output, {network} network, p99"), of(99.0)?, "ms", 80.0),
    ])
}

pub fn run_command() -> Result<Vec<Figure>> {
    let world = World::with_agent("cpu=4,memory=2Gi")?;
    let mut took = Vec::new();
    for _ in 0..RUNS + 3 {
        let mut command = world.berth()?;
        command.args(["run", "--", "/bin/echo", "x"]).current_dir(world.dir());
        took.push(timed(&mut command).with_context(|| world.said())?.as_secs_f64() * 1e3);
    }
    let value = median(&took[3..]).context("nothing was measured")?;
    Ok(vec![Figure::asked("berth run -- /bin/echo x, whole process, p50", value, "ms", 45.0)])
}

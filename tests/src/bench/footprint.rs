//! What the programs weigh: memory (PSS), processor time while idle, bytes on disk.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use super::figures::Figure;
use super::process::{MIB, cpu_time, pss, shims, until};
use super::throughput::many_jobs;
use super::world::{Broker, World, host_job, program};

/// After a start, and after work: until heartbeats are calm and files are gone.
const SETTLE: Duration = Duration::from_secs(10);
const IDLE: Duration = Duration::from_secs(60);
const JOBS: usize = 1000;
const SLEEPERS: usize = 20;

/// One world for all: agent and controller fresh, idle, and after 1,000 jobs.
pub fn daemons() -> Result<Vec<Figure>> {
    let world = World::with_agent("cpu=4,memory=2Gi")?;
    let (agent, controller) = (world.agent_pid()?, world.controller.pid());
    std::thread::sleep(SETTLE);
    let mut figures = vec![
        Figure::asked("agent PSS, fresh", pss(agent)? / MIB, "MiB", 4.0),
        Figure::asked("controller PSS, embedded broker", pss(controller)? / MIB, "MiB", 14.0),
    ];
    let percent = |pid: u32, before: Duration, begun: Instant| -> Result<f64> {
        Ok((cpu_time(pid)? - before).as_secs_f64() / begun.elapsed().as_secs_f64() * 100.0)
    };
    let (begun, before) = (Instant::now(), (cpu_time(agent)?, cpu_time(controller)?));
    std::thread::sleep(IDLE);
    figures.push(Figure::asked("agent CPU, idle", percent(agent, before.0, begun)?, "%", 0.1));
    figures.push(Figure::peer("controller CPU, idle", percent(controller, before.1, begun)?, "%"));
    let took = many_jobs(&world, JOBS).with_context(|| world.said())?;
    std::thread::sleep(SETTLE);
    figures.push(Figure::asked("agent PSS, after 1,000 jobs", pss(agent)? / MIB, "MiB", 6.0));
    figures.push(Figure::peer("controller PSS, after 1,000 jobs", pss(controller)? / MIB, "MiB"));
    figures.push(Figure::peer("1,000 jobs of one pod, two at a time", took.as_secs_f64(), "s"));
    Ok(figures)
}

/// The controller when another program is the broker.
pub fn controller_alone() -> Result<Vec<Figure>> {
    let mut world = World::new(Broker::Mosquitto)?;
    world.start_agent("cpu=4,memory=2Gi")?;
    std::thread::sleep(SETTLE);
    let value = pss(world.controller.pid())? / MIB;
    Ok(vec![Figure::asked("controller PSS, with mosquitto", value, "MiB", 8.0)])
}

pub fn shim() -> Result<Vec<Figure>> {
    let world = World::with_agent("cpu=4,memory=2Gi")?;
    let mut user = world.user()?;
    let mut file = host_job(&["/bin/sleep", "600"], "host");
    file["parallelism"] = SLEEPERS.into();
    file["completions"] = SLEEPERS.into();
    user.submit("sleepers", &file)?;
    let all = |status: &super::user::Status| status.body["podCounts"]["Running"] == SLEEPERS;
    user.wait("sleepers", Duration::from_secs(60), all).with_context(|| world.said())?;
    std::thread::sleep(SETTLE);
    let pids = shims(world.dir());
    ensure!(pids.len() == SLEEPERS, "{} shims for {SLEEPERS} pods", pids.len());
    let sizes: Vec<f64> = pids.iter().map(|pid| pss(*pid)).collect::<Result<_>>()?;
    let mean = sizes.iter().sum::<f64>() / sizes.len() as f64;
    user.cancel("sleepers")?;
    until("the sleepers end", Duration::from_secs(60), || shims(world.dir()).is_empty().then_some(()))?;
    Ok(vec![Figure::asked("shim PSS, mean of 20", mean / MIB, "MiB", 1.5)])
}

pub fn binary() -> Result<Vec<Figure>> {
    let bytes = std::fs::metadata(program("berth-agent")?)?.len();
    Ok(vec![Figure::asked("agent binary, stripped", bytes as f64 / MIB, "MiB", 10.0)])
}

//! Checkpoints as a user sees them: a pod that is moved between two agents, what the second checkpoint of a training
//! costs, and what an agent needs meanwhile.

use std::fs;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::checkpoint::gigabyte_job;
use super::figures::{Figure, median};
use super::process::{MIB, pss, until};
use super::user::{Status, User};
use super::world::World;

const MOVES: usize = 3;
const LIMIT: Duration = Duration::from_secs(120);
const ROOM: &str = "cpu=4,memory=4Gi";

/// Half a GiB of samples that stay, and 125 MiB that every step writes anew, a fifth of it all: weights, their momentum
/// and gradient, what is between the layers. All of it in place, so that no more than that is ever written.
const TRAINING: &str = "import numpy as np, time\n\
    rng = np.random.default_rng(1)\n\
    x = rng.standard_normal((128000, 1000), dtype=np.float32)\n\
    y = rng.standard_normal((128000, 1), dtype=np.float32)\n\
    w1, m1 = rng.standard_normal((1000, 8192), dtype=np.float32) * 0.03, np.zeros((1000, 8192), np.float32)\n\
    w2 = rng.standard_normal((8192, 1), dtype=np.float32) * 0.01\n\
    g1, hidden, back = np.zeros_like(w1), np.zeros((512, 8192), np.float32), np.zeros((512, 8192), np.float32)\n\
    for step in range(1_000_000):\n\
    \x20   rows = slice(step % 250 * 512, step % 250 * 512 + 512)\n\
    \x20   np.maximum(np.matmul(x[rows], w1, out=hidden), 0, out=hidden)\n\
    \x20   slope = hidden @ w2 - y[rows]\n\
    \x20   np.multiply(np.matmul(slope, w2.T, out=back), hidden, out=back, where=hidden <= 0)\n\
    \x20   np.matmul(x[rows].T, back, out=g1)\n\
    \x20   m1 *= 0.9\n\
    \x20   m1 += g1\n\
    \x20   np.multiply(m1, 0.001 / 512, out=g1)\n\
    \x20   w1 -= g1\n\
    \x20   w2 -= 0.001 * (hidden.T @ slope) / 512\n\
    \x20   print(step, float((slope ** 2).mean()), flush=True)\n\
    \x20   time.sleep(0.2)";

/// What an agent and the processes that carry its checkpoints weigh, from a calm moment on.
struct Weight {
    idle: f64,
    most: Arc<AtomicU64>,
    over: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

/// The agent and what it has started, but shims: those outlive it.
fn weigh(agent: u32) -> f64 {
    let tasks = fs::read_dir(format!("/proc/{agent}/task")).into_iter().flatten().flatten();
    let children = tasks.filter_map(|task| fs::read_to_string(task.path().join("children")).ok());
    let children: Vec<u32> = children
        .flat_map(|text| text.split(' ').filter_map(|pid| pid.parse().ok()).collect::<Vec<_>>())
        .collect();
    let carries = |pid: &&u32| {
        fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|line| !line.starts_with(b"berth-agent\0shim\0"))
    };
    std::iter::once(&agent).chain(children.iter().filter(carries)).filter_map(|pid| pss(*pid).ok()).sum()
}

impl Weight {
    fn watch(agent: u32) -> Self {
        let (most, over) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
        let (found, end) = (most.clone(), over.clone());
        let idle = weigh(agent);
        let look = move || {
            while !end.load(Ordering::Relaxed) {
                found.fetch_max(weigh(agent) as u64, Ordering::Relaxed);
                std::thread::sleep(Duration::from_millis(5));
            }
        };
        Self { idle, most, over, thread: Some(std::thread::spawn(look)) }
    }

    /// MiB beyond the calm moment, at most.
    fn most(mut self) -> f64 {
        self.over.store(true, Ordering::Relaxed);
        drop(self.thread.take().map(JoinHandle::join));
        (self.most.load(Ordering::Relaxed) as f64 - self.idle).max(0.0) / MIB
    }
}

pub fn runs_on(status: &Status, node: &str) -> bool {
    let pod = &status.body["pods"][0];
    pod["phase"] == "Running" && pod["node"] == node
}

fn lines(world: &World, job: &str) -> usize {
    world.logs(job).map_or(0, |log| log.lines().count())
}

/// The longest times between lines, each of which begins with one in nanoseconds; in milliseconds.
fn gaps(log: &str, count: usize) -> Result<Vec<f64>> {
    let at: Vec<i64> =
        log.lines().map(|line| line.parse()).collect::<Result<_, _>>().context("a line is no time")?;
    let mut gaps: Vec<f64> = at.windows(2).map(|pair| (pair[1] - pair[0]) as f64 / 1e6).collect();
    gaps.sort_by(f64::total_cmp);
    Ok(gaps.split_off(gaps.len().saturating_sub(count)))
}

/// 1 GiB of dirty memory from one agent to another and back, by the times that the program itself prints.
pub fn moved() -> Result<Vec<Figure>> {
    let mut world = World::with_agent(ROOM)?;
    let nodes = [world.node(), world.start_another(ROOM)?];
    let mut user = world.user()?;
    let mut file = gigabyte_job();
    file["image"] = "host".into();
    user.submit("large", &file)?;
    let begun = user.wait("large", LIMIT, |status| nodes.iter().any(|node| runs_on(status, node)));
    let begun = begun.with_context(|| world.said())?;
    let mut here = usize::from(runs_on(&begun, &nodes[1]));
    until("it has filled its memory", LIMIT, || (lines(&world, "large") > 10).then_some(()))?;
    let (mut frozen, mut saving, mut fetching) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..MOVES {
        let there = 1 - here;
        let source = Weight::watch(world.agent_of(&nodes[here])?);
        let target = Weight::watch(world.agent_of(&nodes[there])?);
        world.done(&["migrate", "large", "--to", &nodes[there]])?;
        let arrived = user.wait("large", LIMIT, |status| runs_on(status, &nodes[there]));
        let arrived = arrived.with_context(|| world.said())?;
        saving.push(source.most());
        fetching.push(target.most());
        frozen.push(arrived.body["checkpoint"]["frozenMs"].as_f64().context("no checkpoint")?);
        let told = lines(&world, "large");
        until("it goes on", LIMIT, || (lines(&world, "large") > told + 10).then_some(()))?;
        here = there;
    }
    let stood = gaps(&world.logs("large")?, MOVES)?;
    user.cancel("large")?;
    user.wait("large", LIMIT, Status::is_final)?;
    let of = |values: &[f64]| median(values).context("nothing was measured");
    let most = |values: &[f64]| values.iter().copied().fold(0.0, f64::max);
    Ok(vec![
        Figure::asked("1 GiB dirty, moved: stop to running", of(&stood)? / 1e3, "s", 6.0),
        Figure::asked("1 GiB dirty, moved: frozen for the dump", of(&frozen)? / 1e3, "s", 4.0),
        Figure::asked("1 GiB saved: agent and helpers above idle, PSS", most(&saving), "MiB", 48.0),
        Figure::peer("1 GiB fetched: agent and helpers above idle, PSS", most(&fetching), "MiB"),
    ])
}

/// What the second checkpoint adds to the depot, five steps after the first.
pub fn second() -> Result<Vec<Figure>> {
    let demo = fs::canonicalize(concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/demo"))?;
    let demo = demo.to_str().context("a plain path")?.to_owned();
    let digits = json!({
        "image": "host", "command": ["/usr/bin/python3", format!("{demo}/train.py"), format!("{demo}/digits.csv.gz")],
        "env": {"EPOCHS": "10000", "PAUSE": "0.2", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        "resources": {"cpu": "1", "memory": "256Mi"}, "limits": {"cpu": "2"}, "checkpoint": {"mode": "criu"}
    });
    let large = json!({
        "image": "host", "command": ["/usr/bin/python3", "-c", TRAINING],
        "env": {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        "resources": {"cpu": "1", "memory": "1500Mi"}, "limits": {"cpu": "2"}, "checkpoint": {"mode": "criu"}
    });
    let mut figures = Vec::new();
    for (what, file) in [("digits", digits), ("640 MiB", large)] {
        let [first, second] = two_checkpoints(&file)?;
        let bytes = |status: &Value, name: &str| status[name].as_f64().context("a checkpoint has its size");
        let percent = bytes(&second, "newBytes")? / bytes(&first, "newBytes")? * 100.0;
        figures.extend([
            Figure::peer(&format!("training, {what}: a checkpoint"), bytes(&first, "bytes")? / MIB, "MiB"),
            Figure::peer(
                &format!("training, {what}: sent for the first"),
                bytes(&first, "newBytes")? / MIB,
                "MiB",
            ),
            Figure::asked(
                &format!("training, {what}: the second, 5 steps later, of the first"),
                percent,
                "%",
                22.0,
            ),
        ]);
    }
    Ok(figures)
}

fn two_checkpoints(file: &Value) -> Result<[Value; 2]> {
    let world = World::with_agent(ROOM)?;
    let mut user = world.user()?;
    user.submit("training", file)?;
    until("it learns", LIMIT, || (lines(&world, "training") > 5).then_some(()))
        .with_context(|| world.said())?;
    let first = checkpoint(&mut user, &world, "training")?;
    let told = lines(&world, "training");
    until("five steps", LIMIT, || (lines(&world, "training") >= told + 5).then_some(()))?;
    let second = checkpoint(&mut user, &world, "training")?;
    user.cancel("training")?;
    user.wait("training", LIMIT, Status::is_final)?;
    Ok([first, second])
}

/// Takes one; what the job's status says of it.
pub fn checkpoint(user: &mut User, world: &World, job: &str) -> Result<Value> {
    let before = user.last.get(job).map_or(Value::Null, |status| status.body["checkpoint"]["id"].clone());
    world.done(&["checkpoint", job, "--no-wait"])?;
    let another = |status: &Status| {
        let id = &status.body["checkpoint"]["id"];
        id.is_string() && *id != before
    };
    let status = user.wait(job, LIMIT, another).with_context(|| world.said())?;
    ensure!(status.body["evictions"] == 0, "it was evicted: {}", status.body);
    Ok(status.body["checkpoint"].clone())
}

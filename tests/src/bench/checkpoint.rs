//! How long a pod stands still while it is saved, and how soon it is back: beside criu by itself, in the same run.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use super::criu::{Plain, Traced, beside};
use super::figures::{Figure, median, percentile};
use super::pod::Pod;
use super::process::{MIB, until};
use super::world::temporary;

/// Saved, ended, brought back: so often.
const CYCLES: usize = 40;
const LARGE_CYCLES: usize = 5;
const LIMIT: Duration = Duration::from_secs(60);
/// Counts as fast as a shell can with a pause between.
const COUNTER: &str = "i=0; while :; do i=$((i+1)); echo $i; sleep 0.005; done";

/// A GiB that no compression makes smaller, dirty all of it; then the time, again and again.
pub const GIGABYTE: &str = "import os, time\n\
    all = memoryview(bytearray(1 << 30))\n\
    for at in range(0, 1 << 30, 1 << 24): all[at:at + (1 << 24)] = os.urandom(1 << 24)\n\
    while True: print(time.time_ns(), flush=True); time.sleep(0.005)";

pub fn gigabyte_job() -> Value {
    json!({
        "command": ["/usr/bin/python3", "-c", GIGABYTE], "network": "none", "checkpoint": {"mode": "criu"},
        "resources": {"cpu": "0.5", "memory": "1200Mi"}, "limits": {"cpu": "2", "memory": "2Gi"}
    })
}

/// A shell that counts.
pub fn small() -> Result<Vec<Figure>> {
    let dir = temporary()?;
    let traced = Traced::new(dir.path())?;
    let job = json!({
        "command": ["/bin/sh", "-c", COUNTER], "network": "none", "checkpoint": {"mode": "criu"},
        "resources": {"cpu": "0.1", "memory": "32Mi"}, "limits": {"cpu": "2"}
    });
    // What notes when criu is at work takes some time of its own.
    let plain = cycles(dir.path(), &beside()?, &job, || Ok(0.0))?;
    let noted = cycles(dir.path(), &traced.criu(), &job, || traced.last())?;
    let mut figures = Vec::new();
    for (what, asked, plain, noted) in
        [("dump", 200.0, &plain.dumps, &noted.dumps), ("restore", 250.0, &plain.restores, &noted.restores)]
    {
        let all: Vec<f64> = plain.iter().map(|(all, _)| *all).collect();
        let own: Vec<f64> = noted.iter().map(|(all, criu)| all - criu).collect();
        let criu: Vec<f64> = noted.iter().map(|(_, criu)| *criu).collect();
        let of = |values: &[f64], percent| percentile(values, percent).context("nothing was measured");
        figures.extend([
            Figure::peer(&format!("small container: {what}, p50"), of(&all, 50.0)?, "ms"),
            Figure::asked(&format!("small container: {what}, p95"), of(&all, 95.0)?, "ms", asked),
            Figure::peer(&format!("small container: {what}, criu at work, p50"), of(&criu, 50.0)?, "ms"),
            Figure::peer(&format!("small container: {what}, beyond criu, p50"), of(&own, 50.0)?, "ms"),
            Figure::asked(&format!("small container: {what}, beyond criu, p95"), of(&own, 95.0)?, "ms", 20.0),
        ]);
    }
    Ok(figures)
}

/// All in milliseconds: the whole, and for how long criu was at work.
#[derive(Default)]
struct Cycles {
    dumps: Vec<(f64, f64)>,
    restores: Vec<(f64, f64)>,
}

fn cycles(dir: &Path, criu: &Path, job: &Value, at_work: impl Fn() -> Result<f64>) -> Result<Cycles> {
    let mut pod = Pod::new(dir, criu, job)?;
    pod.start()?;
    let mut cycles = Cycles::default();
    // The first ones warm caches.
    for cycle in 0..CYCLES + 2 {
        let counted = pod.output()?.lines().count();
        until("the program counts", LIMIT, || {
            (pod.output().ok()?.lines().count() > counted + 3).then_some(())
        })?;
        let dump = (pod.save(1, true)?.ms, at_work()?);
        pod = pod.next(1)?;
        let restore = (pod.start()?, at_work()?);
        if cycle >= 2 {
            cycles.dumps.push(dump);
            cycles.restores.push(restore);
        }
    }
    Ok(cycles)
}

/// 1 GiB of dirty memory, in a container by berth and in a plain process by criu, in turn.
pub fn gigabyte() -> Result<Vec<Figure>> {
    let dir = temporary()?;
    let criu = beside()?;
    let ready = |output: &str| output.lines().count() > 1;
    let mut alone = Plain::start(&dir.path().join("alone"), &["/usr/bin/python3", "-c", GIGABYTE])?;
    let mut pod = Pod::new(dir.path(), &criu, &gigabyte_job())?;
    pod.start()?;
    until("both have filled their memory", LIMIT, || {
        (ready(&alone.output()) && ready(&pod.output().ok()?)).then_some(())
    })?;
    let (mut dumps, mut syncs, mut restores) = (Vec::new(), Vec::new(), Vec::new());
    let (mut own_dumps, mut own_restores) = (Vec::new(), Vec::new());
    for _ in 0..LARGE_CYCLES {
        settle();
        let (dump, sync) = alone.dump(&criu)?;
        settle();
        let own = pod.save(1, true)?.ms;
        settle();
        let restore = alone.restore(&criu)?;
        pod = pod.next(1)?;
        settle();
        let own_restore = pod.start()?;
        dumps.push(dump);
        syncs.push(sync);
        restores.push(restore);
        own_dumps.push(own);
        own_restores.push(own_restore);
    }
    let of = |values: &[f64]| median(values).context("nothing was measured");
    let (bare, restore) = (of(&dumps)? + of(&syncs)?, of(&restores)?);
    Ok(vec![
        Figure::peer("1 GiB dirty: criu alone, dump", of(&dumps)?, "ms"),
        Figure::peer("1 GiB dirty: fsync of its images", of(&syncs)?, "ms"),
        Figure::asked(
            "1 GiB dirty: dump, at most 1.25 of criu alone and fsync",
            of(&own_dumps)?,
            "ms",
            1.25 * bare,
        ),
        Figure::peer("1 GiB dirty: criu alone, restore", restore, "ms"),
        Figure::asked(
            "1 GiB dirty: restore, at most 1.25 of criu alone",
            of(&own_restores)?,
            "ms",
            1.25 * restore,
        ),
    ])
}

/// What others have written is on the disk before the clock runs.
fn settle() {
    // SAFETY: no arguments.
    unsafe { libc::sync() };
}

pub fn mib(bytes: f64) -> f64 {
    bytes / MIB
}

//! Agent, shim and criu killed at every stage of a checkpoint, a move and a start from one: the pod runs, once, and
//! loses nothing. Where a stage is reached criu's own words and the files that appear tell, never time; how long after
//! that the kill comes is drawn, by `BERTH_KILL_SEED` where that is set.

mod ground;

use std::fs;
use std::path::Path;

use ground::{Ground, Victim};

/// What criu says of a dump of one container, in order.
const DUMP: [&str; 7] =
    ["begin", "pre-dump", "network-lock", "query-ext-files", "post-dump", "network-unlock", "done"];
/// And of a start from it.
const RESTORE: [&str; 9] = [
    "begin",
    "pre-restore",
    "setup-namespaces",
    "post-setup-namespaces",
    "post-restore",
    "network-unlock",
    "pre-resume",
    "post-resume",
    "done",
];
/// In a hundred steps so many may be over before they are seen.
const MISSED_PERCENT_MAX: usize = 25;

fn seed() -> u64 {
    std::env::var("BERTH_KILL_SEED").ok().and_then(|text| text.parse().ok()).unwrap_or(1)
}

/// `victim` before the shim hears of each stage, and after criu has its answer.
fn at_each_stage(call: &str, stages: &[&str], moves: bool, victims: &[Victim]) {
    let mut ground = Ground::new(seed());
    for stage in stages {
        for side in ["before", "after"] {
            for victim in victims {
                ground.kill_at((call, stage, side), moves, *victim);
            }
        }
    }
    ground.end();
}

#[test]
fn criu_and_agent_killed_at_each_stage_of_a_snapshot() {
    at_each_stage("dump", &DUMP, false, &[Victim::Criu, Victim::Agent]);
}

#[test]
fn the_shim_killed_at_each_stage_of_a_snapshot() {
    at_each_stage("dump", &DUMP, false, &[Victim::Shim]);
}

#[test]
fn criu_and_agent_killed_at_each_stage_of_a_moves_dump() {
    at_each_stage("dump", &DUMP, true, &[Victim::Criu, Victim::Agent]);
}

#[test]
fn the_shim_killed_at_each_stage_of_a_moves_dump() {
    at_each_stage("dump", &DUMP, true, &[Victim::Shim]);
}

#[test]
fn criu_and_agent_killed_at_each_stage_of_a_restore() {
    at_each_stage("restore", &RESTORE, true, &[Victim::Criu, Victim::Agent]);
}

#[test]
fn the_shim_killed_at_each_stage_of_a_restore() {
    at_each_stage("restore", &RESTORE, true, &[Victim::Shim]);
}

/// What tells of a step, from the pod's directory on its node, where there is one.
type Reached = fn(&Ground, &str, Option<&Path>) -> bool;

/// A checkpoint's way to the depot, and the end of a pod that leaves, where it runs.
const HERE: [(&str, Reached); 7] = [
    ("the half of a checkpoint", |_, _, dir| in_half(dir, "").is_some()),
    ("the archive of what was written", |_, _, dir| in_half(dir, "containers/main/upper.tar").is_some()),
    ("the whole checkpoint", |_, _, dir| whole(dir, "saved.json")),
    ("its carrier", |ground, node, _| ground.carrier(node).is_some()),
    ("its manifest", |_, _, dir| whole(dir, "manifest.json")),
    ("its place among those kept", |ground, node, _| ground.kept(node).iter().any(|kept| is_young(kept))),
    ("the pod's end", |_, _, dir| dir.is_some_and(|dir| dir.join("exit-1.json").exists())),
];

/// A checkpoint's way out of the depot, and the start from it, where the pod goes to.
const THERE: [(&str, Reached); 5] = [
    ("the carrier", |ground, node, _| ground.carrier(node).is_some()),
    ("the half of what is fetched", |_, _, dir| dir.is_some_and(|dir| dir.join("restore.half").exists())),
    ("all of it", |_, _, dir| dir.is_some_and(|dir| dir.join("restore").exists())),
    ("the shim", |_, _, dir| dir.is_some_and(|dir| dir.join("shim.sock").exists())),
    ("the pod's going on", |_, _, dir| {
        dir.is_some_and(|dir| dir.join("shim.sock").exists() && !dir.join("restore").exists())
    }),
];

fn checkpoints(dir: Option<&Path>) -> Vec<std::path::PathBuf> {
    let dir = dir.map(|dir| dir.join("checkpoints"));
    let entries = dir.and_then(|dir| fs::read_dir(dir).ok());
    entries.into_iter().flatten().flatten().map(|entry| entry.path()).collect()
}

fn in_half(dir: Option<&Path>, name: &str) -> Option<std::path::PathBuf> {
    let half = checkpoints(dir).into_iter().find(|path| path.extension().is_some_and(|end| end == "half"))?;
    Some(half.join(name)).filter(|path| path.exists())
}

fn whole(dir: Option<&Path>, name: &str) -> bool {
    checkpoints(dir).iter().any(|path| path.extension().is_none() && path.join(name).exists())
}

fn is_young(path: &Path) -> bool {
    let written = fs::metadata(path.join("manifest.json")).and_then(|file| file.modified()).ok();
    written.and_then(|at| at.elapsed().ok()).is_some_and(|age| age.as_millis() < 500)
}

/// Each of `victims` at each of `steps`.
fn at_each_step(steps: &[(&str, Reached)], at_target: bool, moves: bool, victims: &[Victim]) {
    let mut ground = Ground::new(seed());
    let (mut tried, mut missed) = (0, Vec::new());
    for (name, reached) in steps {
        for victim in victims {
            tried += 1;
            if !ground.kill_when((name, at_target), moves, *victim, reached) {
                missed.push(format!("{victim:?} at {name}"));
            }
        }
    }
    ground.end();
    assert!(missed.len() * 100 <= tried * MISSED_PERCENT_MAX, "missed: {missed:?}");
}

#[test]
fn agent_and_carrier_killed_at_each_step_of_a_snapshot_into_the_depot() {
    at_each_step(&HERE[..6], false, false, &[Victim::Agent]);
}

#[test]
fn agent_and_shim_killed_at_each_step_of_a_move_away() {
    at_each_step(&HERE, false, true, &[Victim::Agent, Victim::Shim]);
}

#[test]
fn agent_and_shim_killed_at_each_step_of_a_move_in() {
    at_each_step(&THERE[..3], true, true, &[Victim::Agent]);
    at_each_step(&THERE[3..], true, true, &[Victim::Agent, Victim::Shim]);
}

#[test]
fn the_carrier_of_a_checkpoint_killed_on_its_way() {
    let mut ground = Ground::new(seed());
    let mut hits = 0;
    for (at_target, moves) in [(false, false), (false, true), (true, true)] {
        for _ in 0..3 {
            hits += usize::from(ground.kill_when(
                ("its start", at_target),
                moves,
                Victim::Carrier,
                |ground, node, _| ground.carrier(node).is_some(),
            ));
        }
    }
    ground.end();
    assert!(hits > 0, "no carrier was hit");
}

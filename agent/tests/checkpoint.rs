//! Real pods, saved and brought back by a real CRIU through their shims. Needs root, and what `tests/criu` leaves.

#[allow(dead_code, reason = "each test binary uses its own part")]
#[path = "shim/world.rs"]
mod world;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use berth_agent::task::{Order, Report, Saved, file};
use berth_protocol::job::{Volume, VolumeSource};
use berth_protocol::pod::{Cause, RESTORE_FAILED};
use berth_protocol::units::{Bytes, Millis};
use world::*;

const COUNTER: &str = "i=0; while :; do i=$((i+1)); echo $i; sleep 0.005; done";

/// Beside the program, where the agent looks as well. Where none works the test is counted as one that could not run.
fn criu() -> Option<PathBuf> {
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

fn pod(criu: &Path, script: &str) -> Pod {
    let mut pod = Pod::new(script);
    pod.task.criu = Some(criu.to_owned());
    pod
}

fn saved(agent: &mut Agent, level: u64, hold: bool) -> Result<Saved, String> {
    agent.order(&Order::Save { level, hold });
    agent.until(|report| match report {
        Report::Saved { saved, .. } => Some(Ok(saved)),
        Report::SaveFailed { why, .. } => Some(Err(why)),
        _ => None,
    })
}

/// Saves the pod, ends it, and starts its next epoch from what was saved, as a move does.
fn moved(from: &mut Pod, agent: &mut Agent) -> (Pod, Agent) {
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

fn log_records(pod: &Pod) -> u64 {
    berth_agent::shim::log::read_from(&pod.dir.join(file::LOG_DIR), 1).count() as u64
}

fn ended(mut pod: Pod, mut agent: Agent) {
    agent.order(&Order::Stop { grace: Millis::ZERO });
    agent.exited();
    pod.wait();
    pod.assert_clean();
}

/// Numbers from 1, none left out and none twice.
fn assert_counts(lines: &str) {
    let numbers: Vec<u64> =
        lines.lines().map(|line| line.parse().unwrap_or_else(|_| panic!("{line}"))).collect();
    assert_eq!(numbers, (1..=numbers.len() as u64).collect::<Vec<_>>());
    assert!(!numbers.is_empty());
}

#[test]
fn a_counter_moves_again_and_again_without_a_gap() {
    let Some(criu) = criu() else { return };
    let script = format!("echo kept > /only-here; mkdir -p /dev/shm/x; echo 1 > /scratch/file; {COUNTER}");
    let mut now = pod(&criu, &script);
    now.task.template.volumes = vec![Volume {
        mount: "/scratch".to_owned(),
        source: VolumeSource::Scratch(Bytes(1 << 20)),
        read_only: false,
    }];
    now.task.volumes = vec![None];
    let mut agent = now.start();
    let mut all = String::new();
    for cycle in 0..cycles() {
        wait_for("output", || log_records(&now) > 1);
        let (next, its_agent) = moved(&mut now, &mut agent);
        all.push_str(&now.output());
        (now, agent) = (next, its_agent);
        let written = |path: &str| fs::read_to_string(now.dir.join(path)).unwrap();
        assert_eq!(written("root/main/upper/only-here"), "kept\n", "{cycle}");
        assert!(written("berth/pod.json").contains(&format!("\"epoch\":{}", now.task.epoch)));
    }
    wait_for("output", || log_records(&now) > 1);
    agent.order(&Order::Stop { grace: Millis::ZERO });
    agent.exited();
    all.push_str(&now.output());
    assert_counts(&all);
    now.wait();
    now.assert_clean();
}

/// More in a measurement (`make bench`) than in every test run.
fn cycles() -> u32 {
    std::env::var("BERTH_CHECKPOINT_CYCLES").ok().and_then(|text| text.parse().ok()).unwrap_or(5)
}

#[test]
fn a_saved_pod_that_is_not_held_runs_on() {
    let Some(criu) = criu() else { return };
    let mut pod = pod(&criu, COUNTER);
    let mut agent = pod.start();
    agent.running();
    for level in 1..4 {
        wait_for("output", || log_records(&pod) > 5 * level);
        saved(&mut agent, level, false).unwrap();
        let before = log_records(&pod);
        wait_for("more output", || log_records(&pod) > before);
    }
    agent.order(&Order::Stop { grace: Millis::ZERO });
    agent.exited();
    assert_counts(&pod.output());
    pod.wait();
    fs::remove_dir_all(pod.dir.join(file::CHECKPOINTS_DIR)).unwrap();
    pod.assert_clean();
}

#[test]
fn containers_of_a_pod_come_along_together() {
    let Some(criu) = criu() else { return };
    let mut now = pod(&criu, "true");
    let script = |name: &str| format!("i=0; while :; do i=$((i+1)); echo {name} $i; sleep 0.01; done");
    now.task.template.containers = ["a", "b"].map(|name| container(name, shell(&script(name)))).into();
    now.task.roots = vec![berth_agent::task::Root::Host; 2];
    let mut agent = now.start();
    let mut all = String::new();
    for _ in 0..2 {
        wait_for("output", || ["a 3", "b 3"].iter().all(|line| (all.clone() + &now.output()).contains(line)));
        let (next, its_agent) = moved(&mut now, &mut agent);
        all.push_str(&now.output());
        (now, agent) = (next, its_agent);
    }
    let lines = |output: &str, name: &str| -> String {
        output.lines().filter_map(|line| line.strip_prefix(name)).map(|n| format!("{}\n", n.trim())).collect()
    };
    for name in ["a", "b"] {
        let before = lines(&all, name).lines().count();
        wait_for("output", || lines(&(all.clone() + &now.output()), name).lines().count() > before);
        assert_counts(&lines(&(all.clone() + &now.output()), name));
    }
    ended(now, agent);
}

#[test]
fn a_dump_that_fails_leaves_the_pod_running_and_says_why() {
    let Some(criu) = criu() else { return };
    for (broken, expect) in [("/bin/false", "criu"), ("/nonesuch/criu", "No such file")] {
        let mut pod = pod(&criu, COUNTER);
        pod.task.criu = Some(broken.into());
        let mut agent = pod.start();
        agent.running();
        let why = saved(&mut agent, 1, true).unwrap_err();
        assert!(why.contains(expect), "{why}");
        let before = log_records(&pod);
        wait_for("more output", || log_records(&pod) > before + 3);
        agent.order(&Order::Stop { grace: Millis::ZERO });
        agent.exited();
        assert_counts(&pod.output());
        pod.wait();
    }
}

#[test]
fn a_restore_that_fails_is_an_eviction_with_its_reason() {
    let Some(criu) = criu() else { return };
    let mut first = pod(&criu, COUNTER);
    let mut agent = first.start();
    agent.running();
    saved(&mut agent, 1, true).unwrap();
    agent.order(&Order::Stop { grace: Millis::ZERO });
    agent.exited();
    first.wait();
    let mut second = first.next_epoch();
    let to = second.dir.join(file::RESTORE_DIR);
    fs::rename(first.dir.join(file::CHECKPOINTS_DIR).join("1"), &to).unwrap();
    fs::remove_file(to.join("containers/main/images/pstree.img")).unwrap();
    second.task.restore = true;
    let outcome = second.start().exited().outcome;
    assert_eq!((outcome.cause, outcome.reason.as_deref()), (Cause::Eviction, Some(RESTORE_FAILED)));
    assert!(outcome.message.as_deref().is_some_and(|text| text.contains("criu: ")), "{outcome:?}");
    second.wait();
}

#[test]
fn criu_killed_at_any_moment_leaves_the_pod_running() {
    let Some(criu) = criu() else { return };
    let mut pod = pod(&criu, COUNTER);
    let mut agent = pod.start();
    agent.running();
    let mut failures = 0;
    for level in 1..=8 {
        agent.order(&Order::Save { level, hold: false });
        let shim = pod.shim_pid();
        let end = std::time::Instant::now() + std::time::Duration::from_millis(20 * (level - 1));
        let child = || {
            let children = fs::read_to_string(format!("/proc/{shim}/task/{shim}/children")).unwrap();
            let is_criu = |pid: &&str| {
                fs::read(format!("/proc/{pid}/cmdline"))
                    .is_ok_and(|line| line.windows(4).any(|w| w == b"swrk"))
            };
            children.split_whitespace().find(is_criu).map(|pid| pid.parse::<i32>().unwrap())
        };
        while std::time::Instant::now() < end {
            std::hint::spin_loop();
        }
        if let Some(pid) = child() {
            let _ =
                nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL);
        }
        let result = agent.until(|report| match report {
            Report::Saved { saved, .. } if saved.level == level => Some(true),
            Report::SaveFailed { level: failed, .. } if failed == level => Some(false),
            _ => None,
        });
        failures += u32::from(!result);
        let before = log_records(&pod);
        wait_for("more output", || log_records(&pod) > before + 3);
    }
    assert!(failures > 0, "criu was never hit");
    saved(&mut agent, 9, false).unwrap();
    agent.order(&Order::Stop { grace: Millis::ZERO });
    agent.exited();
    assert_counts(&pod.output());
    pod.wait();
}

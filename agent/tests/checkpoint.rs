//! Real pods, saved and brought back by a real CRIU through their shims. Needs root, and what `tests/criu` leaves.

#[allow(dead_code, reason = "each test binary uses its own part")]
#[path = "shim/world.rs"]
mod world;

#[allow(dead_code, reason = "each test binary uses its own part")]
#[path = "shim/saving.rs"]
mod saving;

use std::fs;
use std::path::Path;

use berth_agent::task::{Order, Report, file};
use berth_protocol::checkpoint::CheckpointKind;
use berth_protocol::job::{CheckpointMode, Volume, VolumeSource};
use berth_protocol::pod::{Cause, RESTORE_FAILED};
use berth_protocol::units::{Bytes, Millis};
use saving::*;
use world::*;

const COUNTER: &str = "i=0; while :; do i=$((i+1)); echo $i; sleep 0.005; done";

fn pod(criu: &Path, script: &str) -> Pod {
    let mut pod = Pod::new(script);
    pod.task.criu = Some(criu.to_owned());
    pod
}

/// All mounts are shared with others, as systemd has them; for this thread and what it starts.
fn share_mounts() {
    use nix::mount::{MsFlags, mount};
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).unwrap();
    let none = None::<&str>;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_SHARED, none).unwrap();
}

#[test]
fn a_counter_moves_again_and_again_without_a_gap() {
    let Some(criu) = criu() else { return };
    let script = format!("echo kept > /only-here; mkdir -p /dev/shm/x; echo 1 > /scratch/file; {COUNTER}");
    let mut now = pod(&criu, &script);
    let (named, host) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let volume =
        |mount: &str, source| Volume { mount: mount.to_owned(), source, read_only: false, save: false };
    now.task.template.volumes = vec![
        volume("/scratch", VolumeSource::Scratch(Bytes(1 << 20))),
        volume("/large", VolumeSource::Scratch(Bytes(1 << 30))),
        volume("/named", VolumeSource::Named(berth_protocol::ids::VolumeName::parse("data").unwrap())),
        volume("/host", VolumeSource::Host(host.path().display().to_string())),
    ];
    now.task.volumes = vec![None, None, Some(named.path().to_owned()), Some(host.path().to_owned())];
    share_mounts();
    // Whatever is left of a pod's processes comes to this one.
    // SAFETY: no pointers.
    unsafe { libc::prctl(libc::PR_SET_CHILD_SUBREAPER, 1) };
    let mut agent = now.start();
    let mut all = String::new();
    for cycle in 0..cycles() {
        wait_for("output", || log_records(&now) > 1);
        let (next, its_agent) = moved(&mut now, &mut agent);
        all.push_str(&now.output());
        (now, agent) = (next, its_agent);
        let written = |path: &str| fs::read_to_string(now.dir.join(path)).unwrap();
        assert_eq!(written("root/main.upper/only-here"), "kept\n", "{cycle}");
        let facts = fs::read_to_string(now.run_berth(file::POD)).unwrap();
        assert!(facts.contains(&format!("\"epoch\":{}", now.task.epoch)));
    }
    wait_for("output", || log_records(&now) > 1);
    agent.order(&Order::Stop { grace: Millis::ZERO });
    agent.exited();
    all.push_str(&now.output());
    assert_counts(&all);
    now.wait();
    now.assert_clean();
    // The dead of whom nobody was left to take notice are taken notice of; the living stay.
    // SAFETY: no pointers.
    let reap = || unsafe { libc::waitpid(-1, std::ptr::null_mut(), libc::WNOHANG) };
    wait_for("an end of every process", || {
        while reap() > 0 {}
        reap() == -1
    });
    let epochs = fs::read_dir(now.dir.parent().unwrap()).unwrap().count();
    assert_eq!(epochs, cycles() as usize + 1, "one directory an epoch");
}

/// More in a measurement (`make bench`) than in every test run.
fn cycles() -> u32 {
    std::env::var("BERTH_CHECKPOINT_CYCLES").ok().and_then(|text| text.parse().ok()).unwrap_or(12)
}

#[test]
fn a_saved_pod_that_is_not_held_runs_on() {
    let Some(criu) = criu() else { return };
    let mut pod = pod(&criu, COUNTER);
    let mut agent = pod.start();
    agent.running();
    let mut held = None;
    for level in 1..=6 {
        wait_for("output", || log_records(&pod) > 5 * level);
        saved(&mut agent, level, false).unwrap();
        let before = log_records(&pod);
        wait_for("more output", || log_records(&pod) > before);
        let shim = format!("/proc/{}", pod.shim_pid());
        let open = fs::read_dir(format!("{shim}/fd")).unwrap().count();
        assert_eq!(*held.get_or_insert(open), open, "descriptors are left open");
        let children = format!("{shim}/task/{}/children", pod.shim_pid());
        wait_for("no process but the pod's init and its program", || {
            fs::read_to_string(&children).unwrap().split_whitespace().count() == 2
        });
    }
    agent.order(&Order::Stop { grace: Millis::ZERO });
    agent.exited();
    assert_counts(&pod.output());
    pod.wait();
    fs::remove_dir_all(pod.dir.join(file::CHECKPOINTS_DIR)).unwrap();
    pod.assert_clean();
}

#[test]
fn a_criu_that_hangs_ends_with_its_shim() {
    let Some(criu) = criu() else { return };
    let mut pod = pod(&criu, COUNTER);
    let mut agent = pod.start();
    agent.running();
    let children = format!("/proc/{0}/task/{0}/children", pod.shim_pid());
    let children = || fs::read_to_string(&children).unwrap();
    let before = children();
    agent.order(&Order::Save { level: 1, hold: true });
    let mut dumping = None;
    wait_for("a criu", || {
        let new = |pid: &&str| !before.split_whitespace().any(|other| other == *pid);
        let is_criu = |pid: &&str| {
            fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|line| line.windows(4).any(|w| w == b"swrk"))
        };
        dumping = children().split_whitespace().filter(new).find(is_criu).and_then(|pid| pid.parse().ok());
        dumping.is_some()
    });
    let dumping = nix::unistd::Pid::from_raw(dumping.unwrap());
    nix::sys::signal::kill(dumping, nix::sys::signal::Signal::SIGSTOP).unwrap();
    pod.kill_shim();
    wait_for("its criu's end", || !std::path::Path::new(&format!("/proc/{dumping}")).exists());
    berth_agent::shim::clean_up(&pod.task, &pod.dir).unwrap();
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
fn a_pod_that_was_to_go_on_ends_by_order_before_it_has_begun() {
    let Some(criu) = criu() else { return };
    let mut first = pod(&criu, COUNTER);
    let mut agent = first.start();
    agent.running();
    let mut second = departed(&mut first, &mut agent);
    let mut agent = second.spawn().connect();
    let created = |report| matches!(report, Report::Created { .. }).then_some(());
    agent.until(created);
    ended(second, agent);
}

#[test]
fn a_restore_that_fails_is_an_eviction_with_its_reason() {
    let Some(criu) = criu() else { return };
    let mut first = pod(&criu, COUNTER);
    let mut agent = first.start();
    agent.running();
    let mut second = departed(&mut first, &mut agent);
    fs::remove_file(second.dir.join(file::RESTORE_DIR).join("containers/main/images/pstree.img")).unwrap();
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

#[test]
fn a_program_that_ends_of_a_dump_that_was_broken_off_is_no_failure_of_its_own() {
    use std::os::unix::fs::PermissionsExt;
    let dir = tempfile::tempdir().unwrap();
    let program = dir.path().join("criu");
    let mut pod = pod(&program, "exec sleep 4711.25");
    // As where the real one is killed while what it has put into the program runs: that ends after it.
    let breaks =
        "#!/bin/sh\n(while kill -0 $$; do :; done; kill -TRAP $(pgrep -fx 'sleep 4711.25')) &\nkill -9 $$\n";
    fs::write(&program, breaks).unwrap();
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
    let mut agent = pod.start();
    agent.running();
    agent.order(&Order::Save { level: 1, hold: false });
    let outcome = agent.exited().outcome;
    assert_eq!((outcome.cause, outcome.reason.as_deref()), (Cause::Eviction, Some("DumpInterrupted")));
    pod.wait();
}

/// Counts on from `/state`, and saves itself there when it is asked.
fn saves_itself(answer: &str) -> Pod {
    let script = format!(
        "n=$(cat /state 2>/dev/null || echo 0); trap 'echo $n > /state; {answer}' USR1; \
         echo from $n; while :; do n=$((n+1)); sleep 0.01; done"
    );
    let mut pod = Pod::new(&script);
    let policy = &mut pod.task.template.checkpoint;
    policy.signal = Some("SIGUSR1".to_owned());
    policy.grace = Millis(10_000);
    pod
}

/// What the program said it began from, in order.
fn begun_from(pod: &Pod) -> Vec<u64> {
    pod.output().lines().filter_map(|line| line.strip_prefix("from ")?.parse().ok()).collect()
}

#[test]
fn a_program_that_saves_itself_and_ends_with_85_begins_anew_here_and_elsewhere() {
    let answer = "echo $n > /run/berth/checkpoint/state; cp /run/berth/save /asked; exit 85";
    let mut pod = saves_itself(answer);
    let mut agent = pod.start();
    agent.running();
    wait_for("its beginning", || begun_from(&pod).len() == 1);
    let here = saved(&mut agent, 1, false).unwrap();
    assert_eq!(here.kind, CheckpointKind::Cooperative);
    agent.running();
    wait_for("a second beginning", || begun_from(&pod).len() == 2);
    let (mut next, agent) = moved_saved_itself(&mut pod, &mut agent);
    wait_for("a beginning elsewhere", || begun_from(&next).len() == 1);
    let state: u64 =
        fs::read_to_string(next.dir.join("root/main.upper/state")).unwrap().trim().parse().unwrap();
    assert!(state > begun_from(&pod)[1], "it did not go on from its file");
    assert_eq!(begun_from(&next), [state]);
    let written = |path: &str| fs::read_to_string(next.dir.join(path)).unwrap();
    assert_eq!(written("checkpoint/state"), format!("{state}\n"));
    assert_eq!(written("root/main.upper/asked"), "2\n");
    assert!(!next.run_berth(file::SAVE).exists());
    next.task.restore = false;
    ended(next, agent);
}

/// As `moved`, of a pod whose second checkpoint it is.
fn moved_saved_itself(from: &mut Pod, agent: &mut Agent) -> (Pod, Agent) {
    fs::remove_dir_all(from.dir.join(file::CHECKPOINTS_DIR).join("1")).unwrap();
    saved(agent, 2, true).unwrap();
    agent.order(&Order::Stop { grace: Millis::ZERO });
    assert_eq!(agent.exited().outcome.cause, Cause::Eviction);
    from.wait();
    let mut next = from.next_epoch();
    let whole = from.dir.join(file::CHECKPOINTS_DIR).join("2");
    fs::rename(whole, next.dir.join(file::RESTORE_DIR)).unwrap();
    fs::remove_dir(from.dir.join(file::CHECKPOINTS_DIR)).unwrap();
    from.assert_clean();
    next.task.restore = true;
    let mut agent = next.start();
    agent.running();
    (next, agent)
}

#[test]
fn a_named_volume_goes_along_where_the_job_asks_and_is_set_back() {
    let (here, there) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let mut pod = saves_itself("mkdir -p /ckpt/deep; echo $n > /ckpt/deep/state; exit 85");
    pod.task.template.volumes = vec![Volume {
        mount: "/ckpt".to_owned(),
        source: VolumeSource::Named(berth_protocol::ids::VolumeName::parse("ckpt").unwrap()),
        read_only: false,
        save: true,
    }];
    pod.task.volumes = vec![Some(here.path().to_owned())];
    let mut agent = pod.start();
    agent.running();
    wait_for("its beginning", || begun_from(&pod).len() == 1);
    saved(&mut agent, 1, true).unwrap();
    let state = fs::read_to_string(here.path().join("deep/state")).unwrap();
    // Work of a later time, which is done again.
    fs::create_dir(there.path().join("later")).unwrap();
    fs::write(there.path().join("later/state"), "9").unwrap();
    agent.order(&Order::Stop { grace: Millis::ZERO });
    agent.exited();
    pod.wait();
    let mut next = pod.next_epoch();
    fs::rename(pod.dir.join(file::CHECKPOINTS_DIR).join("1"), next.dir.join(file::RESTORE_DIR)).unwrap();
    (next.task.restore, next.task.volumes) = (true, vec![Some(there.path().to_owned())]);
    let mut agent = next.start();
    agent.running();
    assert_eq!(fs::read_to_string(there.path().join("deep/state")).unwrap(), state);
    assert!(!there.path().join("later").exists());
    ended(next, agent);
}

#[test]
fn a_program_that_saves_itself_may_run_on_and_say_so_by_a_file() {
    let mut pod = saves_itself("touch /run/berth/saved");
    pod.task.template.checkpoint.ready = Some("/run/berth/saved".to_owned());
    let mut agent = pod.start();
    agent.running();
    for level in 1..=2 {
        wait_for("its beginning", || begun_from(&pod).len() == 1);
        let saved = saved(&mut agent, level, level == 2).unwrap();
        assert_eq!(saved.kind, CheckpointKind::Cooperative, "{level}");
    }
    assert!(!agent.paused(), "held, it stands");
    agent.order(&Order::Release);
    agent.running();
    agent.order(&Order::Stop { grace: Millis::ZERO });
    agent.exited();
    pod.wait();
    assert_eq!(begun_from(&pod), [0], "it never ended");
}

#[test]
fn a_program_that_does_not_answer_runs_on_and_the_reason_is_told() {
    let mut pod = saves_itself("sleep 2; exit 85");
    let policy = &mut pod.task.template.checkpoint;
    (policy.mode, policy.grace) = (CheckpointMode::Cooperative, Millis(300));
    policy.ready = Some("/run/berth/saved".to_owned());
    let mut agent = pod.start();
    agent.running();
    wait_for("its beginning", || begun_from(&pod).len() == 1);
    let why = saved(&mut agent, 1, true).unwrap_err();
    for part in ["container main", "code 85", "/run/berth/saved", "300ms"] {
        assert!(why.contains(part), "{part}: {why}");
    }
    // Its late answer is taken at its word, and is no failure.
    wait_for("a second beginning", || begun_from(&pod).len() == 2);
    ended_with_checkpoints(pod, agent);
}

fn ended_with_checkpoints(mut pod: Pod, mut agent: Agent) {
    agent.order(&Order::Stop { grace: Millis::ZERO });
    agent.exited();
    pod.wait();
}

#[test]
fn a_program_that_does_not_answer_in_time_is_saved_by_criu_all_the_same() {
    let Some(criu) = criu() else { return };
    let mut pod = saves_itself("true");
    pod.task.criu = Some(criu);
    pod.task.template.checkpoint.grace = Millis(1000);
    let mut agent = pod.start();
    agent.running();
    wait_for("its beginning", || begun_from(&pod).len() == 1);
    let asked = std::time::Instant::now();
    let saved = saved(&mut agent, 1, false).unwrap();
    assert_eq!(saved.kind, CheckpointKind::Criu);
    assert!(asked.elapsed().as_millis() > u128::from(saved.frozen_ms), "it was not waited for");
    assert_eq!(begun_from(&pod), [0]);
    ended_with_checkpoints(pod, agent);
}

#[test]
fn exit_code_85_of_a_program_that_was_not_asked_is_a_failure() {
    let mut pod = Pod::new("exit 85");
    pod.task.template.checkpoint.signal = Some("SIGUSR1".to_owned());
    assert_eq!(pod.run().outcome.cause, Cause::Failure);
}

#[test]
fn hooks_run_in_the_container_around_a_dump() {
    let Some(criu) = criu() else { return };
    let mut now = pod(&criu, COUNTER);
    now.main().env = [("WHO".to_owned(), "the job".to_owned())].into();
    let policy = &mut now.task.template.checkpoint;
    let facts = "echo $1 $WHO $(id -u) $(grep -h NoNewPrivs /proc/self/status | tr -d '\t') $(cat /proc/1/comm) \
                 $(hostname) >> /run/berth/hooks; unshare -m true 2>/dev/null && echo too strong >> /run/berth/hooks";
    let hook =
        |name: &str| ["/bin/sh", "-c", &format!("{facts}; true"), "hook", name].map(str::to_owned).to_vec();
    (policy.quiesce, policy.resume) = (hook("quiesce"), hook("resume"));
    let mut agent = now.start();
    agent.running();
    let lines = |pod: &Pod| fs::read_to_string(pod.run_berth("hooks")).unwrap_or_default();
    let line = |pod: &Pod, name: &str| {
        format!("{name} the job 0 NoNewPrivs:1 berth-init digits-{}\n", pod.task.pod.index)
    };
    saved(&mut agent, 7, false).unwrap();
    wait_for("the resume hook", || lines(&now) == line(&now, "quiesce") + &line(&now, "resume"));
    wait_for("its end", || saved_again(&mut agent));
    wait_for("the resume hook", || lines(&now).lines().count() >= 4);
    // What it has written does not say that it has ended: beside it the shim's children are an init and a container.
    wait_for("its end", || now.children().len() == 2);
    fs::remove_dir_all(now.dir.join(file::CHECKPOINTS_DIR)).unwrap();
    let (next, agent) = moved(&mut now, &mut agent);
    wait_for("the resume hook where it goes on", || lines(&next) == line(&next, "resume"));
    ended(next, agent);
}

/// Once the resume hook of the checkpoint before has ended.
fn saved_again(agent: &mut Agent) -> bool {
    static LEVEL: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(8);
    saved(agent, LEVEL.fetch_add(1, std::sync::atomic::Ordering::Relaxed), false).is_ok()
}

#[test]
fn a_quiesce_hook_that_fails_refuses_the_dump_and_the_pod_goes_on() {
    let Some(criu) = criu() else { return };
    for (command, expect) in [
        (
            shell("cat /proc/self/status > /run/berth/status; echo no lock to be had >&2; exit 3"),
            "the quiesce hook ended with code 3: no lock to be had",
        ),
        (shell("sleep 60"), "has not ended within checkpoint.grace"),
        (vec!["/nonesuch".to_owned()], "the quiesce hook `/nonesuch` cannot be started"),
    ] {
        let mut pod = pod(&criu, COUNTER);
        let policy = &mut pod.task.template.checkpoint;
        (policy.quiesce, policy.grace) = (command, Millis(500));
        pod.main().user = Some("1000:1001".to_owned());
        let mut agent = pod.start();
        agent.running();
        let why = saved(&mut agent, 1, true).unwrap_err();
        assert!(why.contains(expect), "{why}");
        if expect.contains("no lock") {
            let status = fs::read_to_string(pod.run_berth("status")).unwrap();
            for line in
                ["CapEff:\t0000000000000000", "NoNewPrivs:\t1", "Seccomp:\t2", "CapBnd:\t00000000a80425fb"]
            {
                assert!(status.contains(line), "{line}: {status}");
            }
        }
        let before = log_records(&pod);
        wait_for("more output", || log_records(&pod) > before + 3);
        ended_with_checkpoints(pod, agent);
    }
}

/// What the shim says of a resume hook that has not done its work.
fn unresumed(agent: &mut Agent) -> String {
    agent.until(|report| match report {
        Report::ResumeFailed { why, .. } => Some(why),
        _ => None,
    })
}

/// The pod's own numbers, without what berth says beside them.
fn counted(pod: &Pod) -> String {
    pod.output().lines().filter(|line| !line.starts_with("berth: ")).map(|line| format!("{line}\n")).collect()
}

#[test]
fn a_resume_hook_that_fails_leaves_the_pod_running_and_why_is_told() {
    let Some(criu) = criu() else { return };
    for (command, expect) in [
        (shell("echo no lock to be had >&2; exit 3"), "the resume hook ended with code 3: no lock to be had"),
        (shell("sleep 60"), "the resume hook has not ended within checkpoint.grace"),
        (vec!["/nonesuch".to_owned()], "the resume hook `/nonesuch` cannot be started"),
    ] {
        let mut now = pod(&criu, COUNTER);
        let policy = &mut now.task.template.checkpoint;
        (policy.resume, policy.grace) = (command, Millis(500));
        let mut agent = now.start();
        agent.running();
        // It is no failure of the checkpoint, which is there before.
        saved(&mut agent, 1, false).unwrap();
        let why = unresumed(&mut agent);
        assert!(why.starts_with(expect), "{why}");
        assert!(now.output().contains(&format!("berth: {why}\n")), "{}", now.output());
        assert_eq!(unresumed(&mut now.connect()), why, "told to an agent that comes later");
        let before = log_records(&now);
        wait_for("more output", || log_records(&now) > before + 3);
        // Nothing stands against the next one, nor against a move; where it goes on it is told again.
        saved(&mut agent, 2, false).unwrap();
        unresumed(&mut agent);
        fs::remove_dir_all(now.dir.join(file::CHECKPOINTS_DIR)).unwrap();
        let (next, mut agent) = moved(&mut now, &mut agent);
        assert_eq!(unresumed(&mut agent), why);
        let before = log_records(&next);
        wait_for("more output", || log_records(&next) > before + 3);
        assert_counts(&(counted(&now) + &counted(&next)));
        ended(next, agent);
    }
}

#[test]
fn a_resume_hook_that_stands_still_with_its_pod_has_its_time_afterwards() {
    let Some(criu) = criu() else { return };
    let mut pod = pod(&criu, COUNTER);
    let policy = &mut pod.task.template.checkpoint;
    policy.grace = Millis(1_000);
    let hook =
        "touch /run/berth/begun; until [ -e /run/berth/go ]; do sleep 0.01; done; touch /run/berth/resumed";
    policy.resume = shell(hook);
    let mut agent = pod.start();
    agent.running();
    saved(&mut agent, 1, false).unwrap();
    wait_for("the hook", || pod.run_berth("begun").exists());
    agent.order(&Order::Pause { pause: true });
    agent.paused();
    // Frozen for longer than its grace: that much time is what this is about.
    std::thread::sleep(std::time::Duration::from_millis(1_500));
    fs::write(pod.run_berth("go"), "").unwrap();
    agent.order(&Order::Pause { pause: false });
    agent.running();
    wait_for("its end", || pod.run_berth("resumed").exists());
    assert_counts(&pod.output());
    ended_with_checkpoints(pod, agent);
}

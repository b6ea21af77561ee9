//! Pods with memory on a GPU, saved and brought back by a real CRIU through their shims, with a libcuda and an NVML that
//! the test builds: what they are asked, in which order, and what becomes of the pod where any of it fails or dies.

#[allow(dead_code, reason = "each test binary uses its own part")]
#[path = "shim/world.rs"]
mod world;

#[allow(dead_code, reason = "each test binary uses its own part")]
#[path = "shim/saving.rs"]
mod saving;

use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use berth_agent::task::{DeviceGrant, Order, Report, SavedDevices, file};
use berth_protocol::checkpoint::CheckpointKind;
use berth_protocol::job::{Volume, VolumeSource};
use berth_protocol::pod::{Cause, RESTORE_FAILED};
use berth_protocol::units::{Bytes, Millis};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use saving::*;
use world::*;

/// The stubs' devices, and a node of this machine that stands for each one's.
const GPUS: [(&str, &str); 2] = [
    ("GPU-00000000-0000-0000-0000-000000000000", "/dev/kmsg"),
    ("GPU-00000001-0000-0000-0000-000000000000", "/dev/hwrng"),
];

/// A directory with the stubs, in which their words, calls and devices' memory are; containers see it as `/gpu`.
struct Gpu {
    dir: tempfile::TempDir,
}

impl Gpu {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let tests = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests");
        let build = |source: &str, name: &str, options: &[&str]| {
            let mut cc = Command::new("cc");
            cc.args(options).args(["-O1", "-Wall", "-Werror", "-o"]).arg(dir.path().join(name));
            let built = cc.arg(tests.join(source)).arg("-ldl").status();
            assert!(built.expect("a C compiler is needed: apt install gcc").success());
        };
        build("nvml-stub/nvml.c", "libnvidia-ml.so.1", &["-shared", "-fPIC"]);
        build("cuda-stub/cuda.c", "libcuda.so.1", &["-shared", "-fPIC"]);
        build("cuda-stub/app.c", "cuda-app", &[]);
        GPUS.iter().for_each(|(uuid, _)| fs::create_dir(dir.path().join(uuid)).unwrap());
        Self { dir }
    }

    fn path(&self) -> &Path {
        self.dir.path()
    }

    fn words(&self, words: &str) {
        // Renamed into place: the stubs read it at any time.
        let new = self.path().join("state.new");
        fs::write(&new, words).unwrap();
        fs::rename(new, self.path().join("state")).unwrap();
    }

    /// What was called since it was asked last, by the names of the calls that did what they are for.
    fn calls(&self) -> Vec<String> {
        let path = self.path().join("calls");
        let text = fs::read_to_string(&path).unwrap_or_default();
        let _ = fs::remove_file(&path);
        let well = |line: &str| Some(line.strip_suffix(" = 0")?.split(' ').next()?.to_owned());
        text.lines()
            .filter_map(|line| well(line).or_else(|| (!line.contains(' ')).then(|| line.to_owned())))
            .collect()
    }

    /// Waits until a call has begun; returns its process.
    fn begun(&self, call: &str) -> i32 {
        let mut found = None;
        wait_for(call, || {
            let text = fs::read_to_string(self.path().join("calls")).unwrap_or_default();
            let line =
                text.lines().rfind(|line| line.starts_with(&format!("{call} ")) && !line.contains('='));
            found = line.and_then(|line| line.split(' ').nth(1)?.parse().ok());
            found.is_some()
        });
        found.unwrap()
    }

    fn grant(n: usize) -> DeviceGrant {
        let (uuid, node) = GPUS[n];
        DeviceGrant {
            uuid: uuid.to_owned(),
            cdi: None,
            nodes: vec![node.into()],
            files: Vec::new(),
            env: vec![format!("NVIDIA_VISIBLE_DEVICES={uuid}")],
        }
    }

    /// Counts on the first device, one process for each name.
    fn pod(&self, criu: &Path, script: &str) -> Pod {
        let mut pod = Pod::new(script);
        pod.task.criu = Some(criu.to_owned());
        pod.task.devices = vec![Self::grant(0)];
        pod.task.template.volumes = vec![Volume {
            mount: "/gpu".to_owned(),
            source: VolumeSource::Host(self.path().to_str().unwrap().to_owned()),
            read_only: false,
            save: false,
        }];
        pod.task.volumes = vec![Some(self.path().to_owned())];
        pod.env = vec![("LD_LIBRARY_PATH", self.path().to_owned())];
        pod
    }
}

const APP: &str = "exec /gpu/cuda-app a";

/// Once it counts.
fn started(pod: &mut Pod) -> Agent {
    let mut agent = pod.start();
    agent.running();
    wait_for("the first numbers", || log_records(pod) > 2);
    agent
}

/// The pod's programs have their GPUs: it counts, and nothing of the way is left.
fn counts_on(pod: &Pod) {
    let before = log_records(pod);
    wait_for("more numbers", || log_records(pod) > before + 3);
    wait_for("an end of the helper", || helpers(pod).is_empty());
}

fn end(mut pod: Pod, mut agent: Agent) {
    agent.order(&Order::Stop { grace: Millis::ZERO });
    agent.exited();
    assert_counts(&pod.output());
    pod.wait();
}

/// Children of the shim that make the driver's calls.
fn helpers(pod: &Pod) -> Vec<i32> {
    let shim = pod.shim_pid();
    let children = fs::read_to_string(format!("/proc/{shim}/task/{shim}/children")).unwrap_or_default();
    // Its name it gets late.
    let is_helper =
        |pid: &i32| fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|line| line == b"berth-agent\0cuda\0");
    children.split_whitespace().filter_map(|pid| pid.parse().ok()).filter(is_helper).collect()
}

fn kill_hard(pid: i32) {
    kill(Pid::from_raw(pid), Signal::SIGKILL).unwrap();
}

/// Beneath the pod's groups: the processes that compute.
fn apps(pod: &Pod) -> Vec<i32> {
    let groups = pod.cgroups();
    let group = groups.iter().find(|path| path.join("cgroup.procs").exists()).expect("a control group");
    let all = fs::read_to_string(group.join("cgroup.procs")).unwrap();
    let is_app =
        |pid: &i32| fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|comm| comm == "cuda-app\n");
    all.lines().filter_map(|pid| pid.parse().ok()).filter(is_app).collect()
}

#[test]
fn memory_leaves_the_gpu_before_the_dump_and_comes_back_after_it() {
    let Some(criu) = criu() else { return };
    let gpu = Gpu::new();
    let mut pod = gpu.pod(&criu, APP);
    let mut agent = started(&mut pod);
    for level in 1..=3 {
        let saved = saved(&mut agent, level, false).unwrap();
        assert_eq!(saved.kind, CheckpointKind::Criu);
        let devices = SavedDevices { uuids: vec![GPUS[0].0.to_owned()], processes: 1, bytes: Bytes::ZERO };
        assert_eq!(saved.devices, Some(devices));
        counts_on(&pod);
        assert_eq!(
            gpu.calls(),
            ["init", "lock", "checkpoint", "restore", "unlock"],
            "one helper does it all"
        );
    }
    end(pod, agent);
}

#[test]
fn it_goes_on_on_another_gpu() {
    let Some(criu) = criu() else { return };
    let gpu = Gpu::new();
    let mut now = gpu.pod(&criu, APP);
    let mut agent = started(&mut now);
    let mut all = String::new();
    for there in [1, 0, 0] {
        let next_grant = Gpu::grant(there);
        gpu.calls();
        let (next, its_agent) =
            moved_to(&mut now, &mut agent, |task| task.devices = vec![next_grant.clone()]);
        all.push_str(&now.output());
        let calls = fs::read_to_string(gpu.path().join("calls")).unwrap();
        assert!(calls.lines().last().unwrap().starts_with("unlock "), "told to run before it could: {calls}");
        let before = now.task.devices[0].uuid.clone();
        let restore = calls.lines().find(|line| line.starts_with("restore ")).unwrap();
        let pair = format!(" {before} {}", next_grant.uuid);
        assert_eq!(restore.ends_with(&pair), before != next_grant.uuid, "{restore}");
        assert_eq!(gpu.calls(), ["init", "lock", "checkpoint", "init", "restore", "unlock"]);
        (now, agent) = (next, its_agent);
        let node = PathBuf::from(format!("/proc/{}/root{}", apps(&now)[0], GPUS[there].1));
        let of = |path: &Path| std::os::unix::fs::MetadataExt::rdev(&fs::metadata(path).unwrap());
        assert_eq!(of(&node), of(Path::new(GPUS[there].1)), "the device's own node is not there");
        counts_on(&now);
        assert!(
            now.task.devices[0].uuid == next_grant.uuid
                && gpu.path().join(&next_grant.uuid).join("a").exists()
        );
    }
    agent.order(&Order::Stop { grace: Millis::ZERO });
    agent.exited();
    all.push_str(&now.output());
    assert_counts(&all);
    now.wait();
}

#[test]
fn all_processes_are_locked_before_the_first_is_saved() {
    let Some(criu) = criu() else { return };
    let gpu = Gpu::new();
    let mut pod = gpu.pod(&criu, "/gpu/cuda-app b > /dev/null & exec /gpu/cuda-app a");
    let mut agent = started(&mut pod);
    wait_for("both", || apps(&pod).len() == 2);
    let devices = saved(&mut agent, 1, false).unwrap().devices.unwrap();
    assert_eq!(devices.processes, 2);
    counts_on(&pod);
    let (lock, checkpoint, restore, unlock) = ("lock", "checkpoint", "restore", "unlock");
    assert_eq!(gpu.calls(), ["init", lock, lock, checkpoint, checkpoint, restore, restore, unlock, unlock]);
    end(pod, agent);
}

#[test]
fn hooks_run_around_all_of_it() {
    let Some(criu) = criu() else { return };
    let gpu = Gpu::new();
    let mut pod = gpu.pod(&criu, APP);
    let policy = &mut pod.task.template.checkpoint;
    (policy.quiesce, policy.resume) =
        (shell("echo quiesce >> /gpu/calls"), shell("echo resume >> /gpu/calls"));
    let mut agent = started(&mut pod);
    saved(&mut agent, 1, false).unwrap();
    wait_for("the resume hook", || fs::read_to_string(gpu.path().join("calls")).unwrap().contains("resume"));
    assert_eq!(gpu.calls(), ["init", "quiesce", "lock", "checkpoint", "restore", "unlock", "resume"]);
    end(pod, agent);
}

#[test]
fn a_program_that_has_not_used_its_gpu_is_saved_as_any() {
    let Some(criu) = criu() else { return };
    let gpu = Gpu::new();
    let mut pod = gpu.pod(&criu, "i=0; while :; do i=$((i+1)); echo $i; sleep 0.005; done");
    let mut agent = started(&mut pod);
    assert_eq!(saved(&mut agent, 1, false).unwrap().devices, None);
    assert_eq!(gpu.calls(), ["init"]);
    counts_on(&pod);
    end(pod, agent);
}

#[test]
fn a_held_pod_that_is_released_has_its_gpu_again() {
    let Some(criu) = criu() else { return };
    let gpu = Gpu::new();
    let mut pod = gpu.pod(&criu, APP);
    let mut agent = started(&mut pod);
    saved(&mut agent, 1, true).unwrap();
    assert!(!agent.paused());
    assert_eq!(gpu.calls(), ["init", "lock", "checkpoint"]);
    wait_for("an end of what holds the devices", || helpers(&pod).is_empty());
    agent.order(&Order::Release);
    agent.running();
    counts_on(&pod);
    assert_eq!(gpu.calls(), ["init", "restore", "unlock"]);
    end(pod, agent);
}

#[test]
fn whichever_call_fails_the_pod_runs_on_unlocked_and_the_driver_is_quoted() {
    let Some(criu) = criu() else { return };
    let gpu = Gpu::new();
    let mut pod = gpu.pod(&criu, APP);
    let mut agent = started(&mut pod);
    let mut level = 0;
    let cases = [
        ("cuda.init=801", "NVIDIA's driver answers cuInit with CUDA_ERROR_NOT_SUPPORTED"),
        ("cuda.thread=801", "cuCheckpointProcessGetRestoreThreadId"),
        ("cuda.state=801", "cuCheckpointProcessGetState"),
        ("cuda.lock=801", "cuCheckpointProcessLock with CUDA_ERROR_NOT_SUPPORTED (as the test has it)"),
        ("cuda.lock.after=2", "cuCheckpointProcessLock with CUDA_ERROR_OUT_OF_MEMORY"),
        ("cuda.checkpoint=801", "saving the memory of process"),
        ("cuda.checkpoint.after=2", "cuCheckpointProcessCheckpoint with CUDA_ERROR_OUT_OF_MEMORY"),
    ];
    for (words, expect) in cases {
        gpu.words(words);
        level += 1;
        let why = saved(&mut agent, level, true).unwrap_err();
        assert!(why.contains(expect) && why.contains("checkpoint.signal"), "{words}: {why}");
        counts_on(&pod);
    }
    gpu.words("");
    level += 1;
    saved(&mut agent, level, false).unwrap();
    counts_on(&pod);
    end(pod, agent);
}

#[test]
fn a_dump_that_fails_brings_the_memory_back() {
    let Some(criu) = criu() else { return };
    let gpu = Gpu::new();
    let mut pod = gpu.pod(&criu, APP);
    pod.task.criu = Some("/bin/false".into());
    let mut agent = started(&mut pod);
    let why = saved(&mut agent, 1, true).unwrap_err();
    assert!(why.contains("criu"), "{why}");
    counts_on(&pod);
    assert_eq!(gpu.calls(), ["init", "lock", "checkpoint", "restore", "unlock"]);
    end(pod, agent);
}

#[test]
fn the_way_back_is_tried_again() {
    let Some(criu) = criu() else { return };
    let gpu = Gpu::new();
    let mut pod = gpu.pod(&criu, APP);
    let mut agent = started(&mut pod);
    for (level, words) in
        ["cuda.restore=801", "cuda.restore.after=2", "cuda.unlock=801", "cuda.unlock.after=2"]
            .iter()
            .enumerate()
    {
        gpu.words(words);
        saved(&mut agent, level as u64 + 1, false).unwrap();
        let call = words.split(['.', '=']).nth(1).unwrap();
        gpu.begun(call);
        let failed = format!(" = {}", words.split('=').nth(1).unwrap());
        wait_for("its failure", || fs::read_to_string(gpu.path().join("calls")).unwrap().contains(&failed));
        gpu.words("");
        counts_on(&pod);
        gpu.calls();
    }
    end(pod, agent);
}

#[test]
fn a_helper_that_is_killed_in_any_call_wedges_nothing() {
    let Some(criu) = criu() else { return };
    let gpu = Gpu::new();
    let mut pod = gpu.pod(&criu, APP);
    let mut agent = started(&mut pod);
    for (level, call) in (1..).zip(["init", "lock", "checkpoint", "restore", "unlock"]) {
        gpu.words(&format!("cuda.{call}.hang=1"));
        agent.order(&Order::Save { level, hold: false });
        gpu.begun(call);
        let [helper] = helpers(&pod)[..] else { panic!("one helper is to be there") };
        kill_hard(helper);
        gpu.words("");
        let result = agent.until(|report| match report {
            Report::Saved { saved, .. } if saved.level == level => Some(Ok(())),
            Report::SaveFailed { level: failed, why, .. } if failed == level => Some(Err(why)),
            _ => None,
        });
        match call {
            "restore" | "unlock" => result.unwrap(),
            _ => assert!(result.unwrap_err().contains("the process that makes the driver's calls has ended")),
        }
        counts_on(&pod);
        gpu.calls();
    }
    end(pod, agent);
}

#[test]
fn criu_killed_in_its_dump_leaves_the_pod_with_its_gpu() {
    if criu().is_none() {
        return;
    }
    let gpu = Gpu::new();
    // One that has begun and goes no further: a real one may be killed in the midst of a change to the program.
    let stands = gpu.path().join("criu");
    fs::write(&stands, "#!/bin/sh\nkill -STOP $$\n").unwrap();
    fs::set_permissions(&stands, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let mut pod = gpu.pod(&stands, APP);
    let mut agent = started(&mut pod);
    for level in 1..=2 {
        agent.order(&Order::Save { level, hold: level == 2 });
        let mut found = None;
        wait_for("criu", || {
            let shim = pod.shim_pid();
            let children = fs::read_to_string(format!("/proc/{shim}/task/{shim}/children")).unwrap();
            let is_criu = |pid: &&str| {
                fs::read(format!("/proc/{pid}/cmdline"))
                    .is_ok_and(|line| line.windows(4).any(|word| word == b"swrk"))
            };
            found = children.split_whitespace().find(is_criu).map(|pid| pid.parse::<i32>().unwrap());
            found.is_some()
        });
        kill_hard(found.unwrap());
        let why = agent.until(|report| match report {
            Report::SaveFailed { level: failed, why, .. } if failed == level => Some(why),
            _ => None,
        });
        assert!(why.contains("it ended without an answer"), "{why}");
        counts_on(&pod);
        assert_eq!(gpu.calls(), ["init", "lock", "checkpoint", "restore", "unlock"]);
    }
    end(pod, agent);
}

#[test]
fn a_shim_that_is_killed_takes_pod_and_helper_with_it() {
    let Some(criu) = criu() else { return };
    let gpu = Gpu::new();
    for call in ["checkpoint", "restore"] {
        let mut pod = gpu.pod(&criu, APP);
        let mut agent = started(&mut pod);
        gpu.words(&format!("cuda.{call}.hang=1"));
        agent.order(&Order::Save { level: 1, hold: false });
        let app = gpu.begun(call);
        let [helper] = helpers(&pod)[..] else { panic!("one helper is to be there") };
        pod.kill_shim();
        for pid in [app, helper] {
            wait_for("its end", || {
                let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
                status.is_empty() || status.contains("State:\tZ")
            });
        }
        gpu.words("");
        gpu.calls();
    }
}

#[test]
fn a_pod_that_ends_meanwhile_takes_the_helper_with_it() {
    let Some(criu) = criu() else { return };
    let gpu = Gpu::new();
    for call in ["lock", "checkpoint", "restore"] {
        let mut pod = gpu.pod(&criu, APP);
        let mut agent = started(&mut pod);
        gpu.words(&format!("cuda.{call}.hang=1"));
        agent.order(&Order::Save { level: 1, hold: false });
        let app = gpu.begun(call);
        let [helper] = helpers(&pod)[..] else { panic!("one helper is to be there") };
        let groups = fs::read_to_string(format!("/proc/{helper}/cgroup")).unwrap();
        assert!(!groups.contains(&pod.task.pod.to_string()), "frozen and killed with the pod: {groups}");
        kill_hard(app);
        agent.exited();
        wait_for("an end of the helper", || helpers(&pod).is_empty());
        pod.wait();
        gpu.words("");
        gpu.calls();
    }
}

#[test]
fn a_call_that_does_not_end_is_given_up() {
    let Some(criu) = criu() else { return };
    let gpu = Gpu::new();
    let mut pod = gpu.pod(&criu, APP);
    pod.task.template.checkpoint.grace = Millis(200);
    let mut agent = started(&mut pod);
    gpu.words("cuda.lock.hang=1");
    let why = saved(&mut agent, 1, true).unwrap_err();
    assert!(why.contains("locking process") && why.contains("has not ended within 5s200ms"), "{why}");
    counts_on(&pod);
    // The driver may do late what it was asked for; the next checkpoint finds out.
    gpu.words("");
    saved(&mut agent, 2, false).unwrap();
    counts_on(&pod);
    end(pod, agent);
}

#[test]
fn a_pod_whose_lease_ends_meanwhile_freezes_in_time_and_has_its_gpu_when_it_goes_on() {
    let Some(criu) = criu() else { return };
    let gpu = Gpu::new();
    for call in ["lock", "checkpoint", "restore"] {
        let mut pod = gpu.pod(&criu, APP);
        let mut agent = started(&mut pod);
        gpu.words(&format!("cuda.{call}.hang=1"));
        agent.order(&Order::Save { level: 1, hold: false });
        gpu.begun(call);
        agent.order(&Order::Renew { lease: lease(10) });
        assert!(agent.paused(), "fenced");
        gpu.words("");
        agent.order(&Order::Renew { lease: berth_agent::task::Lease { deadline: None } });
        agent.running();
        counts_on(&pod);
        end(pod, agent);
        gpu.calls();
    }
}

#[test]
fn a_pod_that_is_stopped_meanwhile_can_use_its_gpu_to_end_well() {
    let Some(criu) = criu() else { return };
    let gpu = Gpu::new();
    let mut pod = gpu.pod(&criu, "trap '' TERM; exec /gpu/cuda-app a");
    let mut agent = started(&mut pod);
    gpu.words("cuda.checkpoint.hang=1");
    agent.order(&Order::Save { level: 1, hold: false });
    gpu.begun("checkpoint");
    agent.order(&Order::Stop { grace: Millis(60_000) });
    agent.until(|report| matches!(report, Report::SaveFailed { .. }).then_some(()));
    gpu.words("");
    counts_on(&pod);
    end(pod, agent);
}

/// What cannot be saved is known before anything is stopped.
#[test]
fn refusals_name_the_reason_and_what_to_do_and_touch_nothing() {
    let Some(criu) = criu() else { return };
    type Change = fn(&Gpu, &mut Pod);
    let cases: [(&str, Change, &str); 10] = [
        (APP, |_, pod| pod.task.devices.push(Gpu::grant(1)), "the pod has 2 GPUs"),
        (
            APP,
            |_, pod| pod.task.devices[0].uuid = "0000:03:00.0".into(),
            "NVIDIA's GPUs alone, and the pod has 0000:03:00.0",
        ),
        (APP, |gpu, _| gpu.words("0.mig=1"), "is split by MIG"),
        ("exec /gpu/cuda-app a uvm", |_, _| {}, "has managed memory (UVM)"),
        ("/gpu/cuda-app x nvml & exec /gpu/cuda-app a", |_, _| {}, "has no CUDA at work"),
        (
            APP,
            |gpu, _| gpu.words("cuda.version=12080"),
            "knows CUDA 12.8, and CUDA 13.0 is needed: install driver 580",
        ),
        (
            APP,
            |gpu, _| fs::remove_file(gpu.path().join("libcuda.so.1")).unwrap(),
            "libcuda.so.1 cannot be loaded",
        ),
        (APP, |gpu, _| gpu.words("0.mps=4096"), "is used by way of MPS"),
        (APP, |gpu, _| gpu.words("count=0"), "NVML does not tell how GPU-00000000"),
        (APP, |gpu, _| gpu.words("cuda.failed=1"), "in a state that nothing leads out of"),
    ];
    for (script, change, expect) in cases {
        let gpu = Gpu::new();
        let mut pod = gpu.pod(&criu, script);
        change(&gpu, &mut pod);
        let mut agent = started(&mut pod);
        let why = saved(&mut agent, 1, true).unwrap_err();
        assert!(why.contains(expect) && why.contains("checkpoint.signal"), "{why}");
        assert!(!gpu.calls().contains(&"lock".to_owned()), "{why}");
        counts_on(&pod);
        end(pod, agent);
    }
}

#[test]
fn the_hosts_memory_takes_in_what_was_on_the_gpu_beyond_the_pods_limit() {
    let Some(criu) = criu() else { return };
    let gpu = Gpu::new();
    let mut pod = gpu.pod(&criu, APP);
    let mut agent = started(&mut pod);
    let app = apps(&pod)[0];
    let limit = |pod: &Pod| -> u64 {
        let read = |path: &PathBuf| {
            let names = ["memory.max", "memory.limit_in_bytes"];
            let text = names.iter().find_map(|name| fs::read_to_string(path.join(name)).ok());
            text?.trim().parse().ok()
        };
        pod.cgroups().iter().find_map(read).expect("a limit")
    };
    let own = pod.task.template.containers[0].limits.memory.0;
    assert_eq!(limit(&pod), own);
    let held: u64 = 96 << 20;
    gpu.words(&format!("0.hold={held} 0.pid={app} cuda.checkpoint.hang=1"));
    agent.order(&Order::Save { level: 1, hold: false });
    gpu.begun("checkpoint");
    assert!(limit(&pod) >= own + held, "{}", limit(&pod));
    gpu.words(&format!("0.hold={held} 0.pid={app}"));
    assert_eq!(saving_ended(&mut agent).unwrap().devices.unwrap().bytes, Bytes(held));
    counts_on(&pod);
    wait_for("the limit of before", || limit(&pod) == own);

    // Of a process that NVML does not list, all that is in use may be its own.
    gpu.words(&format!("0.used={}", 1_u64 << 50));
    gpu.calls();
    let why = saved(&mut agent, 2, false).unwrap_err();
    assert!(why.contains("the node's memory must take in ") && why.contains("checkpoint.signal"), "{why}");
    assert_eq!(gpu.calls(), ["init"]);
    counts_on(&pod);
    end(pod, agent);
}

#[test]
fn memory_that_never_comes_back_ends_the_pod_as_an_eviction() {
    let Some(criu) = criu() else { return };
    let gpu = Gpu::new();
    let mut pod = gpu.pod(&criu, APP);
    let mut agent = started(&mut pod);
    gpu.words("cuda.unlock=801");
    saved(&mut agent, 1, false).unwrap();
    let outcome = agent.exited().outcome;
    assert_eq!((outcome.cause, outcome.reason.as_deref()), (Cause::Eviction, Some("DeviceMemoryLost")));
    let told = "cuCheckpointProcessUnlock with CUDA_ERROR_NOT_SUPPORTED";
    assert!(outcome.message.as_deref().is_some_and(|text| text.contains(told)), "{outcome:?}");
    pod.wait();
    assert!(pod.dir.join(file::CHECKPOINTS_DIR).join("1").exists(), "what was saved is there");
}

/// A pod that was saved and has ended, and its next epoch, which is to begin from that.
fn on_its_way(gpu: &Gpu, criu: &Path) -> (Pod, Pod) {
    let mut first = gpu.pod(criu, APP);
    let mut agent = started(&mut first);
    let second = departed(&mut first, &mut agent);
    gpu.calls();
    (first, second)
}

#[test]
fn a_start_whose_memory_does_not_come_back_has_failed() {
    let Some(criu) = criu() else { return };
    let gpu = Gpu::new();
    for (words, expect) in [
        ("cuda.restore=801", "bringing back the memory of process"),
        ("cuda.thread=1", "knows 0 of the 1 processes"),
        ("cuda.failed=1", "NVIDIA's driver has given up process"),
    ] {
        let (_first, mut second) = on_its_way(&gpu, &criu);
        gpu.words(words);
        let outcome = second.start().exited().outcome;
        assert_eq!(
            (outcome.cause, outcome.reason.as_deref()),
            (Cause::Eviction, Some(RESTORE_FAILED)),
            "{outcome:?}"
        );
        assert!(outcome.message.as_deref().is_some_and(|text| text.contains(expect)), "{outcome:?}");
        second.wait();
        gpu.words("");
    }
}

#[test]
fn a_helper_that_is_killed_where_the_pod_goes_on_is_replaced() {
    let Some(criu) = criu() else { return };
    let gpu = Gpu::new();
    for call in ["init", "restore", "unlock"] {
        let (first, mut second) = on_its_way(&gpu, &criu);
        gpu.words(&format!("cuda.{call}.hang=1"));
        let mut agent = second.start();
        gpu.begun(call);
        let [helper] = helpers(&second)[..] else { panic!("one helper is to be there") };
        kill_hard(helper);
        gpu.words("");
        agent.running();
        counts_on(&second);
        agent.order(&Order::Stop { grace: Millis::ZERO });
        agent.exited();
        assert_counts(&(first.output() + &second.output()));
        second.wait();
    }
}

#[test]
fn the_program_says_what_the_driver_can() {
    let gpu = Gpu::new();
    let check = || {
        let program = env!("CARGO_BIN_EXE_berth-agent");
        let output = Command::new(program)
            .args(["cuda", "check"])
            .env("LD_LIBRARY_PATH", gpu.path())
            .output()
            .unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
        assert_eq!(output.status.signal(), None);
        (output.status.success(), text(&output.stdout), text(&output.stderr))
    };
    assert_eq!(check(), (true, "13.0".to_owned(), String::new()));
    assert_eq!(gpu.calls(), [""; 0], "no device is woken");
    let doctor = || {
        let program = env!("CARGO_BIN_EXE_berth-agent");
        let output =
            Command::new(program).args(["doctor", "--dev"]).env("LD_LIBRARY_PATH", gpu.path()).output();
        let text = String::from_utf8(output.unwrap().stdout).unwrap();
        text.lines().find(|line| line.contains("memory of GPUs")).unwrap().to_owned()
    };
    assert_eq!(doctor(), "ok       memory of GPUs: saved by NVIDIA's driver, CUDA 13.0");
    gpu.words("cuda.version=12040");
    let (works, _, why) = check();
    assert!(!works && why.contains("knows CUDA 12.4") && why.contains("driver 580"), "{why}");
    fs::remove_file(gpu.path().join("libcuda.so.1")).unwrap();
    let (works, _, why) = check();
    assert!(!works && why.contains("install the libraries of NVIDIA's driver"), "{why}");
}

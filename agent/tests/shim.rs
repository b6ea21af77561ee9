//! The real shim, driven as the agent drives it: by task file and socket. Needs root, and busybox in /bin.

#[allow(dead_code, reason = "each test binary uses its own part")]
#[path = "shim/world.rs"]
mod world;

use std::fs;
use std::time::Instant;

use berth_agent::shim;
use berth_agent::task::{ImageProcess, Order, Report, Root, file};
use berth_protocol::ids::ContainerName;
use berth_protocol::pod::Cause;
use berth_protocol::units::{Bytes, Millis};
use world::*;

/// Layers with a static busybox: the lower one has it, the upper one a file and a whiteout.
fn busybox(dir: &std::path::Path) -> Root {
    use std::os::unix::fs::PermissionsExt;
    let (lower, upper) = (dir.join("lower"), dir.join("upper"));
    for path in [lower.join("bin"), lower.join("etc"), upper.join("srv")] {
        fs::create_dir_all(path).unwrap();
    }
    fs::copy("/bin/busybox", lower.join("bin/busybox")).unwrap();
    for name in ["sh", "cat", "id", "echo", "ls", "pwd", "touch", "sleep", "env"] {
        std::os::unix::fs::symlink("busybox", lower.join("bin").join(name)).unwrap();
    }
    fs::write(lower.join("etc/passwd"), "root:x:0:0::/root:/bin/sh\nada:x:1000:1001::/home/ada:/bin/sh\n")
        .unwrap();
    fs::write(lower.join("etc/group"), "ada:x:1001:\naudio:x:29:ada\n").unwrap();
    std::os::unix::fs::symlink("/nowhere/resolv.conf", lower.join("etc/resolv.conf")).unwrap();
    fs::write(lower.join("gone"), "").unwrap();
    fs::write(upper.join("srv/data"), "from the upper layer\n").unwrap();
    let whiteout = upper.join("gone");
    let made = std::process::Command::new("mknod").arg(&whiteout).args(["c", "0", "0"]).status().unwrap();
    assert!(made.success());
    for layer in [&lower, &upper] {
        fs::set_permissions(layer, fs::Permissions::from_mode(0o755)).unwrap();
    }
    let config = ImageProcess {
        entrypoint: vec!["sh".to_owned(), "-c".to_owned()],
        cmd: vec!["echo by default".to_owned()],
        env: vec!["FROM=image".to_owned()],
        working_dir: Some("/work/here".to_owned()),
        user: Some("ada".to_owned()),
        stop_signal: Some("SIGUSR1".to_owned()),
    };
    Root::Image { layers: vec![lower, upper], config }
}

fn image_pod(tmp: &tempfile::TempDir, args: &[&str]) -> Pod {
    let mut pod = Pod::of(Vec::new());
    pod.main().args = args.iter().map(|s| (*s).to_owned()).collect();
    pod.task.roots = vec![busybox(tmp.path())];
    pod
}

#[test]
fn a_host_image_runs_and_leaves_nothing() {
    let mut pod = Pod::new("echo out; echo err >&2; touch /only-here; hostname; cat /run/berth/pod.json");
    let output = pod.succeed();
    assert!(output.contains("out\n") && output.contains("err\n"), "{output}");
    assert!(output.contains(&format!("digits-{}\n", pod.task.pod.index)), "{output}");
    let facts = output.lines().find(|line| line.starts_with('{')).unwrap();
    let facts: serde_json::Value = serde_json::from_str(facts).unwrap();
    let expect = serde_json::json!({
        "namespace": "default", "job": "digits", "pod": format!("digits-{}", pod.task.pod.index),
        "index": pod.task.pod.index, "epoch": 1, "run": 1, "restarts": 0, "node": "node-1", "addresses": [],
        "checkpointDir": "/run/berth/checkpoint", "userNamespace": false,
    });
    assert_eq!(facts, expect);
    assert!(!std::path::Path::new("/only-here").exists());
    pod.assert_clean();
}

#[test]
fn layers_users_and_the_images_defaults() {
    let tmp = tempfile::tempdir().unwrap();
    assert_eq!(image_pod(&tmp, &[]).succeed(), "by default\n");
    let tmp = tempfile::tempdir().unwrap();
    let script = "id; pwd; echo $FROM $HOME; cat /srv/data; ls /gone; cat /etc/resolv.conf; touch mine";
    let mut pod = image_pod(&tmp, &[script]);
    let output = pod.succeed();
    let expect = "uid=1000(ada) gid=1001(ada) groups=29(audio)\n/work/here\nimage /home/ada\n\
                  from the upper layer\n";
    assert!(output.starts_with(expect), "{output}");
    assert!(output.contains("/gone: No such file"), "{output}");
    pod.assert_clean();
}

#[test]
fn exit_codes_signals_and_commands_that_are_none() {
    for (command, code, reason) in [
        (shell("exit 7"), Some(7), Some("Error")),
        (shell("kill -KILL $$"), Some(137), Some("Signaled")),
        (vec!["nonesuch".to_owned()], Some(127), Some("CommandNotFound")),
        (vec!["/nonesuch/x".to_owned()], Some(127), Some("CommandNotFound")),
        (vec!["/etc/passwd".to_owned()], Some(126), Some("CommandNotExecutable")),
        (shell("true"), Some(0), None),
    ] {
        let mut pod = Pod::of(command.clone());
        let exit = pod.run();
        assert_eq!(exit.outcome.exit_code, code, "{command:?} {exit:?}");
        assert_eq!(exit.outcome.reason.as_deref(), reason, "{command:?} {exit:?}");
        pod.assert_clean();
    }
}

#[test]
fn what_cannot_be_made_says_why() {
    let mut pod = Pod::new("true");
    pod.main().user = Some("nobody-such".to_owned());
    let outcome = pod.run().outcome;
    assert_eq!((outcome.reason.as_deref(), outcome.exit_code), (Some("UserNotFound"), None));
    pod.assert_clean();
    let mut pod = Pod::new("true");
    pod.task.roots =
        vec![Root::Image { layers: vec!["/nonesuch/layer".into()], config: ImageProcess::default() }];
    let outcome = pod.run().outcome;
    assert_eq!(outcome.reason.as_deref(), Some("ImageMissing"), "{outcome:?}");
    pod.assert_clean();
}

#[test]
fn two_hundred_that_end_at_once_are_all_seen() {
    for n in 0..200 {
        let mut pod = Pod::of(vec!["/bin/true".to_owned()]);
        let exit = pod.run();
        assert_eq!(exit.outcome.exit_code, Some(0), "{n}: {exit:?}");
    }
}

#[test]
fn too_much_memory_is_told_apart_from_a_failure() {
    let mut pod = Pod::new("x=$(head -c 200000000 /dev/zero | tr '\\0' x); echo ${#x}");
    let exit = pod.run();
    assert_eq!(exit.outcome.reason.as_deref(), Some("OOMKilled"), "{exit:?} {}", pod.output());
    assert!(exit.containers[0].oom_killed);
    assert_eq!(exit.outcome.cause, Cause::Failure);
}

#[test]
fn a_stop_gives_grace_and_then_kills() {
    let mut pod = Pod::new("trap 'echo saved; exit 9' TERM; echo up; while :; do sleep 0.01; done");
    let mut agent = pod.start();
    wait_for("output", || pod.output().contains("up"));
    agent.order(&Order::Stop { grace: Millis(10_000) });
    let exit = agent.exited();
    assert_eq!((exit.outcome.exit_code, exit.outcome.cause), (Some(9), Cause::Eviction));
    assert!(pod.output().contains("saved"));
    pod.wait();

    let mut pod = Pod::new("trap '' TERM; echo up; while :; do sleep 0.01; done");
    let mut agent = pod.start();
    wait_for("output", || pod.output().contains("up"));
    let begun = Instant::now();
    agent.order(&Order::Stop { grace: Millis(300) });
    let exit = agent.exited();
    assert_eq!((exit.outcome.exit_code, exit.outcome.cause), (Some(137), Cause::Eviction));
    let took = begun.elapsed().as_millis();
    assert!((300..2000).contains(&took), "{took} ms");
    pod.wait();
    pod.assert_clean();
}

#[test]
fn it_stands_still_at_its_deadline_and_goes_on_when_renewed() {
    let mut pod = Pod::new("i=0; while :; do i=$((i+1)); echo $i; sleep 0.005; done");
    let mut agent = pod.start_under(lease(400));
    agent.running();
    assert!(agent.paused());
    let frozen = pod.output();
    assert!(!frozen.is_empty());
    // Nothing may come any more: a busy writer would within this time.
    let begun = Instant::now();
    while begun.elapsed().as_millis() < 100 {
        assert_eq!(pod.output().len(), frozen.len());
    }
    // The user's wish does not lift the fence.
    agent.order(&Order::Pause { pause: false });
    let mut second = pod.connect();
    assert!(second.paused());
    agent.order(&Order::Renew { lease: lease(60_000) });
    agent.running();
    wait_for("more output", || pod.output().len() > frozen.len());
    agent.order(&Order::Pause { pause: true });
    assert!(!agent.paused());
    agent.order(&Order::Stop { grace: Millis(5000) });
    assert_eq!(agent.exited().outcome.cause, Cause::Eviction);
    pod.wait();
}

#[test]
fn with_stop_on_disconnect_it_ends_at_its_deadline() {
    let mut pod = Pod::new("echo up; sleep 100");
    pod.task.template.on_disconnect.action = berth_protocol::job::DisconnectAction::Stop;
    let mut agent = pod.start_under(lease(300));
    let outcome = agent.exited().outcome;
    assert_eq!((outcome.cause, outcome.reason.as_deref()), (Cause::Eviction, Some("LeaseExpired")));
    pod.wait();
}

#[test]
fn a_dead_shim_takes_its_pod_along() {
    for fenced in [false, true] {
        let mut pod = Pod::new("echo up; (trap '' TERM HUP; setsid sleep 1000 & sleep 1000)");
        let mut agent = pod.start_under(if fenced { lease(300) } else { lease(60_000) });
        wait_for("output", || pod.output().contains("up"));
        if fenced {
            assert!(agent.paused());
        }
        let parent = pod.task.cgroup_parent.clone();
        let mine = (pod.task.pod.clone(), pod.task.epoch);
        assert!(shim::scan(&parent).unwrap().contains(&mine));
        pod.kill_shim();
        if !fenced {
            wait_for("the pod's end", || !shim::scan(&parent).unwrap().contains(&mine));
        }
        assert_eq!(pod.exit_file(), None);
        shim::clean_up(&pod.task, &pod.dir).unwrap();
        assert!(!shim::scan(&parent).unwrap().contains(&mine));
        pod.assert_clean();
    }
}

#[test]
fn a_shim_that_hangs_is_ended_with_its_pod() {
    let mut pod = Pod::new("echo up; sleep 1000");
    let _agent = pod.start();
    wait_for("output", || pod.output().contains("up"));
    let pid = nix::unistd::Pid::from_raw(pod.shim_pid());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGSTOP).unwrap();
    shim::clean_up(&pod.task, &pod.dir).unwrap();
    pod.kill_shim();
    assert_eq!(pod.exit_file(), None);
    pod.assert_clean();
}

#[test]
fn agents_come_and_go() {
    let mut pod = Pod::new(
        "read line < /run/berth/go || true; while [ ! -e /run/berth/go ]; do sleep 0.01; done; echo done",
    );
    drop(pod.start());
    let mut first = pod.connect();
    first.running();
    let mut second = pod.connect();
    second.running();
    drop(first);
    fs::write(pod.run_berth("go"), "").unwrap();
    assert_eq!(second.exited().outcome.cause, Cause::Success);
    pod.wait();
}

#[test]
fn not_started_it_can_be_stopped_and_never_ran() {
    let mut pod = Pod::new("echo ran");
    pod.spawn();
    let mut agent = pod.connect();
    assert!(matches!(agent.report(), Report::Created { .. }));
    agent.order(&Order::Renew { lease: lease(60_000) });
    agent.order(&Order::Stop { grace: Millis(1000) });
    let outcome = agent.exited().outcome;
    assert_eq!((outcome.exit_code, outcome.cause, outcome.started_at), (None, Cause::Eviction, None));
    assert_eq!(pod.output(), "");
    pod.wait();
    pod.assert_clean();
}

#[test]
fn the_log_is_whole_and_bounded() {
    let mut pod = Pod::new("i=0; while [ $i -lt 20000 ]; do i=$((i+1)); echo line $i; done; printf 'no end'");
    let output = pod.succeed();
    let expect: String = (1..=20_000).map(|i| format!("line {i}\n")).chain(["no end".to_owned()]).collect();
    assert_eq!(output, expect);

    let mut pod = Pod::new("head -c 5000000 /dev/zero | tr '\\0' x | fold -w 99");
    pod.task.log_bytes_max = Bytes(1 << 20);
    pod.succeed();
    let bytes: u64 =
        fs::read_dir(pod.dir.join("log")).unwrap().map(|e| e.unwrap().metadata().unwrap().len()).sum();
    assert!(bytes <= 1 << 20, "{bytes}");
    // A second run goes on where the first has ended.
    let last = pod.exit_file().unwrap().outcome.log_records;
    pod.task.run = pod.task.run.next();
    *pod.main() = container("main", shell("echo again"));
    assert_eq!(pod.run().outcome.log_records, last + 1);
}

#[test]
fn it_is_confined() {
    let script = "exec 2>&1; grep -E '^(CapEff|CapBnd|NoNewPrivs|Seccomp|SigBlk|SigIgn):' /proc/self/status; \
        cat /proc/kcore | head -c 1; ls -l /proc/self/fd | wc -l; ls /dev; \
        unshare -U true || echo no user namespace; mount -t tmpfs x /mnt || echo no mount; \
        echo 1 > /proc/sys/kernel/panic || echo no sysctl; cat /dev/kmsg || echo no kmsg; \
        ulimit -n; cat /proc/1/comm; ls /proc | grep -c '^[0-9]'; cat /proc/self/oom_score_adj; \
        cat /proc/self/cgroup; touch /sys/fs/cgroup/x || echo no cgroup; mkdir /sys/fs/cgroup/memory/x || echo no group; readlink /proc/self/ns/time; \
        mknod /dev/vda b 254 0 && cat /dev/vda || echo no disk";
    let mut pod = Pod::new(script);
    let output = pod.succeed();
    println!("{output}");
    for line in [
        "CapEff:\t00000000a80425fb",
        "CapBnd:\t00000000a80425fb",
        "NoNewPrivs:\t1",
        "Seccomp:\t2",
        "SigBlk:\t0000000000000000",
        "no user namespace",
        "no mount",
        "no sysctl",
        "no cgroup",
        "no group",
        "no disk",
        "berth-init",
    ] {
        assert!(output.lines().any(|l| l == line), "{line}\n{output}");
    }
    // 32 and 33 are the C library's own, and cannot be reset through it.
    let ignored = output.lines().find_map(|l| l.strip_prefix("SigIgn:\t")).unwrap();
    assert_eq!(u64::from_str_radix(ignored, 16).unwrap() & 0x7fff_ffff, 0);
    let own = fs::read_link("/proc/self/ns/time").unwrap();
    assert!(!output.contains(own.to_str().unwrap()));
}

#[test]
fn volumes_and_the_workspace() {
    use berth_protocol::job::{Volume, VolumeSource, Workspace};
    let tmp = tempfile::tempdir().unwrap();
    let (host, workspace) = (tmp.path().join("host"), tmp.path().join("workspace"));
    for dir in [&host, &workspace] {
        fs::create_dir(dir).unwrap();
    }
    fs::write(workspace.join("train.py"), "print()\n").unwrap();
    let volume =
        |mount: &str, source, read_only| Volume { mount: mount.to_owned(), source, read_only, save: false };
    let script = "exec 2>&1; echo kept > /data/kept; echo x > /fixed/x || echo no write; cat /fixed/kept; \
        head -c 3000000 /dev/zero > /scratch/small || echo full; head -c 3000000 /dev/zero > /scratch/large/x && echo fits; \
        cd /work && cat train.py && echo changed > train.py && cat train.py; ls -d /scratch";
    let mut pod = Pod::new(script);
    pod.task.template.volumes = vec![
        volume("/scratch/large", VolumeSource::Scratch(Bytes(1 << 30)), false),
        volume("/scratch", VolumeSource::Scratch(Bytes(1 << 20)), false),
        volume("/data", VolumeSource::Host(host.display().to_string()), false),
        volume("/fixed", VolumeSource::Host(host.display().to_string()), true),
    ];
    pod.task.volumes = vec![None, None, Some(host.clone()), Some(host.clone())];
    let digest = berth_protocol::ids::Digest::of(b"");
    pod.task.template.workspace = Some(Workspace { digest, bytes: Bytes(1), path: "/work".to_owned() });
    pod.task.workspace = Some(workspace.clone());
    let output = pod.succeed();
    for part in ["no write", "kept", "full", "fits", "print()\nchanged\n"] {
        assert!(output.contains(part), "{part}\n{output}");
    }
    assert_eq!(fs::read_to_string(host.join("kept")).unwrap(), "kept\n");
    assert_eq!(fs::read_to_string(workspace.join("train.py")).unwrap(), "print()\n");
    pod.assert_clean();

    let mut pod = Pod::new("true");
    pod.task.template.volumes = vec![volume("/data", VolumeSource::Host("/nonesuch".to_owned()), false)];
    pod.task.volumes = vec![Some("/nonesuch".into())];
    assert_eq!(pod.run().outcome.reason.as_deref(), Some("VolumeMissing"));
    pod.assert_clean();
}

#[test]
fn what_grows_beyond_its_bound_ends_the_pod() {
    use berth_protocol::job::{Volume, VolumeSource};
    let mut pod = Pod::new("head -c 90M /dev/zero > /scratch/x; sleep 1000");
    let source = VolumeSource::Scratch(Bytes(80 << 20));
    pod.task.template.volumes =
        vec![Volume { mount: "/scratch".to_owned(), source, read_only: false, save: false }];
    pod.task.template.grace = Millis(0);
    pod.task.volumes = vec![None];
    let outcome = pod.run().outcome;
    assert_eq!(outcome.reason.as_deref(), Some("ScratchFull"), "{outcome:?}");
    assert_eq!(outcome.cause, Cause::Failure);
    pod.assert_clean();
}

#[test]
fn an_image_is_stopped_by_the_signal_that_it_names() {
    let tmp = tempfile::tempdir().unwrap();
    let script = "trap 'echo told; exit 0' USR1; echo ready; while :; do sleep 0.01; done";
    let mut pod = image_pod(&tmp, &[script]);
    pod.main().command = vec!["sh".to_owned(), "-c".to_owned()];
    let mut agent = pod.start();
    wait_for("the trap", || pod.output().contains("ready"));
    agent.order(&Order::Stop { grace: Millis(60_000) });
    agent.exited();
    pod.wait();
    assert!(pod.output().contains("told"), "{}", pod.output());
    pod.assert_clean();
}

#[test]
fn containers_share_a_pod_and_its_end() {
    let mut pod = Pod::new(
        "exec 2>&1; hostname; while ! busybox nc 127.0.0.1 7000 </dev/null; do sleep 0.01; done; exit 4",
    );
    let mut other = container(
        "side",
        shell(
            "trap 'echo told; exit 0' TERM; hostname; busybox nc -l -p 7000 -e /bin/echo hi; while :; do sleep 0.01; done",
        ),
    );
    other.limits.memory = Bytes(48 << 20);
    pod.task.template.containers.push(other);
    pod.task.roots.push(Root::Host);
    let exit = pod.run();
    let output = pod.output();
    assert_eq!((exit.outcome.exit_code, exit.outcome.cause), (Some(4), Cause::Failure), "{output}");
    assert_eq!(exit.containers.len(), 2);
    assert!(output.contains("told") && output.contains("hi\n"), "{output}");
    pod.assert_clean();
}

#[test]
fn no_containers_name_is_one_of_the_pods_own_files() {
    let mut pod = Pod::new("ls /run/berth; cat /etc/hostname");
    pod.main().name = ContainerName::parse("berth").unwrap();
    for name in ["etc", "state", "netns"] {
        pod.task.template.containers.push(container(name, shell("true")));
        pod.task.roots.push(Root::Host);
    }
    let output = pod.succeed();
    assert!(output.starts_with("checkpoint\npod.json\n"), "{output}");
    pod.assert_clean();
}

#[test]
fn a_granted_device_is_there_and_no_other() {
    let mut pod = Pod::new(
        "exec 2>&1; ls /dev/loop-control /dev/vda; head -c 0 /dev/loop-control && echo readable; echo $GPU",
    );
    pod.task.devices = vec![berth_agent::task::DeviceGrant {
        uuid: "GPU-1".to_owned(),
        cdi: None,
        nodes: vec!["/dev/loop-control".into()],
        files: Vec::new(),
        env: vec!["GPU=1".to_owned()],
    }];
    let output = pod.succeed();
    assert!(output.contains("/dev/loop-control\n") && output.contains("readable\n1\n"), "{output}");
    assert!(output.contains("'/dev/vda': No such file"), "{output}");
}

#[test]
fn what_was_written_stays_for_outputs() {
    use berth_agent::shim::rootfs::{self, Home};
    let mut pod = Pod::new("mkdir -p /srv/model && echo weights > /srv/model/w");
    pod.task.template.outputs = vec!["/srv/model".to_owned()];
    pod.succeed();
    let home = Home::new(&pod.dir, &pod.task.template.containers[0].name);
    let at = pod.dir.join("result");
    rootfs::mount_result(&Root::Host, &home, &at).unwrap();
    assert_eq!(fs::read_to_string(at.join("srv/model/w")).unwrap(), "weights\n");
    assert!(fs::write(at.join("srv/model/w"), "x").is_err());
    rootfs::unmount(&at).unwrap();
    fs::remove_dir(&at).unwrap();
    shim::clean_up(&pod.task, &pod.dir).unwrap();
    assert!(
        pod.dir.join(file::ROOT_DIR).exists(),
        "an agent that began later does not take them away either"
    );
    fs::remove_dir_all(pod.dir.join(file::ROOT_DIR)).unwrap();
    pod.assert_clean();
}

#[test]
fn limits_reach_the_kernel() {
    let v2 = std::path::Path::new("/sys/fs/cgroup/cgroup.controllers").exists();
    let (files, expect) = match v2 {
        true => ("memory.max memory.swap.max memory.high cpu.max", "67108864\n0\n63750144\n200000 100000\n"),
        false => ("memory/memory.limit_in_bytes cpu/cpu.cfs_quota_us", "67108864\n200000\n"),
    };
    assert_eq!(Pod::new(&format!("cd /sys/fs/cgroup; cat {files}")).succeed(), expect);
}

#[test]
fn processes_are_bounded_and_roots_can_be_read_only() {
    let mut pod = Pod::new(
        "touch /x || echo no root; touch /run/berth/saved; \
         cat /sys/fs/cgroup/pids/pids.max /sys/fs/cgroup/pids.max; true",
    );
    pod.main().read_only_root = true;
    let output = pod.succeed();
    // No container may have more than a quarter of what the machine can have at all.
    let bounds = ["pid_max", "threads-max"]
        .map(|name| fs::read_to_string(format!("/proc/sys/kernel/{name}")).unwrap());
    let least = bounds.iter().map(|text| text.trim().parse::<u64>().unwrap()).min().unwrap();
    let max = (least / 4).min(32_768).to_string();
    assert!(output.lines().any(|line| line == "no root"), "{output}");
    assert!(output.lines().any(|line| line == max), "{max}\n{output}");
}

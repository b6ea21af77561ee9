//! A pod's users are its own: none of the machine's outside, the same as ever on disk. Needs root, busybox in /bin, and
//! Linux 6.3.

#[allow(dead_code, reason = "each test binary uses its own part")]
#[path = "shim/world.rs"]
mod world;

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};
use std::path::{Path, PathBuf};

use berth_agent::task::{ImageProcess, Order, Report, Root, file};
use berth_protocol::ids::{Digest, VolumeName};
use berth_protocol::job::{CheckpointMode, Network, Volume, VolumeSource, Workspace};
use berth_protocol::units::{Bytes, Millis};
use world::*;

/// A layer with a static busybox, and what a test adds.
fn layer() -> tempfile::TempDir {
    let layer = tempfile::tempdir().unwrap();
    let path = |name: &str| layer.path().join(name);
    fs::set_permissions(layer.path(), fs::Permissions::from_mode(0o755)).unwrap();
    for dir in ["bin", "etc", "home/ada", "tmp"] {
        fs::create_dir_all(path(dir)).unwrap();
    }
    fs::copy("/bin/busybox", path("bin/busybox")).unwrap();
    for name in ["sh", "cat", "id", "ls", "stat", "touch", "chown", "rm", "mkdir", "sleep", "grep"] {
        symlink("busybox", path("bin").join(name)).unwrap();
    }
    fs::write(
        path("etc/passwd"),
        "root:x:0:0::/root:/bin/sh\nada:x:1000:1000::/home/ada:/bin/sh\nfar:x:70000:1::/:\n",
    )
    .unwrap();
    fs::write(path("etc/group"), "few:x:4:ada\nmany:x:70001:ada\n").unwrap();
    fs::write(path("home/ada/given"), "").unwrap();
    chown(path("home/ada"), Some(1000), Some(1000)).unwrap();
    chown(path("home/ada/given"), Some(1000), Some(1000)).unwrap();
    layer
}

fn pod(layers: &[&Path], script: &str) -> Pod {
    let mut pod = Pod::new(script);
    let layers = layers.iter().map(|path| path.to_path_buf()).collect();
    pod.task.roots = vec![Root::Image { layers, config: ImageProcess::default() }];
    pod
}

fn volume(mount: &str, source: VolumeSource) -> Volume {
    Volume { mount: mount.to_owned(), source, read_only: false, save: false }
}

/// The real user of a process.
fn user(pid: i32) -> u32 {
    numbers(pid, "Uid:")[0]
}

/// Those beside its first one.
fn groups(pid: i32) -> Vec<u32> {
    numbers(pid, "Groups:")
}

fn numbers(pid: i32, what: &str) -> Vec<u32> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix(what)).unwrap();
    line.split_whitespace().map(|number| number.parse().unwrap()).collect()
}

fn owner(path: PathBuf) -> (u32, u32) {
    let file = fs::symlink_metadata(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    (file.uid(), file.gid())
}

const ALIVE: &str = "echo up; sleep 100";

#[test]
fn no_process_of_a_pod_is_a_user_of_the_machines() {
    let layer = layer();
    let mut pods = [pod(&[layer.path()], ALIVE), pod(&[layer.path()], ALIVE)];
    pods[1].main().user = Some("ada".to_owned());
    let mut firsts = Vec::new();
    for (pod, inside) in pods.iter_mut().zip([0, 1000]) {
        let mut agent = pod.start();
        agent.running();
        wait_for("output", || pod.output().contains("up"));
        let first = user(pod.init_pid());
        assert_eq!(user(pod.container_pid()), first + inside);
        for pid in [pod.init_pid(), pod.container_pid()] {
            // Nor have they those of whoever has started the agent.
            assert!(
                groups(pid).iter().all(|group| (first..first + 65_536).contains(group)),
                "{:?}",
                groups(pid)
            );
        }
        assert!((0x4000_0000..0x7000_0000).contains(&first) && first.is_multiple_of(65_536), "{first}");
        firsts.push(first);
    }
    assert_ne!(firsts[0], firsts[1], "pods share no numbers");
    let mut without = pod(&[layer.path()], ALIVE);
    without.task.own_users = false;
    let mut agent = without.start();
    agent.running();
    assert_eq!((user(without.container_pid()), groups(without.container_pid())), (0, Vec::new()));
}

#[test]
fn doctor_says_whether_they_can_be() {
    let dir = tempfile::tempdir().unwrap();
    let said = |data: &Path| {
        let mut doctor = std::process::Command::new(env!("CARGO_BIN_EXE_berth-agent"));
        let output = doctor.args(["doctor", "--dev", "--data-dir"]).arg(data).output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        text.lines().find(|line| line.contains("users of pods")).unwrap().to_owned()
    };
    assert!(said(dir.path()).starts_with("ok "), "{}", said(dir.path()));
    let never = said(Path::new("/proc/berth"));
    assert!(never.starts_with("missing ") && never.contains("cannot map owners"), "{never}");
}

#[test]
fn on_disk_owners_are_as_ever() {
    let (below, above, named) = (layer(), tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    fs::set_permissions(above.path(), fs::Permissions::from_mode(0o755)).unwrap();
    fs::write(above.path().join("top"), "").unwrap();
    fs::write(named.path().join("before"), "").unwrap();
    chown(named.path().join("before"), Some(7), Some(8)).unwrap();
    let script = "set -e
        stat -c '%u:%g %n' /bin /top /home/ada/given /v/named/before /run/berth /run/berth/pod.json /etc/hosts
        for dir in / /v/named /v/small /v/large /run/berth/checkpoint /work; do
            touch $dir/made; touch $dir/hers; chown 1000:1001 $dir/hers
            stat -c '%u:%g' $dir/made $dir/hers
        done
        rm /home/ada/given; rm -r /tmp; mkdir /tmp
        echo up; sleep 100";
    let workspace = tempfile::tempdir().unwrap();
    fs::write(workspace.path().join("script.py"), "").unwrap();
    let mut pod = pod(&[below.path(), above.path()], script);
    let scratch = |bytes| VolumeSource::Scratch(Bytes(bytes));
    pod.task.template.volumes = vec![
        volume("/v/named", VolumeSource::Named(VolumeName::parse("data").unwrap())),
        volume("/v/small", scratch(1 << 20)),
        volume("/v/large", scratch(1 << 30)),
    ];
    pod.task.volumes = vec![Some(named.path().to_owned()), None, None];
    let digest = Digest::parse(&format!("sha256:{}", "0".repeat(64))).unwrap();
    pod.task.template.workspace = Some(Workspace { digest, bytes: Bytes(1), path: "/work".to_owned() });
    pod.task.workspace = Some(workspace.path().to_owned());
    let mut agent = pod.start();
    agent.running();
    wait_for("output", || pod.output().contains("up\n") || pod.processes() == 0);
    let output = pod.output();
    let places = "0:0 /bin\n0:0 /top\n1000:1000 /home/ada/given\n7:8 /v/named/before\n0:0 /run/berth\n\
        0:0 /run/berth/pod.json\n0:0 /etc/hosts\n";
    assert_eq!(output, format!("{places}{}up\n", "0:0\n1000:1001\n".repeat(6)));
    let shims = PathBuf::from(format!("/proc/{}/root", pod.shim_pid()));
    let in_pod = |name: &str| shims.join(pod.dir.strip_prefix("/").unwrap()).join(name);
    let raw = [
        in_pod("root/main.upper"),
        named.path().to_owned(),
        in_pod("volumes/1"),
        in_pod("volumes/2"),
        pod.dir.join(file::CHECKPOINT_DIR),
        in_pod("root/main.workspace-upper"),
    ];
    for dir in raw {
        assert_eq!(owner(dir.join("made")), (0, 0), "{}", dir.display());
        assert_eq!(owner(dir.join("hers")), (1000, 1001), "{}", dir.display());
    }
}

#[test]
fn what_is_the_nodes_stays_the_nodes_users() {
    let (layer, given) = (layer(), tempfile::tempdir().unwrap());
    let has = |change: &dyn Fn(&mut Pod)| {
        let mut pod = pod(&[layer.path()], "cat /proc/self/uid_map");
        change(&mut pod);
        let text = pod.succeed();
        let map: Vec<u32> = text.split_whitespace().map(|word| word.parse().unwrap()).collect();
        pod.assert_clean();
        assert!(map == [0, 0, u32::MAX] || map[2] == 65_536, "{map:?}");
        map[2] == 65_536
    };
    let criu = |pod: &mut Pod, mode| {
        pod.task.criu = Some("/usr/sbin/criu".into());
        pod.task.template.checkpoint.mode = mode;
    };
    assert!(has(&|_| {}));
    assert!(
        has(&|pod| criu(pod, CheckpointMode::None)) && has(&|pod| criu(pod, CheckpointMode::Cooperative))
    );
    assert!(!has(&|pod| criu(pod, CheckpointMode::Auto)) && !has(&|pod| criu(pod, CheckpointMode::Criu)));
    assert!(!has(&|pod| pod.task.roots = vec![Root::Host]));
    assert!(!has(&|pod| pod.task.own_users = false));
    assert!(!has(&|pod| pod.task.template.network = Network::Host));
    assert!(!has(&|pod| pod.main().capabilities = ["NET_ADMIN".to_owned()].into()));
    assert!(!has(&|pod| pod.main().user = Some("1:65536".to_owned())));
    assert!(has(&|pod| pod.main().user = Some("1:65535".to_owned())));
    assert!(!has(&|pod| {
        pod.task.template.volumes =
            vec![volume("/data", VolumeSource::Host(given.path().display().to_string()))];
        pod.task.volumes = vec![Some(fs::canonicalize(given.path()).unwrap())];
    }));
}

#[test]
fn a_user_without_a_number_in_the_namespace_is_named() {
    let layer = layer();
    let mut pod = pod(&[layer.path()], "id");
    pod.main().user = Some("far".to_owned());
    let outcome = pod.run().outcome;
    assert_eq!(outcome.reason.as_deref(), Some("UserNotFound"));
    assert!(outcome.message.as_deref().unwrap().contains("user `far` is 70000:1"), "{outcome:?}");
    pod.assert_clean();
    pod.main().user = Some("70000:1".to_owned());
    pod.task.run = pod.task.run.next();
    assert!(pod.succeed().starts_with("uid=70000"), "{}", pod.output());
    // A group that he has no need of.
    pod.main().user = Some("ada".to_owned());
    pod.task.run = pod.task.run.next();
    assert!(pod.succeed().ends_with("groups=4(few)\n"), "{}", pod.output());
}

#[test]
fn what_a_program_has_saved_of_itself_goes_along_to_other_numbers() {
    let layer = layer();
    let script = "n=$(cat /state 2>/dev/null || echo 0); [ $n = 2 ] && stat -c %u /state /run/berth/checkpoint/hers && exit
        trap 'echo $((n + 1)) >/state; chown 1000 /state; touch /run/berth/checkpoint/hers
              chown 1001 /run/berth/checkpoint/hers; exit 85' USR1
        echo from $n; while :; do sleep 0.01; done";
    let mut here = pod(&[layer.path()], script);
    let policy = &mut here.task.template.checkpoint;
    policy.signal = Some("SIGUSR1".to_owned());
    policy.grace = Millis(10_000);
    let mut agent = here.start();
    agent.running();
    wait_for("its beginning", || here.output().contains("from 0\n"));
    // Here it begins anew, in the same namespace.
    assert!(saved(&mut agent, 1, false));
    wait_for("a second beginning", || here.output().contains("from 1\n"));
    assert!(saved(&mut agent, 2, true));
    agent.order(&Order::Stop { grace: Millis::ZERO });
    agent.exited();
    here.wait();
    // Somebody else's numbers.
    let mut other = pod(&[layer.path()], ALIVE);
    let mut its_agent = other.start();
    its_agent.running();
    let mut there = here.next_epoch();
    let whole = here.dir.join(file::CHECKPOINTS_DIR).join("2");
    fs::rename(whole, there.dir.join(file::RESTORE_DIR)).unwrap();
    there.task.restore = true;
    assert_eq!(there.run().outcome.exit_code, Some(0), "{}", there.output());
    assert_eq!(there.output(), "1000\n1001\n");
}

fn saved(agent: &mut Agent, level: u64, hold: bool) -> bool {
    agent.order(&Order::Save { level, hold });
    agent.until(|report| match report {
        Report::Saved { .. } => Some(true),
        Report::SaveFailed { .. } => Some(false),
        _ => None,
    })
}

#[test]
fn where_owners_cannot_be_mapped_a_pod_runs_without_numbers_of_its_own() {
    use nix::mount::{MsFlags, mount, umount};
    let layer = layer();
    let mut pod = pod(&[layer.path()], "cat /proc/self/uid_map; cat /run/berth/pod.json");
    // Until somebody teaches it to map them.
    mount(Some("none"), &pod.dir, Some("ramfs"), MsFlags::empty(), None::<&str>).unwrap();
    let exit = pod.run();
    let output = pod.output();
    umount(&pod.dir).unwrap();
    assert_eq!(exit.outcome.exit_code, Some(0), "{exit:?}");
    assert!(output.contains("4294967295") && output.contains(r#""userNamespace":false"#), "{output}");
    fs::create_dir_all(&pod.dir).unwrap();
}

#[test]
fn what_covers_a_part_of_proc_leaves_pods_without() {
    use nix::mount::{MsFlags, mount};
    use nix::sched::{CloneFlags, unshare};
    let layer = layer();
    let mut pod = pod(&[layer.path()], "cat /run/berth/pod.json");
    // As lxcfs does for the containers that it serves; here for this thread and what it starts alone.
    unshare(CloneFlags::CLONE_NEWNS).unwrap();
    let none = None::<&str>;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).unwrap();
    mount(Some("/proc/uptime"), "/proc/cpuinfo", none, MsFlags::MS_BIND, none).unwrap();
    let facts = pod.succeed();
    assert!(facts.contains(r#""userNamespace":false"#), "{facts}");
}

#[test]
fn a_volume_shows_what_is_mounted_in_it_and_keeps_its_flags() {
    use nix::mount::{MsFlags, mount, umount};
    let (layer, named) = (layer(), tempfile::tempdir().unwrap());
    let below = named.path().join("below");
    fs::create_dir(&below).unwrap();
    let none = None::<&str>;
    mount(Some("below"), &below, Some("tmpfs"), MsFlags::MS_NOEXEC, none).unwrap();
    fs::write(below.join("there"), "").unwrap();
    mount(none, &below, none, MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY | MsFlags::MS_NOEXEC, none).unwrap();
    let outputs = [true, false].map(|own_users| {
        let mut pod =
            pod(&[layer.path()], "ls /v/below; touch /v/below/made 2>&1; grep /v/below /proc/self/mountinfo");
        pod.task.own_users = own_users;
        let source = VolumeSource::Named(VolumeName::parse("data").unwrap());
        pod.task.template.volumes = vec![volume("/v", source)];
        pod.task.volumes = vec![Some(named.path().to_owned())];
        pod.run();
        pod.output()
    });
    umount(&below).unwrap();
    for output in outputs {
        assert!(output.starts_with("there\ntouch: /v/below/made: Read-only file system\n"), "{output}");
        assert!(output.contains(" ro,noexec,"), "{output}");
    }
}

//! What a job, or an image, tries against the machine that it runs on. Each test fails where its defence is taken away.
//! Needs root, and busybox in /bin.

#[allow(dead_code, reason = "each test binary uses its own part")]
#[path = "shim/world.rs"]
mod world;

use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use berth_agent::shim;
use berth_agent::task::{ImageProcess, Order, Report, Root};
use berth_protocol::ids::VolumeName;
use berth_protocol::job::{Volume, VolumeSource};
use berth_protocol::units::{Bytes, Millis};
use nix::sys::signal::Signal;
use world::*;

/// One layer, with a static busybox and what a test adds to it.
struct Image(tempfile::TempDir);

impl Image {
    fn new() -> Self {
        let image = Self(tempfile::tempdir().unwrap());
        fs::set_permissions(image.0.path(), fs::Permissions::from_mode(0o755)).unwrap();
        fs::create_dir(image.0.path().join("bin")).unwrap();
        fs::copy("/bin/busybox", image.0.path().join("bin/busybox")).unwrap();
        for name in ["sh", "cat", "head", "ls", "ln", "mkfifo", "mknod", "readlink", "sleep"] {
            symlink("busybox", image.0.path().join("bin").join(name)).unwrap();
        }
        image
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Without users of its own, as one that CRIU may have to bring back: that they are others than the machine's is a
    /// defence of its own, and hides whether the others stand.
    fn pod(&self, script: &str) -> Pod {
        let mut pod = self.pod_with_users(script);
        pod.task.criu = Some("/nonexistent/criu".into());
        pod
    }

    fn pod_with_users(&self, script: &str) -> Pod {
        let mut pod = Pod::of(vec!["/bin/sh".to_owned(), "-c".to_owned(), script.to_owned()]);
        pod.task.roots =
            vec![Root::Image { layers: vec![self.0.path().to_owned()], config: ImageProcess::default() }];
        pod
    }

    fn both(&self, script: &str) -> [Pod; 2] {
        [self.pod(script), self.pod_with_users(script)]
    }
}

/// A directory of the host's that no pod is given, and what was in it at the beginning.
struct Outside(tempfile::TempDir);

impl Outside {
    fn new() -> Self {
        let outside = Self(tempfile::tempdir().unwrap());
        // libcontainer takes such a file away before it makes its own.
        fs::write(outside.0.path().join("ptmx"), "the host's").unwrap();
        outside
    }

    fn assert_untouched(&self, what: &str) {
        let names: Vec<_> =
            fs::read_dir(self.0.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(names, ["ptmx"], "{what}");
        assert_eq!(fs::read_to_string(self.0.path().join("ptmx")).unwrap(), "the host's", "{what}");
    }
}

fn volume(mount: &str, source: VolumeSource) -> Volume {
    Volume { mount: mount.to_owned(), source, read_only: false, save: false }
}

#[test]
fn an_image_whose_directories_are_links_writes_nothing_on_the_host() {
    for name in ["dev", "proc", "sys", "run", "etc", "tmp", "run/berth", "dev/pts", "etc/hosts"] {
        let (image, outside) = (Image::new(), Outside::new());
        fs::create_dir_all(image.path(name).parent().unwrap()).unwrap();
        symlink(outside.0.path(), image.path(name)).unwrap();
        if name != "tmp" {
            // The link leads somewhere in the image as well.
            fs::create_dir_all(image.path(outside.0.path().strip_prefix("/").unwrap().to_str().unwrap()))
                .unwrap();
        }
        let script = "echo 1 >/dev/null && [ -c /dev/null ] && [ -e /proc/self/status ] && echo whole";
        for mut pod in image.both(script) {
            let exit = pod.run();
            outside.assert_untouched(name);
            // What is the kernel's or berth's is there whatever the image says of it.
            if ["dev", "proc", "sys", "etc/hosts"].contains(&name) {
                assert_eq!(pod.output(), "whole\n", "{name}: {exit:?}");
            }
            pod.assert_clean();
        }
    }
}

#[test]
fn no_volume_is_mounted_over_the_root_or_what_is_the_kernels() {
    let (image, outside, named) = (Image::new(), Outside::new(), tempfile::tempdir().unwrap());
    // What a run before has left in its volume: were it the root, libcontainer would make devices beyond the link.
    symlink(outside.0.path(), named.path().join("dev")).unwrap();
    symlink("/", named.path().join("top")).unwrap();
    for (link, to) in [("top", "/"), ("up", "../../.."), ("kernel", "/proc")] {
        symlink(to, image.path(link)).unwrap();
    }
    let source = || VolumeSource::Named(VolumeName::parse("data").unwrap());
    for mounts in [&["/top"][..], &["/up"], &["/kernel"], &["/data", "/data/top"]] {
        for mut pod in image.both("ls /") {
            pod.task.template.volumes = mounts.iter().map(|mount| volume(mount, source())).collect();
            pod.task.volumes = vec![Some(named.path().to_owned()); mounts.len()];
            let outcome = pod.run().outcome;
            outside.assert_untouched(mounts[0]);
            assert_eq!(outcome.reason.as_deref(), Some("MountForbidden"), "{mounts:?}: {outcome:?}");
            pod.assert_clean();
        }
    }
}

#[test]
fn a_hosts_path_that_was_allowed_is_not_exchanged_for_another() {
    let (shared, secret) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    fs::write(secret.path().join("secret"), "the host's\n").unwrap();
    let (mine, moved) = (shared.path().join("mine"), shared.path().join("moved"));
    fs::create_dir(&mine).unwrap();
    let given = |pod: &mut Pod| {
        let source = VolumeSource::Host(mine.display().to_string());
        pod.task.template.volumes = vec![volume("/data", source)];
        pod.task.volumes = vec![Some(mine.clone())];
    };
    let mut pod = Pod::new("cat /data/secret; ls -A /data; echo nothing >/data/made");
    given(&mut pod);
    assert_eq!(pod.run().outcome.exit_code, Some(0), "{}", pod.output());
    assert!(mine.join("made").exists(), "as long as nobody has touched it");
    pod.assert_clean();
    // Another pod may write beside it; and the daemon does not look again before each run.
    fs::rename(&mine, &moved).unwrap();
    symlink(secret.path(), &mine).unwrap();
    pod.task.run = pod.task.run.next();
    let outcome = pod.run().outcome;
    assert!(!pod.output().contains("the host's"));
    assert_eq!(outcome.reason.as_deref(), Some("VolumeForbidden"), "{outcome:?}");
    pod.assert_clean();
}

#[test]
fn no_descriptor_leads_out() {
    let secret = tempfile::tempdir().unwrap();
    fs::write(secret.path().join("secret"), "the host's\n").unwrap();
    // Whoever starts the shim has left it a directory of the host's.
    let leaked = File::open(secret.path()).unwrap();
    // SAFETY: the descriptor is open.
    assert_eq!(unsafe { libc::fcntl(leaked.as_raw_fd(), libc::F_SETFD, 0) }, 0);
    let leaked = leaked.as_raw_fd();
    let image = Image::new();
    let script = "for fd in /proc/self/fd/*; do readlink $fd; cat $fd/secret; done 2>/dev/null; true";
    for mut pod in image.both(script) {
        let output = pod.succeed();
        // Standard streams, and for a moment the list itself.
        let known = |line: &str| ["/dev/null", "pipe:", "/proc/"].iter().any(|part| line.starts_with(part));
        assert!(output.lines().all(known), "{output}");
    }
    let scripts = (3..24).chain([leaked]).map(|fd| (fd, image.both("cat secret; ls -A; cat ../secret")));
    for (fd, mut pod) in scripts.flat_map(|(fd, pods)| pods.map(|pod| (fd, pod))) {
        pod.main().working_dir = Some(format!("/proc/self/fd/{fd}"));
        let exit = pod.run();
        assert_ne!(exit.outcome.exit_code, Some(0), "{fd}: {}", pod.output());
        assert!(
            !pod.output().contains("secret\n") && !pod.output().contains("the host's"),
            "{fd}: {}",
            pod.output()
        );
    }
    // Nor has the pod's init kept it.
    let mut pod = Pod::new("echo up; sleep 100");
    let _agent = pod.start();
    wait_for("output", || pod.output().contains("up"));
    let open: Vec<_> = fs::read_dir(format!("/proc/{}/fd", pod.init_pid())).unwrap().flatten().collect();
    assert_eq!(open.len(), 2, "{open:?}");
}

/// Does the link to a process's program lead to where root may change it? Its content cannot be written as long as it
/// runs, so its mode is tried.
fn program_can_be_changed(pid: i32) -> bool {
    let program = format!("/proc/{pid}/exe");
    let same = fs::metadata(&program).unwrap().permissions();
    let refused = fs::set_permissions(&program, same);
    !matches!(refused, Err(e) if e.kind() == io::ErrorKind::ReadOnlyFilesystem)
}

#[test]
fn nobody_writes_to_the_program_that_makes_containers() {
    // `/proc/self/exe` is berth-agent for whoever is to become the container's program. It waits for somebody who writes.
    let dir = tempfile::tempdir().unwrap();
    nix::unistd::mkfifo(&dir.path().join("pipe"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    let mut pod = Pod::of(["/proc/self/exe", "unpack", "/v/pipe", "/v/to"].map(str::to_owned).into());
    pod.task.template.volumes = vec![volume("/v", VolumeSource::Host(dir.path().display().to_string()))];
    pod.task.volumes = vec![Some(fs::canonicalize(dir.path()).unwrap())];
    let mut agent = pod.start();
    agent.running();
    wait_for("its first step", || dir.path().join("to").exists());
    let of_container = pod.container_pid();
    let command = fs::read_to_string(format!("/proc/{of_container}/cmdline")).unwrap();
    assert!(command.starts_with("/proc/self/exe\0unpack"), "{command}");
    for pid in [pod.shim_pid(), pod.init_pid(), of_container] {
        assert!(!program_can_be_changed(pid), "{pid}");
    }
    agent.order(&Order::Stop { grace: Millis(0) });
    agent.exited();
    pod.wait();
}

#[test]
fn the_pods_init_is_of_no_use_to_its_programs() {
    let look = "exec 2>&1; ls -A /proc/1/root/ && echo root; cat /proc/1/root/etc/passwd; readlink /proc/1/fd/*; \
        grep -E '^(CapPrm|CapEff|NoNewPrivs|Seccomp):' /proc/1/status; true";
    // Without the right to look into other processes, and with it.
    let output = Pod::new(look).succeed();
    assert!(output.starts_with("ls: cannot access '/proc/1/root/': Permission denied\n"), "{output}");
    let mut pod = Pod::new(look);
    pod.main().capabilities.insert("SYS_PTRACE".to_owned());
    let output = pod.succeed();
    let expect = "root\ncat: /proc/1/root/etc/passwd: No such file or directory\nanon_inode:[pidfd]\n\
                  anon_inode:[signalfd]\nCapPrm:\t0000000000000000\nCapEff:\t0000000000000000\nNoNewPrivs:\t1\n\
                  Seccomp:\t2\n";
    assert_eq!(output, expect);
}

#[test]
fn a_view_of_the_nodes_files_shows_none_of_berths_own() {
    let mut pod = Pod::new("");
    let data = pod.dir.parent().and_then(Path::parent).unwrap().to_owned();
    fs::create_dir(data.join("identity")).unwrap();
    fs::write(data.join("identity/key"), "secret").unwrap();
    // One stream, for only within one is there an order.
    let script =
        format!("exec 2>&1; ls -A {0}; cat {0}/identity/key; [ -d {0} ] && echo there", data.display());
    pod.main().command = shell(&script);
    let output = pod.succeed();
    assert!(
        output.ends_with("No such file or directory\nthere\n") && output.lines().count() == 2,
        "{output}"
    );
    fs::remove_dir_all(data.join("identity")).unwrap();
}

#[test]
fn a_program_of_roots_gives_nobody_its_rights() {
    let output = Pod::new(
        "cp /usr/bin/id /srv/id && chmod 4755 /srv/id && setpriv --reuid 1000 --regid 1000 --clear-groups /srv/id -u",
    )
    .succeed();
    assert_eq!(output, "1000\n");
}

#[test]
fn the_kernels_own_files_are_masked_or_read_only() {
    let script = "for f in /proc/kcore /proc/keys /proc/timer_list /proc/interrupts /proc/sched_debug; do \
          [ -z \"$(head -c 1 $f 2>/dev/null)\" ] || echo read $f; done; \
        for d in /proc/acpi /proc/scsi /proc/asound /sys/firmware /sys/devices/virtual/powercap; do \
          [ -z \"$(ls -A $d 2>/dev/null)\" ] || echo listed $d; done; \
        for f in /proc/sys/kernel/core_pattern /proc/sys/vm/overcommit_memory /proc/irq/default_smp_affinity \
            /proc/sysrq-trigger /sys/kernel/mm/transparent_hugepage/enabled /sys/fs/cgroup/cgroup.procs \
            /sys/fs/cgroup/devices/devices.allow /sys/fs/cgroup/release_agent; do \
          [ ! -e $f ] || (: >>$f) 2>/dev/null && [ -e $f ] && echo opened $f; done; \
        [ ! -e /dev/console ] || echo console; [ -c /dev/null ] && echo null; true";
    let output = Pod::new(script).succeed();
    assert_eq!(output, "null\n");
}

#[test]
fn devices_of_an_image_or_of_its_own_making_open_to_nobody() {
    use nix::sys::stat::{Mode, SFlag, makedev, mknod};
    let image = Image::new();
    let kmsg = makedev(1, 11);
    mknod(&image.path("kmsg"), SFlag::S_IFCHR, Mode::from_bits_truncate(0o666), kmsg).unwrap();
    let disk = fs::read_dir("/sys/block").unwrap().flatten().find_map(|disk| {
        let text = fs::read_to_string(disk.path().join("dev")).ok()?;
        let (major, minor) = text.trim().split_once(':')?;
        Some(makedev(major.parse().ok()?, minor.parse().ok()?))
    });
    let disk = disk.expect("this machine has a disk");
    mknod(&image.path("disk"), SFlag::S_IFBLK, Mode::from_bits_truncate(0o666), disk).unwrap();
    // That they would open is so outside.
    for name in ["kmsg", "disk"] {
        File::open(image.path(name)).unwrap();
    }
    let script = "mknod /made c 1 11 2>/dev/null; mknod /dev/made c 1 11 2>/dev/null; \
         for d in /kmsg /disk /made /dev/made; do (: <$d) 2>/dev/null && echo opened $d; done; \
         head -c 1 /dev/zero >/dev/null && echo zero";
    for mut pod in image.both(script) {
        assert_eq!(pod.succeed(), "zero\n");
    }
}

#[test]
fn the_word_to_save_itself_is_written_to_nothing_that_a_link_leads_to() {
    let outside = Outside::new();
    let victim = outside.0.path().join("ptmx");
    let layer = Image::new();
    // A pipe that nobody reads would hold the shim up.
    for make in [format!("ln -s {}", victim.display()), "mkfifo".to_owned()] {
        for mut pod in [Pod::new(""), layer.pod_with_users("")] {
            let script = format!(
                "trap 'cat /run/berth/save; exit 85' USR1; {make} /run/berth/save; echo up; while :; do sleep 0.01; done"
            );
            pod.main().command = shell(&script);
            let policy = &mut pod.task.template.checkpoint;
            (policy.signal, policy.grace) = (Some("SIGUSR1".to_owned()), Millis(10_000));
            let mut agent = pod.start();
            agent.running();
            wait_for("output", || pod.output().contains("up"));
            agent.order(&Order::Save { level: 7, hold: true });
            agent.until(|report| matches!(report, Report::Saved { .. }).then_some(()));
            outside.assert_untouched(&make);
            assert_eq!(pod.output(), "up\n7\n", "{make}");
            agent.order(&Order::Stop { grace: Millis(0) });
            agent.exited();
            pod.wait();
        }
    }
}

#[test]
fn a_fork_bomb_stays_in_its_pod() {
    let mut pod = Pod::new("b() { b | b & b; }; echo up; while :; do b; done");
    let _agent = pod.start();
    wait_for("its processes", || pod.processes() > 20);
    // Others can make processes all the while.
    for _ in 0..20 {
        assert!(Command::new("/bin/true").status().unwrap().success());
    }
    shim::clean_up(&pod.task, &pod.dir).unwrap();
    assert_eq!(pod.processes(), 0);
    pod.kill_shim();
    pod.assert_clean();
}

#[test]
fn memory_that_is_no_programs_own_counts_as_well() {
    let fill = |at: &str| {
        format!("head -c 300M /dev/zero >{at} || echo full; ls -l {at} | tr -s ' ' | cut -d ' ' -f 5")
    };
    // Of 64 MiB.
    for at in ["/dev/shm/x", "/dev/x", "/run/berth/x"] {
        let mut pod = Pod::new(&fill(at));
        let exit = pod.run();
        let output = pod.output();
        let kept = output.lines().last().and_then(|size| size.parse::<u64>().ok());
        let killed = exit.containers[0].oom_killed;
        assert!(killed || kept.is_some_and(|bytes| bytes <= 64 << 20), "{at}: {exit:?} {output}");
        pod.assert_clean();
    }
    // What all pods' shims share with them is small, and none of it is the host's disk.
    let mut pod = Pod::new("head -c 16M /dev/zero 2>/dev/null >/run/berth/x || echo full");
    assert_eq!(pod.succeed(), "full\n");
}

#[test]
fn a_flood_of_output_is_bounded_on_disk_and_held_up() {
    let mut pod = Pod::new("echo up; while :; do echo 0123456789012345678901234567890123456789; done");
    pod.task.log_bytes_max = Bytes(1 << 20);
    let mut agent = pod.start();
    let log = pod.dir.join("log");
    let first = |log: &Path| {
        let read = fs::read_dir(log).unwrap().flatten().map(|entry| entry.file_name());
        read.min()
    };
    let begun = {
        wait_for("the log", || log.is_dir() && first(&log).is_some());
        first(&log)
    };
    // Its oldest part has gone: more was written than is kept.
    wait_for("more than is kept", || first(&log) != begun);
    let bytes: u64 =
        fs::read_dir(&log).unwrap().flatten().filter_map(|e| Some(e.metadata().ok()?.len())).sum();
    assert!(bytes <= 1 << 20, "{bytes}");
    agent.order(&Order::Stop { grace: Millis(0) });
    agent.exited();
    pod.wait();
}

#[test]
fn what_holds_words_for_the_depot_leaves_no_core() {
    let tmp = tempfile::tempdir().unwrap();
    // It waits for what it is to transfer, and with which token.
    let mut worker = Command::new(env!("CARGO_BIN_EXE_berth-agent"))
        .arg("checkpoint")
        .current_dir(tmp.path())
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    let pid = worker.id() as i32;
    wait_for("its beginning", || sleeps_in_read(pid));
    let limit = libc::rlimit { rlim_cur: libc::RLIM_INFINITY, rlim_max: libc::RLIM_INFINITY };
    // SAFETY: pointers to a local, and none.
    assert_eq!(unsafe { libc::prlimit(pid, libc::RLIMIT_CORE, &limit, std::ptr::null_mut()) }, 0);
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), Signal::SIGABRT).unwrap();
    let status = worker.wait().unwrap();
    assert_eq!(status.signal(), Some(Signal::SIGABRT as i32));
    assert!(!status.core_dumped());
}

/// Is the process past its start, waiting for input?
fn sleeps_in_read(pid: i32) -> bool {
    let call = fs::read_to_string(format!("/proc/{pid}/syscall")).unwrap_or_default();
    call.starts_with(&format!("{} 0x0 ", libc::SYS_read))
}

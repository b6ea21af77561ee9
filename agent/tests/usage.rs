//! A pod's usage and freezing, in real control groups made for the test.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use berth_agent::io::probe::cgroup;
use berth_agent::io::usage::{freeze, is_frozen, pod_usage, thaw};

/// A group of one name in each hierarchy, with one busy process; gone when dropped.
struct Pod {
    path: PathBuf,
    dirs: Vec<PathBuf>,
    process: Child,
}

impl Pod {
    fn new() -> std::io::Result<Self> {
        let path = PathBuf::from(format!("berth-test-usage-{}", std::process::id()));
        let wanted = |c: &String| ["memory", "cpuacct", "freezer", "cpu"].contains(&c.as_str());
        let mounts = cgroup::mounts(Path::new("/"));
        // Waits until it is in its group, so that what it takes is charged there.
        let script = "read go; text=$(head -c 4000000 /dev/zero | tr '\\0' x); while :; do :; done";
        let process = Command::new("sh").args(["-c", script]).stdin(Stdio::piped()).spawn()?;
        let mut pod = Self { path: path.clone(), dirs: Vec::new(), process };
        for mount in mounts.iter().filter(|mount| mount.controllers.iter().any(wanted)) {
            let dir = mount.point.join(&path);
            if mount.v2 {
                // Refused on a machine whose top group is not ours to change, and then there is no usage to read.
                fs::write(mount.point.join("cgroup.subtree_control"), "+memory +cpu")?;
            }
            fs::create_dir(&dir)?;
            pod.dirs.push(dir.clone());
            fs::write(dir.join("cgroup.procs"), pod.process.id().to_string())?;
        }
        if let Some(mut go) = pod.process.stdin.take() {
            go.write_all(b"\n")?;
        }
        Ok(pod)
    }
}

impl Drop for Pod {
    fn drop(&mut self) {
        let _ = thaw(&self.path);
        let _ = self.process.kill();
        let _ = self.process.wait();
        for dir in &self.dirs {
            until("the group can be removed", || fs::remove_dir(dir).is_ok());
        }
    }
}

fn until(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !done() {
        assert!(Instant::now() < deadline, "not within 10 s: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn usage_freeze_thaw() {
    let pod = match Pod::new() {
        Ok(pod) => pod,
        Err(error) => {
            eprintln!("SKIPPED: cannot make control groups here: {error}");
            return;
        }
    };
    let usage = || pod_usage(&pod.path).unwrap();
    until("the process has used 20 ms", || usage().cpu_usec >= 20_000);
    until("its memory is counted", || usage().memory.0 >= 4_000_000);
    assert!(!is_frozen(&pod.path).unwrap());

    freeze(&pod.path).unwrap();
    until("frozen", || is_frozen(&pod.path).unwrap());
    let stopped_at = usage().cpu_usec;
    let start = Instant::now();
    until("30 ms are over", || start.elapsed() >= Duration::from_millis(30));
    assert!(usage().cpu_usec - stopped_at < 5_000, "a frozen process does not run");

    thaw(&pod.path).unwrap();
    until("it goes on", || usage().cpu_usec > stopped_at + 5_000);
    assert!(!is_frozen(&pod.path).unwrap());
}

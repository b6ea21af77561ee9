//! The packages on a real host: Debian with systemd as pid 1 and cgroup v2, in a virtual machine (tests/vm/). One boot
//! and one reboot for all of it: an emulated machine is ten times slower than this one.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use serde_json::Value;

/// A machine of the test's own; gone with it.
struct Machine {
    dir: tempfile::TempDir,
}

fn checkout() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the crate lies in the workspace")
}

fn text(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

impl Machine {
    fn start() -> Self {
        let machine =
            Self { dir: tempfile::Builder::new().prefix("berth-vm").tempdir().expect("a directory") };
        println!("boot: {} s", machine.vm(600, "start", &[]).trim());
        machine
    }

    fn command(&self, seconds: u32, verb: &str, args: &[&str]) -> Output {
        let mut command = Command::new("timeout");
        command.arg(seconds.to_string()).arg(checkout().join("tests/vm/vm")).arg(verb).arg(self.dir.path());
        command.args(args).output().expect("tests/vm/vm starts")
    }

    fn vm(&self, seconds: u32, verb: &str, args: &[&str]) -> String {
        let output = self.command(seconds, verb, args);
        assert!(output.status.success(), "{verb} {args:?}: {}", text(&output));
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// Runs a script within, which must succeed; its stdout.
    fn sh(&self, script: &str) -> String {
        self.vm(120, "exec", &["sh", "-ec", script])
    }

    /// Until a script succeeds.
    fn until(&self, what: &str, script: &str) {
        let end = Instant::now() + Duration::from_secs(120);
        loop {
            let output = self.command(120, "exec", &["sh", "-ec", script]);
            if output.status.success() {
                return;
            }
            assert!(Instant::now() < end, "{what}: {}\n{}", text(&output), self.journal());
        }
    }

    fn journal(&self) -> String {
        text(&self.command(60, "exec", &["journalctl", "-b", "--no-pager", "-n", "60", "-u", "berth-*"]))
    }

    fn until_online(&self) {
        self.until("the node is online", "berth get nodes | grep -q ' online '");
    }

    /// The one beside the programs, where the package would have it.
    fn install_criu(&self) {
        let here = std::env::current_exe().expect("a test has a path");
        let criu = here.parent().and_then(Path::parent).expect("target/PROFILE/deps").join("criu");
        self.sh("mkdir -p /usr/lib/berth");
        self.vm(120, "copy", &[criu.to_str().expect("a plain path"), "/usr/lib/berth/"]);
        self.sh("systemctl restart berth-agent");
        self.until(
            "the agent has found CRIU",
            "berth describe node $(hostname) -o json | grep -q '\"criu\": \"'",
        );
    }

    /// The job's volume `told` is mounted at `/told`.
    fn submit(&self, name: &str, script: &str) {
        let job = serde_json::json!({
            "name": name, "image": "host", "network": "none", "command": ["sh", "-c", script],
            "resources": {"cpu": "0.5", "memory": "64Mi"}, "volumes": [{"mount": "/told", "name": "told"}],
        });
        self.sh(&format!("echo '{job}' | berth submit -"));
        self.until("it runs", &format!("berth logs {name} | grep -q ."));
    }

    /// The job's record once it has succeeded.
    fn succeeded(&self, name: &str) -> Value {
        let waited = self.command(240, "exec", &["berth", "wait", name, "--timeout", "200s"]);
        assert!(waited.status.success(), "{name}: {}\n{}", text(&waited), self.journal());
        serde_json::from_str(&self.sh(&format!("berth describe job {name} -o json"))).expect("JSON")
    }

    /// As `systemd-analyze security` rates a unit: 0 is safe, 10 is open.
    fn exposure(&self, unit: &str) -> f32 {
        let all = self.sh(&format!("systemd-analyze security --no-pager {unit}"));
        let level =
            all.lines().find_map(|line| line.split_once("Overall exposure level for ")?.1.split_once(": "));
        let (_, rating) = level.unwrap_or_else(|| panic!("no rating: {all}"));
        println!("{unit}: {rating}");
        rating.split(' ').next().and_then(|number| number.parse().ok()).expect("a number")
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.command(60, "powercut", &[]);
    }
}

/// Why no machine can be had here.
fn missing() -> Option<String> {
    let found = |tool: &str| {
        std::env::var("PATH").unwrap_or_default().split(':').any(|dir| Path::new(dir).join(tool).exists())
    };
    let tools = ["qemu-system-x86_64", "qemu-img", "mmdebstrap", "mke2fs", "ssh", "dpkg-deb"];
    if let Some(tool) = tools.into_iter().find(|tool| !found(tool)) {
        return Some(format!("{tool} is missing; make setup installs it"));
    }
    if cfg!(not(target_arch = "x86_64")) {
        return Some("the programs are not for the machine, which is an x86_64".to_owned());
    }
    let id = Command::new("id").arg("-u").output().ok()?;
    (id.stdout != b"0\n").then(|| "making the machine's disk takes root".to_owned())
}

fn skip(why: &str) {
    let line = format!("SKIPPED: vm: {why}\n");
    eprint!("{line}");
    // Where `make test` counts.
    let counted = std::fs::File::options().create(true).append(true).open(checkout().join("target/skipped"));
    let _ = counted.and_then(|mut file| std::io::Write::write_all(&mut file, line.as_bytes()));
}

/// Packages of the programs in `BERTH_VM_PROGRAMS`, such as target/release, else of those built beside this test.
fn packages() -> Vec<PathBuf> {
    let here = std::env::current_exe().expect("a test has a path");
    let beside = here.parent().and_then(Path::parent).expect("target/PROFILE/deps");
    let built = std::env::var_os("BERTH_VM_PROGRAMS").map_or_else(|| beside.to_owned(), PathBuf::from);
    let output = Command::new(checkout().join("systemd/package")).arg("--of").arg(built).output();
    let output = output.expect("systemd/package starts");
    assert!(output.status.success(), "{}", text(&output));
    String::from_utf8_lossy(&output.stdout).lines().map(PathBuf::from).collect()
}

#[test]
fn packages_upgrades_and_reboots_on_a_real_host() {
    if let Some(why) = missing() {
        return skip(&why);
    }
    let packages = packages();
    let mut files: Vec<&str> = packages.iter().map(|path| path.to_str().expect("a plain path")).collect();
    let machine = Machine::start();
    machine.sh("mkdir /root/packages");
    files.push("/root/packages/");
    machine.vm(300, "copy", &files);

    // Installed, nothing runs before its owner has seen what this version trusts.
    machine.sh("dpkg -i /root/packages/*.deb");
    machine.sh("! systemctl is-active --quiet berth-agent berth-controller");
    machine.sh("systemctl enable --now berth-controller berth-agent");
    machine.until_online();
    assert!(machine.exposure("berth-controller") <= 2.0);
    machine.exposure("berth-agent");
    machine.sh(
        "[ $(readlink /proc/1/ns/mnt) = $(readlink /proc/$(systemctl show -P MainPID berth-agent)/ns/mnt) ]",
    );
    assert_eq!(machine.sh("berth run --network none -- sh -c 'echo hello-$((6*7))'"), "hello-42\n");

    // The agent is upgraded under a running job, and systemd reads everything anew: the job does not notice.
    machine.submit("long", "i=0; until [ -e /told/end ]; do i=$((i+1)); echo $i; sleep 0.1; done");
    let pids = "systemctl show -P MainPID berth-agent; pgrep -f 'berth-agent shim' | sort -n | head -n 1";
    let before = machine.sh(pids);
    machine.sh("dpkg -i /root/packages/berth-agent_*.deb && systemctl daemon-reload");
    machine.sh("berth get pods | grep -q 'long-0 *Running'");
    let after = machine.sh(pids);
    let (before, after): (Vec<_>, Vec<_>) = (before.lines().collect(), after.lines().collect());
    assert!(before[0] != after[0] && before[1] == after[1], "agent and shim: {before:?}, then {after:?}");
    let bounds = "cat $(find /sys/fs/cgroup/berth -name '*-0.1')/memory.max";
    assert_eq!(machine.sh(bounds), "67108864\n");
    machine.sh("touch /var/lib/berth/agent/volumes/default/long/told/end");
    let job = machine.succeeded("long");
    assert_eq!((&job["evictions"], &job["failures"]), (&0.into(), &0.into()), "{job:#}");
    let log = machine.sh("berth logs long");
    let numbers: String = (1..=log.lines().count()).map(|n| format!("{n}\n")).collect();
    assert_eq!(log, numbers);

    // A reboot is an eviction: both services come back, and the job begins anew (there is no CRIU here) and ends. On
    // its own it would not have: a shutdown waits for a while for pods to leave.
    machine.submit(
        "over",
        "cat /proc/sys/kernel/random/boot_id; [ -e /told/begun ] || { touch /told/begun; sleep 1000; }; echo ended",
    );
    println!("reboot: {} s", machine.vm(400, "reboot", &[]).trim());
    machine.until_online();
    let job = machine.succeeded("over");
    assert_eq!((&job["evictions"], &job["failures"]), (&1.into(), &0.into()), "{job:#}");
    let log = machine.sh("berth logs over");
    let lines: Vec<&str> = log.lines().collect();
    assert!(lines.len() == 3 && lines[0] != lines[1] && lines[2] == "ended", "{log}");

    // Saved, the power cut, booted: it goes on from where it was saved, and its log has no gap and nothing twice.
    machine.install_criu();
    machine.submit("saved", "i=0; until [ -e /told/end ]; do i=$((i+1)); echo $i; sleep 0.1; done");
    let said = machine.sh("berth checkpoint saved");
    println!("{said}");
    machine.vm(60, "powercut", &[]);
    println!("boot after a power cut: {} s", machine.vm(600, "start", &[]).trim());
    machine.until("it goes on", "berth describe job saved -o json | grep -q '\"evictions\": 1' && berth get pods | grep -q 'saved-0 *Running'");
    machine.sh("touch /var/lib/berth/agent/volumes/default/saved/told/end");
    let job = machine.succeeded("saved");
    assert_eq!((&job["evictions"], &job["failures"]), (&1.into(), &0.into()), "{job:#}");
    assert!(job["checkpoint"]["id"].is_string() && job["pods"][0]["message"].is_null(), "{job:#}");
    let log = machine.sh("berth logs saved");
    let numbers: String = (1..=log.lines().count()).map(|n| format!("{n}\n")).collect();
    assert_eq!(log, numbers);
    machine.vm(120, "stop", &[]);
}

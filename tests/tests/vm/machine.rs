//! A virtual machine of the test's own, with the packages installed.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use serde_json::Value;

/// A machine of the test's own; gone with it.
pub struct Machine {
    dir: tempfile::TempDir,
}

fn checkout() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the crate lies in the workspace")
}

pub fn text(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

impl Machine {
    fn start() -> Self {
        let machine =
            Self { dir: tempfile::Builder::new().prefix("berth-vm").tempdir().expect("a directory") };
        println!("boot: {} s", machine.vm(600, "start", &[]).trim());
        machine
    }

    /// With the packages, which lie below `/root/packages` as well.
    pub fn installed() -> Self {
        let packages = packages();
        let mut files: Vec<&str> = packages.iter().map(|path| path.to_str().expect("a plain path")).collect();
        let machine = Self::start();
        machine.sh("mkdir /root/packages");
        files.push("/root/packages/");
        machine.vm(300, "copy", &files);
        machine.sh("dpkg -i /root/packages/*.deb");
        machine
    }

    /// Sets up a cluster of this machine alone, which joins it by the line that its admin is given.
    pub fn begin_cluster(&self) {
        self.sh("printf '%s\\n' 'allow-host-image = true' 'allow-image-path = [\"/root/image\"]' >>/etc/berth/agent.toml");
        println!("{}", self.sh("berth-controller init --host localhost"));
        self.sh("systemctl daemon-reload && systemctl enable --now berth-controller");
        self.until("the controller makes a token", "berth node token >/root/line");
        println!("{}", self.sh("sh -e /root/line"));
        self.until_online();
    }

    /// A verb of tests/vm/vm, ended after so many seconds.
    pub fn command(&self, seconds: u32, verb: &str, args: &[&str]) -> Command {
        let mut command = Command::new("timeout");
        command.arg(seconds.to_string()).arg(checkout().join("tests/vm/vm")).arg(verb).arg(self.dir.path());
        command.args(args);
        command
    }

    pub fn output(&self, seconds: u32, verb: &str, args: &[&str]) -> Output {
        self.command(seconds, verb, args).output().expect("tests/vm/vm starts")
    }

    pub fn vm(&self, seconds: u32, verb: &str, args: &[&str]) -> String {
        let output = self.output(seconds, verb, args);
        assert!(output.status.success(), "{verb} {args:?}: {}", text(&output));
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// Runs a script within, which must succeed; its stdout.
    pub fn sh(&self, script: &str) -> String {
        self.vm(120, "exec", &["sh", "-ec", script])
    }

    /// Until a script succeeds.
    pub fn until(&self, what: &str, script: &str) {
        let end = Instant::now() + Duration::from_secs(120);
        loop {
            let output = self.output(120, "exec", &["sh", "-ec", script]);
            if output.status.success() {
                return;
            }
            assert!(Instant::now() < end, "{what}: {}\n{}", text(&output), self.journal());
        }
    }

    pub fn journal(&self) -> String {
        text(&self.output(60, "exec", &["journalctl", "-b", "--no-pager", "-n", "60", "-u", "berth-*"]))
    }

    pub fn until_online(&self) {
        self.until("the node is online", "berth get nodes | grep -q ' online '");
    }

    /// Leaves an image with busybox in it, and returns what a job calls it.
    pub fn copy_image(&self) -> &'static str {
        let here = tempfile::tempdir().expect("a directory");
        let layout = here.path().join("image");
        berth_tests::image::busybox_layout(&layout);
        self.vm(60, "copy", &[layout.to_str().expect("a plain path"), "/root/"]);
        "oci:/root/image:latest"
    }

    /// The one beside the programs, where the package would have it.
    pub fn install_criu(&self) {
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
    pub fn submit(&self, name: &str, script: &str) {
        self.submit_with(name, script, Value::Null);
    }

    /// With these fields of a job file's as well.
    pub fn submit_with(&self, name: &str, script: &str, fields: Value) {
        let mut job = serde_json::json!({
            "name": name, "image": "host", "network": "none", "command": ["sh", "-c", script],
            "resources": {"cpu": "0.5", "memory": "64Mi"}, "volumes": [{"mount": "/told", "name": "told"}],
        });
        for (field, value) in fields.as_object().into_iter().flatten() {
            job[field] = value.clone();
        }
        self.sh(&format!("echo '{job}' | berth submit -"));
        self.until("it runs", &format!("berth logs {name} | grep -q ."));
    }

    /// The job's record once it has succeeded.
    pub fn succeeded(&self, name: &str) -> Value {
        let waited = self.output(240, "exec", &["berth", "wait", name, "--timeout", "200s"]);
        assert!(waited.status.success(), "{name}: {}\n{}", text(&waited), self.journal());
        serde_json::from_str(&self.sh(&format!("berth describe job {name} -o json"))).expect("JSON")
    }

    /// As `systemd-analyze security` rates a unit: 0 is safe, 10 is open.
    pub fn exposure(&self, unit: &str) -> f32 {
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
        self.output(60, "powercut", &[]);
    }
}

/// Why no machine can be had here.
pub fn missing() -> Option<String> {
    let found = |tool: &str| {
        std::env::var("PATH").unwrap_or_default().split(':').any(|dir| Path::new(dir).join(tool).exists())
    };
    let tools = ["qemu-system-x86_64", "qemu-img", "mmdebstrap", "mke2fs", "ssh", "dpkg-deb", "umoci"];
    if let Some(tool) = tools.into_iter().find(|tool| !found(tool)) {
        return Some(format!("{tool} is missing; make setup installs it"));
    }
    if cfg!(not(target_arch = "x86_64")) {
        return Some("the programs are not for the machine, which is an x86_64".to_owned());
    }
    let id = Command::new("id").arg("-u").output().ok()?;
    (id.stdout != b"0\n").then(|| "making the machine's disk takes root".to_owned())
}

pub fn skip(why: &str) {
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
    let packages: Vec<PathBuf> = String::from_utf8_lossy(&output.stdout).lines().map(PathBuf::from).collect();
    let dir = packages.first().and_then(|package| package.parent()).expect("a package");
    let sums = Command::new("sha256sum").args(["--check", "SHA256SUMS"]).current_dir(dir).output();
    let sums = sums.expect("sha256sum starts");
    let said = text(&sums);
    assert!(sums.status.success(), "{said}");
    for package in &packages {
        let name = package.file_name().expect("a name").to_string_lossy();
        assert!(said.contains(&*name), "{name} is in SHA256SUMS: {said}");
    }
    packages
}

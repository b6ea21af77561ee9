//! A private cluster of the real programs on loopback, in a temporary directory, gone with the test.

use std::fs::File;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use berth_tests::mosquitto;
use berth_tests::ports::free_ports;
use serde_json::Value;

/// The programs, built beside this test.
pub fn program(name: &str) -> PathBuf {
    let here = std::env::current_exe().expect("a test has a path");
    let path = here.parent().and_then(Path::parent).expect("target/PROFILE/deps").join(name);
    assert!(path.exists(), "{} is not there: cargo build --workspace makes it", path.display());
    path
}

/// A port that was free a moment ago.
pub fn free_port() -> u16 {
    free_ports(1)[0]
}

/// Waits for a condition; panics with `what` when it does not come.
pub fn until<T>(what: &str, seconds: u64, mut check: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + Duration::from_secs(seconds);
    loop {
        if let Some(value) = check() {
            return value;
        }
        assert!(Instant::now() < end, "not within {seconds} s: {what}");
        std::thread::park_timeout(Duration::from_millis(20));
    }
}

/// A program that ends with its handle.
pub struct Daemon {
    pub child: Child,
    pub name: String,
}

impl Daemon {
    pub fn start(name: &str, command: &mut Command, log: &Path) -> Self {
        let log = File::options().create(true).append(true).open(log).expect("the log opens");
        let child = command
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("a second handle"))
            .stderr(log)
            .spawn()
            .unwrap_or_else(|error| panic!("{name} does not start: {error}"));
        Self { child, name: name.to_owned() }
    }

    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.kill();
    }
}

pub struct Cluster {
    pub dir: tempfile::TempDir,
    pub port: u16,
    pub http: u16,
    pub controller: Option<Daemon>,
    /// Where controllers keep their records, other than embedded.
    pub store: Option<String>,
    pub mosquitto: Option<Daemon>,
    /// Where brokers listen, other than the controller's own, in the order in which whoever is started next tries them.
    pub brokers: Vec<u16>,
    pub agents: Vec<Daemon>,
    /// Its members have certificates; the first admin's is there.
    pub admin: Option<PathBuf>,
}

impl Cluster {
    /// A controller with its own broker, not yet any agent.
    pub fn new() -> Self {
        let mut cluster = Self::empty();
        cluster.start_controller();
        cluster
    }

    /// A controller on a real Mosquitto.
    pub fn on_mosquitto() -> Self {
        let mut cluster = Self::empty();
        cluster.start_mosquitto();
        cluster.start_controller();
        cluster
    }

    pub fn empty() -> Self {
        Self {
            dir: tempfile::Builder::new().prefix("berth-it").tempdir().expect("a temporary directory"),
            port: free_port(),
            http: free_port(),
            controller: None,
            store: None,
            mosquitto: None,
            brokers: Vec::new(),
            agents: Vec::new(),
            admin: None,
        }
    }

    /// A controller that lets in members alone, set up as its operator would.
    pub fn of_members() -> Self {
        let mut cluster = Self::empty();
        cluster.admin = Some(cluster.dir.path().join("admin"));
        let made = cluster.init();
        assert!(made.status.success(), "{}", text(&made));
        cluster.start_controller();
        until("the controller answers", 30, || cluster.json(&["get", "nodes"]));
        cluster
    }

    /// Likewise, on a Mosquitto with the configuration that the controller writes for it.
    pub fn of_members_on_mosquitto() -> Self {
        let mut cluster = Self::empty();
        cluster.set_up_on_mosquitto(&[]);
        cluster.start_controller();
        until("the controller answers", 30, || cluster.json(&["get", "nodes"]));
        cluster
    }

    /// All but the controller is there.
    pub fn set_up_on_mosquitto(&mut self, more: &[&str]) {
        self.admin = Some(self.dir.path().join("admin"));
        let broker = format!("mqtts://127.0.0.1:{}", self.port);
        let made = self.init_with(&[&["--broker", &broker], more].concat());
        assert!(made.status.success(), "{}", text(&made));
        // Started by root it reads its files as another user.
        let open = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        std::fs::set_permissions(self.dir.path(), open).expect("its directory is ours");
        let written = self.configure_mosquitto();
        assert!(written.status.success(), "{}", text(&written));
        self.start_configured_mosquitto();
    }

    pub fn configure_mosquitto(&self) -> Output {
        let mut command = Command::new(program("berth-controller"));
        command.args(["broker-config", "mosquitto", "--broker-host", "127.0.0.1", "--config"]);
        command.arg(self.dir.path().join("controller.toml"));
        command.args(["--listen", &format!("127.0.0.1:{}", self.port), "--dir"]);
        command.arg(self.dir.path().join("broker"));
        command.output().expect("berth-controller starts")
    }

    pub fn start_configured_mosquitto(&mut self) {
        let mut command = Command::new("mosquitto");
        command.arg("-c").arg(self.dir.path().join("broker/berth.conf"));
        self.mosquitto = Some(Daemon::start("mosquitto", &mut command, &self.log_path("mosquitto")));
    }

    pub fn init(&self) -> Output {
        self.init_with(&[])
    }

    pub fn init_with(&self, flags: &[&str]) -> Output {
        let dir = self.dir.path();
        let mut command = Command::new(program("berth-controller"));
        command.args(["init", "--host", "127.0.0.1", "--config"]).arg(dir.join("controller.toml"));
        command.arg("--data-dir").arg(dir.join("controller")).arg("--admin-dir").arg(dir.join("admin"));
        command.args(["--listen-mqtt", &format!("127.0.0.1:{}", self.port)]);
        command.args(["--listen-http", &format!("127.0.0.1:{}", self.http)]).args(flags);
        command.output().expect("berth-controller starts")
    }

    pub fn start_mosquitto(&mut self) {
        if self.brokers.is_empty() {
            self.brokers.push(self.port);
        }
        self.mosquitto = Some(self.mosquitto_at("mosquitto", self.port));
    }

    pub fn mosquitto_at(&self, name: &str, port: u16) -> Daemon {
        let dir = self.dir.path().join(name);
        std::fs::create_dir_all(&dir).expect("a directory");
        let mut command =
            mosquitto::command(Ipv4Addr::LOCALHOST.into(), port, &dir).expect("the configuration is written");
        Daemon::start(name, &mut command, &self.log_path(name))
    }

    pub fn url(&self) -> String {
        let own = [self.port];
        let ports = if self.brokers.is_empty() { &own[..] } else { &self.brokers };
        let hosts: Vec<String> = ports.iter().map(|port| format!("127.0.0.1:{port}")).collect();
        format!("mqtt://{}", hosts.join(","))
    }

    fn log_path(&self, name: &str) -> PathBuf {
        self.dir.path().join(format!("{name}.log"))
    }

    pub fn log(&self, name: &str) -> String {
        std::fs::read_to_string(self.log_path(name)).unwrap_or_default()
    }

    pub fn start_controller(&mut self) {
        self.controller = Some(self.another_controller("controller", self.http));
    }

    /// Until it has ended, and not well.
    pub fn controller_fails(&mut self) {
        let controller = self.controller.as_mut().expect("it is started");
        let ended = until("the controller ends", 30, || controller.child.try_wait().ok().flatten());
        assert!(!ended.success());
    }

    /// One with a data directory of its own, beside those that are there.
    pub fn another_controller(&self, name: &str, http: u16) -> Daemon {
        if self.admin.is_some() {
            let mut command = Command::new(program("berth-controller"));
            command.arg("--config").arg(self.dir.path().join("controller.toml"));
            return Daemon::start(name, &mut command, &self.log_path(name));
        }
        let broker = if self.brokers.is_empty() { "embedded".into() } else { self.url() };
        let mut command = Command::new(program("berth-controller"));
        command.args(["--dev", "--cluster", "default", "--broker", &broker, "--data-dir"]);
        command.arg(self.dir.path().join(name));
        command.args(["--listen-mqtt", &format!("127.0.0.1:{}", self.port)]);
        command.args(["--listen-http", &format!("127.0.0.1:{http}")]);
        command.args(self.store.iter().flat_map(|store| ["--store", store]));
        Daemon::start(name, &mut command, &self.log_path(name))
    }

    /// Starts an agent (anew, on its old data directory, where there was one) and waits until it is online.
    pub fn agent(&mut self, node: &str, flags: &[&str]) -> usize {
        self.agent_with(node, flags, &[])
    }

    pub fn agent_with(&mut self, node: &str, flags: &[&str], env: &[(&str, &str)]) -> usize {
        let agent = self.agent_alone(node, flags, env);
        until(&format!("{node} online: {}", self.log(node)), 30, || {
            let nodes = self.json(&["get", "nodes"])?;
            let online = |row: &&Value| row["node"] == node && row["state"] == "online";
            nodes.as_array()?.iter().find(online).map(drop)
        });
        agent
    }

    /// Likewise, whether or not a controller is there.
    pub fn agent_alone(&mut self, node: &str, flags: &[&str], env: &[(&str, &str)]) -> usize {
        if self.admin.is_some() {
            return self.member_alone(node, flags, env);
        }
        let mut command = Command::new(program("berth-agent"));
        command.args([
            "--dev",
            "--cluster",
            "default",
            "--broker",
            &self.url(),
            "--node",
            node,
            "--data-dir",
        ]);
        command.arg(self.dir.path().join(node)).args(flags).envs(env.iter().copied());
        self.agents.push(Daemon::start(node, &mut command, &self.log_path(node)));
        self.agents.len() - 1
    }

    /// Joins, where it has not yet, by the line that the admin was given.
    fn member_alone(&mut self, node: &str, flags: &[&str], env: &[(&str, &str)]) -> usize {
        let data = self.dir.path().join(node);
        if !data.join("identity/membership.json").exists() {
            let line = self.run(&["node", "token", node]);
            let line = String::from_utf8_lossy(&line.stdout).into_owned();
            let words: Vec<&str> = line.split_whitespace().collect();
            let ["berth-agent", rest @ ..] = &words[..] else { panic!("no line: {line}") };
            let joined =
                Command::new(program("berth-agent")).args(rest).arg("--data-dir").arg(&data).output();
            let joined = joined.expect("berth-agent starts");
            assert!(joined.status.success(), "{}", text(&joined));
        }
        let mut command = Command::new(program("berth-agent"));
        command.arg("--data-dir").arg(&data).args(flags).envs(env.iter().copied());
        self.agents.push(Daemon::start(node, &mut command, &self.log_path(node)));
        self.agents.len() - 1
    }

    pub fn berth(&self, args: &[&str]) -> Command {
        let mut command = Command::new(program("berth"));
        match &self.admin {
            Some(admin) => command.env("BERTH_IDENTITY", admin),
            None => command.env("BERTH_BROKER", self.url()),
        };
        command.args(args).stdin(Stdio::null());
        command
    }

    pub fn run(&self, args: &[&str]) -> Output {
        self.berth(args).output().expect("berth starts")
    }

    pub fn json(&self, args: &[&str]) -> Option<Value> {
        let output = self.berth(args).args(["-o", "json"]).output().ok()?;
        serde_json::from_slice(&output.stdout).ok()
    }

    /// Submits a job file and expects it to be accepted.
    pub fn submit(&self, name: &str, file: &str) {
        let path = self.dir.path().join(format!("{name}.yaml"));
        std::fs::write(&path, format!("name: {name}\n{file}")).expect("the job file is written");
        let output = self.run(&["submit", path.to_str().expect("a plain path")]);
        assert!(output.status.success(), "submit {name}: {}", text(&output));
    }

    /// Submits one that will be accepted once the controller can do so.
    pub fn submit_in_time(&self, name: &str, file: &str) -> Child {
        let path = self.dir.path().join(format!("{name}.yaml"));
        std::fs::write(&path, format!("name: {name}\n{file}")).expect("the job file is written");
        let mut berth = self.berth(&["submit", path.to_str().expect("a plain path")]);
        berth.stderr(Stdio::piped()).spawn().expect("berth starts")
    }

    pub fn job(&self, name: &str) -> Value {
        self.json(&["describe", "job", name]).unwrap_or(Value::Null)
    }

    pub fn phase(&self, name: &str) -> String {
        self.job(name)["phase"].as_str().unwrap_or_default().to_owned()
    }

    pub fn until_phase(&self, name: &str, phase: &str, seconds: u64) -> Value {
        let end = Instant::now() + Duration::from_secs(seconds);
        loop {
            let job = self.job(name);
            if job["phase"] == phase {
                return job;
            }
            assert!(
                Instant::now() < end,
                "{name} is not {phase} within {seconds} s: {job:#}\n{}",
                self.logs_of_all()
            );
            std::thread::park_timeout(Duration::from_millis(20));
        }
    }

    pub fn logs(&self, name: &str) -> String {
        let output = self.run(&["logs", name]);
        assert!(output.status.success(), "logs {name}: {}", text(&output));
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// What the programs said, for a failed test's message.
    pub fn logs_of_all(&self) -> String {
        let files =
            std::fs::read_dir(self.dir.path()).into_iter().flatten().flatten().map(|entry| entry.path());
        files
            .filter(|path| path.extension().is_some_and(|extension| extension == "log"))
            .map(|path| {
                format!("--- {}\n{}", path.display(), std::fs::read_to_string(&path).unwrap_or_default())
            })
            .collect()
    }
}

impl Cluster {
    /// Ends the shims of an agent that is gone, and with each its pod: what a lost machine does.
    pub fn kill_shims(&self, node: &str) {
        kill_shims_below(&format!("{}/", self.dir.path().join(node).display()));
    }
}

fn kill_shims_below(dir: &str) {
    for entry in std::fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Ok(command) = std::fs::read(entry.path().join("cmdline")) else { continue };
        let command = String::from_utf8_lossy(&command).into_owned();
        if command.starts_with("berth-agent\0shim\0") && command.contains(dir) {
            let pid = entry.file_name().to_string_lossy().into_owned();
            let _ = Command::new("kill").args(["-9", &pid]).status();
        }
    }
}

impl Drop for Cluster {
    /// Pods outlive agents, so they are ended first; then what they left mounted is undone by ending their shims.
    fn drop(&mut self) {
        for agent in &mut self.agents {
            agent.kill();
        }
        kill_shims_below(&self.dir.path().to_string_lossy());
    }
}

/// Both streams of a program, for messages.
pub fn text(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

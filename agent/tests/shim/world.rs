//! A pod's directory, its shim, and what an agent would say to it.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use berth_agent::shim::{control, log, sys};
use berth_agent::task::{Exit, Lease, Order, Report, Root, Task, file};
use berth_protocol::ids::{ContainerName, Epoch, JobName, JobUid, Namespace, NodeId, Run};
use berth_protocol::job::*;
use berth_protocol::resources::{Limits, Resources};
use berth_protocol::units::{Bytes, MilliCpu, Millis};

/// How much slower than usual the machine is, by `BERTH_TEST_SLOWNESS`: an emulated one stretches every deadline.
fn slowness() -> u32 {
    let given = std::env::var("BERTH_TEST_SLOWNESS").ok();
    given.map_or(1, |text| text.parse().expect("BERTH_TEST_SLOWNESS is a whole number"))
}

/// In which anything must have happened.
pub fn soon() -> Duration {
    Duration::from_secs(20) * slowness()
}

/// Until `condition` holds, or the test fails.
pub fn wait_for(what: &str, mut condition: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !condition() {
        assert!(begun.elapsed() < soon(), "waited in vain for {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

pub struct Pod {
    pub task: Task,
    pub dir: PathBuf,
    /// Of the shim, beside this process's own.
    pub env: Vec<(&'static str, PathBuf)>,
    _tmp: std::rc::Rc<tempfile::TempDir>,
    shim: Option<Child>,
}

pub struct Agent {
    reader: BufReader<UnixStream>,
}

static NEXT: AtomicU32 = AtomicU32::new(0);

pub fn shell(script: &str) -> Vec<String> {
    ["/bin/sh", "-c", script].map(str::to_owned).into()
}

pub fn container(name: &str, command: Vec<String>) -> ContainerSpec {
    ContainerSpec {
        name: ContainerName::parse(name).unwrap(),
        image: "host".to_owned(),
        command,
        args: Vec::new(),
        env: Default::default(),
        working_dir: None,
        user: None,
        resources: Resources { cpu: MilliCpu(100), memory: Bytes(32 << 20), ..Resources::default() },
        limits: Limits { cpu: MilliCpu(2000), memory: Bytes(64 << 20) },
        read_only_root: false,
        capabilities: Default::default(),
        secrets: Vec::new(),
    }
}

impl Pod {
    /// One container on a view of this machine's root, without a network, not yet begun.
    pub fn new(script: &str) -> Self {
        Self::of(shell(script))
    }

    pub fn of(command: Vec<String>) -> Self {
        let index = NEXT.fetch_add(1, Ordering::Relaxed);
        let uid = JobUid::parse(&format!("t{}", std::process::id())).unwrap();
        let template = PodTemplate {
            namespace: Namespace::parse("default").unwrap(),
            job: JobName::parse("digits").unwrap(),
            containers: vec![container("main", command)],
            volumes: Vec::new(),
            network: Network::None,
            restart: Restart::default(),
            grace: Millis(5000),
            on_disconnect: OnDisconnect::default(),
            checkpoint: Checkpoint::default(),
            outputs: Vec::new(),
            workspace: None,
        };
        let task = Task {
            node: NodeId::parse("node-1").unwrap(),
            pod: uid.pod(index),
            epoch: Epoch(1),
            run: Run(1),
            template,
            roots: vec![Root::Host],
            volumes: Vec::new(),
            workspace: None,
            devices: Vec::new(),
            network: None,
            cgroup_parent: PathBuf::from(format!("berth-test-{}", std::process::id())),
            log_bytes_max: Bytes(16 << 20),
            scratch_bytes_max: Bytes(1 << 30),
            criu: None,
            own_users: true,
            restore: false,
            restarts: 0,
        };
        let tmp = tempfile::tempdir().unwrap();
        let dir = tmp.path().join("agent/pods").join(format!("{}.1", task.pod));
        fs::create_dir_all(&dir).unwrap();
        Self { task, dir, env: Vec::new(), _tmp: std::rc::Rc::new(tmp), shim: None }
    }

    /// The pod's next placement, in a directory beside this one's.
    pub fn next_epoch(&self) -> Self {
        let mut task = self.task.clone();
        task.epoch = Epoch(task.epoch.0 + 1);
        let dir = self.dir.with_file_name(format!("{}.{}", task.pod, task.epoch));
        fs::create_dir_all(&dir).unwrap();
        Self { task, dir, env: self.env.clone(), _tmp: self._tmp.clone(), shim: None }
    }

    pub fn main(&mut self) -> &mut ContainerSpec {
        &mut self.task.template.containers[0]
    }

    pub fn spawn(&mut self) -> &mut Self {
        fs::write(self.dir.join(file::TASK), serde_json::to_vec(&self.task).unwrap()).unwrap();
        let mut shim = Command::new(env!("CARGO_BIN_EXE_berth-agent"));
        shim.arg("shim").arg(&self.dir).envs(self.env.iter().map(|(name, value)| (name, value)));
        // As of somebody who has started the agent by hand.
        let groups = || Ok(nix::unistd::setgroups(&[nix::unistd::Gid::from_raw(6)])?);
        // SAFETY: one call of the kernel.
        unsafe { shim.pre_exec(groups) };
        self.shim = Some(shim.stdin(Stdio::null()).spawn().unwrap());
        self
    }

    pub fn connect(&self) -> Agent {
        let mut stream = None;
        wait_for("the shim's socket", || {
            stream = control::connect(&self.dir).ok();
            stream.is_some()
        });
        let stream = stream.unwrap();
        stream.set_read_timeout(Some(soon())).unwrap();
        Agent { reader: BufReader::new(stream) }
    }

    /// Spawned and started, without a deadline.
    pub fn start(&mut self) -> Agent {
        self.start_under(Lease { deadline: None })
    }

    pub fn start_under(&mut self, lease: Lease) -> Agent {
        self.spawn();
        let mut agent = self.connect();
        agent.order(&Order::Start { lease });
        agent
    }

    /// From spawn to the exit file, which must be there once the shim has said so.
    pub fn run(&mut self) -> Exit {
        let mut agent = self.start();
        let told = agent.exited();
        assert_eq!(self.exit_file(), Some(told.clone()));
        self.wait();
        told
    }

    pub fn exit_file(&self) -> Option<Exit> {
        let bytes = fs::read(self.dir.join(file::exit(self.task.run))).ok()?;
        Some(serde_json::from_slice(&bytes).unwrap())
    }

    pub fn shim_pid(&self) -> i32 {
        self.shim.as_ref().unwrap().id() as i32
    }

    /// The pod's process 1: the shim's child that bears this name.
    pub fn init_pid(&self) -> i32 {
        self.child("berth-init").expect("the pod has an init")
    }

    /// The program of its only container.
    pub fn container_pid(&self) -> i32 {
        let init = self.init_pid();
        self.children().into_iter().find(|(pid, _)| *pid != init).expect("the pod has a container").0
    }

    fn child(&self, name: &str) -> Option<i32> {
        self.children().into_iter().find_map(|(pid, comm)| (comm == name).then_some(pid))
    }

    /// Of the shim: number and name.
    pub fn children(&self) -> Vec<(i32, String)> {
        let shim = format!("PPid:\t{}", self.shim_pid());
        let pids = fs::read_dir("/proc").unwrap().flatten();
        let pids = pids.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
        pids.filter_map(|pid| {
            let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
            let name = status.lines().find_map(|line| line.strip_prefix("Name:\t"))?;
            status.lines().any(|line| line == shim).then(|| (pid, name.to_owned()))
        })
        .collect()
    }

    /// How many processes are in the pod's groups.
    pub fn processes(&self) -> usize {
        let name = format!("{}.{}", self.task.pod, self.task.epoch);
        let group = self.task.cgroup_parent.join(name);
        let all = berth_agent::shim::cgroup::Cgroup::new(&group).unwrap().processes();
        all.map_or(0, |all| all.len())
    }

    /// A file of `/run/berth`, which is in the shim's mount namespace alone.
    pub fn run_berth(&self, name: &str) -> PathBuf {
        let root = PathBuf::from(format!("/proc/{}/root", self.shim_pid()));
        root.join(self.dir.strip_prefix("/").unwrap()).join(file::BERTH_DIR).join(name)
    }

    pub fn wait(&mut self) {
        let status = self.shim.take().unwrap().wait().unwrap();
        assert!(status.success(), "shim: {status}");
    }

    pub fn kill_shim(&mut self) {
        let mut shim = self.shim.take().unwrap();
        shim.kill().unwrap();
        shim.wait().unwrap();
    }

    /// What the container has written, all of it.
    pub fn output(&self) -> String {
        let mut text = String::new();
        for record in log::read_from(&self.dir.join(file::LOG_DIR), 1) {
            text.push_str(&String::from_utf8_lossy(&record.unwrap().bytes));
        }
        text
    }

    /// Runs to its end and returns what was written; any failure is the test's.
    pub fn succeed(&mut self) -> String {
        let exit = self.run();
        let output = self.output();
        assert_eq!(exit.outcome.exit_code, Some(0), "{exit:?}\n{output}");
        output
    }

    pub fn cgroups(&self) -> Vec<PathBuf> {
        let name = format!("{}.{}", self.task.pod, self.task.epoch);
        let at = |root: PathBuf| root.join(&self.task.cgroup_parent).join(&name);
        let roots = fs::read_dir("/sys/fs/cgroup").unwrap().flatten().map(|e| e.path());
        roots.chain([PathBuf::from("/sys/fs/cgroup")]).map(at).filter(|path| path.exists()).collect()
    }

    /// Nothing is left but the task, the log and the exit.
    pub fn assert_clean(&self) {
        assert_eq!(self.cgroups(), Vec::<PathBuf>::new());
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
        assert!(!mounts.contains(self.dir.to_str().unwrap()), "{mounts}");
        let mut left: Vec<String> = fs::read_dir(&self.dir)
            .unwrap()
            .flatten()
            .map(|entry| entry.file_name().into_string().unwrap())
            .filter(|name| !name.starts_with("exit-"))
            .collect();
        left.sort();
        assert_eq!(left, ["log", "shim.lock", "task.json"]);
    }
}

impl Drop for Pod {
    fn drop(&mut self) {
        if let Some(mut shim) = self.shim.take() {
            let _ = shim.kill();
            let _ = shim.wait();
        }
        berth_agent::shim::clean_up(&self.task, &self.dir).unwrap();
        // The last test's pod takes the common parent with it.
        for root in fs::read_dir("/sys/fs/cgroup").unwrap().flatten() {
            let _ = fs::remove_dir(root.path().join(&self.task.cgroup_parent));
        }
        let _ = fs::remove_dir(Path::new("/sys/fs/cgroup").join(&self.task.cgroup_parent));
    }
}

impl Agent {
    pub fn order(&mut self, order: &Order) {
        let mut line = serde_json::to_vec(order).unwrap();
        line.push(b'\n');
        self.reader.get_mut().write_all(&line).unwrap();
    }

    pub fn report(&mut self) -> Report {
        let mut line = String::new();
        self.reader.read_line(&mut line).unwrap();
        assert!(!line.is_empty(), "the shim has hung up");
        serde_json::from_str(&line).unwrap()
    }

    /// The next report that `wanted` takes.
    pub fn until<T>(&mut self, mut wanted: impl FnMut(Report) -> Option<T>) -> T {
        loop {
            if let Some(found) = wanted(self.report()) {
                return found;
            }
        }
    }

    pub fn exited(&mut self) -> Exit {
        self.until(|report| match report {
            Report::Exited { exit } => Some(exit),
            _ => None,
        })
    }

    pub fn running(&mut self) {
        self.until(|report| matches!(report, Report::Running { .. }).then_some(()))
    }

    pub fn paused(&mut self) -> bool {
        self.until(|report| match report {
            Report::Paused { fenced, .. } => Some(fenced),
            _ => None,
        })
    }
}

/// `ms` from now, longer on a slow machine: a pod must have begun within the shortest of them.
pub fn lease(ms: u64) -> Lease {
    let ms = ms * u64::from(slowness());
    Lease { deadline: Some(sys::boot_now().plus(Millis(ms))) }
}

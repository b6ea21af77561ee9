//! One pod without an agent: its directory and its shim, driven as an agent would. What is measured here is the shim's
//! and criu's, and nothing else's.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use berth_agent::shim::{self, control};
use berth_agent::task::{Lease, Order, Report, Root, Saved, Task, file};
use berth_protocol::ids::{Epoch, JobUid, NodeId, Run};
use berth_protocol::job;
use berth_protocol::units::{Bytes, Millis};
use serde_json::Value;

use super::process::until;
use super::world::program;

/// In which anything must have happened.
const LIMIT: Duration = Duration::from_secs(60);

pub struct Pod {
    task: Task,
    dir: PathBuf,
    shim: Option<Child>,
    agent: Option<BufReader<UnixStream>>,
}

/// A checkpoint that was taken.
pub struct Taken {
    pub saved: Saved,
    /// From the order to the shim's word, in milliseconds.
    pub ms: f64,
}

impl Pod {
    /// A pod of the job file `job`, one container on a view of this machine's root, saved by `criu`; not yet begun.
    /// What it has on disk is below `dir`.
    pub fn new(dir: &Path, criu: &Path, job: &Value) -> Result<Self> {
        let mut file = job.clone();
        (file["name"], file["image"]) = ("bench".into(), "host".into());
        let parsed = job::parse(file.to_string().as_bytes(), None).map_err(|e| anyhow!("{e:?}"))?;
        let task = Task {
            node: NodeId::parse("bench")?,
            pod: JobUid::parse(&format!("b{}", std::process::id()))?.pod(0),
            epoch: Epoch(1),
            run: Run(1),
            template: parsed.spec.pod,
            roots: vec![Root::Host],
            volumes: Vec::new(),
            workspace: None,
            devices: Vec::new(),
            network: None,
            cgroup_parent: PathBuf::from(format!("berth-bench-{}", std::process::id())),
            log_bytes_max: Bytes(16 << 20),
            scratch_bytes_max: Bytes(8 << 30),
            criu: Some(criu.to_owned()),
            own_users: true,
            restore: false,
            restarts: 0,
        };
        Self::of(task, &dir.join("pods"))
    }

    fn of(task: Task, pods: &Path) -> Result<Self> {
        let dir = pods.join(format!("{}.{}", task.pod, task.epoch));
        fs::create_dir_all(&dir)?;
        Ok(Self { task, dir, shim: None, agent: None })
    }

    /// From the shim's start until the program runs, in milliseconds.
    pub fn start(&mut self) -> Result<f64> {
        fs::write(self.dir.join(file::TASK), serde_json::to_vec(&self.task)?)?;
        let begun = Instant::now();
        let mut command = Command::new(program("berth-agent")?);
        let shim = command.arg("shim").arg(&self.dir).stdin(Stdio::null()).spawn()?;
        self.shim = Some(shim);
        let stream = until("the shim's socket", LIMIT, || control::connect(&self.dir).ok())?;
        stream.set_read_timeout(Some(LIMIT))?;
        self.agent = Some(BufReader::new(stream));
        self.order(&Order::Start { lease: Lease { deadline: None } })?;
        self.until(|report| match report {
            Report::Running { .. } => Some(Ok(())),
            Report::Exited { exit } => Some(Err(format!("{:?}", exit.outcome))),
            _ => None,
        })?;
        Ok(begun.elapsed().as_secs_f64() * 1e3)
    }

    /// With `hold` it stands still afterwards.
    pub fn save(&mut self, level: u64, hold: bool) -> Result<Taken> {
        let begun = Instant::now();
        self.order(&Order::Save { level, hold })?;
        let saved = self.until(|report| match report {
            Report::Saved { saved, .. } if saved.level == level => Some(Ok(saved)),
            Report::SaveFailed { why, .. } => Some(Err(why)),
            _ => None,
        })?;
        Ok(Taken { saved, ms: begun.elapsed().as_secs_f64() * 1e3 })
    }

    /// Where a checkpoint's images lie.
    pub fn images(&self, level: u64) -> PathBuf {
        let name = &self.task.template.containers[0].name;
        self.checkpoint(level).join("containers").join(name.as_str()).join("images")
    }

    fn checkpoint(&self, level: u64) -> PathBuf {
        self.dir.join(file::CHECKPOINTS_DIR).join(level.to_string())
    }

    pub fn forget(&self, level: u64) -> Result<()> {
        Ok(fs::remove_dir_all(self.checkpoint(level))?)
    }

    /// Ends it, and makes its next epoch, to begin from that checkpoint.
    pub fn next(mut self, level: u64) -> Result<Self> {
        self.end()?;
        let mut task = self.task.clone();
        (task.epoch, task.restore) = (task.epoch.next(), true);
        let next = Self::of(task, self.dir.parent().context("a pod's directory lies in another")?)?;
        fs::rename(self.checkpoint(level), next.dir.join(file::RESTORE_DIR))?;
        fs::remove_dir_all(&self.dir)?;
        Ok(next)
    }

    fn end(&mut self) -> Result<()> {
        self.order(&Order::Stop { grace: Millis::ZERO })?;
        self.until(|report| matches!(report, Report::Exited { .. }).then_some(Ok(())))?;
        let status = self.shim.take().context("it was not begun")?.wait()?;
        ensure!(status.success(), "the shim ended with {status}");
        Ok(())
    }

    /// What it has written so far.
    pub fn output(&self) -> Result<String> {
        let mut text = String::new();
        for record in shim::log::read_from(&self.dir.join(file::LOG_DIR), 1) {
            text.push_str(&String::from_utf8_lossy(&record?.bytes));
        }
        Ok(text)
    }

    fn order(&mut self, order: &Order) -> Result<()> {
        let mut line = serde_json::to_vec(order)?;
        line.push(b'\n');
        Ok(self.agent.as_mut().context("it was not begun")?.get_mut().write_all(&line)?)
    }

    fn until<T>(&mut self, wanted: impl Fn(Report) -> Option<Result<T, String>>) -> Result<T> {
        let agent = self.agent.as_mut().context("it was not begun")?;
        loop {
            let mut line = String::new();
            ensure!(agent.read_line(&mut line)? > 0, "the shim has hung up");
            match wanted(serde_json::from_str(&line)?) {
                Some(Ok(found)) => return Ok(found),
                Some(Err(why)) => bail!("{why}"),
                None => {}
            }
        }
    }
}

impl Drop for Pod {
    fn drop(&mut self) {
        if let Some(mut shim) = self.shim.take() {
            let _ = shim.kill();
            let _ = shim.wait();
        }
        if let Err(error) = shim::clean_up(&self.task, &self.dir) {
            eprintln!("bench: {error}");
        }
    }
}
